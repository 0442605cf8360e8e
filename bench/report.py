"""Predictions are scored and told here: exact match and ROUGE-L, intervals, tables. No model."""
import functools
import json
import math
import os
import re
import sys

import numpy as np

import common
import config
from bench import p3, terminal
from bench.rouge import exact_match, rouge_l
from common import UserError

ROWS = {                                                # key -> what the tables call it
    "tagi": "TAGI, right instruction",
    "tagi_shuffled": "TAGI, shuffled instruction",
    "tagi_empty": "TAGI, empty instruction",
    "tagi_unseen_wording": "TAGI, unseen wording",
    "meta_unseen_wording": "meta-trained, unseen wording",
    "meta": "meta-trained, instruction in input",
    "meta_shuffled": "meta-trained, shuffled instruction",
    "meta_lora": "meta-trained with one LoRA",
    "no_finetuning": "no finetuning, instruction in input",
    "no_instruction": "frozen LLM, no instruction",
    "teachers": "LoRA teachers, held-out instances of training tasks",
    "copy_input": "copy the input",
    "copy_demo": "copy the first demonstration's output",
}
DIFFERENCES = [                                         # rows, the second taken from the first
    ("tagi", "tagi_shuffled"), ("tagi", "meta_lora"), ("tagi", "meta"), ("meta", "meta_shuffled")]
SETTINGS = {0: "Def", 2: "Def + 2 Pos"}                 # demonstrations -> the paper's word
TITLES = {"exact_match": "exact match", "rouge_l": "ROUGE-L"}


def score(row: str, demos: int | None, records: list[dict], strict: bool) -> dict:
    """One line of the table: exact match and ROUGE-L × 100, means over instances.

    records: its predictions, dicts with task, category, prediction, references. Each metric comes
    with its 95 % bootstrap interval over tasks and the means of every task and category.
    """
    metrics = {"exact_match": functools.partial(exact_match, strict=strict), "rouge_l": rouge_l}
    tasks, task_of = np.unique([r["task"] for r in records], return_inverse=True)
    categories, category_of = np.unique([r["category"] for r in records], return_inverse=True)
    result = {"row": row, "demos": demos, "instances": len(records), "tasks": len(tasks)}
    result["instances_of"] = dict(zip(tasks.tolist(), np.bincount(task_of).tolist()))
    by_task, by_category = {}, {}
    for name, metric in metrics.items():
        values = 100 * np.array([metric(r["prediction"], r["references"]) for r in records])
        result[name] = float(values.mean())
        result[name + "_interval"] = bootstrap_interval(values, task_of)
        by_task[name] = means(values, tasks, task_of)
        by_category[name] = means(values, categories, category_of)
    return result | {"by_task": by_task, "by_category": by_category}


def means(values, names, owner) -> dict:
    """{name: mean of its values}. owner: (n,) the number of each value's name."""
    sums, counts = np.bincount(owner, values), np.bincount(owner)
    return dict(zip(names.tolist(), (sums / counts).tolist()))


def bootstrap_interval(values, owner, samples=2000, seed=0) -> list[float]:
    """95 % interval of the mean over instances when tasks are drawn anew, [low, high].

    values: (n,) scores; owner: (n,) the number of each instance's task.
    """
    n = owner.max() + 1
    sums, counts = np.bincount(owner, values, n), np.bincount(owner, minlength=n)
    draws = np.random.default_rng(seed).integers(n, size=(samples, n))
    drawn_means = sums[draws].sum(1) / counts[draws].sum(1)
    return [float(x) for x in np.percentile(drawn_means, [2.5, 97.5])]


# --------------------------------------------------------------------------------------- tables
# results: what `evaluate.run` and `predictions.rescore` return, and results.json holds.

def say(text: str) -> None:
    """Print it; where nobody reads on (`| head`) or it is full, go on: results are in files."""
    try:
        print(text, flush=True)
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if not isinstance(error, BrokenPipeError):
            print(f"standard output cannot be written: {error.strerror}; going on, as results are "
                  "written to files", file=sys.stderr)


def write_file(path: str, text: str) -> None:
    """Write the file, whole or not at all. Raises UserError where that cannot be."""
    with common.named_file(path, "make room there, or choose another --out", "written"):
        common.write_atomically(path, lambda unfinished: common.write_text(unfinished, text))


def tables(results: dict) -> str:
    if results["bench"] == "p3":
        return p3_table(results)
    parts = [main_table(results), difference_table(results), category_table(results)]
    return "\n\n".join(part for part in parts if part)


def write(results: dict, out: str) -> None:
    """Write results.json, results.md and categories.png into the folder `out`.

    Raises UserError, before anything is written, where what was measured is no finite number.
    """
    for r in results["results"]:
        check_finite(r, f"{r['row']}, {SETTINGS.get(r['demos'], 'all')}")
    common.make_folder(out)
    write_file(f"{out}/results.json", json.dumps(results, indent=1, allow_nan=False))
    write_file(f"{out}/results.md", tables(results) + "\n")
    if results["bench"] != "p3":
        category_chart(results, f"{out}/categories.png")


def tell(results: dict, out: str, checkpoint: str) -> None:
    """Print the tables of what was written to `out`, and what one may do next."""
    say(f"{tables(results)}\n\nsaved in {out}: results.md, results.json, predictions.jsonl\n"
        f"next: your own instruction, python {config.script('adapt.py')} --checkpoint "
        f"{checkpoint}; does it matter, python {config.script('evaluate.py')} --probe "
        f"--checkpoint {checkpoint}")


def check_finite(values, where: str) -> None:
    """Raises UserError where a number in a tree of dicts and lists is NaN or infinite."""
    if isinstance(values, float) and not math.isfinite(values):
        raise UserError(f"{where} is {values}, no finite number: it is no result; look for what is "
                        "damaged, the model or its predictions")
    if isinstance(values, dict):
        for key, value in values.items():
            check_finite(value, f"{where}, {key}")
    elif isinstance(values, (list, tuple)):
        for value in values:
            check_finite(value, where)


def join(before: dict, results: list[dict]) -> list[dict]:
    """The rows of a table: these, and those that were made there before, in the table's order.

    before: what results.json held, of the same question. A row that was made again keeps its costs.
    """
    rows = {(r["key"], r["demos"]): r for r in before.get("results", []) if r.get("key") in ROWS}
    for r in results:
        known = rows.get((r["key"], r["demos"]), {})
        costs = {key: known[key] for key in ("flops", "ms", "formula") if key in known}
        rows[r["key"], r["demos"]] = r | costs
    order = list(ROWS)
    return sorted(rows.values(), key=lambda r: (order.index(r["key"]), r["demos"]))


def line(cells: list[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def settings_of(results: dict) -> list:
    """The numbers of demonstrations that there are rows for."""
    return list(dict.fromkeys(r["demos"] for r in results["results"]))


def metrics_of(results: dict) -> tuple[str, str]:
    """The metrics, the benchmark's own first."""
    names = ("exact_match", "rouge_l")
    return names if results["bench"] == "sample" else names[::-1]


def coverage(results: dict) -> str:
    """Which tasks the numbers are over; 53/119 where a split's tasks are not all there."""
    if results["split"] == "rescored":
        return "rescored predictions"
    share = "{tasks}/{listed} " if results["tasks"] < results["listed"] else ""
    return (share + "{split} tasks").format(**results)


def in_units(flops: float) -> str:
    for unit, size in (("T", 1e12), ("G", 1e9), ("M", 1e6)):
        if flops >= size or unit == "M":
            return f"{flops / size:.1f} {unit}"


def main_table(results: dict) -> str:
    """Every setting's rows as Markdown, costs relative to the meta-trained row."""
    suite = results["bench"] == "sample"
    n, unit, digits = (1, "instance", 2) if suite else (100, "task of 100", 0)      # of costs
    metrics = metrics_of(results)
    head = "| | " + "".join(f"{TITLES[metric]} | 95 % | " for metric in metrics)
    head += f"tasks | ms / {unit} | FLOPs / {unit} | N(t + n·i) |"
    lines = []
    for demos in settings_of(results):
        rows = [r for r in results["results"] if r["demos"] == demos]
        meta = next((r for r in rows if r["row"] == ROWS["meta"]), {})
        lines += [f"\n**{SETTINGS.get(demos, 'all')}**, {coverage(results)}\n",
                  head, "|---|--:|---|--:|---|--:|--:|--:|--:|"]
        for r in rows:
            cells = [r["row"]]
            for metric in metrics:
                low, high = r[metric + "_interval"]
                cells += [f"{r[metric]:.1f}", f"{low:.1f} – {high:.1f}"]
            costs = ["", "", ""]
            if "ms" in r and "ms" in meta:
                costs = [f"{r['ms'] * n:.{digits}f} ({r['ms'] / meta['ms']:.2f}x)",
                         f"{in_units(r['flops'] * n)} ({r['flops'] / meta['flops']:.2f}x)",
                         f"{r['formula']:.2f}x"]
            lines.append(line([*cells, str(r["tasks"]), *costs]))
        for r in results["published"]:
            if r["demos"] == demos:
                lines.append(f"| {r['row']} | {r['rouge_l']:.1f} |  |  |  | 119 |  | "
                             f"({r['flops_ratio']:.2f}x) |  |")
    return "\n".join(lines)


def difference(first: dict, second: dict, metric: str) -> tuple[float, list[float]]:
    """(the mean over instances of the first row's score less the second's, its 95 % interval).

    Paired: both rows answer the same tasks, which are drawn anew for the interval.
    """
    one, other = first["by_task"][metric], second["by_task"][metric]
    numbers = first.get("instances_of", {})             # results of earlier code have none
    counts = np.array([numbers.get(task, 1) for task in one])               # (tasks,)
    values = np.repeat([one[task] - other[task] for task in one], counts)   # (instances,)
    owner = np.repeat(np.arange(len(counts)), counts)
    return float(values.mean()), bootstrap_interval(values, owner)


def difference_table(results: dict) -> str:
    """Differences between rows, for every setting, as Markdown; "" where there are no two rows."""
    metrics = metrics_of(results)
    lines = []
    for demos in settings_of(results):
        rows = {r.get("key"): r for r in results["results"] if r["demos"] == demos}
        pairs = [(rows[a], rows[b]) for a, b in DIFFERENCES if a in rows and b in rows]
        pairs = [(a, b) for a, b in pairs if a["by_task"].keys() == b["by_task"].keys()]
        if pairs:
            head = "".join(f"{TITLES[metric]} | 95 % | " for metric in metrics)
            lines += [f"\n**{SETTINGS.get(demos, 'all')}**, differences paired by task\n",
                      f"| | {head}".rstrip(), "|---|" + "--:|---|" * len(metrics)]
        for a, b in pairs:
            cells = [f"{a['row']} − {b['row']}"]
            for metric in metrics:
                mean, (low, high) = difference(a, b, metric)
                cells += [f"{mean:+.1f}", f"{low:+.1f} – {high:+.1f}"]
            lines.append(line(cells))
    return "\n".join(lines)


def category_table(results: dict) -> str:
    """One line a category, one column a row of the main table, for every setting."""
    lines = []
    for demos in settings_of(results):
        rows, metric, categories = by_category(results, demos)
        names = " | ".join(r["row"] for r in rows)
        lines += [f"\n**{SETTINGS.get(demos, 'all')}** by category, {TITLES[metric]}, "
                  f"{coverage(results)}\n", f"| | {names} |", "|---|" + "--:|" * len(rows)]
        for category in categories:
            scores = [r["by_category"][metric].get(category) for r in rows]
            lines.append(line([category, *("" if x is None else f"{x:.1f}" for x in scores)]))
    return "\n".join(lines)


def category_chart(results: dict, path: str) -> None:
    """A bar chart of category_table's first setting, if matplotlib happens to be installed."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return
    demos = settings_of(results)[0]
    rows, metric, categories = by_category(results, demos)
    categories = categories[:300 // len(rows)]                      # more is no picture
    places, height = np.arange(len(categories)), 0.8 / len(rows)
    figure = Figure(figsize=(8, 1 + 0.12 * len(categories) * len(rows)), layout="constrained")
    axes = figure.subplots()
    for n, r in enumerate(rows):
        values = [r["by_category"][metric].get(category, 0) for category in categories]
        axes.barh(places + n * height, values, height, label=terminal.label(r["row"]))
    axes.set_yticks(places + 0.4 - height / 2, [terminal.label(name) for name in categories])
    axes.invert_yaxis()
    axes.set_xlabel(f"{TITLES[metric]}, {SETTINGS.get(demos, 'all')}, {coverage(results)}")
    axes.legend(fontsize="small")
    terminal.save_picture(figure, path)


def by_category(results: dict, demos) -> tuple[list[dict], str, list[str]]:
    """(rows of a setting, their metric, their categories); teachers only if there is no other."""
    metric = metrics_of(results)[0]
    rows = [r for r in results["results"] if r["demos"] == demos]
    rows = [r for r in rows if r["row"] != ROWS["teachers"]] or rows
    return rows, metric, sorted(set().union(*(r["by_category"][metric] for r in rows)))


def p3_table(results: dict) -> str:
    """Accuracy of every P3 task over its templates, and the averages; then the paper's."""
    rows = [r | p3.summarize(r["by_task"]["exact_match"]) for r in results["results"]]
    names = " | ".join(r["row"] for r in rows)
    lines = ["**P3**, T0's held-out tasks, accuracy: mean (median; smallest – largest) over a "
             "task's templates", "", f"| | templates | {names} |", "|---|--:|" + "---|" * len(rows)]
    missing = []
    for task in p3.TEST:
        if not all(task in r["tasks"] for r in rows):
            missing.append(task)
            continue
        cells = [task, str(rows[0]["tasks"][task]["templates"])]
        for r in rows:
            x = r["tasks"][task]
            cells.append(f"{x['mean']:.1f} ({x['median']:.1f}; {x['min']:.1f} – {x['max']:.1f})")
        lines.append(line(cells))
    for average, x in rows[0]["averages"].items():
        over = f", over {x['over']} of {x['of']}" if x["over"] < x["of"] else ""
        if x["over"]:
            cells = [f"{r['averages'][average]['mean']:.1f}" for r in rows]
            lines.append(line([f"**{average}**{over}", "", *cells]))
    meta = next((r["ms"] for r in rows if r.get("key") == "meta" and "ms" in r), None)
    if meta:
        cells = [f"{r['ms']:.1f} ({r['ms'] / meta:.2f}x)" if "ms" in r else "" for r in rows]
        lines.append(line(["ms a row at batch size 1", "", *cells]))
    if missing:
        lines += ["", f"No rows for {', '.join(missing)}: put their validation rows into the "
                  "data folder (docs/p3.md)."]
    if results["published"]:
        lines += ["", "| paper | MTest11 | HyperT5 | time |", "|---|--:|--:|--:|"]
    for r in results["published"]:
        lines.append(f"| {r['row']} | {r['mtest11']} | {r['hypert5']} | {r['time']} |")
    return "\n".join(lines)


# ----------------------------------------------------------------------------- the paper's rows

# T5 v1.1, which T5-LM, T0 and Tk-Instruct are: (d_model, d_ff, d_kv, heads, encoder's layers,
# decoder's) -> the paper's name. By d_model and layers alone v1.0's 3B and 11B would be Large.
SIZES = {
    (768, 2048, 64, 12, 12, 12): "base",
    (1024, 2816, 64, 16, 24, 24): "large",
    (2048, 5120, 64, 32, 24, 24): "xl",
    (4096, 10240, 64, 64, 24, 24): "xxl",
}


def size_of(c) -> str | None:
    """base, large, xl or xxl; None for another LLM (mT5 has their shapes, but more words)."""
    shape = (c.d_model, c.d_ff, c.d_kv, c.num_heads, c.num_layers, c.num_decoder_layers)
    return SIZES.get(shape) if c.model_type == "t5" else None


def is_official(split: str, names: list[str]) -> bool:
    """Whether this may be the official test split: the paper's numbers are about no other."""
    return split == "test" and len(names) == 119 and all(re.match(r"task\d+_", x) for x in names)


def published_sni(llm_config) -> list[dict]:
    """The paper's rows (its Table 2) for an LLM of this size; none where it has no such size."""
    column = {"base": 0, "xl": 1, "xxl": 2}.get(size_of(llm_config))
    if column is None:
        return []
    rows = []
    for demos, setting in ((0, "def"), (2, "def_2pos")):
        for name, paper in paper_results()["sni"].items():
            score = paper[setting][column]
            if score is not None:
                rows.append({"row": f"paper: {name}", "demos": demos, "rouge_l": score,
                             "flops_ratio": paper["rel_flops"]})
    return rows


def published_p3(llm_config) -> list[dict]:
    """The paper's rows (its Table 3) for an LLM of this size, from T5-LM and T0; or none."""
    column = {"base": 0, "large": 1, "xl": 2}.get(size_of(llm_config))
    if column is None:
        return []
    mtest11, hypert5 = paper_results()["p3"]["mtest11"], paper_results()["p3"]["hypert5"]
    rows = []
    for name in mtest11 | hypert5:
        for start, label in (("t5_lm", "T5-LM"), ("t0", "T0")):
            first = mtest11.get(name, {}).get(start, [None] * 3)[column]
            second = hypert5.get(name, {}).get(start, [None] * 3)[column]
            if first or second:
                time = mtest11.get(name, {}).get("rel_time", "")
                rows.append({"row": f"{name}, {label}", "mtest11": first or "",
                             "hypert5": second or "", "time": time})
    return rows


def paper_results() -> dict:
    path = os.path.join(os.path.dirname(common.__file__), "configs", "paper_results.yaml")
    return common.read_yaml(path, "restore it from the repository")
