"""The paper's sizes, with random weights: python tests/benchmarks/sizes.py [--device cuda] [base xl xxl]

T5 v1.1 with the settings of configs/sni-*.yaml: bf16, and every text as long as the limits allow. On a GPU: time to generate an
adapter, decoding tokens a second with one task merged and with a task for every row, time and peak memory of the training
steps. Without one the memory is computed: every operator runs on tensors without contents (FakeTensorMode), and the bytes of
those in use at the same time are added up. That leaves out what a kernel needs while it runs, fragmentation, and CUDA's own
(about 1 GB).
"""
import argparse
import contextlib
import gc
import statistics
import sys
from pathlib import Path
from unittest import mock

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import common
import config
import lora
import config
import train_hyper
from decoding import decode_adapted
from hypernet import TAGI
from random_t5 import random_t5
from side_by_side import PeakMemory, adapt, random_teachers, timed, tokens
from training import all_logits_at_once, random_batch, step

UNITS = 60                                          # categories of Super-NaturalInstructions
GB = 1e9


def stage_options(stage, size, device, checkpointing):
    options = config.parse(train_hyper.parser(), stage, [
        f"--stage={stage}", f"--config={ROOT}/configs/sni-{size}.yaml", f"--device={device}"])
    options.checkpointing = checkpointing
    train_hyper.settle(options)
    return options


def make(options, size, device):
    """(student of random weights, teachers, optimizer, batch) of one training stage."""
    with torch.device(device):
        torch.set_default_dtype(torch.bfloat16 if options.precision == "bf16" else torch.float32)
        llm = random_t5(size).eval().requires_grad_(False)
        torch.set_default_dtype(torch.float32)
        tagi = TAGI(llm, None, options)
    if options.checkpointing:
        t5.checkpoint_blocks(llm, tagi.repetition)
    args = argparse.Namespace(device=device)
    if options.stage == "pretrain":                                         # a third of the document each
        third = options.text_length // 3
        batch = random_batch(args, options.tasks, options.instances, third, third, third)
    else:
        batch = random_batch(args, options.tasks, options.instances, options.max_instruction, options.max_input,
                             options.max_output)
        batch["prompt"] = [x[:, :options.max_input] for x in batch["prompt"]]
    teachers = random_teachers(tagi, UNITS) if options.lambda_ins else None
    return tagi, teachers, config.make_optimizer(tagi.trainable(), options), batch


def title(stage, size, checkpointing, chunked=True):
    return f"{stage}, {size}{', checkpointing' * checkpointing}{', all logits at once' * (not chunked)}"


def size_of(tensors):
    return sum(t.numel() * t.element_size() for t in tensors) / GB


def memory(stage, size, device, checkpointing, chunked=True):
    """A line: what is held all the time, and the peak of two steps, the first of which makes the optimizer's moments."""
    options, seconds = stage_options(stage, size, device, checkpointing), []
    cuda = device == "cuda"
    with contextlib.ExitStack() as stack:
        if not cuda:
            stack.enter_context(FakeTensorMode())
            stack.enter_context(mock.patch.object(TAGI, "to"))              # fake tensors cannot be moved, and need not be
        if not chunked:
            stack.enter_context(all_logits_at_once())
        peak = contextlib.nullcontext() if cuda else PeakMemory()
        with peak:                                                          # all that is made within counts
            tagi, teachers, optimizer, batch = make(options, size, device)
            if not cuda and options.optimizer == "adafactor":               # it reads numbers; its moments are small
                stack.enter_context(mock.patch.object(optimizer, "step"))
            if cuda:
                torch.cuda.reset_peak_memory_stats()
            for _ in range(4 if cuda else 2):
                seconds.append(timed(lambda: step(tagi, optimizer, batch, teachers)))
            trained = list(tagi.trainable().values())
            moments = [x for state in optimizer.state.values() for x in state.values() if torch.is_tensor(x)]
            held = [size_of(tagi.llm.parameters()), size_of(w for pair in (teachers or {}).values() for w in pair),
                    2 * size_of(trained) + size_of(moments)]
    total = torch.cuda.max_memory_allocated() / GB if cuda else peak.peak / GB
    ms = f"{1000 * statistics.median(seconds[1:]):.0f}" if cuda else ""
    print(f"| {title(stage, size, options.checkpointing, chunked)} | {options.tasks} x {options.instances} | "
          f"{sum(p.numel() for p in trained) / 1e9:.2f} G | {' | '.join(f'{x:.1f}' for x in held)} | {total:.1f} | {ms} |",
          flush=True)


@torch.no_grad()
def decoding(size, rows=16, new=128, length=512):
    """A line: adapter generation, and tokens a second of 16 rows of 512 tokens with 128 new ones each."""
    options = stage_options("finetune", size, "cuda", False)
    tagi = make(options, size, "cuda")[0]
    args = argparse.Namespace(device="cuda")
    ids, mask = tokens(args, rows, length)
    one, each = (adapt(tagi, *tokens(args, n, options.max_instruction)) for n in (1, rows))

    def clock(run):
        return statistics.median([timed(run) for _ in range(4)][1:])        # the first warms up

    generated = clock(lambda: adapt(tagi, *tokens(args, 1, options.max_instruction)))
    mixed = clock(lambda: decode_adapted(tagi, each, ids, mask, new))
    tagi.merge(one)
    merged = clock(lambda: decode_adapted(tagi, one, ids, mask, new))
    print(f"| {size} | {1000 * generated:.1f} | {rows * new / merged:.0f} | {rows * new / mixed:.0f} |", flush=True)


def free():
    """A model's hooks refer to the model: only the garbage collector gives its memory back."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("sizes", nargs="*", default=["base", "xl", "xxl"])
    p.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    args = p.parse_args()
    torch.manual_seed(0)
    how = f"measured on {torch.cuda.get_device_name()}" if args.device == "cuda" else "computed, not measured"
    print(f"GB, {how}, torch {torch.__version__}\n\n| stage | tasks x instances | trained weights | LLM | teachers | trained weights, "
          "gradients, moments | peak | ms a step |\n|---|--:|--:|--:|--:|--:|--:|--:|")
    for size in args.sizes:
        for stage, *how in (("pretrain", False), ("pretrain", True), ("finetune", False), ("finetune", True),
                            ("finetune", True, False)):
            try:
                memory(stage, size, args.device, *how)
            except torch.OutOfMemoryError:
                print(f"| {title(stage, size, *how)} | out of memory | | | | | | |", flush=True)
            free()
    if args.device == "cuda":
        print("\n| | ms an adapter | tokens a second, merged | tokens a second, mixed |\n|---|--:|--:|--:|")
        for size in args.sizes:
            try:
                decoding(size)
            except torch.OutOfMemoryError:
                print(f"| {size} | out of memory | | |", flush=True)
            free()


if __name__ == "__main__":
    main()
