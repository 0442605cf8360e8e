"""Options of the scripts: the command line over a YAML file over the defaults, one set of types and error lines for all."""
import argparse
import difflib
import math
import os
import sys

import torch

import common

# What a config file may hold beside options.
SECTIONS = ("base", "meta", "lora", "lora_all", "pretrain", "finetune", "evaluate")


class Parser(argparse.ArgumentParser):
    where = ""                                  # the file whose values are being parsed, for the error line

    def __init__(self, doc):
        super().__init__(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)

    def error(self, message):
        raise common.UserError(f"{self.where}{message} (--help lists the options)")

    def known(self):
        return {s[2:] for a in self._actions for s in a.option_strings if s.startswith("--") and s != "--help"}


def at_least(least, kind=int):
    """The type of an option: a number no smaller than `least`."""
    def number(text):
        value = kind(text)
        if value < least:
            raise argparse.ArgumentTypeError(f"must be at least {least}, not {text}")
        return value
    return number


def finite(text):
    """The type of an option: a number that is one, no NaN and no infinity."""
    value = float(text)
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"must be a finite number, not {text}")
    return value


def share(text):
    """The type of an option: a number from 0 to 1."""
    value = finite(text)
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"must be from 0 to 1, not {text}")
    return value


def below_1(text):
    """The type of an option: a number from 0 to 1, but not 1."""
    value = share(text)
    if value == 1:
        raise argparse.ArgumentTypeError("must be below 1")
    return value


positive = at_least(1)
flag = {"action": argparse.BooleanOptionalAction}                           # --x and --no-x


def add_shared_options(parser: Parser) -> None:
    """The options that every script has and that may stand at the top level of a config file."""
    g = parser.add_argument_group("run")
    g.add_argument("--config", default="configs/sample.yaml", help="YAML file of options; the command line goes before it")
    g.add_argument("--runs", default="runs/sample", help="folder that holds one folder per stage")
    g.add_argument("--seed", type=at_least(0), default=0)
    g.add_argument("--device", default="auto", choices=["auto", "cpu", "cuda"])
    g.add_argument("--precision", default="fp32", choices=["fp32", "bf16"], help="bf16: frozen LLM in bf16, autocast")
    g.add_argument("--threads", type=at_least(0), default=0, help="CPU threads; 0: PyTorch's default")
    g.add_argument("--fresh", default=False, help="start over instead of resuming or skipping what is done", **flag)
    g.add_argument("--stages", default="base,meta,lora", help="train_teacher.py's stages, in order")
    g = parser.add_argument_group("data")
    g.add_argument("--data", default=common.SUITE, help="a folder in Super-NaturalInstructions' layout, or with P3's data")
    g.add_argument("--format", default="sni", choices=["sni", "p3"], help="what --data holds, and how texts are written")
    g.add_argument("--p3-input", default="fields", choices=["fields", "prompt"], help="what the student reads of a row: the "
                   "fields that the prompt shows, or the rendered prompt")
    g.add_argument("--max-instances", type=positive, default=100, help="instances per training task")
    g.add_argument("--categories", type=at_least(0), default=0,
                   help="train on the N categories with most tasks (the paper: 6, 15, 30, 60); 0: on all")
    g.add_argument("--allow-missing", default=False, help="go on without the tasks of a split whose files are absent", **flag)
    g.add_argument("--demos", default="0", choices=["0", "2", "mixed"],
                   help="demonstrations beside the definition; mixed: 2 in every other step, drawn, else 0")
    g.add_argument("--vary-demos", default=False, help="train with demonstrations drawn from the task's instances instead "
                   "of its first positive examples", **flag)
    g.add_argument("--max-instruction", type=positive, default=1024, help="tokens of an instruction with demonstrations")
    g.add_argument("--max-input", type=positive, default=1024, help="tokens of an input, with instruction where it is read")
    g.add_argument("--max-output", type=positive, default=128, help="tokens of an output")
    g = parser.add_argument_group("models")
    g.add_argument("--model", default="tiny", help="a T5-family checkpoint (T5, ByT5, mT5, umT5, LongT5) by name or "
                   "folder, or `tiny`: trained here")
    g.add_argument("--attention", default="sdpa", choices=["sdpa", "eager"], help="Transformers' attention code in the LLM; "
                   "eager is faster for short texts on a CPU, and LongT5 has no other")
    g.add_argument("--llm", default="meta", help="the frozen LLM under teachers and student: base (--model itself), "
                   "meta (after train_teacher.py --stage meta) or a checkpoint")
    g.add_argument("--meta-model", help="a checkpoint that is meta-trained already, such as a Tk-Instruct, instead of the "
                   "stage meta's")
    g.add_argument("--targets", default="q,v", help="projections with LoRA, of q,k,v,o,wi,wi_0,wi_1,wo")
    g.add_argument("--rank", type=positive, default=32, help="LoRA rank r")
    g.add_argument("--alpha", type=finite, default=32.0, help="LoRA alpha; the update is scaled by alpha / r")
    g.add_argument("--unit", default="category", choices=["category", "task", "all"], help="what one LoRA teacher is for")


def add_training_options(parser: Parser, steps: int) -> None:
    g = parser.add_argument_group("training")
    g.add_argument("--steps", type=positive, default=steps)
    g.add_argument("--tasks", type=positive, default=8, help="tasks in a micro-batch of one rank")
    g.add_argument("--instances", type=positive, default=1, help="instances of each of these tasks")
    g.add_argument("--balance", default="tasks", choices=["tasks", "categories"],
                   help="categories: each is drawn as often as any other, whatever its number of tasks (lora-all, finetune)")
    g.add_argument("--accumulate", type=positive, default=1, help="micro-batches per step and rank")
    g.add_argument("--bucket-steps", type=at_least(0), default=0, help="sort the texts of so many steps by length and deal them "
                   "out again, for less padding; 1: each step's own into its micro-batches; 0: as drawn")
    g.add_argument("--optimizer", default="adamw", choices=["adamw", "adafactor", "muon"],
                   help="muon: Muon for matrices, AdamW for the rest; far fewer steps for a model made from nothing")
    g.add_argument("--lr", type=at_least(0, finite), default=1e-4)
    g.add_argument("--schedule", default="linear", choices=["linear", "cosine", "constant"])
    g.add_argument("--warmup", type=share, default=0.02, help="share of the steps")
    g.add_argument("--restart", type=below_1, default=0,
                   help="share of the steps after which the schedule starts anew")
    g.add_argument("--weight-decay", type=at_least(0, finite), default=0.01)
    g.add_argument("--beta2", type=below_1, default=0.999)
    g.add_argument("--clip", type=at_least(0, finite), default=1.0,
                   help="largest gradient norm; 0: no clipping (stage lora has none)")
    g.add_argument("--checkpointing", default=False, help="gradient checkpointing: each block of the LLM runs again in the "
                   "backward pass, for less memory", **flag)
    g.add_argument("--save-every", type=positive, default=1000, help="steps between checkpoints")
    g.add_argument("--log-every", type=positive, default=20)


def parse(parser: Parser, section: str, argv=None) -> argparse.Namespace:
    """Options of one stage: the command line, before the config's section, before its top level, before the defaults.

    The file's values become words of a command line, so they pass through the same types and choices.
    """
    argv = sys.argv[1:] if argv is None else argv
    early, rest = parser.parse_known_args(argv)                             # --help, the line's own mistakes, which config
    if rest:
        name = rest[0].partition("=")[0].lstrip("-")
        raise common.UserError(f"unknown option {rest[0]}" + closest(name, parser.known(), "--"))
    config, top = common.read_yaml(early.config, "name an existing config with --config"), Parser("")
    add_shared_options(top)
    if early.config == parser.get_default("config"):                        # a checkpoint knows its data, models, limits
        config = recorded(getattr(early, "checkpoint", None), top.known()) or config
    for name in SECTIONS:
        if not isinstance(config.setdefault(name, None) or {}, dict):
            raise common.UserError(f"{early.config}: {name} is a stage's section; expected `key: value` lines below it")
    options = argparse.Namespace()
    for where, values, allowed in (
            (early.config, {k: v for k, v in config.items() if k not in SECTIONS}, top.known()),
            (f"{early.config}, {section}", config[section] or {}, parser.known())):
        parser.where = where + ": "
        parser.parse_args(words_of(values, allowed, parser.where), options)
    parser.where = ""
    parser.parse_args(argv, options)
    if options.device == "cuda" and not torch.cuda.is_available():
        raise common.UserError("--device cuda: PyTorch finds no GPU here; use --device cpu or auto")
    if options.device == "auto":
        options.device = "cuda" if torch.cuda.is_available() else "cpu"
    if options.threads:
        torch.set_num_threads(options.threads)
    if "text" in options and options.text is None:
        options.text = os.path.join(options.data, "corpus.txt")
    return options


def recorded(checkpoint: str | None, known: set) -> dict:
    """The shared options that a checkpoint's run had, but for what is not about its result; {} where there is none."""
    if checkpoint is None or not os.path.isfile(f"{checkpoint}/config.yaml"):
        return {}
    record = vars(common.load_options(checkpoint))
    own = {key: value for key, value in record.items()
           if key.replace("_", "-") in known and key not in ("fresh", "device", "threads", "seed")}
    return own | {"runs": os.path.normpath(f"{checkpoint}/..")}     # where it is now, moved or not


def words_of(values: dict, allowed: set, where: str) -> list[str]:
    """A file's keys and values as words of a command line."""
    words = []
    for key, value in values.items():
        name = str(key).replace("_", "-")
        if name not in allowed:
            raise common.UserError(f"{where}unknown key '{key}'" + closest(name, allowed | set(SECTIONS)))
        if isinstance(value, bool):
            words.append(f"--{name}" if value else f"--no-{name}")
        elif value is not None:
            words.append(f"--{name}={','.join(map(str, value)) if isinstance(value, list) else value}")
    return words


def closest(name: str, allowed, prefix: str = "") -> str:
    close = difflib.get_close_matches(name, allowed, 1)
    return f"; did you mean {prefix}{close[0]}?" if close else ""
