"""What callers of a TAGI hand in: lists of texts, demonstrations, choices; refused in one line."""
from collections.abc import Sequence
from numbers import Integral, Real

import common
from common import UserError
from lora import Adapter

DEMONSTRATIONS = ("demonstrations: give each instruction a list of (input, output) pairs of texts, "
                  "[] for none")


def shown(value) -> str:
    """A value as an error line tells it: its type, and how it begins."""
    return f"{type(value).__name__} {' '.join(ascii(value).split())[:40]}"


def as_list(values, wanted: str) -> list:
    """The values of a list, tuple, array or the like.

    Raises UserError, which begins with what is wanted, where it is one text, a dictionary, a set,
    or no list at all: each of them would be taken apart into something else.
    """
    if hasattr(values, "tolist"):                       # NumPy's arrays, a column of pandas
        values = values.tolist()
    if isinstance(values, (str, bytes, bytearray)) or not isinstance(values, Sequence):
        raise UserError(f"{wanted}, not {shown(values)}")
    return list(values)


def texts(values, wanted: str) -> list[str]:
    """`as_list` of texts. Raises UserError, too, for an item that is none, or no Unicode."""
    values = as_list(values, wanted)
    for n, text in enumerate(values, 1):
        if not isinstance(text, str):
            raise UserError(f"{wanted}; number {n} is {shown(text)}")
        common.check_text(text, f"text {n} of {len(values)}")
    return values


def tasks(instructions_given, demonstrations_given) -> list[tuple]:
    """[(instruction, its (input, output) pairs)]: what a hypernetwork reads of each task."""
    found = instructions(instructions_given)
    return list(zip(found, demonstrations(demonstrations_given, len(found))))


def told(items) -> list[dict]:
    """Tasks as files and cards tell them."""
    return [{"instruction": text, "demonstrations": [list(pair) for pair in pairs]}
            for text, pairs in items]


def instructions(values) -> list[str]:
    """Instructions, one at least. An empty one is one, white space is a mistake."""
    wanted = "adapt takes a list of instructions, each some text"
    values = texts(values, wanted)
    if not values:
        raise UserError(f"{wanted}; this list is empty")
    for n, text in enumerate(values, 1):
        if text.isspace():
            raise UserError(f"{wanted}; number {n} is white space")
    return values


def inputs(values) -> list[str]:
    """Inputs, each with some text; there may be none."""
    values = texts(values, "a list of inputs is needed, each some text")
    for n, text in enumerate(values, 1):
        if not text.strip():
            raise UserError(f"input {n} is empty; give every instance some text")
    return values


def demonstrations(values, n: int) -> list[list[tuple[str, str]]]:
    """A list of (input, output) pairs for each of n instructions; None: none for any."""
    if values is None:
        return [[]] * n
    values = as_list(values, DEMONSTRATIONS)
    if len(values) != n:
        raise UserError(f"{DEMONSTRATIONS}; here are {len(values)} lists for {n} instructions")
    found = []
    for k, pairs in enumerate(values, 1):
        wanted = f"{DEMONSTRATIONS}; those of instruction {k}"
        pairs = [texts(pair, wanted) for pair in as_list(pairs, wanted)]
        for pair in pairs:
            if len(pair) != 2:
                raise UserError(f"{wanted}: a pair has two texts, not {len(pair)}")
        found.append([tuple(pair) for pair in pairs])
    return found


def choices(values, n: int) -> list[list[str]]:
    """The answer choices of each of n inputs, one at least."""
    wanted = "choices: give each input a list of texts"
    values = as_list(values, wanted)
    if len(values) != n:
        raise UserError(f"{wanted}; here are {len(values)} lists for {n} inputs")
    found = []
    for k, row in enumerate(values, 1):
        found.append(texts(row, f"{wanted}; those of input {k}"))
        if not found[-1]:
            raise UserError(f"{wanted}; that of input {k} is empty")
    return found


def check_rows(adapters, model, n: int) -> None:
    """Raises UserError where they are not an adapter of this model, with one row or n."""
    if adapters is None:
        return
    if not isinstance(adapters, Adapter):
        raise UserError(f"adapters is what adapt returns, or None, not {shown(adapters)}")
    adapters.check(model)
    if len(adapters) not in (1, n):
        raise UserError(f"{len(adapters)} adapters for {n} inputs; use adapters.select([...])")


def scale(value) -> float:
    """A number as --scale takes it: a larger one makes scores that are none."""
    if not isinstance(value, Real) or not abs(value) <= 1000:           # or NaN
        raise UserError(f"scale is a finite number from -1000 to 1000, not {shown(value)}")
    return value


def counts(**values) -> None:
    """Raises UserError for a value that is no whole number from 1 on; range() would skip all."""
    for name, value in values.items():
        if not isinstance(value, Integral) or value < 1:
            raise UserError(f"{name} is a whole number of at least 1, not {shown(value)}")
