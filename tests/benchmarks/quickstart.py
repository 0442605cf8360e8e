"""Where the quick start's time goes: seconds of each command, and how fast its steps compute.

    python tests/benchmarks/quickstart.py           # bash quickstart.sh --fresh; docs/quickstart.md
    python tests/benchmarks/quickstart.py --avx2    # as without AVX-512 and bf16 instructions

A training step's speed is its FLOPs, counted by PyTorch, over its median time in one process with
one thread, as a share of what the same core reaches in a product of two 1024 x 1024 matrices in
float32.
"""
import argparse
import contextlib
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from unittest import mock

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import train_hyper
import train_teacher
from bench.runs import Log
from pages import check_replaceable, command_line, paragraph, processor, table, write
from steady import AVX2

TITLE = "# Where the quick start's time goes"
STAGES = {"lora": train_teacher, "lora-all": train_teacher,
          "pretrain": train_hyper, "finetune": train_hyper}
WARM_UP, TIMED = 4, 12                          # steps


def commands(environment: dict) -> list[dict]:
    """A table's rows: the commands of a whole quick start and their seconds; the last is all."""
    done = subprocess.run(["bash", "quickstart.sh", "--fresh"], cwd=ROOT, text=True,
                          env=os.environ | environment, stdout=subprocess.PIPE)
    if done.returncode:
        sys.exit(f"bash quickstart.sh --fresh ended with code {done.returncode}\n"
                 f"{done.stdout[-3000:]}")
    rows, command = [], None
    for line in done.stdout.splitlines():
        if line.startswith("$ "):
            command = f"`{line[2:]}`"
        elif found := re.fullmatch(r"\((\d+) s\)", line):
            rows.append({"command": command, "seconds": found[1]})
        elif found := re.fullmatch(r"quick start: (\d+) s", line):
            rows.append({"command": "all", "seconds": found[1]})
    return rows


def measure_step(stage: str) -> tuple[float, float]:
    """(seconds, FLOPs) of a training step of this stage, in this process."""
    log, steps, last = Log.__call__, 0, 0.0
    seconds, counting = [], contextlib.ExitStack()
    counter = FlopCounterMode(display=False)

    def logged(self, *args):
        """Called after every step: the first are not timed, the one after the timed is counted."""
        nonlocal steps, last
        log(self, *args)
        steps += 1
        if WARM_UP < steps <= WARM_UP + TIMED:
            seconds.append(time.perf_counter() - last)
        if steps == WARM_UP + TIMED:
            counting.enter_context(counter)
            counting.enter_context(sdpa_kernel(SDPBackend.MATH))    # as in bench/cost.py
        elif steps == WARM_UP + TIMED + 1:
            counting.close()
        last = time.perf_counter()

    patched = mock.patch.object(Log, "__call__", logged)
    with tempfile.TemporaryDirectory() as runs, patched:
        for needed in ("lora", "pretrain"):
            os.symlink(ROOT / "runs/sample" / needed, f"{runs}/{needed}")
        STAGES[stage].main(["--stage", stage, "--runs", runs, "--name", f"{stage}-timed",
                            "--steps", str(WARM_UP + TIMED + 2)])
    return statistics.median(seconds), counter.get_total_flops()


def matrix_product() -> float:
    """FLOPs a second of a float32 product on one core."""
    a, b = torch.randn(1024, 1024), torch.randn(1024, 1024)
    seconds = []
    for _ in range(12):
        begin = time.perf_counter()
        a @ b
        seconds.append(time.perf_counter() - begin)
    return 2 * 1024 ** 3 / statistics.median(seconds)


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--avx2", action="store_true")
    parser.add_argument("--out",
                        help="default: docs/quickstart.md, with --avx2 docs/quickstart-avx2.md")
    args = parser.parse_args()
    if args.out:
        check_replaceable(args.out, TITLE)
    environment = AVX2 if args.avx2 else {}
    if any(os.environ.get(key) != value for key, value in environment.items()):
        # PyTorch reads them when it starts: start anew.
        os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | environment)
    os.chdir(ROOT)
    rows = commands(environment)
    torch.set_num_threads(1)
    peak = matrix_product()
    speeds = []
    for stage in STAGES:
        seconds, flops = measure_step(stage)
        speeds.append({"stage": stage, "ms a step": f"{1000 * seconds:.0f}",
                       "GFLOP a step": f"{flops / 1e9:.2f}",
                       "GFLOP/s": f"{flops / seconds / 1e9:.1f}",
                       "share of the product's speed": f"{flops / seconds / peak:.0%}"})
    words = [f"{key}={value}" for key, value in environment.items()]
    head = paragraph(
        f"Written by `{command_line()}`: `bash quickstart.sh --fresh` in an environment that is",
        f"set up, on {processor()}", *(["with", *words] if words else []))
    between = paragraph(
        f"One core computes a float32 product of two 1024 x 1024 matrices at {peak / 1e9:.0f}",
        "GFLOP/s. Training steps of one process with one thread:")
    text = "\n\n".join([TITLE, head + ".", table(rows), between,
                        table(speeds)]) + "\n"
    name = "quickstart-avx2.md" if args.avx2 else "quickstart.md"
    write(args.out or f"docs/{name}", text)
    print(text)


if __name__ == "__main__":
    main()
