"""Our ways beside the usual ones, in one run, taking turns: python tests/benchmarks/run.py [--device cuda] [--only NAME ...]

    teachers     16 LoRA teachers in one batch               against PEFT's get_peft_model, one teacher after another
    finetune     a step with all three losses                against a LoRA step with the instruction in the input
    logits       the losses' logits in chunks                against all at once
    compiling    a training step by torch.compile            against without (on a CPU it needs a C++ compiler)
    padding      finetuning's batches sorted by length       against as they are drawn (TAGI_DATA)
    merged       decoding with one task merged               against plain T5
    mixed        a batch of 16 tasks, each its own adapter   against plain T5, and PEFT's adapter_names=
    reread       n instances by a generated adapter          against the instruction in every input
    regenerate   adapters generated once                     against anew at every decoding step and layer
    rouge_l      our ROUGE-L                                 against Google's rouge_score (TAGI_DATA)
    ranking      one encoder pass a row                      against one a choice

Models have random weights: --size tiny is the built-in suite's but for 593 words, base T5 v1.1 Base; `logits` has layers of its
own, `ranking` a model of its own, `rouge_l` runs on the CPU. Times are medians and the middle half of the rounds, after one of
warm-up; FLOPs are counted by PyTorch; both columns with an x are relative to the benchmark's first way. MB at the peak are of
the tensors that the step makes, without the model.
PEFT and rouge_score come from tests/requirements.txt. sizes.py beside this file is about the paper's model sizes.
"""
import argparse
import os
import platform
import sys
import warnings
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import peft
import torch
import transformers

import decoding
import scoring
import training
from side_by_side import HEAD, SHAPES

BENCHMARKS = {f.__name__: f for f in (
    training.teachers, training.finetune, training.logits, training.compiling, training.padding, decoding.merged, decoding.mixed,
    decoding.reread, decoding.regenerate, scoring.rouge_l, scoring.ranking)}


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    p.add_argument("--size", default="tiny", choices=SHAPES)
    p.add_argument("--only", choices=BENCHMARKS, nargs="+", default=list(BENCHMARKS), metavar="NAME")
    p.add_argument("--rows", type=int, default=64, help="instances in a decoded batch")
    p.add_argument("--instances", type=int, nargs="+", default=[1, 2, 5, 10, 20, 50, 100], help="n of `reread`")
    p.add_argument("--rounds", type=int, default=31)
    args = p.parse_args()
    warnings.simplefilter("ignore")
    where = torch.cuda.get_device_name() if args.device == "cuda" else f"{os.cpu_count()} {platform.machine()} cores, " \
        f"{torch.get_num_threads()} threads"
    S, D, T, C, rank, _, targets = SHAPES[args.size]
    print(f"{args.size}: tokens of instruction {S}, with demonstrations {D}, instance {T}, answer {C}; rank {rank} on {targets}; "
          f"{where}, torch {torch.__version__}, transformers {transformers.__version__}, peft {peft.__version__}\n\n{HEAD}",
          flush=True)
    for name in args.only:
        BENCHMARKS[name](args)


if __name__ == "__main__":
    main()
