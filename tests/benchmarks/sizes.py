"""Memory and speed at the paper's sizes, with random weights; writes a part of docs/memory.md.

    python tests/benchmarks/sizes.py [--device cuda] [base xl xxl]

T5 v1.1 with the settings of configs/sni-*.yaml: bf16, and every text as long as the limits allow.
On a GPU: time and peak memory of the training steps, time to generate an adapter, decoded tokens a
second. Without one, memory is computed: every operator runs on tensors without contents
(FakeTensorMode), and the bytes of those in use at the same time are added up. That leaves out what
a kernel needs while it runs, fragmentation, and CUDA's own (about 1 GB).

The tables go between the lines <!-- sizes --> and <!-- /sizes --> of docs/memory.md; they are only
printed where that file has none, or where only some of the sizes are asked for.
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

import t5
import train_hyper
from bench import optim
from bench.cost import timed
from decoding import decode_adapted
from hypernet import TAGI
from pages import command_line, part, part_of, table
from random_t5 import random_t5
from side_by_side import PeakMemory, adapt, random_teachers, tokens
from training import all_logits_at_once, random_batch, step

SIZES = ["base", "xl", "xxl"]
CASES = (                   # (stage, --checkpointing, logits in chunks)
    ("pretrain", False, True),
    ("pretrain", True, True),
    ("finetune", False, True),
    ("finetune", True, True),
    ("finetune", True, False),
)
TEACHERS = 60               # categories of Super-NaturalInstructions
GB = 1e9


def stage_options(stage, size, device, checkpointing):
    options = train_hyper.get_options([f"--stage={stage}", f"--device={device}",
                                       f"--config={ROOT}/configs/sni-{size}.yaml"])
    options.checkpointing = checkpointing
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
    if options.stage == "pretrain":                     # a third of the document each
        third = options.text_length // 3
        batch = random_batch(args, options.tasks, options.instances, third, third, third)
    else:
        batch = random_batch(args, options.tasks, options.instances, options.max_instruction,
                             options.max_input, options.max_output)
        batch["prompt"] = [x[:, :options.max_input] for x in batch["prompt"]]
    teachers = random_teachers(tagi, TEACHERS) if train_hyper.aligns(options) else None
    return tagi, teachers, optim.make_optimizer(tagi.trainable(), options), batch


def size_of(tensors):
    return sum(t.numel() * t.element_size() for t in tensors) / GB


def title(stage, checkpointing, chunked):
    words = [stage]
    if checkpointing:
        words.append("checkpointing")
    if not chunked:
        words.append("all logits at once")
    return ", ".join(words)


def memory(size, stage, checkpointing, chunked, device):
    """A row: what is held all the time, and the peak of two steps or, on a GPU, of four.

    The first step makes the optimizer's moments.
    """
    options, seconds = stage_options(stage, size, device, checkpointing), []
    cuda = device == "cuda"
    with contextlib.ExitStack() as stack:
        if not cuda:
            stack.enter_context(FakeTensorMode())
            # Fake tensors cannot be moved, and need not be.
            stack.enter_context(mock.patch.object(TAGI, "to"))
        if not chunked:
            stack.enter_context(all_logits_at_once())
        # All that is made within counts.
        peak = stack.enter_context(contextlib.nullcontext() if cuda else PeakMemory())
        tagi, teachers, optimizer, batch = make(options, size, device)
        if not cuda and options.optimizer == "adafactor":
            # It reads numbers, which fake tensors lack; its moments are small.
            stack.enter_context(mock.patch.object(optimizer, "step"))
        if cuda:
            torch.cuda.reset_peak_memory_stats()
        for _ in range(4 if cuda else 2):
            seconds.append(timed(lambda: step(tagi, optimizer, batch, teachers)))
        trained, moments = list(tagi.trainable().values()), []
        for part_optimizer in optimizer.parts:
            for state in part_optimizer.state.values():
                moments += [x for x in state.values() if torch.is_tensor(x)]
        stacked = [w for pair in (teachers or {}).values() for w in pair]
        row = {"size": size, "stage": title(stage, checkpointing, chunked),
               "tasks x instances": f"{options.tasks} x {options.instances}",
               "trained weights": f"{sum(p.numel() for p in trained) / 1e9:.2f} billion",
               "LLM": f"{size_of(tagi.llm.parameters()):.1f}",
               "LoRA teachers": f"{size_of(stacked):.1f}",
               "trained weights, gradients, moments":
                   f"{2 * size_of(trained) + size_of(moments):.1f}"}
        total = torch.cuda.max_memory_allocated() if cuda else peak.peak
    row["at the peak"] = f"{total / GB:.1f}"
    if cuda:
        row["ms a step"] = f"{1000 * statistics.median(seconds[1:]):.0f}"
    return row


@torch.no_grad()
def decoding(size, rows=16, new=128, length=512):
    """A row: adapter generation, and tokens a second of 16 rows of 512 with 128 new ones each."""
    options = stage_options("finetune", size, "cuda", False)
    tagi = make(options, size, "cuda")[0]
    args = argparse.Namespace(device="cuda")
    ids, mask = tokens(args, rows, length)
    one = adapt(tagi, *tokens(args, 1, options.max_instruction))
    each = adapt(tagi, *tokens(args, rows, options.max_instruction))

    def clock(run):
        run()                                           # warms up
        return statistics.median(timed(run) for _ in range(3))

    generated = clock(lambda: adapt(tagi, *tokens(args, 1, options.max_instruction)))
    mixed = clock(lambda: decode_adapted(tagi, each, ids, mask, new))
    tagi.merge(one)
    merged = clock(lambda: decode_adapted(tagi, one, ids, mask, new))
    return {"size": size, "ms an adapter": f"{1000 * generated:.1f}",
            "tokens a second, merged": f"{rows * new / merged:.0f}",
            "tokens a second, mixed": f"{rows * new / mixed:.0f}"}


def attempt(row, otherwise):
    """What the function row() returns, or `otherwise` where memory does not suffice."""
    try:
        row = row()
    except torch.OutOfMemoryError:
        row = otherwise
    print(", ".join(f"{title} {text}" for title, text in row.items()), flush=True)
    gc.collect()            # a model's hooks refer to the model: only this gives its memory back
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return row


def main():
    p = argparse.ArgumentParser(description=__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("sizes", nargs="*", default=SIZES)
    p.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    args = p.parse_args()
    torch.manual_seed(0)
    cuda = args.device == "cuda"
    rows = []
    for size in args.sizes:
        for case in CASES:
            otherwise = {"size": size, "stage": title(*case), "at the peak": "out of memory"}
            rows.append(attempt(lambda: memory(size, *case, args.device), otherwise))
    how = f"measured on {torch.cuda.get_device_name()}" if cuda else "computed, not measured"
    parts = [f"Written by `{command_line()}`. In GB, {how}, torch {torch.__version__}:",
             table(rows)]
    if cuda:
        speeds = []
        for size in args.sizes:
            otherwise = {"size": size, "ms an adapter": "out of memory"}
            speeds.append(attempt(lambda: decoding(size), otherwise))
        parts.append(table(speeds))
    text = "\n\n".join(parts) + "\n"
    print("\n" + text)

    file = ROOT / "docs" / "memory.md"
    page = file.read_text(encoding="utf-8") if file.is_file() else ""
    old = part_of(page, "sizes")
    if old is not None and args.sizes == SIZES:
        page = page.replace(part("sizes", old), part("sizes", text))
        file.write_text(page, encoding="utf-8")


if __name__ == "__main__":
    main()
