"""Plumbing that holds no science: errors in one line, processes, run folders, stages, logs."""
import argparse
import contextlib
import datetime
import functools
import glob
import hashlib
import itertools
import json
import os
import pickle
import platform
import shutil
import signal
import subprocess
import sys
import tempfile
import time

import torch
import torch.distributed as dist
import yaml
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

SUITE = "data/sample"                           # the built-in suite's folder; written where it is missing


class UserError(ValueError):
    """A mistake of the user's: one line that says what, where and what to do."""


@contextlib.contextmanager
def named_file(path: str, remedy: str, verb: str = "read"):
    """Within: whatever is wrong with this file or folder becomes a UserError that names it and says what to do."""
    try:
        yield
    except (OSError, ValueError, KeyError, EOFError, RuntimeError, pickle.UnpicklingError, yaml.YAMLError,
            SafetensorError) as error:
        reason = "no such file" if isinstance(error, FileNotFoundError) else getattr(error, "strerror", None) or str(error)
        reason = " ".join(reason.split())[:200]
        raise UserError(f"{path} cannot be {verb}: {reason}; {remedy}") from None


def command(main):
    """Decorator of a script's main(): a UserError ends in one line and exit code 2, everything else keeps its traceback."""
    @functools.wraps(main)
    def run(*args, **kwargs):
        try:
            return main(*args, **kwargs)
        except UserError as error:
            print(f"error: {error}", file=sys.stderr)
            sys.exit(2)
        finally:
            if dist.is_initialized():
                dist.destroy_process_group()
    return run


def read_yaml(path: str, remedy: str) -> dict:
    with named_file(path, remedy), open(path, encoding="utf-8") as f:
        values = yaml.load(f, getattr(yaml, "CSafeLoader", yaml.SafeLoader)) or {}     # the C one is ten times faster
        if not isinstance(values, dict):
            raise ValueError("expected `key: value` lines")
    return values


# -------------------------------------------------------------------------------------------------------- processes

def init_processes(options) -> tuple[int, int]:
    """(rank, world) from torchrun's environment; (0, 1) without it. Nothing to choose: nccl on CUDA, gloo on CPU."""
    world = int(os.environ.get("WORLD_SIZE", 1))
    if world == 1:
        return 0, 1
    if options.device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    if not dist.is_initialized():
        # Ranks with LoRA teachers of their own meet only when all are done.
        dist.init_process_group("nccl" if options.device == "cuda" else "gloo", timeout=datetime.timedelta(days=30))
    return dist.get_rank(), world


def sum_over_ranks(values: list[float], device: str) -> list[float]:
    if not dist.is_initialized():
        return [float(x) for x in values]
    total = torch.tensor(values, dtype=torch.float64, device=device)
    dist.all_reduce(total)
    return total.tolist()


def sum_gradients(parameters, size: int = 2 ** 26) -> None:
    """Add up the ranks' gradients; every loss was already divided by the count over all ranks.

    A message holds the gradients of many parameters, but a copy of about `size` numbers (256 MB) at a time.
    """
    if not dist.is_initialized():
        return
    parameters = list(parameters)
    ends = itertools.accumulate(p.numel() for p in parameters)
    for _, group in itertools.groupby(zip(parameters, ends), key=lambda pair: pair[1] // size):
        group = [p for p, _ in group]
        for p in group:
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad
        flat = torch.cat([p.grad.flatten() for p in group])
        dist.all_reduce(flat)
        for p, g in zip(group, flat.split([p.numel() for p in group])):
            p.grad.copy_(g.view_as(p))


def wait_for_all_ranks() -> None:
    if dist.is_initialized():
        dist.barrier()


class StopSignal:
    """Ctrl-C or SIGTERM asks for a stop; the loop sees it after the step, saves and leaves. A second one kills."""
    def __init__(self):
        self.asked = 0
        self.before = {number: signal.signal(number, self) for number in (signal.SIGINT, signal.SIGTERM)}

    def __call__(self, number, frame):
        signal.signal(number, signal.SIG_DFL)
        self.asked = 1

    def leave_if_asked(self, device: str) -> None:
        """After a stage's last step: a Ctrl-C during it must not start the next stage."""
        if sum_over_ranks([self.asked], device)[0]:
            sys.exit(130)
        for number, handler in self.before.items():
            signal.signal(number, handler)


# ------------------------------------------------------------------------------------------------------------ models

def digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def weights_digest(path: str) -> str:
    """A hash of every weights file in a checkpoint's folder and below; a hub name stands for itself."""
    if not os.path.isdir(path):
        return path
    folder = glob.escape(path)
    files = glob.glob(f"{folder}/**/*.safetensors", recursive=True) + glob.glob(f"{folder}/*.bin")
    return files_digest(sorted(files), path)


def files_digest(files: list[str], root: str) -> str:
    """A hash of these files' names below `root` and of their bytes."""
    digest = hashlib.sha256()
    for file in files:
        with open(file, "rb") as f:
            content = hashlib.file_digest(f, "sha256").digest()
        digest.update(os.path.relpath(file, root).encode() + content)
    return digest.hexdigest()[:16]


def tokenizer_digest(tokenizer) -> str:
    return digest(repr(sorted(tokenizer.get_vocab().items())))


# What a stage read, as its config.yaml has it -> what is said where a run reads another.
DIGESTS = {
    "data_digest": "the training tasks in {data} are not those that {folder} was trained on",
    "text_digest": "the plain text in {text} is not that which {folder} was trained on",
    "tokenizer_digest": "the tokenizer is not the one that {folder} was trained with",
}


def check_digests(options, folder: str, record: dict, keys=tuple(DIGESTS)) -> None:
    """Raises UserError where `folder`, of this config.yaml, read something else than options' run.

    What one of the two does not know (a run of earlier code, files that are gone) is not compared.
    """
    for key in keys:
        now, then = getattr(options, key, None), record.get(key)
        if None not in (now, then) and now != then:
            said = DIGESTS[key].format(**vars(options) | {"folder": folder})
            raise UserError(f"{said}; train it again with --fresh, or put back what it read")


def check_fingerprint(found: str, expected: str, folder: str, llm_path: str) -> None:
    if found != expected:
        raise UserError(f"{folder} was trained on another LLM than the one in {llm_path} now; train it again or "
                        "restore the model it was trained on")


def llm_path(options) -> str:
    """Where the frozen LLM is: --llm base|meta|PATH. Raises UserError naming the command that makes it."""
    return {"base": base_path, "meta": meta_path}.get(options.llm, lambda options: options.llm)(options)


def llm_of(folder: str, options) -> str:
    """Where the frozen LLM of the TAGI in `folder` is, by its options."""
    return os.path.normpath(os.path.join(folder, options.llm_path)) if options.llm_is_relative else options.llm_path


def base_path(options) -> str:
    return finished_stage(options, "base") if options.model == "tiny" else options.model


def meta_path(options) -> str:
    return options.meta_model or finished_stage(options, "meta")


def finished_stage(options, stage: str) -> str:
    folder = os.path.join(options.runs, stage)
    if not is_finished(folder):
        raise UserError(f"{folder} is not there or not finished; first run "
                        f"python train_teacher.py --stage {stage}{config_flag(options)}")
    record = read_yaml(f"{folder}/config.yaml", "train this stage again")
    check_digests(options, folder, record, ["data_digest"])     # stages may read other texts
    return folder


def config_flag(options) -> str:
    return "" if options.config == "configs/sample.yaml" else f" --config {options.config}"


# ------------------------------------------------------------------------------------------------------- run folders

def make_folder(folder: str) -> None:
    with named_file(folder, "choose another folder", "written"):
        os.makedirs(folder, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()                          # a folder that is there may be read-only


def _atomically(path: str, write) -> None:
    write(path + ".tmp")
    umask = os.umask(0)
    os.umask(umask)
    os.chmod(path + ".tmp", 0o666 & ~umask)                                 # safetensors' files are the owner's alone
    os.replace(path + ".tmp", path)


def save_checkpoint(folder: str, options, weights: dict, optimizer=None, step: int = 0, finished: bool = False) -> None:
    """model.safetensors (trainable weights), optimizer.pt where there is one, config.yaml; each replaced atomically.

    A finished stage keeps its optimizer too, so that it can be trained further; `finished` in config.yaml says it is done.
    """
    make_folder(folder)
    tensors = {name: p.detach().contiguous().cpu() for name, p in weights.items()}
    metadata = {"format": "pt", "step": str(step), "targets": options.targets}
    _atomically(f"{folder}/model.safetensors", lambda path: save_file(tensors, path, metadata))
    if optimizer is not None:
        state = {"optimizer": optimizer.state_dict(), "step": step}
        _atomically(f"{folder}/optimizer.pt", lambda path: torch.save(state, path))
    record = {**vars(options), "step": step, "finished": finished, "versions": versions()}
    write_yaml(f"{folder}/config.yaml", record)


def write_yaml(path: str, values: dict) -> None:
    _atomically(path, lambda path: write_text(path, yaml.safe_dump(values, sort_keys=False)))


def write_text(path, text):
    with open(path, "w", encoding="utf-8") as f:
        f.write(text)


def load_options(folder: str, needs: str = "finished") -> argparse.Namespace:
    """A checkpoint's config.yaml. Raises UserError where it cannot be read or lacks the key that this use needs."""
    path = f"{folder}/config.yaml"
    values = read_yaml(path, "it is no checkpoint, or damaged: train it again")
    if needs not in values:
        raise UserError(f"{path} has no {needs}: another kind of run, or damaged; name another, or train it again")
    return argparse.Namespace(**values)


def is_finished(folder: str) -> bool:
    return bool(os.path.isfile(f"{folder}/config.yaml")
                and read_yaml(f"{folder}/config.yaml", "train this stage again").get("finished"))


def load_weights(parameters: dict, folder: str, strict: bool = True) -> dict:
    """Fill `parameters` from model.safetensors, all of them and nothing else; returns the file's metadata.

    strict=False fills those that the file holds too.
    """
    path = f"{folder}/model.safetensors"
    with named_file(path, "train this stage again with --fresh, or restore the file"):
        saved = load_file(path)
        with safe_open(path, "pt") as f:
            metadata = f.metadata() or {}
    for name in sorted(saved.keys() | parameters.keys() if strict else saved.keys() & parameters.keys()):
        have, want = (tuple(d[name].shape) if name in d else "absent" for d in (saved, parameters))
        if have != want:
            raise UserError(f"{path} does not fit this model and its options: {name} is {have} there, {want} here; use "
                            "the model, rank, targets and generator it was trained with")
    with torch.no_grad():
        for name in parameters.keys() & saved.keys():
            parameters[name].copy_(saved[name])
    return metadata


# ------------------------------------------------------------------------------------------------------------ stages

# What may differ between the runs that make up a stage: it does not change the result, or is not the user's to give.
IGNORED = ("config", "fresh", "stages", "device", "threads", "save_every", "log_every", "stage",
           "runs", "teachers_at_once", "processes")


def run_stage(folder: str, options, rank: int, world: int, stage, digest_of_data,
              ranks_share_a_batch: bool = True) -> None:
    """Run a stage unless it is done; rank 0 says what runs, with which effective batch.

    digest_of_data: options -> a hash of what the stage reads, by its key in DIGESTS.
    """
    write_suite(options, rank)
    wait_for_all_ranks()                                                    # rank 0 may still be saving the stage before
    options.processes = world
    vars(options).update(digest_of_data(options))
    if skip_finished(folder, options, rank == 0):
        return
    if ranks_share_a_batch:
        check_processes(folder, options)
    if rank == 0:
        batch, ranks = options.tasks * options.instances * options.accumulate, ""
        if ranks_share_a_batch:
            batch, ranks = batch * world, f"{world} ranks x "
        print(f"{folder}: {options.steps} steps, effective batch {batch} = {ranks}{options.tasks} tasks x "
              f"{options.instances} instances x {options.accumulate} micro-batches, seed {options.seed}, {versions()}")
    stage(options, rank, world)


def write_suite(options, rank: int = 0) -> None:
    """Write the built-in suite where its default folder is asked for and not there."""
    if rank == 0 and options.data == SUITE and not os.path.isdir(SUITE):
        import sample
        print("writing the built-in suite:", end=" ", flush=True)
        sample.write_suite(SUITE, seed=0)


def skip_finished(folder: str, options, print_it: bool) -> bool:
    """True where this stage is done with these options. Raises UserError where a run with other options is there."""
    if options.fresh or not os.path.isfile(f"{folder}/config.yaml"):
        return False
    old = vars(load_options(folder))
    for key, value in vars(options).items():
        if key not in IGNORED and key not in DIGESTS and old.get(key, value) != value:
            raise UserError(f"{folder} holds a run with --{key.replace('_', '-')} {old[key]}, not {value}; start over with "
                            "--fresh, or keep it and choose another folder with --runs")
    check_digests(options, folder, old)
    if old["finished"] and print_it:
        print(f"{folder}: finished at step {old['step']}, nothing to do (--fresh starts over)")
    return bool(old["finished"])


def check_processes(folder: str, options) -> None:
    """Raises UserError where an unfinished run had another number of processes, so another batch.

    A config.yaml from before that number was recorded is taken as it is.
    """
    if options.fresh or not os.path.isfile(f"{folder}/config.yaml"):
        return
    old, new = vars(load_options(folder)).get("processes", options.processes), options.processes
    if old != new:
        micros = old * options.accumulate
        same = f" --accumulate {micros // new} (the same batch)" if micros % new == 0 else ""
        raise UserError(f"{folder} holds an unfinished run of {old} processes, not {new}: the "
                        f"batch would change; go on with {old} (torchrun --nproc-per-node {old}), "
                        f"or start over with --fresh{same}")


def resume(folder: str, options, parameters: dict, optimizer) -> int:
    """The step to go on from: 0 on a fresh run. Fills parameters and optimizer from an unfinished run's checkpoint."""
    if options.fresh or not os.path.isfile(f"{folder}/config.yaml"):
        return 0
    step, path = int(load_weights(parameters, folder)["step"]), f"{folder}/optimizer.pt"
    with named_file(path, "start over with --fresh"):
        state = torch.load(path, weights_only=True, map_location="cpu")
    if state["step"] != step:
        raise UserError(f"{folder} was cut off while it was being written; start over with --fresh")
    optimizer.load_state_dict(in_groups_of(optimizer, state["optimizer"]))
    return step


def in_groups_of(optimizer, state: dict) -> dict:
    """A saved state, with this optimizer's groups.

    Runs made before the student's gains had a group of their own have them at the end of the only
    one, so that every parameter has the same number.
    """
    if "parts" in state:
        pairs = zip(optimizer.parts, state["parts"], strict=True)
        return {"parts": [in_groups_of(part, its) for part, its in pairs]}
    return {**state, "param_groups": optimizer.state_dict()["param_groups"]}


def begin(folder: str, options, rank: int) -> None:
    """Just before the first step, all that the stage needs having been read: only here --fresh removes the old run."""
    if not options.fresh and os.path.isfile(f"{folder}/config.yaml"):
        check_digests(options, folder, vars(load_options(folder)))
        if "llm_fingerprint" in options:
            before = load_options(folder, "llm_fingerprint").llm_fingerprint
            check_fingerprint(options.llm_fingerprint, before, folder, llm_path(options))
    if rank == 0:
        if options.fresh:
            shutil.rmtree(folder, ignore_errors=True)
        make_folder(folder)
    wait_for_all_ranks()


def leave(folder: str, step: int, log) -> None:
    """End after a Ctrl-C, with what was saved and how to go on."""
    log.close()
    print(f"\nstopped after step {step}; {folder} is saved: run the same command again to go on")
    sys.exit(130)


def versions() -> dict:
    import transformers
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True,
                            cwd=os.path.dirname(os.path.abspath(__file__)))
    return {"python": platform.python_version(), "torch": str(torch.__version__),
            "transformers": transformers.__version__, "git": commit.stdout.strip() or "none"}


class Log:
    """A progress bar and log.jsonl of one stage, on rank 0 only.

    summed: the terms are shares of the ranks, which are added up; then every rank has to call this at every step.
    """
    def __init__(self, folder: str, options, start: int, rank: int, summed: bool = True):
        from tqdm import tqdm
        self.rank, self.every, self.steps, self.t = rank, options.log_every, options.steps, time.time()
        self.summed, self.device = summed, options.device
        self.bar = tqdm(total=options.steps, initial=start, desc=os.path.basename(folder), disable=rank > 0,
                        mininterval=2, dynamic_ncols=True, file=sys.stdout)
        if rank == 0:
            self.file = open(f"{folder}/log.jsonl", "a", buffering=1)

    def __call__(self, step: int, lr: float, terms: dict) -> None:
        """terms: detached tensors of this step; read (and so synchronised) only every log_every steps."""
        self.bar.update(1)
        if step % self.every and step != self.steps:
            return
        values = [float(v) for v in terms.values()]
        if self.summed:
            values = sum_over_ranks(values, self.device)
        if self.rank == 0:
            values = {k: float(f"{v:.5g}") for k, v in zip(terms, values)}
            self.bar.set_postfix(values)
            self.file.write(json.dumps({"step": step, "lr": lr, **values, "seconds": round(time.time() - self.t, 2)}) + "\n")

    def close(self):
        self.bar.close()
