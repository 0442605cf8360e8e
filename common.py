"""Plumbing that holds no science: options, errors in one line, processes, loading the LLM, run folders, logs."""
import argparse
import difflib
import functools
import hashlib
import json
import logging
import math
import os
import platform
import shutil
import signal
import subprocess
import sys
import time

import torch
import torch.distributed as dist
import yaml
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

SECTIONS = ("base", "meta", "lora", "pretrain", "finetune", "evaluate")    # what a config file may hold beside options


class UserError(Exception):
    """A mistake of the user's: one line that says what, where and what to do."""


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


# ---------------------------------------------------------------------------------------------------------- options

class Parser(argparse.ArgumentParser):
    def __init__(self, doc, **kwargs):
        super().__init__(description=doc, **kwargs, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)

    def error(self, message):
        print(f"error: {message} (--help lists the options)", file=sys.stderr)
        sys.exit(2)

    def known(self):
        return {s[2:] for a in self._actions for s in a.option_strings if s.startswith("--") and s != "--help"}


def add_shared_options(parser: Parser) -> None:
    """The options that every script has and that may stand at the top level of a config file."""
    g = parser.add_argument_group("run")
    g.add_argument("--config", default="configs/sample.yaml", help="YAML file of options; the command line goes before it")
    g.add_argument("--runs", default="runs/sample", help="folder that holds one folder per stage")
    g.add_argument("--seed", type=int, default=0)
    g.add_argument("--device", default="auto", choices=["auto", "cpu", "cuda"])
    g.add_argument("--precision", default="fp32", choices=["fp32", "bf16"], help="bf16: frozen LLM in bf16, autocast")
    g.add_argument("--threads", type=int, default=0, help="CPU threads; 0: PyTorch's default")
    g.add_argument("--fresh", action="store_true", help="start over instead of resuming or skipping what is done")
    g.add_argument("--stages", default="base,meta,lora", help="train_teacher.py's stages, in order")
    g = parser.add_argument_group("data")
    g.add_argument("--data", default="data/sample", help="a folder in Super-NaturalInstructions' layout")
    g.add_argument("--max-instances", type=int, default=100, help="instances per training task")
    g.add_argument("--demos", default="0", choices=["0", "2", "mixed"],
                   help="demonstrations beside the definition; mixed: 0 or 2, drawn for each batch")
    g.add_argument("--max-instruction", type=int, default=1024, help="tokens of an instruction, demonstrations included")
    g.add_argument("--max-input", type=int, default=1024, help="tokens of an input, instruction included where it is read")
    g.add_argument("--max-output", type=int, default=128, help="tokens of an output")
    g = parser.add_argument_group("models")
    g.add_argument("--model", default="tiny", help="any T5-family checkpoint or folder, or `tiny`: trained here")
    g.add_argument("--attention", default="sdpa", choices=["sdpa", "eager"], help="Transformers' attention code in the LLM; "
                   "eager is faster for short texts on a CPU")
    g.add_argument("--llm", default="meta", help="the frozen LLM under teachers and student: base (--model itself), "
                   "meta (after train_teacher.py --stage meta) or a checkpoint")
    g.add_argument("--targets", default="q,v", help="projections with LoRA, of q,k,v,o,wi,wi_0,wi_1,wo")
    g.add_argument("--rank", type=int, default=32, help="LoRA rank r")
    g.add_argument("--alpha", type=float, default=32.0, help="LoRA alpha; the update is scaled by alpha / r")
    g.add_argument("--unit", default="category", choices=["category", "task", "all"], help="what one LoRA teacher is for")


def add_training_options(parser: Parser, steps: int) -> None:
    g = parser.add_argument_group("training")
    g.add_argument("--steps", type=int, default=steps)
    g.add_argument("--tasks", type=int, default=8, help="tasks in a micro-batch of one rank")
    g.add_argument("--instances", type=int, default=1, help="instances of each of these tasks")
    g.add_argument("--accumulate", type=int, default=1, help="micro-batches per step and rank")
    g.add_argument("--optimizer", default="adamw", choices=["adamw", "adafactor"])
    g.add_argument("--lr", type=float, default=1e-4)
    g.add_argument("--schedule", default="linear", choices=["linear", "cosine", "constant"])
    g.add_argument("--warmup", type=float, default=0.02, help="share of the steps")
    g.add_argument("--weight-decay", type=float, default=0.01)
    g.add_argument("--beta2", type=float, default=0.999)
    g.add_argument("--clip", type=float, default=1.0, help="largest gradient norm; 0: no clipping")
    g.add_argument("--save-every", type=int, default=1000, help="steps between checkpoints")
    g.add_argument("--log-every", type=int, default=20)


def parse(parser: Parser, section: str, argv=None) -> argparse.Namespace:
    """Options of one stage: the command line, before the config's section, before its top level, before the defaults.

    The file's values become words of the command line, so they pass through the same types and choices.
    """
    known = parser.known()
    words = sys.argv[1:] if argv is None else argv
    if "-h" in words or "--help" in words:
        parser.print_help()
        sys.exit(0)
    early, _ = _quiet(parser).parse_known_args(argv)
    config = read_yaml(early.config)
    top = {k: v for k, v in config.items() if k not in SECTIONS}
    own = config.get(section) or {}
    shared = Parser("")
    add_shared_options(shared)
    words = []
    for where, values, allowed in ((early.config, top, shared.known()), (f"{early.config}, {section}:", own, known)):
        for key, value in values.items():
            name = str(key).replace("_", "-")
            if name not in allowed:
                close = difflib.get_close_matches(name, allowed | set(SECTIONS if where == early.config else ()), 1)
                raise UserError(f"{where}: unknown key '{key}'" + (f"; did you mean '{close[0]}'?" if close else ""))
            if isinstance(value, bool):
                words.append(f"--{name}" if value else f"--no-{name}")
            elif value is not None:
                words.append(f"--{name}={','.join(map(str, value)) if isinstance(value, list) else value}")
    options, rest = parser.parse_known_args(words + list(sys.argv[1:] if argv is None else argv))
    if rest:
        close = difflib.get_close_matches(rest[0].partition("=")[0].lstrip("-"), known, 1)
        raise UserError(f"unknown option {rest[0]}" + (f"; did you mean --{close[0]}?" if close else ""))
    if options.rank < 1:
        raise UserError(f"--rank must be at least 1, not {options.rank}")
    if options.threads:
        torch.set_num_threads(options.threads)
    if options.device == "auto":
        options.device = "cuda" if torch.cuda.is_available() else "cpu"
    return options


def _quiet(parser):
    early = Parser("", add_help=False)
    early.add_argument("--config", default=parser.get_default("config"))
    return early


def read_yaml(path: str) -> dict:
    if not os.path.isfile(path):
        raise UserError(f"{path}: no such file; name an existing config with --config")
    try:
        with open(path) as f:
            values = yaml.safe_load(f) or {}
    except yaml.YAMLError as error:
        raise UserError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict):
        raise UserError(f"{path}: expected `key: value` lines")
    return values


def learning_rate(options, step: int) -> float:
    """Warm-up over the first share of the steps, then linear to 0, cosine to 3 % or constant; step counts from 0."""
    warmup = max(1, round(options.warmup * options.steps))
    if step < warmup:
        return options.lr * (step + 1) / warmup
    done = (step - warmup) / max(1, options.steps - warmup)
    return options.lr * {"linear": 1 - done, "cosine": 0.03 + 0.97 * (1 + math.cos(math.pi * done)) / 2,
                         "constant": 1.0}[options.schedule]


def make_optimizer(parameters, options):
    if options.optimizer == "adafactor":
        return torch.optim.Adafactor(parameters, lr=options.lr, weight_decay=options.weight_decay)
    return torch.optim.AdamW(parameters, lr=options.lr, betas=(0.9, options.beta2), weight_decay=options.weight_decay, fused=True)


# -------------------------------------------------------------------------------------------------------- processes

def init_processes(options) -> tuple[int, int]:
    """(rank, world) from torchrun's environment; (0, 1) without it. Nothing to choose: nccl on CUDA, gloo on CPU."""
    world = int(os.environ.get("WORLD_SIZE", 1))
    if world == 1:
        return 0, 1
    if options.device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    if not dist.is_initialized():
        dist.init_process_group("nccl" if options.device == "cuda" else "gloo")
    return dist.get_rank(), world


def sum_over_ranks(values: list[float], device: str) -> list[float]:
    total = torch.tensor(values, dtype=torch.float64, device=device)
    if dist.is_initialized():
        dist.all_reduce(total)
    return total.tolist()


def sum_gradients(parameters) -> None:
    """Add up the ranks' gradients in one message; every loss was already divided by the count over all ranks."""
    if dist.is_initialized():
        for p in parameters:
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad
        flat = torch.cat([p.grad.flatten() for p in parameters])
        dist.all_reduce(flat)
        for p, g in zip(parameters, flat.split([p.numel() for p in parameters])):
            p.grad.copy_(g.view_as(p))


class StopSignal:
    """Ctrl-C or SIGTERM asks for a stop; the loop sees it after the step, saves and leaves. A second one kills."""
    def __init__(self):
        self.asked = 0
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self)

    def __call__(self, number, frame):
        signal.signal(number, signal.SIG_DFL)
        self.asked = 1


# ------------------------------------------------------------------------------------------------------------ models

def load_llm(path: str, device: str = "cpu", precision: str = "fp32", attention: str = "sdpa"):
    """(llm, tokenizer) of a T5-family checkpoint: a hub name or a local folder.

    Raises UserError where it cannot be found or read, is no encoder-decoder, or its tokenizer has no end token.
    """
    from transformers import AutoModelForSeq2SeqLM, AutoTokenizer, logging as hf_logging
    hf_logging.set_verbosity_error()
    hf_logging.disable_progress_bar()
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    if (os.path.isabs(path) or path.startswith(".")) and not os.path.isdir(path):
        raise UserError(f"{os.path.normpath(path)}: no such folder with a T5-family checkpoint")
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    try:
        tokenizer = AutoTokenizer.from_pretrained(path)
        llm = AutoModelForSeq2SeqLM.from_pretrained(path, dtype=dtype, attn_implementation=attention)
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise UserError(f"cannot load a T5-family model from {path}: {' '.join(str(error).split())[:200]}") from None
    if tokenizer.eos_token_id is None:
        raise UserError(f"{path}: its tokenizer has no end token; use a T5-family tokenizer")
    return llm.to(device), tokenizer


def fingerprint(llm) -> str:
    """A short hash of the LLM's shapes and of a few of its values, the same in fp32 and bf16."""
    digest = hashlib.sha256()
    for name, p in sorted(llm.state_dict().items()):
        values = p.flatten()[:16].to(torch.bfloat16).float().cpu().numpy()
        digest.update(f"{name.replace('.linear.', '.')}{tuple(p.shape)}".encode() + values.tobytes())
    return digest.hexdigest()[:16]


def check_fingerprint(llm, expected: str, folder: str, llm_path: str, found: str | None = None) -> None:
    if (found or fingerprint(llm)) != expected:
        raise UserError(f"{folder} was trained on another LLM than the one in {llm_path} now; train it again or "
                        "restore the model it was trained on")


def llm_path(options) -> str:
    """Where the frozen LLM is: --llm base|meta|PATH. Raises UserError naming the command that makes it."""
    if options.llm == "base" and options.model != "tiny":
        return options.model
    if options.llm not in ("base", "meta"):
        return options.llm
    folder = os.path.join(options.runs, options.llm)
    if not is_finished(folder):
        raise UserError(f"{folder} is not there or not finished; first run "
                        f"python train_teacher.py --stage {options.llm}{config_flag(options)}")
    return folder


def config_flag(options) -> str:
    return "" if options.config == "configs/sample.yaml" else f" --config {options.config}"


# ------------------------------------------------------------------------------------------------------- run folders

def _atomically(path: str, write) -> None:
    write(path + ".tmp")
    os.replace(path + ".tmp", path)


def save_checkpoint(folder: str, options, weights: dict, optimizer=None, step: int = 0, finished: bool = False) -> None:
    """config.yaml, model.safetensors (trainable weights) and, while unfinished, optimizer.pt; each replaced atomically.

    A finished stage keeps its optimizer too, so that it can be trained further; `finished` in config.yaml says it is done.
    """
    os.makedirs(folder, exist_ok=True)
    tensors = {name: p.detach().contiguous().cpu() for name, p in weights.items()}
    _atomically(f"{folder}/model.safetensors", lambda path: save_file(tensors, path, {"format": "pt", "step": str(step)}))
    if optimizer is not None:
        state = {"optimizer": optimizer.state_dict(), "step": step}
        _atomically(f"{folder}/optimizer.pt", lambda path: torch.save(state, path))
    record = {**vars(options), "step": step, "finished": finished, "versions": versions()}
    _atomically(f"{folder}/config.yaml", lambda path: write_text(path, yaml.safe_dump(record, sort_keys=False)))


def write_text(path, text):
    with open(path, "w") as f:
        f.write(text)


def is_finished(folder: str) -> bool:
    path = f"{folder}/config.yaml"
    return os.path.isfile(path) and bool(read_yaml(path).get("finished"))


def make_folder(folder):
    try:
        os.makedirs(folder, exist_ok=True)
        with open(f"{folder}/.write.tmp", "w"):
            pass
        os.remove(f"{folder}/.write.tmp")
    except OSError as error:
        raise UserError(f"{folder} cannot be written: {error.strerror}; choose another with --runs") from None


def load_options(folder: str, needs=()) -> argparse.Namespace:
    if not os.path.isdir(folder):
        raise UserError(f"{folder}: no such checkpoint folder")
    values = read_yaml(f"{folder}/config.yaml") if os.path.isfile(f"{folder}/config.yaml") else {}
    for key in needs:
        if key not in values:
            raise UserError(f"{folder}/config.yaml is missing, damaged or of another kind of run: it has no {key}; train it again with --fresh")
    return argparse.Namespace(**values)


def load_weights(parameters: dict, folder: str, strict: bool = True) -> int:
    """Fill `parameters` from model.safetensors, all of them and (where strict) nothing else; returns its step."""
    path = f"{folder}/model.safetensors"
    if not os.path.isfile(path):
        raise UserError(f"{path}: no such file; train this stage first")
    try:
        saved = load_file(path)
    except SafetensorError as error:
        raise UserError(f"{path} is damaged ({error}); train this stage again with --fresh, or restore the file") from None
    for name in sorted(saved.keys() | parameters.keys() if strict else parameters.keys()):
        have, want = (tuple(d[name].shape) if name in d else "absent" for d in (saved, parameters))
        if have != want:
            raise UserError(f"{path} does not fit this model and its options: {name} is {have} there, {want} here; use "
                            "the model, rank, targets and generator it was trained with")
    with torch.no_grad():
        for name, p in parameters.items():
            p.copy_(saved[name])
    with safe_open(path, "pt") as f:
        return int((f.metadata() or {}).get("step", 0))


def load_shared_weights(parameters: dict, folder: str) -> None:
    """Fill those of `parameters` that model.safetensors holds too."""
    path = f"{folder}/model.safetensors"
    try:
        saved = load_file(path)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path} is missing or damaged; train it again with --fresh") from None
    load_weights({name: p for name, p in parameters.items() if name in saved}, folder, strict=False)


IGNORED = ("config", "fresh", "stages", "device", "threads", "save_every", "log_every", "stage", "runs", "versions", "step", "finished",
           "data", "git")


def resume(folder: str, options, parameters: dict, optimizer) -> int:
    """The step to go on from: 0 on a fresh run. Fills parameters and optimizer from an unfinished run's checkpoint."""
    if options.fresh or not os.path.isfile(f"{folder}/config.yaml"):
        return 0
    step = load_weights(parameters, folder)
    try:
        state = torch.load(f"{folder}/optimizer.pt", weights_only=True, map_location="cpu")
    except Exception:
        raise UserError(f"{folder}/optimizer.pt is missing or damaged; start over with --fresh") from None
    if getattr(options, "llm_fingerprint", None) != vars(load_options(folder)).get("llm_fingerprint"):
        raise UserError(f"{folder} was begun on another LLM than the one in {os.path.normpath(os.path.join(folder, options.llm_path))} now; start over with --fresh")
    if state["step"] != step:
        raise UserError(f"{folder} was cut off while it was being written; start over with --fresh")
    optimizer.load_state_dict(state["optimizer"])
    return step


def skip_finished(folder: str, options, print_it: bool) -> bool:
    """True where this stage is done with these options. Raises UserError where a run with other options is there."""
    if options.fresh or not os.path.isfile(f"{folder}/config.yaml"):
        return False
    old = vars(load_options(folder))
    for key, value in vars(options).items():
        if key not in IGNORED and old.get(key, value) != value:
            raise UserError(f"{folder} holds a run with --{key.replace('_', '-')} {old[key]}, not {value}; start over with "
                            "--fresh, or keep it and choose another folder with --runs")
    if old.get("finished") and print_it:
        print(f"{folder}: finished at step {old['step']}, nothing to do (--fresh starts over)")
    return bool(old.get("finished"))


def run_stage(folder: str, options, rank: int, world: int, stage) -> None:
    """Run a stage unless it is done; rank 0 says what runs, with which effective batch."""
    if skip_finished(folder, options, rank == 0):
        return
    if options.fresh and rank == 0:
        shutil.rmtree(folder, ignore_errors=True)
    wait_for_all_ranks()
    if rank == 0:
        batch = options.tasks * options.instances * options.accumulate * world
        print(f"{folder}: {options.steps} steps, effective batch {batch} = {world} ranks x {options.tasks} tasks x "
              f"{options.instances} instances x {options.accumulate} micro-batches, seed {options.seed}, {versions()}")
    stage(options, rank, world)


def wait_for_all_ranks() -> None:
    if dist.is_initialized():
        dist.barrier()


def leave(folder: str, step: int, log) -> None:
    """End after a Ctrl-C, with what was saved and how to go on."""
    log.close()
    print(f"\nstopped after step {step}; {folder} is saved: run the same command again to go on")
    sys.exit(130)


def save_teacher(folder: str, options, unit: str, llm_fingerprint: str, weights) -> None:
    """One LoRA teacher as a checkpoint folder of its own, named after its unit."""
    options = argparse.Namespace(**{**vars(options), "unit_name": unit, "llm_fingerprint": llm_fingerprint})
    tensors = {f"{site}.{ab}": w for site, pair in weights.items() for ab, w in zip(("lora_A", "lora_B"), pair)}
    save_checkpoint(os.path.join(folder, slug(unit)), options, tensors, step=options.steps, finished=True)


def load_teachers(folder: str, units: list[str], llm, llm_fingerprint: str, options, command: str) -> dict:
    """The teachers of these units, stacked: {site: (lora_A (U, r, D_in), lora_B (U, D_out, r))}.

    Raises UserError where one is missing, or is of another LLM, rank or set of projections than the options'.
    """
    from lora import init_weights
    stacked = init_weights(llm, options.rank, 0, len(units))
    for n, unit in enumerate(units):
        path = os.path.join(folder, slug(unit))
        if not is_finished(path):
            raise UserError(f"{path}: no LoRA teacher for {unit}; first run {command}")
        check_fingerprint(llm, load_options(path).llm_fingerprint, path, "the frozen LLM", llm_fingerprint)
        load_weights({f"{site}.{ab}": w[n] for site, pair in stacked.items()
                      for ab, w in zip(("lora_A", "lora_B"), pair)}, path)
    return stacked


def slug(name: str) -> str:
    return "".join(c if c.isalnum() else "_" for c in name.lower())


def versions() -> dict:
    import transformers
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True,
                            cwd=os.path.dirname(os.path.abspath(__file__)))
    return {"python": platform.python_version(), "torch": str(torch.__version__),
            "transformers": transformers.__version__, "git": commit.stdout.strip() or "none"}


class Log:
    """A progress bar and log.jsonl of one stage, on rank 0 only."""
    def __init__(self, folder: str, options, start: int, rank: int):
        from tqdm import tqdm
        self.shared = dist.is_initialized() and os.path.basename(folder) != "lora"
        self.rank, self.every, self.steps, self.t = rank, options.log_every, options.steps, time.time()
        self.bar = tqdm(total=options.steps, initial=start, desc=os.path.basename(folder), disable=rank > 0,
                        mininterval=2, dynamic_ncols=True, file=sys.stdout)
        if rank == 0:
            os.makedirs(folder, exist_ok=True)
            self.file = open(f"{folder}/log.jsonl", "a", buffering=1)

    def __call__(self, step: int, lr: float, terms: dict) -> None:
        """terms: detached tensors of this step; read (and so synchronised) only every log_every steps."""
        self.bar.update(1)
        if step % self.every and step != self.steps:
            return
        values = sum_over_ranks([float(v) for v in terms.values()], "cpu") if self.shared else list(terms.values())
        if self.rank == 0:
            values = {k: float(f"{v:.5g}") for k, v in zip(terms, values)}
            self.bar.set_postfix(values)
            self.file.write(json.dumps({"step": step, "lr": lr, **values, "seconds": round(time.time() - self.t, 2)}) + "\n")

    def close(self):
        self.bar.close()
