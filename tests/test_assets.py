"""What comes with the repository: a frozen T5 of the built-in suite, a TAGI for it, and what it answers to a stranger."""
import contextlib
import io
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import adapt
import evaluate
from bench import concepts, sample
from hypernet import TAGI

T5, SHIPPED = ROOT / "assets" / "t5-tiny", [ROOT / "assets" / "tagi-tiny", ROOT / "assets" / "tagi-lora"]
OWN = re.compile(r'python adapt\.py --instruction .*')


@pytest.fixture(scope="module", params=SHIPPED, ids=lambda path: path.name)
def tagi(request):
    return TAGI.load(str(request.param), "cpu")


def answer(*argv, script=adapt) -> str:
    out = io.StringIO()
    with contextlib.chdir(ROOT), contextlib.redirect_stdout(out):
        script.main(["--device", "cpu", *argv])
    return out.getvalue()


def size(folder):
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def test_the_t5_has_at_most_2_mb_and_all_weights_8():
    weights = sum(path.stat().st_size for folder in (T5, *SHIPPED) for path in folder.glob("model.safetensors"))
    assert size(T5) <= 2 * 2 ** 20 and weights <= 8e6
    for folder in (T5, *SHIPPED):
        assert {"config.yaml", "model.safetensors", "log.jsonl"} <= {path.name for path in folder.iterdir()}


def test_the_t5_reads_what_the_suite_writes(tagi):
    assert tagi.tokenizer.convert_ids_to_tokens(range(len(tagi.tokenizer))) == concepts.vocabulary()


def test_natural_instructions_are_answered(tagi):
    """Forty that were written before any model was trained on this suite; nine in ten have to be right."""
    rows = [json.loads(line) for line in (ROOT / "tests" / "natural.jsonl").read_text().splitlines()]
    answers = tagi.generate([row["input"] for row in rows], tagi.adapt([row["instruction"] for row in rows]), max_new_tokens=16)
    wrong = [(row["instruction"], text) for row, text in zip(rows, answers) if text != row["output"]]
    assert len(rows) == 40 and len(wrong) <= 4, wrong


def test_none_of_these_instructions_is_one_that_it_was_trained_on(tmp_path):
    sample.write_suite(tmp_path / "suite", seed=0)
    known = {" ".join(text.lower().split()) for path in (tmp_path / "suite" / "tasks").iterdir()
             for text in json.loads(path.read_text())["Definition"]}
    rows = [json.loads(line) for line in (ROOT / "tests" / "natural.jsonl").read_text().splitlines()]
    new = [row for row in rows if " ".join(row["instruction"].lower().split()) not in known]
    assert len(new) >= 36                                                   # "Find the city." is anybody's


def test_a_suite_of_another_seed_is_no_test_of_it(tmp_path, capsys):
    """Most of its test tasks are training tasks of the suite that the shipped models know."""
    sample.write_suite(tmp_path / "suite", seed=1)
    with pytest.raises(SystemExit):
        answer("--checkpoint", str(SHIPPED[0]), "--data", str(tmp_path / "suite"), "--runs", str(tmp_path), "--rows", "tagi",
               script=evaluate)
    line = capsys.readouterr().err.splitlines()[-1]
    assert re.search(r"tiny was trained on \d+ of the \d+ test tasks", line), line


def test_words_that_it_does_not_know_are_named(capsys):
    answer("--instruction", "Find the zeppelin, please.", "--input", "Anna saw a quokka.")
    lines = capsys.readouterr().err.splitlines()[-2:]
    assert lines == ["warning: words the model does not know: zeppelin", "warning: words the model does not know: quokka"]


def test_the_example_of_help_is_right(capsys):
    with pytest.raises(SystemExit):
        adapt.main(["--help"])
    line = OWN.search(capsys.readouterr().out)[0].partition("#")[0]
    assert answer(*shlex.split(line)[2:]) == "Rome\n"


def blocks(language: str) -> list[tuple[str, str]]:
    """The README's code blocks of a language that are followed by a block of their output: (code, output)."""
    text = (ROOT / "README.md").read_text()
    return re.findall(rf"```{language}\n((?:(?!```).)*)```\n+```text\n(.*?)```", text, re.DOTALL)


def test_the_readmes_own_instructions_print_what_it_says():
    found = [(code, output) for code, output in blocks("bash") if OWN.search(code)]
    assert found
    for code, output in found:
        words = shlex.split(code.replace("\\\n", " "))
        assert words[:2] == ["python", "adapt.py"] and answer(*words[2:]) == output


def test_the_readmes_python_prints_what_it_says():
    found = [(code, output) for code, output in blocks("python") if "TAGI" in code]
    assert found
    for code, output in found:
        done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True,
                              env=os.environ | {"CUDA_VISIBLE_DEVICES": ""})
        assert done.stdout == output, done.stderr[-2000:]
