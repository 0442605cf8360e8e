"""What one must know of Transformers' T5: loading all of a checkpoint, and running it in parts.

    N  examples      S  encoder positions     C  target tokens     M  answer choices
    D  d_model       V  vocabulary
"""
import contextlib
import glob
import hashlib
import logging
import os
import re
import shlex
import string
import sys

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint
from transformers import (AutoConfig, AutoModelForSeq2SeqLM, GenerationConfig, PreTrainedConfig,
                          T5Config)
from transformers.modeling_outputs import BaseModelOutput

import common
from bench import llm_files
from common import UserError, named_file
from config import DEFAULT_CONFIG, beside, same, script

# model_type in config.json; ByT5, Flan-T5, T0, Tk-Instruct and MADLAD-400 are "t5"
FAMILY = ("t5", "mt5", "umt5", "longt5")
EXPECTED = "expected a T5-family checkpoint: T5, ByT5, mT5, umT5 or LongT5, encoder and decoder"


def load_llm(path: str, device: str = "cpu", precision: str = "fp32", attention: str = "sdpa"):
    """(llm, tokenizer) of a T5-family checkpoint: a hub name or a local folder.

    Raises UserError where it cannot be found or read, is of another family, is not whole, has
    weights that T5 does not know or that are not finite, or where its tokenizer does not fit.
    """
    from transformers import logging as hf_logging
    hf_logging.set_verbosity_error()
    hf_logging.disable_progress_bar()
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    if precision not in ("fp32", "bf16"):
        raise UserError(f"precision is fp32 or bf16, not {str(precision)[:40]}")
    if not os.path.isdir(path) and not re.fullmatch(r"\w[\w.-]*(/[\w.-]+)?", path):
        raise UserError(f"{path}: no such folder, and no name on the hub; {EXPECTED}")
    if os.path.isfile(os.path.join(path, "adapter_config.json")):
        # Transformers would load it over the model, or its base model in place of one.
        raise UserError(f"{path} holds a PEFT adapter; merge it (merge_and_unload), and save the "
                        "model to another folder")
    with named_file(path, EXPECTED):
        written = PreTrainedConfig.get_config_dict(path)[0]     # AutoConfig changes what it reads
        check_family(path, written, attention)
        llm_files.check_config(path, AutoConfig.from_pretrained(path))
    tokenizer = load_tokenizer(path)
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    with named_file(path, EXPECTED):
        try:
            llm, loading = AutoModelForSeq2SeqLM.from_pretrained(
                path, dtype=dtype, attn_implementation=attention, trust_remote_code=False,
                output_loading_info=True, ignore_mismatched_sizes=True, return_dict=True,
                output_attentions=False, output_hidden_states=False)
        except NotImplementedError:
            # Both of another size are left empty, and whether to tie them cannot be told.
            shape = (written.get("vocab_size"), written.get("d_model"))
            raise ValueError("shared.weight and lm_head.weight have other shapes than config.json "
                             f"says, {shape}") from None
        mend(llm, written)
        check_weights(path, llm, loading, written)
        common.check_finite(dict(llm.named_parameters()), f"{path} is not loaded")
        # Decoding is greedy where nothing else is asked for, whatever penalties a checkpoint has.
        ids = llm_files.fit_together(path, llm, tokenizer)
        llm.generation_config = GenerationConfig(**ids)
    return llm.to(device), tokenizer


def save_llm(folder: str, record: dict, llm, tokenizer, *args, weights=None, **kwargs) -> None:
    """Write a checkpoint of ours (`common.save_checkpoint`) that is one of Transformers' too.

    weights: its own by default; where they were dealt out among processes, those gathered.
    """
    os.makedirs(folder, exist_ok=True)
    save_all_but_weights(folder, llm, tokenizer)
    weights = weights or dict(llm.named_parameters())
    common.save_checkpoint(folder, record, weights, *args, **kwargs)


def save_all_but_weights(folder: str, llm, tokenizer) -> None:
    for part in (llm.config, llm.generation_config, tokenizer):
        part.save_pretrained(folder)


def load_tokenizer(path: str):
    """The checkpoint's tokenizer.

    Raises UserError where it cannot be read, or is none that this code can use.
    """
    from transformers import AutoTokenizer, T5Tokenizer
    with named_file(path, "it needs a tokenizer.json, or a spiece.model and the package protobuf "
                    "(requirements.txt)"):
        llm_files.check_tokenizer_config(path)
        try:
            tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
        except ValueError:              # for umT5 it knows no class that reads a spiece.model
            tokenizer = T5Tokenizer.from_pretrained(path)
        llm_files.check_tokenizer(path, tokenizer)
    return tokenizer


def unknown_words(tokenizer, texts: list[str]) -> list[str]:
    """Those words of the texts, each once and in order, whose tokens hold the unknown token.

    A word is what stands between white space, told without the ASCII punctuation around it.
    """
    words = list(dict.fromkeys(word for text in texts for word in text.split()))
    rows = tokenizer(words, add_special_tokens=False)["input_ids"] if words else []
    unknown = []
    for word, row in zip(words, rows):
        if tokenizer.unk_token_id in row:
            unknown.append(word.strip(string.punctuation) or word)
    return list(dict.fromkeys(unknown))


def warn_of_unknown_words(tokenizer, texts: list[str]) -> None:
    unknown = unknown_words(tokenizer, texts)
    if unknown:
        print(f"warning: words the model does not know: {', '.join(unknown)}", file=sys.stderr)


def check_knows(tokenizer, texts: list[str], what: str) -> None:
    """Raises UserError where most characters of these texts, or of hundreds of them, are unknown.

    A model that is trained on unknown tokens gets better and better at nothing.
    """
    known = total = 0
    for text in texts[::max(1, len(texts) // 300)]:
        row, n = tokenizer(text)["input_ids"], len("".join(text.split()))
        total += n
        if tokenizer.unk_token_id in row:
            its = [token for token in row[:-1] if token != tokenizer.unk_token_id]
            n = sum(len(piece.strip("\u2581")) for piece in tokenizer.convert_ids_to_tokens(its))
        known += n
    if known < total / 2:
        raise UserError(f"{what}: the tokenizer knows {known / total:.0%} of the characters there; "
                        "use a model that was made for this language, with its own tokenizer")


def check_family(path: str, written: dict, attention: str) -> None:
    """Raises UserError where this code cannot run a model of this config.json (`written`)."""
    kind, classes = written.get("model_type"), written.get("architectures") or []
    if kind not in FAMILY:
        raise UserError(f"{path}: its model_type is {kind}; {EXPECTED}")
    if any(name.endswith("EncoderModel") for name in classes):
        raise UserError(f"{path}: {classes[0]} has no decoder; {EXPECTED}")
    if kind == "longt5" and attention != "eager":
        raise UserError(f"{path}: Transformers has no {attention} attention for LongT5; use "
                        "--attention eager")


def mend(llm, written: dict) -> None:
    """Undo what Transformers 5, or some of its versions, silently does to published checkpoints."""
    embeddings = llm.get_decoder().embed_tokens
    head_is_shared = llm.lm_head.weight is llm.shared.weight
    if has_own_head(llm, written) and head_is_shared and embeddings.weight is not llm.shared.weight:
        # MADLAD-400's file has no `shared.weight`: the encoder was given the head in its place.
        llm.set_input_embeddings(embeddings)
    if llm.config.model_type == "umt5":
        # Only a tied head reads states over sqrt(d_model). Transformers sets this flag for all.
        llm.config.tie_word_embeddings = written.get("tie_word_embeddings", True)
        for block in llm.get_decoder().block:
            # Before 5.23 sdpa lets a target see those after it.
            block.layer[0].SelfAttention.is_causal = True


def has_own_head(llm, written: dict) -> bool:
    """Whether the head is no copy of the embeddings: since T5 v1.1, except in LongT5's files."""
    return written.get("tie_word_embeddings") is False and llm.config.model_type != "longt5"


def check_weights(path: str, llm, loading: dict, written: dict) -> None:
    """Raises UserError where weights are missing, unknown to the model or of other shapes.

    Transformers would go on with random ones. Embeddings and a tied head may be absent from the
    file: they are `shared.weight`.
    """
    missing = set(loading["missing_keys"])
    if has_own_head(llm, written) and llm.lm_head.weight is llm.shared.weight:
        missing.add("lm_head.weight")                           # an absent one was tied
    shapes = {}
    for name, theirs, ours in loading["mismatched_keys"]:
        shapes[name] = f"{name} is {tuple(theirs)}, not {tuple(ours)}"
    faults = {"lacks weights of": missing - shapes.keys(),
              "has weights unknown to": loading["unexpected_keys"],
              "has weights of other shapes than": shapes.values()}
    for fault, names in faults.items():
        if names:
            some = ", ".join(sorted(names)[:3]) + (", ..." if len(names) > 3 else "")
            raise UserError(f"{path} {fault} {type(llm).__name__}: {some} ({len(names)} in all); "
                            "save the whole model, merged and without prefixes")


# ---------------------------------------------------------------------------- which T5 is frozen

def llm_path(options, digests=None) -> str:
    """Where the frozen LLM is: --llm base|meta|PATH. Raises UserError naming what makes it.

    digests: of what the run that asks has read.
    """
    if options.llm == "base":
        return base_path(options, digests)
    if options.llm == "meta":
        return meta_path(options, digests)
    return options.llm


def base_path(options, digests=None) -> str:
    return finished_stage("base", options, digests) if options.model == "tiny" else options.model


def meta_path(options, digests=None) -> str:
    if options.meta_model or is_meta_itself(options):
        return options.meta_model or options.model
    return finished_stage("meta", options, digests)


def is_meta_itself(options) -> bool:
    """Whether --model is frozen as it is, without a stage meta: Flan-T5 follows instructions."""
    meta = os.path.join(options.runs, "meta", "config.yaml")
    is_frozen = options.llm == "base" or same("model", options.llm, options.model)
    return is_frozen and options.model != "tiny" and not os.path.isfile(meta)


def meant_by(key: str, value, options):
    """What an option's value is as a path: --llm base|meta, and no --meta-model, are folders."""
    if key == "llm" and value == "base":
        return os.path.join(options.runs, "base") if options.model == "tiny" else options.model
    is_meta = value == "meta" and key in ("llm", "kl_teacher")
    if not is_meta and (key, value) != ("meta_model", None):
        return value
    if options.meta_model or is_meta_itself(options):
        return options.meta_model or options.model
    return os.path.join(options.runs, "meta")


def finished_stage(stage: str, options, digests=None) -> str:
    """The folder of train_teacher.py's stage. Raises UserError where it is not finished."""
    folder = os.path.join(options.runs, stage)
    if not common.is_finished(folder):
        raise UserError(f"{folder} is not finished; first run "
                        f"python {script('train_teacher.py')} --stage {stage}"
                        f"{config_flag(options)}")
    record = common.read_record(folder)
    found = vars(options) | (digests or {})
    common.check_digests(found, folder, record, ["data_digest"])    # stages may read other texts
    return folder


def config_flag(options) -> str:
    """What a command that a line tells the user to run needs beside its stage, after a blank."""
    usual = options.config == beside(DEFAULT_CONFIG)
    words = [] if usual else ["--config", options.config]
    config = common.read_yaml(options.config, "name an existing config with --config")
    for key, default in (("data", "data/sample"), ("runs", "runs/sample"), ("model", "tiny")):
        value = getattr(options, key)
        if not same(key, config.get(key, default), value):
            words += [f"--{key}", value]
    return "".join(f" {shlex.quote(word)}" for word in words)


def llm_of(folder: str, options, llm: str | None = None) -> str:
    """Where the frozen LLM of the TAGI in `folder` is: in `llm`, where that is named.

    Raises UserError where it is gone.
    """
    if llm is not None:
        return os.path.expanduser(llm)
    if not options.llm_is_relative:
        return options.llm_path
    # The folder may be a link: `..` is above what it stands for, or else above the link.
    real = os.path.normpath(os.path.join(os.path.realpath(folder), options.llm_path))
    path = os.path.normpath(os.path.join(folder, options.llm_path))
    if os.path.isdir(real) and os.path.realpath(path) != os.path.realpath(real):
        path = real
    if not os.path.isdir(path):
        raise UserError(f"{folder} is for the LLM that was in {real} (fingerprint "
                        f"{options.llm_fingerprint}), which is not there; name it: --llm FOLDER")
    return path


def checkpoint_at(folder: str) -> str:
    """Where in a stage's folder the newest checkpoint is; the folder itself where none is."""
    folder = os.path.expanduser(folder)
    return common.checkpoint_of(folder) or folder


def path_from(folder: str, path: str) -> str:
    """The LLM's path from a TAGI's real folder, so that both can be moved together."""
    relative, real = os.path.relpath(path, folder), os.path.realpath(folder)
    if os.path.realpath(os.path.join(real, relative)) == os.path.realpath(path):
        return relative
    return os.path.relpath(os.path.realpath(path), real)


def tiny_t5(vocab_size: int, seed: int, d_model=64, layers=3, heads=4, d_ff=192):
    """A T5 v1.1 (gated GELU, untied head) of random weights, started so that it trains fast."""
    torch.manual_seed(seed)
    llm = AutoModelForSeq2SeqLM.from_config(T5Config(
        vocab_size=vocab_size, d_model=d_model, d_kv=d_model // heads, d_ff=d_ff,
        num_layers=layers, num_heads=heads, dropout_rate=0.0,
        feed_forward_proj="gated-gelu_pytorch_tanh",        # gated-gelu's function, in one kernel
        tie_word_embeddings=False, decoder_start_token_id=0))
    with torch.no_grad():
        llm.shared.weight *= 0.3
    # Transformers 5 ties it whatever the config says.
    llm.lm_head.weight = nn.Parameter(llm.shared.weight.detach() * 0.5)
    return llm


# --------------------------------------------------------------------------------------- digests

def fingerprint(llm) -> str:
    """A short hash of the LLM's shapes and of a few of its values, the same in fp32 and bf16."""
    digest = hashlib.sha256()
    for name, p in sorted(llm.state_dict().items()):
        values = p.flatten()[:16].to(torch.bfloat16).float().cpu().numpy()
        shape = f"{name.replace('.linear.', '.')}{tuple(p.shape)}"
        digest.update(shape.encode() + values.tobytes())
    return digest.hexdigest()[:16]


def hypernetwork_digest(model) -> str:
    """Of a TAGI's trained weights; a saved adapter's model has them no more, but this digest."""
    recorded = getattr(model.options, "hypernetwork_digest", None)
    return recorded or tensors_digest(model.trainable())


def tensors_digest(tensors: dict) -> str:
    """A hash of tensors' names and values."""
    total = hashlib.sha256()
    for name, p in sorted(tensors.items()):
        total.update(name.encode() + p.detach().float().cpu().numpy().tobytes())
    return total.hexdigest()[:16]


def weights_digest(path: str) -> str:
    """A hash of every weights file in a checkpoint's folder; a hub name stands for itself."""
    if not os.path.isdir(path):
        return path
    folder = glob.escape(path)
    files = glob.glob(f"{folder}/**/*.safetensors", recursive=True) + glob.glob(f"{folder}/*.bin")
    return common.files_digest(sorted(files), path)


def tokenizer_digest(tokenizer) -> str:
    return common.digest(repr(sorted(tokenizer.get_vocab().items())))


def check_trained_on(llm, tokenizer, options, folder: str, path: str) -> None:
    """Raises UserError where `path` does not hold the LLM that `folder`, with its options, is for.

    Another tokenizer of as many tokens would give answers too, to other texts.
    """
    common.check_fingerprint(fingerprint(llm), options.llm_fingerprint, folder, path)
    expected = getattr(options, "tokenizer_digest", None)           # earlier code recorded none
    if expected not in (None, tokenizer_digest(tokenizer)):
        raise UserError(f"{folder} was trained with another tokenizer than the one in {path} now; "
                        "put back the files of the one that it was trained with")


# --------------------------------------------------------------------------- running it, in parts

def self_attentions(llm) -> list:
    """The encoder's self-attention layers, one for each of its blocks.

    Raises UserError where there are more or fewer than blocks.
    """
    found = []
    for module in llm.get_encoder().modules():
        # LongT5's are LayerLocalSelfAttention and LayerTransientGlobalSelfAttention
        if re.search("Layer[A-Za-z]*SelfAttention$", type(module).__name__):
            found.append(module)
    blocks = llm.config.num_layers
    if len(found) != blocks:
        raise UserError(f"{type(llm).__name__}: {len(found)} self-attention layers for {blocks} "
                        "encoder blocks, so fusion has no place there; use --fusion decoder")
    return found


def logits(llm, input_ids, attention_mask, labels) -> torch.Tensor:
    """Logits for the targets, (N, C, V), without the loss that `labels=` would make too."""
    decoder_ids = llm.prepare_decoder_input_ids_from_labels(labels)
    return llm(input_ids=input_ids, attention_mask=attention_mask, use_cache=False,
               decoder_input_ids=decoder_ids).logits


@contextlib.contextmanager
def headless(llm):
    """Within: the LLM returns, in place of its logits (N, C, V), what its head reads, (N, C, D).

    The caller then runs the head, `get_output_embeddings()` afterwards, only where it needs it.
    """
    head = llm.get_output_embeddings()
    llm.set_output_embeddings(nn.Identity())
    try:
        yield
    finally:
        llm.set_output_embeddings(head)


def no_contexts():
    return contextlib.nullcontext(), contextlib.nullcontext()


def checkpoint_blocks(llm, contexts=no_contexts) -> None:
    """Gradient checkpointing: keep each block's input alone; the backward pass runs it again.

    LoRA weights are set from outside, so they must still be set then. contexts: called when a block
    runs, returns the contexts of that run and of the repetition (torch.utils.checkpoint's
    context_fn), which may set them again.
    """
    for module in llm.modules():
        if not type(module).__name__.endswith("Block"):     # T5Block, MT5Block
            continue

        def run(*args, forward=module.forward, **kwargs):
            if not torch.is_grad_enabled():
                return forward(*args, **kwargs)
            return checkpoint(forward, *args, use_reentrant=False, context_fn=contexts, **kwargs)
        module.forward = run


def score_choices(llm, encoded, mask, labels, owner, normalize=False) -> list[list[float]]:
    """log p(choice | its row) for all choices of N rows, as T0 ranks them (Sanh et al. 2022).

    encoded: (N, S, D) the encoder's output, run once a row; mask: (N, S); labels: (M, C) the
    choices' ids with their end token, −100 on padding; owner: (M,) each choice's row, in order.
    llm: as its decoder is to run, LoRA weights per choice set already. normalize: per token, where
    T0's rule is the sum.
    """
    states = BaseModelOutput(last_hidden_state=encoded[owner])              # (M, S, D)
    logits = llm(encoder_outputs=states, attention_mask=mask[owner], labels=labels).logits
    losses = F.cross_entropy(logits.float().mT, labels, reduction="none")   # (M, C), 0 on padding
    scores = -losses.sum(1)
    if normalize:
        scores = scores / (labels != -100).sum(1)
    counts = torch.bincount(owner, minlength=len(encoded))                  # (N,)
    return [row.tolist() for row in scores.split(counts.tolist())]
