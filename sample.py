"""Write the built-in benchmark: tasks in Super-NaturalInstructions' layout, plain text, and a tokenizer.

Everything is made from the tables of assets/suite.yaml and follows from one seed. A task is a combination of
concepts (which slots to find, how to write them); validation and test tasks are combinations that no training
task contains, so solving them means reading the definition.

    python sample.py --out data/sample --seed 0

Files under --out:
    tasks/*.json                 one task a file, keys as in Super-NaturalInstructions
    splits/default/*_tasks.txt   train, validation, test, and {validation,test}_unseen_wording: those tasks
                                 again, defined in sentence patterns that no training task uses
    corpus.txt                   one document a line. Most hold an event or a list, statements and
                                 questions about it with their answers, and glosses ("red twice is red
                                 red."); two in five put one question to two events or lists in turn.
                                 Made by the generators of the task inputs and with the words of the
                                 definitions, so it suits the tasks far better than web text would: a
                                 question before a text, answered behind it by a bare word, is close to
                                 the tasks that ask for one word alone, held-out ones too. No more than
                                 that: only one question stands before a text, so no ordered pair of
                                 things in it is asked for, and glosses are about words drawn at random.
    tokenizer/                   one piece a word, punctuation apart, whatever stands between them; the same
                                 for every seed
"""
import argparse
import itertools
import json
import os
import random
import re
import shutil
from collections import Counter
from typing import NamedTuple

import yaml

# One record, shortened (--seed 0, tasks/task0002_sentence_job_day_plus.json):
# {"Categories": ["Pair Extraction"],
#  "Definition": ["Look at the line. Write the job and the weekday, linked by the word plus.", ...],
#  "Positive Examples": [{"input": "On Wednesday Nora sold pie, a mirror and a yellow hare to a waiter for a cactus.",
#                         "output": "waiter plus Wednesday", "explanation": "Here waiter is the trade and Wednesday is the weekday."}, ...],
#  "Negative Examples": [...],
#  "Instances": [{"id": "task0002_sentence_job_day_plus-0",
#                 "input": "well, here it is. on monday mark sold fish, a chair and a yellow wolf to a chef.", "output": ["chef plus monday"]}, ...]}

# Tables; assets/suite.yaml explains each.

with open(os.path.join(os.path.dirname(__file__), "assets", "suite.yaml"), encoding="utf-8") as f:
    TABLES = yaml.safe_load(f)

SLOTS = {slot: (nouns.split(), values.split()) for slot, (nouns, values) in TABLES["slots"].items()}
MAPS = {m: (slot, phrases, questions, dict(zip(SLOTS[slot][1], images.split())))  # the last: value -> image
        for m, (slot, phrases, questions, images) in TABLES["maps"].items()}
ATTRIBUTES = {a: (*row[:4], row[4].split()) for a, row in TABLES["attributes"].items()}
POSITIONS = TABLES["positions"]
LABELS = TABLES["obvious_labels"] | {f"{p}_{q}": (p, q) for pair in TABLES["labels"].values() for p, q in (pair, pair[::-1])}
PHRASE_FORMATS, LAYOUT_FORMATS = TABLES["phrase_formats"], TABLES["layout_formats"]
FORMATS = {**PHRASE_FORMATS, **LAYOUT_FORMATS}
COPIES = ("twice", "thrice")
JOINERS, JOINED = TABLES["joiners"], TABLES["joined"]
IN_ORDER = {2: TABLES["in_order"], 3: TABLES["in_order_of_three"]}
GLOSSES = TABLES["form_glosses"] * 3 + TABLES["word_glosses"]
QUOTA = TABLES["quota"]

TRAIN_INSTANCES, EVAL_INSTANCES, DOCUMENTS = 64, 25, 12000
TRAIN_WORDINGS, EVAL_WORDINGS = 20, 10
# What the usual SNI prompt adds around a task's text.
PROMPT = "Definition: Input: Output: Explanation: Positive Negative Example 1 2 3 - Now complete the following example -"


class Task(NamedTuple):
    category: str
    source: str  # what the input is: 'sentence' or 'list'
    operands: tuple  # what to find, in order: slots, mappings or positions, or one attribute
    form: str  # key of FORMATS (one operand), JOINERS (several) or LABELS (classification)


class Record(NamedTuple):
    text: str
    facts: dict  # slot or position -> value
    lower: bool = False  # all of the text in lower case, and so what is copied from it


# Inputs and answers

def slot_of(operand):
    """Slot or position that an operand reads."""
    for table in (MAPS, ATTRIBUTES):
        if operand in table:
            return table[operand][0]
    return operand


def required_slots(task):
    """Slots and positions that an input must contain for `task`."""
    return sorted({slot_of(operand) for operand in task.operands})


def make_record(rng, source, required=()):
    """Draw an input, a sentence or a list, that contains every slot and position in `required`."""
    values = {slot: rng.choice(SLOTS[slot][1]) for slot in SLOTS}
    if source == "list":
        slots = [slot for slot in required if slot in SLOTS]
        shortest = max(3, len(slots), 4 * ("fourth" in required))
        others = [slot for slot in SLOTS if slot not in slots]
        kinds = slots + rng.sample(others, rng.randint(shortest, 6) - len(slots))
        rng.shuffle(kinds)
        items = [values[kind] for kind in kinds]
        places = dict(zip(POSITIONS, items[:4])) | {"last": items[-1]}
        return Record(", ".join(items) + ".", dict(zip(kinds, items)) | places)
    template = rng.choice([t for t in TABLES["events"] if all("{%s}" % slot in t for slot in required)])

    def keep_or_drop(match):
        needed = any("{%s}" % slot in match[1] for slot in required)
        return match[1] if needed or rng.random() < 0.4 else ""

    template = " ".join(re.sub(r"\[(.*?)\]", keep_or_drop, template).split())
    template = re.sub(r" ([,.])", r"\1", template)
    present = re.findall(r"\{(\w+)\}", template)
    return Record(template.format(**values), {slot: values[slot] for slot in present})


def vary(rng, record, source):
    """The record as people type it: at times in lower case, without the full stop, with a sentence before it or more words."""
    text, lower = record.text, rng.random() < 0.15
    if source == "sentence" and rng.random() < 0.12:
        text = f"{rng.choice(TABLES['lead_ins'])} {text}"
    if source == "sentence" and rng.random() < 0.1:
        text = put_in(rng, text, rng.randint(1, 2))
    if rng.random() < 0.15:
        text = text.removesuffix(".")
    return Record(text.lower() if lower else text, record.facts, lower)


def put_in(rng, text, n):
    """The text with n words more that say nothing, anywhere."""
    parts = text.split()
    for _ in range(n):
        parts.insert(rng.randint(0, len(parts)), rng.choice(FILLERS))
    return " ".join(parts)


def value_of(operand, record):
    """What an operand refers to in a record: a word, or True/False for an attribute."""
    value = record.facts[slot_of(operand)]
    if operand in ATTRIBUTES:
        return value in ATTRIBUTES[operand][-1]
    value = MAPS[operand][-1][value] if operand in MAPS else value
    return value.lower() if record.lower else value


def answer(task, record):
    """Reference output of `task` for `record`."""
    values = [value_of(operand, record) for operand in task.operands]
    if task.form in LABELS:
        return LABELS[task.form][0 if values[0] else 1]
    if task.form in FORMATS:
        return FORMATS[task.form][0].format(x=values[0])
    return JOINERS[task.form][0].join(values)


def draw_examples(rng, task, n, varied=False):
    """Draw two demonstrations and n instances: (Record, output) pairs with distinct inputs."""
    required = required_slots(task)
    wanted, seen, examples = None, set(), []
    while len(examples) < n + 2:
        if task.form in LABELS and wanted is None:
            wanted = rng.choice(LABELS[task.form])  # labels are balanced, whatever the values
        record = make_record(rng, task.source, required)
        if varied:
            record = vary(rng, record, task.source)
        output = answer(task, record)
        if record.text in seen or wanted not in (None, output):
            continue
        wanted = None
        seen.add(record.text)
        examples.append((record, output))
    return examples[:2], examples[2:]


# Definitions

def operand_phrase(rng, operand):
    """One wording of what to find, such as 'the town'."""
    if operand in ATTRIBUTES:
        slot, said = ATTRIBUTES[operand][:2]
        return f"the {rng.choice(SLOTS[slot][0])} {said}"
    if operand in MAPS:
        return rng.choice(MAPS[operand][1])
    return rng.choice(POSITIONS[operand]) if operand in POSITIONS else f"the {rng.choice(SLOTS[operand][0])}"


def form_phrase(rng, form):
    """One wording of how to write the answer, such as 'in quotes'."""
    return rng.choice(FORMATS[form][1]) if form in FORMATS else rng.choice(JOINED).format(j=JOINERS[form][1])


def ask_class(rng, task, ask, noun):
    """One of the patterns for a classification."""
    slot, said, opposite, question, _ = ATTRIBUTES[task.operands[0]]
    the_slot = f"the {rng.choice(SLOTS[slot][0])}"
    question = question.format(s=the_slot)
    p, q = LABELS[task.form]
    if ask in TABLES["class_questions"]:
        p, q = rng.choice([(p, q), (q, p)])
    return ask.format(n=noun, c=f"{the_slot} {said}", d=f"{the_slot} {opposite}", s=question, P=p.capitalize(),
                      S=question[0].upper() + question[1:], p=p, q=q)


def core(rng, task):
    """A pattern that asks for what the task wants: one of those for its kind of operand, or one for all."""
    operand = task.operands[0]
    own = []
    if len(task.operands) == 1:
        own = TABLES["slot_cores"] if operand in SLOTS else MAPS[operand][2] if operand in MAPS else []
        if operand == "name" and rng.random() < 0.5:
            own = TABLES["name_cores"]
    return rng.choice(own if own and rng.random() < 0.3 else TABLES["cores"])


def define(rng, task, ask=None):
    """One definition of `task`: in the sentence pattern `ask`, or in one that is put together for it."""
    noun = rng.choice(TABLES["input_nouns"][task.source])
    if task.form in LABELS:
        obvious = task.form in TABLES["obvious_labels"] and rng.random() < 0.35
        text = ask_class(rng, task, ask or rng.choice(TABLES["class_questions" if obvious else "class_asks"]), noun)
    else:
        x = [operand_phrase(rng, operand) for operand in task.operands]
        x = x[0] if len(x) == 1 else rng.choice(IN_ORDER[len(x)]).format(*x)
        text = ask
        if ask is None:
            text = core(rng, task)
            if task.form != "plain" or rng.random() < 0.4:
                tails = [t for t in TABLES["tails"] if t.startswith(".")] if text.endswith("?") else TABLES["tails"]
                text = (text + rng.choice(tails)).replace("?.", "?")
            text += "" if text.endswith("?") else "."
        text = text.format(n=noun, x=x, w=rng.choice(SLOTS.get(task.operands[0], [["thing"]])[0]),
                           f=form_phrase(rng, task.form), it="it" if len(task.operands) == 1 else "them")
    if ask is None and rng.random() < 0.6:
        text = f"{rng.choice(TABLES['openings']).format(n=noun)} {text}"
    if ask is None and rng.random() < 0.12:
        text += f" {rng.choice(TABLES['closings'])}"
    return text


def roughen(rng, text, task):
    """A definition as people type it: at times in one case, without the full stop, with words that say nothing."""
    kind = rng.random()
    if kind < 0.12:
        text = text.lower()
    elif kind < 0.16 and task.form not in LABELS:
        text = text.upper()
    if rng.random() < 0.15:
        text = text.rstrip(".")
    return put_in(rng, text, rng.randint(1, 3)) if rng.random() < 0.2 else text


def definitions(rng, task, split, taken=()):
    """Distinct wordings of a task, none of those in `taken`; one per pattern where they are unseen ones."""
    if split.endswith("unseen_wording"):
        asks = TABLES["unseen_class_asks"] if task.form in LABELS else TABLES["unseen_asks"]
        return [define(rng, task, ask) for ask in rng.sample(asks, len(asks))]
    found = {}  # a dict keeps the order of drawing
    while len(found) < (TRAIN_WORDINGS if split == "train" else EVAL_WORDINGS):
        text = define(rng, task)
        text = roughen(rng, text, task) if split == "train" else text
        if text not in taken:
            found[text] = None
    return list(found)


# Which combinations there are, and which are held out

def candidates(category):
    """All tasks of a category."""
    mixed = [*itertools.product(SLOTS, MAPS), *itertools.product(MAPS, SLOTS)]
    triples = list(itertools.permutations(SLOTS, 3))
    told = [ops for ops in triples if sum(all("{%s}" % o in t for o in ops) for t in TABLES["events"]) > 1]
    source, operands, forms = {
        "Information Extraction": ("sentence", [(s,) for s in SLOTS], PHRASE_FORMATS),
        "Text Formatting": ("sentence", [(s,) for s in SLOTS], LAYOUT_FORMATS),
        "Word Mapping": ("sentence", [(m,) for m in MAPS], [form for form in FORMATS if form not in COPIES]),
        "Pair Extraction": ("sentence", list(itertools.permutations(SLOTS, 2)), JOINERS),
        "Mixed Pairs": ("sentence", mixed, JOINERS),
        "Triple Extraction": ("sentence", told, JOINERS),
        "List Selection": ("list", [(s,) for s in SLOTS], FORMATS),
        "List Pairs": ("list", list(itertools.permutations(SLOTS, 2)), JOINERS),
        "List Triples": ("list", triples, JOINERS),
        "List Positions": ("list", [(p,) for p in POSITIONS], FORMATS),
        "Position Pairs": ("list", list(itertools.permutations(POSITIONS, 2)), JOINERS),
        "Text Classification": ("sentence", [(a,) for a in ATTRIBUTES], LABELS),
        "List Classification": ("list", [(a,) for a in ATTRIBUTES], LABELS),
    }[category]
    return [Task(category, source, ops, form) for ops in operands for form in forms]


def combination(task):
    """What a task teaches: an operand in a form (labels whichever way round), or operands together, in any order and form."""
    form = frozenset(LABELS[task.form]) if task.form in LABELS else task.form
    return (task.source, frozenset(task.operands), form if len(task.operands) == 1 else None)


def parts_of(task):
    """The combinations in a task: its own, and those of two of its three operands."""
    pairs = itertools.combinations(task.operands, 2) if len(task.operands) > 2 else []
    return {combination(task), *(combination(task._replace(operands=pair)) for pair in pairs)}


def split_tasks(rng):
    """Choose the tasks: 'train', 'validation' and 'test', each a list of Task.

    No training task has the combination of a validation or test task, nor holds the pair of one.
    """
    pool = {category: candidates(category) for category in QUOTA}
    split = {"train": [], "validation": [], "test": []}
    held_out = set()
    for category, (_, n_validation, n_test) in QUOTA.items():
        rng.shuffle(pool[category])
        chosen, used = [], Counter()
        kinds = len({operand for task in pool[category] for operand in task.operands})
        for task in pool[category]:
            # Few of a kind, so that every concept keeps other training tasks, and another partner.
            most = 2 if len(task.operands) == 1 else min(4, kinds - 2)
            spread = used[task.form] < min(most, 3) and all(used[operand] < most for operand in task.operands)
            if len(chosen) < n_validation + n_test and spread and combination(task) not in held_out:
                chosen.append(task)
                held_out.add(combination(task))
                used.update([*task.operands, task.form])
        split["validation"] += chosen[:n_validation]
        split["test"] += chosen[n_validation:]
    for category, (n_train, _, _) in QUOTA.items():
        free = [task for task in pool[category][:4000] if not parts_of(task) & held_out]
        seen, pairs = Counter(), Counter()
        for _ in range(n_train):
            # The least taught operands first, then the least taught form: an even grid serves its unseen cells best.
            task = min(free, key=lambda t: (pairs[t.operands], sum(seen[o] for o in t.operands), seen[t.form]))
            free.remove(task)
            pairs[task.operands] += 1
            seen.update([*task.operands, task.form])
            split["train"].append(task)
    return split


def untestable(task):
    """Whether a task is held out of training without being a test: its kind is beyond a T5 of this size.

    On validation tasks labels whose order only the definition tells stay at chance, and new pairs of positions too.
    """
    return task.category == "Position Pairs" or task.form in LABELS and task.form not in TABLES["obvious_labels"]


# Writers

def statement(rng, operand, record):
    """A true sentence, without its full stop, about what an operand is in a record."""
    phrase, value = operand_phrase(rng, operand), value_of(operand, record)
    if operand in ATTRIBUTES:
        return f"it is {rng.choice(('true', 'right') if value else ('false', 'wrong'))} that {phrase}"
    return rng.choice((f"{phrase} is {value}", f"{value} is {phrase}"))


def wrong_example(rng, task, record, wrong_form):
    """A negative example: the right values in a wrong form, or the answer to another input."""
    right, output, why = answer(task, record), None, "it is not written in the way that is given"
    if wrong_form:
        table = next(table for table in (FORMATS, JOINERS, LABELS) if task.form in table)
        output = answer(task._replace(form=rng.choice([form for form in table if form != task.form])), record)
    while output in (None, right):
        why = f"it is the answer for another {task.source}"
        output = answer(task, make_record(rng, task.source, required_slots(task)))
    return {"input": record.text, "output": output, "explanation": f"This is wrong: {why}."}


def task_file(rng, name, task, split, taken=()):
    """The JSON object of one task, as Super-NaturalInstructions has it; taken: definitions that other tasks have."""
    train = split == "train"
    demonstrations, instances = draw_examples(rng, task, TRAIN_INSTANCES if train else EVAL_INSTANCES, train)
    return {
        "Contributors": ["sample.py"], "Source": ["synthetic"], "URL": [], "Categories": [task.category],
        "Reasoning": [], "Definition": definitions(rng, task, split, taken), "Input_language": ["English"],
        "Output_language": ["English"], "Instruction_language": ["English"], "Domains": ["Synthetic"],
        "Positive Examples": [
            {"input": record.text, "output": output,
             "explanation": "Here " + " and ".join(statement(rng, operand, record) for operand in task.operands) + "."}
            for record, output in demonstrations],
        "Negative Examples": [wrong_example(rng, task, record, i == 0) for i, (record, _) in enumerate(demonstrations)],
        "Instances": [{"id": f"{name}-{i}", "input": record.text, "output": [output]}
                      for i, (record, output) in enumerate(instances)],
        "Instance License": ["CC0"],
    }


def as_question(rng, attribute):
    slot, _, _, question, _ = ATTRIBUTES[attribute]
    question = question.format(s=f"the {rng.choice(SLOTS[slot][0])}")
    return f"{question[0].upper()}{question[1:]}?"


def fact(rng):
    """What is true of one value, such as "lion is wild." or "Is the lion wild? yes." """
    slot, said, opposite, question, holds = ATTRIBUTES[rng.choice(list(ATTRIBUTES))]
    value = rng.choice(SLOTS[slot][1])
    if rng.random() < 0.5:
        return f"{rng.choice(('', 'the '))}{value} {said if value in holds else opposite}."
    question = question.format(s=rng.choice((value, f"the {value}")))
    return f"{question[0].upper()}{question[1:]}? {'yes' if value in holds else 'no'}."


def document(rng):
    """One document of the corpus (see the top of this file)."""
    source = rng.choice(("sentence", "sentence", "list"))
    if rng.random() < 0.4:
        operand = rng.choice([*SLOTS, *MAPS, *POSITIONS] if source == "list" else [*SLOTS, *MAPS])
        records = [make_record(rng, source, {slot_of(operand)}) for _ in range(2)]
        return " ".join([f"What is {operand_phrase(rng, operand)}?",
                         *(f"{record.text} {value_of(operand, record)}." for record in records)])
    record = make_record(rng, source)
    known = [o for o in (*SLOTS, *MAPS, *ATTRIBUTES, *POSITIONS) if slot_of(o) in record.facts]
    asked, told = [], []
    for operand in rng.sample(known, min(len(known), rng.randint(2, 4))):
        question, reply = f"What is {operand_phrase(rng, operand)}?", f"{value_of(operand, record)}."
        if operand in ATTRIBUTES and rng.random() < 0.5:
            told.append(f"{as_question(rng, operand)} {'yes' if value_of(operand, record) else 'no'}.")
        elif operand in ATTRIBUTES or rng.random() < 0.5:
            told.append(f"Here {statement(rng, operand, record)}.")
        elif asked:
            told.append(f"{question} {reply}")
        else:
            asked.append(question)
            told.insert(0, reply)
    form, words = rng.choice(list(FORMATS)), [rng.choice(SLOTS[slot][1]) for slot in rng.sample(list(SLOTS), 2)]
    joiner = rng.choice(list(JOINERS))
    gloss = rng.choice(GLOSSES).format(
        v=words[0], w=words[1], f=form_phrase(rng, form), v_f=FORMATS[form][0].format(x=words[0]),
        joined=form_phrase(rng, joiner), v_w=JOINERS[joiner][0].join(words))
    if rng.random() < 0.5:
        gloss = fact(rng)
    # One question at most comes before the text: several, answered in order, would be the pair tasks in disguise.
    text = " ".join([*([gloss] if rng.random() < 0.7 else []), *asked, record.text, *told])
    return text.lower() if rng.random() < 0.1 else text


# The tokenizer

SUFFIXES = r"(?i:n't\b|'(?:s|d|ll|re|ve|m)\b)"  # of contractions: pieces of their own
APART = SUFFIXES + r"|[^\w\s]"  # what is a piece wherever it stands
# The spaces that a text does not have around its pieces, when they are joined again.
NO_SPACE = r""" (?=[.,:;?!)\]]|n't\b|'(?:s|d|ll|re|ve|m)\b)|(?<=[(\[]) |(?<=^["*]) | (?=["*]$)"""


def strings(table):
    """All texts in a table of tables."""
    if isinstance(table, str):
        return [table]
    return [text for part in (table.items() if isinstance(table, dict) else table) for text in strings(part)]


def pieces_of(texts):
    """The words and signs of these texts, once each, without the names in braces."""
    return list(dict.fromkeys(piece for text in texts
                              for piece in re.findall(rf"{SUFFIXES}|(?:(?!n't\b)\w)+|[^\w\s]", re.sub(r"\{\w*\}", " ", text))))


def vocabulary():
    """<pad>, </s>, <unk>, then the words and signs of the tables: each word in lower case and with a capital, and those of
    definitions in capitals too."""
    own = strings([TABLES[key] for key in TABLES if key not in ("function_words", "quota")])
    asked = strings([ASKING, [TABLES[key] for key in TABLES if key not in ("slots", "maps", "attributes", "events", "quota")]])
    more = [PROMPT, "What is? Here it is true right false wrong that and. This is wrong: it is not written in the way that is "
            "given. the answer for another sentence list I'll I'd you're I've I'm it's don't ca wo ' / ( ) ; = + !"]
    pieces = ["<pad>", "</s>", "<unk>"]
    for word in pieces_of(own + more + [TABLES["function_words"]]):
        pieces += [word, word.lower(), word.capitalize()]
    pieces += [word.upper() for word in pieces_of(asked)]
    return list(dict.fromkeys(pieces))


# What definitions say of slots, mappings and attributes.
ASKING = [[nouns for nouns, _ in SLOTS.values()], [row[1:3] for row in MAPS.values()], [row[1:4] for row in ATTRIBUTES.values()]]
# Words that can stand anywhere in a definition without changing what it asks for.
FILLERS = [word for word in pieces_of([TABLES["function_words"]]) if word not in pieces_of(strings(
    [ASKING, [TABLES[key] for key in ("positions", "phrase_formats", "layout_formats", "joiners", "joined", "labels", "in_order",
                                      "in_order_of_three", "class_asks")], "no not nor none never nothing"]))]


def write_tokenizer(path):
    """Save the vocabulary as a tokenizer that AutoTokenizer reads; returns its number of pieces."""
    from tokenizers import Regex, Tokenizer, decoders, normalizers, pre_tokenizers, processors
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    pieces = vocabulary()
    tokenizer = Tokenizer(WordLevel({piece: n for n, piece in enumerate(pieces)}, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Replace(Regex("[’‘]"), "'"), normalizers.Replace(Regex("[“”]"), '"')])
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Split(Regex(APART), "isolated")])
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    tokenizer.decoder = decoders.Sequence(
        [decoders.WordPiece("##", cleanup=False), decoders.Fuse(), decoders.Replace(Regex(NO_SPACE), "")])
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>",
                            clean_up_tokenization_spaces=False).save_pretrained(path)
    return len(pieces)


def write_suite(root, seed=0):
    """Write the whole benchmark under the folder `root`, replacing what is there.

    `seed` decides which combinations are held out, the instances and the wordings.
    Raises RuntimeError if two tasks share a definition.
    """
    rng = random.Random(seed)
    root = os.path.normpath(os.fspath(root))
    tmp = root + ".tmp"
    shutil.rmtree(tmp, ignore_errors=True)
    os.makedirs(os.path.join(tmp, "tasks"))
    os.makedirs(os.path.join(tmp, "splits", "default"))

    def write(path, text):
        with open(os.path.join(tmp, path), "w", encoding="utf-8") as f:
            f.write(text)

    chosen = [(split, task) for split, tasks in split_tasks(rng).items() for task in tasks]
    rng.shuffle(chosen)  # a task's number tells nothing about its split or category
    names = {split: [] for split in ("train", "validation", "test", "validation_unseen_wording", "test_unseen_wording")}
    owner = {}  # definition -> name of its task
    for number, (split, task) in enumerate(chosen, 1):
        name = f"task{number:04d}_{'_'.join((task.source, *task.operands, task.form))}"
        entry = task_file(rng, name, task, split, owner)
        versions = [(split, name, entry)]
        if split != "train":
            unseen = f"{split}_unseen_wording"
            versions.append((unseen, name + "_reworded", {**entry, "Definition": definitions(rng, task, unseen)}))
        for _, name, entry in versions:
            for definition in entry["Definition"]:
                if owner.setdefault(definition, name) != name:
                    raise RuntimeError(f"{name} and {owner[definition]} share a definition: {definition}")
        if split != "train" and untestable(task):
            continue
        for part, name, entry in versions:
            names[part].append(name)
            write(f"tasks/{name}.json", json.dumps(entry, indent=1) + "\n")
    for part, listed in names.items():
        write(f"splits/default/{part}_tasks.txt", "".join(name + "\n" for name in listed))

    documents = [document(rng) for _ in range(DOCUMENTS)]
    write("corpus.txt", "".join(line + "\n" for line in documents))
    pieces = write_tokenizer(os.path.join(tmp, "tokenizer"))

    shutil.rmtree(root, ignore_errors=True)
    os.replace(tmp, root)
    counts = ", ".join(f"{len(listed)} {part}" for part, listed in names.items())
    print(f"{root}: {counts} tasks, {len(documents)} documents, {pieces} pieces (seed {seed})")
def main():
    parser = argparse.ArgumentParser(description="Write the built-in benchmark suite.")
    parser.add_argument("--out", default="data/sample", help="folder to write; replaced if it exists")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    write_suite(args.out, args.seed)


if __name__ == "__main__":
    main()
