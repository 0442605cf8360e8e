"""The built-in suite: deterministic, without leaks, right answers, and a tokenizer that keeps them."""
import filecmp
import json
import os
import random
import sys

import pytest

sys.path.insert(0, os.path.join(os.path.dirname(__file__), ".."))
import sample

SPLITS = ("train", "validation", "test", "test_unseen_wording")


@pytest.fixture(scope="session")
def root(tmp_path_factory):
    path = tmp_path_factory.mktemp("suite") / "sample"
    sample.write_suite(path, seed=0)
    return path


@pytest.fixture(scope="session")
def suite(root):
    """split -> {task name: task file}"""
    names = {s: (root / "splits" / "default" / f"{s}_tasks.txt").read_text().split() for s in SPLITS}
    return {s: {n: json.loads((root / "tasks" / f"{n}.json").read_text()) for n in names[s]} for s in SPLITS}


@pytest.fixture(scope="session")
def corpus(root):
    return (root / "corpus.txt").read_text().splitlines()


@pytest.fixture(scope="session")
def tokenizer(root):
    from transformers import AutoTokenizer
    return AutoTokenizer.from_pretrained(root / "tokenizer")


def words(texts):
    return {word for text in texts for word in text.split()}


def texts_of(entry):
    examples = entry["Positive Examples"] + entry["Negative Examples"]
    return [*entry["Definition"], *(e[k] for e in examples for k in e),
            *(t for i in entry["Instances"] for t in (i["input"], *i["output"]))]


def files_under(root):
    return sorted(os.path.relpath(os.path.join(d, f), root) for d, _, files in os.walk(root) for f in files)


def test_the_same_seed_gives_the_same_bytes_and_another_seed_another_suite(root, tmp_path):
    sample.write_suite(tmp_path / "again", seed=0)
    names = files_under(root)
    assert names == files_under(tmp_path / "again")
    assert filecmp.cmpfiles(root, tmp_path / "again", names, shallow=False)[1:] == ([], [])
    assert not os.path.exists(str(root) + ".tmp")
    held = [{(t.operands, t.form) for t in sample.split_tasks(random.Random(seed))["test"]} for seed in (0, 1)]
    assert len(held[0] & held[1]) < len(held[0]) / 2


def test_splits_are_disjoint_and_have_their_sizes(suite, root):
    assert len(suite["train"]) >= 400 and len(suite["validation"]) >= 20 and len(suite["test"]) >= 40
    assert list(suite["test_unseen_wording"]) == [n + "_reworded" for n in suite["test"]]
    names = [n for s in SPLITS for n in suite[s]]
    assert len(set(names)) == len(names) == len(os.listdir(root / "tasks"))
    assert len({e["Categories"][0] for e in suite["test"].values()}) >= 6


def test_instances_are_distinct_and_no_demonstration_is_among_them(suite):
    for split in SPLITS:
        for entry in suite[split].values():
            inputs = [i["input"] for i in entry["Instances"]]
            assert len(inputs) == (50 if split == "train" else 25)
            shown = [e["input"] for e in entry["Positive Examples"]]
            assert len(shown) == len(entry["Negative Examples"]) == 2
            assert len(set(inputs + shown)) == len(inputs) + 2
            assert all(1 <= len(i["output"][0].split()) <= 6 for i in entry["Instances"])


@pytest.mark.parametrize("seed", range(12))
def test_no_combination_of_a_held_out_task_is_in_training(seed):
    split = sample.split_tasks(random.Random(seed))
    assert [len(split[s]) >= n for s, n in (("train", 400), ("validation", 20), ("test", 40))] == [True] * 3
    taught = set(map(sample.combination, split["train"]))
    held = split["validation"] + split["test"]
    assert not any(sample.combination(task) in taught for task in held)
    assert len(set(map(sample.combination, held))) == len(held)
    for task in held:  # each concept is known from other combinations in the same category
        for part in (*task.operands, task.form):
            assert sum(part in (*t.operands, t.form) for t in split["train"] if t.category == task.category) >= 2


def test_a_pair_is_held_out_in_both_orders_and_every_form():
    one, other = (sample.Task("Pair Extraction", "sentence", *rest) for rest in ((("city", "day"), "and"), (("day", "city"), "or")))
    assert sample.combination(one) == sample.combination(other) != sample.combination(one._replace(source="list"))
    single = sample.Task("Text Formatting", "sentence", ("city",), "stars")
    assert sample.combination(single) != sample.combination(single._replace(form="quotes"))


def test_definitions_are_many_and_belong_to_one_task_each(suite):
    owners = {}
    for split in SPLITS:
        for name, entry in suite[split].items():
            assert len(entry["Definition"]) == len(set(entry["Definition"])) >= (3 if "wording" in split else 8)
            for definition in entry["Definition"]:
                assert owners.setdefault(definition, name) == name


def test_unseen_wordings_use_known_words_in_patterns_no_other_task_has(suite):
    patterns = {f"{o} {a}" for o in sample.OPENINGS for a in sample.ASKS + sample.CLASS_ASKS}
    assert not patterns & {*sample.UNSEEN_ASKS, *sample.UNSEEN_CLASS_ASKS}
    seen = {d for s in SPLITS[:3] for e in suite[s].values() for d in e["Definition"]}
    unseen = {d for e in suite["test_unseen_wording"].values() for d in e["Definition"]}
    assert not seen & unseen
    trained = words(d for e in suite["train"].values() for d in e["Definition"])
    assert words(unseen) <= trained
    for name, entry in suite["test"].items():
        assert {**suite["test_unseen_wording"][name + "_reworded"], "Definition": 0} == {**entry, "Definition": 0}


def test_every_pair_of_slots_occurs_in_several_sentences():
    for a in sample.SLOTS:
        for b in sample.SLOTS:
            assert sum("{%s}" % a in t and "{%s}" % b in t for t in sample.EVENTS) >= 2, (a, b)


def test_answers_are_the_slots_of_the_input():
    rng = random.Random(3)
    for task in sample.split_tasks(rng)["train"]:
        for record, output in sample.draw_examples(rng, task, 3)[1]:
            for operand in task.operands:
                if operand in sample.SLOTS:  # the one value of that slot that the text holds
                    held = [w for w in record.text.split() if w in sample.SLOTS[operand][1]]
                    assert len(held) == 1 and held[0] in output.split()


def test_known_answers():
    record = sample.Record("dog , Paris , red , seven .",
                           {"animal": "dog", "city": "Paris", "colour": "red", "number": "seven"})
    for operands, form, output in ((("number", "city"), "plus", "seven plus Paris"), (("country",), "quotes", '" France "'),
                                   (("young",), "thrice", "puppy puppy puppy"), (("europe",), "up_down", "up"),
                                   (("wild",), "yes_no", "no"), (("colour", "next_number"), "comma", "red , eight")):
        assert sample.answer(sample.Task("", "list", operands, form), record) == output


def test_negative_examples_are_wrong(suite):
    for split in SPLITS[:3]:
        for entry in suite[split].values():
            for right, wrong in zip(entry["Positive Examples"], entry["Negative Examples"]):
                assert right["input"] == wrong["input"] and right["output"] != wrong["output"]


def test_copying_scores_next_to_nothing(suite):
    for split in ("test", "test_unseen_wording"):
        pairs = [(i, e["Positive Examples"][0]["output"]) for e in suite[split].values() for i in e["Instances"]]
        assert sum(i["input"] == i["output"][0] for i, _ in pairs) == 0
        assert sum(shown == i["output"][0] for i, shown in pairs) < 0.12 * len(pairs)
        classes = sum(e["Categories"] == ["Text Classification"] for e in suite[split].values())
        assert classes <= 0.12 * len(suite[split])


def test_corpus_has_the_words_of_definitions_but_no_definition(suite, corpus):
    assert len(corpus) == sample.DOCUMENTS and 30 < sum(len(d.split()) for d in corpus) / len(corpus) < 60
    definitions = [d for s in SPLITS for e in suite[s].values() for d in e["Definition"]]
    text = "\n".join(corpus)
    assert words(definitions) <= words(corpus)
    assert not any(d in text for d in definitions)


def test_no_document_asks_two_questions_in_a_row(corpus):
    assert not any("? What is" in line for line in corpus)


def test_tokenizer_equals_sentencepiece_and_knows_every_word(root, suite, corpus, tokenizer):
    import sentencepiece
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(root / "tokenizer" / "spiece.model"))
    texts = corpus + sorted({t for s in SPLITS for e in suite[s].values() for t in texts_of(e)})
    ids = tokenizer(texts, add_special_tokens=False).input_ids
    assert ids == pieces.encode(texts)
    assert all(tokenizer.unk_token_id not in row for row in ids)
    assert all(len(row) == len(text.split()) for row, text in zip(ids, texts))  # one piece a word


def test_tokenizer_has_t5s_special_tokens_and_takes_the_usual_prompt(tokenizer):
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id) == (0, 1, 2)
    assert 400 <= len(tokenizer) <= 650
    assert tokenizer("lamp").input_ids[-1] == 1
    sentinels = tokenizer.convert_tokens_to_ids([f"<extra_id_{i}>" for i in range(sample.EXTRA_IDS)])
    assert sentinels == list(range(len(tokenizer) - 1, len(tokenizer) - 1 - sample.EXTRA_IDS, -1))
    assert tokenizer("Anna <extra_id_0> red", add_special_tokens=False).input_ids[1] == sentinels[0]
    prompt = ("Definition: Write the city twice.\n\n Positive Example 1 -\nInput: Rome , dog .\n Output: Rome Rome.\n\n"
              "Now complete the following example -\nInput: seven , Lima .\nOutput: ")
    assert len(tokenizer(prompt, add_special_tokens=False).input_ids) == len(prompt.split()) + 2  # two attached full stops


def test_decoding_gives_back_the_answers(suite, tokenizer):
    answers = sorted({i["output"][0] for s in SPLITS for e in suite[s].values() for i in e["Instances"]})
    assert tokenizer.batch_decode(tokenizer(answers).input_ids, skip_special_tokens=True) == answers
