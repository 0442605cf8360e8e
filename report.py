"""Tables: intervals, the main table, and the ablations' retraining and summary."""
import functools
import json
import os
import subprocess
import sys
import time

import numpy as np

import common

SETTINGS = {0: "Def", 2: "Def + 2 Pos"}
STUDENT_T = [12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26]     # 97.5 % quantile at 1, 2, ... degrees of freedom

# Table 4's rows beside the whole method: what is retrained without each part, as options of the finetune stage.
ABLATIONS = {
    "TAGI, whole method": [],
    "without pretraining": ["--no-pretrained"],
    "without fusion (LoRA alone)": ["--no-fusion"],
    "without L_pred": ["--lambda-ce=0"],
    "without L_kl": ["--lambda-kl=0"],
    "without L_ins": ["--lambda-ins=0"],
    "without hypernetwork (fusion alone)": ["--no-hypernetwork"],
}


def bootstrap_interval(values, owner, samples=2000, seed=0):
    """95 % interval of the mean over instances when tasks are drawn anew, [low, high].

    values: (n,) scores; owner: (n,) the number of each instance's task.
    """
    n = owner.max() + 1
    sums, counts = np.bincount(owner, values, n), np.bincount(owner, minlength=n)
    draws = np.random.default_rng(seed).integers(n, size=(samples, n))
    means = sums[draws].sum(1) / counts[draws].sum(1)
    return [float(x) for x in np.percentile(means, [2.5, 97.5])]


def main_table(results: list[dict], split: str) -> str:
    """Both settings as Markdown; costs relative to the meta-trained row."""
    lines = []
    for demos, setting in SETTINGS.items():
        rows = [r for r in results if r["demos"] == demos]
        if not rows:
            continue
        reference = next((r for r in rows if r["row"] == "meta-trained, instruction in input"), {})
        lines += [f"\n**{setting}**, {split} tasks\n",
                  "| | exact match | 95 % | ROUGE-L | 95 % | tasks | ms / instance | FLOPs / instance |",
                  "|---|--:|---|--:|---|--:|--:|--:|"]
        for r in rows:
            cost = ["", ""]
            if "ms" in r:
                cost = [f"{r['ms']:.2f} ({r['ms'] / reference['ms']:.2f}x)",
                        f"{r['flops'] / 1e6:.1f} M ({r['flops'] / reference['flops']:.2f}x)"]
            cells = [r["row"]]
            for metric in ("exact_match", "rouge_l"):
                low, high = r[metric + "_interval"]
                cells += [f"{r[metric]:.1f}", f"{low:.1f} – {high:.1f}"]
            lines.append("| " + " | ".join(cells + [str(r["tasks"])] + cost) + " |")
    return "\n".join(lines)


# -------------------------------------------------------------------------------------------------------- ablations

def ablations(options) -> None:
    """Retrain finetuning for every row of ABLATIONS on suites of several seeds, and print means with spread.

    Everything a row needs, each suite's base, baseline, teachers and pretraining, is run where it is missing; finished
    parts are kept, so an interrupted run goes on. The parts are retrained without, never switched off after training.
    """
    train = functools.partial(python, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={options.processes}")
    names = [("-seed%d" % seed) * (seed > 0) for seed in range(options.seeds)]      # seed 0 is the quick start's suite
    shared = [["--config", options.config, f"--seed={seed}", f"--data={options.data}{name}", f"--runs={options.runs}{name}"]
              for seed, name in enumerate(names)]
    for seed, name in enumerate(names):
        if not os.path.isdir(options.data + name):
            python("sample.py", f"--out={options.data}{name}", f"--seed={seed}")
        train("train_teacher.py", *shared[seed])
        train("train_teacher.py", *shared[seed], "--stage=lora", "--unit=all", "--name=lora-all", "--tasks=48")
        train("train_hyper.py", "--stage=pretrain", *shared[seed])
    scores = {}                                                     # row -> {demos: [one result a seed]}
    for row, flags in ABLATIONS.items():
        run = "finetune" + "".join(flags).replace("--", "-").replace("=", "-")
        for seed, name in enumerate(names):
            train("train_hyper.py", "--stage=finetune", *shared[seed], *[f"--name={run}"] * bool(flags), *flags)
            out = f"{options.runs}{name}/evaluate-{run}"
            if not os.path.isfile(f"{out}/results.json"):
                python("evaluate.py", *shared[seed], f"--checkpoint={options.runs}{name}/{run}", f"--out={out}",
                       f"--split={options.split}", *["--tagi-only"] * bool(flags))
            with open(f"{out}/results.json") as f:
                for r in json.load(f)["results"]:
                    label = row if r["row"] == "TAGI, right instruction" else r["row"]
                    scores.setdefault(label, {}).setdefault(r["demos"], []).append(r)
    text = ablation_table(scores, options)
    print(text)
    common.write_text(f"{options.runs}-ablations.md", text + "\n")


def ablation_table(scores: dict, options) -> str:
    """Exact match, mean ± standard deviation over seeds, and the difference from the whole method, paired by seed.

    The difference comes with the half width of its 95 % interval (Student's t over seeds) and is called noise where that
    holds zero.
    """
    whole = scores["TAGI, whole method"]
    lines = [f"{options.split} tasks, exact match, mean ± standard deviation over {options.seeds} suite seeds; in brackets "
             "the difference from the whole method, paired by seed, ± its 95 % interval", "",
             "| | " + " | ".join(SETTINGS.values()) + " |", "|---|---|---|"]
    for row, by_demos in scores.items():
        cells = []
        for demos in SETTINGS:
            x = np.array([r["exact_match"] for r in by_demos[demos]])
            text = f"{x.mean():.1f} ± {x.std(ddof=1) if len(x) > 1 else float('nan'):.1f}"
            if row in ABLATIONS and row != "TAGI, whole method":
                d = x - np.array([r["exact_match"] for r in whole[demos]])
                half = STUDENT_T[min(len(d), 10) - 2] * d.std(ddof=1) / len(d) ** 0.5 if len(d) > 1 else float("inf")
                text += f" ({d.mean():+.1f} ± {half:.1f}{', noise' if abs(d.mean()) <= half else ''})"
            cells.append(text)
        lines.append(f"| {row} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def python(*words: str) -> None:
    print("$ python " + " ".join(words), flush=True)
    start = time.time()
    code = subprocess.run([sys.executable, *words]).returncode
    if code:
        raise common.UserError(f"python {' '.join(words)} ended with code {code}")
    print(f"({time.time() - start:.0f} s)", flush=True)
