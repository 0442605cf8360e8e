"""Train what the student learns from: a base model, the baseline that reads instructions, teachers.

    base      `--model tiny` only: a small T5 trained from nothing on plain text, to continue it
    meta      the LLM with the instruction in its input on all training tasks (Tk-Instruct, T0): the
              baseline the paper compares with, a possible KL teacher, and by default the frozen LLM
              under everything that follows
    lora      LoRA teachers ("training with instance"): for every category or task LoRA weights Δ_i
              on the frozen LLM, reading instruction and input (--init-from: from generated ones)
    lora-all  one LoRA on the frozen LLM for all training tasks (Table 4's Tk-Instruct-LoRA); in a
              config, section lora_all

Launch (without --stage: the stages that the config has a section for, in this order):
    python train_teacher.py                                     # the built-in suite
    python train_teacher.py --stage meta --lr 1e-3
    torchrun --nproc-per-node 8 train_teacher.py --config configs/my.yaml
"""
import os

import common  # before PyTorch: Ctrl-C
import torch
import torch.nn.functional as F

import config
import data
import lora
import t5
from bench import curriculum, optim, records, sample, shard, terminal
from bench.folders import remove_groups, save_step, sweep, teacher_folder
from bench.runs import Log, Run
from bench.teachers import (find_progress, load_rows, load_start, row_norms, save_record,
                            save_teacher, state_of, step_all_but)
from bench.validation import check_stage, of_reader
from common import UserError

# Letters of the shapes in comments:
#   N  examples      T  tokens of one      C  target tokens      V  vocabulary      U  teachers

# --------------------------------------------------------------------------------------- options

def parser():
    p = config.Parser(__doc__)
    config.add_shared_options(p)
    config.add_training_options(p, list(STAGES), steps=10_000, text_length=128)
    add = p.add_argument_group("lora").add_argument
    add("--teachers-at-once", type=config.many, default=16,
        help="LoRA teachers trained side by side in one batch")
    add("--init-from", type=config.beside,
        help="folder of a TAGI: each teacher starts from the LoRA weights (alone, without fusion) "
             "that it generates for the definition of its one task; default: from random ones")
    curriculum.add_options(p)
    return p


def stages_of(argv) -> list[str]:
    """The stage asked for, or those that the config has a section for, in order."""
    options = config.parse(parser(), None, argv)        # of no section: these stand above them
    if options.stage:
        return [options.stage]
    sections = config.read_config(options.config)
    stages = [stage for stage in STAGES if stage.replace("-", "_") in sections]
    # A checkpoint stands for base, and one that is meta-trained for meta too.
    if options.meta_model or options.model != "tiny":
        stages = [stage for stage in stages if stage != "base"]
    if options.meta_model:
        stages = [stage for stage in stages if stage != "meta"]
    if not stages:
        raise UserError(f"{options.config} has no section for a stage; name one with --stage")
    if options.name and len(stages) > 1:
        raise UserError(f"--name is one folder, not {len(stages)}; name a stage with --stage")
    return stages


# ------------------------------------------------------------------------------------------ data

def mixed_draws(tasks, options, p=None):
    """The function draws(step, micro) -> --tasks of these tasks, instances drawn; p: chances."""
    def draws(step, micro):
        rng = data.rng_of(options.seed, step, micro)
        demos = data.n_demonstrations(options.demos, options.seed, step)
        return data.draw_tasks(tasks, rng, options.tasks, options.instances, demos,
                               options.vary_demos, p)
    return draws


def instructed_batch(draws, tokenizer, options):
    """(ids (N, T), mask (N, T), labels (N, C)): the instruction with every input, and answers."""
    # One row for each instance; the answer is what it was drawn with.
    items, outputs = [], []
    for draw in draws:
        for text, (_, output) in zip(draw.prompts, draw.pairs):
            items.append((draw.definition, draw.demonstrations, text))
            outputs.append(output)
    ids, mask = data.tokenize_instructed(tokenizer, items, options.max_input, options.device,
                                         options.format == "p3")
    return ids, mask, data.labels(tokenizer, outputs, options.max_output, options.device)


# ----------------------------------------------------------- base, meta, lora-all: all ranks train

def train_together(run, llm, parameters, deal, make_batch, save, path=None, tasks=None, restart=0):
    """Train parameters, {name: tensor}, on make_batch(deal(step, micro)) -> (ids, mask, labels).

    save(weights, optimizer, folder, step, finished) writes a checkpoint; path: of the LLM;
    tasks: those that are dealt; restart: as in `optim.learning_rate`.
    """
    options = run.options
    # Where it starts: at 0, or where a run that was stopped left off.
    optimizer = optim.make_optimizer(parameters, options)
    start = run.resume(parameters, optimizer)
    run.validation = of_reader(run, llm, make_batch, tasks, path)
    run.begin(path)
    if run.rank == 0 and tasks is not None:
        data.write_training_tasks(run.folder, tasks)
    parameters, optimizer, run.saved = optim.deal_out(parameters, optimizer, options, [llm])
    autocast = shard.autocast(options)

    for step in range(start, options.steps):
        lr = optim.learning_rate(options, step, restart)
        for group in optimizer.param_groups:
            group["lr"] = lr

        # This rank's micro-batches, numbered among all ranks'.
        micros = [run.rank + run.world * i for i in range(options.accumulate)]
        batches = [make_batch(deal(step, micro), step, micro) for micro in micros]

        # The loss is the mean over the label tokens of all micro-batches and ranks.
        n_tokens = sum((labels != data.IGNORE).sum().item() for _, _, labels in batches)
        n_tokens, stopping = common.sum_over_ranks([n_tokens, run.stop.asked], options.device)
        total = 0.0
        for micro, (ids, mask, labels) in zip(micros, batches):
            # Dropout too is a function of (seed, step, micro): no two ranks drop the same.
            torch.manual_seed(int(data.rng_of(options.seed, step, micro, 4).integers(2 ** 63)))
            with autocast:
                logits = t5.logits(llm, ids, mask, labels)                          # (N, C, V)
            loss = F.cross_entropy(logits.float().flatten(0, 1), labels.flatten(),
                                   reduction="sum") / n_tokens
            loss.backward()
            total += loss.detach()

        # One step with the gradients of all ranks, unless they are no numbers.
        optim.sum_gradients(parameters.values())
        norm = optim.clip_gradients(parameters.values(), options.clip)
        if run.is_finite(step, total, norm, lambda: [deal(step, micro) for micro in micros]):
            optimizer.step()
        optimizer.zero_grad(set_to_none=True)

        # Log, save when due, leave after a Ctrl-C.
        run.after_step(step + 1, lr, {"loss": total}, stopping, lambda *at, optimizer=run.saved:
                       save(run.saved.weights, optimizer, *at), norm, n_tokens)
    run.end()


def train_llm(run, llm, tokenizer, deal, make_batch, **kwargs):
    """Train all weights of the LLM."""
    # train(): dropout as the checkpoint's config has it.
    llm.to(shard.home(run.options)).train()
    if run.options.checkpointing:
        t5.checkpoint_blocks(llm)

    def save(weights, optimizer, folder, *at):
        t5.save_llm(folder, run.record(), llm, tokenizer, optimizer, *at, weights=weights)

    train_together(run, llm, dict(llm.named_parameters()), deal, make_batch, save, **kwargs)


def train_meta(options, run):
    """The LLM on all training tasks, mixed, with the instruction in its input."""
    path = t5.base_path(options, run.found)
    # Weights in float32; --precision bf16 is autocast's arithmetic.
    llm, tokenizer = t5.load_llm(path, shard.home(options), attention=options.attention)
    run.found["tokenizer_digest"] = t5.tokenizer_digest(tokenizer)
    tasks = data.training_tasks(options)
    t5.check_knows(tokenizer, data.texts_of(tasks), options.data)
    draws, restart = mixed_draws(tasks, options), 0.0
    if options.curriculum:                      # for a T5 made from nothing, see below
        draws = curriculum.curriculum_draws(tasks, options)
        restart = curriculum.DEMOS_AFTER
    deal = data.by_length(draws, options.bucket_steps, options.seed, run.world * options.accumulate)

    def make_batch(draws, step, micro):
        return instructed_batch(draws, tokenizer, options)

    train_llm(run, llm, tokenizer, deal, make_batch, path=path, tasks=tasks, restart=restart)


def train_lora_all(options, run):
    """One LoRA on the frozen LLM for all training tasks: a baseline, trained like the student."""
    # All ranks train it together, on batches like finetuning's; a LoRA teacher has one rank.
    llm, tokenizer, path = load_frozen_llm(options, run)
    tasks = data.training_tasks(options)
    t5.check_knows(tokenizer, data.texts_of(tasks), options.data)
    weights = lora.init_weights(llm, options.rank, options.seed)    # site -> (r, D_in), (D_out, r)
    lora.set_weights(llm, weights)
    parameters = lora.flatten(weights)
    for p in parameters.values():
        p.requires_grad_()
    draws = mixed_draws(tasks, options, data.chances(tasks, options.balance))
    deal = data.by_length(draws, options.bucket_steps, options.seed, run.world * options.accumulate)

    def make_batch(draws, step, micro):
        return instructed_batch(draws, tokenizer, options)

    def save(parameters, optimizer, folder, step, finished):
        if finished:                            # before the stage calls itself finished
            save_teacher(run.folder, run.record(), "all", weights)
        common.save_checkpoint(folder, run.record(), parameters, optimizer, step, finished)

    train_together(run, llm, parameters, deal, make_batch, save, path, tasks)


# ------------------------------------------------------ lora: every rank trains teachers of its own

def load_frozen_llm(options, run):
    """(the frozen LLM with places for LoRA weights, its tokenizer, where it is)."""
    if options.optimizer == "adafactor":
        raise UserError("--optimizer adafactor takes norms over teachers; choose adamw for lora")
    path = t5.llm_path(options, run.found)
    llm, tokenizer = t5.load_llm(path, shard.home(options), options.precision, options.attention)
    llm.requires_grad_(False).eval()
    run.found["llm_fingerprint"] = t5.fingerprint(llm)
    run.found["tokenizer_digest"] = t5.tokenizer_digest(tokenizer)
    lora.inject_lora(llm, options.targets.split(","), options.rank, options.alpha)
    if options.checkpointing:
        t5.checkpoint_blocks(llm)
    return llm, tokenizer, path


def train_lora(options, run):
    """LoRA teachers, several side by side; ranks share out the groups, without any traffic."""
    llm, tokenizer, path = load_frozen_llm(options, run)
    tasks_of = {}                               # teacher -> its tasks
    tasks = data.training_tasks(options)
    t5.check_knows(tokenizer, data.texts_of(tasks), options.data)
    for task in tasks:
        tasks_of.setdefault(data.teacher_of(task, options.unit), []).append(task)
    # Groups of --teachers-at-once, or smaller ones where a rank would have nothing to do.
    teachers, size = sorted(tasks_of), options.teachers_at_once
    if len(teachers) <= size * (run.world - 1):
        size = -(-len(teachers) // run.world)
    groups = data.batches(teachers, size)
    if len({teacher_folder(run.folder, name) for name in teachers}) < len(teachers):
        raise UserError(f"--unit {options.unit}: two names make one folder's name; rename one")
    tagi = load_start(options, run, path, tasks_of) if options.init_from else None
    run.found["unit_names"] = teachers
    # From here on --fresh has removed what was there. A rerun sees what these teachers are.
    run.begin(path, log=False)
    if run.rank == 0 and run.before is None:
        save_record(run)
    under_way = find_progress(run.folder, teachers)     # teacher -> (its step, checkpoint, row)
    common.wait_for_all_ranks()                         # nobody still looks for what is replaced

    # This rank's work: of each of its groups those teachers together that are at the same step.
    work = []                                           # (step, teachers)
    for group in groups[run.rank::run.world]:
        at = {}                                         # step -> teachers
        for teacher in group:
            step, folder, _ = under_way.get(teacher, (0, None, 0))
            if step < options.steps or folder != teacher_folder(run.folder, teacher):
                at.setdefault(step, []).append(teacher)
        work += at.items()
    run.log = Log(run.folder, options, 0, run.rank, summed=False)
    run.log.bar.reset(total=sum(options.steps - step for step, _ in work))
    lost = []
    for n, (start, group) in enumerate(work, 1):
        run.log.bar.set_description(f"lora {n} of {len(work)}: {', '.join(group)[:40]}")
        lost += train_group(run, llm, tokenizer, start, group, tasks_of, under_way, tagi)

    run.watch.wait_for_all()                            # ranks may come here hours apart
    run.leave(options.steps, run.stop.asked)
    lost = sorted(set().union(*common.gather_over_ranks(lost)))
    if lost:
        raise UserError(f"{len(lost)} of {len(teachers)} teachers met numbers that are not finite: "
                        f"{', '.join(lost)[:100]}; the others are finished; go on with --on-nan "
                        "skip, or start over with --fresh and a lower --lr")
    if run.rank == 0:
        save_record(run, options.steps, finished=True)
        remove_groups(run.folder)
    run.end()


def train_group(run, llm, tokenizer, start, group, tasks_of, under_way, tagi=None):
    """Train U independent teachers from step `start`, in mixed batches; those that are lost.

    under_way: where their weights are, as `find_progress` tells; else a given TAGI generates them.
    """
    # Every teacher gets the gradient and the step that it would get alone: losses are added up,
    # each the mean over its own label tokens, and AdamW works element by element.
    options, U = run.options, len(group)
    weights = lora.init_weights(llm, options.rank, options.seed, U)     # site -> (U, r, D_in), ..
    parameters = lora.flatten(weights)
    if tagi is not None and start == 0:
        generated = tagi.adapt([tasks_of[teacher][0].definitions[0] for teacher in group]).weights
        for name, p in lora.flatten(generated).items():
            parameters[name].copy_(p)
    for p in parameters.values():
        p.requires_grad_()
    optimizer = optim.make_optimizer(parameters, options)
    if start:
        load_rows([under_way[teacher] for teacher in group], parameters, optimizer)
    autocast = torch.autocast(options.device, torch.bfloat16, enabled=options.precision == "bf16")

    # A teacher draws the same alone and in any group: micro-batches are numbered among all's.
    numbers = {teacher: n for n, teacher in enumerate(sorted(tasks_of))}

    def draws_of(teacher):
        draws = mixed_draws(tasks_of[teacher], options)

        def own_draws(step, micro):
            return draws(step, numbers[teacher] + len(tasks_of) * micro)
        return data.by_length(own_draws, options.bucket_steps, options.seed, options.accumulate)

    deals = [draws_of(teacher) for teacher in group]

    def get_batch(step, micro):
        drawn = []                              # those of a teacher stand next to each other
        for deal in deals:
            drawn += deal(step, micro)
        return instructed_batch(drawn, tokenizer, options)

    # What is saved on the way is of just these teachers, which no one takes for finished ones.
    unfinished = os.path.join(run.folder, f"group-{common.digest(repr(group))}")
    lost, skipped = torch.zeros(U, dtype=torch.bool), 0

    def save(folder, step, finished):
        names = [teacher for u, teacher in enumerate(group) if lost[u]]
        common.save_checkpoint(folder, run.record() | {"teachers": group, "lost": names},
                               parameters, optimizer, step)

    lora.set_weights(llm, weights)
    for step in range(start, options.steps):
        lr = optim.learning_rate(options, step)
        for param_group in optimizer.param_groups:
            param_group["lr"] = lr

        # A teacher's loss is the mean over the label tokens of its own micro-batches.
        batches = [get_batch(step, micro) for micro in range(options.accumulate)]
        n_tokens = 0                            # (U,)
        for _, _, labels in batches:
            n_tokens = n_tokens + (labels != data.IGNORE).view(U, -1).sum(1)        # (U,)
        total = 0.0                             # (U,)
        for ids, mask, labels in batches:
            with autocast:
                logits = t5.logits(llm, ids, mask, labels)                          # (N, C, V)
            losses = F.cross_entropy(logits.float().flatten(0, 1), labels.flatten(),
                                     reduction="none")                              # (N·C,)
            losses = losses.view(U, -1).sum(1) / n_tokens                           # (U,)
            losses.sum().backward()
            total = total + losses.detach()

        # One step; no clipping, whose norm would be of all teachers together. Where a teacher's
        # numbers are not finite, it alone stays behind, for this step or for good.
        norms = row_norms(parameters)                                               # (U,)
        bad = ~(total.isfinite() & norms.isfinite()).cpu()
        skipped += int((bad & ~lost).sum())
        if options.on_nan == "stop":
            lost |= bad
        step_all_but(bad | lost, parameters, optimizer)
        optimizer.zero_grad(set_to_none=True)

        # Log, save when due, leave after a Ctrl-C.
        fine = ~(bad | lost)
        more = {"group": ", ".join(group), "grad_norm": norms[fine].mean()}
        more |= {"skipped": skipped} if skipped else {}
        run.log(step + 1, lr, {"loss": total[fine].mean()}, n_tokens.sum().item(), more)
        last = step + 1 == options.steps
        if last or run.stop.asked or (step + 1) % options.save_every == 0:
            save_step(unfinished, step + 1, last, save)
            sweep(unfinished, keep=1)
        if run.stop.asked and not last:
            run.leave(step + 1)

    # Each teacher becomes a checkpoint of its own.
    lora.set_weights(llm, None)
    for u, teacher in enumerate(group):
        if not lost[u]:
            save_teacher(run.folder, run.record(), teacher, lora.select(weights, u),
                         state_of(optimizer.state_dict(), u))
    if run.stop.asked:                          # in the last step: these teachers are done
        run.leave(options.steps)
    return [teacher for u, teacher in enumerate(group) if lost[u]]


# ------------------------------------------------------------------ base: a T5 made from nothing

def train_base(options, run):
    """A small T5 from nothing: continue a document cut at random (prefix language modelling)."""
    path = os.path.join(options.data, "tokenizer")
    if not os.path.isdir(path):
        raise UserError(f"{path}: no such folder; --model tiny needs a tokenizer beside its data: "
                        f"python {config.script('bench/sample.py')}")
    tokenizer = t5.load_tokenizer(path)
    run.found["tokenizer_digest"] = t5.tokenizer_digest(tokenizer)
    # Each document is cut in two: the encoder reads the first part, the rest is the target.
    documents = records.read_documents(options.text)
    t5.check_knows(tokenizer, documents, options.text)
    eos, pad = tokenizer.eos_token_id, tokenizer.pad_token_id
    n = options.tasks * options.instances

    def draws(step, micro):
        return data.draw_documents(documents, data.rng_of(options.seed, step, micro), n)

    deal = data.by_length(draws, options.bucket_steps, options.seed, run.world * options.accumulate)

    def make_batch(drawn, step, micro):
        rng = data.rng_of(options.seed, step, micro, 3)
        rows = data.cut_documents(drawn, tokenizer, 2, options.text_length, rng)
        ids, mask = data.pad([first + [eos] for first, _ in rows], pad, options.device)
        labels, _ = data.pad([rest + [eos] for _, rest in rows], data.IGNORE, options.device)
        return ids, mask, labels

    llm = t5.tiny_t5(len(tokenizer), options.seed, **curriculum.size_of(options))
    train_llm(run, llm, tokenizer, deal, make_batch)


# ------------------------------------------------------------------------------------------ main

STAGES = {"base": train_base, "meta": train_meta, "lora": train_lora, "lora-all": train_lora_all}


@common.command
@terminal.printing
def main(argv=None):
    of_stages = {}                              # stage -> its options, all before one is trained
    for stage in stages_of(argv):
        options = of_stages[stage] = config.parse(parser(), stage.replace("-", "_"), argv)
        check_stage(options, stage)
    for stage, options in of_stages.items():
        options.stage = stage
        if stage == "lora-all":
            options.unit = "all"
        if options.init_from and stage != "lora":
            raise UserError(f"--init-from is for LoRA teachers; --stage {stage} has no use for it")
        rank, world = common.init_processes(options.device, options.timeout)
        if options.model == "tiny":
            sample.ensure_suite(options.data, rank)
        common.wait_for_all_ranks()             # rank 0 may be writing, or saving the stage before
        # What it reads: base plain text, the others the training tasks.
        digests = data.text_digest(options.text) if stage == "base" else data.tasks_digest(options)
        folder = config.folder_of(options, stage)
        # LoRA teachers are shared out among ranks; what else there is they train together.
        run = Run(folder, options, rank, world, digests, ranks_share_a_batch=stage != "lora")
        if not run.finished:
            if rank == 0:
                config.tell(options, parser(), stage)
            STAGES[stage](options, run)


if __name__ == "__main__":
    main()
