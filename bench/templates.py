"""promptsource's templates: read from YAML, rendered with rows, told in words as instructions.

A template is somebody else's program: bench/sandbox.py runs it within bounds.
"""
import contextlib
import functools
import glob
import itertools
import os
import random
from dataclasses import dataclass

import yaml
from jinja2 import nodes

from bench import yaml_files
from bench.records import brief, read_text
from bench.sandbox import ENVIRONMENT, STEP, TooMuch
from common import UserError, named_file, read_yaml

GET_PROMPTSOURCE = "git clone --depth 1 https://github.com/bigscience-workshop/promptsource"
LONGEST_FIELD = 2048                        # characters; promptsource and T0 cut a field there
PIPES = "3ed2dface8203c4c9dfb1a5dc58e41e0"  # for "|||" in a row's own text, as in promptsource


class _Loader(yaml_files.Loader):
    """Reads promptsource's tags as plain mappings; any other tag is an error, nothing is run."""


for _tag in ("!Template", "!TemplateMetadata"):
    _Loader.add_constructor(_tag, lambda loader, node: loader.construct_mapping(node, deep=True))


class Choices(list):
    """Answer choices, numbered from 0: Python's -1, for the last one, is a label out of range."""

    def __getitem__(self, n):
        if isinstance(n, bool) or isinstance(n, int) and n < 0:
            raise IndexError(n)
        return super().__getitem__(n)


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
        with self.blamed():
            cut = f" | shown | truncate({LONGEST_FIELD}) }}}}"          # as promptsource does it
            prompt = ENVIRONMENT.within_bounds(self.jinja.replace("}}", cut))
            choices = (self.answer_choices or "").replace("}}", " | shown }}")
            return prompt, ENVIRONMENT.within_bounds(choices)

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
        ENVIRONMENT.begin()
        with self.blamed(number):
            choices = None
            if self.answer_choices is not None:
                fields["_rng"] = random.Random(seed)
                text = ENVIRONMENT.render(answers, fields)
                choices = Choices(choice.strip() for choice in text.split("|||"))
            fields |= {"answer_choices": choices, "_rng": random.Random(seed)}
            text = ENVIRONMENT.render(prompt, fields)
            parts = [part.strip() for part in text.split("|||")]
        if len(parts) != 2 or not all(parts):
            return None
        text, target, *choices = (x.replace(PIPES, "|||") for x in [*parts, *(choices or [])])
        return text, target, choices

    @contextlib.contextmanager
    def blamed(self, number=None):
        """Within: what the template does wrong becomes one line that names it, and the row."""
        row = f", row {number}" if number is not None else ""
        try:
            yield
        except TooMuch as error:
            raise UserError(f"{self.dataset}, template '{self.name}'{row}: {error}; mend it, or "
                            "remove it from its templates.yaml") from None
        except Exception as error:
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
        ENVIRONMENT.begin()
        with self.blamed():
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
    text = _worded(node, choices, own)
    ENVIRONMENT.spend(10 * STEP + len(own) + len(text))     # variables of variables may double it
    return text


def _worded(node, choices: list[str], own: dict) -> str:
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
    remedy = "take promptsource/templates of " + GET_PROMPTSOURCE
    for path in sorted(glob.glob(f"{glob.escape(root)}/**/templates.yaml", recursive=True)):
        dataset = os.path.relpath(os.path.dirname(path), root).replace(os.sep, "/")
        text = read_text(path, remedy)
        with named_file(path, remedy):
            try:
                content = yaml_files.load(text, _Loader)
            except yaml.MarkedYAMLError as error:
                line = error.problem_mark.line + 1 if error.problem_mark else "?"
                raise ValueError(f"line {line}: {error.problem}") from None
            records = content.get("templates") if isinstance(content, dict) else None
            if not isinstance(records, dict):
                raise ValueError("expected `templates:` with a !Template for every id")
            found[dataset] = [_template_of(dataset, record) for record in records.values()]
            names = [template.name for template in found[dataset]]
            if len(set(names)) < len(names):
                name = next(name for name in names if names.count(name) > 1)
                raise ValueError(f"two templates are called {name}; a task is named after one")
    if not found:
        raise UserError(f"{root} holds no templates.yaml; {remedy}")
    return found


def _template_of(dataset: str, record) -> Template:
    if not isinstance(record, dict):
        raise ValueError("expected `templates:` with a !Template for every id")
    for key in ("name", "jinja", "answer_choices"):
        value = record.get(key)
        if not isinstance(value, str) and (value is not None or key != "answer_choices"):
            raise ValueError(f"a template has {brief(value)} for its {key}, no text")
    metadata = record.get("metadata")
    metadata = metadata if isinstance(metadata, dict) else {}
    metrics = metadata.get("metrics")
    by_accuracy = isinstance(metrics, list) and "Accuracy" in metrics
    return Template(dataset, record["name"], record["jinja"], record.get("answer_choices"),
                    metadata.get("original_task") is True and by_accuracy)
