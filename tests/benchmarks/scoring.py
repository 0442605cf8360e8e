"""The metrics beside the usual way to compute them."""
import json
import os
import random

import torch
import torch.nn.functional as F

import data
import t5
from bench import rouge
from random_t5 import random_t5, train_tokenizer


def rouge_l(section, args):
    """ROUGE-L is computed by this code, or by Google's rouge_score.

    Both score pairs of an answer and its references, on the CPU: every row of the official test
    references against the row before it, and two pairs of long texts. A relative time of 0.05
    says that ours takes a twentieth of the time.
    """
    path = os.path.join(os.environ.get("TAGI_DATA", ""), "sni", "test_references.jsonl")
    if not os.path.isfile(path):
        section.notes.append("Left out: TAGI_DATA names no folder with sni/test_references.jsonl.")
        return
    with open(path, encoding="utf-8") as f:
        rows = [json.loads(line)["references"] for line in f]
    from rouge_score import rouge_scorer        # of all benchmarks this one alone needs it
    scorer = rouge_scorer.RougeScorer(["rougeL"], use_stemmer=True)

    def text(words, rng):
        return " ".join(rng.choices(words, k=2000))

    def theirs(pairs):
        scores = []
        for answer, references in pairs:
            f = [scorer.score(reference, answer)["rougeL"].fmeasure for reference in references]
            scores.append(max(f))
        return scores

    def ours(pairs):
        rouge.stem.cache_clear()                        # each round is to stem every word anew
        return [rouge.rouge_l(answer, references) for answer, references in pairs]

    words, rng = sorted({word for row in rows for word in row[0].split()}), random.Random(0)
    cases = {
        f"{len(rows)} rows": [(rows[n - 1][0], row) for n, row in enumerate(rows)],
        "2 pairs of 2000 words": [(text(words, rng), [text(words, rng)]) for _ in range(2)]}
    for case, pairs in cases.items():
        section.compare(case, {"rouge_score": lambda: theirs(pairs), "ours": lambda: ours(pairs)},
                        rounds=3, count=False)


WORDS = "yes no maybe never always true false neither".split()


@torch.no_grad()
def ranking(section, args):
    """A row's answer choices share one encoder pass, or have one pass each.

    P3's tasks are scored by every choice's likelihood. "One by one" takes a plain T5's loss,
    choice after choice; "one batch" repeats each input for its choices; "encoder once a row" is
    what evaluate.py does. Eight rows of 1000 tokens, on a two-layer T5 of its own.
    """
    llm = random_t5("smoke").eval().to(args.device)
    tokenizer = train_tokenizer([" ".join(WORDS)] * 100, 150)
    ids = torch.randint(3, 100, (8, 1000), device=args.device)
    mask = torch.ones_like(ids)

    def encode_choices(choices):
        """The choices' labels (M, C), and each one's row (M,)."""
        counts = torch.tensor([len(row) for row in choices])
        labels = data.labels(tokenizer, [choice for row in choices for choice in row], 64,
                             args.device)
        return labels, torch.repeat_interleave(counts).to(args.device)

    def one_by_one(choices):
        scores = []
        for n, row in enumerate(choices):
            for choice in row:
                labels = data.labels(tokenizer, [choice], 64, args.device)
                logits = llm(input_ids=ids[n:n + 1], attention_mask=mask[n:n + 1],
                             labels=labels).logits
                scores.append(-F.cross_entropy(logits[0], labels[0], reduction="sum").item())
        return scores

    def one_batch(choices):
        labels, owner = encode_choices(choices)
        logits = llm(input_ids=ids[owner], attention_mask=mask[owner], labels=labels).logits
        return (-F.cross_entropy(logits.mT, labels, reduction="none").sum(1)).tolist()

    def shared(choices):
        labels, owner = encode_choices(choices)
        encoded = llm.get_encoder()(input_ids=ids, attention_mask=mask)[0]
        return sum(t5.score_choices(llm, encoded, mask, labels, owner), [])

    for n in (2, 4, 8):
        choices = [WORDS[:n]] * 8
        torch.testing.assert_close(torch.tensor(shared(choices)), torch.tensor(one_by_one(choices)),
                                   rtol=1e-4, atol=1e-4)
        section.compare(f"{n} choices", {
            "one by one": lambda: one_by_one(choices),
            "one batch": lambda: one_batch(choices),
            "encoder once a row": lambda: shared(choices)}, rounds=3)
