"""Score a trained TAGI on unseen tasks, with its controls, its baselines and its cost.

Launch:
    python evaluate.py                                          # the built-in suite, the checkpoint in runs/sample/finetune
    python evaluate.py --bench sample --checkpoint DIR --split validation
    python evaluate.py --instruction "Find the city ." --input "Anna went to Paris on Monday ." --input "..."
    python evaluate.py --ablations --seeds 3                    # retrain finetuning without each part (Table 4)

Predictions are written to predictions.jsonl before they are scored; results.json and results.md hold the table.
"""
import json
import os
import sys
import time

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

import common
import config
import data
import lora
import report
from hypernet import TAGI
from rouge import rouge_l
from train_teacher import load_teachers


def parser():
    p = config.Parser(__doc__)
    config.add_shared_options(p)
    g = p.add_argument_group("evaluation")
    g.add_argument("--bench", default="sample", choices=["sample"])
    g.add_argument("--checkpoint", help="folder of a finetuned TAGI; default: finetune under --runs")
    g.add_argument("--split", default="test", help="test, or validation to choose settings on")
    g.add_argument("--batch-size", type=config.positive, default=250)
    g.add_argument("--out", help="where the results go; default: evaluate under --runs")
    g.add_argument("--tagi-only", default=False, help="only the row of the right instruction, without costs",
                   **config.flag)
    g.add_argument("--floor", type=float, help="exit 1 where TAGI's exact match (Def) is below this")
    g.add_argument("--floor-margin", type=float, help="exit 1 where it is not this far above the shuffled instruction's")
    g = p.add_argument_group("your own instruction")
    g.add_argument("--instruction", help="a task definition: answer each --input by it, and do nothing else")
    g.add_argument("--input", action="append", default=[], help="an instance (may be given several times)")
    g = p.add_argument_group("ablations")
    g.add_argument("--ablations", default=False, help="retrain finetuning without each part, on suites of several seeds",
                   **config.flag)
    g.add_argument("--seeds", type=config.positive, default=3)
    g.add_argument("--processes", type=config.positive, default=2, help="that train together (torchrun --nproc-per-node)")
    return p


# ---------------------------------------------------------------------------------------------------------- metrics

def exact_match(prediction: str, references: list[str]) -> float:
    """1.0 where the prediction is one of the references, white space folded."""
    return float(" ".join(prediction.split()) in {" ".join(r.split()) for r in references})


# ------------------------------------------------------------------------------------------------------ predictions

def checkpoint_of(options):
    folder = options.checkpoint or os.path.join(options.runs, "finetune")
    if not os.path.isdir(folder):
        raise common.UserError(f"{folder}: no such checkpoint; first run python train_hyper.py --stage finetune"
                               f"{common.config_flag(options)}")
    return folder


class Bench:
    """The models under test and the tasks they are tested on."""

    def __init__(self, options):
        self.options = options
        checkpoint = checkpoint_of(options)
        self.tagi = TAGI.load(checkpoint, options.device, options.precision)
        self.tagi.requires_grad_(False)
        self.tokenizer = self.tagi.tokenizer
        self.tasks = data.load_sni(options.data, options.split, 100)

    def ask(self, items, weights=None, llm=None, **options):
        """Greedy answers of a plain LLM (default: the frozen one) to (definition, demonstrations, input) items, with LoRA
        weights, a row per item, where given."""
        outputs = []
        for i in range(0, len(items), self.options.batch_size):
            ids, mask = data.tokenize_instructed(self.tokenizer, items[i:i + self.options.batch_size],
                                                 self.options.max_input, self.tagi.device)
            with torch.no_grad(), self.tagi.adapted(None) as frozen:
                if weights is not None:
                    lora.set_weights(frozen, lora.select(weights, slice(i, i + len(ids))))
                out = (llm or frozen).generate(input_ids=ids, attention_mask=mask, do_sample=False, num_beams=1,
                                               **{"max_new_tokens": self.options.max_output, **options})
            outputs += self.tokenizer.batch_decode(out, skip_special_tokens=True)
        return outputs

    def prompts(self, tasks, demos):
        return [(t.definitions[0], t.demonstrations[:demos], x.input) for t in tasks for x in t.instances]

    def meta_trained(self, tasks, demos):
        return self.ask(self.prompts(tasks, demos), llm=self.meta_llm())

    def meta_llm(self):
        """The meta-trained model: the frozen LLM itself, or where that is another one, a second checkpoint."""
        folder = os.path.join(self.options.runs, "meta")
        if not hasattr(self, "_meta"):
            same = common.fingerprint(self.tagi.llm) == common.fingerprint(common.load_llm(folder)[0])
            self._meta = None if same else common.load_llm(
                folder, self.options.device, self.options.precision, self.tagi.options.attention)[0]
        return self._meta

    def without_instruction(self, tasks, demos):
        return self.ask([("", [], x.input) for t in tasks for x in t.instances])

    def teachers(self, tasks, demos, name="lora", unit=None):
        """LoRA teachers read instruction and input, as they were trained to."""
        o = self.tagi.options
        units = [data.unit_of(t, unit or o.unit) for t in tasks]
        weights = load_teachers(os.path.join(self.options.runs, name), sorted(set(units)), self.tagi.llm, o,
                                f"python train_teacher.py --stage lora{common.config_flag(self.options)}")
        rows = [sorted(set(units)).index(unit) for unit, t in zip(units, tasks) for _ in t.instances]
        return self.ask(self.prompts(tasks, demos), lora.select(weights, torch.tensor(rows)))

    def tagi_with(self, tasks, demos, instructed_by=None):
        """TAGI where task i is given the instruction of instructed_by[i] (default its own; None: an empty one)."""
        givers = tasks if instructed_by is None else instructed_by
        adapters = self.tagi.adapt([g.definitions[0] if g else "" for g in givers],
                                   [g.demonstrations[:demos] if g else [] for g in givers])
        rows = [i for i, t in enumerate(tasks) for _ in t.instances]
        return self.tagi.generate([x.input for t in tasks for x in t.instances], adapters.select(rows),
                                  batch_size=self.options.batch_size, max_new_tokens=self.options.max_output)


def shuffled(tasks):
    """Every task's instruction replaced by that of another one: a random cycle, always the same."""
    order = np.random.default_rng(0).permutation(len(tasks))
    other = dict(zip(order.tolist(), np.roll(order, 1).tolist()))
    return [tasks[other[i]] for i in range(len(tasks))]


def predict_rows(bench, tagi_only):
    """Yield (row, demonstrations, tasks, predictions) for every line of the table."""
    tasks, options = bench.tasks, bench.options
    n = [t.name for t in tasks]
    for demos in (0, 2):
        yield "TAGI, right instruction", demos, tasks, bench.tagi_with(tasks, demos)
        if tagi_only:
            continue
        yield "TAGI, shuffled instruction", demos, tasks, bench.tagi_with(tasks, demos, shuffled(tasks))
        yield "TAGI, empty instruction", demos, tasks, bench.tagi_with(tasks, demos, [None] * len(n))
        if options.split == "test":
            reworded = data.load_sni(options.data, "test_unseen_wording", 100)
            yield "TAGI, unseen wording", demos, reworded, bench.tagi_with(reworded, demos)
            yield "meta-trained, unseen wording", demos, reworded, bench.meta_trained(reworded, demos)
        yield "meta-trained, instruction in input", demos, tasks, bench.meta_trained(tasks, demos)
        if os.path.isdir(os.path.join(options.runs, "lora-all")):          # Table 4's Tk-Instruct-LoRA
            yield "meta-trained with one LoRA", demos, tasks, bench.teachers(tasks, demos, "lora-all", "all")
        yield "frozen LLM, no instruction", demos, tasks, bench.without_instruction(tasks, demos)
        trained = data.load_sni(options.data, "train", 10, skip=options.max_instances)[::5]     # every fifth task will do
        yield "LoRA teachers, held-out instances of training tasks", demos, trained, bench.teachers(trained, demos)
        yield "copy the input", demos, tasks, [x.input for t in tasks for x in t.instances]
        yield "copy the first demonstration's output", demos, tasks, [
            t.demonstrations[0][1] if t.demonstrations else "" for t in tasks for _ in t.instances]


# ------------------------------------------------------------------------------------------------------------- cost

def measure_cost(bench, demos, n=100, repeats=7, n_tasks=4):
    """FLOPs and milliseconds per instance for n instances of one task, every answer as long as the mean reference.

    {row: {"flops": .., "ms": ..}}: FLOPs from PyTorch's counter, adapter generation and merging included; times are
    medians over tasks and repeats, the ways taking turns.
    """
    references = [x.outputs[0] for t in bench.tasks for x in t.instances]
    tagi, length = bench.tagi, round(np.mean([len(ids) for ids in bench.tokenizer(references)["input_ids"]]))
    fixed = {"min_new_tokens": length, "max_new_tokens": length}
    bench.meta_llm()

    def merged(task, inputs):
        adapter = tagi.adapt([task.definitions[0]], [task.demonstrations[:demos]])
        tagi.merge(adapter)
        tagi.generate(inputs, adapter, batch_size=bench.options.batch_size, **fixed)
        tagi.unmerge()

    ways = {
        "meta-trained, instruction in input": lambda task, inputs: bench.ask(
            [(task.definitions[0], task.demonstrations[:demos], x) for x in inputs], llm=bench.meta_llm(), **fixed),
        "frozen LLM, no instruction": lambda task, inputs: bench.ask([("", [], x) for x in inputs], **fixed),
        "TAGI, right instruction": merged}
    flops, seconds = {w: [] for w in ways}, {w: [] for w in ways}
    for task in bench.tasks[::max(1, len(bench.tasks) // n_tasks)][:n_tasks]:
        inputs = [task.instances[i % len(task.instances)].input for i in range(n)]
        for way, run in ways.items():                                       # the first run, counted, also warms up
            with FlopCounterMode(display=False) as counter:
                run(task, inputs)
            flops[way].append(counter.get_total_flops() / n)
        for _ in range(repeats):
            for way, run in ways.items():
                start = time.perf_counter()
                run(task, inputs)
                seconds[way].append((time.perf_counter() - start) / n)
    return {way: {"flops": float(np.mean(flops[way])), "ms": float(np.median(seconds[way])) * 1000} for way in ways}


# ------------------------------------------------------------------------------------------------------------- main

def score(row, demos, tasks, predictions):
    """One line of the table: exact match and ROUGE-L × 100, mean over instances, 95 % bootstrap interval over tasks."""
    result = {"row": row, "demos": demos, "tasks": len(tasks), "instances": len(predictions)}
    owner = np.repeat(np.arange(len(tasks)), [len(t.instances) for t in tasks])
    references = [x.outputs for t in tasks for x in t.instances]
    for name, metric in (("exact_match", exact_match), ("rouge_l", rouge_l)):
        values = 100 * np.array([metric(p, r) for p, r in zip(predictions, references)])
        result[name] = float(values.mean())
        result[name + "_interval"] = report.bootstrap_interval(values, owner)
        if name == "exact_match":
            result["by_category"] = {c: float(values[[tasks[t].category == c for t in owner]].mean())
                                     for c in sorted({t.category for t in tasks})}
    return result


def run(options):
    """Every row at Def and Def + 2 Pos -> the list of result dictionaries, also written to --out."""
    common.write_suite(options)
    bench = Bench(options)
    out = options.out or os.path.join(options.runs, "evaluate")
    common.make_folder(out)
    results = []
    with open(f"{out}/predictions.jsonl.tmp", "w", encoding="utf-8") as f:  # an evaluation that fails leaves the last one's
        for row, demos, tasks, predictions in predict_rows(bench, options.tagi_only):
            instances = [(t, x) for t in tasks for x in t.instances]
            for (t, x), prediction in zip(instances, predictions):
                f.write(json.dumps({"row": row, "demos": demos, "id": x.id, "task": t.name, "category": t.category,
                                    "prediction": prediction, "references": x.outputs}) + "\n")
            f.flush()
            results.append(score(row, demos, tasks, predictions))
    os.replace(f"{out}/predictions.jsonl.tmp", f"{out}/predictions.jsonl")
    costs = {} if options.tagi_only else {demos: measure_cost(bench, demos) for demos in (0, 2)}
    for result in results:
        result.update(costs.get(result["demos"], {}).get(result["row"], {}))
    common.write_text(f"{out}/results.json", json.dumps({"split": options.split, "results": results,
                                                         "versions": common.versions()}, indent=1))
    return results, out


def answer(options):
    """One instruction, some inputs: what a user does with a trained model."""
    checkpoint = checkpoint_of(options)
    if not options.instruction.strip() or not options.input:
        raise common.UserError("--instruction needs some text, and at least one --input")
    tagi = TAGI.load(checkpoint, options.device, options.precision)
    for text in tagi.generate(options.input, tagi.adapt([options.instruction]), max_new_tokens=options.max_output):
        print(text)


@common.command
def main(argv=None):
    options = config.parse(parser(), "evaluate", argv)
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise common.UserError("evaluation is one process; start it with python evaluate.py")
    if options.input and options.instruction is None:
        raise common.UserError("--input needs an --instruction to answer it by")
    if options.tagi_only and options.floor_margin is not None:
        raise common.UserError("--floor-margin is over the shuffled instruction's row, which --tagi-only leaves out; drop "
                               "one of them")
    if options.instruction is not None:
        return answer(options)
    if options.ablations:
        return report.ablations(options)
    results, out = run(options)
    text = report.main_table(results, options.split)
    print(text)
    common.write_text(f"{out}/results.md", text + "\n")
    em = {r["row"]: r["exact_match"] for r in results if r["demos"] == 0}
    right, wrong = em["TAGI, right instruction"], em.get("TAGI, shuffled instruction")
    if options.floor is not None and right < options.floor:
        sys.exit(f"TAGI's exact match of {right:.1f} misses the floor of {options.floor}")
    if options.floor_margin is not None and right - wrong < options.floor_margin:
        sys.exit(f"TAGI with the right instruction ({right:.1f}) is less than {options.floor_margin} above the shuffled one "
                 f"({wrong:.1f})")


if __name__ == "__main__":
    main()
