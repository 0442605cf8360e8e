"""Score a trained TAGI on unseen tasks, with its controls, its baselines and its cost.

Launch:
    python evaluate.py                                      # the built-in suite
    python evaluate.py --bench sni --checkpoint DIR         # Super-NaturalInstructions
    python evaluate.py --bench sni --data DIR --rows copy_input,copy_demo
    python evaluate.py --bench p3 --checkpoint DIR          # T0's held-out tasks
    python evaluate.py --rescore predictions.jsonl --references test_references.jsonl
    python evaluate.py --ablations                          # of what bench/ablations.sh trained
    python evaluate.py --probe                              # does the instruction matter?

Here is who answers each row of the table, and what it reads: TAGI the input alone, its adapter
made from the task's instruction, another's or an empty one; an LLM the instruction with every
input, or the input alone. bench/ keeps, scores and tells the answers.
"""
import argparse
import functools
import itertools
import json
import os

import common  # before PyTorch: Ctrl-C
import torch
from tqdm import tqdm

import config
import data
import lora
import t5
from bench import cost, machine, p3, predictions, probe, report, sample, terminal
from bench.predictions import HEURISTICS, UNSEEN_WORDING
from bench.report import ROWS
from bench.rouge import rouge_l     # noqa: F401  for those who import it from here
from bench.teachers import load_teachers
from common import UserError
from hypernet import TAGI

TASKS_AT_ONCE = 16                              # whose adapters are held at a time
COST_INSTANCES = 100                            # of a task whose cost is measured
COST_REPEATS = 3                                # timed runs of each row and task

# --------------------------------------------------------------------------------------- options

def parser():
    p = config.Parser(__doc__)
    config.add_shared_options(p)
    add = p.add_argument_group("evaluation").add_argument
    add("--bench", choices=["sample", "sni", "p3"],
        help="sample (default): the built-in suite, exact match counts every sign; sni: scored as "
             "its official script does; p3: the likeliest answer choice is the answer")
    add("--checkpoint", type=config.beside,
        help="folder of a finetuned TAGI, whose own options are the defaults of --data, --runs "
             "and the like; default: finetune under --runs")
    add("--split", default="test", help="test tasks, or validation to choose settings on")
    add("--eval-instances", type=config.positive,
        help="answer the first N instances of each task; default: 100, for p3 all")
    add("--normalize", default=False, **config.flag,
        help="p3: compare choices by their log-likelihood per token, not by its sum")
    add("--rows", help="make only these rows, with commas between; default: all, which are "
                       + ", ".join(ROWS))
    add("--batch-size", type=config.many,
        help="instances answered at a time; default: 250 for the built-in suite, else 20")
    add("--out", type=config.path,
        help="folder for the results; default: evaluate under --runs, or probe")
    add = p.add_argument_group("predictions that are there").add_argument
    add("--rescore", type=config.path,
        help="score a file of JSON lines with id and prediction; needs no model; default: none")
    add("--references", type=config.path,
        help="for a --rescore file without references: JSON lines with id and references (the "
             "official test_references.jsonl); default: those in that file")
    add = p.add_argument_group("ablations").add_argument
    add("--ablations", default=False, **config.flag,
        help="print the table of the runs that bench/ablations.sh left under --runs")
    add = p.add_argument_group("does the instruction matter?").add_argument
    add("--probe", default=False, **config.flag,
        help="score TAGI with the right instruction, a paraphrase and four wrong ones")
    add("--paraphrases", type=config.path,
        help="for --probe: a JSON file of {task name: its paraphrase}; default: the built-in "
             "suite's, or a task's second definition")
    return p


# ------------------------------------------------------------------------------ tasks and models

class Loaded:
    """Tasks and models, each loaded when a row first needs it; options: evaluate.py's."""

    def __init__(self, options):
        o = self.options = options
        if o.bench == "p3":
            self.tasks = data.load_p3(o.data, o.split, o.eval_instances, o.p3_input)
        else:
            self.tasks = data.load_sni(o.data, o.split, o.eval_instances,
                                       allow_missing=o.allow_missing)
        self.other = ("", None)                 # the path that `llm` loaded last, and its LLM

    @functools.cached_property
    def checkpoint(self) -> str:
        return checkpoint_of(self.options)

    @functools.cached_property
    def tagi(self) -> TAGI:
        o = self.options
        llm = o.llm and t5.llm_path(o)          # None: where the checkpoint has it
        tagi = TAGI.load(self.checkpoint, o.device, o.precision, llm).requires_grad_(False)
        if llm and tagi.options.llm == "meta":
            o.meta_model = llm
        t5.check_knows(tagi.tokenizer, data.texts_of(self.tasks), o.data)
        return tagi

    def llm(self, path):
        """Another LLM beside the frozen one, one at a time; None where it is the frozen one."""
        if self.other[0] != path:
            self.other = ("", None)             # makes room
            o, frozen = self.options, self.tagi.options
            llm, tokenizer = t5.load_llm(path, "cpu", o.precision, frozen.attention)
            if tokenizer.get_vocab() != self.tagi.tokenizer.get_vocab():
                raise UserError(f"{path} has another vocabulary than the frozen LLM; name a "
                                "checkpoint that shares it, or leave its row out with --rows")
            same = t5.fingerprint(llm) == frozen.llm_fingerprint
            self.other = (path, None if same else llm.to(o.device).requires_grad_(False))
        return self.other[1]

    def teachers_of(self, row) -> tuple[str, str, str]:
        """(folder of the LoRA teachers, what there is one for, the command that makes them)."""
        stage, unit = "lora-all", "all"
        if row == "teachers":
            stage, unit = "lora", self.tagi.options.unit
        command = f"python train_teacher.py --stage {stage}{t5.config_flag(self.options)}"
        return os.path.join(self.options.runs, stage), unit, command

    @staticmethod
    def teacher_names(tasks, unit) -> list[str]:
        return sorted({data.teacher_of(task, unit) for task in tasks})

    def tasks_of(self, row) -> list:
        if row == "teachers":
            return self.held_out
        return self.reworded if row in UNSEEN_WORDING else self.tasks

    @property
    def has_unseen_wording(self) -> bool:
        split = self.options.split + "_unseen_wording"
        return os.path.isfile(data.split_file(self.options.data, split))

    @functools.cached_property
    def reworded(self) -> list:
        o = self.options
        return data.load_sni(o.data, o.split + "_unseen_wording", o.eval_instances)

    @functools.cached_property
    def held_out(self) -> list:
        """About a hundred training tasks, with instances that no teacher was trained on."""
        folder, _, command = self.teachers_of("teachers")
        if not os.path.isdir(folder):
            raise UserError(f"{folder}: no LoRA teachers; first run {command}")
        # What the teachers were trained on, whatever is asked for now.
        used = common.load_options(folder, "max_instances").max_instances
        tasks = data.training_tasks(self.options, 10, skip=used)
        if not tasks:
            raise UserError(f"no training task in {self.options.data} has more than the {used} "
                            f"instances that {folder} was trained on (--max-instances), so none "
                            "are held out; choose --rows without teachers")
        return tasks[::max(1, len(tasks) // 100)]

    @functools.cached_property
    def givers(self) -> dict:
        """{task name: the task whose instruction it is given instead of its own}."""
        if len(self.tasks) == 1:
            return {}
        others = predictions.of_another_kind(self.tasks)
        return dict(zip([task.name for task in self.tasks], others))

    def training_data(self, record: dict) -> dict:
        """The digest of the training tasks that are there now, made as that in the record was."""
        made = {"data": self.options.data, "format": self.options.format,
                "allow_missing": record.get("allow_missing", False)}
        return made | data.tasks_digest(argparse.Namespace(**made))

    def check_training_tasks(self) -> None:
        """Refuse another tokenizer, changed training tasks, and tasks that were trained on."""
        o, trained = self.options, self.tagi.options
        found = {"tokenizer_digest": t5.tokenizer_digest(self.tagi.tokenizer)}
        # Another folder holds own tasks, or a copy, perhaps of a part.
        if os.path.realpath(o.data) == os.path.realpath(trained.data):
            found |= self.training_data(vars(trained))
        common.check_digests(found, self.checkpoint, vars(trained))
        names = data.names_and_definitions(self.tasks)
        for model in (self.checkpoint, self.tagi.llm_path):
            path = f"{model}/training_tasks.json"
            if o.split == "train" or not os.path.isfile(path):
                continue
            with common.named_file(path, "train this stage again"), open(path) as f:
                known = predictions.known_tasks(names, json.load(f))
            if known:
                raise UserError(f"{model} was trained on {len(known)} of the {len(self.tasks)} "
                                f"{o.split} tasks in {o.data}: {', '.join(known[:3])} …; evaluate "
                                "it on the data that it is for")


def checkpoint_of(options) -> str:
    folder = options.checkpoint or os.path.join(options.runs, "finetune")
    if options.checkpoint and not os.path.isdir(folder):
        raise UserError(f"{folder}: no such folder; --checkpoint names one that train_hyper.py "
                        "--stage finetune wrote")
    if not os.path.isdir(folder):
        raise UserError(f"{folder}: no such checkpoint; first run python train_hyper.py "
                        f"--stage finetune{t5.config_flag(options)}")
    return folder


# --------------------------------------------------------------------- who answers, reading what
# An answerer is a function from a batch of (task, instance) pairs to texts. limits: of their
# lengths, as Transformers' `generate` has them.

def answerer(loaded, row, demos, tasks, limits):
    """How a row of the table answers instances of these tasks."""
    match row:
        case "tagi" | "tagi_shuffled" | "tagi_empty" | "tagi_unseen_wording":
            return student(loaded, instructed(loaded, row, demos, tasks), tasks, limits)
        case "meta" | "meta_unseen_wording":
            return reader(loaded, demos, limits, llm=loaded.llm(t5.meta_path(loaded.options)))
        case "no_finetuning":
            return reader(loaded, demos, limits, llm=loaded.llm(t5.base_path(loaded.options)))
        case "no_instruction":
            return reader(loaded, None, limits)
        case "teachers" | "meta_lora":
            folder, unit, command = loaded.teachers_of(row)
            names, tagi = loaded.teacher_names(tasks, unit), loaded.tagi
            stacked = load_teachers(folder, names, tagi.llm, vars(tagi.options), command)
            number = {task.name: names.index(data.teacher_of(task, unit)) for task in tasks}
            return reader(loaded, demos, limits, teachers=(stacked, number))
        case "copy_input":
            return lambda pairs: [x.input for _, x in pairs]
        case "copy_demo":
            return lambda pairs: [task.demonstrations[0][1] if task.demonstrations else ""
                                  for task, _ in pairs]


def instructed(loaded, row, demos, tasks):
    """TAGI's adapters for these tasks, a row each, of the instruction that it is given there."""
    definitions, demonstrations = [], []
    for task in tasks:
        giver = loaded.givers[task.name] if row == "tagi_shuffled" else task
        empty = row == "tagi_empty"
        definitions.append("" if empty else giver.definitions[0])
        demonstrations.append([] if empty else giver.demonstrations[:demos])
    return loaded.tagi.adapt(definitions, demonstrations)


def student(loaded, adapters, tasks, limits):
    """TAGI, which reads the input alone; row k of the adapters is for tasks[k]."""
    o, tagi = loaded.options, loaded.tagi
    number = {task.name: k for k, task in enumerate(tasks)}

    def answer(pairs):
        index = [number[task.name] for task, _ in pairs]
        if len(set(index)) == 1:
            index = index[:1]                   # one row for all, not a copy for each
        rows = adapters if len(adapters) == 1 else adapters.select(index)
        inputs = [x.input if x.input.strip() else "." for _, x in pairs]    # "" is read as "."
        if o.bench != "p3":
            return tagi.generate(inputs, rows, batch_size=len(pairs), **limits)
        choices = [x.choices for _, x in pairs]
        scores = tagi.score_choices(inputs, choices, rows, len(pairs), o.normalize, **limits)
        return predictions.likeliest(choices, scores)
    return answer


def reader(loaded, demos, limits, llm=None, teachers=None):
    """An LLM that reads the instruction with every input; demos None: the input alone.

    llm: None for the frozen one. teachers: LoRA weights for it, stacked, and {task: their row}.
    """
    def answer(pairs):
        weights, items = None, []
        if teachers is not None:
            stacked, number = teachers
            index = [number[task.name] for task, _ in pairs]
            one = len(set(index)) == 1
            weights = lora.select(stacked, index[0] if one else torch.tensor(index))
        for task, x in pairs:
            if demos is None:
                items.append(("", [], x.input))
            else:
                text = x.prompt or x.input
                items.append((task.definitions[0], task.demonstrations[:demos], text))
        return ask(loaded, items, [x.choices for _, x in pairs], limits, llm, weights)
    return answer


@torch.no_grad()
def ask(loaded, items, choices, limits, llm=None, weights=None) -> list[str]:
    """What a plain LLM answers to N (definition, demonstrations, input) items.

    For P3 the likeliest of each item's choices, else what it generates greedily. weights: of
    LoRA, (r, D_in) and (D_out, r) for all items or (N, r, D_in) and (N, D_out, r).
    """
    o, tagi = loaded.options, loaded.tagi
    ids, mask = data.tokenize_instructed(tagi.tokenizer, items, o.max_input, tagi.device,
                                         verbatim=o.bench == "p3")              # (N, T)
    with tagi.adapted(None) as frozen:
        lora.set_weights(frozen, weights)
        llm = llm or frozen
        if o.bench != "p3":
            out = llm.generate(input_ids=ids, attention_mask=mask, do_sample=False, num_beams=1,
                               **limits)
            return tagi.tokenizer.batch_decode(out, skip_special_tokens=True)
        encoded = llm.get_encoder()(input_ids=ids, attention_mask=mask)[0]      # (N, T, D)
        labels, owner = data.choice_labels(tagi.tokenizer, choices, limits["max_new_tokens"],
                                           ids.device)                          # (M, C), (M,)
        if weights is not None and next(iter(weights.values()))[0].dim() == 3:
            lora.set_weights(frozen, lora.select(weights, owner))               # (M, r, D_in), ..
        scores = t5.score_choices(llm, encoded, mask, labels, owner, o.normalize)
    return predictions.likeliest(choices, scores)


def predict(loaded, row, demos, done, file, tasks=None, name=None) -> list[dict]:
    """One row's predictions, in the order of its tasks; those not in `done` are made and written.

    done: {(row, demos, task, id): prediction}; new ones are added. With `tasks` those are answered
    as the row's, under a name of their own.
    """
    o, records = loaded.options, []
    tasks, name = tasks or loaded.tasks_of(row), name or ROWS[row]
    bar = tqdm(total=sum(len(task.instances) for task in tasks), disable=None, leave=False,
               desc=f"{name}, {report.SETTINGS[demos]}", dynamic_ncols=True)
    for group in data.batches(tasks, TASKS_AT_ONCE):
        keys, todo = [], []
        for task, x in [(task, x) for task in group for x in task.instances]:
            keys.append((name, demos, task.name, x.id))
            if keys[-1] not in done:
                todo.append((task, x))
        bar.update(len(keys) - len(todo))
        if todo:
            answer = answerer(loaded, row, demos, group, {"max_new_tokens": o.max_output})
        for batch in data.batches(todo, o.batch_size):
            for (task, x), text in zip(batch, answer(batch), strict=True):
                record = {"bench": o.bench, "row": name, "demos": demos, "id": x.id,
                          "task": task.name, "category": task.category,
                          "prediction": text, "references": x.outputs}
                done[name, demos, task.name, x.id] = record
                file.write(json.dumps(record) + "\n")
            file.flush()
            bar.update(len(batch))
        records += [done[key] for key in keys]
    bar.close()
    return records


# ------------------------------------------------------------------------------------------- cost

def measure_costs(loaded, wanted, settings) -> dict:
    """{demos: {row: {"flops": .., "ms": .., "formula": ..}}} of one instance (`cost.of_rows`)."""
    return cost.of_rows(loaded, wanted, settings, COST_INSTANCES, COST_REPEATS, way, data)


def way(loaded, row, demos, pairs, size, limits):
    """A function of no arguments that answers these pairs, all of one task, as the row does.

    For what it costs: TAGI makes its adapter anew, and merges it, as one does for one task.
    """
    task, answer = pairs[0][0], None
    if row == "teachers":                       # all cost the same; a test task has none
        fresh = lora.init_weights(loaded.tagi.llm, loaded.tagi.options.rank, 0, 1)
        answer = reader(loaded, demos, limits, teachers=(fresh, {task.name: 0}))
    elif not row.startswith("tagi"):
        answer = answerer(loaded, row, demos, [task], limits)

    def in_batches(answer):
        for batch in data.batches(pairs, size):
            answer(batch)

    def adapted_and_merged():
        adapter = instructed(loaded, row, demos, [task])
        loaded.tagi.merge(adapter)
        in_batches(student(loaded, adapter, [task], limits))
        loaded.tagi.unmerge()

    return functools.partial(in_batches, answer) if answer else adapted_and_merged


# ------------------------------------------------------------------------------------------- main

def load(options) -> Loaded:
    """Tasks and models. Raises UserError where benchmark, data and model are of two kinds."""
    sample.ensure_suite(options.data)
    if options.bench == "sni" and options.data == sample.SUITE:
        raise UserError(f"--bench sni needs --data, a folder in its layout: {data.GET_SNI}")
    if (options.bench == "p3") != (options.format == "p3"):
        raise UserError(f"--bench {options.bench} with --format {options.format}: a model reads P3 "
                        "as it was trained to; name a checkpoint or config of the other kind, or "
                        "another --bench")
    return Loaded(options)


def run(options) -> dict:
    """What results.json holds: each row at Def and Def + 2 Pos, answered, scored, and its cost."""
    loaded, bench, split, out = load(options), options.bench, options.split, options.out
    wanted = predictions.chosen_rows(loaded, loaded.has_unseen_wording)
    if set(wanted) - HEURISTICS:
        loaded.check_training_tasks()
    sources = predictions.sources_of(loaded, wanted)
    done = predictions.open_predictions(out, vars(options), sources, options.fresh)
    settings = (0,) if bench == "p3" else tuple(report.SETTINGS)
    results, published = [], []
    with predictions.kept(out) as file:
        for row, demos in itertools.product(wanted, settings):
            records = predict(loaded, row, demos, done, file)
            scores = report.score(ROWS[row], demos, records, strict=bench != "sni")
            results.append({"key": row} | scores)
    if {"tagi", "meta"} <= set(wanted):                 # all costs are told relative to meta's
        costs = measure_costs(loaded, wanted, settings)
        for result in results:
            result |= costs.get(result["demos"], {}).get(result["key"], {})
    if bench == "p3":
        tasks, listed = {task.category for task in loaded.tasks}, len(p3.TEST)
        published = report.published_p3(loaded.tagi.llm.config)
    else:
        tasks, listed = loaded.tasks, len(data.listed_tasks(options.data, split))
        if bench == "sni" and set(wanted) - HEURISTICS:
            published = report.published_sni(loaded.tagi.llm.config)
    return {"bench": bench, "split": split, "tasks": len(tasks), "listed": listed,
            "results": results, "published": published, "versions": machine.versions()}


@common.command
@terminal.printing
def main(argv=None):
    options = config.parse(parser(), "evaluate", argv)
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise UserError("evaluation is one process; start it with python evaluate.py")
    if options.references and not options.rescore:
        raise UserError("--references belongs to --rescore FILE; name the predictions too")
    if options.paraphrases and not options.probe:
        raise UserError("--paraphrases belongs to --probe; name that too")
    if options.probe:
        config.refuse(argv, probe.NOT_WITH, "--probe says by itself who answers what")
    if not options.rescore and not options.ablations:
        config.refuse(argv, config.OF_A_CHECKPOINT, "an evaluation takes it from the checkpoint")
    if not config.given(argv, ["llm"]):
        options.llm = None                      # the checkpoint's own
    if options.ablations:
        return report.tell_ablations(options.runs, options.split)
    if options.rescore:
        results = predictions.rescore(options.rescore, options.references, options.bench)
        return report.tell(results, options.out)
    options.bench = options.bench or "sample"
    options.batch_size = options.batch_size or (250 if options.bench == "sample" else 20)
    options.eval_instances = options.eval_instances or (None if options.bench == "p3" else 100)
    folder = "probe" if options.probe else "evaluate"
    options.out = options.out or os.path.join(options.runs, folder)
    if options.probe:
        return probe.run(load(options), predict)
    report.tell(run(options), options.out)


if __name__ == "__main__":
    main()
