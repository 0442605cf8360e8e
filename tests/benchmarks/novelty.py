"""How often `adapt.py --compare` errs about an instruction being far from those trained on: docs/novelty.md.

    python tests/benchmarks/novelty.py [folder of Super-NaturalInstructions; default: natural-instructions]

Near are the built-in suite's tasks, far are Super-NaturalInstructions' definitions, of which the shipped model knows none.
The same is told for the encoder's last states in place of the embeddings.
"""
import json
import sys
import warnings
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT))

import data
import t5
from bench import novelty, sample
from hypernet import TAGI

SHORT = ("Translate into French.", "Summarize the text.", "Is this review positive or negative?", "Write a poem about the sea.",
         "Answer the question.", "Correct the grammar.", "What is the capital of Italy?", "Give the antonym.",
         "Solve the equation.", "Rewrite it politely.", "Who wrote this book?", "Fix the spelling mistakes.")
CHECKPOINT = str(ROOT / "assets" / "tagi-lora")


def last_states(tagi, texts):
    """`novelty.encode` by the encoder's last states."""
    vectors = []
    for batch in data.batches(texts, 64):
        adapter = tagi.adapt(batch)
        states = adapter.states * adapter.mask[..., None]
        vectors.append(F.normalize(states.sum(1), dim=-1))
    return torch.cat(vectors)


def nearest(encode, tagi, sets, trained):
    """{name: the largest cosine of each text with a training text}."""
    vectors = encode(tagi, trained)
    mean = vectors.mean(0)
    vectors = novelty.centered(vectors, mean)
    return {name: (novelty.centered(encode(tagi, texts), mean) @ vectors.T).max(1).values.numpy()
            for name, texts in sets.items()}


def main():
    warnings.simplefilter("ignore")
    root = sys.argv[1] if len(sys.argv) > 1 else "natural-instructions"
    sample.ensure_suite(sample.SUITE)
    tagi = TAGI.load(CHECKPOINT)
    suite = {split: data.load_sni(sample.SUITE, split, 1)
             for split in ("train", "validation", "test", "validation_unseen_wording", "test_unseen_wording")}
    foreign = [task.definitions[0] for task in data.load_sni(root, "train", 1, allow_missing=True)]
    natural = [json.loads(line)["instruction"] for line in (ROOT / "tests" / "natural.jsonl").read_text().splitlines()]
    sets = {name.replace("_", ", "): [task.definitions[0] for task in suite[name]] for name in suite if name != "train"}
    sets["forty natural instructions"] = natural
    sets["Super-NaturalInstructions, whole definition"] = foreign
    sets["Super-NaturalInstructions, first sentence"] = [text.split(". ")[0] for text in foreign]
    sets["twelve short ones of other kinds"] = SHORT
    trained = [text for task in suite["train"] for text in task.definitions[:novelty.WORDINGS]]
    lines = ["# How near an instruction is to those trained on", "",
             "`adapt.py --compare` calls an instruction far where its nearest training task is farther than that of 95 % of",
             "the validation tasks. Written by `python tests/benchmarks/novelty.py`, for `assets/tagi-lora`: the share that is",
             "called far, right for the last three rows and wrong for all others. Short ones of common words pass as near: where",
             "one holds a word that the model does not know, it is told to be perhaps far.", "",
             "| instructions | number | called far, by embeddings | by the encoder's last states |", "|---|--:|--:|--:|"]
    by = [nearest(encode, tagi, sets, trained) for encode in (novelty.encode, last_states)]
    thresholds = [np.quantile(found["validation"], novelty.SHARE) for found in by]
    for name, texts in sets.items():
        shares = [100 * (found[name] < threshold).mean() for found, threshold in zip(by, thresholds)]
        lines.append(f"| {name} | {len(texts)} | {shares[0]:.1f} % | {shares[1]:.1f} % |")
    unknown = sum(bool(t5.unknown_words(tagi.tokenizer, [text])) for text in SHORT)
    lines += ["", f"Of the twelve short ones {unknown} hold an unknown word.", "", f"The threshold is a cosine of {thresholds[0]:.3f}; {len(trained)} wordings of {len(suite['train'])} training tasks."]
    (ROOT / "docs" / "novelty.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
