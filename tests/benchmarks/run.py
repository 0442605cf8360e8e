"""Our ways beside the usual ones, taking turns; writes docs/speed.md.

    python tests/benchmarks/run.py                          # a few minutes on two cores
    python tests/benchmarks/run.py --only merged mixed      # prints some of the tables
    python tests/benchmarks/run.py --size base --rounds 3 --rows 16 --instances 1 10 \\
        --only merged reread --out docs/speed.md            # the page's part on T5 v1.1 Base

Models have random weights: --size tiny is the built-in suite's, base T5 v1.1 Base. PEFT and
rouge_score come from tests/requirements.txt. Two benchmarks read Super-NaturalInstructions:
TAGI_DATA names a folder that holds it as `sni`. sizes.py beside this file is about the paper's
model sizes.
"""
import argparse
import inspect
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
from pages import check_replaceable, command_line, paragraph, part, part_of, processor, write
from side_by_side import SHAPES, Section

BENCHMARKS = {  # name -> (heading, function)
    "teachers": ("Training LoRA teachers", training.teachers),
    "finetune": ("A step of finetuning", training.finetune),
    "logits": ("Logits in the losses", training.logits),
    "padding": ("Padding in finetuning's batches", training.padding),
    "merged": ("Decoding with one task merged", decoding.merged),
    "mixed": ("Decoding many tasks in one batch", decoding.mixed),
    "reread": ("Reading the instruction once", decoding.reread),
    "regenerate": ("Generating adapters once", decoding.regenerate),
    "rouge_l": ("ROUGE-L", scoring.rouge_l),
    "ranking": ("Ranking answer choices", scoring.ranking),
}
NAMES = {"tiny": "The built-in suite's T5", "base": "T5 v1.1 Base"}

PAGE = """# Speed

Each table sets a way of this repository beside the usual way to do the same. The ways take turns,
so that whatever else the machine does slows all of them alike, but it does slow them: compare the
relative times within a table, not milliseconds between tables or pages.

- *ms*: the median over the rounds; *middle half*: from the lower to the upper quartile.
- *relative time*, *relative FLOPs*: as shares of the first way of the same case. 0.50 is half.
- *GFLOP*: counted by PyTorch, and so the same on any machine.

All models have random weights, which changes no time. This page is written by
`tests/benchmarks/run.py`, each part by the command line that stands at its top; padding and ROUGE-L
read Super-NaturalInstructions, which the environment variable `TAGI_DATA` names the place of.
"""


def machine(args) -> str:
    if args.device == "cuda":
        return torch.cuda.get_device_name()
    return f"{processor()}, threads: {torch.get_num_threads()}"


def part_text(args, sections) -> str:
    """One size's part of the page."""
    shape = SHAPES[args.size]
    about = paragraph(
        f"On {machine(args)}; torch {torch.__version__}, transformers {transformers.__version__},",
        f"peft {peft.__version__}; {args.rounds} rounds, of slow benchmarks fewer. An instruction",
        f"has {shape.instruction} tokens, one with two demonstrations {shape.with_demos}, an",
        f"instance {shape.instance}, an answer {shape.answer}; LoRA has rank {shape.rank} on the",
        f"projections {shape.targets}.")
    parts = [f"## {NAMES[args.size]}", f"```bash\n{command_line()}\n```", about + "\n"]
    return "\n\n".join(parts) + "\n" + "\n".join(section.markdown() for section in sections)


def write_page(path: Path, size: str, text: str) -> None:
    """Put this size's part into the page; the other size's stays."""
    page = path.read_text(encoding="utf-8") if path.is_file() else ""
    parts = {}
    for name in SHAPES:
        parts[name] = text if name == size else part_of(page, name)
    texts = [part(name, its_text) for name, its_text in parts.items() if its_text is not None]
    write(path, "\n".join([PAGE, *texts]))


def main():
    epilog = ["benchmarks:"]
    for name, (_, benchmark) in BENCHMARKS.items():
        epilog.append(f"  {name:<11} {inspect.getdoc(benchmark).splitlines()[0]}")
    p = argparse.ArgumentParser(description=__doc__, epilog="\n".join(epilog),
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    p.add_argument("--size", default="tiny", choices=SHAPES)
    p.add_argument("--only", choices=BENCHMARKS, nargs="+", metavar="NAME")
    p.add_argument("--rows", type=int, default=64, help="instances in a decoded batch")
    p.add_argument("--instances", type=int, nargs="+", default=[1, 2, 5, 10, 20, 50, 100],
                   help="numbers of instances that `reread` tries")
    p.add_argument("--rounds", type=int, default=9, help="at most; slow benchmarks have fewer")
    p.add_argument("--out", help="default: docs/speed.md; with --only nothing is written")
    args = p.parse_args()
    if args.out:
        check_replaceable(args.out, PAGE.splitlines()[0])
    warnings.simplefilter("ignore")
    if args.size == "tiny":
        # As quickstart.sh trains it. Two threads that wait for each other gain little on a small
        # model, and lose much where the machine has something else to do.
        torch.set_num_threads(1)
    sections = []
    for name in args.only or BENCHMARKS:
        heading, benchmark = BENCHMARKS[name]
        sections.append(Section(heading, benchmark, args.rounds))
        benchmark(sections[-1], args)
    text = part_text(args, sections)
    print("\n" + text)
    out = args.out or (None if args.only else ROOT / "docs" / "speed.md")
    if out:
        write_page(Path(out), args.size, text)


if __name__ == "__main__":
    main()
