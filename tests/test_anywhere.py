"""Scripts are started by their paths from any current folder."""
import os
import subprocess
import sys

import pytest

pytest.register_assert_rewrite("stages")
pytest_plugins = ("stages",)
from stages import ROOT, at_step, environment

from bench import machine

BENCH = ["bench/check.py", "bench/launch.py", "bench/plot.py", "bench/sample.py"]
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
