"""What bash tests/gpu.sh runs: checks of the numbers, steps of every stage, benchmarks; writes docs/gpu.md.

    python tests/benchmarks/gpu.py          # on a machine with a GPU
    python tests/benchmarks/gpu.py --dry    # on any: the smallest size on the CPU, nothing is written

Each part has its share of the time, and what does not fit into it is left out and named.
"""
import argparse
import os
import subprocess
import sys
import time
import warnings
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import torch
import torch.nn.functional as F
import transformers

import config
import lora
import sizes
import t5
import train_hyper
import train_teacher
from bench import optim
from pages import paragraph, processor, table
from random_t5 import random_t5
from run import BENCHMARKS
from side_by_side import Section, tokens

LIMIT = 520                     # seconds in all
CHECKS, STAGES_END = 200, 400   # the checks' share, and when no further stage is begun
SIZES = ("small", "base", "xl")
# Size -> the config whose batches and lengths it has.
CONFIGS = {"tiny": "base", "small": "base", "base": "base", "xl": "xl"}
STEPS = 4                       # of each; the first one also makes the optimizer's moments
DRY = ("--tasks=2", "--max-input=24", "--max-instruction=24", "--max-output=4", "--rank=4")
NAMES = ("finetune", "logits", "merged", "mixed", "reread", "regenerate", "ranking")


# -------------------------------------------------------------------------------------- every stage

def teacher_options(stage, size, device, flags):
    argv = [f"--stage={stage}", f"--device={device}", "--precision=bf16", "--checkpointing",
            f"--config={ROOT}/configs/sni-{CONFIGS[size]}.yaml", *flags]
    return config.parse(train_teacher.parser(), stage.replace("-", "_"), argv)


def teacher_stage(stage, size, device, flags):
    """(options, parameters, the function that runs a batch and gives its loss) of meta, lora, lora-all."""
    options = teacher_options(stage, size, device, flags)
    with torch.device(device):
        # Frozen weights are held in bf16; those that are trained are in float32.
        torch.set_default_dtype(torch.float32 if stage == "meta" else torch.bfloat16)
        llm = random_t5(size)
        torch.set_default_dtype(torch.float32)
    U = 4 if stage == "lora" else 1             # teachers side by side
    if stage == "meta":
        parameters = dict(llm.train().named_parameters())
    else:
        llm.requires_grad_(False).eval()
        lora.inject_lora(llm, options.targets.split(","), options.rank, options.alpha)
        weights = lora.init_weights(llm, options.rank, 0, U if stage == "lora" else None)
        parameters = lora.flatten(weights)
        for p in parameters.values():
            p.requires_grad_()
        lora.set_weights(llm, weights)
    t5.checkpoint_blocks(llm)
    args = argparse.Namespace(device=device)
    n = options.tasks * options.instances * U
    ids, mask = tokens(args, n, options.max_input)
    labels = tokens(args, n, options.max_output)[0]

    def loss():
        with torch.autocast(device, torch.bfloat16):
            logits = t5.logits(llm, ids, mask, labels)
        return F.cross_entropy(logits.float().flatten(0, 1), labels.flatten())

    return options, parameters, loss


def student_stage(stage, size, device, flags):
    argv = [f"--stage={stage}", f"--device={device}", "--precision=bf16", "--checkpointing",
            f"--config={ROOT}/configs/sni-{CONFIGS[size]}.yaml", *flags]
    options = train_hyper.get_options(argv)
    tagi, teachers, _, batch = sizes.make(options, size, device)
    n_tokens, n_tasks = len(batch["positions"]), len(batch["instruction"][0])

    def loss():
        return train_hyper.losses(tagi, batch, teachers, None, options, n_tokens, n_tasks)["loss"]

    return options, tagi.trainable(), loss


STAGES = {"meta": teacher_stage, "lora": teacher_stage, "lora-all": teacher_stage,
          "pretrain": student_stage, "finetune": student_stage}


def stage_row(stage, size, device, flags):
    """A row: median time of a step, peak memory, and the loss before and after."""
    torch.manual_seed(0)
    cuda = device == "cuda"
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    options, parameters, loss = STAGES[stage](stage, size, device, flags)
    optimizer, seconds, seen = optim.make_optimizer(parameters, options), [], []
    for _ in range(STEPS):
        begin = time.perf_counter()
        value = loss()
        value.backward()
        norm = optim.clip_gradients(parameters.values(), options.clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        seen += [value.item(), norm]            # waits for the GPU
        seconds.append(time.perf_counter() - begin)
    if not torch.tensor(seen).isfinite().all():
        raise SystemExit(f"error: {size}, {stage}: loss or gradient norm are not finite: {seen}")
    return {"size": size, "stage": stage, "optimizer": options.optimizer,
            "tasks x instances": f"{options.tasks} x {options.instances}",
            "trained weights": f"{sum(p.numel() for p in parameters.values()) / 1e6:.1f} million",
            "ms a step": f"{1000 * sorted(seconds[1:])[(STEPS - 1) // 2]:.0f}",
            "GB at the peak": f"{torch.cuda.max_memory_allocated() / sizes.GB:.1f}" if cuda else "",
            "first loss": f"{seen[0]:.3f}", "last loss": f"{seen[-2]:.3f}"}


# ---------------------------------------------------------------------------------------- the parts

def run_checks(device, seconds, dry):
    """(the last line of pytest's output, whether all passed)."""
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "tests/gpu_checks.py"]
    if dry:                                     # the scripts on a CPU have tests of their own
        command += ["-m", "not scripts", "-k", "device or lora_weights or merged"]
    env = os.environ | {"TAGI_TEST_DEVICE": device}
    try:
        ran = subprocess.run(command, cwd=ROOT, env=env, timeout=seconds, text=True,
                             stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    except subprocess.TimeoutExpired as error:
        out = (error.stdout or b"")
        print(out.decode(errors="replace") if isinstance(out, bytes) else out)
        return f"not done after {seconds} seconds", False
    lines = ran.stdout.strip().splitlines() or [""]
    if ran.returncode:
        print("\n".join(lines[-60:]))
    return lines[-1].strip("= "), ran.returncode == 0


def run_benchmarks(args, until):
    """(their sections, the names of those that there was no time for)."""
    sections, left = [], []
    for name in args.only:
        if time.monotonic() > until:
            left.append(name)
            continue
        heading, benchmark = BENCHMARKS[name]
        section = Section(heading, benchmark, args.rounds)
        benchmark(section, args)
        sections.append(section)
    return sections, left


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--dry", action="store_true", help="the smallest size on the CPU; writes nothing")
    dry = p.parse_args().dry
    if not dry and not torch.cuda.is_available():
        raise SystemExit("error: PyTorch finds no GPU here; --dry runs the smallest size on the CPU")
    warnings.simplefilter("ignore")
    begin, device = time.monotonic(), "cpu" if dry else "cuda"
    if dry:
        torch.set_num_threads(1)

    told, passed = run_checks(device, CHECKS, dry)
    print(f"checks: {told}", flush=True)
    rows, left = [], []
    for size in ("tiny",) if dry else SIZES:
        for stage in STAGES:
            if time.monotonic() - begin > STAGES_END:
                left.append(f"{size} {stage}")
                continue
            flags = DRY if dry else ()
            otherwise = {"size": size, "stage": stage, "GB at the peak": "out of memory"}
            rows.append(sizes.attempt(lambda: stage_row(stage, size, device, flags), otherwise))
    args = argparse.Namespace(device=device, size="tiny" if dry else "base", rows=2 if dry else 16,
                              only=("regenerate",) if dry else NAMES, rounds=1 if dry else 3,
                              instances=[1] if dry else [1, 10])
    sections, names = run_benchmarks(args, begin + LIMIT - 60)
    left += names
    seconds = time.monotonic() - begin

    on = processor() if dry else torch.cuda.get_device_name()
    about = paragraph(f"Written by `bash tests/gpu.sh` in {seconds:.0f} seconds on {on}; torch",
                      f"{torch.__version__}, transformers {transformers.__version__}. All weights are random;",
                      "time and memory are measured.")
    checks = paragraph("`tests/gpu_checks.py`, the numbers of the method on the GPU against the CPU's and",
                       f"every stage through its script: {told}.")
    stages = paragraph(f"{STEPS} steps of each with bf16, `--checkpointing` and the batches and lengths of",
                       "`configs/sni-*.yaml`, every text as long as the limits allow; small has Base's. The",
                       "median of all but the first step.")
    parts = ["# On a GPU", about, "## Checks", checks, "## Every stage", stages, table(rows),
             "## Benchmarks", f"At T5 v1.1's {args.size} size; what they compare: [speed.md](speed.md)."]
    parts += [section.markdown().strip() for section in sections]
    if left:
        parts.append(f"Left out, for lack of time: {', '.join(left)}.")
    page = "\n\n".join(parts) + "\n"
    print("\n" + page)
    if not dry:
        (ROOT / "docs" / "gpu.md").write_text(page, encoding="utf-8")
    if not passed:
        raise SystemExit("error: a check failed")


if __name__ == "__main__":
    main()
