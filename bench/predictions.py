"""Predictions: which rows are made, what they depend on, and how they are scored once more.

`rescore` needs no model. loaded: evaluate.py's tasks and models, which are handed in.
"""
import math
import os
import re
import sys

import numpy as np
from transformers import LogitsProcessor

import common
import config
import t5
from bench import machine, records, sample
from bench.report import ROWS, SETTINGS, check_finite, say, score
from bench.teachers import check_teachers
from common import UserError

HEURISTICS = {"copy_input", "copy_demo"}        # rows that need no model
UNSEEN_WORDING = {"tagi_unseen_wording", "meta_unseen_wording"}
NOT_FOR = {                                     # --bench -> rows that it does not have
    "sample": set(),
    "sni": UNSEEN_WORDING,
    "p3": UNSEEN_WORDING | HEURISTICS | {"teachers", "meta_shuffled"},  # a prompt has its own
}

# ------------------------------------------------------------ which benchmark, which rows there are

def with_checkpoint(parser, argv: list[str] | None) -> list[str]:
    """The command line, with the checkpoint of --runs where it names neither that nor a config.

    An evaluation then has the options that the checkpoint was trained with.
    """
    argv = sys.argv[1:] if argv is None else list(argv)
    early, _ = parser.parse_known_args(argv)
    folder = os.path.join(early.runs, "finetune")
    told = config.given(argv, ["config", "checkpoint", "rescore", "ablations"])
    if told or not os.path.isdir(folder):
        return argv
    return argv if common.checkpoint_of(folder) is None else [*argv, "--checkpoint", folder]


def bench_for(options) -> str:
    """The benchmark that the data are of: the checkpoint's own, unless others are named."""
    if options.format == "p3":
        return "p3"
    return "sample" if sample.is_suite(options.data) else "sni"


def chosen_rows(loaded, has_unseen_wording: bool) -> list[str]:
    """The rows to be made, in the table's order: those of --rows, or all that there are.

    One that cannot be made is left out with a word; where it was asked for, that is a UserError.
    """
    options = loaded.options
    asked = [] if options.rows is None else options.rows.split(",")
    for row in asked:
        if row not in ROWS:
            near = config.closest(row, ROWS)
            raise UserError(f"--rows: unknown row '{row}'{near}; --help lists them")
        if row in NOT_FOR[options.bench]:
            raise UserError(f"--rows: {row} is no row of --bench {options.bench}")
    wanted = asked
    if not asked:
        left_out = set(NOT_FOR[options.bench])
        if options.bench == "sample":                   # its table is printed by the quick start
            left_out = {"no_finetuning", "meta_shuffled"}
        if not has_unseen_wording:
            left_out |= UNSEEN_WORDING
        wanted = [row for row in ROWS if row not in left_out]
    for row, reason in impossible_rows(loaded, wanted).items():
        if (row in asked and not row.endswith("_shuffled")) or wanted == [row]:
            raise UserError(f"the row {row} cannot be made: {reason}")
        if row in wanted:
            wanted = [x for x in wanted if x != row]
            if loaded.rank == 0:
                say(f"left out: {ROWS[row]}: {reason}")
    one_kind = len({kind(task) for task in loaded.tasks}) == 1
    if "tagi_shuffled" in wanted and one_kind and loaded.rank == 0:
        say(f"{ROWS['tagi_shuffled']}: all tasks are of one category: that of another task")
    return [row for row in ROWS if row in wanted]


def impossible_rows(loaded, wanted: list[str]) -> dict:
    """{row that cannot be made, of those that are wanted or others: why}."""
    reasons = {}
    if "no_finetuning" in wanted and loaded.options.model == "tiny":
        try:
            t5.base_path(loaded.options)
        except UserError as error:              # the tiny T5 of --meta-model was not started here
            reasons["no_finetuning"] = str(error)
    if len(loaded.tasks) == 1:
        reason = "there is one task only, none to take an instruction from"
        reasons |= {"tagi_shuffled": reason, "meta_shuffled": reason}
    folder, _, command = loaded.teachers_of("meta_lora")
    if not os.path.isdir(folder):
        reasons["meta_lora"] = f"first run {command}"
    path = os.path.join(loaded.options.runs, "lora", "config.yaml")
    remedy = "train the stage lora again with --fresh"
    if os.path.isfile(path) and "data_digest" not in common.read_yaml(path, remedy):
        reasons["teachers"] = ("they were trained on each file's first instances, before rows "
                               f"were shuffled, so none is known to be held out; {remedy}")
    elif "teachers" in wanted and (why := loaded.why_none_held_out()):
        reasons["teachers"] = why
    return reasons


def kind(task) -> str:
    """A task's category; P3's ANLI, CB and RTE are one: their templates are nearly the same."""
    nli = ("anli_r1", "anli_r2", "anli_r3", "cb", "rte")
    return "nli" if task.category in nli else task.category


def of_another_kind(tasks) -> list:
    """For every task one of another kind, drawn, always the same; where there is none, any."""
    rng = np.random.default_rng(0)
    givers = []
    for task in tasks:
        others = [x for x in tasks if kind(x) != kind(task)]
        others = others or [x for x in tasks if x is not task]
        givers.append(others[rng.integers(len(others))])
    return givers


def known_tasks(tasks: dict, trained_on: dict) -> list[str]:
    """Names of those tasks that `trained_on` has, by name or definition ({name: its digest}).

    A name counts without its number (task061_…), which is another one in a suite of another seed.
    """
    names, definitions = set(map(plain_name, trained_on)), set(trained_on.values())
    return [name for name, definition in tasks.items()
            if plain_name(name) in names or definition in definitions]


def plain_name(name: str) -> str:
    """A task's name without its number."""
    return re.sub(r"^task\d+_", "", name)


def known_to(path: str, tasks: dict) -> list[str]:
    """`known_tasks` of a model's training_tasks.json; none where it is not there: one of others."""
    if not os.path.isfile(path):
        return []
    remedy = "train this stage again"
    with common.named_file(path, remedy):
        return known_tasks(tasks, records.read_json(path, remedy))


def likeliest(pairs, scores) -> list[str]:
    """Of each (task, instance) pair's choices the one with the highest score, the first of equals.

    Raises UserError where a score is no finite number, naming the instance.
    """
    texts = []
    for pair, its in zip(pairs, scores, strict=True):
        if not all(map(math.isfinite, its)):
            refuse_answer(pair)
        texts.append(pair[1].choices[its.index(max(its))])
    return texts


class RefuseNaN(LogitsProcessor):
    """Of `generate`, for these (task, instance) pairs: UserError where a token's score is NaN."""

    def __init__(self, pairs):
        self.pairs = pairs

    def __call__(self, input_ids, scores):
        broken = scores.isnan().any(1)
        if broken.any():
            refuse_answer(self.pairs[broken.nonzero()[0].item()])
        return scores


def refuse_answer(pair):
    task, x = pair
    raise UserError(f"{task.name}, instance {x.id}: the model's scores are no finite numbers, so "
                    "there is no answer; its weights are damaged, or the precision too low: train "
                    "it again, or try --precision fp32")


# ------------------------------------------------------------------------- what they depend on

def sources_of(loaded, wanted) -> dict:
    """What these rows' predictions depend on: one goes on only where all of it is the same.

    Raises UserError where something that a row needs is missing, before anything is written.
    """
    o = loaded.options
    sources = {"bench": o.bench}
    for key in ("split", "precision", "max_input", "max_output", "normalize"):
        sources[key] = getattr(o, key)
    givers = {name: task.name for name, task in loaded.givers.items()}
    sources["tasks"] = common.digest(repr(loaded.tasks) + repr(givers))
    if UNSEEN_WORDING & set(wanted):
        sources["reworded"] = common.digest(repr(loaded.reworded))
    if set(wanted) - HEURISTICS:
        weights = t5.weights_digest(loaded.checkpoint)
        sources["checkpoint"] = weights + loaded.tagi.options.llm_fingerprint
        # By its stage's place, which is the same where runs were moved, and at a later step.
        stage = re.sub(r"/step-\d+$", "", os.path.realpath(loaded.checkpoint))
        sources["model"] = os.path.relpath(stage, os.path.realpath(o.runs))
    if {"meta", "meta_shuffled", "meta_unseen_wording"} & set(wanted):
        sources["meta"] = t5.weights_digest(t5.meta_path(o))
    if "no_finetuning" in wanted:
        sources["base"] = t5.weights_digest(t5.base_path(o))
    for row in {"teachers", "meta_lora"} & set(wanted):
        folder, unit, command = loaded.teachers_of(row)
        tasks, expected = loaded.tasks_of(row), vars(loaded.tagi.options)
        check_teachers(folder, loaded.teacher_names(tasks, unit), expected, command)
        record = vars(common.load_options(folder))
        common.check_digests(expected, folder, record)
        if row == "teachers":                           # they answer the data's training tasks
            common.check_digests(loaded.training_data(record), folder, record)
        sources[row] = t5.weights_digest(folder) + common.digest(repr(tasks))
    return sources


def record_of(bench: str, row: str, demos: int, task, x, text: str) -> dict:
    """A line of predictions.jsonl: what a row of the table answered to one instance of a task."""
    return {"bench": bench, "row": row, "demos": demos, "id": x.id, "task": task.name,
            "category": task.category, "prediction": text, "references": x.outputs}


def keys_of(row: str, demos: int, tasks) -> list[tuple]:
    """(row, demos, task, id) of a row's predictions, in the order of its tasks."""
    return [(row, demos, task.name, x.id) for task in tasks for x in task.instances]


# -------------------------------------------------------------------------------- scored once more

def bench_of_predictions(path: str, lines: list[dict], bench: str | None) -> str:
    """Which benchmark a file of predictions is of, and so by which rule it is scored.

    The file's own lines say it, or the config.yaml that an evaluation left beside it; else
    `bench` (--bench), by default sni. Raises UserError where they name two.
    """
    found = {r["bench"] for r in lines if isinstance(r.get("bench"), str)}
    beside = os.path.join(os.path.dirname(path), "config.yaml")
    if not found and os.path.isfile(beside):
        written = common.read_yaml(beside, "move it away, or the predictions elsewhere")
        if {"bench", "sources"} <= written.keys():
            found = {str(written["bench"])}
    if bench:
        found.add(bench)
    if len(found) > 1:
        raise UserError(f"{path}: scores follow the rule of one benchmark, not "
                        f"{' and '.join(sorted(found))}; drop --bench or split the file")
    for name in found - NOT_FOR.keys():
        raise UserError(f"{path}: bench is {name}, none of {', '.join(NOT_FOR)}")
    return found.pop() if found else "sni"


def rescore(path: str, references: str | None, bench: str | None) -> dict:
    """The results of predictions that are there, in our own form or the official one.

    references: the official file, where the predictions have none; an instance of it without a
    prediction scores as an empty one. bench: whose rule scores them, where they do not say so.
    Raises UserError where files or benchmarks do not belong together.
    """
    remedy = "--rescore reads predictions, one JSON object a line"
    numbered = records.numbered_rows(path, remedy, id=object, prediction=str)
    for where, r in numbered:
        check_finite(r, f"{where}: the prediction of {str(r['id'])[:40]}")
    bench = bench_of_predictions(path, [r for _, r in numbered], bench)
    official = read_references(references) if references else None
    results = []
    for (row, demos), group in grouped(path, numbered).items():
        own = all(common.is_texts(r.get("references")) and isinstance(r.get("task"), str)
                  and isinstance(r.get("category"), str) for r in group.values())
        if official is None and not own:
            raise UserError(f"{path}: predictions without references, task and "
                            "category; name the official reference file with --references")
        scored = list(group.values())
        unknown = [] if official is None else [name for _, name in group if name not in official]
        # Our file's teachers answer training tasks, which the official file does not have.
        if unknown and not (own and len(unknown) == len(group)):
            raise UserError(f"{path}: {len(unknown)} ids are not in {references}: "
                            f"{', '.join(unknown[:3])} …; name the reference file of "
                            "these predictions")
        if official is not None and not unknown:
            given = {name: r["prediction"] for (_, name), r in group.items()}
            if len(given) < len(group):
                raise UserError(f"{path}: ids of {row} come in two tasks, so {references} does "
                                "not tell whose they are; drop --references")
            scored = [r | {"prediction": given.get(name, "")} for name, r in official.items()]
            if missing := len(official) - len(given):
                say(f"{row}: {missing} of {len(official)} instances have no prediction and "
                    "score as empty")
        results.append(score(row, demos, scored, bench != "sni"))
    return {"bench": bench, "split": "rescored", "results": results, "published": [],
            "versions": machine.versions()}


def grouped(path: str, numbered: list[tuple[str, dict]]) -> dict:
    """{(row, demos): {(task, id): prediction}}; UserError for two of an instance, with the line."""
    groups = {}
    for where, r in numbered:
        row, task = (records.text_of(r, key, where) for key in ("row", "task"))
        demos, name = r.get("demos"), records.id_text(r, where)
        if not (demos is None or isinstance(demos, int)):
            raise UserError(f"{where}: demos is {records.brief(demos)}, no number")
        row, setting = row or os.path.basename(path), demos if demos in SETTINGS else None
        group = groups.setdefault((row, setting), {})
        if (task, name) in group:
            raise UserError(f"{where}: a second prediction of {name[:40]}; keep one")
        group[task, name] = r
    return groups


def read_references(path: str) -> dict:
    """{id: task, category and references} of the official file; UserError for an id twice."""
    remedy, official = "--references reads the official test_references.jsonl", {}
    for where, r in records.numbered_rows(path, remedy, id=object, references=list):
        if r.get("track", "default") != "default":      # the file has another track too
            continue
        name = records.id_text(r, where)
        if name in official:
            raise UserError(f"{where}: the id {name[:40]} comes a second time; keep one")
        official[name] = {"task": records.text_of(r, "task_id", where) or "all",
                          "category": records.text_of(r, "task_category", where) or "all",
                          "references": r["references"]}
    if not official:
        raise UserError(f"{path} has no references of the track default; {remedy}")
    return official
