"""On what and how this process runs: command, versions, hardware, memory."""
import contextlib
import functools
import os
import platform
import resource
import shlex
import subprocess
import sys

import torch

import common
from bench.early import ROOT


def command_line(going_on: bool = False) -> str:
    """The command that this process was started by, or one that goes on with what it began."""
    words = ["python", *sys.argv]
    if going_on:
        words = [word for word in words if word != "--fresh"]       # it would start over
    world = common.launched_processes()
    if world > 1:
        local = os.environ.get("LOCAL_WORLD_SIZE", world)
        launcher = ["-m", "bench.launch"]
        if not os.path.samefile(os.curdir, ROOT):
            launcher = [os.path.join(ROOT, "bench", "launch.py")]
        words[1:1] = [*launcher, "--nproc-per-node", str(local)]
    return shlex.join(words)


def again() -> str:
    """How an error line or a stop says what goes on with a run."""
    return "run the same command again" + (", without --fresh," if "--fresh" in sys.argv else "")


def launch() -> str | None:
    """The batch system's job or the launcher that may start this command again; None: neither."""
    if os.environ.get("SLURM_JOB_ID"):
        return f"SLURM job {os.environ['SLURM_JOB_ID']}"
    if "TORCHELASTIC_RUN_ID" in os.environ:
        return f"launcher {os.getppid()} on {platform.node()}"
    return None


def is_started_again() -> bool:
    """Whether `launch` has started it before: after a crash, or out of the queue once more."""
    names = "TORCHELASTIC_RESTART_COUNT", "SLURM_RESTART_COUNT"
    return any(os.environ.get(name) not in (None, "", "0") for name in names)


def is_of_this_launch(record: dict) -> bool:
    """Whether what a run wrote of itself names the launcher or job that starts this process."""
    return record.get("launch", "") == launch()


def hardware(device: str) -> dict:
    gpu = torch.cuda.get_device_name() if device == "cuda" else "none"
    return {"host": platform.node(), "gpu": gpu, "cpu": processor(), "cores": os.cpu_count()}


def processor() -> str:
    """Its name, where Linux tells it."""
    try:
        with open("/proc/cpuinfo") as f:
            for line in f:
                if line.startswith("model name"):
                    return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def peak_memory(device: str) -> float:
    """GiB that this process has used at most: of the GPU, or of the machine's memory."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated() / 2 ** 30
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2 ** 30


@functools.cache
def versions() -> dict:
    import transformers
    versions = {"python": platform.python_version(), "torch": str(torch.__version__),
                "transformers": transformers.__version__, "git": "none"}
    here = os.path.dirname(os.path.abspath(__file__))
    with contextlib.suppress(OSError):                  # no git on this machine
        told = subprocess.run(["git", "describe", "--always", "--dirty", "--exclude=*"], cwd=here,
                              capture_output=True, text=True)
        versions["git"] = told.stdout.strip() or "none"
    return versions
