"""The life of one stage in its folder: where it goes on, its checkpoints, its log, how it ends."""
import json
import os
import shutil
import sys
import time

import common
from common import UserError

# What may differ between the runs that make up a stage: it does not change the result.
IGNORED = ("config", "fresh", "device", "save_every", "stage", "runs", "teachers_at_once")


class Run:
    """One stage in its folder: whether it is done, where it goes on, its log, its checkpoints.

    A script calls Run(...), resume, begin, after each step after_step, and at last end. digests: of
    what the stage reads. Raises UserError where a run with other options or data is there.
    """

    def __init__(self, folder: str, options, rank: int, world: int, digests: dict,
                 ranks_share_a_batch: bool = True):
        self.folder, self.options, self.rank, self.world = folder, options, rank, world
        self.found = {"processes": world} | digests     # beside options; both go to config.yaml
        self.start, self.before = 0, None               # before: config.yaml of a run to go on with
        if not options.fresh and os.path.isfile(f"{folder}/config.yaml"):
            self.before = vars(common.load_options(folder))
        self.finished = self._is_done()
        if self.finished:
            return
        batch, ranks = options.tasks * options.instances * options.accumulate, ""
        if ranks_share_a_batch:
            self._check_processes()
            batch, ranks = batch * world, f"{world} ranks x "
        if rank == 0:
            print(f"{folder}: {options.steps} steps, effective batch {batch} = {ranks}"
                  f"{options.tasks} tasks x {options.instances} instances x {options.accumulate} "
                  f"micro-batches, seed {options.seed} "
                  f"({', '.join(f'{name} {version}' for name, version in common.versions().items())})")

    def _is_done(self) -> bool:
        before = self.before
        if before is None:
            return False
        for key, value in vars(self.options).items():
            if key not in IGNORED and before.get(key, value) != value:
                raise UserError(f"{self.folder} holds a run with --{key.replace('_', '-')} "
                                f"{before[key]}, not {value}; start over with --fresh, or keep it "
                                "and choose another folder with --runs")
        common.check_digests(vars(self.options) | self.found, self.folder, before)
        if before["finished"] and self.rank == 0:
            print(f"{self.folder}: finished at step {before['step']}, nothing to do "
                  "(--fresh starts over)")
        return bool(before["finished"])

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
        return vars(self.options) | self.found

    def resume(self, parameters: dict, optimizer) -> int:
        """The step to go on from; parameters and optimizer are filled from the checkpoint there."""
        self.start = common.resume(self.folder, self.options.fresh, parameters, optimizer)
        return self.start

    def begin(self, llm_path: str | None = None, log: bool = True) -> None:
        """Just before the first step, when all is read: only here --fresh removes the old run.

        Raises UserError where the run to go on with is of another LLM.
        """
        if self.before is not None:
            common.check_digests(self.record(), self.folder, self.before)
            if "llm_fingerprint" in self.found:
                before = common.load_options(self.folder, "llm_fingerprint").llm_fingerprint
                common.check_fingerprint(self.found["llm_fingerprint"], before, self.folder, llm_path)
        if self.rank == 0 and self.options.fresh:
            shutil.rmtree(self.folder, ignore_errors=True)
        if self.rank == 0:
            common.make_folder(self.folder)
        common.wait_for_all_ranks()
        self.stop = common.StopSignal()
        if log:
            self.log = Log(self.folder, self.options, self.start, self.rank)

    def after_step(self, step: int, lr: float, terms: dict, stopping: bool, save) -> None:
        """Log this step, counted from 1; save, with save(step, finished), when that is due; leave
        where a rank was asked to stop."""
        self.log(step, lr, terms)
        finished = step == self.options.steps
        due = finished or stopping or step % self.options.save_every == 0
        if due and self.rank == 0:
            save(step, finished)
        if stopping and not finished:
            leave(self.folder, step, self.log)

    def end(self) -> None:
        self.log.close()
        self.stop.leave_if_asked(self.options.device)


def leave(folder: str, step: int, log) -> None:
    """End after a Ctrl-C, with what was saved and how to go on."""
    log.close()
    print(f"\nstopped after step {step}; {folder} is saved: run the same command again to go on")
    sys.exit(130)


class Log:
    """A progress bar and log.jsonl of one stage, a line for 20 steps or fewer, on rank 0 only.

    summed: the terms are shares of the ranks, which are added up; every rank has to call it then.
    """

    def __init__(self, folder: str, options, start: int, rank: int, summed: bool = True):
        from tqdm import tqdm
        self.rank, self.steps, self.begun = rank, options.steps, time.time()
        self.every = max(1, min(20, options.steps // 100))
        self.summed, self.device = summed, options.device
        self.bar = tqdm(total=options.steps, initial=start, desc=os.path.basename(folder),
                        disable=rank > 0, mininterval=2, dynamic_ncols=True, file=sys.stdout)
        if rank == 0:
            self.file = open(f"{folder}/log.jsonl", "a", buffering=1)

    def __call__(self, step: int, lr: float, terms: dict) -> None:
        """terms: {name: detached tensor}, read (and so synchronised) only at the steps logged."""
        self.bar.update(1)
        if step % self.every and step != self.steps:
            return
        values = [float(v) for v in terms.values()]
        if self.summed:
            values = common.sum_over_ranks(values, self.device)
        if self.rank == 0:
            values = {name: float(f"{v:.5g}") for name, v in zip(terms, values)}
            self.bar.set_postfix(values)
            line = {"step": step, "lr": lr, **values, "seconds": round(time.time() - self.begun, 2)}
            self.file.write(json.dumps(line) + "\n")

    def close(self):
        self.bar.close()
