"""Tasks and the texts that each model reads.

One task file of Super-NaturalInstructions (v2.6, tasks/*.json), which the built-in suite follows too:

    {"Definition": ["In this task, you're given ... Your job is to ..."],          # the suite: [0], then paraphrases
     "Categories": ["Question Answering"], ...
     "Positive Examples": [{"input": "...", "output": "...", "explanation": "..."}, ...],
     "Instances": [{"id": "task001-0", "input": "...", "output": ["...", "..."]}, ...]}

and splits/default/{train,test}_tasks.txt name the tasks of a split, one a line.
"""
import glob
import itertools
import json
import os
import random
import re
import string
import warnings
from collections import Counter
from dataclasses import dataclass

import torch

from common import UserError, digest, files_digest, named_file, write_text
from templates import LONGEST_FIELD, Template, load_templates

IGNORE = -100                                  # label of positions that do not count, as in PyTorch's cross-entropy
GET_SNI = "git clone --depth 1 --branch v2.6 https://github.com/allenai/natural-instructions"


class Verbatim(str):
    """A text that is read as it stands, without the words that Super-NaturalInstructions' encoding puts around it."""


@dataclass
class Instance:
    id: str
    input: str
    outputs: list[str]                         # every reference
    prompt: str | None = None                  # what teachers read where it is not made of instruction and input (P3)
    choices: tuple[str, ...] = ()              # answers to rank, where the task has them (P3)


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

    split: names splits/default/{split}_tasks.txt. The official test instances are the first 100 of
    each test task. Those of the split train are shuffled first, as in the official code: many files
    are sorted by class. With skip, a task may have none left; with allow_missing, tasks whose files
    are absent are left out.
    Raises UserError for a missing folder or file, broken JSON, a task without definition, an instance without output.
    """
    files = [os.path.join(root, "tasks", name + ".json") for name in listed_tasks(root, split)]
    absent = [file for file in files if not os.path.isfile(file)]
    if absent and not (allow_missing and len(absent) < len(files)):
        names = ", ".join(os.path.basename(file) for file in absent[:3])
        remedy = f"get them all: {GET_SNI}" + " (or go on with those there: --allow-missing)" * (not allow_missing)
        raise UserError(f"{split_file(root, split)} names {len(absent)} tasks whose files are not in {root}/tasks: {names} …; "
                        + remedy)
    there = [file for file in files if file not in absent]
    return [read_task(file, max_instances, skip, shuffle=split == "train") for file in there]


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
    n = max_instances or options.max_instances
    if options.format == "p3":
        tasks = load_p3(options.data, "train", n, options.p3_input, skip)
    else:
        tasks = load_sni(options.data, "train", n, skip, options.allow_missing)
    leaks = held_out_names([task.category if options.format == "p3" else task.name for task in tasks])
    if leaks and "P3" not in _warned:
        _warned.add("P3")
        warnings.warn(f"{len(leaks)} training tasks are named after data sets that P3 holds out ({', '.join(leaks[:2])} …): scores "
                      "of this model on P3 would be leaks", stacklevel=2)
    sizes = Counter(task.category for task in tasks)
    largest = sorted(sizes, key=lambda category: (-sizes[category], category))
    if options.categories and options.categories > len(largest):
        raise UserError(f"--categories {options.categories}: the training tasks of {options.data} have only {len(largest)}")
    kept = set(largest[:options.categories or None])
    return [task for task in tasks if task.category in kept and task.instances]


def tasks_digest(options) -> dict:
    """{"data_digest": a hash of the training split's files}; {} where they are not all there.

    Their bytes are hashed, nothing is parsed.
    """
    root = options.data
    if options.format == "p3":
        folder = glob.escape(root)
        files = [f"{root}/templates/{dataset}/templates.yaml" for dataset in P3_TRAIN]
        files += [f"{root}/{dataset}/train.jsonl" for dataset in P3_TRAIN]
        files += sorted(glob.glob(f"{folder}/*prompted*/*.jsonl"))
    elif os.path.isfile(split_file(root, "train")):
        with open(split_file(root, "train"), "rb") as f:
            names = f.read().decode(errors="replace").split()
        files = [os.path.join(root, "tasks", name + ".json") for name in names]
    else:
        return {}
    there = [file for file in files if os.path.isfile(file)]
    complete = options.format == "p3" or options.allow_missing or len(there) == len(files)
    return {"data_digest": files_digest(there, root)} if there and complete else {}


def text_digest(options) -> dict:
    """{"text_digest": a hash of the file of plain text}; {} where it is not there."""
    if not os.path.isfile(options.text):
        return {}
    return {"text_digest": files_digest([options.text], os.path.dirname(options.text))}


def names_and_definitions(tasks: list[Task]) -> dict:
    """{a task's name: a hash of its definition}: what `known_tasks` knows them again by."""
    return {task.name: digest(" ".join(task.definitions[0].split())) for task in tasks}


def write_training_tasks(folder: str, tasks: list[Task]) -> None:
    """Beside a checkpoint, what it was trained on, so that none of it is evaluated on (`bench.Bench`)."""
    write_text(f"{folder}/training_tasks.json", json.dumps(names_and_definitions(tasks), indent=0))


def known_tasks(tasks: list[Task], trained_on: dict) -> list[str]:
    """Names of those tasks that `trained_on` (`names_and_definitions`) holds by definition or name.

    A name counts without its number (task061_…), which is another one in a suite of another seed.
    """
    def plain(name):
        return re.sub(r"^task\d+_", "", name)

    names, definitions = set(map(plain, trained_on)), set(trained_on.values())
    return [name for name, definition in names_and_definitions(tasks).items()
            if plain(name) in names or definition in definitions]


def is_texts(value) -> bool:
    """A list of texts, not empty."""
    return isinstance(value, list) and bool(value) and all(isinstance(text, str) for text in value)


def read_task(path: str, max_instances: int | None = None, skip: int = 0,
              shuffle: bool = False) -> Task:
    """A task file's instances skip : skip + max_instances, of the file's order or a shuffled one.

    The shuffled one follows from the task's name and its number of instances alone: whatever its
    seed, every stage takes the same ones, and those after them are held out. Raises UserError for
    what is no task's file.
    """
    with named_file(path, "a task's file is one JSON object; fetch or write it again"), open(path, encoding="utf-8") as f:
        record = json.load(f)

    def need(condition, what):
        if not condition:
            raise UserError(f"{path}: {what}")

    need(isinstance(record, dict), "no JSON object; a task's file is one")
    definitions, categories = ([x] if isinstance(x, str) else x for x in (record.get("Definition"), record.get("Categories")))
    need(is_texts(definitions) and definitions[0].strip(), "no Definition; every task needs one")
    need(not categories or is_texts(categories), "Categories are no texts")
    rows, examples = record.get("Instances"), record.get("Positive Examples") or []
    need(isinstance(rows, list) and rows, "no Instances; every task needs some")
    need(isinstance(examples, list), "Positive Examples are no list")
    name, instances, demonstrations = os.path.basename(path).removesuffix(".json"), [], []
    numbers = list(range(len(rows)))
    if shuffle:
        random.Random(name).shuffle(numbers)
    for n in numbers[skip:None if max_instances is None else skip + max_instances]:
        row = rows[n]
        outputs = row.get("output") if isinstance(row, dict) else None
        outputs = [outputs] if isinstance(outputs, str) else outputs
        need(is_texts(outputs) and isinstance(row.get("input"), str), f"instance {n} has no input or no output")
        instances.append(Instance(str(row.get("id", f"{name}-{n}")), row["input"], outputs))
    need(len({x.id for x in instances}) == len(instances), "two instances have the same id")
    for n, row in enumerate(examples, 1):
        need(isinstance(row, dict) and isinstance(row.get("input"), str) and isinstance(row.get("output"), str),
             f"Positive Example {n} has no input or no output")
        demonstrations.append((row["input"], row["output"]))
    return Task(name, categories[0] if categories else "none", [d.strip() for d in definitions if d.strip()], demonstrations,
                instances)


# ---------------------------------------------------------------------------------------------------------------- P3
# T0's split of the Public Pool of Prompts (Sanh et al. 2022): one task for every data set and template.

P3_TRAIN = ("adversarial_qa/dbert adversarial_qa/dbidaf adversarial_qa/droberta ag_news amazon_polarity app_reviews "
            "cnn_dailymail/3.0.0 common_gen cosmos_qa dbpedia_14 dream duorc/ParaphraseRC duorc/SelfRC gigaword glue/mrpc glue/qqp "
            "imdb kilt_tasks/hotpotqa multi_news paws/labeled_final qasc quarel quartz quoref ropes rotten_tomatoes samsum sciq "
            "social_i_qa trec wiki_bio wiki_hop/original wiki_qa wiqa xsum yelp_review_full").split()
P3_TEST = {"anli_r1": "anli", "anli_r2": "anli", "anli_r3": "anli", "hellaswag": "hellaswag", "cb": "super_glue/cb",
           "copa": "super_glue/copa", "rte": "super_glue/rte", "wic": "super_glue/wic", "wsc": "super_glue/wsc.fixed",
           "winogrande": "winogrande/winogrande_xl", "story_cloze": "story_cloze/2016"}
NLI = {"e": 0, "n": 1, "c": 2, "entailment": 0, "neutral": 1, "contradiction": 2}
P3_LABELS = {"anli_r1": NLI, "anli_r2": NLI, "anli_r3": NLI, "rte": {"entailment": 0, "not_entailment": 1},
             "cb": {"entailment": 0, "contradiction": 1, "neutral": 2},
             "wic": {"false": 0, "true": 1}, "wsc": {"false": 0, "true": 1}}
LABEL_FIELD = {"winogrande": "answer", "story_cloze": "answer_right_ending"}               # else label


def load_p3(root: str, split: str = "test", max_instances: int | None = None, p3_input: str = "fields",
            skip: int = 0) -> list[Task]:
    """A task for every data set and template of T0's split, with its rows skip : skip + max_instances.

        root/templates/super_glue/rte/templates.yaml    promptsource's folder of templates
        root/rte/validation.jsonl                       rows with the data set's own field names, one JSON object a line
        root/imdb/train.jsonl                           the same of a training data set (super_glue/rte/… is found as well)
        root/prompted/imdb_Reviewer_Enjoyment.jsonl     or rows already prompted, {"prompt": .., "completion": ..}

    split: test (the held-out tasks that are there, T0's evaluation templates) or train (all templates of the 36 data sets).
    The hypernetwork reads the template's text. The student reads, by p3_input, the row's "fields" that the prompt shows
    or the whole "prompt", which is the only choice for prompted rows. Teachers read the prompt. A row to which a template
    does not apply is left out. Raises UserError, naming data set, template and row, for what cannot be rendered, a label
    outside the choices, a file that is not JSON lines, and where no task is there.
    """
    if split not in ("train", "test"):
        raise UserError(f"P3 has the splits train and test here, no {split}")
    templates, tasks = load_templates(os.path.join(root, "templates")), []
    end = None if max_instances is None else skip + max_instances
    for name, dataset in P3_TEST.items() if split == "test" else [(d, d) for d in P3_TRAIN]:
        rows = p3_rows(root, name, dataset, "validation" if split == "test" else "train")
        for template in templates.get(dataset, []):
            if split == "test" and not template.for_evaluation:
                continue
            if rows is None and split == "train":
                instances = prompted_instances(root, template)
            else:
                made = (p3_instance(name, template, row, n, p3_input) for n, row in enumerate(rows or []))
                instances = (x for x in made if x is not None)
            instances = list(itertools.islice(instances, skip, end))        # rows beyond are not rendered
            if instances:
                tasks.append(Task(f"{name}: {template.name}", name, [Verbatim(template.text)], [], instances))
    if not tasks:
        example = "rte/validation.jsonl" if split == "test" else "imdb/train.jsonl"
        raise UserError(f"{root} has no rows of T0's {split} data sets; put them into {root}/{example} and the like (README)")
    return tasks


def p3_rows(root: str, name: str, dataset: str, split: str) -> list[dict] | None:
    """Rows of a data set with labels as integers, None where there are none."""
    for folder in (name, *[dataset] * (list(P3_TEST.values()).count(dataset) < 2)):          # ANLI's rounds share a folder
        path = os.path.join(root, folder, split + ".jsonl")
        if os.path.isfile(path):
            rows = read_json_lines(path, "rows are JSON objects with the data set's own field names, one a line")
            return [with_plain_label(name, row, f"{path}, row {n}") for n, row in enumerate(rows)]
    return None


def with_plain_label(name: str, row: dict, where: str) -> dict:
    """The row as the templates want it: SuperGLUE's own files have true or a word where they index by 0 and 1."""
    row = row | (row["target"] if isinstance(row.get("target"), dict) else {})                # WSC's spans
    if name not in P3_TEST:
        return row
    key = LABEL_FIELD.get(name, "label")
    label = row.get(key)
    if label in ("", None, -1, "-1"):
        raise UserError(f"{where}: no {key}: the labels of this split are hidden; use the validation split")
    if isinstance(label, str) and name in P3_LABELS and not label.isdigit():
        if label.lower() not in P3_LABELS[name]:
            raise UserError(f"{where}: label '{label}' is none of {', '.join(P3_LABELS[name])}")
        row[key] = P3_LABELS[name][label.lower()]
    elif key == "label" and isinstance(label, (bool, str)) and str(label).removeprefix("-").isdigit() or isinstance(label, bool):
        row[key] = int(label)
    return row


def p3_instance(name: str, template: Template, row: dict, n: int, p3_input: str) -> Instance | None:
    rendered = template.render(row, n)
    if rendered is None:
        return None
    prompt, target, choices = rendered
    if name in P3_TEST and target not in choices:
        raise UserError(f"{template.dataset}, template '{template.name}', row {n}: the answer '{target}' is none of the choices "
                        f"{choices}")
    text = prompt
    if p3_input == "fields" and template.fields:                            # else the fields would tell more than the prompt, or less
        text = " ".join(f"{key}: {field_text(row[key])}" for key in template.fields if key in row)
    return Instance(f"{name}-{n}", Verbatim(text), [target], Verbatim(prompt), tuple(choices))


def field_text(value) -> str:
    if isinstance(value, dict):
        return "; ".join(f"{key}: {field_text(x)}" for key, x in value.items())
    return ", ".join(map(field_text, value)) if isinstance(value, list) else " ".join(str(value)[:LONGEST_FIELD].split())


def prompted_instances(root: str, template: Template) -> list[Instance]:
    """Rows already prompted with this template: of the file in root/*prompted*/ that is named after it."""
    def plain(name):
        return re.sub("[^A-Za-z0-9]+", "_", name)

    for path in sorted(glob.glob(f"{glob.escape(root)}/*prompted*/*.jsonl")):
        if plain(os.path.basename(path).removesuffix(".jsonl")) == plain(f"{template.dataset}_{template.name}"):
            if os.path.getsize(path) == 0:
                return []
            rows = read_json_lines(path, "rows are JSON objects with prompt and completion", prompt=str, completion=str)
            pairs = [(row["prompt"].strip(), row["completion"].removesuffix("<|endoftext|>").strip()) for row in rows]
            return [Instance(f"{template.dataset}-{n}", Verbatim(prompt), [target], Verbatim(prompt))
                    for n, (prompt, target) in enumerate(pairs) if prompt and target]
    return []


def held_out_names(tasks: list[str]) -> list[str]:
    """Those of these training tasks whose names hold the name of a data set that P3 holds out."""
    held_out = re.compile("anli|hellaswag|winogrande|story_?cloze|copa|wsc|wic(?![a-z])|(?<![a-z])(cb|rte)(?![a-z])", re.IGNORECASE)
    return [name for name in tasks if held_out.search(name)]


# ------------------------------------------------------------------------------------------------------------- texts
# The encoding of the official Tk-Instruct code (ni_collator.py): the meta-trained baseline and the teachers read
# definition + demonstrations + instance, the hypernetwork the first two, the student the instance alone.

def _full_stop(text: str) -> str:
    text = text.strip()
    return text if text[-1:] in tuple(string.punctuation) else text + "."


def instance_text(text: str) -> str:
    if isinstance(text, Verbatim):
        return text
    return f"Input: {_full_stop(text)}\nOutput: "


def instruction_text(definition: str, demonstrations=()) -> str:
    """Definition and demonstrations: what the hypernetwork reads. "" for neither."""
    if isinstance(definition, Verbatim):
        return definition
    text = f"Definition: {_full_stop(definition)}\n\n" if definition.strip() else ""
    for n, (demo_input, demo_output) in enumerate(demonstrations, 1):
        text += f" Positive Example {n} -\nInput: {_full_stop(demo_input)}\n Output: {_full_stop(demo_output)}\n\n"
    return text


def prompt_text(definition: str, demonstrations, text: str) -> str:
    """The text with the instruction in the input; without any instruction the instance text alone."""
    if isinstance(text, Verbatim):
        return text
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


def unknown_words(tokenizer, texts: list[str]) -> list[str]:
    """Those words of the texts, each once and in order, whose tokens hold the unknown token.

    A word is what stands between white space, told without the ASCII punctuation around it.
    """
    words = list(dict.fromkeys(word for text in texts for word in text.split()))
    rows = tokenizer(words, add_special_tokens=False)["input_ids"] if words else []
    unknown = [word for word, row in zip(words, rows) if tokenizer.unk_token_id in row]
    return list(dict.fromkeys(word.strip(string.punctuation) or word for word in unknown))


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


def target_positions(labels: torch.Tensor) -> torch.Tensor:
    """Where the M labels that count are in the flattened (N, C), (M,)."""
    return (labels.flatten() != IGNORE).nonzero()[:, 0]


def batches(items: list, size: int) -> list[list]:
    return [items[i:i + size] for i in range(0, len(items), size)]


def unit_of(task: Task, unit: str) -> str:
    """The name of the teacher that a task belongs to: its category's (the paper's choice), its own, or the only one."""
    return {"category": task.category, "task": task.name, "all": "all"}[unit]


# ------------------------------------------------------------------------------------------------------------- files

TYPES = {str: "text", list: "list of texts", int: "number"}


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
                if not isinstance(row[key], kind) or kind is list and not is_texts(row[key]):
                    raise UserError(f"{path}, line {n}: {key} is {str(row[key])[:40]}, no {TYPES.get(kind, kind.__name__)}; {remedy}")
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
