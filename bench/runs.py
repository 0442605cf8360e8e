"""The life of one stage in its folder: where it goes on, its checkpoints, its log, how it ends."""
import argparse
import fcntl
import json
import math
import os
import sys
import time

import torch

import common
import config
import t5
from bench import board, machine, recorded, shard, terminal
from bench.folders import (is_ours, publish, record_in, remove_groups, remove_ours, save_step,
                           sweep, teacher_folder, writing)
from bench.watch import Watch
from common import UserError

# What may differ between the runs that make up a stage: it does not change the result.
IGNORED = ("config", "fresh", "device", "save_every", "stage", "runs", "teachers_at_once", "keep",
           "timeout", "on_nan", "validate_every", "tensorboard", "shard")


# Stage -> the command that comes after it.
NEXT = {"base": "train_teacher.py --stage meta", "meta": "train_teacher.py --stage lora",
        "lora": "train_hyper.py --stage pretrain", "lora-all": "train_hyper.py --stage pretrain",
        "pretrain": "train_hyper.py --stage finetune",
        "finetune": "evaluate.py --checkpoint {folder}"}


class Run:
    """One stage in its folder: whether it is done, where it goes on, its log, its checkpoints.

    A script calls Run(...), resume, begin, in each step is_finite and after_step, and at last end.
    digests: of what the stage reads. Raises UserError where a run with other options or data is
    there, and where another process is at work in the folder.

    While it is trained the folder holds complete checkpoints, step-000500/, of which `latest` names
    the newest. At the end the last one's files stand in the folder itself.
    """

    def __init__(self, folder: str, options, rank: int, world: int, digests: dict,
                 ranks_share_a_batch: bool = True):
        terminal.last()
        shard.leave_out_where_useless(options, rank)
        self.folder, self.options, self.rank, self.world = folder, options, rank, world
        self.found = {"processes": world} | digests     # beside options; both go to config.yaml
        self.start, self.skipped, self.begun = 0, 0, time.time()
        self.cwd = os.getcwd()                          # it may be removed while this runs
        self.lock = self.validation = None              # a script may set one, bench/validation.py
        self.saved = None                               # and this, optim.Saved
        if options.tensorboard:
            board.summary_writer()                      # refuses before anything is read
        if not is_ours(folder):
            raise UserError(f"{folder} holds files that are not of this program's runs, and none "
                            "of them is to be replaced; choose another --name or --runs")
        self.take_lock()
        if options.fresh and machine.is_started_again():        # it did start over, the first time
            options.fresh = not common.gather_over_ranks(self._is_of_this_launch())[0]
        # before: config.yaml of a run to go on with
        self.before = self.source = None
        if not options.fresh:
            self.source = common.checkpoint_of(folder)
        if self.source is not None:
            self.before = vars(recorded.load_options(self.source, ("finished", "step")))
        self.finished = self._is_done()
        if self.finished:
            return
        batch, ranks = options.tasks * options.instances * options.accumulate, ""
        if ranks_share_a_batch:
            self._check_processes()
            batch, ranks = batch * world, f"{world} ranks x "
        if rank == 0:
            versions = [f"{name} {version}" for name, version in machine.versions().items()]
            print(f"{folder}: {options.steps} steps, effective batch {batch} = {ranks}"
                  f"{options.tasks} tasks x {options.instances} instances x {options.accumulate} "
                  f"micro-batches, seed {options.seed} "
                  f"({', '.join(versions)})")

    def take_lock(self) -> None:
        """Of the folder, where it is there: one run at a time. It goes with the process."""
        if self.rank > 0 or self.lock is not None or not os.path.isdir(self.folder):
            return
        with common.named_file(f"{self.folder}/.lock", "choose another folder", "written"):
            self.lock = os.open(f"{self.folder}/.lock", os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.lockf(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise UserError(f"another run is at work in {self.folder}; wait for it to end, or "
                            "choose another folder with --name") from None

    def _is_done(self) -> bool:
        before, options = self.before, self.options
        if before is None:
            return False
        # The options then, in this folder, which may have been moved.
        then = vars(options) | before | {"runs": os.path.abspath(options.runs)}
        then = argparse.Namespace(**then)
        for key, value in vars(options).items():
            old = before.get(key, value)
            places = t5.meant_by(key, old, then), t5.meant_by(key, value, options)
            if key in IGNORED or config.same(key, *places, before.get("cwd", "")):
                continue
            if key == "steps" and before["finished"] and value > old:
                continue                                # a finished stage is trained further
            raise UserError(f"{self.folder} holds a run with --{key.replace('_', '-')} "
                            f"{old}, not {value}; start over with --fresh, or keep it "
                            "and choose another folder with --runs")
        common.check_digests(vars(options) | self.found, self.folder, before)
        if not before["finished"] or before["step"] < options.steps:
            return False
        for teacher in before.get("unit_names", []):    # one may have been removed since
            if not common.is_finished(teacher_folder(self.folder, teacher)):
                return False
        # Killed between the last checkpoint and its move into the folder.
        if self.rank == 0:
            publish(self.folder)
            sweep(self.folder, options.keep)
            remove_groups(self.folder)
        common.wait_for_all_ranks()
        if self.rank == 0:
            print(f"{self.folder}: finished at step {before['step']}, nothing to do "
                  "(--fresh starts over, more --steps go on)")
        return True

    def _check_processes(self) -> None:
        """Another number of processes would be another batch."""
        old, new = (self.before or {}).get("processes", self.world), self.world
        if old != new:
            micros, same = old * self.options.accumulate, ""
            if micros % new == 0:
                same = f" --accumulate {micros // new} (the same batch)"
            raise UserError(f"{self.folder} holds an unfinished run of {old} processes, not {new}: "
                            f"the batch would change; go on with {old} (torchrun --nproc-per-node "
                            f"{old}), or start over with --fresh{same}")

    def record(self) -> dict:
        """What config.yaml tells of this run."""
        seconds = (self.before or {}).get("seconds", 0) + time.time() - self.begun
        here = {"cwd": self.cwd, "seconds": round(seconds, 1), "versions": machine.versions()}
        return vars(self.options) | self.found | here

    def resume(self, parameters: dict, optimizer) -> int:
        """The step to go on from; parameters and optimizer are filled from the checkpoint there."""
        self.start = common.resume(self.source, parameters, optimizer)
        return self.start

    def begin(self, llm_path: str | None = None, log: bool = True) -> None:
        """Just before the first step, when all is read: only here --fresh removes the old run.

        Raises UserError where the run to go on with is of another LLM, and where ranks differ in
        options, data or LLM.
        """
        if self.before is not None:
            common.check_digests(self.record(), self.folder, self.before)
            if "llm_fingerprint" in self.found:
                before = common.load_options(self.source, "llm_fingerprint").llm_fingerprint
                common.check_fingerprint(self.found["llm_fingerprint"], before, self.folder,
                                         llm_path)
        self._compare_ranks()
        if self.rank == 0:
            common.make_folder(self.folder)
            self.take_lock()
            if not self.options.fresh and common.checkpoint_of(self.folder) != self.source:
                raise UserError(f"another run was at work in {self.folder} meanwhile; run the same "
                                "command again")
            if self.options.fresh:
                self._describe(began=False)             # marked as ours while it is removed
                remove_ours(self.folder)
            sweep(self.folder, self.options.keep)
            self._describe()
        common.wait_for_all_ranks()
        common.stop.listen()
        common.stop.at_once = False
        self.stop = common.stop
        self.stop.leave_if_asked(self.options.device)
        self.watch = Watch(self.folder, self.rank, self.world, self.options.timeout)
        if self.validation is not None:
            self.validation.begin()
        if log:
            self.log = Log(self.folder, self.options, self.start, self.rank)

    def _compare_ranks(self) -> None:
        """Raises UserError where the ranks read different things."""
        ours = vars(self.options) | self.found
        for rank, key, theirs in common.differences(ours):
            raise UserError(f"rank {rank} has {key} {theirs}, rank {self.rank} has "
                            f"{ours.get(key)}; give all the same options, data and LLM")

    def _is_of_this_launch(self) -> bool:
        """Whether the run in this folder was begun by the launcher or job that starts this one."""
        runs = record_in(self.folder, "run.yaml").get("runs")
        last = runs[-1] if isinstance(runs, list) and runs else None
        return isinstance(last, dict) and machine.is_of_this_launch(last)

    def _describe(self, began: bool = True) -> None:
        """run.yaml: how each run in this folder was started, on what; it marks the folder as ours.

        began: what --fresh removes is gone.
        """
        path, runs = f"{self.folder}/run.yaml", []
        if os.path.isfile(path):
            with common.named_file(path, "remove it"):
                runs = [*common.read_yaml(path, "remove it").get("runs", [])]
        runs.append({"command": machine.command_line(), "from_step": self.start,
                     "processes": self.world, "started": time.strftime("%Y-%m-%d %H:%M:%S"),
                     "launch": machine.launch() if began else None,
                     "versions": machine.versions()} | machine.hardware(self.options.device))
        with writing(path):
            told = {"go_on_with": machine.command_line(going_on=True), "runs": runs}
            common.write_yaml(path, told)

    def is_finite(self, step: int, loss: torch.Tensor, norm: float, dealt) -> bool:
        """Whether this step, counted from 0, may be taken: loss and gradient norm are finite.

        With --on-nan skip a step that may not is counted and left out; else UserError is raised,
        which names the tasks. loss: this rank's share; dealt(): what its micro-batches are made of.
        """
        loss, = common.sum_over_ranks([loss], self.options.device)
        if math.isfinite(loss) and math.isfinite(norm):
            return True
        self.skipped += 1
        names = {name_of(item) for items in dealt() for item in items}
        tasks = sorted(set().union(*common.gather_over_ranks(names)))
        self.log.note({"step": step + 1, "not_finite": [f"{loss:g}", f"{norm:g}"], "tasks": tasks})
        if self.options.on_nan == "skip":
            return False
        kept = os.path.basename(common.checkpoint_of(self.folder) or "no checkpoint yet")
        name = os.path.basename(self.folder)
        raise UserError(f"{name}, step {step + 1}: loss {loss:.3g}, gradient norm {norm:.3g}, with "
                        f"{', '.join(tasks)[:100]} (log.jsonl lists all); last good: {kept}; "
                        "--on-nan skip goes on, a lower --lr needs --fresh")

    def after_step(self, step: int, lr: float, terms: dict, stopping: bool, save, norm: float,
                   tokens: float):
        """Log this step, counted from 1; save, with save(folder, step, finished), when that is due;
        leave where a rank was asked to stop. norm: of the gradient; tokens: labels of all ranks."""
        more = {"grad_norm": norm} | ({"skipped": self.skipped} if self.skipped else {})
        self.log(step, lr, terms, tokens, more)
        finished = step == self.options.steps
        stopping = stopping or (self.world == 1 and self.stop.asked)
        # A validation comes before the checkpoint, after which nobody would make up for it; only
        # those who stop a run have their checkpoint first.
        if not stopping:
            self._validate(step, save)
        if finished or stopping or step % self.options.save_every == 0:
            self.saved.gather()
            if self.rank == 0:
                print(f"\nsaving step {step}" if stopping else "", end="", flush=True)
                save_step(self.folder, step, finished, save)
                if finished:
                    publish(self.folder)
                sweep(self.folder, self.options.keep)
        if stopping:
            self._validate(step, save)
        if stopping and not finished:
            self.leave(step)

    def _validate(self, step, save):
        if self.validation is None or not self.validation.after_step(step):
            return
        self.saved.gather(optimizer=False)
        if self.rank == 0:
            self.validation.keep(step, lambda new: save(new, step, False, optimizer=None))

    def leave(self, step: int, asked: bool = True) -> None:
        """End after a stop, if a rank was asked to, with what was saved and how to go on."""
        # All together: where one ends alone, torchrun ends the others 30 seconds later.
        if not common.sum_over_ranks([asked], self.options.device)[0]:
            return
        self.log.close()
        if self.rank == 0:
            print(f"\nstopped after step {step}; {self.folder} is saved: {machine.again()} "
                  f"to go on (run.yaml there has it)", flush=True)
        sys.exit(130)

    def end(self) -> None:
        """Say where it is saved and what comes then."""
        self.log.close()
        self.watch.end()
        then = NEXT[self.options.stage].format(folder=self.folder)
        name, _, rest = then.partition(" ")
        if self.rank == 0:
            seconds = self.record()["seconds"]
            print(f"{self.folder}: finished after {seconds:.0f} s and saved; next: python "
                  f"{config.script(name)} {rest}{t5.config_flag(self.options)}")
            if self.validation is not None:
                print(self.validation.tell())
        self.stop.leave_if_asked(self.options.device)
        self.stop.at_once = self.world == 1


def name_of(item) -> str:
    """Of what a batch is made of: a document's beginning, or a task's name."""
    return repr(item[:20]) if isinstance(item, str) else item.task.name


class Log:
    """A progress bar, on rank 0, and log.jsonl, a line for 20 steps or fewer.

    summed: the terms are shares of the ranks, which are added up; every rank has to call it then,
    and rank 0 alone writes. Else each rank writes a file of its own.
    """

    def __init__(self, folder: str, options, start: int, rank: int, summed: bool = True):
        from tqdm import tqdm
        self.steps, self.begun, self.tokens, self.since = options.steps, time.time(), 0, time.time()
        self.every = max(1, min(20, options.steps // 100))
        self.summed, self.device = summed, options.device
        self.bar = tqdm(total=options.steps, initial=start, desc=os.path.basename(folder),
                        disable=rank > 0, mininterval=2, dynamic_ncols=True, file=sys.stdout)
        self.told = {}                                  # by the bar, beside each step's terms
        self.file = self.board = None
        if options.tensorboard and (rank == 0 or not summed):
            self.board = board.Board(folder)
        if rank == 0 or not summed:
            path = f"{folder}/log-{rank}.jsonl" if rank else f"{folder}/log.jsonl"
            with writing(path):
                forget_steps_after(start if summed else math.inf, path)
                self.file = open(path, "a", buffering=1)

    def __call__(self, step: int, lr: float, terms: dict, tokens: float, more: dict | None = None):
        """terms: {name: detached tensor}, read (and so synchronised) only at the steps logged;
        tokens: labels of this step; more: what all ranks know, numbers or texts."""
        self.bar.update(1)
        self.tokens += tokens
        if step % self.every and step != self.steps:
            return
        values = [float(v) for v in terms.values()]
        if self.summed:
            values = common.sum_over_ranks(values, self.device)
        if self.file is None:
            return
        values = {name: rounded(v) for name, v in zip(terms, values)}
        self.bar.set_postfix(self.told | values)
        now = time.time()
        speed = self.tokens / max(now - self.since, 1e-9)
        self.tokens, self.since = 0, now
        values |= {name: rounded(v) for name, v in (more or {}).items()}
        values |= {"tokens_per_second": rounded(speed),
                   "peak_gib": rounded(machine.peak_memory(self.device)),
                   "seconds": round(now - self.begun, 2)}
        self.note({"step": step, "lr": lr} | values)

    def note(self, line: dict) -> None:
        """Write a line of its own."""
        if self.file is not None:
            with writing(self.file.name):
                self.file.write(json.dumps(line) + "\n")
        if self.board is not None:
            self.board.add(line)

    def validated(self, step: int, losses: dict, seconds: float) -> None:
        """Write what a validation found, whose seconds are none of training, and tell it on."""
        self.since += seconds
        self.told = {name: rounded(v) for name, v in losses.items()}
        self.bar.set_postfix(self.told)
        self.note({"step": step} | self.told)

    def close(self):
        self.bar.close()
        if self.file is not None:
            self.file.close()
        if self.board is not None:
            self.board.close()


def rounded(value):
    """Five digits of a number; None where it is none, which JSON has no word for."""
    if isinstance(value, str):
        return value
    return float(f"{float(value):.5g}") if math.isfinite(value) else None


def forget_steps_after(step: int, path: str) -> None:
    """Of a log.jsonl, drop the lines of steps that a killed run made and that are made again."""
    if not os.path.isfile(path):
        return
    kept = []
    with open(path, encoding="utf-8", errors="replace") as f:
        for line in f:
            try:
                if json.loads(line)["step"] <= step:
                    kept.append(line)
            except (ValueError, KeyError, TypeError):           # the last one, cut off
                pass
    common.write_atomically(path, lambda new: common.write_text(new, "".join(kept)))
