"""P3: templates rendered as promptsource does, rank classification, and what a user types."""
import argparse
import json
import os
import random
import textwrap
from collections import Counter
from pathlib import Path

import pytest
import torch
import yaml

pytest.register_assert_rewrite("stages")
pytest_plugins = ("stages",)
from conftest import KINDS, close, make_llm, make_random_tagi, make_tokenizer
from stages import ROOT

import bench
import common
import config
import data
import evaluate
import rank
import train_hyper
import train_teacher
from templates import Template, load_templates

P3 = Path(os.environ["TAGI_DATA"]) / "p3" if "TAGI_DATA" in os.environ else None
real_data = pytest.mark.skipif(P3 is None, reason="TAGI_DATA names no folder with P3's templates and rows")

SHARED_BY_LORA_ALL = ("steps", "tasks", "instances", "accumulate", "bucket_steps", "lr", "schedule",
                      "warmup", "demos", "vary_demos")
COPA = {"premise": "The sun rose.", "choice1": "It got warm.", "choice2": "It got dark.", "question": "effect", "label": 0}
RTE = {"premise": "A cat sat.", "hypothesis": "A cat stood.", "label": 1}


# --------------------------------------------------------------------------------------------------------- rendering

@pytest.mark.parametrize("template, row, rendered", [
    (Template("d", "fixed choices", '{{premise}} Is "{{hypothesis}}" so? ||| {% if label != -1 %}{{ answer_choices[label] }}{% endif %}',
              "Yes ||| No"), RTE, ('A cat sat. Is "A cat stood." so?', "No", ["Yes", "No"])),
    (Template("d", "choices per row, condition", '{{ premise }} {% if question == "cause" %} because... {% else %} so... {% endif %}\n'
              "- {{choice1}}\n- {{choice2}} ||| {{ answer_choices[label] }}", "{{choice1}} ||| {{choice2}}"), COPA,
     ("The sun rose.  so... \n- It got warm.\n- It got dark.", "It got warm.", ["It got warm.", "It got dark."])),
    (Template("d", "choices in the prompt", "{{premise}} {{ answer_choices | join(' or ') }}? ||| {{ answer_choices[label] }}",
              "Yes ||| Maybe ||| No"), RTE, ("A cat sat. Yes or Maybe or No?", "Maybe", ["Yes", "Maybe", "No"])),
    (Template("d", "1-based strings", "{{sentence}} ||| {{ answer_choices[answer | int - 1] }}", "{{a}} ||| {{b}}"),
     {"sentence": "x _ y", "a": "Ann", "b": "Bo", "answer": "2"}, ("x _ y", "Bo", ["Ann", "Bo"])),
    (Template("d", "loop, zip, open-ended", "{% for k, v in zip(keys, values) %}{{k}}={{v}};{% endfor %} ||| {{target}}"),
     {"keys": ["a", "b"], "values": [1, 2], "target": " t "}, ("a=1;b=2;", "t", [])),
    (Template("d", "most frequent", "{{ votes | most_frequent | join(',') }} ||| {{ votes[0] }}"), {"votes": list("abcab")}, ("a,b", "a", [])),
    (Template("d", "pipes in the row", "{{text}}! ||| {{text}}", "{{text}} ||| b"), {"text": "a|||c"}, ("a|||c!", "a|||c", ["a|||c", "b"])),
    (Template("d", "three pieces", "{{premise}} ||| {{hypothesis}} ||| {{label}}"), RTE, None),
    (Template("d", "another kind of row", '{% if question == "cause" %}{{premise}} ||| {{choice1}}{% endif %}'), COPA, None),
    (Template("d", "hidden label", "{{premise}} ||| {% if label != -1 %}{{label}}{% endif %}"), RTE | {"label": -1}, None)],
    ids=lambda x: x.name if isinstance(x, Template) else "")
def test_rendering_equals_what_is_rendered_by_hand(template, row, rendered):
    assert template.render(row) == rendered


def test_long_fields_are_cut_as_in_promptsource():
    """`| string | truncate(2048)` in every expression: 2 048 characters with the dots, at a word's end."""
    prompt, target, _ = Template("d", "t", "{{text}} ||| {{text[0]}}").render({"text": "word " * 1000})
    assert len(prompt) <= 2048 and prompt.endswith("word...") and target == "w"


def test_a_random_choice_is_a_function_of_template_and_row():
    template = Template("d", "t", "{{ items | choice }} ||| x")
    first = [template.render({"items": list("abcdefgh")}, n) for n in range(30)]
    random.seed(5)
    assert first == [template.render({"items": list("abcdefgh")}, n) for n in range(30)]
    assert len({prompt for prompt, _, _ in first}) > 4
    other = Template("d", "u", "{{ items | choice }} ||| x")
    assert first != [other.render({"items": list("abcdefgh")}, n) for n in range(30)]


@pytest.mark.parametrize("jinja, choices, text, fields", [
    ('{{premise}} Is "{{hypothesis}}" so? ||| {% if label != -1 %}{{ answer_choices[label] }}{% endif %}', "Yes ||| No",
     'premise Is "hypothesis" so?\nAnswers: Yes, No', ["premise", "hypothesis"]),
    ('{{ premise }} {% if question == "cause" %}because{% else %}so{% endif %} {{answer_choices[0]}} or {{answer_choices[1]}}? ||| '
     "{{ answer_choices[label] }}", "{{choice1}} ||| {{choice2}}",
     "premise  because / so  choice1 or choice2?\nAnswers: choice1, choice2", ["premise", "question", "choice1", "choice2"]),
    ('{% if question == "effect" %}\n{{ premise }} What next? ||| {{answer_choices[label]}}{% endif %}', "{{choice1}} ||| {{choice2}}",
     "premise What next?\nAnswers: choice1, choice2", ["premise"]),
    ("{% if l == 0 %}{{a}} ||| {{t}}{% elif l == 1 %}{{b}} ||| {{t}}"
     "{% elif l == 2 %}{{c}} ||| {{t}}{% else %}{{d}} ||| {{t}}{% endif %}", None, "a / b / c / d", ["a", "b", "c", "d"]),
    ("Is it {% if l == 0 %}{{a}}{% elif l == 1 %}{{b}}{% elif l == 2 %}{{c}}{% endif %}? ||| {{t}}",
     None, "Is it a / b / c ?", ["a", "b", "l", "c"]),
    ("{% for f in facts %}{{f | lower}}{% endfor %} {{ ', '.join(answer_choices) }}: {{answers.text}} ||| {{label}}", "a ||| b",
     "facts a, b: answers.text\nAnswers: a, b", ["facts", "answers"]),
    ("{% set x = premise %}Say {{'it'}}: {{x[0] | upper}}{{x[1:]}} {{premise}} ||| {{target}}", None, "Say it: premise premise", ["premise"])])
def test_the_instruction_is_the_template_with_names_for_fields(jinja, choices, text, fields):
    """And the fields are those that the input shows: what only the target uses or what only decides whether the template
    applies, the label above all, is not among them."""
    template = Template("d", "t", jinja, choices)
    assert " ".join(template.text.split()) == " ".join(text.split()) and template.fields == fields


@pytest.mark.parametrize("jinja, choices, fields", [
    ("{{dialogue[:-1]}} What next? ||| {{dialogue[-1]}}", None, None), ("{{question}} {{table}} ||| {{table | length}}", None, None),
    ("{{q}} {{answer_choices | join(', ')}} ||| {{answer_choices[3]}}", "{{w1}} ||| {{w2}} ||| {{w3}} ||| {{right}}", None),
    ("{{q}} {{answer_choices | join(', ')}} ||| {{answer_choices[label]}}", "{{c1}} ||| {{c2}}", ["q", "c1", "c2"]),
    ("Is it {{options[0]}}? {{q}} ||| {{answer}}", None, None), ("{{fact[1:]}} ||| {{answer}}", None, None),
    ("{{options[0]}} or {{options[1]}}? ||| {{answer_choices[label]}}", "{{options | join('|||')}}", ["options"]),
    ("{% set i = range(3) | choice %}{{q}} {{ [a, b, c][i] }}? ||| {% if i == label %}Yes{% else %}No{% endif %}", None, None),
    ("{{ ['Say', 'Tell'] | choice }} {{q}} ||| {{answer}}", None, ["q"]),
    ("{% if answers %}{{q}} ||| {{answers | choice}}{% endif %}", None, ["q"]),
    ("{{a}} or {{b}}? ||| {% if answer == '1' %}{{a}}{% else %}{{b}}{% endif %}", None, ["a", "b"])])
def test_fields_that_tell_more_or_less_than_the_prompt_are_not_read(jinja, choices, fields):
    """None: the student reads the prompt. Else what is shown whole, and nothing that names the answer."""
    assert Template("d", "t", jinja, choices).fields == fields


@pytest.mark.parametrize("jinja", [
    "{{ ''.__class__.__mro__ }} ||| x", "{{ premise.__class__.__base__.__subclasses__() }} ||| x",
    "{{ cycler.__init__.__globals__.os.system('true') }} ||| x", "{{ (premise | attr('__class__')).mro() }} ||| x",
    "{% for i in range(10 ** 9) %}{% endfor %} ||| x"])
def test_a_template_that_reaches_for_pythons_insides_is_refused(jinja):
    with pytest.raises(common.UserError, match="super_glue/rte, template 't', row 7"):
        Template("super_glue/rte", "t", jinja).render(RTE, 7)


def test_yaml_with_another_tag_is_refused(tmp_path):
    (tmp_path / "rte").mkdir()
    (tmp_path / "rte/templates.yaml").write_text(f"templates: !!python/object/apply:os.system ['touch {tmp_path}/done']\n")
    with pytest.raises(common.UserError, match="rte/templates.yaml.*could not determine a constructor"):
        load_templates(str(tmp_path))
    assert not (tmp_path / "done").exists()


# ---------------------------------------------------------------------------------------------------------- real data

@real_data
def test_the_real_templates_are_t0s_and_render_on_the_real_rows():
    """T0's evaluation templates are those for the original task by accuracy; every one renders; COPA's by kind of question."""
    found = load_templates(str(P3 / "templates"))
    listed = yaml.safe_load((P3 / "t0_eval_templates.yaml").read_text())
    assert set(listed) == set(data.P3_TEST.values())
    for dataset, names in listed.items():
        assert sorted(names) == sorted(t.name for t in found[dataset] if t.for_evaluation)
    tasks = data.load_p3(str(P3))
    assert Counter(t.category for t in tasks) == {"cb": 15, "copa": 12, "rte": 10, "winogrande": 5}
    sizes = {t.name: len(t.instances) for t in tasks}
    assert sizes["rte: must be true"] == 277 and sizes["winogrande: Replace"] == 1267
    assert sizes["copa: …why? C1 or C2"] + sizes["copa: …As a result, C1 or C2?"] == 100 == sizes["copa: choose"]
    rows = [json.loads(line) for line in (P3 / "rte/validation.jsonl").read_text().splitlines()]
    for task in tasks:
        if task.name == "rte: guaranteed true":
            for row, x in zip(rows, task.instances, strict=True):
                assert x.prompt == f'Given {row["premise"]} Is it guaranteed true that "{row["hypothesis"]}"? Yes or no?'
                assert x.outputs == ["No" if row["label"] == "not_entailment" else "Yes"] and x.choices == ("Yes", "No")
                assert x.input == " ".join(f'premise: {row["premise"]} hypothesis: {row["hypothesis"]}'.split())


@real_data
def test_no_students_fields_name_the_answer_in_the_real_templates():
    """Worked out by hand for the templates at risk; T0's evaluation templates all have fields, never the label's."""
    found = load_templates(str(P3 / "templates"))
    reads_prompt = {dataset: sum(t.fields is None for t in found[dataset]) for dataset in data.P3_TRAIN}
    assert {k: n for k, n in reads_prompt.items() if n} == {
        "common_gen": 2, "dream": 2, "duorc/ParaphraseRC": 2, "duorc/SelfRC": 2, "multi_news": 1, "qasc": 8, "quartz": 8, "sciq": 3,
        "social_i_qa": 1, "wiki_bio": 4, "wiki_hop/original": 9, "wiqa": 4}
    for dataset, never in {"ropes": "answers", "kilt_tasks/hotpotqa": "output", "sciq": "correct_answer", "imdb": "label", "quail": "correct_answer_id",
                           "quoref": "answers", "glue/mrpc": "label", "xsum": "summary", "ag_news": "label"}.items():
        assert not any(never in (t.fields or []) for t in found[dataset] if "enerat" not in t.name), dataset
    for dataset in set(data.P3_TEST.values()):
        for t in found[dataset]:
            assert not t.for_evaluation or t.fields and not {"label", "answer", "answer_right_ending", "idx"} & set(t.fields)


@real_data
def test_prompted_training_rows_find_their_template_by_name():
    """35 of the 36 data sets (trec's completions are empty there), none of which is held out."""
    found, tasks = load_templates(str(P3 / "templates")), data.load_p3(str(P3), "train", 1000)
    assert len(data.P3_TRAIN) == 36 and set(data.P3_TRAIN) <= found.keys()
    assert {t.category for t in tasks} == set(data.P3_TRAIN) - {"trec"} and len(tasks) == 271
    for task in tasks:
        assert all(x.prompt == x.input and x.outputs[0] and "<|endoftext|>" not in x.outputs[0] for x in task.instances)
    by_name = {t.name: t for t in tasks}
    assert by_name["ag_news: classify"].definitions[0].startswith("text") and len(by_name["ag_news: classify"].instances) == 50
    assert not data.held_out_names(list(data.P3_TRAIN))


@real_data
def test_sni_training_tasks_of_held_out_data_sets_are_warned_of(monkeypatch):
    monkeypatch.setattr(data, "_warned", set())
    options = argparse.Namespace(data=str(P3.parent / "sni"), max_instances=1, allow_missing=False, categories=0, format="sni")
    with pytest.warns(UserWarning, match="17 training tasks are named after data sets that P3 holds out.*task"):
        data.training_tasks(options)


# ---------------------------------------------------------------------------------------------------- a miniature P3

TEMPLATES = {
    "imdb": [("Reviewer Enjoyment", "{{text}} How does the reviewer feel? ||| {{answer_choices[label]}}", "They didn't like it ||| They loved it"),
             ("Negation ", "{{text}} This is definitely not a ||| {{answer_choices[1-label]}} review.", "negative ||| positive")],
    "ag_news": [("classify", "{{text}} Which kind? ||| {{answer_choices[label]}}", "World ||| Sports")],
    "super_glue/rte": [("can we infer", 'Suppose {{premise}} Can we infer that "{{hypothesis}}"? ||| {% if label != -1 %}'
                        "{{answer_choices[label]}}{% endif %}", "Yes ||| No"),
                       ("not for evaluation", "{{premise}} ||| {{hypothesis}}", None)],
    "super_glue/copa": [("choose", '{{premise}} {% if question == "cause" %}because...{% else %}so...{% endif %} {{choice1}} {{choice2}} '
                         "||| {{answer_choices[label]}}", "{{choice1}} ||| {{choice2}}"),
                        ("why", '{% if question == "cause" %}{{premise}} Why? {{choice1}} or {{choice2}}? ||| {{answer_choices[label]}}'
                         "{% endif %}", "{{choice1}} ||| {{choice2}}")],
}


def write_p3(root: Path) -> Path:
    for dataset, records in TEMPLATES.items():
        folder = root / "templates" / dataset
        folder.mkdir(parents=True)
        text = f"dataset: {dataset}\ntemplates:\n"
        for n, (name, jinja, choices) in enumerate(records):
            evaluates = name != "not for evaluation"
            text += textwrap.indent(f"id{n}: !Template\n  name: {json.dumps(name)}\n  jinja: {json.dumps(jinja)}\n"
                                    f"  answer_choices: {json.dumps(choices)}\n  metadata: !TemplateMetadata\n"
                                    f"    original_task: {str(evaluates).lower()}\n    metrics:\n    - Accuracy\n", "  ")
        (folder / "templates.yaml").write_text(text)
    rng = random.Random(0)
    rows = {"imdb/train": [{"text": f"Anna went to Paris {n} .", "label": n % 2} for n in range(12)],
            "rte/validation": [{"premise": f"Tom saw a dog {n} .", "hypothesis": "Tom saw a cat .", "idx": n,
                                "label": rng.choice(["entailment", "not_entailment"])} for n in range(9)],
            "super_glue/copa/validation": [COPA | {"question": ["cause", "effect"][n % 2], "label": n // 2 % 2} for n in range(8)],
            "prompted/ag_news_classify": [{"prompt": f"A dog ran {n} . Which kind?", "completion": "Sports<|endoftext|>"} for n in range(9)]}
    for name, lines in rows.items():
        path = root / (name + ".jsonl")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return root


@pytest.fixture
def p3(tmp_path):
    return write_p3(tmp_path / "p3")


def test_both_splits_load_from_raw_and_prompted_rows(p3):
    test = {t.name: t for t in data.load_p3(str(p3))}
    assert {name: len(t.instances) for name, t in test.items()} == {"copa: choose": 8, "copa: why": 4, "rte: can we infer": 9}
    x = test["rte: can we infer"].instances[0]
    assert x.prompt == 'Suppose Tom saw a dog 0 . Can we infer that "Tom saw a cat ."?' and x.choices == ("Yes", "No")
    assert x.input == "premise: Tom saw a dog 0 . hypothesis: Tom saw a cat ." and x.outputs == ["No"]
    assert data.load_p3(str(p3), p3_input="prompt")[2].instances[0].input == x.prompt
    assert data.instance_text(x.input) == x.input and data.prompt_text("d", [], x.prompt) == x.prompt     # nothing around them
    train = {t.name: t for t in data.load_p3(str(p3), "train", 5)}
    assert {name: len(t.instances) for name, t in train.items()} == {"imdb: Reviewer Enjoyment": 5, "imdb: Negation ": 5, "ag_news: classify": 5}
    assert train["imdb: Negation "].instances[1].outputs == ["negative review."] and train["ag_news: classify"].category == "ag_news"
    assert train["ag_news: classify"].instances[0].outputs == ["Sports"]
    assert [x.id for x in data.load_p3(str(p3), "train", 3, skip=5)[0].instances] == ["ag_news-5", "ag_news-6", "ag_news-7"]


@pytest.mark.parametrize("name, row, label", [
    ("rte", {"label": "not_entailment"}, 1), ("rte", {"label": 0}, 0), ("cb", {"label": "neutral"}, 2), ("cb", {"label": "contradiction"}, 1),
    ("anli_r2", {"label": "n"}, 1), ("anli_r1", {"label": "contradiction"}, 2), ("wic", {"label": True}, 1), ("wic", {"label": "false"}, 0),
    ("wsc", {"label": False}, 0), ("hellaswag", {"label": "3"}, 3), ("copa", {"label": 1}, 1), ("imdb", {"label": -1}, -1),
    ("social_i_qa", {"label": "2"}, "2")])
def test_labels_in_the_forms_that_data_sets_come_in(name, row, label):
    assert data.with_plain_label(name, row, "") == {"label": label}


@pytest.mark.parametrize("name, row", [("winogrande", {"answer": ""}), ("hellaswag", {"label": ""}), ("copa", {"label": -1}), ("rte", {}),
                                       ("story_cloze", {"answer_right_ending": None})])
def test_hidden_labels_are_refused(name, row):
    with pytest.raises(common.UserError, match="row 4.*validation split"):
        data.with_plain_label(name, row, "x.jsonl, row 4")


def test_winograd_spans_of_superglues_own_files_become_fields():
    row = data.with_plain_label("wsc", {"text": "t", "target": {"span1_text": "a", "span2_text": "b"}, "label": True}, "")
    assert row["span1_text"] == "a" and row["label"] == 1


def edit_row(path, **changes):
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    rows[3] = {k: v for k, v in (rows[3] | changes).items() if v is not None}
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


BROKEN = {
    "missing field": (lambda p: edit_row(p / "rte/validation.jsonl", hypothesis=None), ["super_glue/rte", "can we infer", "row 3", "hypothesis"]),
    "label outside": (lambda p: edit_row(p / "rte/validation.jsonl", label=5), ["super_glue/rte", "can we infer", "row 3"]),
    "unknown label": (lambda p: edit_row(p / "rte/validation.jsonl", label="maybe"), ["rte/validation.jsonl", "row 3", "maybe"]),
    "hidden label": (lambda p: edit_row(p / "rte/validation.jsonl", label=-1), ["rte/validation.jsonl", "row 3", "validation split"]),
    "answer no choice": (lambda p: replace(p / "templates/super_glue/rte", "{{answer_choices[label]}}", "Perhaps"), ["can we infer", "row 0", "Perhaps"]),
    "broken template": (lambda p: replace(p / "templates/super_glue/rte", "{{premise}}", "{{premise"), ["super_glue/rte", "can we infer"]),
    "failing template": (lambda p: replace(p / "templates/super_glue/rte", "{{premise}}", "{{premise.nothing}}"), ["super_glue/rte", "can we infer", "row 0"]),
    "no JSON lines": (lambda p: (p / "rte/validation.jsonl").write_text('{"premise":\n'), ["rte/validation.jsonl, line 1"]),
    "no YAML": (lambda p: (p / "templates/imdb/templates.yaml").write_text("a: ["), ["imdb/templates.yaml"]),
    "an empty YAML": (lambda p: (p / "templates/imdb/templates.yaml").write_text(""), ["imdb/templates.yaml", "templates:"]),
    "a list of templates": (lambda p: (p / "templates/imdb/templates.yaml").write_text("templates: [a]"), ["imdb/templates.yaml"]),
    "a template without a name": (lambda p: replace(p / "templates/imdb", '  name: "Neg', '  nam: "Neg'), ["imdb/templates.yaml", "name"]),
    "no templates": (lambda p: [f.unlink() for f in p.glob("templates/**/*.yaml")], ["templates", "promptsource"]),
    "no rows": (lambda p: [f.unlink() for f in p.glob("**/validation.jsonl")], ["rte/validation.jsonl"]),
}


def replace(folder, old, new):
    path = folder / "templates.yaml"
    assert old in path.read_text()
    path.write_text(path.read_text().replace(old, new))


@pytest.mark.parametrize("case", BROKEN)
def test_bad_input_to_p3_is_one_line_with_data_set_template_and_row(p3, case):
    damage, said = BROKEN[case]
    damage(p3)
    with pytest.raises(common.UserError) as error:
        data.load_p3(str(p3))
    assert "\n" not in str(error.value) and all(word in str(error.value) for word in said), error.value


# ------------------------------------------------------------------------------------------------------------ ranking

CHOICES = [["cat", "dog dog"], ["word", "red", "blue cat dog"], ["yes"], ["a", "b", "c", "d"]]
INPUTS = [data.Verbatim(x) for x in ("a red cat", "dog b c", "the word", "blue dog blue")]


def by_the_loss(llm, tokenizer, ids, mask, choice):
    """Minus the summed loss of a plain T5, for one row and one choice."""
    labels = tokenizer(choice, return_tensors="pt")["input_ids"]
    return -llm(input_ids=ids, attention_mask=mask, labels=labels).loss.item() * labels.numel()


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.numbers
def test_choices_score_as_by_the_loss_of_a_plain_t5_called_choice_by_choice(kind, normalize, exact):
    llm, tokenizer = make_llm(kind).double(), make_tokenizer()
    ids, mask = data.tokenize(tokenizer, INPUTS, 64)
    with torch.no_grad():
        encoded = llm.get_encoder()(input_ids=ids, attention_mask=mask)[0]
        scores = rank.log_likelihoods(llm, tokenizer, encoded, mask, CHOICES, normalize)
        for n, row in enumerate(CHOICES):
            own, own_mask = data.tokenize(tokenizer, [INPUTS[n]], 64)
            expected = [by_the_loss(llm, tokenizer, own, own_mask, choice) for choice in row]
            if normalize:
                expected = [x / len(tokenizer(choice)["input_ids"]) for x, choice in zip(expected, row)]
            assert scores[n] == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.numbers
def test_a_mixed_batch_ranks_as_the_tasks_one_by_one_and_as_the_students_logits_have_it(kind, exact):
    """Per-example LoRA, both fusions, own norms and embeddings; and one adapter for all."""
    tagi = make_random_tagi(kind)
    adapters = tagi.adapt(["say the first word", "upper"])
    index = [0, 1, 1, 0]
    mixed = tagi.rank(INPUTS, CHOICES, adapters.select(index), batch_size=3)
    alone = [tagi.rank([x], [row], adapters.select([i]))[0] for x, row, i in zip(INPUTS, CHOICES, index)]
    close([torch.tensor(row) for row in mixed], [torch.tensor(row) for row in alone])
    for n, row in enumerate(CHOICES):
        for choice, score in zip(row, mixed[n]):
            ids, mask = data.tokenize(tagi.tokenizer, [data.instance_text(tagi.in_format(INPUTS[n]))], 64)
            labels = data.labels(tagi.tokenizer, [choice], 64)
            with torch.no_grad():
                logits = tagi(adapters.select([index[n]]), ids, mask, labels)
            assert logits.log_softmax(-1)[0].gather(1, labels.T).sum().item() == pytest.approx(score, abs=1e-9)
    one = tagi.rank(INPUTS, CHOICES, adapters.select([1]))
    tagi.merge(adapters.select([1]))
    merged = tagi.rank(INPUTS, CHOICES, tagi.merged)
    close([torch.tensor(row) for row in one], [torch.tensor(row) for row in merged])


def test_the_encoder_runs_once_a_row_however_many_choices_it_has():
    tagi = make_random_tagi("v1.1").float()
    adapters, seen = tagi.adapt(["upper"]), []
    hook = tagi.llm.get_encoder().register_forward_hook(lambda module, args, kwargs, out: seen.append(len(out[0])), with_kwargs=True)
    tagi.rank(INPUTS, CHOICES, adapters, batch_size=3)
    hook.remove()
    assert seen == [3, 1]                                                   # rows, in two batches; ten choices


def test_a_student_of_p3_reads_texts_as_they_stand():
    tagi = make_random_tagi("v1.1").float()
    ids = {}
    for name in ("sni", "p3"):
        tagi.options.format = name
        ids[name] = [next(tagi._batches(["a red cat"], None, 1))[1].tolist(), tagi.adapt(["upper"]).mask.shape[1]]
    assert ids["p3"][0] == tagi.tokenizer(["a red cat"])["input_ids"] != ids["sni"][0]
    assert ids["p3"][1] == len(tagi.tokenizer("upper")["input_ids"]) < ids["sni"][1]


def test_averages_are_the_papers():
    """Its Table 10 by task gives its Table 3: 58.9 over 11, 59.8 over HyperT5's 8, where ANLI is one."""
    published = yaml.safe_load((ROOT / "configs/paper_results.yaml").read_text())["p3"]
    by_task = published["tagi_xl_t5_lm_by_task"]
    found = rank.summarize({f"{task}: {t}": x + d for task, x in by_task.items() for t, d in (("a", -1), ("b", 0), ("c", 1))})
    assert round(found["averages"]["MTest11"]["mean"], 1) == published["mtest11"]["tagi"]["t5_lm"][2]
    assert round(found["averages"]["HyperT5"]["mean"], 1) == published["hypert5"]["tagi"]["t5_lm"][2]
    assert found["tasks"]["rte"] == pytest.approx({"mean": 76.6, "median": 76.6, "min": 75.6, "max": 77.6, "templates": 3})
    part = rank.summarize({"rte: a": 50.0, "anli_r1: a": 30.0, "story_cloze: a": 90.0})["averages"]
    assert part == {"MTest11": {"mean": pytest.approx(170 / 3), "over": 3, "of": 11}, "HyperT5": {"mean": 50.0, "over": 1, "of": 8}}


# -------------------------------------------------------------------------------------------------- what a user types

@pytest.fixture
def p3_project(project, p3, monkeypatch):
    """LoRA teachers, student and a config for the miniature P3, on the LLM of the tests' suite."""
    options = yaml.safe_load(project.config.read_text()) | {
        "data": str(p3), "format": "p3", "demos": 0, "vary_demos": False,
        "llm": str(project.runs / "meta")}                      # of other training tasks
    own = p3.parent / "p3.yaml"
    own.write_text(yaml.safe_dump(options))
    project.config, project.data_of_p3 = own, p3
    for stage in ("lora", "lora-all", "finetune"):
        project.run(stage, "--fresh", "--no-pretrained" if stage == "finetune" else "--tasks=2")
    measure = evaluate.measure_ranking
    monkeypatch.setattr(evaluate, "measure_ranking", lambda bench, demos, repeats: measure(bench, demos, 1, 2, 1))
    return project


def test_p3_is_trained_on_and_evaluated_with_its_controls(p3_project):
    assert sorted(path.parent.name for path in p3_project.runs.glob("lora/*/model.safetensors")) == ["ag_news", "imdb"]
    out = p3_project.run("evaluate", "--bench=p3")
    found = json.loads((p3_project.runs / "evaluate/results.json").read_text())
    assert [r["key"] for r in found["results"]] == [
        "tagi", "tagi_shuffled", "tagi_empty", "meta", "meta_lora", "no_finetuning",
        "no_instruction"]
    predictions = [json.loads(line) for line in (p3_project.runs / "evaluate/predictions.jsonl").read_text().splitlines()]
    for r in found["results"]:
        mine = [p for p in predictions if p["row"] == r["row"]]
        assert len(mine) == 21 and set(r["by_task"]["exact_match"]) == {"copa: choose", "copa: why", "rte: can we infer"}
        for name, accuracy in r["by_task"]["exact_match"].items():
            right = [p["prediction"] == p["references"][0] for p in mine if p["task"] == name]
            assert accuracy == pytest.approx(100 * sum(right) / len(right))
    assert "over 2 of 11" in out and "over 2 of 8" in out and "No rows for anli_r1" in out and "ms a row at batch size 1" in out
    assert {p["prediction"] for p in predictions if p["task"].startswith("rte")} <= {"Yes", "No"}
    before = (p3_project.runs / "evaluate/predictions.jsonl").read_text()
    p3_project.run("evaluate", "--bench=p3", "--batch-size=3")                                # all there: read again
    assert (p3_project.runs / "evaluate/predictions.jsonl").read_text() == before


def test_teachers_read_the_prompt_and_the_student_the_fields(p3_project):
    options = config.parse(train_hyper.parser(), "finetune", p3_project.argv("finetune"))
    tagi = evaluate.TAGI.load(str(p3_project.runs / "finetune"))
    get_batch, units = train_hyper.finetune_batches(options, tagi, 1)
    batch = get_batch(0, 0)
    assert units == ["ag_news", "imdb"]
    texts = {key: tagi.tokenizer.batch_decode(batch[key][0], skip_special_tokens=True) for key in ("instruction", "input", "prompt")}
    assert any(text.startswith("text") for text in texts["instruction"]) and not any("Definition" in t for t in texts["instruction"])
    for text, prompt in zip(texts["input"], texts["prompt"]):
        assert (text == prompt) == ("kind" in text) and "Input:" not in text + prompt


def test_a_model_trained_on_one_format_is_not_tested_on_the_other(p3_project, finished):
    assert "--format p3" in p3_project.refuses("evaluate", "--bench=sample")
    assert "--format sni" in p3_project.refuses("evaluate", "--bench=p3", "--format=sni")


def test_own_choices_are_ranked_from_python(p3_project):
    """As the README shows it."""
    tagi = evaluate.TAGI.load(str(p3_project.runs / "finetune"))
    scores = tagi.rank(["premise: A cat sat ."], [["Yes", "No", "Maybe so"]], tagi.adapt(["Is it so ?"]))
    assert len(scores) == 1 and len(scores[0]) == 3 and all(x < 0 for x in scores[0])
    with pytest.raises(common.UserError, match="input 1 is empty"):
        tagi.rank([" "], [["Yes"]], None)


def test_a_shuffled_instruction_is_of_another_kind_of_task(p3):
    """ANLI's rounds, CB and RTE share their templates, so they are one kind; of a single kind, any other task."""
    def task(category, n):
        return data.Task(f"{category}: {n}", category, ["d"], [], [])

    tasks = [task(name, n) for name in data.P3_TEST for n in range({"cb": 15, "copa": 12}.get(name, 10))]
    nli = {"anli_r1", "anli_r2", "anli_r3", "cb", "rte"}
    givers = bench.of_another_kind(tasks)
    assert len(givers) == len(tasks) and givers == bench.of_another_kind(tasks) and len({t.category for t in givers}) > 5
    assert all(a.category != b.category and not {a.category, b.category} <= nli for a, b in zip(tasks, givers))
    few = [task("cb", 0), task("rte", 1)]
    assert bench.of_another_kind(few) == few[::-1]


def test_dropping_the_instruction_leaves_p3s_fields_or_is_refused(p3_project, monkeypatch):
    """With all instructions dropped, meta-training's inputs are the student's."""
    def texts(*flags):
        seen, tokenize = [], data.tokenize_instructed

        def told(tokenizer, items, *rest):
            seen.extend(data.prompt_text(*item) for item in items)
            return tokenize(tokenizer, items, *rest)

        with monkeypatch.context() as patch:
            patch.setattr(data, "tokenize_instructed", told)
            p3_project.run("meta", "--name=dropped", "--fresh", "--easy-first=0", *flags)
        return set(seen)

    tasks = data.load_p3(str(p3_project.data_of_p3), "train")
    instances = [x for t in tasks for x in t.instances]
    inputs, prompts = {x.input for x in instances}, {x.prompt for x in instances}
    dropped = texts("--drop-instruction=1")
    assert dropped <= inputs and dropped - prompts
    assert texts("--drop-instruction=0") <= prompts
    flags = ("--drop-instruction=0.5", "--p3-input=prompt")
    assert "--drop-instruction" in p3_project.refuses("meta", "--name=other", *flags)


def test_p3_has_a_test_split_and_rows_of_its_own(p3_project):
    assert "train and test" in p3_project.refuses("evaluate", "--bench=p3", "--split=validation")
    for row in ("teachers", "copy_demo", "tagi_unseen_wording"):
        assert row in p3_project.refuses("evaluate", "--bench=p3", f"--rows=tagi,{row}")


@pytest.mark.parametrize("size, column", [
    ("base", 0), ("large", 1), ("xl", 2), ("xxl", None), ("v1.0 3B", None), ("v1.0 11B", None)])
def test_published_rows_are_those_of_the_models_size(size, column):
    """T5 v1.0's 3B and 11B have Large's width and layers."""
    import report
    from random_t5 import t5_config
    from transformers import T5Config
    v1_0 = {"v1.0 3B": (16384, 32), "v1.0 11B": (65536, 128)}
    if size in v1_0:
        d_ff, heads = v1_0[size]
        llm_config = T5Config(d_model=1024, d_kv=128, d_ff=d_ff, num_heads=heads, num_layers=24)
    else:
        llm_config = t5_config(size)
    rows = {r["row"]: r["mtest11"] for r in report.published_p3(llm_config)}
    assert not rows if column is None else rows["tagi, T5-LM"] == [45.6, 54.7, 58.9][column]
    assert column is not None or size == "xxl" or not report.published_sni(llm_config)


@pytest.mark.parametrize("size, lr, tasks, accumulate", [("base", 1e-4, 8, 2), ("large", 1e-4, 4, 4), ("xl", 5e-5, 2, 4)])
def test_the_configs_hold_the_papers_table_6(size, lr, tasks, accumulate):
    path = f"--config={ROOT}/configs/p3-{size}.yaml"
    lora = config.parse(train_teacher.parser(), "lora", [path])
    finetune = config.parse(train_hyper.parser(), "finetune", [path])
    lora_all = config.parse(train_teacher.parser(), "lora_all", [path])
    assert all(vars(lora_all)[key] == vars(finetune)[key] for key in SHARED_BY_LORA_ALL)
    assert "lora-all" in lora_all.stages.split(",")
    assert all(vars(o)[key] == value for o in (lora, finetune) for key, value in {
        "rank": 32, "targets": "q,v", "unit": "category", "format": "p3", "max_instances": 1000, "max_input": 512, "max_output": 64}.items())
    assert (finetune.lr, finetune.tasks, finetune.accumulate, finetune.steps) == (lr, tasks, accumulate, 20_000)
    assert (finetune.schedule, finetune.warmup, finetune.lambda_kl, finetune.lambda_ins) == ("linear", 0.02, 5, "sigmoid")
