"""Write the built-in suite: tasks in Super-NaturalInstructions' layout, plain text, a tokenizer.

    python -m bench.sample --out data/sample --seed 0

Everything is made from the tables of suite.yaml and follows from one seed. A task is a combination
of concepts (which slots to find, how to write them). No training task contains the combination of a
validation or test task, so solving those means reading the definition. Files under --out:

    tasks/*.json                one task a file, keys as in Super-NaturalInstructions
    splits/default/*_tasks.txt  train, validation, test, and {validation,test}_unseen_wording: those
                                tasks again, in sentence patterns that no training task uses
    corpus.txt                  one document a line
    tokenizer/                  one piece a word, punctuation apart; the same for every seed
    files.sha256                their digests: only a folder that is as they say is replaced

Most documents hold an event or a list, statements and questions about it with their answers, and
often a gloss ("red twice is red red."); two in five put one question to two events or lists in
turn. They come from the generators of the task inputs and use the words of the definitions, so
they suit the tasks far better than web text would: a question before a text, answered behind it by
a bare word, is close to the tasks that ask for one word alone, held-out ones too. No more than
that: only one question stands before a text, so no ordered pair of things in it is asked for, and
glosses are about words drawn at random.
"""
import functools
import itertools
import json
import os
import random
import re
import sys
from collections import Counter
from pathlib import Path

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))  # started by path
import common
import config
from bench import terminal
from bench.concepts import (
    ATTRIBUTES, EVENTS, FORMATS, JOINERS, LABELS, MAPS, OPERANDS, POSITIONS, SLOTS, SPECS, TABLES,
    Task, answer, draw_examples, make_record, put_in, value_of, write, write_tokenizer)
from bench.folders import new_folder
from bench.listed import replaceable, write_list

SUITE = "data/sample"  # the folder that the scripts fill with seed 0 where it is missing
TRAIN_INSTANCES, EVAL_INSTANCES = 64, 25
TRAIN_WORDINGS, EVAL_WORDINGS = 20, 10
DOCUMENTS = 12000
FILES = ("corpus.txt", "tokenizer/tokenizer.json", "tokenizer/tokenizer_config.json",
         *(f"splits/default/{split}_tasks.txt" for split in (
             "train", "validation", "test", "validation_unseen_wording", "test_unseen_wording")))

# ------------------------------------------------------------------------------ definitions

def capitalized(text):
    return text[0].upper() + text[1:]


def ask_label(rng, task, ask, noun):
    """Word a classification, in the sentence pattern `ask` where one is given."""
    either = task.form in TABLES["obvious_labels"] and rng.random() < 0.35
    ask = ask or rng.choice(TABLES["class_questions" if either else "class_asks"])
    slot, said, opposite, question, _ = ATTRIBUTES[task.operands[0]]
    thing = OPERANDS[slot].phrase(rng)
    question = question.format(s=thing)
    p, q = LABELS[task.form]
    if ask in TABLES["class_questions"]:
        p, q = rng.choice([(p, q), (q, p)])
    return ask.format(n=noun, c=f"{thing} {said}", d=f"{thing} {opposite}",
                      s=question, S=capitalized(question), p=p, P=p.capitalize(), q=q)


def ask_value(rng, task, ask, noun):
    """Word any other task, in the sentence pattern `ask` where one is given."""
    first, *others = task.operands
    found = [OPERANDS[operand].phrase(rng) for operand in task.operands]
    orders = TABLES["in_order_of_three" if len(others) > 1 else "in_order"]
    found = rng.choice(orders).format(*found) if others else found[0]
    ask = ask or put_together(rng, task)
    bare = rng.choice(SLOTS[first][0] if first in SLOTS else ["thing"])
    form = rng.choice((FORMATS | JOINERS)[task.form][1])
    return ask.format(n=noun, x=found, w=bare, f=form, it="them" if others else "it")


def put_together(rng, task):
    """Draw a sentence pattern: a core, then how to write the answer where that has to be said."""
    own = OPERANDS[task.operands[0]].cores if len(task.operands) == 1 else []
    if task.operands == ("name",) and rng.random() < 0.5:
        own = TABLES["name_cores"]
    text = rng.choice(own if own and rng.random() < 0.3 else TABLES["cores"])
    if task.form != "plain" or rng.random() < 0.4:
        tails = TABLES["tails"]
        if text.endswith("?"):  # only another sentence can follow
            tails = [tail[1:] for tail in tails if tail.startswith(".")]
        text += rng.choice(tails)
    return text if text.endswith("?") else text + "."


def define(rng, task, ask=None):
    """Draw one definition of `task`, in the sentence pattern `ask` where one is given."""
    noun = rng.choice(TABLES["input_nouns"][task.source])
    text = (ask_label if task.form in LABELS else ask_value)(rng, task, ask, noun)
    if ask is None and rng.random() < 0.6:
        text = f"{rng.choice(TABLES['openings']).format(n=noun)} {text}"
    if ask is None and rng.random() < 0.12:
        text += f" {rng.choice(TABLES['closings'])}"
    return text


def roughen(rng, text, task):
    """Return a definition as people type it: in one case, with no full stop, with more words."""
    kind = rng.random()
    if kind < 0.12:
        text = text.lower()
    elif kind < 0.16 and task.form not in LABELS:
        text = text.upper()
    if rng.random() < 0.15:
        text = text.rstrip(".")
    return put_in(rng, text, rng.randint(1, 3)) if rng.random() < 0.2 else text


def definitions(rng, task, train, taken):
    """Draw distinct wordings of a task, none of which is `taken`."""
    found = {}  # a dict keeps the order of drawing
    while len(found) < (TRAIN_WORDINGS if train else EVAL_WORDINGS):
        text = roughen(rng, define(rng, task), task) if train else define(rng, task)
        if text not in taken:
            found[text] = None
    return list(found)


# ------------------------------------------------------------------------------ splits

def candidates(category):
    """Return all tasks of a category."""
    source, kinds, form_kinds, *_ = SPECS["categories"][category]
    tables = TABLES | {"labels": LABELS}
    forms = list(itertools.chain(*(tables[kind] for kind in form_kinds)))
    tasks = []
    for order in dict.fromkeys(itertools.permutations(kinds)):  # slots and maps, maps and slots
        for operands in itertools.product(*(tables[kind] for kind in order)):
            slots = {OPERANDS[operand].slot for operand in operands}
            told = [event for event in EVENTS if slots <= EVENTS[event]]
            if len(set(operands)) == len(operands) and (source == "list" or len(told) > 1):
                tasks += [Task(category, source, operands, form) for form in forms]
    return tasks


def combination(task):
    """Return what a task teaches: an operand in a form, or operands together.

    The order of labels and operands does not count, nor does the form of several operands.
    """
    form = task.form if len(task.operands) == 1 else None
    if form in LABELS:
        form = frozenset(LABELS[form])
    return task.source, frozenset(task.operands), form


def parts_of(task):
    """Return the combinations in a task: its own, and those of any two of its operands."""
    pairs = itertools.combinations(task.operands, 2)
    return {combination(task), *(combination(task._replace(operands=pair)) for pair in pairs)}


def split_tasks(rng):
    """Choose the tasks: 'train', 'validation' and 'test', each a list of Task.

    No training task has the combination of a validation or test task, nor holds the pair of one.
    """
    pool = {category: candidates(category) for category in SPECS["categories"]}
    split = {"train": [], "validation": [], "test": []}
    held_out = set()
    for category, (*_, n_validation, n_test) in SPECS["categories"].items():
        rng.shuffle(pool[category])
        # Few of a kind, so that every concept keeps other training tasks, and another partner.
        concepts = set().union(*(task.operands for task in pool[category]))
        most = 2 if len(pool[category][0].operands) == 1 else min(4, len(concepts) - 2)
        chosen, used = [], Counter()
        for task in pool[category]:
            spread = used[task.form] < min(most, 3) and max(used[o] for o in task.operands) < most
            if spread and combination(task) not in held_out:
                chosen.append(task)
                held_out.add(combination(task))
                used.update([*task.operands, task.form])
            if len(chosen) == n_validation + n_test:
                break
        split["validation"] += chosen[:n_validation]
        split["test"] += chosen[n_validation:]
    for category, (*_, n_train, _, _) in SPECS["categories"].items():
        free = [task for task in pool[category][:4000] if not parts_of(task) & held_out]
        seen, pairs = Counter(), Counter()

        for _ in range(n_train):
            # The least taught operands, then form: an even grid serves its unseen cells best.
            task = min(free, key=lambda t: (
                pairs[t.operands], sum(seen[o] for o in t.operands), seen[t.form]))
            free.remove(task)
            pairs[task.operands] += 1
            seen.update([*task.operands, task.form])
            split["train"].append(task)
    return split


# ------------------------------------------------------------------------------ task files

def statement(rng, operand, record):
    """Draw a true sentence, without its full stop, about what an operand is in a record."""
    phrase = OPERANDS[operand].phrase(rng)
    value = value_of(operand, record)
    if operand in ATTRIBUTES:
        word = rng.choice(("true", "right") if value else ("false", "wrong"))
        return f"it is {word} that {phrase}"
    return rng.choice((f"{phrase} is {value}", f"{value} is {phrase}"))


def wrong_example(rng, task, record, right, wrong_form):
    """Draw a negative example: the right values in a wrong form, or the answer to another input."""
    output, why = right, "it is not written in the way that is given"
    if wrong_form:
        forms = next(table for table in (FORMATS, JOINERS, LABELS) if task.form in table)
        form = rng.choice([form for form in forms if form != task.form])
        output = answer(task._replace(form=form), record)
    while output == right:
        why = f"it is the answer for another {task.source}"
        output = answer(task, make_record(rng, task.source, task.operands))
    return {"input": record.text, "output": output, "explanation": f"This is wrong: {why}."}


def task_file(rng, name, task, train, taken):
    """Return a task as Super-NaturalInstructions has it, in words that are not `taken`."""
    n = TRAIN_INSTANCES if train else EVAL_INSTANCES
    demonstrations, instances = draw_examples(rng, task, n, varied=train)
    wordings = definitions(rng, task, train, taken)
    right = []
    for record, output in demonstrations:
        said = " and ".join(statement(rng, operand, record) for operand in task.operands)
        right.append({"input": record.text, "output": output, "explanation": f"Here {said}."})
    wrong = [wrong_example(rng, task, *demonstrations[0], wrong_form=True),
             wrong_example(rng, task, *demonstrations[1], wrong_form=False)]
    rows = [{"id": f"{name}-{i}", "input": record.text, "output": [output]}
            for i, (record, output) in enumerate(instances)]
    return SPECS["task_file"] | {
        "Categories": [task.category], "Definition": wordings,
        "Positive Examples": right, "Negative Examples": wrong, "Instances": rows}


def write_tasks(rng, root):
    """Write the task files and the splits; returns split -> names of its tasks.

    Raises RuntimeError if two tasks share a definition.
    """
    chosen = [(split, task) for split, tasks in split_tasks(rng).items() for task in tasks]
    rng.shuffle(chosen)  # a task's number tells nothing about its split or category
    names = {split: [] for split in ("train", "validation", "test",
                                     "validation_unseen_wording", "test_unseen_wording")}
    taken = set()  # definitions
    for number, (split, task) in enumerate(chosen, 1):
        train = split == "train"
        name = f"task{number:04d}_{'_'.join((task.source, *task.operands, task.form))}"
        files = {split: (name, task_file(rng, name, task, train, taken))}
        if not train:
            asks = TABLES["unseen_class_asks" if task.form in LABELS else "unseen_asks"]
            reworded = [define(rng, task, ask) for ask in rng.sample(asks, len(asks))]
            entry = files[split][1] | {"Definition": reworded}
            files[f"{split}_unseen_wording"] = (f"{name}_reworded", entry)
        # Two kinds are beyond a T5 of this size and so no tests: labels whose order only the
        # definition tells, and new pairs of positions. On validation tasks they stay at chance.
        unclear = task.form in LABELS and task.form not in TABLES["obvious_labels"]
        beyond = unclear or task.category == "Position Pairs"
        for part, (name, entry) in files.items():
            if not taken.isdisjoint(entry["Definition"]):
                raise RuntimeError(f"{name} shares a definition with another task")
            taken.update(entry["Definition"])
            if train or not beyond:
                names[part].append(name)
                write(root / "tasks" / f"{name}.json", json.dumps(entry, indent=1) + "\n")
    for part, listed in names.items():
        write(root / "splits" / "default" / f"{part}_tasks.txt", "\n".join(listed) + "\n")
    return names


# ------------------------------------------------------------------------------ corpus

def document(rng):
    """Draw one document of the corpus (see the top of this file)."""
    source = rng.choice(("sentence", "sentence", "list"))
    if rng.random() < 0.4:
        operand = rng.choice([*SLOTS, *MAPS, *(POSITIONS if source == "list" else ())])
        records = [make_record(rng, source, (operand,)) for _ in range(2)]
        answers = [f"{record.text} {value_of(operand, record)}." for record in records]
        return " ".join([f"What is {OPERANDS[operand].phrase(rng)}?", *answers])
    record = make_record(rng, source)
    before, after = questions(rng, record)
    loose = gloss(rng)
    if rng.random() < 0.5:
        loose = fact(rng)
    if rng.random() < 0.7:
        before.insert(0, loose)
    text = " ".join([*before, record.text, *after])
    return text.lower() if rng.random() < 0.1 else text


def questions(rng, record):
    """Draw what stands before and after a record: a question; answers and statements."""
    before, after = [], []
    operands = (*SLOTS, *MAPS, *ATTRIBUTES, *POSITIONS)
    known = [operand for operand in operands if OPERANDS[operand].slot in record.facts]
    for operand in rng.sample(known, min(len(known), rng.randint(2, 4))):
        question = f"What is {OPERANDS[operand].phrase(rng)}?"
        value = value_of(operand, record)
        if operand in ATTRIBUTES and rng.random() < 0.5:
            thing = OPERANDS[OPERANDS[operand].slot].phrase(rng)
            after.append(yes_or_no(operand, thing, value))
        elif operand in ATTRIBUTES or rng.random() < 0.5:
            after.append(f"Here {statement(rng, operand, record)}.")
        elif before:
            # Two questions before a text, answered in order, would be the pair tasks in disguise.
            after.append(f"{question} {value}.")
        else:
            before.append(question)
            after.insert(0, f"{value}.")
    return before, after


def yes_or_no(attribute, thing, holds):
    question = ATTRIBUTES[attribute][3].format(s=thing)
    return f"{capitalized(question)}? {'yes' if holds else 'no'}."


def fact(rng):
    """Draw what is true of one value, such as "lion is wild." or "Is the lion wild? yes." """
    attribute = rng.choice(list(ATTRIBUTES))
    slot, said, opposite, _, _ = ATTRIBUTES[attribute]
    value = rng.choice(SLOTS[slot][1])
    holds = OPERANDS[attribute].images[value]
    if rng.random() < 0.5:
        return f"{rng.choice(('', 'the '))}{value} {said if holds else opposite}."
    return yes_or_no(attribute, rng.choice((value, f"the {value}")), holds)


def gloss(rng):
    """Draw a sentence on how words are written, or one that uses the words of definitions."""
    output, phrases = FORMATS[rng.choice(list(FORMATS))]
    v, w = [rng.choice(SLOTS[slot][1]) for slot in rng.sample(list(SLOTS), 2)]
    between, joined = JOINERS[rng.choice(list(JOINERS))]
    text = rng.choice(TABLES["form_glosses"] * 3 + TABLES["word_glosses"])
    return text.format(v=v, w=w, f=rng.choice(phrases), v_f=output.format(x=v),
                       joined=rng.choice(joined), v_w=between.join((v, w)))


# ------------------------------------------------------------------------------ the suite

def write_suite(root, seed=0):
    """Write the whole suite as the folder `root`; one that is there is replaced if it is a suite.

    Raises UserError, and leaves everything as it was, where anything else is in it, a task that was
    changed, say, or it cannot be written.
    """
    rng = random.Random(seed)
    with new_folder(replaceable(root, is_own_name), replace=True) as folder:
        new = Path(folder)
        names = write_tasks(rng, new)
        write(new / "corpus.txt", "".join(document(rng) + "\n" for _ in range(DOCUMENTS)))
        pieces = write_tokenizer(new / "tokenizer")
        write_list(folder)
    counts = ", ".join(f"{len(listed)} {split}" for split, listed in names.items())
    print(f"{root}: {counts} tasks, {DOCUMENTS} documents, {pieces} pieces (seed {seed})")


@functools.cache
def names_of_tasks():
    """All names that tasks can have, without their numbers."""
    found = set()
    for category in SPECS["categories"]:
        for task in candidates(category):
            found.add("_".join((task.source, *task.operands, task.form)))
    return found


def is_own_name(path):
    """Whether a suite has a file of this name."""
    match = re.fullmatch(r"tasks/task\d{4}_(.+?)(_reworded)?\.json", path)
    return path in FILES or (match is not None and match[1] in names_of_tasks())


def is_default(root):
    """Whether this is the folder that the scripts fill, however it is written."""
    return os.path.realpath(root) == os.path.realpath(SUITE)


def is_suite(root):
    """Whether this folder holds, or is to hold, the built-in suite, of whatever seed."""
    wordings = os.path.join(root, "splits", "default", "test_unseen_wording_tasks.txt")
    tokenizer = os.path.join(root, "tokenizer", "tokenizer.json")
    return is_default(root) or (os.path.isfile(wordings) and os.path.isfile(tokenizer))


def ensure_suite(root, rank=0):
    """Write the suite, on rank 0, where its default folder is asked for and not there."""
    if rank == 0 and is_default(root) and not os.path.isdir(root):
        print("writing the built-in suite:", end=" ", flush=True)
        write_suite(root, seed=0)


@common.command
@terminal.printing
def main(argv=None):
    parser = config.Parser("Write the built-in suite.", epilog=None)
    parser.add_argument("--out", type=config.path, default=SUITE,
                        help="folder to write; a suite that is there is replaced, nothing else")
    parser.add_argument("--seed", type=config.seed, default=0,
                        help="decides what is held out, the instances and the wordings")
    args = parser.parse_args(argv)
    write_suite(args.out, args.seed)


if __name__ == "__main__":
    main()
