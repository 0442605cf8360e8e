"""Evaluation: shared out over processes, results that are never lost or replaced, own tasks."""
import contextlib
import io
import json
import os
import shutil
import signal
import subprocess
import sys

import pytest
import torch

pytest.register_assert_rewrite("stages")
pytest_plugins = ("stages",)
from stages import ROOT, call, environment, process

import adapt
import common
import evaluate
import train_hyper
import train_teacher
from bench import ablations, cost, kept, predictions, report, sample
from bench.loaded import Loaded

TAGI = str(ROOT / "assets/tagi-tiny")
COPIES = "--rows=copy_input,copy_demo"
ANSWERS = ("--rows=tagi,tagi_empty,no_instruction,copy_input", "--batch-size=4", "--no-cost")


@pytest.fixture(scope="module")
def own(tmp_path_factory):
    """A folder of own tasks in SNI's layout: two to train on, three to be tested on."""
    root = tmp_path_factory.mktemp("own")
    tasks = {"keep": ("Copy the text.", "Copying"), "last": ("Write the last word.", "Words"),
             "city": ("Find the city.", "Places"), "animal": ("Find the animal.", "Animals"),
             "first": ("Write the first word.", "Words")}
    (root / "tasks").mkdir()
    for n, (name, (definition, category)) in enumerate(tasks.items()):
        inputs = [f"{who} saw a {what} in {where}." for who, what, where in zip(
            ("Ann", "Tom", "Eva", "Max", "Ida", "Leo", "Zoe"), ("cat", "dog", "pig") * 3,
            ("Rome", "Oslo", "Paris") * 3)][:5 + n % 3]
        rows = [{"id": f"{name}-{k}", "input": x, "output": [x.split()[-1][:-1]]}
                for k, x in enumerate(inputs)]
        (root / "tasks" / f"{name}.json").write_text(json.dumps({
            "Definition": [definition], "Categories": [category], "Instances": rows,
            "Positive Examples": [{"input": "Bob saw a cow in Rome.", "output": "Rome"}]}))
    (root / "splits/default").mkdir(parents=True)
    (root / "splits/default/train_tasks.txt").write_text("keep\nlast\n")
    (root / "splits/default/test_tasks.txt").write_text("city\nanimal\nfirst\n")
    return root


def run(own, out, *flags) -> str:
    return call(evaluate, "--checkpoint", TAGI, "--data", str(own), "--device=cpu",
                *(["--out", str(out)] if out else []), *map(str, flags))


def refused(own, out, *flags) -> str:
    """The one line that it ends with; nothing in `out` is changed."""
    before, err = files(out), io.StringIO()
    with contextlib.redirect_stderr(err), pytest.raises(SystemExit) as end:
        run(own, out, *flags)
    assert end.value.code == 2 and files(out) == before
    line = err.getvalue()
    assert line.startswith("error: ") and line.count("\n") == 1 and len(line) <= 300, line
    return line


def files(folder) -> dict:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def lines(folder):
    return [json.loads(line) for line in (folder / "predictions.jsonl").read_text().splitlines()]


def results(folder):
    return json.loads((folder / "results.json").read_text())


def rows(folder):
    return [(r["key"], r["demos"]) for r in results(folder)["results"]]


@pytest.fixture(scope="module")
def whole(own, tmp_path_factory):
    """What one process predicts that is not stopped."""
    out = tmp_path_factory.mktemp("whole") / "out"
    run(own, out, *ANSWERS)
    return out


# -------------------------------------------------------------------------------- several processes

@pytest.fixture(scope="module")
def launched(own, whole, tmp_path_factory):
    """One launch of two processes, which takes seconds: the first evaluation goes on from the half
    that one process made, in the second rank 1 is killed when it has written its third batch."""
    folder = tmp_path_factory.mktemp("launched")
    shutil.copytree(whole, folder / "two")
    (folder / "two/results.json").unlink(), (folder / "two/results.md").unlink(), (folder / "two/categories.png").unlink()
    half = (whole / "predictions.jsonl").read_text().splitlines(keepends=True)
    (folder / "two/predictions.jsonl").write_text("".join(half[len(half) // 2:]))
    words = ["--checkpoint", TAGI, "--data", str(own), "--device=cpu", *ANSWERS]
    (folder / "script.py").write_text(f"""
import os, signal, sys
sys.path.insert(0, {str(ROOT)!r})
import evaluate
from bench.kept import Kept
evaluate.common.dist.destroy_process_group = lambda: None                   # a second group may hang
evaluate.main({words!r} + ["--out", {str(folder / "two")!r}])
append, written = Kept.append, []

def kill_after_three(self, records):
    append(self, records)
    written.append(records)
    if self.rank == 1 and len(written) == 3:
        os.kill(os.getpid(), signal.SIGKILL)

Kept.append = kill_after_three
evaluate.main({words!r} + ["--out", {str(folder / "killed")!r}])
""")
    return folder, process(sys.executable, "-m", "bench.launch", "--nproc-per-node=2", folder / "script.py", code=1)


def test_two_processes_write_and_say_what_one_does_also_where_they_go_on(whole, launched):
    folder, ended = launched
    for name in ("predictions.jsonl", "results.md"):
        assert (folder / "two" / name).read_bytes() == (whole / name).read_bytes()
    assert results(folder / "two") == results(whole)
    assert ended.stdout.count("**Def**, test tasks") == 1 and ended.stdout.count("saved in") == 1
    assert "by 2 processes" in ended.stdout and "Traceback" not in ended.stderr
    assert not list((folder / "two").glob("*.rank*"))


def test_two_processes_of_which_one_is_killed_lose_nothing_and_one_goes_on(own, whole, launched, tmp_path):
    left = launched[0] / "killed"
    assert not (left / "results.json").exists()
    ranks = [(left / name).read_text().splitlines() for name in ("predictions.jsonl", "predictions.rank1.jsonl")]
    assert len(ranks[1]) >= 3 and not set(ranks[0]) & set(ranks[1])
    shutil.copytree(left, tmp_path / "out")
    with open(tmp_path / "out/predictions.rank1.jsonl", "a") as f:
        f.write('{"row": "TAGI, ri')                                        # as a crash may leave it
    answered = []
    append = kept.Kept.append
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kept.Kept, "append", lambda self, its: (answered.extend(its), append(self, its)))
        run(own, tmp_path / "out", *ANSWERS)
    assert len(answered) == len(lines(whole)) - len(ranks[0]) - len(ranks[1])     # nothing twice
    for name in ("predictions.jsonl", "results.md"):
        assert (tmp_path / "out" / name).read_bytes() == (whole / name).read_bytes()
    assert not list((tmp_path / "out").glob("*.rank*"))


@pytest.mark.parametrize("world", [1, 2, 3, 5])
def test_batches_are_dealt_to_each_process_in_turn_whatever_their_groups(own, world):
    dealt, groups = [], ([1, 2, 3], [4], [], [5, 6], [7, 8, 9, 10, 11])
    for rank in range(world):
        loaded = Loaded.__new__(Loaded)
        loaded.rank, loaded.world, loaded.dealt = rank, world, 0
        dealt.append([n for group in groups for n in loaded.share(group)])
    assert sorted(n for its in dealt for n in its) == list(range(1, 12))
    assert max(map(len, dealt)) - min(map(len, dealt)) <= 1


def test_a_batch_of_which_a_part_is_there_is_answered_whole(own, whole, tmp_path, monkeypatch):
    """So that its padding, and every bit of its answers, is what it would have been."""
    out, asked, answerer = tmp_path / "out", [], evaluate.answerer
    shutil.copytree(whole, out)
    (out / "predictions.jsonl").write_text("".join(json.dumps(r) + "\n" for r in lines(whole)[1:]))

    def watched(*args):
        answer = answerer(*args)
        return lambda pairs: (asked.append(len(pairs)), answer(pairs))[1]

    monkeypatch.setattr(evaluate, "answerer", watched)
    run(own, out, *ANSWERS)
    assert asked == [4] and (out / "predictions.jsonl").read_bytes() == (whole / "predictions.jsonl").read_bytes()


def test_processes_that_read_different_data_are_refused(monkeypatch, tmp_path):
    monkeypatch.setattr(common, "gather_over_ranks", lambda ours: [ours, ours | {"tasks": "others"}])
    options = evaluate.config.parse(evaluate.parser(), "evaluate", ["--out", str(tmp_path / "out")])
    with pytest.raises(common.UserError, match="rank 1 has another tasks or instances"):
        with kept.Kept(options, {"tasks": "ours"}):
            pass
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_an_evaluation_with_a_line_and_nothing_is_lost(own, whole, tmp_path, monkeypatch, number):
    out, append, written = tmp_path / "out", kept.Kept.append, []

    def stopped(self, records):
        append(self, records)
        written.extend(records)
        if len(written) > 8:
            signal.raise_signal(number)

    said = io.StringIO()
    with monkeypatch.context() as patch, contextlib.redirect_stdout(said), pytest.raises(SystemExit) as end:
        patch.setattr(kept.Kept, "append", stopped)
        evaluate.main(["--checkpoint", TAGI, "--data", str(own), "--device=cpu", "--out", str(out), *ANSWERS])
    assert end.value.code == 130 and lines(out) == written
    line = said.getvalue().strip().splitlines()[-1]
    assert line == f"stopped; what was predicted is in {out}: run the same command again to go on"
    run(own, out, *ANSWERS)
    assert (out / "predictions.jsonl").read_bytes() == (whole / "predictions.jsonl").read_bytes()


def test_a_full_disk_is_one_line_and_the_evaluation_goes_on_later(own, whole, tmp_path, monkeypatch):
    class Full:
        name = "predictions.jsonl"

        def __init__(self, file):
            self.file, self.room = file, 1000

        def write(self, text):                      # takes a part, then nothing, as a disk does
            if not self.room:
                raise OSError(28, "No space left on device")
            n = self.file.write(text[:self.room])
            self.room -= n
            return n

    enter = kept.Kept.__enter__

    def full(self):
        enter(self)
        self.file = Full(self.file)
        return self

    out = tmp_path / "out"
    with monkeypatch.context() as patch, pytest.raises(SystemExit) as end:
        patch.setattr(kept.Kept, "__enter__", full)
        run(own, out, *ANSWERS)
    assert end.value.code == 2 and (out / "predictions.jsonl").stat().st_size == 1000
    run(own, out, *ANSWERS)
    assert (out / "predictions.jsonl").read_bytes() == (whole / "predictions.jsonl").read_bytes()


def test_a_second_evaluation_in_a_folder_is_refused(own, tmp_path):
    out = tmp_path / "out"
    run(own, out, COPIES)
    with kept.lock(str(out)):
        for flags in ((COPIES,), ("--rescore", out / "predictions.jsonl")):
            line = refused(own, out, *flags)
            assert f"another run is at work in {out}" in line and "--out" in line
    run(own, out, COPIES)                                                   # it was let go


# ------------------------------------------------------------------------- no results are replaced

def test_rows_that_are_made_later_join_the_table(own, tmp_path):
    out = tmp_path / "out"
    run(own, out, COPIES)
    table = (out / "results.md").read_text()
    run(own, out, "--rows=copy_demo")
    assert (out / "results.md").read_text() == table
    run(own, out, "--rows=no_instruction")
    assert rows(out) == [(key, n) for key in ("no_instruction", "copy_input", "copy_demo") for n in (0, 2)]
    assert not list(out.glob("*.1"))


def test_costs_that_were_measured_stay_where_rows_are_made_without(own, tmp_path, monkeypatch):
    monkeypatch.setattr(evaluate, "COST_INSTANCES", 2)
    monkeypatch.setattr(cost, "COST_TASKS", 1)
    out, asked = tmp_path / "out", []
    run(own, out, "--rows=tagi_empty,copy_input", "--no-cost")
    assert not any("ms" in r for r in results(out)["results"])
    measure = evaluate.measure_costs
    monkeypatch.setattr(evaluate, "measure_costs", lambda loaded, wanted, n: asked.append(set(wanted)) or measure(
        loaded, wanted, n))
    run(own, out, "--rows=tagi,meta")
    assert asked == [{"tagi", "meta", "tagi_empty", "copy_input"}]          # all rows take turns
    costs = {(r["key"], r["demos"]): r["ms"] for r in results(out)["results"] if "ms" in r}
    assert set(costs) == {(key, n) for key in ("tagi", "meta", "tagi_empty") for n in (0, 2)}
    run(own, out, "--rows=tagi,meta", "--no-cost")
    assert costs == {(r["key"], r["demos"]): r["ms"] for r in results(out)["results"] if "ms" in r}


def default_place(own, tmp_path, *flags):
    """With runs of its own, so that --out may be left out."""
    return call(evaluate, "--data", str(own), "--bench=sni", "--runs", str(tmp_path / "runs"), "--device=cpu",
                COPIES, *flags)


@pytest.mark.parametrize("what", ["instances", "split", "data", "limits"])
def test_an_evaluation_of_other_instances_or_data_has_a_place_of_its_own(own, tmp_path, what):
    default_place(own, tmp_path)
    first, second = tmp_path / "runs/evaluate", tmp_path / "runs/evaluate-2"
    before, other = files(first), tmp_path / "other"
    shutil.copytree(own, other)
    shutil.copy(other / "splits/default/test_tasks.txt", other / "splits/default/validation_tasks.txt")
    (other / "splits/default/test_tasks.txt").write_text("animal\nfirst\n")
    root, flags = {"instances": (own, ["--eval-instances=2"]), "split": (other, ["--split=validation"]),
                   "data": (other, []), "limits": (own, ["--max-output=3"])}[what]
    said = default_place(root, tmp_path, *flags)
    assert files(first) == before and f"kept in {second}" in said and f"saved in {second}" in said
    assert results(second)["results"][0]["instances"] == {"instances": 6, "data": 11}.get(what, 18)
    again = files(second)
    default_place(root, tmp_path, *flags)                                   # it is found again
    assert files(second) == again and not (tmp_path / "runs/evaluate-3").exists()
    default_place(own, tmp_path)
    assert files(first).keys() == before.keys() and lines(first)


def test_in_a_folder_that_was_asked_for_earlier_results_are_set_aside(own, tmp_path):
    out = tmp_path / "out"
    run(own, out, COPIES)
    before = files(out)
    said = run(own, out, COPIES, "--eval-instances=2")
    for path, content in before.items():
        if path.name != "config.yaml":
            assert path.with_name(path.name + ".1").read_bytes() == content
    assert "results.md.1" in said and results(out)["results"][0]["instances"] == 6
    run(own, out, COPIES, "--eval-instances=2", "--fresh")
    assert (out / "results.md.2").exists()


def test_rescored_results_do_not_replace_an_evaluations(own, tmp_path):
    out = tmp_path / "out"
    run(own, out, COPIES)
    before = (out / "results.md").read_bytes()
    run(own, out, "--rescore", out / "predictions.jsonl")
    assert (out / "results.md.1").read_bytes() == before and results(out)["split"] == "rescored"
    run(own, out, "--rescore", out / "predictions.jsonl")                   # the same once more
    assert not (out / "results.md.2").exists()
    run(own, out, COPIES)
    assert (out / "results.md").read_bytes() == before and (out / "results.md.2").exists()


@pytest.mark.parametrize("name", ["results.md", "results.json", "predictions.jsonl", "config.yaml", "categories.png",
                                  "probe.md"])
@pytest.mark.parametrize("content", ["mine", '{"my": 1}'])
def test_a_file_that_an_evaluation_did_not_write_is_not_replaced(own, tmp_path, name, content):
    (tmp_path / name).write_text(content)
    line = refused(own, tmp_path, COPIES)
    assert str(tmp_path / name) in line and "--out" in line and "replaced" in line


def test_rescoring_does_not_replace_what_it_did_not_write_and_leaves_the_rest_alone(own, whole, tmp_path):
    for name in ("results.md", "results.json"):
        folder = tmp_path / name.replace(".", "-")
        folder.mkdir()
        (folder / name).write_text("{}")
        assert str(folder / name) in refused(own, folder, "--rescore", whole / "predictions.jsonl")
    (tmp_path / "config.yaml").write_text("mine: 1")
    run(own, tmp_path, "--rescore", whole / "predictions.jsonl")
    assert (tmp_path / "config.yaml").read_text() == "mine: 1" and (tmp_path / "results.md").exists()


def test_a_table_of_ablations_does_not_replace_another_splits_nor_a_users_file(tmp_path):
    runs = tmp_path / "runs"
    for split in ("test", "validation"):
        for name in ablations.ABLATIONS.values():
            folder = runs / f"evaluate-{split}{name and '-' + name}"
            folder.mkdir(parents=True, exist_ok=True)
            its = [{"row": report.ROWS["tagi"], "demos": n, "rouge_l": 50.0,
                    "by_task": {"rouge_l": {"one": 50.0}}} for n in (0, 2)]
            (folder / "results.json").write_text(json.dumps({"bench": "sni", "split": split, "results": its}))
        said = call(evaluate, "--ablations", "--runs", str(runs), "--split", split)
        path = tmp_path / ("runs-ablations.md" if split == "test" else "runs-ablations-validation.md")
        assert said == path.read_text() + f"\nsaved as {path}\n"
        call(evaluate, "--ablations", "--runs", str(runs), "--split", split)
    path.write_text("mine")
    with pytest.raises(SystemExit):
        call(evaluate, "--ablations", "--runs", str(runs), "--split", "validation")
    assert path.read_text() == "mine"


# ------------------------------------------------------------------------------------- the terminal

def test_results_are_there_where_the_terminal_is_ascii_and_nobody_reads_on(own, tmp_path):
    """`| head -n 1` of a process that writes at once, on a terminal that has no dash, after a line of its own."""
    words = [sys.executable, "-u", "evaluate.py", "--checkpoint", TAGI, "--data", own, "--device=cpu",
             "--out", tmp_path / "out", "--rows=copy_input"]
    command = " ".join(map(str, words)) + f" 2> {tmp_path}/err | head -n 1"
    env = environment() | {"PYTHONIOENCODING": "ascii", "LC_ALL": "C"}
    done = subprocess.run(["bash", "-o", "pipefail", "-c", command], cwd=ROOT, env=env, capture_output=True, timeout=200)
    assert done.returncode == 0 and (tmp_path / "err").read_bytes() == b""
    assert "N(t + n·i)" in (tmp_path / "out/results.md").read_text(encoding="utf-8")
    assert rows(tmp_path / "out") == [("copy_input", 0), ("copy_input", 2)]


@pytest.mark.parametrize("what", ["full", "not read"])
def test_an_evaluation_ends_where_its_standard_output_is_full_or_not_read(own, tmp_path, monkeypatch, capfd, what):
    read, write = os.pipe()
    os.close(read)
    with open("/dev/full", "w") if what == "full" else os.fdopen(write, "w") as stream, monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", stream)
        evaluate.main(["--checkpoint", TAGI, "--data", str(own), "--device=cpu", "--out", str(tmp_path / "out"), COPIES])
    said = capfd.readouterr().err
    assert said.count("\n") == (what == "full") and ("No space left" in said) == (what == "full")
    assert (tmp_path / "out/results.md").exists() and rows(tmp_path / "out")


@contextlib.contextmanager
def ascii_terminal(monkeypatch):
    """Within: standard output knows no more than ASCII. What was written is in the buffer."""
    buffer = io.BytesIO()
    stream = io.TextIOWrapper(buffer, encoding="ascii", errors="strict", write_through=True)
    with monkeypatch.context() as patch, contextlib.chdir(ROOT):
        patch.setattr(sys, "stdout", stream)
        yield buffer
    stream.detach()                             # else it closes the buffer


@pytest.mark.parametrize("module", [evaluate, adapt, train_teacher, train_hyper], ids=lambda m: m.__name__)
def test_help_can_be_read_on_an_ascii_terminal(monkeypatch, module):
    with ascii_terminal(monkeypatch) as said, pytest.raises(SystemExit) as end:
        module.main(["--help"])
    assert end.value.code == 0 and b"--device" in said.getvalue()


def test_the_table_can_be_read_on_an_ascii_terminal(own, tmp_path, monkeypatch):
    with ascii_terminal(monkeypatch) as said:
        evaluate.main(["--checkpoint", TAGI, "--data", str(own), "--device=cpu", "--out", str(tmp_path / "out"), COPIES])
    assert b"| copy the input |" in said.getvalue() and b"\\u2013" in said.getvalue()
    assert "–" in (tmp_path / "out/results.md").read_text(encoding="utf-8")


def test_the_end_says_where_the_results_are_and_what_comes_next(own, tmp_path):
    said = run(own, tmp_path / "out", COPIES)
    assert said.startswith("options of evaluate: ") and said.count(f"--data={own}") == 1    # what it runs with, at the start
    *_, saved, then = said.strip().splitlines()
    assert saved == f"saved in {tmp_path}/out: results.md, results.json, predictions.jsonl"
    assert f"adapt.py --checkpoint {TAGI}" in then and f"evaluate.py --probe --checkpoint {TAGI}" in then


def test_measuring_costs_has_a_progress_bar(monkeypatch):
    bars = []

    class Bar:
        def __init__(self, total, desc, **kwargs):
            bars.append([desc, total, 0])

        def update(self, n):
            bars[-1][2] += n

        def close(self):
            assert bars[-1][1] == bars[-1][2]

    monkeypatch.setattr(cost, "tqdm", Bar)
    ways = [{"tagi": lambda: torch.ones(2, 2) @ torch.ones(2, 2), "meta": lambda: None}] * 3
    assert cost.measure(ways, 1, 2, ": them")["tagi"]["flops"] == 16
    assert bars == [["cost: them", 3 * 2 * 3, 18]]


# --------------------------------------------------------------------------------- which benchmark

def test_own_tasks_are_evaluated_as_tasks_in_snis_layout_without_a_word_of_the_suite(own, tmp_path):
    """All rows that there are: three tasks, without held-out instances, teachers or a T5 of their own."""
    out, err = tmp_path / "out", io.StringIO()
    with contextlib.redirect_stderr(err):
        said = run(own, out, "--no-cost", "--max-output=8")
    found = results(out)
    assert (found["bench"], found["tasks"], found["listed"], found["published"]) == ("sni", 3, 3, [])
    assert [key for key, n in rows(out) if n == 0] == [
        "tagi", "tagi_shuffled", "tagi_empty", "meta", "meta_shuffled", "no_instruction", "copy_input",
        "copy_demo"]
    assert said.count("left out: ") == 3 and err.getvalue() == ""
    assert "paper" not in said and "bench.sample" not in said and "built-in" not in said
    assert "| | ROUGE-L |" in said and "| Animals |" in said and "/3" not in said


def test_the_probe_takes_own_tasks_too(own, tmp_path):
    said = run(own, tmp_path / "out", "--probe", "--max-output=8")
    found = json.loads((tmp_path / "out/probe.json").read_text())
    assert (found["bench"], found["metric"], found["tasks"]) == ("sni", "rouge_l", 3)
    assert "\nleft out: a paraphrase" in said and f"written to {tmp_path}/out" in said


def options_for(*argv):
    parser = evaluate.parser()
    with contextlib.chdir(ROOT):
        argv = predictions.with_checkpoint(parser, list(map(str, argv)))
        return evaluate.config.parse(parser, "evaluate", argv)


def test_the_bench_is_that_of_the_data_that_the_checkpoint_was_trained_on(own, tmp_path):
    """The tiny TAGI's own data are the suite; a checkpoint that names others is tested on those."""
    assert predictions.bench_for(options_for("--checkpoint", TAGI)) == "sample"
    assert predictions.bench_for(options_for("--checkpoint", TAGI, "--data", own)) == "sni"
    folder = tmp_path / "runs/finetune"
    shutil.copytree(TAGI, folder)
    record = common.read_yaml(folder / "config.yaml", "")
    common.write_yaml(str(folder / "config.yaml"), record | {"data": str(own)})
    for flags in (["--checkpoint", folder], ["--runs", tmp_path / "runs"]):     # named, or found in its runs
        options = options_for(*flags)
        assert (options.data, predictions.bench_for(options)) == (str(own), "sni")
    common.write_yaml(str(folder / "config.yaml"), record | {"data": str(own), "format": "p3"})
    assert predictions.bench_for(options_for("--runs", tmp_path / "runs")) == "p3"


def test_a_stage_that_is_not_finished_is_evaluated_at_its_newest_checkpoint(own, tmp_path):
    """By the stage's folder or the checkpoint's; its results then make room for those of a later one."""
    stage = tmp_path / "runs/finetune"
    for n, name in enumerate(("step-000004", "step-000010")):
        shutil.copytree(TAGI, stage / name)
        record = common.read_yaml(stage / name / "config.yaml", "") | {
            "data": str(own), "llm_path": str(ROOT / "assets/t5-tiny"), "llm_is_relative": False, "finished": False}
        del record["data_digest"]
        common.write_yaml(str(stage / name / "config.yaml"), record)
        weights = common.load_file(stage / name / "model.safetensors")
        common.save_tensors(str(stage / name / "model.safetensors"), {key: p * (1 - 0.01 * n) for key, p in weights.items()},
                            {"step": "0"})
        for folder in (stage, stage / name):
            said = call(evaluate, "--checkpoint", str(folder), "--device=cpu", "--rows=tagi_empty", "--max-output=3")
            assert f"saved in {tmp_path}/runs/evaluate:" in said and "| Animals |" in said
    assert (tmp_path / "runs/evaluate/results.md.1").exists() and not (tmp_path / "runs/evaluate/results.md.2").exists()


def test_the_suite_is_known_wherever_it_is(own, tmp_path):
    assert sample.is_suite("data/sample") and sample.is_suite("./data/sample/") and not sample.is_suite(own)
    (tmp_path / "splits/default").mkdir(parents=True)
    (tmp_path / "splits/default/test_unseen_wording_tasks.txt").write_text("a")
    assert not sample.is_suite(tmp_path)
    (tmp_path / "tokenizer").mkdir()
    (tmp_path / "tokenizer/tokenizer.json").write_text("{}")
    assert sample.is_suite(tmp_path)


def test_published_numbers_stand_beside_the_official_test_tasks_alone():
    official = [f"task{n}_x" for n in range(119)]
    assert report.is_official("test", official)
    assert not report.is_official("validation", official) and not report.is_official("test", official[:3])
    assert not report.is_official("test", ["mine"] * 119)


# ----------------------------------------------------------------------------- numbers that are none

def test_a_choice_whose_score_is_no_number_is_never_the_answer(own):
    from data import Instance, Task
    pairs = [(Task("rte: a", "rte", ["d"], [], []), Instance(f"rte-{n}", "x", ["No"], None, ("Yes", "No"))) for n in range(2)]
    assert predictions.likeliest(pairs, [[-1.0, -2.0], [-3.0, -2.0]]) == ["Yes", "No"]
    for value in (float("nan"), float("-inf"), float("inf")):
        with pytest.raises(common.UserError, match="rte: a, instance rte-1: .* no finite numbers"):
            predictions.likeliest(pairs, [[-1.0, -2.0], [-3.0, value]])


@pytest.mark.parametrize("row", ["tagi", "no_instruction"])
def test_a_model_whose_logits_are_no_numbers_answers_nothing(own, tmp_path, monkeypatch, row):
    load = evaluate.TAGI.load

    def poisoned(*args, **kwargs):
        tagi = load(*args, **kwargs)
        with torch.no_grad():
            tagi.llm.lm_head.weight[5] = float("nan")
        return tagi

    monkeypatch.setattr(evaluate.TAGI, "load", poisoned)
    err = io.StringIO()
    with contextlib.redirect_stderr(err), pytest.raises(SystemExit) as end:
        run(own, tmp_path / "out", f"--rows={row}")
    assert end.value.code == 2 and "city, instance city-0" in err.getvalue()
    assert not lines(tmp_path / "out") and not (tmp_path / "out/results.json").exists()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_predictions_that_hold_numbers_that_are_none_are_not_scored(own, whole, tmp_path, value):
    its = lines(whole)
    its[3]["scores"] = [-1.0, value]
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(r) + "\n" for r in its))
    line = refused(own, tmp_path, "--rescore", tmp_path / "p.jsonl")
    assert str(tmp_path / "p.jsonl") in line and its[3]["id"] in line and str(value) in line


def test_results_that_are_no_numbers_are_not_written(whole, tmp_path):
    found = results(whole)
    found["results"][2]["by_task"]["rouge_l"]["city"] = float("nan")
    with pytest.raises(common.UserError, match="TAGI, empty instruction, Def, by_task, rouge_l, city is nan"):
        report.write(found, str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_fresh_sets_an_evaluation_aside_once_and_not_after_each_crash(own, tmp_path, monkeypatch):
    """A launcher that starts all processes again, --fresh and all, goes on with what was answered."""
    out, words = tmp_path / "out", ("--no-cost", "--rows=copy_input", "--eval-instances=2", "--fresh")
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    run(own, out, *words)
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    run(own, out, *words)
    assert not list(out.glob("*.1"))
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "0")       # a new launch
    run(own, out, *words)
    assert list(out.glob("*.1"))
