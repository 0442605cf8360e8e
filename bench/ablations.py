"""The paper's Table 4: what bench/ablations.sh left, told as one table."""
import json
import os

import numpy as np

import common
from bench.report import ROWS, SETTINGS, TITLES, check_finite, line, say, write_file
from common import UserError

WHOLE = "TAGI, whole method"
ABLATIONS = {                                           # row -> its run in bench/ablations.sh
    WHOLE: "finetune",
    "without pretraining": "finetune-without-pretraining",
    "without fusion (LoRA alone)": "finetune-without-fusion",
    "without L_pred": "finetune-without-pred",
    "without L_kl": "finetune-without-kl",
    "without L_ins": "finetune-without-ins",
    "without hypernetwork (fusion alone)": "finetune-without-hypernetwork",
    "L_ins compares B·A": "finetune-with-product",
    "L_ins compares A and B": "finetune-with-factors",
    "L_ins compares A and B by SVD": "finetune-with-svd",
}
HEAD = "mean ± standard deviation"
STUDENT_T = [12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26]    # 97.5 %; 2, 3, .. seeds


def tell(runs: str, split: str) -> None:
    """Write the table of what bench/ablations.sh left in this folder of runs, and print it."""
    runs = os.path.normpath(runs)
    text = table(*read(runs, split), split)
    path = f"{runs}-ablations.md" if split == "test" else f"{runs}-ablations-{split}.md"
    if os.path.lexists(path):
        with common.named_file(path, "move it away"), open(path, encoding="utf-8") as f:
            ours = HEAD in f.readline()
        if not ours:
            raise UserError(f"{path} is no table of ablations, and is not replaced; move it away")
    write_file(path, text + "\n")
    say(f"{text}\n\nsaved as {path}")


def read(runs: str, split: str) -> tuple[dict, str]:
    """({row: {demos: [score of each seed]}}, what scores) as bench/ablations.sh left it.

    runs: the folder of seed 0; that of seed 1 is {runs}-seed1, and so on. Raises UserError where
    a result is missing, of another split or no number.
    """
    folders, scores = [runs], {}
    while os.path.isdir(f"{runs}-seed{len(folders)}"):
        folders.append(f"{runs}-seed{len(folders)}")
    for row, name in ABLATIONS.items():
        for folder in folders:
            path = f"{folder}/evaluate-{name}/results.json"
            with common.named_file(path, "first run bash bench/ablations.sh"):
                with open(path, encoding="utf-8") as f:
                    results = json.load(f)
                metric = "rouge_l" if results["bench"] == "sni" else "exact_match"
                rows = [(r["row"], int(r["demos"]), float(r[metric])) for r in results["results"]]
                of_split = str(results["split"])
            check_finite([score for _, _, score in rows], path)
            if of_split != split:
                raise UserError(f"{path} is of {of_split[:40]} tasks, not {split}; run "
                                f"SPLIT={split} bash bench/ablations.sh for all {len(folders)} "
                                f"seeds, or move {folder} away")
            for label, demos, score in rows:
                by_demos = scores.setdefault(row if label == ROWS["tagi"] else label, {})
                by_demos.setdefault(demos, []).append(score)
    return scores, metric


def table(scores: dict, metric: str, split: str) -> str:
    """Means over seeds, and the differences from the whole method, as Markdown."""
    whole = {demos: np.array(x) for demos, x in scores[WHOLE].items()}
    lines = [f"{split} tasks, {TITLES[metric]}, {HEAD} over {len(whole[0])} "
             "seeds; in brackets the difference from the whole method, paired by seed, ± its 95 % "
             "interval", "", "| | " + " | ".join(SETTINGS[demos] for demos in whole) + " |",
             "|---|" + "---|" * len(whole)]
    for row, by_demos in scores.items():
        cells = [row]
        for demos in whole:
            x = np.array(by_demos[demos])
            n = len(x)
            spread = x.std(ddof=1) if n > 1 else float("nan")
            cell = f"{x.mean():.1f} ± {spread:.1f}"
            if row in ABLATIONS and row != WHOLE:
                d, half = x - whole[demos], float("inf")
                if n > 1:                               # Student's t over seeds
                    half = STUDENT_T[min(n, 10) - 2] * d.std(ddof=1) / n ** 0.5
                noise = ", noise" if abs(d.mean()) <= half else ""
                cell += f" ({d.mean():+.1f} ± {half:.1f}{noise})"
            cells.append(cell)
        lines.append(line(cells))
    return "\n".join(lines)
