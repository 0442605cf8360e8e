"""What a run's folder goes through: checkpoints that are kept, numbers that are none, a lock, other people's files."""
import argparse
import json
import os
import subprocess
import sys
import time

import pytest
import torch
import yaml

pytest.register_assert_rewrite("stages")
pytest_plugins = ("stages",)
from stages import ROOT, STAGES, at_step, environment, interrupt
from test_resume import NEEDS, same

import common
import config
import t5
import train_hyper
from bench import folders, machine
from bench.watch import Watch

TOGETHER = [stage for stage in STAGES if stage != "lora"]


def steps_in(folder) -> list[str]:
    return sorted(path.name for path in folder.glob("step-*"))


# -------------------------------------------------------------------------------- checkpoints that are kept

@pytest.mark.parametrize("stage", ["meta", "finetune"])
def test_the_newest_checkpoints_are_kept_and_the_last_ones_files_stand_in_the_stages_folder(finished, tmp_path, stage):
    project = finished.copy(tmp_path / "runs", NEEDS[stage])
    project.run(stage, "--steps=5", "--save-every=1", "--keep=3")
    folder = project.runs / stage
    assert steps_in(folder) == ["step-000003", "step-000004"] and not os.path.lexists(folder / "latest")
    assert project.record(stage)["finished"] and project.record(stage)["step"] == 5
    for n in (3, 4):
        record = yaml.safe_load((folder / f"step-00000{n}" / "config.yaml").read_text())
        assert record["step"] == n and not record["finished"]
    assert not list(folder.glob("*.tmp")) and not list(folder.glob(".unfinished*"))


def test_a_checkpoint_on_the_way_loads_as_a_model_of_its_own(finished, tmp_path, monkeypatch):
    project = finished.copy(tmp_path / "runs", NEEDS["finetune"])
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        at_step(patch, 2, interrupt)
        project.run("finetune", "--steps=4")
    folder = project.runs / "finetune"
    assert steps_in(folder) == ["step-000002"] and os.readlink(folder / "latest") == "step-000002"
    for path in (folder, folder / "latest", folder / "step-000002"):
        tagi = train_hyper.TAGI.load(str(path))
        assert os.path.realpath(tagi.llm_path) == os.path.realpath(project.runs / "meta")
        assert len(tagi.generate(["a cat"], tagi.adapt(["Find the animal."]))) == 1


@pytest.mark.parametrize("stage", STAGES)
def test_a_finished_stage_goes_on_with_more_steps(finished, tmp_path, stage):
    project = finished.copy(tmp_path / "runs", [*NEEDS[stage], stage])
    constant = ("--schedule=constant", "--warmup=0")
    straight = finished.copy(tmp_path / "straight", NEEDS[stage])
    for its, steps in ((project, ("--fresh", "--steps=2")), (project, ("--steps=4",)), (straight, ("--steps=4",))):
        its.run(stage, *constant, *steps)
    assert project.record(stage)["step"] == 4 and project.record(stage)["finished"]
    for path in straight.runs.glob(f"{stage}/**/model.safetensors"):
        where = path.parent.relative_to(straight.runs).parts
        assert same(project.weights(*where), straight.weights(*where)), where
    assert "nothing to do" in project.run(stage, *constant, "--steps=4")
    assert "--steps 4, not 3" in project.refuses(stage, *constant, "--steps=3")


def test_a_missing_teacher_of_a_finished_stage_is_trained_again_by_the_command_that_is_advised(finished, tmp_path):
    project = finished.copy(tmp_path / "runs", ["meta", "lora", "pretrain"])
    gone = next(path.parent for path in project.runs.glob("lora/*/model.safetensors"))
    name, weights = gone.name, project.weights("lora", gone.name)
    folders.remove_ours(str(gone))
    line = project.refuses("finetune")
    assert name in line and "--stage lora" in line
    project.run("lora", "--teachers-at-once=16")
    assert project.weights("lora", name).keys() == weights.keys()
    project.run("finetune")


# -------------------------------------------------------------------------------- numbers that are not finite

@pytest.fixture
def poisoned(monkeypatch):
    """poisoned(n): the n-th logits from here on, of those that are learned from, are NaN."""
    def poison(n, rows=slice(None)):
        calls, logits = [0], t5.logits

        def some(*args):
            made = logits(*args)
            if torch.is_grad_enabled():
                calls[0] += 1
                if calls[0] == n:
                    factor = torch.ones(len(made), 1, 1)
                    factor[rows] = float("nan")
                    made = made * factor
            return made
        monkeypatch.setattr(t5, "logits", some)
        ce = train_hyper.target_losses

        def losses(student, *args, **kwargs):
            calls[0] += 1
            return ce(student * float("nan") if calls[0] == n else student, *args, **kwargs)
        monkeypatch.setattr(train_hyper, "target_losses", losses)
    return poison


@pytest.mark.parametrize("stage", TOGETHER)
def test_a_step_that_is_not_finite_stops_the_run_and_harms_no_checkpoint(finished, tmp_path, poisoned, stage):
    project = finished.copy(tmp_path / "runs", NEEDS[stage])
    poisoned(3)
    flags = ("--steps=4", "--save-every=1")
    line = project.refuses(stage, *flags)
    assert "step 3" in line and "nan" in line and "step-000002" in line and "--on-nan skip" in line and len(line) < 300
    told = project.log(stage)[-1]
    assert told["step"] == 3 and told["not_finite"] == ["nan", "nan"] and len(told["tasks"]) > 1
    if stage not in ("base", "pretrain"):
        names = (project.data / "splits" / "default" / "train_tasks.txt").read_text().split()
        assert any(name in line for name in names)
    assert project.record(stage)["step"] == 2
    assert all(p.isfinite().all() for p in project.weights(stage).values())
    project.run(stage, *flags)                          # the poison was there once
    straight = finished.copy(tmp_path / "straight", NEEDS[stage])
    straight.run(stage, *flags)
    assert same(project.weights(stage), straight.weights(stage))


@pytest.mark.parametrize("stage", ["meta", "finetune"])
def test_a_step_that_is_not_finite_is_left_out_and_counted_where_that_is_asked_for(finished, tmp_path, poisoned, stage):
    project = finished.copy(tmp_path / "runs", NEEDS[stage])
    poisoned(2)
    project.run(stage, "--steps=4", "--on-nan=skip")
    assert all(p.isfinite().all() for p in project.weights(stage).values())
    rows = project.log(stage)
    assert [row["step"] for row in rows] == [1, 2, 2, 3, 4] and rows[1]["tasks"] and rows[2]["loss"] is None
    assert [row.get("skipped", 0) for row in rows] == [0, 0, 1, 1, 1]
    for line in (project.runs / stage / "log.jsonl").read_text().splitlines():
        json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))


def test_only_the_teacher_whose_numbers_are_not_finite_is_lost(finished, tmp_path, poisoned):
    project = finished.copy(tmp_path / "runs", ["meta"])
    poisoned(2, slice(0, 4))                            # the first teacher's rows
    names = sorted(path.parent.name for path in finished.runs.glob("lora/*/model.safetensors"))
    record = {name: finished.record("lora", name)["unit_name"] for name in names}
    line = project.refuses("lora")
    first = sorted(record, key=record.get)[0]
    assert record[first] in line and f"1 of {len(names)} teachers" in line
    assert sorted(path.parent.name for path in project.runs.glob("lora/*/model.safetensors")) == sorted(set(names) - {first})
    for name in set(names) - {first}:
        assert same(project.weights("lora", name), finished.weights("lora", name)), name
    project.run("lora")                                 # the poison was there once: it alone is trained anew
    assert project.record("lora")["finished"] and all(p.isfinite().all() for p in project.weights("lora", first).values())


def test_a_teachers_step_that_is_not_finite_is_left_out_where_that_is_asked_for(finished, tmp_path, poisoned):
    project = finished.copy(tmp_path / "runs", ["meta"])
    poisoned(1, slice(0, 4))
    project.run("lora", "--on-nan=skip")
    assert project.record("lora")["finished"] and project.log("lora")[-1]["skipped"] == 1
    for path in finished.runs.glob("lora/*/model.safetensors"):
        weights = project.weights("lora", path.parent.name)
        assert all(p.isfinite().all() for p in weights.values())


def test_weights_that_are_not_finite_are_neither_written_nor_loaded(finished, tmp_path):
    project = finished.copy(tmp_path / "runs", ["meta", "pretrain", "finetune"])
    weights = project.weights("finetune")
    name = next(iter(weights))
    weights[name].view(-1)[0] = float("inf")
    with pytest.raises(common.UserError, match="not finite"):
        common.save_checkpoint(str(tmp_path / "new"), project.record("finetune"), weights)
    assert not (tmp_path / "new" / "model.safetensors").exists()
    common.save_tensors(str(project.runs / "finetune" / "model.safetensors"), weights, {"step": "2"})
    assert name in project.refuses("adapt", "--instruction=Find the city.", "--input=Rome")


# ------------------------------------------------------------------------- one run a folder, other people's files

def test_a_second_run_in_a_folder_is_refused_in_one_line(finished, tmp_path):
    project = finished.copy(tmp_path / "runs", ["meta"])
    words = project.command("pretrain", "--steps=100000")
    first = subprocess.Popen(words, cwd=ROOT, env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    try:
        deadline = time.time() + 120
        while not (project.runs / "pretrain" / "log.jsonl").exists():
            assert first.poll() is None and time.time() < deadline
            time.sleep(0.05)
        for flags in ((), ("--fresh",)):
            line = project.refuses("pretrain", "--steps=100000", *flags)
            assert "another run is at work" in line and str(project.runs / "pretrain") in line
    finally:
        first.kill()
        first.communicate()
    assert "steps" in project.run("pretrain", "--steps=2", "--fresh")           # the lock went with the process


@pytest.mark.parametrize("flags", [(), ("--fresh",)])
def test_a_folder_with_files_of_others_is_neither_emptied_nor_written_to(finished, tmp_path, flags):
    project = finished.copy(tmp_path / "runs", ["meta"])
    folder = project.runs / "thesis"
    folder.mkdir()
    (folder / "chapter.tex").write_text("mine")
    (folder / "config.yaml").write_text("mine: too")
    line = project.refuses("pretrain", "--name=thesis", *flags)
    assert "thesis" in line and sorted(path.name for path in folder.iterdir()) == ["chapter.tex", "config.yaml"]


def test_fresh_removes_what_the_program_wrote_and_leaves_what_it_did_not(project):
    folder = project.runs / "lora"
    teacher = next(path.parent for path in folder.glob("*/model.safetensors"))
    mine = [folder / "notes.txt", teacher / "notes.txt", folder / "plots" / "a.png"]
    for path in mine:
        path.parent.mkdir(exist_ok=True)
        path.write_text("mine")
    old = (teacher / "model.safetensors").stat().st_mtime_ns
    project.run("lora", "--fresh")
    assert all(path.read_text() == "mine" for path in mine)
    assert (teacher / "model.safetensors").stat().st_mtime_ns > old


def test_another_spelling_of_a_path_is_no_other_option(project, tmp_path):
    link = tmp_path / "a-link"
    link.symlink_to(project.data)
    for spelling in (link, f"{project.data}/.", os.path.relpath(project.data, ROOT)):
        assert "nothing to do" in project.run("meta", "--data", spelling)


def test_run_yaml_tells_how_each_run_in_a_folder_was_started_and_on_what(finished, tmp_path, monkeypatch):
    project = finished.copy(tmp_path / "runs", ["meta"])
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        at_step(patch, 2, interrupt)
        project.run("pretrain", "--steps=4")
    project.run("pretrain", "--steps=4")
    told = yaml.safe_load((project.runs / "pretrain" / "run.yaml").read_text())
    assert [run["from_step"] for run in told["runs"]] == [0, 2] and told["go_on_with"].startswith("python ")
    for key in ("command", "processes", "started", "host", "cpu", "gpu", "cores", "versions"):
        assert told["runs"][1][key], key
    assert project.record("pretrain")["seconds"] > 0


def test_what_is_told_to_go_on_with_a_run_does_not_start_it_over(finished, tmp_path, monkeypatch, capsys):
    project = finished.copy(tmp_path / "runs", ["meta"])
    monkeypatch.setattr("sys.argv", ["train_hyper.py", "--stage", "pretrain", "--fresh", "--steps=4"])
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        at_step(patch, 2, interrupt)
        project.run("pretrain", "--fresh", "--steps=4")
    assert "run the same command again, without --fresh, to go on" in capsys.readouterr().out
    told = yaml.safe_load((project.runs / "pretrain" / "run.yaml").read_text())
    assert told["go_on_with"] == "python train_hyper.py --stage pretrain --steps=4"
    assert "--fresh" in told["runs"][0]["command"]


@pytest.mark.parametrize("started, again", [
    ({"TORCHELASTIC_RUN_ID": "x"}, {"TORCHELASTIC_RESTART_COUNT": "1"}), ({"SLURM_JOB_ID": "7"}, {"SLURM_RESTART_COUNT": "1"})])
def test_fresh_starts_over_once_and_not_after_each_crash_or_requeue(finished, tmp_path, monkeypatch, started, again):
    project = finished.copy(tmp_path / "runs", NEEDS["pretrain"])
    command = ["pretrain", "--fresh", "--steps=4", "--save-every=2"]
    for name, value in started.items():
        monkeypatch.setenv(name, value)
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        at_step(patch, 2, interrupt)
        project.run(*command)
    for name, value in again.items():
        monkeypatch.setenv(name, value)
    assert "finished" in project.run(*command)
    runs = yaml.safe_load((project.runs / "pretrain" / "run.yaml").read_text())["runs"]
    assert [run["from_step"] for run in runs] == [0, 2]
    for name in started:                                        # of another launch it is another run
        monkeypatch.setenv(name, "8")
    monkeypatch.setattr(os, "getppid", lambda: 8)
    project.run(*command)
    runs = yaml.safe_load((project.runs / "pretrain" / "run.yaml").read_text())["runs"]
    assert [run["from_step"] for run in runs] == [0]


# --------------------------------------------------------------------------------- standard output

@pytest.mark.parametrize("what", ["full", "not read"])
def test_a_training_outlives_its_standard_output(finished, tmp_path, monkeypatch, capfd, what):
    project, (read, write) = finished.copy(tmp_path / "runs", NEEDS["finetune"]), os.pipe()
    os.close(read)
    with open("/dev/full", "w") if what == "full" else os.fdopen(write, "w") as stream, monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", stream)
        train_hyper.main(project.argv("finetune", "--name=other"))
        assert sys.stdout is stream
    said = capfd.readouterr().err
    assert said.count("cannot be written") == 1 and "going on" in said
    assert same(finished.weights("finetune"), project.weights("other"))


# --------------------------------------------------------------------------------------------- processes

def test_a_cluster_that_sets_world_size_for_a_single_process_changes_nothing(monkeypatch):
    for name in ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WORLD_SIZE", "8")
    assert common.init_processes("cpu") == (0, 1)
    for name in ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "${UNSET}")                    # and others what torchrun never sets
    assert common.init_processes("cpu") == (0, 1)


@pytest.mark.parametrize("name", ["step-000003", "step-1", "best-000002"])
def test_a_run_is_not_called_as_a_checkpoint_within_one(project, name):
    assert "not step-N or best-N" in project.refuses("finetune", f"--name={name}")


def test_the_command_told_next_names_data_and_runs_of_ones_own(tmp_path):
    (tmp_path / "c.yaml").write_text("rank: 4\n")
    options = argparse.Namespace(config=str(tmp_path / "c.yaml"), data="my tasks", runs="r", model="tiny")
    assert t5.config_flag(options) == f" --config {tmp_path}/c.yaml --data 'my tasks' --runs r"
    options.config, options.data, options.runs = config.beside("configs/sample.yaml"), "./data/sample", "runs/sample"
    assert t5.config_flag(options) == ""


def test_ranks_that_read_different_things_are_refused_before_the_first_step(finished, tmp_path, monkeypatch):
    project = finished.copy(tmp_path / "runs", NEEDS["finetune"])
    for key, value in (("lr", 0.5), ("data_digest", "another"), ("llm_fingerprint", "another")):
        with monkeypatch.context() as patch:
            patch.setattr(common, "gather_over_ranks", lambda ours: [ours, ours | {key: value}])
            line = project.refuses("finetune", "--name=other")
            assert "rank 1" in line and key in line and str(value) in line
    assert not (project.runs / "other" / "run.yaml").exists()


def test_versions_are_told_where_there_is_no_git(monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    assert machine.versions.__wrapped__()["git"] == "none"


@pytest.mark.parametrize("told, silent", [
    ([[7, 0, 0], [6, 0, 0]], 1),                # rank 0 waits for rank 1 in a meeting
    ([[900, 0, 1], [300, 0, 0], [500, 0, 0]], 1),       # rank 0 is done; two hang, the one that did less is named
    ([[900, 0, 1], [5, 0, 0]], 1)])
def test_the_watch_names_the_rank_that_does_nothing(monkeypatch, told, silent):
    written, clock = [], [0.0]
    monkeypatch.setattr("bench.watch.time.monotonic", lambda: clock[0])
    monkeypatch.setattr("bench.watch.os.write", lambda n, text: written.append(text.decode()))

    def leave(code):
        raise SystemExit(code)
    monkeypatch.setattr("bench.watch.os._exit", leave)
    watch = Watch("x", 0 if silent else 1, len(told), minutes=2)
    watch.told = told
    watch._check()
    clock[0] = 119
    watch._check()                              # not yet
    clock[0] = 121
    with pytest.raises(SystemExit):
        watch._check()
    assert written and f"rank {silent} of {len(told)}" in written[0] and "--timeout" in written[0]


def test_a_rank_that_goes_on_is_not_silent_however_long_another_waits(monkeypatch):
    clock = [0.0]
    monkeypatch.setattr("bench.watch.time.monotonic", lambda: clock[0])
    monkeypatch.setattr("bench.watch.os._exit", lambda code: pytest.fail("ended"))
    watch = Watch("x", 0, 2, minutes=2)
    for minute in range(600):
        clock[0] = 60 * minute
        watch.told = [[9, 0, 1], [minute, 0, 0]]
        watch._check()
