"""What a batch holds: a pure function of (seed, step, number of the micro-batch among all ranks').

A resumed run needs no loader state, and two ranks draw what one process would have drawn in two micro-batches.
"""
import functools
from collections import Counter
from dataclasses import dataclass

import numpy as np

from data import Task, instruction_text


@dataclass
class Draw:
    """One task of a mixed-task batch: an instruction, and (input, output) pairs it is to be followed on."""
    task: Task
    definition: str
    demonstrations: list[tuple[str, str]]
    pairs: list[tuple[str, str]]
    prompts: list[str]                         # what a teacher is asked instead of each pair's input; in SNI the same

    def __len__(self):
        """Characters of the longest text that a teacher reads: what batches are sorted by."""
        return len(instruction_text(self.definition, self.demonstrations)) + max(map(len, self.prompts))


def generator(*key: int) -> np.random.Generator:
    return np.random.default_rng(list(key))


def n_demonstrations(demos: str, seed: int, step: int) -> int:
    """0 or 2. "mixed": two in every other step, on average; one choice for a step keeps padding low and ranks together."""
    return 2 * (generator(seed, step, 0, 1).random() < 1 / 2) if demos == "mixed" else int(demos)


def chances(tasks: list[Task], balance: str) -> np.ndarray | None:
    """How likely each task is to be drawn, with --balance categories; None: all alike."""
    if balance == "tasks":
        return None
    sizes = Counter(task.category for task in tasks)
    return np.array([1 / sizes[task.category] for task in tasks]) / len(sizes)


def draw_tasks(tasks: list[Task], rng: np.random.Generator, n_tasks: int, n_instances: int, n_demos: int,
               vary: bool = False, p: np.ndarray | None = None) -> list[Draw]:
    """n_tasks tasks, each with one of its wordings, n_instances instances and n_demos demonstrations.

    vary: demonstrations are drawn from the task's instances; else they are its first positive examples, as in the tests.
    p: the tasks' chances (`chances`).
    """
    picks = rng.choice(len(tasks), n_tasks, replace=n_tasks > len(tasks), p=p)
    return [draw_task(tasks[t], rng, n_instances, n_demos, vary) for t in picks]


def draw_task(task: Task, rng: np.random.Generator, n_instances: int, n_demos: int, vary: bool = False) -> Draw:
    definition = task.definitions[rng.integers(len(task.definitions))]
    n = n_instances + n_demos * vary
    rows = rng.choice(len(task.instances), n, replace=n > len(task.instances))
    drawn = [task.instances[i] for i in rows]
    pairs = [(x.input, x.outputs[rng.integers(len(x.outputs))]) for x in drawn]
    demonstrations = pairs[n_instances:] if vary else task.demonstrations[:n_demos]
    return Draw(task, definition, demonstrations, pairs[:n_instances], [x.prompt or x.input for x in drawn[:n_instances]])


def by_length(draws, options, n_micro: int):
    """draws(step, micro) -> list, and the function that comes back as well, its items dealt out by length.

    The items of --bucket-steps steps, n_micro micro-batches each (those of all ranks), are sorted by len() and cut into
    batches again: texts of like length share one, and little is padding. With one step a step's items stay its own, its
    gradient the same. With more, steps with short and with long texts follow in random order, and every item still comes once.
    With none, items stay as they were drawn.
    """
    if not options.bucket_steps:
        return draws

    @functools.lru_cache(maxsize=1)
    def window(number):
        steps = range(number * options.bucket_steps, (number + 1) * options.bucket_steps)
        items = sorted((x for step in steps for micro in range(n_micro) for x in draws(step, micro)), key=len)
        return items, generator(options.seed, number, 0, 2).permutation(options.bucket_steps)

    def deal(step, micro):
        items, order = window(step // options.bucket_steps)
        size = len(items) // (options.bucket_steps * n_micro)
        at = (order[step % options.bucket_steps] * n_micro + micro) * size
        return items[at:at + size]

    return deal


def draw_documents(documents: list[str], rng: np.random.Generator, n: int) -> list[str]:
    return [documents[i] for i in rng.integers(len(documents), size=n)]


def cut_documents(drawn: list[str], tokenizer, parts: int, limit: int, rng: np.random.Generator) -> list[list[list[int]]]:
    """Of each document a window of at most `limit` tokens, in `parts` pieces, none empty.

    All are cut at the same shares of their length, drawn once a batch: its pieces are then of like length, padding is low.
    Token ids come without the end token.
    """
    shares, rows = np.sort(rng.random(parts - 1)), []
    for ids in tokenizer(drawn, add_special_tokens=False)["input_ids"]:
        start = int(rng.integers(max(len(ids) - limit, 0) + 1))
        window = ids[start:start + limit]
        cuts = [0]
        for k, share in enumerate(shares, 1):
            cuts.append(min(max(round(share * len(window)), cuts[-1] + 1), len(window) - parts + k))
        rows.append([window[a:b] for a, b in zip(cuts, [*cuts[1:], len(window)])])
    return rows
