"""Small checkpoints of every architecture in the hub's own forms, from file to evaluation."""
import io
import json
import os
import shutil

import pytest
import sentencepiece
import torch
import yaml
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForSeq2SeqLM

pytest.register_assert_rewrite("stages")
import common
import data
import evaluate
import lora
import t5
import train_hyper
import train_teacher
from conftest import (ALL, INPUTS, INSTRUCTIONS, OUTPUTS, close, lengthen, randomize,
                      student_options, tokens)
from hypernet import TAGI
from stages import call, write_suite

PIECES = 300                    # of the SentencePiece model, pad, eos and unk among them
# As in T5 v1.1 Small, d_model is not num_heads x d_kv.
SHAPE = {"d_model": 24, "d_kv": 4, "d_ff": 20, "num_heads": 3, "num_layers": 2}
COMMON = SHAPE | {
    "decoder_start_token_id": 0, "dropout_rate": 0.1, "eos_token_id": 1, "initializer_factor": 1.0,
    "is_encoder_decoder": True, "layer_norm_epsilon": 1e-06, "pad_token_id": 0,
    "relative_attention_num_buckets": 32, "use_cache": True}
V1_1 = COMMON | {
    "architectures": ["T5ForConditionalGeneration"], "feed_forward_proj": "gated-gelu",
    "model_type": "t5", "num_decoder_layers": 2, "output_past": True, "tie_word_embeddings": False,
    "vocab_size": 512}
LONG = V1_1 | {
    "architectures": ["LongT5ForConditionalGeneration"], "model_type": "longt5", "local_radius": 3,
    "global_block_size": 4, "n_positions": 4096, "relative_attention_max_distance": 128,
    "torch_dtype": "float32", "transformers_version": "4.20.0.dev0"}

# config.json by architecture, with the hub's keys and small numbers. The vocabulary is padded, as
# 32 100 to 32 128 is.
CONFIGS = {
    "t5": COMMON | {
        "architectures": ["T5ForConditionalGeneration"], "model_type": "t5", "n_positions": 512,
        "output_past": True, "vocab_size": 512,
        "task_specific_params": {"summarization": {
            "early_stopping": True, "length_penalty": 2.0, "max_length": 200, "min_length": 30,
            "no_repeat_ngram_size": 3, "num_beams": 4, "prefix": "summarize: "}}},
    "t5-v1_1": V1_1,
    "lm-adapt, t0, tk-instruct": V1_1 | {
        "_name_or_path": "google/t5-base-lm-adapt", "gradient_checkpointing": False,
        "torch_dtype": "float32", "transformers_version": "4.18.0.dev0"},
    "flan-t5": V1_1 | {
        "n_positions": 512, "relative_attention_max_distance": 128,
        "transformers_version": "4.23.1",
        "task_specific_params": {"translation_en_to_de": {"max_length": 300, "num_beams": 4}}},
    "byt5": V1_1 | {
        "_name_or_path": "google/byt5-small", "num_layers": 3, "num_decoder_layers": 1,
        "tokenizer_class": "ByT5Tokenizer", "transformers_version": "4.7.0.dev0",
        "vocab_size": 384},
    "madlad400": V1_1 | {"n_positions": 512, "transformers_version": "4.23.1"},
    "mt5": V1_1 | {
        "architectures": ["MT5ForConditionalGeneration"], "model_type": "mt5",
        "tokenizer_class": "T5Tokenizer", "transformers_version": "4.10.0.dev0",
        "vocab_size": 384},
    "umt5": V1_1 | {
        "architectures": ["UMT5ForConditionalGeneration"], "model_type": "umt5",
        "dense_act_fn": "gelu_new", "is_gated_act": True, "scalable_attention": True,
        "tokenizer_class": "T5Tokenizer", "torch_dtype": "float32",
        "transformers_version": "4.31.0.dev0"},
    "longt5 local": LONG | {"encoder_attention_type": "local"},
    "longt5 global": LONG | {"encoder_attention_type": "transient-global"},
}
EXTRA_IDS = {"mt5": 0, "byt5": 125}             # sentinels, where there are not 100
NEW = ("byt5", "umt5", "longt5 local", "longt5 global")         # which the other tests do not have
FORMS = ("safetensors", "bin", "sharded safetensors", "sharded bin")
# It is in v1.0's files, and nothing reads it.
BIAS = "decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight"


@pytest.fixture(scope="session")
def suite(tmp_path_factory):
    """The built-in suite, cut down, with a SentencePiece model of its texts beside it."""
    root = tmp_path_factory.mktemp("hub")
    write_suite(root / "data")
    model, lines = io.BytesIO(), (root / "data/corpus.txt").read_text().splitlines()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines), model_writer=model, model_type="unigram", vocab_size=PIECES,
        pad_id=0, eos_id=1, unk_id=2, bos_id=-1, minloglevel=2)
    (root / "spiece.model").write_bytes(model.getvalue())
    return root


def random_weights(kind):
    """{name: tensor} as the published file of this architecture has them."""
    config = dict(CONFIGS[kind])
    llm = AutoModelForSeq2SeqLM.from_config(AutoConfig.for_model(**config))
    generator = torch.Generator().manual_seed(0)
    weights = {}
    for name, p in llm.state_dict().items():
        x = torch.randn(p.shape, generator=generator)
        weights[name] = 1 + 0.3 * x if p.dim() == 1 else x * p.shape[1] ** -0.5
    shape = config["vocab_size"], config["d_model"]
    weights["shared.weight"] = 0.6 * torch.randn(shape, generator=generator)
    for name in ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight"):
        weights[name] = weights["shared.weight"].clone()
    if kind == "t5":
        weights[BIAS] = torch.randn(32, config["num_heads"], generator=generator)
    if kind == "madlad400":                         # neither `shared` nor the encoder's
        absent = ("shared.weight", "encoder.embed_tokens.weight")
    elif kind == "t5" or kind.startswith("longt5"):                             # `shared` alone
        absent = ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight", "lm_head.weight")
    else:
        absent = ()
    return {name: x.contiguous() for name, x in weights.items() if name not in absent}


def write_weights(folder, weights, form):
    """One file, or two with an index."""
    save, name = torch.save, "pytorch_model{}.bin"
    if "safetensors" in form:
        save, name = save_file, "model{}.safetensors"
    if not form.startswith("sharded"):
        return save(weights, folder / name.format(""))
    names, places = sorted(weights), {}
    for n, part in enumerate((names[::2], names[1::2]), 1):
        shard = name.format(f"-0000{n}-of-00002")
        save({key: weights[key] for key in part}, folder / shard)
        places |= dict.fromkeys(part, shard)
    size = sum(x.nbytes for x in weights.values())
    index = {"metadata": {"total_size": size}, "weight_map": places}
    (folder / (name.format("") + ".index.json")).write_text(json.dumps(index))


def write_checkpoint(folder, suite, kind, form="safetensors", weights=None):
    """A folder as `git clone` of a hub repository leaves it; returns its weights."""
    folder.mkdir()
    weights = random_weights(kind) if weights is None else weights
    (folder / "config.json").write_text(json.dumps(CONFIGS[kind]))
    write_weights(folder, weights, form)
    n = EXTRA_IDS.get(kind, 100)
    special = {"eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}
    extra = {"additional_special_tokens": [f"<extra_id_{i}>" for i in range(n)]} if n else {}
    (folder / "special_tokens_map.json").write_text(json.dumps(special | extra))
    its = {"extra_ids": n, "additional_special_tokens": None, "tokenizer_class": "T5Tokenizer",
           "sp_model_kwargs": {}, "special_tokens_map_file": "cache/special_tokens_map.json"}
    if kind == "byt5":
        its["tokenizer_class"] = "ByT5Tokenizer"
    else:
        shutil.copy(suite / "spiece.model", folder)
    (folder / "tokenizer_config.json").write_text(json.dumps(special | its | extra))
    return weights


def attention_of(kind):
    return "eager" if kind.startswith("longt5") else "sdpa"


def load(folder, kind):
    return t5.load_llm(str(folder), attention=attention_of(kind))


# ---------------------------------------------------------------------------------------- the files

@pytest.mark.parametrize("kind, form", [
    *((kind, "bin") for kind in CONFIGS if kind not in ("t5", "t5-v1_1")),
    *(("t5-v1_1", form) for form in FORMS), *(("t5", form) for form in FORMS)])
def test_every_weight_of_a_published_file_arrives(kind, form, suite, tmp_path):
    """Bit for bit, under its own name; embeddings that a file has once are everywhere."""
    weights = write_checkpoint(tmp_path / "hub", suite, kind, form)
    llm, _ = load(tmp_path / "hub", kind)
    loaded = llm.state_dict()
    assert weights.keys() - {BIAS} <= loaded.keys()
    assert all(torch.equal(loaded[name], x) for name, x in weights.items() if name != BIAS)
    first = "decoder.embed_tokens.weight" if kind == "madlad400" else "shared.weight"
    for module in (llm.shared, llm.get_encoder().embed_tokens, llm.get_decoder().embed_tokens):
        assert torch.equal(module.weight, weights[first])


@pytest.mark.parametrize("kind", CONFIGS)
def test_a_head_is_the_files_own_and_only_v1_0_scales_what_it_reads(kind, suite, tmp_path):
    """Logits are the decoder's states times lm_head.weight, or shared.weight where the file has no
    other; in T5 v1.0 over sqrt(d_model). LongT5's files have neither a head nor the scaling."""
    weights = write_checkpoint(tmp_path / "hub", suite, kind)
    llm, tokenizer = load(tmp_path / "hub", kind)
    ids, mask = data.tokenize(tokenizer, ["Find the city .", "Repeat it"], 64)
    labels = data.labels(tokenizer, ["Paris", "it it"], 64)
    with torch.no_grad():
        with t5.headless(llm.eval()):
            states = t5.logits(llm, ids, mask, labels)
        logits = t5.logits(llm, ids, mask, labels)
        # What the head reads has the scaling in it already; what the decoder returns does not.
        encoded = llm.get_encoder()(input_ids=ids, attention_mask=mask)[0]
        decoder_ids = llm.prepare_decoder_input_ids_from_labels(labels)
        decoded = llm.get_decoder()(input_ids=decoder_ids, encoder_hidden_states=encoded,
                                    encoder_attention_mask=mask)[0]
    head = weights.get("lm_head.weight", weights.get("shared.weight"))
    scale = SHAPE["d_model"] ** -0.5 if kind == "t5" else 1
    torch.testing.assert_close(states, decoded * scale, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(logits, decoded * scale @ head.T, rtol=1e-4, atol=1e-4)
    assert ("lm_head.weight" in weights) == (llm.lm_head.weight is not llm.shared.weight)


@pytest.mark.parametrize("kind", CONFIGS)
def test_no_target_sees_those_after_it_and_all_inputs_see_each_other(kind, suite, tmp_path):
    """Another last token changes the last target's logits alone, and every state of the input."""
    write_checkpoint(tmp_path / "hub", suite, kind)
    llm, _ = load(tmp_path / "hub", kind)
    ids = torch.tensor([[5, 9, 7, 8, 1], [5, 9, 7, 8, 11]])
    mask = torch.ones_like(ids)
    with torch.no_grad():
        logits = llm.eval()(input_ids=ids[:1].expand(2, -1), attention_mask=mask,
                            decoder_input_ids=ids).logits
        states = llm.get_encoder()(input_ids=ids, attention_mask=mask)[0]
    assert ((logits[0] - logits[1]).abs().amax(-1) > 1e-3).tolist() == [False] * 4 + [True]
    assert ((states[0] - states[1]).abs().amax(-1) > 1e-3).all()


@pytest.mark.parametrize("kind", [kind for kind in CONFIGS if kind != "byt5"])
def test_spiece_model_alone_gives_sentencepieces_ids(kind, suite, tmp_path):
    """The ids of Google's library, then the end token; sentinels come last, in reverse."""
    write_checkpoint(tmp_path / "hub", suite, kind)
    _, tokenizer = load(tmp_path / "hub", kind)
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(suite / "spiece.model"))
    texts = (suite / "data/corpus.txt").read_text().splitlines()[:50]
    texts += ["  Two  spaces\nand a line ", "ﬁve ½"]
    for text in texts:
        assert tokenizer(text)["input_ids"] == pieces.encode(" ".join(text.split())) + [1]
    n = EXTRA_IDS.get(kind, 100)
    assert len(tokenizer) == PIECES + n <= CONFIGS[kind]["vocab_size"]
    for i in range(n):
        assert tokenizer.convert_tokens_to_ids(f"<extra_id_{i}>") == PIECES + n - 1 - i


def test_byt5_reads_bytes(suite, tmp_path):
    """Id 3 + byte and the end token, every space kept; no file holds a vocabulary."""
    write_checkpoint(tmp_path / "hub", suite, "byt5")
    _, tokenizer = load(tmp_path / "hub", "byt5")
    text = "Output:  é "
    ids = tokenizer(text)["input_ids"]
    assert ids == [3 + byte for byte in text.encode()] + [1] and len(tokenizer) == 384
    assert tokenizer.batch_decode([ids], skip_special_tokens=True) == [text]


def test_umt5_has_a_position_bias_in_every_layer(suite, tmp_path):
    """Unlike the others', which the first layer's serves."""
    write_checkpoint(tmp_path / "hub", suite, "umt5")
    llm, _ = load(tmp_path / "hub", "umt5")
    for block in [*llm.encoder.block, *llm.decoder.block]:
        assert block.layer[0].SelfAttention.has_relative_attention_bias


@pytest.mark.parametrize("kind", CONFIGS)
def test_what_meta_saves_computes_what_the_published_file_does(kind, suite, tmp_path):
    """A run folder made of it, and one made of that, keep head, scaling and tokenizer."""
    write_checkpoint(tmp_path / "hub", suite, kind, "bin")
    options = train_teacher.parser().parse_args([])
    folder, logits, ids = tmp_path / "hub", [], []
    for step in range(3):
        llm, tokenizer = load(folder, kind)
        batch = data.tokenize(tokenizer, INPUTS, 64)
        with torch.no_grad():
            logits.append(t5.logits(llm.eval(), *batch, data.labels(tokenizer, OUTPUTS, 64)))
        ids.append(batch[0])
        folder = tmp_path / str(step)
        t5.save_llm(str(folder), vars(options), llm, tokenizer, finished=True)
    assert torch.equal(logits[0], logits[1]) and torch.equal(logits[0], logits[2])
    assert torch.equal(ids[0], ids[1]) and torch.equal(ids[0], ids[2])


def test_a_checkpoints_own_beams_and_penalties_do_not_change_greedy_decoding(suite, tmp_path):
    """Summarization models have such settings in config.json."""
    its = {"early_stopping": True, "length_penalty": 0.8, "max_length": 3, "min_length": 8,
           "no_repeat_ngram_size": 2, "num_beams": 2, "repetition_penalty": 3.5}
    answers, kind = [], "longt5 global"
    for name, more in (("plain", {}), ("summarization", its)):
        write_checkpoint(tmp_path / name, suite, kind)
        (tmp_path / name / "config.json").write_text(json.dumps(CONFIGS[kind] | more))
        llm, tokenizer = load(tmp_path / name, kind)
        ids, mask = data.tokenize(tokenizer, INPUTS, 64)
        answers.append(llm.eval().generate(input_ids=ids, attention_mask=mask, max_new_tokens=12))
    assert torch.equal(*answers)


# --------------------------------------------------------------------------------------- the stages

@pytest.mark.parametrize("kind", CONFIGS)
def test_every_stage_runs_on_a_published_checkpoint(kind, suite, tmp_path):
    """A step each of meta, LoRA teachers, pretrain and finetune, an evaluation, and answers."""
    write_checkpoint(tmp_path / "hub", suite, kind, "bin")
    stage = {"steps": 1, "tasks": 2, "save_every": 1}
    student = stage | {"width": 16, "bottleneck": 8}
    config = {"model": str(tmp_path / "hub"), "attention": attention_of(kind),
              "data": str(suite / "data"), "runs": str(tmp_path / "runs"), "rank": 2, "alpha": 2,
              "max_instances": 5, "max_output": 4, "targets": "q,k,v,o,wo",
              "meta": stage, "lora": stage, "pretrain": student | {"text_length": 24},
              "finetune": student | {"train_norms": True, "train_embeddings": True},
              "evaluate": {"rows": "tagi,no_finetuning,teachers", "eval_instances": 2}}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    words = ["--config", str(tmp_path / "config.yaml")]
    call(train_teacher, "--stage", "meta", *words)
    call(train_teacher, "--stage", "lora", *words)
    call(train_hyper, "--stage", "pretrain", *words)
    call(train_hyper, "--stage", "finetune", *words)
    table = call(evaluate, *words, "--checkpoint", str(tmp_path / "runs/finetune"))
    assert "TAGI, right instruction" in table and "LoRA teachers" in table
    tagi = TAGI.load(str(tmp_path / "runs/finetune"))
    adapter = tagi.adapt(["upper"])
    assert len(adapter.fusion) == CONFIGS[kind]["num_layers"]
    assert all(B.any() for _, B in adapter.weights.values())        # they have moved from 0
    assert len(tagi.generate(INPUTS, adapter, num_beams=2, max_new_tokens=3)) == 4


# --------------------------------------------------------------------------------------- the method

@pytest.fixture(scope="module")
def folders(suite, tmp_path_factory):
    """{architecture: checkpoint folder} of those that the other tests do not have."""
    root = tmp_path_factory.mktemp("new")
    for kind in NEW:
        write_checkpoint(root / kind, suite, kind)
    return {kind: root / kind for kind in NEW}


@pytest.fixture
def make(folders, exact):
    """make(kind, *flags): a TAGI on such a checkpoint, all it trains random, in float64."""
    def make_tagi(kind, *flags):
        llm, tokenizer = load(folders[kind], kind)
        return randomize(TAGI(llm, tokenizer, student_options(*ALL, *flags))).double()
    return make_tagi


@pytest.mark.parametrize("targets", ["q,v", "q,k,v,o,wi_0,wi_1,wo"])
@pytest.mark.parametrize("kind", NEW)
def test_a_mixed_batch_merging_beams_and_ranking_agree_on_every_architecture(kind, targets, make):
    """Rows of a mixed batch are the tasks one by one, a block of instances shares a row, merged
    equals unmerged, beams and log-likelihoods are those of the instances alone."""
    tagi = make(kind, f"--targets={targets}")
    ids, mask, labels = tokens(tagi)
    adapters = tagi.adapt(INSTRUCTIONS)
    assert len(adapters.fusion) == CONFIGS[kind]["num_layers"]
    mixed = tagi(adapters, ids, mask, labels)
    choices = [["cat", "dog b", "a red"]] * 4
    answers = tagi.generate(INPUTS, adapters, num_beams=3, max_new_tokens=4)
    scores = tagi.score_choices(INPUTS, choices, adapters)
    for n in range(4):
        one = tagi.adapt([INSTRUCTIONS[n]])
        alone = tagi(one, *tokens(tagi, [INPUTS[n]], [OUTPUTS[n]]))
        close(mixed[n, :alone.shape[1]], alone[0])
        assert tagi.generate([INPUTS[n]], one, num_beams=3, max_new_tokens=4) == [answers[n]]
        close(tagi.score_choices([INPUTS[n]], choices[:1], one)[0], scores[n])
        blocks = tagi(adapters.select([n, n, n, n]), ids, mask, labels)
        close(tagi(adapters.select([n]), ids, mask, labels), blocks)
        close(tagi(adapters.select([n, n]), ids, mask, labels), blocks)
        tagi.merge(one)
        torch.testing.assert_close(tagi(one, ids, mask, labels), blocks, rtol=1e-4, atol=1e-4)
        tagi.unmerge()
    assert (mixed - tagi(adapters.select([1, 2, 3, 0]), ids, mask, labels)).abs().max() > 0.1


@pytest.mark.parametrize("kind", NEW)
def test_padding_changes_nothing_on_any_architecture(kind, make):
    """Longer padding of instruction, input and labels: the same weights and logits."""
    tagi = make(kind)
    a, a_mask = data.tokenize_instructed(tagi.tokenizer, [(i, []) for i in INSTRUCTIONS], 64)
    ids, mask, labels = tokens(tagi)

    def run(n):
        x, x_mask = lengthen(a, 7, n), lengthen(a_mask, 0, n)
        adapter = tagi.generate_adapter(*tagi.encode_instruction(x, x_mask), x_mask)
        logits = tagi(adapter, lengthen(ids, 9, n), lengthen(mask, 0, n),
                      lengthen(labels, data.IGNORE, n))
        return adapter.weights, logits[:, :labels.shape[1]][labels != data.IGNORE]

    weights, logits = run(0)
    for n in (1, 6, 40):
        long_weights, long_logits = run(n)
        close(long_weights, weights)
        close(long_logits, logits)


@pytest.mark.parametrize("kind", NEW)
def test_encoder_fusion_reaches_every_block_of_every_architecture(kind, make):
    """Other keys of the instruction in any one block change the logits."""
    tagi = make(kind)
    batch, one = tokens(tagi), tagi.adapt(INSTRUCTIONS)
    before = tagi(one, *batch)
    assert len(one.fusion) == CONFIGS[kind]["num_layers"]
    for l, (k, v) in enumerate(one.fusion):
        one.fusion[l] = (k.flip(1), v)
        assert (tagi(one, *batch) - before).abs().max() > 1e-3
        one.fusion[l] = (k, v)


@pytest.mark.parametrize("kind", NEW)
def test_checkpointing_changes_no_gradient_on_any_architecture(kind, make):
    """The backward pass runs each block again with the adapter it had."""
    gradients = []
    for checkpointing in (False, True):
        tagi = make(kind)
        if checkpointing:
            t5.checkpoint_blocks(tagi.llm, tagi.repetition)
        ids, mask = data.tokenize_instructed(tagi.tokenizer, [(i, []) for i in INSTRUCTIONS], 64)
        adapter = tagi.generate_adapter(*tagi.encode_instruction(ids, mask), mask)
        tagi(adapter, *tokens(tagi)).square().mean().backward()
        gradients.append({name: p.grad for name, p in tagi.trainable().items()})
    assert all(g is not None for g in gradients[0].values())
    close(*gradients)


# ----------------------------------------------------------------------------------------- refusals

def refused(folder, *words, attention="sdpa"):
    """load_llm ends in one line that has these words."""
    with pytest.raises(common.UserError) as error:
        t5.load_llm(str(folder), attention=attention)
    line = str(error.value)
    assert "\n" not in line and len(line) < 500, line
    assert all(word in line for word in (str(folder), *words)), line


@pytest.mark.parametrize("kind, architecture", [
    ("switch_transformers", "SwitchTransformersForConditionalGeneration"),
    ("bart", "BartForConditionalGeneration"), ("gpt2", "GPT2LMHeadModel"), ("unheard_of", None),
    ("t5", "T5EncoderModel")])
def test_another_architecture_is_refused_with_what_is_supported(kind, architecture, suite,
                                                                 tmp_path):
    """By config.json, before weights are read."""
    write_checkpoint(tmp_path / "hub", suite, "t5-v1_1")
    change = {"model_type": kind, "architectures": architecture and [architecture]}
    (tmp_path / "hub/config.json").write_text(json.dumps(V1_1 | change))
    fault = "T5EncoderModel has no decoder" if kind == "t5" else f"its model_type is {kind}"
    refused(tmp_path / "hub", fault, t5.EXPECTED)
    assert "T5, ByT5, mT5, umT5 or LongT5" in t5.EXPECTED


def test_longt5_without_eager_attention_is_refused_with_the_option(suite, tmp_path):
    """Transformers has no other code for it."""
    write_checkpoint(tmp_path / "hub", suite, "longt5 local")
    refused(tmp_path / "hub", "LongT5", "--attention eager")


Q = "encoder.block.0.layer.0.SelfAttention.q"


def leave_out(weights, *parts):
    for name in list(weights):
        if any(part in name for part in parts):
            del weights[name]


def prefix(weights):
    for name in list(weights):
        weights["module." + name] = weights.pop(name)


def wrap(weights):
    """As PEFT saves a model with LoRA layers in it."""
    weights[Q + ".base_layer.weight"] = weights.pop(Q + ".weight")
    weights[Q + ".lora_A.default.weight"] = torch.zeros(2, 24)
    weights[Q + ".lora_B.default.weight"] = torch.zeros(12, 2)


def shorten(weights):
    for name, x in weights.items():
        if len(x) == 512:
            weights[name] = x[:-1].clone()


EMBEDDINGS = ("embed_tokens", "shared", "lm_head")
# what is wrong with the weights -> how, and words of the error line
DAMAGES = {
    "one is missing": (lambda w: leave_out(w, Q), "lacks", Q),
    "the decoder is missing": (lambda w: leave_out(w, "decoder.block"), "lacks", "decoder.block.0"),
    "its own head is missing": (lambda w: leave_out(w, "lm_head"), "lacks", "lm_head.weight"),
    "embeddings are missing": (lambda w: leave_out(w, *EMBEDDINGS), "lacks", "embed_tokens.weight"),
    "a prefix": (prefix, "lacks", "weights of T5ForConditionalGeneration"),
    "PEFT's layers": (wrap, "lacks", Q),
    "one more": (lambda w: w.update({"classification_head.dense.weight": torch.zeros(2, 2)}),
                 "unknown", "classification_head.dense.weight"),
    "another shape": (lambda w: w.update({Q + ".weight": torch.zeros(8, 24)}),
                      "other shapes", "(8, 24), not (12, 24)"),
    "another vocabulary": (shorten, "shared.weight", "other shapes", "(512, 24)"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_checkpoint_whose_weights_do_not_all_fit_is_refused_by_name(damage, suite, tmp_path):
    """Transformers would fill in random ones, or leave out what it does not know."""
    change, *words = DAMAGES[damage]
    weights = random_weights("t5-v1_1")
    change(weights)
    write_checkpoint(tmp_path / "hub", suite, "t5-v1_1", weights=weights)
    refused(tmp_path / "hub", *words)


def test_a_peft_adapter_beside_or_instead_of_the_model_is_refused(suite, tmp_path):
    """Transformers would load it over the model."""
    write_checkpoint(tmp_path / "hub", suite, "t5")
    adapter = {"peft_type": "LORA", "base_model_name_or_path": "t5-small"}
    (tmp_path / "hub/adapter_config.json").write_text(json.dumps(adapter))
    refused(tmp_path / "hub", "PEFT", "merge_and_unload")
    (tmp_path / "hub/config.json").unlink()
    refused(tmp_path / "hub", "PEFT", "merge_and_unload")


def test_a_folder_without_a_tokenizer_is_refused(suite, tmp_path):
    """Transformers would make one of 100 sentinels and a space."""
    write_checkpoint(tmp_path / "hub", suite, "t5")
    for name in ("spiece.model", "tokenizer_config.json", "special_tokens_map.json"):
        os.unlink(tmp_path / "hub" / name)
    refused(tmp_path / "hub", "neither tokenizer.json nor spiece.model")


def test_a_model_without_a_place_for_fusion_in_every_block_is_refused(folders, monkeypatch):
    """No encoder runs without its part of fusion unnoticed."""
    llm, tokenizer = load(folders["umt5"], "umt5")
    first = llm.get_encoder().block[0].layer[0]
    monkeypatch.setattr(first, "__class__", type("Renamed", (type(first),), {}))
    with pytest.raises(common.UserError, match="1 self-attention layers for 2 encoder blocks"):
        TAGI(llm, tokenizer, student_options())
    TAGI(llm, tokenizer, student_options("--fusion=decoder"))
