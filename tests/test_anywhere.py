"""Scripts are started by their paths from any current folder, and one that was removed is told in one line."""
import os
import subprocess
import sys

import pytest

pytest.register_assert_rewrite("stages")
pytest_plugins = ("stages",)
from stages import ROOT, at_step, environment

from bench import machine

BENCH = ["bench/check.py", "bench/launch.py", "bench/plot.py", "bench/sample.py", "bench/scratch.py"]
SCRIPTS = ["adapt.py", "evaluate.py", "train_hyper.py", "train_teacher.py", *BENCH]


def help_of(*words, cwd, before="true"):
    """A script's --help, started in this folder, of which a shell command has done away with something before."""
    command = f'{before} && exec "$@" --help'
    return subprocess.run(["bash", "-c", command, "bash", sys.executable, *map(str, words)], cwd=cwd, env=environment(),
                          capture_output=True, text=True, timeout=300)


def test_these_are_all_scripts():
    for folder in (ROOT, ROOT / "bench"):
        for path in folder.glob("*.py"):
            is_script = "__main__" in path.read_text() and path.name != "early.py"
            assert is_script == (str(path.relative_to(ROOT)) in SCRIPTS), path


@pytest.mark.parametrize("script", BENCH)
def test_a_script_of_bench_is_started_by_its_path_from_another_folder(tmp_path, script):
    done = help_of(ROOT / script, cwd=tmp_path)
    assert done.returncode == 0 and done.stdout.startswith("usage: "), done.stderr
    assert not list(tmp_path.iterdir())


def test_what_goes_on_with_a_run_names_the_launcher_by_its_path_where_it_is_not_here(tmp_path, monkeypatch):
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "2")
    monkeypatch.chdir(ROOT)
    assert machine.command_line().startswith("python -m bench.launch --nproc-per-node 2 ")
    monkeypatch.chdir(tmp_path)
    assert machine.command_line().startswith(f"python {ROOT}/bench/launch.py --nproc-per-node 2 ")


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_current_folder_that_was_removed_is_one_line(tmp_path, script):
    (tmp_path / "gone").mkdir()
    done = help_of(ROOT / script, cwd=tmp_path / "gone", before='rmdir "$PWD"')
    assert done.returncode == 2 and not done.stdout
    lines = [line for line in done.stderr.splitlines() if not line.startswith("shell-init")]     # bash's own
    assert len(lines) == 1 and lines[0].startswith("error: the current folder was removed"), done.stderr


def test_a_current_folder_that_is_removed_while_a_run_is_at_work_costs_it_nothing(finished, tmp_path, monkeypatch):
    project = finished.copy(tmp_path / "runs", ["meta"])

    def removed():
        def getcwd():
            raise FileNotFoundError(2, "No such file or directory")
        monkeypatch.setattr(os, "getcwd", getcwd)
    at_step(monkeypatch, 1, removed)
    project.run("pretrain")
    monkeypatch.undo()
    assert project.record("pretrain")["finished"] and project.record("pretrain")["cwd"] == str(ROOT)
