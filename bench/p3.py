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
import glob
import itertools
import os
import re
import statistics

from bench.records import read_json_lines
from bench.templates import LONGEST_FIELD, Template, load_templates
from common import UserError

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
