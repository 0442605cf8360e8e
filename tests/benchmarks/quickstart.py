"""Where the quick start's time goes: seconds of each of its commands, and how fast its training steps compute.

    python tests/benchmarks/quickstart.py               # runs `bash quickstart.sh --fresh`, writes docs/quickstart.md
    python tests/benchmarks/quickstart.py --avx2        # as on a processor without AVX-512 and bf16 instructions

A training step's speed is its FLOPs, counted by PyTorch, over its median time in one process with one thread, as a share of
what the same core reaches in a product of two 1024 x 1024 matrices in float32.
"""
import argparse
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
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "tests/benchmarks")]
from steady import AVX2, processor

STAGES = {"lora": "train_teacher", "lora-all": "train_teacher", "pretrain": "train_hyper", "finetune": "train_hyper"}
WARM_UP, TIMED = 4, 12                          # steps


def commands(environment: dict) -> list[tuple[str, int]]:
    """(command, its seconds) of a whole quick start, the last being all of it."""
    done = subprocess.run(["bash", "quickstart.sh", "--fresh"], cwd=ROOT, env=os.environ | environment, text=True,
                          stdout=subprocess.PIPE)
    if done.returncode:
        sys.exit(f"bash quickstart.sh --fresh ended with code {done.returncode}\n{done.stdout[-3000:]}")
    rows, command = [], None
    for line in done.stdout.splitlines():
        if line.startswith("$ "):
            command = line[2:]
        elif found := re.fullmatch(r"\((\d+) s\)", line):
            rows.append((command, int(found[1])))
        elif found := re.fullmatch(r"quick start: (\d+) s", line):
            rows.append(("all", int(found[1])))
    return rows


def measure_step(stage: str) -> tuple[float, float]:
    """(seconds, FLOPs) of a training step of this stage, in this process."""
    import importlib

    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    import common
    seconds, counter, last, n = [], FlopCounterMode(display=False), [0.0], [0]
    log = common.Log.__call__

    def logged(self, *args):
        log(self, *args)
        n[0] += 1
        now = time.perf_counter()
        if n[0] > WARM_UP + 1 and n[0] <= WARM_UP + 1 + TIMED:
            seconds.append(now - last[0])
        if n[0] == WARM_UP + 1 + TIMED:
            counter.__enter__()
        elif n[0] == WARM_UP + 2 + TIMED:
            counter.__exit__(None, None, None)
        last[0] = time.perf_counter()

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as runs, mock.patch.object(common.Log, "__call__", logged), sdpa_kernel(SDPBackend.MATH):
        for needed in ("lora", "pretrain"):
            os.symlink(ROOT / "runs/sample" / needed, f"{runs}/{needed}")
        words = ["--stage", stage, "--runs", runs, "--steps", str(WARM_UP + 3 + TIMED), "--name", f"{stage}-timed"]
        importlib.import_module(STAGES[stage]).main(words)
    return statistics.median(seconds), counter.get_total_flops()


def matrix_product() -> float:
    """FLOPs a second of a float32 product on one core."""
    import torch
    torch.set_num_threads(1)
    a, b = torch.randn(1024, 1024), torch.randn(1024, 1024)
    seconds = []
    for _ in range(12):
        begin = time.perf_counter()
        a @ b
        seconds.append(time.perf_counter() - begin)
    return 2 * 1024 ** 3 / statistics.median(seconds)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--avx2", action="store_true")
    parser.add_argument("--out", help="default: docs/quickstart.md, with --avx2 docs/quickstart-avx2.md")
    args = parser.parse_args()
    environment = AVX2 if args.avx2 else {}
    if any(os.environ.get(key) != value for key, value in environment.items()):      # read when PyTorch starts
        os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | environment)
    rows = commands(environment)
    out = args.out or ("docs/quickstart-avx2.md" if args.avx2 else "docs/quickstart.md")
    os.chdir(ROOT)
    peak = matrix_product()
    lines = ["# Where the quick start's time goes", "",
             f"Written by `python tests/benchmarks/quickstart.py{' --avx2' * args.avx2}`: `bash quickstart.sh --fresh` in an "
             f"environment that is set up, on {processor()}{', with ' + ' '.join(f'{k}={v}' for k, v in AVX2.items()) if args.avx2 else ''}."
             , "", "| command | seconds |", "|---|--:|"]
    lines += [f"| `{command}` | {seconds} |" for command, seconds in rows]
    lines += ["", f"One core computes a float32 product of two 1024 x 1024 matrices at {peak / 1e9:.0f} GFLOP/s. Training steps of "
              "one process with one thread:", "", "| stage | ms a step | GFLOP a step | GFLOP/s | share of the product's speed |",
              "|---|--:|--:|--:|--:|"]
    for stage in STAGES:
        seconds, flops = measure_step(stage)
        lines.append(f"| {stage} | {1000 * seconds:.0f} | {flops / 1e9:.2f} | {flops / seconds / 1e9:.1f} | "
                     f"{flops / seconds / peak:.0%} |")
    text = "\n".join(lines) + "\n"
    os.makedirs("docs", exist_ok=True)
    Path(out).write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
