"""Our ways beside the usual ones, in one run, taking turns: python tests/benchmarks/run.py [--device cuda] [--size base] [--only NAME]

    teachers     16 LoRA teachers in one batch               against PEFT's get_peft_model, one teacher after another
    merged       decoding with one task merged               against plain T5
    mixed        a batch of 16 tasks, each its own adapter   against plain T5, and PEFT's adapter_names
    reread       n instances by a generated adapter          against the instruction in every input
    regenerate   adapters generated once                     against anew at every decoding step, as the paper's code does
    rouge, rank  see rouge_l.py and rank.py

Models have random weights; `tiny` is the built-in suite's shape, `base` T5 v1.1 Base. Times are medians with the spread of the
middle half of the rounds, after one round of warm-up that does not count. PEFT comes from tests/requirements.txt.
"""
import argparse
import contextlib
import statistics
import sys
import tempfile
import time
import warnings
from pathlib import Path
from unittest import mock

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import peft
import torch
import torch.nn.functional as F

import common
import config
import data
import draw
import lora
import train_hyper
import train_teacher
from hypernet import TAGI
from random_t5 import random_t5

SHAPES = {  # tokens of: an instruction, one with two demonstrations, an instance, an answer; LoRA rank, alpha, targets
    "tiny": (27, 85, 22, 5, 8, 8, "q,k,v,o"),
    "base": (130, 400, 130, 12, 32, 32, "q,v"),
}
LINES = []


def interleaved(rounds: int, **ways) -> dict:
    """{way: (median, lower quartile, upper quartile) of seconds}; the ways take turns, the first round only warms up."""
    seconds = {way: [] for way in ways}
    for n in range(rounds + 1):
        for way, run in ways.items():
            synchronize()
            start = time.perf_counter()
            run()
            synchronize()
            if n:
                seconds[way].append(time.perf_counter() - start)
    return {way: (statistics.median(x), *statistics.quantiles(x, n=4)[::2]) for way, x in seconds.items()}


def synchronize():
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def report(name: str, seconds: dict, reference: str, unit: str = "") -> None:
    """A line for every way: its time, and how many times the reference's that is."""
    for way, (median, low, high) in seconds.items():
        line = (f"| {name} | {way.replace('_', ' ')}{unit} | {1000 * median:.1f} | {1000 * low:.1f} – {1000 * high:.1f} | "
                f"{median / seconds[reference][0]:.2f}x |")
        LINES.append(line)
        print(line, flush=True)


# ------------------------------------------------------------------------------------------------------------- models

def make_tagi(args, **changed) -> TAGI:
    """A student of random weights, its B not zero, as train_hyper.py would make it."""
    *_, rank, alpha, targets = SHAPES[args.size]
    sizes = ["--width=128", "--bottleneck=128"]
    with mock.patch.object(common, "read_yaml", lambda *args: {}):
        options = config.parse(train_hyper.parser(), "finetune", ["--stage=finetune", f"--device={args.device}", *sizes])
    vars(options).update({"rank": rank, "alpha": alpha, "targets": targets, "train_norms": False} | changed)
    tagi = TAGI(make_llm(args), None, options)
    if tagi.generator is not None:
        with torch.no_grad():
            for p in tagi.trainable().values():
                p += 0.01 * torch.randn_like(p)
    return tagi


def make_llm(args):
    llm = random_t5(args.size).to(args.device).eval().requires_grad_(False)
    return llm.to(torch.bfloat16) if args.device == "cuda" else llm


def tokens(args, llm, n, length):
    ids = torch.randint(3, llm.config.vocab_size - 110, (n, length), device=args.device)
    return ids, torch.ones_like(ids)


@torch.no_grad()
def decode(llm, ids, mask, n_new, **more):
    return llm.generate(input_ids=ids, attention_mask=mask, do_sample=False, num_beams=1, min_new_tokens=n_new,
                        max_new_tokens=n_new, **more)


@torch.no_grad()
def decode_adapted(tagi, adapter, ids, mask, n_new):
    with tagi.adapted(adapter) as llm:
        encoded, mask = tagi.encode(ids, mask)
        return llm.generate(encoder_outputs=encoded, attention_mask=mask, do_sample=False, num_beams=1, min_new_tokens=n_new,
                            max_new_tokens=n_new)


@torch.no_grad()
def adapt(tagi, ids, mask):
    return tagi.generate_adapter(*tagi.encode_instruction(ids, mask), mask)


def with_and_without_fusion(args):
    return make_tagi(args, encoder_fusion=False, decoder_fusion=False), make_tagi(args)


# --------------------------------------------------------------------------------------------------------- benchmarks

def merged(args):
    """One task's adapter merged: T5's own cost without fusion; fusion attends over the instruction as well."""
    S, _, T, C, *_ = SHAPES[args.size]
    plain, ways = make_llm(args), {}
    ids, mask = tokens(args, plain, args.rows, T)
    ways["plain_T5"] = lambda: decode(plain, ids, mask, C)
    for name, tagi in zip(("merged, no fusion", "merged, with fusion"), with_and_without_fusion(args)):
        adapter = adapt(tagi, *tokens(args, plain, 1, S))
        tagi.merge(adapter)
        ways[name] = lambda tagi=tagi, adapter=adapter: decode_adapted(tagi, adapter, ids, mask, C)
    report(f"merged, {args.rows} rows", interleaved(args.rounds, **ways), "plain_T5")


def mixed(args):
    """A batch of 16 tasks, every task with an adapter of its own."""
    S, _, T, C, rank, alpha, targets = SHAPES[args.size]
    plain, ways = make_llm(args), {}
    ids, mask = tokens(args, plain, args.rows, T)
    index = torch.arange(args.rows) % 16
    ways["plain_T5"] = lambda: decode(plain, ids, mask, C)
    for name, tagi in zip(("16 tasks, no fusion", "16 tasks, with fusion"), with_and_without_fusion(args)):
        adapter = adapt(tagi, *tokens(args, plain, 16, S)).select(index.to(args.device))
        ways[name] = lambda tagi=tagi, adapter=adapter: decode_adapted(tagi, adapter, ids, mask, C)
    settings = peft.LoraConfig(r=rank, lora_alpha=alpha, target_modules=targets.split(","), init_lora_weights=False)
    peft_llm = peft.get_peft_model(make_llm(args), settings, adapter_name="task0")
    for n in range(1, 16):
        peft_llm.add_adapter(f"task{n}", settings)
    peft_llm.eval()
    names = [f"task{n}" for n in index.tolist()]
    ways["16 tasks, PEFT adapter_names"] = lambda: decode(peft_llm, ids, mask, C, adapter_names=names)
    report(f"mixed, {args.rows} rows", interleaved(args.rounds, **ways), "plain_T5")


def reread(args):
    """n instances of one task: adapter generated, merged, used, unmerged, against the instruction in every input."""
    S, S2, T, C, *_ = SHAPES[args.size]
    plain, tagi = make_llm(args), make_tagi(args)

    def once(instruction, ids, mask):
        adapter = adapt(tagi, *instruction)
        tagi.merge(adapter)
        decode_adapted(tagi, adapter, ids, mask, C)
        tagi.unmerge()

    for demos, length in ((0, S), (2, S2)):
        instruction, even = tokens(args, plain, 1, length), None
        for n in (1, 2, 5, 10, 20, 50, 100):
            ids, mask = tokens(args, plain, n, T)
            long_ids, long_mask = tokens(args, plain, n, length + T)
            seconds = interleaved(args.rounds, instruction_in_input=lambda: decode(plain, long_ids, long_mask, C),
                                  generated_adapter=lambda: once(instruction, ids, mask))
            if n in (1, 10, 100):
                report(f"reread, {demos} demonstrations, n = {n}", seconds, "instruction_in_input")
            if even is None and seconds["generated_adapter"][0] <= seconds["instruction_in_input"][0]:
                even = n
        LINES.append(f"| reread, {demos} demonstrations | even from n = {even} (of 1, 2, 5, 10, 20, 50, 100) on | | | |")
        print(LINES[-1], flush=True)


def regenerate(args):
    """Adapters once a task, against anew before every decoding step, as the paper's code does."""
    S, _, T, C, *_ = SHAPES[args.size]
    tagi = make_tagi(args)
    ids, mask = tokens(args, tagi.llm, args.rows, T)
    with torch.no_grad():
        instruction, i_mask = tokens(args, tagi.llm, 16, S)
        first, last = tagi.encode_instruction(instruction, i_mask)
    index = torch.arange(args.rows, device=args.device) % 16

    @torch.no_grad()
    def make():
        return tagi.generate_adapter(first, last, i_mask).select(index)

    def at_every_step():
        hook = tagi.llm.decoder.register_forward_pre_hook(lambda *_: lora.set_weights(tagi.llm, make().weights))
        decode_adapted(tagi, make(), ids, mask, C)
        hook.remove()

    report(f"regenerate, {args.rows} rows of 16 tasks", interleaved(
        args.rounds, once=lambda: decode_adapted(tagi, make(), ids, mask, C), at_every_step=at_every_step), "once")


def teachers(args):
    """16 LoRA teachers of the built-in suite's tasks, tokenizing included: all in one batch, against one after another."""
    steps, units = 10, 16
    rank, alpha, targets = SHAPES[args.size][4:]
    folder = tempfile.mkdtemp()
    with contextlib.redirect_stdout(None):
        if not Path(ROOT, common.SUITE).is_dir():
            import sample
            sample.write_suite(ROOT / common.SUITE)
    tasks = data.load_sni(str(ROOT / common.SUITE), "train", 40)[:units]
    tokenizer = train_teacher.load_tokenizer(str(ROOT / common.SUITE / "tokenizer"))
    with mock.patch.object(common, "read_yaml", lambda *args: {}):
        options = config.parse(train_teacher.parser(), "lora", [
            "--stage=lora", f"--device={args.device}", f"--rank={rank}", f"--alpha={alpha}", f"--targets={targets}",
            f"--steps={steps}", "--tasks=1", "--instances=8", "--unit=task", "--max-input=192", "--max-output=16", "--lr=1e-3"])
    options.llm_fingerprint = ""
    groups = {task.name: [task] for task in tasks}

    ours = make_llm(args)
    lora.inject_lora(ours, targets.split(","), rank, alpha)

    def stacked():
        with mock.patch.object(common, "Log"), mock.patch.object(train_teacher, "save_teacher"):
            stop = mock.Mock(asked=0)
            train_teacher.train_teachers(folder, options, ours, tokenizer, sorted(groups), groups, stop, 0)

    plain = make_llm(args)

    def one_by_one():
        settings = peft.LoraConfig(r=rank, lora_alpha=alpha, target_modules=targets.split(","), lora_dropout=0.0)
        for n, name in enumerate(sorted(groups)):
            model = peft.get_peft_model(plain, settings)
            optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3, fused=True)
            for step in range(steps):
                drawn = draw.draw_tasks(groups[name], draw.generator(0, step, n), 1, 8, 0)[0]
                items = [(drawn.definition, [], text) for text in drawn.prompts]
                ids, mask = data.tokenize_instructed(tokenizer, items, options.max_input, args.device)
                labels = data.labels(tokenizer, [y for _, y in drawn.pairs], options.max_output, args.device)
                logits = model(input_ids=ids, attention_mask=mask, labels=labels).logits
                F.cross_entropy(logits.float().flatten(0, 1), labels.flatten()).backward()
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
            model.unload()

    seconds = interleaved(max(3, args.rounds // 3), PEFT_one_after_another=one_by_one, ours_16_at_once=stacked)
    report(f"teachers, 16 x {steps} steps of 8 examples", seconds, "PEFT_one_after_another")
    rates = ", ".join(f"{way.replace('_', ' ')} {units * steps / x[0]:.0f}" for way, x in seconds.items())
    LINES.append(f"| teachers | teacher-steps per second: {rates} | | | |")
    print(LINES[-1], flush=True)


BENCHMARKS = {f.__name__: f for f in (teachers, merged, mixed, reread, regenerate)}


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    p.add_argument("--size", default="tiny", choices=SHAPES)
    p.add_argument("--only", choices=BENCHMARKS)
    p.add_argument("--rows", type=int, default=64, help="instances in a decoded batch")
    p.add_argument("--rounds", type=int, default=15)
    args = p.parse_args()
    warnings.simplefilter("ignore")
    print("| benchmark | way | ms, median | middle half | ratio |\n|---|---|--:|--:|--:|", flush=True)
    for name in [args.only] if args.only else BENCHMARKS:
        BENCHMARKS[name](args)


if __name__ == "__main__":
    main()
