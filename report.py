"""Tables: intervals, the main table, and the ablations' retraining and summary."""
import functools
import json
import os
import subprocess
import sys
import time

import numpy as np

import common
import data
import rank

SETTINGS = {0: "Def", 2: "Def + 2 Pos"}
TITLES = {"exact_match": "exact match", "rouge_l": "ROUGE-L"}
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


def main_table(results: dict) -> str:
    """Both settings as Markdown; costs relative to the meta-trained row. results: as `evaluate.run` returns them."""
    lines, n = [], 1 if results["bench"] == "sample" else 100                # costs are per instance, or per task of 100
    metrics = ("exact_match", "rouge_l") if results["bench"] == "sample" else ("rouge_l", "exact_match")
    unit = "instance" if n == 1 else f"task of {n}"
    for demos in dict.fromkeys(r["demos"] for r in results["results"]):
        rows = [r for r in results["results"] if r["demos"] == demos]
        reference = next((r for r in rows if r["row"] == "meta-trained, instruction in input"), {})
        lines += [f"\n**{SETTINGS.get(demos, 'all')}**, {coverage(results)}\n",
                  "| | " + "".join(f"{TITLES[metric]} | 95 % | " for metric in metrics)
                  + f"tasks | ms / {unit} | FLOPs / {unit} | N(t + n·i) |", "|---|--:|---|--:|---|--:|--:|--:|--:|"]
        for r in rows:
            cells, cost = [r["row"]], ["", "", ""]
            if "ms" in r and "ms" in reference:
                cost = [f"{r['ms'] * n:.{2 if n == 1 else 0}f} ({r['ms'] / reference['ms']:.2f}x)",
                        f"{in_units(r['flops'] * n)} ({r['flops'] / reference['flops']:.2f}x)", f"{r['formula']:.2f}x"]
            for metric in metrics:
                low, high = r[metric + "_interval"]
                cells += [f"{r[metric]:.1f}", f"{low:.1f} – {high:.1f}"]
            lines.append("| " + " | ".join(cells + [str(r["tasks"])] + cost) + " |")
        for r in results["published"]:
            if r["demos"] == demos:
                lines.append(f"| {r['row']} | {r['rouge_l']:.1f} |  |  |  | 119 |  | ({r['flops_ratio']:.2f}x) |  |")
    return "\n".join(lines)


def coverage(results: dict) -> str:
    """Which tasks the numbers are over; 53/119 where a split's tasks are not all there."""
    if results["split"] == "rescored":
        return "rescored predictions"
    tasks = f"{results['tasks']}/{results['listed']} " if results["tasks"] < results["listed"] else ""
    return f"{tasks}{results['split']} tasks"


def in_units(x: float) -> str:
    for unit in ("M", "G", "T"):
        x /= 1e6 if unit == "M" else 1e3
        if x < 1000 or unit == "T":
            return f"{x:.1f} {unit}"


# Of T5 v1.1, which T5-LM, T0 and Tk-Instruct are: (d_model, d_ff, d_kv, heads, encoder's layers,
# decoder's) -> the paper's name. By d_model and layers alone T5 v1.0's 3B and 11B would be Large.
SIZES = {
    (768, 2048, 64, 12, 12, 12): "base",
    (1024, 2816, 64, 16, 24, 24): "large",
    (2048, 5120, 64, 32, 24, 24): "xl",
    (4096, 10240, 64, 64, 24, 24): "xxl",
}


def size_of(llm_config) -> str | None:
    """base, large, xl or xxl; None for another LLM (mT5 has their shapes, but more words)."""
    c = llm_config
    shape = (c.d_model, c.d_ff, c.d_kv, c.num_heads, c.num_layers, c.num_decoder_layers)
    return SIZES.get(shape) if c.model_type == "t5" else None


def published_sni(llm_config) -> list[dict]:
    """The paper's rows (its Table 2) for an LLM of this size; none for a size that it does not have."""
    sizes = ["base", "xl", "xxl"]
    if size_of(llm_config) not in sizes:
        return []
    size, rows = sizes.index(size_of(llm_config)), paper_results()["sni"]
    return [{"row": f"paper: {name}", "demos": demos, "rouge_l": row[setting][size], "flops_ratio": row["rel_flops"]}
            for demos, setting in ((0, "def"), (2, "def_2pos")) for name, row in rows.items()
            if row[setting][size] is not None]


def p3_table(results: dict) -> str:
    """Accuracy of every P3 task, mean (median; spread) over its templates, and the averages; then the paper's."""
    rows = [r | rank.summarize(r["by_task"]["exact_match"]) for r in results["results"]]
    there = [name for name in data.P3_TEST if all(name in r["tasks"] for r in rows)]
    missing = [name for name in data.P3_TEST if name not in there]
    lines = ["**P3**, T0's held-out tasks, accuracy: mean (median; smallest – largest) over a task's templates", "",
             "| | templates | " + " | ".join(r["row"] for r in rows) + " |", "|---|--:|" + "---|" * len(rows)]
    for task in there:
        cells = [r["tasks"][task] for r in rows]
        lines.append(f"| {task} | {cells[0]['templates']} | " + " | ".join(
            f"{x['mean']:.1f} ({x['median']:.1f}; {x['min']:.1f} – {x['max']:.1f})" for x in cells) + " |")
    for average, x in rows[0]["averages"].items():
        over = f", over {x['over']} of {x['of']}" if x["over"] < x["of"] else ""
        if x["over"]:
            cells = (f"{r['averages'][average]['mean']:.1f}" for r in rows)
            lines.append(f"| **{average}**{over} |  | " + " | ".join(cells) + " |")
    reference = next((r["ms"] for r in rows if r.get("key") == "meta" and "ms" in r), None)
    if reference:
        cells = (f"{r['ms']:.1f} ({r['ms'] / reference:.2f}x)" if "ms" in r else "" for r in rows)
        lines.append("| ms a row at batch size 1 |  | " + " | ".join(cells) + " |")
    if missing:
        lines += ["", f"No rows for {', '.join(missing)}: put their validation rows into the data folder (README)."]
    if results["published"]:
        lines += ["", "| paper | MTest11 | HyperT5 | time |", "|---|--:|--:|--:|"]
        lines += [f"| {r['row']} | {r['mtest11']} | {r['hypert5']} | {r['time']} |" for r in results["published"]]
    return "\n".join(lines)


def published_p3(llm_config) -> list[dict]:
    """The paper's rows (its Table 3) for an LLM of this size, started from T5-LM and from T0; none for another size."""
    sizes = ["base", "large", "xl"]
    if size_of(llm_config) not in sizes:
        return []
    size, averages, rows = sizes.index(size_of(llm_config)), paper_results()["p3"], []
    for name in averages["mtest11"] | averages["hypert5"]:
        for start, label in (("t5_lm", "T5-LM"), ("t0", "T0")):
            numbers = [averages[average].get(name, {}).get(start, [None] * 3)[size] for average in ("mtest11", "hypert5")]
            if any(numbers):
                time = averages["mtest11"].get(name, {}).get("rel_time", "")
                rows.append({"row": f"{name}, {label}", "mtest11": numbers[0] or "", "hypert5": numbers[1] or "", "time": time})
    return rows


def paper_results() -> dict:
    path = os.path.join(os.path.dirname(os.path.abspath(__file__)), "configs", "paper_results.yaml")
    return common.read_yaml(path, "restore it from the repository")


def by_category(results: dict, demos) -> tuple[list[dict], str, list[str]]:
    """(rows of one setting, their metric, their categories), without the teachers': those are over other tasks.

    Where there is no other row, the teachers'.
    """
    metric = "exact_match" if results["bench"] == "sample" else "rouge_l"
    rows = [r for r in results["results"] if r["demos"] == demos]
    rows = [r for r in rows if not r["row"].startswith("LoRA teachers")] or rows
    return rows, metric, sorted({c for r in rows for c in r["by_category"][metric]})


def category_table(results: dict) -> str:
    """One line a category, one column a row of the main table, for every setting."""
    lines = []
    for demos in dict.fromkeys(r["demos"] for r in results["results"]):
        rows, metric, categories = by_category(results, demos)
        lines += [f"\n**{SETTINGS.get(demos, 'all')}** by category, {TITLES[metric]}, {coverage(results)}\n",
                  "| | " + " | ".join(r["row"] for r in rows) + " |", "|---|" + "--:|" * len(rows)]
        for category in categories:
            scores = (r["by_category"][metric].get(category) for r in rows)
            cells = ("" if x is None else f"{x:.1f}" for x in scores)
            lines.append(f"| {category} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def category_chart(results: dict, path: str) -> None:
    """A bar chart of category_table's first setting, where matplotlib happens to be installed."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return
    first = results["results"][0]["demos"]
    rows, metric, categories = by_category(results, first)
    figure = Figure(figsize=(8, 1 + 0.12 * len(categories) * len(rows)), layout="constrained")
    axes, height = figure.subplots(), 0.8 / len(rows)
    for n, r in enumerate(rows):
        axes.barh([y + n * height for y in range(len(categories))], [r["by_category"][metric].get(c, 0) for c in categories], height,
                  label=r["row"])
    axes.set_yticks([y + 0.4 - height / 2 for y in range(len(categories))], categories)
    axes.invert_yaxis()
    axes.set_xlabel(f"{TITLES[metric]}, {SETTINGS.get(first, 'all')}, {coverage(results)}")
    axes.legend(fontsize="small")
    figure.savefig(path)


# -------------------------------------------------------------------------------------------------------- ablations

def ablations(options) -> None:
    """Retrain finetuning for every row of ABLATIONS from several seeds on the same data, and print means with spread.

    Everything a row needs, each seed's baseline, teachers and pretraining, is run where it is missing; finished
    parts are kept, so an interrupted run goes on. The parts are retrained without, never switched off after training.
    """
    train = functools.partial(python, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={options.processes}")
    names = [("-seed%d" % seed) * (seed > 0) for seed in range(options.seeds)]      # seed 0 is the quick start's run
    shared = [["--config", options.config, f"--seed={seed}", f"--data={options.data}", f"--runs={options.runs}{name}"]
              for seed, name in enumerate(names)]
    for words in shared:
        train("train_teacher.py", *words)
        train("train_hyper.py", "--stage=pretrain", *words)
    scores = {}                                                     # row -> {demos: [one result a seed]}
    for row, flags in ABLATIONS.items():
        run = "finetune" + "".join(flags).replace("--", "-").replace("=", "-")
        for seed, name in enumerate(names):
            train("train_hyper.py", "--stage=finetune", *shared[seed], *[f"--name={run}"] * bool(flags), *flags)
            # Predictions of this very checkpoint and split are reused, no others.
            out = f"{options.runs}{name}/evaluate-{run}"
            python("evaluate.py", *shared[seed], f"--checkpoint={options.runs}{name}/{run}",
                   f"--out={out}", f"--split={options.split}", "--cost-repeats=0", *["--rows=tagi"] * bool(flags))
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
    lines = [f"{options.split} tasks, exact match, mean ± standard deviation over {options.seeds} seeds; in brackets "
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
