"""LoRA teachers: their files, a folder for each below a run's, and their factors made alike."""
import os

import torch
import torch.nn as nn
import torch.nn.functional as F

import common
import config
import lora
from common import UserError
from hypernet import TAGI


def teacher_folder(folder: str, teacher: str) -> str:
    """Where below a run's folder the teacher of this name is."""
    return os.path.join(folder, "".join(c if c.isalnum() else "_" for c in teacher.lower()))


def save_teacher(folder: str, record: dict, teacher: str, weights: lora.Weights) -> None:
    """Write a finished teacher's weights, (r, D_in) and (D_out, r) per site, as a checkpoint.

    record: options and what the run found out, llm_fingerprint among it.
    """
    common.save_checkpoint(teacher_folder(folder, teacher), record | {"unit_name": teacher},
                           lora.flatten(weights), step=record["steps"], finished=True)


def check_teachers(folder: str, teachers: list[str], expected: dict, command: str) -> None:
    """Raises UserError where a teacher is not there or not finished, or not as expected.

    expected: the llm_fingerprint, rank and alpha that are needed; command: what trains teachers.
    """
    for teacher in teachers:
        path = teacher_folder(folder, teacher)
        if not common.is_finished(path):
            raise UserError(f"{path}: no LoRA teacher for {teacher}; first run {command}")
        record = vars(common.load_options(path, "llm_fingerprint"))
        config.check_fits(expected, path, record, ("rank", "alpha"),
                          "the frozen LLM's folder", f"train it again: {command} --fresh")


def load_teachers(folder: str, teachers: list[str], llm: nn.Module, expected: dict,
                  command: str) -> lora.Weights:
    """These teachers stacked, {site: (lora_A (U, r, D_in), lora_B (U, D_out, r))}.

    expected: as for `check_teachers`, and the digests of what they are to have read. Raises
    UserError as that does, and where one is for other projections or read something else.
    """
    check_teachers(folder, teachers, expected, command)
    stacked = lora.init_weights(llm, expected["rank"], 0, len(teachers))
    for n, teacher in enumerate(teachers):
        path = teacher_folder(folder, teacher)
        common.check_digests(expected, path, vars(common.load_options(path)))
        common.load_weights(lora.flatten(lora.select(stacked, n)), path)
    return stacked


def load_start(options, run, path, tasks_of):
    """The TAGI of --init-from. Raises UserError where it generates no start for these teachers."""
    if max(map(len, tasks_of.values())) > 1:    # a mean of products B·A is no such product
        raise UserError(f"--init-from needs one task a teacher, unlike --unit {options.unit}; choose "
                        "--unit task")
    folder = options.init_from
    tagi = TAGI.load(folder, options.device, options.precision)
    config.check_fits(run.record(), folder, vars(tagi.options), ("rank", "alpha", "targets"), path,
                    "name another with --init-from")
    if tagi.generator is None:
        raise UserError(f"{folder} has --generator none, so it generates no LoRA; name another")
    return tagi


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
