"""How much memory each stage needs at a model's size, by counting, before any weight is loaded.

Exact: weights, gradients and the optimizer's state, counted on a model that has shapes and no
contents (PyTorch's meta device), made from the LLM's config.json or, where the name tells it, from
the published sizes below. Estimated: what a micro-batch keeps for the backward pass, every text as
long as the limits allow. Bytes that a token keeps in a block, c = 2 in bf16 and else 4:

    each norm      D·(4 + c) in bf16, which is squared in float32, else D·4
    attention      4·c·I of q, k, v and output, and c·H·(positions attended to) of its weights
    feed-forward   6·c·F with a gated GELU, 2·c·F with ReLU
    fusion         what a norm and an attention keep, for the encoder's tokens
    trained LLM    the inputs of its linear layers too, c·(2·D + I + F)

and once for a micro-batch: keys and values of what the decoder attends to, the generated adapters
(3 times in float32), logits of (N, C, V), or of 256 positions where a stage makes them in chunks.
With --checkpointing a block's input alone is kept, and one block is whole. The peak: what is held
all the time, and the larger of gradients and activations, for the first come as the second go. What
tests/benchmarks/sizes.py counts operator by operator is 0.88 to 1.04 times these peaks
(docs/memory.md). CUDA's own gigabyte and fragmentation come on top. An evaluation holds two LLMs,
the hypernetwork and the LoRA teachers, what decoding keeps of a batch, and one block's work.

    N  instances   K  tasks   S, T, C  tokens of instruction, input, target   V  vocabulary
    D  d_model     I  heads · d_kv     F  d_ff      H  heads
"""
import os
import re
from types import SimpleNamespace

import torch
import torch.nn as nn
from transformers import AutoConfig, AutoModelForSeq2SeqLM, PreTrainedConfig, T5Config

import lora
import t5
from bench import optim
from common import named_file
from hypernet import TAGI

GB = 1e9
CARDS = (16, 24, 40, 80, 141)           # GB of GPUs that one can have
CHUNK = 256                             # positions whose logits the student's stages make at a time
# Published sizes: name -> (D, F, blocks of encoder and of decoder, H, d_kv)
V1_1 = {"small": (512, 1024, 8, 6, 64), "base": (768, 2048, 12, 12, 64),
        "large": (1024, 2816, 24, 16, 64), "xl": (2048, 5120, 24, 32, 64),
        "xxl": (4096, 10240, 24, 64, 64)}
V1_0 = {"small": (512, 2048, 6, 8, 64), "base": (768, 3072, 12, 12, 64),
        "large": (1024, 4096, 24, 16, 64), "3b": (1024, 16384, 24, 32, 128),
        "11b": (1024, 65536, 24, 128, 128)}
SAME = {"3b": "xl", "11b": "xxl"}       # v1.1's checkpoints of others: tk-instruct-3b-def-pos
FULL_LOGITS = ("base", "meta", "lora", "lora-all")


# ---------------------------------------------------------------------------------- the LLM's size

def empty_llm(path: str, attention: str):
    """(the LLM in `path` without contents, what its size is known from).

    A published size is told by the name, without asking the hub. Raises UserError where there is no
    config.json either, or it is of another family.
    """
    written = None if os.path.isdir(path) else published(path)
    if written is not None:
        its, source = T5Config(**written), f"as published, {path}"
    else:
        with named_file(path, t5.EXPECTED):
            written = PreTrainedConfig.get_config_dict(path)[0]
        t5.check_family(path, written, attention)
        with named_file(path, t5.EXPECTED):
            its, source = AutoConfig.from_pretrained(path), path
    with named_file(path, t5.EXPECTED), torch.device("meta"):
        llm = AutoModelForSeq2SeqLM.from_config(its)
    if t5.has_own_head(llm, written):           # Transformers 5 ties it whatever the config says
        llm.lm_head.weight = nn.Parameter(torch.empty_like(llm.shared.weight))
    return llm.requires_grad_(False).eval(), source


def published(path: str) -> dict | None:
    """What the config.json of a checkpoint of this name says, of T5, Flan-T5, Tk-Instruct, T0."""
    name = path.rstrip("/").rpartition("/")[2].lower()
    if name == "t0" or re.fullmatch("t0p+", name):
        name += "-11b"
    found = re.search(r"(?<![a-z0-9])(small|base|large|xl|xxl|3b|11b)(?![a-z0-9])", name)
    if found is None or not re.search(r"(^|[^a-z])(t5|t0|tk)", name) or "mt5" in name:
        return None
    size, old = found[1], re.fullmatch("t5-[a-z0-9]+", name)
    shape = V1_0.get(size) if old else V1_1[SAME.get(size, size)]
    if shape is None:
        return None
    d_model, d_ff, layers, heads, d_kv = shape
    return {"vocab_size": 32128, "d_model": d_model, "d_ff": d_ff, "num_layers": layers,
            "num_heads": heads, "d_kv": d_kv, "tie_word_embeddings": bool(old),
            "feed_forward_proj": "relu" if old else "gated-gelu"}


def numbers(parameters) -> int:
    """How many numbers these parameters hold; one that is there twice counts once."""
    return sum(p.numel() for p in {id(p): p for p in parameters}.values())


def state_numbers(optimizer) -> int:
    """How many numbers an optimizer keeps: Adam two a weight, Muon one, Adafactor rows, columns."""
    total = 0
    for part in optimizer.parts:
        for p in [p for group in part.param_groups for p in group["params"]]:
            if isinstance(part, torch.optim.Adafactor):
                size = p.numel()
                total += size // p.shape[-1] + size // p.shape[-2] if p.dim() > 1 else size
            else:
                total += p.numel() if isinstance(part, optim.Muon) else 2 * p.numel()
    return total


# -------------------------------------------------------------------------------------- activations

def batch_of(stage: str, o) -> SimpleNamespace:
    """N, K, S, T, C of a stage's micro-batch with every text as long as it may be."""
    K, N = o.tasks, o.tasks * o.instances
    if stage == "lora":                         # several teachers' batches side by side
        N *= o.teachers_at_once
    if stage == "base":
        half = o.text_length // 2
        return SimpleNamespace(N=N, K=0, S=0, T=half, C=half)
    if stage == "pretrain":
        third = o.text_length // 3
        return SimpleNamespace(N=N, K=N, S=third, T=third, C=third)
    if stage == "finetune":
        return SimpleNamespace(N=N, K=K, S=o.max_instruction, T=o.max_input, C=o.max_output)
    return SimpleNamespace(N=N, K=0, S=0, T=o.max_input, C=o.max_output)


def activations(llm, o, batch, c, adapter: int, trained: bool, chunked: bool, checkpointing: bool):
    """Bytes that a micro-batch keeps for its backward pass, by the formula above.

    adapter: numbers in one task's LoRA weights, where they are generated; trained: the LLM is.
    """
    its, b = llm.config, batch
    D, I, F, H = its.d_model, its.num_heads * its.d_kv, its.d_ff, its.num_heads
    fusion = getattr(o, "fusion", "none") if b.K else "none"
    memory = b.T + (b.S if fusion in ("both", "decoder") else 0)   # what the decoder attends to
    norm = D * (4 + c) if c == 2 else D * 4
    feed_forward = F * c * (6 if its.is_gated_act else 2)
    inputs = c * (2 * D + I + F) if trained else c * D              # LoRA's A reads q's and v's
    encoder = 2 * norm + 4 * c * I + c * H * b.T + feed_forward + inputs
    if fusion in ("both", "encoder"):
        encoder += norm + c * D + 3 * c * I + c * H * b.S + 2 * c * I * b.S / b.T * b.K / b.N
    decoder = 3 * norm + 6 * c * I + c * H * (b.C + memory) + feed_forward + inputs
    cross = 2 * c * I * memory                                      # keys, values of an instance
    blocks = [(its.num_layers, b.N * b.T, encoder, 0),
              (its.num_decoder_layers, b.N * b.C, decoder, b.N * cross)]
    kept, one = 0, 0
    for n, tokens, each, extra in blocks:
        whole = tokens * each + extra
        kept += n * (tokens * D * c if checkpointing else whole)
        one = max(one, whole if checkpointing else 0)
    rows = CHUNK if chunked else b.N * b.C
    logits = rows * its.vocab_size * (c + 12)           # in float32 too, softmax, gradient
    return kept + one + logits + 3 * 4 * b.K * adapter


# ------------------------------------------------------------------------------------------- stages

def of_stage(stage: str, llm, o, teachers: int) -> dict:
    """Bytes of one stage, by part; llm: one without contents; o: the stage's options.

    teachers: how many LoRA teachers finetuning holds.
    """
    batch = batch_of(stage, o)
    trains_llm = stage in ("base", "meta")
    c = 2 if o.precision == "bf16" else 4
    llm_numbers, others = numbers(llm.parameters()), 0
    with torch.device("meta"):
        if stage in ("pretrain", "finetune"):
            tagi = TAGI(llm, None, o)
            parameters = tagi.trainable()
        else:
            lora.inject_lora(llm, o.targets.split(","), o.rank, o.alpha)
            parameters = dict(llm.named_parameters())
        adapter = 0                             # numbers in one LoRA
        for wrapper in lora.sites(llm).values():
            adapter += o.rank * sum(wrapper.weight.shape)
        if stage in ("lora", "lora-all"):
            n = o.teachers_at_once if stage == "lora" else 1
            parameters = {"A and B": nn.Parameter(torch.empty(n * adapter))}
        optimizer = optim.make_optimizer(parameters, o)
    if stage == "finetune":
        if o.lambda_kl and o.kl_teacher != "lora":
            others += llm_numbers * c
        if o.kl_teacher == "lora" or o.alignment != "none":
            others += 4 * teachers * adapter
    trained = numbers(parameters.values())
    lora.remove_lora(llm)
    found = {"stage": stage, "batch": f"{o.tasks} x {o.instances}", "trained": trained,
             "llm": 0 if trains_llm else llm_numbers * c, "others": others, "weights": 4 * trained,
             "gradients": 4 * trained, "optimizer": 4 * state_numbers(optimizer),
             "copies": 2 * trained if c == 2 else 0}                # bf16's, that autocast makes
    held = sum(found[key] for key in ("llm", "others", "weights", "optimizer", "copies"))
    makes = adapter if stage in ("pretrain", "finetune") and o.generator != "none" else 0
    for key, checkpointing in (("activations", False), ("checkpointed", True)):
        found[key] = activations(llm, o, batch, c, makes, trains_llm, stage not in FULL_LOGITS,
                                 checkpointing)
        found[f"peak, {key}"] = held + max(found["gradients"], found[key])
    return found


def of_evaluation(llm, o, batch_size: int, finetune: dict) -> dict:
    """Bytes of an evaluation, by part; finetune: that stage's row."""
    its, c = llm.config, 2 if o.precision == "bf16" else 4
    D, I, F, H = its.d_model, its.num_heads * its.d_kv, its.d_ff, its.num_heads
    memory = o.max_input + o.max_instruction
    cache = 2 * c * I * its.num_decoder_layers * (memory + o.max_output)        # of an instance
    block = o.max_input * (3 * 4 * D + 4 * c * I + 3 * c * F + c * H * o.max_input)
    working = batch_size * (cache + block) + batch_size * its.vocab_size * 4
    found = {"stage": "evaluate", "batch": f"batch {batch_size}", "trained": 0,
             "llm": 2 * numbers(llm.parameters()) * c, "others": finetune["others"],
             "weights": finetune["weights"], "gradients": 0, "optimizer": 0}
    held = found["llm"] + found["others"] + found["weights"]
    for key in ("activations", "checkpointed"):         # there is no backward pass
        found |= {key: working, f"peak, {key}": held + working}
    return found


def card(size: float) -> str:
    """The smallest GPU that holds so many bytes, a gigabyte and a twentieth left for CUDA's own."""
    fits = [gb for gb in CARDS if size / GB * 1.05 + 1 <= gb]
    return f"{fits[0]} GB" if fits else "several"


def table(rows: list[dict]) -> list[list[str]]:
    """The rows of `of_stage` as cells to print, titles first; GB."""
    cells = [["stage", "tasks x instances", "trained, million", "LLM", "teachers", "weights",
              "gradients", "optimizer", "activations", "peak", "GPU", "checkpointing", "GPU"]]
    for row in rows:
        gb = {key: f"{value / GB:.1f}" for key, value in row.items() if not isinstance(value, str)}
        plain, again = row["peak, activations"], row["peak, checkpointed"]
        cells.append([row["stage"], row["batch"], f"{row['trained'] / 1e6:.1f}",
                      gb["llm"], gb["others"], gb["weights"], gb["gradients"], gb["optimizer"],
                      gb["activations"], gb["peak, activations"], card(plain),
                      gb["peak, checkpointed"], card(again)])
    return cells
