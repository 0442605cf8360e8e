"""P3: its tasks, rows and averages, and what a user types."""
import argparse
import json
import os
import random
import textwrap
import warnings
from collections import Counter
from pathlib import Path

import pytest
import yaml

pytest.register_assert_rewrite("stages")
pytest_plugins = ("stages",)
from stages import ROOT

import common
import config
import data
import evaluate
import train_hyper
import train_teacher
from bench import cost, curriculum, p3, report
from bench.predictions import of_another_kind
from hypernet import TAGI

P3 = Path(os.environ["TAGI_DATA"]) / "p3" if "TAGI_DATA" in os.environ else None
real_data = pytest.mark.skipif(
    P3 is None, reason="TAGI_DATA names no folder with P3's templates and rows")

SHARED_BY_LORA_ALL = ("steps", "tasks", "instances", "accumulate", "bucket_steps", "lr", "schedule",
                      "warmup", "demos", "vary_demos")
COPA = {"premise": "The sun rose.", "choice1": "It got warm.", "choice2": "It got dark.",
        "question": "effect", "label": 0}


def read_lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


# ---------------------------------------------------------------------------------------- real data

@real_data
def test_the_real_templates_are_t0s_and_render_on_the_real_rows():
    """T0 evaluates with those for the original task by accuracy; COPA's ask by kind of question."""
    found = p3.load_templates(str(P3 / "templates"))
    listed = yaml.safe_load((P3 / "t0_eval_templates.yaml").read_text())
    assert set(listed) == set(p3.TEST.values())
    for dataset, names in listed.items():
        assert sorted(names) == sorted(t.name for t in found[dataset] if t.for_evaluation)
    tasks = {t.name: t for t in data.load_p3(str(P3))}
    categories = Counter(t.category for t in tasks.values())
    assert categories == {"cb": 15, "copa": 12, "rte": 10, "winogrande": 5}
    sizes = {name: len(t.instances) for name, t in tasks.items()}
    assert sizes["rte: must be true"] == 277 and sizes["winogrande: Replace"] == 1267
    of_causes, of_effects = sizes["copa: …why? C1 or C2"], sizes["copa: …As a result, C1 or C2?"]
    assert of_causes + of_effects == 100 == sizes["copa: choose"]
    rows, task = read_lines(P3 / "rte/validation.jsonl"), tasks["rte: guaranteed true"]
    for row, x in zip(rows, task.instances, strict=True):
        premise, hypothesis = row["premise"], row["hypothesis"]
        assert x.prompt == f'Given {premise} Is it guaranteed true that "{hypothesis}"? Yes or no?'
        assert x.outputs == ["No" if row["label"] == "not_entailment" else "Yes"]
        assert x.choices == ("Yes", "No")
        assert x.input == " ".join(f"premise: {premise} hypothesis: {hypothesis}".split())


@real_data
def test_prompted_training_rows_find_their_template_by_name():
    """35 of the 36 data sets (trec's completions are empty there), none of which is held out."""
    found = p3.load_templates(str(P3 / "templates"))
    tasks = {t.name: t for t in data.load_p3(str(P3), "train", 1000)}
    assert len(p3.TRAIN) == 36 and set(p3.TRAIN) <= found.keys()
    assert {t.category for t in tasks.values()} == set(p3.TRAIN) - {"trec"} and len(tasks) == 271
    for task in tasks.values():
        for x in task.instances:
            assert x.prompt == x.input and x.outputs[0] and "<|endoftext|>" not in x.outputs[0]
    classify = tasks["ag_news: classify"]
    assert classify.definitions[0].startswith("text") and len(classify.instances) == 50
    assert not p3.held_out_names(list(p3.TRAIN))


@real_data
def test_sni_training_tasks_of_held_out_data_sets_are_warned_of(monkeypatch):
    monkeypatch.setattr(data, "_warned", set())
    options = argparse.Namespace(data=str(P3.parent / "sni"), max_instances=1, allow_missing=False,
                                 categories=0, format="sni")
    with pytest.warns(UserWarning, match="17 training tasks are named after data sets that P3 "
                                         "holds out.*task"):
        data.training_tasks(options)


# ----------------------------------------------------------------------------------- a miniature P3

REVIEW = "Sentiment with choices "                          # promptsource's names may end so
TEMPLATES = {                                               # data set -> (name, jinja, choices), ..
    "imdb": [
        ("Reviewer Enjoyment",
         "{{text}} How does the reviewer feel? ||| {{answer_choices[label]}}",
         "They didn't like it ||| They loved it"),
        (REVIEW, "{{text}} This is definitely not a ||| {{answer_choices[1-label]}} review.",
         "negative ||| positive")],
    "ag_news": [
        ("classify", "{{text}} Which kind? ||| {{answer_choices[label]}}", "World ||| Sports")],
    "super_glue/rte": [
        ("can we infer",
         'Suppose {{premise}} Can we infer that "{{hypothesis}}"? ||| {% if label != -1 %}'
         "{{answer_choices[label]}}{% endif %}", "Yes ||| No"),
        ("not for evaluation", "{{premise}} ||| {{hypothesis}}", None)],
    "super_glue/copa": [
        ("choose",
         '{{premise}} {% if question == "cause" %}because...{% else %}so...{% endif %} {{choice1}} '
         "{{choice2}} ||| {{answer_choices[label]}}", "{{choice1}} ||| {{choice2}}"),
        ("why",
         '{% if question == "cause" %}{{premise}} Why? {{choice1}} or {{choice2}}? ||| '
         "{{answer_choices[label]}}{% endif %}", "{{choice1}} ||| {{choice2}}")],
}


def write_p3(root: Path) -> Path:
    for dataset, records in TEMPLATES.items():
        folder = root / "templates" / dataset
        folder.mkdir(parents=True)
        text = f"dataset: {dataset}\ntemplates:\n"
        for n, (name, jinja, choices) in enumerate(records):
            evaluates = name != "not for evaluation"
            text += textwrap.indent(
                f"id{n}: !Template\n  name: {json.dumps(name)}\n  jinja: {json.dumps(jinja)}\n"
                f"  answer_choices: {json.dumps(choices)}\n  metadata: !TemplateMetadata\n"
                f"    original_task: {str(evaluates).lower()}\n    metrics:\n    - Accuracy\n",
                "  ")
        (folder / "templates.yaml").write_text(text)
    rng = random.Random(0)
    reviews = [{"text": f"Anna went to Paris {n} .", "label": n % 2} for n in range(12)]
    rte = [{"premise": f"Tom saw a dog {n} .", "hypothesis": "Tom saw a cat .", "idx": n,
            "label": rng.choice(["entailment", "not_entailment"])} for n in range(9)]
    copa = [COPA | {"question": ["cause", "effect"][n % 2], "label": n // 2 % 2} for n in range(8)]
    news = [{"prompt": f"A dog ran {n} . Which kind?", "completion": "Sports<|endoftext|>"}
            for n in range(9)]
    rows = {"imdb/train": reviews, "rte/validation": rte, "super_glue/copa/validation": copa,
            "prompted/ag_news_classify": news}
    for name, lines in rows.items():
        path = root / (name + ".jsonl")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return root


@pytest.fixture
def small_p3(tmp_path):
    return write_p3(tmp_path / "p3")


def test_the_same_rows_in_two_places_are_refused(small_p3):
    split, other = small_p3 / "rte/validation.jsonl", small_p3 / "super_glue/rte/validation.jsonl"
    other.parent.mkdir(parents=True, exist_ok=True)
    other.symlink_to(split)                                     # the same file twice is one
    assert data.load_p3(str(small_p3), "test")
    other.unlink()
    other.write_text(split.read_text())
    with pytest.raises(common.UserError, match="are for the same rows; keep one"):
        data.load_p3(str(small_p3), "test")


def test_training_tasks_that_are_test_tasks_are_warned_of(tmp_path):
    (tmp_path / "test.txt").write_text("task1_a\ntask2_b\n")
    with pytest.warns(UserWarning, match="1 training tasks are test tasks too .task2_b"):
        p3.warn_of_leaks(["task2_b", "task3_c"], str(tmp_path / "test.txt"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        p3.warn_of_leaks(["task3_c"], str(tmp_path / "test.txt"))
        p3.warn_of_leaks(["task3_c"], str(tmp_path / "none.txt"))


def test_both_splits_load_from_raw_and_prompted_rows(small_p3):
    root = str(small_p3)
    test = {t.name: t for t in data.load_p3(root)}
    sizes = {name: len(t.instances) for name, t in test.items()}
    assert sizes == {"copa: choose": 8, "copa: why": 4, "rte: can we infer": 9}
    x = test["rte: can we infer"].instances[0]
    assert x.prompt == 'Suppose Tom saw a dog 0 . Can we infer that "Tom saw a cat ."?'
    assert x.choices == ("Yes", "No") and x.outputs == ["No"]
    assert x.input == "premise: Tom saw a dog 0 . hypothesis: Tom saw a cat ."
    assert data.load_p3(root, p3_input="prompt")[2].instances[0].input == x.prompt
    # nothing is put around the texts
    assert all(t.verbatim for t in test.values())
    assert data.instance_text(x.input, verbatim=True) == x.input
    assert data.prompt_text("d", [], x.prompt, verbatim=True) == x.prompt
    train = {t.name: t for t in data.load_p3(root, "train", 5)}
    sizes = {name: len(t.instances) for name, t in train.items()}
    assert sizes == {"imdb: Reviewer Enjoyment": 5, f"imdb: {REVIEW}": 5, "ag_news: classify": 5}
    assert train[f"imdb: {REVIEW}"].instances[1].outputs == ["negative review."]
    assert train["ag_news: classify"].category == "ag_news"
    assert train["ag_news: classify"].instances[0].outputs == ["Sports"]
    skipped = data.load_p3(root, "train", 3, skip=5)[0].instances
    assert [x.id for x in skipped] == ["ag_news-5", "ag_news-6", "ag_news-7"]


def test_a_template_that_promptsource_does_not_have_is_read_as_its_prompt(small_p3):
    tasks = {t.name: t for t in data.load_p3(str(small_p3))}
    for x in tasks["copa: why"].instances:
        assert x.input == x.prompt
    for x in tasks["copa: choose"].instances:
        assert x.input.startswith("premise: The sun rose. question: ") and x.input != x.prompt


@pytest.mark.parametrize("name, row, label", [
    ("rte", {"label": "not_entailment"}, 1), ("rte", {"label": 0}, 0),
    ("cb", {"label": "neutral"}, 2), ("cb", {"label": "contradiction"}, 1),
    ("anli_r2", {"label": "n"}, 1), ("anli_r1", {"label": "contradiction"}, 2),
    ("wic", {"label": True}, 1), ("wic", {"label": "false"}, 0),
    ("wsc", {"label": False}, 0), ("hellaswag", {"label": "3"}, 3), ("copa", {"label": 1}, 1),
    ("social_i_qa", {"label": "2"}, "2")])
def test_labels_in_the_forms_that_data_sets_come_in(name, row, label):
    assert p3.with_plain_label(name, row, "") == {"label": label}


@pytest.mark.parametrize("name, row", [
    ("winogrande", {"answer": ""}), ("hellaswag", {"label": ""}), ("copa", {"label": -1}),
    ("rte", {}), ("story_cloze", {"answer_right_ending": None})])
def test_hidden_labels_are_refused(name, row):
    with pytest.raises(common.UserError, match="row 4.*validation split"):
        p3.with_plain_label(name, row, "x.jsonl, row 4")


def test_winograd_spans_of_superglues_own_files_become_fields():
    spans = {"span1_text": "a", "span2_text": "b"}
    row = p3.with_plain_label("wsc", {"text": "t", "target": spans, "label": True}, "")
    assert row["span1_text"] == "a" and row["label"] == 1


def edit_row(path, **changes):
    rows = read_lines(path)
    rows[3] = {k: v for k, v in (rows[3] | changes).items() if v is not None}
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def edit_rte(**changes):
    return lambda root: edit_row(root / "rte/validation.jsonl", **changes)


def replace(dataset, old, new):
    def damage(root):
        path = root / "templates" / dataset / "templates.yaml"
        assert old in path.read_text()
        path.write_text(path.read_text().replace(old, new))
    return damage


def write(name, text):
    return lambda root: (root / name).write_text(text)


def remove(pattern):
    return lambda root: [path.unlink() for path in root.glob(pattern)]


RTE, INFER, IMDB = "super_glue/rte", "can we infer", "imdb/templates.yaml"
BROKEN = {                                                  # what -> (how, what the line names)
    "missing field": (edit_rte(hypothesis=None), [RTE, INFER, "row 3", "hypothesis"]),
    "label outside": (edit_rte(label=5), ["rte/validation.jsonl, line 4", "row 3", "5", "0 to 1"]),
    "unknown label": (edit_rte(label="maybe"), ["rte/validation.jsonl", "row 3", "maybe"]),
    "hidden label": (edit_rte(label=-1), ["rte/validation.jsonl", "row 3", "validation split"]),
    "answer no choice": (replace(RTE, "{{answer_choices[label]}}", "Perhaps"),
                         [INFER, "row 0", "Perhaps"]),
    "broken template": (replace(RTE, "{{premise}}", "{{premise"), [RTE, INFER]),
    "failing template": (replace(RTE, "{{premise}}", "{{premise.nothing}}"),
                         [RTE, INFER, "row 0"]),
    "no JSON lines": (write("rte/validation.jsonl", '{"premise":\n'),
                      ["rte/validation.jsonl, line 1"]),
    "no YAML": (write(f"templates/{IMDB}", "a: ["), [IMDB]),
    "an empty YAML": (write(f"templates/{IMDB}", ""), [IMDB, "templates:"]),
    "a list of templates": (write(f"templates/{IMDB}", "templates: [a]"), [IMDB]),
    "a template without a name": (replace("imdb", '  name: "Sent', '  nam: "Sent'),
                                  [IMDB, "name"]),
    "no templates": (remove("templates/**/*.yaml"), ["templates", "promptsource"]),
    "no rows": (remove("**/validation.jsonl"), ["rte/validation.jsonl"]),
}


@pytest.mark.parametrize("case", BROKEN)
def test_bad_input_to_p3_is_one_line_with_data_set_template_and_row(small_p3, case):
    damage, named = BROKEN[case]
    damage(small_p3)
    with pytest.raises(common.UserError) as error:
        data.load_p3(str(small_p3))
    line = str(error.value)
    assert "\n" not in line and all(word in line for word in named), line


# ----------------------------------------------------------------------------------------- averages

def test_averages_are_the_papers():
    """Its Table 10 by task gives its Table 3: 58.9 over 11, 59.8 over HyperT5's 8, where ANLI is
    one."""
    published = yaml.safe_load((ROOT / "configs/paper_results.yaml").read_text())["p3"]
    by_template = {}
    for task, x in published["tagi_xl_t5_lm_by_task"].items():
        by_template |= {f"{task}: a": x - 1, f"{task}: b": x, f"{task}: c": x + 1}
    found = p3.summarize(by_template)
    for average, key in (("MTest11", "mtest11"), ("HyperT5", "hypert5")):
        expected = published[key]["tagi"]["t5_lm"][2]
        assert round(found["averages"][average]["mean"], 1) == expected
    assert found["tasks"]["rte"] == pytest.approx(
        {"mean": 76.6, "median": 76.6, "min": 75.6, "max": 77.6, "templates": 3})
    part = p3.summarize({"rte: a": 50.0, "anli_r1: a": 30.0, "story_cloze: a": 90.0})["averages"]
    assert part == {"MTest11": {"mean": pytest.approx(170 / 3), "over": 3, "of": 11},
                    "HyperT5": {"mean": 50.0, "over": 1, "of": 8}}


# -------------------------------------------------------------------------------- what a user types

@pytest.fixture
def p3_project(project, small_p3, monkeypatch):
    """LoRA teachers, student and a config for the miniature P3, on the LLM of the tests' suite."""
    options = yaml.safe_load(project.config.read_text()) | {
        "data": str(small_p3), "format": "p3", "demos": 0, "vary_demos": False,
        "llm": str(project.runs / "meta")}                  # of other training tasks
    own = small_p3.parent / "p3.yaml"
    own.write_text(yaml.safe_dump(options))
    project.config, project.data_of_p3 = own, small_p3
    for stage in ("lora", "lora-all", "finetune"):
        project.run(stage, "--fresh", "--no-pretrained" if stage == "finetune" else "--tasks=2")
    for module, name, n in ((cost, "COST_TASKS", 1), (cost, "COST_P3_ROWS", 2),
                            (evaluate, "COST_REPEATS", 1)):
        monkeypatch.setattr(module, name, n)
    return project


def test_p3_is_trained_on_and_evaluated_with_its_controls(p3_project):
    teachers = p3_project.runs.glob("lora/*/model.safetensors")
    assert sorted(path.parent.name for path in teachers) == ["ag_news", "imdb"]
    out = p3_project.run("evaluate", "--bench=p3")
    found = json.loads((p3_project.runs / "evaluate/results.json").read_text())
    assert [r["key"] for r in found["results"]] == [
        "tagi", "tagi_shuffled", "tagi_empty", "meta", "meta_lora", "no_finetuning",
        "no_instruction"]
    path = p3_project.runs / "evaluate/predictions.jsonl"
    predictions = read_lines(path)
    for r in found["results"]:
        mine = [p for p in predictions if p["row"] == r["row"]]
        accuracies = r["by_task"]["exact_match"]
        assert len(mine) == 21
        assert set(accuracies) == {"copa: choose", "copa: why", "rte: can we infer"}
        for name, accuracy in accuracies.items():
            right = [p["prediction"] == p["references"][0] for p in mine if p["task"] == name]
            assert accuracy == pytest.approx(100 * sum(right) / len(right))
    assert "over 2 of 11" in out and "over 2 of 8" in out and "No rows for anli_r1" in out
    assert "ms a row at batch size 1" in out
    of_rte = {p["prediction"] for p in predictions if p["task"].startswith("rte")}
    assert of_rte <= {"Yes", "No"}
    before = path.read_text()
    p3_project.run("evaluate", "--bench=p3", "--batch-size=3")          # all there: read again
    assert path.read_text() == before


def test_teachers_read_the_prompt_and_the_student_the_fields(p3_project):
    options = config.parse(train_hyper.parser(), "finetune", p3_project.argv("finetune"))
    tagi = TAGI.load(str(p3_project.runs / "finetune"))
    tasks = data.training_tasks(options)
    get_batch, teachers = train_hyper.finetune_batches(options, tagi, 1, tasks)
    batch = get_batch(0, 0)
    assert teachers == ["ag_news", "imdb"]
    texts = {key: tagi.tokenizer.batch_decode(batch[key][0], skip_special_tokens=True)
             for key in ("instruction", "input", "prompt")}
    assert any(text.startswith("text") for text in texts["instruction"])
    assert not any("Definition" in text for text in texts["instruction"])
    for text, prompt in zip(texts["input"], texts["prompt"]):
        assert (text == prompt) == ("kind" in text) and "Input:" not in text + prompt


def test_a_model_trained_on_one_format_is_not_tested_on_the_other(p3_project, finished):
    assert "--format p3" in p3_project.refuses("evaluate", "--bench=sample")
    assert "--format sni" in p3_project.refuses("evaluate", "--bench=p3", "--format=sni")


def test_own_choices_are_ranked_from_python(p3_project):
    """As the README shows it."""
    tagi = TAGI.load(str(p3_project.runs / "finetune"))
    scores = tagi.score_choices(["premise: A cat sat ."], [["Yes", "No", "Maybe so"]],
                                tagi.adapt(["Is it so ?"]))
    assert len(scores) == 1 and len(scores[0]) == 3 and all(x < 0 for x in scores[0])
    with pytest.raises(common.UserError, match="input 1 is empty"):
        tagi.score_choices([" "], [["Yes"]], None)


def test_a_shuffled_instruction_is_of_another_kind_of_task():
    """ANLI's rounds, CB and RTE share their templates, so they are one kind."""
    def task(category, n):
        return data.Task(f"{category}: {n}", category, ["d"], [], [])

    sizes = {"cb": 15, "copa": 12}
    tasks = [task(name, n) for name in p3.TEST for n in range(sizes.get(name, 10))]
    nli = {"anli_r1", "anli_r2", "anli_r3", "cb", "rte"}
    givers = of_another_kind(tasks)
    assert len(givers) == len(tasks) and givers == of_another_kind(tasks)
    assert len({t.category for t in givers}) > 5
    for a, b in zip(tasks, givers):
        assert a.category != b.category and not {a.category, b.category} <= nli
    few = [task("cb", 0), task("rte", 1)]                   # of a single kind: any other task
    assert of_another_kind(few) == few[::-1]


def test_an_instance_without_its_instruction_is_p3s_fields_or_is_refused(p3_project, monkeypatch):
    """Where a curriculum leaves all instructions out, meta-training's inputs are the student's."""
    def texts(uninstructed):
        seen, tokenize = [], data.tokenize_instructed

        def noted(tokenizer, items, *rest):
            seen.extend(data.prompt_text(*item, verbatim=True) for item in items)
            return tokenize(tokenizer, items, *rest)

        with monkeypatch.context() as patch:
            patch.setattr(data, "tokenize_instructed", noted)
            patch.setattr(curriculum, "EASY_FIRST", 0)
            patch.setattr(curriculum, "UNINSTRUCTED", uninstructed)
            p3_project.run("meta", "--name=dropped", "--fresh", "--curriculum")
        return set(seen)

    tasks = data.load_p3(str(p3_project.data_of_p3), "train")
    instances = [x for t in tasks for x in t.instances]
    inputs, prompts = {x.input for x in instances}, {x.prompt for x in instances}
    dropped = texts(1)
    assert dropped <= inputs and dropped - prompts
    assert texts(0) <= prompts
    flags = ("--curriculum", "--p3-input=prompt")
    assert "--curriculum" in p3_project.refuses("meta", "--name=other", *flags)


def test_p3_has_a_test_split_and_rows_of_its_own(p3_project):
    line = p3_project.refuses("evaluate", "--bench=p3", "--split=validation")
    assert "train and test" in line
    for row in ("teachers", "copy_demo", "tagi_unseen_wording"):
        assert row in p3_project.refuses("evaluate", "--bench=p3", f"--rows=tagi,{row}")


@pytest.mark.parametrize("size, column", [
    ("base", 0), ("large", 1), ("xl", 2), ("xxl", None), ("v1.0 3B", None), ("v1.0 11B", None)])
def test_published_rows_are_those_of_the_models_size(size, column):
    """T5 v1.0's 3B and 11B have Large's width and layers."""
    from random_t5 import t5_config
    from transformers import T5Config
    v1_0 = {"v1.0 3B": (16384, 32), "v1.0 11B": (65536, 128)}
    if size in v1_0:
        d_ff, heads = v1_0[size]
        llm_config = T5Config(d_model=1024, d_kv=128, d_ff=d_ff, num_heads=heads, num_layers=24)
    else:
        llm_config = t5_config(size)
    rows = {r["row"]: r["mtest11"] for r in report.published_p3(llm_config)}
    if column is None:
        assert not rows
    else:
        assert rows["tagi, T5-LM"] == [45.6, 54.7, 58.9][column]
    assert column is not None or size == "xxl" or not report.published_sni(llm_config)


@pytest.mark.parametrize("size, lr, tasks, accumulate", [
    ("base", 1e-4, 8, 2), ("large", 1e-4, 4, 4), ("xl", 5e-5, 2, 4)])
def test_the_configs_hold_the_papers_table_6(size, lr, tasks, accumulate):
    path = f"--config={ROOT}/configs/p3-{size}.yaml"
    lora = config.parse(train_teacher.parser(), "lora", [path])
    finetune = config.parse(train_hyper.parser(), "finetune", [path])
    lora_all = config.parse(train_teacher.parser(), "lora_all", [path])
    assert all(vars(lora_all)[key] == vars(finetune)[key] for key in SHARED_BY_LORA_ALL)
    assert "lora-all" in train_teacher.stages_of([path])
    table = {"rank": 32, "targets": "q,v", "unit": "category", "format": "p3",
             "max_instances": 1000, "max_input": 512, "max_output": 64}
    for options in (lora, finetune):
        assert {key: vars(options)[key] for key in table} == table
    assert (finetune.lr, finetune.tasks, finetune.accumulate) == (lr, tasks, accumulate)
    assert (finetune.steps, finetune.schedule, finetune.warmup) == (20_000, "linear", 0.02)
    assert (finetune.lambda_kl, finetune.lambda_ins) == (5, "sigmoid")
