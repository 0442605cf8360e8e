"""Choices that share one encoder pass beside one pass a choice: python tests/benchmarks/rank.py

A T5 of random weights (tests/random_t5.py's smoke size), eight rows of 1 000 tokens with 2, 4 and 8 one-word choices; the two
take turns, medians over nine rounds.
"""
import statistics
import sys
import time
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parents[1]), str(Path(__file__).resolve().parents[2])]

import torch
import torch.nn.functional as F

import data
import rank
from random_t5 import random_t5, train_tokenizer

ROWS, LENGTH = 8, 1000
WORDS = "yes no maybe never always true false neither".split()


def one_by_one(llm, tokenizer, ids, mask, choices):
    """As the loss of a plain T5 has it: encoder and decoder for every choice."""
    scores = []
    for n, row in enumerate(choices):
        for choice in row:
            labels = data.labels(tokenizer, [choice], 64)
            logits = llm(input_ids=ids[n:n + 1], attention_mask=mask[n:n + 1], labels=labels).logits
            scores.append(-F.cross_entropy(logits[0], labels[0], reduction="sum").item())
    return scores


def at_once(llm, tokenizer, ids, mask, choices):
    """All choices in one batch, but each with an encoder pass of its own."""
    owner = torch.tensor(rank.owner_of(choices))
    labels = data.labels(tokenizer, [choice for row in choices for choice in row], 64)
    logits = llm(input_ids=ids[owner], attention_mask=mask[owner], labels=labels).logits
    return (-F.cross_entropy(logits.mT, labels, reduction="none").sum(1)).tolist()


def shared(llm, tokenizer, ids, mask, choices):
    encoded = llm.get_encoder()(input_ids=ids, attention_mask=mask)[0]
    return [score for row in rank.log_likelihoods(llm, tokenizer, encoded, mask, choices) for score in row]


@torch.no_grad()
def main():
    torch.manual_seed(0)
    llm = random_t5("smoke").eval()
    tokenizer = train_tokenizer([" ".join(WORDS)] * 100, 150)
    ids = torch.randint(3, 100, (ROWS, LENGTH))
    mask = torch.ones_like(ids)
    print("| choices | one by one, ms | one batch, ms | encoder once a row, ms | ratio to one by one | to one batch |\n"
          "|--:|--:|--:|--:|--:|--:|")
    for n in (2, 4, 8):
        choices, seconds, scores = [WORDS[:n]] * ROWS, {}, {}
        for _ in range(9):
            for way in (one_by_one, at_once, shared):
                start = time.perf_counter()
                scores[way] = way(llm, tokenizer, ids, mask, choices)
                seconds.setdefault(way, []).append(time.perf_counter() - start)
        torch.testing.assert_close(torch.tensor(scores[shared]), torch.tensor(scores[one_by_one]), rtol=1e-4, atol=1e-4)
        a, b, c = (1000 * statistics.median(seconds[way]) for way in (one_by_one, at_once, shared))
        print(f"| {n} | {a:.0f} | {b:.0f} | {c:.0f} | {a / c:.1f}x | {b / c:.1f}x |", flush=True)


if __name__ == "__main__":
    main()
