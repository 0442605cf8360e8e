"""Tasks of one's own with a checkpoint of one's own: the README's commands, and no tiny T5 in its place."""
import contextlib
import io
import json
import re
import shlex
import subprocess
from pathlib import Path

import pytest
import sentencepiece
import yaml

pytest.register_assert_rewrite("stages")
import adapt
import data
import evaluate
import train_hyper
import train_teacher
from bench import check
from stages import call
from test_hub_forms import write_checkpoint

ROOT = Path(__file__).resolve().parent.parent
OWN, CONFIG = ROOT / "assets" / "own-tasks", "configs/flan-t5-small.yaml"
SCRIPTS = {"bench.check": check, "train_teacher.py": train_teacher, "train_hyper.py": train_hyper,
           "evaluate.py": evaluate, "adapt.py": adapt}


@pytest.fixture(scope="module")
def flan(tmp_path_factory):
    """A checkpoint as the hub has Flan-T5's, small and of random weights, that can read the example's texts."""
    root = tmp_path_factory.mktemp("flan")
    texts = [text for split in ("train", "test") for task in data.load_sni(str(OWN), split)
             for text in (task.definitions[0], *(x.input for x in task.instances))]
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter(texts * 3), model_writer=model, vocab_size=300, pad_id=0,
                                             eos_id=1, unk_id=2, bos_id=-1, minloglevel=2, hard_vocab_limit=False)
    (root / "spiece.model").write_bytes(model.getvalue())
    write_checkpoint(root / "checkpoint", root, "flan-t5")
    return root / "checkpoint"


def commands() -> list[list[str]]:
    """The words after `python` of each command in the README's section on own tasks."""
    text = (ROOT / "README.md").read_text()
    block = re.search(r"## Your own tasks\n.*?```bash\n(.*?)```", text, re.DOTALL)[1]
    return [shlex.split(line, comments=True)[1:] for line in block.splitlines()]


def test_the_readmes_commands_for_own_tasks_run_from_check_to_an_answer(flan, tmp_path):
    found, printed = commands(), {}
    assert [words[1] if words[0] == "-m" else words[0] for words in found] == list(SCRIPTS)
    for words in found:
        words = words[words[0] == "-m":]
        words = [word.replace("runs/own-tasks", str(tmp_path / "runs")) for word in words]
        if CONFIG in words:
            words += ["--model", str(flan), "--runs", str(tmp_path / "runs")]
        if words[0].startswith("train"):
            words += ["--steps", "2"]
        printed[words[0]] = call(SCRIPTS[words[0]], *words[1:])
    assert "nothing keeps these stages from starting" in printed["bench.check"]
    assert "TAGI, right instruction" in printed["evaluate.py"] and "LoRA teachers, held-out" in printed["evaluate.py"]
    assert printed["adapt.py"].count("\n") == 1
    folders = {path.name for path in (tmp_path / "runs").iterdir() if path.is_dir()}
    assert {"lora", "lora-all", "finetune"} <= folders and not {"base", "meta"} & folders
    record = yaml.safe_load((tmp_path / "runs" / "finetune" / "config.yaml").read_text())
    assert record["model"] == str(flan) and not record["pretrained"]
    # With plain text it is pretrained first, and finetuned from that.
    (tmp_path / "text.txt").write_text("one two three four five six\n" * 4)
    its = ["--config", CONFIG, "--model", str(flan), "--runs", str(tmp_path / "runs"), "--steps", "1"]
    call(train_hyper, "--stage", "pretrain", "--text", str(tmp_path / "text.txt"), *its)
    call(train_hyper, "--stage", "finetune", "--name", "again", *its)


def test_the_example_has_three_tasks_to_train_on_and_others_to_evaluate():
    tasks = {split: data.load_sni(str(OWN), split) for split in ("train", "validation", "test")}
    assert {split: len(its) for split, its in tasks.items()} == {"train": 3, "validation": 1, "test": 2}
    for task in [task for its in tasks.values() for task in its]:
        assert 12 <= len(task.instances) <= 24 and len(task.demonstrations) == 2
        inputs = [x.input for x in task.instances] + [text for text, _ in task.demonstrations]
        assert len(set(inputs)) == len(inputs)                      # no demonstration is an instance
    held_out = yaml.safe_load((ROOT / CONFIG).read_text())["max_instances"]
    assert all(len(task.instances) > held_out for task in tasks["train"])


def refused(script, *words) -> str:
    err = io.StringIO()
    with contextlib.redirect_stderr(err), pytest.raises(SystemExit) as end:
        call(script, *map(str, words))
    assert end.value.code == 2 and err.getvalue().count("\n") == 1, err.getvalue()
    return err.getvalue()


@pytest.mark.parametrize("script, words", [(train_teacher, ()), (train_teacher, ("--stage", "meta")),
                                           (train_hyper, ("--stage", "pretrain")), (train_hyper, ("--stage", "finetune"))])
def test_the_default_config_does_not_train_the_tiny_t5_where_another_model_is_asked_for(script, words, flan, tmp_path):
    line = refused(script, "--model", flan, "--runs", tmp_path / "runs", *words)
    assert "would not be used" in line and "assets/t5-tiny" in line and "--llm base" in line and CONFIG in line
    assert not (tmp_path / "runs").exists()


def test_stage_base_is_refused_for_a_checkpoint(flan, tmp_path):
    line = refused(train_teacher, "--stage", "base", "--model", flan, "--runs", tmp_path / "runs")
    assert "makes the tiny T5" in line and not (tmp_path / "runs").exists()


def test_another_model_never_has_the_built_in_suite_written(flan, tmp_path, monkeypatch):
    """A wrong or forgotten --data is an error then, not two thousand files."""
    def write(*args, **kwargs):
        raise AssertionError("the suite is written")

    monkeypatch.setattr(train_teacher.sample, "write_suite", write)
    monkeypatch.setattr(train_teacher.sample, "SUITE", str(tmp_path / "suite"))
    for script, stage in ((train_teacher, "lora"), (train_hyper, "finetune")):
        line = refused(script, "--stage", stage, "--model", flan, "--llm", "base", "--runs", tmp_path / "runs", "--data",
                       tmp_path / "suite")
        assert str(tmp_path / "suite") in line
    with pytest.raises(AssertionError):                             # as it is where the tiny T5 is meant
        call(train_teacher, "--stage", "lora", "--runs", str(tmp_path / "runs"), "--data", str(tmp_path / "suite"))


def test_without_plain_text_pretrain_says_how_to_go_on_without(flan, tmp_path):
    words = ["--config", CONFIG, "--model", flan, "--runs", tmp_path / "runs"]
    line = refused(train_hyper, "--stage", "pretrain", *words)
    assert "corpus.txt" in line and "--text" in line and "--stage finetune --no-pretrained" in line


def test_a_command_that_an_error_advises_names_the_model(flan, tmp_path):
    words = ["--config", CONFIG, "--model", flan, "--runs", tmp_path / "runs"]
    line = refused(train_hyper, "--stage", "finetune", "--no-pretrained", *words)
    assert f"--model {flan}" in line or "--model" in line and "..." in line     # long paths lose their middle


def test_git_ignores_the_folders_that_the_readme_has_one_make():
    made = ["data/sample/tasks/x.json", "runs/own-tasks/lora/config.yaml", "natural-instructions/tasks/x.json", "c4.jsonl",
            "p3/rte/validation.jsonl", "p3/templates/rte/templates.yaml", "promptsource/setup.py"]
    ours = ["assets/own-tasks/tasks/task001_message_topic.json", "bench/p3.py", "configs/p3-base.yaml", "docs/p3.md", "data.py"]
    if not (ROOT / ".git").exists():
        pytest.skip("no git repository here")
    done = subprocess.run(["git", "check-ignore", "--no-index", *made, *ours], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.split() == made


def test_all_of_the_example_is_in_the_form_that_it_shows():
    for path in (OWN / "tasks").iterdir():
        record = json.loads(path.read_text())
        assert list(record) == ["Definition", "Categories", "Positive Examples", "Instances"]
