"""Write the built-in benchmark: tasks in Super-NaturalInstructions' layout, plain text, and a tokenizer.

Everything is made from the small tables below and follows from one seed. A task is a combination of
concepts (which slots to find, how to write them); validation and test tasks are combinations that no
training task contains, so solving them means reading the definition.

    python sample.py --out data/sample --seed 0

Files under --out:
    tasks/*.json                 one task a file, keys as in Super-NaturalInstructions
    splits/default/*_tasks.txt   train, validation, test, and test_unseen_wording: the test tasks again,
                                 defined in sentence patterns that no other task uses
    corpus.txt                   one document a line. Each holds an event or a list, statements and
                                 questions about it with their answers, and glosses ("red twice is red
                                 red ."). Made by the generators of the task inputs and with the words
                                 of the definitions, so it suits the tasks far better than web text
                                 would: a question before a text, answered behind it by a bare word, is
                                 close to the tasks that ask for one word alone, held-out ones too. No
                                 more than that: only one question stands before a text, so no ordered
                                 pair is asked for, and glosses are about words drawn at random.
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

# One record, shortened (--seed 0, tasks/task044_sentence_city_food_plus.json):
# {"Categories": ["Pair Extraction"],
#  "Definition": ["Look at the text . Write the city and then the meal joined by the word plus .", ...],
#  "Positive Examples": [{"input": "A clerk named Lucy paid twelve coins for pasta and a table in Tokyo .",
#                         "output": "Tokyo plus pasta", "explanation": "Here the town is Tokyo and pasta is the food ."}, ...],
#  "Negative Examples": [...],
#  "Instances": [{"id": "task044_sentence_city_food_plus-0",
#                 "input": "A nurse named Anna paid seven coins for candy and a bag in Cairo .",
#                 "output": ["Cairo plus candy"]}, ...]}

# Tables. Every word is one piece of the vocabulary, punctuation stands apart.

SLOTS = {  # slot: (what definitions call it, its values)
    "name": ("name person", "Anna Maria Clara Julia Emma Nora Lucy Peter David Simon Oscar Tom Paul Mark"),
    "city": ("city town", "Paris Rome Madrid Berlin Oslo Athens Cairo Tokyo Lima Delhi Boston Nairobi"),
    "day": ("day weekday", "Monday Tuesday Wednesday Thursday Friday Saturday Sunday"),
    "animal": ("animal beast", "dog cat cow horse sheep pig lion wolf bear frog deer hare"),
    "colour": ("colour shade", "red blue green black white brown yellow pink grey purple"),
    "object": ("object thing", "lamp chair table book clock mirror bag hat cup phone drum knife"),
    "number": ("number count", "two three four five six seven eight nine ten eleven twelve"),
    "job": ("job trade", "baker doctor teacher farmer judge waiter nurse pilot sailor chef miner clerk"),
    "vehicle": ("vehicle transport", "car bus truck bike train tram boat ferry ship canoe balloon glider"),
    "food": ("food meal", "cake honey jam candy chocolate pie bread soup cheese rice fish pasta"),
}
SLOTS = {slot: (nouns.split(), values.split()) for slot, (nouns, values) in SLOTS.items()}

MAPS = {  # mapping: (slot it reads, what definitions call it, images in the order of the slot's values)
    "country": ("city", ("the country of the city", "the country where the town lies"),
                "France Italy Spain Germany Norway Greece Egypt Japan Peru India America Kenya"),
    "language": ("city", ("the language of the city", "the language spoken in the town"),
                "French Italian Spanish German Norwegian Greek Arabic Japanese Spanish Hindi English Swahili"),
    "next_day": ("day", ("the day after the given day", "the weekday that comes next"),
                "Tuesday Wednesday Thursday Friday Saturday Sunday Monday"),
    "previous_day": ("day", ("the day before the given day", "the weekday that came before"),
                "Sunday Monday Tuesday Wednesday Thursday Friday Saturday"),
    "next_number": ("number", ("the number plus one", "the count plus one"),
                "three four five six seven eight nine ten eleven twelve thirteen"),
    "digits": ("number", ("the number in digits", "the count in digits"),
                "2 3 4 5 6 7 8 9 10 11 12"),
    "young": ("animal", ("the young of the animal", "the baby of the beast"),
                "puppy kitten calf foal lamb piglet cub pup cub tadpole fawn leveret"),
    "sound": ("animal", ("the sound of the animal", "the noise of the beast"),
                "barks meows moos neighs bleats grunts roars howls growls croaks bellows squeaks"),
    "workplace": ("job", ("the workplace of the job", "the place of the trade"),
                "bakery hospital school farm court diner clinic airport harbour kitchen mine office"),
    "way": ("vehicle", ("the way of the vehicle", "the way used by the transport"),
                "road road road road rail rail water water water water air air"),
}
MAPS = {m: (slot, phrases, dict(zip(SLOTS[slot][1], images.split()))) for m, (slot, phrases, images) in MAPS.items()}

ATTRIBUTES = {  # attribute: (slot, what is said of it, the values for which it holds)
    "large": ("number", "is more than six", "seven eight nine ten eleven twelve"),
    "even": ("number", "is even", "two four six eight ten twelve"),
    "weekend": ("day", "is on the weekend", "Saturday Sunday"),
    "wild": ("animal", "is wild", "lion wolf bear frog deer hare"),
    "europe": ("city", "is in Europe", "Paris Rome Madrid Berlin Oslo Athens"),
    "sweet": ("food", "is sweet", "cake honey jam candy chocolate pie"),
    "wheels": ("vehicle", "has wheels", "car bus truck bike train tram"),
    "woman": ("name", "is a woman", "Anna Maria Clara Julia Emma Nora Lucy"),
}
ATTRIBUTES = {a: (slot, said, values.split()) for a, (slot, said, values) in ATTRIBUTES.items()}

POSITIONS = {"first": 0, "second": 1, "last": -1}

FORMATS = {  # format of one answer: (output, how definitions say it)
    "plain": ("{x}", ("alone", "with nothing else")),
    "answer": ("answer : {x}", ("after the word answer and a colon", "with the word answer and a colon before it")),
    "it_is": ("it is {x}", ("after the words it is", "with the words it is before it")),
    "done": ("{x} done", ("before the word done", "with the word done after it")),
    "please": ("{x} please", ("before the word please", "with the word please after it")),
    "brackets": ("[ {x} ]", ("in square brackets", "between square brackets")),
    "quotes": ("\" {x} \"", ("in quotes", "between quotes")),
    "stars": ("* {x} *", ("between two stars", "with a star on each side")),
    "twice": ("{x} {x}", ("twice", "two times")),
    "thrice": ("{x} {x} {x}", ("three times", "in three copies")),
}
PHRASE_FORMATS, LAYOUT_FORMATS = list(FORMATS)[:5], list(FORMATS)[5:]

JOINERS = {"comma": (",", "a comma"), "dash": ("-", "a dash"), "and": ("and", "the word and"),
           "then": ("then", "the word then"), "or": ("or", "the word or"), "plus": ("plus", "the word plus")}
JOINED = ("joined by {j}", "with {j} between them", "separated by {j}")

LABELS = {"yes_no": ("yes", "no"), "true_false": ("true", "false"), "right_wrong": ("right", "wrong"),
          "good_bad": ("good", "bad"), "up_down": ("up", "down"), "hot_cold": ("hot", "cold")}

EVENTS = (  # [parts in brackets] are left out at times
    "[On {day}] {name} the {job} bought a {colour} {object} in {city} [for {number} coins] .",
    "The {colour} {vehicle} left {city} [on {day}] with {name} and a {animal} [and {number} boxes] .",
    "In {city} a {animal} ate the {food} of {name} the {job} [on {day}] .",
    "Some {number} friends came by {vehicle} [on {day}] to see the {animal} of {name} in {city} .",
    "A {job} named {name} paid {number} coins for {food} and a {object} [in {city}] .",
    "With a {animal} and a {colour} {object} , {name} came to {city} by {vehicle} [on {day}] .",
    "The {job} gave the {animal} some {food} near the {colour} {vehicle} [at {number}] [on {day}] .",
    "Each {day} the {job} {name} cooks {food} for {number} guests [in {city}] .",
    "{name} saw a {vehicle} , a {animal} and {number} {colour} boxes in {city} [on {day}] .",
    "By {vehicle} the {food} and the {object} went to {city} with {name} the {job} [on {day}] .",
    "There is a {object} of {colour} glass and {food} for the {animal} of the {job} [in {city}] .",
    "It was {day} when {name} lost the {object} and {number} coins in the {vehicle} [to {city}] .",
    "The {animal} hid the {object} of the {job} under the {colour} {vehicle} for {number} days [in {city}] .",
    "At {number} on {day} the {colour} {vehicle} brought {food} and a {object} to {name} [the {job}] .",
    "On {day} {name} sold {food} , a {object} and a {colour} {animal} [to a {job}] .",
    "In {city} , {number} people saw the {job} {name} sell a {animal} for a {object} [on {day}] .",
)

# Definitions: {n} the input's kind, {x} what to find, {f} how to write it, {it} it or them.
INPUT_NOUNS = {"sentence": ("sentence", "text"), "list": ("list", "row")}
OPENINGS = ("In this task , you are given a {n} .", "You are given a {n} .", "You will read a {n} .", "Read the {n} .",
            "Look at the {n} .", "The input is a {n} .", "Here is a {n} .")
ASKS = (
    "Your job is to find {x} and write {it} {f} .", "Write {x} {f} .", "Find {x} , then write {it} {f} .",
    "The answer is {x} , written {f} .", "Pick out {x} and give {it} {f} .", "Look for {x} in it and answer {f} .",
    "Please tell us {x} . Give {it} {f} .", "Your answer must be {x} , {f} .", "Return {x} , given {f} .",
    "Please return {x} {f} .", "Answer {f} and give {x} .", "In your answer , write {f} : {x} .",
)
CLASS_ASKS = (  # {c} the condition, {p} the label where it holds, {q} the other
    "Answer {p} if {c} and {q} otherwise .", "Write {p} if {c} , else write {q} .",
    "If {c} , your answer must be {p} , otherwise {q} .", "Give {p} when {c} and {q} when not .",
    "Find out if {c} . Then answer {p} , otherwise {q} .", "The answer is {p} if {c} , else {q} .",
    "When {c} , return {p} , otherwise return {q} .", "Your job is to write {p} if {c} and {q} if not .",
)
# Sentence patterns kept for test_unseen_wording; their words all occur in the patterns above.
UNSEEN_ASKS = ("Read the {n} , find {x} , and return {it} {f} .", "In the {n} given , please find {x} , then answer {f} .",
               "Please give {x} {f} : the input is a {n} .", "In this {n} , find {x} . Your answer must be written {f} .")
UNSEEN_CLASS_ASKS = ("Read the {n} and return {p} if {c} , else {q} .",
                     "In the {n} given , find out if {c} , then return {p} , otherwise {q} .",
                     "Find out if {c} in this {n} . Give {p} if it is , else {q} .")
IN_ORDER = ("{a} and then {b}", "{a} followed by {b}", "{a} and after it {b}")
IN_ORDER_OF_THREE = ("{a} , then {b} and then {c}", "{a} followed by {b} and then {c}")

GLOSSES = (  # loose sentences for the corpus, for every other word of the definitions; {v} and {w}: any two values
    *["{v} {f} is {v_f} .", "Here {v} is written {f} : {v_f} .", "{v} and {w} , {joined} , are {v_w} ."] * 3,
    "If it is not {v} , it is {w} .", "The word {v} comes before the word {w} .", "In this text , {v} is followed by {w} .",
    "Read {v} , Look for {w} , Pick out {v} .", "Your input must be {v} , otherwise your task must be {w} .",
    "When you find {v} , write {w} or return it .", "Then give us {v} , not a list or a row .",
    "Find it . Write it . Give it . Return it .",
    "This is a good sentence , not a bad sentence .", "Look up and down . Find out if it is hot or cold .",
    "Answer {v} , yes or no , else {w} .", "Please tell us {v} and look for {w} in it .",
    "You will read {v} , {w} and one list .",
)

# Category: (training, validation, test tasks). Triples only enrich training.
QUOTA = {"Information Extraction": (42, 3, 5), "Text Formatting": (41, 3, 6), "Word Mapping": (66, 4, 6),
         "Pair Extraction": (80, 4, 9), "Mixed Pairs": (50, 3, 6), "List Selection": (75, 3, 6), "List Pairs": (58, 3, 5),
         "Text Classification": (44, 2, 2), "Triple Extraction": (16, 0, 0), "List Triples": (8, 0, 0)}
TRAIN_INSTANCES, EVAL_INSTANCES, PARAPHRASES, DOCUMENTS, EXTRA_IDS = 50, 25, 10, 12000, 20
# What the usual SNI prompt adds around a task's text.
PROMPT = "Definition: Input: Output: Explanation: Positive Negative Example 1 2 3 - Now complete the following example -"


class Task(NamedTuple):
    category: str
    source: str  # what the input is: 'sentence' or 'list'
    operands: tuple  # what to find, in order: slots, mappings, positions, or one attribute
    form: str  # key of FORMATS (one operand), JOINERS (several) or LABELS (classification)


class Record(NamedTuple):
    text: str
    facts: dict  # slot -> value
    items: list  # values in order; empty for a sentence


# Inputs and answers

def slot_of(operand):
    """Slot that an operand reads, or None for a list position."""
    for table in (MAPS, ATTRIBUTES):
        if operand in table:
            return table[operand][0]
    return operand if operand in SLOTS else None


def required_slots(task):
    """Slots that an input must contain for `task`."""
    return sorted({slot_of(operand) for operand in task.operands} - {None})


def make_record(rng, source, required=()):
    """Draw an input, a sentence or a list, that contains every slot in `required`."""
    values = {slot: rng.choice(SLOTS[slot][1]) for slot in SLOTS}
    if source == "list":
        others = [slot for slot in SLOTS if slot not in required]
        kinds = list(required) + rng.sample(others, rng.randint(4, 6) - len(required))
        rng.shuffle(kinds)
        items = [values[kind] for kind in kinds]
        return Record(" , ".join(items) + " .", {kind: values[kind] for kind in kinds}, items)
    template = rng.choice([t for t in EVENTS if all("{%s}" % slot in t for slot in required)])

    def keep_or_drop(match):
        needed = any("{%s}" % slot in match[1] for slot in required)
        return match[1] if needed or rng.random() < 0.6 else ""

    template = " ".join(re.sub(r"\[(.*?)\]", keep_or_drop, template).split())
    present = re.findall(r"\{(\w+)\}", template)
    return Record(template.format(**values), {slot: values[slot] for slot in present}, [])


def value_of(operand, record):
    """What an operand refers to in a record: a word, or True/False for an attribute."""
    if operand in POSITIONS:
        return record.items[POSITIONS[operand]]
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
    if operand in POSITIONS:
        return f"the {operand} {rng.choice(('item', 'word'))}"
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
    if len(phrases) == 2:
        phrases = [rng.choice(IN_ORDER).format(a=phrases[0], b=phrases[1])]
    elif len(phrases) == 3:
        phrases = [rng.choice(IN_ORDER_OF_THREE).format(a=phrases[0], b=phrases[1], c=phrases[2])]
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
        # A list's opening tells its task from the same question about a sentence.
        opening = rng.choice(OPENINGS) + " " if task.source == "list" or rng.random() < 0.3 else ""
        found[define(rng, task, opening + ask)] = None
    return list(found)


# Which combinations there are, and which are held out

def candidates(category):
    """All tasks of a category."""
    slots, maps, joiners = list(SLOTS), list(MAPS), list(JOINERS)
    # Fewer operands where there would be far more pairs than tasks: a pair is learned from its neighbours in the grid.
    few_slots = ["name", "colour", "object", "vehicle", "food", "city"]
    few_maps = ["young", "next_number", "next_day", "workplace", "country"]
    mixed = [*itertools.product(few_slots, few_maps), *itertools.product(few_maps, few_slots)]
    selectors = [*POSITIONS, "animal", "colour", "city", "food"]
    source, operands, forms = {
        "Information Extraction": ("sentence", [(s,) for s in slots], PHRASE_FORMATS),
        "Text Formatting": ("sentence", [(s,) for s in slots], LAYOUT_FORMATS),
        "Word Mapping": ("sentence", [(m,) for m in maps], list(FORMATS)),
        "Pair Extraction": ("sentence", list(itertools.permutations(slots, 2)), joiners),
        "Mixed Pairs": ("sentence", mixed, joiners),
        "List Selection": ("list", [(s,) for s in [*POSITIONS, *slots]], list(FORMATS)),
        "List Pairs": ("list", list(itertools.permutations(selectors, 2)), joiners),
        "Text Classification": ("sentence", [(a,) for a in ATTRIBUTES], list(LABELS)),
        "Triple Extraction": ("sentence", list(itertools.permutations(slots, 3)), joiners),
        "List Triples": ("list", list(itertools.permutations(selectors, 3)), joiners),
    }[category]
    # Some triples of slots occur together in no sentence.
    writable = [ops for ops in operands if source == "list"
                or any(all("{%s}" % slot_of(o) in t for o in ops) for t in EVENTS)]
    return [Task(category, source, ops, form) for ops in writable for form in forms]


def links(task):
    """Combinations that a task teaches: operand and form, or each pair of neighbouring operands."""
    if len(task.operands) == 1:
        return {(task.source, task.operands[0], task.form)}
    return {(task.source, a, b) for a, b in zip(task.operands, task.operands[1:])}


def split_tasks(rng):
    """Choose the tasks.

    Returns
    -------
    dict of str to list of Task
        Keys 'train', 'validation', 'test'. No training task has a link of a validation or test task.
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
            spread = used[task.form] < 3 and all(used[operand] < most for operand in task.operands)
            if len(chosen) < n_validation + n_test and spread and not links(task) & held_out:
                chosen.append(task)
                held_out |= links(task)
                used.update([*task.operands, task.form])
        split["validation"] += chosen[:n_validation]
        split["test"] += chosen[n_validation:]
    for category, (n_train, _, _) in QUOTA.items():
        free = [task for task in pool[category] if not links(task) & held_out]
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
    record = make_record(rng, rng.choice(("sentence", "sentence", "list")))
    known = [o for o in (*SLOTS, *MAPS, *ATTRIBUTES) if slot_of(o) in record.facts]
    if record.items:
        known += list(POSITIONS) * 2
    asked, told = [], []
    for operand in rng.sample(known, rng.randint(2, 4)):
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

    Raises
    ------
    RuntimeError
        If a word of `texts` did not become one piece.
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
    """Write the whole benchmark under `root`, replacing what is there.

    Parameters
    ----------
    root : str
        Folder to write.
    seed : int
        Decides which combinations are held out, the instances and the wordings.

    Raises
    ------
    RuntimeError
        If two tasks share a definition, or the tokenizer splits a word.
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
