"""Does the instruction matter? What TAGI scores with the right one and with wrong ones.

Without demonstrations, so that the instruction alone is what differs. loaded: evaluate.py's tasks
and models, which are handed in, as is what answers. How alike the adapters are: similarity.py.
"""
import dataclasses
import json
import os
import random

import numpy as np

import common
from bench import kept, machine, predictions, similarity
from bench.records import read_json
from bench.report import (
    ROWS, TITLES, bootstrap_interval, check_finite, line, say, score, write_file)
from common import UserError

# key -> (what the table calls it, its row in predictions.jsonl); three are rows of an evaluation
CONDITIONS = {
    "right": ("the right one", ROWS["tagi"]),
    "paraphrase": ("a paraphrase", "TAGI, paraphrase"),
    "shuffled_words": ("its words shuffled", "TAGI, shuffled words"),
    "other_task": ("another task's", ROWS["tagi_shuffled"]),
    "empty": ("an empty one", ROWS["tagi_empty"]),
    "random_words": ("random words", "TAGI, random words"),
}
NOT_WITH = ("rows", "rescore", "ablations")      # options that it would ignore


def run(loaded, predict) -> None:
    """Answer the tasks by right and wrong instructions; write and print what comes of it.

    predict: evaluate.py's.
    """
    o, scores, rows = loaded.options, {}, []
    texts = instructions(loaded)
    loaded.check_training_tasks()
    sources = predictions.sources_of(loaded, ["tagi"]) | {"probe": common.digest(repr(texts))}
    o.out = o.out or kept.place(os.path.join(o.runs, "probe"), sources, loaded.rank)
    metric = "rouge_l" if o.bench == "sni" else "exact_match"
    with kept.Kept(o, sources, loaded.rank, loaded.world) as answers:
        asked, keys = {}, []                    # asked: key of CONDITIONS -> its tasks
        for key, given in texts.items():
            asked[key] = []
            for task in loaded.tasks:
                if task.name in given:
                    asked[key].append(dataclasses.replace(task, definitions=[given[task.name]]))
            keys += predictions.keys_of(CONDITIONS[key][1], 0, asked[key])
        answers.tell(keys)
        for n, (key, tasks) in enumerate(asked.items(), 1):
            at = f"{n} of {len(asked)}: "
            predict(loaded, "tagi", 0, answers, at, tasks, CONDITIONS[key][1])
        if not answers.gather(keys):
            return                              # the rest is for one process
        for key, tasks in asked.items():
            name = CONDITIONS[key][1]
            result = score(name, 0, answers.records(name, 0, tasks), strict=o.bench != "sni")
            scores[key] = result["by_task"][metric]
            rows.append({"key": key} | compare(scores["right"], scores[key])
                        | {"by_category": result["by_category"][metric]})
        results = {"bench": o.bench, "split": o.split, "metric": metric,
                   "tasks": len(loaded.tasks), "rows": rows, "by_task": scores,
                   "instructions": texts, "versions": machine.versions()}
        write(results, o.out)                   # first: by it the picture is known to be ours
        alike, told = similarity.of_tasks(loaded.tagi, loaded.tasks, f"{o.out}/similarity.png")
        text = "\n\n".join([table(results), category_table(results), example(texts), told])
        write(results | {"similarity": alike}, o.out)
        write_file(f"{o.out}/probe.md", text + "\n")
    say(f"{text}\n\nwritten to {o.out}: probe.md, probe.json, similarity.png where there is one")


def write(results: dict, out: str) -> None:
    check_finite(results, "the probe")
    write_file(f"{out}/probe.json", json.dumps(results, indent=1, allow_nan=False))


# ------------------------------------------------------------------------------ the instructions

def instructions(loaded) -> dict:
    """{key of CONDITIONS: {task name: the instruction that it is given}}, the right ones first.

    A task that has none of a kind is not in there. Raises UserError where one task is all there is.
    """
    o, tasks = loaded.options, loaded.tasks
    if len(tasks) == 1:
        raise UserError(f"--probe compares tasks, and {o.split} of {o.data} has only one, "
                        f"{tasks[0].name}; name another --split or --data")
    worded, pool, texts = paraphrases(loaded), [], {key: {} for key in CONDITIONS}
    for task in tasks:
        pool += task.definitions[0].split()     # each word as often as it is there
    for task in tasks:
        right, seed = task.definitions[0], f"{o.seed} {task.name}"
        given = {"right": right, "paraphrase": worded.get(task.name),
                 "shuffled_words": shuffled_words(right, seed),
                 "other_task": loaded.givers[task.name].definitions[0], "empty": "",
                 "random_words": random_words(right, pool, seed)}
        for key, text in given.items():
            if text is not None:
                texts[key][task.name] = text
    for key, (label, _) in CONDITIONS.items():
        if not texts[key]:
            if loaded.rank == 0:
                say(f"left out: {label}: no task has one")
            del texts[key]
    return texts


def shuffled_words(text: str, seed: str) -> str | None:
    """The same words in another order; None where there is no other."""
    words = text.split()
    if len(set(words)) < 2:
        return None
    rng, order = random.Random(seed), list(words)
    while order == words:
        rng.shuffle(order)
    return " ".join(order)


def random_words(text: str, pool: list[str], seed: str) -> str:
    """As many words as the text has, each drawn from the pool."""
    return " ".join(random.Random(seed).choices(pool, k=len(text.split())))


def paraphrases(loaded) -> dict:
    """{task name: its instruction worded otherwise}, of the tasks that have one.

    Of --paraphrases, else of the split of tasks worded otherwise, else tasks' second definitions.
    """
    o, names = loaded.options, {task.name for task in loaded.tasks}
    if o.paraphrases:
        return read_paraphrases(o.paraphrases, names)
    if loaded.has_unseen_wording:
        worded = {task.name.removesuffix("_reworded"): task for task in loaded.reworded}
        return {name: worded[name].definitions[0] for name in names & worded.keys()}
    return {task.name: task.definitions[1] for task in loaded.tasks if len(task.definitions) > 1}


def read_paraphrases(path: str, names: set[str]) -> dict:
    """The file's {task name: text}. Raises UserError for anything else and for unknown tasks."""
    remedy = "--paraphrases names a JSON file of {task name: its instruction worded otherwise}"
    texts = read_json(path, remedy)
    if not isinstance(texts, dict) or not texts:
        raise UserError(f"{path}: no JSON object with a task in it; {remedy}")
    for name, text in texts.items():
        if name not in names:
            raise UserError(f"{path}: {name} is none of the tasks that are tested; {remedy}")
        if not isinstance(text, str) or not text.strip():
            raise UserError(f"{path}: {name} has no text; {remedy}")
    return texts


# ------------------------------------------------------------------------------------ the scores

def compare(right: dict, other: dict) -> dict:
    """One line of the table, over the tasks that both have; right, other: {task: score}.

    score and difference (right − other) are means over tasks, each with its 95 % bootstrap
    interval; that of the difference is paired: a task that is drawn brings both of its scores.
    """
    names = sorted(right.keys() & other.keys())
    scores = np.array([other[name] for name in names])
    differences = np.array([right[name] for name in names]) - scores
    each = np.arange(len(names))
    return {"tasks": len(names), "score": float(scores.mean()),
            "interval": bootstrap_interval(scores, each),
            "difference": float(differences.mean()),
            "difference_interval": bootstrap_interval(differences, each),
            "better": int((differences > 1e-9).sum()),
            "equal": int((abs(differences) <= 1e-9).sum()),
            "worse": int((differences < -1e-9).sum())}


def metric_of(results: dict) -> str:
    return "accuracy" if results["bench"] == "p3" else TITLES[results["metric"]]


def table(results: dict) -> str:
    """The conditions as Markdown, one a line."""
    metric = metric_of(results)
    lines = [f"**TAGI by instruction**, {results['tasks']} {results['split']} tasks, without "
             f"demonstrations: {metric}, mean over tasks", "",
             f"| instruction | {metric} | 95 % | right − this | 95 % | tasks where right is better "
             "| equal | worse |", "|---|--:|---|--:|---|--:|--:|--:|"]
    for r in results["rows"]:
        cells = [CONDITIONS[r["key"]][0]]
        for mean in ("score", "difference"):
            low, high = r["interval" if mean == "score" else "difference_interval"]
            cells += [f"{r[mean]:.1f}", f"{low:.1f} – {high:.1f}"]
        for kind in ("better", "equal", "worse"):
            cells.append(f"{r[kind]} ({100 * r[kind] / r['tasks']:.0f} %)")
        lines.append(line(cells[:3] + [""] * 5 if r["key"] == "right" else cells))
    return "\n".join(lines)


def category_table(results: dict) -> str:
    """One line a category, one column a condition."""
    rows = results["rows"]
    names = [CONDITIONS[r["key"]][0] for r in rows]
    lines = [f"By category, {metric_of(results)}, mean over instances", "",
             line([""] + names), "|---|" + "--:|" * len(rows)]
    for category in sorted(rows[0]["by_category"]):
        means = [r["by_category"].get(category) for r in rows]
        lines.append(line([category, *("" if x is None else f"{x:.1f}" for x in means)]))
    return "\n".join(lines)


def example(texts: dict) -> str:
    """What one task was given, the first that has an instruction of every kind, or of most."""
    name = max(texts["right"], key=lambda name: sum(name in given for given in texts.values()))
    lines = [f"For example {name}:", ""]
    for key, given in texts.items():
        if name in given:
            lines.append(f"- {CONDITIONS[key][0]}: {' '.join(given[name].split()) or '–'}")
    return "\n".join(lines)
