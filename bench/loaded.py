"""What an evaluation is made of: its tasks and models, each loaded when a row first needs it."""
import argparse
import functools
import os

import common
import config
import data
import t5
from bench import predictions
from bench.predictions import UNSEEN_WORDING
from common import UserError
from hypernet import TAGI


class Loaded:
    """Tasks and models, each loaded when a row first needs it; options: evaluate.py's.

    rank, world: of this process, among those that share out the work.
    """

    def __init__(self, options, rank: int = 0, world: int = 1):
        o = self.options = options
        self.rank, self.world, self.dealt = rank, world, 0
        self.told = f", 1 of {world} processes" if world > 1 else ""
        if o.bench == "p3":
            self.tasks = data.load_p3(o.data, o.split, o.eval_instances, o.p3_input)
        else:
            self.tasks = data.load_sni(o.data, o.split, o.eval_instances,
                                       allow_missing=o.allow_missing)
        self.other = ("", None)                 # the path that `llm` loaded last, and its LLM

    def share(self, batches: list) -> list:
        """Those of these batches that this process answers: they are dealt out in turn."""
        first = (self.rank - self.dealt) % self.world
        self.dealt += len(batches)
        return batches[first::self.world]

    @functools.cached_property
    def checkpoint(self) -> str:
        return checkpoint_of(self.options)

    @functools.cached_property
    def tagi(self) -> TAGI:
        o = self.options
        llm = o.llm and t5.llm_path(o)          # None: where the checkpoint has it
        tagi = TAGI.load(self.checkpoint, o.device, o.precision, llm).requires_grad_(False)
        trained = tagi.options
        frozen, meta = (t5.meant_by(key, getattr(trained, key), trained)
                        for key in ("llm", "meta_model"))
        if llm and config.same("llm", frozen, meta):
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
        command = f"python {config.script('train_teacher.py')} --stage {stage}"
        command += t5.config_flag(self.options)
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
        """Some hundred training tasks, with instances that no teacher was trained on; or none."""
        folder, _, command = self.teachers_of("teachers")
        if not os.path.isdir(folder):
            raise UserError(f"{folder}: no LoRA teachers; first run {command}")
        # What the teachers were trained on, whatever is asked for now.
        used = common.load_options(folder, "max_instances").max_instances
        tasks = data.training_tasks(self.options, 10, skip=used)
        return tasks[::max(1, len(tasks) // 100)]

    @property
    def is_data_of_training(self) -> bool:
        """Whether --data is the folder that the TAGI was trained on, however it was written."""
        trained = self.tagi.options
        return config.same("data", trained.data, self.options.data, getattr(trained, "cwd", ""))

    def why_none_held_out(self) -> str | None:
        """Why the LoRA teachers have nothing to answer here; None where they have."""
        folder, root = self.teachers_of("teachers")[0], self.options.data
        if not self.is_data_of_training:
            if not os.path.isdir(folder):
                return f"there are none in {folder}"
            if not os.path.isfile(data.split_file(root, "train")):
                return f"{root} has no training tasks"
        if not self.held_out:
            return (f"no training task in {root} has more than the instances that {folder} was "
                    "trained on (--max-instances), so none are held out; choose other --rows")
        return None

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
                "allow_missing": record.get("allow_missing", False),
                "hold_out": record.get("hold_out", 0)}
        return made | data.tasks_digest(argparse.Namespace(**made))

    def check_training_tasks(self) -> None:
        """Refuse another tokenizer, changed training tasks, and tasks that were trained on."""
        o, trained = self.options, self.tagi.options
        found = {"tokenizer_digest": t5.tokenizer_digest(self.tagi.tokenizer)}
        # Another folder holds own tasks, or a copy, perhaps of a part.
        if self.is_data_of_training:
            found |= self.training_data(vars(trained))
        common.check_digests(found, self.checkpoint, vars(trained))
        names = data.names_and_definitions(self.tasks)
        for model in (self.checkpoint, self.tagi.llm_path):
            path = f"{model}/training_tasks.json"
            if not os.path.isfile(path):        # a step's folder is in that of its stage
                path = os.path.join(os.path.dirname(os.path.abspath(model)), "training_tasks.json")
            known = predictions.known_to(path, names) if o.split != "train" else []
            if known:
                raise UserError(f"{model} was trained on {len(known)} of the {len(self.tasks)} "
                                f"{o.split} tasks in {o.data}: {', '.join(known[:3])} …; evaluate "
                                "it on the data that it is for")


def checkpoint_of(options) -> str:
    """The folder of the newest complete checkpoint in that of --checkpoint, or of finetuning."""
    folder = options.checkpoint or os.path.join(options.runs, "finetune")
    if options.checkpoint and not os.path.isdir(folder):
        raise UserError(f"{folder}: no such folder; --checkpoint names one that train_hyper.py "
                        "--stage finetune wrote")
    if not os.path.isdir(folder):
        raise UserError(f"{folder}: no such checkpoint; first run python "
                        f"{config.script('train_hyper.py')} --stage finetune"
                        f"{t5.config_flag(options)}")
    return t5.checkpoint_at(folder)
