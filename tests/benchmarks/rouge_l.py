"""Our ROUGE-L beside Google's rouge_score: python tests/benchmarks/rouge_l.py [test_references.jsonl]

Scores every row of the official reference file (default: under TAGI_DATA) against the next row's first reference, and
pairs of 2 000-word texts; the two take turns, medians over seven rounds.
"""
import json
import os
import random
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from rouge_score import rouge_scorer

import rouge


def main():
    path = sys.argv[1] if len(sys.argv) > 1 else os.path.join(os.environ.get("TAGI_DATA", ""), "sni", "test_references.jsonl")
    with open(path, encoding="utf-8") as f:
        rows = [json.loads(line)["references"] for line in f]
    vocabulary = sorted({word for row in rows for word in row[0].split()})
    rng = random.Random(0)
    scorer = rouge_scorer.RougeScorer(["rougeL"], use_stemmer=True)
    long = [(" ".join(rng.choices(vocabulary, k=2000)), [" ".join(rng.choices(vocabulary, k=2000))]) for _ in range(2)]
    sets = {f"{len(rows)} official references": [(rows[i - 1][0], row) for i, row in enumerate(rows)],
            f"{len(long)} pairs of 2 000 words": long}
    ways = {"rouge_score": lambda p, r: max(scorer.score(x, p)["rougeL"].fmeasure for x in r), "ours": rouge.rouge_l}
    print("| | " + " | ".join(f"{way}, s" for way in ways) + " | ratio |\n|---|--:|--:|--:|")
    for name, pairs in sets.items():
        seconds = {way: [] for way in ways}
        for _ in range(7):
            for way, score in ways.items():
                rouge.stem.cache_clear()
                start = time.perf_counter()
                for prediction, references in pairs:
                    score(prediction, references)
                seconds[way].append(time.perf_counter() - start)
        ours, googles = (statistics.median(seconds[way]) for way in ("ours", "rouge_score"))
        print(f"| {name} | {googles:.3f} | {ours:.4f} | {googles / ours:.1f}x |", flush=True)


if __name__ == "__main__":
    main()
