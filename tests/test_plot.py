"""Pictures of training runs: what is read of logs and scores, in whatever state a run left them, and what is drawn."""
import json
import shutil
import sys
from xml.etree import ElementTree

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

pytest.register_assert_rewrite("stages")
pytest_plugins = ("stages",)
from bench import plot, report, similarity
from stages import call


def line(step, **terms):
    return json.dumps({"step": step, "lr": 0.1, "loss": 1 / step, "grad_norm": 2.0, "seconds": 1.0} | terms) + "\n"


def write_run(folder, *lines):
    folder.mkdir(parents=True)
    (folder / "log.jsonl").write_text("".join(lines))
    return folder


@pytest.fixture
def runs(tmp_path):
    a = write_run(tmp_path / "a" / "finetune", *[line(n, ce=3 / n) for n in (1, 2, 3)],
                  '{"step": 2, "validation": 5.5, "validation_shuffled": 7.5}\n')
    b = write_run(tmp_path / "b" / "finetune", *[line(n) for n in (1, 2, 4)])
    return a, b


def refused(capsys, *argv) -> str:
    with pytest.raises(SystemExit) as end:
        plot.main([str(word) for word in argv])
    said = capsys.readouterr().err
    assert end.value.code == 2 and said.startswith("error: ") and said.count("\n") == 1 and len(said) <= 308, said
    return said


def texts(path) -> list[str]:
    """What an SVG says."""
    return [element.text for element in ElementTree.parse(path).iter("{http://www.w3.org/2000/svg}text")]


# ------------------------------------------------------------------------------------------------------------ reading

def test_what_a_kill_cut_off_is_left_out_and_of_a_step_that_was_run_again_the_later_counts(tmp_path):
    run = write_run(tmp_path / "run", line(1, loss=9.0), line(2, loss=8.0), line(3, loss=7.0), '{"step": 4, "lo\n', line(2, loss=6.0),
                    line(3, loss=5.0))
    assert plot.read_log(str(run))[""]["loss"] == {1: 9.0, 2: 6.0, 3: 5.0}


def test_lines_that_are_no_steps_and_values_that_are_no_numbers_are_left_out(tmp_path):
    rubbish = [b"\0" * 50, b"[" * 100_000, b"null", b"3", b'{"step": "2", "loss": 1}', b'{"step": true, "loss": 1}', b'{"loss": 1}',
               b'{"step": NaN, "loss": 1}', b'{"step": 1e400, "loss": 1}', b'{"step": 3, "loss": NaN}', b'{"step": 3, "loss": "1"}',
               b'{"step": 3, "loss": 1e300}', b'{"step": 3, "loss": ' + b"9" * 5000 + b"}", b"\xff\xfe\xff",
               b'{"step": 3, "loss": null}', b'{"step": 3, "loss": [1]}', b'{"step": ' + b"9" * 400 + b', "loss": 1}']
    run = write_run(tmp_path / "run")
    for line_of_it in rubbish:
        (run / "log.jsonl").write_bytes(line(1).encode() + line_of_it + b"\n" + line(2).encode())
        assert plot.read_log(str(run))[""]["loss"] == {1: 1.0, 2: 0.5}, line_of_it[:40]
    (run / "log.jsonl").write_bytes(line(1).encode() + b"\n".join(rubbish))
    call(plot, str(run), "--out", str(tmp_path / "curves.svg"))


def test_curves_of_lora_teachers_are_kept_apart_by_group_whichever_rank_wrote_them(tmp_path):
    run = write_run(tmp_path / "lora", line(1, group="a and 1 more"), line(1, group="c", loss=4.0))
    (run / "log-1.jsonl").write_text(line(1, group="d", loss=5.0))
    assert {group: terms["loss"] for group, terms in plot.read_log(str(run)).items()} == {
        "a and 1 more": {1: 1.0}, "c": {1: 4.0}, "d": {1: 5.0}}


def test_a_folder_of_runs_stands_for_every_stage_in_it_once(runs, tmp_path):
    above = str(tmp_path / "a")
    assert plot.stage_folders([above, str(runs[0]), str(runs[1])]) == [f"{above}/finetune", str(runs[1])]


# ------------------------------------------------------------------------------------------------------------ pictures

def test_several_runs_are_in_one_picture_with_their_losses_and_both_validations(runs, tmp_path):
    out = tmp_path / "deep" / "curves.svg"
    said = call(plot, *map(str, runs), "--out", str(out))
    assert said == f"{out}: loss, ce, validation of a/finetune, b/finetune\n"
    found = texts(out)
    assert {"loss", "ce", "validation", "a/finetune", "b/finetune", "with another task's instruction"} <= set(found)
    assert "grad norm" not in found and "lr" not in found and "seconds" not in found


def test_a_picture_shows_the_numbers_of_the_log(runs, tmp_path):
    curves = plot.panels_of({"a": (plot.read_log(str(runs[0])), plot.read_scores(str(runs[0]))),
                             "b": (plot.read_log(str(runs[1])), plot.read_scores(str(runs[1])))}, None)
    assert curves["loss"] == [(0, False, {1: 1, 2: 0.5, 3: 1 / 3}), (1, False, {1: 1, 2: 0.5, 4: 0.25})]
    assert curves["ce"] == [(0, False, {1: 3, 2: 1.5, 3: 1})]
    assert curves["validation"] == [(0, False, {2: 5.5}), (0, True, {2: 7.5})]


def test_a_png_is_one_and_terms_choose_what_is_drawn(runs, tmp_path):
    out = tmp_path / "curves.PNG"
    assert "grad norm, loss of" in call(plot, str(runs[0]), "--out", str(out), "--terms=grad_norm,loss")
    assert out.read_bytes().startswith(b"\x89PNG")


def test_the_same_runs_make_the_same_file_and_replace_the_picture_before(runs, tmp_path):
    out = tmp_path / "curves.svg"
    call(plot, str(runs[0]), "--out", str(out))
    first = out.read_bytes()
    call(plot, str(runs[0]), "--out", str(out))
    assert out.read_bytes() == first


def test_names_are_shown_as_they_are(tmp_path):
    names = ["_hidden", "$x$ and $", "<b>&", "größe"]
    for name in names:
        write_run(tmp_path / "p" / name, line(1))
    out = tmp_path / "curves.svg"
    call(plot, *[str(tmp_path / "p" / name) for name in names], "--out", str(out))
    for shown in ("p/_hidden", "p/$x$ and $", "p/<b>&", "p/größe"):
        assert shown in texts(out)


# ------------------------------------------------------------------------------------------------------------ scores

def write_evaluation(folder, results, **options):
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(yaml.safe_dump(options))
    (folder / "results.json").write_text(json.dumps({"results": results}))


def result(key, value, demos=0):
    return {"key": key, "demos": demos, "exact_match": value, "rouge_l": value + 1}


def write_checkpoint(folder, step):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.yaml").write_text(yaml.safe_dump({"step": step, "finished": True}))


def test_scores_of_a_runs_checkpoints_are_drawn_at_their_steps(runs, tmp_path):
    a, b = runs
    for folder, step in ((a, 3), (a / "best-000002", 2), (b, 4)):
        write_checkpoint(folder, step)
    (a / "best").symlink_to("best-000002")
    above, other = str(tmp_path / "a"), str(tmp_path / "b")
    write_evaluation(tmp_path / "a" / "evaluate", [result("tagi", 60.0), result("tagi", 70.0, 2), result("tagi_shuffled", 1.0),
                                                   result("meta", 99.0)], runs=above, checkpoint=None)
    write_evaluation(tmp_path / "a" / "of-best", [result("tagi", 50.0)], runs=above, checkpoint=str(a / "best"))
    write_evaluation(tmp_path / "a" / "of-b", [result("tagi", 5.0)], runs=other, checkpoint=str(b))
    assert plot.read_scores(str(a)) == {"exact_match": {"tagi": {2: 50.0, 3: 60.0}, "tagi_shuffled": {3: 1.0}},
                                        "rouge_l": {"tagi": {2: 51.0, 3: 61.0}, "tagi_shuffled": {3: 2.0}}}
    assert plot.read_scores(str(b)) == {"exact_match": {}, "rouge_l": {}}
    out = tmp_path / "curves.svg"
    assert "exact match, ROUGE-L of" in call(plot, str(a), str(b), "--out", str(out))


def test_scores_go_with_runs_that_were_moved(runs, tmp_path):
    write_checkpoint(runs[0], 3)
    write_evaluation(tmp_path / "a" / "evaluate", [result("tagi", 60.0)], runs="runs/then", checkpoint="runs/then/finetune")
    assert plot.read_scores(str(runs[0]))["exact_match"] == {"tagi": {3: 60.0}}


def test_evaluations_of_several_checkpoints_are_drawn_over_their_steps(finished, tmp_path):
    """Of one under way and of the last: also where the first is gone since, and its results set aside."""
    project = finished.copy(tmp_path / "runs")
    flags, run = ["--rows=tagi", "--no-cost", "--eval-instances=1", "--max-output=2"], project.runs / "longer"
    project.run("finetune", "--name=longer", "--steps=3")
    shutil.copytree(run, run / "step-000001", ignore=shutil.ignore_patterns("step-*"))
    record = yaml.safe_load((run / "config.yaml").read_text())
    (run / "step-000001" / "config.yaml").write_text(yaml.safe_dump(record | {"step": 1, "llm_path": "../../meta"}))
    weights = load_file(run / "model.safetensors")
    name = next(iter(weights))
    save_file(weights | {name: weights[name] + 1}, run / "step-000001" / "model.safetensors")
    for checkpoint in ("step-000001", "."):
        project.run("evaluate", "--checkpoint", run / checkpoint, *flags)
    told = json.loads((project.runs / "evaluate" / "results.json.1").read_text())
    assert (told["checkpoint"], told["step"]) == ("../longer/step-000001", 1)
    project.run("evaluate", "--rows=copy_input", "--eval-instances=1", "--max-output=2")      # of no checkpoint: it stays
    shutil.rmtree(run / "step-000001")
    scores = plot.read_scores(str(run))
    assert {metric: list(rows["tagi"]) for metric, rows in scores.items()} == {"exact_match": [1, 3], "rouge_l": [1, 3]}
    moved = project.runs.rename(tmp_path / "moved")
    assert plot.read_scores(str(moved / "longer")) == scores


def test_scores_of_other_tasks_are_drawn_by_themselves(runs, tmp_path):
    for n, split in enumerate(("test", "validation")):
        folder = tmp_path / "a" / f"evaluate-{n}"
        folder.mkdir()
        told = {"results": [result("tagi", 50.0 + n)], "split": split, "checkpoint": "../finetune/step-000002", "step": 2}
        (folder / "results.json").write_text(json.dumps(told))
    panels = plot.panels_of({"a": (plot.read_log(str(runs[0])), plot.read_scores(str(runs[0])))}, None)
    assert panels["exact match"] == [(0, False, {2: 50.0})] and panels["exact match, validation tasks"] == [(0, False, {2: 51.0})]


@pytest.mark.parametrize("content", ["", "{", "[]", '{"results": 3}', '{"results": [3]}', '{"results": [{"demos": 0}]}', "null"])
def test_a_damaged_evaluation_is_told_and_left_out(runs, tmp_path, capsys, content):
    write_checkpoint(runs[0], 3)
    write_evaluation(tmp_path / "a" / "evaluate", [], runs=str(tmp_path / "a"), checkpoint=None)
    (tmp_path / "a" / "evaluate" / "results.json").write_text(content)
    assert plot.read_scores(str(runs[0])) == {"exact_match": {}, "rouge_l": {}}
    said = capsys.readouterr().out
    assert said.startswith("left out: ") and "results.json" in said and said.count("\n") == 1


# ------------------------------------------------------------------------------------------------------------ mistakes

def test_what_cannot_be_drawn_ends_in_one_line(runs, tmp_path, capsys):
    empty = write_run(tmp_path / "empty")
    speed = write_run(tmp_path / "speed", '{"step": 1, "lr": 0.1}\n')
    (tmp_path / "folder.svg").mkdir()
    (tmp_path / "own.svg").write_text("<svg>a drawing of one's own</svg>")
    for argv, words in ((["nowhere"], ["nowhere", "log.jsonl"]), ([tmp_path / "a" / "finetune", tmp_path / "nothing"], ["nothing"]),
                        ([empty], ["empty/log.jsonl", "no step"]), ([speed], ["no loss", "lr"]),
                        ([runs[0], "--out=curves.jpg"], ["curves.jpg", ".svg or .png"]), ([runs[0], "--out=curves"], [".svg or .png"]),
                        ([runs[0], "--terms=los"], ["los", "loss", "grad_norm"]), ([runs[0], "--terms", "x" * 9000], ["--terms"]),
                        ([runs[0], "--out", tmp_path / "folder.svg"], ["folder.svg"]),
                        ([runs[0], "--out", tmp_path / "own.svg"], ["own.svg", "not drawn by"]),
                        ([runs[0], "--out", tmp_path / "own.svg" / "x.svg"], ["x.svg"])):
        said = refused(capsys, *argv)
        assert all(word in said for word in words), said
    assert (tmp_path / "own.svg").read_text() == "<svg>a drawing of one's own</svg>"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b", "empty", "folder.svg", "own.svg", "speed"]


def test_without_matplotlib_one_line_says_what_to_install(runs, tmp_path, capsys, monkeypatch):
    for name in [name for name in sys.modules if name.partition(".")[0] == "matplotlib"] + ["matplotlib"]:
        monkeypatch.setitem(sys.modules, name, None)
    assert "pip install matplotlib" in refused(capsys, runs[0], "--out", tmp_path / "curves.svg")


@pytest.mark.parametrize("name", ["$x_$", "$\\frac$", "_category", "東京", "a\0b\n", "long " * 20_000])
def test_any_name_of_a_category_or_row_is_drawn_without_a_word(tmp_path, recwarn, name):
    score = {"row": name, "demos": None, "by_category": {"rouge_l": {name: 50.0, "other": 20.0}}}
    results = {"bench": "sni", "split": "rescored", "results": [score], "published": []}
    report.category_chart(results, str(tmp_path / "categories.png"))
    similarity.heat_map(torch.eye(3), [name, name, "other"], str(tmp_path / "similarity.png"))
    for picture in ("categories.png", "similarity.png"):
        assert (tmp_path / picture).read_bytes().startswith(b"\x89PNG")
    assert not list(recwarn)


def test_thousands_of_categories_are_drawn(tmp_path):
    score = {"row": "r", "demos": None, "by_category": {"rouge_l": {str(n): 1.0 for n in range(6000)}}}
    report.category_chart({"bench": "sni", "split": "rescored", "results": [score], "published": []}, str(tmp_path / "x.png"))
