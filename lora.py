"""LoRA written by hand: injection, shared or per-example weights, merging.

LoRA (Hu et al. 2021) adds a low-rank update to a frozen linear map: W x + scaling * B A x. Here the wrapper holds no
weights of its own. They are set from outside, so that one frozen model serves every teacher and the student:
a teacher's weights are parameters, a student's are the output of the hypernetwork, and both run through one expression.

    N  batch (examples)      r      rank
    T  tokens                D_in, D_out  width of the wrapped linear layer
"""
import contextlib

import torch
import torch.nn as nn
from torch.utils.checkpoint import checkpoint

from common import UserError

# What this module calls `weights` everywhere: {site: (lora_A, lora_B)}, a site being the wrapped layer's module name.
# lora_A is (r, D_in), or (N, r, D_in) where every example has its own; lora_B is (D_out, r), or (N, D_out, r). A model that
# is run on k·N examples gives row n to the n-th block of k: the k beams of example n stand next to each other.
Weights = dict[str, tuple[torch.Tensor, torch.Tensor]]


class LoRALinear(nn.Module):
    """A frozen linear layer plus `scaling * x Aᵀ Bᵀ`, with the A and B that `set_weights` put there (none: the layer)."""

    def __init__(self, linear: nn.Linear, scaling: float):
        super().__init__()
        self.linear, self.scaling = linear, scaling
        self.lora_A = self.lora_B = None            # plain attributes: never parameters, never in a state_dict
        self.original = None                        # the weight before `merge`

    @property
    def weight(self):                               # T5's feed-forward layer reads `wo.weight.dtype`
        return self.linear.weight

    @property
    def bias(self):
        return self.linear.bias

    def forward(self, x):                           # x: (N, T, D_in)
        y = self.linear(x)                          # (N, T, D_out)
        if self.lora_A is None:
            return y
        # One expression, shared or per example: row k of the weights serves the k-th block of examples, (K, N/K·T, D_in).
        A, B = (w.to(x.dtype).view(-1, *w.shape[-2:]) for w in (self.lora_A, self.lora_B))
        if len(x) % len(A):                         # else a row would serve parts of examples
            raise ValueError(f"{len(x)} examples are no multiple of {len(A)} adapters")
        update = torch.baddbmm(y.reshape(len(A), -1, y.shape[-1]), x.reshape(len(A), -1, x.shape[-1]) @ A.mT, B.mT,
                               alpha=self.scaling)
        return update.view(y.shape)


def inject_lora(model: nn.Module, targets, r: int, alpha: float) -> dict[str, LoRALinear]:
    """Wrap every linear layer of `model` whose last name is in `targets` (e.g. "q", "v"), in place.

    The update is scaled by alpha / r. Layers are found by walking the modules, so T5 v1.0, v1.1, mT5 and their kin
    need no paths of their own; a model already wrapped is wrapped anew around the same linear layers.
    Returns {site: wrapper} in module order. Raises ValueError where r < 1, UserError (a ValueError) where a target
    matches no linear layer.
    """
    if r < 1:
        raise ValueError(f"LoRA rank must be at least 1, not {r}")
    remove_lora(model)
    found = {name: module for name, module in model.named_modules()
             if name.rpartition(".")[2] in targets and isinstance(module, nn.Linear)}
    missing = set(targets) - {name.rpartition(".")[2] for name in found}
    if missing:
        raise UserError(f"--targets: no linear layer is called {', '.join(sorted(missing))} in {type(model).__name__}; "
                        "T5 has q, k, v, o, wi, wi_0, wi_1, wo")
    model.lora_sites = {name: _replace(model, name, LoRALinear(linear, alpha / r)) for name, linear in found.items()}
    return model.lora_sites


def remove_lora(model: nn.Module) -> None:
    """Put the plain linear layers back (merged weights are unmerged first)."""
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
    return getattr(model, "lora_sites", {})         # kept there: to walk all modules at every use takes milliseconds


def init_weights(model: nn.Module, r: int, seed: int, n: int | None = None) -> Weights:
    """Fresh LoRA weights, A Kaiming-uniform and B zero as in loralib: (r, D_in) and (D_out, r), or with n in front.

    Every teacher starts from the same A (a pure function of the seed): factors of different teachers then stay
    comparable, which METHOD's factor-wise alignment needs, LoRA's factors being unique only up to A·M, M⁻¹·B.
    """
    generator, weights = torch.Generator().manual_seed(seed), {}
    for name, wrapper in sites(model).items():
        D_out, D_in = wrapper.weight.shape
        A = torch.empty(r, D_in, device="cpu").uniform_(-1, 1, generator=generator) / D_in ** 0.5
        B = torch.zeros(D_out, r, device="cpu")
        if n is not None:
            A, B = A.expand(n, -1, -1).clone(), B.expand(n, -1, -1).clone()   # (n, r, D_in), (n, D_out, r)
        weights[name] = (A.to(wrapper.weight.device), B.to(wrapper.weight.device))
    return weights


def set_weights(model: nn.Module, weights: Weights | None) -> None:
    """Make `model` run with these LoRA weights, or with none. Raises ValueError where sites or shapes do not fit."""
    wrappers = sites(model)
    if weights is not None and weights.keys() != wrappers.keys():
        raise ValueError(f"LoRA weights are for other layers: {sorted(weights.keys() ^ wrappers.keys())[:3]} …")
    for name, wrapper in wrappers.items():
        if weights is not None and wrapper.original is not None:
            raise ValueError("a task is merged into the model; call unmerge first")
        wrapper.lora_A, wrapper.lora_B = (None, None) if weights is None else weights[name]
        if weights is not None and (wrapper.lora_A.shape[-1], wrapper.lora_B.shape[-2]) != wrapper.weight.shape[::-1]:
            raise ValueError(f"LoRA weights of {name} do not fit a layer of shape {tuple(wrapper.weight.shape)}")


def select(weights: Weights, index) -> Weights:
    """Weights for a mixed batch: row index[n] of (K, r, D_in), (K, D_out, r) for example n; an integer drops the axis."""
    return {name: (A[index], B[index]) for name, (A, B) in weights.items()}


def cast(weights: Weights, dtype: torch.dtype) -> Weights:
    """The same weights in another dtype, each of its shape."""
    return {name: (A.to(dtype), B.to(dtype)) for name, (A, B) in weights.items()}


@torch.no_grad()
def merge(model: nn.Module, weights: Weights) -> None:
    """Fold one task's weights, (r, D_in) and (D_out, r), into the layers: decoding then costs what the plain model costs.

    The sum is made in float32 and rounded once, to the layers' dtype. In bf16 that is an error of a
    sixth of an update that is a hundredth of the weight. A sum kept in float32 would gain nothing,
    since autocast rounds it alike; nor is the output of an unmerged bf16 layer any more exact.
    Raises ValueError where the model is already merged or the weights are per example.
    """
    for name, wrapper in sites(model).items():
        A, B = weights[name]
        if wrapper.original is not None:
            raise ValueError("already merged; call unmerge first")
        if A.dim() != 2:
            raise ValueError("only one task's weights can be merged; select one first")
        wrapper.original = wrapper.weight.detach().clone()
        update = wrapper.scaling * (B.float() @ A.float())
        wrapper.weight.copy_(wrapper.weight + update)                       # the sum is in float32
    set_weights(model, None)


@torch.no_grad()
def unmerge(model: nn.Module) -> None:
    """Undo `merge` bit for bit: the original weights were kept, subtracting would round."""
    for wrapper in sites(model).values():
        if wrapper.original is not None:
            wrapper.weight.copy_(wrapper.original)
            wrapper.original = None


def weights_of(model: nn.Module) -> Weights | None:
    """What `set_weights` put there."""
    weights = {name: (wrapper.lora_A, wrapper.lora_B) for name, wrapper in sites(model).items()}
    return None if any(A is None for A, _ in weights.values()) else weights


def logits(model: nn.Module, input_ids, attention_mask, labels) -> torch.Tensor:
    """An encoder-decoder's logits for its targets, (N, C, V), without the loss that `labels=` would make it compute too."""
    return model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False,
                 decoder_input_ids=model.prepare_decoder_input_ids_from_labels(labels)).logits


@contextlib.contextmanager
def headless(model: nn.Module):
    """Within: the LLM returns in place of its logits (N, C, V) what its head would read of every position, (N, C, D).

    The caller then runs the head, `model.get_output_embeddings()` again afterwards, only where it needs it.
    """
    head = model.get_output_embeddings()
    model.set_output_embeddings(nn.Identity())
    try:
        yield
    finally:
        model.set_output_embeddings(head)


def checkpoint_blocks(model: nn.Module, contexts=lambda: (contextlib.nullcontext(), contextlib.nullcontext())) -> None:
    """Gradient checkpointing: keep only the input of each T5 block; the backward pass runs the block again.

    LoRA weights are set from outside, so they must still be set then. contexts: called when a block runs, returns the
    contexts of that run and of the repetition (torch.utils.checkpoint's context_fn), which may set them again.
    """
    for module in model.modules():
        if type(module).__name__.endswith("Block"):                     # T5Block, MT5Block
            def run(*args, forward=module.forward, **kwargs):
                if not torch.is_grad_enabled():
                    return forward(*args, **kwargs)
                return checkpoint(forward, *args, use_reentrant=False, context_fn=contexts, **kwargs)
            module.forward = run


# ---------------------------------------------------------------------- alignment with a teacher's weights, Eq. 6

def alignment_loss(generated: Weights, teacher: Weights, kind: str) -> torch.Tensor:
    """L_ins for each of K tasks, (K,): mean squared error between generated and teacher LoRA weights.

    "factors" is the paper's: A against A and B against B. "product" compares B·A, which is what the layer computes and,
    unlike the factors, unique. It is got from r × r Gram matrices, without forming D_out × D_in:
    ‖BA − B'A'‖² = ⟨BᵀB, AAᵀ⟩ − 2⟨BᵀB', AA'ᵀ⟩ + ⟨B'ᵀB', A'A'ᵀ⟩.
    """
    def inner(A1, B1, A2, B2):                                          # ⟨B1·A1, B2·A2⟩ for each site and task
        return ((B1.mT @ B2) * (A1 @ A2.mT)).sum((-2, -1))

    shapes = {}                                                         # sites of one shape are taken together
    for name, (A, B) in generated.items():
        shapes.setdefault((A.shape, B.shape), []).append(name)
    total, count = 0.0, 0
    for names in shapes.values():
        A, B = (torch.stack([generated[name][i] for name in names]) for i in (0, 1))     # (P, K, r, D_in), (P, K, D_out, r)
        A_t, B_t = (torch.stack([teacher[name][i] for name in names]) for i in (0, 1))
        if kind == "factors":
            errors = (A - A_t).square().sum((-2, -1)) + (B - B_t).square().sum((-2, -1))
            count += len(names) * (A[0, 0].numel() + B[0, 0].numel())
        else:
            errors = inner(A, B, A, B) - 2 * inner(A, B, A_t, B_t) + inner(A_t, B_t, A_t, B_t)
            count += len(names) * B.shape[-2] * A.shape[-1]
        total = total + errors.sum(0)                                   # over sites
    return total / count
