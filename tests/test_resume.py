"""A run that was cut off goes on where it was, bit for bit; what is done is not done again; a seed decides everything."""
import re
import signal
import subprocess
import time

import pytest
import torch

pytest.register_assert_rewrite("stages")
pytest_plugins = ("stages",)
from conftest import apart
from stages import ROOT, STAGES, at_step, environment, interrupt

import common

NEEDS = {"base": (), "meta": ("base",), "lora": ("meta",), "lora-all": ("meta",),
         "pretrain": ("meta",), "finetune": ("meta", "lora", "pretrain")}
FOUR = ("--steps", "4", "--save-every", "2")


class Killed(Exception):
    pass


def kill():
    raise Killed


def same(a: dict, b: dict) -> bool:
    """The same tensors, bit for bit."""
    return a.keys() == b.keys() and all(a[name].dtype == b[name].dtype and torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("stage, flags", [
    ("base", ()), ("lora-all", ()), ("lora-all", ("--accumulate", "2", "--bucket-steps", "3")),
    ("meta", ()), ("meta", ("--accumulate", "2", "--optimizer", "adafactor")),
    ("pretrain", ()), ("finetune", ()),
    ("finetune", ("--train-embeddings", "--demos", "2", "--schedule", "linear")),
    ("meta", ("--bucket-steps", "3", "--accumulate", "2")), ("pretrain", ("--bucket-steps", "3")),
    ("finetune", ("--bucket-steps", "3", "--accumulate", "2")), ("finetune", ("--generator=none", "--optimizer", "adafactor"))])
@pytest.mark.numbers
def test_resumed_after_ctrl_c_equals_uninterrupted(finished, tmp_path, monkeypatch, capsys, stage, flags):
    straight, cut = (finished.copy(tmp_path / name, NEEDS[stage]) for name in ("straight", "cut"))
    straight.run(stage, *FOUR, *flags)
    with monkeypatch.context() as patch, pytest.raises(SystemExit) as end:
        at_step(patch, 1, interrupt)
        capsys.readouterr()
        cut.run(stage, *FOUR, *flags)
    assert end.value.code == 130
    said = capsys.readouterr().out
    assert str(cut.runs / stage) in said and "run the same command again" in said
    saved = cut.record(stage)
    assert 0 < saved["step"] < 4 and not saved["finished"] and f"stopped after step {saved['step']}" in said
    cut.run(stage, *FOUR, *flags)
    assert cut.record(stage)["finished"] and cut.record(stage)["step"] == 4
    assert same(cut.weights(stage), straight.weights(stage))
    assert [row["step"] for row in cut.log(stage)] == [1, 2, 3, 4]


@pytest.mark.parametrize("stage", ["meta", "lora-all", "pretrain", "finetune"])
def test_resumed_from_the_last_checkpoint_of_a_killed_run_equals_uninterrupted(finished, tmp_path, monkeypatch, stage):
    straight, cut = (finished.copy(tmp_path / name, NEEDS[stage]) for name in ("straight", "cut"))
    straight.run(stage, *FOUR)
    with monkeypatch.context() as patch, pytest.raises(Killed):
        at_step(patch, 3, kill)
        cut.run(stage, *FOUR)
    assert cut.record(stage)["step"] == 2
    cut.run(stage, *FOUR)
    assert same(cut.weights(stage), straight.weights(stage))


@pytest.mark.parametrize("stage", ["meta", "finetune"])
def test_a_run_killed_before_its_first_checkpoint_starts_again_from_the_beginning(finished, tmp_path, monkeypatch, stage):
    cut = finished.copy(tmp_path / "cut", NEEDS[stage])
    with monkeypatch.context() as patch, pytest.raises(Killed):
        at_step(patch, 1, kill)
        cut.run(stage)
    cut.run(stage)
    assert same(cut.weights(stage), finished.weights(stage))


def test_ctrl_c_in_the_last_step_leaves_a_finished_stage(finished, tmp_path, monkeypatch):
    cut = finished.copy(tmp_path / "cut", ("meta",))
    at_step(monkeypatch, 2, interrupt)
    try:
        cut.run("pretrain")
    except SystemExit as end:
        assert end.code == 130
    assert cut.record("pretrain")["finished"] and same(cut.weights("pretrain"), finished.weights("pretrain"))


def test_ctrl_c_in_a_stages_last_step_does_not_start_the_next_stage(finished, tmp_path, monkeypatch):
    cut = finished.copy(tmp_path / "cut", ())
    with monkeypatch.context() as patch, pytest.raises(SystemExit) as end:
        at_step(patch, 2, interrupt)
        cut.run(None)
    assert end.value.code == 130
    assert cut.record("base")["finished"] and not (cut.runs / "meta" / "model.safetensors").exists()


@pytest.mark.numbers
def test_an_interrupted_lora_stage_keeps_finished_teachers_and_a_rerun_skips_them(finished, tmp_path, monkeypatch, capsys):
    cut = finished.copy(tmp_path / "cut", ("meta",))
    one = ("--teachers-at-once", "1")
    with monkeypatch.context() as patch, pytest.raises(SystemExit) as end:
        at_step(patch, 5, interrupt)                                        # two steps a teacher: in the third's first
        capsys.readouterr()
        cut.run("lora", *one)
    assert end.value.code == 130 and "run the same command again" in capsys.readouterr().out
    kept = {path: path.stat().st_mtime_ns for path in cut.runs.glob("lora/*/model.safetensors")}
    assert len(kept) == 2 and not cut.record("lora")["finished"]
    cut.run("lora", *one)
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    names = sorted(path.parent.name for path in finished.runs.glob("lora/*/model.safetensors"))
    assert names == sorted(path.parent.name for path in cut.runs.glob("lora/*/model.safetensors")) and len(names) > 3
    for name in names:                                                      # and each is what it is in a group
        alone, together = cut.weights("lora", name), finished.weights("lora", name)
        assert apart(alone, together, cut.record("lora")["lr"]) < 0.03


@pytest.mark.parametrize("how, error", [(interrupt, SystemExit), (kill, Killed)])
@pytest.mark.numbers
def test_teachers_under_way_go_on_where_they_were(finished, tmp_path, monkeypatch, how, error):
    straight, cut = (finished.copy(tmp_path / name, ("meta",)) for name in ("straight", "cut"))
    straight.run("lora", *FOUR)
    with monkeypatch.context() as patch, pytest.raises(error):
        at_step(patch, 3, how)
        cut.run("lora", *FOUR)
    groups = [common.load_options(common.checkpoint_of(path)) for path in cut.runs.glob("lora/group-*")]
    assert [group.step for group in groups] == [3 if how is interrupt else 2]
    cut.run("lora", *FOUR)
    names = sorted(path.parent.name for path in straight.runs.glob("lora/*/model.safetensors"))
    assert names == sorted(path.parent.name for path in cut.runs.glob("lora/*/model.safetensors")) and len(names) > 3
    assert all(same(cut.weights("lora", name), straight.weights("lora", name)) for name in names)
    assert not list(cut.runs.glob("lora/group-*"))


@pytest.mark.numbers
def test_teachers_that_started_from_a_tagi_go_on_where_they_were(finished, tmp_path, monkeypatch):
    straight, cut = (finished.copy(tmp_path / name, ("meta",)) for name in ("straight", "cut"))
    flags = (*FOUR, "--unit=task", "--teachers-at-once=7", "--init-from", finished.runs / "finetune")
    straight.run("lora", *flags)
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        at_step(patch, 2, interrupt)
        cut.run("lora", *flags)
    cut.run("lora", *flags)
    names = sorted(path.parent.name for path in straight.runs.glob("lora/*/model.safetensors"))
    assert len(names) == 12
    assert all(same(cut.weights("lora", name), straight.weights("lora", name)) for name in names)


def test_ctrl_c_in_the_last_step_of_a_group_of_teachers_keeps_them(finished, tmp_path, monkeypatch):
    cut = finished.copy(tmp_path / "cut", ("meta",))
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        at_step(patch, 2, interrupt)
        cut.run("lora", "--teachers-at-once", "1")
    assert len(list(cut.runs.glob("lora/*/model.safetensors"))) >= 1


def test_ctrl_c_to_a_process_leaves_a_checkpoint_from_which_the_same_command_goes_on(finished, tmp_path, monkeypatch):
    cut = finished.copy(tmp_path / "cut", ("meta",))
    flags = ("--steps", "100000")
    log = cut.runs / "pretrain" / "log.jsonl"
    process = subprocess.Popen(cut.command("pretrain", *flags), cwd=ROOT, env=environment(), text=True,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    try:
        deadline = time.time() + 120
        while not (log.exists() and log.read_text().count("\n") >= 3):
            assert process.poll() is None and time.time() < deadline
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130 and "Traceback" not in err
    step = int(re.search(r"stopped after step (\d+)", out).group(1))
    assert "run the same command again" in out
    assert cut.record("pretrain")["step"] == step and not cut.record("pretrain")["finished"]
    with pytest.raises(SystemExit):
        at_step(monkeypatch, 1, interrupt)
        cut.run("pretrain", *flags)
    logged = [row["step"] for row in cut.log("pretrain")]
    assert logged == sorted(set(logged)) and logged[-1] <= step + 1
    assert cut.record("pretrain")["step"] == step + 1


@pytest.mark.parametrize("stage", STAGES)
def test_a_finished_stage_is_not_run_again_and_fresh_starts_over(project, finished, monkeypatch, stage):
    files = project.files()
    at_step(monkeypatch, 1, lambda: pytest.fail("a finished stage was trained"))
    out = project.run(stage)
    assert "finished at step 2" in out and "--fresh" in out and project.files() == files
    monkeypatch.undo()
    project.run(stage, "--fresh")
    assert [row["step"] for row in project.log(stage)] == [1, 2]
    assert project.files().keys() == files.keys() and same(project.weights(stage), finished.weights(stage))
    changed = {path for path, seen in project.files().items() if seen[0] != files[path][0]}
    assert {path for path in files if stage in path.parts} == changed                       # its own folder, no other


@pytest.mark.parametrize("stage", STAGES)
def test_another_option_on_a_finished_run_is_refused_with_its_name(project, stage):
    line = project.refuses(stage, "--lr", "0.5")
    assert f"--lr {project.record(stage)['lr']}," in line and "0.5" in line and str(project.runs / stage) in line and "--fresh" in line


@pytest.mark.parametrize("flag", ["--lr=0.5", "--steps=5", "--rank=3", "--seed=4", "--fusion=none", "--lambda-ins=0.5",
                                  "--targets=q,v", "--demos=2", "--max-instances=4"])
def test_another_option_on_an_unfinished_run_is_refused_with_its_name(project, monkeypatch, flag):
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        at_step(patch, 1, interrupt)
        project.run("finetune", *FOUR, "--name=cut")
    assert flag.partition("=")[0].replace("--no-", "--") in project.refuses("finetune", *FOUR, "--name=cut", flag)


def test_what_does_not_change_the_result_may_change_between_runs(project, monkeypatch, tmp_path):
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        at_step(patch, 1, interrupt)
        project.run("finetune", "--steps=4", "--name=cut")
    project.run("finetune", "--steps=4", "--name=cut", "--save-every=1", "--device=cpu")
    assert project.record("cut")["finished"]


def edit(path, old, new):
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


@pytest.mark.parametrize("stage", ["meta", "pretrain", "finetune"])
def test_an_unfinished_run_goes_on_with_its_own_number_of_processes_only(
        finished, tmp_path, monkeypatch, stage):
    """A run from before the number was recorded is taken as it is."""
    cut = finished.copy(tmp_path / "cut", NEEDS[stage])
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        at_step(patch, 1, interrupt)
        cut.run(stage, *FOUR)
    record = cut.checkpoint(stage) / "config.yaml"
    assert cut.record(stage)["processes"] == 1
    edit(record, "processes: 1\n", "processes: 2\n")
    line = cut.refuses(stage, *FOUR)
    assert str(cut.runs / stage) in line and "2 processes, not 1" in line
    assert "--nproc-per-node 2" in line and "--fresh --accumulate 2" in line
    edit(record, "processes: 2\n", "")
    cut.run(stage, *FOUR)
    assert cut.record(stage)["finished"] and cut.record(stage)["processes"] == 1
    record = cut.runs / stage / "config.yaml"
    edit(record, "processes: 1\n", "processes: 2\n")
    assert "nothing to do" in cut.run(stage, *FOUR)                         # what is done is done


def test_lora_teachers_go_on_with_another_number_of_processes_and_leave_nothing_half_done(
        finished, tmp_path, monkeypatch):
    cut = finished.copy(tmp_path / "cut", ("meta",))
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        at_step(patch, 1, interrupt)
        cut.run("lora", "--teachers-at-once", "2")
    edit(cut.runs / "lora" / "config.yaml", "processes: 1\n", "processes: 2\n")
    assert list(cut.runs.glob("lora/group-*"))
    cut.run("lora")                                             # other groups than those under way
    assert cut.record("lora")["finished"] and not list(cut.runs.glob("lora/group-*"))
    theirs, its = (list(p.runs.glob("lora/*/model.safetensors")) for p in (finished, cut))
    assert len(theirs) == len(its) > 3


def test_an_unfinished_run_does_not_go_on_with_another_frozen_llm(finished, tmp_path, monkeypatch):
    cut = finished.copy(tmp_path / "cut", ("base", "meta"))
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        at_step(patch, 1, interrupt)
        cut.run("pretrain", *FOUR)
    cut.run("meta", "--fresh", "--seed", "1")
    line = cut.refuses("pretrain", *FOUR)
    assert str(cut.runs / "pretrain") in line and str(cut.runs / "meta") in line


@pytest.mark.parametrize("stage", ["meta", "finetune"])
@pytest.mark.parametrize("file, damage", [("optimizer.pt", "cut"), ("optimizer.pt", "gone"), ("model.safetensors", "cut"),
                                          ("model.safetensors", "gone")])
def test_a_damaged_unfinished_run_is_refused_in_one_line(finished, tmp_path, monkeypatch, stage, file, damage):
    cut = finished.copy(tmp_path / "cut", NEEDS[stage])
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        at_step(patch, 1, interrupt)
        cut.run(stage, *FOUR)
    path = cut.checkpoint(stage) / file
    path.write_bytes(path.read_bytes()[:path.stat().st_size // 2]) if damage == "cut" else path.unlink()
    assert str(cut.runs / stage) in cut.refuses(stage, *FOUR)
    cut.run(stage, *FOUR, "--fresh")
    assert cut.record(stage)["finished"]


def chain(finished, runs, *flags):
    project = finished.copy(runs, ())
    for stage in STAGES:
        project.run(stage, *flags)
    return project


def folders(project):
    return sorted(path.parent.relative_to(project.runs).parts for path in project.runs.rglob("model.safetensors"))


def test_the_same_seed_gives_the_same_weights_and_another_seed_others(finished, tmp_path):
    again, other = chain(finished, tmp_path / "again"), chain(finished, tmp_path / "other", "--seed=1")
    assert folders(again) == folders(other) == folders(finished)
    for folder in folders(finished):
        assert same(again.weights(*folder), finished.weights(*folder)), folder
        assert folder == ("lora",) or not same(other.weights(*folder), finished.weights(*folder)), folder
