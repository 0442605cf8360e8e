"""Damaged data files of every kind: what reads one either works or raises a UserError of one line.

KINDS: {kind of file: a function of a random.Random that makes a sound file, damages it, and has it read}. Such a
function returns where reading works, after a look at what was read, and raises UserError where it does not.
`run_cases(n, seed)` counts both. Anything else that is raised is a fault of the program.
"""
import argparse
import contextlib
import io
import json
import math
import random
import sys
import tempfile
import warnings
from collections import Counter
from pathlib import Path
from unittest import mock

import numpy as np
import yaml

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import adapt
import data
import t5
from bench import p3, predictions
from bench.records import read_documents
from common import UserError

HUGE, DEEP, DEEPER = "@huge@", "@deep@", "@deeper@"         # numbers and nesting that json.dumps would not write
RAW = {HUGE: "1" * 5000, DEEP: "[" * 400 + "]" * 400, DEEPER: '{"a":' * 30000 + "1" + "}" * 30000}
ODD = [None, True, False, 0, 1, -1, -2, 3, 7, 1.0, 0.5, -0.0, 1e308, float("nan"), float("inf"), 10 ** 30, "", " ", "0", "1", "1.0",
       "true", "-1", "²", "a", "a\nb\u2028c", "\0", "half \ud83d", "\ude00", "🙂", "文字没有空格", "x" * 5000, [], {}, [[]], ["a"], [1],
       [None], {"a": 1}, {"": {}}, HUGE, DEEP, DEEPER]

_root = []


class NonFinite(Exception):
    """A score that came out is no number from 0 to 100."""


def folder() -> Path:
    """A folder of this process's own, whose files the next case overwrites."""
    if not _root:
        _root.append(tempfile.TemporaryDirectory())
    return Path(_root[0].name)


# ------------------------------------------------------------------------------------------------------------ damage

def places(value, found=None) -> list[tuple]:
    """(container, key) of everything in a value of JSON."""
    found = [] if found is None else found
    for key in value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ():
        found.append((value, key))
        places(value[key], found)
    return found


def damage_value(rng: random.Random, value):
    """Something in it is gone, of another type, odd, twice, or in one more list."""
    value = json.loads(json.dumps(value))
    container, key = rng.choice(places(value))
    how = rng.randrange(6)
    if how == 0:
        del container[key]
    elif how == 1 and isinstance(container, list):
        container.append(container[key])
    elif how == 2:
        container[key] = [container[key]]
    elif how == 3:
        container[key] = json.dumps(container[key])
    else:
        container[key] = rng.choice(ODD)
    return value


def dumped(value, **more) -> str:
    text = json.dumps(value, **more)
    for mark, raw in RAW.items():
        text = text.replace(json.dumps(mark), raw)
    return text


def damage_text(rng: random.Random, text: str) -> bytes:
    """In one of three cases the text as it is, else another encoding, or a part that is gone, twice or noise."""
    how = rng.randrange(36)
    at, length = rng.randrange(len(text) + 1), rng.choice([1, 2, 5, 50])
    encodings = ["utf-8-sig", "utf-16", "utf-16-le", "utf-32", "latin-1", "cp1252", "utf-7"]
    if how == 0:
        return text[:at].encode()
    if how == 1:
        return (text[:at] + text[at + length:]).encode()
    if how == 2:
        return (text[:at] + text[at:at + length] * 2 + text[at + length:]).encode()
    if how == 3:
        return (text[:at] + rng.choice(["\0", '"', "{", "}", "[", "]", ",", ":", "\n", "\\", "\u2028", "\ufeff", "é"]) + text[at:]).encode()
    if how == 4:
        return text[:at].encode() + bytes(rng.randrange(256) for _ in range(length)) + text[at:].encode()
    if how == 5:
        return text.replace("\n", rng.choice(["\r\n", "\r", "\n\n", " "])).encode()
    if how == 6:
        key = rng.choice(text.split('"')[1::2] or ["a"])
        return text.replace(f'"{key}":', f'"{key}": 1, "{key}":', 1).encode()
    if how == 7:
        return b""
    if how == 8:
        return bytes(rng.randrange(256) for _ in range(200))
    if how == 9:
        return (text * 2).encode()
    if how == 10:
        return ("[" * 100_000 + text).encode()
    if how < 11 + len(encodings):
        return ("é " * (how % 2) + text).encode(encodings[how - 11], "replace")
    return text.encode()


def damage_lines(rng: random.Random, rows: list[dict]) -> bytes:
    """JSON lines of which one is damaged, or a line is there twice, or all of them are one list."""
    rows, n = list(rows), rng.randrange(len(rows))
    how = rng.randrange(12)
    if how == 0:
        rows.append(rows[n])
    elif how == 1:
        return damage_text(rng, dumped(rows, indent=rng.choice([None, 1])))
    elif how > 2:
        rows[n] = damage_value(rng, rows[n])
    return damage_text(rng, "".join(dumped(row) + "\n" for row in rows))


# ---------------------------------------------------------------------------------------------------- what is looked at

def look(texts) -> None:
    for text in texts:
        assert isinstance(text, str)
        text.encode()


def look_at_tasks(tasks) -> None:
    """As training goes through them: every text can be put together, encoded and drawn."""
    assert tasks
    for task in tasks:
        pairs = [text for pair in task.demonstrations for text in pair]
        look([task.name, task.category, *task.definitions, *pairs])
        assert len({x.id for x in task.instances}) == len(task.instances)
        for x in task.instances:
            look([x.id, x.input, *x.outputs, *x.choices, *([x.prompt] if x.prompt is not None else [])])
        look([data.prompt_text(task.definitions[0], task.demonstrations, task.instances[0].input, task.verbatim)])
        data.draw_task(task, data.rng_of(0), 2, 2, vary=True)


def letters(texts, add_special_tokens) -> dict:
    """A tokenizer by bytes that knows neither white space nor NULs."""
    return {"input_ids": [[b for b in text.encode() if b > 32] for text in texts]}


letters.eos_token_id = 1


# ------------------------------------------------------------------------------------------------------------- the kinds

SNI_TASK = {
    "Definition": ["Find the city."], "Categories": ["Question Answering"],
    "Positive Examples": [{"input": "Anna is in Oslo.", "output": "Oslo", "explanation": "so"}],
    "Instances": [{"id": f"t-{n}", "input": f"Tom saw {n} dogs in Rome.", "output": ["Rome", "rome"]} for n in range(3)]}


def sni(rng, task: bytes, split: bytes) -> None:
    root = folder()
    for name in ("tasks", "splits/default"):
        (root / name).mkdir(parents=True, exist_ok=True)
    (root / "tasks/task1_city.json").write_bytes(task)
    (root / "tasks/task2_city.json").write_text(json.dumps(SNI_TASK))
    (root / "splits/default/train_tasks.txt").write_bytes(split)
    look_at_tasks(data.load_sni(str(root), "train", rng.choice([1, 2, 100])))


def sni_task(rng) -> None:
    value = damage_value(rng, SNI_TASK) if rng.randrange(4) else SNI_TASK
    sni(rng, damage_text(rng, dumped(value, indent=rng.choice([None, 1]))), b"task1_city\ntask2_city\n")


def sni_split(rng) -> None:
    names = ["task1_city", "task2_city"] + rng.choice([[], ["task1_city"], ["../tasks/task2_city"], ["task9"], ["a\0"], ["x" * 5000]])
    rng.shuffle(names)
    sni(rng, json.dumps(SNI_TASK).encode(), damage_text(rng, "\n".join(names)))


# name -> (data set, jinja, answer choices, a row)
P3_TEST = {
    "rte": ("super_glue/rte", 'Suppose {{premise}} So "{{hypothesis}}"? ||| {% if label != -1 %}{{answer_choices[label]}}{% endif %}',
            "Yes ||| No", {"premise": "Tom saw a dog.", "hypothesis": "Tom saw a cat.", "label": 1, "idx": 0}),
    "copa": ("super_glue/copa", '{{premise}} {% if question == "cause" %}because{% else %}so{% endif %} {{choice1}} {{choice2}} ||| '
             "{{answer_choices[label]}}", "{{choice1}} ||| {{choice2}}",
             {"premise": "The sun rose.", "choice1": "It got warm.", "choice2": "It got dark.", "question": "effect", "label": 0}),
    "winogrande": ("winogrande/winogrande_xl", "{{sentence}} ||| {% if answer == '1' %}{{option1}}{% else %}{{option2}}{% endif %}",
                   "{{option1}} ||| {{option2}}", {"sentence": "x _ y", "option1": "Ann", "option2": "Bo", "answer": "2"}),
    "hellaswag": ("hellaswag", "{{ctx}} (a) {{answer_choices[0]}} ||| {{answer_choices[label | int()]}}", '{{endings | join(" ||| ")}}',
                  {"ctx": "A man", "endings": ["runs", "sits", "eats", "naps"], "label": "2"}),
    "story_cloze": ("story_cloze/2016", '{{input_sentence_1}} {{answer_choices | join("\\n- ")}} ||| {{answer_choices[answer_right_ending -1]}}',
                    "{{sentence_quiz1}} ||| {{sentence_quiz2}}",
                    {"input_sentence_1": "He ran.", "sentence_quiz1": "He won.", "sentence_quiz2": "He lost.", "answer_right_ending": 1}),
}
P3_TRAIN = {
    "imdb": ("imdb", "{{text}} Good? ||| {{answer_choices[label]}}", "No ||| Yes", {"text": "I liked it.", "label": 1}),
    "qasc": ("qasc", "{{question}} ||| {% for choice in choices.label %}{% if choice == answerKey %}{{answer_choices[loop.index - 1]}}{% endif %}"
             "{% endfor %}", '{{choices.text | join("|||")}}',
             {"question": "What?", "choices": {"text": ["a dog", "a cat"], "label": ["A", "B"]}, "answerKey": "B"}),
    "social_i_qa": ("social_i_qa", '{{question}} ||| {{{"1": answerA, "2": answerB, "3": answerC}[label]}}', "{{answerA}} ||| {{answerB}}",
                    {"question": "Why?", "answerA": "a", "answerB": "b", "answerC": "c", "label": "2"}),
    "duorc/SelfRC": ("duorc/SelfRC", "{{question}} ||| {% if no_answer %}None{% else %}{{answers | choice}}{% endif %}", None,
                     {"question": "Who?", "answers": ["Tom", "Tom Hanks"], "no_answer": False}),
}
JINJA = [
    "{% for i in range(99999) %}{% for j in range(99999) %}{{i}}{% endfor %}{% endfor %}", "{{ 'a' * 10**10 }}", "{{ 10**10**10 }}",
    "{{ 'a' | center(10**9) }}", "{{ 'a'.ljust(10**9) }}", "{{ '%999999999d' % 1 }}", "{{ '{:>999999999}'.format(1) }}",
    "{% macro f(n) %}{{f(n)}}{{f(n)}}{% endmacro %}{{f(1)}}", "{% set a = 'x' * 999 %}{% set b = a ~ a %}{% set c = b ~ b %}{{c}}",
    "{% set n = namespace(s='ab') %}{% for i in range(99) %}{% set n.s = n.s ~ n.s %}{% endfor %}{{n.s}}", "{{ [0] * 10**9 }}",
    "{% set n = namespace(s=[1]) %}{% for i in range(99) %}{% set n.s = [n.s, n.s] %}{% endfor %}{{n.s}}", "{{ lipsum(n=10**6) }}",
    "{{ premise.__class__.__mro__ }}", "{{ label | choice }}", "{% include 'x' %}", "{{ " + "(" * 999 + "1" + ")" * 999 + " }}", "{{", "%}", "|||",
    "{% if 1 %}" * 60, "{{ none }}", "{{ true }}", "{{ nothing }}", "{{ premise[99] }}", "{{ 1 / 0 }}", "{{ premise | nothing }}",
    "{{ text | replace('', text) | replace('', text) }}", "{% for c in premise %}{{c}}{% endfor %}", "{{ range(99999) | join(premise) }}"]


def yaml_of(records: list[dict], dataset: str) -> str:
    text = f"dataset: {json.dumps(dataset)}\ntemplates:\n"
    for n, record in enumerate(records):
        metadata = "{original_task: true, metrics: [Accuracy]}"
        lines = "".join(f"    {key}: {dumped(value)}\n" for key, value in record.items())
        text += f"  id{n}: !Template\n{lines}    metadata: !TemplateMetadata {metadata}\n"
    return text


def read_p3(rng, name, rows: bytes, templates: bytes, split: str) -> None:
    root = folder() / "p3"
    for old in [*root.rglob("*.jsonl"), *root.rglob("templates.yaml")]:
        old.unlink()
    dataset = (P3_TEST | P3_TRAIN)[name][0]
    for path, content in ((f"templates/{dataset}/templates.yaml", templates),
                          (f"{name}/{'validation' if split == 'test' else 'train'}.jsonl", rows)):
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_bytes(content)
    look_at_tasks(data.load_p3(str(root), split, rng.choice([None, 2]), rng.choice(["fields", "prompt"])))


def p3_case(rng):
    split = rng.choice(["test", "train"])
    cases = P3_TEST if split == "test" else P3_TRAIN
    name = rng.choice(sorted(cases))
    return split, name, *cases[name]


def p3_rows(rng) -> None:
    split, name, dataset, jinja, choices, row = p3_case(rng)
    records = [{"name": "a", "jinja": jinja, "answer_choices": choices}]
    rows = [row, row, row]
    key = rng.choice([key for fields in [p3.ANSWERS.get(name, {"answerKey": 0})] for key in fields])
    if rng.randrange(2):
        rows[1] = row | {key: rng.choice(ODD)}
    read_p3(rng, name, damage_lines(rng, rows), yaml_of(records, dataset).encode(), split)


def p3_templates(rng) -> None:
    split, name, dataset, jinja, choices, row = p3_case(rng)
    at = rng.choice([0, len(jinja), rng.randrange(len(jinja))])
    if rng.randrange(2):
        jinja = jinja[:at] + rng.choice(JINJA) + jinja[at:]
    records = [{"name": "a", "jinja": jinja, "answer_choices": choices}, {"name": "b", "jinja": "Say y. ||| y", "answer_choices": "y ||| z"}]
    if rng.randrange(2):
        records = damage_value(rng, records)
        records = [record if isinstance(record, dict) else {"name": record} for record in records]
    text = yaml_of(records, dataset)
    if not rng.randrange(4):
        text = yaml.safe_dump(damage_value(rng, {"dataset": dataset, "templates": {"a": {"name": "a", "jinja": jinja}}}))
    read_p3(rng, name, (json.dumps(row) + "\n").encode(), damage_text(rng, text), split)


def p3_prompted(rng) -> None:
    root = folder() / "p3"
    for old in [*root.rglob("*.jsonl"), *root.rglob("templates.yaml")]:
        old.unlink()
    for name in ("templates/imdb", "prompted"):
        (root / name).mkdir(parents=True, exist_ok=True)
    (root / "templates/imdb/templates.yaml").write_text(yaml_of([{"name": "a", "jinja": "{{text}} ||| x"}], "imdb"))
    rows = [{"prompt": f"Good {n}?", "completion": "Yes<|endoftext|>"} for n in range(3)]
    (root / "prompted/imdb_a.jsonl").write_bytes(damage_lines(rng, rows))
    look_at_tasks(data.load_p3(str(root), "train"))


PREDICTION = {"bench": "sni", "row": "TAGI", "demos": 0, "id": "i0", "task": "task1", "category": "Kind", "prediction": "a cat",
              "references": ["a cat", "the cat"]}
REFERENCES = [{"id": f"i{n}", "references": ["a cat"], "task_id": f"task{n % 2}", "task_category": "Kind", "track": "default"} for n in range(4)]


def scored(rng, lines: bytes, references: bytes | None) -> None:
    """Every score that comes out is a number from 0 to 100."""
    (folder() / "p.jsonl").write_bytes(lines)
    (folder() / "r.jsonl").write_bytes(references or b"")
    found = predictions.rescore(str(folder() / "p.jsonl"), str(folder() / "r.jsonl") if references is not None else None,
                                rng.choice([None, None, "sni", "p3"]))
    numbers = []

    def collect(value):
        for x in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
            collect(x)
        if isinstance(value, float):
            numbers.append(value)

    for result in found["results"]:
        look([result["row"], *result["by_task"]["rouge_l"], *result["by_category"]["rouge_l"]])
        collect(result)
    if not numbers or not all(math.isfinite(x) and 0 <= x <= 100 + 1e-9 for x in numbers):
        raise NonFinite(numbers)
    json.dumps(found).encode()


def predictions_file(rng) -> None:
    rows = [PREDICTION | {"id": f"i{n}", "task": f"task{n % 2}"} for n in range(4)]
    if rng.randrange(2):
        rows = [{"id": f"i{n}", "prediction": "a cat"} for n in range(4)]
    references = rng.choice([None, "".join(json.dumps(r) + "\n" for r in REFERENCES).encode()])
    scored(rng, damage_lines(rng, rows), references)


def references_file(rng) -> None:
    rows = [{"id": f"i{n}", "prediction": "a cat"} for n in range(3)]
    scored(rng, "".join(json.dumps(row) + "\n" for row in rows).encode(), damage_lines(rng, REFERENCES))


def corpus(rng) -> None:
    lines = ["Anna went to Paris.", "The dog ran.", "小猫在花园里睡着了。", "\u200b \u200b \u200b", "one", rng.choice([str(x) for x in ODD]), ""]
    rng.shuffle(lines)
    path = folder() / f"corpus.{rng.choice(['txt', 'json', 'jsonl', 'text'])}"
    if rng.randrange(2):
        content = damage_lines(rng, [{"text": line, "url": "u"} for line in lines])
    else:
        content = damage_text(rng, "\n".join(lines).encode("utf-8", "replace").decode())
    path.write_bytes(content)
    documents = read_documents(str(path))
    look(documents)
    assert documents
    for row in data.cut_documents(documents, letters, 3, 20, np.random.default_rng(0)):
        assert len(row) == 3 and all(row)


def instructions(rng) -> None:
    rows = [{"instruction": "Find it.", "input": "A cat.", "demonstrations": [["A dog.", "dog"]]} for _ in range(3)]
    path = folder() / "instructions.jsonl"
    path.write_bytes(damage_lines(rng, rows))
    tagi = mock.Mock()
    tagi.generate.side_effect = lambda inputs, *args, **kwargs: ["x"] * len(inputs)
    options = argparse.Namespace(instructions=str(path), batch_size=2, scale=1.0, choices=None, beams=1, max_output=4, sample=False, json=True)
    with mock.patch.object(t5, "warn_of_unknown_words"), contextlib.redirect_stdout(io.StringIO()):
        adapt.answer_file(tagi, options)
    for call in tagi.adapt.call_args_list:
        look([*call.args[0], *(text for pairs in call.args[1] for pair in pairs for text in pair)])


KINDS = {"SNI task": sni_task, "SNI split": sni_split, "P3 rows": p3_rows, "P3 templates": p3_templates, "P3 prompted rows": p3_prompted,
         "predictions": predictions_file, "references": references_file, "corpus": corpus, "instructions": instructions}


def run(kind: str, rng: random.Random) -> str:
    """"works" or "one line": what a case of this kind ends in. Raises what is neither."""
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        try:
            KINDS[kind](rng)
        except UserError as error:
            line = str(error)
            assert len(line) <= 300 and line.isprintable(), line
            return "one line"
    return "works"


def run_cases(n: int, seed: int) -> dict[str, Counter]:
    """{kind: {"works", "one line" or the name of what was raised: how many of n cases}}."""
    counts = {}
    for kind in KINDS:
        counts[kind] = Counter()
        for case in range(n):
            try:
                counts[kind][run(kind, random.Random(f"{seed} {kind} {case}"))] += 1
            except Exception as error:
                counts[kind][type(error).__name__] += 1
    return counts
