"""A checkpoint's config.yaml: options of a run and what it found out, each of its own type."""
import argparse

import common
import config

# What is there beside options -> its type.
FOUND = {"step": int, "finished": bool, "processes": int, "llm_path": str, "llm_is_relative": bool,
         "llm_fingerprint": str, "data_digest": str, "text_digest": str, "tokenizer_digest": str,
         "hypernetwork_digest": str, "adapter_digest": str, "shared_digest": str, "unit_name": str,
         "validation": float, "validation_shuffled": float, "validation_digest": str,
         "adapter": bool, "teachers": list, "lost": list, "scale": float, "adapted_to": list,
         "versions": dict}
# What a TAGI cannot be made without.
OF_A_STUDENT = ("llm_path", "llm_is_relative", "llm_fingerprint", "seed", "format", "attention",
                "targets", "rank", "alpha", "generator", "width", "bottleneck", "fusion",
                "train_norms", "train_embeddings", "max_instruction", "max_input")


def add_student_options(parser: config.Parser) -> None:
    """The options that say which parts a student has."""
    add = parser.add_argument_group("student").add_argument
    add("--generator", default="attention", choices=["attention", "mean", "none"],
        help="how instruction states become LoRA weights: by attention for each site, by the "
             "released code's mean, or not at all (fusion alone)")
    add("--width", type=config.width, default=128, help="the generator's width")
    add("--bottleneck", type=config.width, default=128, help="hidden width of its MLPs")
    add("--fusion", default="both", choices=["both", "encoder", "decoder", "none"],
        help="Eq. 1: cross-attention in every encoder block, instruction states for the decoder")
    add("--train-norms", default=False, **config.flag,
        help="train gains of the student's own for the layer norms")
    add("--train-embeddings", default=False, **config.flag,
        help="train a change of the student's own to the embeddings")


def load_options(folder: str, needs=("finished",)) -> argparse.Namespace:
    """`common.load_options`, all values checked. Raises UserError where one is of another type."""
    options = common.load_options(folder, needs[0])
    path = f"{folder}/config.yaml"
    with common.named_file(path, "it is damaged: restore it, or train this stage again"):
        for key in needs:
            if key not in options:
                raise ValueError(f"no {key}")
        for key, value in vars(options).items():
            check(key, value)
    return options


def check(key: str, value) -> None:
    """Raises ValueError where a run of ours cannot have written this value."""
    if key in config.PATHS and isinstance(value, str):
        config.path(value)                              # ArgumentTypeError for what names no file
    if key in FOUND:
        fine = _is(value, FOUND[key])
    else:
        fine = key not in OPTIONS or _is_option(OPTIONS[key], value)
    if not fine:
        raise ValueError(f"{key} is {str(value)[:40]!r}")


def _is(value, kind: type) -> bool:
    if isinstance(value, bool) or kind is bool:         # in Python a bool is an int
        return isinstance(value, bool) and kind is bool
    if kind in (int, float):
        return isinstance(value, (int, kind)) and abs(value) < config.LARGEST
    return isinstance(value, kind)


def _is_option(action, value) -> bool:
    if value is None or action.default is None:
        return value is action.default or isinstance(value, str)
    if not _is(value, type(action.default)) or value not in (action.choices or [value]):
        return False
    try:
        return action.type is None or isinstance(value, str) or action.type(str(value)) == value
    except (argparse.ArgumentTypeError, ValueError):
        return False


def _options() -> dict:
    # name of an option, as a file has it -> argparse's description of it
    parser = config.Parser("")
    config.add_shared_options(parser)
    stages = ["base", "meta", "lora", "lora-all", "pretrain", "finetune"]
    config.add_training_options(parser, stages, steps=1, text_length=3)
    add_student_options(parser)
    return {action.dest: action for action in parser._actions}


OPTIONS = _options()
