"""The whole method on real Super-NaturalInstructions, from nothing; writes docs/sni-scratch.md.

    python tests/benchmarks/sni_scratch.py --sni natural-instructions --seeds 2
    python tests/benchmarks/sni_scratch.py --stop-before test       # to choose settings
    python tests/benchmarks/sni_scratch.py --report                 # the page, of what is there

Each command is the one that a user types; one that was finished is not run again, one that was cut
off goes on. Seed 0's runs are in --runs, seed 1's in that name with -seed1, as bench/ablations.sh
has it. The page's part on examples is written by hand and is kept.
"""
import argparse
import functools
import itertools
import json
import os
import re
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from pages import (
    ROOT, check_replaceable, command_line, paragraph, part, part_of, processor, table, write)

sys.path.insert(0, str(ROOT))
import common
import data
import evaluate
import t5
from bench import ablations, cost, report
from bench.teachers import load_teachers
from hypernet import TAGI

TITLE = "# Real tasks, from nothing"
WITHOUT = "finetune-without-fusion"
PARTS = [name for name in ablations.ABLATIONS.values()  # that are trained beside WITHOUT
         if name.startswith("without-") and name != "without-fusion"]
SPLITS = {"test_seen_categories": "unseen tasks of seen categories", "test": "the official test"}
ROWS = ("tagi", "tagi_shuffled", "tagi_empty")     # of the TAGI without fusion
PAIRS = [*report.DIFFERENCES, ("tagi", "no_instruction"), ("meta_lora", "meta"),
         ("tagi_alone", "tagi_shuffled_alone"), ("tagi_alone", "meta_lora"),
         ("tagi_alone", "meta")]                    # rows, the second taken from the first
FAR = 10                                            # points between two rows' scores of a task
SHIFTS = 5                                          # other inputs' answers for each input
COST = paragraph(f"FLOPs and time are those of a task of {evaluate.COST_INSTANCES} inputs, its",
                 "adapter's making included, over those of the T5 that reads the instruction with",
                 f"every input; means of {cost.COST_TASKS} tasks.")
METRICS = {"rouge_l": "ROUGE-L", "exact_match": "exact match"}


# -------------------------------------------------------------------------------------- commands

def runs_of(runs: str, seed: int) -> str:
    return runs if seed == 0 else f"{runs}-seed{seed}"


def launch(args) -> str:
    return f"python -m bench.launch --nproc-per-node {args.processes}"


def training(args, seed: int) -> dict[str, str]:
    """The commands that train one seed, in order: {the stage's folder: command}."""
    options = f"--config {args.config} --runs {runs_of(args.runs, seed)} --seed {seed}"
    found = {stage: f"{launch(args)} train_teacher.py --stage {stage} {options}"
             for stage in ("base", "meta", "lora", "lora-all")}
    for stage in ("pretrain", "finetune"):
        found[stage] = f"{launch(args)} train_hyper.py --stage {stage} {options}"
    found[WITHOUT] = (f"{launch(args)} train_hyper.py --stage finetune --fusion none "
                      f"--name {WITHOUT} {options}")
    return found


def scoring(args, seed: int, split: str) -> list[str]:
    """The commands that score one seed on a split."""
    runs = runs_of(args.runs, seed)
    few = split == "validation"
    n = args.validation_instances if few else args.test_instances
    options = (f"--bench sni --config {args.config} --runs {runs} --seed {seed} --split {split} "
               f"--eval-instances {n}" + (" --no-cost" if few or seed else ""))
    return [f"{launch(args)} evaluate.py {options} --out {runs}/evaluate-{split}",
            f"{launch(args)} evaluate.py {options} --checkpoint {runs}/{WITHOUT} "
            f"--rows {','.join(ROWS)} --out {runs}/evaluate-{split}-without-fusion"]


def leaving_out(args) -> str:
    """The command that trains Table 4's ablations, beside the one without fusion, and scores them.

    It scores the config's number of instances.
    """
    return (f"CONFIG={args.config} RUNS={args.runs} SEEDS={args.ablations} BENCH=sni "
            f"PROCESSES={args.processes} SPLIT=test_seen_categories "
            f'ONLY="{" ".join(PARTS)}" bash bench/ablations.sh')


def halve(folder: Path) -> None:
    """Round a finished stage's weights to bfloat16 in their files, before another stage reads them.

    It makes them small enough to carry to another machine; they cannot be trained on then.
    """
    for path in folder.rglob("model.safetensors"):
        with safe_open(path, "pt") as f:
            metadata = f.metadata()
        weights = {name: x.bfloat16() for name, x in load_file(path).items()}
        common.save_tensors(str(path), weights, metadata)


def commands_of(record: Path) -> dict:
    """{command: its seconds, and whether it finished} of commands.json; {}: it is not there."""
    return json.loads(record.read_text()) if record.is_file() else {}


def run(command: str, record: Path, halved: Path | None = None) -> None:
    """Run it, unless the record says that it is finished; the record keeps its seconds.

    halved: a folder whose weights are halved then.
    """
    done = commands_of(record)
    its = done.setdefault(command, {"seconds": 0.0, "finished": False})
    if its["finished"]:
        return
    print(f"\n$ {command}", flush=True)
    begun = time.time()
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    code = subprocess.run(command, shell=True, cwd=ROOT,
                          env=os.environ | {"OMP_NUM_THREADS": "1", "PATH": path}).returncode
    if code == 0 and halved is not None:
        halve(halved)
    its["seconds"] += time.time() - begun
    its["finished"] = code == 0
    record.parent.mkdir(parents=True, exist_ok=True)
    record.write_text(json.dumps(done, indent=1))
    if code:
        sys.exit(code)


# ------------------------------------------------------------------------------------ the numbers

def results_of(args, seed: int, split: str) -> dict | None:
    """results.json of the whole method, with the rows of TAGI without fusion; None: not there."""
    folder = ROOT / runs_of(args.runs, seed)
    path = Path(ablations.results_path(str(folder), split, ""))
    if not path.is_file():
        return None
    results = json.loads(path.read_text())
    path = Path(ablations.results_path(str(folder), split, "without-fusion"))
    for r in json.loads(path.read_text())["results"] if path.is_file() else []:
        r |= {"key": f"{r['key']}_alone", "row": r["row"].replace("TAGI", "TAGI without fusion")}
        results["results"].append(r)
    return results


def rows_of(results: dict, demos: int) -> dict:
    """{key: row} of a setting."""
    return {r["key"]: r for r in results["results"] if r["demos"] == demos}


def scores_table(of_seeds: list[dict], demos: int) -> str:
    """Every row: ROUGE-L and exact match of each seed, the interval over tasks, FLOPs and time."""
    seeds, lines = [rows_of(results, demos) for results in of_seeds], []
    meta = seeds[0].get("meta", {})
    for key, r in seeds[0].items():
        its = [rows[key] for rows in seeds if key in rows]
        line = {"case": r["row"]}
        for metric, title in METRICS.items():
            line[title] = " / ".join(f"{x[metric]:.1f}" for x in its)
            line[f"{title}, 95 %"] = " / ".join(
                "{:.1f} – {:.1f}".format(*x[metric + "_interval"]) for x in its)
        if "ms" in r and "ms" in meta:
            line["FLOPs"] = f"{r['flops'] / meta['flops']:.2f}x"
            line["time"] = f"{r['ms'] / meta['ms']:.2f}x"
        lines.append(line)
    return table(lines)


def differences_table(of_seeds: list[dict], demos: int) -> str:
    lines = []
    for a, b in PAIRS:
        line = {}
        for results in of_seeds:
            rows = rows_of(results, demos)
            if a in rows and b in rows:
                line["case"] = f"{rows[a]['row']} − {rows[b]['row']}"
                for metric, title in METRICS.items():
                    mean, (low, high) = report.difference(rows[a], rows[b], metric)
                    line.setdefault(title, []).append(f"{mean:+.1f} ({low:+.1f} – {high:+.1f})")
        if line:
            lines.append({k: v if isinstance(v, str) else " / ".join(v) for k, v in line.items()})
    return table(lines)


def categories_table(results: dict, demos: int) -> str:
    """ROUGE-L of seed 0 by category, of the rows that the comparison is about."""
    rows = rows_of(results, demos)
    shown = [key for key in ("tagi", "tagi_shuffled", "tagi_alone", "meta", "meta_shuffled",
                             "meta_lora", "copy_demo") if key in rows]
    lines = []
    for category in sorted(rows["tagi"]["by_category"]["rouge_l"]):
        line = {"case": category}
        for key in shown:
            line[rows[key]["row"]] = f"{rows[key]['by_category']['rouge_l'][category]:.1f}"
        lines.append(line)
    return table(lines)


# ------------------------------------------------------------------------------------- diagnosis

def lengths_and_cosine(weights: dict, scaling: float) -> tuple[float, float]:
    """(the mean length of K updates B·A, all sites as one vector, the mean cosine of two of them).

    weights: {site: (A (K, r, D_in), B (K, D_out, r))}.
    """
    updates = [scaling * (B.float() @ A.float()).flatten(1) for A, B in weights.values()]
    updates = torch.cat(updates, 1)                                         # (K, of all sites)
    length = updates.norm(dim=1)
    unit = updates / length[:, None]
    others = ~torch.eye(len(unit), dtype=torch.bool)
    return length.mean().item(), (unit @ unit.T)[others].mean().item()


def diagnosis(args, seed: int) -> str:
    """A table: how long the generated updates and the teachers' are, and how alike those of tasks.

    The instructions are the validation tasks'.
    """
    folder = ROOT / runs_of(args.runs, seed)
    lines = []
    for name, told in (("finetune", "TAGI"), (WITHOUT, "TAGI without fusion")):
        tagi = TAGI.load(str(folder / name), device="cpu")
        tasks = data.load_sni(tagi.options.data, "validation", 1)
        with torch.no_grad():
            weights = tagi.adapt([task.definitions[0] for task in tasks]).weights
        lines.append((told, weights))
    names = common.read_yaml(str(folder / "lora/config.yaml"), "")["unit_names"]
    stacked = load_teachers(str(folder / "lora"), names, tagi.llm, vars(tagi.options), "")
    lines.append(("LoRA teachers", stacked))
    scaling, rows = tagi.options.alpha / tagi.options.rank, []
    for told, weights in lines:
        length, cosine = lengths_and_cosine(weights, scaling)
        rows.append({"case": told, "length of an update": f"{length:.2f}",
                     "cosine of two tasks' updates": f"{cosine:.3f}"})
    return table(rows)


def shares(args, split: str) -> str:
    """Sentences: what of a split's instances is cut, can be read off, or stands in training."""
    folder = ROOT / args.runs / "finetune"
    options = common.load_options(str(folder))
    tokenizer = t5.load_tokenizer(str(ROOT / args.runs / "meta"))
    tasks = data.load_sni(args.data, split, args.test_instances)
    known = {x.input for task in data.load_sni(args.data, "train", None) for x in task.instances}

    def size(text):
        return len(tokenizer(text)["input_ids"])

    def fit(task, *its_input):
        """How many of two demonstrations are left of an instruction, or of it before an input."""
        text = data.prompt_text if its_input else data.instruction_text
        limit = options.max_input if its_input else options.max_instruction
        demos = task.demonstrations[:2]
        while demos and size(text(task.definitions[0], demos, *its_input)) > limit:
            demos = demos[:-1]
        return len(demos)

    found = []
    for task in tasks:
        definition = task.definitions[0]
        of_task = fit(task)
        for x in task.instances:
            words = [re.escape(output.strip()) for output in x.outputs]
            shortest = min(size(output) for output in x.outputs)
            left = fit(task, x.input)
            found.append((
                any(re.search(rf"(?<!\w){word}(?!\w)", definition, re.I) for word in words),
                size(data.prompt_text(definition, (), x.input)) > options.max_input,
                size(data.instance_text(x.input)) > options.max_input,
                shortest > options.max_output, x.input in known,
                left == 2, left == 0, of_task == 2, of_task == 0))
    in_definition, prompt, alone, long, seen, *demos = 100 * np.mean(found, 0)
    return paragraph(
        f"Of the instances {in_definition:.0f} % have a reference that stands in the definition,",
        f"and {seen:.0f} % an input that a training task has too. {prompt:.0f} % of the prompts of",
        f"definition and input are cut at {options.max_input} tokens, and {alone:.0f} % of TAGI's",
        f"inputs; {long:.0f} % of the instances have references of more than {options.max_output}",
        "tokens only, which no model can write here and copying can. Of two demonstrations both",
        "remain in {:.0f} % and none in {:.0f} % of the prompts; in {:.0f} % and {:.0f} % of".format(
            *demos), "what the hypernetwork reads.")


def permuted(args, seed: int, split: str) -> str:
    """A table: what a row's answers score for other inputs of their task, definition alone."""
    path = ROOT / runs_of(args.runs, seed) / f"evaluate-{split}/predictions.jsonl"
    answers = {}                                        # (row, task) -> its predictions
    for line in path.read_text().splitlines():
        r = json.loads(line)
        if r["demos"] == 0:
            answers.setdefault((r["row"], r["task"]), []).append(r)
    rows, score = [], functools.cache(report.rouge_l)
    for key in ("tagi", "tagi_shuffled", "meta", "meta_lora", "teachers"):
        own, others, owner, same = [], [], [], 0
        groups = [its for (row, _), its in answers.items() if row == report.ROWS[key]]
        for n, its in enumerate(groups):
            texts = [r["prediction"] for r in its]
            same += Counter(texts).most_common(1)[0][1] >= 0.9 * len(texts)
            for i, r in enumerate(its):
                shifted = [texts[(i + by) % len(texts)] for by in range(SHIFTS + 1)]
                scores = [100 * score(text, tuple(r["references"])) for text in shifted]
                own.append(scores[0])
                others.append(np.mean(scores[1:]))
                owner.append(n)
        less = np.array(own) - np.array(others)
        low, high = report.bootstrap_interval(less, np.array(owner))
        rows.append({"case": report.ROWS[key], "own answers": f"{np.mean(own):.1f}",
                     "of other inputs": f"{np.mean(others):.1f}",
                     "difference": f"{less.mean():+.1f} ({low:+.1f} – {high:+.1f})",
                     "tasks with one answer for 90 % of the inputs": f"{same} of {len(groups)}"})
    return table(rows)


def gaps(of_seeds: list[dict]) -> str:
    """A table: in how many tasks TAGI's ROUGE-L is far from the baseline's; the others' mean."""
    lines = []
    for (seed, results), (demos, setting) in itertools.product(
            enumerate(of_seeds), report.SETTINGS.items()):
        ours, theirs = (rows_of(results, demos)[key]["by_task"]["rouge_l"]
                        for key in ("tagi", "meta"))
        less = np.array([ours[task] - theirs[task] for task in ours])
        near = np.abs(less) <= FAR
        lines.append({"case": f"seed {seed}, {setting}",
                      f"tasks more than {FAR} below": f"{(less < -FAR).sum()}",
                      f"more than {FAR} above": f"{(less > FAR).sum()}", "others": f"{near.sum()}",
                      "others' mean difference": f"{less[near].mean():+.1f}"})
    return table(lines)


def losses(args, seed: int) -> str:
    """A table: the loss of each stage's steps, at its beginning, later and at its end."""
    rows = []
    for stage in ("base", "meta", "lora-all", "pretrain", "finetune", WITHOUT):
        path = ROOT / runs_of(args.runs, seed) / stage / "log.jsonl"
        logged = [json.loads(line) for line in path.read_text().splitlines()]
        steps = [x for x in logged if "loss" in x]
        row = {"stage": stage, "steps": str(steps[-1]["step"])}
        for title, share in (("first tenth", 0), ("seventh tenth", 0.6), ("last tenth", 0.9)):
            start = int(share * len(steps))
            its = steps[start:start + max(1, len(steps) // 10)]
            row[title] = f"{np.mean([x.get('ce', x['loss']) for x in its]):.2f}"
        for key, title in (("validation", "validation"), ("validation_shuffled", "shuffled")):
            its = [x[key] for x in logged if key in x]
            row[title] = f"{its[-1]:.2f}" if its else ""
        rows.append(row)
    return table(rows)


# ------------------------------------------------------------------------------------------ page

def commands_table(args) -> str:
    """Every command of seed 0, and the minutes that it took for each seed, with tries cut off."""
    def plain(command):
        return re.sub(r" --(runs|seed|eval-instances|out|checkpoint) \S+| --no-cost", "", command)

    shown, minutes = [], []                             # of each seed {command: its minutes}
    for seed in range(args.seeds):
        record = commands_of(ROOT / runs_of(args.runs, seed) / "commands.json")
        minutes.append(Counter())
        for command, its in record.items():
            minutes[-1][plain(command)] += its["seconds"] / 60
        shown += [command for command, its in record.items() if its["finished"] and not seed]
    rows = [{"command": f"`{command}`", "minutes": " / ".join(
        f"{of_seed[plain(command)]:.1f}" for of_seed in minutes if plain(command) in of_seed)}
        for command in shown]
    for told, word in (("training", " train_"), ("scoring", " evaluate.py")):
        sums = [sum(its for command, its in of_seed.items() if word in command)
                for of_seed in minutes]
        rows.append({"command": told, "minutes": " / ".join(f"{x:.1f}" for x in sums)})
    return table(rows)


def page(args, by_split: dict, examples: str) -> str:
    """docs/sni-scratch.md. by_split: {split: results of each seed}."""
    first = next(iter(by_split.values()))
    head = paragraph(
        "A T5 of random weights is trained on the texts of Super-NaturalInstructions' training",
        "tasks, then to follow their instructions, and is frozen; TAGI is trained on it and tested",
        f"on tasks that nothing was trained on. Seeds: {len(first)}, side by side in each cell.",
        f"Written by `{command_line()}`. Processor: {processor()}, torch {torch.__version__}.")
    parts = [TITLE, head]
    for split, of_seeds in by_split.items():
        results = of_seeds[0]
        parts.append(f"## {SPLITS[split].capitalize()}: {results['tasks']} tasks")
        for demos, setting in report.SETTINGS.items():
            parts += [f"**{setting}**", scores_table(of_seeds, demos),
                      "Differences, paired by task, with 95 % intervals over tasks:",
                      differences_table(of_seeds, demos)]
        parts.append(COST)
        parts += ["Tasks in which TAGI is far from the T5 that reads the instruction, ROUGE-L:",
                  gaps(of_seeds), shares(args, split),
                  "What answers score for other inputs of the same task, ROUGE-L, definition alone, "
                  "seed 0:", permuted(args, 0, split),
                  "ROUGE-L by category, definition alone, seed 0:", categories_table(results, 0)]
    if args.ablations:
        scores, metric = ablations.read(args.runs, "test_seen_categories")
        parts += ["## What each part does (Table 4)",
                  ablations.table(scores, metric, "test_seen_categories")]
        if args.seeds > 1:                              # how much training alone moves a score
            told = []
            for demos, its in scores[ablations.WHOLE].items():
                mean, (low, high) = report.difference(its[1], its[0], metric)
                told.append(f"{mean:+.1f} ({low:+.1f} – {high:+.1f}) at {report.SETTINGS[demos]}")
            parts.append(f"The whole method's seed 1 less its seed 0: {', '.join(told)}.")
    parts += ["## What was looked at", "L_pred, seed 0, nats a token:", losses(args, 0),
              "Updates, seed 0:", diagnosis(args, 0)]
    parts += ["## Commands", commands_table(args)]
    return "\n\n".join(parts) + "\n\n" + part("by hand", examples)


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--sni", default="natural-instructions", help="folder in Super-NaturalInstructions' layout")
    add("--data", default="data/sni-scratch", help="folder that bench.scratch makes of it")
    add("--seeds", type=int, default=2)
    add("--ablations", type=int, default=1, help="seeds of which Table 4's are trained; 0: none")
    add("--config", default="configs/sni-scratch.yaml")
    add("--processes", type=int, default=2, help="that work together: one a GPU")
    add("--halve", action="store_true", help="keep finished weights in bfloat16, to carry them")
    add("--runs", default="runs/sni-scratch", help="folder of seed 0's runs")
    add("--validation-instances", type=int, default=10, help="of each validation task")
    add("--test-instances", type=int, default=25, help="of each test task")
    add("--stop-before", choices=["validation", "test"])
    add("--report", action="store_true", help="only the page, of what is there")
    add("--out", default="docs/sni-scratch.md")
    args = parser.parse_args()
    out = ROOT / args.out
    check_replaceable(out, TITLE)
    if not args.report and not (ROOT / args.data).is_dir():
        subprocess.run([sys.executable, "-m", "bench.scratch", "--data", args.sni, "--out",
                        args.data], cwd=ROOT, check=True)
    for seed in range(0 if args.report else args.seeds):
        record = ROOT / runs_of(args.runs, seed) / "commands.json"
        for stage, command in training(args, seed).items():
            run(command, record, record.parent / stage if args.halve else None)
        if args.stop_before != "validation":
            for command in scoring(args, seed, "validation"):
                run(command, record)
    if args.stop_before:
        return
    for seed in range(0 if args.report else args.seeds):
        record = ROOT / runs_of(args.runs, seed) / "commands.json"
        for split in SPLITS:
            for command in scoring(args, seed, split):
                run(command, record)
    if args.ablations and not args.report:
        run(leaving_out(args), ROOT / args.runs / "commands.json")
    by_split = {}
    for split in SPLITS:
        found = [results_of(args, seed, split) for seed in range(args.seeds)]
        by_split[split] = [results for results in found if results is not None]
    by_split = {split: found for split, found in by_split.items() if found}
    examples = part_of(out.read_text(), "by hand") if out.is_file() else None
    write(out, page(args, by_split, examples or ""))


if __name__ == "__main__":
    main()
