"""Tasks, texts and batches.

One task file of Super-NaturalInstructions (v2.6, tasks/*.json), which the built-in suite follows too:

    {"Definition": ["In this task, you're given ... Your job is to ..."],          # the suite: [0], then paraphrases
     "Categories": ["Question Answering"], ...
     "Positive Examples": [{"input": "...", "output": "...", "explanation": "..."}, ...],
     "Instances": [{"id": "task001-0", "input": "...", "output": ["...", "..."]}, ...]}

and splits/default/{train,test}_tasks.txt name the tasks of a split, one a line.
"""
import json
import os
import string
import warnings
from collections import Counter
from dataclasses import dataclass

import numpy as np
import torch

from common import UserError, named_file

IGNORE = -100                                  # label of positions that do not count, as in PyTorch's cross-entropy
GET_SNI = "git clone --depth 1 --branch v2.6 https://github.com/allenai/natural-instructions"


@dataclass
class Instance:
    id: str
    input: str
    outputs: list[str]                         # every reference


@dataclass
class Task:
    name: str
    category: str
    definitions: list[str]                     # [0] is the task's; more are paraphrases
    demonstrations: list[tuple[str, str]]      # (input, output) of the positive examples
    instances: list[Instance]


def load_sni(root: str, split: str = "test", max_instances: int | None = 100, skip: int = 0,
             allow_missing: bool = False) -> list[Task]:
    """The tasks of a split in the official layout, each with its instances skip : skip + max_instances.

    split: names splits/default/{split}_tasks.txt. The official test instances are the first 100 of each test task. With
    skip, tasks that have no more instances than that are left out; with allow_missing, those whose files are absent.
    Raises UserError for a missing folder or file, broken JSON, a task without definition, an instance without output.
    """
    files = [os.path.join(root, "tasks", name + ".json") for name in listed_tasks(root, split)]
    absent = [file for file in files if not os.path.isfile(file)]
    if absent and not (allow_missing and len(absent) < len(files)):
        names = ", ".join(os.path.basename(file) for file in absent[:3])
        remedy = f"get them all: {GET_SNI}" + " (or go on with those there: --allow-missing)" * (not allow_missing)
        raise UserError(f"{split_file(root, split)} names {len(absent)} tasks whose files are not in {root}/tasks: {names} …; "
                        + remedy)
    tasks = [read_task(file, max_instances, skip) for file in files if file not in absent]
    return [task for task in tasks if task.instances]


def split_file(root: str, split: str) -> str:
    return os.path.join(root, "splits", "default", f"{split}_tasks.txt")


def listed_tasks(root: str, split: str) -> list[str]:
    """The names of a split's tasks, whether their files are there or not."""
    path = split_file(root, split)
    with named_file(path, f"--data names a folder in Super-NaturalInstructions' layout: {GET_SNI} (or python sample.py "
                    "writes the built-in suite)"), open(path, encoding="utf-8") as f:
        names = f.read().split()
    if not names:
        raise UserError(f"{path} is empty; it should name one task a line")
    return names


def training_tasks(options, max_instances: int | None = None, skip: int = 0) -> list[Task]:
    """The training split as the options have it; --categories N: only the N categories with most tasks (nested subsets)."""
    tasks = load_sni(options.data, "train", max_instances or options.max_instances, skip, options.allow_missing)
    sizes = Counter(task.category for task in tasks)
    largest = sorted(sizes, key=lambda category: (-sizes[category], category))
    if options.categories and options.categories > len(largest):
        raise UserError(f"--categories {options.categories}: the training tasks of {options.data} have only {len(largest)}")
    kept = set(largest[:options.categories or None])
    return [task for task in tasks if task.category in kept]


def read_task(path: str, max_instances: int | None = None, skip: int = 0) -> Task:
    with named_file(path, "a task's file is one JSON object; fetch or write it again"):
        with open(path, encoding="utf-8") as f:
            record = json.load(f)
        if not isinstance(record, dict):
            raise ValueError(f"it is a {type(record).__name__}")
    definitions = record.get("Definition") or []
    definitions = [definitions] if isinstance(definitions, str) else definitions
    if not definitions or not definitions[0].strip():
        raise UserError(f"{path}: no Definition; every task needs one")
    name, instances, demonstrations = os.path.basename(path).removesuffix(".json"), [], []
    for n, row in enumerate(record.get("Instances", [])[skip:None if max_instances is None else skip + max_instances]):
        outputs = row.get("output")
        outputs = [outputs] if isinstance(outputs, str) else outputs
        if not outputs or "input" not in row:
            raise UserError(f"{path}: instance {skip + n} has no input or no output")
        instances.append(Instance(row.get("id", f"{name}-{skip + n}"), row["input"], outputs))
    if len({x.id for x in instances}) < len(instances):
        raise UserError(f"{path}: two instances have the same id")
    if not instances and not skip:
        raise UserError(f"{path}: no Instances; every task needs some")
    for n, row in enumerate(record.get("Positive Examples", []), 1):
        if "input" not in row or "output" not in row:
            raise UserError(f"{path}: Positive Example {n} has no input or no output")
        demonstrations.append((row["input"], row["output"]))
    return Task(name, (record.get("Categories") or ["none"])[0],
                [d.strip() for d in definitions], demonstrations, instances)


# ------------------------------------------------------------------------------------------------------------- texts
# The encoding of the official Tk-Instruct code (ni_collator.py): the meta-trained baseline and the teachers read
# definition + demonstrations + instance, the hypernetwork the first two, the student the instance alone.

def _full_stop(text: str) -> str:
    text = text.strip()
    return text if text[-1:] in tuple(string.punctuation) else text + "."


def instance_text(text: str) -> str:
    return f"Input: {_full_stop(text)}\nOutput: "


def instruction_text(definition: str, demonstrations=()) -> str:
    """Definition and demonstrations: what the hypernetwork reads. "" for neither."""
    text = f"Definition: {_full_stop(definition)}\n\n" if definition.strip() else ""
    for n, (demo_input, demo_output) in enumerate(demonstrations, 1):
        text += f" Positive Example {n} -\nInput: {_full_stop(demo_input)}\n Output: {_full_stop(demo_output)}\n\n"
    return text


def prompt_text(definition: str, demonstrations, text: str) -> str:
    """The text with the instruction in the input; without any instruction the instance text alone."""
    instruction = instruction_text(definition, demonstrations)
    return instruction + "Now complete the following example -\n" * bool(instruction) + instance_text(text)


_warned = set()


def tokenize(tokenizer, texts: list[str], limit: int, device="cpu") -> tuple[torch.Tensor, torch.Tensor]:
    """(ids, attention mask), both (N, T), right-padded; a text over `limit` tokens is cut, with one warning a limit."""
    return cut_and_pad(tokenizer, tokenizer(texts)["input_ids"], limit, device)


def tokenize_instructed(tokenizer, items: list[tuple], limit: int, device="cpu") -> tuple[torch.Tensor, torch.Tensor]:
    """`tokenize` for (definition, demonstrations) or (definition, demonstrations, instance) items.

    A demonstration that would take the text over `limit` tokens is left out, with all after it, rather than cut: the
    official rule. A text that is too long even so is cut.
    """
    def text(definition, demonstrations, instance=None):
        return instruction_text(definition, demonstrations) if instance is None else prompt_text(
            definition, demonstrations, instance)

    rows = tokenizer([text(*item) for item in items])["input_ids"]
    for n, (definition, demonstrations, *instance) in enumerate(items):
        while len(rows[n]) > limit and demonstrations:
            demonstrations = demonstrations[:-1]
            rows[n] = tokenizer(text(definition, demonstrations, *instance))["input_ids"]
    return cut_and_pad(tokenizer, rows, limit, device)


def cut_and_pad(tokenizer, rows: list[list[int]], limit: int, device="cpu") -> tuple[torch.Tensor, torch.Tensor]:
    longest = max(map(len, rows))
    if longest > limit:
        if limit not in _warned:
            warnings.warn(f"a text of {longest} tokens was cut to the limit of {limit}", stacklevel=3)
            _warned.add(limit)
        rows = [row if len(row) <= limit else row[:limit - 1] + [tokenizer.eos_token_id] for row in rows]
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


# ----------------------------------------------------------------------------------------------------------- batches
# A batch is a pure function of (seed, step, number of the micro-batch among all ranks'): a resumed run needs no loader
# state, and two ranks draw what one process would have drawn in two micro-batches.

def batches(items: list, size: int) -> list[list]:
    return [items[i:i + size] for i in range(0, len(items), size)]


@dataclass
class Draw:
    """One task of a mixed-task batch: an instruction, and (input, output) pairs it is to be followed on."""
    task: Task
    definition: str
    demonstrations: list[tuple[str, str]]
    pairs: list[tuple[str, str]]


def generator(*key: int) -> np.random.Generator:
    return np.random.default_rng(list(key))


def n_demonstrations(demos: str, seed: int, step: int) -> int:
    """0 or 2. "mixed": two in every other step, on average; one choice for a step keeps padding low and ranks together."""
    return 2 * (generator(seed, step, 0, 1).random() < 1 / 2) if demos == "mixed" else int(demos)


def draw_tasks(tasks: list[Task], rng: np.random.Generator, n_tasks: int, n_instances: int, n_demos: int,
               vary: bool = False) -> list[Draw]:
    """n_tasks tasks, each with one of its wordings, n_instances instances and n_demos demonstrations.

    vary: demonstrations are drawn from the task's instances; else they are its first positive examples, as in the tests.
    """
    picks = rng.choice(len(tasks), n_tasks, replace=n_tasks > len(tasks))
    return [draw_task(tasks[t], rng, n_instances, n_demos, vary) for t in picks]


def draw_task(task: Task, rng: np.random.Generator, n_instances: int, n_demos: int, vary: bool = False) -> Draw:
    definition = task.definitions[rng.integers(len(task.definitions))]
    n = n_instances + n_demos * vary
    rows = rng.choice(len(task.instances), n, replace=n > len(task.instances))
    drawn = [task.instances[i] for i in rows]
    pairs = [(x.input, x.outputs[rng.integers(len(x.outputs))]) for x in drawn]
    demonstrations = pairs[n_instances:] if vary else task.demonstrations[:n_demos]
    return Draw(task, definition, demonstrations, pairs[:n_instances])


def read_json_lines(path: str, remedy: str, **types: type) -> list[dict]:
    """The objects of a JSON-lines file, each with these keys, their values of these types.

    Raises UserError naming file and line for anything else, and for a file without lines.
    """
    with named_file(path, remedy), open(path, encoding="utf-8") as f:
        lines = f.read().split("\n")
    rows = []
    for n, line in enumerate(lines, 1):
        if line.strip():
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise UserError(f"{path}, line {n}: not JSON: {error}; {remedy}") from None
            if not isinstance(row, dict):
                raise UserError(f"{path}, line {n}: no JSON object; {remedy}")
            for key, kind in types.items():
                if key not in row:
                    raise UserError(f"{path}, line {n}: no {key}; {remedy}")
                if not isinstance(row[key], kind) or row[key] == []:
                    raise UserError(f"{path}, line {n}: {key} is {row[key]!r:.40}, which is empty or no {kind.__name__}; {remedy}")
            rows.append(row)
    if not rows:
        raise UserError(f"{path} is empty; {remedy}")
    return rows


def read_documents(path: str) -> list[str]:
    """Those of at least three words in a text file: one document a line, plain or JSON lines with "text" (C4's form)."""
    remedy = "--text names plain text in UTF-8, one document a line, or JSON lines with a text"
    if path.endswith((".json", ".jsonl")):
        lines = [row["text"] for row in read_json_lines(path, remedy, text=str)]
    else:
        with named_file(path, remedy), open(path, encoding="utf-8") as f:
            lines = f.read().splitlines()
    documents = [line for line in lines if len(line.split(maxsplit=2)) == 3]
    if not documents:
        raise UserError(f"{path} has no document of three words or more; {remedy}")
    return documents


def cut_documents(documents: list[str], tokenizer, n: int, parts: int, limit: int,
                  rng: np.random.Generator) -> list[list[list[int]]]:
    """n documents drawn at random; of each a window of at most `limit` tokens, in `parts` pieces, none empty.

    All are cut at the same shares of their length, drawn once a batch: its pieces are then of like length, padding is low.
    Token ids come without the end token.
    """
    shares, rows = np.sort(rng.random(parts - 1)), []
    drawn = [documents[i] for i in rng.integers(len(documents), size=n)]
    for ids in tokenizer(drawn, add_special_tokens=False)["input_ids"]:
        start = int(rng.integers(max(len(ids) - limit, 0) + 1))
        window = ids[start:start + limit]
        cuts = [0]
        for k, share in enumerate(shares, 1):
            cuts.append(min(max(round(share * len(window)), cuts[-1] + 1), len(window) - parts + k))
        rows.append([window[a:b] for a, b in zip(cuts, [*cuts[1:], len(window)])])
    return rows


def unit_of(task: Task, unit: str) -> str:
    """The name of the teacher that a task belongs to: its category's (the paper's choice), its own, or the only one."""
    return {"category": task.category, "task": task.name, "all": "all"}[unit]
