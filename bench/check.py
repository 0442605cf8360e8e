"""Check the data of a config before any training, and how much memory each stage needs.

    python -m bench.check configs/sni-base.yaml [--data FOLDER ...]
    python -m bench.check configs/sni-xxl.yaml --memory         # no data: the table of memory alone

Tells which tasks of each split are there and which are missing, test tasks that are training tasks,
how long the texts are in tokens, what share of them the limits cut and which limits would cut 1 %,
the share of unknown tokens, the plain text of base and pretrain, and each stage's memory
(bench/memory.py says how it is counted). Nothing is trained or written, no weight is loaded. Ends
with exit code 2 and one line where a stage could not start.
"""
import copy
import os
import random
import sys
import warnings
from collections import Counter

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))  # started by path
import common  # before PyTorch: Ctrl-C
import torch

import config
import data
import t5
from bench import curriculum, memory, p3, predictions, records, sample, terminal
from common import UserError

EDGES = (8, 16, 32, 64, 128, 256, 512, 1024)    # of the histogram, tokens
TEACHERS = {"sni": 60, "p3": 36}                # the paper's numbers, where no data is read
LETTERS = 4                                     # of a token, about, where no tokenizer is at hand

# --------------------------------------------------------------------------------------- options


def add_own_options(parser):
    add = parser.add_argument_group("check").add_argument
    add("file", nargs="?", type=config.beside, metavar="CONFIG",
        help="the same as --config CONFIG, and its default")
    add("--memory", default=False, **config.flag,
        help="the table of memory alone, of a size that the LLM's name or folder tells")
    add("--texts", type=config.at_least(0), default=5000,
        help="tokenize so many texts of each kind, drawn; 0: all")
    return parser


def own_parser():
    parser = config.Parser(__doc__)
    config.add_shared_options(parser)
    return add_own_options(parser)


def options_of_stages(argv, options) -> dict:
    """{stage: its options} of the stages that this config trains, read as their scripts read them.

    A key that a stage does not know ends here, and not after the stages before it.
    """
    import evaluate                             # here: the scripts stand above this folder
    import train_hyper
    import train_teacher
    scripts = {"pretrain": train_hyper, "finetune": train_hyper, "evaluate": evaluate}
    found, sections = {}, config.read_config(options.config)
    for stage in (*train_teacher.STAGES, *scripts):
        section = stage.replace("-", "_")
        if section not in sections and stage != "evaluate":
            continue
        script = scripts.get(stage, train_teacher)
        its = config.parse(add_own_options(script.parser()), section, argv)
        its.stage = stage
        is_made = stage == "base" and options.model != "tiny"       # a checkpoint stands for it
        if not is_made and not (stage in ("base", "meta") and options.meta_model):
            found[stage] = its
    return found


# ------------------------------------------------------------------------------------------ tables

def print_table(rows: list[list[str]]) -> None:
    """Rows of cells, titles first, in columns: the first column of words, the others of numbers."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    for row in rows:
        cells = [cell.rjust(width) for cell, width in zip(row, widths)]
        print("  ".join([row[0].ljust(widths[0]), *cells[1:]]).rstrip())
    print()


def percent(part, whole) -> str:
    return f"{100 * part / whole:.1f} %" if whole else "–"


# ------------------------------------------------------------------------------------------- tasks

def splits_of(options) -> list[str]:
    if options.format == "p3":
        return ["train", "test"]
    there = os.path.isfile(data.split_file(options.data, "validation"))
    return ["train", "validation", "test"] if there else ["train", "test"]


def listed_and_absent(options, split: str) -> tuple[list, list]:
    """(what the split names, that of it which is not there): tasks, or P3's data sets."""
    if options.format == "p3":
        names = list(p3.TRAIN if split == "train" else p3.TEST)
        return names, []
    names = data.listed_tasks(options.data, split)
    return names, [name for name in names
                   if not os.path.isfile(data.task_path(options.data, name))]


def read_split(options, split: str) -> list:
    """The tasks of a split that are there, with the instances that are trained or evaluated on."""
    if split == "train":
        return data.training_tasks(options)
    if options.format == "p3":
        return data.load_p3(options.data, split, None, options.p3_input)
    return data.load_sni(options.data, split, 100, allow_missing=True)


def check_splits(options, problems: list) -> dict:
    """{split: its tasks}, as far as they can be read; prints what is there and what is missing."""
    found, lenient = {}, copy.copy(options)
    lenient.allow_missing = True
    p3_data = options.format == "p3"
    rows = [["split", "data sets" if p3_data else "tasks", "there", "missing", "texts to follow",
             "categories", "instances"]]
    missing = {}
    for split in splits_of(options):
        try:
            names, absent = listed_and_absent(options, split)
            tasks = found[split] = read_split(lenient, split)
        except UserError as error:
            problems.append(f"{split}: {error}")
            continue
        categories = {task.category for task in tasks}
        if p3_data:
            absent = [name for name in names if name not in categories]
        elif absent and not options.allow_missing:
            problems.append(f"{split}: {len(absent)} tasks are missing ({absent[0]} …); get them "
                            "all, or go on without them: --allow-missing")
        missing[split] = absent
        instances = sum(len(task.instances) for task in tasks)
        rows.append([split, str(len(names)), str(len(names) - len(absent)), str(len(absent)),
                     str(len(tasks)), str(len(categories)), str(instances)])
    print(f"{options.data}, training tasks with at most {options.max_instances} instances each:")
    print_table(rows)
    for split, absent in missing.items():
        if absent:
            print(f"missing of {split}: {', '.join(absent[:5])}{' …' if len(absent) > 5 else ''}")
    return found


def check_twins(found: dict, problems: list) -> None:
    """Say which tasks of other splits are training tasks, by name or by definition."""
    trained = data.names_and_definitions(found.get("train", []))
    for split, tasks in found.items():
        if split == "train" or not trained:
            continue
        twins = predictions.known_tasks(data.names_and_definitions(tasks), trained)
        if twins:
            problems.append(f"{split}: {len(twins)} of {len(tasks)} tasks are training tasks too, "
                            f"by name or definition: {', '.join(twins[:3])}; take them out of one")
        else:
            print(f"{split}: no task is a training task too")


# ----------------------------------------------------------------------------------------- lengths

def texts_of(tasks: list, options) -> dict:
    """{kind: (its texts, the limit's option)}: what is read of these tasks."""
    plain, shown, inputs, instructed, with_two, outputs = [], [], [], [], [], []
    for task in tasks:
        verbatim, two = task.verbatim, task.demonstrations[:2]
        for definition in task.definitions:
            plain.append(data.instruction_text(definition, (), verbatim))
            if two:
                shown.append(data.instruction_text(definition, two, verbatim))
        for x in task.instances:
            inputs.append(data.instance_text(x.input, verbatim))
            its = (x.prompt or x.input, verbatim)
            instructed.append(data.prompt_text(task.definitions[0], (), *its))
            if two:
                with_two.append(data.prompt_text(task.definitions[0], two, *its))
            outputs += x.outputs
    kinds = {"instruction": (plain, "max_instruction"),
             "instruction, 2 demonstrations": (shown, "max_instruction"),
             "input": (inputs, "max_input"),
             "instruction and input": (instructed, "max_input"),
             "the same, 2 demonstrations": (with_two, "max_input"),
             "output": (outputs, "max_output")}
    return {kind: (texts, limit) for kind, (texts, limit) in kinds.items() if texts}


def drawn(texts: list[str], n: int) -> list[str]:
    return random.Random(0).sample(texts, n) if 0 < n < len(texts) else texts


def measure(texts: list[str], tokenizer) -> tuple[list[int], int | None]:
    """(each text's length in tokens, how many tokens are unknown or None)."""
    if tokenizer is None:
        return [1 + -(-len(text) // LETTERS) for text in texts], None
    lengths, unknown = [], 0
    for batch in data.batches(texts, 1000):
        for ids in tokenizer(batch)["input_ids"]:
            lengths.append(len(ids))
            unknown += ids.count(tokenizer.unk_token_id)
    return lengths, unknown


def cut_at_1_percent(lengths: list[int]) -> int:
    """The smallest limit that cuts at most one text in a hundred."""
    return sorted(lengths)[len(lengths) - 1 - len(lengths) // 100]


def histogram(lengths: list[int]) -> list[str]:
    """The share of the lengths up to each of EDGES, from the one before, and above the last."""
    bins = Counter()
    for length in lengths:
        bins[next((edge for edge in EDGES if length <= edge), None)] += 1
    return [f"{100 * bins[edge] / len(lengths):.0f}" for edge in (*EDGES, None)]


def check_lengths(split: str, tasks: list, options, tokenizer, problems: list) -> None:
    """Print the table of one split's lengths."""
    rows = [["", "texts", "mean", "longest", *(f"≤{edge}" for edge in EDGES), f">{EDGES[-1]}",
             "limit", "cut", "1 % at", "unknown"]]
    for kind, (texts, limit) in texts_of(tasks, options).items():
        lengths, unknown = measure(drawn(texts, options.texts), tokenizer)
        most = getattr(options, limit)
        over = sum(length > most for length in lengths)
        rows.append([kind, str(len(texts)), f"{sum(lengths) / len(lengths):.0f}",
                     str(max(lengths)), *histogram(lengths), str(most),
                     percent(over, len(lengths)), str(cut_at_1_percent(lengths)),
                     "?" if unknown is None else percent(unknown, sum(lengths))])
    print(f"{split}, tokens, and % of the texts by tokens:")
    print_table(rows)
    check_knows(split, data.texts_of(tasks), options.data, tokenizer, problems)


def check_knows(name: str, texts: list[str], path: str, tokenizer, problems: list) -> None:
    """The rule by which a stage refuses texts of which its tokenizer knows too little."""
    try:
        if tokenizer is not None:
            t5.check_knows(tokenizer, texts, path)
    except UserError as error:
        problems.append(f"{name}: {error}")


def check_text(stage: str, options, tokenizer, problems: list) -> None:
    """Say how much plain text a stage has."""
    if stage == "pretrain" and not os.path.exists(options.text):
        skip = (f"no plain text in {options.text}; name some with --text, or leave the stage out: "
                "--stage finetune --no-pretrained")
        if options.text == os.path.join(options.data, "corpus.txt"):    # nobody said there is some
            print(f"{stage}: {skip}")
        else:
            problems.append(f"{stage}: {skip}")
        return
    try:
        documents = records.read_documents(options.text)
    except UserError as error:
        problems.append(f"{stage}: {error}")
        return
    check_knows(stage, documents, options.text, tokenizer, problems)
    lengths, _ = measure(drawn(documents, options.texts), tokenizer)
    mean = sum(lengths) / len(lengths)
    longer = sum(length > options.text_length for length in lengths)
    print(f"{stage}: {options.text}: {len(documents)} documents of three words or more, about "
          f"{mean:.0f} tokens each, {percent(longer, len(lengths))} longer than the "
          f"{options.text_length} (--text-length) that are read at a time")


# ------------------------------------------------------------------------------------------ models

def llm_of(options) -> str:
    """The checkpoint that has the frozen LLM's size, where that itself is still to be trained."""
    if options.llm not in ("base", "meta"):
        return options.llm
    return (options.meta_model if options.llm == "meta" else None) or options.model


def load_tokenizer(options):
    """(the tokenizer, where it is from); (None, why) where it is not at hand."""
    path = llm_of(options)
    try:
        if path == "tiny":
            path = os.path.join(options.data, "tokenizer")
        return t5.load_tokenizer(path), path
    except UserError:
        if os.path.isdir(path) or path.endswith("tokenizer"):
            raise
        return None, f"{path} is not at hand: lengths are estimates, {LETTERS} letters a token"


def check_memory(stages: dict, options, tokenizer, teachers: int) -> None:
    """Print what each stage needs."""
    path = llm_of(options)
    if path == "tiny":
        size = curriculum.size_of(stages["base"]) if "base" in stages else {}
        with torch.device("meta"):
            llm, source = t5.tiny_t5(len(tokenizer), 0, **size), "the tiny T5"
        llm.requires_grad_(False).eval()
    else:
        llm, source = memory.empty_llm(path, options.attention)
    rows = {}
    for stage, its in stages.items():
        if stage != "evaluate":
            rows[stage] = memory.of_stage(stage, llm, its, teachers)
        elif "finetune" in rows:
            size = its.batch_size or (20 if options.model != "tiny" else 250)
            rows[stage] = memory.of_evaluation(llm, its, size, rows["finetune"])
    print(f"memory in GB, computed, not measured, for {source} with "
          f"{memory.numbers(llm.parameters()) / 1e6:.1f} million weights, rank {options.rank}, "
          f"{teachers} LoRA teachers, one process, every text as long as the limits allow:")
    print_table(memory.table(list(rows.values())))
    print("peak: what is held, and the larger of gradients and activations (bench/memory.py has "
          "the formula);\nGPU: the smallest that holds it; the last two columns are with "
          "--checkpointing")


# -------------------------------------------------------------------------------------------- main

def check(argv, options) -> list[str]:
    """Print all tables; what keeps a stage from starting, a line each."""
    problems = []
    stages = options_of_stages(argv, options)
    if set(stages) == {"evaluate"}:
        raise UserError(f"{options.config} has no section for a stage, so nothing is trained by it")
    teachers = TEACHERS[options.format]
    if options.memory:
        tokenizer = load_tokenizer(options)[0] if llm_of(options) == "tiny" else None
        check_memory(stages, options, tokenizer, teachers)
        return []
    if sample.is_default(options.data) and not os.path.isdir(options.data):
        raise UserError(f"{options.data} is not there; the scripts write it when they first need "
                        f"it, or now: python {config.script('bench/sample.py')}")
    found = check_splits(options, problems)
    check_twins(found, problems)
    tokenizer, source = load_tokenizer(options)
    print(f"tokenizer: {source}\n")
    for split in ("train", "test"):
        if found.get(split):
            check_lengths(split, found[split], options, tokenizer, problems)
    for stage in ("base", "pretrain"):
        if stage in stages:
            check_text(stage, stages[stage], tokenizer, problems)
    if found.get("train"):
        teachers = len({data.teacher_of(task, options.unit) for task in found["train"]})
    print()
    check_memory(stages, options, tokenizer, teachers)
    return problems


@common.command
@terminal.printing
def main(argv=None):
    argv = list(sys.argv[1:] if argv is None else argv)
    early = own_parser().parse_known_args(argv)[0]
    if early.file:
        if "--config" in [word.partition("=")[0] for word in argv]:
            raise UserError(f"{early.file} and --config name two configs; name one")
        argv += ["--config", early.file]
    options = config.parse(own_parser(), None, argv)
    with warnings.catch_warnings():
        warnings.showwarning = lambda message, *rest, **kwargs: print(f"warning: {message}")
        problems = check(argv, options)
    for problem in problems:
        print(f"problem: {problem}")
    if problems:
        others = f" ({len(problems)} problems in all)" if len(problems) > 1 else ""
        raise UserError(problems[0] + others)
    if not options.memory:
        print("nothing keeps these stages from starting")


if __name__ == "__main__":
    main()
