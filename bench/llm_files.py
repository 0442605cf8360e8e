"""What is checked of a T5-family checkpoint's files before, and after, a model is made of them.

Transformers makes a model of whatever config.json says: of sizes that fill the memory, with a
start token that is not there, or with weights that are no numbers.
"""
import glob
import json
import os

from safetensors import safe_open

from common import UserError

# Field of config.json -> (type, smallest, largest value). The largest T5 has 24 layers of 1024 x
# 65 536; mT5's vocabulary is 250 112.
FIELDS = {
    "vocab_size": (int, 4, 10 ** 7), "d_model": (int, 1, 10 ** 5), "d_ff": (int, 1, 10 ** 6),
    "d_kv": (int, 1, 10 ** 4), "num_heads": (int, 1, 10 ** 3), "num_layers": (int, 1, 10 ** 3),
    "num_decoder_layers": (int, 1, 10 ** 3), "relative_attention_num_buckets": (int, 4, 10 ** 4),
    "relative_attention_max_distance": (int, 2, 10 ** 6), "dropout_rate": (float, 0, 0.99),
    "layer_norm_epsilon": (float, 0, 0.1), "initializer_factor": (float, 0, 10 ** 4),
    "local_radius": (int, 1, 10 ** 4), "global_block_size": (int, 1, 10 ** 4)}
FLOATS = ("F64", "F32", "F16", "BF16")          # types of weights, as safetensors calls them


def check_config(path: str, config) -> None:
    """Raises UserError where this config.json is not of a model that this machine could make."""
    for name, (kind, least, most) in FIELDS.items():
        value = getattr(config, name, least)            # LongT5's own are absent elsewhere
        is_number = isinstance(value, (int, kind)) and not isinstance(value, bool)
        if not is_number or not least <= value <= most:
            raise UserError(f"{path}: config.json's {name} is {value}; expected a number from "
                            f"{least} to {most}")
    # Transformers divides by the logarithm of their ratio.
    if config.relative_attention_max_distance <= config.relative_attention_num_buckets // 2:
        raise UserError(f"{path}: config.json's relative_attention_max_distance is too small for "
                        f"its {config.relative_attention_num_buckets} buckets")
    if not config.is_encoder_decoder:
        raise UserError(f"{path}: config.json says is_encoder_decoder: false; a T5 is both")
    folder = glob.escape(path)
    files = glob.glob(f"{folder}/*.safetensors") + glob.glob(f"{folder}/*.bin")
    size = sum(map(os.path.getsize, files))
    if files and least_weights(config) > size:          # a byte is the least that a weight takes
        raise UserError(f"{path}: config.json tells of at least {least_weights(config)} weights, "
                        f"and its files have {size} bytes; restore config.json or the weights")
    for file in files:
        if file.endswith(".safetensors"):
            check_types(file)


def least_weights(config) -> int:
    """How many weights a model has at least: its embeddings and the matrices of its blocks."""
    attention = 4 * config.d_model * config.num_heads * config.d_kv
    feed_forward = 2 * config.d_model * config.d_ff
    return (config.vocab_size * config.d_model
            + config.num_heads * config.relative_attention_num_buckets
            + config.num_layers * (attention + feed_forward)
            + config.num_decoder_layers * (2 * attention + feed_forward))


def check_types(file: str) -> None:
    """Raises UserError where a weight is no floating-point number; Transformers converts it."""
    with safe_open(file, "pt") as f:
        for name in f.keys():
            kind = f.get_slice(name).get_dtype()
            if kind not in FLOATS:
                raise UserError(f"{file}: {name} is of type {kind}; save the weights as float32 or "
                                "bfloat16, not quantised")


def check_tokenizer_config(path: str) -> None:
    """Raises UserError where it asks for more sentinels than a loop of Transformers' ends with."""
    file = f"{path}/tokenizer_config.json"
    if not os.path.isfile(file):
        return
    with open(file, encoding="utf-8") as f:
        n = json.load(f).get("extra_ids") or 0
    if not isinstance(n, int) or not 0 <= n <= 10_000:
        raise UserError(f"{file}: extra_ids is {str(n)[:20]}; expected 0 to 10000 (T5's are 100)")


def check_tokenizer(path: str, tokenizer) -> None:
    """Raises UserError where it has no pieces of its own, no end or padding, or ends no text."""
    if len(tokenizer) <= len(tokenizer.all_special_ids) + 1:    # special tokens and a space alone
        raise UserError(f"{path} has neither tokenizer.json nor spiece.model; copy the "
                        "tokenizer's files there")
    for name, token in (("end", tokenizer.eos_token_id), ("padding", tokenizer.pad_token_id)):
        if token is None:
            raise UserError(f"{path}: its tokenizer has no {name} token; use a T5-family tokenizer")
    for text in ("Input: a.", "\u00bd \ud7a3"):         # some fail at what they do not know
        ids = tokenizer(text)["input_ids"]
        if ids[-1:] != [tokenizer.eos_token_id] or tokenizer.pad_token_id in ids:
            raise UserError(f"{path}: its tokenizer does not end a text with its end token; use a "
                            "T5-family tokenizer")
        tokenizer.decode(ids)


def fit_together(path: str, llm, tokenizer) -> dict:
    """{name: id} of the tokens that decoding starts, ends and is padded with.

    Raises UserError where the model has no such token, or no embedding for one of the tokenizer's.
    """
    n_rows, largest = llm.config.vocab_size, max(tokenizer.get_vocab().values())
    if largest >= n_rows:
        raise UserError(f"{path}: its tokenizer has tokens up to number {largest}, its model only "
                        f"{n_rows} embeddings; use the tokenizer that the model was trained with")
    # Training starts with the one, generation with the other.
    start = getattr(llm.config, "decoder_start_token_id", None)
    if start is None:
        start = getattr(llm.generation_config, "decoder_start_token_id", None)
    if isinstance(start, bool) or not isinstance(start, int) or not 0 <= start < n_rows:
        raise UserError(f"{path}: its decoder_start_token_id is {start}; config.json needs one "
                        f"from 0 to {n_rows - 1} (T5's is 0)")
    ids = {"decoder_start_token_id": start, "eos_token_id": tokenizer.eos_token_id,
           "pad_token_id": tokenizer.pad_token_id}
    for name, token in ids.items():
        setattr(llm.config, name, token)
    return ids
