"""Files that a user brings: keys and ids that are there twice, half an emoji, encodings, endings, and random damage."""
import argparse
import io
import json
import random
import warnings

import mutations_data
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import adapt
import common
import data
from bench import predictions, probe, records
from common import UserError

HALF = "half \ud83d an emoji"


def task(**changes) -> dict:
    return mutations_data.SNI_TASK | changes


def write_sni(root, text: str, split: str = "task1_city\n") -> str:
    for name in ("tasks", "splits/default"):
        (root / name).mkdir(parents=True, exist_ok=True)
    (root / "tasks/task1_city.json").write_text(text)
    (root / "splits/default/test_tasks.txt").write_text(split)
    return str(root)


def lines(path, *rows) -> str:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return str(path)


def refused(function, *args) -> str:
    with pytest.raises(UserError) as error:
        function(*args)
    assert len(str(error.value)) <= 300 and str(error.value).isprintable()
    return str(error.value)


# -------------------------------------------------------------------------------------------------------------- twice

@pytest.mark.parametrize("text, line, key", [
    ('{"a": 1,\n "b": {"a": 2},\n "a": 3}', 3, "a"), ('\n{"x": [{"y": 1},\n{"y": 1, "z": {"y": 2},\n\n"y": 3}]}', 5, "y"),
    ('{"a": {"b": [1, 2], "c": 1,\n"c": [{"a": 1}]}}', 2, "c"), ('[{"k\\n": 1,\n"k\\u000a": 2}]', 2, "k"),
    ('{"a": "\\"a\\": ", "b": ["a"], \n"c": "a", "a": null}', 2, "a")])
def test_a_key_that_is_there_twice_is_told_with_its_line(tmp_path, text, line, key):
    (tmp_path / "x.json").write_text(text)
    told = refused(records.read_json, str(tmp_path / "x.json"), "mend it")
    assert f"x.json, line {line}: the key {key}" in told and "twice" in told


@pytest.mark.parametrize("nested", [False, True])
def test_a_key_twice_in_a_task_or_in_a_line_of_json_is_refused(tmp_path, nested):
    text = json.dumps(task(), indent=1)
    key = '"input": "Tom saw 1' if nested else '"Instances"'
    root = write_sni(tmp_path, text.replace(key, ('"input": "x",\n' if nested else '"Instances": [],\n') + key))
    told = refused(data.load_sni, root)
    assert "task1_city.json, line" in told and ("the key input" if nested else "the key Instances") in told
    path = lines(tmp_path / "p.jsonl", {"id": "a", "prediction": "b"}, '{"id": "b", "prediction": "x", "prediction": "y"}')
    assert "p.jsonl, line 2: the key prediction is there twice" in refused(predictions.rescore, path, None, None)


def test_a_task_that_is_listed_twice_is_told_with_both_lines(tmp_path):
    root = write_sni(tmp_path, json.dumps(task()), "\ntask1_city\ntask2\n\ntask1_city\n")
    told = refused(data.load_sni, root)
    assert "test_tasks.txt, line 5: task1_city is listed on line 2 too" in told


def test_an_id_that_comes_twice_is_told_with_its_line(tmp_path):
    reference = mutations_data.REFERENCES[0]
    path = lines(tmp_path / "p.jsonl", {"id": "i0", "prediction": "b"})
    twice = lines(tmp_path / "r.jsonl", reference, mutations_data.REFERENCES[1], "", reference)
    assert "r.jsonl, line 4: the id i0" in refused(predictions.rescore, path, twice, None)
    twice = lines(tmp_path / "p.jsonl", {"id": "i0", "prediction": "b"}, "", {"id": "i0", "prediction": "c"})
    once = lines(tmp_path / "r.jsonl", reference, reference | {"track": "xlingual"})        # another track's, which do not count
    assert "p.jsonl, line 3: a second prediction of i0" in refused(predictions.rescore, twice, once, None)
    root = write_sni(tmp_path, json.dumps(task(Instances=[{"id": "a", "input": "x", "output": "y"}] * 2)))
    assert "two instances have the same id a" in refused(data.load_sni, root)


def test_one_id_in_two_tasks_is_not_scored_with_references_by_id_alone(tmp_path):
    rows = [mutations_data.PREDICTION | {"id": "i0", "task": f"task{n}"} for n in range(2)]
    path, official = lines(tmp_path / "p.jsonl", *rows), lines(tmp_path / "r.jsonl", mutations_data.REFERENCES[0])
    assert "ids of TAGI come in two tasks" in refused(predictions.rescore, path, official, None)
    assert predictions.rescore(path, None, None)["results"][0]["instances"] == 2


# ------------------------------------------------------------------------------------------------------ half an emoji

def instance(**changes) -> dict:
    row = {"id": "a", "input": "x", "output": ["y"]} | changes
    return task(Instances=[{"id": "b", "input": "x", "output": ["y"]}, row])


@pytest.mark.parametrize("record, where", [
    (task(Definition=[HALF]), "Definition 0"), (task(Definition=HALF), "Definition"), (task(Categories=[HALF]), "Categories 0"),
    (task(**{"Positive Examples": [{"input": HALF, "output": "y"}]}), "Positive Examples 0, input"),
    (instance(input=HALF), "Instances 1, input"), (instance(output=["y", HALF]), "Instances 1, output 1"),
    (instance(id=HALF), "Instances 1, id"), (instance(**{HALF: 1}), "Instances 1, a key")])
def test_half_an_emoji_in_a_task_is_told_with_file_and_instance(tmp_path, record, where):
    told = refused(data.load_sni, write_sni(tmp_path, json.dumps(record)))
    assert f"task1_city.json, {where}: sign" in told and "half a character" in told


def test_half_an_emoji_in_a_line_of_json_is_told_with_file_and_line(tmp_path):
    good, reference = {"id": "i0", "prediction": "b"}, mutations_data.REFERENCES[0]
    path, official = lines(tmp_path / "p.jsonl", good), lines(tmp_path / "r.jsonl", reference)
    broken = lines(tmp_path / "q.jsonl", good, {"id": "i1", "prediction": HALF})
    assert "q.jsonl, line 2, prediction: sign 6" in refused(predictions.rescore, broken, official, None)
    broken = lines(tmp_path / "s.jsonl", reference, reference | {"id": "i1", "references": ["a", HALF]})
    assert "s.jsonl, line 2, references 1: sign 6" in refused(predictions.rescore, path, broken, None)
    for name in ("c.jsonl", "c.txt"):
        broken = lines(tmp_path / name, {"text": "The dog ran."}, {"text": f"This is {HALF}."})
        assert f"{name}, line 2, text: sign" in refused(records.read_documents, broken)


def test_whole_emojis_and_nuls_that_json_writes_are_signs_like_others(tmp_path):
    root = write_sni(tmp_path, json.dumps(instance(input="a 🙂 and a \0", output=["\ud83d\ude00"])))
    x = data.load_sni(root)[0].instances[1]
    assert (x.input, x.outputs) == ("a 🙂 and a \0", ["😀"])
    path = lines(tmp_path / "c.jsonl", {"text": "a \0 b c"})
    assert records.read_documents(path) == ["a \0 b c"]
    assert "c.txt cannot be read: line 2 holds a NUL" in refused(records.read_documents, lines(tmp_path / "c.txt", "a b c", "a \0 b c"))


# ------------------------------------------------------------------------------------------------- encodings, endings

@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-32", "latin-1"])
@pytest.mark.parametrize("name", ["tasks/task1_city.json", "splits/default/test_tasks.txt", "c.txt", "c.jsonl"])
def test_a_file_is_utf_8_with_or_without_a_byte_order_mark(tmp_path, name, encoding):
    root = write_sni(tmp_path, json.dumps(task()))
    content = {"tasks/task1_city.json": json.dumps(task(Definition=["Wo ist das Café?"]), ensure_ascii=False),
               "splits/default/test_tasks.txt": "task1_city\ntask2_café\n", "c.txt": "Das Café ist zu.\n",
               "c.jsonl": json.dumps({"text": "Das Café ist zu."}, ensure_ascii=False)}[name]
    (tmp_path / name).write_bytes(content.encode(encoding))
    (tmp_path / "tasks/task2_café.json").write_text(json.dumps(task()))
    read = records.read_documents if name.startswith("c.") else lambda path: data.load_sni(root)
    if encoding.startswith("utf-8"):
        found = read(str(tmp_path / name))
        assert found == ["Das Café ist zu."] or found[0].name == "task1_city"
    else:
        assert f"/{name} cannot be read" in refused(read, str(tmp_path / name)) or "NUL" in refused(read, str(tmp_path / name))


@pytest.mark.parametrize("name", ["c.txt", "c.json", "c.jsonl", "c.text", "c"])
def test_lines_of_json_are_known_by_what_they_hold(tmp_path, name):
    path = lines(tmp_path / name, "", {"text": "The dog ran."}, {"url": 1, "text": "A cat sat."})
    assert records.read_documents(path) == ["The dog ran.", "A cat sat."]


@pytest.mark.parametrize("name", ["c.txt", "c.json"])
@pytest.mark.parametrize("content", [
    [{"text": "The dog ran."}], ["The dog ran."], '{"text": "The dog', '{\n "text": "The dog ran."\n}', {"texts": "The dog ran."}])
def test_json_that_is_no_lines_with_a_text_is_not_read_as_plain_text(tmp_path, name, content):
    text = content if isinstance(content, str) else json.dumps(content)
    assert f"{name}, line 1" in refused(records.read_documents, lines(tmp_path / name, text))
    if isinstance(content, list):
        refused(records.read_documents, lines(tmp_path / name, json.dumps(content, indent=1)))


def test_plain_text_that_begins_like_json_is_plain_text(tmp_path):
    texts = ["[1] The dog ran.", "{ The dog ran.", "[[Dog]] ran away fast.", '"The dog ran," he said.', "{{Infobox | a | b}}"]
    for text in texts:
        assert records.read_documents(lines(tmp_path / "c.txt", text, "A cat sat.")) == [text, "A cat sat."]


# ------------------------------------------------------------------------------------------------ texts without spaces

def test_documents_that_are_left_out_are_counted(tmp_path):
    path = lines(tmp_path / "c.txt", "The dog ran.", "", "Dogs.", "Two words", " ")
    with pytest.warns(UserWarning, match="c.txt: 2 of 3 documents are left out"):
        assert records.read_documents(path) == ["The dog ran."]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        records.read_documents(lines(tmp_path / "d.txt", "The dog ran.", ""))


@pytest.mark.parametrize("text", ["小猫在花园的树下睡着了。", "きのう東京で友だちに会った。", "แมวนอนหลับอยู่ในสวน", "ខ្ញុំទៅផ្សារនៅថ្ងៃនេះ"])
def test_texts_without_spaces_are_documents(tmp_path, text):
    with pytest.warns(UserWarning, match="1 of 2"):
        assert records.read_documents(lines(tmp_path / "c.txt", text, "犬")) == [text]


@pytest.mark.parametrize("ids", [[], [7], [7, 8]])
def test_a_document_of_fewer_tokens_than_pieces_is_cut_into_pieces_that_are_not_empty(ids):
    def tokenizer(texts, add_special_tokens):
        return {"input_ids": [list(ids) for _ in texts]}

    tokenizer.eos_token_id = 1
    for pieces in data.cut_documents(["text"] * 3, tokenizer, 3, 10, np.random.default_rng(0)):
        assert len(pieces) == 3 and all(pieces) and {i for piece in pieces for i in piece} <= {*ids, 1}


# ----------------------------------------------------------------------------------------------------- random damage

@pytest.mark.parametrize("kind", mutations_data.KINDS)
@settings(max_examples=40, deadline=20_000, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
@given(rng=st.randoms(use_true_random=False))
def test_a_damaged_file_works_or_is_refused_in_one_line(kind, rng):
    mutations_data.run(kind, rng)


def test_random_cases_are_counted_by_how_they_end():
    counts = mutations_data.run_cases(20, seed=0)
    assert counts.keys() == mutations_data.KINDS.keys()
    for kind, ends in counts.items():
        assert ends.keys() == {"works", "one line"} and ends.total() == 20, kind
    assert mutations_data.run_cases(3, seed=0) == mutations_data.run_cases(3, seed=0)


def test_the_damage_is_seen_by_what_looks_at_it(monkeypatch):
    """A reader that lets half an emoji through is caught by the cases."""
    monkeypatch.setattr(records, "check_texts", lambda value, where: None)
    monkeypatch.setattr(common, "check_text", lambda text, where: None)
    monkeypatch.setattr(mutations_data, "KINDS", {"SNI task": mutations_data.sni_task})
    assert mutations_data.run_cases(150, seed=0)["SNI task"]["UnicodeEncodeError"] > 0
    with pytest.raises(UnicodeEncodeError):
        for case in range(150):
            mutations_data.run("SNI task", random.Random(f"0 SNI task {case}"))


# -------------------------------------------------------------------------------------------------- adapt.py, --probe

def test_a_wrong_line_of_instructions_is_told_by_its_number(tmp_path):
    good = {"instruction": "Find it.", "input": "A cat."}
    for bad, said in (({"instruction": " ", "input": "x"}, "needs an instruction"), (good | {"demonstrations": [["x"]]}, "demonstrations"),
                      (good | {"input": HALF}, "input: sign 6"), ('{"input": "a", "input": "b"}', "the key input is there twice")):
        path = lines(tmp_path / "i.jsonl", good, "", bad)
        told = refused(adapt.answer_file, None, argparse.Namespace(instructions=path))
        assert "i.jsonl, line 3" in told and said in told


def test_a_typed_line_that_is_no_utf_8_is_refused(monkeypatch):
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"caf\xe9\n"), encoding="utf-8"))
    assert "this instruction is no text in UTF-8" in refused(adapt.prompt, "instruction")
    c_locale = io.TextIOWrapper(io.BytesIO(b"caf\xe9\n"), encoding="utf-8", errors="surrogateescape")
    monkeypatch.setattr("sys.stdin", c_locale)
    assert "this instruction is no text in UTF-8" in refused(adapt.prompt, "instruction")


def test_a_closed_standard_input_ends_the_questions(monkeypatch):
    monkeypatch.setattr("sys.stdin", None)
    adapt.ask(None, argparse.Namespace(), None)


@pytest.mark.parametrize("name", ["./task1_city", "../tasks/task1_city", "/a/task1_city", "tasks/task2_day"])
def test_a_path_in_a_split_is_refused_as_one_task_would_have_two_names(tmp_path, name):
    root = write_sni(tmp_path, json.dumps(task()), f"task1_city\n{name}\n")
    assert f"line 2: {name} is a path" in refused(data.load_sni, root)


def test_paraphrases_with_a_task_twice_or_half_an_emoji_are_refused(tmp_path):
    path = tmp_path / "p.json"
    for text, said in (('{"a": "x",\n"a": "y"}', "line 2: the key a"), (json.dumps({"a": HALF}), "a: sign 6")):
        path.write_text(text)
        assert said in refused(probe.read_paraphrases, str(path), {"a"})
