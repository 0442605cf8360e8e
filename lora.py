"""LoRA written by hand: injection, shared or per-example weights, merging, teachers' files.

LoRA (Hu et al. 2021) adds a low-rank update to a frozen linear map: W x + scaling · B A x. Here the
wrapper holds no weights of its own. They are set from outside, so that one frozen model serves
every teacher and the student: a teacher's weights are parameters, a student's are the output of the
hypernetwork, and both run through one expression.

"""
import os

import torch
import torch.nn as nn

import common
from common import UserError

# Letters of the shapes in comments:
#   N  examples (a batch)    T  tokens of one       D_in, D_out  width of the wrapped linear layer
#   K  adapters              r  LoRA rank           U  teachers

# site (the wrapped layer's module name) -> (lora_A, lora_B)
#   shared:       (r, D_in)     (D_out, r)
#   per example:  (K, r, D_in)  (K, D_out, r), row k for the k-th of K equal blocks of examples
#                 (the beams of one example are such a block)
Weights = dict[str, tuple[torch.Tensor, torch.Tensor]]


class LoRALinear(nn.Module):
    """A frozen linear layer plus `scaling * x Aᵀ Bᵀ`, with what `set_weights` put there."""

    def __init__(self, linear: nn.Linear, scaling: float):
        super().__init__()
        self.linear, self.scaling = linear, scaling
        self.lora_A = self.lora_B = None            # plain attributes: never in a state_dict
        self.original = None                        # the weight before `merge`

    @property
    def weight(self):                               # T5's feed-forward layer reads wo.weight.dtype
        return self.linear.weight

    @property
    def bias(self):
        return self.linear.bias

    def forward(self, x):                           # (N, T, D_in)
        y = self.linear(x)                          # (N, T, D_out)
        if self.lora_A is None:
            return y
        # Shared weights are one adapter for all. Row k of the weights serves the k-th block of
        # N / K examples, so that both kinds are one batched product.
        A = self.lora_A.to(x.dtype).view(-1, *self.lora_A.shape[-2:])       # (K, r, D_in)
        B = self.lora_B.to(x.dtype).view(-1, *self.lora_B.shape[-2:])       # (K, D_out, r)
        K = len(A)
        if len(x) % K:                              # else a row would serve parts of examples
            raise ValueError(f"{len(x)} examples are no multiple of {K} adapters")
        x_blocks = x.reshape(K, -1, x.shape[-1])                            # (K, N/K·T, D_in)
        y_blocks = y.reshape(K, -1, y.shape[-1])                            # (K, N/K·T, D_out)
        y_blocks = torch.baddbmm(y_blocks, x_blocks @ A.mT, B.mT, alpha=self.scaling)
        return y_blocks.view(y.shape)               # (N, T, D_out)


def inject_lora(model: nn.Module, targets, r: int, alpha: float) -> dict[str, LoRALinear]:
    """Wrap every linear layer of `model` whose last name is in `targets` ("q", "v"), in place.

    Updates are scaled by alpha / r. Layers are found by walking the modules, so T5 v1.0, v1.1, mT5
    and their kin need no paths of their own; a wrapped model is wrapped anew.
    Returns {site: wrapper} in module order. Raises ValueError where r < 1, UserError (a ValueError)
    where a target matches no linear layer.
    """
    if r < 1:
        raise ValueError(f"LoRA rank must be at least 1, not {r}")
    remove_lora(model)
    found = {}                                      # site -> linear layer
    for name, module in model.named_modules():
        if name.rpartition(".")[2] in targets and isinstance(module, nn.Linear):
            found[name] = module
    missing = set(targets) - {name.rpartition(".")[2] for name in found}
    if missing:
        raise UserError(f"--targets: no linear layer is called {', '.join(sorted(missing))} in "
                        f"{type(model).__name__}; T5 has q, k, v, o, wi, wi_0, wi_1, wo")
    model.lora_sites = {}                           # kept there: walking all modules takes long
    for name, linear in found.items():
        model.lora_sites[name] = _replace(model, name, LoRALinear(linear, alpha / r))
    return model.lora_sites


def remove_lora(model: nn.Module) -> None:
    """Put the plain linear layers back; merged weights are unmerged first."""
    unmerge(model)
    for name, wrapper in sites(model).items():
        _replace(model, name, wrapper.linear)
    model.lora_sites = {}


def _replace(model, name, module):
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)
    return module


def sites(model: nn.Module) -> dict[str, LoRALinear]:
    """The wrappers that `inject_lora` put into `model`, {site: wrapper}, in module order."""
    return getattr(model, "lora_sites", {})


# -------------------------------------------------------------------------------------- weights

def init_weights(model: nn.Module, r: int, seed: int, n: int | None = None) -> Weights:
    """Fresh LoRA weights, A Kaiming-uniform and B zero as in loralib; with n, n times the same.

    A (r, D_in) and B (D_out, r), or (n, r, D_in) and (n, D_out, r).
    """
    # Every teacher starts from the same A: LoRA's factors are unique only up to A·M, M⁻¹·B, and
    # those of different teachers stay comparable so.
    rng, weights = torch.Generator().manual_seed(seed), {}
    for name, wrapper in sites(model).items():
        D_out, D_in = wrapper.weight.shape
        A = torch.empty(r, D_in, device="cpu").uniform_(-1, 1, generator=rng) / D_in ** 0.5
        B = torch.zeros(D_out, r, device="cpu")
        if n is not None:
            A = A.expand(n, -1, -1).clone()         # (n, r, D_in)
            B = B.expand(n, -1, -1).clone()         # (n, D_out, r)
        weights[name] = (A.to(wrapper.weight.device), B.to(wrapper.weight.device))
    return weights


def set_weights(model: nn.Module, weights: Weights | None) -> None:
    """Make `model` run with these LoRA weights, or with none.

    Raises ValueError where sites or shapes do not fit, or a task is merged.
    """
    wrappers = sites(model)
    if weights is None:
        for wrapper in wrappers.values():
            wrapper.lora_A = wrapper.lora_B = None
        return
    if weights.keys() != wrappers.keys():
        others = sorted(weights.keys() ^ wrappers.keys())
        raise ValueError(f"LoRA weights are for other layers: {others[:3]} …")
    for name, wrapper in wrappers.items():
        if wrapper.original is not None:
            raise ValueError("a task is merged into the model; call unmerge first")
        A, B = weights[name]
        if (B.shape[-2], A.shape[-1]) != wrapper.weight.shape:
            raise ValueError(f"LoRA weights of {name} do not fit a layer of shape "
                             f"{tuple(wrapper.weight.shape)}")
        wrapper.lora_A, wrapper.lora_B = A, B


def weights_of(model: nn.Module) -> Weights | None:
    """What `set_weights` put there."""
    weights = {name: (wrapper.lora_A, wrapper.lora_B) for name, wrapper in sites(model).items()}
    return None if any(A is None for A, _ in weights.values()) else weights


def select(weights: Weights, index) -> Weights:
    """Weights for a mixed batch: row index[n] for example n; an integer drops the axis."""
    return {name: (A[index], B[index]) for name, (A, B) in weights.items()}


def cast(weights: Weights, dtype: torch.dtype) -> Weights:
    """The same weights in another dtype, each of its shape."""
    return {name: (A.to(dtype), B.to(dtype)) for name, (A, B) in weights.items()}


@torch.no_grad()
def merge(model: nn.Module, weights: Weights) -> None:
    """Fold one task's weights, (r, D_in) and (D_out, r), into the layers: it then costs plain T5.

    Raises ValueError where the model is already merged or the weights are per example.
    """
    # The sum is made in float32 and rounded once, to the layers' dtype. In bf16 that is an error of
    # a sixth of an update that is a hundredth of the weight. A sum kept in float32 would gain
    # nothing, since autocast rounds it alike; nor is an unmerged bf16 layer's output more exact.
    for name, wrapper in sites(model).items():
        A, B = weights[name]
        if wrapper.original is not None:
            raise ValueError("already merged; call unmerge first")
        if A.dim() != 2:
            raise ValueError("only one task's weights can be merged; select one first")
        wrapper.original = wrapper.weight.detach().clone()
        update = wrapper.scaling * (B.float() @ A.float())
        wrapper.weight.copy_(wrapper.weight + update)
    set_weights(model, None)


@torch.no_grad()
def unmerge(model: nn.Module) -> None:
    """Undo `merge` bit for bit: the original weights were kept, subtracting would round."""
    for wrapper in sites(model).values():
        if wrapper.original is not None:
            wrapper.weight.copy_(wrapper.original)
            wrapper.original = None


# ------------------------------------------------------- files of LoRA teachers, a folder for each

def flatten(weights: Weights) -> dict[str, torch.Tensor]:
    """{site: (lora_A, lora_B)} as a checkpoint's {"site.lora_A": tensor, "site.lora_B": tensor}."""
    flat = {}
    for site, (A, B) in weights.items():
        flat[f"{site}.lora_A"] = A
        flat[f"{site}.lora_B"] = B
    return flat


def teacher_folder(folder: str, teacher: str) -> str:
    """Where below a run's folder the teacher of this name is."""
    return os.path.join(folder, "".join(c if c.isalnum() else "_" for c in teacher.lower()))


def save_teacher(folder: str, record: dict, teacher: str, weights: Weights) -> None:
    """Write a finished teacher's weights, (r, D_in) and (D_out, r) per site, as a checkpoint.

    record: options and what the run found out, llm_fingerprint among it.
    """
    common.save_checkpoint(teacher_folder(folder, teacher), record | {"unit_name": teacher},
                           flatten(weights), step=record["steps"], finished=True)


def check_teachers(folder: str, teachers: list[str], expected: dict, command: str) -> None:
    """Raises UserError where a teacher is not there or not finished, or not as expected.

    expected: the llm_fingerprint, rank and alpha that are needed; command: what trains teachers.
    """
    for teacher in teachers:
        path = teacher_folder(folder, teacher)
        if not common.is_finished(path):
            raise UserError(f"{path}: no LoRA teacher for {teacher}; first run {command}")
        old = vars(common.load_options(path, "llm_fingerprint"))
        common.check_fingerprint(expected["llm_fingerprint"], old["llm_fingerprint"], path,
                                 "the frozen LLM's folder")
        for key in ("rank", "alpha"):               # another alpha's would load, rescaled
            new = expected[key]
            if old.get(key, new) != new:
                raise UserError(f"{path} was trained with --{key} {old[key]}, not {new}; use the "
                                f"same, or train it again: {command} --fresh")


def load_teachers(folder: str, teachers: list[str], llm: nn.Module, expected: dict,
                  command: str) -> Weights:
    """These teachers stacked, {site: (lora_A (U, r, D_in), lora_B (U, D_out, r))}.

    expected: as for `check_teachers`, and the digests of what they are to have read. Raises
    UserError as that does, and where one is for other projections or read something else.
    """
    check_teachers(folder, teachers, expected, command)
    stacked = init_weights(llm, expected["rank"], 0, len(teachers))
    for n, teacher in enumerate(teachers):
        path = teacher_folder(folder, teacher)
        common.check_digests(expected, path, vars(common.load_options(path)))
        common.load_weights(flatten(select(stacked, n)), path)
    return stacked
