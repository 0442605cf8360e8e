"""promptsource's prompt templates: read without running code, rendered in a sandbox.

One template of templates/super_glue/copa/templates.yaml (https://github.com/bigscience-workshop/promptsource):

    0edd8660-f299-4819-a5ac-633c11177228: !Template
      name: exercise
      answer_choices: '{{choice1}} ||| {{choice2}}'
      jinja: "Exercise: choose the most plausible alternative. {{ premise }} {% if question == "cause" %} because...
        {% else %} so... {% endif %} - {{choice1}} - {{choice2}} ||| {% if label != -1 %}{{ answer_choices[label] }}{%endif%}"
      metadata: !TemplateMetadata {original_task: true, metrics: [Accuracy]}
"""
import functools
import glob
import os
import random
from collections import Counter
from dataclasses import dataclass

import yaml
from jinja2 import StrictUndefined, TemplateError, nodes, pass_context
from jinja2.sandbox import SandboxedEnvironment

from common import UserError, named_file

GET_PROMPTSOURCE = "git clone --depth 1 https://github.com/bigscience-workshop/promptsource"
LONGEST_FIELD = 2048                            # characters of a field in a prompt; promptsource and T0 cut there
PIPES = "3ed2dface8203c4c9dfb1a5dc58e41e0"      # stands for "|||" in a row's own text, as in promptsource


class _Loader(yaml.SafeLoader):
    """Plain mappings for promptsource's tags; any other tag is an error, and nothing is ever constructed."""


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
    dataset: str                                # its folder, such as super_glue/copa
    name: str
    jinja: str                                  # input ||| target
    answer_choices: str | None = None           # choice ||| choice ...; None: open-ended
    original_task: bool = False                 # asks what the data set was made for
    metrics: tuple = ()

    @property
    def for_evaluation(self) -> bool:
        """Whether T0 evaluates with it: its list holds just these."""
        return self.original_task and "Accuracy" in self.metrics

    @functools.cached_property
    def _compiled(self):
        with self._blamed():
            jinja = self.jinja.replace("}}", f" | string | truncate({LONGEST_FIELD}) }}}}")        # as promptsource does it
            return ENVIRONMENT.from_string(jinja), ENVIRONMENT.from_string(self.answer_choices or "")

    def render(self, row: dict, number: int = 0) -> tuple[str, str, list[str]] | None:
        """(input, target, answer choices or []) for row `number`; None where the template does not apply to it.

        It does not apply, as in T0, where it renders without an input or without a target. Random choices in a template
        are a function of template and row number. Raises UserError, naming data set, template and row, where it fails.
        """
        prompt, answers = self._compiled
        fields = {k: v.replace("|||", PIPES) if isinstance(v, str) else v for k, v in row.items()}
        with self._blamed(number):
            choices = None
            if self.answer_choices is not None:
                fields["_rng"] = random.Random(f"{self.dataset} {self.name} {number}")
                choices = [text.strip() for text in answers.render(fields).split("|||")]
            fields |= {"answer_choices": choices, "_rng": random.Random(f"{self.dataset} {self.name} {number}")}
            parts = [part.strip().replace(PIPES, "|||") for part in prompt.render(fields).split("|||")]
        if len(parts) < 2 or not parts[0] or not parts[1]:
            return None
        return parts[0], parts[1], [choice.replace(PIPES, "|||") for choice in choices or []]

    def _blamed(self, number=None):
        return _Blame(f"{self.dataset}, template '{self.name}'" + (f", row {number}" if number is not None else ""))

    @functools.cached_property
    def text(self) -> str:
        """The template as an instruction: its input with the row's fields replaced by their names, and its answer choices.

        Both sides of a condition are told, with a slash between: "premise because... / so... - choice1 - choice2".
        """
        fixed = None
        with self._blamed():
            if self.answer_choices is not None:
                fixed = [choice.strip() for choice in _say(ENVIRONMENT.parse(self.answer_choices), None).split("|||")]
            prompt = _say(ENVIRONMENT.parse(self.jinja), fixed).partition("|||")[0].strip()
        return prompt + (f"\nAnswers: {', '.join(fixed)}" if fixed else "")

    @functools.cached_property
    def fields(self) -> list[str]:
        """Names of the row's fields that its input shows or depends on, directly or through the answer choices."""
        with self._blamed():
            prompt, answers = ENVIRONMENT.parse(self.jinja), ENVIRONMENT.parse(self.answer_choices or "")
            names, _ = _names(prompt.body)
            if "answer_choices" in names:
                names += [n.name for n in answers.find_all(nodes.Name)]
            local = {n.name for tree in (prompt, answers) for n in tree.find_all(nodes.Name) if n.ctx == "store"}
        return [name for name in dict.fromkeys(names) if name not in local | {"answer_choices", "zip", "range"}]


class _Blame:
    """Within: whatever a template does wrong becomes one line that says which."""

    def __init__(self, where):
        self.where = where

    def __enter__(self):
        return self

    def __exit__(self, kind, error, trace):
        if isinstance(error, (TemplateError, TypeError, ValueError, KeyError, IndexError, AttributeError, OverflowError)) \
                and not isinstance(error, UserError):
            raise UserError(f"{self.where}: {kind.__name__}: {' '.join(str(error).split())[:200]}; the row needs every field that "
                            "the template names, in the data set's original form") from None


def _say(node, choices) -> str:
    """The text of a parsed template with every expression replaced by the name of the field it shows."""
    match node:
        case nodes.TemplateData():
            return node.data
        case nodes.Name():
            return " / ".join(choices) if node.name == "answer_choices" and choices else node.name
        case nodes.Const():
            return str(node.value)
        case nodes.If():
            sides = [_say_all(node.body, choices), *(_say_all(n.body, choices) for n in node.elif_), _say_all(node.else_, choices)]
            sides = [side.split("|||") for side in sides if side.strip()]
            columns = [" / ".join(side[i].strip() for side in sides if i < len(side)) for i in range(max(map(len, sides), default=0))]
            return " ||| ".join(f" {column} " for column in columns)
        case nodes.CondExpr():
            return " / ".join(_say(n, choices) for n in (node.expr1, node.expr2) if n is not None)
        case nodes.For():
            return _say_all(node.body, choices)
        case nodes.Assign() | nodes.AssignBlock() | nodes.Compare() | nodes.Not() | nodes.And() | nodes.Or():
            return ""
        case nodes.Getitem():
            if _is_choices(node.node) and choices and isinstance(node.arg, nodes.Const) and node.arg.value in range(len(choices)):
                return choices[node.arg.value]
            return _say(node.node, choices) + (f".{node.arg.value}" if isinstance(node.arg, nodes.Const)
                                               and isinstance(node.arg.value, str) else "")
        case nodes.Getattr():
            return f"{_say(node.node, choices)}.{node.attr}"
        case nodes.Call() if isinstance(node.node, nodes.Getattr) and node.node.attr == "join" and node.args:
            return _say(node.node.node, choices).join(choices if _is_choices(node.args[0]) and choices else
                                                      [_say(node.args[0], choices)])
        case nodes.Call():
            return _say(node.node.node if isinstance(node.node, nodes.Getattr) else node.node, choices)
        case nodes.Filter():
            if node.name == "join" and _is_choices(node.node) and choices and node.args:
                return _say(node.args[0], choices).join(choices)
            return _say(node.node, choices) if node.node is not None else ""
        case nodes.Tuple() | nodes.List():
            return ", ".join(_say(n, choices) for n in node.items)
        case nodes.Template() | nodes.Output() | nodes.Concat() | nodes.Add():
            return _say_all(node.iter_child_nodes(), choices)
    return " ".join(filter(None, (_say(n, choices) for n in node.iter_child_nodes())))


def _say_all(children, choices):
    return "".join(_say(n, choices) for n in children)


def _is_choices(node):
    return isinstance(node, nodes.Name) and node.name == "answer_choices"


def _names(children) -> tuple[list[str], bool]:
    """(names used up to the "|||" between input and target, whether that was met)."""
    names, met = [], False
    for node in children:
        match node:
            case nodes.TemplateData():
                met = "|||" in node.data
            case nodes.Output():
                more, met = _names(node.nodes)
                names += more
            case nodes.If():
                names += [n.name for n in [node.test, *node.test.find_all(nodes.Name)] if isinstance(n, nodes.Name)]
                for branch in (node.body, node.elif_, node.else_):
                    more, inside = _names(branch)
                    names, met = names + more, met or inside
            case nodes.For():
                names += [n.name for n in [node.iter, *node.iter.find_all(nodes.Name)] if isinstance(n, nodes.Name)]
                more, met = _names(node.body)
                names += more
            case _:
                names += [n.name for n in [node, *node.find_all(nodes.Name)] if isinstance(n, nodes.Name)]
        if met:
            break
    return names, met


def load_templates(root: str) -> dict[str, list[Template]]:
    """{data set: its templates} of every templates.yaml in a folder; a data set is named by its subfolder (super_glue/rte).

    Raises UserError for a missing folder, broken YAML, a tag that is not promptsource's, a template without name or text.
    """
    found, remedy = {}, f"promptsource's templates are in the folder promptsource/templates of {GET_PROMPTSOURCE}"
    for path in sorted(glob.glob(f"{glob.escape(root)}/**/templates.yaml", recursive=True)):
        dataset = os.path.relpath(os.path.dirname(path), root).replace(os.sep, "/")
        with named_file(path, remedy):
            with open(path, encoding="utf-8") as f:
                records = yaml.load(f, _Loader)["templates"].values()                         # a SafeLoader: builds plain data
            found[dataset] = []
            for record in records:
                metadata = record.get("metadata") or {}
                found[dataset].append(Template(dataset, record["name"], record["jinja"], record.get("answer_choices"),
                                               bool(metadata.get("original_task")), tuple(metadata.get("metrics") or ())))
    if not found:
        raise UserError(f"{root} holds no templates.yaml; {remedy}")
    return found
