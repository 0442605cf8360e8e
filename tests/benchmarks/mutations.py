"""Thousands of damaged files and wrong options, and how each ends; writes docs/bad-input.md.

    python tests/benchmarks/mutations.py --cases 20000
    python tests/benchmarks/mutations.py --only tokenizer.json --seed 17        # one case, with its traceback

The cases are those of tests/mutations_models.py and tests/mutations_data.py, shared out evenly; each is a function of its
seed. They run in processes of their own, so that one that hangs or dies is counted and the next goes on. Faults are printed.
"""
import argparse
import collections
import importlib
import multiprocessing
import random
import resource
import sys
import time
import traceback
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from pages import command_line, paragraph, processor, table

MODULES = ("mutations_models", "mutations_data")
ENDS = ("works", "one line", "traceback", "hang", "crash", "not finite")
MEMORY = 16 << 30               # bytes of addresses that a process may ask for


def kinds() -> dict:
    """{name: function(rng)} of all modules."""
    found = {}
    for name in MODULES:
        if (ROOT / "tests" / f"{name}.py").is_file():
            found |= importlib.import_module(name).KINDS
    return found


def run(function, seed: int) -> tuple[str, str]:
    """(how it ends, what is to be told of it)."""
    from common import UserError
    try:
        function(random.Random(seed))
    except UserError as error:
        text = str(error)
        return ("one line" if len(text) <= 300 and text.isprintable() else "traceback"), text
    except BaseException as error:
        last = traceback.extract_tb(error.__traceback__)[-1]
        end = "not finite" if type(error).__name__ == "NonFinite" else "traceback"
        return end, f"{type(error).__name__}: {str(error)[:100]} ({Path(last.filename).name}, line {last.lineno})"
    return "works", ""


def work(pipe) -> None:
    import torch
    torch.set_num_threads(1)
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    found = kinds()
    with open("/dev/null", "w") as sys.stdout:
        while case := pipe.recv():
            pipe.send(run(found[case[0]], case[1]))


class Worker:
    """A process that runs one case after another, and is replaced when one hangs or kills it."""

    def __init__(self):
        self.case = self.process = None

    def begin(self, case) -> None:
        if self.process is None:
            context = multiprocessing.get_context("spawn")
            self.pipe, theirs = context.Pipe()
            self.process = context.Process(target=work, args=(theirs,), daemon=True)
            self.process.start()
            theirs.close()
            self.begun = time.time() + 60               # imports take a while
        else:
            self.begun = time.time()
        self.case = case
        self.pipe.send(case)

    def end(self, limit: float):
        """(how its case ended, what of it), or None while it runs."""
        if self.pipe.poll(0.01):
            try:
                return self.pipe.recv()
            except EOFError:
                self.process.join()
                told = "crash", f"exit code {self.process.exitcode}"
                self.process = None
                return told
        if time.time() - self.begun > limit:
            self.process.kill()
            self.process = None
            return "hang", f"over {limit:g} seconds"
        return None


def count(names: list[str], options) -> dict:
    """{name: {end: how many}} of --cases of these kinds in turn, or of those that --minutes are enough for."""
    counts = {name: collections.Counter() for name in names}
    cases = iter([(names[n % len(names)], options.seed + n // len(names)) for n in range(options.cases)])
    workers, until = [Worker() for _ in range(options.jobs)], time.time() + 60 * options.minutes
    told, done = set(), False
    while not done or any(worker.case for worker in workers):
        for worker in workers:
            if worker.case is not None:
                ended = worker.end(options.limit)
                if ended is None:
                    continue
                (name, seed), worker.case = worker.case, None
                counts[name][ended[0]] += 1
                if ended[0] not in ENDS[:2] and (name, ended) not in told:
                    told.add((name, ended))
                    print(f"{name}, seed {seed}: {ended[0]}, {ended[1]}", flush=True)
            case = next(cases, None) if time.time() < until else None
            done = case is None
            if case:
                worker.begin(case)
    return counts


def page(counts: dict, seconds: float) -> str:
    rows, total = [], collections.Counter()
    for name, ends in counts.items():
        rows.append({"case": name, "cases": str(ends.total()), **{end: str(ends[end]) for end in ENDS}})
        total += ends
    rows.append({"case": "**all**", "cases": f"**{total.total()}**", **{end: f"**{total[end]}**" for end in ENDS}})
    text = paragraph(
        "Valid files, each with one random change – a key deleted, renamed or there twice, a value of another type or size, bytes cut,",
        "flipped or in another encoding, nested deeply –, and options with random values, given to what reads them. A case may work or end",
        "in one line of at most 300 characters (exit code 2 of the scripts); anything else is a fault: a traceback, no end within",
        "the time limit (hang), a process that dies (crash), a result that is not finite.")
    return (f"# Bad input\n\n{text}\n\n{table(rows)}\n\n"
            + paragraph(f"Written by `{command_line()}` in {seconds / 60:.0f} minutes on {processor()}.") + "\n")


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--cases", type=int, default=20_000)
    p.add_argument("--only", nargs="+", metavar="KIND", help="these kinds alone, and no page is written")
    p.add_argument("--seed", type=int, help="of the first case; with one kind in --only, of the only one")
    p.add_argument("--jobs", type=int, default=2, help="processes")
    p.add_argument("--limit", type=float, default=30, help="seconds after which a case hangs")
    p.add_argument("--minutes", type=float, default=1e6, help="no case is begun after these")
    p.add_argument("--out", default="docs/bad-input.md")
    options = p.parse_args()
    found = kinds()
    if options.only and options.seed is not None:
        for name in options.only:
            found[name](random.Random(options.seed))
        return
    options.seed = options.seed or 0
    begun = time.time()
    counts = count(options.only or list(found), options)
    text = page(counts, time.time() - begun)
    print(text)
    if not options.only:
        (ROOT / options.out).write_text(text)
    sys.exit(any(ends[end] for ends in counts.values() for end in ENDS[2:]))


if __name__ == "__main__":
    main()
