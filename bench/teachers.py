"""LoRA teachers: their files, a folder for each below a run's, and their factors made alike."""
import glob
import os

import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors.torch import load_file

import common
import config
import lora
import t5
from bench import recorded, shard
from bench.folders import remove_ours, teacher_folder, writing
from common import UserError
from hypernet import TAGI


def save_teacher(folder: str, record: dict, teacher: str, weights: lora.Weights,
                 optimizer: dict | None = None) -> None:
    """Write a finished teacher's weights, (r, D_in) and (D_out, r) per site, as a checkpoint.

    record: options and what the run found out, llm_fingerprint among it; optimizer: its state.
    """
    path = teacher_folder(folder, teacher)
    remove_ours(path)                           # of fewer --steps
    with writing(path):
        common.save_checkpoint(path, record | {"unit_name": teacher}, lora.flatten(weights),
                               optimizer, record["steps"], finished=True)


def save_record(run, step: int = 0, finished: bool = False) -> None:
    """What config.yaml tells of the whole stage, beside its teachers' folders."""
    with writing(run.folder):
        common.save_checkpoint(run.folder, run.record(), {}, step=step, finished=finished)


def check_teachers(folder: str, teachers: list[str], expected: dict, command: str) -> list[dict]:
    """Each teacher's record. Raises UserError where one is not there, finished or as expected.

    expected: the llm_fingerprint, rank and alpha that are needed; command: what trains teachers.
    """
    records = []
    for teacher in teachers:
        path = teacher_folder(folder, teacher)
        if not common.is_finished(path):
            raise UserError(f"{path}: no LoRA teacher for {teacher}; first run {command}")
        record = vars(recorded.load_options(path, ("llm_fingerprint",)))
        config.check_fits(expected, path, record, ("rank", "alpha"),
                          "the frozen LLM's folder", f"train again: {command} --fresh")
        records.append(record)
    return records


def load_teachers(folder: str, teachers: list[str], llm: nn.Module, expected: dict,
                  command: str) -> lora.Weights:
    """These teachers stacked, {site: (lora_A (U, r, D_in), lora_B (U, D_out, r))}.

    expected: as for `check_teachers`, and the digests of what they are to have read. Raises
    UserError as that does, and where one is for other projections or read something else.
    """
    records = check_teachers(folder, teachers, expected, command)
    stacked = lora.init_weights(llm, expected["rank"], 0, len(teachers))
    for n, (teacher, record) in enumerate(zip(teachers, records)):
        path = teacher_folder(folder, teacher)
        common.check_digests(expected, path, record)
        common.load_weights(lora.flatten(lora.select(stacked, n)), path)
    return stacked


def rows_of(stacked: lora.Weights, index) -> lora.Weights:
    """Teachers' weights for a batch, row index[n] for its n-th, from the CPU with --shard."""
    home = next(iter(stacked.values()))[0].device
    picked = {}
    for site, (A, B) in lora.select(stacked, index.to(home)).items():
        picked[site] = A.to(index.device), B.to(index.device)
    return picked


def load_start(options, run, path, tasks_of):
    """The TAGI of --init-from. Raises UserError where it generates no start for these teachers."""
    if max(map(len, tasks_of.values())) > 1:    # a mean of products B·A is no such product
        raise UserError(f"--init-from needs one task a teacher, unlike --unit {options.unit}; "
                        "choose --unit task")
    folder = options.init_from
    tagi = TAGI.load(folder, options.device, options.precision)
    config.check_fits(run.record(), folder, vars(tagi.options), ("rank", "alpha", "targets"), path,
                    "name another with --init-from")
    if tagi.generator is None:
        raise UserError(f"{folder} has --generator none, so it generates no LoRA; name another")
    return tagi


def start_from_pretrained(options, run, parameters):
    """Fill the parameters that the pretrain stage has too; parts that are new here stay new."""
    folder = os.path.join(options.runs, "pretrain")
    if not common.is_finished(folder):
        raise UserError(f"{folder} is not finished; first run python "
                        f"{config.script('train_hyper.py')} --stage pretrain"
                        f"{t5.config_flag(options)}, or add --no-pretrained")
    old, new = vars(recorded.load_options(folder)), run.record()
    keys = ["llm_fingerprint"]
    if options.generator != "none":             # another alpha's weights would load, rescaled
        keys += ["rank", "alpha", "targets", "generator", "width", "bottleneck"]
    for key in keys:
        if old.get(key, new[key]) != new[key]:
            raise UserError(f"{folder} was trained with {key} {old[key]}, not {new[key]}; train it "
                            "again with --fresh, or start without it: --no-pretrained")
    common.check_digests(new, folder, old)
    common.load_weights(parameters, folder, strict=False)


def load_kl_teacher(options, run, llm_path, tagi):
    """Another checkpoint as KL teacher; None where it is the frozen LLM, which needs no copy."""
    is_meta = options.kl_teacher == "meta"
    path = t5.meta_path(options, run.found) if is_meta else options.kl_teacher
    if os.path.realpath(path) == os.path.realpath(llm_path):
        return None
    teacher, tokenizer = t5.load_llm(path, shard.home(options), options.precision,
                                     options.attention)
    same_size = teacher.config.vocab_size == tagi.llm.config.vocab_size
    if tokenizer.get_vocab() != tagi.tokenizer.get_vocab() or not same_size:
        raise UserError(f"--kl-teacher {path} has another vocabulary than {llm_path}; choose one "
                        "that shares it")
    return teacher.requires_grad_(False).eval()


# ----------------------------------------------------------- teachers that are trained side by side

def find_progress(folder: str, teachers: list[str]) -> dict[str, tuple[int, str, int | None]]:
    """teacher -> (its step, the checkpoint that holds it, its row there, None in one of its own).

    Groups may be others now than they were. A teacher whose numbers were not finite starts anew.
    """
    found = {}
    for group in sorted(glob.glob(f"{glob.escape(folder)}/group-*")):
        checkpoint = common.checkpoint_of(group)
        if checkpoint is None:
            continue
        record = recorded.load_options(checkpoint, ("teachers", "lost", "step"))
        for row, teacher in enumerate(record.teachers):
            if teacher not in record.lost and record.step > found.get(teacher, (0,))[0]:
                found[teacher] = record.step, checkpoint, row
    for teacher in teachers:
        own = teacher_folder(folder, teacher)
        if common.is_finished(own):
            step = recorded.load_options(own, ("finished", "step")).step
            if step >= found.get(teacher, (0,))[0]:
                found[teacher] = step, own, None
    return found


def load_rows(sources: list[tuple], parameters: dict, optimizer) -> None:
    """Fill row u of parameters, {name: (U, ..)}, and of the optimizer's state from sources[u].

    sources: as `find_progress` finds them, all of one step.
    """
    files, states = {}, []                      # checkpoint -> (its weights, its optimizer's state)
    for u, (step, folder, row) in enumerate(sources):
        if folder not in files:
            with common.named_file(f"{folder}/model.safetensors", "start over with --fresh"):
                weights = load_file(f"{folder}/model.safetensors")
            common.check_finite(weights, f"{folder} is not loaded")
            files[folder] = weights, common.load_optimizer(folder, step)
        weights, state = files[folder]
        with common.named_file(folder, "start over with --fresh"), torch.no_grad():
            for name, p in parameters.items():
                p[u].copy_(weights[name] if row is None else weights[name][row])
            states.append(state if row is None else state_of(state, row))
    with common.named_file(folder, "start over with --fresh"):
        optimizer.load_state_dict(joined(states))


def state_of(state: dict, row: int) -> dict:
    """Of the optimizer's state of U teachers that of one, as if it were the only one (U = 1).

    A copy: of a view PyTorch would save the tensor that it is a view of, so that of all U.
    """
    return map_state(lambda values: values[0][row:row + 1].clone(), [state])


def joined(states: list[dict]) -> dict:
    """The optimizer's state of teachers side by side, from that of each."""
    return map_state(torch.cat, states)


def map_state(function, states: list[dict]) -> dict:
    """The first state, each of its tensors with a row for a teacher made anew from those of all."""
    parts = []
    for n, part in enumerate(states[0]["parts"]):
        new = {}                                # number of a parameter -> name -> value
        for p, values in part["state"].items():
            new[p] = {}
            for name, value in values.items():
                if torch.is_tensor(value) and value.ndim:
                    value = function([state["parts"][n]["state"][p][name] for state in states])
                new[p][name] = value            # else the number of steps, which they share
        parts.append({**part, "state": new})
    return {"parts": parts}


def row_norms(parameters: dict) -> torch.Tensor:
    """Each teacher's gradient norm, (U,); parameters: {name: (U, ..)}."""
    squares = [p.grad.flatten(1).square().sum(1) for p in parameters.values()]
    return torch.stack(squares).sum(0).sqrt()


@torch.no_grad()
def step_all_but(rows: torch.Tensor, parameters: dict, optimizer) -> None:
    """The optimizer's step, which leaves these teachers' rows, (U,) bool, and their state as is."""
    if not rows.any():
        optimizer.step()
        return
    kept = list(parameters.values())
    for part in optimizer.parts:
        for values in part.state.values():
            kept += [value for value in values.values() if torch.is_tensor(value) and value.ndim]
    rows = rows.to(kept[0].device)
    before = [value[rows].clone() for value in kept]
    for p in parameters.values():
        p.grad[rows] = 0
    optimizer.step()
    for value, old in zip(kept, before):
        value[rows] = old


# -------------------------------------------------------------------------------------- to compare

@torch.no_grad()
def svd_factors(weights: lora.Weights) -> lora.Weights:
    """The same products B·A = U·S·Vᵀ in factors that can be compared: B = U·√S and A = √S·Vᵀ.

    {site: (lora_A (.., r, D_in), lora_B (.., D_out, r))}, of any dtype, and the same comes back.
    Singular values fall from row to row of A; a row's entry of largest magnitude is positive.
    """
    # The SVD is that of an r × r matrix: B·A = Q_B (R_B R_Aᵀ) Q_Aᵀ.
    factors = {}
    for name, (A, B) in weights.items():
        Q_A, R_A = torch.linalg.qr(A.double().mT)       # (.., D_in, k), (.., k, r); k = min(D, r)
        Q_B, R_B = torch.linalg.qr(B.double())
        U, S, Vh = torch.linalg.svd(R_B @ R_A.mT, full_matrices=False)
        roots = S.sqrt()                                                    # (.., k)
        new_A = roots[..., None] * (Vh @ Q_A.mT)                            # (.., k, D_in)
        new_B = (Q_B @ U) * roots[..., None, :]                             # (.., D_out, k)
        largest = new_A.abs().argmax(-1, keepdim=True)                      # (.., k, 1)
        signs = torch.where(new_A.gather(-1, largest) < 0, -1.0, 1.0)       # (.., k, 1)
        missing = A.shape[-2] - S.shape[-1]             # where r is larger than the layer: zeros
        new_A = F.pad(new_A * signs, (0, 0, 0, missing))
        new_B = F.pad(new_B * signs.mT, (0, missing))
        factors[name] = (new_A.to(A.dtype), new_B.to(B.dtype))
    return factors
