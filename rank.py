"""Rank classification, as T0 evaluates (Sanh et al. 2022): of a row's answer choices, the most likely one is the answer.

The encoder runs once a row; only the decoder runs once a choice.

    N  rows     M  choices of all rows     S  encoder positions     C  tokens of a choice     V  vocabulary
"""
import statistics

import torch
import torch.nn.functional as F
from transformers.modeling_outputs import BaseModelOutput

import data


def owner_of(choices) -> list[int]:
    """The row of every choice, when all rows' choices stand one after another."""
    return [n for n, row in enumerate(choices) for _ in row]


def log_likelihoods(llm, tokenizer, encoded, mask, choices, normalize=False, limit=128) -> list[list[float]]:
    """log p(choice | row) for every row's choices, end token included; with `normalize` per token.

    llm: as it is to run in the decoder, LoRA weights per choice set already. encoded: (N, S, D) the encoder's output; mask:
    (N, S); choices: N lists of texts. The sum over tokens, not their mean, is T0's rule.
    """
    owner = torch.tensor(owner_of(choices), device=encoded.device)                              # (M,)
    labels = data.labels(tokenizer, [choice for row in choices for choice in row], limit, encoded.device)       # (M, C)
    logits = llm(encoder_outputs=BaseModelOutput(last_hidden_state=encoded[owner]), attention_mask=mask[owner],
                 labels=labels).logits                                                          # (M, C, V)
    scores = -F.cross_entropy(logits.float().mT, labels, reduction="none", ignore_index=data.IGNORE).sum(1)     # (M,)
    if normalize:
        scores = scores / (labels != data.IGNORE).sum(1)
    return [row.tolist() for row in scores.split([len(row) for row in choices])]


# ----------------------------------------------------------------------------------------------------------- averages

HYPERT5 = {"anli": ("anli_r1", "anli_r2", "anli_r3"), **{name: (name,) for name in (
    "hellaswag", "cb", "copa", "rte", "wic", "wsc", "winogrande")}}     # its 8 numbers: ANLI as one, no StoryCloze
AVERAGES = {"MTest11": {name: (name,) for name in data.P3_TEST}, "HyperT5": HYPERT5}


def summarize(by_template: dict) -> dict:
    """From {"rte: can we infer": accuracy, ..} to each task's mean, median and spread over templates, and the averages.

    An average takes the parts that are there whole, and says how many of how many that is.
    """
    tasks = {}
    for name, accuracy in by_template.items():
        tasks.setdefault(name.partition(": ")[0], []).append(accuracy)
    summary = {"tasks": {task: {"mean": statistics.fmean(x), "median": statistics.median(x), "min": min(x), "max": max(x),
                                "templates": len(x)} for task, x in tasks.items()}, "averages": {}}
    for average, parts in AVERAGES.items():
        means = [statistics.fmean(statistics.fmean(tasks[name]) for name in part)
                 for part in parts.values() if all(name in tasks for name in part)]
        summary["averages"][average] = {"mean": statistics.fmean(means) if means else None, "over": len(means), "of": len(parts)}
    return summary
