"""Own instructions: adapt.py, an adapter's rows, scale and sums, its files, and PEFT's reading of an export."""
import io
import json
import os
import shutil
import subprocess
import sys
import threading
import warnings
from unittest import mock

import pytest
import torch
import transformers
import yaml
from safetensors.torch import load_file
from transformers import AutoModelForSeq2SeqLM

pytest.register_assert_rewrite("stages")
pytest_plugins = ("stages",)
from conftest import ALL, INPUTS, INSTRUCTIONS, close, make_llm, make_random_tagi, make_tokenizer, randomize, student_options, tokens
from stages import ROOT, call

import adapt
import common
import data
import lora
import t5
import train_hyper
from bench import novelty
from common import UserError
from hypernet import TAGI
from lora import Adapter

LORA_ALONE = ("--fusion=none", "--train-norms", "--targets=q,v,o,wi_0,wi_1,wo")


def make_checkpoint(folder, *flags, kind="v1.1"):
    """A checkpoint of random weights beside its LLM, in the form of train_hyper.py's."""
    llm, tokenizer = make_llm(kind), make_tokenizer()
    for part in (llm, tokenizer):
        part.save_pretrained(folder / "llm")
    tagi = randomize(TAGI(t5.load_llm(str(folder / "llm"))[0], tokenizer, student_options(*flags)))
    record = vars(tagi.options) | {"llm_is_relative": True, "llm_path": "../llm", "data_digest": "0123",
                                   "llm_fingerprint": t5.fingerprint(tagi.llm)}
    common.save_checkpoint(str(folder / "tagi"), record, tagi.trainable(), finished=True)
    return str(folder / "tagi")


@pytest.fixture(scope="module")
def full(tmp_path_factory):
    return make_checkpoint(tmp_path_factory.mktemp("full"), *ALL)


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    return make_checkpoint(tmp_path_factory.mktemp("alone"), *LORA_ALONE)


def scores(tagi, adapter, inputs=INPUTS):
    """Log-likelihoods of two answers to each input: numbers in which every difference shows."""
    return torch.tensor(tagi.score_choices(inputs, [["red", "two cats"]] * len(inputs), adapter))


def plain(tagi):
    return torch.tensor(tagi.score_choices(INPUTS, [["red", "two cats"]] * len(INPUTS), None))


# ------------------------------------------------------------------------------- rows, scale, sums

def test_rows_are_indexed_sliced_and_told_in_one_line(full):
    tagi = TAGI.load(full)
    three = tagi.adapt([*INSTRUCTIONS[:2], INSTRUCTIONS[0]])
    assert [len(three), len(three[1]), len(three[-1]), len(three[1:]), len(list(three))] == [3, 1, 1, 2, 3]
    assert torch.equal(three[-1].states, three.select([2]).states) and three[1].tasks == three.tasks[1:2]
    assert repr(three).count("\n") == 0 and "3 tasks" in repr(three)
    with pytest.raises(IndexError):
        three[3]


def test_scale_0_is_no_lora_and_no_encoder_fusion_and_1_changes_no_bit(full):
    tagi = TAGI.load(full)
    adapter, one = tagi.adapt(INSTRUCTIONS[:1], scale=0.0), tagi.adapt(INSTRUCTIONS[:1])
    assert torch.equal(scores(tagi, one), scores(tagi, tagi.adapt(INSTRUCTIONS[:1], scale=1.0)))
    zero = Adapter({site: (A, 0 * B) for site, (A, B) in one.weights.items()}, one.states, one.mask,
                   [(keys, 0 * values) for keys, values in one.fusion])
    close(scores(tagi, adapter), scores(tagi, zero), 1e-5)
    assert (scores(tagi, adapter) - scores(tagi, one)).abs().max() > 1e-3


def test_scale_is_linear_in_the_update_that_a_layer_makes(alone):
    tagi = TAGI.load(alone)
    wrapper = next(iter(lora.sites(tagi.llm).values()))
    x, updates = torch.randn(1, 3, wrapper.weight.shape[1]), []
    for scale in (1.0, 0.5, -2.0):
        with torch.no_grad(), tagi.adapted(tagi.adapt(INSTRUCTIONS[:1], scale=scale)):
            updates.append(wrapper(x) - wrapper.linear(x))
    close(updates[1], 0.5 * updates[0], 1e-5)
    close(updates[2], -2.0 * updates[0], 1e-5)


def test_a_scaled_adapter_is_merged_scaled(alone):
    tagi = TAGI.load(alone)
    adapter = tagi.adapt(INSTRUCTIONS[:1], scale=0.3)
    expected = scores(tagi, adapter)
    tagi.merge(adapter)
    close(scores(tagi, adapter), expected, 1e-4)
    tagi.unmerge()


@pytest.mark.parametrize("kind", ["alone", "full"])
def test_an_adapter_combined_with_itself_or_with_weight_0_is_itself(kind, request):
    tagi = TAGI.load(request.getfixturevalue(kind))
    first, other = tagi.adapt(INSTRUCTIONS[:2])
    first = tagi.adapt(INSTRUCTIONS[:1])                                # without the padding of two
    twice = Adapter.combine([first, first])
    assert next(iter(twice.weights.values()))[0].shape[1] == 2 * tagi.options.rank
    one = Adapter.combine([first, other], [1, 0])
    close(scores(tagi, one), scores(tagi, first), 1e-5)
    if kind == "alone":                 # the decoder counts states that stand there twice twice
        close(scores(tagi, twice), scores(tagi, first), 1e-4)


def test_a_combination_is_the_weighted_sum_of_the_products(alone):
    tagi = TAGI.load(alone)
    both = tagi.adapt(INSTRUCTIONS[:2], scale=0.5)
    combined = Adapter.combine(list(both), [0.7, -2.0])
    for site, (A, B) in combined.weights.items():
        (A1, B1), (A2, B2) = (row.weights[site] for row in both)
        close(B @ A, 0.5 * (0.7 * B1 @ A1 - 2.0 * B2 @ A2), 1e-4)


def test_fusion_attends_to_the_states_of_all_that_are_combined(full):
    tagi = TAGI.load(full)
    first, other = tagi.adapt(INSTRUCTIONS[:1]), tagi.adapt(INSTRUCTIONS[1:2])
    combined = Adapter.combine([first, other])
    n = int(first.mask.sum() + other.mask.sum())
    assert combined.mask.sum() == n == combined.fusion[0][0].shape[2]
    assert (scores(tagi, combined) - scores(tagi, first)).abs().max() > 1e-3


@pytest.mark.parametrize("weights", [[1.0], [0, 0], [float("nan"), 1], [1, float("inf")]])
def test_weights_that_combine_nothing_are_refused(alone, weights):
    both = TAGI.load(alone).adapt(INSTRUCTIONS[:2])
    with pytest.raises(UserError, match="weight"):
        Adapter.combine(list(both), weights)


# ------------------------------------------------------------------------------------ no trace left

@pytest.mark.parametrize("end", ["exception", "dropped generator", "after"])
def test_the_model_is_the_plain_one_afterwards_bit_for_bit(full, end):
    tagi = TAGI.load(full)
    before, adapter = plain(tagi), tagi.adapt(INSTRUCTIONS[:1])

    def steps():
        with tagi.adapted(adapter):
            yield 1
            yield 2
    if end == "exception":
        with pytest.raises(KeyError), tagi.adapted(adapter):
            raise KeyError
    elif end == "dropped generator":
        half = steps()
        next(half)
        assert tagi.active is adapter
        del half
    else:
        tagi.generate(INPUTS, adapter, max_new_tokens=2)
    assert tagi.active is None and torch.equal(plain(tagi), before)


def test_a_second_thread_that_adapts_while_one_generates_gets_an_error(full):
    tagi, caught = TAGI.load(full), []

    def other():
        try:
            tagi.adapt(INSTRUCTIONS[:1])
        except RuntimeError as error:
            caught.append(str(error))
    adapter = tagi.adapt(INSTRUCTIONS[:1])
    expected = scores(tagi, adapter)
    with tagi.adapted(adapter):
        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
        assert len(caught) == 1 and "another thread" in caught[0] and tagi.active is adapter
    other()                                                             # free again
    assert len(caught) == 1 and torch.equal(scores(tagi, adapter), expected)


# ------------------------------------------------------------------------------------------- files

@pytest.mark.parametrize("kind", ["alone", "full"])
def test_a_saved_adapter_answers_the_same_bit_for_bit_without_the_hypernetwork(kind, request, tmp_path):
    tagi = TAGI.load(request.getfixturevalue(kind))
    adapter = tagi.adapt(INSTRUCTIONS[:1], [[("a", "b")]], scale=0.7)
    expected = scores(tagi, adapter)
    adapter.save(str(tmp_path / "kept"))
    own, loaded = TAGI.load(str(tmp_path / "kept")), Adapter.load(str(tmp_path / "kept"))
    assert own.generator is None and torch.equal(scores(own, loaded), expected)
    assert loaded.tasks == adapter.tasks and loaded.scale == 0.7
    assert torch.equal(scores(tagi, Adapter.load(str(tmp_path / "kept"))), expected)   # nor in the model that made it
    with pytest.raises(UserError, match="no hypernetwork"):
        own.adapt(INSTRUCTIONS[:1])
    loaded.save(str(tmp_path / "again"))                                # and may be saved on
    assert torch.equal(scores(own, Adapter.load(str(tmp_path / "again"))), expected)


def test_several_rows_and_combinations_are_saved_too(full, tmp_path):
    tagi = TAGI.load(full)
    both = tagi.adapt(INSTRUCTIONS[:2])
    both.save(str(tmp_path / "both"))
    Adapter.combine(list(both)).save(str(tmp_path / "sum"))
    assert torch.equal(scores(tagi, Adapter.load(str(tmp_path / "both"))[1]), scores(tagi, both[1]))
    own = TAGI.load(str(tmp_path / "sum"))
    assert torch.equal(scores(own, Adapter.load(str(tmp_path / "sum"))), scores(tagi, Adapter.combine(list(both))))


def test_an_adapter_of_another_model_is_refused(full, alone, tmp_path):
    adapter = TAGI.load(full).adapt(INSTRUCTIONS[:1])
    adapter.save(str(tmp_path / "kept"))
    for one in (adapter, Adapter.load(str(tmp_path / "kept"))):
        with pytest.raises(UserError, match="this adapter is for a model with targets"):
            TAGI.load(alone).generate(INPUTS, one)
    other = make_checkpoint(tmp_path, *ALL)
    record = yaml.safe_load(open(f"{other}/config.yaml"))
    changed = randomize(TAGI.load(other), seed=5)                       # the same LLM, fusion of another training
    common.save_checkpoint(other, record, changed.trainable(), finished=True)
    with pytest.raises(UserError, match="shared_digest"):
        TAGI.load(other).generate(INPUTS, adapter)


@pytest.mark.parametrize("write", ["save", "export", "merge_into_t5"])
@pytest.mark.parametrize("fault", ["there already", "disk full"])
def test_what_cannot_be_written_leaves_nothing(alone, tmp_path, write, fault):
    adapter = TAGI.load(alone).adapt(INSTRUCTIONS[:1])
    folder = tmp_path / "out"
    if fault == "there already":
        folder.mkdir()
        (folder / "mine").write_text("x")
    full_disk = mock.patch.object(common, "save_file", side_effect=OSError(28, "No space left on device"))
    with pytest.raises(UserError, match=str(folder)), full_disk if fault == "disk full" else mock.MagicMock():
        getattr(adapter, write)(str(folder))
    left = sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*"))
    assert left == (["out", "out/mine"] if fault == "there already" else [])


def test_an_adapter_that_no_loaded_model_made_is_not_saved(tmp_path):
    adapter = make_random_tagi().adapt(INSTRUCTIONS[:1])
    with pytest.raises(UserError, match="TAGI.load"):
        adapter.save(str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("write", ["export", "merge_into_t5"])
def test_what_is_no_lora_is_not_lost_in_silence(full, tmp_path, write):
    adapter = TAGI.load(full).adapt(INSTRUCTIONS[:1])
    with pytest.raises(UserError, match="--lossy"):
        getattr(adapter, write)(str(tmp_path / "out"))
    getattr(adapter, write)(str(tmp_path / "out"), lossy=True)
    assert (tmp_path / "out").is_dir()


# ------------------------------------------------------------------------------------------ merged

@pytest.mark.parametrize("kind", ["v1.0", "v1.1", "mt5"])
def test_a_merged_model_is_a_plain_t5_of_the_same_logits(tmp_path, kind):
    targets = "--targets=q,v,o,wo"
    tagi = TAGI.load(make_checkpoint(tmp_path, "--fusion=none", "--train-norms", "--train-embeddings", targets, kind=kind))
    adapter = tagi.adapt(INSTRUCTIONS[:1], scale=0.5)
    before = {name: p.clone() for name, p in tagi.llm.named_parameters()}
    adapter.merge_into_t5(str(tmp_path / "merged"))
    assert all(torch.equal(p, before[name]) for name, p in tagi.llm.named_parameters())
    ids, mask, labels = tokens(tagi)
    with torch.no_grad():
        expected = tagi(adapter, ids, mask, labels)
        for llm in (AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "merged"), t5.load_llm(str(tmp_path / "merged"))[0]):
            close(llm(input_ids=ids, attention_mask=mask, labels=labels).logits, expected, 2e-4)


# -------------------------------------------------------------------------------------------- PEFT

@pytest.fixture(scope="module", params=["norms too", "LoRA"])
def exported(request, alone, tmp_path_factory):
    """(the model, its adapters of two tasks, the folders of their exports)."""
    if request.param == "LoRA":
        alone = make_checkpoint(tmp_path_factory.mktemp("no_norms"), LORA_ALONE[0], LORA_ALONE[2])
    tagi, folder = TAGI.load(alone), tmp_path_factory.mktemp("peft")
    adapters = tagi.adapt(INSTRUCTIONS[:2], scale=0.5)
    folders = [str(folder / name) for name in ("first", "second")]
    for adapter, path in zip(adapters, folders):
        adapter.export(path)
    return tagi.double(), adapters, folders                             # float32's weights, run in float64


def base_of(tagi):
    return AutoModelForSeq2SeqLM.from_pretrained(tagi.llm_path).double()


def with_peft(way, tagi, folder):
    from peft import PeftModel
    if way == "PeftModel.from_pretrained":
        return PeftModel.from_pretrained(base_of(tagi), folder)
    if way == "load_adapter":
        llm = base_of(tagi)
        llm.load_adapter(folder)
        return llm
    return AutoModelForSeq2SeqLM.from_pretrained(folder)


@pytest.mark.parametrize("way", ["PeftModel.from_pretrained", "load_adapter", "from_pretrained"])
def test_peft_reads_an_export_as_we_run_it(exported, way):
    tagi, adapters, folders = exported
    old = tuple(map(int, transformers.__version__.split(".")[:2])) < (5, 23)
    if tagi.norm_gains and way != "PeftModel.from_pretrained" and old:
        pytest.skip("Transformers 5.17's own reading of PEFT's files takes norms wrong; PeftModel reads them")
    ids, mask, labels = tokens(tagi)
    for adapter, folder in zip(adapters, folders):
        llm = with_peft(way, tagi, folder).double().eval()
        with torch.no_grad():
            theirs = llm(input_ids=ids, attention_mask=mask, labels=labels).logits
            close(theirs, tagi(adapter, ids, mask, labels), 1e-5)
            plain_logits = base_of(tagi)(input_ids=ids, attention_mask=mask, labels=labels).logits
        assert (theirs - plain_logits).abs().max() > 1e-3


def test_peft_answers_a_mixed_batch_with_beams_as_we_do(tmp_path):
    """Without norms of its own: PEFT has no mixed batches for those."""
    from peft import PeftModel
    tagi = TAGI.load(make_checkpoint(tmp_path, "--fusion=none", "--targets=q,v,o,wo"))
    adapters = tagi.adapt(INSTRUCTIONS[:2])
    for k in (0, 1):
        adapters[k].export(str(tmp_path / f"task{k}"))
    llm = PeftModel.from_pretrained(base_of(tagi), str(tmp_path / "task0"), adapter_name="task0")
    llm.load_adapter(str(tmp_path / "task1"), adapter_name="task1")
    llm, tagi = llm.double().eval(), tagi.double()
    index = [0, 1, 1]
    inputs = [INPUTS[0], INPUTS[1], INPUTS[0]]
    ids, mask = data.tokenize(tagi.tokenizer, [data.instance_text(x) for x in inputs], 64)
    names = [f"task{k}" for k in index]
    labels = data.labels(tagi.tokenizer, ["red", "two cats", "a"], 64)
    with torch.no_grad():
        theirs = llm(input_ids=ids, attention_mask=mask, labels=labels, adapter_names=names).logits
        close(theirs, tagi(adapters.select(index), ids, mask, labels), 1e-5)
        out = llm.generate(input_ids=ids, attention_mask=mask, adapter_names=names, num_beams=3, max_new_tokens=6,
                           do_sample=False)
    ours = tagi.generate(inputs, adapters.select(index), num_beams=3, max_new_tokens=6)
    assert tagi.tokenizer.batch_decode(out, skip_special_tokens=True) == ours


def test_a_combination_is_exported_with_its_own_rank(exported, tmp_path):
    tagi, adapters, _ = exported
    combined = Adapter.combine(list(adapters), [0.7, 0.4])
    combined.export(str(tmp_path / "sum"))
    config = json.loads((tmp_path / "sum" / "adapter_config.json").read_text())
    assert config["r"] == 2 * tagi.options.rank and config["lora_alpha"] / config["r"] == tagi.options.alpha / tagi.options.rank
    ids, mask, labels = tokens(tagi)
    llm = with_peft("PeftModel.from_pretrained", tagi, str(tmp_path / "sum")).double().eval()
    with torch.no_grad():
        close(llm(input_ids=ids, attention_mask=mask, labels=labels).logits, tagi(combined, ids, mask, labels), 1e-5)


def test_an_exports_config_and_card_say_what_it_is(exported):
    tagi, adapters, folders = exported
    config = json.loads(open(f"{folders[0]}/adapter_config.json").read())
    assert config["peft_type"] == "LORA" and config["task_type"] == "SEQ_2_SEQ_LM" and config["inference_mode"]
    assert config["r"] == tagi.options.rank and config["lora_alpha"] == 0.5 * tagi.options.alpha
    assert config["target_modules"] == tagi.options.targets.split(",")
    assert (config["modules_to_save"] is None) == (not tagi.norm_gains)
    assert os.path.samefile(config["base_model_name_or_path"], tagi.llm_path)
    card = open(f"{folders[0]}/README.md").read()
    assert INSTRUCTIONS[0] in card and tagi.options.llm_fingerprint in card and "0123" in card
    assert t5.tensors_digest(tagi.trainable()) in card


def test_an_export_needs_no_peft(alone, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)                      # importing it fails
    TAGI.load(alone).adapt(INSTRUCTIONS[:1]).export(str(tmp_path / "out"))
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"README.md", "adapter_config.json", "adapter_model.safetensors"}


# ------------------------------------------------------------------------------------ command line

ASK = ("--instruction", "Find the city.", "--max-output=4")
SHORT = ("--max-output=4",)


def ask(project, *flags, stdin=""):
    """(standard output, standard error) of a process of its own, which reads stdin to its end."""
    done = subprocess.run([sys.executable, str(ROOT / "adapt.py"), *project.argv("adapt", *flags)], input=stdin,
                          capture_output=True, text=True, env=os.environ | {"CUDA_VISIBLE_DEVICES": ""})
    assert done.returncode == 0, done.stderr
    return done.stdout, done.stderr


def test_an_own_instruction_prints_one_line_an_input_and_nothing_else(project):
    inputs = ["Anna went to Paris on Monday .", "Lucy paid two coins .", "Tom saw a dog in Rome ."]
    flags = [word for text in inputs for word in ("--input", text)]
    out = project.run("adapt", *ASK, *flags)
    assert out.count("\n") == 3
    assert out.splitlines()[1:2] == project.run("adapt", *ASK, *flags[2:4]).splitlines()
    assert not (project.runs / "evaluate").exists()


def test_a_file_standard_input_and_inputs_give_the_same_answers(project, tmp_path):
    inputs = ["Anna went to Paris .", "Lucy paid two coins .", "Tom saw a dog ."]
    expected = project.run("adapt", *ASK, "--batch-size=1", *[word for x in inputs for word in ("--input", x)])
    path = tmp_path / "inputs.txt"
    path.write_text("\n".join(inputs) + "\n")
    assert project.run("adapt", *ASK, "--batch-size=1", "--inputs", path) == expected
    assert ask(project, *ASK, "--inputs=-", stdin="\n".join(inputs))[0] == expected
    path.write_text("\ufeff" + "\r\n".join(inputs))                     # as another system's editor saves it
    assert project.run("adapt", *ASK, "--batch-size=1", "--inputs", path) == expected


def test_many_tasks_in_a_file_answer_as_each_alone(project, tmp_path):
    rows = [{"instruction": "Find the city.", "input": "Anna went to Paris."},
            {"instruction": "Find the day.", "input": "Tom left on Monday.", "demonstrations": [["It is Friday.", "Friday"]]}]
    path = tmp_path / "tasks.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    out = project.run("adapt", "--instructions", path, "--batch-size=1", "--json", *SHORT)
    found = [json.loads(line) for line in out.splitlines()]
    assert [row["instruction"] for row in found] == [row["instruction"] for row in rows]
    alone = [project.run("adapt", "--instruction", rows[0]["instruction"], "--input", rows[0]["input"], *SHORT),
             project.run("adapt", "--instruction", rows[1]["instruction"], "--input", rows[1]["input"],
                         "--demo", "It is Friday. => Friday", *SHORT)]
    assert [row["output"] + "\n" for row in found] == alone
    assert project.run("adapt", "--instructions", path, *SHORT).count("\n") == 2       # in one mixed batch


def test_choices_are_ranked_with_their_scores(project):
    out = json.loads(project.run("adapt", *ASK, "--input", "Anna went to Paris.", "--choices", "Paris|Rome|a dog", "--json"))
    assert set(out["scores"]) == {"Paris", "Rome", "a dog"} and out["scores"][out["output"]] == max(out["scores"].values())


def test_sampling_draws_answers_which_follow_the_seed(project, monkeypatch):
    seen, generate = [], TAGI.generate

    def at_a_high_temperature(*args, **options):
        seen.append(options["do_sample"])
        return generate(*args, **options, temperature=9.0)
    monkeypatch.setattr(TAGI, "generate", at_a_high_temperature)
    flags = (*ASK, "--input", "Anna went to Paris.", "--sample")
    first = project.run("adapt", *flags, "--seed=1")
    assert first == project.run("adapt", *flags, "--seed=1") and all(seen)
    assert len({project.run("adapt", *flags, f"--seed={seed}") for seed in range(4)}) > 1
    project.run("adapt", *ASK, "--input", "Anna went to Paris.")
    assert not seen[-1]


def test_a_prompt_loop_asks_for_instructions_and_inputs_on_standard_error(project):
    out, err = ask(project, *SHORT, stdin="Find the city.\nAnna went to Paris.\n\nFind the day.\nIt is Monday.\n")
    assert out.count("\n") == 2 and err.count("instruction: ") == 2 and err.count("input: ") == 4
    out, err = ask(project, *ASK, "--json", stdin="Anna went to Paris.\n")         # the instruction is there already
    assert json.loads(out)["input"] == "Anna went to Paris." and err.count("instruction: ") == 0


def test_save_then_adapter_answers_the_same(project, tmp_path):
    one = project.run("adapt", *ASK, "--input", "Anna went to Paris.", "--save", tmp_path / "kept")
    out = call(adapt, "--adapter", str(tmp_path / "kept"), "--input", "Anna went to Paris.", "--max-output=4")
    assert out == one and one.count("\n") == 1


def test_compare_tells_three_answers_their_time_and_the_nearest_tasks(project):
    assert "--index" in project.refuses("adapt", *ASK, "--compare", "--input", "Anna went to Paris.")
    assert "tasks" in project.run("adapt", "--index")
    out = project.run("adapt", *ASK, "--compare", "--input", "Anna went to Paris.")
    assert out.count(" ms ") == 3 and "frozen, instruction with the input" in out and out.count("task0") >= 3
    assert "those trained on" in out


def test_an_instruction_that_was_trained_on_is_nearest_and_a_foreign_one_far(project):
    project.run("adapt", "--index")
    checkpoint = str(project.runs / "finetune")
    tagi = TAGI.load(checkpoint)
    task = data.load_sni(str(project.data), "train", 1)[3]
    found, threshold = novelty.nearest(tagi, task.definitions[0], checkpoint)
    assert list(found)[0] == task.name and found[task.name] > 0.99 >= threshold
    assert list(found.values()) == sorted(found.values(), reverse=True) and len(found) == 3


def test_the_shipped_model_knows_a_foreign_instruction_as_far():
    checkpoint = str(ROOT / "assets" / "tagi-lora")
    tagi = TAGI.load(checkpoint)
    foreign = ("Given a news article, write a short summary of the article.",
               "Decide whether the hypothesis follows from the premise; the label is entailment or contradiction.")
    assert all("FAR" in novelty.tell(tagi, text, checkpoint) for text in foreign)
    assert "near" in novelty.tell(tagi, "Which city is it? Put it in quotes.", checkpoint)


@pytest.mark.parametrize("flags, said", [
    ([*ASK, "--demo", "no arrow"], "=>"), (["--demo", "a => b"], "--demo"),
    (["--input", "a"], "--instruction"), (["--save", "x"], "--instruction"), ([*ASK, "--choices", "a|a"], "--choices"),
    ([*ASK, "--choices", "a|b", "--beams", "2"], "--beams"), ([*ASK, "--lossy", "--save", "x"], "--lossy"),
    ([*ASK, "--save", "x", "--merge", "x"], "--save"), ([*ASK, "--save", "x", "--export", "y"], "--lossy"),
    ([*ASK, "--save", "RUNS"], "--save"), (["--adapter", "RUNS", "--input", "a"], "no saved adapter"),
    ([*ASK, "--instruction", "Find the day."], "--combine"), ([*ASK, "--combine"], "--combine"),
    ([*ASK, "--instruction", "Find the day.", "--combine", "1"], "weights"), ([*ASK, "--instruction", "Find the day.", "--combine", "1,x"], "--combine"),
    ([*ASK, "--instruction", "Find the day.", "--combine", "0,0"], "weights"),
    ([*ASK, "--scale", "nan"], "--scale"), ([*ASK, "--choices", "a||b"], "--choices"),
    ([*ASK, "--inputs", "nowhere.txt"], "nowhere.txt"), (["--instructions", "nowhere.jsonl"], "nowhere.jsonl"),
    ([*ASK, "--instructions", "x.jsonl"], "--instructions"), ([*ASK, "--adapter", "x"], "--adapter"),
    ([*ASK, "--export", "x"], "--lossy"), ([*ASK, "--merge", "x"], "--lossy"),
    ([*ASK, "--beam", "2"], "--beam")])
def test_bad_input_is_one_line(project, flags, said, tmp_path):
    places = {"x": tmp_path / "x", "y": tmp_path / "y", "RUNS": project.runs}
    assert said in project.refuses("adapt", *(places.get(word, word) for word in flags))
    assert not (tmp_path / "x").exists() and not (tmp_path / "y").exists()


@pytest.mark.parametrize("row", [{"input": "a"}, {"instruction": " ", "input": "a"}, {"instruction": "a", "input": ""},
                                 {"instruction": "a", "input": "b", "demonstrations": {"a": "b"}},
                                 {"instruction": "a", "input": "b", "demonstrations": [["a"]]}])
def test_a_bad_line_of_tasks_is_named(project, tmp_path, row):
    path = tmp_path / "tasks.jsonl"
    path.write_text(json.dumps(row) + "\n")
    assert str(path) in project.refuses("adapt", "--instructions", path)


def test_an_empty_line_or_file_of_inputs_is_named(project, tmp_path):
    path = tmp_path / "inputs.txt"
    path.write_text("Anna went to Paris.\n\nTom saw a dog.\n")
    line = project.refuses("adapt", *ASK, "--inputs", path, "--batch-size=8")
    assert str(path) in line and "line 2 is empty" in line
    path.write_bytes(b"\xff\xfe\x00")
    assert str(path) in project.refuses("adapt", *ASK, "--inputs", path)
    path.write_bytes(b"")
    assert "it is empty" in project.refuses("adapt", *ASK, "--inputs", path)
    assert str(tmp_path) in project.refuses("adapt", *ASK, "--inputs", tmp_path)


def test_inputs_may_come_by_a_pipe_of_the_shells(project, tmp_path):
    os.mkfifo(tmp_path / "pipe")
    writer = threading.Thread(target=(tmp_path / "pipe").write_text, args=["Anna went to Paris.\n"])
    writer.start()
    assert project.run("adapt", *ASK, "--inputs", tmp_path / "pipe").count("\n") == 1
    writer.join()


def test_an_adapter_whose_llm_is_elsewhere_names_it_and_takes_a_checkpoint(project, tmp_path):
    one = project.run("adapt", *ASK, "--input", "Anna went to Paris.", "--save", tmp_path / "kept")
    (tmp_path / "far" / "away").mkdir(parents=True)
    moved = shutil.move(tmp_path / "kept", tmp_path / "far" / "away" / "kept")
    with pytest.raises(SystemExit) as end:
        call(adapt, "--adapter", str(moved), "--input", "Anna went to Paris.")
    assert end.value.code == 2
    assert project.run("adapt", "--adapter", moved, "--input", "Anna went to Paris.", *SHORT) == one


@pytest.mark.parametrize("damage", ["swapped", "a tensor gone", "scale", "rank", "task", "cut", "config cut"])
def test_a_damaged_adapter_is_refused(full, alone, tmp_path, damage):
    folder = str(tmp_path / "kept")
    TAGI.load(full).adapt(INSTRUCTIONS[:1]).save(folder)
    path = f"{folder}/adapter.safetensors"
    record = yaml.safe_load(open(f"{folder}/config.yaml"))
    if damage == "swapped":
        TAGI.load(alone).adapt(INSTRUCTIONS[:1]).save(str(tmp_path / "other"))
        shutil.copy(tmp_path / "other" / "adapter.safetensors", path)
    elif damage == "a tensor gone":
        common.save_tensors(path, dict(list(load_file(path).items())[1:]))
    elif damage == "cut":
        os.truncate(path, 100)
    elif damage == "config cut":
        os.truncate(f"{folder}/config.yaml", 100)
    else:
        changed = {"scale": {"scale": "abc"}, "rank": {"rank": 4}, "task": {"adapted_to": None}}[damage]
        (tmp_path / "kept" / "config.yaml").write_text(yaml.safe_dump(record | changed))
    with pytest.raises(UserError, match=folder):
        Adapter.load(folder)


def test_loaded_adapters_of_several_models_are_not_combined_and_those_of_one_are(full, alone, tmp_path):
    for name, checkpoint in (("a", full), ("b", full), ("c", alone)):
        TAGI.load(checkpoint).adapt(INSTRUCTIONS[:1]).save(str(tmp_path / name))
    a, b, c = (Adapter.load(str(tmp_path / name)) for name in "abc")
    for pair in ([a, c], [c, a]):
        with pytest.raises(UserError, match="several models"):
            Adapter.combine(pair)
    tagi = TAGI.load(full)
    both = scores(tagi, Adapter.combine([a, b]))
    assert torch.equal(both, scores(tagi, Adapter.combine([Adapter.load(str(tmp_path / "a")), tagi.adapt(INSTRUCTIONS[:1])])))


def test_a_sum_of_sums_is_told_and_exported_as_one(alone, tmp_path):
    tagi = TAGI.load(alone)
    a, b = tagi.adapt(INSTRUCTIONS[:2])
    again = Adapter.combine([Adapter.combine([a, b], [0.5, 2.0]), b], [1.0, 0.25])
    assert [part["weight"] for part in again.tasks[0]["combined"]] == [0.5, 2.0, 0.25]
    again.export(str(tmp_path / "out"))
    card = (tmp_path / "out" / "README.md").read_text()
    assert card.count("Instruction (weight") == 3 and "not measured" in card


def test_a_second_thread_cannot_merge_while_one_generates_and_a_failed_merge_leaves_nothing(alone):
    tagi, caught = TAGI.load(alone), []
    adapter, before = tagi.adapt(INSTRUCTIONS[:1]), plain(TAGI.load(alone))

    def other():
        try:
            tagi.merge(adapter)
        except RuntimeError as error:
            caught.append(str(error))
    with tagi.adapted(adapter):
        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
    assert len(caught) == 1 and tagi.merged is None
    broken = Adapter(dict(list(adapter.weights.items())[:-1]), adapter.states, adapter.mask, adapter.fusion, model=tagi)
    with pytest.raises(KeyError):
        tagi.merge(broken)
    assert torch.equal(plain(tagi), before)


def test_an_adapter_made_in_bf16_is_run_in_fp32(full, tmp_path):
    TAGI.load(full, precision="bf16").adapt(INSTRUCTIONS[:1]).save(str(tmp_path / "kept"))
    own = TAGI.load(str(tmp_path / "kept"))
    found, expected = scores(own, Adapter.load(str(tmp_path / "kept"))), scores(TAGI.load(full), TAGI.load(full).adapt(INSTRUCTIONS[:1]))
    assert found.isfinite().all() and (found - expected).abs().mean() < 0.1 * expected.abs().mean()


def test_a_scaled_exports_card_claims_no_score_and_a_saved_ones_names_its_hypernetwork(alone, tmp_path):
    tagi = TAGI.load(alone)
    tagi.adapt(INSTRUCTIONS[:1], scale=0.5).export(str(tmp_path / "half"))
    assert "not measured" in (tmp_path / "half" / "README.md").read_text()
    tagi.adapt(INSTRUCTIONS[:1]).save(str(tmp_path / "kept"))
    loaded = Adapter.load(str(tmp_path / "kept"))
    loaded.check(TAGI.load(str(tmp_path / "kept")))
    loaded.export(str(tmp_path / "out"))
    card = (tmp_path / "out" / "README.md").read_text()
    assert t5.tensors_digest(tagi.trainable()) in card and "the same" in card


def test_white_space_one_text_and_nothing_are_no_instructions(full):
    tagi = TAGI.load(full)
    for wrong in ("say it", ["  "], [*INSTRUCTIONS, "\n"]):
        with pytest.raises(UserError, match="list of instructions"):
            tagi.adapt(wrong)
    with pytest.raises(UserError, match="weights"):
        Adapter.combine([])
    assert len(tagi.adapt(INSTRUCTIONS[:2])[1:1]) == 0


TWO = INSTRUCTIONS[:2]
PAIR = ("a red cat", "cat")


@pytest.mark.parametrize("instructions, demonstrations, said", [
    ("say it", None, "list of instructions"), (b"say it", None, "list of instructions"), ({"say it": 1}, None, "list of instructions"),
    ({"say it"}, None, "list of instructions"), (None, None, "list of instructions"), (7, None, "list of instructions"),
    (iter(TWO), None, "list of instructions"), ([], None, "empty"), (["say it", None], None, "number 2"), ([b"say it"], None, "number 1"),
    ([["say it"]], None, "number 1"), (["say it", 3.5], None, "number 2"), (["say \ud83d"], None, "Unicode"), ([" "], None, "white space"),
    (TWO, "pairs", "demonstrations"), (TWO, {"input": "a", "output": "b"}, "demonstrations"), (TWO, [], "0 lists for 2"), (TWO, [[PAIR]], "1 lists for 2"),
    (TWO, [[PAIR]] * 3, "3 lists for 2"), (TWO, [PAIR, PAIR], "instruction 1"), (TWO, [[], ["ab"]], "instruction 2"), (TWO, [[], [b"ab"]], "instruction 2"),
    (TWO, [[{"input": "a", "output": "b"}], []], "instruction 1"), (TWO, [[("a",)], []], "not 1"), (TWO, [[("a", "b", "c")], []], "not 3"),
    (TWO, [[("a", 1)], []], "instruction 1"), (TWO, [[("a", None)], []], "instruction 1"), (TWO, [[], None], "instruction 2"),
    (TWO, [[("a", "\udc00")], []], "Unicode"), (TWO, {0: [PAIR], 1: []}, "demonstrations"), (TWO, [{PAIR}, []], "instruction 1")])
def test_what_adapt_would_take_apart_or_miscount_is_one_line(full, instructions, demonstrations, said):
    with pytest.raises(UserError) as error:
        TAGI.load(full).adapt(instructions, demonstrations)
    line = str(error.value)
    assert said in line and "\n" not in line and len(line) <= 300


@pytest.mark.parametrize("inputs, said", [
    ("one text", "list of inputs"), (b"x", "list of inputs"), ({"a": 1}, "list of inputs"), (None, "list of inputs"), (["a", 3], "number 2"),
    ([["a"]], "number 1"), (["a", " "], "input 2 is empty"), (["a \udfff"], "Unicode"), ({"a", "b"}, "list of inputs")])
def test_what_is_no_list_of_inputs_is_one_line(full, inputs, said):
    tagi = TAGI.load(full)
    for ask in (lambda: tagi.generate(inputs, None), lambda: tagi.score_choices(inputs, [["a"]] * 2, None)):
        with pytest.raises(UserError, match=said):
            ask()


@pytest.mark.parametrize("choices, said", [
    ("ab", "choices"), (["ab", "cd"], "input 1"), ([["a"]], "1 lists for 2"), ([["a"]] * 3, "3 lists for 2"), ([], "0 lists for 2"),
    ([["a"], []], "input 2"), ([["a"], ["b", None]], "input 2"), ([{"a": 1}, ["b"]], "input 1"), ([["a"], ["\ud800"]], "Unicode"), (None, "choices"),
    ({"a": ["b"], "c": ["d"]}, "choices")])
def test_choices_are_a_list_of_texts_for_each_input(full, choices, said):
    with pytest.raises(UserError, match=said):
        TAGI.load(full).score_choices(INPUTS[:2], choices, None)


def test_adapters_and_numbers_of_another_kind_are_one_line(full):
    tagi = TAGI.load(full)
    adapters = tagi.adapt(INSTRUCTIONS[:3])
    for wrong, said in (("an instruction", "what adapt returns"), (list(adapters), "what adapt returns"), (adapters.weights, "what adapt returns"),
                        (adapters, "3 adapters for 2 inputs"), (adapters[:2], "2 adapters for 1 inputs"), (adapters[:0], "0 adapters")):
        with pytest.raises(UserError, match=said):
            tagi.generate(INPUTS[:1] if said.startswith("2") else INPUTS[:2], wrong)
    for key, value in (("batch_size", 0), ("batch_size", -1), ("batch_size", 1.5), ("num_beams", 0), ("max_new_tokens", 0), ("max_new_tokens", "8")):
        with pytest.raises(UserError, match=key):
            tagi.generate(INPUTS, None, **{key: value})
    for scale in (float("nan"), float("inf"), "1", None, [1.0], 1e38, -1001):
        with pytest.raises(UserError, match="scale"):
            tagi.adapt(TWO, scale=scale)
    for index in ([0.5], [True, False, True], torch.tensor([1.0])):
        with pytest.raises(UserError, match="whole numbers"):
            adapters.select(index)
    assert len(adapters.select([])) == 0 and len(adapters.select(range(2))) == 2
    for wrong, weights in (("ab", None), ([adapters[0], "x"], None), ([adapters[0], adapters[1]], {0: 1, 1: 2}), ([adapters[0], adapters[1]], "12")):
        with pytest.raises(UserError, match="combine takes"):
            Adapter.combine(wrong, weights)


@pytest.mark.parametrize("how", [{"precision": "fp8"}, {"precision": "float32"}, {"precision": None}, {"device": "tpu"}, {"device": ""},
                                 {"device": "cpu:x"}])
def test_a_precision_or_device_that_is_none_is_refused(full, how):
    with pytest.raises(UserError, match=next(iter(how))):
        TAGI.load(full, **how)


def test_lists_of_other_kinds_are_lists(full):
    """Tuples, arrays, and pairs written as lists give the same adapter; no inputs give no answers."""
    numpy, tagi = pytest.importorskip("numpy"), TAGI.load(full)
    expected = scores(tagi, tagi.adapt(TWO, [[PAIR], []]).select([0, 0, 1, 1]))
    for instructions in (tuple(TWO), numpy.array(TWO), numpy.array(TWO, dtype=object)):
        found = tagi.adapt(instructions, ([list(PAIR)], ()), scale=numpy.float32(1)).select([0, 0, 1, 1])
        assert torch.equal(scores(tagi, found, numpy.array(INPUTS)), expected)
    one = tagi.adapt(TWO[:1])
    assert tagi.generate([], one) == [] and tagi.score_choices([], [], None) == []
    assert one.tasks == [{"instruction": TWO[0], "demonstrations": []}]


def test_a_model_and_an_adapter_are_told_in_one_line(full):
    tagi = TAGI.load(full)
    for one in (tagi, tagi.adapt(TWO), tagi.adapt(TWO)[:0], Adapter.combine(list(tagi.adapt(TWO)))):
        assert "\n" not in repr(one) and len(repr(one)) < 200 and str(one) == repr(one)
    assert "rank 2" in repr(tagi) and "generator attention" in repr(tagi)


def test_a_model_is_loaded_to_the_gpu_where_there_is_one_unless_told(full, monkeypatch):
    asked = []

    def load_llm(path, device, *args):
        asked.append(device)
        raise UserError("enough")
    monkeypatch.setattr(t5, "load_llm", load_llm)
    for there in (True, False):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: there)
        for device in ((), ("auto",), (None,), ("cpu",), ("cuda",), ("cuda:1",), (torch.device("cpu"),)):
            with pytest.raises(UserError, match="enough" if there or "cuda" not in str(device) else "no GPU"):
                TAGI.load(full, *device)
    assert asked == ["cuda"] * 3 + ["cpu", "cuda", "cuda:1", "cpu"] + ["cpu"] * 5


@pytest.mark.parametrize("stdout, code, said", [("full", 2, "standard output cannot be written"), ("closed", None, ""), ("ascii", None, "")])
def test_answers_on_a_full_a_closed_and_an_ascii_terminal(stdout, code, said, monkeypatch):
    stream = {"full": lambda: open("/dev/full", "w"), "closed": lambda: None,
              "ascii": lambda: io.TextIOWrapper(io.BytesIO(), encoding="ascii")}[stdout]()
    err, ended = io.StringIO(), None
    monkeypatch.setattr(sys, "stdout", stream)
    monkeypatch.setattr(sys, "stderr", err)
    try:
        adapt.main(["--device=cpu", "--instruction", "Find the city.", "--json", "--input", "A cat came to Rome by boat, née."])
    except SystemExit as end:
        ended = end.code
    monkeypatch.undo()
    lines = [line for line in err.getvalue().splitlines() if not line.startswith("warning:")]
    assert ended == code and len(lines) == bool(said) and said in "".join(lines), lines
    if stdout == "ascii":
        told = stream.buffer.getvalue()
        assert json.loads(told)["input"].endswith("née.") and told.isascii()


def test_a_parent_folder_that_was_made_for_a_failed_save_goes_too(alone, tmp_path):
    adapter = TAGI.load(alone).adapt(INSTRUCTIONS[:1])
    with mock.patch.object(common, "save_file", side_effect=OSError(28, "No space left on device")):
        with pytest.raises(UserError, match="No space left"):
            adapter.save(str(tmp_path / "a" / "b" / "c"))
    assert not list(tmp_path.iterdir())
    adapter.save(str(tmp_path / "a" / "b" / "c"))
    assert [path.name for path in (tmp_path / "a" / "b").iterdir()] == ["c"]


def test_a_folder_that_is_no_adapter_is_named(project, tmp_path):
    for folder in (tmp_path / "nowhere", project.runs / "finetune"):
        with pytest.raises(UserError, match=str(folder)):
            Adapter.load(str(folder))
