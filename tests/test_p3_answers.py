"""P3's labels and answers in every form that exports give them: each ends right, or in one line."""
import json
import os
from pathlib import Path

import pytest
from mutations_data import P3_TEST, P3_TRAIN, yaml_of

import data
from bench import p3
from common import UserError

P3 = Path(os.environ["TAGI_DATA"]) / "p3" if "TAGI_DATA" in os.environ else None
real_data = pytest.mark.skipif(P3 is None, reason="TAGI_DATA names no folder with P3's templates and rows")

FIELDS = [(name, key) for name, fields in p3.ANSWERS.items() for key in fields]


def forms(name: str, key: str, number: int) -> list:
    """How exports write this answer: a number, its text, a float of a column with gaps, a class in words, true."""
    first, names = p3.ANSWERS[name][key]
    words = names.split()[number - first].split("|") if isinstance(names, str) else []
    written = [number, str(number), float(number), f"{number}.0", f" {number}\n", *words, *(word.upper() for word in words)]
    written += [word.replace("_", " ") for word in words]
    return written + [word == "true" for word in words if word in ("true", "false")]


def numbers(name: str, key: str) -> range:
    first, names = p3.ANSWERS[name][key]
    return range(first, first + (len(names.split()) if isinstance(names, str) else names))


@pytest.mark.parametrize("name, key", FIELDS)
def test_an_answer_is_the_same_however_it_is_written(name, key):
    for number in numbers(name, key):
        plain = {p3.with_plain_label(name, {key: form} | others(name, key), "x")[key] for form in forms(name, key, number)}
        assert plain == {str(number) if name in p3.AS_TEXT else number}
        assert type(plain.pop()) is (str if name in p3.AS_TEXT else int)


def others(name: str, key: str) -> dict:
    """The other fields with answers that such a row needs."""
    return {other: 0 for other in p3.ANSWERS[name] if other != key}


@pytest.mark.parametrize("name, key", FIELDS)
def test_what_is_no_answer_is_refused_with_its_place(name, key):
    allowed, names = numbers(name, key), str(p3.ANSWERS[name][key][1])
    wrong = [-2, *range(allowed[0]), allowed[-1] + 1, str(allowed[-1] + 1), 0.5, "0.5", 1e300, 10 ** 30, "x", "²", "1 2", "one", [], [1], {}, {"a": 1},
             "\ud83d", "1" * 500, float("inf"), "nope\nnope", [[]] * 500]
    wrong += [] if "true" in names else [True, False, "true", "False"]
    for value in wrong:
        with pytest.raises(UserError) as error:
            p3.with_plain_label(name, {key: value} | others(name, key), "rows.jsonl, line 7 (row 6)")
        line = str(error.value)
        assert line.startswith(f"rows.jsonl, line 7 (row 6): {key} is ") and f"{allowed[0]} to {allowed[-1]}" in line and len(line) <= 300


@pytest.mark.parametrize("name, key", FIELDS)
def test_a_hidden_answer_is_refused_with_where_there_are_some(name, key):
    for value in (None, "", " ", -1, "-1", -1.0, float("nan")):
        with pytest.raises(UserError, match="hidden; take the validation split, or for training the training split"):
            p3.with_plain_label(name, {key: value} | others(name, key), "x")
    if name in p3.TEST:
        with pytest.raises(UserError, match="hidden"):
            p3.with_plain_label(name, {}, "x")
    else:
        assert p3.with_plain_label(name, {"text": "a"}, "x") == {"text": "a"}       # a template that needs it says so


@pytest.mark.parametrize("name", ["qasc", "quartz"])
def test_an_answer_key_is_one_of_the_choices_labels(name):
    row = {"choices": {"text": ["a dog", "a cat"], "label": ["A", "B"]}, "answerKey": "B"}
    assert p3.with_plain_label(name, row, "x") == row
    for changes in ({"answerKey": "C"}, {"answerKey": 1}, {"answerKey": None}, {"answerKey": []}, {"choices": {"text": ["a"]}}):
        with pytest.raises(UserError, match="x: answerKey .* none of the choices"):
            p3.with_plain_label(name, row | changes, "x")


# ------------------------------------------------------------------------------------------------- from rows to references

def write(root: Path, name: str, rows: list[dict]) -> str:
    dataset, jinja, choices, _ = (P3_TEST | P3_TRAIN)[name]
    split = "validation" if name in p3.TEST else "train"
    (root / "templates" / dataset).mkdir(parents=True, exist_ok=True)
    (root / name).mkdir(parents=True, exist_ok=True)
    text = yaml_of([{"name": "a", "jinja": jinja, "answer_choices": choices}], dataset)
    (root / "templates" / dataset / "templates.yaml").write_text(text)
    (root / name / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(root)


def references(root: str, name: str) -> list:
    task, = data.load_p3(root, "test" if name in p3.TEST else "train")
    return [x.outputs for x in task.instances]


@pytest.mark.parametrize("name", [name for name in P3_TEST | P3_TRAIN if name in p3.ANSWERS])
def test_references_do_not_depend_on_how_answers_are_written(tmp_path, name):
    """WinoGrande's templates ask for answer == '1', and take the second option for every other."""
    row = (P3_TEST | P3_TRAIN)[name][3]
    key, = p3.ANSWERS[name]
    found = []
    for number in numbers(name, key):
        rows = [row | {key: form} for form in forms(name, key, number)]
        outputs = references(write(tmp_path, name, rows), name)
        assert len(outputs) == len(rows) and all(len(x) == 1 for x in outputs)
        if name != "duorc/SelfRC" or number:                                        # one of whose answers is drawn
            assert outputs == outputs[:1] * len(rows)
        found.append(outputs[0])
    assert len({str(x) for x in found}) == len(found)


@pytest.mark.parametrize("name, changes, said", [
    ("copa", {"choice1": None}, "null"), ("rte", {"premise": None}, "null"), ("rte", {"premise": True}, "true"),
    ("rte", {"premise": float("nan")}, "nan"), ("hellaswag", {"endings": "runs"}, "a text for a list"), ("imdb", {"text": None}, "null"),
    ("duorc/SelfRC", {"answers": "Tom"}, "a text for a list"), ("duorc/SelfRC", {"answers": [None]}, "null"), ("imdb", {"label": -1}, "hidden"),
    ("winogrande", {"option2": None}, "null"), ("story_cloze", {"answer_right_ending": 0}, "1 to 2")])
def test_a_field_without_a_text_is_refused_with_row_and_template_or_line(tmp_path, name, changes, said):
    rows = [(P3_TEST | P3_TRAIN)[name][3]] * 2
    root = write(tmp_path, name, [rows[0], rows[1] | changes])
    with pytest.raises(UserError) as error:
        references(root, name)
    line = str(error.value)
    assert said in line and "row 1" in line and ("template 'a'" in line or ".jsonl, line 2" in line), line


def test_numbers_are_texts_of_fields_and_of_choices(tmp_path):
    root = write(tmp_path, "copa", [P3_TEST["copa"][3] | {"premise": 7, "choice1": 1, "choice2": 2.5}])
    task, = data.load_p3(root)
    assert task.instances[0].choices == ("1", "2.5") and task.instances[0].outputs == ["1"] and "7" in task.instances[0].prompt


@real_data
@pytest.mark.parametrize("name", ["rte", "cb", "copa", "winogrande"])
def test_real_rows_have_the_same_references_with_answers_in_numbers_and_in_texts(tmp_path, name):
    (tmp_path / "templates").symlink_to(P3 / "templates")
    (tmp_path / name).mkdir()
    rows = [json.loads(line) for line in (P3 / name / "validation.jsonl").read_text().splitlines()[:12]]
    key, = p3.ANSWERS[name]
    loaded = []
    for form in (lambda n: None, int, str, float, lambda n: f"{n}.0"):
        written = [row if form(0) is None else row | {key: form(p3.answer_number(row[key], *p3.ANSWERS[name][key], ""))} for row in rows]
        (tmp_path / name / "validation.jsonl").write_text("".join(json.dumps(row) + "\n" for row in written))
        loaded.append(data.load_p3(str(tmp_path)))
    assert loaded[1:] == loaded[:1] * 4
