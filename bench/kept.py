"""Where an evaluation's files are kept: its folder, and what one process or several predicted.

Rank 0 appends to predictions.jsonl, every other rank to a file of its own beside it. At the end,
and where an evaluation is gone on with, by however many processes, rank 0 puts them together. Only
files that an evaluation wrote are replaced, and none is lost: they are set aside under a number.
"""
import contextlib
import fcntl
import glob
import itertools
import json
import os
import sys

import common
from bench import machine, predictions, report
from bench.records import read_json, read_json_lines
from bench.report import say, write_file
from bench.watch import Watch
from common import UserError

# What an evaluation asks, of its `predictions.sources_of` -> how that is told. Another question's
# results have a folder of their own; the same question's, asked of new weights, replace the old.
QUESTION = {"bench": "bench", "split": "split", "tasks": "tasks or instances", "model": "model",
            "precision": "precision", "max_input": "limit of inputs",
            "max_output": "limit of outputs", "normalize": "rule of ranking"}
# A file that tells by these keys that this program wrote it -> what was written with it.
MARKS = {
    "config.yaml": ({"sources", "versions"}, ["predictions.jsonl"]),
    "results.json": ({"bench", "results", "versions"}, ["results.md", "categories.png"]),
    "probe.json": ({"bench", "rows", "versions"}, ["probe.md", "similarity.png"]),
}
RESULTS = ["results.json", *MARKS["results.json"][1]]
PROBE = ["probe.json", *MARKS["probe.json"][1]]
OTHER = "choose another --out"

# -------------------------------------------------------------------------------------- its folder


def place(base: str, sources: dict, rank: int = 0) -> str:
    """The folder of the evaluation with these sources: `base`, or base-2, … for other questions."""
    differs = []
    for n in itertools.count(1):
        folder = base if n == 1 else f"{base}-{n}"
        before = read_mark(f"{folder}/config.yaml").get("sources") or {}
        others = [key for key in QUESTION if key in sources and
                  before.get(key, sources[key]) != sources[key]]
        if not others:
            break
        differs = differs or [QUESTION[key] for key in others]
    if differs and rank == 0:
        say(f"{base} holds an evaluation with another {', '.join(differs)}: this one is kept in "
            f"{folder}")
    return folder


def read_mark(path: str) -> dict:
    """What a file of MARKS holds; {} where it is not there, or none of ours."""
    keys = MARKS[os.path.basename(path)][0]
    with contextlib.suppress(UserError):
        if os.path.isfile(path):
            record = common.read_yaml(path, "") if path.endswith("yaml") else read_json(path, "")
            if isinstance(record, dict) and keys <= record.keys():
                return record
    return {}


def check_ours(folder: str, marks=tuple(MARKS)) -> None:
    """Raises UserError where a file that would be replaced was not written by an evaluation."""
    for mark in marks:
        others = MARKS[mark][1]
        there = [name for name in (mark, *others) if os.path.lexists(f"{folder}/{name}")]
        if there and not read_mark(f"{folder}/{mark}"):
            raise UserError(f"{folder}/{there[0]} was not written by an evaluation, and is not "
                            f"replaced; {OTHER}")


@contextlib.contextmanager
def lock(folder: str):
    """Within: no other run is at work in this folder, which is made. It ends with the process."""
    common.make_folder(folder)
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        raise UserError(f"another run is at work in {folder}; wait for it, or {OTHER}") from None
    try:
        yield
    finally:
        os.close(descriptor)


def set_aside(folder: str, names: list[str], why: str) -> None:
    """Rename those of these files that are there: results.md.1, all with one free number."""
    there = [name for name in names if os.path.isfile(f"{folder}/{name}")]
    if not there:
        return
    n = next(n for n in itertools.count(1)
             if not any(os.path.lexists(f"{folder}/{name}.{n}") for name in names))
    for name in there:
        with common.named_file(f"{folder}/{name}", OTHER, "renamed"):
            os.replace(f"{folder}/{name}", f"{folder}/{name}.{n}")
    say(f"{folder}: {why} is kept there as {', '.join(f'{name}.{n}' for name in there)}")


def earlier_results(folder: str) -> dict:
    """What results.json holds there of the same question: `Kept` set others aside; or {}."""
    found = read_mark(f"{folder}/results.json")
    if found.get("split") == "rescored":
        set_aside(folder, RESULTS, "what was rescored there")
        return {}
    return found


def rescore(options) -> None:
    """Score predictions that are there, and print and write the results, into --out if given."""
    results = predictions.rescore(options.rescore, options.references, options.bench)
    if not options.out:
        return say(report.tables(results))
    results["rescored"] = [options.bench, *map(os.path.realpath, filter(None, (
        options.rescore, options.references)))]
    with lock(options.out):
        check_ours(options.out, ["results.json"])
        if read_mark(f"{options.out}/results.json").get("rescored") != results["rescored"]:
            set_aside(options.out, RESULTS, "what was scored there before")
        report.write(results, options.out)
    say(f"{report.tables(results)}\n\nsaved in {options.out}: results.md, results.json")


# --------------------------------------------------------------------------------- its predictions

class Kept:
    """An evaluation's predictions in its folder, where no other run is at work meanwhile.

    done: {(row, demos, task, id): record} of what the same models predicted on the same data.
    options, with out, the folder; sources: what the predictions depend on. Raises UserError where
    another run is at work there, files there are not an evaluation's, and ranks read other things.
    """

    def __init__(self, options, sources: dict, rank: int = 0, world: int = 1):
        self.options, self.sources, self.rank, self.world = options, sources, rank, world
        self.out, self.path = options.out, f"{options.out}/predictions.jsonl"
        self.own = f"{self.out}/predictions.rank{rank}.jsonl" if rank else self.path
        self.context = contextlib.ExitStack()

    def __enter__(self):
        with self.context:                      # closes what is open where the rest of it fails
            self._compare_ranks()
            if self.rank == 0:
                self.context.enter_context(lock(self.out))
                self._prepare()
            common.wait_for_all_ranks()
            self.done = read_predictions(self.path)
            common.wait_for_all_ranks()         # before rank 0 appends
            with common.named_file(self.own, OTHER, "written"):
                self.file = self.context.enter_context(open(self.own, "ab", buffering=0))
            self.watch = Watch(self.out, self.rank, self.world, self.options.timeout)
            self.context.callback(self.watch.end)
            self.context = self.context.pop_all()
        return self

    def __exit__(self, *error):
        self.context.close()

    def _compare_ranks(self) -> None:
        """Raises UserError where the ranks read different things."""
        for rank, key, _ in common.differences(self.sources):
            raise UserError(f"rank {rank} has another {QUESTION.get(key, key)} than rank "
                            f"{self.rank}; give all the same options, data and models")

    def _prepare(self) -> None:
        """Put leftovers of several processes together; set aside what other models predicted."""
        check_ours(self.out)
        mark = read_mark(f"{self.out}/config.yaml")
        before, fresh = mark.get("sources") or {}, self.options.fresh
        if machine.is_started_again() and machine.is_of_this_launch(mark):
            fresh = False                       # it did start over, the first time
        others = [key for key, mark in self.sources.items() if before.get(key, mark) != mark]
        if fresh or others:
            told = ", ".join(QUESTION.get(key, key) for key in others)
            names = ["predictions.jsonl", *map(os.path.basename, self._ranks_files())]
            set_aside(self.out, [*names, *RESULTS, *PROBE],
                      f"what was there, of another {told}," if others else "what was there")
        else:
            self._join_ranks()
            self.sources = before | self.sources
        record = {**vars(self.options), "command": machine.command_line(),
                  "launch": machine.launch(),
                  "sources": self.sources, "versions": machine.versions()}
        with common.named_file(f"{self.out}/config.yaml", OTHER, "written"):
            common.write_yaml(f"{self.out}/config.yaml", record)

    def _ranks_files(self) -> list[str]:
        return sorted(glob.glob(f"{glob.escape(self.out)}/predictions.rank*.jsonl"))

    def _join_ranks(self, order=()) -> dict:
        """Put all ranks' files together in predictions.jsonl: these keys' records, after others."""
        files, records = self._ranks_files(), read_predictions(self.path)
        before, wanted = list(records), set(order)
        for file in files:
            records = read_predictions(file) | records
        if lost := wanted - records.keys():
            raise UserError(f"{len(lost)} predictions of other processes are not in {self.out}; "
                            "start all of them where they see the same folder")
        keys = [key for key in records if key not in wanted] + list(order)
        if keys != before:
            write_file(self.path, "".join(json.dumps(records[key]) + "\n" for key in keys))
        for file in files:
            os.unlink(file)
        return records

    def tell(self, keys: list[tuple]) -> None:
        """Say, on rank 0, how much there is to be predicted."""
        todo = sum(key not in self.done for key in keys)
        if self.rank == 0:
            say(f"{self.out}: {todo} of {len(keys)} answers are to be made, by {self.world} "
                f"process{'es' if self.world > 1 else ''}")

    def append(self, records: list[dict]) -> None:
        """Write a batch's predictions: they are in the file when this returns."""
        text = "".join(json.dumps(record) + "\n" for record in records).encode()
        remedy = f"make room, and {machine.again()} to go on"
        with common.named_file(self.own, remedy, "written"):
            while text:                         # a full disk takes a part of it
                text = text[self.file.write(text):]
        for record in records:
            self.done[key_of(record)] = record
        common.progress += 1                    # so Watch sees that this rank is at work
        self.leave_if_asked()

    def leave_if_asked(self) -> None:
        if common.stop.asked:                   # another rank was, or the launcher is gone
            raise KeyboardInterrupt

    def gather(self, keys: list[tuple]) -> bool:
        """Wait for all ranks. On rank 0, where this is True, `done` then has all of these keys."""
        self.watch.wait_for_all()
        self.leave_if_asked()
        self.watch.end()
        self.file.close()
        if self.rank == 0:
            self.done = self._join_ranks(keys)
        return self.rank == 0

    def records(self, row: str, demos: int, tasks) -> list[dict]:
        """What a row answered to these tasks, in their order, once `gather` has all of it."""
        records = []
        for task in tasks:
            for x in task.instances:
                text = self.done[row, demos, task.name, x.id]["prediction"]
                records.append(predictions.record_of(self.options.bench, row, demos, task, x, text))
        return records


@contextlib.contextmanager
def stoppable(options, rank: int):
    """Within: Ctrl-C and SIGTERM end it at once, with a word on going on and exit code 130."""
    common.stop.at_once = True
    try:
        if common.stop.asked:
            raise KeyboardInterrupt
        yield
    except KeyboardInterrupt:
        common.stop.at_once, common.stop.asked = False, 1       # another one changes nothing
        if rank == 0:
            kept = "nothing was predicted yet"
            if options.out and os.path.isfile(f"{options.out}/predictions.jsonl"):
                kept = f"what was predicted is in {options.out}"
            say(f"\nstopped; {kept}: {machine.again()} to go on")
        sys.exit(130)


def key_of(record: dict) -> tuple:
    return record["row"], record["demos"], record["task"], record["id"]


def read_predictions(path: str) -> dict:
    """{(row, demos, task, id): record} of a file, if it is there; a last line cut off goes."""
    if not os.path.isfile(path):
        return {}
    with common.named_file(path, OTHER), open(path, "rb+") as f:
        f.truncate(f.read().rfind(b"\n") + 1)
    if not os.path.getsize(path):
        return {}
    lines = read_json_lines(path, "start over with --fresh", row=str, demos=int, task=str, id=str,
                            prediction=str)
    return {key_of(record): record for record in lines}
