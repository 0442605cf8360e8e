"""promptsource's prompt templates: read without running code, rendered in a sandbox.

One template of templates/super_glue/copa/templates.yaml (https://github.com/bigscience-workshop/promptsource):

    0edd8660-f299-4819-a5ac-633c11177228: !Template
      name: exercise
      answer_choices: '{{choice1}} ||| {{choice2}}'
      jinja: "Exercise: choose the most plausible alternative. {{ premise }} {% if question == "cause" %} because...
        {% else %} so... {% endif %} - {{choice1}} - {{choice2}} ||| {% if label != -1 %}{{ answer_choices[label] }}{%endif%}"
      metadata: !TemplateMetadata {original_task: true, metrics: [Accuracy]}
"""
import contextlib
import functools
import glob
import os
import random
from collections import Counter
from dataclasses import dataclass

import yaml
from jinja2 import StrictUndefined, nodes, pass_context
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

        It does not apply, as in T0, where it renders without an input or without a target, or in
        more than two pieces. Random choices in a template are a function of template and row
        number. Raises UserError, naming data set, template and row, where it fails.
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
        if len(parts) != 2 or not parts[0] or not parts[1]:
            return None
        return parts[0], parts[1], [choice.replace(PIPES, "|||") for choice in choices or []]

    @contextlib.contextmanager
    def _blamed(self, number=None):
        """Within: whatever the template does wrong becomes one line that says which, and for which row."""
        try:
            yield
        except Exception as error:
            where = f"{self.dataset}, template '{self.name}'" + (f", row {number}" if number is not None else "")
            raise UserError(f"{where}: {type(error).__name__}: {' '.join(str(error).split())[:200]}; the row needs every field that "
                            "the template names, in the data set's original form") from None

    @functools.cached_property
    def text(self) -> str:
        """The template as an instruction: its input with the row's fields replaced by their names, and its answer choices.

        Both sides of a condition are told, with a slash between: "premise because... / so... - choice1 - choice2".
        """
        with self._blamed():
            choices = None
            if self.answer_choices is not None:
                tree = ENVIRONMENT.parse(self.answer_choices)
                choices = [choice.strip() for choice in _Teller(tree).say(tree).split("|||")]
            tree = ENVIRONMENT.parse(self.jinja)
            prompt = _Teller(tree, choices).say(tree).partition("|||")[0].strip()
        return prompt + (f"\nAnswers: {', '.join(choices)}" if choices else "")

    @functools.cached_property
    def fields(self) -> list[str] | None:
        """Names of the row's fields that its input shows or words a condition by, in order; None where the fields would tell
        the student less than the input does, or more.

        That is where the target is made of a field that the input shows too (the last sentence of a dialogue, say), or of a
        certain one of several choices, and where the input shows a part of a field, or a random choice among fields.
        """
        with self._blamed():
            tree, answers = ENVIRONMENT.parse(self.jinja), ENVIRONMENT.parse(self.answer_choices or "")
            own = _assigned(tree)
            shown, target = _sides(tree.body)
            choice_fields = _names([answers], {})
            names = [name for node in shown for name in _names([node], own)]
            if "answer_choices" in names:
                names += choice_fields
            names = [name for name in dict.fromkeys(names) if name not in NOT_FIELDS]
            told = set(_names(target, own))
            if any(_is_choices(n.node) and isinstance(n.arg, nodes.Const) for n in _all(target, nodes.Getitem)):
                told |= set(choice_fields)
            return None if told & set(names) or _partly_shown(shown, own) or _random_fields(shown, own) else names


NOT_FIELDS = {"answer_choices", "zip", "range", "loop", "dict", "cycler", "joiner", "namespace"}


class _Teller:
    """Tells a parsed template with every expression replaced by the name of the field it shows."""

    def __init__(self, tree, choices=None):
        self.own, self.choices = _assigned(tree), choices

    def say(self, node) -> str:
        choices = self.choices
        match node:
            case nodes.TemplateData():
                return node.data
            case nodes.Name() if node.name in self.own:                     # a variable of the template's own
                return self.say(self.own[node.name])
            case nodes.Name():
                return " / ".join(choices) if node.name == "answer_choices" and choices else node.name
            case nodes.Const():
                return str(node.value)
            case nodes.If():
                bodies = [node.body, *(n.body for n in node.elif_), node.else_]
                sides = [self.say_all(body) for body in bodies]
                sides = [side.split("|||") for side in sides if side.strip()]
                columns = [" / ".join(side[i].strip() for side in sides if i < len(side))
                           for i in range(max(map(len, sides), default=0))]
                return " ||| ".join(f" {column} " for column in columns)
            case nodes.CondExpr():
                return " / ".join(self.say(n) for n in (node.expr1, node.expr2) if n is not None)
            case nodes.For():
                return self.say_all(node.body)
            case nodes.Assign() | nodes.AssignBlock() | nodes.Compare() | nodes.Not() | nodes.And() | nodes.Or():
                return ""
            case nodes.Getitem():
                if _is_choices(node.node) and choices and isinstance(node.arg, nodes.Const) and node.arg.value in range(len(choices)):
                    return choices[node.arg.value]
                key = node.arg.value if isinstance(node.arg, nodes.Const) else None
                return self.say(node.node) + (f".{key}" if isinstance(key, str) else "")
            case nodes.Getattr():
                return f"{self.say(node.node)}.{node.attr}"
            case nodes.Call() if isinstance(node.node, nodes.Getattr) and node.node.attr == "join" and node.args:
                return self.say(node.node.node).join(choices if _is_choices(node.args[0]) and choices else
                                                     [self.say(node.args[0])])
            case nodes.Call():
                return self.say(node.node.node if isinstance(node.node, nodes.Getattr) else node.node)
            case nodes.Filter():
                if node.name == "join" and _is_choices(node.node) and choices and node.args:
                    return self.say(node.args[0]).join(choices)
                return self.say(node.node) if node.node is not None else ""
            case nodes.Tuple() | nodes.List():
                return ", ".join(dict.fromkeys(self.say(n) for n in node.items))
            case nodes.Output():                                            # {{x[0] | upper}}{{x[1:]}} is x, once
                told = [(self.say(n), n) for n in node.nodes]
                return "".join(text for i, (text, n) in enumerate(told) if not (
                    i and told[i - 1][0] == text and not isinstance(n, nodes.TemplateData)))
            case nodes.Template() | nodes.Concat() | nodes.Add():
                return self.say_all(node.iter_child_nodes())
        return " ".join(filter(None, (self.say(n) for n in node.iter_child_nodes())))

    def say_all(self, children) -> str:
        return "".join(self.say(n) for n in children)


def _is_choices(node):
    return isinstance(node, nodes.Name) and node.name == "answer_choices"


def _assigned(tree) -> dict:
    """{name: the expression it stands for} of the template's own variables, those of loops included."""
    own = {}
    for n in [*tree.find_all(nodes.Assign), *tree.find_all(nodes.For)]:
        for name in [n.target] if isinstance(n.target, nodes.Name) else n.target.find_all(nodes.Name):
            expression = n.node if isinstance(n, nodes.Assign) else n.iter
            if all(x.name != name.name for x in [expression, *expression.find_all(nodes.Name)] if isinstance(x, nodes.Name)):
                own.setdefault(name.name, expression)
    return own


def _sides(children) -> tuple[list, list]:
    """The expressions before the "|||" and those after it, conditions of what is worded included.

    A condition around both sides only says whether the template applies, so it is on neither.
    """
    before, after, met = [], [], False
    for node in children:
        if isinstance(node, nodes.TemplateData):
            met = met or "|||" in node.data
        elif isinstance(node, (nodes.If, nodes.For, nodes.Output)):
            bodies = [node.nodes] if isinstance(node, nodes.Output) else [node.body, node.else_]
            if isinstance(node, nodes.If):                          # each elif is a side of its own
                bodies[1:1] = [[n] for n in node.elif_]
            if met and isinstance(node, nodes.If) and node.else_:           # one or the other: which, the input does not say
                continue
            head = {nodes.If: ["test"], nodes.For: ["iter"]}.get(type(node), [])
            inside = [_sides(body) for body in bodies]
            splits = any(_splits(body) for body in bodies)
            for x, y in inside:
                (after if met else before).extend(x)
                after.extend(y)
            if not splits:
                (after if met else before).extend(getattr(node, name) for name in head)
            met = met or splits
        elif not isinstance(node, nodes.Assign):
            (after if met else before).append(node)
    return before, after


def _partly_shown(shown, own) -> set:
    """Fields of which these expressions show a slice or some items, but nowhere the whole, nor items 0, 1, .. one by one."""
    items, whole = {}, {n.name for n in shown if isinstance(n, nodes.Name)}
    for n in _all(shown, nodes.Getitem, own):
        index = n.arg.value if isinstance(n.arg, nodes.Const) else n.arg
        if not _is_choices(n.node) and isinstance(index, (int, nodes.Slice)):
            for name in _names([n.node], own):
                items.setdefault(name, set()).add(index)
    return {name for name, found in items.items() if len(found) < 2 or found != set(range(len(found)))} - whole


def _random_fields(shown, own) -> bool:
    """Whether a random choice decides which field or item these expressions show."""
    indices = [n.arg for n in _all(shown, nodes.Getitem, own)]
    return any(n.name == "choice" for n in _all(indices, nodes.Filter, own)) or any(
        n.name == "choice" and set(_names([n], own)) - NOT_FIELDS for n in _all(shown, nodes.Filter, own))


def _splits(children) -> bool:
    return any(isinstance(n, nodes.TemplateData) and "|||" in n.data for child in children
               for n in [child, *child.find_all(nodes.TemplateData)])


def _all(trees, kind, own=None):
    """Nodes of a kind in these expressions, and in those that the variables in them stand for."""
    for tree in trees:
        for n in [tree, *tree.find_all(nodes.Node)]:
            if isinstance(n, kind):
                yield n
            if own and isinstance(n, nodes.Name) and n.name in own:
                yield from _all([own[n.name]], kind, {k: v for k, v in own.items() if k != n.name})


def _names(trees, own) -> list[str]:
    """Names of fields in these expressions, a template's own variables resolved."""
    return [n.name for n in _all(trees, nodes.Name, own) if n.name not in own]


def load_templates(root: str) -> dict[str, list[Template]]:
    """{data set: its templates} of every templates.yaml in a folder; a data set is named by its subfolder (super_glue/rte).

    Raises UserError for a missing folder, broken YAML, a tag that is not promptsource's, a template without name or text.
    """
    found, remedy = {}, f"promptsource's templates are in the folder promptsource/templates of {GET_PROMPTSOURCE}"
    for path in sorted(glob.glob(f"{glob.escape(root)}/**/templates.yaml", recursive=True)):
        dataset = os.path.relpath(os.path.dirname(path), root).replace(os.sep, "/")
        with named_file(path, remedy):
            with open(path, encoding="utf-8") as f:
                content = yaml.load(f, _Loader)                             # a SafeLoader: builds plain data
            records = content.get("templates") if isinstance(content, dict) else None
            if not isinstance(records, dict) or not all(isinstance(r, dict) and isinstance(r.get("metadata") or {}, dict)
                                                        for r in records.values()):
                raise ValueError("expected `templates:` with a !Template for every id")
            found[dataset] = []
            for record in records.values():
                metadata = record.get("metadata") or {}
                found[dataset].append(Template(dataset, record["name"], record["jinja"], record.get("answer_choices"),
                                               bool(metadata.get("original_task")), tuple(metadata.get("metrics") or ())))
    if not found:
        raise UserError(f"{root} holds no templates.yaml; {remedy}")
    return found
