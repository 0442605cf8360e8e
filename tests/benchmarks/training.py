"""Training beside the usual ways to train: one LoRA after another, the instruction in the input."""
import argparse
import contextlib
import gc
import os
import types
from pathlib import Path
from unittest import mock

import peft
import torch
import torch.nn as nn
import torch.nn.functional as F

import config
import data
import lora
import t5
import train_hyper
import train_teacher
from bench import optim, sample
from pages import ROOT
from random_t5 import train_tokenizer
from side_by_side import (SHAPES, PeakMemory, lora_flags, make_llm, make_tagi, no_config,
                          random_teachers, tokens)


def teachers(section, args):
    """Sixteen LoRA teachers are trained in one batch, or one after another with PEFT.

    Each learns one task of the built-in suite in five steps, tokenizing included; *batch* is its
    number of instances a step. A relative time of 0.2 says that the batch of all sixteen takes a
    fifth of the time; it is padded to the longest text of all tasks, so its FLOPs are more. PEFT's
    model is made once, outside the clock.
    """
    n_teachers, steps = 16, 5
    shape, suite = SHAPES[args.size], ROOT / sample.SUITE
    if not suite.is_dir():
        sample.write_suite(suite)
    tasks_of = {}                                       # teacher -> its tasks
    for task in data.load_sni(str(suite), "train", 40)[:n_teachers]:
        tasks_of[task.name] = [task]
    names = sorted(tasks_of)
    tokenizer = t5.load_tokenizer(str(suite / "tokenizer"))

    ours = make_llm(args)
    lora.inject_lora(ours, shape.targets.split(","), shape.rank, shape.alpha)
    settings = peft.LoraConfig(r=shape.rank, lora_alpha=shape.alpha, lora_dropout=0.0,
                               target_modules=shape.targets.split(","))
    model = peft.get_peft_model(make_llm(args), settings)
    parameters = [p for p in model.parameters() if p.requires_grad]

    def at_once(options):
        # Of a run only what training a group reads: it keeps no log and saves nothing.
        run = types.SimpleNamespace(options=options, folder="unused", record=dict, log=mock.Mock(),
                                    stop=types.SimpleNamespace(asked=0))
        writers = {name: mock.DEFAULT for name in ("save_step", "sweep", "save_teacher")}
        with mock.patch.multiple(train_teacher, **writers):
            lost = train_teacher.train_group(run, ours, tokenizer, 0, names, tasks_of, {})
        if lost or run.log.call_count != steps:
            raise SystemExit(f"{run.log.call_count} of {steps} steps, {len(lost)} teachers lost")

    def one_after_another(options):
        for n, name in enumerate(names):
            optimizer = torch.optim.AdamW(parameters, lr=options.lr, fused=True)
            for step in range(steps):
                rng = data.rng_of(0, step, n)
                drawn = data.draw_tasks(tasks_of[name], rng, 1, options.instances, 0)
                ids, mask, labels = train_teacher.instructed_batch(drawn, tokenizer, options)
                with torch.autocast(args.device, torch.bfloat16, enabled=args.device == "cuda"):
                    logits = t5.logits(model, ids, mask, labels)
                F.cross_entropy(logits.float().flatten(0, 1), labels.flatten()).backward()
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)

    precision = "bf16" if args.device == "cuda" else "fp32"
    for batch in (1, 4, 8):
        argv = ["--stage=lora", *lora_flags(args), f"--precision={precision}", f"--steps={steps}",
                "--tasks=1", f"--instances={batch}", "--unit=task", "--max-input=192",
                "--max-output=16", "--lr=1e-3"]
        with no_config():
            options = config.parse(train_teacher.parser(), "lora", argv)
        seconds = section.compare(f"batch {batch}", {
            "PEFT, one after another": lambda: one_after_another(options),
            "ours, at once": lambda: at_once(options)}, rounds=3)
        section.add_column("teacher-steps a second", {
            way: f"{n_teachers * steps / x:.0f}" for way, x in seconds.items()})


def finetune(section, args):
    """A step trains the hypernetwork with all three losses, or one LoRA on the same instances.

    The usual way is a LoRA for all tasks that reads the instruction in every input. Ours runs the
    frozen LLM twice more, as KL teacher and over the instructions, and reads an instruction once
    for all its instances: the relative time is the price of a step. *32 x 2* is 32 tasks with two
    instances of each. *MB at the peak* counts the tensors that a step makes, without the model.
    """
    shape = SHAPES[args.size]
    tasks, numbers = (32, (1, 2, 4)) if args.size == "tiny" else (8, (1, 2))
    for instances in numbers:
        batch = random_batch(args, tasks, instances, shape.instruction, shape.instance,
                             shape.answer)
        tagi = make_tagi(args, "--lambda-kl=1", "--alignment=product")
        stacked = random_teachers(tagi, tasks)
        optimizer = optim.make_optimizer(tagi.trainable(), tagi.options)

        def ours():
            step(tagi, optimizer, batch, stacked)

        plain = make_llm(args)
        lora.inject_lora(plain, shape.targets.split(","), shape.rank, shape.alpha)
        weights = lora.init_weights(plain, shape.rank, 0)
        parameters = lora.flatten(weights)
        for p in parameters.values():
            p.requires_grad_()
        its_optimizer = optim.make_optimizer(parameters, tagi.options)
        lora.set_weights(plain, weights)

        def usual():
            with torch.autocast(args.device, torch.bfloat16, enabled=args.device == "cuda"):
                logits = t5.logits(plain, *batch["prompt"], batch["labels"])
            F.cross_entropy(logits.float().flatten(0, 1), batch["labels"].flatten()).backward()
            nn.utils.clip_grad_norm_(parameters.values(), 1.0)
            its_optimizer.step()
            its_optimizer.zero_grad(set_to_none=True)

        ways = {"LoRA, instruction in input": usual, "ours, three losses": ours}
        section.compare(f"{tasks} x {instances}", ways)
        section.add_column("MB at the peak", peaks(ways, args.device))


def logits(section, args):
    """The losses make a vocabulary's logits for 256 positions at a time, or all at once.

    L_pred and L_kl of 1024 target positions over T5's 32128 words, forwards and backwards. In
    chunks, logits are made once more in the backward pass: more FLOPs and time, for less memory,
    which the last column shows.
    """
    M, D, V = 1024, 768, 32128
    heads = [nn.Linear(D, V, bias=False, device=args.device).requires_grad_(False)
             for _ in range(2)]
    student = torch.randn(M, D, device=args.device, requires_grad=True)
    teacher = torch.randn(M, D, device=args.device)
    labels = torch.randint(0, V, (M,), device=args.device)
    options = argparse.Namespace(temperature=1.0, standardize_logits=False)

    def chunked():
        sum(train_hyper.target_losses(student, teacher, labels, *heads, options)).backward()

    def at_once():
        with all_logits_at_once():
            chunked()

    ways = {"all at once": at_once, "in chunks": chunked}
    section.compare(f"{M} positions", ways, rounds=3)
    section.add_column("MB at the peak", peaks(ways, args.device))


def padding(section, args):
    """Finetuning's batches are sorted by length over several steps, or stay as drawn.

    The table shows the share of padding in what the encoder reads, for batches of 8 tasks of
    Super-NaturalInstructions and two micro-batches a step: less of it is less to compute.
    """
    folder = Path(os.environ.get("TAGI_DATA", ""), "sni")
    if not folder.is_dir():
        section.notes.append("Left out: TAGI_DATA names no folder with Super-NaturalInstructions "
                             "in sni.")
        return
    with no_config():
        options = train_hyper.get_options([
            "--stage=finetune", f"--data={folder}", "--allow-missing", "--demos=mixed",
            "--accumulate=2"])
    tasks, texts = data.training_tasks(options), []
    for task in tasks:
        for text in (task.definitions[0], task.instances[0].input):
            texts.append(" ".join(text.split())[:500])
    student = argparse.Namespace(tokenizer=train_tokenizer(texts, 8000))
    for ranks in (1, 8):
        row = {"case": f"{ranks} rank" + ("s" if ranks > 1 else "")}
        for steps in (0, 1, 8):
            options.bucket_steps = steps
            row[f"--bucket-steps {steps}"] = f"{padding_share(options, student, ranks, tasks):.0%}"
        section.rows.append(row)


def padding_share(options, student, ranks, tasks, steps=16):
    """The share of padding in what the student and its teacher read in so many steps."""
    n_micro = ranks * options.accumulate
    get_batch, _ = train_hyper.finetune_batches(options, student, n_micro, tasks)
    real = total = 0
    for step in range(steps):
        for micro in range(n_micro):
            batch = get_batch(step, micro)
            for _, mask in (batch["input"], batch["prompt"]):
                real += mask.sum().item()
                total += mask.numel()
    return 1 - real / total


# ------------------------------------------------------------------- for these and for sizes.py

def step(tagi, optimizer, batch, teachers):
    """What train_hyper.train does with one micro-batch."""
    n_tokens, n_tasks = len(batch["positions"]), len(batch["instruction"][0])
    terms = train_hyper.losses(tagi, batch, teachers, None, tagi.options, n_tokens, n_tasks)
    terms["loss"].backward()
    nn.utils.clip_grad_norm_(tagi.trainable().values(), 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


@contextlib.contextmanager
def all_logits_at_once():
    """Within: train_hyper.target_losses neither cuts positions into chunks nor repeats logits."""
    def run(f, *args, **kwargs):
        return f(*args)

    size = mock.patch.object(train_hyper.target_losses, "__defaults__", (10 ** 9,))
    with size, mock.patch.object(train_hyper, "checkpoint", run):
        yield


def random_batch(args, tasks, instances, S, T, C):
    """A batch as train_hyper.finetune_batches makes them, every text as long as the others."""
    n = tasks * instances
    return {"instruction": tokens(args, tasks, S), "input": tokens(args, n, T),
            "prompt": tokens(args, n, S + T), "labels": tokens(args, n, C)[0],
            "positions": torch.arange(n * C, device=args.device), "index": None,
            "teacher": torch.arange(tasks, device=args.device)}


def peaks(ways, device) -> dict:
    """{way: megabytes that one run needs beyond what was there before}."""
    return {way: f"{peak_memory(run, device):.0f}" for way, run in ways.items()}


def peak_memory(run, device):
    if device == "cuda":
        gc.collect()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        return (torch.cuda.max_memory_allocated() - before) / 2 ** 20
    with PeakMemory() as memory:
        run()
    return memory.peak / 2 ** 20
