"""Every line of the table: which tasks it is over, and which model answers them, reading what.

A line answers (task, instance) pairs. Models and data are loaded when first asked for, one other LLM beside the frozen one
at a time.
"""
import argparse
import functools
import json
import os

import numpy as np
import torch

import common
import config
import data
import lora
import rank
import t5
from hypernet import TAGI
from train_teacher import check_teachers, load_teachers

ROWS = {
    "tagi": "TAGI, right instruction",
    "tagi_shuffled": "TAGI, shuffled instruction",
    "tagi_empty": "TAGI, empty instruction",
    "tagi_unseen_wording": "TAGI, unseen wording",
    "meta_unseen_wording": "meta-trained, unseen wording",
    "meta": "meta-trained, instruction in input",
    "meta_lora": "meta-trained with one LoRA",
    "no_finetuning": "no finetuning, instruction in input",
    "no_instruction": "frozen LLM, no instruction",
    "teachers": "LoRA teachers, held-out instances of training tasks",
    "copy_input": "copy the input",
    "copy_demo": "copy the first demonstration's output",
}
HEURISTICS = {"copy_input", "copy_demo"}
UNSEEN_WORDING = {"tagi_unseen_wording", "meta_unseen_wording"}
NOT_FOR = {"sample": set(), "sni": UNSEEN_WORDING, "p3": UNSEEN_WORDING | HEURISTICS | {"teachers"}}


class Bench:
    """The models under test and the tasks they are tested on."""

    def __init__(self, options):
        self.options = options
        if options.bench == "p3":
            self.tasks = data.load_p3(options.data, options.split, options.eval_instances, options.p3_input)
            self.listed = len(data.P3_TEST)
        else:
            self.listed = len(data.listed_tasks(options.data, options.split))
            self.tasks = data.load_sni(options.data, options.split, options.eval_instances,
                                       allow_missing=options.allow_missing)
        self.loaded = ("", None)

    @functools.cached_property
    def tagi(self):
        tagi = TAGI.load(checkpoint_of(self.options), self.options.device, self.options.precision)
        return tagi.requires_grad_(False)

    @functools.cached_property
    def reworded(self):
        return data.load_sni(self.options.data, self.options.split + "_unseen_wording", self.options.eval_instances)

    @functools.cached_property
    def trained(self):
        """About a hundred training tasks (enough for a mean), with instances that no teacher was trained on."""
        folder, _, command = self.teachers_of("teachers")
        if not os.path.isdir(folder):
            raise common.UserError(f"{folder}: no LoRA teachers; first run {command}")
        # What the teachers were trained on, whatever is asked for now.
        used = common.load_options(folder, "max_instances").max_instances
        tasks = data.training_tasks(self.options, 10, skip=used)
        tasks = tasks[::max(1, len(tasks) // 100)]
        if not tasks:
            raise common.UserError(
                f"no training task in {self.options.data} has more than the {used} instances that "
                f"{folder} was trained on (--max-instances), so none are held out; choose --rows "
                "without teachers")
        return tasks

    @functools.cached_property
    def givers(self):
        """{task name: the task whose instruction it is given instead of its own}."""
        if len(self.tasks) == 1:
            return {}
        return dict(zip([t.name for t in self.tasks], of_another_kind(self.tasks)))

    def tasks_of(self, row):
        return self.trained if row == "teachers" else self.reworded if row.endswith("unseen_wording") else self.tasks

    def rows(self):
        """The rows to be made, in the table's order.

        One that cannot be made is left out with a word; where it was asked for that is a UserError.
        """
        o = self.options
        asked = [] if o.rows is None else o.rows.split(",")
        for row in asked:
            if row not in ROWS:
                raise common.UserError(f"--rows: unknown row '{row}'" + config.closest(row, ROWS) + "; --help lists them")
            if row in NOT_FOR[o.bench]:
                raise common.UserError(f"--rows: {row} is no row of --bench {o.bench}")
        wanted = asked
        if o.rows is None:
            left_out = {"no_finetuning"} if o.bench == "sample" else set(NOT_FOR[o.bench])
            if not os.path.isfile(data.split_file(o.data, o.split + "_unseen_wording")):
                left_out |= UNSEEN_WORDING
            wanted = [row for row in ROWS if row not in left_out]
        for row, reason in self.missing().items():
            shuffled = row == "tagi_shuffled"
            needed = o.floor_margin is not None if shuffled else row in asked
            if needed or wanted == [row]:
                raise common.UserError(f"the row {row} cannot be made: {reason}")
            if row in wanted:
                print(f"left out: {ROWS[row]}: {reason}")
                wanted = [x for x in wanted if x != row]
        if "tagi_shuffled" in wanted and len({kind(task) for task in self.tasks}) == 1:
            print(f"{ROWS['tagi_shuffled']}: all tasks are of one category: that of another task")
        return [row for row in ROWS if row in wanted]

    def missing(self) -> dict:
        """{row that cannot be made: why}."""
        o, reasons = self.options, {}
        if len(self.tasks) == 1:
            reasons["tagi_shuffled"] = "there is one task only, none to take an instruction from"
        folder, _, command = self.teachers_of("meta_lora")
        if not os.path.isdir(folder):
            reasons["meta_lora"] = f"first run {command}"
        path = os.path.join(o.runs, "lora", "config.yaml")
        remedy = "train the stage lora again with --fresh"
        if os.path.isfile(path) and "data_digest" not in common.read_yaml(path, remedy):
            reasons["teachers"] = ("they were trained on each file's first instances, before rows "
                                   f"were shuffled, so none is known to be held out; {remedy}")
        return reasons

    def sources(self, rows) -> dict:
        """What the predictions depend on, so that an evaluation goes on only where all of it is the same.

        Raises UserError where something that a row needs is missing, before anything is written.
        """
        o = self.options
        marks = {key: getattr(o, key) for key in ("split", "precision", "max_input", "max_output", "normalize")}
        marks["bench"] = o.bench
        givers = {name: task.name for name, task in self.givers.items()}
        marks["tasks"] = common.digest(repr(self.tasks) + repr(givers))
        if any(row.endswith("unseen_wording") for row in rows):
            marks["reworded"] = common.digest(repr(self.reworded))
        if set(rows) - HEURISTICS:
            self.check_training_tasks()
            marks["checkpoint"] = common.weights_digest(checkpoint_of(o)) + self.tagi.options.llm_fingerprint
        if {"meta", "meta_unseen_wording"} & set(rows):
            marks["meta"] = common.weights_digest(common.meta_path(o))
        if "no_finetuning" in rows:
            marks["base"] = common.weights_digest(common.base_path(o))
        for row in {"teachers", "meta_lora"} & set(rows):
            folder, unit, command = self.teachers_of(row)
            units = {data.unit_of(t, unit) for t in self.tasks_of(row)}
            check_teachers(folder, sorted(units), self.tagi.options, command)
            record = vars(common.load_options(folder))
            common.check_digests(self.tagi.options, folder, record)
            if row == "teachers":                       # which answers the data's training tasks
                common.check_digests(self.training_data(record), folder, record)
            marks[row] = common.weights_digest(folder) + common.digest(repr(self.tasks_of(row)))
        return marks

    def check_training_tasks(self):
        """Refuse training tasks that have changed, and tasks under test that were trained on.

        Raises UserError, for another tokenizer too.
        """
        o, trained, folder = self.options, self.tagi.options, checkpoint_of(self.options)
        tokenizer = argparse.Namespace()
        tokenizer.tokenizer_digest = common.tokenizer_digest(self.tagi.tokenizer)
        common.check_digests(tokenizer, folder, vars(trained))
        # Another folder holds own tasks, or a copy, perhaps of a part.
        if os.path.realpath(o.data) == os.path.realpath(trained.data):
            common.check_digests(self.training_data(vars(trained)), folder, vars(trained))
        if o.split != "train":
            for model in (folder, common.llm_of(folder, trained)):
                self.refuse_known_tasks(model)

    def refuse_known_tasks(self, folder):
        """Raises UserError where the model in this folder was trained on tasks under test, if it left a list of them."""
        path = f"{folder}/training_tasks.json"
        if not os.path.isfile(path):
            return
        with common.named_file(path, "train this stage again"), open(path, encoding="utf-8") as f:
            known = data.known_tasks(self.tasks, json.load(f))
        if known:
            raise common.UserError(
                f"{folder} was trained on {len(known)} of the {len(self.tasks)} {self.options.split} tasks in "
                f"{self.options.data}: {', '.join(known[:3])} …; evaluate it on the data that it is for")

    def training_data(self, record):
        """The digest of the training tasks that are there now, made as that in the record was."""
        options = argparse.Namespace(data=self.options.data, format=self.options.format,
                                     allow_missing=record.get("allow_missing", False))
        vars(options).update(data.tasks_digest(options))
        return options

    def teachers_of(self, row):
        """(folder of the LoRA teachers, what each is for, the command that trains them)."""
        stage, unit = ("lora-all", "all")
        if row == "teachers":
            stage, unit = "lora", self.tagi.options.unit
        command = f"python train_teacher.py --stage {stage}{common.config_flag(self.options)}"
        return os.path.join(self.options.runs, stage), unit, command

    def llm(self, path):
        """Another checkpoint beside the frozen LLM, one at a time; None where it is the frozen LLM itself."""
        if self.loaded[0] != path:
            self.loaded = ("", None)                                        # makes room
            other, tokenizer = t5.load_llm(path, "cpu", self.options.precision, self.tagi.options.attention)
            if tokenizer.get_vocab() != self.tagi.tokenizer.get_vocab():
                raise common.UserError(f"{path} has another vocabulary than the frozen LLM; name a checkpoint that shares it, or "
                                       "leave its row out with --rows")
            same = t5.fingerprint(other) == self.tagi.options.llm_fingerprint
            self.loaded = (path, None if same else other.to(self.options.device).requires_grad_(False))
        return self.loaded[1]

    def answerer(self, row, demos, tasks):
        """A function from a batch of (task, instance) pairs of these tasks to texts: how this row of the table answers."""
        match row:
            case "tagi" | "tagi_unseen_wording":
                return self.student(demos, tasks, tasks)
            case "tagi_shuffled":
                return self.student(demos, tasks, [self.givers[t.name] for t in tasks])
            case "tagi_empty":
                return self.student(demos, tasks, [None] * len(tasks))
            case "meta" | "meta_unseen_wording":
                return self.reader(demos, llm=self.llm(common.meta_path(self.options)))
            case "no_finetuning":
                return self.reader(demos, llm=self.llm(common.base_path(self.options)))
            case "no_instruction":
                return lambda pairs: self.ask([("", [], x.input) for _, x in pairs], [x.choices for _, x in pairs])
            case "teachers" | "meta_lora":
                return self.reader(demos, teachers=self.teachers(tasks, *self.teachers_of(row)))
            case "copy_input":
                return lambda pairs: [x.input for _, x in pairs]
            case "copy_demo":
                return lambda pairs: [t.demonstrations[0][1] if t.demonstrations else "" for t, _ in pairs]

    def student(self, demos, tasks, instructed_by):
        """TAGI where tasks[i] is given the instruction of instructed_by[i]; None: an empty one."""
        adapters = self.tagi.adapt([t.definitions[0] if t else "" for t in instructed_by],
                                   [t.demonstrations[:demos] if t else [] for t in instructed_by])
        number = {task.name: n for n, task in enumerate(tasks)}

        def answer(pairs):
            index = [number[task.name] for task, _ in pairs]
            index = index[:1] if len(set(index)) == 1 else index            # one task: one row for all, not a copy for each
            inputs = [x.input if x.input.strip() else "." for _, x in pairs]           # an empty one is read as "." anyway
            rows, limit = adapters.select(index), self.options.max_output
            if self.options.bench == "p3":
                choices = [x.choices for _, x in pairs]
                return best(choices, self.tagi.rank(inputs, choices, rows, len(pairs), self.options.normalize, limit))
            return self.tagi.generate(inputs, rows, batch_size=len(pairs), max_new_tokens=limit)
        return answer

    def reader(self, demos, llm=None, teachers=None):
        """An LLM (None: the frozen one) that reads the instruction with every instance, as it is or with LoRA teachers."""
        def answer(pairs):
            weights = None
            if teachers is not None:
                stacked, number = teachers
                index = [number[task.name] for task, _ in pairs]
                weights = lora.select(stacked, index[0] if len(set(index)) == 1 else torch.tensor(index))
            items = [(t.definitions[0], t.demonstrations[:demos], x.prompt or x.input) for t, x in pairs]
            return self.ask(items, [x.choices for _, x in pairs], weights, llm)
        return answer

    def teachers(self, tasks, folder, unit, command):
        """(the LoRA teachers of these tasks, stacked, {task name: its teacher's number})."""
        units = sorted({data.unit_of(t, unit) for t in tasks})
        stacked = load_teachers(folder, units, self.tagi.llm, self.tagi.options, command)
        return stacked, {t.name: units.index(data.unit_of(t, unit)) for t in tasks}

    def ask(self, items, choices=None, weights=None, llm=None, **options):
        """Answers of a plain LLM (default: the frozen one) to (definition, demonstrations, input) items: the likeliest of
        the choices for P3, else what it generates greedily; with LoRA weights, a row per item, where given."""
        ids, mask = data.tokenize_instructed(self.tagi.tokenizer, items, self.options.max_input, self.tagi.device)
        with torch.no_grad(), self.tagi.adapted(None) as frozen:
            lora.set_weights(frozen, weights)
            llm = llm or frozen
            if self.options.bench == "p3":
                encoded = llm.get_encoder()(input_ids=ids, attention_mask=mask)[0]
                if weights is not None and next(iter(weights.values()))[0].dim() == 3:          # a row for every choice
                    lora.set_weights(frozen, lora.select(weights, torch.tensor(rank.owner_of(choices))))
                return best(choices, rank.log_likelihoods(llm, self.tagi.tokenizer, encoded, mask, choices,
                                                          self.options.normalize, self.options.max_output))
            out = llm.generate(input_ids=ids, attention_mask=mask, do_sample=False, num_beams=1,
                               **{"max_new_tokens": self.options.max_output, **options})
        return self.tagi.tokenizer.batch_decode(out, skip_special_tokens=True)


def best(choices, scores):
    """Of each row's choices the one with the highest score, the first of equals."""
    return [row[max(range(len(row)), key=values.__getitem__)] for row, values in zip(choices, scores, strict=True)]


def checkpoint_of(options):
    folder = options.checkpoint or os.path.join(options.runs, "finetune")
    if not os.path.isdir(folder):
        raise common.UserError(f"{folder}: no such checkpoint; first run python train_hyper.py --stage finetune"
                               f"{common.config_flag(options)}")
    return folder


def kind(task):
    """A task's category; ANLI, CB and RTE of P3 are one: their templates are nearly the same."""
    nli = ("anli_r1", "anli_r2", "anli_r3", "cb", "rte")
    return "nli" if task.category in nli else task.category


def of_another_kind(tasks):
    """For every task one of another kind, drawn, always the same; where there is none, any."""
    rng = np.random.default_rng(0)
    givers = []
    for task in tasks:
        others = [x for x in tasks if kind(x) != kind(task)]
        others = others or [x for x in tasks if x is not task]
        givers.append(others[rng.integers(len(others))])
    return givers
