"""Validation during training: on which tasks, the loss that is logged, the best checkpoint, and that training does not notice."""
import argparse
import json
import math
import os
import random
import shutil
import sys

import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
import yaml
from safetensors.torch import load_file

pytest.register_assert_rewrite("stages")
pytest_plugins = ("stages",)
from stages import MODULES, Project, at_step, call, interrupt

import common
import config
import data
import t5
from bench import predictions, records, validation
from bench.board import Board
from hypernet import TAGI

FOUR = ("--steps=4", "--save-every=1")
NEEDS = {"meta": ("base",), "lora-all": ("meta",), "finetune": ("meta", "lora", "pretrain")}


@pytest.fixture(autouse=True)
def few_examples(monkeypatch):
    """Of each of the three validation tasks."""
    monkeypatch.setattr(validation, "EXAMPLES", 12)


class Killed(Exception):
    pass


def same(a: dict, b: dict) -> bool:
    """The same tensors, bit for bit."""
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def options_of(project, stage, *flags):
    return config.parse(MODULES[stage].parser(), stage.replace("-", "_"), project.argv(stage, *flags))


def validated(project, stage) -> dict:
    """{step: its line} of a stage's validations, each there once."""
    lines = [row for row in project.log(stage) if "validation" in row]
    assert len({row["step"] for row in lines}) == len(lines)
    return {row["step"]: row for row in lines}


def scripted(monkeypatch, *losses):
    """Have validations find these losses, one after the other, with the right instruction."""
    rest = list(losses)
    monkeypatch.setattr(validation, "mean_loss", lambda batches, *args: rest.pop(0) if batches else 9.0)
    monkeypatch.setattr(validation, "shuffled", lambda *args: [])


def with_data(project, tmp_path) -> Project:
    """The same runs with data of their own."""
    shutil.copytree(project.data, tmp_path / "data")
    own = Project(tmp_path / "data", tmp_path / "config.yaml", project.runs)
    text = yaml.safe_load(project.config.read_text()) | {"data": str(own.data)}
    own.config.write_text(yaml.safe_dump(text))
    return own


def split(project, name, tasks):
    (project.data / "splits" / "default" / f"{name}_tasks.txt").write_text("".join(f"{task}\n" for task in tasks))


def names(project, name) -> list[str]:
    return data.listed_tasks(str(project.data), name)


def make_task(n, category, instances=6, definition=None):
    rows = [data.Instance(f"{n}-{i}", f"input {i} of {n}" + " more" * (i % 3), [f"out {i}"]) for i in range(instances)]
    return data.Task(f"task{n}", category, [definition or f"definition {n}", "paraphrase"], [("a", "b"), ("c", "d")], rows)


# ---------------------------------------------------------------------------------------------- training does not notice

@pytest.mark.parametrize("stage", ["meta", "lora-all", "finetune"])
def test_weights_are_the_same_bit_for_bit_with_and_without_validation(finished, tmp_path, stage):
    plain, watched = (finished.copy(tmp_path / name, NEEDS[stage]) for name in ("plain", "watched"))
    if stage == "meta":                                         # dropout, which draws random numbers
        for project in (plain, watched):
            path = project.runs / "base" / "config.json"
            path.write_text(json.dumps(json.loads(path.read_text()) | {"dropout_rate": 0.3}))
    plain.run(stage, "--steps=4", "--checkpointing")
    watched.run(stage, "--steps=4", "--checkpointing", "--validate-every=1")
    assert same(plain.weights(stage), watched.weights(stage))
    lines = validated(watched, stage)
    assert list(lines) == [1, 2, 3, 4]
    assert all(("validation_shuffled" in line) == (stage == "finetune") for line in lines.values())
    assert len({line["validation"] for line in lines.values()}) > 1
    assert [row["step"] for row in plain.log(stage)] == [row["step"] for row in watched.log(stage) if "validation" not in row]


def test_a_validation_leaves_random_numbers_modes_and_gradients_alone():
    torch.manual_seed(1), np.random.seed(1), random.seed(1)
    model = nn.Sequential(nn.Linear(3, 3), nn.Dropout(0.5), nn.Sequential(nn.Dropout(0.5)))
    model[2].eval()
    states = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()
    with validation.evaluating(model):
        x = torch.ones(2, 3)
        first, second = (validation.mean_loss([x, x], lambda x: (model(x).sum(), 1), 0, 1, "cpu") for _ in range(2))
    assert first == second and model[0].weight.grad is None
    assert [module.training for module in model.modules()] == [True, True, True, False, False]
    assert torch.equal(states[0], torch.get_rng_state()) and states[1] == np.random.get_state()[1].tolist()
    assert states[2] == random.getstate()


@pytest.mark.parametrize("n, world", [(5, 2), (4, 2), (2, 3), (1, 4), (7, 1)])
def test_ranks_share_out_the_batches_and_find_what_one_process_finds(monkeypatch, n, world):
    """Each runs as many forward passes as the others, whatever is left for it, since those of a model in shards are joint."""
    batches, asked, told = [torch.randn(3) for _ in range(n)], {}, {}

    def loss_of(rank):
        def run(batch):
            asked.setdefault(rank, []).append(batch)
            return batch.sum(), len(batch) + 1
        return run

    one = validation.mean_loss(batches, loss_of(None), 0, 1, "cpu")
    for rank in range(world):
        with monkeypatch.context() as patch:
            patch.setattr(common, "sum_over_ranks", lambda values, device: told.setdefault(rank, values))
            try:
                validation.mean_loss(batches, loss_of(rank), rank, world, "cpu")
            except ZeroDivisionError:                           # this rank alone has none
                pass
    monkeypatch.setattr(common, "sum_over_ranks", lambda values, device: [sum(x) for x in zip(*told.values())])
    assert validation.mean_loss(batches, loss_of(None), 0, 1, "cpu") == one
    assert len({len(asked[rank]) for rank in range(world)}) == 1 and len(asked[0]) == math.ceil(n / world)


# ---------------------------------------------------------------------------------------------- what is measured

@pytest.mark.numbers
def test_the_logged_losses_are_those_of_the_splits_validation_tasks_with_the_right_and_with_another_instruction(
        finished, tmp_path):
    own = finished.copy(tmp_path / "runs", NEEDS["finetune"])
    own.run("finetune", "--validate-every=2", "--demos=0")
    tagi = TAGI.load(str(own.runs / "finetune"))
    draws, tasks = examples_of(own)
    givers = {task.name: giver for task, giver in zip(tasks, predictions.of_another_kind(tasks))}
    sums, n = {"validation": 0.0, "validation_shuffled": 0.0}, 0
    for draw in draws:                                          # each instance alone
        (text, answer), = draw.pairs
        ids, mask = data.tokenize(tagi.tokenizer, [data.instance_text(text)], tagi.options.max_input)
        labels = data.labels(tagi.tokenizer, [answer], tagi.options.max_output)
        n += labels.numel()
        for term, task in (("validation", draw.task), ("validation_shuffled", givers[draw.task.name])):
            with torch.no_grad():
                logits = tagi(tagi.adapt([task.definitions[0]]), ids, mask, labels)[0]
            sums[term] += F.cross_entropy(logits, labels[0], reduction="sum").item()
    line, = validated(own, "finetune").values()
    assert line["step"] == 2 and line["validation_shuffled"] != line["validation"]
    assert {term: line[term] for term in sums} == {term: pytest.approx(total / n, rel=1e-4) for term, total in sums.items()}


def examples_of(project):
    """(the draws of the split's validation tasks, the tasks as they follow each other there)."""
    draws = validation.examples(data.load_sni(str(project.data), "validation", None), "0")
    tasks = list({draw.task.name: draw.task for draw in draws}.values())
    assert {task.name for task in tasks} == set(names(project, "validation")) and len(draws) == validation.EXAMPLES
    return draws, tasks


@pytest.mark.numbers
@pytest.mark.parametrize("stage", ["meta", "lora-all"])
def test_a_model_that_reads_the_instruction_is_validated_reading_it(finished, tmp_path, stage):
    own = finished.copy(tmp_path / "runs", NEEDS[stage])
    own.run(stage, "--validate-every=2", "--demos=0", "--lr=0")
    llm, tokenizer = t5.load_llm(str(own.runs / ("base" if stage == "meta" else "meta")))
    total = n = 0
    for draw in examples_of(own)[0]:
        (text, answer), = draw.pairs
        ids, mask = data.tokenize_instructed(tokenizer, [(draw.task.definitions[0], [], text)], 999)
        labels = data.labels(tokenizer, [answer], options_of(own, stage).max_output)
        with torch.no_grad():
            total += F.cross_entropy(t5.logits(llm, ids, mask, labels)[0], labels[0], reduction="sum").item()
        n += labels.numel()
    line, = validated(own, stage).values()
    assert line["validation"] == pytest.approx(total / n, rel=1e-4)


def test_examples_are_always_the_same_of_every_task_about_as_many_and_those_of_a_task_side_by_side(monkeypatch):
    monkeypatch.setattr(validation, "EXAMPLES", 256)
    tasks = [make_task(n, "c", instances=40 + n) for n in range(7)]
    draws = validation.examples(tasks, "mixed")
    assert draws == validation.examples(tasks, "mixed")
    of = [draw.task.name for draw in draws]
    assert {of.count(name) for name in of} == {256 // 7} and len({*of}) == 7
    assert sum(a != b for a, b in zip(of, of[1:])) == 6
    assert len({draw.pairs[0] for draw in draws}) == len(draws)             # none twice
    assert {draw.definition for draw in draws} == {task.definitions[0] for task in tasks}
    assert {(draw.task.name, len(draw.demonstrations)) for draw in draws} == {(f"task{n}", 2 * (n % 2)) for n in range(7)}
    assert {len(draw.demonstrations) for draw in validation.examples(tasks, "2")} == {2}


def test_of_few_instances_all_are_taken_and_of_very_many_tasks_some(monkeypatch):
    monkeypatch.setattr(validation, "EXAMPLES", 256)
    assert len(validation.examples([make_task(0, "c", 5)], "0")) == 5
    draws = validation.examples([make_task(n, "c", 2) for n in range(700)], "0")
    assert len(draws) == 256 == len({draw.task.name for draw in draws})


def test_a_wrong_instruction_is_of_another_category_where_there_is_one_and_never_the_tasks_own():
    tasks, training = [make_task(n, "ab"[n % 2]) for n in range(4)], [make_task(9, "t")]
    wrong = validation.shuffled(validation.examples(tasks, "2"), training)
    categories = {task.definitions[0]: task.category for task in tasks}
    assert all(categories[draw.definition] != draw.task.category and len(draw.demonstrations) == 2 for draw in wrong)
    assert [draw.pairs for draw in wrong] == [draw.pairs for draw in validation.examples(tasks, "2")]
    alone = validation.shuffled(validation.examples(tasks[:1], "0"), training)
    assert {draw.definition for draw in alone} == {"definition 9"}          # there is one category: of a training task
    alike = validation.shuffled(validation.examples(tasks[::2], "0"), [])
    assert all(draw.definition != draw.task.definitions[0] for draw in alike)


# ---------------------------------------------------------------------------------------------- which tasks

def test_held_out_tasks_are_left_out_of_every_stages_training_whatever_the_seed_and_few_are_among_many(finished):
    def of(stage, *flags):
        options = options_of(finished, stage, *flags)
        return ({task.name for task in data.training_tasks(options)},
                {task.name for task in data.training_tasks(options, held_out=True)})

    every, none = of("meta")
    assert every == set(names(finished, "train")) and not none
    trained, held = of("meta", "--hold-out=4")
    assert len(held) == 4 and trained == every - held
    for stage in ("lora", "lora-all", "finetune"):
        assert of(stage, "--hold-out=4", "--seed=5", "--max-instances=3") == (trained, held)
    assert of("meta", "--hold-out=2")[1] < held
    few = {task.name for task in data.training_tasks(options_of(finished, "meta", "--hold-out=4", "--categories=2"))}
    assert few < trained


def test_nothing_is_trained_on_that_is_held_out(finished, tmp_path):
    own = finished.copy(tmp_path / "runs", ("base",))
    own.run("meta", "--hold-out=3", "--validate-every=2")
    trained = json.loads((own.runs / "meta" / "training_tasks.json").read_text())
    held = {task.name for task in data.training_tasks(options_of(own, "meta", "--hold-out=3"), held_out=True)}
    assert len(held) == 3 and held | trained.keys() == set(names(own, "train")) and not held & trained.keys()
    assert validated(own, "meta")
    own.run("lora", "--unit=task", "--hold-out=3")
    assert len(list(own.runs.glob("lora/*/model.safetensors"))) == len(trained)


def test_stages_that_hold_out_other_tasks_do_not_go_together(finished, tmp_path):
    own = finished.copy(tmp_path / "runs", ("base", "meta", "lora", "pretrain"))
    assert "training tasks" in own.refuses("finetune", "--hold-out=2", "--validate-every=1")


def test_of_p3_whole_data_sets_are_held_out():
    tasks = [make_task(n, f"set{n // 3}") for n in range(12)]
    options = argparse.Namespace(hold_out=2, format="p3", data="p3")
    trained, held = records.hold_out(tasks, options)
    assert len(held) == 6 and len({task.category for task in held}) == 2
    assert not {task.category for task in held} & {task.category for task in trained} and len(trained) == 6


def test_without_tasks_to_validate_on_one_line_says_how_to_get_them(finished, tmp_path):
    own = with_data(finished.copy(tmp_path / "runs", ("base",)), tmp_path)
    flags = ("--validate-every=1", "--data", own.data)
    path = own.data / "splits" / "default" / "validation_tasks.txt"
    lines = {}
    train, test, there = (names(own, name) for name in ("train", "test", "validation"))
    for what, tasks in {"trained": [*there, train[3]], "tested": [test[0]], "empty": []}.items():
        split(own, "validation", tasks)
        lines[what] = own.refuses("meta", *flags)
    path.unlink()
    lines["none"] = own.refuses("meta", *flags)
    assert "--hold-out" in lines["none"] and str(path) in lines["none"]
    assert train[3] in lines["trained"] and "train" in lines["trained"]
    assert test[0] in lines["tested"] and "test" in lines["tested"]
    assert "is empty" in lines["empty"]
    assert "12" in own.refuses("meta", *flags, "--hold-out=12")
    own.run("meta", *flags, "--hold-out=11")


def test_a_model_that_was_trained_on_the_validation_tasks_is_refused(finished, tmp_path):
    own = finished.copy(tmp_path / "runs", ("meta", "lora", "pretrain"))
    path = own.runs / "meta" / "training_tasks.json"
    name = names(own, "validation")[1]
    path.write_text(json.dumps(json.loads(path.read_text()) | {name: "0"}))
    line = own.refuses("finetune", "--validate-every=1")
    assert str(own.runs / "meta") in line and name in line
    path.write_text("[")
    assert str(path) in own.refuses("lora-all", "--validate-every=1")


@pytest.mark.parametrize("stage", ["base", "lora", "pretrain"])
def test_a_stage_without_validation_refuses_it_before_any_stage_is_trained(finished, tmp_path, stage):
    own = finished.copy(tmp_path / "runs", ("base", "meta"))
    assert f"stage {stage}" in own.refuses(stage, "--validate-every=1")
    if stage == "lora":
        text = yaml.safe_load(own.config.read_text())
        own.config = tmp_path / "config.yaml"
        own.config.write_text(yaml.safe_dump({k: v for k, v in text.items() if k != "base"}))
        shutil.rmtree(own.runs / "meta")
        assert "stage lora" in own.refuses(None, "--validate-every=1") and not (own.runs / "meta").exists()


# ---------------------------------------------------------------------------------------------- the best checkpoint

def best_of(project, stage):
    """(where the link leads, its record), when it is the only one of its kind."""
    folders = list((project.runs / stage).glob("best-*"))
    link = project.runs / stage / "best"
    assert folders == [link.resolve()] and os.readlink(link) == folders[0].name
    return folders[0].name, project.record(stage, "best")


@pytest.mark.parametrize("stage", ["meta", "lora-all", "finetune"])
def test_the_best_checkpoint_is_kept_beside_the_last(finished, tmp_path, monkeypatch, stage):
    own = finished.copy(tmp_path / "runs", NEEDS[stage])
    with monkeypatch.context() as patch:
        scripted(patch, 4.0, 3.0, 3.0, 3.5)
        own.run(stage, *FOUR, "--validate-every=1")
    name, record = best_of(own, stage)
    assert name == "best-000002" and record["step"] == 2 and record["validation"] == 3.0
    short = finished.copy(tmp_path / "short", NEEDS[stage])
    short.run(stage, "--steps=4", "--save-every=2", "--keep=9")
    assert same(own.weights(stage), short.weights(stage)) and not same(own.weights(stage), own.weights(stage, "best"))
    assert not (own.runs / stage / "best" / "optimizer.pt").exists()
    if stage != "finetune":
        return
    assert json.loads((own.runs / stage / "best" / "training_tasks.json").read_text()).keys() == set(names(own, "train"))
    with monkeypatch.context() as patch:                        # as it was after two steps
        at_step(patch, 2, interrupt)
        with pytest.raises(SystemExit):
            finished.copy(tmp_path / "cut", NEEDS[stage]).run(stage, *FOUR)
    cut = common.checkpoint_of(str(tmp_path / "cut" / stage))
    assert same(own.weights(stage, "best"), load_file(f"{cut}/model.safetensors"))


def test_the_best_checkpoint_answers_like_any_other(finished, tmp_path, monkeypatch):
    own = finished.copy(tmp_path / "runs", NEEDS["finetune"])
    with monkeypatch.context() as patch:
        scripted(patch, 3.0, 3.5)
        own.run("finetune", "--validate-every=1")
    best = str(own.runs / "finetune" / "best")
    tagi, last = TAGI.load(best), TAGI.load(str(own.runs / "finetune"))
    assert same(tagi.trainable(), own.weights("finetune", "best")) and not same(tagi.trainable(), last.trainable())
    own.run("evaluate", "--checkpoint", best, "--rows=tagi", "--out", tmp_path / "out", "--split=validation")
    assert json.loads((tmp_path / "out" / "results.json").read_text())["results"]
    call(MODULES["evaluate"], "--checkpoint", best, "--rows=tagi", "--split=validation")      # where it is told by the folder alone
    assert list(own.runs.rglob("results.json"))[0].parent.parent == own.runs
    assert call(MODULES["adapt"], "--checkpoint", best, "--instruction=Find the city.", "--input=a red cat")


@pytest.mark.parametrize("losses, best", [((5.0, 4.0, 6.0, 4.5), 2), ((5.0, 6.0, 5.5, 4.0), 4), ((3.0, 4.0, 4.0, math.nan), 1)])
def test_a_resumed_run_does_not_forget_the_best(finished, tmp_path, monkeypatch, losses, best):
    own = finished.copy(tmp_path / "runs", NEEDS["lora-all"])
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        scripted(patch, *losses)
        at_step(patch, 2, interrupt)
        own.run("lora-all", *FOUR, "--validate-every=1")
    with monkeypatch.context() as patch:
        scripted(patch, *losses[2:])
        own.run("lora-all", *FOUR, "--validate-every=1")
    name, record = best_of(own, "lora-all")
    assert name == f"best-00000{best}" and record["validation"] == losses[best - 1]
    assert list(validated(own, "lora-all")) == [1, 2, 3, 4]


@pytest.mark.parametrize("where", ["move_config", "point", "remove_ours"])
def test_a_run_killed_while_it_keeps_its_best_goes_on_to_the_same(finished, tmp_path, monkeypatch, where):
    own = finished.copy(tmp_path / "runs", NEEDS["lora-all"])
    do, count = getattr(validation, where), []

    def killed(*args):
        count.append(args)
        if len(count) == (1 if where == "remove_ours" else 2):
            raise Killed
        do(*args)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        scripted(patch, 5.0, 4.0)
        patch.setattr(validation, where, killed)
        own.run("lora-all", *FOUR, "--validate-every=1")
    with monkeypatch.context() as patch:
        scripted(patch, 4.0, 6.0, 7.0)
        own.run("lora-all", *FOUR, "--validate-every=1")
    name, record = best_of(own, "lora-all")
    assert name == "best-000002" and record["validation"] == 4.0 and record["step"] == 2
    folders = {path.name for path in (own.runs / "lora-all").iterdir() if path.is_dir()}
    assert folders - {"step-000003"} == {"all", "best", "best-000002"}
    straight = finished.copy(tmp_path / "straight", NEEDS["lora-all"])
    straight.run("lora-all", *FOUR)
    assert same(own.weights("lora-all"), straight.weights("lora-all"))


def test_a_best_that_other_validation_tasks_told_does_not_count(finished, tmp_path, monkeypatch):
    own = with_data(finished.copy(tmp_path / "runs", NEEDS["lora-all"]), tmp_path)
    flags = (*FOUR, "--validate-every=1", "--data", own.data)
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        scripted(patch, 1.0, 1.5)
        at_step(patch, 2, interrupt)
        own.run("lora-all", *flags)
    split(own, "validation", names(own, "validation")[:2])
    with monkeypatch.context() as patch:
        scripted(patch, 5.0, 4.0)
        own.run("lora-all", *flags)
    assert best_of(own, "lora-all")[0] == "best-000004"


# ---------------------------------------------------------------------------------------------- TensorBoard

def curves(folder) -> dict:
    """{name: [(step, value)]} as TensorBoard shows them."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    events = EventAccumulator(str(folder))
    events.Reload()
    return {name: [(e.step, e.value) for e in events.Scalars(name)] for name in events.Tags()["scalars"]}


def logged(rows) -> dict:
    found = {}
    for row in rows:
        for name, value in row.items():
            if name not in ("step", "group"):
                found.setdefault(name, []).append((row["step"], pytest.approx(value, rel=1e-6)))
    return found


def test_tensorboard_shows_what_the_log_holds_and_a_resumed_run_continues_its_curves(finished, tmp_path, monkeypatch):
    own = finished.copy(tmp_path / "runs", NEEDS["finetune"])
    flags = ("--steps=4", "--save-every=2", "--validate-every=2", "--tensorboard")
    with monkeypatch.context() as patch, pytest.raises(Killed):
        at_step(patch, 3, lambda: (_ for _ in ()).throw(Killed))
        own.run("finetune", *flags)
    assert [step for step, _ in curves(own.runs / "finetune" / "tensorboard")["loss"]] == [1, 2, 3]
    own.run("finetune", *flags)
    found = curves(own.runs / "finetune" / "tensorboard")
    assert found == logged(own.log("finetune"))
    assert [step for step, _ in found["loss"]] == [1, 2, 3, 4] and {"validation", "validation_shuffled", "grad_norm"} <= found.keys()
    own.run("finetune", *flags, "--fresh")
    assert curves(own.runs / "finetune" / "tensorboard") == logged(own.log("finetune"))


def test_tensorboard_keeps_groups_of_lora_teachers_apart(finished, tmp_path):
    own = finished.copy(tmp_path / "runs", NEEDS["lora-all"])
    own.run("lora", "--teachers-at-once=2", "--tensorboard")
    groups = {row["group"] for row in own.log("lora")}
    folders = list((own.runs / "lora" / "tensorboard").glob("group-*"))
    assert len(folders) == len(groups) > 2
    shown = sorted([value for _, value in curves(folder)["loss"]] for folder in folders)
    of_log = sorted([row["loss"] for row in own.log("lora") if row["group"] == group] for group in groups)
    assert shown == [pytest.approx(losses) for losses in of_log]


def test_a_group_of_many_teachers_has_a_folder_of_its_own(tmp_path):
    shown = Board(str(tmp_path))
    groups = [", ".join(["Grammar Error Correction / Detection"] * n) for n in (15, 16)]
    for group in groups:
        shown.add({"step": 1, "loss": 0.5, "group": group, "not_finite": ["nan"]})
    shown.close()
    assert [curves(folder) for folder in (tmp_path / "tensorboard").glob("group-*")] == [{"loss": [(1, 0.5)]}] * 2


def test_without_tensorboard_one_line_says_what_to_install_before_anything_is_trained(finished, tmp_path, monkeypatch):
    own = finished.copy(tmp_path / "runs", ("base",))
    for name in [name for name in sys.modules if name.startswith(("tensorboard", "torch.utils.tensorboard"))]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    assert "pip install tensorboard" in own.refuses("meta", "--tensorboard")
    assert not (own.runs / "meta").exists()
