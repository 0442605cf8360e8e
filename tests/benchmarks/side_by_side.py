"""What the benchmarks share: ways that take turns, their tables, models of random weights."""
import inspect
import weakref
from typing import NamedTuple
from unittest import mock

import numpy as np
import torch
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from torch.utils.weak import WeakIdKeyDictionary

import common
import lora
import t5
import train_hyper
from bench.cost import count_flops, timed
from hypernet import TAGI
from pages import table
from random_t5 import random_t5


class Shape(NamedTuple):
    instruction: int        # tokens of an instruction,
    with_demos: int         # of one with two demonstrations,
    instance: int           # of an instance,
    answer: int             # of an answer
    rank: int
    alpha: int
    targets: str


SHAPES = {
    "tiny": Shape(24, 74, 19, 4, 8, 8, "q,k,v,o"),      # the built-in suite's means and settings
    "base": Shape(130, 400, 130, 12, 32, 32, "q,v"),    # T5 v1.1 Base on Super-NaturalInstructions
}
PIECES = 1965                                           # in the tokenizer of the built-in suite


class Section:
    """One benchmark's part of the page: a heading, its docstring, a table, notes."""

    def __init__(self, heading: str, benchmark, rounds: int):
        self.heading, self.text, self.rounds = heading, inspect.getdoc(benchmark), rounds
        self.rows = []                                  # dicts, {column's title: text}
        self.notes = []

    def compare(self, case: str, ways: dict, rounds: int | None = None, count: bool = True,
                show: bool = True) -> dict:
        """Run the ways, {name: function}, in turns; returns {name: median seconds}.

        The first way is what the others' times and FLOPs are relative to. Each runs once to count
        its FLOPs, which also warms up, then in as many rounds as asked for, at most `rounds`.
        """
        flops, seconds = {}, {way: [] for way in ways}
        for way, run in ways.items():
            if count:
                flops[way] = count_flops(run)
            else:
                run()
        for _ in range(min(self.rounds, rounds or self.rounds)):
            for way, run in ways.items():
                seconds[way].append(timed(run))
        first = next(iter(ways))
        medians = {way: float(np.median(x)) for way, x in seconds.items()}
        for way in ways:
            low, high = 1000 * np.quantile(seconds[way], (0.25, 0.75))
            row = {"case": case, "way": way, "ms": f"{1000 * medians[way]:.1f}",
                   "middle half": f"{low:.1f} – {high:.1f}",
                   "relative time": f"{medians[way] / medians[first]:.2f}"}
            if count:
                row["GFLOP"] = f"{flops[way] / 1e9:.3g}"
                row["relative FLOPs"] = f"{flops[way] / flops[first]:.2f}"
            print(f"{case}: {way}: {row['ms']} ms, {row['relative time']} x", flush=True)
            if show:
                self.rows.append(row)
        return medians

    def add_column(self, title: str, texts: dict) -> None:
        """One more column in the rows of the last comparison; texts: {way: text}."""
        for row in self.rows[-len(texts):]:
            row[title] = texts[row["way"]]

    def markdown(self) -> str:
        parts = [f"### {self.heading}", self.text]
        if self.rows:
            parts.append(table(self.rows))
        return "\n\n".join(parts + self.notes) + "\n"


class PeakMemory(TorchDispatchMode):
    """Within: bytes of all tensors that operators made and that are in use, now and at most.

    `live` and `peak`. Tensors of FakeTensorMode count as if they were real, and so does what
    fully_shard empties and fills again. What an operator needs only while it runs is not seen.
    """

    def __init__(self):
        super().__init__()
        self.live = self.peak = 0
        self.seen = WeakIdKeyDictionary()       # storage -> [its bytes]

    def __enter__(self):
        resize, peak = torch.UntypedStorage.resize_, self

        def resize_(storage, size):
            resize(storage, size)
            if storage in peak.seen:
                peak.change(peak.seen[storage], size)

        self.patch = mock.patch.object(torch.UntypedStorage, "resize_", resize_)
        self.patch.start()
        return super().__enter__()

    def __exit__(self, *error):
        self.patch.stop()
        return super().__exit__(*error)

    def change(self, its, size):
        self.live += size - its[0]
        its[0] = size
        self.peak = max(self.peak, self.live)

    def add(self, tensor):
        if isinstance(tensor, DTensor):         # its rows here are a tensor of their own
            return
        storage = tensor.untyped_storage()
        if storage not in self.seen:
            self.seen[storage] = its = [0]
            self.change(its, storage.nbytes())
            weakref.finalize(storage, self.change, its, 0)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **kwargs or {})
        tree_map_only(torch.Tensor, self.add, out)
        return out


# --------------------------------------------------------------------------------------- models

def no_config():
    """Within: a script's options are its own defaults, without a config file."""
    return mock.patch.object(common, "read_yaml", lambda *args: {})


def lora_flags(args) -> list[str]:
    shape = SHAPES[args.size]
    return [f"--device={args.device}", f"--rank={shape.rank}", f"--alpha={shape.alpha}",
            f"--targets={shape.targets}"]


def make_tagi(args, *flags) -> TAGI:
    """A student of random weights, its B not zero, as train_hyper.py would make it."""
    with no_config():
        options = train_hyper.get_options(["--stage=finetune", *lora_flags(args), *flags])
    tagi = TAGI(make_llm(args), None, options)
    with torch.no_grad():
        for p in tagi.trainable().values():
            p += 0.01 * torch.randn_like(p)
    return tagi


def make_llm(args):
    """A frozen LLM of random weights, in bf16 on a GPU."""
    if args.size == "tiny":
        llm = t5.tiny_t5(PIECES, seed=0)
        llm.set_attn_implementation("eager")            # as configs/sample.yaml has it
    else:
        llm = random_t5(args.size)
    llm.to(args.device).eval().requires_grad_(False)
    return llm.to(torch.bfloat16) if args.device == "cuda" else llm


def tokens(args, n, length):
    """(ids, mask), both (n, length), of random tokens."""
    ids = torch.randint(3, 400, (n, length), device=args.device)
    return ids, torch.ones_like(ids)


@torch.no_grad()
def adapt(tagi, ids, mask):
    return tagi.generate_adapter(*tagi.encode_instruction(ids, mask), mask)


def random_teachers(tagi, n):
    """The stacked weights of n LoRA teachers, their B not zero."""
    stacked = lora.init_weights(tagi.llm, tagi.options.rank, 0, n)
    return {site: (A, 0.01 * torch.randn_like(B)) for site, (A, B) in stacked.items()}
