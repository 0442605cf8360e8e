"""Splits, plain text and vocabulary for a T5 from nothing: what is held out, and that none of it is read."""
import json
import os
import random
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

import common
import data
import t5
from bench import scratch

ROOT = Path(__file__).parent.parent
WORDS = [a + b for a in ("ba", "ko", "li", "mu", "ne", "po", "ra", "su", "ti", "wo") for b in (
    "bam", "cot", "dil", "fen", "gor", "hup", "jek", "lap", "mir", "nos")]


def write_tasks(root, categories=12, of_each=18):
    """SNI's layout: tasks whose definitions are words at random; in each category a pair of twins, and three of a name."""
    rng = random.Random(0)
    names, twin = [], []
    for c in range(categories):
        for t in range(of_each if c else 3):                    # the first one has too few to hold any out
            words = [rng.choice(WORDS) for _ in range(12)]
            if t == 1:
                words = [*twin[:-1], "other"]
            twin = words
            name = f"task{100 * c + t}_" + (f"c{c}_same" if 2 <= t < 5 else f"c{c}_t{t}")
            record = {"Definition": [" ".join(words) + "."], "Categories": [f"Category {c}"],
                      "Positive Examples": [{"input": f"ein{name} {words[0]} x", "output": f"aus{name}", "explanation": "because"}],
                      "Instances": [{"id": f"{name}-{n}", "input": f"question{name} {words[n]} what is it", "output": [f"answer{name}"]}
                                    for n in range(4)]}
            names.append(name)
            os.makedirs(f"{root}/tasks", exist_ok=True)
            with open(f"{root}/tasks/{name}.json", "w") as f:
                json.dump(record, f)
    os.makedirs(f"{root}/splits/default")
    for split, its in (("train", names), ("test", names[:2])):
        with open(f"{root}/splits/default/{split}_tasks.txt", "w") as f:
            f.write("\n".join(its) + "\n")


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    root = tmp_path_factory.mktemp("scratch")
    write_tasks(root / "sni")
    scratch.write_scratch(str(root / "sni"), str(root / "out"), 0, 600)
    return root


def test_held_out_tasks_are_spread_over_categories_and_have_no_twin(written):
    splits = {split: data.load_sni(str(written / "out"), split, None) for split in (*scratch.SIZES, "train")}
    names = {split: {task.name for task in tasks} for split, tasks in splits.items()}
    assert {split: len(names[split]) for split in scratch.SIZES} == scratch.SIZES
    every = data.listed_tasks(str(written / "sni"), "train")
    assert sorted(every) == sorted(name for its in names.values() for name in its)      # each in one split
    held_out = Counter(task.category for split in scratch.SIZES for task in splits[split])
    sizes = Counter(task.category for tasks in splits.values() for task in tasks)
    assert len(held_out) == 11 and all(2 * n <= sizes[category] for category, n in held_out.items())
    assert max(held_out.values()) - min(held_out.values()) <= 1
    pairs = [line.split() for line in (written / "out/splits/twins.txt").read_text().splitlines()]
    assert len(pairs) == 12 + 3 * 11 and not {name for pair in pairs for name in pair} & set().union(
        *(names[split] for split in scratch.SIZES))
    assert data.listed_tasks(str(written / "out"), "test") == data.listed_tasks(str(written / "sni"), "test")


def test_the_text_is_of_the_training_tasks_alone_and_without_the_instances_answers(written):
    text = (written / "out/corpus.txt").read_text()
    for split in ("train", *scratch.SIZES):
        for task in data.load_sni(str(written / "out"), split, None):
            trained = split == "train"
            assert (f"question{task.name} " in text) == trained
            assert (f"aus{task.name} because" in text) == trained and f"answer{task.name}" not in text
    tokenizer = t5.load_tokenizer(str(written / "out/tokenizer"))
    some = text.splitlines()[0]
    assert tokenizer.decode(tokenizer(some)["input_ids"], skip_special_tokens=True) == some
    assert len(tokenizer) <= 600 and tokenizer.convert_tokens_to_ids("<extra_id_0>") == len(tokenizer) - 1


def test_the_seed_decides_and_a_folder_that_was_changed_stays(written, capsys):
    scratch.write_scratch(str(written / "sni"), str(written / "again"), 0, 600)
    scratch.write_scratch(str(written / "sni"), str(written / "other"), 1, 600)
    lists = [(written / name / "files.sha256").read_text() for name in ("out", "again", "other")]
    assert lists[0] == lists[1] != lists[2]
    scratch.write_scratch(str(written / "sni"), str(written / "again"), 1, 600)         # it is ours, and is replaced
    assert (written / "again/files.sha256").read_text() == lists[2]
    (written / "again/tasks").unlink()
    (written / "again/tasks").symlink_to(written / "out")                               # the user's own link
    with pytest.raises(common.UserError, match="tasks"):
        scratch.write_scratch(str(written / "sni"), str(written / "again"), 0, 600)
    assert (written / "sni/tasks/task0_c0_t0.json").is_file()


def test_too_few_tasks_and_no_data_end_in_one_line(tmp_path):
    write_tasks(tmp_path / "sni", categories=4)
    for words, told in ((["--data", tmp_path / "sni"], "tasks may be held out, 90 are needed"),
                        (["--data", tmp_path / "none"], "train_tasks.txt"),
                        (["--data", tmp_path / "sni", "--vocabulary", "9"], "--vocabulary")):
        done = subprocess.run([sys.executable, "-m", "bench.scratch", "--out", str(tmp_path / "out"), *map(str, words)],
                              cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 2 and told in done.stderr and done.stderr.count("\n") == 1, done.stderr
    assert not (tmp_path / "out").exists()


def test_a_vocabulary_that_is_too_small_and_the_folder_itself_as_data_end_in_one_line(written, tmp_path, capsys):
    every_sign = "".join(chr(n) for n in range(0x4E00, 0x4E00 + 900))
    with pytest.raises(common.UserError, match="name a larger --vocabulary"):
        scratch.train_tokenizer([every_sign] * 3, 500)
    before = sorted((written / "out").rglob("*"))
    with pytest.raises(SystemExit) as end:
        scratch.main(["--data", str(written / "out"), "--out", str(written / "out")])
    line = capsys.readouterr().err
    assert end.value.code == 2 and line.count("\n") == 1 and "--data and --out both name" in line
    assert sorted((written / "out").rglob("*")) == before


def test_an_example_without_an_explanation_has_none_in_the_text(tmp_path):
    write_tasks(tmp_path)
    path = tmp_path / "tasks/task100_c1_t0.json"
    record = json.loads(path.read_text())
    record["Positive Examples"][0]["explanation"] = None
    path.write_text(json.dumps(record))
    tasks = [task for task in data.load_sni(str(tmp_path), "train", None) if task.name == path.stem]
    texts = scratch.documents(str(tmp_path), tasks)
    assert len(texts) == 6 and not any("None" in text for text in texts)


@pytest.mark.skipif("TAGI_DATA" not in os.environ, reason="TAGI_DATA names no folder with real tasks")
def test_real_tasks_are_split_without_a_task_in_two_splits(tmp_path):
    real_sni = Path(os.environ["TAGI_DATA"]) / "sni"
    scratch.write_scratch(str(real_sni), str(tmp_path / "out"), 0, 2000)
    names = {split: data.listed_tasks(str(tmp_path / "out"), split) for split in (*scratch.SIZES, "train", "test")}
    assert sum(map(len, names.values())) == len(set().union(*names.values()))
    assert len(names["train"]) == len(data.listed_tasks(str(real_sni), "train")) - 90
