"""ROUGE-L against Google's rouge_score, to the last bit."""
import json
import os
import random
from pathlib import Path

import pytest
from rouge_score import rouge_scorer

import evaluate
from bench import rouge

SCORER = rouge_scorer.RougeScorer(["rougeL"], use_stemmer=True)


def google(prediction, references):
    return max(SCORER.score(reference, prediction)["rougeL"].fmeasure for reference in references)


def test_golden_values():
    """Worked by hand: a common subsequence of 2 in 3 and 4 words; case, punctuation and endings do not count."""
    assert evaluate.rouge_l is rouge.rouge_l
    assert rouge.rouge_l("a b c", ["a x b y"]) == 2 * (2 / 3) * (2 / 4) / (2 / 3 + 2 / 4)
    assert rouge.rouge_l("", ["a"]) == rouge.rouge_l("a", [""]) == rouge.rouge_l("a", ["b"]) == rouge.rouge_l("?", ["!"]) == 0
    assert rouge.rouge_l("B a", ["z", "b A."]) == 1
    assert rouge.rouge_l("Running quickly", ["runs quick"]) == 0.5                  # quickly -> quickli
    assert rouge.words("Generalizations of the ponies' 3 hopping studies") == [
        "gener", "of", "the", "poni", "3", "hop", "studi"]


def test_random_strings_score_as_googles():
    """20 000 predictions with two references: endings of every rule, digits, punctuation, case, other alphabets."""
    rng = random.Random(0)
    endings = [*rouge.STEP2, *rouge.STEP3, *rouge.STEP4, "", "", "s", "es", "ies", "sses", "ed", "ing", "ied", "eed", "y", "e", "ll"]
    words = ["".join(rng.choices("abcdeilostuyz", k=rng.randrange(1, 6))) + rng.choice(endings) + rng.choice(endings)
             for _ in range(3000)]
    words += [*rouge.IRREGULAR, "The", "a-b", "x_y", "3.5", "don't", "été", "中文", "İstanbul", "\u212a", "\n", ".", "!", ""]
    for _ in range(20_000):
        few = rng.sample(words, 6)
        prediction, *references = (" ".join(rng.choices(few, k=rng.randrange(9))) for _ in range(3))
        assert rouge.rouge_l(prediction, references) == google(prediction, references), (prediction, references)


@pytest.mark.skipif("TAGI_DATA" not in os.environ, reason="TAGI_DATA names no folder with the official references")
def test_official_references_score_as_googles():
    """Every row of the official reference file against copies, corruptions, other rows, and odd texts."""
    rng = random.Random(0)
    path = Path(os.environ["TAGI_DATA"]) / "sni" / "test_references.jsonl"
    rows = [json.loads(line)["references"] for line in path.read_text(encoding="utf-8").splitlines()]
    for references in rows:
        own = references[0].split()
        for prediction in (references[-1], " ".join(rng.sample(own, len(own))), " ".join(own[::2]), " ".join(own + own[:3]),
                           rng.choice(rows)[0], "", "– ÉTÉ 中文 " + references[0].upper()):
            assert rouge.rouge_l(prediction, references) == google(prediction, references), (prediction, references)
    for references in rows[::500]:
        prediction = " ".join([references[0]] * 30)
        assert rouge.rouge_l(prediction, references) == google(prediction, references)
