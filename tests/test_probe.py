"""evaluate.py --probe: scores with right and wrong instructions, and how alike the LoRA is."""
import json
import sys
from collections import Counter

import pytest
import torch

pytest.register_assert_rewrite("stages")
pytest_plugins = ("stages",)
from conftest import make_random_tagi
from stages import ROOT
from test_p3 import p3_project, small_p3        # noqa: F401  fixtures

import evaluate
from bench import probe, report, similarity

SHIPPED = ("--checkpoint", ROOT / "assets" / "tagi-tiny", "--split=validation",
           "--eval-instances=8")
ALL = ["right", "paraphrase", "shuffled_words", "other_task", "empty", "random_words"]


def asked(project, *flags) -> tuple:
    """Arguments of a probe of the shipped TAGI on the miniature suite."""
    return "evaluate", "--probe", *SHIPPED, "--data", project.data, *flags


def read(folder) -> tuple[dict, str, list[dict]]:
    """(probe.json, probe.md, predictions) of a folder."""
    lines = (folder / "predictions.jsonl").read_text().splitlines()
    return (json.loads((folder / "probe.json").read_text()), (folder / "probe.md").read_text(),
            [json.loads(line) for line in lines])


# ------------------------------------------------------------------------------------ the scores

def test_a_constant_difference_has_an_interval_of_no_width():
    """Though the scores themselves vary: it is paired."""
    found = probe.compare({"a": 50, "b": 60, "c": 91}, {"a": 40, "b": 50, "c": 81})
    assert found["difference"] == 10 and found["difference_interval"] == [10, 10]
    assert found["score"] == 57 and found["interval"][0] < 50 < 65 < found["interval"][1]
    assert (found["tasks"], found["better"], found["equal"], found["worse"]) == (3, 3, 0, 0)


def test_tasks_are_counted_as_better_equal_and_worse_where_both_have_a_score():
    right = {"a": 100, "b": 50, "c": 0, "d": 30, "e": 100 * (0.1 + 0.2)}
    found = probe.compare(right, {"c": 25, "b": 50, "a": 0, "e": 30})
    assert (found["tasks"], found["better"], found["equal"], found["worse"]) == (4, 1, 2, 1)
    assert found["difference"] == pytest.approx(75 / 4) and found["score"] == pytest.approx(105 / 4)
    low, high = found["difference_interval"]
    assert low < 0 < 75 / 4 < high
    assert probe.compare(right, {"c": 25, "b": 50, "a": 0, "e": 30}) == found      # seeded


# ------------------------------------------------------------------------------ the instructions

def test_shuffled_words_are_the_same_words_in_another_order():
    for text in ("Find the city and then the town .", "one two", "no no yes"):
        for seed in range(20):
            shuffled = probe.shuffled_words(text, str(seed))
            assert shuffled != text and Counter(shuffled.split()) == Counter(text.split())
    assert len({probe.shuffled_words("a b c d e f g", str(seed)) for seed in range(20)}) > 10


@pytest.mark.parametrize("text", ["go", "go go", ""])
def test_words_of_which_there_is_one_order_are_not_shuffled(text):
    assert probe.shuffled_words(text, "0") is None


def test_random_words_are_as_many_and_come_from_the_pool():
    pool = [f"w{n}" for n in range(50)]
    words = probe.random_words("a b c d e f g h", pool, "0").split()
    assert len(words) == 8 and set(words) <= set(pool) and len(set(words)) > 1


def test_the_same_seed_gives_the_same_words():
    text, pool = "a b c d e f g h", [f"w{n}" for n in range(50)]
    for draw in (probe.shuffled_words, lambda text, seed: probe.random_words(text, pool, seed)):
        assert draw(text, "0 task") == draw(text, "0 task")
        assert draw(text, "0 task") != draw(text, "1 task") != draw(text, "0 other")


# ---------------------------------------------------------------------------------- the adapters

INSTRUCTIONS = ["say the first word", "count the cats", "upper", "say the last word"]


def formed(weights) -> torch.Tensor:
    """B·A of every site, written out, as one vector a task, (K, ·)."""
    return torch.cat([(B @ A).flatten(1) for A, B in weights.values()], 1).double()


def test_the_products_are_those_of_the_formed_matrices(monkeypatch):
    """Of a TAGI whose sites have several shapes, its adapters made three at a time."""
    tagi = make_random_tagi("v1.1", "--targets=q,wo")
    monkeypatch.setattr(similarity, "AT_ONCE", 3)
    weights = similarity.lora_of(tagi, INSTRUCTIONS)
    assert len({A.shape for A, _ in weights.values()}) > 1
    vectors, products = formed(tagi.adapt(INSTRUCTIONS).weights), similarity.gram(weights)
    torch.testing.assert_close(products, vectors @ vectors.T)
    torch.testing.assert_close(similarity.cosines(products), torch.cosine_similarity(
        vectors[:, None], vectors[None], dim=-1))
    centred = vectors - vectors.mean(0)
    torch.testing.assert_close(similarity.without_mean(products), centred @ centred.T)
    assert products.min() < 0.9 * products.max()                # they do differ


def test_lora_that_is_zero_is_like_none():
    zero = {"a": (torch.ones(2, 1, 3), torch.zeros(2, 4, 1))}
    assert similarity.cosines(similarity.gram(zero)).tolist() == [[0, 0], [0, 0]]


def test_means_are_over_pairs_of_one_category_and_of_two():
    similar = torch.tensor([[1, .5, .1, .2], [.5, 1, .3, .4], [.1, .3, 1, .9], [.2, .4, .9, 1]])
    assert similarity.within_and_between(similar, ["x", "x", "y", "y"]) == pytest.approx((.7, .25))
    assert similarity.within_and_between(similar, ["x"] * 4)[1] is None
    assert similarity.within_and_between(similar, list("wxyz"))[0] is None


# -------------------------------------------------------------------------------- what a user types

def test_the_probe_answers_as_an_evaluation_does(project, tmp_path):
    """The same predictions as the evaluation's rows of the same instructions; scores are theirs."""
    out = project.run(*asked(project))
    results, text, predictions = read(project.runs / "probe")
    assert text in out and out.splitlines()[-1].startswith(
        f"written to {project.runs / 'probe'}: ")
    assert [r["key"] for r in results["rows"]] == ALL and results["metric"] == "exact_match"
    project.run("evaluate", *SHIPPED, "--data", project.data, "--out", tmp_path / "out",
                "--rows=tagi,tagi_shuffled,tagi_empty,tagi_unseen_wording")
    lines = (tmp_path / "out" / "predictions.jsonl").read_text().splitlines()
    expected = [json.loads(line) for line in lines]
    for key, row in (("right", "tagi"), ("other_task", "tagi_shuffled"), ("empty", "tagi_empty"),
                     ("paraphrase", "tagi_unseen_wording")):
        its = [p["prediction"] for p in predictions if p["row"] == probe.CONDITIONS[key][1]]
        assert its == [p["prediction"] for p in expected
                       if p["row"] == report.ROWS[row] and p["demos"] == 0] and len(its) == 24
    assert len({tuple(p["prediction"] for p in predictions if p["row"] == row)
                for row, _ in Counter(p["row"] for p in predictions).items()}) >= 4
    for key, by_task in results["by_task"].items():
        its = [p for p in predictions if p["row"] == probe.CONDITIONS[key][1]]
        for name, found in by_task.items():
            mine = [p["prediction"] in p["references"] for p in its if p["task"] == name]
            assert len(mine) == 8 and found == pytest.approx(100 * sum(mine) / 8)
    categories = {p["task"]: p["category"] for p in predictions}       # a task each
    cells = {line.split(" | ")[0].strip("| "): line.strip("| ").split(" | ")[1:]
             for line in text.splitlines() if line.startswith("|")}
    for name, category in categories.items():
        assert cells[category] == [f"{results['by_task'][key][name]:.1f}" for key in ALL]


def test_the_right_instruction_is_better_than_another_tasks(project):
    out = project.run(*asked(project))
    results, _, _ = read(project.runs / "probe")
    rows = {r["key"]: r for r in results["rows"]}
    assert rows["other_task"]["better"] == rows["empty"]["better"] == 3
    assert rows["right"]["difference_interval"] == [0, 0] and rows["right"]["equal"] == 3
    table = [line for line in out.splitlines() if line.startswith("|")]
    assert len(table) == 2 + len(ALL) + 2 + 3           # these tasks are of three categories
    assert table[2].startswith("| the right one |") and table[2].endswith("|  |  |  |  |  |")
    assert table[5].endswith("| 3 (100 %) | 0 (0 %) | 0 (0 %) |")
    assert "within a category – (no such pair), between categories 0.9" in out


def test_the_instructions_are_those_of_the_task_and_kept(project):
    project.run(*asked(project))
    results, text, _ = read(project.runs / "probe")
    given = results["instructions"]
    for name, right in given["right"].items():
        record = json.loads((project.data / "tasks" / f"{name}.json").read_text())
        worded = json.loads((project.data / "tasks" / f"{name}_reworded.json").read_text())
        assert right == record["Definition"][0] and given["empty"][name] == ""
        assert given["paraphrase"][name] == worded["Definition"][0]
        assert given["other_task"][name] in set(given["right"].values()) - {right}
        assert Counter(given["shuffled_words"][name].split()) == Counter(right.split())
        words = " ".join(given["right"].values()).split()
        assert set(given["random_words"][name].split()) <= set(words)
        assert len(given["random_words"][name].split()) == len(right.split())
    first = next(iter(given["right"]))
    for key in ALL[:-2]:
        assert given[key][first] in text
    project.run(*asked(project, "--seed=1", "--out", project.runs / "other"))
    other = read(project.runs / "other")[0]["instructions"]
    changed = {key for key in ALL if other[key] != given[key]}
    assert changed == {"shuffled_words", "random_words"}


def test_an_interrupted_probe_goes_on(project, monkeypatch, capsys):
    """Ctrl-C in its third row: the first two are not answered again, and the result is the same."""
    project.run(*asked(project, "--out", project.runs / "whole"))
    answerer, calls = evaluate.answerer, []

    def interrupted(*args):
        calls.append(args)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return answerer(*args)

    monkeypatch.setattr(evaluate, "answerer", interrupted)
    with pytest.raises(SystemExit) as end:
        project.run(*asked(project))
    assert end.value.code == 130 and "run the same command again" in capsys.readouterr().out
    assert not (project.runs / "probe" / "probe.json").exists()
    project.run(*asked(project))
    assert len(calls) == 3 + 4
    assert read(project.runs / "probe")[:2] == read(project.runs / "whole")[:2]
    project.run(*asked(project))
    assert len(calls) == 7                                                  # all there
    project.run(*asked(project, "--fresh"))
    assert len(calls) == 7 + 6


def test_other_instructions_are_answered_anew(project):
    """Predictions of the words of another seed are set aside."""
    project.run(*asked(project))
    project.run(*asked(project, "--seed=1"))
    assert (project.runs / "probe" / "predictions.jsonl.1").exists()
    assert len(read(project.runs / "probe")[2]) == 6 * 24


def test_own_paraphrases_go_before_others_and_are_compared_on_their_tasks(project, tmp_path):
    names = (project.data / "splits/default/validation_tasks.txt").read_text().split()
    path = tmp_path / "own.json"
    path.write_text(json.dumps({names[1]: "Say nothing at all ."}))
    project.run(*asked(project, "--paraphrases", path))
    results, text, predictions = read(project.runs / "probe")
    row = next(r for r in results["rows"] if r["key"] == "paraphrase")
    assert row["tasks"] == 1 and list(results["by_task"]["paraphrase"]) == [names[1]]
    assert row["difference"] == pytest.approx(
        results["by_task"]["right"][names[1]] - results["by_task"]["paraphrase"][names[1]])
    assert results["instructions"]["paraphrase"] == {names[1]: "Say nothing at all ."}
    assert f"For example {names[1]}:" in text           # it has all kinds
    assert sum(p["row"] == "TAGI, paraphrase" for p in predictions) == 8


def test_natural_instructions_are_scored_by_rouge_and_reworded_by_a_second_definition(
        project, tmp_path):
    """The suite as a folder of one's own, without a split of tasks that are worded otherwise."""
    own = project.copy(tmp_path / "own", (), data=tmp_path / "data")
    (own.data / "splits/default/validation_unseen_wording_tasks.txt").unlink()
    own.run(*asked(own, "--bench=sni"))
    results, text, _ = read(own.runs / "probe")
    assert results["metric"] == "rouge_l" and "| instruction | ROUGE-L |" in text
    for name, given in results["instructions"]["paraphrase"].items():
        path = own.data / "tasks" / f"{name}.json"
        record = json.loads(path.read_text())
        assert given == record["Definition"][1]
        path.write_text(json.dumps(record | {"Definition": record["Definition"][:1]}))
    out = own.run(*asked(own, "--bench=sni"))
    assert "left out: a paraphrase: no task has one\n" in out and "| a paraphrase |" not in out
    assert [r["key"] for r in read(own.runs / "probe-2")[0]["rows"]] == [
        key for key in ALL if key != "paraphrase"]              # of other tasks: beside the first
    assert read(own.runs / "probe")[1] == text


def test_p3_is_scored_by_accuracy(p3_project):                              # noqa: F811
    out = p3_project.run("evaluate", "--probe", "--bench=p3")
    results, text, predictions = read(p3_project.runs / "probe")
    assert "| instruction | accuracy |" in out and "left out: a paraphrase" in out
    for p in predictions:
        assert not p["task"].startswith("rte") or p["prediction"] in ("Yes", "No")
    by_task = results["by_task"]["other_task"]
    assert set(by_task) == {"copa: choose", "copa: why", "rte: can we infer"}
    its = [p["prediction"] == p["references"][0] for p in predictions
           if p["row"] == "TAGI, shuffled instruction" and p["task"] == "copa: choose"]
    assert by_task["copa: choose"] == pytest.approx(100 * sum(its) / len(its))


# ----------------------------------------------------------------------------------- the picture

def test_the_picture_has_tasks_by_category_and_its_numbers_are_told(project, tmp_path, monkeypatch):
    """Two tasks of one category around another's in the split come to stand side by side."""
    drawn, draw = [], similarity.heat_map

    def watched(similar, categories, path):
        drawn.append((similar, categories))
        return draw(similar, categories, path)

    monkeypatch.setattr(similarity, "heat_map", watched)
    own = project.copy(tmp_path / "own", (), data=tmp_path / "data")
    names = (own.data / "splits/default/validation_tasks.txt").read_text().split()
    for name, category in zip(names, ("Same", "Other", "Same"), strict=True):
        path = own.data / "tasks" / f"{name}.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"Categories": [category]}))
    own.run(*asked(own))
    (similar, categories), = drawn
    assert categories == ["Other", "Same", "Same"]
    assert torch.allclose(similar.diagonal(), torch.ones(3, dtype=similar.dtype))
    results, text, _ = read(own.runs / "probe")
    found = results["similarity"]["own"]
    assert found["within"] == pytest.approx(similar[1, 2].item())
    assert found["between"] == pytest.approx(similar[0, 1:].mean().item())
    assert (f"within a category {found['within']:.3f}, between categories {found['between']:.3f}"
            in text)
    assert 0 < results["similarity"]["own_share"] < 1
    assert (own.runs / "probe" / "similarity.png").read_bytes().startswith(b"\x89PNG")


def test_without_matplotlib_one_line_says_so_and_the_rest_is_there(project, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    out = project.run(*asked(project))
    assert [line for line in out.splitlines() if "needs matplotlib" in line] == [
        "The picture of it, similarity.png, needs matplotlib: pip install matplotlib"]
    results, text, _ = read(project.runs / "probe")
    assert len(results["rows"]) == len(ALL) and results["similarity"]["own"]["between"] < 0
    assert not (project.runs / "probe" / "similarity.png").exists()


def test_a_model_of_fusion_alone_has_no_lora_to_compare(project):
    project.run("finetune", "--name=fusion", "--generator=none", "--lambda-ins=0")
    out = project.run("evaluate", "--probe", "--checkpoint", project.runs / "fusion")
    assert "\nThis model has no hypernetwork: there is no LoRA to compare.\n" in out
    assert "osine" not in out
    assert read(project.runs / "probe")[0]["similarity"] is None
    assert not (project.runs / "probe" / "similarity.png").exists()


# -------------------------------------------------------------------------------------- refusals

@pytest.mark.parametrize("text, said", [
    (None, "no such file"), ("{", "cannot be read"), ("[1]", "no JSON object"),
    ("{}", "no JSON object"), ('{"task9999_x": "Do it ."}', "task9999_x is none of the tasks"),
    ('{"NAME": "  "}', "NAME has no text"), ('{"NAME": 3}', "NAME has no text")])
def test_bad_paraphrases_are_one_line(project, tmp_path, text, said):
    name = (project.data / "splits/default/validation_tasks.txt").read_text().split()[0]
    path = tmp_path / "own.json"
    if text is not None:
        path.write_text(text.replace("NAME", name))
    line = project.refuses(*asked(project, "--paraphrases", path))
    assert f"{path}" in line and said.replace("NAME", name) in line
    assert "--paraphrases names" in line
    assert not (project.runs / "probe").exists()


@pytest.mark.parametrize("flags, named", [
    (["--paraphrases=x.json"], ["--paraphrases", "--probe"]),
    (["--probe", "--rows=tagi"], ["--rows", "leave it out"]),
    (["--probe", "--ablations"], ["--ablations", "leave it out"]),
    (["--probe", "--rescore", "x.jsonl"], ["--rescore", "leave it out"]),
    (["--probe", "--checkpoint=nowhere"], ["nowhere", "no such folder"]),
    (["--probe", "--bench=p3"], ["--bench p3", "--format"]),
    (["--probe", "--rank=3"], ["--rank", "checkpoint"])], ids=" ".join)
def test_options_that_do_not_go_together_are_one_line(project, flags, named):
    line = project.refuses("evaluate", *flags)
    assert all(word in line for word in named)


def test_one_task_alone_is_refused(project, tmp_path):
    own = project.copy(tmp_path / "own", (), data=tmp_path / "data")
    path = own.data / "splits/default/validation_tasks.txt"
    name = path.read_text().split()[0]
    path.write_text(name)
    line = own.refuses(*asked(own))
    assert "--probe" in line and f"validation of {own.data}" in line and name in line
    assert "--split or --data" in line and not (own.runs / "probe").exists()


def test_tasks_that_the_model_was_trained_on_are_refused(project, tmp_path):
    own = project.copy(tmp_path / "own", (), data=tmp_path / "data")
    path = own.data / "splits/default/validation_tasks.txt"
    trained = (own.data / "splits/default/train_tasks.txt").read_text().split()[0]
    path.write_text(path.read_text() + trained)
    line = own.refuses(*asked(own))
    assert "was trained on 1 of the 4" in line and trained in line
    assert not (own.runs / "probe").exists()
