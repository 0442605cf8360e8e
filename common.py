"""Plumbing that holds no science: mistakes in one line, files, processes, run folders, logs."""
import argparse
import contextlib
import datetime
import functools
import glob
import hashlib
import os
import signal
import sys
import tempfile
import threading
import time

from bench import early     # before PyTorch

import torch
import torch.distributed as dist
import torch.distributed.nn     # its defaults keep a process group that was made before the import
import yaml
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from bench import yaml_files

# ------------------------------------------------------------------------------ mistakes, files


def one_line(text: str, most: int = 300, encoding: str | None = None) -> str:
    """The text as one printable line of at most so many characters; its middle is what goes."""
    text = " ".join(line.strip() for line in text.splitlines())
    text = "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)   # \x1b, \udc80 in words
    encoding = encoding or "utf-8"
    text = text.encode(encoding, "backslashreplace").decode(encoding)
    if len(text) > most:
        text = text[:most // 2] + " ... " + text[5 + most // 2 - most:]     # the end: what to do
    return text


class UserError(ValueError):
    """A mistake of the user's: one line that says what, where and what to do."""

    def __init__(self, message: str):
        super().__init__(one_line(message, 290))


@contextlib.contextmanager
def named_file(path: str, remedy: str, verb: str = "read"):
    """Within: whatever is wrong with this file or folder becomes a UserError that names it.

    Libraries raise what they like where a file is damaged: TypeError, RecursionError, a bare
    Exception. So nothing but the file is to be read within.
    """
    try:
        yield
    except (UserError, KeyboardInterrupt, SystemExit, GeneratorExit):
        raise
    except BaseException as error:                      # a panic of tokenizers is no Exception
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        if isinstance(error, FileNotFoundError):
            reason = "no such file"
        elif isinstance(error, KeyError):
            reason = f"no {error}"
        reason = one_line(" ".join(reason.split()), 200)
        raise UserError(f"{path} cannot be {verb}: {reason}; {remedy}") from None


def command(main):
    """Decorator of a script's main(): a UserError ends in one line and exit code 2."""
    @functools.wraps(main)
    def run(*args, **kwargs):
        stop.listen()
        for stream in (sys.stdout, sys.stderr):
            if hasattr(stream, "reconfigure"):          # a terminal may know no more than ASCII
                stream.reconfigure(errors="backslashreplace")
        try:
            return main(*args, **kwargs)
        except UserError as error:
            tell_once(error)
            sys.exit(2)
        except KeyboardInterrupt:
            print("stopped", file=sys.stderr)
            sys.exit(130)
        except BrokenPipeError:                         # | head: nobody reads on
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        finally:
            if dist.is_initialized():
                dist.destroy_process_group()
            if launched_processes() == 1:               # else the launcher's SIGTERM may still come
                stop.restore()
    return run


def read_yaml(path: str, remedy: str) -> dict:
    with named_file(path, remedy), open(path, encoding="utf-8-sig") as f:
        values = yaml_files.load(f.read())
        values = {} if values is None else values
        if not isinstance(values, dict):
            raise ValueError("expected `key: value` lines")
    return values


def is_texts(value) -> bool:
    """Whether it is a list of texts, and not empty."""
    return isinstance(value, list) and value != [] and all(isinstance(x, str) for x in value)


def check_text(text: str, where: str) -> None:
    """Raises UserError for half a character (a lone surrogate): JSON may hold one, Unicode not."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UserError(f"{where}: sign {error.start + 1} is half a character "
                        f"({text[error.start]!a}), which is no Unicode; mend the text") from None


def make_folder(folder: str) -> None:
    with named_file(folder, "choose another folder", "written"):
        os.makedirs(folder, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()      # a folder that is there may be read-only


def write_text(path: str, text: str) -> None:
    with open(path, "w", encoding="utf-8") as f:
        f.write(text)


def write_yaml(path: str, values: dict) -> None:
    write_atomically(path, lambda path: write_text(path, yaml.safe_dump(values, sort_keys=False)))


def save_tensors(path: str, tensors: dict, metadata: dict | None = None) -> None:
    tensors = {name: p.detach().contiguous().cpu() for name, p in tensors.items()}
    write_atomically(path, lambda path: save_file(tensors, path, metadata))


def write_atomically(path: str, write) -> None:
    write(path + ".tmp")
    flush(path + ".tmp")
    os.umask(umask := os.umask(0))                      # the only way to read it
    os.chmod(path + ".tmp", 0o666 & ~umask)             # safetensors' files are the owner's alone
    os.replace(path + ".tmp", path)


# ------------------------------------------------------------------------------------ processes

def launched_processes() -> int:
    """How many processes were started together: torchrun's WORLD_SIZE, and 1 without a RANK."""
    numbers = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_PORT")
    told = all(os.environ.get(name, "").isdecimal() for name in numbers)
    if not told or not os.environ.get("MASTER_ADDR"):
        return 1                                        # a cluster may set WORLD_SIZE for one, too
    return int(os.environ["WORLD_SIZE"])


def init_processes(device: str, minutes: float = 30) -> tuple[int, int]:
    """(rank, world) by torchrun's environment, (0, 1) without it; nccl on CUDA, gloo on CPU.

    minutes: how long a rank waits for the others before it gives up.
    """
    world = launched_processes()
    if world == 1:
        return 0, 1
    if device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    if not dist.is_initialized():
        patience = datetime.timedelta(minutes=minutes + 2)     # watch.Watch ends it before, by name
        backend = "nccl" if device == "cuda" else "gloo"
        with meeting():
            store, rank, world = next(dist.rendezvous("env://", timeout=patience))
            # After a restart the launcher's store still holds where the killed ranks were.
            again = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
            store = dist.PrefixStore(f"start-{again}", store)
            dist.init_process_group(backend, store=store, rank=rank, world_size=world,
                                    timeout=patience)
    return dist.get_rank(), world


def tell_once(error: UserError) -> None:
    """Print it, on the rank that has it: where all have the same, rank 0's launcher ends them."""
    if launched_processes() > 1 and os.environ["RANK"] != "0":
        for number in stop.before:                      # the launcher's SIGTERM ends the wait
            signal.signal(number, signal.SIG_DFL)
        time.sleep(20)
    encoding = getattr(sys.stderr, "encoding", None)
    print(one_line(f"error: {error}", encoding=encoding), file=sys.stderr, flush=True)


progress = 0        # meetings and steps that this process has begun: Watch sees who is silent


@contextlib.contextmanager
def meeting():
    """Within: what all ranks do together. Where another one is gone, this one ends in one line."""
    global progress
    progress += 1
    try:
        yield
    except RuntimeError as error:
        # The other one has said why it ended, and the launcher ends this one in a moment.
        raise UserError(f"rank {os.environ['RANK']} lost another rank: {error}") from None


def sum_over_ranks(values: list[float], device: str) -> list[float]:
    if not dist.is_initialized():
        return [float(x) for x in values]
    total = torch.tensor(values, dtype=torch.float64, device=device)
    with meeting():
        dist.all_reduce(total)
        return total.tolist()


def gather_over_ranks(value) -> list:
    """Every rank's value, in their order."""
    if not dist.is_initialized():
        return [value]
    values = [None] * dist.get_world_size()
    with meeting():
        dist.all_gather_object(values, value)
    return values


def differences(ours: dict):
    """Yield (rank, key, its value) where a rank's value is not this one's; all ranks call it."""
    for rank, theirs in enumerate(gather_over_ranks(ours)):
        for key in sorted(ours.keys() | theirs.keys()):
            if ours.get(key) != theirs.get(key):
                yield rank, key, theirs.get(key)


def wait_for_all_ranks() -> None:
    if dist.is_initialized():
        with meeting():
            dist.barrier()


class StopSignal:
    """SIGINT (Ctrl-C) and SIGTERM. Between steps they ask for a stop, which the loop sees after its
    step, and more of them change nothing; before the first step of a single process they end it."""

    def __init__(self):
        self.asked, self.at_once, self.before = 0, True, {}     # before: signal -> its handler

    def listen(self) -> None:
        """From now on, in the main thread: other threads get no signals."""
        if threading.current_thread() is threading.main_thread() and not self.before:
            self.asked, self.at_once = 0, launched_processes() == 1
            for number in (signal.SIGINT, signal.SIGTERM):
                self.before[number] = signal.signal(number, self)

    def restore(self) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)
        self.before = {}

    def __call__(self, number, frame):
        if self.at_once:
            raise KeyboardInterrupt
        if not self.asked and os.environ.get("RANK", "0") == "0":
            os.write(2, b"\nstopping: this step ends, then its state is saved\n")
        self.asked = 1

    def leave_if_asked(self, device: str) -> None:
        """Where no step is under way: all ranks leave, if one was asked to."""
        if sum_over_ranks([self.asked], device)[0]:
            sys.exit(130)


stop = StopSignal()


# -------------------------------------------------------------------- digests of what a run read

# Key in a run's config.yaml -> what is said where another run reads something else.
DIGESTS = {
    "data_digest": "the training tasks in {data} are not those that {folder} was trained on",
    "text_digest": "the plain text in {text} is not that which {folder} was trained on",
    "tokenizer_digest": "the tokenizer is not the one that {folder} was trained with",
}


def digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def files_digest(files: list[str], root: str) -> str:
    """A hash of these files' names below `root` and of their bytes."""
    total = hashlib.sha256()
    for file in files:
        with open(file, "rb") as f:
            content = hashlib.file_digest(f, "sha256").digest()
        total.update(os.path.relpath(file, root).encode() + content)
    return total.hexdigest()[:16]


def check_digests(found: dict, folder: str, record: dict, keys=tuple(DIGESTS)) -> None:
    """Raises UserError where `folder`, with the config.yaml `record`, read something else.

    found: options and digests of the run that asks. What one of the two lacks is not compared.
    """
    for key in keys:
        now, then = found.get(key), record.get(key)
        if None not in (now, then) and now != then:
            problem = DIGESTS[key].format(**found | {"folder": folder})
            raise UserError(f"{problem}; train it again with --fresh, or put back what it read")


def check_fingerprint(found: str, expected: str, folder: str, llm_path: str) -> None:
    if found != expected:
        raise UserError(f"{folder} was trained on another LLM than the one in {llm_path} now; "
                        "train it again or restore the model it was trained on")


# ---------------------------------------------------------------------------------- checkpoints

def save_checkpoint(folder: str, record: dict, weights: dict, optimizer=None, step: int = 0,
                    finished: bool = False) -> None:
    """Write model.safetensors, optimizer.pt where there is one, and at last config.yaml.

    record: options and what the run found out; weights: what was trained, {name: tensor};
    optimizer: one, or its state_dict. Raises UserError for weights that are not finite.
    """
    check_finite(weights, f"{folder} is not written")
    make_folder(folder)
    metadata = {"format": "pt", "step": str(step), "targets": record["targets"]}
    save_tensors(f"{folder}/model.safetensors", weights, metadata)
    if optimizer is not None:
        state = optimizer if isinstance(optimizer, dict) else optimizer.state_dict()
        state = {"optimizer": state, "step": step}
        write_atomically(f"{folder}/optimizer.pt", lambda path: torch.save(state, path))
    flush(folder)
    write_yaml(f"{folder}/config.yaml", record | {"step": step, "finished": finished})
    flush(folder)


LARGEST_WEIGHT = 1e6    # a damaged bit makes larger ones, of which float32 soon makes infinite ones


def check_finite(tensors: dict, problem: str) -> None:
    """Raises UserError where a weight is NaN or infinite, no number at all or far too large."""
    for name, p in tensors.items():
        if not p.is_floating_point() or not (p.detach().float().abs() <= LARGEST_WEIGHT).all():
            raise UserError(f"{problem}: its {name} holds numbers that are not finite, or beyond "
                            f"{LARGEST_WEIGHT:.0e}; go on from an earlier checkpoint, or train "
                            "it again")


def flush(path: str) -> None:
    """Wait until this file, or the names in this folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def checkpoints_of(folder: str) -> dict[str, int]:
    """A stage's complete checkpoints, {folder: step}: its own folder, step-… in it; in order."""
    found = {}
    for path in glob.glob(f"{glob.escape(folder)}/step-*/config.yaml"):
        number = os.path.basename(os.path.dirname(path)).removeprefix("step-")
        if number.isdecimal():
            found[os.path.dirname(path)] = int(number)
    if os.path.isfile(f"{folder}/config.yaml"):
        record = read_record(folder)
        if "finished" in record:                        # else it is no checkpoint
            found[folder] = record.get("step", 0)
    return dict(sorted(found.items(), key=lambda item: (item[1], item[0] == folder)))


def checkpoint_of(folder: str) -> str | None:
    """Where in a stage's folder the newest complete checkpoint is: there, or in step-…; or None."""
    return next(reversed(checkpoints_of(folder)), None)


def read_record(folder: str) -> dict:
    """A run folder's config.yaml, whose step and finished are, if there, what they should be."""
    path, remedy = f"{folder}/config.yaml", "it is no checkpoint, or damaged: train it again"
    record = read_yaml(path, remedy)
    step, finished = record.get("step", 0), record.get("finished", False)
    if type(step) is not int or type(finished) is not bool:
        raise UserError(f"{path}: step {str(step)[:20]}, finished {str(finished)[:20]}; {remedy}")
    return record


def load_options(folder: str, needs: str = "finished") -> argparse.Namespace:
    """A checkpoint's config.yaml. Raises UserError where it lacks the key that this use needs."""
    path, values = f"{folder}/config.yaml", read_record(folder)
    if needs not in values:
        raise UserError(f"{path} has no {needs}: another kind of run, or damaged; name another, "
                        "or train it again")
    # Earlier code had a switch for the generator and one for each part of fusion.
    if values.get("hypernetwork") is False:
        values["generator"] = "none"
    if "encoder_fusion" in values:
        parts = (values["encoder_fusion"], values.get("decoder_fusion"))
        names = {"True, True": "both", "True, False": "encoder", "False, True": "decoder"}
        values["fusion"] = names.get(str(parts)[1:-1], "none")
    return argparse.Namespace(**{str(key): value for key, value in values.items()})


def is_finished(folder: str) -> bool:
    return os.path.isfile(f"{folder}/config.yaml") and read_record(folder).get("finished", False)


def load_weights(parameters: dict, folder: str, strict: bool = True) -> dict:
    """Fill `parameters` from model.safetensors, all of them and nothing else; its metadata.

    strict=False fills those that the file holds too. Raises UserError where names or shapes differ.
    """
    path = f"{folder}/model.safetensors"
    with named_file(path, "train this stage again with --fresh, or restore the file"):
        saved = load_file(path)
        with safe_open(path, "pt") as f:
            metadata = f.metadata() or {}
    both = saved.keys() & parameters.keys()
    for name in sorted(saved.keys() | parameters.keys() if strict else both):
        there = tuple(saved[name].shape) if name in saved else "absent"
        here = tuple(parameters[name].shape) if name in parameters else "absent"
        if there != here:
            raise UserError(f"{path} does not fit this model and its options: {name} is {there} "
                            f"there, {here} here; use the model, rank, targets and generator it "
                            "was trained with")
    check_finite(saved, f"{path} is not loaded")
    with torch.no_grad():
        for name in both:
            parameters[name].copy_(saved[name])
    return metadata


def resume(folder: str | None, parameters: dict, optimizer) -> int:
    """The step to go on from, parameters and optimizer filled from this checkpoint; None: 0."""
    if folder is None:
        return 0
    metadata, remedy = load_weights(parameters, folder), "start over with --fresh"
    with named_file(f"{folder}/model.safetensors", remedy):
        step = int(metadata["step"])
    with named_file(f"{folder}/optimizer.pt", remedy):
        optimizer.load_state_dict(load_optimizer(folder, step))
    return step


def load_optimizer(folder: str, step: int) -> dict:
    """The optimizer's state that was saved with the weights of this step."""
    path = f"{folder}/optimizer.pt"
    with named_file(path, "start over with --fresh"):
        state = torch.load(path, weights_only=True, map_location="cpu")
        if state["step"] != step:
            raise ValueError(f"it is of step {state['step']}, the weights of {step}")
        return state["optimizer"]
