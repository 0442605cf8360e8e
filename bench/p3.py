"""T0's split of P3 (Public Pool of Prompts; Sanh et al. 2022): a task is a data set and a template.

A row of COPA's, and one of promptsource's templates for it (input ||| target):

    {"premise": "The sun rose.", "choice1": "It got warm.", "choice2": "It got dark.",
     "question": "effect", "label": 0}

    0edd8660-f299-4819-a5ac-633c11177228: !Template
      name: exercise
      answer_choices: '{{choice1}} ||| {{choice2}}'
      jinja: "Exercise: choose the most plausible alternative. {{ premise }}
        {% if question == "cause" %} because... {% else %} so... {% endif %}
        - {{choice1}} - {{choice2}} ||| {% if label != -1 %}{{ answer_choices[label] }}{%endif%}"
      metadata: !TemplateMetadata {original_task: true, metrics: [Accuracy]}

The hypernetwork reads the template, with names for fields; the student reads the row's fields;
teachers read both as one prompt, "Exercise: .. The sun rose. so... - It got warm. - It got dark."
"""
import contextlib
import functools
import glob
import itertools
import os
import random
import re
import statistics
from collections import Counter
from dataclasses import dataclass

import yaml
from jinja2 import StrictUndefined, nodes, pass_context
from jinja2.sandbox import SandboxedEnvironment

from common import UserError, named_file, read_json_lines, read_yaml

GET_PROMPTSOURCE = "git clone --depth 1 https://github.com/bigscience-workshop/promptsource"
LONGEST_FIELD = 2048                        # characters; promptsource and T0 cut a field there
PIPES = "3ed2dface8203c4c9dfb1a5dc58e41e0"  # for "|||" in a row's own text, as in promptsource

TRAIN = (
    "adversarial_qa/dbert adversarial_qa/dbidaf adversarial_qa/droberta ag_news amazon_polarity "
    "app_reviews cnn_dailymail/3.0.0 common_gen cosmos_qa dbpedia_14 dream duorc/ParaphraseRC "
    "duorc/SelfRC gigaword glue/mrpc glue/qqp imdb kilt_tasks/hotpotqa multi_news "
    "paws/labeled_final qasc quarel quartz quoref ropes rotten_tomatoes samsum sciq social_i_qa "
    "trec wiki_bio wiki_hop/original wiki_qa wiqa xsum yelp_review_full").split()

TEST = {                                    # task -> data set
    "anli_r1": "anli", "anli_r2": "anli", "anli_r3": "anli", "hellaswag": "hellaswag",
    "cb": "super_glue/cb", "copa": "super_glue/copa", "rte": "super_glue/rte",
    "wic": "super_glue/wic", "wsc": "super_glue/wsc.fixed",
    "winogrande": "winogrande/winogrande_xl", "story_cloze": "story_cloze/2016",
}
HELD_OUT = re.compile(                      # finds the name of such a data set in a task's name
    "anli|hellaswag|winogrande|story_?cloze|copa|wsc|wic(?![a-z])|(?<![a-z])(cb|rte)(?![a-z])",
    re.IGNORECASE)

NLI = {"e": 0, "n": 1, "c": 2, "entailment": 0, "neutral": 1, "contradiction": 2}
LABELS = {                                  # task -> label in words -> the templates' number
    "anli_r1": NLI, "anli_r2": NLI, "anli_r3": NLI,
    "cb": {"entailment": 0, "contradiction": 1, "neutral": 2},
    "rte": {"entailment": 0, "not_entailment": 1},
    "wic": {"false": 0, "true": 1}, "wsc": {"false": 0, "true": 1},
}
LABEL_FIELD = {"winogrande": "answer", "story_cloze": "answer_right_ending"}    # else label


# ---------------------------------------------------------------------------------------- templates

class _Loader(yaml.SafeLoader):
    """Reads promptsource's tags as plain mappings; any other tag is an error, nothing is run."""


for _tag in ("!Template", "!TemplateMetadata"):
    _Loader.add_constructor(_tag, lambda loader, node: loader.construct_mapping(node, deep=True))


@pass_context
def _choice(context, choices):
    return context["_rng"].choice(list(choices))


def _most_frequent(items):
    counts = Counter(items)
    return [item for item, n in counts.items() if n == max(counts.values())]


ENVIRONMENT = SandboxedEnvironment(undefined=StrictUndefined)
ENVIRONMENT.globals["zip"] = zip
ENVIRONMENT.filters |= {"choice": _choice, "most_frequent": _most_frequent}


@dataclass
class Template:
    dataset: str                            # its folder, such as super_glue/copa
    name: str
    jinja: str                              # input ||| target
    answer_choices: str | None = None       # choice ||| choice ...; None: open-ended
    for_evaluation: bool = False            # T0 evaluates with it: the original task, by accuracy

    @property
    def fields(self) -> list[str] | None:
        """The row's fields that the student reads; None: it reads the prompt instead."""
        return listed_fields().get((self.dataset, self.name))

    @functools.cached_property
    def _compiled(self):
        with self._blamed():
            cut = f" | string | truncate({LONGEST_FIELD}) }}}}"         # as promptsource does it
            prompt = ENVIRONMENT.from_string(self.jinja.replace("}}", cut))
            return prompt, ENVIRONMENT.from_string(self.answer_choices or "")

    def render(self, row: dict, number: int = 0) -> tuple[str, str, list[str]] | None:
        """(input, target, answer choices or []) for row `number`; None where it does not apply.

        It does not apply, as in T0, where it renders without an input or without a target, or in
        more than two pieces. Random choices in a template are a function of template and row
        number. Raises UserError, naming data set, template and row, where it fails.
        """
        prompt, answers = self._compiled
        seed = f"{self.dataset} {self.name} {number}"
        fields = {key: x.replace("|||", PIPES) if isinstance(x, str) else x
                  for key, x in row.items()}
        with self._blamed(number):
            choices = None
            if self.answer_choices is not None:
                fields["_rng"] = random.Random(seed)
                choices = [choice.strip() for choice in answers.render(fields).split("|||")]
            fields |= {"answer_choices": choices, "_rng": random.Random(seed)}
            parts = [part.strip() for part in prompt.render(fields).split("|||")]
        if len(parts) != 2 or not all(parts):
            return None
        text, target, *choices = (x.replace(PIPES, "|||") for x in [*parts, *(choices or [])])
        return text, target, choices

    @contextlib.contextmanager
    def _blamed(self, number=None):
        """Within: what the template does wrong becomes one line that names it, and the row."""
        try:
            yield
        except Exception as error:
            row = f", row {number}" if number is not None else ""
            reason = " ".join(str(error).split())[:200]
            raise UserError(
                f"{self.dataset}, template '{self.name}'{row}: {type(error).__name__}: {reason}; "
                "the row needs every field that the template names, in the data set's original "
                "form") from None

    @functools.cached_property
    def text(self) -> str:
        """The template as an instruction: its input, with names for the row's fields, and choices.

        Both sides of a condition are in it: "premise because... / so... - choice1 - choice2".
        """
        with self._blamed():
            choices, answers = [], ""
            if self.answer_choices is not None:
                text = _in_words(ENVIRONMENT.parse(self.answer_choices), [])
                choices = [choice.strip() for choice in text.split("|||")]
                answers = f"\nAnswers: {', '.join(choices)}"
            text = _in_words(ENVIRONMENT.parse(self.jinja), choices)
            return text.partition("|||")[0].strip() + answers


def own_variables(tree) -> dict:
    """{variable that a template sets or loops with: the expression that it stands for}."""
    own = {}
    for n in tree.find_all((nodes.Assign, nodes.For)):
        for target in [n.target, *n.target.find_all(nodes.Name)]:
            if isinstance(target, nodes.Name):
                own.setdefault(target.name, n.node if isinstance(n, nodes.Assign) else n.iter)
    return own


def _in_words(node, choices: list[str], own: dict | None = None) -> str:
    """The text of a parsed template, with a field's name where it shows the field.

    choices: its answer choices in words, [] where it has none; own: its `own_variables`.
    """
    if own is None:
        own = own_variables(node)
    words = functools.partial(_in_words, choices=choices, own=own)      # of a part of this node

    match node:
        case None | nodes.Assign() | nodes.AssignBlock():
            return ""
        case nodes.TemplateData():
            return node.data
        case nodes.Const():
            return str(node.value)

        # a name is that of the answer choices, of a variable of the template's own, or of a field
        case nodes.Name(name="answer_choices") if choices:
            return " / ".join(choices)
        case nodes.Name(name=name) if name in own:
            others = {key: own[key] for key in own if key != name}      # it may name itself
            return _in_words(own[name], choices, others)
        case nodes.Name():
            return node.name

        # answer_choices[0], answer_choices | join(' or '), ' or '.join(answer_choices)
        case nodes.Getitem(node=nodes.Name(name="answer_choices"),
                           arg=nodes.Const(value=int(n))) if n < len(choices):
            return choices[n]
        case (nodes.Filter(name="join", node=x, args=[glue, *_])
              | nodes.Call(node=nodes.Getattr(node=glue, attr="join"), args=[x, *_])):
            if choices and isinstance(x, nodes.Name) and x.name == "answer_choices":
                return words(glue).join(choices)
            return words(x)

        # x['text'] and x.text keep the key; x[0], x.split(), range(x), x | lower do not
        case (nodes.Getattr(node=x, attr=key)
              | nodes.Getitem(node=x, arg=nodes.Const(value=str(key)))):
            return f"{words(x)}.{key}"
        case (nodes.Call(node=nodes.Getattr(node=x)) | nodes.Call(node=x)
              | nodes.Getitem(node=x) | nodes.Filter(node=x)):
            return words(x)

        # each side of a condition that says something; a target in them is cut off
        case nodes.If():
            bodies = [node.body, *(n.body for n in node.elif_), node.else_]
            sides = ["".join(map(words, body)) for body in bodies]
            heads = [side.partition("|||")[0].strip() for side in sides if side.strip()]
            end = "|||" if "|||" in "".join(sides) else ""
            return f" {' / '.join(heads)} {end}" if heads else ""
        case nodes.CondExpr():
            return " / ".join(words(n) for n in (node.expr1, node.expr2) if n is not None)
        case nodes.For():
            return "".join(map(words, node.body))
        case nodes.List() | nodes.Tuple():
            return ", ".join(dict.fromkeys(map(words, node.items)))
        case nodes.Output():                # {{x[0] | upper}}{{x[1:]}} is x, once
            return "".join(text for text, _ in itertools.groupby(map(words, node.nodes)))
        case nodes.Template() | nodes.Concat() | nodes.Add():
            return "".join(map(words, node.iter_child_nodes()))
    return " ".join(filter(None, map(words, node.iter_child_nodes())))


@functools.cache
def listed_fields() -> dict[tuple[str, str], list[str]]:
    """{(data set, template): the fields that its student reads}, as p3_fields.yaml lists them."""
    path = os.path.join(os.path.dirname(os.path.abspath(__file__)), "p3_fields.yaml")
    listed = {}
    for dataset, groups in read_yaml(path, "restore it from the repository")["fields"].items():
        for fields, names in groups.items():
            for name in names:
                listed[dataset, name] = fields.split()
    return listed


def load_templates(root: str) -> dict[str, list[Template]]:
    """{data set: its templates} of every templates.yaml in a folder.

    A data set is named by its subfolder (super_glue/rte). Raises UserError for a missing folder,
    broken YAML, a tag that is not promptsource's, a template without name or text.
    """
    found = {}
    remedy = ("promptsource's templates are in the folder promptsource/templates of "
              + GET_PROMPTSOURCE)
    for path in sorted(glob.glob(f"{glob.escape(root)}/**/templates.yaml", recursive=True)):
        dataset = os.path.relpath(os.path.dirname(path), root).replace(os.sep, "/")
        with named_file(path, remedy), open(path, encoding="utf-8") as f:
            content = yaml.load(f, _Loader)
            try:
                records = content.get("templates").values()
                found[dataset] = [_template_of(dataset, record) for record in records]
            except (AttributeError, TypeError):
                raise ValueError("expected `templates:` with a !Template for every id") from None
    if not found:
        raise UserError(f"{root} holds no templates.yaml; {remedy}")
    return found


def _template_of(dataset: str, record: dict) -> Template:
    metadata = record.get("metadata") or {}
    metrics = metadata.get("metrics") or ()
    return Template(dataset, record["name"], record["jinja"], record.get("answer_choices"),
                    bool(metadata.get("original_task")) and "Accuracy" in metrics)


# -------------------------------------------------------------------------------------------- tasks

def load(root: str, split: str = "test", max_instances: int | None = None,
         p3_input: str = "fields", skip: int = 0) -> list[dict]:
    """A task for every data set and template of T0's split, with rows skip : skip + max_instances.

        root/templates/super_glue/rte/templates.yaml    promptsource's folder of templates
        root/rte/validation.jsonl                       rows in the data set's own form
        root/imdb/train.jsonl                           (super_glue/rte/… is found as well)
        root/prompted/imdb_Reviewer_Enjoyment.jsonl     prompted ones: {"prompt", "completion"}

    split: test (the held-out tasks that are there, with T0's evaluation templates) or train (all
    templates of the 36 data sets). p3_input: a row's input is its "fields" that the template shows
    or the whole "prompt", which is the only choice for prompted rows and for templates that
    p3_fields.yaml does not list. A row to which a template does not apply is left out. A task:

        {"name": "rte: can we infer", "category": "rte", "instruction": the template's text,
         "instances": [{"id": "rte-0", "input": .., "output": .., "prompt": .., "choices": (..)}]}

    Raises UserError, naming data set, template and row, for what cannot be rendered, a label
    outside the choices, a file that is not JSON lines, and where no task is there.
    """
    if split not in ("train", "test"):
        raise UserError(f"P3 has the splits train and test here, no {split}")
    templates = load_templates(os.path.join(root, "templates"))
    end = None if max_instances is None else skip + max_instances
    tasks = []
    for name, dataset in TEST.items() if split == "test" else zip(TRAIN, TRAIN):
        rows = read_rows(root, name, dataset, "validation" if split == "test" else "train")
        for template in templates.get(dataset, []):
            if split == "test" and not template.for_evaluation:
                continue
            if rows is None and split == "train":
                instances = prompted_instances(root, template)
            else:
                instances = rendered_instances(name, template, rows or [], p3_input)
            instances = list(itertools.islice(instances, skip, end))    # the rest isn't rendered
            if instances:
                tasks.append({"name": f"{name}: {template.name}", "category": name,
                              "instruction": template.text, "instances": instances})
    if not tasks:
        example = "rte/validation.jsonl" if split == "test" else "imdb/train.jsonl"
        raise UserError(f"{root} has no rows of T0's {split} data sets; put them into "
                        f"{root}/{example} and the like (docs/p3.md)")
    return tasks


def training_files(root: str) -> list[str]:
    """The files there that the training split is made of, in the order in which they are hashed."""
    files = [f"{root}/templates/{dataset}/templates.yaml" for dataset in TRAIN]
    files += [f"{root}/{dataset}/train.jsonl" for dataset in TRAIN]
    files += sorted(glob.glob(f"{glob.escape(root)}/*prompted*/*.jsonl"))
    return [file for file in files if os.path.isfile(file)]


def held_out_names(names: list[str]) -> list[str]:
    """Those of these names of training tasks that hold the name of a data set in TEST."""
    return [name for name in names if HELD_OUT.search(name)]


def read_rows(root: str, name: str, dataset: str, split: str) -> list[dict] | None:
    """Rows of a data set with labels as integers, None where there are none."""
    # ANLI's three rounds are one data set to promptsource, so its folder cannot hold their rows
    for folder in [name] if dataset == "anli" else [name, dataset]:
        path = os.path.join(root, folder, split + ".jsonl")
        if os.path.isfile(path):
            remedy = "rows are JSON objects with the data set's own field names, one a line"
            rows = read_json_lines(path, remedy)
            return [with_plain_label(name, row, f"{path}, row {n}") for n, row in enumerate(rows)]
    return None


def with_plain_label(name: str, row: dict, where: str) -> dict:
    """The row as templates want it: its label a number, where SuperGLUE has true or a word."""
    if isinstance(row.get("target"), dict):     # WSC's spans
        row = row | row["target"]
    if name not in TEST:
        return row
    key = LABEL_FIELD.get(name, "label")
    label = row.get(key)
    if label in ("", None, -1, "-1"):
        raise UserError(f"{where}: no {key}: the labels of this split are hidden; "
                        "use the validation split")
    if isinstance(label, bool):
        label = int(label)
    elif isinstance(label, str) and name in LABELS and not label.isdigit():
        if label.lower() not in LABELS[name]:
            raise UserError(f"{where}: label '{label}' is none of {', '.join(LABELS[name])}")
        label = LABELS[name][label.lower()]
    elif isinstance(label, str) and key == "label" and label.removeprefix("-").isdigit():
        label = int(label)
    return row | {key: label}


def rendered_instances(name: str, template: Template, rows: list[dict], p3_input: str):
    """Yields an instance for every row to which the template applies."""
    for n, row in enumerate(rows):
        rendered = template.render(row, n)
        if rendered is None:
            continue
        prompt, target, choices = rendered
        if name in TEST and target not in choices:
            raise UserError(f"{template.dataset}, template '{template.name}', row {n}: "
                            f"the answer '{target}' is none of the choices {choices}")
        text = prompt
        if p3_input == "fields" and template.fields:
            there = [key for key in template.fields if key in row]
            text = " ".join(f"{key}: {field_text(row[key])}" for key in there)
        yield {"id": f"{name}-{n}", "input": text, "output": target, "prompt": prompt,
               "choices": tuple(choices)}


def field_text(value) -> str:
    if isinstance(value, dict):
        return "; ".join(f"{key}: {field_text(x)}" for key, x in value.items())
    if isinstance(value, list):
        return ", ".join(map(field_text, value))
    return " ".join(str(value)[:LONGEST_FIELD].split())


def prompted_instances(root: str, template: Template) -> list[dict]:
    """Rows already prompted with this template: of the file in root/*prompted*/ named after it."""
    def plain(name):
        return re.sub("[^A-Za-z0-9]+", "_", name)

    paths = sorted(glob.glob(f"{glob.escape(root)}/*prompted*/*.jsonl"))
    own = plain(f"{template.dataset}_{template.name}")
    named = [x for x in paths if plain(os.path.basename(x).removesuffix(".jsonl")) == own]
    if not named or os.path.getsize(named[0]) == 0:
        return []
    rows = read_json_lines(named[0], "rows are JSON objects with prompt and completion",
                           prompt=str, completion=str)
    instances = []
    for n, row in enumerate(rows):
        prompt = row["prompt"].strip()
        target = row["completion"].removesuffix("<|endoftext|>").strip()
        if prompt and target:
            instances.append({"id": f"{template.dataset}-{n}", "input": prompt, "output": target,
                              "prompt": prompt, "choices": ()})
    return instances


# ----------------------------------------------------------------------------------------- averages

HYPERT5 = [name for name in TEST if not name.startswith("anli") and name != "story_cloze"]
AVERAGES = {                                # average -> its parts; a part: tasks that count as one
    "MTest11": [(name,) for name in TEST],
    "HyperT5": [("anli_r1", "anli_r2", "anli_r3"), *((name,) for name in HYPERT5)],
}


def summarize(by_template: dict) -> dict:
    """Each task's mean, median and spread over templates, and the averages.

    by_template: {"rte: can we infer": accuracy, ..}. An average takes the parts that are there
    whole, and says how many of how many that is.
    """
    accuracies = {}                         # task -> its templates' accuracies
    for name, accuracy in by_template.items():
        accuracies.setdefault(name.partition(": ")[0], []).append(accuracy)
    tasks, averages = {}, {}
    for task, x in accuracies.items():
        tasks[task] = {"mean": statistics.fmean(x), "median": statistics.median(x),
                       "min": min(x), "max": max(x), "templates": len(x)}
    for average, parts in AVERAGES.items():
        whole = [part for part in parts if all(task in tasks for task in part)]
        means = [statistics.fmean(tasks[task]["mean"] for task in part) for part in whole]
        averages[average] = {"mean": statistics.fmean(means) if means else None,
                             "over": len(means), "of": len(parts)}
    return {"tasks": tasks, "averages": averages}
