"""Train what the student learns from: a base model, the baseline that reads instructions, and LoRA teachers.

    base   `--model tiny` only: a small T5 trained from nothing on plain text, to continue it
    meta   the LLM with the instruction in its input on all training tasks (Tk-Instruct, T0): the baseline the paper
           compares with, a possible KL teacher, and by default the frozen LLM under everything that follows
    lora   LoRA teachers (METHOD "training with instance"): for every category or task, LoRA weights Δ_i on the frozen
           LLM, reading instruction and input
    lora-all   one LoRA for all training tasks ("meta-trained with one LoRA", Tk-Instruct-LoRA in
               Table 4): meta with LoRA weights on the frozen LLM in place of its own; section
               lora_all of a config

Launch (without --stage: the stages that the config lists, in order):
    python train_teacher.py                                     # the built-in suite, configs/sample.yaml
    python train_teacher.py --stage meta --lr 1e-3
    torchrun --nproc-per-node 8 train_teacher.py --config configs/my.yaml
"""
import argparse
import dataclasses
import glob
import functools
import os
import shutil
import sys

import torch
import torch.nn as nn
import torch.nn.functional as F
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer, T5Config

import common
import config
import data
import draw
import lora
import optim
import t5


def parser():
    p = config.Parser(__doc__)
    config.add_shared_options(p)
    g = p.add_argument_group("stage")
    g.add_argument("--stage", choices=["base", "meta", "lora", "lora-all"],
                   help="one stage; default: those of --stages")
    g.add_argument("--name", help="folder under --runs; default: the stage's name")
    config.add_training_options(p, steps=10_000)
    g = p.add_argument_group("base and meta")
    g.add_argument("--compile", default=False, help="torch.compile of the LLM: minutes at the start, and a C++ compiler on a "
                   "CPU; the benchmark `compiling` shows what it gains", **config.flag)
    g = p.add_argument_group("base (only --model tiny)")
    g.add_argument("--text", help="plain text, one document a line; default: --data's corpus.txt")
    g.add_argument("--text-length", type=config.at_least(3), default=128, help="tokens of a document used at a time")
    g.add_argument("--width", type=config.positive, default=64, help="d_model")
    g.add_argument("--layers", type=config.positive, default=2, help="blocks in the encoder and in the decoder")
    g.add_argument("--heads", type=config.positive, default=4)
    g.add_argument("--ff", type=config.positive, default=128, help="d_ff")
    g = p.add_argument_group("meta")
    g.add_argument("--drop-instruction", type=config.share, default=0.0, help="share of draws whose input is the instance alone")
    g.add_argument("--easy-first", type=config.share, default=0.0, help="share of the steps, at the start, on tasks with answers "
                   "of one or two words, in one wording; a model made from nothing needs it")
    g.add_argument("--demos-after", type=config.share, default=0.0, help="share of the steps without demonstrations, at the start")
    g = p.add_argument_group("lora")
    g.add_argument("--teachers-at-once", type=config.positive, default=16,
                   help="LoRA teachers trained side by side in one batch")
    return p


# ----------------------------------------------------------------------------------------------------------- models

def tiny_t5(options, tokenizer):
    """A T5 v1.1 (gated GELU, untied head) of a few hundred thousand parameters, started so that it trains fast."""
    torch.manual_seed(options.seed)
    shape = T5Config(vocab_size=len(tokenizer), d_model=options.width, d_kv=options.width // options.heads,
                     d_ff=options.ff, num_layers=options.layers, num_heads=options.heads, dropout_rate=0.0,
                     feed_forward_proj="gated-gelu_pytorch_tanh",         # gated-gelu's function, in one kernel
                     tie_word_embeddings=False, decoder_start_token_id=0)
    llm = AutoModelForSeq2SeqLM.from_config(shape)
    with torch.no_grad():
        llm.shared.weight *= 0.3
    llm.lm_head.weight = nn.Parameter(llm.shared.weight.detach() * 0.5)     # Transformers 5 ties it whatever the config says
    return llm


def save_llm(folder, options, llm, tokenizer, **kwargs):
    """A run folder that is also a Transformers checkpoint."""
    os.makedirs(folder, exist_ok=True)
    llm.config.save_pretrained(folder)
    llm.generation_config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    common.save_checkpoint(folder, options, dict(llm.named_parameters()), **kwargs)


def train_llm(folder, options, llm, tokenizer, get_batch, rank, world, tasks=None):
    """Train all weights of the LLM; stages base and meta."""
    llm.to(options.device).train()
    if options.checkpointing and options.compile:
        raise common.UserError("--compile does not work with --checkpointing; choose one of them")
    if options.checkpointing:
        lora.checkpoint_blocks(llm)
    if options.compile:
        llm.compile(dynamic=True)                                           # texts differ in length: one program for all
    save = functools.partial(save_llm, folder, options, llm, tokenizer)
    train_together(folder, options, llm, dict(llm.named_parameters()), save, get_batch, rank, world, tasks)


def train_together(folder, options, llm, parameters, save, get_batch, rank, world, tasks=None):
    """Train these parameters on `get_batch(step, micro) -> (ids, mask, labels)`, of all ranks.

    save(optimizer=.., step=.., finished=..) writes a checkpoint to the folder; tasks: those that the batches are of.
    """
    optimizer = optim.make_optimizer(parameters, options)
    start = common.resume(folder, options, parameters, optimizer)
    common.begin(folder, options, rank)
    if rank == 0 and tasks is not None:
        data.write_training_tasks(folder, tasks)
    stop, log = common.StopSignal(), common.Log(folder, options, start, rank)
    autocast = torch.autocast(options.device, torch.bfloat16, enabled=options.precision == "bf16")

    for step in range(start, options.steps):
        lr = optim.learning_rate(options, step)
        for group in optimizer.param_groups:
            group["lr"] = lr
        micros = [rank + world * i for i in range(options.accumulate)]      # among all ranks'
        batches = [get_batch(step, micro) for micro in micros]
        # The loss of a step is the mean over the label tokens of all its micro-batches and ranks.
        counts = [sum((labels != data.IGNORE).sum().item() for _, _, labels in batches), stop.asked]
        n_tokens, stopping = common.sum_over_ranks(counts, options.device)
        total = 0.0
        for micro, (ids, mask, labels) in zip(micros, batches):
            # Dropout too is a function of (seed, step, micro): no two ranks drop the same.
            torch.manual_seed(int(draw.generator(options.seed, step, micro, 4).integers(2 ** 63)))
            with autocast:
                logits = lora.logits(llm, ids, mask, labels)                                       # (N, C, V)
            loss = F.cross_entropy(logits.float().flatten(0, 1), labels.flatten(), reduction="sum") / n_tokens
            loss.backward()
            total += loss.detach()
        common.sum_gradients(parameters.values())
        if options.clip:
            nn.utils.clip_grad_norm_(parameters.values(), options.clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        log(step + 1, lr, {"loss": total})
        finished = step + 1 == options.steps
        if rank == 0 and (finished or stopping or (step + 1) % options.save_every == 0):
            save(optimizer=optimizer, step=step + 1, finished=finished)
        if stopping and not finished:
            common.leave(folder, step + 1, log)
    log.close()
    stop.leave_if_asked(options.device)


# ----------------------------------------------------------------------------------------------------------- stages

def train_base(options, rank, world):
    """A small T5 from nothing: continue a document cut at random (prefix language modelling)."""
    tokenizer = load_tokenizer(os.path.join(options.data, "tokenizer"))
    options.tokenizer_digest = common.tokenizer_digest(tokenizer)
    documents = data.read_documents(options.text)
    eos, pad, n = tokenizer.eos_token_id, tokenizer.pad_token_id, options.tasks * options.instances
    deal = draw.by_length(lambda *at: draw.draw_documents(documents, draw.generator(options.seed, *at), n), options,
                          world * options.accumulate)

    def get_batch(step, micro):
        rng = draw.generator(options.seed, step, micro, 3)
        rows = draw.cut_documents(deal(step, micro), tokenizer, 2, options.text_length, rng)
        ids, mask = data.pad([a + [eos] for a, _ in rows], pad, options.device)
        labels, _ = data.pad([b + [eos] for _, b in rows], data.IGNORE, options.device)
        return ids, mask, labels

    train_llm(folder_of(options, "base"), options, tiny_t5(options, tokenizer), tokenizer, get_batch, rank, world)


def load_tokenizer(path):
    if not os.path.isdir(path):
        raise common.UserError(f"{path}: no such folder; --model tiny needs a tokenizer beside its data: python sample.py")
    return AutoTokenizer.from_pretrained(path)


def train_meta(options, rank, world):
    """The LLM on all training tasks, mixed, with the instruction in its input."""
    path = common.base_path(options)
    llm, tokenizer = t5.load_llm(path, options.device, attention=options.attention)       # float32; autocast's arithmetic
    options.tokenizer_digest = common.tokenizer_digest(tokenizer)
    tasks = data.training_tasks(options)
    easy = [dataclasses.replace(t, definitions=t.definitions[:1]) for t in tasks
            if all(len(output.split()) <= 2 for x in t.instances for output in x.outputs)] or tasks
    if options.drop_instruction and all(x.prompt == x.input for t in tasks for x in t.instances):
        raise common.UserError("--drop-instruction: here every input is the whole prompt, "
                               "instruction included; choose 0, or --p3-input fields and rows with them")

    def draws(step, micro):
        rng = draw.generator(options.seed, step, micro)
        easy_only, early = step < options.easy_first * options.steps, step < options.demos_after * options.steps
        demos = 0 if early else draw.n_demonstrations(options.demos, options.seed, step)
        drawn = draw.draw_tasks(easy if easy_only else tasks, rng, options.tasks, options.instances, demos, options.vary_demos)
        for n, d in enumerate(drawn):
            if not easy_only and rng.random() < options.drop_instruction:
                inputs = [x for x, _ in d.pairs]            # of P3 the fields without the prompt
                drawn[n] = dataclasses.replace(d, definition="", demonstrations=[], prompts=inputs)
        return drawn

    deal = draw.by_length(draws, options, world * options.accumulate)

    def get_batch(step, micro):
        drawn = deal(step, micro)
        items = [(d.definition, d.demonstrations, text) for d in drawn for text in d.prompts]
        ids, mask = data.tokenize_instructed(tokenizer, items, options.max_input, options.device)
        return ids, mask, data.labels(tokenizer, [y for d in drawn for _, y in d.pairs], options.max_output, options.device)

    train_llm(folder_of(options, "meta"), options, llm, tokenizer, get_batch, rank, world, tasks)


def load_frozen_llm(options):
    """(the frozen LLM with places for LoRA weights, its tokenizer), for lora and lora-all."""
    if options.optimizer == "adafactor":
        raise common.UserError("--optimizer adafactor takes norms over all teachers at once; choose adamw for lora")
    path = common.llm_path(options)
    llm, tokenizer = t5.load_llm(path, options.device, options.precision, options.attention)
    llm.requires_grad_(False).eval()
    options.llm_fingerprint = t5.fingerprint(llm)
    options.tokenizer_digest = common.tokenizer_digest(tokenizer)
    lora.inject_lora(llm, options.targets.split(","), options.rank, options.alpha)
    if options.checkpointing:
        lora.checkpoint_blocks(llm)
    return llm, tokenizer


def train_lora_all(options, rank, world):
    """One LoRA on the frozen LLM for all training tasks: a baseline, trained like the student.

    All ranks train it together, on batches like finetuning's; teachers of one category have a rank.
    """
    folder = folder_of(options, "lora-all")
    llm, tokenizer = load_frozen_llm(options)
    tasks = data.training_tasks(options)
    weights = lora.init_weights(llm, options.rank, options.seed)     # {site: (r, D_in), (D_out, r)}
    lora.set_weights(llm, weights)
    parameters = {name: w.requires_grad_() for name, w in flatten(weights).items()}
    p = draw.chances(tasks, options.balance)

    def draws(step, micro):
        rng = draw.generator(options.seed, step, micro)
        demos = draw.n_demonstrations(options.demos, options.seed, step)
        return draw.draw_tasks(tasks, rng, options.tasks, options.instances, demos,
                               options.vary_demos, p)

    deal = draw.by_length(draws, options, world * options.accumulate)

    def get_batch(step, micro):
        drawn = deal(step, micro)
        items = [(d.definition, d.demonstrations, text) for d in drawn for text in d.prompts]
        outputs = [y for d in drawn for _, y in d.pairs]
        ids, mask = data.tokenize_instructed(tokenizer, items, options.max_input, options.device)
        return ids, mask, data.labels(tokenizer, outputs, options.max_output, options.device)

    def save(finished, **kwargs):
        if finished:                                        # before the stage calls itself finished
            save_teacher(folder, options, "all", weights)
        common.save_checkpoint(folder, options, parameters, finished=finished, **kwargs)

    train_together(folder, options, llm, parameters, save, get_batch, rank, world)


def train_lora(options, rank, world):
    """LoRA teachers on the frozen LLM, several side by side: a batch mixes them, each example uses its own weights."""
    folder = folder_of(options, "lora")
    llm, tokenizer = load_frozen_llm(options)
    units = {}
    for task in data.training_tasks(options):
        units.setdefault(data.unit_of(task, options.unit), []).append(task)
    names, size = sorted(units), options.teachers_at_once
    if len(names) <= size * (world - 1):                                    # else a rank would have nothing to do
        size = -(-len(names) // world)
    groups = [names[i:i + size] for i in range(0, len(names), size)]
    if len({teacher_folder(folder, name) for name in names}) < len(names):
        raise common.UserError(f"--unit {options.unit}: two names differ only in signs that a folder's name cannot have; "
                               "rename one")
    common.begin(folder, options, rank)
    if rank == 0:
        common.save_checkpoint(folder, options, {})                         # a rerun sees what these teachers are
    stop = common.StopSignal()
    for group in groups[rank::world]:                                       # ranks share out the groups, no traffic
        group = [unit for unit in group if not common.is_finished(teacher_folder(folder, unit))]
        if group:
            train_teachers(folder, options, llm, tokenizer, group, units, stop, rank)
    common.wait_for_all_ranks()
    if rank == 0:
        for left in glob.glob(f"{glob.escape(folder)}/unfinished-*"):       # of other groups
            shutil.rmtree(left)
        common.save_checkpoint(folder, options, {}, step=options.steps, finished=True)
    stop.leave_if_asked(options.device)


def train_teachers(folder, options, llm, tokenizer, group, units, stop, rank):
    """A group of U independent teachers. Their losses are added up, each the mean over its own label tokens, and AdamW
    works element by element: every teacher gets the gradient and the step it would get alone."""
    numbers = {unit: n for n, unit in enumerate(sorted(units))}
    weights = lora.init_weights(llm, options.rank, options.seed, len(group))   # {site: (U, r, D_in), (U, D_out, r)}
    parameters = {f"{site}.{i}": p.requires_grad_() for site, pair in weights.items() for i, p in enumerate(pair)}
    optimizer = optim.make_optimizer(parameters, options)
    unfinished = os.path.join(folder, f"unfinished-{common.digest(repr(group))}")           # of just these teachers
    start = common.resume(unfinished, options, parameters, optimizer)
    log = common.Log(folder, options, start, rank, summed=False)            # every rank has teachers of its own
    autocast = torch.autocast(options.device, torch.bfloat16, enabled=options.precision == "bf16")

    def draws_of(unit):
        def draws(step, micro):                                             # the same alone or in a group
            rng = draw.generator(options.seed, step, numbers[unit] + len(units) * micro)
            demos = draw.n_demonstrations(options.demos, options.seed, step)
            return draw.draw_tasks(units[unit], rng, options.tasks, options.instances, demos, options.vary_demos)
        return draw.by_length(draws, options, options.accumulate)

    deals = [draws_of(unit) for unit in group]

    def get_batch(step, micro):
        """Inputs and labels of U·n examples, n for each teacher, those of a teacher next to each other."""
        draws = [d for deal in deals for d in deal(step, micro)]
        items = [(d.definition, d.demonstrations, text) for d in draws for text in d.prompts]
        ids, mask = data.tokenize_instructed(tokenizer, items, options.max_input, options.device)
        return ids, mask, data.labels(tokenizer, [y for d in draws for _, y in d.pairs], options.max_output, options.device)

    lora.set_weights(llm, weights)
    for step in range(start, options.steps):
        lr = optim.learning_rate(options, step)
        for g in optimizer.param_groups:
            g["lr"] = lr
        batches = [get_batch(step, micro) for micro in range(options.accumulate)]
        n_tokens = sum((labels != data.IGNORE).view(len(group), -1).sum(1) for _, _, labels in batches)        # (U,)
        total = 0.0
        for ids, mask, labels in batches:
            with autocast:
                logits = lora.logits(llm, ids, mask, labels)                                       # (N, C, V)
            losses = F.cross_entropy(logits.float().flatten(0, 1), labels.flatten(), reduction="none")
            loss = (losses.view(len(group), -1).sum(1) / n_tokens).sum()                           # over (U,)
            loss.backward()
            total += loss.detach()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        log(step + 1, lr, {"loss": total / len(group)})
        if step + 1 < options.steps and (stop.asked or (step + 1) % options.save_every == 0):
            common.save_checkpoint(unfinished, options, parameters, optimizer, step + 1)
            if stop.asked:
                common.leave(folder, step + 1, log)
    lora.set_weights(llm, None)
    for u, unit in enumerate(group):
        save_teacher(folder, options, unit, lora.select(weights, u))
    shutil.rmtree(unfinished, ignore_errors=True)
    if stop.asked:                                                          # in the last step: these teachers are done
        common.leave(folder, options.steps, log)
    log.close()


def teacher_folder(folder, unit):
    return os.path.join(folder, "".join(c if c.isalnum() else "_" for c in unit.lower()))


def flatten(weights):
    """{site: (lora_A, lora_B)} as a checkpoint's {"site.lora_A": tensor}."""
    return {f"{site}.{ab}": w for site, pair in weights.items() for ab, w in zip(("lora_A", "lora_B"), pair)}


def save_teacher(folder, options, unit, weights):
    """One LoRA teacher as a checkpoint folder of its own, named after its unit."""
    options = argparse.Namespace(**vars(options), unit_name=unit)
    common.save_checkpoint(teacher_folder(folder, unit), options, flatten(weights), step=options.steps, finished=True)


def check_teachers(folder, units, options, command):
    """Raises UserError where a unit has no finished teacher (`command` makes it), or one of another
    LLM, rank or alpha than the options'."""
    for unit in units:
        path = teacher_folder(folder, unit)
        if not common.is_finished(path):
            raise common.UserError(f"{path}: no LoRA teacher for {unit}; first run {command}")
        old = vars(common.load_options(path, "llm_fingerprint"))
        common.check_fingerprint(options.llm_fingerprint, old["llm_fingerprint"], path,
                                 "the frozen LLM's folder")
        for key in ("rank", "alpha"):                   # another alpha's would load, rescaled
            new = getattr(options, key)
            if old.get(key, new) != new:
                raise common.UserError(f"{path} was trained with --{key} {old[key]}, not {new}; "
                                       f"use the same, or train it again: {command} --fresh")


def load_teachers(folder, units, llm, options, command):
    """The teachers of these units, stacked: {site: (lora_A (U, r, D_in), lora_B (U, D_out, r))}.

    Raises UserError as `check_teachers` does, and where one is of another set of projections.
    """
    check_teachers(folder, units, options, command)
    stacked = lora.init_weights(llm, options.rank, 0, len(units))
    for n, unit in enumerate(units):
        path = teacher_folder(folder, unit)
        common.check_digests(options, path, vars(common.load_options(path)))
        common.load_weights(flatten(lora.select(stacked, n)), path)
    return stacked


def folder_of(options, stage):
    return os.path.join(options.runs, options.name or stage)


STAGES = {"base": train_base, "meta": train_meta, "lora": train_lora, "lora-all": train_lora_all}


@common.command
def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    first = config.parse(parser(), "base", argv)                            # only to learn which stages to run
    for stage in [first.stage] if first.stage else first.stages.split(","):
        if stage not in STAGES:
            raise common.UserError(f"--stages: unknown stage '{stage}'; choose from {', '.join(STAGES)}")
        options = config.parse(parser(), stage.replace("-", "_"), argv)
        if stage == "lora-all":
            options.unit = "all"
        rank, world = common.init_processes(options)
        digest = data.text_digest if stage == "base" else data.tasks_digest
        common.run_stage(folder_of(options, stage), options, rank, world, STAGES[stage], digest,
                         stage != "lora")


if __name__ == "__main__":
    main()
