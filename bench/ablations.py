"""The paper's Table 4: what bench/ablations.sh left, told as one table."""
import json
import os

import numpy as np

import common
from bench.report import ROWS, SETTINGS, TITLES, check_finite, difference, line, say, write_file
from common import UserError

WHOLE = "TAGI, whole method"
ABLATIONS = {                                           # row -> its name in bench/ablations.sh
    WHOLE: "",
    "without pretraining": "without-pretraining",
    "without fusion (LoRA alone)": "without-fusion",
    "without L_pred": "without-pred",
    "without L_kl": "without-kl",
    "without L_ins": "without-ins",
    "without hypernetwork (fusion alone)": "without-hypernetwork",
    "L_ins compares B·A": "with-product",
    "L_ins compares A and B": "with-factors",
    "L_ins compares A and B by SVD": "with-svd",
}
HEAD = "mean ± standard deviation"
STUDENT_T = [4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26]            # 97.5 %; 3, 4, .. seeds


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


def results_path(folder: str, split: str, name: str) -> str:
    """Where bench/ablations.sh keeps the results of an ablation, or "", the whole method."""
    return f"{folder}/evaluate-{split}{name and '-' + name}/results.json"


def read(runs: str, split: str) -> tuple[dict, str]:
    """({row: {demos: {seed: its row of results.json}}}, what scores), of bench/ablations.sh.

    runs: the folder of seed 0; that of seed 1 is {runs}-seed1, and so on. Rows, or seeds of a row,
    that were not trained are not among them. Raises UserError where the whole method's results
    are missing, or a score is no number.
    """
    folders, scores = [runs], {}
    while os.path.isfile(results_path(f"{runs}-seed{len(folders)}", split, "")):
        folders.append(f"{runs}-seed{len(folders)}")
    for row, name in ABLATIONS.items():
        for seed, folder in enumerate(folders):
            path = results_path(folder, split, name)
            if name and not os.path.isfile(path):
                continue
            with common.named_file(path, "first run bash bench/ablations.sh"):
                with open(path, encoding="utf-8") as f:
                    results = json.load(f)
                metric = "rouge_l" if results["bench"] == "sni" else "exact_match"
                rows = [(r["row"], int(r["demos"]), r) for r in results["results"]]
                check_finite([float(r[metric]) for _, _, r in rows], path)
            for label, demos, r in rows:
                if label == ROWS["tagi"]:
                    label = row
                elif name:                              # an ablation's own controls
                    continue
                scores.setdefault(label, {}).setdefault(demos, {})[seed] = r
    return scores, metric


def table(scores: dict, metric: str, split: str) -> str:
    """Means over seeds, and the differences from the whole method, as Markdown."""
    whole = scores[WHOLE]
    n = max(map(len, whole.values()))
    lines = [f"{split} tasks, {TITLES[metric]}, {HEAD} over {n} seed{'s' * (n > 1)}; in brackets "
             "the difference from the whole method and its 95 % interval, paired by seed, of one "
             "or two seeds by task", "", "| | " + " | ".join(SETTINGS[demos] for demos in whole) +
             " |", "|---|" + "---|" * len(whole)]
    for row, by_demos in scores.items():
        has = max(map(len, by_demos.values()))
        cells = [row if has == n else f"{row}, {has} of {n} seeds"]
        for demos in whole:
            its = by_demos[demos]                       # {seed: its row}
            cell = spread([r[metric] for r in its.values()])
            if row in ABLATIONS and row != WHOLE:
                cell += f" ({compared(its, whole[demos], metric)})"
            cells.append(cell)
        lines.append(line(cells))
    return "\n".join(lines)


def spread(scores: list[float]) -> str:
    mean = f"{np.mean(scores):.1f}"
    return mean if len(scores) == 1 else f"{mean} ± {np.std(scores, ddof=1):.1f}"


def compared(its: dict, whole: dict, metric: str) -> str:
    """The difference of {seed: row} from the whole method's of the same seeds, and its interval."""
    if len(its) < 3:                                    # over tasks: two seeds say little
        others = {seed: whole[seed] for seed in its}
        mean, (low, high) = difference(mean_row(its, metric), mean_row(others, metric), metric)
        told = f"{mean:+.1f}, {low:+.1f} – {high:+.1f}"
    else:                                               # over seeds, Student's t
        d = np.array([r[metric] - whole[seed][metric] for seed, r in its.items()])
        mean = d.mean()
        half = STUDENT_T[min(len(d), 10) - 3] * d.std(ddof=1) / len(d) ** 0.5
        low, high, told = mean - half, mean + half, f"{mean:+.1f} ± {half:.1f}"
    return told + (", noise" if low <= 0 <= high else "")


def mean_row(its: dict, metric: str) -> dict:
    """Of {seed: row} a row with each task's mean score."""
    rows = list(its.values())
    scores = [r["by_task"][metric] for r in rows]
    mean = {task: np.mean([x[task] for x in scores]) for task in scores[0]}
    return rows[0] | {"by_task": {metric: mean}}
