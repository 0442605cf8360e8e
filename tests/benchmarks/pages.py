"""What the scripts here share about the files in docs/ that they write."""
import platform
import shlex
import sys
import textwrap
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
WORDS = ("case", "way", "stage", "size", "command", "arithmetic")   # columns that hold no numbers


def processor() -> str:
    """This machine's cores, by number and name, with the vector instructions that they have."""
    found = {}                                          # key of a line -> its value on each core
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        key, _, value = line.partition(":")
        found.setdefault(key.strip(), []).append(value.strip())
    names = found.get("model name") or [platform.machine()]
    flags = found.get("flags", [""])[0].split()
    extras = [name for name in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if name in flags]
    return f"{len(found['processor'])} cores of {names[0]} with {', '.join(extras) or 'no AVX2'}"


def command_line() -> str:
    """The command that this process was started with, as one types it."""
    script = Path(sys.argv[0]).resolve().relative_to(ROOT)
    return shlex.join(["python", str(script), *sys.argv[1:]])


def paragraph(*sentences: str) -> str:
    """The sentences, wrapped as lines of a Markdown file."""
    return textwrap.fill(" ".join(sentences), 95, break_long_words=False, break_on_hyphens=False)


def table(rows: list[dict]) -> str:
    """A Markdown table of rows {column's title: text}.

    Columns come in the order in which rows first name them; where a row lacks one it is empty.
    """
    titles = list(dict.fromkeys(title for row in rows for title in row))
    lines = ["| " + " | ".join(titles) + " |",
             "|" + "|".join("---" if title in WORDS else "--:" for title in titles) + "|"]
    for row in rows:
        lines.append("| " + " | ".join(row.get(title, "") for title in titles) + " |")
    return "\n".join(lines)


def write(path, text: str) -> None:
    """Write a page or picture; what is there is replaced only if it begins as those do."""
    check_replaceable(path, "<svg" if text.startswith("<svg") else text.partition("\n")[0])
    Path(path).write_text(text, encoding="utf-8")


def check_replaceable(path, beginning: str) -> None:
    """Ends the script, before it measures for hours, too, where another file is at this path."""
    path = Path(path)
    if path.is_dir() or not path.parent.is_dir():
        sys.exit(f"error: {path} cannot be written; name a file in a folder that is there")
    if path.is_file():
        there = path.read_bytes()[:len(beginning.encode())]
        if there and there != beginning.encode():
            sys.exit(f"error: {path} was not written by this script, and stays; name another --out")


def part(name: str, text: str) -> str:
    """The text between two comments by which a script finds it again."""
    return f"<!-- {name} -->\n{text}<!-- /{name} -->\n"


def part_of(page: str, name: str) -> str | None:
    """The text that `part` put between the comments of this name; None where they are not there."""
    before, begin, rest = page.partition(f"<!-- {name} -->\n")
    text, end, _ = rest.partition(f"<!-- /{name} -->\n")
    return text if begin and end else None
