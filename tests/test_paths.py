"""Where files are: from any folder, by a home, by a link, after a move; what is replaced and what never is; --help."""
import contextlib
import io
import json
import os
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

pytest.register_assert_rewrite("stages")
pytest_plugins = ("stages",)
from stages import ROOT, call, environment

import adapt
import config
import evaluate
import t5
import train_hyper
import train_teacher
from bench import check, listed, plot, sample
from common import UserError
from hypernet import TAGI
from lora import Adapter

SHIPPED = ROOT / "assets" / "tagi-lora"
SCRIPTS = {"adapt": adapt, "evaluate": evaluate, "train_hyper": train_hyper, "train_teacher": train_teacher,
           "bench.sample": sample, "bench.check": check, "bench.plot": plot}
ASK = ["--instruction", "Find the city.", "--input", "A cat came to Rome by boat."]


def refused(function, *args) -> str:
    """The one line with which a function refuses its arguments."""
    with pytest.raises(UserError) as error:
        function(*args)
    line = str(error.value)
    assert "\n" not in line and len(line) <= 300
    return line


def ends(module, *argv) -> str:
    """The line on standard error with which a script ends, exit code 2."""
    err = io.StringIO()
    with contextlib.redirect_stderr(err), pytest.raises(SystemExit) as end:
        module.main(list(map(str, argv)))
    assert end.value.code == 2 and err.getvalue().count("\n") == 1, err.getvalue()
    return err.getvalue()


def process(*words, cwd, stdout=subprocess.PIPE, **env):
    return subprocess.run([sys.executable, *map(str, words)], cwd=cwd, env=environment() | env, stdout=stdout,
                          stderr=subprocess.PIPE, text=True, timeout=300)


# --------------------------------------------------------------------------------------------- another current folder

def test_every_script_runs_from_another_folder_with_the_default_config_beside_it(project, tmp_path, monkeypatch):
    """Models of assets/ are found beside the scripts, data and runs are those of the current folder."""
    (tmp_path / "data").mkdir()
    shutil.copytree(project.data, tmp_path / "data" / "sample")
    monkeypatch.chdir(tmp_path)
    small = ["--steps", "1", "--tasks", "2"]
    train_teacher.main(["--stage", "lora", "--unit", "all", *small])
    train_hyper.main(["--stage", "pretrain", *small])
    train_hyper.main(["--stage", "finetune", "--unit", "all", *small])
    evaluate.main(["--rows", "tagi", "--eval-instances", "1"])
    adapt.main(["--checkpoint", "runs/sample/finetune", *ASK, "--max-output", "2"])
    assert {path.name for path in (tmp_path / "runs" / "sample").iterdir()} >= {"lora", "pretrain", "finetune", "evaluate"}
    record = yaml.safe_load((tmp_path / "runs" / "sample" / "finetune" / "config.yaml").read_text())
    llm = os.path.realpath(tmp_path / "runs" / "sample" / "finetune" / record["llm_path"])
    assert llm == str(ROOT / "assets" / "t5-tiny")


def test_a_script_is_started_by_its_absolute_path(tmp_path):
    done = process(ROOT / "adapt.py", *ASK, cwd=tmp_path)
    assert (done.returncode, done.stdout) == (0, "Rome\n"), done.stderr
    assert not list(tmp_path.iterdir())


def test_configs_and_assets_of_the_current_folder_go_before_those_beside_the_scripts(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert config.beside("configs/sni-base.yaml") == str(ROOT / "configs" / "sni-base.yaml")
    assert config.beside("./assets/t5-tiny") == str(ROOT / "assets" / "t5-tiny")
    for name in ("configs/absent.yaml", "runs/sample", "data/sample", "tiny", "google/t5-v1_1-base", str(tmp_path)):
        assert config.beside(name) == name
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "sni-base.yaml").write_text("")
    assert config.beside("configs/sni-base.yaml") == "configs/sni-base.yaml"


# -------------------------------------------------------------------------------------------------------- ~ and names

def test_a_tilde_is_the_home_folder_in_options_and_in_config_files(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    path = tmp_path / "own.yaml"
    path.write_text("data: ~/data\nmeta_model: ~/t5\nfinetune: {text: ~/text.txt, kl_teacher: ~/teacher}\n")
    options = config.parse(train_hyper.parser(), "finetune", ["--config=~/own.yaml", "--runs=~/runs", "--llm", "~/llm"])
    found = [options.config, options.data, options.meta_model, options.text, options.kl_teacher, options.runs, options.llm]
    assert found == [str(tmp_path / name) for name in ("own.yaml", "data", "t5", "text.txt", "teacher", "runs", "llm")]
    shutil.copytree(SHIPPED, tmp_path / "tagi")
    assert TAGI.load("~/tagi", "cpu", llm=str(ROOT / "assets" / "t5-tiny")).options.rank == 8
    TAGI.load(str(SHIPPED), "cpu").adapt(["Find the city."]).save("~/kept")
    assert os.path.samefile(TAGI.load(str(tmp_path / "kept"), "cpu").llm_path, ROOT / "assets" / "t5-tiny")
    assert len(Adapter.load("~/kept")) == 1


def test_every_option_that_is_a_path_takes_a_tilde_and_refuses_no_name_at_all():
    """Those of every script: by the words of their help, so that a new one is not forgotten."""
    for module in (adapt, evaluate, train_hyper, train_teacher, plot):
        for action in module.parser()._actions:
            said = action.help or ""
            if said.startswith(("folder", "new folder", "file", "YAML", "plain text", "checkpoint", "T5-family", "the picture")) \
                    and action.dest != "name":
                assert action.type in (config.path, config.beside), (module.__name__, action.dest)
                assert action.dest in config.PATHS or module in (adapt, plot), action.dest


@pytest.mark.parametrize("module, argv, said", [
    (evaluate, ["--out", ""], "--out"), (evaluate, ["--out= "], "--out"), (train_hyper, ["--stage=pretrain", "--runs="], "--runs"),
    (train_teacher, ["--data", ""], "--data"), (adapt, [*ASK, "--save", ""], "--save"), (sample, ["--out", ""], "--out"), (plot, ["x", "--out", ""], "--out"),
    (sample, ["--out", "~no-such-user/x"], "home"), (train_teacher, ["--config", "~no-such-user/x"], "home"),
    (adapt, ["--instruction", "say \udcff"], "Unicode"), (train_hyper, ["--runs", "a\ud800"], "Unicode")])
def test_an_empty_path_a_home_of_nobody_and_half_a_character_are_one_line(module, argv, said):
    assert said in ends(module, *argv)


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "/tmp", "../x", "-x", "~", "~/x", "a b", "a\n", "a/", "\\x", "*"])
@pytest.mark.parametrize("module, stage", [(train_hyper, "finetune"), (train_teacher, "lora")], ids=lambda x: str(x)[:5])
def test_a_runs_name_is_one_plain_name(module, stage, name):
    assert "--name" in ends(module, f"--stage={stage}", f"--name={name}", "--fresh")


@pytest.mark.parametrize("name", ["meta", "lora", "lora-all", "pretrain", "evaluate", "probe", "base"])
def test_a_runs_name_is_not_another_stages(project, name):
    assert "another stage" in project.refuses("finetune", "--name", name, "--fresh")


def test_plain_names_are_taken():
    for name in ("finetune", "lora-only", "run_2", "x.1", "seed=3", "é"):
        assert config.plain_name(name) == name


def test_two_ways_to_write_a_path_are_the_same_and_two_values_are_not(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    os.symlink("data", tmp_path / "link")
    for other in ("./data", "data/", str(tmp_path / "data"), "link", "../" + tmp_path.name + "/data"):
        assert config.same("data", "data", other)
    assert config.same("meta_model", "assets/t5-tiny", str(ROOT / "assets" / "t5-tiny"))
    assert not config.same("data", "data", "other") and not config.same("targets", "q", "./q")
    assert config.same("rank", 4, 4) and not config.same("rank", 4, 8) and not config.same("text", None, "data")


# ------------------------------------------------------------------------------------------------------ moved, linked

@pytest.fixture
def elsewhere(tmp_path):
    """The shipped TAGI and its LLM, copied to a folder of their own."""
    for name in ("tagi-lora", "t5-tiny"):
        shutil.copytree(ROOT / "assets" / name, tmp_path / "far" / name)
    return tmp_path / "far"


def test_a_linked_checkpoint_finds_the_llm_beside_the_folder_that_it_stands_for(elsewhere, tmp_path, monkeypatch):
    (tmp_path / "runs" / "a").mkdir(parents=True)
    for link in ("runs/link", "runs/a/link"):
        os.symlink(elsewhere / "tagi-lora", tmp_path / link)
        for name in (str(tmp_path / link), f"{tmp_path}/{link}/", f"{tmp_path}/runs/../{link}"):
            assert os.path.realpath(TAGI.load(name, "cpu").llm_path) == str(elsewhere / "t5-tiny")
    monkeypatch.chdir(tmp_path / "runs")
    assert os.path.realpath(TAGI.load("link", "cpu").llm_path) == str(elsewhere / "t5-tiny")
    options = config.parse(evaluate.parser(), "evaluate", ["--checkpoint", "link"])
    assert options.runs == str(elsewhere)


def test_a_checkpoint_on_another_disk_finds_the_llm_beside_the_link_too(elsewhere, tmp_path):
    (tmp_path / "runs").mkdir()
    os.symlink(elsewhere / "tagi-lora", tmp_path / "runs" / "finetune")
    shutil.move(elsewhere / "t5-tiny", tmp_path / "runs" / "t5-tiny")
    assert TAGI.load(str(tmp_path / "runs" / "finetune"), "cpu").llm_path == str(tmp_path / "runs" / "t5-tiny")


def test_a_linked_checkpoint_without_its_llm_is_not_looked_for_on_the_hub(elsewhere, tmp_path, monkeypatch):
    shutil.rmtree(elsewhere / "t5-tiny")
    os.symlink(elsewhere / "tagi-lora", tmp_path / "link")
    monkeypatch.setattr(t5, "load_llm", lambda *args: pytest.fail("it was looked for"))
    line = refused(TAGI.load, str(tmp_path / "link"))
    assert str(elsewhere / "t5-tiny") in line and "--llm" in line


def test_a_path_that_is_written_through_a_link_is_read_through_it(elsewhere, tmp_path):
    (tmp_path / "disk" / "deep").mkdir(parents=True)
    os.symlink(tmp_path / "disk" / "deep", tmp_path / "kept")
    tagi = TAGI.load(str(elsewhere / "tagi-lora"), "cpu")
    tagi.adapt(["Find the city."]).save(str(tmp_path / "kept" / "one"))
    for folder in (tmp_path / "kept" / "one", tmp_path / "disk" / "deep" / "one"):
        assert os.path.samefile(TAGI.load(str(folder), "cpu").llm_path, elsewhere / "t5-tiny")


def test_a_copied_checkpoint_says_which_llm_it_wants_and_takes_it(elsewhere, tmp_path):
    (tmp_path / "deep" / "er").mkdir(parents=True)
    moved = str(shutil.move(elsewhere / "tagi-lora", tmp_path / "deep" / "er" / "tagi"))
    wanted = yaml.safe_load(open(f"{moved}/config.yaml"))["llm_fingerprint"]
    for line in (refused(TAGI.load, moved), ends(adapt, "--checkpoint", moved, *ASK)):
        assert "--llm" in line and wanted in line and str(tmp_path / "deep" / "er" / "t5-tiny") in line
    llm = str(elsewhere / "t5-tiny")
    assert TAGI.load(moved, "cpu", llm=llm).llm_path == llm
    assert call(adapt, "--checkpoint", moved, "--llm", llm, *ASK) == "Rome\n"
    other = t5.tiny_t5(1965, seed=1)                                        # of the same shapes
    t5.save_all_but_weights(str(tmp_path / "other"), other, t5.load_tokenizer(llm))
    other.save_pretrained(tmp_path / "other")
    line = refused(lambda: TAGI.load(moved, "cpu", llm=str(tmp_path / "other")))
    assert "another LLM" in line or "shapes" in line or "does not fit" in line
    assert "nowhere" in ends(adapt, "--checkpoint", moved, "--llm", tmp_path / "nowhere", *ASK)


def test_a_copied_checkpoint_is_evaluated_with_its_llm_named(project, tmp_path, monkeypatch):
    """Its own LLM is the meta-trained row's, too, wherever the stage that made it is."""
    moved = shutil.copytree(project.runs / "finetune", tmp_path / "a" / "b" / "moved")
    flags = ["--checkpoint", moved, "--data", project.data, "--out", tmp_path / "out", "--eval-instances", "1",
             "--rows", "tagi,meta", "--max-output", "2"]
    monkeypatch.setattr(evaluate, "measure_costs", lambda *args: {})
    assert "--llm" in ends(evaluate, *flags)
    evaluate.main([*map(str, flags), "--llm", str(project.runs / "meta")])
    keys = {row["key"] for row in json.loads((tmp_path / "out" / "results.json").read_text())["results"]}
    assert keys == {"tagi", "meta"}


# ----------------------------------------------------------------------------------------- what is replaced, and what not

@pytest.fixture
def quick_suite(monkeypatch):
    """The suite of one task, so that it is written in no time."""
    def one_task(rng, root):
        sample.write(root / "tasks" / "task0001_sentence_city_plain.json", f'"{rng.random()}"')
        sample.write(root / "splits" / "default" / "train_tasks.txt", "task0001_sentence_city_plain\n")
        return {"train": ["task0001_sentence_city_plain"]}
    monkeypatch.setattr(sample, "write_tasks", one_task)
    monkeypatch.setattr(sample, "DOCUMENTS", 3)


def tree(folder) -> dict:
    """{path: its bytes, or where the link leads} of all that is below the folder, but for Python's own files."""
    found = {}
    for path in sorted(Path(folder).rglob("*")):
        found[str(path.relative_to(folder))] = os.readlink(path) if path.is_symlink() else path.is_file() and path.read_bytes()
    return found


@pytest.mark.parametrize("out", [".", "./", "..", "/", "~", "own/..", "", "here", "notes.txt", "own", "changed", "more", "linked", "dangling-in"])
def test_the_suite_never_replaces_what_it_did_not_write(quick_suite, tmp_path, monkeypatch, out):
    here = tmp_path / "project" / "here"
    (here / "own" / "tasks").mkdir(parents=True)
    (here / "own" / "tasks" / "task1_my_own.json").write_text("{}")
    (here / "notes.txt").write_text("mine")
    for name in ("changed", "more", "dangling-in"):
        sample.write_suite(here / name)
    (here / "changed" / "tasks" / "task0001_sentence_city_plain.json").write_text("{}")     # an own wording, say
    (here / "more" / "tasks" / "README").write_text("mine")
    os.symlink("nowhere", here / "dangling-in" / "link")
    os.symlink("own", here / "linked")
    monkeypatch.chdir(here)
    monkeypatch.setenv("HOME", str(tmp_path))
    before = tree(tmp_path)
    if out == "here":
        out = str(here)
    ends(sample, "--out", out)
    refused(sample.write_suite, os.path.expanduser(out))
    assert tree(tmp_path) == before


def test_a_suite_that_is_as_it_was_written_an_empty_folder_and_a_link_to_either_are_filled(quick_suite, tmp_path, capsys):
    for name in ("one", "deep/er/new", "empty", "link"):
        if name == "empty":
            (tmp_path / name).mkdir()
        elif name == "link":
            os.symlink("one", tmp_path / name)
        sample.main(["--out", str(tmp_path / name), "--seed", "0"])
        first = tree(tmp_path / name)
        sample.main(["--out", str(tmp_path / name), "--seed", "1"])
        assert tree(tmp_path / name) != first and (tmp_path / name / listed.LIST).is_file()
    assert (tmp_path / "link").is_symlink() and tree(tmp_path / "link") == tree(tmp_path / "one")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["deep", "empty", "link", "one"]     # nothing beside them


def test_a_suite_from_before_there_was_a_list_is_known_by_its_names(quick_suite, tmp_path):
    root = tmp_path / "old"
    sample.write_suite(root)
    (root / listed.LIST).unlink()
    sample.write_suite(root, seed=1)
    for mine in ("tasks/task0002_my_own.json", "notes.txt", "tasks/more/x.json", "splits/default/mine_tasks.txt"):
        (root / listed.LIST).unlink(missing_ok=True)
        (root / mine).parent.mkdir(exist_ok=True)
        (root / mine).write_text("{}")
        assert mine in refused(sample.write_suite, root)
        (root / mine).unlink()


def test_a_suite_that_cannot_be_written_leaves_the_old_one(quick_suite, tmp_path, monkeypatch):
    sample.write_suite(tmp_path / "one")
    before = tree(tmp_path)

    def full(folder):
        raise OSError(28, "No space left on device")
    monkeypatch.setattr(sample, "write_tokenizer", full)
    assert "No space left" in refused(sample.write_suite, tmp_path / "one", 1)
    assert "No space left" in refused(sample.write_suite, tmp_path / "deep" / "er" / "new")
    assert tree(tmp_path) == before


def test_the_default_suite_is_written_where_it_is_missing_and_only_there(quick_suite, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for asked in ("data", "data/other", str(tmp_path / "x")):
        sample.ensure_suite(asked)
    assert not list(tmp_path.iterdir())
    sample.ensure_suite("./data/sample/")
    written = tree(tmp_path)
    assert "data/sample/corpus.txt" in written
    sample.ensure_suite("data/sample")
    assert tree(tmp_path) == written


def test_other_writers_replace_only_their_own(tmp_path, tmp_path_factory, monkeypatch):
    """Packed checkpoints, pages of the benchmarks, pictures of results."""
    mine = tmp_path / "model"
    mine.mkdir()
    for name in ("config.json", "model.safetensors", "tokenizer.json"):
        (mine / name).write_text("mine")
    (tmp_path / "notes.md").write_text("mine")
    results = tmp_path_factory.mktemp("results") / "results.json"
    results.write_text('{"results": []}')
    before = tree(tmp_path)
    for folder in ("assets", "tests/benchmarks"):
        monkeypatch.syspath_prepend(ROOT / folder)
    import pack
    import pages
    with pytest.raises(SystemExit, match="holds other files"):
        pack.pack(str(SHIPPED), str(mine))
    assert tree(tmp_path) == before
    monkeypatch.setattr(sys, "argv", ["draw_results.py", str(results), str(tmp_path / "notes.md")])
    with pytest.raises(SystemExit, match="no picture"):
        runpy.run_path(str(ROOT / "assets" / "draw_results.py"), run_name="__main__")
    assert tree(tmp_path) == before
    with pytest.raises(SystemExit, match="was not written"):
        pages.write(tmp_path / "notes.md", "# Title\ntext")
    assert tree(tmp_path) == before
    for text in ("# Title\none", "# Title\ntwo"):
        pages.write(tmp_path / "page.md", text)
        assert (tmp_path / "page.md").read_text() == text


# ---------------------------------------------------------------------------------------------- seeing where one is

def help_of(name, monkeypatch, encoding) -> str:
    stream = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    monkeypatch.setattr(sys, "stdout", stream)
    with pytest.raises(SystemExit) as end:
        SCRIPTS[name].main(["--help"])
    stream.flush()
    assert end.value.code == 0
    return stream.buffer.getvalue().decode(encoding)


@pytest.mark.parametrize("name", SCRIPTS)
def test_help_works_on_an_ascii_terminal_and_loses_no_sign(name, monkeypatch):
    plain = help_of(name, monkeypatch, "ascii")
    full = help_of(name, monkeypatch, "utf-8")
    assert plain.count("?") == full.count("?") and plain.count("--") == full.count("--")


@pytest.mark.parametrize("name", SCRIPTS)
def test_every_line_of_help_tells_the_default(name, monkeypatch):
    if name == "bench.sample":
        said = " ".join(help_of(name, monkeypatch, "utf-8").split())
        assert "(default: data/sample)" in said and "(default: 0)" in said
        return
    parser = (getattr(SCRIPTS[name], "own_parser", None) or SCRIPTS[name].parser)()
    for action in parser._actions:
        if action.dest == "help" or action.required:
            continue
        said = parser._get_formatter()._expand_help(action)
        assert "default" in said, action.dest
        assert "None" not in said and "%(default)" not in said and "[]" not in said
        if action.default not in (None, []) and not isinstance(action.default, bool):
            assert str(action.default) in said, action.dest


def test_defaults_in_help_are_those_of_the_script():
    said = {name: " ".join(SCRIPTS[name].parser().format_help().split()) for name in ("train_hyper", "train_teacher")}
    assert "optimizer steps (default: 20000)" in said["train_hyper"]
    assert "optimizer steps (default: 10000)" in said["train_teacher"]
    assert "(default: yes)" in said["train_hyper"] and "(default: no)" in said["train_hyper"]


def test_options_are_told_those_that_differ_from_the_defaults_first(capsys):
    parser = train_hyper.parser()
    options = config.parse(parser, "finetune", ["--stage=finetune", "--seed=3", "--runs", "a b", "--no-pretrained"])
    config.tell(options, parser, "finetune")
    said = capsys.readouterr().out
    assert max(map(len, said.splitlines())) <= 100
    first, _, second = said.partition("as by default:")
    first, second = first.split(), second.split()
    assert first[:3] == ["options", "of", "finetune:"] and "'--runs=a b'" in said
    for word in ("--seed=3", "--no-pretrained", "--rank=8", "--lr=0.0035", "--meta-model=assets/t5-tiny"):
        assert word in first and word not in second
    for word in ("--instances=1", "--clip=1.0", "--no-standardize-logits", "--data=data/sample"):
        assert word in second and word not in first
    told = [word for word in [*first, *second] if word.lstrip("'").startswith("--")]
    unset = {action.dest for action in parser._actions if getattr(options, action.dest, None) is None}
    assert len(told) == len([a for a in parser._actions if a.dest not in unset | {"help", "stage"}])


def test_a_stage_tells_its_options_once_and_one_that_is_done_does_not(project):
    assert "options of finetune:" not in project.run("finetune")
    said = project.run("finetune", "--name=other")
    assert said.count("options of finetune:") == 1 and "--name=other" in said.split("as by default:")[0]


def test_a_run_is_gone_on_with_however_its_paths_are_written_and_from_wherever(project, tmp_path, monkeypatch):
    (tmp_path / "a").mkdir()
    monkeypatch.chdir(tmp_path)
    os.symlink(project.data, tmp_path / "link")
    said = ["nothing to do" in call(train_hyper, *project.argv("finetune", "--data", data))
            for data in (f"{project.data}/", f"{project.data}/../{project.data.name}", tmp_path / "link")]
    assert all(said)
    argv = ["--stage=pretrain", "--config", str(project.config), "--runs", str(tmp_path / "own"), "--llm", str(project.runs / "meta")]
    train_hyper.main([*argv, "--data", "link", "--text", "link/corpus.txt"])
    monkeypatch.chdir(tmp_path / "a")
    train_hyper.main([*argv, "--data", "../link", "--text", str(project.data / "corpus.txt")])
    record = yaml.safe_load((tmp_path / "own" / "pretrain" / "config.yaml").read_text())
    assert record["cwd"] == str(tmp_path) and record["data"] == "link"


def test_an_llm_that_somebody_else_saved_is_no_run_whatever_its_files_are_called(project):
    """Its files have the names that a checkpoint of ours has, and none is ours to remove."""
    mine = project.runs / "t5-base"
    mine.mkdir()
    for name in ("config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"):
        (mine / name).write_text("mine")
    for flags in ((), ("--fresh",)):
        assert "t5-base" in project.refuses("finetune", "--name", "t5-base", *flags)
    (project.runs / "mine").mkdir()
    (project.runs / "mine" / "thesis.txt").write_text("mine")
    assert "mine" in project.refuses("finetune", "--name", "mine", "--fresh")
