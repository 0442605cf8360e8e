"""What people see: help with each default; output that is closed, full, of few signs; pictures."""
import argparse
import functools
import os
import sys
import warnings

from common import UserError

# Signs of help texts, as a terminal that has ASCII alone gets them.
PLAIN = str.maketrans({"λ": "lambda", "Δ": "Delta", "·": "*", "–": "-", "…": "...", "→": "->"})


def has_unicode(stream) -> bool:
    """Whether the stream takes every sign; one without an encoding keeps texts as they are."""
    return (getattr(stream, "encoding", None) or "utf-8").lower().startswith("utf")


def printing(main):
    """Decorator of a script's main(): a closed stream swallows what is printed, a full one fails.

    A pipe that nobody reads any more stays a BrokenPipeError.
    """
    @functools.wraps(main)
    def run(*args, **kwargs):
        for name in ("stdout", "stderr"):
            if getattr(sys, name) is None:                      # started with >&-
                setattr(sys, name, open(os.devnull, "w"))
        try:
            result = main(*args, **kwargs)
            sys.stdout.flush()
            return result
        except BrokenPipeError:
            raise
        except OSError as error:
            if not is_full():
                raise
            raise UserError(f"standard output cannot be written: {error.strerror}; what was not "
                            "printed is lost") from None
        finally:
            if isinstance(sys.stdout, Lasting):
                sys.stdout = sys.stdout.stream
    return run


class Lasting:
    """A stream for what runs for days: where it fails the rest is lost, with a word, no more."""

    def __init__(self, stream):
        self.stream = stream

    def __getattr__(self, name):
        return getattr(self.stream, name)

    def write(self, text):
        return self._go_on(self.stream.write, text)

    def flush(self):
        return self._go_on(self.stream.flush)

    def _go_on(self, function, *args):
        try:
            return function(*args)
        except OSError as error:
            os.dup2(os.open(os.devnull, os.O_WRONLY), self.stream.fileno())
            print(f"standard output cannot be written: {error.strerror}; going on without it",
                  file=sys.stderr)


def last() -> None:
    """From now on, within `printing`, the program outlives its standard output."""
    if not isinstance(sys.stdout, Lasting):
        sys.stdout = Lasting(sys.stdout)


def is_full() -> bool:
    """Whether standard output takes no more; then what is left of it goes nowhere."""
    try:
        print(flush=True)                       # a flush alone has nothing left to fail with
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return True
    return False


class HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Tells each option's default, unless its help does or there is none."""

    def _get_help_string(self, action):                 # as argparse's own formatters do
        text = (action.help or "").removesuffix(" (default: %(default)s)")      # of a flag
        default = action.default
        if default in (None, argparse.SUPPRESS) or default == [] or "default:" in text:
            return text
        if isinstance(default, bool):
            default = "yes" if default else "no"
        return f"{text} (default: {default})".replace("%", "%%")


def write_help(text: str, stream) -> None:
    if not has_unicode(stream):
        text = text.translate(PLAIN).encode("ascii", "replace").decode()
    stream.write(text)


def label(text: str) -> str:
    """A name as matplotlib is to show it: no formula, none that it keeps for itself, not long."""
    text = "".join(c if c.isprintable() else "?" for c in text)
    text = text if len(text) <= 80 else f"{text[:38]} ... {text[-38:]}"
    return ("./" if text.startswith("_") else "") + text.replace("$", r"\$")


def save_picture(figure, target, **how) -> None:
    """Write matplotlib's figure; a sign that its font has not is a box, without a word."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph ")
        figure.savefig(target, **how)
