"""Checkpoints in a run's folder, and which files there are ours: no others are removed."""
import contextlib
import functools
import glob
import os
import re
import shutil
import tempfile

from safetensors import SafetensorError

import common
from bench import machine
from common import UserError

# ---------------------------------------------------------------------------- what the disk refuses

@contextlib.contextmanager
def writing(folder: str):
    """Within: what the disk refuses of this folder's files is a UserError that names the file."""
    try:
        yield
    except Exception as error:
        if not is_disks(error):
            raise
        path = getattr(error, "filename2", None) or getattr(error, "filename", None) or folder
        raise UserError(f"{path} cannot be written: {reason_of(error)}; make room, or move away "
                        f"what is there; what was saved is as it was: {machine.again()}") from None


def in_one_line(function):
    """Decorator of what writes in a folder, its first argument: as within `writing`."""
    @functools.wraps(function)
    def run(folder, *args, **kwargs):
        with writing(folder):
            return function(folder, *args, **kwargs)
    return run


def is_disks(error: Exception) -> bool:
    """Whether it may come of a full disk, or of what is there."""
    # PyTorch and tokenizers have no errors of their own.
    return isinstance(error, (OSError, SafetensorError, RuntimeError)) or type(error) is Exception


def reason_of(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error)


# ------------------------------------------------------------------------------- written as a whole

UNFINISHED = ".unfinished-"     # how the name of a folder begins that is being written


@contextlib.contextmanager
def new_folder(folder: str, remedy: str = "choose another folder", replace: bool = False):
    """Within: a folder beside it, which in the end becomes `folder`, whole; after an error it goes.

    All of it is on the disk before it gets its name. replace: an old one makes room for it then; it
    can be made again, so nothing waits for the disk. Raises UserError where something else is there
    already, and where it cannot be written.
    """
    told, folder = folder, os.path.abspath(os.path.expanduser(folder))
    if os.path.lexists(folder) and not replace:
        raise UserError(f"{told} is there already; choose another folder")
    above = os.path.dirname(folder)
    made = missing(above)
    try:
        os.makedirs(above, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=above, prefix=UNFINISHED) as unfinished:
            new, old = f"{unfinished}/whole", f"{unfinished}/old"
            os.mkdir(new)
            yield new
            if replace and os.path.isdir(folder):
                os.rename(folder, old)
            elif not replace:
                flush_all(new)
            try:
                os.rename(new, folder)
            except OSError:
                if os.path.isdir(old):
                    os.rename(old, folder)
                raise
        common.flush(above)
    except Exception as error:
        if not is_disks(error):
            raise
        reason = reason_of(error)
        raise UserError(f"{told} cannot be written: {reason}; {remedy}") from None
    finally:
        for parent in made:                             # those that are still empty
            with contextlib.suppress(OSError):
                os.rmdir(parent)


def missing(folder: str) -> list[str]:
    """This folder and those above it that are not there, from the lowest up."""
    found = []
    while not os.path.lexists(folder):
        found.append(folder)
        folder = os.path.dirname(folder)
    return found


def flush_all(folder: str) -> None:
    for part, _, files in os.walk(folder, topdown=False):
        for name in files:
            common.flush(os.path.join(part, name))
        common.flush(part)


# ------------------------------------------------------------------------------------- checkpoints

@in_one_line
def save_step(folder: str, step: int, finished: bool, write) -> None:
    """Make the checkpoint step-… in a stage's folder, by write(folder, step, finished).

    It is complete, and on the disk, before it has its name. Raises UserError where it cannot be.
    """
    target = f"{folder}/step-{step:06d}"
    if not os.path.isfile(f"{target}/config.yaml"):     # else it was killed just after this
        kept = common.checkpoint_of(folder)
        kept = f"{kept} is as it was" if kept else "there is no checkpoint yet"
        remedy = f"make room there; {kept}; then {machine.again()}"
        with new_folder(target, remedy) as unfinished:
            write(unfinished, step, finished)
            move_config(unfinished, unfinished, folder, target)
    point(f"{folder}/latest", target)
    common.flush(folder)


def stage_of(checkpoint: str) -> str:
    """The stage's folder where this is step-… or best-… in it, or a link to one; else itself."""
    real = os.path.realpath(checkpoint)
    is_within = re.fullmatch(r"(step|best)-\d+", os.path.basename(real))
    return os.path.dirname(real) if is_within else checkpoint


@in_one_line
def publish(folder: str) -> None:
    """Put the files of the newest checkpoint, the last one, into the stage's folder itself."""
    newest, config = common.checkpoint_of(folder), f"{folder}/config.yaml"
    if newest == folder:
        return
    if os.path.isfile(config):                  # of a run with fewer --steps
        os.unlink(config)
    for name in os.listdir(newest):
        if name != "config.yaml":               # last: it makes the rest a checkpoint
            put_beside(f"{newest}/{name}", f"{folder}/{name}")
    common.flush(folder)
    move_config(newest, folder, newest, folder)
    common.flush(folder)


@in_one_line
def sweep(folder: str, keep: int) -> None:
    """Remove what a killed run left half written, and the checkpoints beyond the newest `keep`."""
    root = glob.escape(folder)
    for path in glob.glob(f"{root}/{UNFINISHED}*"):
        shutil.rmtree(path)
    for path in glob.glob(f"{root}/*.tmp"):
        if os.path.basename(path).removesuffix(".tmp") in OURS:
            os.unlink(path)
    for path in glob.glob(f"{root}/step-*"):
        if not os.path.exists(f"{path}/config.yaml"):       # its removal was cut off
            remove_ours(path)
    checkpoints = common.checkpoints_of(folder)
    if folder in checkpoints:                   # its files stand in the folder itself
        published = f"{folder}/step-{checkpoints[folder]:06d}"
        checkpoints.pop(published, None)
        remove_ours(published)
    for path in list(checkpoints)[:-keep]:
        if path != folder:
            remove_ours(path)
    link, newest = f"{folder}/latest", common.checkpoint_of(folder)
    if newest not in (None, folder):
        point(link, newest)
    elif os.path.islink(link):
        os.unlink(link)


@in_one_line
def remove_groups(folder: str) -> None:
    """What was saved of LoRA teachers on the way, once each of them is a checkpoint of its own."""
    for pattern in ("group-*", "unfinished-*"):
        for path in glob.glob(f"{glob.escape(folder)}/{pattern}"):
            remove_ours(path)


# ------------------------------------------------------------------------------ what files are ours

# Names that this program gives to files in a stage's folder and its checkpoints.
OURS = {"run.yaml", "config.yaml", "model.safetensors", "optimizer.pt", "log.jsonl", ".lock",
        "training_tasks.json", "instructions.safetensors", "latest", "best",
        # of an LLM and its tokenizer
        "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json",
        "special_tokens_map.json", "added_tokens.json", "spiece.model"}
BEGUN = {".lock", "log.jsonl", "training_tasks.json", "run.yaml.tmp"}   # of a run's first moments
OUR_FOLDERS = ("step-", "best-", "group-", "unfinished-", UNFINISHED, "tensorboard")


def is_known(entry: os.DirEntry) -> bool:
    """Whether this program may have written this file or folder of a run folder."""
    if entry.is_dir(follow_symlinks=False):
        is_teacher = "unit_name" in record_in(entry.path)
        return is_teacher or entry.name.startswith(OUR_FOLDERS)
    name = entry.name.removesuffix(".tmp")
    return name in OURS or re.match(r"log-\d+\.jsonl$|events\.out\.tfevents", name) is not None


def teacher_folder(folder: str, teacher: str) -> str:
    """Where below the folder of stage lora the teacher of this name is."""
    return os.path.join(folder, "".join(c if c.isalnum() else "_" for c in teacher.lower()))


def record_in(folder: str, name: str = "config.yaml") -> dict:
    """What this file in it holds; {} where there is none that can be read."""
    try:
        return common.read_yaml(f"{folder}/{name}", "")
    except UserError:
        return {}


def is_ours(folder: str) -> bool:
    """Whether a run of this program made this folder; also where nothing is there yet."""
    if not os.path.isdir(folder):                       # a link to a folder is one
        return not os.path.lexists(folder)
    # Names alone do not tell: an LLM of somebody else's has the same. So a run first marks its
    # folder.
    if all(name in BEGUN or name.startswith(OUR_FOLDERS) for name in os.listdir(folder)):
        return True
    return "go_on_with" in record_in(folder, "run.yaml") or "finished" in record_in(folder)


@in_one_line
def remove_ours(folder: str) -> None:
    """Remove what this program wrote into this folder, config.yaml first; it, too, once empty."""
    if not os.path.isdir(folder):
        return
    if os.path.isfile(f"{folder}/config.yaml"):         # without it the rest is no checkpoint
        os.unlink(f"{folder}/config.yaml")
    with os.scandir(folder) as entries:
        known = [entry for entry in entries if is_known(entry)]
    for entry in sorted(known, key=lambda entry: entry.name == "run.yaml"):     # the mark goes last
        if entry.is_dir(follow_symlinks=False):
            remove_ours(entry.path)
        elif entry.name != ".lock":
            os.unlink(entry.path)
    if not os.listdir(folder):
        os.rmdir(folder)


def put_beside(path: str, target: str) -> None:
    """Make `target` the same file as `path`, in one step: by a link, else by a copy."""
    if os.path.exists(target) and os.path.samefile(path, target):
        return
    temporary = f"{target}.tmp"
    if os.path.exists(temporary):
        os.unlink(temporary)
    try:
        os.link(path, temporary)
    except OSError:
        shutil.copyfile(path, temporary)
        common.flush(temporary)
    os.replace(temporary, target)


def move_config(source: str, target: str, old: str, new: str) -> None:
    """Write source's config.yaml to target, its relative path from `new`, which was from `old`."""
    record = common.read_yaml(f"{source}/config.yaml", "train this stage again with --fresh")
    if record.get("llm_is_relative"):
        path = os.path.join(os.path.realpath(old), record["llm_path"])
        record["llm_path"] = os.path.relpath(path, os.path.realpath(new))
    common.write_yaml(f"{target}/config.yaml", record)


def point(link: str, folder: str) -> None:
    """Make the symbolic link name this folder beside it, in one step."""
    temporary = f"{link}.tmp"
    if os.path.lexists(temporary):
        os.unlink(temporary)
    os.symlink(os.path.basename(folder), temporary)
    os.replace(temporary, link)
