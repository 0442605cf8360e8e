"""The metrics beside the usual way to compute them."""
import json
import os
import random

import torch
import torch.nn.functional as F
from rouge_score import rouge_scorer

import data
import rank
import rouge
from random_t5 import random_t5, train_tokenizer
from side_by_side import compare, note


def rouge_l(args):
    """Google's rouge_score beside ours: every row of the official references against the next row's, and long texts."""
    path = os.path.join(os.environ.get("TAGI_DATA", ""), "sni", "test_references.jsonl")
    if not os.path.isfile(path):
        return note("ROUGE-L", f"skipped: no {path}; TAGI_DATA names a folder with sni/test_references.jsonl")
    with open(path, encoding="utf-8") as f:
        rows = [json.loads(line)["references"] for line in f]
    words, rng = sorted({word for row in rows for word in row[0].split()}), random.Random(0)
    scorer = rouge_scorer.RougeScorer(["rougeL"], use_stemmer=True)
    long = [(" ".join(rng.choices(words, k=2000)), [" ".join(rng.choices(words, k=2000))]) for _ in range(2)]

    def ours(pairs):
        rouge.stem.cache_clear()
        return [rouge.rouge_l(p, references) for p, references in pairs]

    for name, pairs in ((f"{len(rows)} official references", [(rows[i - 1][0], row) for i, row in enumerate(rows)]),
                        (f"{len(long)} pairs of 2 000 words", long)):
        compare(f"ROUGE-L, {name}", args, {
            "rouge_score": lambda: [max(scorer.score(x, p)["rougeL"].fmeasure for x in references) for p, references in pairs],
            "ours": lambda: ours(pairs)}, rounds=7, count=False)


WORDS = "yes no maybe never always true false neither".split()


@torch.no_grad()
def ranking(args):
    """Answer choices of a row that share its encoder pass, beside one pass a choice; eight rows of 1 000 tokens."""
    llm = random_t5("smoke").eval().to(args.device)
    tokenizer = train_tokenizer([" ".join(WORDS)] * 100, 150)
    ids = torch.randint(3, 100, (8, 1000), device=args.device)
    mask = torch.ones_like(ids)

    def one_by_one(choices):
        """As the loss of a plain T5 has it: encoder and decoder for every choice."""
        scores = []
        for n, row in enumerate(choices):
            for choice in row:
                labels = data.labels(tokenizer, [choice], 64, args.device)
                logits = llm(input_ids=ids[n:n + 1], attention_mask=mask[n:n + 1], labels=labels).logits
                scores.append(-F.cross_entropy(logits[0], labels[0], reduction="sum").item())
        return scores

    def one_batch(choices):
        owner = torch.tensor(rank.owner_of(choices))
        labels = data.labels(tokenizer, [choice for row in choices for choice in row], 64, args.device)
        logits = llm(input_ids=ids[owner], attention_mask=mask[owner], labels=labels).logits
        return (-F.cross_entropy(logits.mT, labels, reduction="none").sum(1)).tolist()

    def shared(choices):
        encoded = llm.get_encoder()(input_ids=ids, attention_mask=mask)[0]
        return [score for row in rank.log_likelihoods(llm, tokenizer, encoded, mask, choices) for score in row]

    for n in (2, 4, 8):
        choices = [WORDS[:n]] * 8
        torch.testing.assert_close(torch.tensor(shared(choices)), torch.tensor(one_by_one(choices)), rtol=1e-4, atol=1e-4)
        compare(f"ranking {n} choices", args, {
            "one by one": lambda: one_by_one(choices), "one batch": lambda: one_batch(choices),
            "encoder once a row": lambda: shared(choices)}, rounds=9)
