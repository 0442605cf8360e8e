"""Training beside the usual ways to train: LoRA teachers one after another, and LoRA with the instruction in the input."""
import argparse
import contextlib
import gc
import os
from pathlib import Path
from unittest import mock

import peft
import torch
import torch.nn as nn
import torch.nn.functional as F

import common
import data
import draw
import lora
import optim
import sample
import train_hyper
import train_teacher
from random_t5 import train_tokenizer
from side_by_side import SHAPES, PeakMemory, compare, make_llm, make_tagi, note, parse, random_teachers, tokens


def teachers(args):
    """16 LoRA teachers of the built-in suite's tasks, tokenizing included: all in one batch, against one after another.

    PEFT's model is made once, outside the clock.
    """
    steps, units, suite = 10, 16, str(Path(common.__file__).parent / common.SUITE)
    rank, alpha, targets = SHAPES[args.size][4:]
    if not Path(suite).is_dir():
        with contextlib.redirect_stdout(None):
            sample.write_suite(suite)
    tasks = {task.name: [task] for task in data.load_sni(suite, "train", 40)[:units]}
    tokenizer, names = train_teacher.load_tokenizer(f"{suite}/tokenizer"), sorted(tasks)
    ours, plain = make_llm(args), make_llm(args)
    lora.inject_lora(ours, targets.split(","), rank, alpha)
    settings = peft.LoraConfig(r=rank, lora_alpha=alpha, target_modules=targets.split(","), lora_dropout=0.0)
    model = peft.get_peft_model(plain, settings)
    parameters = [p for p in model.parameters() if p.requires_grad]

    def at_once(options):
        with mock.patch.object(common, "Log"), mock.patch.object(train_teacher, "save_teacher"):
            train_teacher.train_teachers("", options, ours, tokenizer, names, tasks, mock.Mock(asked=0), 0)

    def one_after_another(options):
        for n, name in enumerate(names):
            optimizer = torch.optim.AdamW(parameters, lr=options.lr, fused=True)
            for step in range(steps):
                drawn, = draw.draw_tasks(tasks[name], draw.generator(0, step, n), 1, options.instances, 0)
                items = [(drawn.definition, [], text) for text in drawn.prompts]
                ids, mask = data.tokenize_instructed(tokenizer, items, options.max_input, args.device)
                labels = data.labels(tokenizer, [y for _, y in drawn.pairs], options.max_output, args.device)
                with torch.autocast(args.device, torch.bfloat16, enabled=options.precision == "bf16"):
                    logits = lora.logits(model, ids, mask, labels)
                F.cross_entropy(logits.float().flatten(0, 1), labels.flatten()).backward()
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)

    for batch in (1, 2, 4, 8):
        options = parse(train_teacher.parser(), "lora", f"--device={args.device}", f"--rank={rank}", f"--alpha={alpha}",
                        f"--targets={targets}", f"--steps={steps}", "--tasks=1", f"--instances={batch}", "--unit=task",
                        "--max-input=192", "--max-output=16", "--lr=1e-3",
                        f"--precision={'bf16' if args.device == 'cuda' else 'fp32'}")
        name = f"16 teachers, batch {batch}"
        seconds = compare(name, args, {"PEFT, one after another": lambda: one_after_another(options),
                                       "ours, at once": lambda: at_once(options)}, rounds=max(3, args.rounds // 3))
        rates = [f"{way} {units * steps / x:.0f}" for way, x in seconds.items()]
        a, b = seconds.values()
        note(name, f"teacher-steps a second: {', '.join(rates)}: {a / b:.1f}x")


def finetune(args):
    """A finetuning step with all three losses against a LoRA step on the same instances with the instruction in the input."""
    S, _, T, C, rank, alpha, targets = SHAPES[args.size]
    tasks = 32 if args.size == "tiny" else 8
    flags = ["--lambda-kl=1", "--alignment=product"]
    for instances in (1, 2, 4) if args.size == "tiny" else (1, 2):
        tagi, plain = make_tagi(args, *flags), make_llm(args)
        batch = random_batch(args, tasks, instances, S, T, C)
        stacked = random_teachers(tagi, tasks)
        optimizer = optim.make_optimizer(tagi.trainable(), tagi.options)

        def ours():
            step(tagi, optimizer, batch, stacked)

        lora.inject_lora(plain, targets.split(","), rank, alpha)
        weights = lora.init_weights(plain, rank, 0)
        parameters = {f"{site}.{i}": p.requires_grad_() for site, pair in weights.items() for i, p in enumerate(pair)}
        its_optimizer = optim.make_optimizer(parameters, tagi.options)
        lora.set_weights(plain, weights)

        def usual():
            with torch.autocast(args.device, torch.bfloat16, enabled=args.device == "cuda"):
                logits = lora.logits(plain, *batch["prompt"], batch["labels"])
            F.cross_entropy(logits.float().flatten(0, 1), batch["labels"].flatten()).backward()
            nn.utils.clip_grad_norm_(parameters.values(), 1.0)
            its_optimizer.step()
            its_optimizer.zero_grad(set_to_none=True)

        name, ways = f"finetune, {tasks} tasks x {instances}", {"LoRA, instruction in input": usual, "ours, three losses": ours}
        seconds = compare(name, args, ways, rounds=args.rounds)
        n_tokens = tasks * instances * (S + T + C)
        rates = [f"{way} {n_tokens / x:.0f}" for way, x in seconds.items()]
        peaks = [f"{way} {peak_memory(run, args.device):.0f}" for way, run in ways.items()]
        note(name, f"tokens of instruction, input and answer a second: {', '.join(rates)}; MB at the peak: {', '.join(peaks)}")


def logits(args):
    """L_pred and L_kl of 1 024 target positions (8 x 128) over T5's 32 128 words: in chunks, and with all logits at once."""
    M, D, V = 1024, 768, 32128
    heads = [nn.Linear(D, V, bias=False, device=args.device).requires_grad_(False) for _ in range(2)]
    student, teacher = (torch.randn(M, D, device=args.device, requires_grad=n == 0) for n in range(2))
    labels = torch.randint(0, V, (M,), device=args.device)
    options = argparse.Namespace(temperature=1.0, standardize_logits=False)

    def chunked():
        sum(train_hyper.target_losses(student, teacher, labels, *heads, options)).backward()

    def at_once():
        with all_logits_at_once():
            chunked()

    name, ways = f"logits of {M} positions", {"all at once": at_once, "in chunks": chunked}
    compare(name, args, ways, rounds=5)
    note(name, "MB at the peak: " + ", ".join(f"{way} {peak_memory(run, args.device):.0f}" for way, run in ways.items()))


def compiling(args):
    """The LLM's own training, forwards and backwards over 48 rows of eight lengths, with and without torch.compile."""
    S, _, T, C, *_ = SHAPES[args.size]
    batches = [(*tokens(args, 48, S + T - n), tokens(args, 48, C)[0]) for n in range(8)]
    ways = {}
    for name in ("without", "with"):
        llm = make_llm(args).requires_grad_(True).train()
        if name == "with":
            llm.compile(dynamic=True)

        def train(llm=llm):
            for ids, mask, labels in batches:
                F.cross_entropy(lora.logits(llm, ids, mask, labels).flatten(0, 1), labels.flatten()).backward()
                llm.zero_grad()

        ways[name] = train
    compare("torch.compile", args, ways, rounds=9, count=False)


def padding(args):
    """The share of padding in finetuning's batches of 8 tasks on Super-NaturalInstructions, sorted by length or as drawn."""
    folder = os.path.join(os.environ.get("TAGI_DATA", ""), "sni")
    if not os.path.isdir(folder):
        return note("padding", f"skipped: no {folder}; TAGI_DATA names a folder with Super-NaturalInstructions in sni")
    options = parse(train_hyper.parser(), "finetune", f"--data={folder}", "--allow-missing", "--demos=mixed", "--accumulate=2")
    tasks = data.training_tasks(options)
    texts = [" ".join(text.split())[:500] for task in tasks for text in (task.definitions[0], task.instances[0].input)]
    student = argparse.Namespace(tokenizer=train_tokenizer(texts, 8000))
    for ranks in (1, 8):
        shares = {}
        for steps in (0, 1, 8):
            options.bucket_steps, n_micro = steps, ranks * options.accumulate
            with mock.patch.object(data, "training_tasks", lambda _: tasks):
                get_batch, _ = train_hyper.finetune_batches(options, student, n_micro)
                batches = [get_batch(step, micro) for step in range(16) for micro in range(n_micro)]
            masks = [batch[key][1] for batch in batches for key in ("input", "prompt")]
            shares[steps] = 1 - sum(mask.sum().item() for mask in masks) / sum(mask.numel() for mask in masks)
        said = [f"--bucket-steps {steps}: {share:.0%}" for steps, share in shares.items()]
        note(f"padding, {ranks} rank{'s' * (ranks > 1)} x 2 x 8 tasks", ", ".join(said))


def step(tagi, optimizer, batch, teachers):
    """What train_hyper.train does with one micro-batch."""
    terms = train_hyper.losses(tagi, batch, teachers, None, tagi.options, len(batch["positions"]), len(batch["unit"]))
    terms["loss"].backward()
    nn.utils.clip_grad_norm_(tagi.trainable().values(), 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


@contextlib.contextmanager
def all_logits_at_once():
    """Within: train_hyper.target_losses neither cuts the positions into chunks nor makes logits twice."""
    with mock.patch.object(train_hyper.target_losses, "__defaults__", (10 ** 9,)), \
            mock.patch.object(train_hyper, "checkpoint", lambda f, *args, **kwargs: f(*args)):
        yield


def random_batch(args, tasks, instances, S, T, C):
    """A batch of train_hyper.finetune_batches' form, every text as long as the others."""
    n = tasks * instances
    return {"instruction": tokens(args, tasks, S), "input": tokens(args, n, T), "prompt": tokens(args, n, S + T), "index": None,
            "unit": torch.arange(tasks, device=args.device), "labels": tokens(args, n, C)[0],
            "positions": torch.arange(n * C, device=args.device)}


def peak_memory(run, device):
    """Megabytes that one run needs beyond what was there before."""
    if device == "cuda":
        gc.collect()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        return (torch.cuda.max_memory_allocated() - before) / 2 ** 20
    with PeakMemory() as memory:
        run()
    return memory.peak / 2 ** 20
