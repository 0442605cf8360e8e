"""What one must know of Transformers' T5: which checkpoints are read, and that what runs is what their files hold."""
import hashlib
import logging
import os
import re

import torch

from common import UserError, named_file

FAMILY = ("t5", "mt5", "umt5", "longt5")        # model_type in config.json; ByT5, Flan-T5, T0, Tk-Instruct are "t5"
EXPECTED = "expected a T5-family checkpoint: T5, ByT5, mT5, umT5 or LongT5, encoder and decoder"


def load_llm(path: str, device: str = "cpu", precision: str = "fp32", attention: str = "sdpa"):
    """(llm, tokenizer) of a T5-family checkpoint: a hub name or a local folder.

    Raises UserError where it cannot be found or read, is of another family, is not whole or has weights that T5 does not
    know, or its tokenizer has no end token.
    """
    from transformers import AutoModelForSeq2SeqLM, GenerationConfig, PreTrainedConfig, logging as hf_logging
    hf_logging.set_verbosity_error()
    hf_logging.disable_progress_bar()
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    if not os.path.isdir(path) and not re.fullmatch(r"\w[\w.-]*(/[\w.-]+)?", path):
        raise UserError(f"{path}: no such folder, and no name on the hub; {EXPECTED}")
    with named_file(path, EXPECTED):
        written = PreTrainedConfig.get_config_dict(path)[0]         # as the file has it: T5Config changes what it reads
    check_family(path, written, attention)
    tokenizer = load_tokenizer(path)
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    with named_file(path, EXPECTED):
        try:
            llm, loading = AutoModelForSeq2SeqLM.from_pretrained(
                path, dtype=dtype, attn_implementation=attention, output_loading_info=True, ignore_mismatched_sizes=True)
        except NotImplementedError:             # of other sizes it leaves both empty, and cannot tell whether to tie them
            raise ValueError("shared.weight and lm_head.weight have other shapes than config.json says, "
                             f"({written.get('vocab_size')}, {written.get('d_model')})") from None
    mend(llm, written)
    check_weights(path, llm, loading, written)
    # Greedy decoding is meant where nothing else is asked for, whatever beams and penalties a checkpoint comes with.
    ids = ("pad_token_id", "eos_token_id", "decoder_start_token_id")
    llm.generation_config = GenerationConfig(**{key: getattr(llm.generation_config, key) for key in ids})
    return llm.to(device), tokenizer


def mend(llm, written: dict) -> None:
    """Undo what Transformers 5 (some of its versions) does to published checkpoints, silently. written: config.json."""
    embeddings = llm.get_decoder().embed_tokens
    if has_own_head(llm, written) and llm.lm_head.weight is llm.shared.weight is not embeddings.weight:
        llm.set_input_embeddings(embeddings)    # MADLAD-400 has no `shared.weight`; the encoder was given the head
    if llm.config.model_type == "umt5":
        # Only a tied head reads states scaled by 1/sqrt(d_model). The scaling asks this flag, which is set for all.
        llm.config.tie_word_embeddings = written.get("tie_word_embeddings", True)
        for block in llm.get_decoder().block:
            block.layer[0].SelfAttention.is_causal = True           # else sdpa lets a target see those after it


def has_own_head(llm, written: dict) -> bool:
    """Whether the head is no copy of the embeddings: in T5 v1.1 and what came after, except LongT5's files."""
    return written.get("tie_word_embeddings") is False and llm.config.model_type != "longt5"


def load_tokenizer(path: str):
    """The checkpoint's tokenizer. Raises UserError where it cannot be read, has no pieces or no end token."""
    from transformers import AutoTokenizer, T5Tokenizer
    with named_file(path, "it needs a tokenizer.json, or a spiece.model and the package protobuf (requirements.txt)"):
        try:
            tokenizer = AutoTokenizer.from_pretrained(path)
        except ValueError:                      # for umT5, Transformers knows no class that reads a spiece.model
            tokenizer = T5Tokenizer.from_pretrained(path)
    if len(tokenizer) <= len(tokenizer.all_special_ids) + 1:    # made of nothing but special tokens and a space
        raise UserError(f"{path} has neither tokenizer.json nor spiece.model; copy the tokenizer's files there")
    if tokenizer.eos_token_id is None:
        raise UserError(f"{path}: its tokenizer has no end token; use a T5-family tokenizer")
    return tokenizer


def check_family(path: str, written: dict, attention: str) -> None:
    """Raises UserError where config.json is not of a model that this code can run, or not with this attention code."""
    kind, classes = written.get("model_type"), written.get("architectures") or []
    if kind not in FAMILY:
        raise UserError(f"{path}: its model_type is {kind}; {EXPECTED}")
    if any(name.endswith("EncoderModel") for name in classes):
        raise UserError(f"{path}: {classes[0]} has no decoder; {EXPECTED}")
    if os.path.isfile(os.path.join(path, "adapter_config.json")):           # Transformers would load it over the model
        raise UserError(f"{path} holds a PEFT adapter; merge it (merge_and_unload), and save the model to another folder")
    if kind == "longt5" and attention != "eager":
        raise UserError(f"{path}: Transformers has no {attention} attention for LongT5; use --attention eager")


def check_weights(path: str, llm, loading: dict, written: dict) -> None:
    """Raises UserError where not all weights came from the checkpoint, or some of the checkpoint's have no place in it.

    Embeddings and a tied head may be absent: they are `shared.weight`. Transformers fills what else is absent at random.
    """
    missing = set(loading["missing_keys"])
    if has_own_head(llm, written) and llm.lm_head.weight is llm.shared.weight:
        missing.add("lm_head.weight")                               # Transformers 5 ties an absent one
    shapes = {name: f"{name} is {tuple(theirs)}, not {tuple(ours)}" for name, theirs, ours in loading["mismatched_keys"]}
    for fault, names in (("lacks", missing - shapes.keys()), ("has weights unknown to", loading["unexpected_keys"]),
                         ("has other shapes than", shapes.values())):
        if names:
            some = ", ".join(sorted(names)[:3]) + (", ..." if len(names) > 3 else "")
            what = "weights of" if fault == "lacks" else ""
            raise UserError(f"{path} {fault} {what} {type(llm).__name__}: {some} ({len(names)} in all); save the whole "
                            "model, merged and without prefixes, with save_pretrained")


def fingerprint(llm) -> str:
    """A short hash of the LLM's shapes and of a few of its values, the same in fp32 and bf16."""
    digest = hashlib.sha256()
    for name, p in sorted(llm.state_dict().items()):
        values = p.flatten()[:16].to(torch.bfloat16).float().cpu().numpy()
        digest.update(f"{name.replace('.linear.', '.')}{tuple(p.shape)}".encode() + values.tobytes())
    return digest.hexdigest()[:16]


def self_attentions(llm) -> list:
    """The encoder's self-attention layers, one for each of its blocks.

    LongT5's are called LongT5LayerLocalSelfAttention and LongT5LayerTransientGlobalSelfAttention. Raises UserError where
    there are more or fewer than blocks.
    """
    found = [m for m in llm.get_encoder().modules() if re.search("Layer[A-Za-z]*SelfAttention$", type(m).__name__)]
    if len(found) != llm.config.num_layers:
        raise UserError(f"{type(llm).__name__}: {len(found)} self-attention layers for {llm.config.num_layers} encoder "
                        "blocks, so fusion has no place in them; use another model, or --no-encoder-fusion")
    return found
