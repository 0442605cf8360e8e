"""One folder, written in two ways or named by a word, is one folder: when a run is gone on with, and in an evaluation."""
import json
import os
import shutil

import pytest
import yaml

pytest.register_assert_rewrite("stages")
pytest_plugins = ("stages",)
from stages import ROOT

import config
import evaluate


def change(folder, **values) -> None:
    """Write these values into a checkpoint's config.yaml."""
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(yaml.safe_load(path.read_text()) | values))


def test_a_word_for_an_llm_is_the_folder_that_it_stands_for(project):
    """The runs were moved since, too: the records name the folder that they were copied from."""
    meta, relative = project.runs / "meta", os.path.relpath(project.runs / "meta", ROOT)
    for flags in (["--llm", meta], ["--llm", relative], ["--meta-model", meta],
                  ["--llm=meta", "--meta-model", relative]):
        assert "nothing to do" in project.run("finetune", *flags), flags
    for flags in (["--llm=base"], ["--llm", project.runs / "base"], ["--llm", project.runs / "lora"]):
        assert str(flags[-1]).removeprefix("--llm=") in project.refuses("finetune", *flags)


@pytest.mark.parametrize("option, word, stage", [("--llm", "base", "base"), ("--kl-teacher", "meta", "meta")])
def test_a_folder_and_then_the_word_for_it(project, option, word, stage):
    flags = ["--name=own", "--lambda-ins=0", "--kl-teacher=meta", "--no-pretrained"]
    project.run("finetune", *flags, option, project.runs / stage)
    assert "nothing to do" in project.run("finetune", *flags, option, word)


def test_a_word_is_not_a_folder_of_that_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for key, word in (("llm", "meta"), ("llm", "base"), ("kl_teacher", "lora"), ("model", "tiny")):
        assert not config.same(key, word, f"./{word}") and config.same(key, f"{word}/", f"./{word}")


def test_a_checkpoint_is_evaluated_from_another_folder_on_the_data_it_was_trained_on(project, tmp_path, monkeypatch):
    """A relative path starts where the run was started: elsewhere it is found, and known as the same."""
    os.symlink(project.data, tmp_path / "link")
    (tmp_path / "other").mkdir()
    monkeypatch.chdir(tmp_path / "other")
    change(project.runs / "finetune", data="link", cwd=str(tmp_path))
    argv = ["--checkpoint", str(project.runs / "finetune")]
    assert os.path.samefile(config.parse(evaluate.parser(), "evaluate", argv).data, project.data)
    change(project.runs / "finetune", data_digest="another")
    for data in ([], ["--data", project.data], ["--data", "../link/."]):
        with pytest.raises(SystemExit) as end:
            evaluate.main([*argv, *map(str, data), "--rows=tagi", "--no-cost"])
        assert end.value.code == 2


def test_the_meta_trained_row_of_a_moved_checkpoint_is_its_llm_however_that_was_named(project, tmp_path):
    change(project.runs / "finetune", runs=str(project.runs), llm=f"{project.runs}/./meta")
    moved = shutil.copytree(project.runs / "finetune", tmp_path / "a" / "b" / "moved")
    flags = ["--checkpoint", moved, "--data", project.data, "--out", tmp_path / "out", "--no-cost",
             "--eval-instances", "1", "--rows", "tagi,meta", "--max-output", "2"]
    evaluate.main([*map(str, flags), "--llm", str(project.runs / "meta")])
    results = json.loads((tmp_path / "out" / "results.json").read_text())["results"]
    assert {row["key"] for row in results} == {"tagi", "meta"}
