"""The code's lines and files are short, and the commands that docs, configs and docstrings name are taken."""
import re
import shlex
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import adapt
import evaluate
import train_hyper
import train_teacher
from bench import check, plot

CODE = sorted([*ROOT.glob("*.py"), *(ROOT / "bench").glob("*.py")])
PARSERS = {"adapt.py": adapt.parser, "evaluate.py": evaluate.parser, "train_hyper.py": train_hyper.parser,
           "train_teacher.py": train_teacher.parser, "bench.check": check.own_parser, "bench.plot": plot.parser}
COMMAND = re.compile(r"(?:python|torchrun)\b.*?\b(" + "|".join(PARSERS) + r")(?![\w/])([^`|\[…]*)")
TOLD = [ROOT / "README.md", ROOT / "docs" / "p3.md", ROOT / "docs" / "long-runs.md", ROOT / "docs" / "memory.md",
        *sorted((ROOT / "configs").glob("*.yaml"))]


@pytest.mark.parametrize("path", CODE, ids=lambda path: path.name)
def test_lines_have_at_most_100_signs_and_files_450_lines(path):
    lines = path.read_text(encoding="utf-8").splitlines()
    assert [n for n, line in enumerate(lines, 1) if len(line) > 100] == [] and len(lines) <= 450


def test_the_commands_that_are_named_are_taken():
    texts = {path.name: path.read_text(encoding="utf-8") for path in TOLD}
    for module in (adapt, evaluate, train_hyper, train_teacher, check, plot):
        texts[module.__name__] = module.__doc__
    found = 0
    for name, text in texts.items():
        for line in text.replace("\\\n", " ").splitlines():
            for script, words in COMMAND.findall(line):
                words = shlex.split(re.split(r"  +|#", words.strip())[0])
                if script == "bench.plot" and not words:                # README: RUN…
                    continue
                PARSERS[script]().parse_args(words)
                found += 1
    assert found > 50


def test_scripts_that_are_named_are_there():
    there = {path.name for path in ROOT.rglob("*.py") if ".venv" not in path.parts}
    for path in [*CODE, *TOLD, *ROOT.glob("tests/*.sh"), ROOT / "quickstart.sh"]:
        for name in re.findall(r"(?<![\w/.-])(?:bench/|tests/|tests/benchmarks/|assets/)?(\w+\.py)\b", path.read_text(encoding="utf-8")):
            assert name in there | {"ni_collator.py"}, (path.name, name)      # of Tk-Instruct's code
