"""python -m bench.check: what it tells of data, and what memory it counts."""
import contextlib
import io
import json
import math
import os
import re
from pathlib import Path

import pytest
import torch
import yaml

pytest.register_assert_rewrite("stages")
import config
import t5
import train_hyper
from bench import check, memory, optim
from conftest import make_llm, make_tokenizer, student_options
from hypernet import TAGI
from stages import call, write_config, write_suite
from test_p3 import P3

ROOT = Path(__file__).resolve().parent.parent
WORDS = "red blue cat dog first last word letter".split()


def write_task(folder: Path, name: str, definition: str, inputs: list[str], output="cat") -> None:
    (folder / "tasks").mkdir(parents=True, exist_ok=True)
    record = {"Definition": [definition], "Categories": ["one"],
              "Positive Examples": [{"input": "dog", "output": "cat"}, {"input": "red", "output": "blue"}],
              "Instances": [{"id": f"{name}-{n}", "input": text, "output": [output]} for n, text in enumerate(inputs)]}
    (folder / "tasks" / f"{name}.json").write_text(json.dumps(record))


def write_splits(folder: Path, **splits) -> None:
    (folder / "splits" / "default").mkdir(parents=True, exist_ok=True)
    for split, names in splits.items():
        (folder / "splits" / "default" / f"{split}_tasks.txt").write_text("".join(name + "\n" for name in names))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("llm")
    t5.save_all_but_weights(str(folder), make_llm("v1.1"), make_tokenizer())
    return folder                                                   # without weights: none are read


@pytest.fixture
def own(tmp_path, checkpoint):
    """Two training tasks of 100 inputs, one, two, three .. or 100 words long, a test task, and a config for them."""
    lengths = [" ".join(["cat"] * n) for n in range(1, 101)]
    write_task(tmp_path / "data", "task1_a", "say the first word", lengths)
    write_task(tmp_path / "data", "task2_b", "upper", lengths)
    write_task(tmp_path / "data", "task3_c", "count the cats", ["cat"] * 5)
    write_splits(tmp_path / "data", train=["task1_a", "task2_b"], test=["task3_c"])
    (tmp_path / "text.txt").write_text("red cat dog\nblue\n" + "cat " * 50 + "\n")
    stage = {"tasks": 2}
    values = {"data": str(tmp_path / "data"), "runs": str(tmp_path / "runs"), "model": str(checkpoint), "llm": "base",
              "rank": 2, "alpha": 2, "lora": stage, "finetune": stage | {"width": 16, "bottleneck": 8},
              "pretrain": stage | {"text": str(tmp_path / "text.txt"), "text_length": 30, "width": 16, "bottleneck": 8}}
    (tmp_path / "own.yaml").write_text(yaml.safe_dump(values))
    return tmp_path


def run(*words) -> str:
    return call(check, *map(str, words))


def refused(*words) -> tuple[str, str]:
    """(standard output, the one line of the error)."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.chdir(ROOT), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        with pytest.raises(SystemExit) as end:
            check.main([str(word) for word in words])
    line = err.getvalue()
    assert end.value.code == 2 and line.startswith("error: ") and line.count("\n") == 1 and len(line) <= 301, line
    return out.getvalue(), line


def row(printed: str, name: str) -> list[str]:
    """The cells of the first line that begins with this name."""
    line = next(line for line in printed.splitlines() if re.match(re.escape(name) + r"\s\s", line))
    return re.split(r"\s{2,}", line.strip())


def test_it_counts_tasks_lengths_cuts_and_text_and_writes_nothing(own):
    before = {path: path.stat().st_mtime_ns for path in own.rglob("*")}
    printed = run(own / "own.yaml", "--max-input", 60)
    assert row(printed, "train") == ["train", "2", "2", "0", "2", "1", "200"]
    assert row(printed, "test") == ["test", "1", "1", "0", "1", "1", "5"]
    tokenizer = t5.load_tokenizer(yaml.safe_load((own / "own.yaml").read_text())["model"])
    lengths = sorted(2 * [len(tokenizer(f"Input: {' '.join(['cat'] * n)}.\nOutput: ")["input_ids"]) for n in range(1, 101)])
    cells = row(printed, "input")
    assert cells[1:4] == ["200", f"{sum(lengths) / 200:.0f}", str(lengths[-1])]
    assert cells[4:13] == check.histogram(lengths) and sum(map(int, cells[4:13])) in range(98, 103)
    over = sum(length > 60 for length in lengths)
    assert cells[13:16] == ["60", f"{100 * over / 200:.1f} %", str(lengths[-3])]        # two of 200 are longer
    assert row(printed, "output")[1] == "200" and row(printed, "instruction")[1] == "2"
    assert row(printed, "instruction, 2 demonstrations")[1] == "2" and row(printed, "the same, 2 demonstrations")[1] == "200"
    assert "2 documents of three words or more" in printed and "50.0 % longer" in printed
    assert "no task is a training task too" in printed and printed.endswith("nothing keeps these stages from starting\n")
    assert {path: path.stat().st_mtime_ns for path in own.rglob("*")} == before


def test_a_limit_of_what_it_names_cuts_at_most_1_percent():
    for n in (1, 2, 99, 100, 101, 250):
        lengths = list(range(1, n + 1))
        limit = check.cut_at_1_percent(lengths)
        assert sum(x > limit for x in lengths) <= n / 100 < sum(x >= limit for x in lengths)


def test_missing_tasks_are_counted_and_end_it_unless_they_may_be_missing(own):
    write_splits(own / "data", train=["task1_a", "task2_b", "task9_gone"])
    printed, line = refused(own / "own.yaml")
    assert row(printed, "train")[1:4] == ["3", "2", "1"] and "missing of train: task9_gone" in printed
    assert "task9_gone" in line and "--allow-missing" in line
    assert "nothing keeps" in run(own / "own.yaml", "--allow-missing")


@pytest.mark.parametrize("name, definition", [("task7_a", "another"), ("task7_other", "say the  first word")])
def test_a_test_task_that_is_trained_on_is_named(own, name, definition):
    write_task(own / "data", name, definition, ["cat"])
    write_splits(own / "data", test=["task3_c", name])
    printed, line = refused(own / "own.yaml")
    assert f"1 of 2 tasks are training tasks too, by name or definition: {name}" in line


def test_unknown_tokens_are_told_and_are_a_problem_where_they_are_most(own):
    printed = run(own / "own.yaml")
    assert row(printed, "output")[-1] == "0.0 %"
    write_task(own / "data", "task1_a", "説明", ["猫 犬 水 火"] * 100, "猫")
    write_task(own / "data", "task2_b", "説明", ["猫 犬 水 火"] * 100, "猫")
    printed, line = refused(own / "own.yaml")
    assert "train: " in line and "the tokenizer knows" in line and "of the characters" in line
    assert float(row(printed, "output")[-1].split()[0]) > 20


def test_every_problem_is_listed_and_the_line_says_how_many(own):
    write_splits(own / "data", train=["task1_a", "task2_b", "task9_gone"], test=["task1_a"])
    os.remove(own / "text.txt")
    printed, line = refused(own / "own.yaml")
    assert printed.count("\nproblem: ") == 3 and "(3 problems in all)" in line
    assert "pretrain: no plain text" in printed and "--no-pretrained" in printed


@pytest.mark.parametrize("damage, expected", [
    (lambda own: (own / "data/tasks/task1_a.json").write_text("{"), "task1_a.json"),
    (lambda own: (own / "data/splits/default/test_tasks.txt").unlink(), "test_tasks.txt"),
    (lambda own: (own / "text.txt").write_bytes(b"\xff\xfe"), "text.txt"),
    (lambda own: (own / "own.yaml").write_text((own / "own.yaml").read_text() + "tokens: 3\n"), "tokens"),
    (lambda own: (own / "own.yaml").write_text(
        (own / "own.yaml").read_text().replace("bottleneck: 8", "bottelneck: 8", 1)), "bottelneck"),
    (lambda own: (own / "own.yaml").unlink(), "own.yaml")])
def test_what_cannot_be_read_ends_in_one_line_that_names_it(own, damage, expected):
    damage(own)
    assert expected in refused(own / "own.yaml")[1]


def test_two_configs_or_a_model_that_is_not_there_are_refused(own):
    assert "two configs" in refused(own / "own.yaml", "--config", own / "own.yaml")[1]
    assert "no-such-folder" in refused(own / "own.yaml", "--model", "./no-such-folder")[1]


def test_it_checks_the_built_in_suite(tmp_path):
    write_suite(tmp_path / "data")
    write_config(tmp_path / "config.yaml", tmp_path / "data", tmp_path / "runs")
    printed = run("--config", tmp_path / "config.yaml")
    assert row(printed, "train")[1:4] == ["12", "12", "0"] and row(printed, "validation")[1:4] == ["3", "3", "0"]
    for stage in ("base", "meta", "lora", "lora-all", "pretrain", "finetune", "evaluate"):
        assert row(printed, stage)
    assert not (tmp_path / "runs").exists()


def test_it_checks_p3(tmp_path, checkpoint):
    if P3 is None:
        pytest.skip("no real data here (TAGI_DATA)")
    values = {"data": str(P3), "format": "p3", "model": str(checkpoint), "llm": "base", "rank": 2,
              "max_instances": 20, "lora": {}, "finetune": {"width": 16, "bottleneck": 8}}
    (tmp_path / "p3.yaml").write_text(yaml.safe_dump(values))
    out = io.StringIO()
    with contextlib.suppress(SystemExit), contextlib.redirect_stdout(out):      # its signs are mostly unknown
        check.main([str(tmp_path / "p3.yaml"), "--texts", "50"])
    assert row(out.getvalue(), "test")[1:4] == ["11", "4", "7"] and "missing of test: anli_r1" in out.getvalue()


# -------------------------------------------------------------------------------------------- memory

@pytest.mark.parametrize("kind", ["v1.0", "v1.1", "mt5"])
def test_weights_are_counted_as_a_real_model_has_them(kind, tmp_path):
    llm = make_llm(kind)
    t5.save_all_but_weights(str(tmp_path), llm, make_tokenizer())
    # Transformers 5 writes that a head is tied whatever it is; the hub's files say what it is.
    its = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(its | {"tie_word_embeddings": kind == "v1.0"}))
    empty, source = memory.empty_llm(str(tmp_path), "sdpa")
    assert source == str(tmp_path) and all(p.is_meta for p in empty.parameters())
    assert memory.numbers(empty.parameters()) == sum(p.numel() for p in llm.parameters())
    for flags in ((), ("--generator=mean", "--train-norms"), ("--fusion=none", "--train-embeddings")):
        options = student_options(*flags)
        found = memory.of_stage("finetune", empty, options, 3)
        tagi = TAGI(make_llm(kind), make_tokenizer(), options)
        assert found["trained"] == sum(p.numel() for p in tagi.trainable().values())
        assert found["weights"] == 4 * found["trained"] == found["gradients"]
        adapter = tagi.adapt(["upper"]).weights
        assert found["others"] == 3 * 4 * sum(x.numel() for pair in adapter.values() for x in pair)


@pytest.mark.parametrize("name", ["adamw", "adafactor", "muon"])
def test_the_optimizers_state_is_counted_as_it_is_after_a_step(name):
    torch.manual_seed(0)
    parameters = {"matrix": torch.randn(6, 4), "bias": torch.randn(5), "stack": torch.randn(2, 3, 4)}
    for p in parameters.values():
        p.requires_grad_().grad = torch.randn_like(p)
    options = student_options(f"--optimizer={name}")
    optimizer = optim.make_optimizer(parameters, options)
    counted = memory.state_numbers(optimizer)
    optimizer.step()
    kept = [x.numel() for part in optimizer.parts for state in part.state.values() for key, x in state.items()
            if torch.is_tensor(x) and key != "step"]
    assert counted == sum(kept)


def counts_of_docs() -> dict:
    """{(size, stage, with checkpointing): GB at the peak} of docs/memory.md, counted operator by operator."""
    found = {}
    for line in (ROOT / "docs" / "memory.md").read_text().splitlines():
        cells = [cell.strip() for cell in line.strip("| ").split("|")]
        if cells[0] in ("base", "xl", "xxl") and cells[1].partition(",")[0] in ("pretrain", "finetune") and len(cells) == 8:
            stage, _, more = cells[1].partition(", ")
            if more in ("", "checkpointing"):
                found[cells[0], stage, bool(more)] = float(cells[-1])
    return found


@pytest.mark.parametrize("size", ["base", "xl"])
def test_the_estimated_peaks_are_near_those_counted_operator_by_operator(size):
    counted = {key: gb for key, gb in counts_of_docs().items() if key[0] == size}
    assert len(counted) == 4
    llm, _ = memory.empty_llm(f"google/t5-{size}-lm-adapt", "sdpa")
    for _, stage, checkpointing in counted:
        options = config.parse(train_hyper.parser(), stage, [f"--config={ROOT}/configs/sni-{size}.yaml"])
        found = memory.of_stage(stage, llm, options, 60)
        peak = found["peak, checkpointed" if checkpointing else "peak, activations"] / memory.GB
        assert 0.85 < counted[size, stage, checkpointing] / peak < 1.1, (stage, checkpointing, peak)


def test_a_published_size_is_told_by_the_name():
    for name, billion in {"google/flan-t5-small": 0.077, "google/t5-base-lm-adapt": 0.248, "google/t5-v1_1-large": 0.783,
                          "t5-base": 0.223, "google-t5/t5-large": 0.738, "allenai/tk-instruct-3b-def-pos": 2.85,
                          "bigscience/T0_3B": 2.85, "bigscience/T0pp": 11.1, "google/flan-t5-xxl": 11.1}.items():
        llm, source = memory.empty_llm(name, "sdpa")
        assert math.isclose(memory.numbers(llm.parameters()) / 1e9, billion, rel_tol=0.01), name
        assert name in source
    for name in ("google/mt5-base", "google/byt5-small", "facebook/bart-base", "me/my-t5"):
        assert memory.published(name) is None


def test_memory_alone_needs_no_data(tmp_path):
    printed = run(ROOT / "configs" / "sni-base.yaml", "--memory", "--data", tmp_path / "none")
    assert row(printed, "finetune")[1] == "8 x 1" and "60 LoRA teachers" in printed and "tokens" not in printed


def test_the_readmes_gpus_are_those_that_the_command_prints(tmp_path):
    table = {}                                                      # stage -> cells of Base, XL, XXL
    for line in (ROOT / "README.md").read_text().splitlines():
        cells = [cell.strip() for cell in line.strip("| ").split("|")]
        if cells[0] in ("LoRA teachers", "pretrain", "finetune", "evaluate") and len(cells) == 4:
            table[cells[0]] = cells[1:]
    assert len(table) == 4
    for column, size in enumerate(("base", "xl")):
        printed = run(ROOT / "configs" / f"sni-{size}.yaml", "--memory")
        for name, cells in table.items():
            found = row(printed, {"LoRA teachers": "lora"}.get(name, name))
            plain, again = found[-3].removesuffix(" GB"), found[-1].removesuffix(" GB")
            told = dict(re.findall(r"(c?)(?:: | ?)\b(\d+) GB", cells[column]))
            assert told.get("") == plain and told.get("c", plain) == again, (size, name, cells[column], found)
