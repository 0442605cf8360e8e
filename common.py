"""Plumbing that holds no science: mistakes in one line, files, processes, run folders, logs."""
import argparse
import contextlib
import datetime
import functools
import hashlib
import json
import os
import pickle
import platform
import signal
import subprocess
import sys
import tempfile

import torch
import torch.distributed as dist
import torch.distributed.nn     # its defaults keep a process group that was made before the import
import yaml
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

# ------------------------------------------------------------------------------ mistakes, files


class UserError(ValueError):
    """A mistake of the user's: one line that says what, where and what to do."""


@contextlib.contextmanager
def named_file(path: str, remedy: str, verb: str = "read"):
    """Within: whatever is wrong with this file or folder becomes a UserError that names it."""
    try:
        yield
    except (OSError, ValueError, KeyError, EOFError, RuntimeError, pickle.UnpicklingError,
            yaml.YAMLError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        if isinstance(error, FileNotFoundError):
            reason = "no such file"
        reason = " ".join(reason.split())[:200]
        raise UserError(f"{path} cannot be {verb}: {reason}; {remedy}") from None


def command(main):
    """Decorator of a script's main(): a UserError ends in one line and exit code 2."""
    @functools.wraps(main)
    def run(*args, **kwargs):
        try:
            return main(*args, **kwargs)
        except UserError as error:
            print(f"error: {error}", file=sys.stderr)
            sys.exit(2)
        except KeyboardInterrupt:
            sys.exit(130)
        except BrokenPipeError:                         # | head: nobody reads on
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        finally:
            if dist.is_initialized():
                dist.destroy_process_group()
    return run


def read_yaml(path: str, remedy: str) -> dict:
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)      # the C one is ten times faster
    with named_file(path, remedy), open(path, encoding="utf-8") as f:
        values = yaml.load(f, loader) or {}
        if not isinstance(values, dict):
            raise ValueError("expected `key: value` lines")
    return values


def read_json_lines(path: str, remedy: str, **types: type) -> list[dict]:
    """The objects of a JSON-lines file, each with these keys, their values of these types.

    Raises UserError naming file and line for anything else, and for a file without lines.
    """
    with named_file(path, remedy), open(path, encoding="utf-8") as f:
        lines = f.read().split("\n")
    rows = []
    for n, line in enumerate(lines, 1):
        if not line.strip():
            continue
        where = f"{path}, line {n}"
        with named_file(where, remedy):
            row = json.loads(line)
        if not isinstance(row, dict):
            raise UserError(f"{where}: no JSON object; {remedy}")
        for key, kind in types.items():
            if key not in row:
                raise UserError(f"{where}: no {key}; {remedy}")
            value = row[key]
            if not isinstance(value, kind) or (kind is list and not is_texts(value)):
                name = {str: "text", list: "list of texts"}.get(kind, "number")
                raise UserError(f"{where}: {key} is {str(value)[:40]}, no {name}; {remedy}")
        rows.append(row)
    if not rows:
        raise UserError(f"{path} is empty; {remedy}")
    return rows


def is_texts(value) -> bool:
    """Whether it is a list of texts, and not empty."""
    return isinstance(value, list) and value != [] and all(isinstance(x, str) for x in value)


def make_folder(folder: str) -> None:
    with named_file(folder, "choose another folder", "written"):
        os.makedirs(folder, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()      # a folder that is there may be read-only


def write_text(path: str, text: str) -> None:
    with open(path, "w", encoding="utf-8") as f:
        f.write(text)


def write_yaml(path: str, values: dict) -> None:
    _atomically(path, lambda path: write_text(path, yaml.safe_dump(values, sort_keys=False)))


def save_tensors(path: str, tensors: dict, metadata: dict | None = None) -> None:
    tensors = {name: p.detach().contiguous().cpu() for name, p in tensors.items()}
    _atomically(path, lambda path: save_file(tensors, path, metadata))


def _atomically(path: str, write) -> None:
    write(path + ".tmp")
    os.umask(umask := os.umask(0))                      # the only way to read it
    os.chmod(path + ".tmp", 0o666 & ~umask)             # safetensors' files are the owner's alone
    os.replace(path + ".tmp", path)


# ------------------------------------------------------------------------------------ processes

def init_processes(device: str) -> tuple[int, int]:
    """(rank, world) by torchrun's environment, (0, 1) without it; nccl on CUDA, gloo on CPU."""
    world = int(os.environ.get("WORLD_SIZE", 1))
    if world == 1:
        return 0, 1
    if device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    if not dist.is_initialized():
        patience = datetime.timedelta(days=30)          # LoRA teachers: ranks meet at the end
        dist.init_process_group("nccl" if device == "cuda" else "gloo", timeout=patience)
    return dist.get_rank(), world


def sum_over_ranks(values: list[float], device: str) -> list[float]:
    if not dist.is_initialized():
        return [float(x) for x in values]
    total = torch.tensor(values, dtype=torch.float64, device=device)
    dist.all_reduce(total)
    return total.tolist()


def wait_for_all_ranks() -> None:
    if dist.is_initialized():
        dist.barrier()


class StopSignal:
    """Ctrl-C or SIGTERM asks for a stop, which the loop sees after its step. A second one kills."""

    def __init__(self):
        self.asked, numbers = 0, (signal.SIGINT, signal.SIGTERM)
        self.before = {number: signal.signal(number, self) for number in numbers}   # -> handler

    def __call__(self, number, frame):
        signal.signal(number, signal.SIG_DFL)
        self.asked = 1

    def leave_if_asked(self, device: str) -> None:
        """After a stage's last step: a Ctrl-C during it must not start the next stage."""
        if sum_over_ranks([self.asked], device)[0]:
            sys.exit(130)
        for number, handler in self.before.items():
            signal.signal(number, handler)


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
    """Write model.safetensors, optimizer.pt where there is one, and config.yaml, each atomically.

    record: options and what the run found out; weights: what was trained, {name: tensor}.
    """
    make_folder(folder)
    metadata = {"format": "pt", "step": str(step), "targets": record["targets"]}
    save_tensors(f"{folder}/model.safetensors", weights, metadata)
    if optimizer is not None:
        state = {"optimizer": optimizer.state_dict(), "step": step}
        _atomically(f"{folder}/optimizer.pt", lambda path: torch.save(state, path))
    last = {"step": step, "finished": finished, "versions": versions()}
    write_yaml(f"{folder}/config.yaml", {**record, **last})


def load_options(folder: str, needs: str = "finished") -> argparse.Namespace:
    """A checkpoint's config.yaml. Raises UserError where it lacks the key that this use needs."""
    path = f"{folder}/config.yaml"
    values = read_yaml(path, "it is no checkpoint, or damaged: train it again")
    if needs not in values:
        raise UserError(f"{path} has no {needs}: another kind of run, or damaged; name another, "
                        "or train it again")
    # Earlier code had a switch for the generator and one for each part of fusion.
    if values.get("hypernetwork") is False:
        values["generator"] = "none"
    if "encoder_fusion" in values:
        parts = (values["encoder_fusion"], values["decoder_fusion"])
        names = {(True, True): "both", (True, False): "encoder", (False, True): "decoder"}
        values["fusion"] = names.get(parts, "none")
    return argparse.Namespace(**values)


def is_finished(folder: str) -> bool:
    path = f"{folder}/config.yaml"
    return os.path.isfile(path) and bool(read_yaml(path, "train this stage again").get("finished"))


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
    with torch.no_grad():
        for name in both:
            parameters[name].copy_(saved[name])
    return metadata


def resume(folder: str, fresh: bool, parameters: dict, optimizer) -> int:
    """The step to go on from, parameters and optimizer filled; 0 where there is no run yet."""
    if fresh or not os.path.isfile(f"{folder}/config.yaml"):
        return 0
    step = int(load_weights(parameters, folder)["step"])
    path = f"{folder}/optimizer.pt"
    with named_file(path, "start over with --fresh"):
        state = torch.load(path, weights_only=True, map_location="cpu")
    if state["step"] != step:
        raise UserError(f"{folder} was cut off while it was being written; start over with --fresh")
    optimizer.load_state_dict(state["optimizer"])
    return step


def versions() -> dict:
    import transformers
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True,
                            text=True, cwd=os.path.dirname(os.path.abspath(__file__)))
    return {"python": platform.python_version(), "torch": str(torch.__version__),
            "transformers": transformers.__version__, "git": commit.stdout.strip() or "none"}
