"""Score a trained TAGI on unseen tasks, with its controls, its baselines and its cost.

Launch:
    python evaluate.py                                          # the built-in suite, the checkpoint in runs/sample/finetune
    python evaluate.py --bench sni --checkpoint DIR             # Super-NaturalInstructions, the data its training had
    python evaluate.py --bench sni --data DIR --rows copy_input,copy_demo
    python evaluate.py --bench p3 --checkpoint DIR              # T0's held-out tasks
    python evaluate.py --rescore predictions.jsonl --references test_references.jsonl
    python evaluate.py --instruction "Find the city." --input "Anna went to Paris on Monday."    # by the model in assets/
    python evaluate.py --ablations --seeds 3                    # retrain finetuning without each part (Table 4)

Predictions are written to predictions.jsonl as they come; an interrupted evaluation goes on from there. results.json and
results.md hold the tables.
"""
import functools
import itertools
import json
import os
import string
import sys

import numpy as np
from tqdm import tqdm

import common
import config
import data
import report
from bench import HEURISTICS, ROWS, Bench, checkpoint_of
from cost import measure_cost, measure_ranking
from hypernet import TAGI
from rouge import rouge_l

TASKS_AT_ONCE = 16                              # whose adapters are held at a time
OWN = os.path.join(os.path.dirname(os.path.abspath(__file__)), "assets", "tagi-tiny")      # a TAGI of the built-in suite


def parser():
    p = config.Parser(__doc__)
    config.add_shared_options(p)
    g = p.add_argument_group("evaluation")
    g.add_argument("--bench", choices=["sample", "sni", "p3"], help="default: sample, the built-in suite; it counts exact "
                   "match strictly, sni as the official script; p3 ranks answer choices")
    g.add_argument("--checkpoint", help="folder of a finetuned TAGI, whose own options are the defaults of --data, --runs "
                   "and the like; default: finetune under --runs, for an own instruction assets/tagi-tiny")
    g.add_argument("--split", default="test", help="test, or validation to choose settings on")
    g.add_argument("--eval-instances", type=config.positive, help="instances of each task, the first ones; default: 100, "
                   "for p3 all")
    g.add_argument("--normalize", default=False, help="p3: log-likelihoods per token instead of their sum", **config.flag)
    g.add_argument("--rows", help="only these rows of the table: " + ", ".join(ROWS))
    g.add_argument("--batch-size", type=config.positive, help="default: 250 for the built-in suite, else 20")
    g.add_argument("--cost-repeats", type=config.at_least(0), default=5,
                   help="timed repeats of each way to answer 100 instances; 0: no costs")
    g.add_argument("--out", help="where the results go; default: evaluate under --runs")
    g = p.add_argument_group("floors of exact match, at Def and at Def + 2 Pos: exit 1 below")
    g.add_argument("--floor", type=config.finite, help="of TAGI")
    g.add_argument("--floor-margin", type=config.finite,
                   help="of TAGI, above it with the shuffled instruction")
    g.add_argument("--floor-meta", type=config.finite, help="of the meta-trained row")
    g.add_argument("--floor-share", type=config.finite,
                   help="of TAGI, as a share of the meta-trained row's")
    g = p.add_argument_group("predictions that are there")
    g.add_argument("--rescore", help="score this file, JSON lines with id and prediction, without a model")
    g.add_argument("--references", help="JSON lines with id and references, where --rescore's file has none (the official "
                   "test_references.jsonl)")
    g = p.add_argument_group("your own instruction")
    g.add_argument("--instruction", help="a task definition: answer each --input by it, and do nothing else")
    g.add_argument("--input", action="append", default=[], help="an instance (may be given several times)")
    g = p.add_argument_group("ablations")
    g.add_argument("--ablations", default=False, help="retrain finetuning without each part, from several seeds",
                   **config.flag)
    g.add_argument("--seeds", type=config.positive, default=3)
    g.add_argument("--processes", type=config.positive, default=2, help="that train together (torchrun --nproc-per-node)")
    return p


# ---------------------------------------------------------------------------------------------------------- metrics

WITHOUT_PUNCTUATION = str.maketrans("", "", string.punctuation)


def exact_match(prediction: str, references: list[str], strict: bool = False) -> float:
    """1.0 where the prediction is one of the references: as in the official script lower-cased, without ASCII punctuation,
    white space folded. strict: white space alone is folded (the built-in suite, where brackets and quotes are the task)."""
    def folded(text):
        return " ".join((text if strict else text.lower().translate(WITHOUT_PUNCTUATION)).split())
    return float(folded(prediction) in map(folded, references))


def score(row, demos, records, strict) -> dict:
    """One line of the table from its predictions: exact match and ROUGE-L × 100, means over instances.

    records: dicts with task, category, prediction, references. With 95 % bootstrap intervals over tasks, and the means of
    every category and task.
    """
    result = {"row": row, "demos": demos, "instances": len(records)}
    groups = {key: np.unique([r[key] for r in records], return_inverse=True) for key in ("task", "category")}
    for name, metric in (("exact_match", functools.partial(exact_match, strict=strict)), ("rouge_l", rouge_l)):
        values = 100 * np.array([metric(r["prediction"], r["references"]) for r in records])
        names, owner = groups["task"]
        result |= {"tasks": len(names), name: float(values.mean()), name + "_interval": report.bootstrap_interval(values, owner)}
        for key, (names, owner) in groups.items():
            means = np.bincount(owner, values) / np.bincount(owner)
            result.setdefault(f"by_{key}", {})[name] = dict(zip(names.tolist(), means.tolist()))
    return result


# ------------------------------------------------------------------------------------------------------ predictions

def predict(bench, row, demos, done, file):
    """One row's predictions, as records in the order of its tasks; those not in `done` are made, added to it and written."""
    tasks, records = bench.tasks_of(row), []
    bar = tqdm(total=sum(len(t.instances) for t in tasks), desc=f"{ROWS[row]}, {report.SETTINGS[demos]}", disable=None,
               leave=False, dynamic_ncols=True)
    for group in data.batches(tasks, TASKS_AT_ONCE):
        pairs = [(task, x) for task in group for x in task.instances]
        todo = [(task, x) for task, x in pairs if (ROWS[row], demos, task.name, x.id) not in done]
        bar.update(len(pairs) - len(todo))
        answer = bench.answerer(row, demos, group) if todo else None
        for batch in data.batches(todo, bench.options.batch_size):
            for (task, x), text in zip(batch, answer(batch), strict=True):
                record = {"bench": bench.options.bench, "row": ROWS[row], "demos": demos,
                          "id": x.id, "task": task.name, "category": task.category,
                          "prediction": text, "references": x.outputs}
                done[ROWS[row], demos, task.name, x.id] = record
                file.write(json.dumps(record) + "\n")
            file.flush()
            bar.update(len(batch))
        records += [done[ROWS[row], demos, task.name, x.id] for task, x in pairs]
    bar.close()
    return records


# ------------------------------------------------------------------------------------------------------------- main

def run(options):
    """Make every row at Def and Def + 2 Pos, score it, measure costs -> the results, as written to results.json."""
    common.write_suite(options)
    if options.bench == "sni" and options.data == common.SUITE:
        raise common.UserError(f"--bench sni needs --data, a folder in its layout: {data.GET_SNI}")
    if (options.bench == "p3") != (options.format == "p3"):
        raise common.UserError(f"--bench {options.bench} with --format {options.format}: a model reads P3 as it was trained to; name "
                               "a checkpoint or config of the other kind, or another --bench")
    bench = Bench(options)
    rows, out = bench.rows(), out_of(options)
    done = open_predictions(out, options, bench.sources(rows))
    scores, settings = [], (0,) if options.bench == "p3" else report.SETTINGS
    with open(f"{out}/predictions.jsonl", "a", encoding="utf-8") as file:
        try:
            for row in rows:
                for demos in settings:
                    records = predict(bench, row, demos, done, file)
                    scores.append({"key": row} | score(ROWS[row], demos, records, options.bench != "sni"))
        except KeyboardInterrupt:
            print(f"\nstopped; what was predicted is in {out}/predictions.jsonl: run the same command again to go on")
            sys.exit(130)
    if {"tagi", "meta"} <= set(rows) and options.cost_repeats:
        measure = measure_ranking if options.bench == "p3" else measure_cost
        costs = {demos: measure(bench, demos, repeats=options.cost_repeats) for demos in settings}
        for result in scores:
            result |= costs[result["demos"]].get(result["key"], {})
    published = []
    if options.bench != "sample" and set(rows) - HEURISTICS:
        published = {"sni": report.published_sni, "p3": report.published_p3}[options.bench](bench.tagi.llm.config)
    tasks = {t.category for t in bench.tasks} if options.bench == "p3" else bench.tasks
    return {"bench": options.bench, "split": options.split, "tasks": len(tasks), "listed": bench.listed,
            "results": scores, "published": published, "versions": common.versions()}


def out_of(options):
    return options.out or os.path.join(options.runs, "evaluate")


def open_predictions(out, options, sources) -> dict:
    """What an evaluation of the same models and data has predicted so far, {(row, demos, task, id): record}.

    Predictions of other models or data are set aside as predictions.jsonl.1, .2 and so on.
    """
    common.make_folder(out)
    path, record, done = f"{out}/predictions.jsonl", f"{out}/config.yaml", {}
    if os.path.isfile(path):
        before = common.read_yaml(record, "choose another --out, or start over with --fresh").get("sources", {})
        if options.fresh or any(before.get(key, mark) != mark for key, mark in sources.items()):
            os.replace(path, next(name for n in itertools.count(1) if not os.path.exists(name := f"{path}.{n}")))
        else:
            sources = before | sources
            with open(path, encoding="utf-8") as f:
                text = f.read()
            lines = text[:text.rfind("\n") + 1]                             # one that was cut off goes
            common.write_text(path + ".tmp", lines)
            os.replace(path + ".tmp", path)
            if lines:
                done = {(r["row"], r["demos"], r["task"], r["id"]): r for r in data.read_json_lines(
                    path, "start over with --fresh", row=str, demos=int, task=str, id=object, prediction=str)}
    common.write_yaml(record, {**vars(options), "sources": sources, "versions": common.versions()})
    return done


FLOORS = {"floor": ["tagi"], "floor_margin": ["tagi", "tagi_shuffled"], "floor_meta": ["meta"],
          "floor_share": ["tagi", "meta"]}      # option -> the rows it is about


def missed_floors(results: list[dict], options) -> list[str]:
    """One line for every floor that exact match misses at a setting. results: those of `run`."""
    missed = []
    for demos in dict.fromkeys(r["demos"] for r in results):
        em = {r["key"]: r["exact_match"] for r in results if r["demos"] == demos}
        right, wrong, meta = em.get("tagi"), em.get("tagi_shuffled"), em.get("meta")
        at = report.SETTINGS[demos]
        if options.floor is not None and right < options.floor:
            missed.append(f"{at}: TAGI's exact match of {right:.1f} misses the floor of "
                          f"{options.floor:g}")
        if options.floor_margin is not None and right < wrong + options.floor_margin:
            missed.append(f"{at}: TAGI's exact match of {right:.1f} is less than "
                          f"{options.floor_margin:g} above the {wrong:.1f} with the shuffled one")
        if options.floor_meta is not None and meta < options.floor_meta:
            missed.append(f"{at}: the meta-trained row's exact match of {meta:.1f} misses the "
                          f"floor of {options.floor_meta:g}")
        if options.floor_share is not None and right < options.floor_share * meta:
            missed.append(f"{at}: TAGI's exact match of {right:.1f} is less than "
                          f"{options.floor_share:g} times the meta-trained row's {meta:.1f}")
    return missed


def bench_of_predictions(options) -> str:
    """Which benchmark --rescore's file is of, and so by which rule it is scored.

    The file's own lines say it, or the config.yaml that an evaluation left beside it; else --bench,
    by default sni. Raises UserError where they name two.
    """
    remedy = "--rescore reads predictions, one JSON object a line"
    records = data.read_json_lines(options.rescore, remedy)
    found = {r["bench"] for r in records if isinstance(r.get("bench"), str)}
    beside = os.path.join(os.path.dirname(options.rescore), "config.yaml")
    if not found and os.path.isfile(beside):
        written = common.read_yaml(beside, "move it away, or the predictions elsewhere")
        found = {written["bench"]} if {"bench", "sources"} <= written.keys() else set()
    if options.bench:
        found.add(options.bench)
    if len(found) > 1:
        raise common.UserError(f"{options.rescore}: scores follow the rule of one benchmark, "
                               f"not {' and '.join(sorted(found))}; drop --bench or split the file")
    return found.pop() if found else "sni"


def rescore(options):
    """The results of predictions that are there, in our own form or the official one; a missing one scores as empty."""
    remedy = "--rescore reads predictions, one JSON object a line"
    records = data.read_json_lines(options.rescore, remedy, id=object, prediction=str)
    rows, official, scores = {}, None, []
    if options.references:
        lines = data.read_json_lines(options.references, "--references reads the official test_references.jsonl", id=object,
                                     references=list)
        official = {str(r["id"]): r for r in lines if r.get("track", "default") == "default"}  # the file has another track too
    for r in records:
        row, demos = r.get("row", os.path.basename(options.rescore)), r.get("demos")
        group = rows.setdefault((str(row), demos if demos in report.SETTINGS else None), {})
        key = str(r.get("task")), str(r["id"])
        if key in group:
            raise common.UserError(f"{options.rescore} holds two predictions of {r['id']}; keep one")
        group[key] = r
    for (row, demos), group in rows.items():
        given, scored = {name: r["prediction"] for (_, name), r in group.items()}, list(group.values())
        own = all(data.is_texts(r.get("references")) and isinstance(r.get("task"), str) and isinstance(r.get("category"), str)
                  for r in scored)
        unknown = [] if official is None else [name for name in given if name not in official]
        if official is None and not own:
            raise common.UserError(f"{options.rescore}: predictions without references, task and category; name the official "
                                   "reference file with --references")
        if unknown and not (own and len(unknown) == len(given)):            # our file's teachers answer training tasks
            raise common.UserError(f"{options.rescore}: {len(unknown)} ids are not in {options.references}: "
                                   f"{', '.join(unknown[:3])} …; name the reference file of these predictions")
        if official is not None and not unknown:
            scored = [{"task": str(r.get("task_id", "all")), "category": str(r.get("task_category", "all")),
                       "references": r["references"], "prediction": given.get(name, "")} for name, r in official.items()]
            if missing := len(official) - len(given):
                print(f"{row}: {missing} of {len(official)} instances have no prediction and score as empty")
        scores.append(score(row, demos, scored, options.bench != "sni"))
    return {"bench": options.bench, "split": "rescored", "results": scores, "published": [], "versions": common.versions()}


def answer(options):
    """One instruction, some inputs: what a user does with a trained model; where none is named, with the one in assets/."""
    named = options.checkpoint or (options.config, options.runs) != ("configs/sample.yaml", "runs/sample")
    checkpoint = checkpoint_of(options) if named else OWN
    if not options.instruction.strip() or not options.input:
        raise common.UserError("--instruction needs some text, and at least one --input")
    tagi = TAGI.load(checkpoint, options.device, options.precision)
    if unknown := data.unknown_words(tagi.tokenizer, [options.instruction, *options.input]):
        print(f"warning: words the model does not know: {', '.join(unknown)}", file=sys.stderr)
    for text in tagi.generate(options.input, tagi.adapt([options.instruction]), max_new_tokens=options.max_output):
        print(text)


@common.command
def main(argv=None):
    options = config.parse(parser(), "evaluate", argv)
    rows = ROWS if options.rows is None else options.rows.split(",")
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise common.UserError("evaluation is one process; start it with python evaluate.py")
    if options.input and options.instruction is None:
        raise common.UserError("--input needs an --instruction to answer it by")
    for name, needed in FLOORS.items():
        if getattr(options, name) is None:
            continue
        flag, absent = "--" + name.replace("_", "-"), [row for row in needed if row not in rows]
        if absent:
            raise common.UserError(f"{flag} is about {' and '.join(absent)}, which --rows leaves "
                                   "out; drop one of them")
        if options.rescore or options.ablations or options.instruction is not None:
            raise common.UserError(f"{flag} is for an evaluation, not for --rescore, --ablations "
                                   "or --instruction; drop it")
    options.bench = bench_of_predictions(options) if options.rescore else options.bench or "sample"
    options.batch_size = options.batch_size or (250 if options.bench == "sample" else 20)
    options.eval_instances = options.eval_instances or (None if options.bench == "p3" else 100)
    if options.instruction is not None:
        return answer(options)
    if options.ablations:
        return report.ablations(options)
    results = rescore(options) if options.rescore else run(options)
    if options.bench == "p3":
        text = report.p3_table(results)
    else:
        text = report.main_table(results) + "\n\n" + report.category_table(results)
    print(text)
    if options.out or not options.rescore:
        out = out_of(options)
        common.make_folder(out)
        common.write_text(f"{out}/results.json", json.dumps(results, indent=1))
        common.write_text(f"{out}/results.md", text + "\n")
        if options.bench != "p3":
            report.category_chart(results, f"{out}/categories.png")
    missed = [] if options.rescore else missed_floors(results["results"], options)
    if missed:
        sys.exit("\n".join(missed))


if __name__ == "__main__":
    main()
