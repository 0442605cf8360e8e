"""What is refused of a T5 checkpoint's files, each in one line that names the file, and what of them changes nothing."""
import json
import time

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSeq2SeqLM

import common
import data
import t5
from conftest import INPUTS, OUTPUTS, make_llm, make_tokenizer


@pytest.fixture
def folder(tmp_path):
    """A checkpoint of random weights, as `t5.save_llm` writes it."""
    llm, path = make_llm("v1.1"), tmp_path / "llm"
    t5.save_all_but_weights(path, llm, make_tokenizer())
    common.save_tensors(f"{path}/model.safetensors", dict(llm.named_parameters()), {"format": "pt"})
    return path


def change(path, **values):
    """Set keys of a JSON file; None deletes."""
    content = json.loads(path.read_text()) | values
    path.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))


def refusal(folder) -> str:
    begun = time.time()
    with pytest.raises(common.UserError) as told:
        t5.load_llm(str(folder))
    assert str(folder) in str(told.value) and len(str(told.value)) <= 300 and time.time() - begun < 20
    return str(told.value)


@pytest.mark.parametrize("field, value", [
    ("d_model", "24"), ("d_model", 0), ("d_model", -24), ("d_model", 24.5), ("d_model", 10 ** 30), ("d_model", [24]), ("d_ff", True),
    ("num_layers", 10 ** 9), ("num_layers", 0), ("num_decoder_layers", 10 ** 9), ("num_heads", {}), ("d_kv", 10 ** 9),
    ("vocab_size", 10 ** 12), ("vocab_size", 0), ("relative_attention_num_buckets", 0), ("relative_attention_max_distance", 4),
    ("relative_attention_num_buckets", 10 ** 9), ("dropout_rate", 7), ("dropout_rate", float("nan")), ("layer_norm_epsilon", float("inf")),
    ("layer_norm_epsilon", "1e-6"), ("hidden_size", 10 ** 9), ("is_encoder_decoder", False), ("feed_forward_proj", 3),
    ("feed_forward_proj", "a-b-c"), ("model_type", ["t5"]), ("architectures", 5), ("num_hidden_layers", 10 ** 9)])
def test_a_size_of_another_type_or_out_of_all_proportion_is_refused_at_once(folder, field, value):
    change(folder / "config.json", **{field: value})
    refusal(folder)


@pytest.mark.parametrize("sizes", [{"d_ff": 900_000}, {"vocab_size": 9_000_000}, {"num_layers": 1000}, {"d_kv": 9999, "num_heads": 999}])
def test_more_weights_than_the_files_have_bytes_are_refused_before_memory_is_asked_for(folder, sizes):
    change(folder / "config.json", **sizes)
    assert "config.json tells of at least" in refusal(folder)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -1e30])
def test_weights_that_are_not_finite_are_refused_by_name(folder, value):
    weights = load_file(folder / "model.safetensors")
    name = "encoder.block.1.layer.0.SelfAttention.k.weight"
    weights[name][0, 0] = value
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    assert name in refusal(folder)


@pytest.mark.parametrize("kind", [torch.int8, torch.int64, torch.bool])
def test_weights_of_a_type_that_holds_no_numbers_with_a_point_are_refused(folder, kind):
    weights = load_file(folder / "model.safetensors")
    weights["lm_head.weight"] = weights["lm_head.weight"].to(kind)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    assert "lm_head.weight" in refusal(folder)


def test_a_tokenizer_larger_than_the_embedding_is_refused(folder):
    tokenizer = make_tokenizer()
    tokenizer.add_tokens([f"more{n}" for n in range(60)])
    tokenizer.save_pretrained(folder)
    assert "60 embeddings" in refusal(folder)


@pytest.mark.parametrize("name, said", [("pad_token", "padding"), ("eos_token", "end")])
def test_a_tokenizer_without_padding_or_end_is_refused(folder, name, said):
    change(folder / "tokenizer_config.json", tokenizer_class="PreTrainedTokenizerFast", **{name: None})
    assert said in refusal(folder)


@pytest.mark.parametrize("start", [None, -1, 60, "0", [0], 0.5])
def test_a_start_token_that_is_none_is_refused(folder, start):
    for name in ("config.json", "generation_config.json"):
        change(folder / name, decoder_start_token_id=start)
    refusal(folder)


def test_a_start_token_in_one_of_the_two_files_is_enough_for_training_and_answers(folder):
    before = answers(folder)
    for name in ("config.json", "generation_config.json"):
        text = (folder / name).read_text()
        change(folder / name, decoder_start_token_id=None)
        assert answers(folder) == before
        (folder / name).write_text(text)


def answers(folder):
    llm, tokenizer = t5.load_llm(str(folder))
    ids, mask = data.tokenize(tokenizer, INPUTS, 16)
    labels = data.labels(tokenizer, OUTPUTS, 8)
    with torch.no_grad():
        logits = t5.logits(llm, ids, mask, labels)
        out = llm.generate(input_ids=ids, attention_mask=mask, max_new_tokens=8)
    return logits.tolist(), out.tolist()


CHANGES = {"num_beams": 3, "do_sample": True, "temperature": 5.0, "repetition_penalty": 9.0, "no_repeat_ngram_size": 1, "max_length": 2,
           "min_length": 8, "forced_bos_token_id": 7, "forced_eos_token_id": 9, "bad_words_ids": [[5], [6]], "length_penalty": 3.0,
           "suppress_tokens": [4, 5, 6], "begin_suppress_tokens": [4, 5, 6, 7], "eos_token_id": 5, "pad_token_id": 9,
           "decoder_start_token_id": 0, "num_return_sequences": 2, "return_dict_in_generate": True, "exponential_decay_length_penalty": [1, 2.0]}


@pytest.mark.parametrize("name", ["config.json", "generation_config.json"])
def test_what_a_checkpoint_says_of_decoding_changes_no_greedy_answer(folder, name):
    before = answers(folder)
    for key, value in CHANGES.items():
        text = (folder / name).read_text()
        change(folder / name, **{key: value})
        try:
            found = answers(folder)
        except common.UserError:                                # Transformers refuses some of them by itself
            found = before
        assert found == before, key
        (folder / name).write_text(text)


@pytest.mark.parametrize("key, value", [("return_dict", False), ("output_attentions", True),
                                        ("output_hidden_states", True), ("torchscript", True), ("use_cache", False)])
def test_what_a_config_says_of_the_form_of_results_changes_none(folder, key, value):
    before = answers(folder)
    change(folder / "config.json", **{key: value})
    assert answers(folder) == before


@pytest.mark.parametrize("damage", ["encoder only", "prefix", "peft", "deeper"])
def test_weights_of_another_model_are_refused_by_name(folder, damage):
    path = folder / "model.safetensors"
    weights = load_file(path)
    if damage == "encoder only":
        weights = {name: x for name, x in weights.items() if not name.startswith("decoder")}
    elif damage == "prefix":
        weights = {"module." + name: x for name, x in weights.items()}
    elif damage == "peft":
        weights = {"base_model.model." + name.replace("q.weight", "q.base_layer.weight"): x for name, x in weights.items()}
    else:
        for name in [name for name in weights if ".block.1." in name]:
            weights[name.replace(".block.1.", ".block.2.")] = weights[name].clone()
    save_file(weights, path, {"format": "pt"})
    assert "weight" in refusal(folder)


# ------------------------------------------------------------------------------------------------ tokenizers

@pytest.mark.parametrize("kept", [(), ("tokenizer_config.json",), ("special_tokens_map.json", "tokenizer_config.json")])
def test_a_folder_without_a_vocabulary_is_refused(folder, kept):
    for path in folder.glob("*token*"):
        if path.name not in kept:
            path.unlink()
    assert "token" in refusal(folder)


@pytest.mark.parametrize("extra_ids", [0, 1, 30, 100])
def test_a_folder_without_a_vocabulary_is_refused_whatever_its_special_tokens(folder, extra_ids):
    (folder / "tokenizer.json").unlink()
    change(folder / "tokenizer_config.json", extra_ids=extra_ids, additional_special_tokens=None, extra_special_tokens=None)
    refusal(folder)


@pytest.mark.parametrize("extra_ids", [10 ** 30, -1, "100", 1e9, [1]])
def test_more_sentinels_than_there_can_be_are_refused_at_once(folder, extra_ids):
    change(folder / "tokenizer_config.json", extra_ids=extra_ids)
    assert "extra_ids" in refusal(folder)


def test_texts_that_the_tokenizer_does_not_know_are_refused():
    tokenizer = make_tokenizer()
    t5.check_knows(tokenizer, ["a red cat"] * 3 + ["猫は猫"] * 2, "these")
    t5.check_knows(tokenizer, [], "none")
    for text in ("猫 は 猫 и кот", "我喜欢吃苹果我喜欢吃苹果 , . a", "ÀÉÎ ÕÜ"):
        with pytest.raises(common.UserError, match="these texts: the tokenizer knows .% of the char|knows 1.%"):
            t5.check_knows(tokenizer, [text] * 1000 + ["a cat"], "these texts")


def test_the_tests_own_checkpoint_loads_as_it_is(folder):
    llm, _ = t5.load_llm(str(folder))
    plain = AutoModelForSeq2SeqLM.from_pretrained(folder)
    assert all(torch.equal(p, plain.get_parameter(name)) for name, p in llm.named_parameters())
