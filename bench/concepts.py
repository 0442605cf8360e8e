"""The built-in suite's words, its inputs and their answers, and its tokenizer.

Everything comes from suite.yaml. A task of the suite asks for operands of an input, in a form:

    In Oslo a sheep ate the jam of Lucy the teacher on Friday.    operands: job, day; form: plus
    -> teacher plus Friday
"""
import itertools
import json
import re
from pathlib import Path
from typing import NamedTuple

import yaml

# ------------------------------------------------------------------------------ words and tokenizer

with open(Path(__file__).with_name("suite.yaml"), encoding="utf-8") as f:
    # Words, then what is made of them. The C loader is ten times faster.
    TABLES, SPECS = yaml.load_all(f, getattr(yaml, "CSafeLoader", yaml.SafeLoader))

SLOTS = {slot: (nouns.split(), values.split()) for slot, (nouns, values) in TABLES["slots"].items()}
MAPS, ATTRIBUTES, POSITIONS = TABLES["maps"], TABLES["attributes"], TABLES["positions"]
BRACES = re.compile(r"\{(\w*)\}")  # around the name of what is filled in
EVENTS = {event: set(BRACES.findall(event)) for event in TABLES["events"]}  # event -> its slots
PIECE = re.compile(SPECS["apart"] + r"|(?:(?!n't\b)\w)+")


def strings(table):
    """Return all texts in a table of tables, its keys too."""
    if isinstance(table, str):
        return [table]
    parts = table.items() if isinstance(table, dict) else table
    return list(itertools.chain(*map(strings, parts)))


def pieces_of(texts):
    """Return the words and signs of these texts, once each, without the names in braces."""
    return list(dict.fromkeys(PIECE.findall(BRACES.sub(" ", "\n".join(texts)))))


# What definitions say of slots, mappings and attributes.
ASKED = [[nouns for nouns, _ in SLOTS.values()], [row[1:3] for row in MAPS.values()],
         [row[1:4] for row in ATTRIBUTES.values()]]
# Words that can stand anywhere in a definition without changing what it asks for.
TELLING = pieces_of(strings([ASKED, [TABLES[key] for key in SPECS["telling"]]]))
FILLERS = [word for word in pieces_of([TABLES["function_words"]]) if word not in TELLING]


def vocabulary():
    """Return all pieces: three special ones, then the words and signs of the tables.

    Each word also in lower case and with a capital, and those of definitions in capitals.
    """
    pieces = ["<pad>", "</s>", "<unk>"]
    for word in pieces_of(strings([*TABLES.values()])):
        pieces += [word, word.lower(), word.capitalize()]
    tables = [TABLES[key] for key in TABLES if key not in SPECS["not_in_definitions"]]
    pieces += [word.upper() for word in pieces_of(strings([ASKED, tables]))]
    return list(dict.fromkeys(pieces))


def write(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


def write_tokenizer(folder):
    """Write a tokenizer that AutoTokenizer reads; returns its number of pieces."""
    ids = {piece: n for n, piece in enumerate(vocabulary())}
    model = SPECS["tokenizer"]["model"] | {"vocab": ids}
    tokenizer = SPECS["tokenizer"] | {"model": model}
    write(folder / "tokenizer.json", json.dumps(tokenizer, indent=2, ensure_ascii=False))
    write(folder / "tokenizer_config.json", json.dumps(SPECS["tokenizer_config"], indent=2) + "\n")
    return len(ids)


# ------------------------------------------------------------------------------ inputs, answers

class Operand(NamedTuple):
    """What tasks ask for: a slot, a mapping or an attribute of a slot's value, or a position."""
    slot: str  # the slot or position that it reads
    phrases: list  # what definitions call it
    images: dict  # value that it reads -> value asked for, where that is another
    cores: list  # patterns that ask for it alone

    def phrase(self, rng):
        return rng.choice(self.phrases)


OPERANDS = {position: Operand(position, phrases, {}, []) for position, phrases in POSITIONS.items()}
for slot, (nouns, _) in SLOTS.items():
    OPERANDS[slot] = Operand(slot, [f"the {noun}" for noun in nouns], {}, TABLES["slot_cores"])
for name, (slot, phrases, questions, images) in MAPS.items():
    images = dict(zip(SLOTS[slot][1], images.split()))
    OPERANDS[name] = Operand(slot, phrases, images, questions)
for name, (slot, said, _, _, holding) in ATTRIBUTES.items():
    phrases = [f"{phrase} {said}" for phrase in OPERANDS[slot].phrases]
    images = {value: value in holding.split() for value in SLOTS[slot][1]}
    OPERANDS[name] = Operand(slot, phrases, images, [])

# Forms of one operand, of several, and of an attribute.
FORMATS = TABLES["phrase_formats"] | TABLES["layout_formats"] | TABLES["copies"]
JOINERS = {}  # form -> what stands between answers, what definitions say
for form, (between, sign) in TABLES["joiners"].items():
    JOINERS[form] = (between, [joined.format(j=sign) for joined in TABLES["joined"]])
LABELS = dict(TABLES["obvious_labels"])  # form -> label where the attribute holds, and where not
for one, other in TABLES["labels"].values():
    LABELS |= {f"{one}_{other}": [one, other], f"{other}_{one}": [other, one]}


class Task(NamedTuple):
    category: str
    source: str  # what the input is: 'sentence' or 'list'
    operands: tuple  # what to find, in order
    form: str  # key of FORMATS (one operand), JOINERS (several) or LABELS (an attribute)


class Record(NamedTuple):
    text: str
    facts: dict  # slot or position -> value
    lower: bool = False  # all of the text in lower case, and so what is copied from it


def make_record(rng, source, operands=()):
    """Draw an input, a sentence or a list, that contains what these operands read."""
    required = sorted({OPERANDS[operand].slot for operand in operands})
    values = {slot: rng.choice(choices) for slot, (_, choices) in SLOTS.items()}
    if source == "list":
        slots = [slot for slot in required if slot in SLOTS]
        others = [slot for slot in SLOTS if slot not in slots]
        length = rng.randint(4 if "fourth" in required else 3, 6)
        slots += rng.sample(others, length - len(slots))
        rng.shuffle(slots)
        items = [values[slot] for slot in slots]
        facts = dict(zip(slots, items)) | dict(zip(POSITIONS, items[:4])) | {"last": items[-1]}
        return Record(", ".join(items) + ".", facts)
    event = rng.choice([event for event in EVENTS if EVENTS[event].issuperset(required)])
    for part in re.findall(r"\[.*?\]", event):
        needed = not set(required).isdisjoint(BRACES.findall(part))
        event = event.replace(part, part[1:-1] if needed or rng.random() < 0.4 else "")
    return Record(event.format(**values), {slot: values[slot] for slot in BRACES.findall(event)})


def put_in(rng, text, n):
    """Return the text with n words more that say nothing, anywhere."""
    parts = text.split()
    for _ in range(n):
        parts.insert(rng.randint(0, len(parts)), rng.choice(FILLERS))
    return " ".join(parts)


def vary(rng, record, source):
    """Return the record as people type it: in lower case, with no full stop, with more words."""
    text = record.text
    lower = rng.random() < 0.15
    if source == "sentence" and rng.random() < 0.12:
        text = f"{rng.choice(TABLES['lead_ins'])} {text}"
    if source == "sentence" and rng.random() < 0.1:
        text = put_in(rng, text, rng.randint(1, 2))
    if rng.random() < 0.15:
        text = text.removesuffix(".")
    return Record(text.lower() if lower else text, record.facts, lower)


def value_of(operand, record):
    """Return what an operand refers to in a record: a word, or True/False for an attribute."""
    read = record.facts[OPERANDS[operand].slot]
    value = OPERANDS[operand].images.get(read, read)
    return value.lower() if record.lower and operand not in ATTRIBUTES else value


def answer(task, record):
    """Return the reference output of `task` for `record`."""
    values = [value_of(operand, record) for operand in task.operands]
    if task.form in LABELS:
        return LABELS[task.form][0 if values[0] else 1]
    if task.form in JOINERS:
        return JOINERS[task.form][0].join(values)
    return FORMATS[task.form][0].format(x=values[0])


def draw_examples(rng, task, n, varied=False):
    """Draw two demonstrations and n instances: (Record, output) pairs with distinct inputs."""
    examples = {}  # input -> Record, output
    while len(examples) < n + 2:
        # Labels are balanced, whatever the values.
        wanted = rng.choice(LABELS[task.form]) if task.form in LABELS else None
        record = output = None
        while record is None or record.text in examples or wanted not in (None, output):
            record = make_record(rng, task.source, task.operands)
            if varied:
                record = vary(rng, record, task.source)
            output = answer(task, record)
        examples[record.text] = (record, output)
    examples = list(examples.values())
    return examples[:2], examples[2:]
