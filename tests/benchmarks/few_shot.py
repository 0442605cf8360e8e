"""Train a task's LoRA further on a few of its examples, from several starts: which one is best?

    python tests/benchmarks/few_shot.py     # docs/few-shot.md and .svg; some 20 minutes on one core

On test tasks of the built-in suite, none of which the shipped TAGI or a LoRA teacher was trained
on. Learning rates are chosen on validation tasks. runs/sample holds the LoRA teachers (bash
quickstart.sh). All LoRAs of one curve, one for each task and draw, train side by side in a batch.
Finished curves are kept: a run that was cut off goes on, and one that is done writes the page anew.

    K  LoRAs    n  examples of each    T  input tokens    C  target tokens    V  vocabulary
"""
import argparse
import dataclasses
import json
import os
import random
import statistics
import sys
from pathlib import Path

import torch
import torch.nn.functional as F

import curves
from pages import ROOT, command_line, paragraph, processor, table

sys.path.insert(0, str(ROOT))
import common
import data
import lora
import t5
from bench import concepts, sample
from hypernet import TAGI

SHOTS = (1, 4, 16, 64)                          # training examples of a task
STEPS = (0, 1, 3, 10, 30, 100)                  # after which a LoRA is scored
RATES = (3e-4, 1e-3, 3e-3, 1e-2, 3e-2)          # learning rates to choose from
CHOSEN_ON = (1, 16)                             # the shots that they are chosen with
DRAWS = 5                                       # of a task's training examples
BATCH = 4                                       # examples in a step, at most all there are
TASKS = {"validation": 6, "test": 8}            # of as many categories

# What a LoRA is trained in, and what that model reads:
#   instructed  the frozen LLM, instruction and instance
#   alone       the frozen LLM, the instance alone
#   tagi        TAGI, the rest of which is held fixed, the instance alone
LAST_STEP = {"tagi": 100, "alone": 100, "instructed": 10}   # longer inputs, and little to learn
STARTS = {"zero": "zero", "all": "one LoRA for all", "nearest": "nearest teacher",
          "generated": "generated"}
COLOURS = {"zero": "#888888", "all": "#d08a2e", "nearest": "#3f8f4f", "generated": "#2a6fb0"}
WAYS = [("tagi", "generated"), ("tagi", "zero"), ("alone", "generated"), ("alone", "zero"),
        ("alone", "nearest"), ("alone", "all"), ("instructed", "generated"),
        ("instructed", "zero"), ("instructed", "nearest"), ("instructed", "all")]

# ----------------------------------------------------------------------------------------- tasks

def spread(tasks: list, n: int) -> list:
    """The first task of each of n categories."""
    first = {}
    for task in tasks:
        first.setdefault(task.category, task)
    return list(first.values())[:n]


def recipes() -> dict[str, concepts.Task]:
    """What the suite makes tasks from, by the name of a task's file less its number."""
    made = {}
    for tasks in sample.split_tasks(random.Random(0)).values():
        for task in tasks:
            made["_".join((task.source, *task.operands, task.form))] = task
    return made


def draw_shots(task: data.Task, recipe: concepts.Task, draw: int) -> list[tuple[str, str]]:
    """Training examples (input, output), as many as the most shots, none of which is scored on."""
    scored = {x.input for x in task.instances}
    n, rng = SHOTS[-1], random.Random(f"{task.name} {draw}")
    _, examples = concepts.draw_examples(rng, recipe, n + len(scored))
    pairs = [(record.text, output) for record, output in examples if record.text not in scored]
    return pairs[:n]


class Sets:
    """What K LoRAs read, one for each of the tasks and draws, those of a task next to each other.

    definitions: K texts; shots and scored: K lists of (input, output) pairs.
    """

    def __init__(self, tasks: list, made: dict, draws: int):
        self.definitions, self.categories, self.shots, self.scored = [], [], [], []
        for task in tasks:
            recipe = made[task.name.partition("_")[2]]
            for draw in range(draws):
                self.definitions.append(task.definitions[0])
                self.categories.append(task.category)
                self.shots.append(draw_shots(task, recipe, draw))
                self.scored.append([(x.input, x.outputs[0]) for x in task.instances])


def encode(tagi, form, definitions, sets):
    """K lists of n (input, output) pairs as ids (K, n, T), mask (K, n, T) and labels (K, n, C)."""
    items, outputs = [], []
    for definition, pairs in zip(definitions, sets):
        for text, output in pairs:
            items.append((definition if form == "instructed" else "", [], text))
            outputs.append(output)
    o = tagi.options
    ids, mask = data.tokenize_instructed(tagi.tokenizer, items, o.max_input)
    labels = data.labels(tagi.tokenizer, outputs, o.max_output)
    return [x.view(len(sets), -1, x.shape[-1]) for x in (ids, mask, labels)]


# ---------------------------------------------------------------------------------------- starts

def encoded(tagi, definitions) -> torch.Tensor:
    """The mean last state of each instruction in the frozen encoder, of length 1, (K, D)."""
    rows = []
    for some in data.batches(definitions, 256):
        adapter = tagi.adapt(some)
        mask = adapter.mask[..., None]                                              # (K, S, 1)
        rows.append((adapter.states * mask).sum(1) / mask.sum(1))
    return F.normalize(torch.cat(rows), dim=-1)


class Starts:
    """The LoRA weights that training starts from, {site: (K, r, D_in), (K, D_out, r)}."""

    def __init__(self, tagi, runs):
        o, self.tagi = tagi.options, tagi
        training = data.training_tasks(o)
        self.categories = sorted({task.category for task in training})
        self.teachers = lora.load_teachers(os.path.join(runs, "lora"), self.categories, tagi.llm,
                                           vars(o), "bash quickstart.sh")
        self.one = lora.load_teachers(os.path.join(runs, "lora-all"), ["all"], tagi.llm, vars(o),
                                      "bash quickstart.sh")
        # A category's place is the mean of its tasks' instructions.
        states = encoded(tagi, [task.definitions[0] for task in training])
        places = []
        for category in self.categories:
            its = [n for n, task in enumerate(training) if task.category == category]
            places.append(states[its].mean(0))
        self.places = F.normalize(torch.stack(places), dim=-1)                      # (U, D)

    def nearest(self, definitions) -> list[int]:
        """The number of the category whose instructions have the largest cosine with each."""
        return (encoded(self.tagi, definitions) @ self.places.T).argmax(1).tolist()

    def weights(self, start, definitions):
        tagi, K = self.tagi, len(definitions)
        if start == "zero":
            return lora.init_weights(tagi.llm, tagi.options.rank, 0, K)
        if start == "all":
            return lora.select(self.one, [0] * K)
        if start == "nearest":
            return lora.select(self.teachers, self.nearest(definitions))
        return tagi.adapt(definitions).weights


# -------------------------------------------------------------------------------------- training

def logits(tagi, adapter, weights, ids, mask, labels):
    """Of K blocks of n examples, (K, n, T) and (K, n, C): (K·n, C, V)."""
    ids, mask, labels = ids.flatten(0, 1), mask.flatten(0, 1), labels.flatten(0, 1)
    longest, most = mask.sum(1).max(), (labels != data.IGNORE).sum(1).max()
    ids, mask, labels = ids[:, :longest], mask[:, :longest], labels[:, :most]
    if adapter is not None:                     # the rest of what TAGI made of the instruction
        return tagi(dataclasses.replace(adapter, weights=weights), ids, mask, labels), labels
    with tagi.adapted(None) as llm:
        lora.set_weights(llm, weights)
        return t5.logits(llm, ids, mask, labels), labels


@torch.no_grad()
def score(tagi, adapter, weights, rows) -> list[float]:
    """The share of its instances that each LoRA answers exactly, K numbers from 0 to 100.

    An answer is exact where each token of the reference, its end too, is the likeliest after those
    before it: greedy decoding then writes just that.
    """
    found, labels = logits(tagi, adapter, weights, *rows)
    right = (found.argmax(-1) == labels) | (labels == data.IGNORE)                  # (K·n, C)
    return (100 * right.all(1).float().view(len(rows[0]), -1).mean(1)).tolist()


def untrained(tagi, starts, form, start, sets) -> list[float]:
    """The scores of the K starts themselves."""
    adapter = tagi.adapt(sets.definitions) if form == "tagi" else None
    weights = starts.weights(start, sets.definitions)
    return score(tagi, adapter, weights, encode(tagi, form, sets.definitions, sets.scored))


def curve(tagi, starts, form, start, sets, k, lr) -> dict:
    """{step: scores of the K LoRAs} of training on the first k of each one's examples."""
    adapter = tagi.adapt(sets.definitions) if form == "tagi" else None
    parameters, weights = [], {}
    for site, pair in starts.weights(start, sets.definitions).items():
        weights[site] = tuple(p.clone().requires_grad_() for p in pair)
        parameters += weights[site]
    optimizer = torch.optim.AdamW(parameters, lr=lr, fused=True)
    shots = encode(tagi, form, sets.definitions, [pairs[:k] for pairs in sets.shots])
    scored = encode(tagi, form, sets.definitions, sets.scored)
    K, n = len(sets.definitions), min(k, BATCH)
    scores, rng = {}, data.rng_of(0, k)
    for step in range(1, LAST_STEP[form] + 1):
        # The same numbers for all LoRAs: their examples were drawn independently.
        picks = torch.as_tensor(rng.permutation(k)[:n])
        found, labels = logits(tagi, adapter, weights, *(x[:, picks] for x in shots))
        losses = F.cross_entropy(found.flatten(0, 1), labels.flatten(), reduction="none")
        tokens = (labels != data.IGNORE).view(K, -1).sum(1)                         # (K,)
        (losses.view(K, -1).sum(1) / tokens).sum().backward()       # each LoRA's own mean
        optimizer.step()
        optimizer.zero_grad()
        if step in STEPS:
            scores[step] = score(tagi, adapter, weights, scored)
    return scores


def best_rate(scores: dict) -> float:
    return max(RATES, key=lambda lr: scores[str(lr)])           # the smallest of equals


def measure(runs: str, kept: dict, keep) -> None:
    """Add to `kept` what it lacks, and call keep() after each curve.

    kept: {"rates": {way: {rate: mean score}}, "scores": {way: {shots: {step: [score of each
    LoRA]}}}, ..}; its keys are texts, as in JSON.
    """
    tagi = TAGI.load("assets/tagi-tiny").requires_grad_(False)
    o = tagi.options
    sample.ensure_suite(o.data)
    common.check_digests(data.tasks_digest(o) | {"data": o.data}, "assets/tagi-tiny", vars(o))
    starts, made = Starts(tagi, runs), recipes()
    validation = Sets(spread(data.load_sni(o.data, "validation"), TASKS["validation"]), made, 1)
    test = Sets(spread(data.load_sni(o.data, "test"), TASKS["test"]), made, DRAWS)
    nearest = [starts.categories[n] for n in starts.nearest(test.definitions)]
    kept["own"] = sum(a == b for a, b in zip(nearest, test.categories)) // DRAWS

    for form, start in WAYS:
        way = f"{form} {start}"
        # The learning rate, by the mean over validation tasks, shots and steps.
        rates = kept.setdefault("rates", {}).setdefault(way, {})
        for lr in RATES:
            if str(lr) in rates:
                continue
            means = []
            for k in CHOSEN_ON:
                scores = curve(tagi, starts, form, start, validation, k, lr)
                means += [statistics.mean(its) for its in scores.values()]
            rates[str(lr)] = statistics.mean(means)
            keep()
        print(way, rates, flush=True)
        # The test tasks, with that rate.
        if kept.setdefault("used", {}).get(way) != best_rate(rates):
            kept.setdefault("scores", {})[way] = {}
        kept["used"][way], its = best_rate(rates), kept["scores"][way]
        for k in SHOTS:
            if str(k) in its:
                continue
            found = {"0": untrained(tagi, starts, form, start, test)} if not its else {}
            for step, scores in curve(tagi, starts, form, start, test, k, best_rate(rates)).items():
                found[str(step)] = scores
            its[str(k)] = {"0": its["1"]["0"]} | found if its else found
            keep()
            print(f"{way}, {k} shots:", ", ".join(f"{step}: {statistics.mean(x):.1f}"
                                                  for step, x in its[str(k)].items()), flush=True)


# ------------------------------------------------------------------------------------------ page

PARTS = {  # heading -> the ways that it compares, and what it says of them
    "Each start in the form it was made for": (
        [("instructed", "zero"), ("instructed", "all"), ("instructed", "nearest"),
         ("tagi", "generated"), ("instructed", "generated")],
        "LoRA teachers and the one LoRA for all were trained on the frozen LLM with the "
        "instruction in its input, and a LoRA of zero leaves it the model that was meta-trained "
        "so. What TAGI generates was trained inside TAGI, on the instance alone. The last start "
        "of the table is what `train_teacher.py --init-from` does: the generated factors in the "
        "other form."),
    "The instance alone, on the frozen LLM": (
        [("alone", "zero"), ("alone", "all"), ("alone", "nearest"), ("alone", "generated")],
        "Nothing but the LoRA can tell the LLM what to do, and none of these starts was made for "
        "that: the generated factors stand here without the rest of TAGI."),
    "The instance alone, in TAGI": (
        [("tagi", "zero"), ("tagi", "generated")],
        "Here the encoder and the decoder attend to the instruction too (fusion), and TAGI has "
        "gains and embeddings of its own, all held fixed. What that does without the generated "
        "factors is the start from zero."),
}


def title(k: int) -> str:
    return f"{k} examples" if k > 1 else "1 example"


def label(form, start) -> str:
    return STARTS[start] + {"instructed": ", instructed", "alone": "", "tagi": " in TAGI"}[form]


def mean_and_spread(scores: list[float]) -> str:
    """The mean over tasks and draws, and the deviation over draws of the mean over tasks."""
    of_draw = [statistics.mean(scores[draw::DRAWS]) for draw in range(DRAWS)]
    return f"{statistics.mean(of_draw):.1f} ± {statistics.stdev(of_draw):.1f}"


def score_table(kept, ways) -> str:
    rows = []
    for k in SHOTS:
        for form, start in ways:
            row = {"examples": str(k), "way": label(form, start)}
            for step in STEPS:
                scores = kept["scores"][f"{form} {start}"][str(k)].get(str(step))
                row[f"step {step}"] = mean_and_spread(scores) if scores else ""
            rows.append(row)
    return table(rows)


def summary(kept, ways) -> str:
    """A table of means over the steps that all of the ways have, and which start is best."""
    last, rows, best = min(LAST_STEP[form] for form, _ in ways), [], {}
    for form, start in ways:
        row = {"way": label(form, start)}
        for k in SHOTS:
            by_step, means = kept["scores"][f"{form} {start}"][str(k)], []
            for step in STEPS[1:STEPS.index(last) + 1]:
                means.append(statistics.mean(by_step[str(step)]))
            row[title(k)] = f"{statistics.mean(means):.1f}"
            best.setdefault(k, []).append((statistics.mean(means), label(form, start)))
        rows.append(row)
    told, lost = {}, []                         # names of the best -> numbers of examples
    for k, means in best.items():
        most = f"{max(means)[0]:.1f}"
        names = [name for mean, name in means if f"{mean:.1f}" == most]
        told.setdefault(" / ".join(names), []).append(str(k))
        if not any(name.startswith(STARTS["generated"]) for name in names):
            lost.append(str(k))
    best = [f"with {', '.join(shots)}: {names}" for names, shots in told.items()]
    text = f"The best start, by the number of examples, {'; '.join(best)}."
    if lost:
        text += f" With {', '.join(lost)} it is not a generated one."
    return "\n\n".join([f"Means over the scored steps from 1 to {last}:", table(rows),
                        paragraph(text)])


def rates_table(kept) -> str:
    rows = []
    for form, start in WAYS:
        scores = kept["rates"][f"{form} {start}"]
        row = {"way": label(form, start)}
        for lr in RATES:
            mean = f"{scores[str(lr)]:.1f}"
            row[f"{lr:g}"] = f"**{mean}**" if lr == best_rate(scores) else mean
        rows.append(row)
    return table(rows)


def page(kept: dict, svg: str) -> str:
    """docs/few-shot.md; svg: the picture's name."""
    n = TASKS["test"]
    parts = ["# A generated LoRA, trained further", paragraph(
        f"A task's LoRA is trained on 1, 4, 16 or 64 of its examples: AdamW, steps of {BATCH}",
        "examples (of 1 where there is one), a constant learning rate. What does it help to start",
        f"from the LoRA that TAGI generates? There are {n} test tasks of the built-in suite, of as",
        f"many categories, and {DRAWS} draws of the examples for each task; no start has seen",
        f"these tasks. The score is exact match on a task's {sample.EVAL_INSTANCES}",
        "instances, none of which is trained on: an answer is right where each token of the",
        "reference is the likeliest after those before it. ± is the standard deviation over draws",
        "of the mean over tasks."),
        paragraph(f"Written by `{command_line()}`; processor: {processor()};",
                  f"torch {torch.__version__}."),
        "- *zero*: B = 0, A random.\n- *generated*: what `assets/tagi-tiny` makes of the task's "
        "definition.\n- *nearest teacher*: the LoRA teacher of the category whose training "
        "tasks' instructions, encoded by\n  the frozen LLM and averaged, have the largest cosine "
        f"with the task's; for {kept['own']} of the {n} tasks it is the\n  task's own "
        "category.\n- *one LoRA for all*: that of stage `lora-all`.",
        f"![Exact match against steps, for each number of examples]({svg})"]
    for heading, (ways, text) in PARTS.items():
        parts += [f"## {heading}", paragraph(text), summary(kept, ways), "All steps:",
                  score_table(kept, ways)]
    parts += ["## Learning rates", paragraph(
        f"Chosen for each start on {TASKS['validation']} validation tasks with one draw each, by",
        f"the mean over the steps after 0 with {' and '.join(map(str, CHOSEN_ON))} examples (bold;",
        "the smallest of equals). With the instruction in the input there are",
        f"{LAST_STEP['instructed']} steps in place of {STEPS[-1]}."), rates_table(kept)]
    return "\n\n".join(parts) + "\n"


def picture(kept: dict) -> str:
    """docs/few-shot.svg: a row of panels with the instruction in the input, one without it."""
    rows = {"instruction and instance": {}, "instance alone": {}}
    for k in SHOTS:
        for form, start in WAYS:
            curve = {}
            for step, scores in kept["scores"][f"{form} {start}"][str(k)].items():
                curve[int(step)] = statistics.mean(scores)
            panels = rows["instruction and instance" if form == "instructed" else "instance alone"]
            panels.setdefault(title(k), []).append((COLOURS[start], form == "tagi", curve))
    legend = [(STARTS[start], colour, False) for start, colour in COLOURS.items()]
    return curves.draw(legend + [("in TAGI", "#222222", True)], rows, STEPS,
                       "exact match (%) on unseen instances against steps of training")


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", default="runs/sample", help="folder with lora and lora-all")
    parser.add_argument("--kept", default="runs/few-shot.json", help="where curves are kept")
    parser.add_argument("--out", default="docs/few-shot.md", help="the picture is beside it")
    args = parser.parse_args()
    torch.set_num_threads(1)
    os.chdir(ROOT)
    path, out = Path(args.kept), Path(args.out)
    settings = repr((SHOTS, STEPS, CHOSEN_ON, DRAWS, BATCH, TASKS, LAST_STEP))
    kept = json.loads(path.read_text()) if path.is_file() else {}
    if kept.get("settings") != settings:
        kept = {"settings": settings}

    def keep():
        path.with_suffix(".tmp").write_text(json.dumps(kept))
        os.replace(path.with_suffix(".tmp"), path)

    measure(args.runs, kept, keep)
    out.with_suffix(".svg").write_text(picture(kept), encoding="utf-8")
    out.write_text(page(kept, out.with_suffix(".svg").name), encoding="utf-8")


if __name__ == "__main__":
    main()
