"""Everything that the quick start trains, for several seeds and kinds of arithmetic: how steady?

    python tests/benchmarks/steady.py --seeds 5     # writes docs/steady.md, keeps what is finished

The suite and the frozen LLM are the same in all runs; LoRA teachers, the one LoRA for all tasks,
pretraining and finetuning are trained anew in each.
"""
import argparse
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch

from pages import ROOT, check_replaceable, command_line, paragraph, processor, table, write

sys.path.insert(0, str(ROOT))
from bench import report

TITLE = "# The same on any machine?"
PYTHON = sys.executable
AVX2 = {"ATEN_CPU_CAPABILITY": "avx2", "MKL_ENABLE_INSTRUCTIONS": "AVX2",
        "ONEDNN_MAX_CPU_ISA": "AVX2"}
ARITHMETIC = {  # name -> (environment, processes)
    "as is": ({}, 2),
    "AVX2": (AVX2, 2),
    "no vector instructions": ({"ATEN_CPU_CAPABILITY": "default"}, 2),
    "one process": ({}, 1),
}
SETTINGS = tuple(report.SETTINGS)       # demonstrations: Def, Def + 2 Pos
ROWS = ("tagi", "tagi_shuffled", "tagi_unseen_wording", "meta", "meta_unseen_wording", "meta_lora")
TAGI, SHUFFLED, REWORDED, META, _, META_LORA = LABELS = [report.ROWS[row] for row in ROWS]


def train_and_score(folder: Path, arithmetic: str, seed: int, config: str) -> dict:
    """{row: {demonstrations: exact match}} on test tasks; finished stages are not run again."""
    environment, processes = ARITHMETIC[arithmetic]
    launch = [PYTHON]
    if processes > 1:
        launch += ["-m", "torch.distributed.run", "--standalone",
                   f"--nproc-per-node={processes}"]
    shared = ["--config", config, "--runs", str(folder), "--seed", str(seed)]
    same_batch = ["--accumulate", str(2 // processes)]
    for script, stage in (("train_teacher", "lora"), ("train_teacher", "lora-all"),
                          ("train_hyper", "pretrain"), ("train_hyper", "finetune")):
        # A LoRA teacher is trained by one process, however many there are.
        more = [] if stage == "lora" else same_batch
        call([*launch, f"{script}.py", "--stage", stage, *more, *shared], environment)
    call([PYTHON, "evaluate.py", "--checkpoint", str(folder / "finetune"),
          "--rows", ",".join(ROWS)], environment)
    scores = {}
    for r in json.loads((folder / "evaluate" / "results.json").read_text())["results"]:
        scores.setdefault(r["row"], {})[r["demos"]] = r["exact_match"]
    return scores


def call(words: list[str], environment: dict) -> None:
    environment = os.environ | {"OMP_NUM_THREADS": "1"} | environment
    done = subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(words)} ended with code {done.returncode}\n"
                 f"{done.stdout[-1000:]}\n{done.stderr[-2000:]}")


def saved_scores(record: Path) -> dict:
    """What `train_and_score` returned in an earlier call, of which JSON made the keys texts."""
    scores = {}
    for row, by_demos in json.loads(record.read_text()).items():
        scores[row] = {int(demos): x for demos, x in by_demos.items()}
    return scores


# ----------------------------------------------------------------------------------------- page

def both(by_demos: dict | None) -> str:
    """Def / Def + 2 Pos; a dash for a row that a run of an earlier version lacks."""
    return " / ".join(f"{by_demos[d]:.1f}" for d in SETTINGS) if by_demos else "–"


def matrix(runs: dict, row: str) -> np.ndarray:
    """A row's scores, (runs, settings)."""
    return np.array([[scores[row][d] for d in SETTINGS] for scores in runs.values()])


def page(runs: dict) -> str:
    """docs/steady.md. runs: (arithmetic, seed) -> what `train_and_score` returns."""
    rows, of_seed = [], {}
    for (arithmetic, seed), scores in runs.items():
        share = {d: 100 * scores[TAGI][d] / scores[META][d] for d in SETTINGS}
        rows.append({"arithmetic": arithmetic, "seed": str(seed), "TAGI": both(scores[TAGI]),
                     "% of the baseline's": both(share),
                     "unseen wording": both(scores[REWORDED]),
                     "shuffled instruction": both(scores[SHUFFLED]),
                     "one LoRA for all": both(scores.get(META_LORA))})
        of_seed.setdefault(seed, []).append([scores[TAGI][d] for d in SETTINGS])
    ours, baseline = matrix(runs, TAGI), matrix(runs, META)
    low, high, mean = ours.min(0), ours.max(0), ours.mean(0)
    same_seed = np.max([np.ptp(x, axis=0) for x in of_seed.values()], 0)
    least = (100 * ours / baseline).min(0)
    its_low, its_high = baseline.min(0), baseline.max(0)
    head = paragraph(
        f"Exact match on test tasks, Def / Def + 2 Pos, of {len(runs)} trainings of what the",
        "quick start trains on the T5 in `assets/`; – is what a run did not train.",
        f"Written by `{command_line()}`. Processor: {processor()}, torch {torch.__version__}.")
    foot = paragraph(
        "The baseline, which is not trained anew, has",
        f"{its_low[0]:.1f} to {its_high[0]:.1f} / {its_low[1]:.1f} to {its_high[1]:.1f}. TAGI lies",
        f"between {low[0]:.1f} and {high[0]:.1f} (mean {mean[0]:.1f}) /",
        f"between {low[1]:.1f} and {high[1]:.1f} (mean {mean[1]:.1f}): any two runs differ by",
        f"at most {high[0] - low[0]:.1f} / {high[1] - low[1]:.1f} points, two of the same seed by",
        f"at most {same_seed[0]:.1f} / {same_seed[1]:.1f}. Its smallest share of the baseline's",
        f"score is {least[0]:.1f} % / {least[1]:.1f} %.")
    return "\n\n".join([TITLE, head, table(rows), foot]) + "\n"


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--seeds", type=int, default=5)
    add("--only", choices=ARITHMETIC, nargs="+", default=list(ARITHMETIC))
    add("--report", action="store_true", help="only the table of the runs that are there")
    add("--jobs", type=int, default=2, help="runs at a time")
    add("--config", default="configs/sample.yaml")
    add("--runs", default="runs/steady", help="folder of the runs")
    add("--out", default="docs/steady.md")
    args = parser.parse_args()
    check_replaceable(ROOT / args.out, TITLE)

    def record_of(case):
        arithmetic, seed = case
        return ROOT / args.runs / f"{arithmetic.replace(' ', '-')}-{seed}" / "steady.json"

    def run(case):
        """Its scores, from the file that an earlier call left, or trained now."""
        record = record_of(case)
        scores = saved_scores(record) if record.is_file() else {}
        if not args.report and not set(LABELS) <= scores.keys():
            record.parent.mkdir(parents=True, exist_ok=True)
            scores = train_and_score(record.parent, *case, args.config)
            record.write_text(json.dumps(scores))
        arithmetic, seed = case
        print(f"{arithmetic}, seed {seed}: TAGI {both(scores[TAGI])}, "
              f"baseline {both(scores[META])}", flush=True)
        return scores

    cases = []
    for arithmetic in args.only:
        for seed in range(args.seeds):
            if not args.report or record_of((arithmetic, seed)).is_file():
                cases.append((arithmetic, seed))
    with ThreadPoolExecutor(args.jobs) as pool:
        runs = dict(zip(cases, pool.map(run, cases)))
    text = page(runs)
    write(ROOT / args.out, text)
    print(text)


if __name__ == "__main__":
    main()
