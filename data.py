"""What is read and how: record -> task -> draw -> text -> ids.

1. One task file of Super-NaturalInstructions (v2.6, tasks/*.json); the built-in suite's are alike:

    {"Definition": ["In this task, you're given ... Your job is to ..."],
     "Categories": ["Question Answering"], ...                  # the suite: [0], then paraphrases
     "Positive Examples": [{"input": "...", "output": "...", "explanation": "..."}, ...],
     "Instances": [{"id": "task001-0", "input": "...", "output": ["...", "..."]}, ...]}

   and splits/default/{train,test}_tasks.txt name a split's tasks, one a line. P3: bench/p3.py.
2. Draws: what a batch holds is a pure function of (seed, step, micro-batch among all ranks').
3. Texts: what hypernetwork, student and teachers read. 4. Their token ids.

    N  texts      T  tokens of one      C  target tokens      M  target tokens that count, of all
"""
import functools
import json
import os
import random
import string
import warnings
from collections import Counter
from dataclasses import dataclass

import numpy as np
import torch

import common
import config
from bench import p3, records
from bench.folders import writing
from common import UserError, is_texts

IGNORE = -100           # label of positions that do not count, as in PyTorch's cross-entropy
GET_SNI = "git clone --depth 1 --branch v2.6 https://github.com/allenai/natural-instructions"
_warned = set()         # what was warned of already: it is said once


@dataclass
class Instance:
    id: str
    input: str
    outputs: list[str]                      # every reference
    prompt: str | None = None               # P3: what teachers read in place of definition + input
    choices: tuple[str, ...] = ()           # P3: answers to rank, where the task has them


@dataclass
class Task:
    name: str
    category: str
    definitions: list[str]                  # [0] is the task's; more are paraphrases
    demonstrations: list[tuple[str, str]]   # (input, output) of the positive examples
    instances: list[Instance]
    verbatim: bool = False                  # P3: texts are read as they stand, nothing put around


# ------------------------------------------------------------------------------ 1. records, tasks

def load_sni(root: str, split: str = "test", max_instances: int | None = 100, skip: int = 0,
             allow_missing: bool = False) -> list[Task]:
    """The tasks of a split in the official layout, with instances skip : skip + max_instances.

    split: names splits/default/{split}_tasks.txt. The official test instances are the first 100 of
    each test task. Those of the split train are shuffled first, as in the official code: many files
    are sorted by class. With skip, a task may have none left; with allow_missing, tasks whose files
    are absent are left out.
    Raises UserError for a missing folder or file, broken JSON, a task without definition, an
    instance without output.
    """
    files = [task_path(root, name) for name in listed_tasks(root, split)]
    absent = [file for file in files if not os.path.isfile(file)]
    if absent and not (allow_missing and len(absent) < len(files)):
        names = ", ".join(os.path.basename(file) for file in absent[:3])
        others = "" if allow_missing else " (or --allow-missing)"
        raise UserError(f"{len(absent)} tasks of {split_file(root, split)} have no file in tasks/: "
                        f"{names[:60]} …; get them: {GET_SNI}{others}")
    there = [file for file in files if file not in absent]
    return [read_task(file, max_instances, skip, shuffle=split == "train") for file in there]


def task_path(root: str, name: str) -> str:
    return os.path.join(root, "tasks", name + ".json")


def split_file(root: str, split: str) -> str:
    return os.path.join(root, "splits", "default", f"{split}_tasks.txt")


def listed_tasks(root: str, split: str) -> list[str]:
    """The names of a split's tasks, whether their files are there or not."""
    path = split_file(root, split)
    remedy = (f"--data and --split name a folder like SNI's: {GET_SNI} (or python "
              f"{config.script('bench/sample.py')} writes the built-in suite)")
    return records.read_names(path, remedy)


def load_p3(root: str, split: str = "test", max_instances: int | None = None,
            p3_input: str = "fields", skip: int = 0) -> list[Task]:
    """A task for every data set and template of T0's split, with rows skip : skip + max_instances.

    bench/p3.py says which, and how the folder is laid out. The hypernetwork reads the template's
    text, the student, by p3_input, the row's "fields" or its whole "prompt", teachers the prompt.
    Raises UserError for what cannot be rendered, naming it, and where no task is there.
    """
    def task(record):
        rows = [Instance(x["id"], x["input"], [x["output"]], x["prompt"], x["choices"])
                for x in record["instances"]]
        definitions = [record["instruction"]]
        return Task(record["name"], record["category"], definitions, [], rows, verbatim=True)

    return [task(record) for record in p3.load(root, split, max_instances, p3_input, skip)]


def training_tasks(options, max_instances: int | None = None, skip: int = 0,
                   held_out: bool = False) -> list[Task]:
    """The training split, fewer --categories in more; held_out: what --hold-out takes out of it."""
    n = max_instances or options.max_instances
    if options.format == "p3":
        tasks = load_p3(options.data, "train", n, options.p3_input, skip)
        names, test = [task.category for task in tasks], None
    else:
        tasks = load_sni(options.data, "train", n, skip, options.allow_missing)
        names, test = [task.name for task in tasks], split_file(options.data, "test")
    p3.warn_of_leaks(names, test)
    tasks, left_out = records.hold_out(tasks, options)
    if held_out:
        return [task for task in left_out if task.instances]
    sizes = Counter(task.category for task in tasks)
    largest = sorted(sizes, key=lambda category: (-sizes[category], category))
    if options.categories > len(largest):
        raise UserError(f"--categories {options.categories}: the training tasks of {options.data} "
                        f"have only {len(largest)}")
    kept = set(largest[:options.categories or None])
    return [task for task in tasks if task.category in kept and task.instances]


def read_task(path: str, max_instances: int | None = None, skip: int = 0,
              shuffle: bool = False) -> Task:
    """A task file's instances skip : skip + max_instances, in the file's order or shuffled.

    The shuffled order follows from the task's name and its number of instances alone: whatever its
    seed, every stage takes the same ones, and those after them are held out. Raises UserError for
    what is no task's file.
    """
    remedy = "a task's file is one JSON object; fetch or write it again"
    record = records.read_json(path, remedy)

    def need(condition, what):
        if not condition:
            raise UserError(f"{path}: {what}")

    def as_list(value):
        return [value] if isinstance(value, str) else value

    def has(row, key):
        return isinstance(row, dict) and isinstance(row.get(key), str)

    need(isinstance(record, dict), "no JSON object; a task's file is one")
    definitions, categories = as_list(record.get("Definition")), as_list(record.get("Categories"))
    need(is_texts(definitions) and definitions[0].strip(), "no Definition; every task needs one")
    need(not categories or is_texts(categories), "Categories are no texts")
    rows, examples = record.get("Instances"), record.get("Positive Examples") or []
    need(isinstance(rows, list) and rows, "no Instances; every task needs some")
    need(isinstance(examples, list), "Positive Examples are no list")

    name = os.path.basename(path).removesuffix(".json")
    numbers = list(range(len(rows)))
    if shuffle:
        random.Random(name).shuffle(numbers)
    end = None if max_instances is None else skip + max_instances
    instances, demonstrations, ids = [], [], set()
    for n in numbers[skip:end]:
        row = rows[n]
        outputs = as_list(row.get("output")) if isinstance(row, dict) else None
        need(is_texts(outputs) and has(row, "input"), f"instance {n} has no input or no output")
        key = records.id_text(row, f"{path}: instance {n}", f"{name}-{n}")
        need(key not in ids, f"two instances have the same id {key[:40]}; keep one")
        ids.add(key)
        instances.append(Instance(key, row["input"], outputs))
    for n, row in enumerate(examples, 1):
        need(has(row, "input") and has(row, "output"),
             f"Positive Example {n} has no input or no output")
        demonstrations.append((row["input"], row["output"]))
    category = categories[0] if categories else "none"
    definitions = [text.strip() for text in definitions if text.strip()]
    return Task(name, category, definitions, demonstrations, instances)


def teacher_of(task: Task, unit: str) -> str:
    """The name of a task's LoRA teacher: its category's (the paper's choice), its own, or all's."""
    return {"category": task.category, "task": task.name, "all": "all"}[unit]


# What a run was trained on, so that others can be held against it.
def tasks_digest(options) -> dict:
    """{"data_digest": a hash of the training split's files}; {} where they are not all there."""
    root, complete = options.data, True
    if options.format == "p3":
        files = p3.training_files(root)
    elif os.path.isfile(split_file(root, "train")):
        with open(split_file(root, "train"), "rb") as f:
            names = f.read().decode("utf-8-sig", "replace").split()
        listed = [task_path(root, name) for name in names]
        files = [file for file in listed if os.path.isfile(file)]
        complete = options.allow_missing or len(files) == len(listed)
    else:
        return {}
    left_out = getattr(options, "hold_out", 0)          # earlier code had none
    less = f" less {left_out}" if left_out else ""
    return {"data_digest": common.files_digest(files, root) + less} if files and complete else {}


def text_digest(path: str) -> dict:
    """{"text_digest": a hash of the file of plain text}; {} where it is not there."""
    there = os.path.isfile(path)
    return {"text_digest": common.files_digest([path], os.path.dirname(path))} if there else {}


def names_and_definitions(tasks: list[Task]) -> dict:
    """{a task's name: a hash of its definition}: what a task is known again by."""
    return {task.name: common.digest(" ".join(task.definitions[0].split())) for task in tasks}


def write_training_tasks(folder: str, tasks: list[Task]) -> None:
    """Beside a checkpoint, what it was trained on, so that none of it is evaluated on."""
    text = json.dumps(names_and_definitions(tasks), indent=0)
    with writing(folder):
        common.write_text(f"{folder}/training_tasks.json", text)


def texts_of(tasks: list[Task]) -> list[str]:
    """Of each task a definition, of its instances all that is read and an answer."""
    texts = []
    for task in tasks:
        texts.append(task.definitions[0])
        for x in task.instances:
            texts += [x.prompt or x.input, x.outputs[0]]
    return texts


# -------------------------------------------------------------------------------------- 2. draws
# A resumed run needs no loader state; two ranks draw what one would have in two micro-batches.

@dataclass
class Draw:
    """One task of a mixed-task batch: an instruction, and (input, output) pairs to follow it on."""
    task: Task
    definition: str
    demonstrations: list[tuple[str, str]]
    pairs: list[tuple[str, str]]
    prompts: list[str]              # what a teacher is asked instead of each input; in SNI the same

    def __len__(self):
        """Characters of the longest text that a teacher reads: what batches are sorted by."""
        instruction = instruction_text(self.definition, self.demonstrations, self.task.verbatim)
        return len(instruction) + max(map(len, self.prompts))


def rng_of(*key: int) -> np.random.Generator:
    return np.random.default_rng(list(key))


def n_demonstrations(demos: str, seed: int, step: int) -> int:
    """0 or 2 for all of a step, which keeps padding low and ranks together; mixed: drawn."""
    if demos != "mixed":
        return int(demos)
    return 2 if rng_of(seed, step, 0, 1).random() < 0.5 else 0


def chances(tasks: list[Task], balance: str) -> np.ndarray | None:
    """How likely each task is to be drawn, with --balance categories; None: all alike."""
    if balance == "tasks":
        return None
    sizes = Counter(task.category for task in tasks)
    return np.array([1 / sizes[task.category] for task in tasks]) / len(sizes)


def draw_tasks(tasks: list[Task], rng: np.random.Generator, n_tasks: int, n_instances: int,
               n_demos: int, vary: bool = False, p: np.ndarray | None = None) -> list[Draw]:
    """n_tasks tasks, each with one of its wordings, n_instances instances, n_demos demonstrations.

    vary: demonstrations are instances, drawn; else the task's first positive examples, as in tests.
    """
    picks = rng.choice(len(tasks), n_tasks, replace=n_tasks > len(tasks), p=p)
    return [draw_task(tasks[t], rng, n_instances, n_demos, vary) for t in picks]


def draw_task(task: Task, rng: np.random.Generator, n_instances: int, n_demos: int,
              vary: bool = False) -> Draw:
    definition = task.definitions[rng.integers(len(task.definitions))]
    n = n_instances + n_demos if vary else n_instances
    rows = rng.choice(len(task.instances), n, replace=n > len(task.instances))
    drawn = [task.instances[i] for i in rows]
    pairs = [(x.input, x.outputs[rng.integers(len(x.outputs))]) for x in drawn]
    prompts = [x.prompt or x.input for x in drawn[:n_instances]]
    demonstrations = pairs[n_instances:] if vary else task.demonstrations[:n_demos]
    return Draw(task, definition, demonstrations, pairs[:n_instances], prompts)


def by_length(draws, bucket_steps: int, seed: int, n_micro: int):
    """The function draws(step, micro) -> list, with its items dealt out again by length."""
    # The items of bucket_steps steps, n_micro micro-batches each (those of all ranks), are sorted
    # by len() and cut into batches: texts of like length share one, and little is padding. With one
    # step, its items stay its own. With more, steps of short and long texts come in random order.
    if not bucket_steps:
        return draws

    @functools.lru_cache(maxsize=1)
    def window(number):
        items = []
        for step in range(number * bucket_steps, (number + 1) * bucket_steps):
            for micro in range(n_micro):
                items += draws(step, micro)
        return sorted(items, key=len), rng_of(seed, number, 0, 2).permutation(bucket_steps)

    def deal(step, micro):
        items, order = window(step // bucket_steps)
        size = len(items) // (bucket_steps * n_micro)
        at = (order[step % bucket_steps] * n_micro + micro) * size
        return items[at:at + size]

    return deal


def draw_documents(documents: list[str], rng: np.random.Generator, n: int) -> list[str]:
    return [documents[i] for i in rng.integers(len(documents), size=n)]


def cut_documents(drawn: list[str], tokenizer, parts: int, limit: int,
                  rng: np.random.Generator) -> list[list[list[int]]]:
    """Of each document a window of at most `limit` tokens, in `parts` pieces of ids, none empty."""
    shares, rows = np.sort(rng.random(parts - 1)), []       # of all alike, which keeps padding low
    for ids in tokenizer(drawn, add_special_tokens=False)["input_ids"]:
        while len(ids) < parts:                             # signs that the tokenizer hardly knows
            ids = [*ids, *(ids or [tokenizer.eos_token_id])]
        start = int(rng.integers(max(len(ids) - limit, 0) + 1))
        window = ids[start:start + limit]
        cuts = [0]
        for k, share in enumerate(shares, 1):
            cut = max(round(share * len(window)), cuts[-1] + 1)
            cuts.append(min(cut, len(window) - parts + k))      # leaves a token for each after it
        rows.append([window[a:b] for a, b in zip(cuts, [*cuts[1:], len(window)])])
    return rows


# -------------------------------------------------------------------------------------- 3. texts
# The encoding of the official Tk-Instruct code (ni_collator.py): the meta-trained baseline and the
# teachers read definition + demonstrations + instance, the hypernetwork the first two, the student
# the instance alone. verbatim: the texts are P3's, which are read as they stand.

def _full_stop(text: str) -> str:
    text = text.strip()
    return text if text[-1:] in tuple(string.punctuation) else text + "."


def instance_text(text: str, verbatim: bool = False) -> str:
    return text if verbatim else f"Input: {_full_stop(text)}\nOutput: "


def instruction_text(definition: str, demonstrations=(), verbatim: bool = False) -> str:
    """Definition and demonstrations: what the hypernetwork reads. "" for neither."""
    if verbatim:
        return definition
    text = f"Definition: {_full_stop(definition)}\n\n" if definition.strip() else ""
    for n, (its_input, its_output) in enumerate(demonstrations, 1):
        text += (f" Positive Example {n} -\nInput: {_full_stop(its_input)}\n"
                 f" Output: {_full_stop(its_output)}\n\n")
    return text


def prompt_text(definition: str, demonstrations, text: str, verbatim: bool = False) -> str:
    """The text with the instruction in the input; without an instruction, the instance's alone."""
    if verbatim:
        return text
    instruction = instruction_text(definition, demonstrations)
    if instruction:
        instruction += "Now complete the following example -\n"
    return instruction + instance_text(text)


# ---------------------------------------------------------------------------------------- 4. ids

def tokenize(tokenizer, texts: list[str], limit: int, device="cpu"):
    """(ids, attention mask), both (N, T), right-padded; a text over `limit` tokens is cut."""
    return cut_and_pad(tokenizer, tokenizer(texts)["input_ids"], limit, device)


def tokenize_instructed(tokenizer, items: list[tuple], limit: int, device="cpu",
                        verbatim: bool = False):
    """`tokenize` for (definition, demonstrations) or (definition, demonstrations, input) items.

    A demonstration that would take the text over `limit` tokens is left out, with all after it,
    rather than cut: the official rule. A text that is too long even so is cut.
    """
    def text(item):
        return (instruction_text if len(item) == 2 else prompt_text)(*item, verbatim=verbatim)

    rows = tokenizer([text(item) for item in items])["input_ids"]
    for n, (definition, demonstrations, *its_input) in enumerate(items):
        while len(rows[n]) > limit and demonstrations:
            demonstrations = demonstrations[:-1]
            rows[n] = tokenizer(text((definition, demonstrations, *its_input)))["input_ids"]
    return cut_and_pad(tokenizer, rows, limit, device)


def cut_and_pad(tokenizer, rows: list[list[int]], limit: int, device="cpu"):
    """(ids, attention mask) of rows of ids, cut at `limit` with one warning for each limit."""
    longest = max(map(len, rows))
    if longest > limit:
        if limit not in _warned:
            _warned.add(limit)
            warnings.warn(f"a text of {longest} tokens was cut to the limit of {limit}")
        end = [tokenizer.eos_token_id]
        rows = [row if len(row) <= limit else row[:limit - 1] + end for row in rows]
    return pad(rows, tokenizer.pad_token_id, device)


def pad(rows: list[list[int]], value: int, device="cpu") -> tuple[torch.Tensor, torch.Tensor]:
    ids = torch.full((len(rows), max(map(len, rows))), value)
    mask = torch.zeros_like(ids)
    for n, row in enumerate(rows):
        ids[n, :len(row)] = torch.tensor(row)
        mask[n, :len(row)] = 1
    return ids.to(device), mask.to(device)


def labels(tokenizer, texts: list[str], limit: int, device="cpu") -> torch.Tensor:
    """Target ids (N, C), the padding IGNORE."""
    ids, mask = tokenize(tokenizer, texts, limit, device)
    return ids.masked_fill(mask == 0, IGNORE)


def choice_labels(tokenizer, choices: list, limit: int, device="cpu"):
    """Ids of the M answer choices of all rows, (M, C), and the row of each, (M,)."""
    counts = torch.tensor([len(row) for row in choices])
    owner = torch.repeat_interleave(counts).to(device)
    return labels(tokenizer, [text for row in choices for text in row], limit, device), owner


def target_positions(labels: torch.Tensor) -> torch.Tensor:
    """Where the M labels that count are in the flattened (N, C), (M,)."""
    return (labels.flatten() != IGNORE).nonzero()[:, 0]


def batches(items: list, size: int) -> list[list]:
    return [items[i:i + size] for i in range(0, len(items), size)]
