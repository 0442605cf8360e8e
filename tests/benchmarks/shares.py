"""Memory of one rank with and without --shard at the paper's sizes; writes a part of docs/memory.md.

    python tests/benchmarks/shares.py [base xl xxl]

Counted, not measured: a step runs on tensors without contents (FakeTensorMode), in a process group
that sends nothing (PyTorch's fake backend), and the bytes of tensors that are in use at the same
time are added up, what fully_shard gathers and frees included. Batch and lengths are those of
configs/sni-*.yaml with --precision bf16 --checkpointing and AdamW; stage meta, which those configs
leave out, with 8 tasks. CUDA's own gigabyte and fragmentation come on top.
"""
import argparse
import contextlib
import gc
from unittest import mock

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.device_mesh import init_device_mesh
from torch.testing._internal.distributed.fake_pg import FakeStore

import sizes
import config
import t5
import train_hyper
import train_teacher
from bench import optim, shard
from hypernet import TAGI
from pages import command_line, part, part_of, table
from random_t5 import random_t5
from side_by_side import PeakMemory, tokens

RANKS = (1, 2, 8)


def make_meta(size, options):
    """(LLM in training, its parameters, the function that runs a batch and gives the loss)."""
    llm = random_t5(size).train()
    t5.checkpoint_blocks(llm)
    args = argparse.Namespace(device="cpu")
    ids, mask = tokens(args, options.tasks * options.instances, options.max_input)
    labels = tokens(args, options.tasks * options.instances, options.max_output)[0]

    def loss():
        with torch.autocast("cpu", torch.bfloat16, cache_enabled=not options.shard):
            logits = t5.logits(llm, ids, mask, labels)
        return F.cross_entropy(logits.float().flatten(0, 1), labels.flatten(), reduction="sum")

    return [llm], None, dict(llm.named_parameters()), loss, {}


def make_finetune(size, options):
    tagi, teachers, _, batch = sizes.make(options, size, "cpu")
    n_tokens, n_tasks = len(batch["positions"]), len(batch["instruction"][0])

    def loss():
        return train_hyper.losses(tagi, batch, teachers, None, options, n_tokens, n_tasks)["loss"]

    return [tagi.llm], tagi, tagi.trainable(), loss, teachers


def stage_options(stage, size, sharded):
    if stage == "finetune":
        options = sizes.stage_options(stage, size, "cpu", checkpointing=True)
    else:
        argv = ["--stage=meta", "--device=cpu", f"--config={sizes.ROOT}/configs/sni-{size}.yaml"]
        options = config.parse(train_teacher.parser(), "meta", argv)
    options.shard = sharded
    return options


def count(size, stage, ranks):
    """(GB of one rank's GPU at the peak of two steps, GB of its CPU while it loads)."""
    options = stage_options(stage, size, ranks > 1)
    with contextlib.ExitStack() as stack:
        if ranks > 1:
            dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=ranks)
            stack.callback(dist.destroy_process_group)
            mesh = init_device_mesh("cpu", (ranks,))
            stack.enter_context(mock.patch.object(shard, "init_device_mesh", lambda *args: mesh))
        stack.enter_context(FakeTensorMode())
        stack.enter_context(mock.patch.object(TAGI, "to"))      # fake tensors cannot be moved
        peak = stack.enter_context(PeakMemory())
        make = make_finetune if stage == "finetune" else make_meta
        llms, tagi, parameters, loss, teachers = make(size, options)
        optimizer = optim.make_optimizer(parameters, options)
        loaded, elsewhere = peak.live, 0
        parameters, optimizer, _ = optim.deal_out(parameters, optimizer, options, llms, tagi)
        if options.shard:
            # Teachers wait on the CPU.
            elsewhere = sum(w.nbytes for pair in teachers.values() for w in pair)
        gc.collect()
        peak.peak = peak.live
        for _ in range(2):                      # the first one makes the optimizer's moments
            loss().backward()
            optim.sum_gradients(parameters.values())
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        at_most = peak.peak - elsewhere
        del llms, tagi, parameters, loss, teachers, optimizer
        gc.collect()
    return at_most / sizes.GB, loaded / sizes.GB


def main():
    p = argparse.ArgumentParser(description=__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("sizes", nargs="*", default=sizes.SIZES)
    args = p.parse_args()
    rows = []
    for size in args.sizes:
        for stage in ("meta", "finetune"):
            row = {"size": size, "stage": stage}
            for ranks in RANKS:
                peak, loaded = count(size, stage, ranks)
                title = f"--shard, {ranks} ranks" if ranks > 1 else "without"
                row[title] = f"{peak:.1f}"
                print(size, stage, title, row[title], flush=True)
            row["CPU memory of a rank while it loads"] = f"{loaded:.1f}"
            rows.append(row)
    text = "\n\n".join([f"Written by `{command_line()}`. GB of one rank's GPU, counted, torch "
                        f"{torch.__version__}:", table(rows)]) + "\n"
    print("\n" + text)
    file = sizes.ROOT / "docs" / "memory.md"
    page = file.read_text(encoding="utf-8") if file.is_file() else ""
    old = part_of(page, "shares")
    if old is not None and args.sizes == sizes.SIZES:
        file.write_text(page.replace(part("shares", old), part("shares", text)), encoding="utf-8")


if __name__ == "__main__":
    main()
