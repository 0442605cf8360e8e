"""A user's mistake: one line on standard error, exit code 2, nothing lost. `Project.refuses` checks these three each time."""
import io
import json
import re
import shutil
import subprocess
import warnings

import pytest
import torch
import yaml

pytest.register_assert_rewrite("stages")
pytest_plugins = ("stages",)
from stages import ROOT, STAGES, Project, at_step, environment, interrupt

import adapt
import common
import data
import evaluate
import train_hyper
import train_teacher

ASK = ("--instruction", "Find the city .", "--input", "Anna went to Paris on Monday .")


def test_in_a_process_of_its_own(project):
    """What the shell sees: no traceback, on standard output the options at most, the code."""
    shutil.rmtree(project.runs / "meta")
    done = subprocess.run(project.command("pretrain", "--name=other"), cwd=ROOT, env=environment(), capture_output=True, text=True)
    assert done.returncode == 2 and "Traceback" not in done.stdout and "saved" not in done.stdout
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1


# ------------------------------------------------------------------------------------------ the order of the stages

@pytest.mark.parametrize("stage, absent, command, flags", [
    ("meta", "base", "python train_teacher.py --stage base", ()),
    ("lora", "meta", "python train_teacher.py --stage meta", ()),
    ("lora", "base", "python train_teacher.py --stage base", ("--llm=base",)),
    ("pretrain", "meta", "python train_teacher.py --stage meta", ()),
    ("finetune", "meta", "python train_teacher.py --stage meta", ()),
    ("finetune", "lora", "python train_teacher.py --stage lora", ()),
    ("finetune", "lora", "python train_teacher.py --stage lora", ("--lambda-ins=0",)),
    ("finetune", "lora", "python train_teacher.py --stage lora", ("--lambda-kl=0",)),
    ("finetune", "pretrain", "python train_hyper.py --stage pretrain", ()),
    ("evaluate", "finetune", "python train_hyper.py --stage finetune", ()),
    ("evaluate", "lora", "python train_teacher.py --stage lora", ("--split=validation",)),
])
def test_a_stage_before_the_one_it_needs_names_the_command_to_run(project, stage, absent, command, flags):
    if stage != "evaluate":
        shutil.rmtree(project.runs / stage)
    shutil.rmtree(project.runs / absent)
    line = project.refuses(stage, *flags)
    assert str(project.runs / absent) in line or f"runs/{absent}" in line
    assert f"{command} --config {project.config}" in line


def test_a_student_whose_frozen_llm_is_gone_says_where_it_should_be(project):
    shutil.rmtree(project.runs / "meta")
    line = project.refuses("evaluate", "--rows=tagi")
    assert str(project.runs / "meta") in line.replace("finetune/../", "") and "Repo id" not in line


@pytest.mark.parametrize("stage, absent", [("meta", "base"), ("pretrain", "meta"), ("finetune", "pretrain"), ("finetune", "lora")])
def test_an_unfinished_stage_is_not_built_upon(project, stage, absent):
    record = project.runs / absent / "config.yaml"
    if absent == "lora":
        record = next(project.runs.glob("lora/*/config.yaml"))
    record.write_text(record.read_text().replace("finished: true", "finished: false"))
    assert f"--stage {absent}" in project.refuses(stage, "--name=other")


# --------------------------------------------------------------------------------------------------------- options

def config(project, tmp_path, text, section=None):
    """project's config with a few lines more, at the top level or in a section."""
    values = yaml.safe_load(project.config.read_text())
    (values[section] if section else values).update(yaml.safe_load(text))
    path = tmp_path / "other.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


@pytest.mark.parametrize("section, text, said", [
    (None, "max_inputs: 3", ["max_inputs", "max-input"]),
    (None, "finetunes: {lr: 3}", ["finetunes", "finetune"]),
    (None, "lr: 3e-4", ["lr"]),         # known, but a stage's: belongs into a section
    (None, "fresh: true", ["fresh", "command line"]), ("meta", "fresh: true", ["fresh", "command line"]),
    (None, "config: other.yaml", ["config", "command line"]),
    (None, "stages: [base, meta]", ["stages"]), (None, "threads: 2", ["threads"]),  # of earlier code
    ("meta", "leraning_rate: 3", ["leraning_rate", "meta:"]),
    ("meta", "curiculum: true", ["curiculum", "curriculum"]),
    ("meta", "lambda_kl: 1", ["lambda_kl", "meta:"]),                       # another script's
    ("meta", "curriculum: 0.1", ["curriculum"]),
    (None, "rank: many", ["rank", "many"]), (None, "rank: 1.5", ["rank", "1.5"]),
    ("meta", "lr: fast", ["lr", "fast"]),
    ("meta", "schedule: sudden", ["schedule", "sudden", "cosine"]),
    (None, "demos: 3", ["demos", "mixed"]),
    (None, "rank: 0", ["rank", "0"]), (None, "rank: true", ["rank"]),
    (None, "rank: false", ["rank"]), (None, "meta: 3", ["meta"]),
    (None, "meta: [lr, 3]", ["meta"]), ("meta", "lr: {a: 3}", ["lr"])])
def test_a_wrong_line_of_the_config_is_named_with_the_file(project, tmp_path, section, text, said):
    path = config(project, tmp_path, text, section)
    line = project.refuses("meta", "--name=other", "--config", path)
    assert str(path) in line
    assert all(word in line.replace(str(path), "") for word in said), line


@pytest.mark.parametrize("text", ["a: [1, 2", "a: b: c", "- 1\n- 2\n", "just words", "\tseed: 1", "a: 'b"])
def test_a_config_that_is_no_yaml_mapping_is_refused(project, tmp_path, text):
    path = tmp_path / "broken.yaml"
    path.write_text(text)
    assert str(path) in project.refuses("meta", "--config", path)


def test_a_missing_config_is_named(project, tmp_path):
    for stage in ("meta", "finetune", "evaluate"):
        line = project.refuses(stage, "--config", tmp_path / "absent.yaml")
        assert "absent.yaml" in line and "--config" in line


@pytest.mark.parametrize("stage, flags, said", [
    ("meta", ["--stepz", "3"], ["--stepz", "--steps"]),
    ("finetune", ["--lambda-k=3"], ["--lambda-k", "--lambda-kl"]),
    ("evaluate", ["--chekpoint", "x"], ["--chekpoint", "--checkpoint"]),
    ("meta", ["more"], ["more"]), ("lora", ["--rank", "0"], ["--rank", "0", "1"]),
    ("finetune", ["--rank=-2"], ["--rank", "-2"]), ("meta", ["--rank", "x"], ["--rank", "x"]),
    ("meta", ["--stage", "mete"], ["--stage", "mete", "meta"]),
    ("finetune", ["--alignment", "x"], ["--alignment", "product"]),
    ("finetune", ["--fusion", "x"], ["--fusion", "x", "encoder"]),
    ("finetune", ["--generator", "x"], ["--generator", "x", "mean"]),
    ("finetune", ["--lambda-ins", "x"], ["--lambda-ins", "x"]),
    ("meta", ["--lr"], ["--lr"]), ("meta", ["--lr="], ["--lr"]),
    ("finetune", ["--generator=none", "--fusion=none"], ["--generator none", "--fusion none"]),
    ("finetune", ["--generator=none", "--fusion=none", "--no-train-norms"], ["--generator none"]),
    ("finetune", ["--generator=none", "--fusion=decoder", "--no-train-norms",
                  "--no-train-embeddings"], ["--fusion", "nothing to train"]),
    ("finetune", ["--lambda-ce=0", "--lambda-kl=0"], ["--lambda-ce", "--lambda-kl"]),
    ("lora", ["--targets=q,x"], ["targets", "x", "wi_0"]),
    ("finetune", ["--targets=q,x", "--no-pretrained"], ["targets", "x", "wi_0"]),
    ("meta", ["--tasks=0"], ["--tasks"]), ("finetune", ["--steps=0"], ["--steps"]),
    ("finetune", ["--instances=0"], ["--instances"]),
    ("meta", ["--accumulate=0"], ["--accumulate"]),
    ("finetune", ["--temperature=0"], ["--temperature"]),
    ("lora", ["--teachers-at-once=0"], ["--teachers-at-once"]),
    ("pretrain", ["--text-length=2"], ["--text-length"]),
    ("pretrain", ["--width=30"], ["--width", "30", "4"]),
    ("meta", ["--save-every=0"], ["--save-every"])])
def test_a_wrong_option_is_named(project, stage, flags, said):
    line = project.refuses(stage, *([] if stage == "evaluate" else ["--name=other"]), *flags)
    assert all(word in line for word in said), line
    assert not (project.runs / "other" / "model.safetensors").exists()


def test_train_hyper_without_a_stage_names_the_option(project):
    with pytest.raises(SystemExit) as end:
        train_hyper.main(["--config", str(project.config)])
    assert end.value.code == 2


@pytest.mark.parametrize("keep, flags", [
    ([], []), (["pretrain", "finetune"], []), (["base", "meta"], ["--meta-model=assets/t5-tiny"])])
def test_a_config_without_a_stage_of_train_teacher_is_named(project, tmp_path, keep, flags):
    """Nor is there one where those that it has a section for are made already."""
    values = yaml.safe_load(project.config.read_text())
    stages = [stage.replace("-", "_") for stage in STAGES]
    values = {key: value for key, value in values.items() if key not in stages or key in keep}
    path = tmp_path / "other.yaml"
    path.write_text(yaml.safe_dump(values))
    line = project.refuses(None, "--config", path, *flags)
    assert str(path) in line and "no section" in line and "--stage" in line


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is there")
def test_a_gpu_that_is_not_there(project):
    assert "--device" in project.refuses("meta", "--device=cuda", "--name=other")


# ------------------------------------------------------------------------------------------------------------ data

def damaged(project, tmp_path, split, edit) -> Project:
    """A copy of the project whose first task of a split went through edit(record) -> record or text."""
    other = project.copy(tmp_path / "damaged", data=tmp_path / "data")
    name = (other.data / "splits" / "default" / f"{split}_tasks.txt").read_text().split()[0]
    other.task = other.data / "tasks" / f"{name}.json"
    record = edit(json.loads(other.task.read_text()))
    other.task.write_text(record if isinstance(record, str) else json.dumps(record))
    return other


def without(key, value=None):
    def edit(record):
        record.pop(key)
        return record if value is None else record | {key: value}
    return edit


def instance(change):
    def edit(record):
        record["Instances"][2].update(change)
        return record
    return edit


DAMAGE = [(lambda record: json.dumps(record, indent=1)[:300], "JSON"), (lambda record: "", "JSON"),
          (lambda record: json.dumps([record]), ""), (without("Definition"), "Definition"), (without("Definition", []), "Definition"),
          (without("Definition", [" "]), "Definition"), (instance({"output": []}), "instance 2"), (instance({"output": None}), "instance 2"),
          (without("Instances", []), "nstance"), (without("Positive Examples", [{"input": "a"}]), "Positive Example")]
NAMES = ("cut", "empty", "a list", "no Definition", "Definition []", "Definition blank", "output []", "output null", "Instances []",
         "an example without output")


@pytest.mark.parametrize("edit, said", DAMAGE, ids=NAMES)
def test_a_damaged_training_task_is_named(project, tmp_path, edit, said):
    other = damaged(project, tmp_path, "train", edit)
    line = other.refuses("meta", "--name=other", "--data", other.data, "--demos=2")
    assert str(other.task) in line and said in line


@pytest.mark.parametrize("edit, said", [DAMAGE[0], DAMAGE[3], DAMAGE[6], DAMAGE[8]], ids=["cut", "no Definition", "output []", "Instances []"])
def test_a_damaged_test_task_is_named(project, tmp_path, edit, said):
    other = damaged(project, tmp_path, "validation", edit)
    line = other.refuses("evaluate", "--rows=tagi", "--data", other.data, "--split=validation")
    assert str(other.task) in line and said in line


def test_a_test_task_without_examples_is_scored(project, tmp_path, monkeypatch):
    """They are optional in a task file, so the row that copies the first one has to do without."""
    monkeypatch.setattr(evaluate, "measure_costs", lambda *args: {})
    other = damaged(project, tmp_path, "validation", without("Positive Examples"))
    assert "copy the first demonstration" in other.run("evaluate", "--data", other.data, "--split=validation")


@pytest.mark.parametrize("stage", ["base", "meta", "lora", "finetune", "evaluate"])
def test_a_missing_data_folder_is_named_with_the_command_that_writes_it(project, tmp_path, stage):
    name = [] if stage == "evaluate" else ["--name=other"]
    line = project.refuses(stage, *name, "--data", tmp_path / "nowhere")
    assert str(tmp_path / "nowhere") in line and "python bench/sample.py" in line


@pytest.mark.parametrize("stage, split", [("meta", "train"), ("finetune", "train"), ("evaluate", "test")])
def test_an_empty_or_missing_split_or_task_file_is_named(project, tmp_path, stage, split):
    other = project.copy(tmp_path / "damaged", data=tmp_path / "data")
    flags = [*([] if stage == "evaluate" else ["--name=other"]), "--data", other.data]
    path = other.data / "splits" / "default" / f"{split}_tasks.txt"
    path.write_text(path.read_text() + "task999_absent\n")
    line = other.refuses(stage, *flags)
    assert str(path) in line and "task999_absent" in line
    path.write_text("\n")
    assert str(path) in other.refuses(stage, *flags)
    path.unlink()
    assert str(path) in other.refuses(stage, *flags)


def test_a_split_that_is_not_there_is_named(project):
    assert "dev_tasks.txt" in project.refuses("evaluate", "--split=dev")


@pytest.mark.parametrize("stage", ["base", "pretrain"])
@pytest.mark.parametrize("name, text, said", [
    ("absent.txt", None, "--text"), ("empty.txt", "\n \n", ""), ("short.txt", "Anna\nTom\n", ""),
    ("broken.jsonl", '{"text": "Anna went to Paris on Monday ."}\n{"text": "An\n', "line 2"), ("other.json", '{"words": "a"}\n', "line 1")])
def test_a_wrong_text_file_is_named(project, tmp_path, stage, name, text, said):
    path = tmp_path / name
    if text is not None:
        path.write_text(text)
    line = project.refuses(stage, "--name=other", "--text", path)
    assert str(path) in line and said in line


def test_a_text_file_that_is_no_text_is_named(project, tmp_path):
    path = tmp_path / "image.txt"
    path.write_bytes(bytes(range(256)))
    assert str(path) in project.refuses("base", "--name=other", "--text", path)


# ---------------------------------------------------------------------------- data that has changed

@pytest.fixture
def own(project, tmp_path) -> Project:
    """The project as if it had been trained on a data folder of its own."""
    other = project.copy(tmp_path / "own", data=tmp_path / "data")
    other.config = tmp_path / "own.yaml"
    other.config.write_text(project.config.read_text().replace(str(project.data), str(other.data)))
    for record in other.runs.rglob("config.yaml"):
        record.write_text(record.read_text().replace(str(project.data), str(other.data)))
    return other


def change_a_training_task(project):
    name = (project.data / "splits" / "default" / "train_tasks.txt").read_text().split()[5]
    path = project.data / "tasks" / f"{name}.json"
    record = json.loads(path.read_text())
    record["Instances"][7]["output"] = ["changed"]
    path.write_text(json.dumps(record))


@pytest.mark.parametrize("stage", ["base", "meta", "lora", "lora-all", "pretrain", "finetune"])
def test_data_that_changed_under_a_finished_stage_is_noticed(own, stage):
    """The training tasks, or the plain text where that is what the stage read."""
    assert "nothing to do" in own.run(stage)
    change_a_training_task(own)
    (own.data / "corpus.txt").write_text("Anna went to Paris .\n" * 50)
    line = own.refuses(stage)
    path = own.data / "corpus.txt" if stage in ("base", "pretrain") else own.data
    assert f"in {path} " in line and str(own.runs / stage) in line and "--fresh" in line


@pytest.mark.parametrize("stage, upstream", [
    ("lora", "meta"), ("lora-all", "meta"), ("finetune", "meta"), ("finetune", "lora")])
def test_a_stage_on_other_training_tasks_than_those_before_it_is_refused(own, stage, upstream):
    change_a_training_task(own)
    # An LLM that is named as a path may be of other tasks.
    flags = [f"--llm={own.runs / 'meta'}"] if upstream == "lora" else []
    line = own.refuses(stage, "--name=other", *flags)
    assert f"the training tasks in {own.data} " in line and str(own.runs / upstream) in line


def test_training_does_not_go_on_with_other_training_tasks_or_another_tokenizer(own, monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        at_step(patch, 1, interrupt)
        own.run("pretrain", "--name=cut", "--steps=4")
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        at_step(patch, 1, interrupt)
        own.run("meta", "--name=cut_meta", "--steps=4")
    swap_words(own.runs / "meta")
    line = own.refuses("pretrain", "--name=cut", "--steps=4")
    assert "tokenizer" in line and str(own.runs / "cut") in line
    assert "tokenizer" in own.refuses("evaluate", "--rows=tagi")
    assert "tokenizer" in own.refuses("finetune", "--name=other", "--no-pretrained")
    change_a_training_task(own)
    line = own.refuses("meta", "--name=cut_meta", "--steps=4")
    assert "training tasks" in line and str(own.runs / "cut_meta") in line


def swap_words(folder):
    """Two words of an LLM's tokenizer change places."""
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    vocab = tokenizer["model"]["vocab"]
    one, other_one = list(vocab)[100:102]
    vocab[one], vocab[other_one] = vocab[other_one], vocab[one]
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))


def test_a_student_is_not_evaluated_where_its_training_tasks_have_changed(own, tmp_path):
    """A copy of the data as it was is as good as the folder itself."""
    copy = tmp_path / "copy"
    shutil.copytree(own.data, copy)
    change_a_training_task(own)
    line = own.refuses("evaluate", "--rows=tagi", "--split=validation")
    assert f"the training tasks in {own.data} " in line and str(own.runs / "finetune") in line
    own.run("evaluate", "--rows=tagi,teachers", "--split=validation", "--data", copy)
    shutil.copytree(own.data, tmp_path / "changed")
    flags = ("--split=validation", "--data", tmp_path / "changed")    # in another folder:
    own.run("evaluate", "--rows=tagi", *flags)                # the student may be tested there,
    line = own.refuses("evaluate", "--rows=teachers", *flags)     # its teachers may not
    assert str(tmp_path / "changed") in line and str(own.runs / "lora") in line


@pytest.mark.parametrize("how", ["name", "definition"])
def test_a_task_that_was_trained_on_is_no_test_task(own, tmp_path, how):
    """Found by its name, whatever its number, or by its definition."""
    folder = tmp_path / "elsewhere"
    shutil.copytree(own.data, folder)
    splits = folder / "splits" / "default"
    trained = (splits / "train_tasks.txt").read_text().split()[1]
    tested = (splits / "test_tasks.txt").read_text().split()[1]
    text = (folder / "tasks" / f"{trained}.json").read_text()
    if how == "name":
        name = "task999_" + trained.partition("_")[2]
        text = json.dumps(json.loads(text) | {"Definition": ["Something else ."]})
    else:
        name = "task999_something_else"
    (folder / "tasks" / f"{name}.json").write_text(text)
    (splits / "test_tasks.txt").write_text(f"{tested}\n{name}\n")
    for stage in ("finetune", "meta"):                          # the student, then the LLM under it
        line = own.refuses("evaluate", "--rows=tagi", "--data", folder)
        assert "1 of the 2 test tasks" in line and name in line and str(own.runs / stage) in line
        (own.runs / stage / "training_tasks.json").unlink()
    own.run("evaluate", "--rows=copy_input", "--data", folder)


def test_runs_of_earlier_code_which_recorded_no_digests_still_load(own, monkeypatch):
    """Their teachers saw each file's first rows, so none is known to be held out: no such row."""
    monkeypatch.setattr(evaluate, "measure_costs", lambda *args: {})
    for path in own.runs.rglob("config.yaml"):
        lines = path.read_text().splitlines(keepends=True)
        path.write_text("".join(line for line in lines if "_digest:" not in line))
    for path in own.runs.rglob("training_tasks.json"):
        path.unlink()
    for stage in STAGES:
        assert "nothing to do" in own.run(stage)
    own.run("finetune", "--name=other")
    out = own.run("evaluate", "--split=validation")
    assert "left out: LoRA teachers" in out and "--fresh" in out
    assert "| TAGI, right instruction |" in out and "| LoRA teachers" not in out
    assert "--fresh" in own.refuses("evaluate", "--split=validation", "--rows=teachers")


# ------------------------------------------------------------------------------------------------------ own instruction

@pytest.mark.parametrize("flags, said", [
    (["--instruction", "Find the city .", "--input", " "], "empty"), (["--instruction", "", "--input", "a"], "--instruction"),
    (["--instruction", " ", "--input", "a"], "--instruction"),
    (["--instruction", "Find the city .", "--input", "a", "--input", ""], "input 2"), (["--input", "a"], "--instruction")])
def test_an_empty_input_or_instruction_is_refused(project, flags, said):
    assert said in project.refuses("adapt", *flags)


def warned(seen):
    return [str(w.message) for w in seen if "cut to the limit" in str(w.message)]


def test_an_instruction_over_the_limit_is_cut_with_one_warning_and_answered(project, monkeypatch):
    monkeypatch.setattr(data, "_warned", set())
    limit = project.record("finetune")["max_instruction"]
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        out = project.run("adapt", "--max-output=4", "--instruction", "Find the city . " * 200, *ASK[2:], *ASK[2:])
    assert len(warned(seen)) == 1 and str(limit) in warned(seen)[0] and out.count("\n") == 2


def test_an_input_over_the_limit_is_cut_with_one_warning_and_answered(project, monkeypatch):
    monkeypatch.setattr(data, "_warned", set())
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        assert project.run("adapt", *ASK, "--max-output=4", "--input", "Anna went to Paris . " * 200, "--input", "Tom . " * 500).count("\n") == 3
    assert len(warned(seen)) == 1


@pytest.mark.parametrize("stage", ["meta", "finetune"])
def test_training_texts_over_the_limit_are_cut_with_one_warning(project, monkeypatch, stage):
    monkeypatch.setattr(data, "_warned", set())
    flag = "--max-instruction=9" if stage == "finetune" else "--max-input=9"
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        project.run(stage, "--name=other", "--demos=2", flag, "--max-output=16", "--steps=3")    # outputs fit
    assert len(warned(seen)) == 1 and project.record("other")["finished"]


# -------------------------------------------------------------------------------------------------------- checkpoints

def test_a_student_of_another_frozen_llm_is_refused(project):
    project.run("meta", "--fresh", "--seed=1")
    for stage, flags in (("evaluate", ["--split=validation"]), ("evaluate", ["--rows=tagi"]), ("adapt", ASK)):
        line = project.refuses(stage, *flags)
        assert str(project.runs / "finetune") in line and "meta" in line and "another" in line
    assert str(project.runs / "lora") in project.refuses("finetune", "--name=other")
    for flags in ([], ["--generator=none"]):
        line = project.refuses("finetune", "--name=other", "--lambda-kl=0", "--lambda-ins=0", *flags)
        assert str(project.runs / "pretrain") in line and "--no-pretrained" in line


def test_teachers_and_students_of_another_rank_are_refused(project):
    line = project.refuses("finetune", "--name=other", "--rank=3")
    assert str(project.runs / "lora") in line and "rank" in line and "2" in line and "3" in line
    line = project.refuses("finetune", "--name=other", "--rank=3", "--lambda-kl=0", "--lambda-ins=0")
    assert str(project.runs / "pretrain") in line and "rank" in line
    record = project.runs / "finetune" / "config.yaml"
    record.write_text(record.read_text().replace("rank: 2", "rank: 3"))
    line = project.refuses("evaluate", "--rows=tagi")
    assert str(project.runs / "finetune") in line and "rank" in line


def test_teachers_and_students_of_another_alpha_are_refused_before_anything_is_written(project):
    """It has no shape: the same weights would load, and be another update."""
    line = project.refuses("finetune", "--name=other", "--alpha=4")
    assert str(project.runs / "lora") in line and "alpha 2.0, not 4.0; use the same" in line
    flags = ("--name=other", "--alpha=4", "--lambda-kl=0", "--lambda-ins=0")
    line = project.refuses("finetune", *flags)
    assert str(project.runs / "pretrain") in line and "alpha 2.0, not 4.0" in line
    assert "--no-pretrained" in line
    assert not (project.runs / "other").exists()
    for record in project.runs.glob("lora/*/config.yaml"):
        record.write_text(record.read_text().replace("alpha: 2", "alpha: 4"))
    line = project.refuses("evaluate", "--rows=teachers")
    assert str(project.runs / "lora") in line and "alpha 4" in line
    assert not (project.runs / "evaluate").exists()


def test_teachers_do_not_start_from_a_tagi_of_another_kind(project):
    """Another rank, alpha, set of projections or LLM, no generator, several tasks a teacher, or no teacher at all."""
    start = ("--name=other", "--unit=task", "--init-from")
    folder = project.runs / "finetune"
    for flag, said in (("--rank=3", "rank 2, not 3"), ("--alpha=4", "alpha 2.0, not 4.0"),
                       ("--targets=q,v", "targets q,k,v,o, not q,v"), ("--unit=category", "--unit task"),
                       ("--unit=all", "--unit task"), (f"--llm={project.runs}/base", "another LLM")):
        line = project.refuses("lora", *start, folder, flag)
        assert said in line and ("--init-from" in line or "another LLM" in line)
    line = project.refuses("lora", *start, project.runs / "nowhere")
    assert str(project.runs / "nowhere") in line
    assert str(project.runs / "meta") in project.refuses("lora", *start, project.runs / "meta")
    assert "lora-all" in project.refuses("lora-all", *start, folder)
    project.run("finetune", "--name=fusion", "--generator=none", "--lambda-ins=0")
    assert "generates no LoRA" in project.refuses("lora", *start, project.runs / "fusion")
    assert not (project.runs / "other").exists()


def test_teachers_and_students_from_before_alpha_was_recorded_still_load(project):
    records = [*project.runs.glob("lora/*/config.yaml"), project.runs / "pretrain" / "config.yaml"]
    for record in records:
        record.write_text(re.sub("^alpha:.*\n", "", record.read_text(), flags=re.MULTILINE))
    project.run("finetune", "--name=other")


def test_teachers_of_other_projections_are_refused(project):
    line = project.refuses("finetune", "--name=other", "--targets=q,v", "--no-pretrained")
    assert str(project.runs / "lora") in line and "targets" in line


def test_a_student_whose_targets_were_edited_is_refused(project):
    """q and k are of the same shapes, so the weights alone would fit."""
    project.run("finetune", "--name=other", "--targets=q,v", "--no-pretrained", "--lambda-kl=0", "--lambda-ins=0")
    record = project.runs / "other" / "config.yaml"
    record.write_text(record.read_text().replace("targets: q,v", "targets: q,k"))
    line = project.refuses("evaluate", "--rows=tagi", "--checkpoint", project.runs / "other")
    assert str(project.runs / "other") in line and "q,v" in line and "q,k" in line


@pytest.mark.parametrize("file, damage", [("config.yaml", "empty"), ("config.yaml", "gone"), ("model.safetensors", "cut"),
                                          ("model.safetensors", "gone")])
@pytest.mark.parametrize("folder, stage, flags", [
    ("finetune", "evaluate", ["--rows=tagi"]), ("finetune", "adapt", ASK), ("pretrain", "finetune", ["--name=other"]),
    ("lora/*", "finetune", ["--name=other"]), ("meta", "pretrain", ["--name=other"]), ("base", "meta", ["--name=other"])],
    ids=["evaluate", "ask", "pretrain", "lora", "meta", "base"])
def test_a_damaged_checkpoint_is_named(project, folder, stage, flags, file, damage):
    path = next(project.runs.glob(f"{folder}/{file}"))
    path.write_bytes(path.read_bytes()[:path.stat().st_size // 2 if damage == "cut" else 0])
    if damage == "gone":
        path.unlink()
    line = project.refuses(stage, *flags)
    assert str(path.parent) in line
    assert "name an existing config with --config" not in line              # it is not the user's config that is wrong


@pytest.mark.parametrize("checkpoint", ["meta", "lora", "nowhere"])
def test_a_checkpoint_that_is_no_student_is_refused(project, checkpoint):
    for stage, flags in (("evaluate", ["--rows=tagi"]), ("adapt", ASK)):
        assert str(project.runs / checkpoint) in project.refuses(stage, "--checkpoint", project.runs / checkpoint, *flags)


@pytest.mark.parametrize("flag, stage", [("--llm", "lora"), ("--kl-teacher", "finetune")])
@pytest.mark.parametrize("what", ["nowhere", "data", "file"])
def test_an_llm_that_is_none_is_named(project, tmp_path, flag, stage, what):
    path = {"nowhere": tmp_path / "nowhere", "data": project.data, "file": project.config}[what]
    line = project.refuses(stage, "--name=other", flag, path)
    assert str(path) in line and "Repo id" not in line                      # a missing folder, not a misspelt name on the hub


def test_a_kl_teacher_with_another_vocabulary_is_refused(project, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(project.runs / "base", other)
    tokenizer = json.loads((other / "tokenizer.json").read_text())
    vocab = tokenizer["model"]["vocab"]
    one, other_one = list(vocab)[100:102]
    vocab[one], vocab[other_one] = vocab[other_one], vocab[one]
    (other / "tokenizer.json").write_text(json.dumps(tokenizer))
    line = project.refuses("finetune", "--name=other", "--kl-teacher", other)
    assert str(other) in line and "vocabulary" in line


@pytest.mark.parametrize("stage", ["meta", "lora", "finetune"])
def test_runs_that_cannot_be_written_are_refused_before_training(project, tmp_path, stage):
    file = tmp_path / "a file"
    file.write_text("")
    line = project.refuses(stage, "--name=../" + file.name + "/x")          # a file where a folder should be
    assert "a file" in line


def test_results_that_cannot_be_written_are_refused(project):
    assert str(project.config) in project.refuses("evaluate", "--rows=tagi", "--out", project.config)


@pytest.mark.parametrize("flag", ["--ablations", "--rescore=x.jsonl"])
def test_what_needs_no_model_is_refused_in_several_processes(project, monkeypatch, flag):
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, {"WORLD_SIZE": "2", "MASTER_ADDR": "localhost"}.get(name, "0"))
    assert "python evaluate.py" in project.refuses("evaluate", flag)


@pytest.mark.parametrize("value", ["nan", "inf"])
@pytest.mark.parametrize("stage, flag", [
    *[("meta", name) for name in ("--lr", "--warmup", "--weight-decay", "--clip", "--beta2")],
    *[("finetune", name) for name in ("--alpha", "--lambda-ce", "--lambda-kl", "--lambda-ins",
                                      "--temperature")]])
def test_a_number_that_is_none_is_refused(project, stage, flag, value):
    name = [] if stage == "evaluate" else ["--name=other"]
    line = project.refuses(stage, *name, f"{flag}={value}")
    assert flag in line and "finite" in line and value in line
    assert not (project.runs / "other").exists() and not (project.runs / "evaluate").exists()


@pytest.mark.parametrize("flag, value", [
    ("--beta2", "1"), ("--beta2", "-0.1"), ("--warmup", "1.1"), ("--warmup", "-0.1")])
def test_a_share_that_is_none_is_refused(project, flag, value):
    line = project.refuses("meta", "--name=other", f"{flag}={value}")
    assert flag in line and ("from 0 to 1" in line or "below 1" in line)
    assert not (project.runs / "other").exists()


# ---------------------------------------------------------------------------------------------------- nothing is lost

@pytest.mark.parametrize("stage", ["base", "lora", "finetune"])
def test_fresh_with_a_mistake_does_not_remove_the_finished_run(project, tmp_path, stage):
    project.refuses(stage, "--fresh", "--data", tmp_path / "nowhere", "--text", tmp_path / "nowhere.txt")


@pytest.mark.parametrize("stage", ["lora", "finetune"])
def test_a_mistake_leaves_no_run_behind_that_a_right_command_trips_over(project, tmp_path, stage):
    project.refuses(stage, "--name=other", "--data", tmp_path / "nowhere", "--alpha=7")
    project.run(stage, "--name=other")


def test_a_failed_evaluation_keeps_the_predictions_of_the_last_one(project, monkeypatch):
    monkeypatch.setattr(evaluate, "measure_costs", lambda *args: {})
    project.run("evaluate", "--split=validation")
    shutil.rmtree(project.runs / "lora")
    assert "--stage lora" in project.refuses("evaluate", "--split=validation")


@pytest.mark.parametrize("stage, flags, said", [
    ("evaluate", ["--rank=4"], ["--rank", "checkpoint", "leave it out"]),
    ("evaluate", ["--no-vary-demos"], ["--no-vary-demos", "checkpoint"]),
    ("evaluate", ["--targets", "q"], ["--targets", "checkpoint"]),
    ("evaluate", ["--references=x.jsonl"], ["--references", "--rescore"]),
    ("evaluate", ["--checkpoint=nowhere"], ["nowhere", "no such folder", "--checkpoint"]),
    ("evaluate", ["--split=tset"], ["tset_tasks.txt", "--split"])])
def test_an_option_without_effect_or_with_a_wrong_name_is_told_so(project, stage, flags, said):
    line = project.refuses(stage, *flags)
    assert all(word in line for word in said), line


def test_one_name_for_several_stages_is_refused(project):
    # With --fresh the second would remove what the first one trained.
    assert "--stage" in project.refuses(None, "--name=x", "--fresh")


def test_a_key_of_one_stage_at_the_top_of_a_config_is_told_where_it_belongs(project, tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text("lr: 0.1\n")
    line = project.refuses("meta", "--config", path)
    assert "lr" in line and "section" in line


def test_a_command_in_an_error_line_names_the_runs_that_it_is_about(project, tmp_path):
    assert f"--runs {tmp_path}/empty" in project.refuses("lora", "--fresh", "--runs", tmp_path / "empty")


# ---------------------------------------------------------------------------------- one line, whatever the input holds

class Panic(BaseException):
    """What tokenizers raise where their Rust code panics: no Exception."""


@pytest.mark.parametrize("error", [TypeError("a\nb"), AttributeError("x"), RecursionError("deep"), Exception("bare"), OSError(),
                                   KeyError("vocab"), MemoryError(), AssertionError(), Panic("no"), ValueError("x" * 5000)])
def test_whatever_is_raised_while_a_named_file_is_read_becomes_one_line(error):
    with pytest.raises(common.UserError) as told:
        with common.named_file("some/file", "write it again"):
            raise error
    line = str(told.value)
    assert line.startswith("some/file cannot be read: ") and line.endswith("; write it again")
    assert len(line) <= 300 and line.isprintable()


@pytest.mark.parametrize("error", [KeyboardInterrupt(), SystemExit(3), common.UserError("my own")])
def test_ctrl_c_an_exit_and_a_mistake_told_already_pass_through_a_named_file(error):
    with pytest.raises(type(error)) as passed:
        with common.named_file("some/file", "write it again"):
            raise error
    assert passed.value is error


@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
@pytest.mark.parametrize("word", ["x" * 9999, "two\nlines\r\x85and\u2028more", "\x1b[31mred\x00", "half \ud83d", "naïve 🙂" * 99])
def test_an_error_is_one_printable_line_of_300_characters_on_every_terminal(monkeypatch, word, encoding):
    @common.command
    def main():
        print(word)
        raise common.UserError(f"{word} is wrong; do something else")
    streams = {name: io.TextIOWrapper(io.BytesIO(), encoding=encoding) for name in ("stdout", "stderr")}
    for name, stream in streams.items():
        monkeypatch.setattr(f"sys.{name}", stream)
    with pytest.raises(SystemExit) as end:
        main()
    streams["stderr"].flush()
    line = streams["stderr"].buffer.getvalue().decode(encoding)
    assert end.value.code == 2 and line.startswith("error: ") and line.endswith("; do something else\n")
    assert len(line) <= 301 and line[:-1].isprintable()


# ------------------------------------------------------------------------------------------------- YAML files

@pytest.mark.parametrize("text, said", [
    ("steps: 3\nseed: 1\nsteps: 4", "line 3: the key steps is there twice"),
    ("lora: {steps: 2}\nrank: 3\nlora:\n  unit: task", "line 3: the key lora is there twice"),
    ("meta:\n  lr: 1\n  tasks: 2\n  lr: 2", "line 4: the key lr is there twice"),
    ("meta: {lr: 1, 'lr': 2}", "line 1: the key lr is there twice"),
    ("lora: {steps: 1}\nlora: {steps: 2}\n<<: {seed: 1}", "line 2: the key lora is there twice"),
    ("[" * 100_000, "over 50 levels"), ("a: " + "{b: " * 60 + "1" + "}" * 60, "over 50 levels"),
    ("\n".join(f"{'  ' * n}a:" for n in range(60)), "over 50 levels"), ("- " * 9999, "over 50 levels"),
    ("a: &a [*a]", "line 1: stands for over"), ("&a {b: *a}", "line 1: stands for over"),
    ("a0: &a0 [x]\n" + "\n".join(f"a{n}: &a{n} [{'*a%d,' % (n - 1) * 9}]" for n in range(1, 9)), "stands for over"),
    ("a0: &a0 {x: 1}\n" + "\n".join(f"a{n}: &a{n} {{<<: [{'*a%d,' % (n - 1) * 9}]}}" for n in range(1, 9)), "stands for over"),
    ("max_input: 5\nmax-input: 6", "'max-input' is 'max_input' once more"), ("finetune: {1: 2}", "unknown key '1'"),
    ('runs: "\\ud83d"', "invalid Unicode"),
    ("{[a]: 3}", "unhashable"), ("a: 2001-99-01", "month"), ("a: " + "9" * 5000, "4300 digits"),
    ("!!python/object:os.system {}", "constructor"),
    ("a: 1\n---\nb: 2", "single document"), ("a: \0", "#x0000"), ("[]", "key: value"), ("0", "key: value")])
def test_yaml_with_a_key_twice_too_deep_or_without_end_is_refused_with_its_line(tmp_path, text, said):
    path = tmp_path / "a.yaml"
    path.write_text(text)
    with pytest.raises(common.UserError, match=re.escape(said)) as told:
        parsed = train_hyper.get_options(["--stage=finetune", f"--config={path}"])
        raise AssertionError(parsed)
    assert str(path) in str(told.value)


def test_merge_keys_of_yaml_may_be_overridden_as_ever(tmp_path):
    path = tmp_path / "a.yaml"
    path.write_text("\ufeffmeta: &base {lr: 1, steps: 3}\nlora: {<<: *base, lr: 2}\nl: {m: &a {<<: *base, lr: 4}}\nn: {<<: *a}",
                    encoding="utf-8")
    found = common.read_yaml(path, "mend it")
    assert found["lora"] == {"lr": 2, "steps": 3} and found["n"] == found["l"]["m"] == {"lr": 4, "steps": 3}


# --------------------------------------------------------------------------------- numbers have two bounds

NUMBERS = [10 ** 30, -10 ** 30, "1e309", "inf", "-inf", "nan", "9" * 5000, "0x10", "", "1 2", "½"]


@pytest.mark.parametrize("module, stage", [(train_hyper, "finetune"), (train_teacher, "lora"), (evaluate, None), (adapt, None)])
def test_every_number_of_every_script_is_finite_and_bounded(module, stage):
    first = ["--instruction=a"] if module is adapt else ["--stage", stage] if stage else []
    n_numbers = 0
    for action in module.parser()._actions:
        if getattr(action.type, "__name__", "") not in ("number", "below_1", "numbers", "number_or_sigmoid"):
            continue
        n_numbers += 1
        for value in NUMBERS:
            with pytest.raises(common.UserError) as told:
                module.parser().parse_args([*first, f"{action.option_strings[0]}={value}"])
            assert action.option_strings[0] in str(told.value) and len(str(told.value)) <= 300
    assert n_numbers > 3


@pytest.mark.parametrize("flag", ["--alpha=0", "--alpha=-1", "--warmup=7", "--warmup=-0.1", "--beta2=1", "--beta2=-0.5", "--lr=-1",
                                  "--lr=1e9", "--clip=-1", "--weight-decay=-1", "--lambda-kl=-5", "--lambda-ins=-1",
                                  "--temperature=0", "--temperature=inf", "--steps=0", "--seed=-1", "--seed=4294967296",
                                  "--rank=99999", "--width=99999", "--text-length=2", "--bucket-steps=-1", "--tasks=1000000"])
def test_numbers_out_of_their_range_are_refused(flag):
    with pytest.raises(common.UserError, match=f"{flag.partition('=')[0]}.*must be (a finite number from|below 1)"):
        train_hyper.parser().parse_args(["--stage=finetune", flag])


@pytest.mark.parametrize("stage", ["base", "pretrain"])
def test_a_text_in_signs_that_the_tokenizer_does_not_know_is_refused_before_training(project, tmp_path, stage):
    path = tmp_path / "text.txt"
    path.write_text("猫 は 猫 で ある\nкот это кот да\n" * 50)
    line = project.refuses(stage, "--name=other", "--text", path)
    assert f"{path}: the tokenizer knows 0% of the characters there" in line
    assert not (project.runs / "other" / "model.safetensors").exists()


@pytest.mark.parametrize("stage", ["meta", "lora", "lora-all", "finetune", "evaluate"])
def test_tasks_in_signs_that_the_tokenizer_does_not_know_are_refused_before_training(project, tmp_path, stage):
    other = project.copy(tmp_path / "damaged", data=tmp_path / "data")
    for path in (other.data / "tasks").glob("*.json"):
        content = json.loads(path.read_text())
        content["Definition"] = ["猫は猫である"]
        content["Instances"] = [{"id": f"x{n}", "input": f"Ж{'ЖЯ' * n}", "output": ["кот"]} for n in range(9)]
        path.write_text(json.dumps(content))
    flags = ["--rows=tagi"] if stage == "evaluate" else ["--name=other"]
    if stage in ("lora", "lora-all", "finetune"):
        flags += ["--llm", other.runs / "meta"]                 # of which no digest of data is compared
    line = other.refuses(stage, *flags, "--data", other.data)
    assert "the tokenizer knows 0% of the characters there" in line and str(other.data) in line
