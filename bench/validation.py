"""The loss on tasks that are not trained on, every so many steps, and the best checkpoint so far.

A validation is a pure function of the weights and the options: always the same examples, each task
in its first wording with its first positive examples, no dropout, no gradients, no random numbers.
So what is trained is the same, bit for bit, with and without it, and on any number of processes.
"""
import contextlib
import dataclasses
import glob
import math
import os
import shutil
import time

import torch
import torch.nn.functional as F

import common
import data
import t5
from bench import machine, predictions, shard
from bench.folders import move_config, new_folder, point, record_in, remove_ours
from common import UserError

SEED = 0            # of the draw of examples: not the run's, so that runs of several seeds compare
EXAMPLES = 256      # of all validation tasks together, about as many of each


# ------------------------------------------------------------------------------ tasks, examples

def validation_tasks(options) -> list[data.Task]:
    """The training tasks that --hold-out holds out, or else those of the split validation.

    Raises UserError where there are neither, or where the split shares a task with train or test.
    """
    if options.hold_out:
        return data.training_tasks(options, EXAMPLES, held_out=True)
    path = data.split_file(options.data, "validation")
    if options.format == "p3" or not os.path.isfile(path):
        here = "P3 has no validation tasks" if options.format == "p3" else f"{path} is not there"
        raise UserError(f"--validate-every: {here}; hold some training tasks out, in all stages "
                        "the same: --hold-out 20")
    names = set(data.listed_tasks(options.data, "validation"))
    for split in ("train", "test"):
        if os.path.isfile(data.split_file(options.data, split)):
            both = sorted(names.intersection(data.listed_tasks(options.data, split)))
            if both:
                raise UserError(f"{path} names {len(both)} tasks of the split {split}: "
                                f"{', '.join(both[:2])[:90]} …; take them out, or hold training "
                                "tasks out instead: --hold-out 20")
    return data.load_sni(options.data, "validation", None, allow_missing=options.allow_missing)


def check_unseen(tasks: list[data.Task], folder: str) -> None:
    """Raises UserError where the model in `folder` was trained on one of these tasks."""
    names = data.names_and_definitions(tasks)
    known = predictions.known_to(f"{folder}/training_tasks.json", names)
    if known:
        raise UserError(f"{folder} was trained on {len(known)} of the {len(tasks)} validation "
                        f"tasks: {', '.join(known[:2])[:90]} …; train it again with the same "
                        "--hold-out, or validate on others")


def examples(tasks: list[data.Task], demos: str) -> list[data.Draw]:
    """About EXAMPLES draws of one instance each, those of a task side by side, short ones first.

    demos: as in --demos; with "mixed", every second task has demonstrations.
    """
    rng = data.rng_of(SEED)
    if len(tasks) > EXAMPLES:
        tasks = [tasks[t] for t in sorted(rng.choice(len(tasks), EXAMPLES, replace=False))]
    groups = []                                 # of each task its draws
    for number, task in enumerate(tasks):
        n_demos = 2 * (number % 2) if demos == "mixed" else int(demos)
        n = min(EXAMPLES // len(tasks), len(task.instances))
        draws = []
        for i in rng.choice(len(task.instances), n, replace=False):
            x = task.instances[i]
            draws.append(data.Draw(task, task.definitions[0], task.demonstrations[:n_demos],
                                   [(x.input, x.outputs[0])], [x.prompt or x.input]))
        groups.append(sorted(draws, key=len))
    groups.sort(key=lambda draws: len(draws[-1]))
    return [draw for draws in groups for draw in draws]


def shuffled(draws: list[data.Draw], training: list[data.Task]) -> list[data.Draw]:
    """The same instances, each with another task's instruction, of another category if possible.

    Where all are of one category, it is one of the training tasks'.
    """
    tasks = list({draw.task.name: draw.task for draw in draws}.values())
    others = tasks
    if len({predictions.kind(task) for task in tasks}) == 1:
        others = tasks + training
    givers = dict(zip([task.name for task in tasks], predictions.of_another_kind(others)))
    wrong = []
    for draw in draws:
        giver = givers[draw.task.name]
        wrong.append(dataclasses.replace(
            draw, definition=giver.definitions[0],
            demonstrations=giver.demonstrations[:len(draw.demonstrations)]))
    return wrong


# ----------------------------------------------------------------------------------------- loss

@torch.no_grad()
def mean_loss(batches: list, loss_of, rank: int, world: int, device: str) -> float:
    """The mean over all label tokens of all batches, on every rank the same.

    loss_of(batch): (the summed loss, the number of label tokens).
    """
    # Every rank runs as many batches, since those of a model in shards run together: where there
    # is none left for it, a rank repeats the last one, which does not count.
    n = len(batches)
    totals, counts = [0.0] * n, [0] * n         # other ranks' stay 0, so sums are exact
    for start in range(0, n, world):
        number = start + rank
        total, count = loss_of(batches[min(number, n - 1)])
        if number < n:
            totals[number], counts[number] = float(total), int(count)
    sums = common.sum_over_ranks(totals + counts, device)
    return sum(sums[:n]) / sum(sums[n:])


@contextlib.contextmanager
def evaluating(model):
    """Within: the model without dropout; afterwards each module is in the mode that it was in."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


# ------------------------------------------------------------------------------- during training

STAGES = ("meta", "lora-all", "finetune")


def check_stage(options, stage: str) -> None:
    """Raises UserError where --validate-every is asked of a stage without validation."""
    if options.validate_every and stage not in STAGES:
        what = "plain text" if stage in ("base", "pretrain") else "each teacher's own tasks"
        raise UserError(f"--validate-every: stage {stage} learns from {what}, without validation; "
                        "leave it out, or name with --stage meta, lora-all or finetune")


class Validation:
    """Losses on the validation tasks while a stage is trained; in its folder the best checkpoint.

    model: what is trained, for its dropout; loss_of(draws): (summed loss, label tokens); training:
    the tasks trained on; shuffle: the loss with another task's instruction, too. Raises UserError
    where there are no validation tasks, or where the model in `llm_path` was trained on them.
    """

    def __init__(self, run, model, loss_of, training: list, llm_path: str, shuffle: bool):
        options = run.options
        self.run, self.model, self.loss_of = run, model, loss_of
        tasks = validation_tasks(options)
        check_unseen(tasks, llm_path)
        right = examples(tasks, options.demos)
        size = options.tasks * options.instances        # of a micro-batch, which fits into memory
        self.batches = {"validation": data.batches(right, size)}        # term -> batches of draws
        if shuffle:
            self.batches["validation_shuffled"] = data.batches(shuffled(right, training), size)
        texts = [(x.task.name, x.definition, x.demonstrations, x.pairs, x.prompts) for x in right]
        self.digest = common.digest(repr(texts))        # losses of other texts do not compare
        self.best = math.inf

    def begin(self) -> None:
        """Where a run goes on: its best checkpoint so far, if the same examples told it."""
        found = []                                      # (loss, folder) of complete ones
        for folder in sorted(glob.glob(f"{glob.escape(self.run.folder)}/best-*")):
            loss = self._loss_of_best(folder)
            if loss is not None:
                found.append((loss, folder))
        if found:
            self.best, folder = min(found)
            if self.run.rank == 0:
                self._name(folder)

    def _loss_of_best(self, folder):
        """That of a checkpoint that is there; None where it is not, or other examples told it."""
        record = record_in(folder)
        loss = record.get("validation")
        is_number = isinstance(loss, float) and math.isfinite(loss)
        return loss if is_number and record.get("validation_digest") == self.digest else None

    def after_step(self, step: int) -> bool:
        """Validate where that is due; whether these weights are the best so far, to be kept."""
        options, run = self.run.options, self.run
        if step % options.validate_every and step != options.steps:
            return False
        begun, losses = time.time(), {}
        with evaluating(self.model):
            for term, batches in self.batches.items():
                losses[term] = mean_loss(batches, self.loss_of, run.rank, run.world, options.device)
        run.log.validated(step, losses, time.time() - begun)
        is_best = losses["validation"] < self.best      # a loss that is no number is none
        if is_best:
            self.best, self.losses = losses["validation"], losses
        return is_best

    def keep(self, step: int, save) -> None:
        """Write the best checkpoint, by save(folder), and then remove the one before."""
        folder = self.run.folder
        target = f"{folder}/best-{step:06d}"
        if os.path.lexists(target) and self._loss_of_best(target) is None:
            remove_ours(target)                 # of other examples
        if not os.path.lexists(target):         # else it was killed just after this
            remedy = f"make room there, and {machine.again()}"
            with new_folder(target, remedy) as new:
                save(new)
                move_config(new, new, folder, target)
                record = record_in(new) | self.losses | {"validation_digest": self.digest}
                common.write_yaml(f"{new}/config.yaml", record)
                if os.path.isfile(f"{folder}/training_tasks.json"):
                    shutil.copy(f"{folder}/training_tasks.json", new)
        self._name(target)

    def tell(self) -> str:
        """One line on the best checkpoint, for the end of a stage."""
        best = f"{self.run.folder}/best"
        if not math.isfinite(self.best):
            return f"{best}: none, no validation told a loss"
        where = os.path.basename(os.path.realpath(best))
        return f"{best}: {where}, with the lowest validation loss, {self.best:.5g}"

    def _name(self, best):
        """Make the link `best` name this checkpoint, and remove those that were the best before."""
        folder = self.run.folder
        point(f"{folder}/best", best)
        for path in glob.glob(f"{glob.escape(folder)}/best-*"):
            if os.path.basename(path) != os.path.basename(best):
                remove_ours(path)


def of_reader(run, llm, make_batch, training: list, llm_path: str) -> Validation | None:
    """The validation of an LLM that reads the instruction with the input, where it is asked for.

    make_batch(draws, step, micro): (ids, mask, labels), of which step and micro are no part.
    """
    options = run.options
    if not options.validate_every:
        return None
    autocast = shard.autocast(options)

    def loss_of(draws):
        ids, mask, labels = make_batch(draws, 0, 0)
        with autocast:
            logits = t5.logits(llm, ids, mask, labels)                              # (N, C, V)
        loss = F.cross_entropy(logits.float().flatten(0, 1), labels.flatten(), reduction="sum")
        return loss, (labels != data.IGNORE).sum()

    return Validation(run, llm, loss_of, training, llm_path, shuffle=False)
