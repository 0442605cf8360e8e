"""What every benchmark shares: ways that take turns, the table's lines, models of random weights."""
import statistics
import weakref
from unittest import mock

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from torch.utils.flop_counter import FlopCounterMode
from torch.utils.weak import WeakIdKeyDictionary

import common
import config
import lora
import train_hyper
from cost import timed
from hypernet import TAGI
from random_t5 import random_t5

SHAPES = {  # tokens of: an instruction, one with two demonstrations, an instance, an answer; LoRA rank, alpha, targets
    "tiny": (27, 85, 22, 5, 8, 8, "q,k,v,o"),
    "base": (130, 400, 130, 12, 32, 32, "q,v"),
}
HEAD = "| benchmark | way | ms, median | middle half | time | GFLOP | FLOPs |\n|---|---|--:|--:|--:|--:|--:|"


def compare(name: str, args, ways: dict, rounds: int | None = None, count: bool = True, show: bool = True) -> dict:
    """Print a line for every way, {name: function}; the first is the one that times and FLOPs are relative to.

    FLOPs are counted in a round of its own; another warms up; in `rounds` more the ways take turns and are timed. Returns
    {way: median seconds}.
    """
    seconds, flops = {way: [] for way in ways}, {}
    for way, run in ways.items() if count else ():  # the counter does not know a CPU's flash attention
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
            run()
        flops[way] = counter.get_total_flops()
    for n in range(1 + (rounds or args.rounds)):
        for way, run in ways.items():
            seconds[way] += [timed(run)] * (n > 0)
    medians, first = {way: statistics.median(x) for way, x in seconds.items()}, next(iter(ways))
    for way, x in seconds.items():
        low, _, high = statistics.quantiles(x, n=4)
        cost = f"{flops[way] / 1e9:.3g} | {flops[way] / flops[first]:.2f}x" if count else " | "
        if show:
            say(f"| {name} | {way} | {1000 * medians[way]:.1f} | {1000 * low:.1f} – {1000 * high:.1f} | "
                f"{medians[way] / medians[first]:.2f}x | {cost} |")
    return medians


def note(name: str, text: str) -> None:
    say(f"| {name} | {text} | | | | | |")


def say(line: str) -> None:
    print(line, flush=True)


class PeakMemory(TorchDispatchMode):
    """Within: the bytes of all tensors that operators made and that are still in use, now (`live`) and at most (`peak`).

    Tensors of FakeTensorMode count as if they were real. What an operator needs only while it runs is not seen.
    """

    def __init__(self):
        super().__init__()
        self.live = self.peak = 0
        self.seen = WeakIdKeyDictionary()

    def add(self, tensor):
        storage = tensor.untyped_storage()
        if storage not in self.seen:
            self.seen[storage] = size = storage.nbytes()
            self.live += size
            self.peak = max(self.peak, self.live)
            weakref.finalize(storage, self.free, size)

    def free(self, size):
        self.live -= size

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **kwargs or {})
        tree_map_only(torch.Tensor, self.add, out)
        return out


# ------------------------------------------------------------------------------------------------------------- models

def parse(parser, section, *flags):
    """A script's options with its own defaults and these flags, without a config file."""
    with mock.patch.object(common, "read_yaml", lambda *args: {}):
        return config.parse(parser, section, [f"--stage={section}", *flags])


def make_tagi(args, *flags) -> TAGI:
    """A student of random weights, its B not zero, as train_hyper.py would make it."""
    *_, rank, alpha, targets = SHAPES[args.size]
    options = parse(train_hyper.parser(), "finetune", f"--device={args.device}", f"--rank={rank}", f"--alpha={alpha}",
                    f"--targets={targets}", *flags)
    train_hyper.settle(options)
    tagi = TAGI(make_llm(args), None, options)
    with torch.no_grad():
        for p in tagi.trainable().values():
            p += 0.01 * torch.randn_like(p)
    return tagi


def make_llm(args):
    llm = random_t5(args.size).to(args.device).eval().requires_grad_(False)
    if args.size == "tiny":
        llm.set_attn_implementation("eager")        # as configs/sample.yaml has it
    return llm.to(torch.bfloat16) if args.device == "cuda" else llm


def tokens(args, n, length):
    ids = torch.randint(3, 400, (n, length), device=args.device)
    return ids, torch.ones_like(ids)


@torch.no_grad()
def adapt(tagi, ids, mask):
    return tagi.generate_adapter(*tagi.encode_instruction(ids, mask), mask)


def random_teachers(tagi, n):
    """LoRA teachers of n units, their B not zero."""
    stacked = lora.init_weights(tagi.llm, tagi.options.rank, 0, n)
    return {site: (A, 0.01 * torch.randn_like(B)) for site, (A, B) in stacked.items()}
