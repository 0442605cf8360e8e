"""What a user types: every stage and flag runs, leaves the files it should, and options come from where they should."""
import argparse
import json
import math
import os
import shutil
import subprocess
import sys

import pytest
import torch
import yaml

pytest.register_assert_rewrite("stages")
pytest_plugins = ("stages",)
from conftest import apart
from stages import MODULES, ROOT, STAGES, call, environment, process

import adapt
import common
import config
import data
import evaluate
import lora
import t5
import train_hyper
import train_teacher
from bench import ablations, curriculum, optim, report, rouge
from bench.runs import Log

MEASURED = {"step", "lr", "grad_norm", "tokens_per_second", "peak_gib", "seconds"}
TERMS = {"base": {"loss"}, "meta": {"loss"}, "lora": {"loss"}, "lora-all": {"loss"},
         "pretrain": {"loss", "ce"},
         "finetune": {"loss", "ce", "kl", "ins"}}
EVERY_ROW = ["TAGI, right instruction", "TAGI, shuffled instruction", "TAGI, empty instruction",
             "meta-trained, instruction in input", "meta-trained with one LoRA",
             "frozen LLM, no instruction",
             "LoRA teachers, held-out instances of training tasks", "copy the input",
             "copy the first demonstration's output"]
UNSEEN_WORDING = ["TAGI, unseen wording", "meta-trained, unseen wording"]
WITH_COST = set(EVERY_ROW) - {"copy the input", "copy the first demonstration's output"}


# ----------------------------------------------------------------------------------------------------------- stages

def test_evaluate_runs_as_the_readme_calls_it(project):
    """A process of its own; test_resume.py has train_hyper.py's, test_distributed.py train_teacher.py's."""
    done = process(*project.command("evaluate", "--rows=tagi", "--split=validation"))
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
        group = row.pop("group", None)
        assert (group is not None) == (stage == "lora")
        assert row.keys() == MEASURED | TERMS[stage]
        assert all(math.isfinite(value) for value in row.values())
        assert row["grad_norm"] > 0 and row["tokens_per_second"] > 1 and 0.05 < row["peak_gib"] < 24
        assert all(row[term] >= 0 for term in TERMS[stage]) and row["loss"] > 1 and row["lr"] > 0


def test_the_log_keeps_small_terms(finished):
    """L_ins is a mean over weights, here about 1e-5: two digits of it, at least, are in the log."""
    values = [row["ins"] for row in finished.log("finetune")]
    assert any(value != float(f"{value:.0e}") for value in values), values


@pytest.mark.parametrize("steps, every", [(5, 1), (199, 1), (205, 2), (1999, 19), (8007, 20)])
def test_the_log_has_about_a_hundred_lines_or_one_every_20_steps_and_one_for_the_last(
        tmp_path, steps, every):
    options = argparse.Namespace(steps=steps, device="cpu", tensorboard=False)
    log = Log(str(tmp_path), options, start=0, rank=0)
    for step in range(1, steps + 1):
        log(step, 0.1, {"loss": torch.tensor(1.0)}, 10)
    log.close()
    rows = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert {row["step"] for row in rows} == {*range(every, steps + 1, every), steps}
    assert len(rows) == -(-steps // every)


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


def test_a_teachers_optimizer_state_is_its_own_alone(finished):
    """Of a view of a group's state the whole group's would be saved with each."""
    paths = sorted((finished.runs / "lora").glob("*/optimizer.pt"))
    assert len(paths) > 1
    for path in paths:
        weights = path.with_name("model.safetensors").stat().st_size
        assert path.stat().st_size < 4 * weights + 100_000, path


def test_train_teacher_without_stage_runs_the_stages_of_the_config_in_order(finished, tmp_path):
    project = finished.copy(tmp_path / "runs", ())
    out = project.run(None)
    stages = ["base", "meta", "lora", "lora-all"]
    begun = [out.index(f"{project.runs / stage}: 2 steps") for stage in stages]
    assert begun == sorted(begun)
    assert sorted(path.name for path in project.runs.iterdir()) == sorted(stages)


@pytest.mark.parametrize("sections, flags, stages", [
    ("lora_all base lora meta", [], ["base", "meta", "lora", "lora-all"]),  # not the file's order
    ("meta lora", [], ["meta", "lora"]),
    ("base meta lora lora_all pretrain finetune", ["--meta-model=there"], ["lora", "lora-all"]),
    ("base meta lora", ["--meta-model=there", "--model=t5"], ["lora"]),
    ("base meta lora", ["--model=t5"], ["meta", "lora"]),
    ("base meta lora", ["--meta-model=there", "--stage=meta"], ["meta"]),
    ("lora", ["--stage=lora-all"], ["lora-all"])],
    ids=lambda x: x if isinstance(x, str) else " ".join(x))
def test_stages_that_a_checkpoint_makes_needless_are_left_out(tmp_path, sections, flags, stages):
    """base and meta where a meta-trained model is there, base where there is any to begin with."""
    path = tmp_path / "config.yaml"
    path.write_text("".join(f"{section}: {{steps: 2}}\n" for section in sections.split()))
    assert train_teacher.stages_of([f"--config={path}", *flags]) == stages


def test_a_curriculum_has_easy_tasks_first_demonstrations_last_and_inputs_alone(
        finished, monkeypatch):
    """Ten steps: easy tasks in two, demonstrations in the last five, in between half of the draws
    without instruction."""
    monkeypatch.setattr(curriculum, "EASY_FIRST", 0.2)
    monkeypatch.setattr(curriculum, "DEMOS_AFTER", 0.5)
    monkeypatch.setattr(curriculum, "UNINSTRUCTED", 0.5)
    words = finished.argv("meta", "--curriculum", "--steps=10", "--tasks=20", "--demos=2")
    options = config.parse(train_teacher.parser(), "meta", words)
    tasks = data.training_tasks(options)
    first_wording = {task.name: task.definitions[0] for task in tasks}
    answers = {task.name: [output for x in task.instances for output in x.outputs]
               for task in tasks}
    draws = curriculum.curriculum_draws(tasks, options)
    seen = {"other wording": 0, "longer": 0, "no instruction": 0, "demonstrations": 0}
    for step in range(10):
        for draw in draws(step, 0):
            name = draw.task.name
            other = draw.definition not in ("", first_wording[name])
            longer = max(len(output.split()) for output in answers[name]) > 2
            if step < 2:
                assert draw.definition and not other and not longer
            assert not draw.demonstrations or step >= 5
            assert draw.demonstrations or step < 5 or not draw.definition
            seen["other wording"] += other
            seen["longer"] += longer
            seen["no instruction"] += not draw.definition
            seen["demonstrations"] += bool(draw.demonstrations)
    assert all(seen.values()) and 40 < seen["no instruction"] < 120, seen   # half of 160


def test_a_curriculums_learning_rate_starts_anew_with_its_demonstrations(project, monkeypatch):
    monkeypatch.setattr(curriculum, "DEMOS_AFTER", 0.5)
    project.run("meta", "--fresh", "--steps=8", "--warmup=0.25", "--schedule=linear", "--lr=0.04")
    rates = [0.04, 0.04, 0.04 * 2 / 3, 0.04 / 3]                # four steps, warm-up in the first
    assert [row["lr"] for row in project.log("meta")] == pytest.approx(rates * 2)
    project.run("meta", "--fresh", "--steps=8", "--warmup=0.25", "--schedule=linear", "--lr=0.04",
                "--no-curriculum")
    rates = [0.02, 0.04, *(0.04 * n / 6 for n in (6, 5, 4, 3, 2, 1))]
    assert [row["lr"] for row in project.log("meta")] == pytest.approx(rates)


@pytest.mark.parametrize("schedule", ["linear", "cosine", "constant"])
def test_the_learning_rate_starts_anew_after_a_share_of_the_steps(schedule):
    """As if there were two trainings, of 71 and 29 steps; without a restart there is one."""
    def rates(steps, restart=0.0):
        options = argparse.Namespace(steps=steps, lr=0.01, warmup=0.1, schedule=schedule)
        return [optim.learning_rate(options, step, restart) for step in range(steps)]
    assert rates(100, 0.71) == rates(71) + rates(29)
    one = rates(100)
    assert one[9] == max(one) == 0.01 and one[0] == 0.001
    assert (one[-1] < 0.001) == (schedule != "constant")


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
    (["--fusion=none"], {"ce", "kl", "ins"}, ALL - {"fusion"}),
    (["--lambda-ce=0"], {"ce", "kl", "ins"}, ALL),
    (["--lambda-kl=0"], {"ce", "ins"}, ALL),
    (["--lambda-ins=0"], {"ce", "kl"}, ALL),
    (["--generator=none"], {"ce", "kl"}, ALL - {"generator"}),
    (["--generator=mean", "--no-pretrained"], {"ce", "kl", "ins"}, ALL),
    (["--alignment=factors"], {"ce", "kl", "ins"}, ALL),
    (["--alignment=svd"], {"ce", "kl", "ins"}, ALL),
    (["--alignment=none"], {"ce", "kl"}, ALL),
    (["--lambda-ins=0.5", "--alignment=factors"], {"ce", "kl", "ins"}, ALL),
    (["--kl-teacher=meta"], {"ce", "kl", "ins"}, ALL),
    (["--kl-teacher=BASE"], {"ce", "kl", "ins"}, ALL),
    (["--standardize-logits"], {"ce", "kl", "ins"}, ALL),
    (["--temperature=3"], {"ce", "kl", "ins"}, ALL),
    (["--no-train-embeddings"], {"ce", "kl", "ins"}, ALL - {"embedding_delta"}),
    (["--no-train-norms"], {"ce", "kl", "ins"}, ALL - {"norm_gains"}),
    (["--fusion=encoder"], {"ce", "kl", "ins"}, ALL),
    (["--fusion=decoder"], {"ce", "kl", "ins"}, ALL - {"fusion"}),
], ids=lambda x: " ".join(x) if isinstance(x, list) else "")
@pytest.mark.numbers
def test_a_flag_of_finetuning_trains_and_changes_the_result(project, flags, terms, parts):
    flags = [flag.replace("BASE", str(project.runs / "base")) for flag in flags]
    project.run("finetune", "--name=other", *flags)
    weights, whole = project.weights("other"), project.weights("finetune")
    assert prefixes(weights) == parts
    assert weights.keys() != whole.keys() or any(not torch.equal(weights[name], whole[name]) for name in weights)
    for row in project.log("other"):
        assert row.keys() - MEASURED == {"loss"} | terms
        options = argparse.Namespace(**project.record("other"))
        expected = options.lambda_ce * row["ce"] + options.lambda_kl * row.get("kl", 0)
        if "ins" in terms and options.lambda_ins != "sigmoid":
            expected += options.lambda_ins * row["ins"]
        if "ins" not in terms or options.lambda_ins != "sigmoid":
            assert row["loss"] == pytest.approx(expected, abs=1e-3)     # five digits are logged
        else:
            assert expected - 1e-3 < row["loss"] < expected + row["ins"] + 1e-3
    record = project.record("other")
    fusion = [flag.removeprefix("--fusion=") for flag in flags if flag.startswith("--fusion")]
    assert record["finished"] and record["fusion"] == (fusion or ["both"])[0]
    assert evaluate.TAGI.load(str(project.runs / "other")).adapt(["Find the city ."]).mask.any()


@pytest.mark.parametrize("stage", ["meta", "lora", "finetune"])
@pytest.mark.numbers
def test_checkpointing_trains_the_same(project, stage):
    """Against the fixture's stage: the same losses, the second of which is after a step. Weights
    too, but for meta, whose Muon makes much of rounding."""
    project.run(stage, "--name=other", "--checkpointing")
    losses = [[row["loss"] for row in project.log(name)] for name in (stage, "other")]
    assert losses[0] == pytest.approx(losses[1], abs=1e-3)
    assert abs(losses[0][0] - losses[0][1]) > 0.01
    if stage != "meta":
        for path in (project.runs / stage).rglob("model.safetensors"):
            folder = path.parent.relative_to(project.runs / stage)
            a, b = project.weights(stage, folder), project.weights("other", folder)
            assert apart(a, b, project.record(stage)["lr"]) < 0.03


def test_no_fusion_is_both_parts_off(project):
    project.run("finetune", "--name=other", "--fusion=none")
    assert project.record("other")["fusion"] == "none"
    tagi = evaluate.TAGI.load(str(project.runs / "other"))
    adapter = tagi.adapt(["Find the city ."])
    ids, mask = data.tokenize(tagi.tokenizer, ["Anna went to Paris ."], 64)
    with tagi.adapted(adapter):
        memory, _ = tagi.encode(ids, mask)
    assert not tagi.fusion and not adapter.fusion                   # the encoder's part
    assert memory[0].shape[:2] == ids.shape                         # the decoder's


@pytest.mark.parametrize("flags, earlier", [
    ([], {"hypernetwork": True, "encoder_fusion": True, "decoder_fusion": True}),
    (["--fusion=encoder"], {"hypernetwork": True, "encoder_fusion": True, "decoder_fusion": False}),
    (["--fusion=decoder"], {"hypernetwork": True, "encoder_fusion": False, "decoder_fusion": True}),
    (["--fusion=none"], {"hypernetwork": True, "encoder_fusion": False, "decoder_fusion": False}),
    (["--generator=none"], {"hypernetwork": False, "encoder_fusion": True, "decoder_fusion": True})],
    ids=lambda x: " ".join(x) if isinstance(x, list) else "")
def test_a_student_of_earlier_code_whose_switches_had_other_names_still_loads(
        project, flags, earlier):
    project.run("finetune", "--name=other", *flags)
    folder = project.runs / "other"
    record = project.record("other")

    def answers():
        tagi = evaluate.TAGI.load(str(folder))
        ids, mask = data.tokenize(tagi.tokenizer, ["Anna went to Paris ."], 64)
        labels = data.labels(tagi.tokenizer, ["Paris"], 8)
        return tagi(tagi.adapt(["Find the city ."]), ids, mask, labels)

    expected = answers()
    fusion = earlier["encoder_fusion"] or earlier["decoder_fusion"]
    before = record | earlier | {"generator": "attention", "fusion": fusion, "threads": 0,
                                 "log_every": 20, "restart": 0}
    (folder / "config.yaml").write_text(yaml.safe_dump(before))
    options = common.load_options(str(folder))
    assert (options.fusion, options.generator) == (record["fusion"], record["generator"])
    assert torch.equal(answers(), expected)
    assert "nothing to do" in project.run("finetune", "--name=other", *flags)


def test_teachers_and_students_per_task(project):
    project.run("lora", "--fresh", "--unit=task", "--teachers-at-once=7")
    names = (project.data / "splits" / "default" / "train_tasks.txt").read_text().split()
    assert sorted(path.parent.name for path in project.runs.glob("lora/*/model.safetensors")) == sorted(names)
    project.run("finetune", "--name=other", "--unit=task")
    assert {"kl", "ins"} <= project.log("other")[0].keys()


def test_teachers_start_from_what_a_tagi_generates(project):
    """With a learning rate of 0 they are what the checkpoint generates for the tasks' definitions; else they train it."""
    folder, given = project.runs / "finetune", ("--unit=task", "--demos=0")
    project.run("lora", "--name=start", "--init-from", folder, "--lr=0", *given)
    tagi = evaluate.TAGI.load(str(folder))
    tasks = sorted(data.load_sni(str(project.data), "train"), key=lambda task: task.name)
    generated = tagi.adapt([task.definitions[0] for task in tasks]).weights
    for n, task in enumerate(tasks):
        weights, expected = project.weights("start", task.name), lora.flatten(lora.select(generated, n))
        assert weights.keys() == expected.keys()
        assert all(torch.equal(weights[name], expected[name]) for name in weights)
    assert any(B.any() for _, B in generated.values())
    assert project.record("start", tasks[0].name)["init_from"] == str(folder)
    # From there they train, and end elsewhere than those that start at zero.
    project.run("lora", "--name=further", "--init-from", folder, *given)
    project.run("lora", "--name=zero", *given)
    start, further, zero = (project.weights(name, tasks[0].name) for name in ("start", "further", "zero"))
    assert not any(torch.equal(further[name], start[name]) for name in further)
    assert not any(torch.equal(further[name], zero[name]) for name in further)
    assert "--init-from" in project.refuses("lora", "--name=further", *given)


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
    """The cost of three instances of a task, timed once: the table's form, not its figures."""
    monkeypatch.setattr(evaluate, "COST_INSTANCES", 3)
    monkeypatch.setattr(evaluate, "COST_REPEATS", 1)


@pytest.fixture
def uncosted(monkeypatch):
    """No costs, which take most of a small evaluation's time."""
    monkeypatch.setattr(evaluate, "measure_costs", lambda *args: {})


def strict_match(prediction, references):
    return rouge.exact_match(prediction, references, strict=True)


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
    assert f"{table.strip()}\n\nsaved in" in out and "**Def**" in table and "**Def + 2 Pos**" in table
    assert all(table.count(f"\n| {row} |") == 2 for row in rows) and "(1.00x)" in table
    assert {(p["task"], p["id"]) for p in predictions if p["row"] == rows[0]} == {
        (p["task"], p["id"]) for p in predictions if p["row"] == "copy the input"}


def test_the_copying_rows_copy(project, uncosted):
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
    project.run("finetune", "--name=other", "--generator=none")
    project.run("evaluate", "--rows=tagi", "--checkpoint", project.runs / "other", "--out", tmp_path / "out")
    _, results, _ = read(tmp_path / "out")
    assert [(r["row"], r["demos"]) for r in results["results"]] == [
        ("TAGI, right instruction", 0), ("TAGI, right instruction", 2)]
    assert not (project.runs / "evaluate").exists()


# ---------------------------------------------------------------------------- shell scripts

RECORD = """#!/bin/bash
printf '%s\\t' "$(basename "$0")" "$@" >> commands
echo >> commands
"""


class Script:
    """A script of the repository in a folder where its commands are written down, not run.

    python: what .venv/bin/python does beside that, in bash.
    """

    def __init__(self, folder, script, python=""):
        self.folder, self.script = folder, script
        for name in (script, "tests/environment.sh", "requirements.txt"):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / name)
        (folder / ".venv/bin").mkdir(parents=True)
        shutil.copy(ROOT / "requirements.txt", folder / ".venv/requirements.txt.installed")
        path = folder / ".venv/bin/python"
        path.write_text(RECORD + python)
        path.chmod(0o755)

    def run(self, *words, **variables) -> subprocess.CompletedProcess:
        return subprocess.run(["bash", self.script, *words], cwd=self.folder, text=True,
                              env=environment() | variables, capture_output=True, timeout=60)

    def commands(self) -> list[list[str]]:
        """What was called: a program and its words."""
        lines = (self.folder / "commands").read_text().splitlines()
        return [line.rstrip("\t").split("\t") for line in lines]

    def stages(self) -> list[list[str]]:
        """Of those commands the scripts in Python with their options."""
        found = []
        for words in self.commands():
            at = [n for n, word in enumerate(words) if word.endswith(".py")]
            if at:
                found.append(words[at[0]:])
        return found


SCRIPTS = {module.__name__ + ".py": module for module in (train_teacher, train_hyper, evaluate, adapt)}


def options_of_command(words):
    """{option: value}; whatever the script's own parser refuses raises UserError."""
    return vars(SCRIPTS[words[0]].parser().parse_args(words[1:]))


def ablations_script(tmp_path, project, **variables) -> Script:
    script = Script(tmp_path / "tree", "bench/ablations.sh")
    paths = {"CONFIG": str(project.config), "RUNS": str(project.runs)}
    done = script.run(**paths, **variables)
    assert done.returncode == 0 and not done.stderr, done.stderr
    return script


PARTS = {                                       # row -> the option that makes it
    "TAGI, whole method": {},
    "without pretraining": {"pretrained": False},
    "without fusion (LoRA alone)": {"fusion": "none"},
    "without L_pred": {"lambda_ce": 0},
    "without L_kl": {"lambda_kl": 0},
    "without L_ins": {"lambda_ins": 0},
    "without hypernetwork (fusion alone)": {"generator": "none"},
    "L_ins compares B·A": {"alignment": "product"},
    "L_ins compares A and B": {},               # the default, though not the config's
    "L_ins compares A and B by SVD": {"alignment": "svd"},
}


def test_ablations_train_and_score_every_row_once_a_seed(finished, tmp_path):
    script = ablations_script(tmp_path, finished, SEEDS="2", PROCESSES="3", SPLIT="validation")
    assert ablations.ABLATIONS.keys() == PARTS.keys()
    stages = script.stages()
    default = vars(train_hyper.parser().parse_args([]))
    names = ("pretrained", "fusion", "lambda_ce", "lambda_kl", "lambda_ins", "generator", "alignment")
    for seed, runs in ((0, str(finished.runs)), (1, f"{finished.runs}-seed1")):
        mine = [(words[0], options_of_command(words)) for words in stages]
        mine = [(name, options) for name, options in mine
                if (options["runs"], options["seed"]) == (runs, seed) and not options.get("ablations")]
        trained = [options for _, options in mine if options.get("stage") == "finetune"]
        scored = [options for name, options in mine if name == "evaluate.py"]
        assert len(mine) == 2 + 2 * len(PARTS)
        # What they need comes first: the teachers, which are the config's, then pretraining.
        assert [name for name, _ in mine[:2]] == ["train_teacher.py", "train_hyper.py"]
        assert mine[0][1]["stage"] is None and mine[1][1]["stage"] == "pretrain"
        for (row, name), run, its in zip(ablations.ABLATIONS.items(), trained, scored, strict=True):
            changed = {key: run[key] for key in names if run[key] != default[key]}
            name = name and f"-{name}"
            assert changed == PARTS[row] and (run["name"] or "finetune") == f"finetune{name}"
            assert its["checkpoint"] == f"{runs}/finetune{name}"
            assert its["out"] == f"{runs}/evaluate-validation{name}" and its["split"] == "validation"
            assert its["rows"] == (None if row == "TAGI, whole method" else "tagi")
            assert run["config"] == its["config"] == str(finished.config)
            assert mine.index(("train_hyper.py", run)) + 1 == mine.index(("evaluate.py", its))
    assert len(stages) == 2 * (2 + 2 * len(PARTS)) + 1
    assert options_of_command(stages[-1])["ablations"]
    for program, *words in script.commands():
        assert program == "python"
        launched = words[:4] == ["-m", "bench.launch", "--nproc-per-node", "3"]
        assert launched == ("--ablations" not in words)


def test_ablations_of_some_parts_alone(finished, tmp_path):
    script = ablations_script(tmp_path, finished, SEEDS="1", ONLY="without-kl without-ins")
    names = [options_of_command(words).get("name") for words in script.stages() if words[0] == "train_hyper.py"]
    assert names == [None, None, "finetune-without-kl", "finetune-without-ins"]


def test_ablations_retrain_finetuning_for_every_row_once(project, uncosted, tmp_path):
    """On one seed, the commands run in this process; a second run trains and scores nothing
    again."""
    called = ablations_script(tmp_path, project, SEEDS="1").stages()

    def run_all() -> str:
        """What the last one prints, the table."""
        for words in called:
            table = call(SCRIPTS[words[0]], *words[1:])
        return table

    table = run_all()
    rows = [line.split("|")[1].strip() for line in table.splitlines() if line.startswith("| ")]
    assert rows[:1] == [""] and set(ablations.ABLATIONS) <= set(rows)
    assert "meta-trained with one LoRA" in rows
    for name in list(ablations.ABLATIONS.values())[1:]:
        assert project.record(f"finetune-{name}")["finished"]
        assert (project.runs / f"evaluate-test-{name}" / "results.json").exists()
    assert not any("lora-all" in word for words in called for word in words)    # the config's stage

    def kept():
        files = project.files()
        trained = {path: files[path] for path in files if path.suffix == ".safetensors"}
        told = [path for path in files if path.name == "predictions.jsonl"]
        return trained | {path: files[path][1] for path in told}

    before = kept()
    assert run_all() == table
    assert kept() == before and len(before) > 20


def test_ablations_do_not_take_another_splits_or_checkpoints_scores(
        project, uncosted, monkeypatch, tmp_path):
    monkeypatch.setattr(ablations, "ABLATIONS", {"TAGI, whole method": ""})

    def evaluated(split):
        """As the script scores the whole method, and tells it."""
        script = ablations_script(tmp_path / split, project, SEEDS="1", SPLIT=split)
        words = [words for words in script.stages() if words[0] == "evaluate.py"]
        for its in (words[0], words[-1]):
            call(evaluate, *its[1:])

    evaluated("test")
    line = project.refuses("evaluate", "--ablations", "--split=validation")
    assert "evaluate-validation/results.json" in line and "bash bench/ablations.sh" in line
    evaluated("validation")
    results = project.runs / "evaluate-validation" / "results.json"
    assert json.loads(results.read_text())["split"] == "validation"
    before = (results.parent / "predictions.jsonl").read_text()
    project.run("finetune", "--fresh", "--seed=7")
    shutil.rmtree(tmp_path / "validation")
    evaluated("validation")
    assert (results.parent / "predictions.jsonl").read_text() != before


def test_ablations_print_the_table_of_the_results_that_are_there(project):
    """Means over three seeds, of the rows that the whole method's evaluation has too; which seeds are missing."""
    def write(seed, name, **scores):
        runs = project.runs.parent / (project.runs.name + (f"-seed{seed}" if seed else ""))
        path = runs / f"evaluate-test{name and '-' + name}" / "results.json"
        path.parent.mkdir(parents=True)
        rows = [{"row": report.ROWS[key], "demos": demos, "exact_match": score + demos,
                 "by_task": {"exact_match": {"one": score, "other": score}}}
                for key, score in scores.items() for demos in (0, 2)]
        path.write_text(json.dumps({"bench": "sample", "split": "test", "results": rows}))

    for seed in range(3):
        for name in ablations.ABLATIONS.values():
            if not name:
                write(seed, name, tagi=50.0 + seed, meta=70.0)
            else:
                write(seed, name, tagi=40.0 + seed)
    table = project.run("evaluate", "--ablations")
    assert "test tasks" in table and "over 3 seeds" in table and "| Def | Def + 2 Pos |" in table
    assert "| TAGI, whole method | 51.0 ± 1.0 | 53.0 ± 1.0 |" in table
    assert "| meta-trained, instruction in input | 70.0 ± 0.0 | 72.0 ± 0.0 |" in table
    for row in list(ablations.ABLATIONS)[1:]:
        assert f"| {row} | 41.0 ± 1.0 (-10.0 ± 0.0) | 43.0 ± 1.0 (-10.0 ± 0.0) |" in table
    written = project.runs.parent / (project.runs.name + "-ablations.md")
    assert table == f"{written.read_text()}\nsaved as {written}\n"
    for name in ("with-svd", "with-factors"):
        for seed in (1, 2) if name == "with-svd" else range(3):
            runs = project.runs.parent / (project.runs.name + (f"-seed{seed}" if seed else ""))
            (runs / f"evaluate-test-{name}/results.json").unlink()
    fewer = project.run("evaluate", "--ablations")
    cell = "40.0 (-10.0, -10.0 – -10.0)"
    assert f"| L_ins compares A and B by SVD, 1 of 3 seeds | {cell} |" in fewer
    assert "| L_ins compares A and B |" not in fewer and "| L_ins compares B·A | 41.0 ± 1.0 (" in fewer
    (project.runs / "evaluate-test/results.json").unlink()
    line = project.refuses("evaluate", "--ablations")
    assert "evaluate-test/results.json" in line and "bash bench/ablations.sh" in line


# The quick start's own check: floors of exact match, at both settings.

GOOD = {(0, "tagi"): 94.0, (0, "tagi_shuffled"): 0.0, (0, "meta"): 96.0, (0, "copy_demo"): 7.0,
        (2, "tagi"): 95.0, (2, "tagi_shuffled"): 2.0, (2, "meta"): 97.0, (2, "copy_demo"): 7.0}
TAGI_AT_2 = "Def + 2 Pos: TAGI's exact match of {:.1f} is less than "


def quickstart(tmp_path, results) -> Script:
    """quickstart.sh whose evaluation leaves this results.json, and whose check is run."""
    (tmp_path / "made_up.json").write_text(results)
    return Script(tmp_path / "tree", "quickstart.sh", python=f"""
if [ "$1" = - ]; then exec {sys.executable} "$@"; fi
for ((i = 1; i <= $#; i++)); do
    if [ "${{!i}}" = --checkpoint ]; then next=$((i + 1)); runs=$(dirname "${{!next}}"); fi
done
if [[ "$*" == *"--bench sample"* ]]; then
    mkdir -p "$runs/evaluate"
    cp ../made_up.json "$runs/evaluate/results.json"
fi
""")


@pytest.mark.parametrize("scores, missed", [
    ({}, []),
    ({(0, "meta"): 95.0, (2, "meta"): 100.0, (0, "tagi_shuffled"): 14.0}, []),  # just not missed
    ({(0, "meta"): 94.9}, ["Def: the meta-trained row's exact match of 94.9 is below 95"]),
    ({(2, "meta"): 94.9}, ["Def + 2 Pos: the meta-trained row's exact match of 94.9 is below 95"]),
    ({(0, "tagi"): 91.1}, ["Def: TAGI's exact match of 91.1 is less than 0.95 times the "
                           "meta-trained row's 96.0"]),
    ({(2, "tagi"): 91.1}, [TAGI_AT_2.format(91.1) + "0.95 times the meta-trained row's 97.0"]),
    ({(0, "tagi_shuffled"): 14.1}, ["Def: TAGI's exact match of 94.0 is less than 80 above the "
                                    "14.1 with the shuffled instruction"]),
    ({(2, "tagi_shuffled"): 15.1}, [TAGI_AT_2.format(95.0) + "80 above the 15.1 with"]),
    ({(0, "meta"): 90.0, (0, "tagi"): 70.0, (2, "meta"): 90.0, (2, "tagi"): 70.0},
     ["Def: the meta-trained", "Def: TAGI's exact match of 70.0 is less than 0.95 times",
      "Def: TAGI's exact match of 70.0 is less than 80 above", "Def + 2 Pos: the meta-trained",
      TAGI_AT_2.format(70.0) + "0.95 times", TAGI_AT_2.format(70.0) + "80 above"])],
    ids=lambda x: ", ".join(f"{row} {demos}" for demos, row in x) if isinstance(x, dict) else "")
def test_a_floor_that_the_quick_start_misses_is_exit_code_1(tmp_path, scores, missed):
    """At either setting, a line for each on standard error; the last command is not run then."""
    results = [{"key": key, "demos": demos, "exact_match": em}
               for (demos, key), em in (GOOD | scores).items()]
    script = quickstart(tmp_path, json.dumps({"results": results}))
    done = script.run()
    lines = done.stderr.splitlines()
    assert len(lines) == len(missed), lines
    assert all(line.startswith(start) for line, start in zip(lines, missed)), lines
    assert done.returncode == (1 if missed else 0)
    assert ("--instruction" in script.stages()[-1]) == (not missed)
    assert ("quick start: " in done.stdout) == (not missed)


def test_the_quick_start_checks_the_results_that_an_evaluation_writes(
        project, uncosted, tmp_path):
    """Two steps of training miss every floor of the baseline; the table is there."""
    project.run("evaluate", "--rows=tagi,tagi_shuffled,meta")
    assert "TAGI, right instruction" in read(project.runs / "evaluate")[2]
    results = project.runs / "evaluate" / "results.json"
    done = quickstart(tmp_path, results.read_text()).run()
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert done.stderr.count("the meta-trained row's exact match") == 2     # Def and Def + 2 Pos
    assert done.stderr.count("80 above") == 2


@pytest.mark.parametrize("flags, before, runs", [
    ([], [], "runs/sample"), (["--fresh"], [], "runs/sample"),
    (["--from-scratch"], ["base", "meta"], "runs/from-scratch")], ids=" ".join)
def test_the_quick_starts_commands_are_options_of_the_scripts(tmp_path, flags, before, runs):
    results = [{"key": key, "demos": demos, "exact_match": em} for (demos, key), em in GOOD.items()]
    script = quickstart(tmp_path, json.dumps({"results": results}))
    assert script.run(*flags).returncode == 0
    stages = [(words[0], options_of_command(words)) for words in script.stages()]
    assert [(name, options.get("stage")) for name, options in stages] == [
        *(("train_teacher.py", stage) for stage in before), ("train_teacher.py", None),
        ("train_hyper.py", "pretrain"), ("train_hyper.py", "finetune"),
        ("evaluate.py", None), ("adapt.py", None)]
    for name, options in stages[:-2]:
        assert options["runs"] == runs and options["fresh"] == ("--fresh" in flags)
        assert options["meta_model"] == ("runs/from-scratch/meta" if before else None)
    assert {options["checkpoint"] for _, options in stages[-2:]} == {f"{runs}/finetune"}
    assert ["python", "-m", "bench.sample"] in script.commands()            # no suite is there


def test_words_that_the_model_does_not_know_are_named_on_standard_error(project, capsys):
    flags = ("--instruction", "Find the city , \u03a9mega .",
             "--input", "Anna saw \u010duch, \u03a9mega and \u010duch .", "--input", "Tom saw a dog .")
    assert project.run("adapt", "--max-output=4", *flags).count("\n") == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning: ")]
    assert lines == ["warning: words the model does not know: \u03a9mega",              # of the instruction, of the inputs
                     "warning: words the model does not know: \u010duch, \u03a9mega"]
    project.run("adapt", "--max-output=4", "--instruction", "Find the city .", "--input", "Tom saw a dog .")
    assert "warning" not in capsys.readouterr().err


def test_unknown_words_are_those_with_an_unknown_token_each_once_without_punctuation():
    from conftest import make_tokenizer
    tokenizer = make_tokenizer()
    texts = ["say \u00e9t\u00e9, (Word) 7", "7 say \u00e9t\u00e9 \u20ac"]
    assert t5.unknown_words(tokenizer, texts) == ["\u00e9t\u00e9", "Word", "7", "\u20ac"]
    assert t5.unknown_words(tokenizer, ["say word"]) == t5.unknown_words(tokenizer, [" "]) == []


def one_task(project, tmp_path, *names):
    """A copy of the project whose validation split names just these of its tasks, by number."""
    own = project.copy(tmp_path / "own", data=tmp_path / "data")
    path = own.data / "splits/default/validation_tasks.txt"
    path.write_text("\n".join(path.read_text().split()[n] for n in names))
    return own, ("--data", own.data, "--split=validation")


def test_one_task_alone_has_no_shuffled_instruction(project, tmp_path):
    own, flags = one_task(project, tmp_path, 0)
    out = own.run("evaluate", *flags, "--rows=tagi,tagi_shuffled")
    assert "left out: TAGI, shuffled instruction" in out
    assert "| TAGI, shuffled" not in out and "| TAGI, right" in out
    assert "tagi_shuffled" in own.refuses("evaluate", *flags, "--rows=tagi_shuffled")


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


def test_without_one_lora_for_all_its_row_is_left_out_with_its_command(project, uncosted):
    shutil.rmtree(project.runs / "lora-all")
    out = project.run("evaluate", "--split=validation")
    command = f"python train_teacher.py --stage lora-all --config {project.config}"
    assert f"left out: meta-trained with one LoRA: first run {command}" in out
    assert "| meta-trained with one LoRA |" not in out
    assert command in project.refuses("evaluate", "--split=validation", "--rows=meta_lora")


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
    ("lr: 3e-4", "lr", 3e-4), ("lr: 1", "lr", 1.0), ("steps: 12", "steps", 12),
    ("targets: [q, k, wi_0]", "targets", "q,k,wi_0"), ("targets: q,v", "targets", "q,v"),
    ("demos: 2", "demos", "2"), ("demos: mixed", "demos", "mixed"),
    ("fusion: none", "fusion", "none"), ("generator: none", "generator", "none"),
    ("train_norms: true", "train_norms", True), ("train-norms: true", "train_norms", True),
    ("train_norms: false", "train_norms", False), ("pretrained: no", "pretrained", False),
    ("lambda_ins: sigmoid", "lambda_ins", "sigmoid"), ("lambda_ins: 0", "lambda_ins", 0.0),
    ("lambda_ins: 5e-1", "lambda_ins", 0.5), ("alignment: none", "alignment", "none"),
    ("name: null", "name", None), ("text: a b#c.txt", "text", "a b#c.txt"),
    ("pretrained: true", "pretrained", True), ("pretrained: false", "pretrained", False)])
def test_a_value_of_the_file_passes_through_the_options_own_type(tmp_path, line, key, value):
    options = options_of(tmp_path, f"finetune:\n  {line}\n", "--stage=finetune",
                         section="finetune", parser=train_hyper.parser)
    found = getattr(options, key)
    assert found == value and type(found) is type(value)


def test_lists_become_comma_strings_at_the_top_level_too(tmp_path):
    options = options_of(tmp_path, "llm: base\ntargets: [q, v]\n")
    assert (options.llm, options.targets) == ("base", "q,v")


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
