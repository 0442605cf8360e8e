"""A miniature suite, tiny options and ways of calling the scripts, for the tests of what a user types.

Test modules load this file with `pytest_plugins = ("stages",)` and get two fixtures: `finished`, all five stages run for
two steps, only to be read, and `project`, a copy of it of one's own.
"""
import contextlib
import io
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from safetensors.torch import load_file

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ.setdefault("HF_HUB_OFFLINE", "1")                    # a wrong path must not become a search of the hub

import adapt
import common
import evaluate
from bench import sample
from bench.runs import Log
import train_hyper
import train_teacher
from conftest import THREADS

STAGES = ("base", "meta", "lora", "lora-all", "pretrain", "finetune")
MODULES = {"base": train_teacher, "meta": train_teacher, "lora": train_teacher,
           "lora-all": train_teacher, "pretrain": train_hyper, "finetune": train_hyper,
           "evaluate": evaluate, "adapt": adapt}
KEPT = {"train": 12, "validation": 3, "test": 3,  # tasks of each split
        "validation_unseen_wording": 3, "test_unseen_wording": 3}


def write_suite(root: Path) -> None:
    """The built-in suite, cut down to a few tasks and a few documents."""
    with contextlib.redirect_stdout(io.StringIO()):
        sample.write_suite(root, seed=0)
    for split, n in KEPT.items():
        path = root / "splits" / "default" / f"{split}_tasks.txt"
        path.write_text("".join(name + "\n" for name in path.read_text().split()[:n]))
    named = {name for path in (root / "splits" / "default").iterdir() for name in path.read_text().split()}
    for path in (root / "tasks").iterdir():
        if path.stem not in named:
            path.unlink()
    corpus = root / "corpus.txt"
    corpus.write_text("".join(corpus.read_text().splitlines(keepends=True)[:200]))


def write_config(path: Path, data: Path, runs: Path) -> None:
    """configs/sample.yaml with everything small: the same keys and stages, two steps each."""
    config = yaml.safe_load((ROOT / "configs" / "sample.yaml").read_text())
    config |= {"data": str(data), "runs": str(runs)}
    config |= {"rank": 2, "alpha": 2, "max_output": 4}
    config["meta_model"] = None                                         # all of it is trained here
    for stage in STAGES:
        config[stage.replace("-", "_")] |= {"steps": 2, "tasks": 4}
    text = {"text": str(data / "corpus.txt"), "text_length": 24}
    config["base"] |= text
    config["pretrain"] |= text | {"width": 16, "bottleneck": 16}
    config["lora"]["teachers_at_once"] = 16                             # all in one group
    config["finetune"] |= {"width": 16, "bottleneck": 16, "tasks": 3}
    for stage in ("lora_all", "finetune"):
        config[stage] |= {"instances": 2, "balance": "tasks"}
    path.write_text(yaml.safe_dump(config))


class Project:
    """A suite, a config and a folder of runs."""

    def __init__(self, data: Path, config: Path, runs: Path):
        self.data, self.config, self.runs = data, config, runs

    def argv(self, stage, *flags) -> list[str]:
        """Words after the script's name. stage: one of STAGES, "evaluate", "adapt", or None for all of train_teacher.py's."""
        if stage == "adapt":
            return ["--checkpoint", str(self.runs / "finetune"), *map(str, flags)]
        words = [] if stage in (None, "evaluate") else ["--stage", stage]
        return [*words, "--config", str(self.config), "--runs", str(self.runs), *map(str, flags)]

    def run(self, stage, *flags) -> str:
        """Run a stage in this process, as its script would; returns what it printed to standard output."""
        return call(MODULES[stage or "base"], *self.argv(stage, *flags))

    def refuses(self, stage, *flags) -> str:
        """The one line on standard error with which a stage ends, exit code 2, without a change to a file that is there."""
        before, err = self.files(), io.StringIO()
        with contextlib.redirect_stderr(err), pytest.raises(SystemExit) as end:
            self.run(stage, *flags)
        assert end.value.code == 2
        line = err.getvalue()
        assert line.startswith("error: ") and line.count("\n") == 1 and line.endswith("\n"), line
        assert len(line) <= 301, line
        after = self.files()
        assert {path: after.get(path) for path in before} == before, "a refused command changed or removed files"
        return line

    def files(self) -> dict:
        paths = [path for path in sorted(self.runs.rglob("*")) if path.is_file() and path.name != ".lock"]
        return {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in paths}

    def command(self, stage, *flags) -> list[str]:
        return [sys.executable, MODULES[stage or "base"].__name__ + ".py", *self.argv(stage, *flags)]

    def copy(self, runs: Path, stages=STAGES, data: Path | None = None) -> "Project":
        """The same config with runs of its own, of which these stages are there already, and where asked data of its own."""
        for stage in stages:
            shutil.copytree(self.runs / stage, runs / stage)
        if data is not None:
            shutil.copytree(self.data, data)
        return Project(data or self.data, self.config, runs)

    def weights(self, *folders) -> dict:
        return load_file(self.checkpoint(*folders) / "model.safetensors")

    def record(self, *folders) -> dict:
        return yaml.safe_load((self.checkpoint(*folders) / "config.yaml").read_text())

    def checkpoint(self, *folders) -> Path:
        """The newest complete checkpoint of a stage, or of a teacher."""
        folder = self.runs.joinpath(*folders)
        return Path(common.checkpoint_of(str(folder)) or folder)

    def log(self, stage) -> list[dict]:
        return [json.loads(line) for line in (self.runs / stage / "log.jsonl").read_text().splitlines()]


def call(module, *argv) -> str:
    """module.main(argv) from the repository's root; returns its standard output. Signal handlers are put back."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    out = io.StringIO()
    try:
        with contextlib.chdir(ROOT), contextlib.redirect_stdout(out):
            module.main(list(argv))
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        sys.stdout.write(out.getvalue())
    return out.getvalue()


def environment() -> dict:
    env = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    env |= {"MASTER_ADDR": "localhost", "HF_HUB_OFFLINE": "1"}
    return env | {"OMP_NUM_THREADS": str(THREADS)}


def process(*words, code=0, seconds=120) -> subprocess.CompletedProcess:
    """Run a command in a process of its own from the repository's root, and check its exit code."""
    words = [str(word) for word in words]
    with subprocess.Popen(words, cwd=ROOT, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                          start_new_session=True) as running:
        try:
            out, err = running.communicate(timeout=seconds)
        except subprocess.TimeoutExpired:
            os.killpg(running.pid, signal.SIGKILL)                          # torchrun's workers too
            raise
    assert running.returncode == code, f"exit code {running.returncode}\n{out[-2000:]}\n{err[-4000:]}"
    return subprocess.CompletedProcess(words, code, out, err)


def at_step(monkeypatch, n, do) -> None:
    """Have `do()` called just after the log of the n-th step that is run from here on."""
    count, log = [0], Log.__call__

    def logged(self, *args):
        log(self, *args)
        count[0] += 1
        if count[0] == n:
            do()

    monkeypatch.setattr(Log, "__call__", logged)


def interrupt():
    """Ctrl-C."""
    signal.raise_signal(signal.SIGINT)


@pytest.fixture(scope="session")
def finished(tmp_path_factory) -> Project:
    root = tmp_path_factory.mktemp("stages")
    write_suite(root / "data")
    write_config(root / "config.yaml", root / "data", root / "runs")
    project = Project(root / "data", root / "config.yaml", root / "runs")
    for stage in STAGES:
        project.run(stage)
    return project


@pytest.fixture
def project(finished, tmp_path) -> Project:
    return finished.copy(tmp_path / "runs")
