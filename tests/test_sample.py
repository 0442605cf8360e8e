"""The built-in suite: deterministic, without leaks, right answers, a tokenizer that keeps them."""
import filecmp
import json
import os
import random
import re
import sys

import pytest

sys.path.insert(0, os.path.join(os.path.dirname(__file__), ".."))
from bench import concepts, sample

SPLITS = ("train", "validation", "test", "validation_unseen_wording", "test_unseen_wording")


@pytest.fixture(scope="session")
def root(tmp_path_factory):
    path = tmp_path_factory.mktemp("suite") / "sample"
    sample.write_suite(path, seed=0)
    return path


@pytest.fixture(scope="session")
def suite(root):
    """split -> {task name: task file}"""
    files = {}
    for split in SPLITS:
        names = (root / "splits" / "default" / f"{split}_tasks.txt").read_text().split()
        files[split] = {n: json.loads((root / "tasks" / f"{n}.json").read_text()) for n in names}
    return files


@pytest.fixture(scope="session")
def corpus(root):
    return (root / "corpus.txt").read_text().splitlines()


@pytest.fixture(scope="session")
def tokenizer(root):
    from transformers import AutoTokenizer
    return AutoTokenizer.from_pretrained(root / "tokenizer")


def words(texts):
    return {word.lower() for word in concepts.pieces_of(texts)}


def texts_of(entry):
    examples = entry["Positive Examples"] + entry["Negative Examples"]
    return [*entry["Definition"], *(e[k] for e in examples for k in e),
            *(t for i in entry["Instances"] for t in (i["input"], *i["output"]))]


def files_under(root):
    return sorted(os.path.relpath(os.path.join(folder, file), root)
                  for folder, _, files in os.walk(root) for file in files)


def test_the_same_seed_gives_the_same_bytes_and_another_seed_another_suite(root, tmp_path):
    sample.write_suite(tmp_path / "again", seed=0)
    names = files_under(root)
    assert names == files_under(tmp_path / "again")
    assert filecmp.cmpfiles(root, tmp_path / "again", names, shallow=False)[1:] == ([], [])
    assert not os.path.exists(str(root) + ".tmp")
    splits = [sample.split_tasks(random.Random(seed)) for seed in (0, 1)]
    held = [{(task.operands, task.form) for task in split["test"]} for split in splits]
    assert len(held[0] & held[1]) < len(held[0]) / 2


def test_splits_are_disjoint_and_have_their_sizes(suite, root):
    assert len(suite["train"]) >= 400
    assert len(suite["validation"]) >= 20 and len(suite["test"]) >= 40
    for split in ("validation", "test"):
        assert list(suite[split + "_unseen_wording"]) == [n + "_reworded" for n in suite[split]]
    names = [n for s in SPLITS for n in suite[s]]
    assert len(set(names)) == len(names) == len(os.listdir(root / "tasks"))
    assert len({e["Categories"][0] for e in suite["test"].values()}) >= 6


def test_instances_are_distinct_and_no_demonstration_is_among_them(suite):
    for split in SPLITS:
        for entry in suite[split].values():
            inputs = [i["input"] for i in entry["Instances"]]
            assert len(inputs) == (64 if split == "train" else 25)
            shown = [e["input"] for e in entry["Positive Examples"]]
            assert len(shown) == len(entry["Negative Examples"]) == 2
            assert len(set(inputs + shown)) == len(inputs) + 2
            assert all(1 <= len(i["output"][0].split()) <= 6 for i in entry["Instances"])


@pytest.mark.parametrize("seed", range(12))
def test_no_combination_of_a_held_out_task_is_in_training(seed):
    split = sample.split_tasks(random.Random(seed))
    for name, n in (("train", 1000), ("validation", 40), ("test", 60)):
        assert len(split[name]) >= n
    taught = set().union(*map(sample.parts_of, split["train"]))
    held = split["validation"] + split["test"]
    assert not any(sample.combination(task) in taught for task in held)
    assert len(set(map(sample.combination, held))) == len(held)
    for task in held:  # each concept is known from other combinations in the same category
        taught = [t for t in split["train"] if t.category == task.category]
        for part in (*task.operands, task.form):
            assert sum(part in (*t.operands, t.form) for t in taught) >= 2


def test_a_pair_is_held_out_in_both_orders_and_every_form():
    one = sample.Task("Pair Extraction", "sentence", ("city", "day"), "and")
    other = sample.Task("Pair Extraction", "sentence", ("day", "city"), "or")
    assert sample.combination(one) == sample.combination(other)
    assert sample.combination(other) != sample.combination(one._replace(source="list"))
    single = sample.Task("Text Formatting", "sentence", ("city",), "stars")
    assert sample.combination(single) != sample.combination(single._replace(form="quotes"))


def test_definitions_are_many_and_belong_to_one_task_each(suite):
    owners = {}
    for split in SPLITS:
        for name, entry in suite[split].items():
            assert len(entry["Definition"]) == len(set(entry["Definition"]))
            assert len(entry["Definition"]) >= (3 if "wording" in split else 8)
            for definition in entry["Definition"]:
                assert owners.setdefault(definition, name) == name


def test_unseen_wordings_use_known_words_in_patterns_no_other_task_has(suite):
    """Their patterns are no parts of those that training definitions are put together from."""
    seen = {d.lower() for s in SPLITS[:3] for e in suite[s].values() for d in e["Definition"]}
    for split in ("validation", "test"):
        unseen = {d for e in suite[split + "_unseen_wording"].values() for d in e["Definition"]}
        assert not seen & {d.lower() for d in unseen}
        assert words(unseen) <= words(d for e in suite["train"].values() for d in e["Definition"])
        for name, entry in suite[split].items():
            reworded = suite[split + "_unseen_wording"][name + "_reworded"]
            assert {**reworded, "Definition": 0} == {**entry, "Definition": 0}
    patterns = sample.TABLES["unseen_asks"] + sample.TABLES["unseen_class_asks"]
    openings, asks = ["", *sample.TABLES["openings"]], sample.TABLES["class_asks"]
    assert not set(patterns) & {opening + ask for opening in openings for ask in asks}
    built = re.compile("|".join(re.escape(core) + "[.?]?" + re.escape(tail) + "[.?]?"
                                for core in sample.TABLES["cores"]
                                for tail in sample.TABLES["tails"]))
    assert not any(built.fullmatch(pattern) for pattern in patterns)


def test_every_pair_of_slots_occurs_in_several_sentences():
    for a in sample.SLOTS:
        for b in sample.SLOTS:
            both = [t for t in sample.TABLES["events"] if "{%s}" % a in t and "{%s}" % b in t]
            assert len(both) >= 2, (a, b)


def test_answers_are_the_slots_of_the_input():
    rng = random.Random(3)
    for task in sample.split_tasks(rng)["train"]:
        for record, output in sample.draw_examples(rng, task, 3)[1]:
            for operand in task.operands:
                if operand in sample.SLOTS:  # the one value of that slot that the text holds
                    pieces = concepts.pieces_of([record.text])
                    held = [word for word in pieces if word in sample.SLOTS[operand][1]]
                    assert len(held) == 1 and held[0] in concepts.pieces_of([output])


def test_known_answers():
    record = concepts.Record("dog, Paris, red, seven.", {
        "animal": "dog", "city": "Paris", "colour": "red", "number": "seven",
        "first": "dog", "second": "Paris", "third": "red", "last": "seven"})
    for operands, form, output in (
            (("number", "city"), "plus", "seven plus Paris"),
            (("country",), "quotes", '"France"'),
            (("young",), "thrice", "puppy puppy puppy"),
            (("europe",), "up_down", "up"),
            (("wild",), "yes_no", "no"),
            (("wild",), "down_up", "up"),
            (("last",), "stars", "*seven*"),
            (("colour", "next_number"), "comma", "red, eight"),
            (("previous_number",), "plain", "six"),
            (("second", "animal", "language"), "dash", "Paris - dog - French")):
        assert sample.answer(sample.Task("", "list", operands, form), record) == output
    in_lower_case = concepts.Record(record.text.lower(), record.facts, lower=True)
    task = sample.Task("", "list", ("city", "country"), "and")
    assert sample.answer(task, in_lower_case) == "paris and france"


def test_positions_are_those_of_the_list():
    rng = random.Random(5)
    for _ in range(50):
        record = sample.make_record(rng, "list", ("fourth",))
        items = record.text.removesuffix(".").split(", ")
        assert [record.facts[p] for p in sample.POSITIONS] == [*items[:4], items[-1]]


def test_training_inputs_are_varied_and_those_of_the_other_splits_are_not(suite):
    for split in SPLITS:
        inputs = [i["input"] for e in suite[split].values() for i in e["Instances"]]
        lower = sum(x == x.lower() for x in inputs)
        unended = sum(not x.endswith(".") for x in inputs)
        if split == "train":
            assert 0.1 < lower / len(inputs) and 0.1 < unended / len(inputs) < 0.2
        else:
            assert unended == 0
            sentences = [i["input"] for name, entry in suite[split].items() if "sentence" in name
                         for i in entry["Instances"]]
            assert not any(x == x.lower() for x in sentences)


def test_negative_examples_are_wrong(suite):
    for split in SPLITS[:3]:
        for entry in suite[split].values():
            for right, wrong in zip(entry["Positive Examples"], entry["Negative Examples"]):
                assert right["input"] == wrong["input"] and right["output"] != wrong["output"]


def test_copying_scores_next_to_nothing(suite):
    for split in ("test", "test_unseen_wording"):
        pairs = [(i, entry["Positive Examples"][0]["output"])
                 for entry in suite[split].values() for i in entry["Instances"]]
        assert sum(i["input"] == i["output"][0] for i, _ in pairs) == 0
        assert sum(shown == i["output"][0] for i, shown in pairs) < 0.12 * len(pairs)
        classes = sum(e["Categories"] == ["Text Classification"] for e in suite[split].values())
        assert classes <= 0.12 * len(suite[split])


def test_corpus_has_no_definition_but_bare_questions(suite, corpus):
    """A document may ask what a task asks for that wants one word alone; nothing beyond that."""
    assert len(corpus) == sample.DOCUMENTS
    assert 20 < sum(len(d.split()) for d in corpus) / len(corpus) < 60
    text = "\n".join(corpus)
    definitions = set()
    for split in SPLITS:
        for name, entry in suite[split].items():
            if "_plain" not in name:
                definitions.update(entry["Definition"])
    assert len(definitions) > 15000 and not any(d in text for d in definitions)


def test_no_document_asks_two_questions_in_a_row(corpus):
    assert not any("? What is" in line for line in corpus)


def test_the_tokenizer_knows_every_word_of_the_suite_as_one_piece(suite, corpus, tokenizer):
    texts = corpus + sorted({t for s in SPLITS for e in suite[s].values() for t in texts_of(e)})
    rows = tokenizer(texts, add_special_tokens=False).input_ids
    assert all(tokenizer.unk_token_id not in row for row in rows)
    piece = re.compile(r"(?i:n't)|'\w+|(?:(?!(?i:n't))\w)+|[^\w\s]")
    assert all(tokenizer.convert_ids_to_tokens(row) == piece.findall(text)
               for row, text in zip(rows, texts))


def test_the_tokenizer_has_t5s_special_tokens_and_takes_the_usual_prompt(tokenizer):
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id) == (0, 1, 2)
    assert len(tokenizer) == len(concepts.vocabulary()) < 2100
    assert tokenizer("lamp").input_ids == [tokenizer.get_vocab()["lamp"], 1]
    prompt = ("Definition: Write the city twice.\n\n"
              " Positive Example 1 -\nInput: Rome, dog.\n Output: Rome Rome.\n\n"
              "Now complete the following example -\nInput: seven, Lima.\nOutput: ")
    assert tokenizer.unk_token_id not in tokenizer(prompt).input_ids


def test_spaces_around_punctuation_and_typographic_signs_make_no_difference(tokenizer):
    plain = tokenizer("Don't write \"Paris\", it's [Rome]: the animal's young!").input_ids
    assert tokenizer.unk_token_id not in plain
    for text in ("Don't write \" Paris \" , it's [ Rome ] : the animal's young !",
                 "Don’t write “Paris”,it’s [Rome]:the animal’s young !"):
        assert tokenizer(text).input_ids == plain
    tables = [sample.TABLES["slots"], sample.TABLES["function_words"]]
    for word in concepts.pieces_of(concepts.strings(tables)):
        cases = f"{word} {word.lower()} {word.capitalize()}"
        assert tokenizer.unk_token_id not in tokenizer(cases).input_ids, word
    asked = " ".join(concepts.pieces_of(concepts.strings(sample.TABLES["cores"])))
    assert tokenizer.unk_token_id not in tokenizer(asked.upper().replace("N'T", "")).input_ids


def test_fillers_are_no_words_that_mean_something_in_a_definition():
    assert len(concepts.FILLERS) > 200
    telling = {"city", "first", "twice", "not", "no", "quotes", "comma", "wild", "then", "yes",
               "day", "word"}
    assert not telling & set(concepts.FILLERS)


def test_decoding_gives_back_the_answers(suite, tokenizer):
    answers = set()
    for split in SPLITS:
        for entry in suite[split].values():
            answers.update(i["output"][0] for i in entry["Instances"])
    answers = sorted(answers)
    assert tokenizer.batch_decode(tokenizer(answers).input_ids, skip_special_tokens=True) == answers
