"""Jinja's sandbox with bounds: a template ends within seconds, whatever it holds.

The sandbox keeps a template from Python's insides, and not from loops in loops, texts that grow,
`'a' * 10 ** 10` or a filter that is asked for a width of a billion.
"""
import functools
import itertools
import math
import warnings
from collections import Counter

from jinja2 import StrictUndefined, nodes, pass_context
from jinja2.runtime import LoopContext
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import _PassArg
from jinja2.visitor import NodeTransformer

WORK = 20_000_000       # that one rendering may do, in characters read or made: a second or two
STEP, ITEM = 100, 20    # what an operation or a turn of a loop costs, and an item of a list
LONGEST = 50_000        # characters of a template; promptsource's have less than 1 000
LARGEST = 10 ** 8       # characters that one operation could make at most
NODES = tuple(getattr(nodes, name) for name in (
    "Template Output TemplateData Const Name NSRef If For Assign AssignBlock List Tuple Dict Pair "
    "With Keyword CondExpr Filter Test Call Getitem Getattr Slice Concat Compare Operand Not Neg "
    "Pos And Or Add Sub Mul Div FloorDiv Mod Pow").split())
FILTERS = (
    "abs attr capitalize count d default dictsort first float groupby int items join last length "
    "list lower map max min reject rejectattr replace reverse select selectattr sort string title "
    "trim truncate unique upper wordcount").split()
METHODS = (
    "capitalize count endswith find get index isalnum isalpha isdigit islower isnumeric isspace "
    "istitle isupper items join keys lower lstrip partition removeprefix removesuffix replace "
    "rfind rindex rpartition rsplit rstrip split splitlines startswith strip swapcase title upper "
    "values").split()
MULTIPLY = ("join", "replace")      # those of them whose result can be as long as a product


class TooMuch(Exception):
    """A template does more than a prompt can need."""


def size(value, room: float = math.inf) -> float:
    """How many characters a value has, with those in it; the count stops above `room`."""
    if isinstance(value, str):
        return len(value)
    if isinstance(value, int):
        if value.bit_length() > 10_000:
            raise TooMuch("it makes a number of more than 3 000 digits")
        return 1
    if isinstance(value, range):
        return ITEM * len(value)
    total = 0
    if isinstance(value, dict):
        value = itertools.chain.from_iterable(value.items())
    elif not isinstance(value, (list, tuple, type({}.items()), type({}.keys()), type({}.values()))):
        return 1
    for item in value:
        total += ITEM + size(item, room - total)
        if total > room:
            break
    return total


class BoundedEnvironment(ImmutableSandboxedEnvironment):
    """The sandbox that templates are rendered in; whatever they hold, they end in seconds.

    Why: NODES leave out macros, imports and recursive loops, so that nothing is repeated but by a
    loop over a value that is there. Every turn of a loop and every operation (operators, filters,
    tests, methods, lists) takes from WORK what it reads and what it makes. None makes more than it
    reads, but for products, which are refused before they are made: those with a width or a format
    are no part of FILTERS and METHODS. Nothing is computed at compile time but filters, which count
    there too. No time is measured, so that a template ends alike on every machine.
    """

    intercepted_binops = frozenset(["+", "-", "*", "/", "//", "%", "**"])

    def __init__(self):
        super().__init__(undefined=StrictUndefined, optimized=False)
        functions = ("range", "dict", "namespace")
        self.globals = {name: self.globals[name] for name in functions}
        self.globals["zip"] = lambda *lists: list(zip(*lists))
        self.filters = {name: self.filters[name] for name in FILTERS}
        self.filters |= {"choice": _choice, "most_frequent": _most_frequent, "shown": _shown}
        for functions in (self.filters, self.tests):
            for name, function in functions.items():
                functions[name] = self.counted(name, function)
        self.filters |= {"_turns": self.turns, "_read": self.read, "_made": self.made}
        self.begin()

    def begin(self) -> None:
        """All of WORK is there again: for another row, or another template."""
        self.left = WORK

    def spend(self, work: float) -> None:
        self.left -= work
        if self.left < 0:
            raise TooMuch("it does more than a prompt can need, as loops in loops do")

    def read(self, value):
        """A value that an operation reads, counted."""
        self.spend(STEP + size(value, self.left))
        return value

    def made(self, value):
        """A value that an operation has made, counted; a lazy one becomes a list."""
        if hasattr(value, "__next__") and not isinstance(value, LoopContext):
            value = list(itertools.islice(value, self.left // ITEM + 1))
        return self.read(value)

    def turns(self, value, cost):
        """What a loop runs over; its turns cost so much each, which is taken at once."""
        if isinstance(value, str):
            raise ValueError("a loop over a text's letters: the row has a text instead of a list")
        value = self.read(value)
        self.spend(cost * len(value) if hasattr(value, "__len__") else 0)
        return value

    def check_product(self, values) -> None:
        """Refuse an operation whose result could be as long as the product of what it is given."""
        product = 1
        for value in values:
            number = isinstance(value, (int, float)) and abs(value)
            product *= max(number or size(value, LARGEST), 1)
        if not product <= LARGEST:                      # or NaN
            raise TooMuch("it makes a text or list that is too long")

    def counted(self, name, function):
        """A filter or test that takes its work from what is left."""
        @functools.wraps(function)                      # keeps Jinja's marks on it
        def run(*args, **kwargs):
            values = [*args[_PassArg.from_obj(function) is not None:], *kwargs.values()]
            if name in ("join", "choice", "most_frequent") and isinstance(values[0], str):
                raise ValueError(f"{name} of a text's letters: the row has a text for a list")
            return self.bounded(name, values, lambda: function(*args, **kwargs))
        return run

    def bounded(self, name, values, run):
        """What run() makes of these values, if that is not too much."""
        for value in values:
            self.read(value)
        if name in MULTIPLY:
            self.check_product(values)
        return self.made(run())

    def call(__self, __context, __obj, *args, **kwargs):        # noqa: B902, as in Jinja
        values = [getattr(__obj, "__self__", None), *args, *kwargs.values()]
        run = functools.partial(super().call, __context, __obj, *args, **kwargs)
        return __self.bounded(getattr(__obj, "__name__", ""), values, run)

    def call_binop(self, context, operator, left, right):
        numbers = isinstance(left, (int, float)) and isinstance(right, (int, float))
        if operator == "%" and not numbers:
            raise TooMuch("it fills in a text with %; put texts together with ~")
        if operator == "**" and not (numbers and abs(left) < 10 ** 9 and abs(right) < 99):
            raise TooMuch("it has a power that is too large, or none of numbers")
        if operator == "*" and not numbers:
            self.check_product([left, right])
        run = functools.partial(super().call_binop, context, operator, left, right)
        return self.bounded(operator, [left, right], run)

    def is_safe_attribute(self, obj, attr, value):
        if isinstance(obj, (str, bytes, int, float, list, tuple, dict, range)):
            return attr in METHODS
        return super().is_safe_attribute(obj, attr, value)

    def wrap_str_format(self, value):
        return None                                     # so that a text's `format` is no METHOD

    def within_bounds(self, source: str):
        """The compiled template of a text."""
        self.begin()
        if len(source) > LONGEST:
            raise TooMuch(f"it is {len(source)} characters long, {LONGEST} at most")
        tree = self.parse(source)
        for node in tree.find_all(nodes.Node):
            if not isinstance(node, NODES) or getattr(node, "recursive", False):
                name = type(node).__name__.lower()
                raise TooMuch(f"'{name}' on its line {node.lineno} is nothing that a prompt needs")
        with warnings.catch_warnings():                 # of Python's, on what "{{ 5[1] }}" becomes
            warnings.simplefilter("ignore", SyntaxWarning)
            return self.from_string(_Counting().visit(tree))

    def render(self, template, fields: dict) -> str:
        """The text of a template that is compiled; ValueError where that is too much work."""
        parts = []
        for part in template.generate(fields):
            self.spend(len(part))
            parts.append(part)
        return "".join(parts)


class _Counting(NodeTransformer):
    """Puts the counting into a template's tree where Jinja calls no function that could do it."""

    def counted(self, node, name="_made", *args):
        return nodes.Filter(node, name, list(args), [], None, None, lineno=node.lineno)

    def visit_For(self, node):
        cost = STEP + sum(len(text.data) for text in node.find_all(nodes.TemplateData))
        self.generic_visit(node)
        node.iter = self.counted(node.iter, "_turns", nodes.Const(cost))
        return node

    def visit_Compare(self, node):
        self.generic_visit(node)
        node.expr = self.counted(node.expr, "_read")
        for operand in node.ops:
            operand.expr = self.counted(operand.expr, "_read")
        return node

    def visit_List(self, node):
        self.generic_visit(node)
        stored = getattr(node, "ctx", "load") == "store"        # a tuple that is assigned to
        return node if stored else self.counted(node)

    visit_Tuple = visit_Dict = visit_Concat = visit_List

    def visit_Getitem(self, node):
        self.generic_visit(node)
        return self.counted(node) if isinstance(node.arg, nodes.Slice) else node


# ------------------------------ promptsource's filters

@pass_context
def _choice(context, choices):
    return context["_rng"].choice(list(choices))


def _most_frequent(items):
    counts = Counter(items)
    most = max(counts.values(), default=0)
    return [item for item, n in counts.items() if n == most]


def _shown(value) -> str:
    """A value as the prompt or the answer has it; null, true and false are neither."""
    if value is None or isinstance(value, bool):
        raise ValueError(f"the row has {str(value).lower().replace('none', 'null')} where the "
                         "template shows a text or number")
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"the row has {value} where the template shows a text or number")
    return str(value)


ENVIRONMENT = BoundedEnvironment()
