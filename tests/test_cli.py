"""What a user types: every stage and flag runs, leaves the files it should, and options come from where they should."""
import argparse
import functools
import json
import math
import os
import shutil

import pytest
import torch
import yaml

pytest.register_assert_rewrite("stages")
pytest_plugins = ("stages",)
from conftest import apart
from stages import MODULES, ROOT, STAGES, call, process

import config
import data
import evaluate
import report
import train_hyper
import train_teacher

TERMS = {"base": {"loss"}, "meta": {"loss"}, "lora": {"loss"}, "lora-all": {"loss"},
         "pretrain": {"loss", "ce"},
         "finetune": {"loss", "ce", "kl", "ins"}}
EVERY_ROW = ["TAGI, right instruction", "TAGI, shuffled instruction", "TAGI, empty instruction",
             "meta-trained, instruction in input", "meta-trained with one LoRA",
             "frozen LLM, no instruction",
             "LoRA teachers, held-out instances of training tasks", "copy the input", "copy the first demonstration's output"]
UNSEEN_WORDING = ["TAGI, unseen wording", "meta-trained, unseen wording"]
WITH_COST = set(EVERY_ROW) - {"copy the input", "copy the first demonstration's output"}


# ----------------------------------------------------------------------------------------------------------- stages

def test_evaluate_runs_as_the_readme_calls_it(project):
    """A process of its own; test_resume.py has train_hyper.py's, test_distributed.py train_teacher.py's."""
    done = process(*project.command("evaluate", "--rows=tagi", "--split=validation", "--floor=101"), code=1)
    assert "101" in done.stderr.splitlines()[-1]
    assert "TAGI, right instruction" in done.stdout and "Def + 2 Pos" in done.stdout
    assert "Traceback" not in done.stderr and "Warning" not in done.stderr


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_leaves_a_run_folder_that_says_everything_about_itself(finished, stage):
    folder = finished.runs / stage
    optimizer = {"optimizer.pt"} if stage != "lora" else set()                              # teachers are short runs
    assert {"config.yaml", "model.safetensors", "log.jsonl"} | optimizer <= {path.name for path in folder.iterdir()}
    assert not list(finished.runs.rglob("*.tmp"))
    record = finished.record(stage)
    assert record["finished"] and record["step"] == record["steps"] == 2 and record["seed"] == 0
    assert {"python", "torch", "transformers", "git"} <= record["versions"].keys()
    known = MODULES[stage].parser().known()
    assert {name for name in known if not name.startswith("no-")} <= {key.replace("_", "-") for key in record}


@pytest.mark.parametrize("stage", STAGES)
def test_the_log_is_one_json_object_a_step_with_the_loss_terms(finished, stage):
    assert [row["step"] for row in finished.log(stage)] == [1, 2]
    for row in finished.log(stage):
        assert row.keys() == {"step", "lr", "seconds"} | TERMS[stage]
        assert all(math.isfinite(value) for value in row.values())
        assert all(row[term] >= 0 for term in TERMS[stage]) and row["loss"] > 1 and row["lr"] > 0


def test_the_log_keeps_small_terms(finished):
    """L_ins is a mean over weights, here about 1e-5: two digits of it, at least, are in the log."""
    values = [row["ins"] for row in finished.log("finetune")]
    assert any(value != float(f"{value:.0e}") for value in values), values


def test_the_log_has_a_line_every_log_every_steps_and_for_the_last(project):
    project.run("meta", "--fresh", "--steps=5", "--log-every=2")
    assert [row["step"] for row in project.log("meta")] == [2, 4, 5]


def test_a_stage_prints_its_folder_steps_and_effective_batch(project):
    out = project.run("finetune", "--name=other", "--accumulate=2")
    assert f"{project.runs / 'other'}: 2 steps, effective batch 12" in out and "loss=" in out and "ins=" in out


def test_lora_teachers_are_folders_of_their_own_one_a_category(finished):
    names = (finished.data / "splits" / "default" / "train_tasks.txt").read_text().split()
    tasks = [json.loads((finished.data / "tasks" / f"{name}.json").read_text()) for name in names]
    categories = {task["Categories"][0] for task in tasks}
    folders = {path.parent.name for path in finished.runs.glob("lora/*/model.safetensors")}
    assert folders == {category.lower().replace(" ", "_") for category in categories} and len(folders) > 2
    assert {finished.record("lora", folder)["unit_name"] for folder in folders} == categories


@pytest.mark.parametrize("stage", ["base", "meta"])
def test_an_llm_of_a_stage_loads_with_transformers_auto_classes(finished, stage):
    from transformers import AutoModelForSeq2SeqLM, AutoTokenizer
    folder = finished.runs / stage
    tokenizer, llm = AutoTokenizer.from_pretrained(folder), AutoModelForSeq2SeqLM.from_pretrained(folder)
    for name, saved in finished.weights(stage).items():
        assert torch.equal(llm.state_dict()[name], saved), name
    assert not torch.equal(llm.lm_head.weight, llm.shared.weight)
    text = "Anna went to Paris on Monday."
    ids = tokenizer(text, return_tensors="pt").input_ids
    assert tokenizer.decode(ids[0], skip_special_tokens=True) == text and ids.max() < llm.config.vocab_size
    assert llm.generate(ids, max_new_tokens=3).shape[0] == 1


def test_train_teacher_without_stage_runs_the_stages_of_the_config_in_order(finished, tmp_path):
    project = finished.copy(tmp_path / "runs", ())
    out = project.run(None, "--stages=base,meta")
    assert out.index(f"{project.runs / 'base'}: 2 steps") < out.index(f"{project.runs / 'meta'}: 2 steps")
    assert sorted(path.name for path in project.runs.iterdir()) == ["base", "meta"]


def test_the_frozen_llm_may_be_the_base_model_or_a_folder(project):
    flags = ("--no-pretrained", "--lambda-ins=0", "--lambda-kl=0")
    for llm in ("base", project.runs / "base"):
        project.run("finetune", "--name=other", "--fresh", "--llm", llm, *flags)
        record = project.record("other")
        assert os.path.realpath(project.runs / "other" / record["llm_path"]) == str(project.runs / "base")


# --------------------------------------------------------------------------------------- finetuning, flag by flag

def prefixes(weights):
    return {name.partition(".")[0] for name in weights}


ALL = {"generator", "fusion", "norm_gains", "embedding_delta"}


@pytest.mark.parametrize("flags, terms, parts", [
    (["--no-pretrained"], {"ce", "kl", "ins"}, ALL),
    (["--no-fusion"], {"ce", "kl", "ins"}, ALL - {"fusion"}),
    (["--lambda-ce=0"], {"ce", "kl", "ins"}, ALL),
    (["--lambda-kl=0"], {"ce", "ins"}, ALL),
    (["--lambda-ins=0"], {"ce", "kl"}, ALL),
    (["--no-hypernetwork"], {"ce", "kl"}, ALL - {"generator"}),
    (["--generator=mean", "--no-pretrained"], {"ce", "kl", "ins"}, ALL),
    (["--alignment=factors"], {"ce", "kl", "ins"}, ALL),
    (["--alignment=none"], {"ce", "kl"}, ALL),
    (["--lambda-ins=0.5", "--alignment=factors"], {"ce", "kl", "ins"}, ALL),
    (["--kl-teacher=meta"], {"ce", "kl", "ins"}, ALL),
    (["--kl-teacher=BASE"], {"ce", "kl", "ins"}, ALL),
    (["--standardize-logits"], {"ce", "kl", "ins"}, ALL),
    (["--temperature=3"], {"ce", "kl", "ins"}, ALL),
    (["--no-train-embeddings"], {"ce", "kl", "ins"}, ALL - {"embedding_delta"}),
    (["--no-train-norms"], {"ce", "kl", "ins"}, ALL - {"norm_gains"}),
    (["--no-decoder-fusion"], {"ce", "kl", "ins"}, ALL),
    (["--no-encoder-fusion"], {"ce", "kl", "ins"}, ALL - {"fusion"}),
], ids=lambda x: " ".join(x) if isinstance(x, list) else "")
@pytest.mark.numbers
def test_a_flag_of_finetuning_trains_and_changes_the_result(project, flags, terms, parts):
    flags = [flag.replace("BASE", str(project.runs / "base")) for flag in flags]
    project.run("finetune", "--name=other", *flags)
    weights, whole = project.weights("other"), project.weights("finetune")
    assert prefixes(weights) == parts
    assert weights.keys() != whole.keys() or any(not torch.equal(weights[name], whole[name]) for name in weights)
    for row in project.log("other"):
        assert row.keys() - {"step", "lr", "seconds"} == {"loss"} | terms
        options = argparse.Namespace(**project.record("other"))
        expected = options.lambda_ce * row["ce"] + options.lambda_kl * row.get("kl", 0)
        if "ins" in terms and options.lambda_ins != "sigmoid":
            expected += options.lambda_ins * row["ins"]
        if "ins" not in terms or options.lambda_ins != "sigmoid":
            assert row["loss"] == pytest.approx(expected, abs=1e-3)     # five digits are logged
        else:
            assert expected - 1e-3 < row["loss"] < expected + row["ins"] + 1e-3
    record = project.record("other")
    assert record["finished"] and record["fusion"] == ("--no-fusion" not in flags)
    assert evaluate.TAGI.load(str(project.runs / "other")).adapt(["Find the city ."]).mask.any()


@pytest.mark.parametrize("stage, flags", [("meta", ["--checkpointing"]), ("lora", ["--checkpointing"]),
                                          ("finetune", ["--checkpointing"]), ("meta", ["--compile"])])
@pytest.mark.numbers
def test_checkpointing_and_compiling_train_the_same(project, stage, flags, monkeypatch):
    """Against the fixture's stage: the same losses, the second of which is after a step. Weights too, but for meta, whose Muon
    makes much of rounding. The compiler traces only: code made of it would take minutes."""
    compile_ = torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, **kwargs: compile_(self, backend="eager", **kwargs))
    project.run(stage, "--name=other", *flags)
    losses = [[row["loss"] for row in project.log(name)] for name in (stage, "other")]
    assert losses[0] == pytest.approx(losses[1], abs=1e-3)
    assert abs(losses[0][0] - losses[0][1]) > 0.01
    if stage != "meta":
        for path in (project.runs / stage).rglob("model.safetensors"):
            folder = path.parent.relative_to(project.runs / stage)
            a, b = project.weights(stage, folder), project.weights("other", folder)
            assert apart(a, b, project.record(stage)["lr"]) < 0.03


def test_compiling_with_checkpointing_is_refused(project):
    assert "choose one of them" in project.refuses("meta", "--name=other", "--compile", "--checkpointing")


def test_no_fusion_is_both_parts_off(project):
    project.run("finetune", "--name=other", "--no-fusion")
    record = project.record("other")
    assert not record["encoder_fusion"] and not record["decoder_fusion"]


def test_teachers_and_students_per_task(project):
    project.run("lora", "--fresh", "--unit=task", "--teachers-at-once=7")
    names = (project.data / "splits" / "default" / "train_tasks.txt").read_text().split()
    assert sorted(path.parent.name for path in project.runs.glob("lora/*/model.safetensors")) == sorted(names)
    project.run("finetune", "--name=other", "--unit=task")
    assert {"kl", "ins"} <= project.log("other")[0].keys()


@pytest.mark.parametrize("flags", [["--generator=mean"], ["--width=32"], ["--rank=3", "--lambda-kl=0", "--lambda-ins=0"],
                                   ["--targets=q,v", "--lambda-kl=0", "--lambda-ins=0"]], ids=" ".join)
def test_a_flag_that_needs_another_pretrained_student_says_what_to_do(project, flags):
    line = project.refuses("finetune", "--name=other", *flags)
    key, _, value = flags[0].removeprefix("--").partition("=")
    assert str(project.runs / "pretrain") in line and key in line and value in line
    assert "--fresh" in line and "--no-pretrained" in line
    project.run("finetune", "--name=other", "--no-pretrained", *flags)


# ------------------------------------------------------------------------------------------------------- evaluation

@pytest.fixture
def quick(monkeypatch):
    """The cost of three instances of one task, timed once: the table's form, not its figures."""
    cost = functools.partial(evaluate.measure_cost, n=3, n_tasks=1)
    monkeypatch.setattr(evaluate, "measure_cost", lambda bench, demos, repeats: cost(bench, demos, repeats=1))


def strict_match(prediction, references):
    return evaluate.exact_match(prediction, references, strict=True)


def read(folder):
    predictions = [json.loads(line) for line in (folder / "predictions.jsonl").read_text().splitlines()]
    return predictions, json.loads((folder / "results.json").read_text()), (folder / "results.md").read_text()


@pytest.mark.parametrize("split", ["test", "validation"])
def test_evaluate_writes_every_row_at_both_settings(project, quick, split):
    out = project.run("evaluate", f"--split={split}")
    predictions, results, table = read(project.runs / "evaluate")
    rows = EVERY_ROW + UNSEEN_WORDING
    assert sorted((r["row"], r["demos"]) for r in results["results"]) == sorted((row, n) for row in rows for n in (0, 2))
    assert results["split"] == split and "torch" in results["versions"]
    for result in results["results"]:
        mine = [p for p in predictions if (p["row"], p["demos"]) == (result["row"], result["demos"])]
        assert len(mine) == result["instances"] > 0
        for name, metric in (("exact_match", strict_match), ("rouge_l", evaluate.rouge_l)):             # rescored offline
            values = [metric(p["prediction"], p["references"]) for p in mine]
            assert result[name] == pytest.approx(100 * sum(values) / len(values))
            low, high = result[name + "_interval"]
            assert 0 <= low <= result[name] <= high <= 100
        assert ("ms" in result and "flops" in result) == (result["row"] in WITH_COST)
    assert table.strip() == out.strip()[-len(table.strip()):] and "**Def**" in table and "**Def + 2 Pos**" in table
    assert all(table.count(f"\n| {row} |") == 2 for row in rows) and "(1.00x)" in table
    assert {(p["task"], p["id"]) for p in predictions if p["row"] == rows[0]} == {
        (p["task"], p["id"]) for p in predictions if p["row"] == "copy the input"}


def test_the_copying_rows_copy(project, quick):
    project.run("evaluate", "--split=validation")
    predictions, _, _ = read(project.runs / "evaluate")
    tasks = {p["task"]: json.loads((project.data / "tasks" / f"{p['task']}.json").read_text()) for p in predictions}
    for p in predictions:
        task = tasks[p["task"]]
        instance = next(i for i in task["Instances"] if i["id"] == p["id"])
        assert p["references"] == instance["output"]
        if p["row"] == "copy the input":
            assert p["prediction"] == instance["input"]
        if p["row"] == "copy the first demonstration's output":
            assert p["prediction"] == task["Positive Examples"][0]["output"]


def test_evaluate_takes_another_checkpoint_and_another_folder_for_results(project, tmp_path):
    project.run("finetune", "--name=other", "--no-hypernetwork")
    project.run("evaluate", "--rows=tagi", "--checkpoint", project.runs / "other", "--out", tmp_path / "out")
    _, results, _ = read(tmp_path / "out")
    assert [(r["row"], r["demos"]) for r in results["results"]] == [("TAGI, right instruction", 0), ("TAGI, right instruction", 2)]
    assert not (project.runs / "evaluate").exists()


def test_ablations_retrain_finetuning_for_every_row_once(project, quick, monkeypatch):
    """On one seed, the commands run in this process; a second run trains and scores nothing again."""
    called = []

    def python(*words):
        at = next(i for i, word in enumerate(words) if word.endswith(".py"))
        called.append(words[at:])
        call({"train_teacher.py": train_teacher, "train_hyper.py": train_hyper, "evaluate.py": evaluate}[words[at]], *words[at + 1:])

    monkeypatch.setattr(report, "python", python)
    table = project.run("evaluate", "--ablations", "--seeds=1")
    rows = [line.split("|")[1].strip() for line in table.splitlines() if line.startswith("| ")]
    assert rows[:1] == [""] and set(report.ABLATIONS) <= set(rows) and "meta-trained with one LoRA" in rows
    for flags in list(report.ABLATIONS.values())[1:]:
        run = next(words for words in called if words[0] == "train_hyper.py" and flags[0] in words)
        name = next(word for word in run if word.startswith("--name=")).removeprefix("--name=")
        assert project.record(name)["finished"] and (project.runs / f"evaluate-{name}" / "results.json").exists()
    assert not any("lora-all" in word for words in called for word in words)    # the config's stage

    def kept():
        files = project.files()
        trained = {path: files[path] for path in files if path.suffix == ".safetensors"}
        told = [path for path in files if path.name == "predictions.jsonl"]
        return trained | {path: files[path][1] for path in told}

    before = kept()
    project.run("evaluate", "--ablations", "--seeds=1")
    assert kept() == before and len(before) > 20


def test_ablations_do_not_take_another_splits_or_checkpoints_scores(project, quick, monkeypatch):
    monkeypatch.setattr(report, "ABLATIONS", {"TAGI, whole method": []})
    def python(*words):
        if words[0] == "evaluate.py":
            call(evaluate, *words[1:])

    monkeypatch.setattr(report, "python", python)
    project.run("evaluate", "--ablations", "--seeds=1", "--split=test")
    results = project.runs / "evaluate-finetune" / "results.json"
    assert json.loads(results.read_text())["split"] == "test"
    project.run("evaluate", "--ablations", "--seeds=1", "--split=validation")
    assert json.loads(results.read_text())["split"] == "validation"
    before = (results.parent / "predictions.jsonl").read_text()
    project.run("finetune", "--fresh", "--seed=7")
    project.run("evaluate", "--ablations", "--seeds=1", "--split=validation")
    assert (results.parent / "predictions.jsonl").read_text() != before


def test_a_missed_floor_is_exit_code_1_with_the_table_written(project, capsys):
    with pytest.raises(SystemExit) as end:
        project.run("evaluate", "--rows=tagi", "--floor=101")
    assert end.value.code == 1 or "101" in end.value.code                   # sys.exit(text) prints it and exits with 1
    assert "TAGI, right instruction" in read(project.runs / "evaluate")[2]
    project.run("evaluate", "--rows=tagi", "--floor=0")


def test_a_missed_margin_over_the_shuffled_instruction_is_exit_code_1(project, quick):
    with pytest.raises(SystemExit) as end:
        project.run("evaluate", "--floor=0", "--floor-margin=101")
    assert end.value.code == 1 or "101" in end.value.code


def test_a_missed_floor_of_the_baseline_is_exit_code_1(project, quick):
    floors = ("--rows=tagi,meta", "--floor=0", "--floor-share=0")
    with pytest.raises(SystemExit) as end:
        project.run("evaluate", *floors, "--floor-meta=101")
    assert end.value.code.count("101") == 2                                 # Def and Def + 2 Pos
    project.run("evaluate", *floors, "--floor-meta=0")


TAGI_AT_2 = "Def + 2 Pos: TAGI's exact match of 85.0"


@pytest.mark.parametrize("flags, missed", [
    (["--floor=70", "--floor-margin=50", "--floor-meta=90", "--floor-share=0.9"], []),
    (["--floor=86"], [TAGI_AT_2 + " misses the floor of 86"]),
    (["--floor-meta=91"], ["Def + 2 Pos: the meta-trained row's exact match of 90.0"]),
    (["--floor=95"], ["Def: TAGI's exact match of 94.0", TAGI_AT_2]),
    (["--floor-margin=84"], [TAGI_AT_2 + " is less than 84 above the 2.0"]),
    (["--floor-share=0.95"], [TAGI_AT_2 + " is less than 0.95 times the meta-trained row's 90.0"]),
    (["--floor-meta=96", "--floor-share=1"],
     ["Def: the meta-trained", "Def: TAGI's", "Def + 2 Pos: the meta-trained", TAGI_AT_2])])
def test_a_floor_is_missed_at_either_setting(flags, missed):
    scores = {0: {"tagi": 94.0, "tagi_shuffled": 0.0, "meta": 95.0, "copy_demo": 7.0},
              2: {"tagi": 85.0, "tagi_shuffled": 2.0, "meta": 90.0, "copy_demo": 7.0}}
    results = [{"key": key, "demos": demos, "exact_match": em}
               for demos, row in scores.items() for key, em in row.items()]
    lines = evaluate.missed_floors(results, evaluate.parser().parse_args(flags))
    assert len(lines) == len(missed), lines
    assert all(line.startswith(start) for line, start in zip(lines, missed)), lines


def test_words_that_the_model_does_not_know_are_named_on_standard_error(project, capsys):
    flags = ("--instruction", "Find the city , \u03a9mega .",
             "--input", "Anna saw \u010duch, \u03a9mega and \u010duch .", "--input", "Tom saw a dog .")
    assert project.run("evaluate", *flags).count("\n") == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last == "warning: words the model does not know: \u03a9mega, \u010duch"
    project.run("evaluate", "--instruction", "Find the city .", "--input", "Tom saw a dog .")
    assert "warning" not in capsys.readouterr().err


def test_unknown_words_are_those_with_an_unknown_token_each_once_without_punctuation():
    from conftest import make_tokenizer
    tokenizer = make_tokenizer()
    texts = ["say \u00e9t\u00e9, (Word) 7", "7 say \u00e9t\u00e9 \u20ac"]
    assert data.unknown_words(tokenizer, texts) == ["\u00e9t\u00e9", "Word", "7", "\u20ac"]
    assert data.unknown_words(tokenizer, ["say word"]) == data.unknown_words(tokenizer, [" "]) == []


def one_task(project, tmp_path, *names):
    """A copy of the project whose validation split names just these of its tasks, by number."""
    own = project.copy(tmp_path / "own", data=tmp_path / "data")
    path = own.data / "splits/default/validation_tasks.txt"
    path.write_text("\n".join(path.read_text().split()[n] for n in names))
    return own, ("--data", own.data, "--split=validation")


def test_one_task_alone_has_no_shuffled_instruction(project, quick, tmp_path):
    own, flags = one_task(project, tmp_path, 0)
    out = own.run("evaluate", *flags, "--rows=tagi,tagi_shuffled")
    assert "left out: TAGI, shuffled instruction" in out
    assert "| TAGI, shuffled" not in out and "| TAGI, right" in out
    for more in (["--rows=tagi_shuffled"], ["--floor-margin=1"]):
        assert "tagi_shuffled" in own.refuses("evaluate", *flags, *more)


def test_tasks_of_one_category_are_shuffled_among_each_other_with_a_word(project, tmp_path):
    own, flags = one_task(project, tmp_path, 0, 1)
    for path in (own.data / "tasks").iterdir():
        if path.stem in (own.data / "splits/default/validation_tasks.txt").read_text().split():
            path.write_text(json.dumps(json.loads(path.read_text()) | {"Categories": ["Same"]}))
    out = own.run("evaluate", *flags, "--rows=tagi,tagi_shuffled")
    assert "all tasks are of one category" in out and "| TAGI, shuffled" in out
    out = project.run("evaluate", "--rows=tagi,tagi_shuffled")
    assert "all tasks are of one category" not in out


# --------------------------------------------------------------------------------- one LoRA for all

def test_one_lora_for_all_is_the_lora_stages_single_teacher(project):
    """Without clipping, which teachers do not have: alike to a hundredth of the learning rate."""
    flags = ("--steps=3", "--lr=0.003", "--schedule=cosine", "--tasks=4", "--instances=2",
             "--demos=mixed", "--beta2=0.98", "--warmup=0.02")
    project.run("lora", "--unit=all", "--name=single", *flags)
    project.run("lora-all", "--name=shared", "--clip=0", *flags)
    a, b = project.weights("single", "all"), project.weights("shared", "all")
    assert a.keys() == b.keys()
    assert max((a[name] - b[name]).abs().max().item() for name in a) < 0.003 / 100
    assert max(w.abs().max().item() for name, w in b.items() if name.endswith("lora_B")) > 0.003
    assert project.record("shared", "all")["unit"] == "all" and "adafactor" in project.refuses(
        "lora-all", "--name=other", "--optimizer=adafactor")


def test_without_one_lora_for_all_its_row_is_left_out_with_its_command(project, quick):
    shutil.rmtree(project.runs / "lora-all")
    out = project.run("evaluate", "--split=validation")
    command = f"python train_teacher.py --stage lora-all --config {project.config}"
    assert f"left out: meta-trained with one LoRA: first run {command}" in out
    assert "| meta-trained with one LoRA |" not in out
    assert command in project.refuses("evaluate", "--split=validation", "--rows=meta_lora")


def test_an_own_instruction_prints_one_line_an_input_and_nothing_else(project):
    inputs = ["Anna went to Paris on Monday .", "Lucy paid two coins .", "Tom saw a dog in Rome ."]
    flags = [word for text in inputs for word in ("--input", text)]
    out = project.run("evaluate", "--instruction", "Find the city .", *flags)
    assert out.count("\n") == 3
    assert out.splitlines()[1:2] == project.run("evaluate", "--instruction", "Find the city .", *flags[2:4]).splitlines()
    assert not (project.runs / "evaluate").exists()


# ---------------------------------------------------------------------------------------------------------- options

def options_of(tmp_path, text, *argv, section="meta", parser=train_teacher.parser):
    path = tmp_path / "config.yaml"
    path.write_text(text)
    return config.parse(parser(), section, ["--config", str(path), *argv])


def test_the_command_line_goes_before_the_section_before_the_top_level_before_the_default(tmp_path):
    top, section = "seed: 1\nrank: 5\nmax_input: 7\n", "meta:\n  seed: 2\n  max_input: 8\n"
    assert options_of(tmp_path, "").seed == 0
    assert options_of(tmp_path, top).seed == 1
    assert options_of(tmp_path, section + top).seed == 2                    # whatever the order in the file
    assert options_of(tmp_path, top + section, "--seed", "3").seed == 3
    options = options_of(tmp_path, top + section, "--max-input=9")
    assert (options.seed, options.rank, options.max_input, options.max_output) == (2, 5, 9, 128)
    assert options_of(tmp_path, top + section, section="base").seed == 1    # a section is one stage's


def test_a_default_given_on_the_command_line_still_goes_before_the_file(tmp_path):
    assert options_of(tmp_path, "seed: 1\n", "--seed=0").seed == 0


@pytest.mark.parametrize("line, key, value", [
    ("lr: 3e-4", "lr", 3e-4), ("lr: 1", "lr", 1.0), ("steps: 12", "steps", 12), ("targets: [q, k, wi_0]", "targets", "q,k,wi_0"),
    ("targets: q,v", "targets", "q,v"), ("demos: 2", "demos", "2"), ("demos: mixed", "demos", "mixed"), ("fusion: false", "fusion", False),
    ("train_norms: true", "train_norms", True), ("train-norms: true", "train_norms", True), ("pretrained: no", "pretrained", False),
    ("lambda_ins: sigmoid", "lambda_ins", "sigmoid"), ("lambda_ins: 0", "lambda_ins", 0.0), ("lambda_ins: 5e-1", "lambda_ins", 0.5),
    ("alignment: none", "alignment", "none"), ("name: null", "name", None), ("text: a b#c.txt", "text", "a b#c.txt"),
    ("fresh: true", "fresh", True), ("fresh: false", "fresh", False)])
def test_a_value_of_the_file_passes_through_the_options_own_type(tmp_path, line, key, value):
    options = options_of(tmp_path, f"finetune:\n  {line}\n", "--stage=finetune", section="finetune", parser=train_hyper.parser)
    found = getattr(options, key)
    assert found == value and type(found) is type(value)


def test_lists_become_comma_strings_at_the_top_level_too(tmp_path):
    options = options_of(tmp_path, "stages: [base, meta]\ntargets: [q, v]\n")
    assert (options.stages, options.targets) == ("base,meta", "q,v")


@pytest.mark.parametrize("module, section", [(MODULES[s], s) for s in (*STAGES, "evaluate")], ids=(*STAGES, "evaluate"))
def test_without_any_option_each_script_reads_the_built_in_suites_config(monkeypatch, module, section):
    monkeypatch.chdir(ROOT)
    argv = ["--stage", section] if module is train_hyper else []
    section = section.replace("-", "_")
    options = config.parse(module.parser(), section, argv)
    values = yaml.safe_load((ROOT / "configs" / "sample.yaml").read_text())
    assert (options.config, options.data, options.runs) == ("configs/sample.yaml", "data/sample", "runs/sample")
    for key, value in (values.get(section) or {}).items():
        assert str(getattr(options, key)) == str(value) or getattr(options, key) == float(value)
    assert getattr(options, "text", "data/sample/corpus.txt") == "data/sample/corpus.txt"


# ------------------------------------------------------------------------------------------------------------- help

@pytest.mark.parametrize("module", [train_teacher, train_hyper, evaluate], ids=lambda m: m.__name__)
def test_help_is_complete_and_grouped(capsys, module):
    parser = module.parser()
    with pytest.raises(SystemExit) as end:
        call(module, "--help")
    assert end.value.code == 0
    said = capsys.readouterr()
    assert said.err == "" and module.__doc__.strip().splitlines()[0] in said.out
    words = set(said.out.replace(",", " ").replace("[", " ").replace("]", " ").split())
    missing = {option for action in parser._actions for option in action.option_strings} - words
    assert not missing
    groups = [group for group in parser._action_groups if group.title not in ("options", "positional arguments")]
    assert len(groups) >= 5 and all(f"\n{group.title}:\n" in said.out for group in groups)
    grouped = {id(action) for group in groups for action in group._group_actions}
    assert [a.dest for a in parser._actions if id(a) not in grouped] == ["help"]


@pytest.mark.parametrize("module", [train_teacher, train_hyper, evaluate], ids=lambda m: m.__name__)
def test_help_needs_no_config(capsys, tmp_path, module):
    with pytest.raises(SystemExit) as end:
        call(module, "--config", str(tmp_path / "absent.yaml"), "--help")
    assert end.value.code == 0 and "--seed" in capsys.readouterr().out
