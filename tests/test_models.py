"""Around the method: the LLM on disk, LoRA teachers, data, metrics."""
import argparse
import copy
import json
import warnings
from unittest import mock

import numpy as np
import pytest
import torch

import common
import data
import evaluate
import lora
from bench.teachers import load_teachers, save_teacher
import t5
import train_teacher
from bench import ablations, optim, predictions, report
from bench.records import read_documents
from conftest import INPUTS, KINDS, OUTPUTS, apart, make_llm, make_tokenizer

# ----------------------------------------------------------------------------------------------------------- the LLM


@pytest.mark.parametrize("kind", KINDS)
def test_a_saved_llm_comes_back_bit_for_bit_and_its_head_stays_tied_or_untied(kind, tmp_path):
    """Saved as stages do it, and load_llm: the same weights, logits, answers, fingerprint and tokenizer."""
    llm, tokenizer = make_llm(kind), make_tokenizer()
    t5.save_llm(str(tmp_path), vars(train_teacher.parser().parse_args([])), llm, tokenizer, finished=True)
    loaded, loaded_tokenizer = t5.load_llm(str(tmp_path))
    assert type(loaded) is type(llm) and loaded_tokenizer.get_vocab() == tokenizer.get_vocab()
    assert loaded_tokenizer(INPUTS)["input_ids"] == tokenizer(INPUTS)["input_ids"]
    assert (loaded.lm_head.weight is loaded.shared.weight) == (kind == "v1.0")
    before, after = llm.state_dict(), loaded.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[k], after[k]) for k in before)
    ids, mask = data.tokenize(tokenizer, INPUTS, 64)
    labels = data.labels(tokenizer, OUTPUTS, 64)
    a, b = (m(input_ids=ids, attention_mask=mask, labels=labels).logits for m in (llm, loaded))
    assert torch.equal(a, b)
    a, b = (m.generate(ids, attention_mask=mask, max_new_tokens=6) for m in (llm, loaded))
    assert torch.equal(a, b)
    assert t5.fingerprint(loaded) == t5.fingerprint(llm) != t5.fingerprint(make_llm(kind, seed=1))


def test_the_built_in_model_is_untied_and_finite():
    """tiny_t5 has a head of its own, which saving and loading keep (above), and starts near the uniform loss."""
    tokenizer = make_tokenizer()
    llm = t5.tiny_t5(len(tokenizer), seed=0)
    assert llm.lm_head.weight is not llm.shared.weight and llm.config.vocab_size == len(tokenizer)
    ids, mask = data.tokenize(tokenizer, INPUTS, 64)
    loss = llm(input_ids=ids, attention_mask=mask, labels=data.labels(tokenizer, OUTPUTS, 64)).loss
    assert loss < 1.5 * np.log(len(tokenizer))


@pytest.mark.parametrize("kind", KINDS)
def test_muon_takes_the_matrices_between_layers_and_adamw_the_rest(kind):
    """Each parameter once, and every one is moved; the two go on from a saved state as one."""
    llm = make_llm(kind)
    options = train_teacher.parser().parse_args(["--optimizer", "muon", "--lr", "0.01"])
    parameters = dict(llm.named_parameters())
    adamw, muon = optim.make_optimizer(parameters, options).parts
    names = {id(p): name for name, p in parameters.items()}
    its, rest = ([names[id(p)] for group in part.param_groups for p in group["params"]] for part in (muon, adamw))
    assert sorted(its + rest) == sorted(parameters)
    assert all(".SelfAttention." in n or ".EncDecAttention." in n or ".DenseReluDense." in n for n in its)
    assert all("shared" in n or "lm_head" in n or "norm" in n or "relative_attention_bias" in n for n in rest)

    def train(optimizer, steps):
        for step in steps:
            for i, p in enumerate(parameters.values()):
                p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(100 * step + i))
            optimizer.step()

    start = copy.deepcopy(llm.state_dict())
    train(optim.make_optimizer(parameters, options), range(4))
    straight = copy.deepcopy(llm.state_dict())
    assert all(not torch.equal(start[name], straight[name]) for name in start)
    llm.load_state_dict(start)
    first, second = (optim.make_optimizer(parameters, options) for _ in range(2))
    train(first, range(2))
    second.load_state_dict(first.state_dict())
    train(second, range(2, 4))
    assert all(torch.equal(straight[name], p) for name, p in llm.state_dict().items())


def test_fingerprint_is_of_the_llm_not_of_wrappers_or_precision():
    """Injection and bf16 leave it; changed weights of any one layer do not."""
    llm = make_llm("v1.1")
    expected = t5.fingerprint(llm)
    assert t5.fingerprint(copy.deepcopy(llm).to(torch.bfloat16)) == expected
    lora.inject_lora(llm, ["q", "wo"], 2, 2)
    assert t5.fingerprint(llm) == expected
    with torch.no_grad():
        llm.get_decoder().block[1].layer[2].layer_norm.weight *= 2
    assert t5.fingerprint(llm) != expected


def test_a_folder_without_a_model_is_one_line(tmp_path):
    """load_llm names what it could not load."""
    with pytest.raises(common.UserError, match="expected a T5-family checkpoint"):
        t5.load_llm(str(tmp_path))


# ---------------------------------------------------------------------------------------------------------- teachers

def teach(folder, llm, group, units, *flags):
    """train_group for this group of teachers -> their weights as load_teachers reads them."""
    options = train_teacher.parser().parse_args(["--steps=3", "--lr=0.001", "--tasks=1", "--instances=2", "--rank=2", "--alpha=4",
                                                 "--device=cpu", "--max-output=8", *flags])
    record = vars(options) | {"llm_fingerprint": "print"}
    folder.mkdir(exist_ok=True)
    llm.requires_grad_(False)
    lora.inject_lora(llm, ["q", "v"], options.rank, options.alpha)
    run = mock.Mock(folder=str(folder), options=options, rank=0, stop=mock.Mock(asked=0), record=lambda: record)
    assert train_teacher.train_group(run, llm, make_tokenizer(), 0, group, units, {}) == []
    return load_teachers(str(folder), group, llm, record, "")


@pytest.mark.parametrize("kind", KINDS)
def test_training_teachers_leaves_the_base_untouched(kind, tasks, tmp_path):
    """Every weight of the LLM is bit-identical afterwards, no gradient and no teacher is left on it; the teachers moved."""
    llm = make_llm(kind)
    before = {name: p.clone() for name, p in llm.state_dict().items()}
    weights = teach(tmp_path, llm, ["one", "two"], {"one": [tasks[0], tasks[2]], "two": [tasks[1]]})
    assert all(w.lora_A is None and w.original is None for w in lora.sites(llm).values())
    assert all(p.grad is None for p in llm.parameters())
    lora.remove_lora(llm)
    after = llm.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[k], after[k]) for k in before)
    assert all((B[0] - B[1]).abs().max() > 1e-4 and B.abs().amax((1, 2)).min() > 1e-4 for _, B in weights.values())


@pytest.mark.parametrize("demos", ["0", "2"])
@pytest.mark.numbers
def test_a_teacher_in_a_group_is_the_teacher_trained_alone(demos, tasks, tmp_path):
    """Side by side or alone: the same examples, the same gradient, the same weights."""
    units = {t.name: [t] for t in tasks}
    group = teach(tmp_path / "group", make_llm("v1.1"), sorted(units), units, f"--demos={demos}")
    for n, unit in enumerate(sorted(units)):
        alone = teach(tmp_path / unit, make_llm("v1.1"), [unit], units, f"--demos={demos}")
        its = lora.flatten(lora.select(group, n))
        assert apart(lora.flatten(lora.select(alone, 0)), its, lr=1e-3) < 0.03


@pytest.mark.parametrize("more", [[], ["--bucket-steps=4"]])
@pytest.mark.numbers
def test_a_teacher_among_sixteen_is_the_teacher_trained_alone(tasks, tmp_path, more):
    """Twenty steps of AdamW at the paper's learning rate: gradients and moments never mix."""
    units = {f"unit{n:02}": [tasks[n % 3]] for n in range(16)}
    flags = ("--steps=20", "--accumulate=2", "--lr=1e-4", *more)
    group = teach(tmp_path / "group", make_llm("v1.1"), sorted(units), units, *flags)
    for n in (0, 7, 15):
        alone = teach(tmp_path / str(n), make_llm("v1.1"), [f"unit{n:02}"], units, *flags)
        its = lora.flatten(lora.select(group, n))
        assert apart(lora.flatten(lora.select(alone, 0)), its, lr=1e-4) < 0.03
    assert all((B[0] - B[15]).abs().max() > 1e-4 for _, B in group.values())


def test_a_missing_teacher_or_one_of_another_llm_rank_or_alpha_is_one_line(tasks, tmp_path):
    """load_teachers names the folder and the command, or what does not fit."""
    llm, units = make_llm("v1.1"), {"one": [tasks[0]]}
    teach(tmp_path, llm, ["one"], units)
    expected = {"rank": 2, "alpha": 4, "llm_fingerprint": "print"}
    with pytest.raises(common.UserError, match="two.*no LoRA teacher for two; first run COMMAND"):
        load_teachers(str(tmp_path), ["one", "two"], llm, expected, "COMMAND")
    expected["llm_fingerprint"] = "other print"
    with pytest.raises(common.UserError, match="another LLM"):
        load_teachers(str(tmp_path), ["one"], llm, expected, "")
    expected |= {"llm_fingerprint": "print", "rank": 3}
    with pytest.raises(common.UserError, match="--rank 2, not 3.*COMMAND --fresh"):
        load_teachers(str(tmp_path), ["one"], llm, expected, "COMMAND")
    expected |= {"rank": 2, "alpha": 8}
    with pytest.raises(common.UserError, match="--alpha 4.0, not 8.*COMMAND --fresh"):
        load_teachers(str(tmp_path), ["one"], llm, expected, "COMMAND")


# -------------------------------------------------------------------------------------------------------------- texts

def test_prompt_is_the_official_encoding():
    """Character by character as Tk-Instruct's ni_collator writes definition, two positive examples and instance."""
    assert data.prompt_text("Say it. Loudly", [("a?", "b"), ("c ", "d!")], " e\n") == (
        "Definition: Say it. Loudly.\n\n"
        " Positive Example 1 -\nInput: a?\n Output: b.\n\n"
        " Positive Example 2 -\nInput: c.\n Output: d!\n\n"
        "Now complete the following example -\nInput: e.\nOutput: ")
    assert data.prompt_text("", [], "e") == data.instance_text("e") == "Input: e.\nOutput: "
    assert data.instruction_text("Say it", [("a", "b")]) == (
        "Definition: Say it.\n\n Positive Example 1 -\nInput: a.\n Output: b.\n\n")
    assert data.instruction_text("", []) == ""


@pytest.mark.parametrize("instance", [(), ("cat",)], ids=["instruction", "prompt"])
def test_a_demonstration_that_does_not_fit_is_left_out_whole(instance):
    """One token too few drops the last demonstration, with what comes after it, and cuts nothing."""
    tokenizer = make_tokenizer()
    demos = [("a", "b"), ("c c c c", "d"), ("e", "f")]

    def ids(n):
        text = data.prompt_text("upper", demos[:n], *instance) if instance else data.instruction_text("upper", demos[:n])
        return tokenizer(text)["input_ids"]

    with warnings.catch_warnings():
        warnings.simplefilter("error")                                  # nothing is cut
        for n in (3, 2, 1, 0):
            for limit in (len(ids(n)), len(ids(n + 1)) - 1) if n < 3 else (len(ids(3)),):
                rows, mask = data.tokenize_instructed(tokenizer, [("upper", demos, *instance)], limit)
                assert rows[0].tolist() == ids(n) and mask.all()
    data._warned.clear()
    with pytest.warns(UserWarning, match="cut to the limit of 3"):
        rows, _ = data.tokenize_instructed(tokenizer, [("upper", demos, *instance)], 3)
    assert rows[0].tolist() == ids(0)[:2] + [1]


def test_texts_are_padded_right_and_labels_ignore_padding():
    """Ids with mask, labels with IGNORE; a text over the limit is cut before its end token with one warning a limit."""
    tokenizer = make_tokenizer()
    ids, mask = data.tokenize(tokenizer, ["cat", "cat dog red"], 9)
    assert ids.tolist() == [[54, 1, 0, 0], [54, 55, 56, 1]] and mask.tolist() == [[1, 1, 0, 0], [1, 1, 1, 1]]
    assert data.labels(tokenizer, ["cat", "cat dog red"], 9).tolist() == [[54, 1, -100, -100], [54, 55, 56, 1]]
    data._warned.clear()
    with pytest.warns(UserWarning, match="a text of 4 tokens was cut to the limit of 3"):
        assert data.tokenize(tokenizer, ["cat", "cat dog red"], 3)[0].tolist() == [[54, 1, 0], [54, 55, 1]]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        data.tokenize(tokenizer, ["cat dog red"], 3)


# ------------------------------------------------------------------------------------------------------------ batches

def test_draws_are_a_pure_function_of_their_key(tasks):
    """The same (seed, step, micro-batch) draws the same, another one something else; pairs are the task's own."""
    def drawn(*key, n=2, instances=3, demos="mixed"):
        n_demos = data.n_demonstrations(demos, *key[:2])
        return data.draw_tasks(tasks, data.rng_of(*key), n, instances, n_demos)

    assert drawn(0, 1, 2) == drawn(0, 1, 2)
    assert len({str(drawn(*key)) for key in [(0, 1, 2), (1, 1, 2), (0, 2, 2), (0, 1, 3), (0, 2, 1)]}) == 5
    for step in range(20):
        for d in drawn(0, step, 0):
            assert d.definition in d.task.definitions and len(set(d.pairs)) > 1
            assert set(d.pairs) <= {(i.input, i.outputs[0]) for i in d.task.instances}
    assert len({d.task.name for d in drawn(0, 0, 0, n=3, demos="0")}) == 3                 # without replacement while it lasts
    assert len(drawn(0, 0, 0, n=5, demos="2")) == 5 and len(drawn(0, 0, 0, instances=9)[0].pairs) == 9
    counts = [{len(d.demonstrations) for d in drawn(0, s, 0)} for s in range(100)]
    assert all(len(c) == 1 for c in counts) and 20 < sum(c == {2} for c in counts) < 80


@pytest.mark.parametrize("window, n_micro", [(0, 2), (1, 1), (1, 3), (4, 2)])
def test_length_buckets_hold_every_item_once_with_little_padding(window, n_micro):
    """A step of a window of one keeps its own items; in larger ones steps of all lengths come in random order."""
    def draws(step, micro):
        return ["x" * n for n in data.rng_of(0, step, micro).integers(1, 100, size=5)]

    def padding(deal):
        batches = [deal(step, micro) for step in range(8) for micro in range(n_micro)]
        return sum(len(batch) * max(map(len, batch)) - sum(map(len, batch)) for batch in batches)

    deal = data.by_length(draws, window, 0, n_micro)
    if window == 0:
        assert deal is draws
        return
    for first in range(0, 8, window):
        dealt, drawn = ([x for step in range(first, first + window) for micro in range(n_micro) for x in of(step, micro)]
                        for of in (deal, draws))
        assert sorted(dealt) == sorted(drawn)
    assert window * n_micro == 1 or padding(deal) < 0.7 * padding(draws)
    assert data.by_length(draws, window, 0, n_micro)(5, 0) == deal(5, 0)                    # a resumed run's
    firsts = [len(deal(step, 0)[0]) for step in range(8)]
    assert window == 1 or firsts[:4] != sorted(firsts[:4]) or firsts[4:] != sorted(firsts[4:])
    ranks = [sorted(len(x) for x in deal(5, micro)) for micro in range(n_micro)]
    assert all(a[-1] <= b[0] for a, b in zip(ranks, ranks[1:]))                           # neighbours in length run together


@pytest.mark.parametrize("length, parts, limit", [(3, 3, 50), (10, 3, 50), (40, 3, 12), (40, 2, 40), (5, 2, 2)])
def test_document_is_cut_into_pieces_that_join_to_a_window(length, parts, limit):
    """No piece is empty, nothing is lost or repeated, every window can come, and cuts vary."""
    ids, seen = list(range(length)), set()

    def tokenizer(texts, add_special_tokens):
        return {"input_ids": [ids for _ in texts]}

    for step in range(60):
        pieces, again = data.cut_documents(["text"] * 2, tokenizer, parts, limit, data.rng_of(0, step))
        assert list(map(len, pieces)) == list(map(len, again))          # one place to cut, the same for the whole batch
        window = [i for piece in pieces for i in piece]
        assert len(pieces) == parts and all(pieces) and len(window) == min(length, limit)
        assert window == ids[window[0]:window[0] + len(window)]
        seen.add(tuple(map(len, pieces)))
    assert len(seen) > 1 or min(length, limit) == parts


def test_varied_demonstrations_are_other_instances_of_the_task(tasks):
    """With vary, demonstrations come from the task's instances and never hold the instance that is asked."""
    task = tasks[0]
    task = data.Task(task.name, task.category, task.definitions, task.demonstrations,
                     [data.Instance(str(i), f"in {i}", [f"out {i}"]) for i in range(4)])
    for step in range(20):
        drawn = data.draw_task(task, data.rng_of(0, step), 1, 2, vary=True)
        assert len(drawn.demonstrations) == 2 and len(drawn.pairs) == 1 and drawn.pairs[0] not in drawn.demonstrations


def test_teacher_of_names_category_task_or_all(tasks):
    """What a LoRA teacher is for."""
    assert [data.teacher_of(tasks[1], unit) for unit in ("category", "task", "all")] == ["two", "task1", "all"]


# -------------------------------------------------------------------------------------------------------- SNI's layout

@pytest.fixture
def sni(tmp_path):
    """write(record) puts one task into a folder in SNI's layout and returns the folder."""
    (tmp_path / "tasks").mkdir(), (tmp_path / "splits/default").mkdir(parents=True)
    (tmp_path / "splits/default/test_tasks.txt").write_text("task1\n")

    def write(record):
        (tmp_path / "tasks/task1.json").write_text(record if isinstance(record, str) else json.dumps(record))
        return str(tmp_path)
    return write


GOOD = {"Definition": [" Say it. ", "Tell"], "Categories": ["Saying"],
        "Positive Examples": [{"input": "p", "output": "q", "explanation": ""}],
        "Instances": [{"id": f"x{n}", "input": f"in{n}", "output": [f"out{n}", "alt"]} for n in range(5)]}


def test_load_sni_reads_the_official_layout(sni):
    """Definitions, category, demonstrations and the instances skip : skip + max, with all their references."""
    task, = data.load_sni(sni(GOOD), "test", 2, skip=1)
    assert task == data.Task("task1", "Saying", ["Say it.", "Tell"], [("p", "q")],
                             [data.Instance("x1", "in1", ["out1", "alt"]), data.Instance("x2", "in2", ["out2", "alt"])])
    assert [len(data.load_sni(sni(GOOD), "test", n)[0].instances) for n in (None, 100, 3)] == [5, 5, 3]
    task, = data.load_sni(sni(GOOD | {"Definition": "Say it.", "Instances": [{"input": "a", "output": "b"}]}))
    assert task.definitions == ["Say it."] and task.instances[0].outputs == ["b"]


@pytest.mark.parametrize("record, message", [
    ('{"Definition":\n oops', "line 2"), (GOOD | {"Definition": []}, "no Definition"),
    (GOOD | {"Definition": ["  "]}, "no Definition"),
    (GOOD | {"Instances": [{"input": "a", "output": ["b"]}, {"input": "a", "output": []}]}, "instance 1 has no"),
    (GOOD | {"Instances": [{"output": ["b"]}]}, "instance 0 has no")])
def test_broken_task_files_are_one_line_that_names_the_file(sni, record, message):
    """What is wrong, and where."""
    with pytest.raises(common.UserError, match=f"task1.json.*{message}"):
        data.load_sni(sni(record))


def test_missing_folders_splits_and_files_are_one_line(sni, tmp_path):
    """Each names the path that is missing."""
    root = sni(GOOD)
    with pytest.raises(common.UserError, match="nowhere.*no such file"):
        data.load_sni(f"{root}/nowhere")
    with pytest.raises(common.UserError, match="train_tasks.txt"):
        data.load_sni(root, "train")
    (tmp_path / "splits/default/test_tasks.txt").write_text("task1\ntask2\n")
    with pytest.raises(common.UserError, match="task2.json"):
        data.load_sni(root)
    (tmp_path / "splits/default/test_tasks.txt").write_text("\n")
    with pytest.raises(common.UserError, match="is empty"):
        data.load_sni(root)


def test_documents_are_lines_of_text_or_of_json(tmp_path):
    """Both forms give the same; short lines are left out; a bad line is named."""
    lines = ["cat dog red", "", "cat", "blue dog cat dog"]
    (tmp_path / "a.txt").write_text("\n".join(lines))
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({"text": line}) for line in lines if line))
    text, records = (read_documents(str(tmp_path / f)) for f in ("a.txt", "a.jsonl"))
    assert text == records == [lines[0], lines[3]]
    (tmp_path / "a.jsonl").write_text('{"text": "cat"}\n{"txt": "cat"}')
    with pytest.raises(common.UserError, match="a.jsonl, line 2"):
        read_documents(str(tmp_path / "a.jsonl"))
    (tmp_path / "a.txt").write_text("cat\n")
    with pytest.raises(common.UserError, match="no document"):
        read_documents(str(tmp_path / "a.txt"))


# ------------------------------------------------------------------------------------------------------------ metrics

def test_exact_match_golden_values():
    """As the official script: lower-cased, ASCII punctuation gone, white space folded; strict: white space alone."""
    for prediction, references, official, strict in [
            (" a  b\n", ["x", "a b"], 1, 1), ("A b.", ["a b"], 1, 0), ("a", ["a b"], 0, 0), ("( a )", ["[ a ]"], 1, 0),
            ("don't", ["dont"], 1, 0), ("a–b", ["ab"], 0, 0), ("", ["."], 1, 0), ("a-b", ["a b"], 0, 0)]:
        assert report.exact_match(prediction, references) == official
        assert report.exact_match(prediction, references, strict=True) == strict


def test_score_means_over_instances_by_category_and_by_task(tasks):
    """Exact match x 100 of a row whose first task is all right, by hand; categories hold two tasks and one."""
    records = [{"task": t.name, "category": t.category, "references": x.outputs,
                "prediction": x.outputs[0].upper() if t is tasks[0] else "wrong"} for t in tasks for x in t.instances]
    result = report.score("row", 0, records, strict=False)
    assert result["exact_match"] == result["rouge_l"] == pytest.approx(100 / 3)
    assert result["by_category"]["exact_match"] == result["by_category"]["rouge_l"] == {"one": 50.0, "two": 0.0}
    assert result["by_task"]["exact_match"] == {"task0": 100.0, "task1": 0.0, "task2": 0.0}
    assert (result["tasks"], result["instances"]) == (3, 12)
    assert report.score("row", 0, records, strict=True)["exact_match"] == 0


def test_bootstrap_interval_is_over_tasks():
    """Certain where tasks agree, however much instances differ; else about 1.96 standard errors of the tasks' mean."""
    owner = np.repeat(np.arange(50), 4)
    within = np.tile([0.0, 100.0, 0.0, 100.0], 50)
    assert report.bootstrap_interval(within, owner) == [50.0, 50.0]
    between = np.repeat(np.random.default_rng(0).normal(50, 10, 50), 4)
    low, high = report.bootstrap_interval(between, owner)
    error = between[::4].std() / 50 ** 0.5
    assert low < between.mean() < high and high - low == pytest.approx(2 * 1.96 * error, rel=0.1)
    assert report.bootstrap_interval(between, owner) == [low, high]
    uneven = np.array([1.0] * 9 + [0.0])                               # two tasks: only 9 of 9, 9 of 10, 0 of 1 can be drawn
    assert report.bootstrap_interval(uneven, np.array([0] * 9 + [1])) == [0.0, 1.0]


def test_a_difference_between_rows_is_paired_by_task_and_counts_instances():
    def answers(task, n, right):
        return [{"task": task, "category": "c", "prediction": "yes" if k < right else "no", "references": ["yes"]}
                for k in range(n)]
    first = answers("a", 30, 20) + answers("b", 10, 9)
    second = answers("a", 30, 10) + answers("b", 10, 9)
    one, other = (report.score("x", 0, rows, strict=True) for rows in (first, second))
    mean, (low, high) = report.difference(one, other, "exact_match")
    assert abs(mean - (one["exact_match"] - other["exact_match"])) < 1e-9 and abs(mean - 25) < 1e-9
    assert abs(low - 0) < 1e-9 and abs(high - 100 / 3) < 1e-9            # only b drawn, only a drawn
    results = {"bench": "sni", "split": "test", "results": [one | {"key": "meta", "row": "M"}, other | {
        "key": "meta_shuffled", "row": "S"}]}
    assert "| M − S | +25.0 | +0.0 – +33.3 | +25.0 | +0.0 – +33.3 |" in report.difference_table(results)
    assert report.difference_table(results | {"results": [one | {"key": "meta"}]}) == ""


def test_the_ablation_table_pairs_by_seed_and_calls_a_difference_noise_where_its_interval_holds_zero():
    """Differences -10, -11, -12 are far from 0 (95 % half width 4.30 / sqrt 3); -10, 10, -3 are not."""
    def rows(*scores):
        return {demos: {seed: {"exact_match": x + demos} for seed, x in enumerate(scores)} for demos in (0, 2)}

    table = ablations.table({
        "TAGI, whole method": rows(80, 70, 90), "without pretraining": rows(70, 59, 78), "without L_kl": rows(70, 80, 87),
        "copy the input": rows(1, 2, 3)}, "exact_match", "test")
    lines = table.splitlines()
    assert "| TAGI, whole method | 80.0 ± 10.0 | 82.0 ± 10.0 |" in lines
    assert "| without pretraining | 69.0 ± 9.5 (-11.0 ± 2.5) | 71.0 ± 9.5 (-11.0 ± 2.5) |" in lines
    assert "| without L_kl | 79.0 ± 8.5 (-1.0 ± 25.2, noise) | 81.0 ± 8.5 (-1.0 ± 25.2, noise) |" in lines
    assert "| copy the input | 2.0 ± 1.0 | 4.0 ± 1.0 |" in lines


def test_the_ablation_table_of_one_or_two_seeds_pairs_by_task():
    def of_seed(*scores):
        return {"rouge_l": float(np.mean(scores)), "by_task": {"rouge_l": dict(enumerate(scores))}}

    def row(*scores):
        return {0: {0: of_seed(*scores)}}

    table = ablations.table({"TAGI, whole method": row(50, 60, 70, 20), "without L_kl": row(40, 45, 60, 5),
                             "without L_ins": row(60, 50, 75, 15)}, "rouge_l", "test")
    lines = table.splitlines()
    assert "over 1 seed;" in lines[0] and "| TAGI, whole method | 50.0 |" in lines
    assert "| without L_kl | 37.5 (-12.5, -15.0 – -10.0) |" in lines
    assert "| without L_ins | 50.0 (+0.0, -7.5 – +7.5, noise) |" in lines
    whole = {0: {0: of_seed(50, 60), 1: of_seed(30, 40)}}
    table = ablations.table({"TAGI, whole method": whole, "without L_kl": {0: {0: of_seed(40, 50), 1: of_seed(40, 40)}},
                             "without L_ins": {0: {1: of_seed(20, 20)}}}, "rouge_l", "test")
    lines = table.splitlines()
    assert "| TAGI, whole method | 45.0 ± 14.1 |" in lines
    assert "| without L_kl | 42.5 ± 3.5 (-2.5, -5.0 – +0.0, noise) |" in lines      # of the tasks 0 and -5
    assert "| without L_ins, 1 of 2 seeds | 20.0 (-15.0, -20.0 – -10.0) |" in lines


def test_a_shuffled_instruction_is_of_another_category(tasks):
    others = predictions.of_another_kind(tasks)
    assert all(a.category != b.category for a, b in zip(tasks, others))
    assert others == predictions.of_another_kind(tasks)
    same = [tasks[0], tasks[2]]                                 # of one category: any other task
    assert predictions.of_another_kind(same) == same[::-1]
