"""Write the built-in benchmark: tasks in Super-NaturalInstructions' layout, plain text, and a tokenizer.

Everything is made from the small tables of assets/suite.yaml and follows from one seed. A task is a combination of
concepts (which slots to find, how to write them); validation and test tasks are combinations that no training
task contains, so solving them means reading the definition.

    python sample.py --out data/sample --seed 0

Files under --out:
    tasks/*.json                 one task a file, keys as in Super-NaturalInstructions
    splits/default/*_tasks.txt   train, validation, test, and test_unseen_wording: the test tasks again,
                                 defined in sentence patterns that no other task uses
    corpus.txt                   one document a line. Most hold an event or a list, statements and
                                 questions about it with their answers, and glosses ("red twice is red
                                 red ."); two in five put one question to two events or lists in turn.
                                 Made by the generators of the task inputs and with the words of the
                                 definitions, so it suits the tasks far better than web text would: a
                                 question before a text, answered behind it by a bare word, is close to
                                 the tasks that ask for one word alone, held-out ones too. No more than
                                 that: only one question stands before a text, so no ordered pair of
                                 things in it is asked for, and glosses are about words drawn at random.
    tokenizer/                   SentencePiece unigram model of these words, as a Transformers T5 tokenizer
"""
import argparse
import io
import itertools
import json
import os
import random
import re
import shutil
from collections import Counter
from typing import NamedTuple

import yaml

# One record, shortened (--seed 0, tasks/task061_sentence_colour_city_plus.json):
# {"Categories": ["Pair Extraction"],
#  "Definition": ["You will read a text . Please tell us first the colour , followed by the town . Give them joined ...", ...],
#  "Positive Examples": [{"input": "With a horse and a black table , David came to Berlin by car on Tuesday .",
#                         "output": "black plus Berlin",
#                         "explanation": "Here the shade is black and Berlin is the city ."}, ...],
#  "Negative Examples": [...],
#  "Instances": [{"id": "task061_sentence_colour_city_plus-0",
#                 "input": "The blue tram left Boston with Mark and a dog .", "output": ["blue plus Boston"]}, ...]}

# Tables; assets/suite.yaml explains each.

with open(os.path.join(os.path.dirname(__file__), "assets", "suite.yaml"), encoding="utf-8") as f:
    TABLES = yaml.safe_load(f)

SLOTS = {slot: (nouns.split(), values.split()) for slot, (nouns, values) in TABLES["slots"].items()}
MAPS = {m: (slot, phrases, dict(zip(SLOTS[slot][1], images.split())))  # the last: value -> image
        for m, (slot, phrases, images) in TABLES["maps"].items()}
ATTRIBUTES = {a: (slot, said, values.split()) for a, (slot, said, values) in TABLES["attributes"].items()}
LABELS, QUOTA = TABLES["labels"], TABLES["quota"]
PHRASE_FORMATS, LAYOUT_FORMATS = TABLES["phrase_formats"], TABLES["layout_formats"]
FORMATS = {**PHRASE_FORMATS, **LAYOUT_FORMATS}
COPIES = ("twice", "thrice")
JOINERS, JOINED, IN_ORDER = TABLES["joiners"], TABLES["joined"], TABLES["in_order"]
EVENTS, INPUT_NOUNS, OPENINGS = TABLES["events"], TABLES["input_nouns"], TABLES["openings"]
ASKS, CLASS_ASKS = TABLES["asks"], TABLES["class_asks"]
UNSEEN_ASKS, UNSEEN_CLASS_ASKS = TABLES["unseen_asks"], TABLES["unseen_class_asks"]
GLOSSES = TABLES["form_glosses"] * 3 + TABLES["word_glosses"]

TRAIN_INSTANCES, EVAL_INSTANCES, PARAPHRASES, DOCUMENTS, EXTRA_IDS = 50, 25, 10, 12000, 20
# What the usual SNI prompt adds around a task's text.
PROMPT = "Definition: Input: Output: Explanation: Positive Negative Example 1 2 3 - Now complete the following example -"


class Task(NamedTuple):
    category: str
    source: str  # what the input is: 'sentence' or 'list'
    operands: tuple  # what to find, in order: slots, mappings, or one attribute
    form: str  # key of FORMATS (one operand), JOINERS (several) or LABELS (classification)


class Record(NamedTuple):
    text: str
    facts: dict  # slot -> value


# Inputs and answers

def slot_of(operand):
    """Slot that an operand reads."""
    for table in (MAPS, ATTRIBUTES):
        if operand in table:
            return table[operand][0]
    return operand


def required_slots(task):
    """Slots that an input must contain for `task`."""
    return sorted({slot_of(operand) for operand in task.operands})


def make_record(rng, source, required=()):
    """Draw an input, a sentence or a list, that contains every slot in `required`."""
    values = {slot: rng.choice(SLOTS[slot][1]) for slot in SLOTS}
    if source == "list":
        others = [slot for slot in SLOTS if slot not in required]
        kinds = list(required) + rng.sample(others, rng.randint(3, 5) - len(required))
        rng.shuffle(kinds)
        return Record(" , ".join(values[kind] for kind in kinds) + " .", {kind: values[kind] for kind in kinds})
    template = rng.choice([t for t in EVENTS if all("{%s}" % slot in t for slot in required)])

    def keep_or_drop(match):
        needed = any("{%s}" % slot in match[1] for slot in required)
        return match[1] if needed or rng.random() < 0.4 else ""

    template = " ".join(re.sub(r"\[(.*?)\]", keep_or_drop, template).split())
    present = re.findall(r"\{(\w+)\}", template)
    return Record(template.format(**values), {slot: values[slot] for slot in present})


def value_of(operand, record):
    """What an operand refers to in a record: a word, or True/False for an attribute."""
    value = record.facts[slot_of(operand)]
    if operand in ATTRIBUTES:
        return value in ATTRIBUTES[operand][2]
    return MAPS[operand][2][value] if operand in MAPS else value


def answer(task, record):
    """Reference output of `task` for `record`."""
    values = [value_of(operand, record) for operand in task.operands]
    if task.form in LABELS:
        return LABELS[task.form][0 if values[0] else 1]
    if task.form in FORMATS:
        return FORMATS[task.form][0].format(x=values[0])
    return f" {JOINERS[task.form][0]} ".join(values)


def draw_examples(rng, task, n):
    """Draw two demonstrations and n instances: (Record, output) pairs with distinct inputs."""
    required = required_slots(task)
    wanted, seen, examples = None, set(), []
    while len(examples) < n + 2:
        if task.form in LABELS and wanted is None:
            wanted = rng.choice(LABELS[task.form])  # labels are balanced, whatever the values
        record = make_record(rng, task.source, required)
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
        slot, said, _ = ATTRIBUTES[operand]
        return f"the {rng.choice(SLOTS[slot][0])} {said}"
    return rng.choice(MAPS[operand][1]) if operand in MAPS else f"the {rng.choice(SLOTS[operand][0])}"


def form_phrase(rng, form):
    """One wording of how to write the answer, such as 'in quotes'."""
    return rng.choice(FORMATS[form][1]) if form in FORMATS else rng.choice(JOINED).format(j=JOINERS[form][1])


def define(rng, task, ask):
    """Fill one sentence pattern for `task`."""
    noun = rng.choice(INPUT_NOUNS[task.source])
    phrases = [operand_phrase(rng, operand) for operand in task.operands]
    if task.form in LABELS:
        return ask.format(n=noun, c=phrases[0], p=LABELS[task.form][0], q=LABELS[task.form][1])
    if len(phrases) > 1:
        phrases = [rng.choice(IN_ORDER).format(*phrases)]
    it = "it" if len(task.operands) == 1 else "them"
    return ask.format(n=noun, x=phrases[0], f=form_phrase(rng, task.form), it=it)


def definitions(rng, task, unseen=False):
    """Distinct wordings of a task: PARAPHRASES from the training patterns, or one per unseen pattern."""
    if unseen:
        asks = UNSEEN_CLASS_ASKS if task.form in LABELS else UNSEEN_ASKS
        return [define(rng, task, ask) for ask in rng.sample(asks, len(asks))]
    found = {}  # a dict keeps the order of drawing
    while len(found) < PARAPHRASES:
        ask = rng.choice(CLASS_ASKS if task.form in LABELS else ASKS)
        found[define(rng, task, f"{rng.choice(OPENINGS)} {ask}")] = None
    return list(found)


# Which combinations there are, and which are held out

def candidates(category):
    """All tasks of a category."""
    mixed = [*itertools.product(SLOTS, MAPS), *itertools.product(MAPS, SLOTS)]
    source, operands, forms = {
        "Information Extraction": ("sentence", [(s,) for s in SLOTS], PHRASE_FORMATS),
        "Text Formatting": ("sentence", [(s,) for s in SLOTS], LAYOUT_FORMATS),
        "Word Mapping": ("sentence", [(m,) for m in MAPS], [form for form in FORMATS if form not in COPIES]),
        "Pair Extraction": ("sentence", list(itertools.permutations(SLOTS, 2)), JOINERS),
        "Mixed Pairs": ("sentence", mixed, JOINERS),
        "List Selection": ("list", [(s,) for s in SLOTS], FORMATS),
        "List Pairs": ("list", list(itertools.permutations(SLOTS, 2)), JOINERS),
        "Text Classification": ("sentence", [(a,) for a in ATTRIBUTES], LABELS),
    }[category]
    return [Task(category, source, ops, form) for ops in operands for form in forms]


def combination(task):
    """What a task teaches: an operand in a form, or two operands together, in either order and any form."""
    return (task.source, frozenset(task.operands), task.form if len(task.operands) == 1 else None)


def split_tasks(rng):
    """Choose the tasks: 'train', 'validation' and 'test', each a list of Task.

    No training task has the combination of a validation or test task.
    """
    pool = {category: candidates(category) for category in QUOTA}
    split = {"train": [], "validation": [], "test": []}
    held_out = set()
    for category, (_, n_validation, n_test) in QUOTA.items():
        rng.shuffle(pool[category])
        chosen, used = [], Counter()
        for task in pool[category]:
            # Few of a kind, so that every concept keeps many other training tasks.
            most = 2 if len(task.operands) == 1 else 4
            spread = used[task.form] < min(most, 3) and all(used[operand] < most for operand in task.operands)
            if len(chosen) < n_validation + n_test and spread and combination(task) not in held_out:
                chosen.append(task)
                held_out.add(combination(task))
                used.update([*task.operands, task.form])
        split["validation"] += chosen[:n_validation]
        split["test"] += chosen[n_validation:]
    for category, (n_train, _, _) in QUOTA.items():
        free = [task for task in pool[category] if combination(task) not in held_out]
        seen = Counter()
        for _ in range(n_train):
            # The least taught operands first, then the least taught form: an even grid serves its unseen cells best.
            task = min(free, key=lambda t: (seen[t.operands], seen[t.form]))
            free.remove(task)
            seen.update([task.operands, task.form])
            split["train"].append(task)
    return split


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
    return {"input": record.text, "output": output, "explanation": f"This is wrong : {why} ."}


def task_file(rng, name, task, n):
    """The JSON object of one task, as Super-NaturalInstructions has it."""
    demonstrations, instances = draw_examples(rng, task, n)
    return {
        "Contributors": ["sample.py"], "Source": ["synthetic"], "URL": [], "Categories": [task.category],
        "Reasoning": [], "Definition": definitions(rng, task), "Input_language": ["English"],
        "Output_language": ["English"], "Instruction_language": ["English"], "Domains": ["Synthetic"],
        "Positive Examples": [
            {"input": record.text, "output": output,
             "explanation": "Here " + " and ".join(statement(rng, operand, record) for operand in task.operands) + " ."}
            for record, output in demonstrations],
        "Negative Examples": [wrong_example(rng, task, record, i == 0) for i, (record, _) in enumerate(demonstrations)],
        "Instances": [{"id": f"{name}-{i}", "input": record.text, "output": [output]}
                      for i, (record, output) in enumerate(instances)],
        "Instance License": ["CC0"],
    }


def document(rng):
    """One document of the corpus (see the top of this file)."""
    source = rng.choice(("sentence", "sentence", "list"))
    if rng.random() < 0.4:
        operand = rng.choice([*SLOTS, *MAPS])
        records = [make_record(rng, source, {slot_of(operand)}) for _ in range(2)]
        return " ".join([f"What is {operand_phrase(rng, operand)} ?",
                         *(f"{record.text} {value_of(operand, record)} ." for record in records)])
    record = make_record(rng, source)
    known = [o for o in (*SLOTS, *MAPS, *ATTRIBUTES) if slot_of(o) in record.facts]
    asked, told = [], []
    for operand in rng.sample(known, min(len(known), rng.randint(2, 4))):
        question, reply = f"What is {operand_phrase(rng, operand)} ?", f"{value_of(operand, record)} ."
        if operand in ATTRIBUTES or rng.random() < 0.5:
            told.append(f"Here {statement(rng, operand, record)} .")
        elif asked:
            told.append(f"{question} {reply}")
        else:
            asked.append(question)
            told.insert(0, reply)
    form, words = rng.choice(list(FORMATS)), [rng.choice(SLOTS[slot][1]) for slot in rng.sample(list(SLOTS), 2)]
    joiner = rng.choice(list(JOINERS))
    gloss = rng.choice(GLOSSES).format(
        v=words[0], w=words[1], f=form_phrase(rng, form), v_f=FORMATS[form][0].format(x=words[0]),
        joined=form_phrase(rng, joiner), v_w=f" {JOINERS[joiner][0]} ".join(words))
    # One question at most comes before the text: several, answered in order, would be the pair tasks in disguise.
    return " ".join([*([gloss] if rng.random() < 0.5 else []), *asked, record.text, *told])


def write_tokenizer(path, texts):
    """Train SentencePiece on `texts` and save it as a Transformers T5 tokenizer: pad 0, </s> 1, <unk> 2.

    Returns its number of pieces. Raises RuntimeError if a word of `texts` did not become one piece.
    """
    import sentencepiece
    from transformers import T5Tokenizer

    words = {word for text in texts for word in text.split()}
    characters = {c for word in words for c in word}
    # Given real frequencies the trainer splits rare words, so all weigh the same. It only considers strings seen
    # in two surroundings, so each word also comes with a full stop (as prompts put one); "." alone must outweigh those.
    lines = [line for word in sorted(words) for line in [word] * 200 + [word + "."] * 5] + ["."] * 20000
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines), model_writer=model, model_type="unigram",
        vocab_size=len(words) + len(characters) + 4, hard_vocab_limit=False, character_coverage=1.0,
        normalization_rule_name="identity", split_by_unicode_script=False, split_by_number=False,
        pad_id=0, eos_id=1, unk_id=2, bos_id=-1, num_threads=1, minloglevel=2)
    pieces = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
    split = [word for word in words if len(pieces.encode(word)) != 1]
    if split:
        raise RuntimeError(f"the tokenizer splits {len(split)} words, such as {split[:5]}")
    # T5Tokenizer(vocab_file=...) ignores the file's pieces without a word, so they are passed one by one.
    vocab = [(pieces.id_to_piece(i), pieces.get_score(i)) for i in range(pieces.get_piece_size())]
    vocab += [(f"<extra_id_{i}>", 0.0) for i in reversed(range(EXTRA_IDS))]
    tokenizer = T5Tokenizer(vocab=vocab, extra_ids=EXTRA_IDS, clean_up_tokenization_spaces=False)
    tokenizer.save_pretrained(path)
    with open(os.path.join(path, "spiece.model"), "wb") as f:
        f.write(model.getvalue())
    return len(tokenizer)


def write_suite(root, seed=0):
    """Write the whole benchmark under the folder `root`, replacing what is there.

    `seed` decides which combinations are held out, the instances and the wordings.
    Raises RuntimeError if two tasks share a definition, or the tokenizer splits a word.
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
    names = {"train": [], "validation": [], "test": [], "test_unseen_wording": []}
    owner, texts = {}, [PROMPT]  # definition -> name of its task
    for number, (split, task) in enumerate(chosen, 1):
        name = f"task{number:03d}_{'_'.join((task.source, *task.operands, task.form))}"
        entry = task_file(rng, name, task, TRAIN_INSTANCES if split == "train" else EVAL_INSTANCES)
        versions = [(split, name, entry)]
        if split == "test":
            reworded = {**entry, "Definition": definitions(rng, task, unseen=True)}
            versions.append(("test_unseen_wording", name + "_reworded", reworded))
        for part, name, entry in versions:
            names[part].append(name)
            for definition in entry["Definition"]:
                if owner.setdefault(definition, name) != name:
                    raise RuntimeError(f"{name} and {owner[definition]} share a definition: {definition}")
            write(f"tasks/{name}.json", json.dumps(entry, indent=1) + "\n")
        if split == "train":
            examples = entry["Positive Examples"] + entry["Negative Examples"]
            texts += entry["Definition"] + [e[key] for e in examples for key in e]
            texts += [text for instance in entry["Instances"] for text in (instance["input"], *instance["output"])]
    for part, listed in names.items():
        write(f"splits/default/{part}_tasks.txt", "".join(name + "\n" for name in listed))

    documents = [document(rng) for _ in range(DOCUMENTS)]
    write("corpus.txt", "".join(line + "\n" for line in documents))
    pieces = write_tokenizer(os.path.join(tmp, "tokenizer"), texts + documents)

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
