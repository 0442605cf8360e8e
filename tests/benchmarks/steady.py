"""Everything that the quick start trains, for several seeds under several kinds of arithmetic: how far do its scores differ?

    python tests/benchmarks/steady.py --seeds 5             # writes docs/steady.md; what is finished is kept

The suite and the frozen LLM are the same in all runs; LoRA teachers, pretraining and finetuning are trained anew in each.
"""
import argparse
import json
import os
import platform
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parents[2]
PYTHON = sys.executable
AVX2 = {"ATEN_CPU_CAPABILITY": "avx2", "MKL_ENABLE_INSTRUCTIONS": "AVX2", "ONEDNN_MAX_CPU_ISA": "AVX2"}
ARITHMETIC = {  # name -> (environment, processes)
    "as is": ({}, 2),
    "AVX2": (AVX2, 2),
    "no vector instructions": ({"ATEN_CPU_CAPABILITY": "default"}, 2),
    "one process": ({}, 1),
}
ROWS = "tagi,tagi_shuffled,tagi_unseen_wording,meta,meta_unseen_wording"
NAMES = {"tagi": "TAGI, right instruction", "meta": "meta-trained, instruction in input",
         "shuffled": "TAGI, shuffled instruction"}


def train_and_score(folder: Path, arithmetic: str, seed: int, config: str) -> dict:
    """{row: {demonstrations: exact match}} of one run on test tasks; finished stages are not run again."""
    environment, processes = ARITHMETIC[arithmetic]
    launch = [PYTHON]
    if processes > 1:
        launch = [PYTHON, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    shared = ["--config", config, "--runs", str(folder), "--seed", str(seed)]
    accumulate = ["--accumulate", str(2 // processes)]                      # the same effective batch
    for words in (["train_teacher.py", "--stage", "lora"], ["train_hyper.py", "--stage", "pretrain", *accumulate],
                  ["train_hyper.py", "--stage", "finetune", *accumulate]):
        call([*launch, *words, *shared], environment)
    call([PYTHON, "evaluate.py", "--checkpoint", str(folder / "finetune"), "--rows", ROWS, "--cost-repeats", "0"], environment)
    results = json.loads((folder / "evaluate" / "results.json").read_text())["results"]
    scores = {}
    for r in results:
        scores.setdefault(r["row"], {})[r["demos"]] = r["exact_match"]
    return scores


def call(words: list[str], environment: dict) -> None:
    done = subprocess.run(words, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"} | environment, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(words)} ended with code {done.returncode}\n{done.stdout[-1000:]}\n{done.stderr[-2000:]}")


def table(runs: dict, seeds: int) -> str:
    """runs: (arithmetic, seed) -> what `train_and_score` returns."""
    lines = ["# The same on any machine?", "",
             f"Exact match on test tasks, Def / Def + 2 Pos, of {len(runs)} trainings of LoRA teachers, pretraining "
             f"and finetuning on the T5 in `assets/`; written by `python tests/benchmarks/steady.py --seeds {seeds}`. "
             f"Processor: {processor()}, torch {torch.__version__}.", "",
             "| arithmetic | seed | TAGI | its share of the baseline's | unseen wording | shuffled instruction |",
             "|---|--:|--:|--:|--:|--:|"]
    for (arithmetic, seed), s in runs.items():
        right, baseline = s[NAMES["tagi"]], s[NAMES["meta"]]
        share = " / ".join(f"{100 * right[d] / baseline[d]:.1f} %" for d in (0, 2))
        lines.append(f"| {arithmetic} | {seed} | {both(right)} | {share} | {both(s['TAGI, unseen wording'])} | "
                     f"{both(s[NAMES['shuffled']])} |")
    rights = np.array([[run[NAMES["tagi"]][d] for d in (0, 2)] for run in runs.values()])
    baselines = np.array([[run[NAMES["meta"]][d] for d in (0, 2)] for run in runs.values()])
    low, high = rights.min(0), rights.max(0)
    same_seed = []
    for seed in {seed for _, seed in runs}:
        own = np.array([[run[NAMES["tagi"]][d] for d in (0, 2)] for (_, s), run in runs.items() if s == seed])
        same_seed.append(own.max(0) - own.min(0))
    spread = np.max(same_seed, 0)
    share = (100 * rights / baselines).min(0)
    lines += ["",
              f"The baseline, which is not trained anew, has {baselines[:, 0].min():.1f} to {baselines[:, 0].max():.1f} / "
              f"{baselines[:, 1].min():.1f} to {baselines[:, 1].max():.1f}.",
              f"TAGI lies between {low[0]:.1f} and {high[0]:.1f} (mean {rights[:, 0].mean():.1f}) / between {low[1]:.1f} and "
              f"{high[1]:.1f} (mean {rights[:, 1].mean():.1f}): any two runs differ by at most {high[0] - low[0]:.1f} / "
              f"{high[1] - low[1]:.1f} points, two of the same seed by at most {spread[0]:.1f} / {spread[1]:.1f}. Its smallest "
              f"share of the baseline's score is {share[0]:.1f} % / {share[1]:.1f} %.", ""]
    return "\n".join(lines)


def both(by_demos: dict) -> str:
    return f"{by_demos[0]:.1f} / {by_demos[2]:.1f}"


def processor() -> str:
    with open("/proc/cpuinfo") as f:
        names = [line.partition(":")[2].strip() for line in f if line.startswith("model name")]
    flags = open("/proc/cpuinfo").read()
    extras = [name for name in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if name in flags]
    return f"{len(names)} cores of {names[0] if names else platform.machine()} with {', '.join(extras)}"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--only", choices=ARITHMETIC, nargs="+", default=list(ARITHMETIC))
    parser.add_argument("--report", action="store_true", help="the table of the runs that are there; nothing is trained")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time")
    parser.add_argument("--config", default="configs/sample.yaml")
    parser.add_argument("--runs", default="runs/steady", help="folder of the runs")
    parser.add_argument("--out", default="docs/steady.md")
    args = parser.parse_args()

    def folder_of(arithmetic, seed):
        return ROOT / args.runs / f"{arithmetic.replace(' ', '-')}-{seed}"

    def run(case):
        """Its scores, from the file that an earlier call left, or trained now."""
        arithmetic, seed = case
        folder = folder_of(*case)
        record = folder / "steady.json"
        if not record.is_file():
            record.parent.mkdir(parents=True, exist_ok=True)
            record.write_text(json.dumps(train_and_score(folder, arithmetic, seed, args.config)))
        scores = {row: {int(demos): x for demos, x in by_demos.items()}      # JSON's keys are texts
                  for row, by_demos in json.loads(record.read_text()).items()}
        print(f"{arithmetic}, seed {seed}: TAGI {both(scores[NAMES['tagi']])}, baseline {both(scores[NAMES['meta']])}", flush=True)
        return case, scores

    cases = [(arithmetic, seed) for seed in range(args.seeds) for arithmetic in args.only]
    if args.report:
        cases = [case for case in cases if (folder_of(*case) / "steady.json").is_file()]
    with ThreadPoolExecutor(args.jobs) as pool:
        runs = dict(pool.map(run, cases))
    runs = dict(sorted(runs.items(), key=lambda item: (args.only.index(item[0][0]), item[0][1])))
    os.makedirs(ROOT / "docs", exist_ok=True)
    text = table(runs, args.seeds)
    (ROOT / args.out).write_text(text)
    print(text)


if __name__ == "__main__":
    main()
