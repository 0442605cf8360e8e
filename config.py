"""Options: the command line over a YAML file over the defaults."""
import argparse
import difflib
import os
import re
import shlex
import sys
import textwrap

import torch

import common
from bench import folders, terminal

HERE = os.path.dirname(os.path.abspath(__file__))
DEFAULT_CONFIG = "configs/sample.yaml"
PLACES = """
Relative paths start at the current folder. Files of configs/ and assets/ that are not there are
taken from beside the scripts; ~ is your home folder."""
ORDER = """
A config's values go before the defaults told here, the command line's before both; without --config
it is configs/sample.yaml, the built-in suite's."""

# What a config file may hold beside options: one section for each stage, with its options.
SECTIONS = ("base", "meta", "lora", "lora_all", "pretrain", "finetune", "evaluate")


class Parser(argparse.ArgumentParser):
    where = ""                                  # the file whose values are parsed, for error lines

    def __init__(self, doc, epilog=PLACES):
        super().__init__(description=doc, epilog=epilog, formatter_class=terminal.HelpFormatter,
                         allow_abbrev=False)

    def parse_known_args(self, args=None, namespace=None):
        args = sys.argv[1:] if args is None else list(args)
        for n, word in enumerate(args, 1):
            common.check_text(word, f"word {n} of the command line")
        return super().parse_known_args(args, namespace)

    def print_help(self, file=None):
        terminal.write_help(self.format_help(), file or sys.stdout)

    def error(self, message):
        raise common.UserError(f"{self.where}{message} (--help lists the options)")

    def known(self) -> set[str]:
        """The options' names, without dashes in front."""
        names = {name for action in self._actions for name in action.option_strings}
        return {name[2:] for name in names if name.startswith("--")} - {"help"}


# ------------------------------------------------------------------------------- types of options

LARGEST = 10 ** 9                               # of numbers that have no bound of their own


def number(least, most, kind=int):
    """The type of an option: a number from `least` to `most`, and so no NaN and no infinity."""
    def number(text):
        value = kind(text)
        if not least <= value <= most:
            raise argparse.ArgumentTypeError(f"must be a finite number from {least} to {most}, "
                                             f"not {text}")
        return value
    return number


def at_least(least, kind=int):
    """The type of an option: a number from `least` up to a billion."""
    return number(least, LARGEST, kind)


def below_1(text):
    """The type of an option: a number from 0 to 1, and not 1."""
    if share(text) == 1:
        raise argparse.ArgumentTypeError("must be below 1")
    return share(text)


def demonstration(text):
    """The type of an option: "input => output"."""
    if "=>" not in text:
        raise argparse.ArgumentTypeError(f"'{text[:40]}' has no =>; write \"input => output\"")
    return [part.strip() for part in text.split("=>", 1)]


def numbers(text):
    """The type of an option: numbers with commas between."""
    return [scale(number) for number in text.split(",")]


def path(text):
    """The type of an option: a file or folder, ~ in front for a home folder."""
    if not text.strip():
        raise argparse.ArgumentTypeError("is empty; name a file or folder")
    found = os.path.expanduser(text)
    if found.startswith("~"):
        raise argparse.ArgumentTypeError(f"{text[:60]} begins with no user's home; write ./~...")
    return found


def beside(text):
    """The type of an option: a path; one of configs/ or assets/ is looked for here too."""
    found = path(text)
    first = os.path.normpath(found).split(os.sep)[0]
    if first in ("configs", "assets") and not os.path.lexists(found):
        ours = os.path.join(HERE, os.path.normpath(found))
        return ours if os.path.exists(ours) else found
    return found


def script(name: str) -> str:
    """A script of ours as it is started from the current folder, for commands that are told."""
    return name if os.path.exists(name) else shlex.quote(os.path.join(HERE, name))


def plain_name(text):
    """The type of an option: the name of a folder, no path, and not a checkpoint's (step-N)."""
    if not re.fullmatch(r"(?!(step|best)-\d+$)\w[\w.+=-]*", text):
        raise argparse.ArgumentTypeError(f"{text[:60]!a} is no plain name: letters, digits and "
                                         "_.+=- after the first, no path, not step-N or best-N")
    return text


positive = at_least(1)
finite = number(-LARGEST, LARGEST, float)
share = number(0, 1, float)
scale = number(-1000, 1000, float)
# So many that a single process has a chance to hold or to make them.
seed = number(0, 2 ** 32 - 1)
width = number(1, 8192)
many = number(1, 10_000)
tokens = number(1, 100_000)
rate = number(0, 10, float)
weight = number(0, 10 ** 6, float)
flag = {"action": argparse.BooleanOptionalAction}                           # --x and --no-x

# Options whose values are paths: written in two ways, one may be the same.
PATHS = ("config", "runs", "data", "model", "llm", "meta_model", "text", "init_from", "kl_teacher",
         "checkpoint", "out")
# Option of these -> values of it that are no paths.
WORDS = {"model": ("tiny",), "llm": ("base", "meta"), "kl_teacher": ("lora", "meta")}

# Options that every script has, but that a checkpoint decides for whoever uses it.
OF_A_CHECKPOINT = ("targets", "rank", "alpha", "unit", "attention", "demos", "vary-demos",
                   "max-instances", "hold-out", "max-instruction")


# ------------------------------------------------------------------------------- options of all

def add_shared_options(parser: Parser) -> None:
    """The options of every script, which may stand at the top level of a config file."""
    parser.epilog = PLACES + ORDER
    add = parser.add_argument_group("run").add_argument
    add("--config", type=beside, default=DEFAULT_CONFIG,
        help="YAML file of options; those of the command line go before it")
    add("--runs", type=path, default="runs/sample",
        help="folder that holds one folder for each stage")
    add("--seed", type=seed, default=0, help="everything random follows from it")
    add("--device", default="auto", choices=["auto", "cpu", "cuda"],
        help="auto: the GPU where there is one")
    add("--precision", default="fp32", choices=["fp32", "bf16"],
        help="bf16: the frozen LLM is held in bf16, and autocast computes in it")
    add("--fresh", default=False, **flag,
        help="start over instead of resuming, or skipping what is done")

    add = parser.add_argument_group("data").add_argument
    add("--data", type=beside, default="data/sample",
        help="folder in Super-NaturalInstructions' layout, or with P3's data")
    add("--format", default="sni", choices=["sni", "p3"],
        help="what --data holds, and how texts are written")
    add("--p3-input", default="fields", choices=["fields", "prompt"],
        help="what the student reads of a P3 row: the fields that its prompt shows, or the prompt")
    add("--max-instances", type=positive, default=100,
        help="instances of each training task that are trained on")
    add("--categories", type=at_least(0), default=0,
        help="train on the N categories with most tasks (the paper: 6, 15, 30, 60); 0: on all")
    add("--allow-missing", default=False, **flag,
        help="go on without those tasks of a split whose files are absent")
    add("--hold-out", type=at_least(0), default=0,
        help="so many whole training tasks (P3: data sets) are left out, for --validate-every")
    add("--demos", default="0", choices=["0", "2", "mixed"],
        help="demonstrations beside the definition; mixed: none in half of the steps, else 2")
    add("--vary-demos", default=False, **flag,
        help="draw demonstrations from the task's instances, not its first positive examples")
    add("--max-instruction", type=tokens, default=1024,
        help="tokens of an instruction with its demonstrations, at most")
    add("--max-input", type=tokens, default=1024,
        help="tokens of an input, at most, the instruction included where it is read with it")
    add("--max-output", type=many, default=128, help="tokens of an output, at most")

    add = parser.add_argument_group("models").add_argument
    add("--model", type=beside, default="tiny",
        help="T5-family checkpoint (T5, ByT5, mT5, umT5, LongT5) by name or folder; tiny: a small "
             "one that stage base trains from nothing")
    add("--attention", default="sdpa", choices=["sdpa", "eager"],
        help="Transformers' attention code; eager is faster for short texts on a CPU, and LongT5 "
             "has no other")
    add("--llm", type=beside, default="meta",
        help="the frozen LLM under teachers and student: base (--model itself), meta (what stage "
             "meta made of it) or a checkpoint; in an evaluation: where a moved TAGI's is now")
    add("--meta-model", type=beside,
        help="checkpoint that is meta-trained already (a Tk-Instruct, say), in place of stage "
             "meta; default: what that stage made")
    add("--targets", default="q,v", help="projections with LoRA, of q,k,v,o,wi,wi_0,wi_1,wo")
    add("--rank", type=number(1, 1024), default=32, help="LoRA rank r")
    add("--alpha", type=number(1e-6, 10 ** 6, float), default=32.0,
        help="LoRA alpha; updates are scaled by alpha / r")
    add("--unit", default="category", choices=["category", "task", "all"],
        help="what there is one LoRA teacher for")


def add_training_options(parser: Parser, stages: list[str], steps: int, text_length: int) -> None:
    """The options of both training scripts; steps and text_length are defaults."""
    add = parser.add_argument_group("stage").add_argument
    add("--stage", choices=stages,
        help="which stage to train; default: in train_teacher.py those that the config has a "
             "section for, in order; train_hyper.py needs one")
    add("--name", type=plain_name, help="folder under --runs; default: the stage's name")
    add("--text", type=path,
        help="plain text for base and pretrain: one document a line, or JSON lines with a text; "
             "default: corpus.txt in --data")
    add("--text-length", type=number(3, 100_000), default=text_length,
        help="tokens of a document that are used at a time")

    add = parser.add_argument_group("batches").add_argument
    add("--steps", type=positive, default=steps, help="optimizer steps")
    add("--tasks", type=many, default=8, help="tasks in a micro-batch of one process")
    add("--instances", type=many, default=1, help="instances of each of these tasks")
    add("--accumulate", type=many, default=1, help="micro-batches in a step of one process")
    add("--balance", default="tasks", choices=["tasks", "categories"],
        help="what is drawn equally often; categories: whatever their number of tasks (lora-all, "
             "finetune)")
    add("--bucket-steps", type=number(0, 10_000), default=0,
        help="sort the texts of so many steps by length, for less padding; 1: each step's own "
             "among its micro-batches; 0: as drawn")
    add("--checkpointing", default=False, **flag,
        help="gradient checkpointing: less memory, as each block of the LLM runs twice")
    add("--shard", default=False, **flag,
        help="deal out the LLM's and the student's weights, gradients and optimizer among the "
             "processes of torchrun (fully_shard): less memory, more traffic")
    add("--save-every", type=positive, default=1000, help="steps between checkpoints")
    add("--keep", type=positive, default=2, help="so many of the newest checkpoints are kept")
    add("--on-nan", default="stop", choices=["stop", "skip"],
        help="where loss or gradient are not finite: stop, or leave the step out and count it")
    add("--timeout", type=at_least(0.01, finite), default=30.0,
        help="minutes after which a rank that does nothing ends the run")
    add("--validate-every", type=at_least(0), default=0,
        help="steps between losses on the split validation, or on what --hold-out leaves out, in "
             "meta, lora-all and finetune; the best checkpoint is kept; 0: none")
    add("--tensorboard", default=False, **flag, help="write the log for TensorBoard too")

    add = parser.add_argument_group("optimizer").add_argument
    add("--optimizer", default="adamw", choices=["adamw", "adafactor", "muon"],
        help="muon: Muon for matrices, AdamW for the rest")
    add("--lr", type=rate, default=1e-4, help="largest learning rate")
    add("--schedule", default="linear", choices=["linear", "cosine", "constant"],
        help="of the learning rate after warm-up")
    add("--warmup", type=share, default=0.02, help="share of the steps with a rising rate")
    add("--weight-decay", type=rate, default=0.01, help="decoupled, as in AdamW")
    add("--beta2", type=below_1, default=0.999, help="AdamW's second decay rate")
    add("--clip", type=weight, default=1.0,
        help="largest gradient norm; 0: no clipping (stage lora has none)")


def parse(parser: Parser, section: str | None, argv=None) -> argparse.Namespace:
    """Options of one stage: command line, config's section, config's top level, defaults.

    The file's values become words of a command line, and so pass the same types and choices.
    """
    argv = sys.argv[1:] if argv is None else argv
    early, rest = parser.parse_known_args(argv)     # --help, the line's own mistakes, which config
    if rest:
        name = rest[0].partition("=")[0].lstrip("-")
        raise common.UserError(f"unknown option {rest[0]}" + closest(name, parser.known(), "--"))
    config = read_config(early.config)
    top = Parser("")
    add_shared_options(top)
    checkpoint = getattr(early, "checkpoint", None)
    if checkpoint and same("config", early.config, DEFAULT_CONFIG):
        config = recorded(checkpoint, top.known()) or config
    options = argparse.Namespace()
    shared = {key: value for key, value in config.items() if key not in SECTIONS}
    of_stage = config.get(section) or {}
    for where, values, allowed in ((f"{early.config}: ", shared, top.known()),
                                   (f"{early.config}, {section}: ", of_stage, parser.known())):
        parser.where = where
        parser.parse_args(words_of(values, allowed, where), options)
    parser.where = ""
    parser.parse_args(argv, options)
    options.device = device_of(options.device)
    if "text" in options and options.text is None:
        options.text = os.path.join(options.data, "corpus.txt")
    if "steps" in options:
        check_model(options, argv)
    return options


def check_model(options, argv) -> None:
    """Raises UserError where a stage would train on another model than the --model asked for."""
    if options.model == "tiny":
        return
    if options.stage == "base":
        raise common.UserError(f"--stage base makes the tiny T5; --model {options.model} is a "
                               "checkpoint and needs none: leave the stage out")
    words = [word.partition("=")[0] for word in argv]
    if "--model" in words and options.llm == "meta" and options.meta_model:
        if not {"--meta-model", "--llm"} & set(words):
            raise common.UserError(
                f"--model {options.model} would not be used: {options.config} freezes its "
                f"meta_model {options.meta_model}; add --llm base to freeze --model itself, or "
                "name a config that is for it: --config configs/flan-t5-small.yaml")


def device_of(name: str | None) -> str:
    """auto and None: the GPU where there is one. Raises UserError where --device cuda has none."""
    if name in (None, "auto"):
        return "cuda" if torch.cuda.is_available() else "cpu"
    if str(name).startswith("cuda") and not torch.cuda.is_available():
        raise common.UserError("--device cuda: PyTorch finds no GPU here; use --device cpu or auto")
    try:
        return str(torch.device(str(name)))
    except RuntimeError:
        raise common.UserError(f"{str(name)[:40]!r} is no device; cpu, cuda or auto") from None


def given(argv, names) -> list[str]:
    """Those of these options that the command line sets."""
    found = []
    for word in sys.argv[1:] if argv is None else argv:
        option = word.partition("=")[0]
        if option.startswith("--") and option[2:].removeprefix("no-") in names:
            found.append(option)
    return found


def refuse(argv, names, reason: str) -> None:
    """Raises UserError where the command line sets one of these options, which it would ignore."""
    if found := given(argv, names):
        raise common.UserError(f"{found[0]}: {reason}; leave it out")


def read_config(path: str) -> dict:
    """A config file, its keys as texts. Raises UserError where a stage's section is none."""
    config = common.read_yaml(path, "name a file of `key: value` lines with --config")
    config = {str(key): value for key, value in config.items()}
    for name in SECTIONS:
        if not isinstance(config.get(name) or {}, dict):
            raise common.UserError(f"{path}: {name} is a section, of `key: value` lines below it")
    for part in (config, *(config.get(name) or {} for name in SECTIONS)):
        for key in {"config", "fresh"}.intersection(part):
            raise common.UserError(f"{path}: {key} is for the command line; take it out there")
    return config


def recorded(checkpoint: str, known: set) -> dict:
    """The shared options of a checkpoint's run that are about its result; {} where it is none."""
    newest = common.checkpoint_of(checkpoint) or checkpoint     # in the folder of a stage
    if not os.path.isfile(f"{newest}/config.yaml"):
        return {}
    own, found = {}, vars(common.load_options(newest))
    for key, value in found.items():
        if key.replace("_", "-") in known - {"fresh", "device", "seed"}:
            own[key] = value
        if key in own and key in PATHS and isinstance(value, str) and not os.path.exists(value):
            there = os.path.join(str(found.get("cwd", "")), value)      # where the run started
            if value not in WORDS.get(key, ()) and os.path.exists(there):
                own[key] = there
    # Where it is now, moved or not; a link is to a folder that has its neighbours.
    checkpoint = folders.stage_of(checkpoint)
    runs, real = os.path.normpath(f"{checkpoint}/.."), os.path.dirname(os.path.realpath(checkpoint))
    return own | {"runs": runs if os.path.realpath(runs) == real else real}


def words_of(values: dict, allowed: set, where: str) -> list[str]:
    """A file's keys and values as words of a command line."""
    words, seen = [], {}                        # seen: name -> the key that it was
    for key, value in values.items():
        name = str(key).replace("_", "-")
        if seen.setdefault(name, key) != key:
            raise common.UserError(f"{where}'{key}' is '{seen[name]}' once more; leave one out")
        if name not in allowed:
            near = closest(name, allowed | set(SECTIONS))
            raise common.UserError(f"{where}unknown key '{key}'" + near + "; an option of one "
                                   "script stands in its stage's section")
        if isinstance(value, list):
            value = ",".join(map(str, value))
        if isinstance(value, bool) and f"no-{name}" in allowed:
            words.append(f"--{name}" if value else f"--no-{name}")
        elif value is not None:
            words.append(f"--{name}={value}")
    return words


def same(key: str, old, new, cwd: str = "") -> bool:
    """Whether an option's two values are the same, a path's in whatever way it is written.

    cwd: the folder where `old` was written, if not here.
    """
    if old == new or key not in PATHS or not (isinstance(old, str) and isinstance(new, str)):
        return old == new
    if old in WORDS.get(key, ()) or new in WORDS.get(key, ()):
        return False                            # a word, and a folder of that name: ./meta
    return os.path.realpath(os.path.join(cwd, beside(old))) == os.path.realpath(beside(new))


def folder_of(options, stage: str) -> str:
    """Where a stage's run is. Raises UserError where --name is the folder of another stage."""
    stages = {section.replace("_", "-") for section in SECTIONS} | {"probe"}
    if options.name in stages - {stage}:
        raise common.UserError(f"--name {options.name} is the folder of another stage; choose "
                               "another name")
    return os.path.join(options.runs, options.name or stage)


def tell(options, parser: Parser, stage: str) -> None:
    """Print what a stage runs with: options that differ from the defaults, then the others."""
    changed, usual = [], []
    for action in parser._actions:
        value = getattr(options, action.dest, None)
        if value is None or action.dest in ("help", "stage"):
            continue
        word = f"--{action.dest.replace('_', '-')}"
        if isinstance(value, bool):
            word = word if value else word.replace("--", "--no-", 1)
        else:
            word = shlex.quote(f"{word}={value}")
        (usual if same(action.dest, value, action.default) else changed).append(word)
    for title, words in ((f"options of {stage}:", changed), ("as by default:", usual)):
        print(textwrap.fill(" ".join([title, *words]), 100, subsequent_indent="    ",
                            break_long_words=False, break_on_hyphens=False))


def closest(name: str, allowed, prefix: str = "") -> str:
    close = difflib.get_close_matches(name, allowed, 1)
    return f"; did you mean {prefix}{close[0]}?" if close else ""


def check_fits(expected: dict, folder: str, record: dict, keys, llm_path: str, remedy: str):
    """Raises UserError where `folder`, with the config.yaml `record`, is of another LLM or LoRA.

    expected: the llm_fingerprint and, of `keys`, the options that are needed.
    """
    its = record["llm_fingerprint"]
    common.check_fingerprint(expected["llm_fingerprint"], its, folder, llm_path)
    for key in keys:                                # another alpha's would load, rescaled
        if record.get(key, expected[key]) != expected[key]:
            raise common.UserError(f"{folder} has --{key} {record[key]}, not {expected[key]}; use "
                                   f"the same, or {remedy}")
