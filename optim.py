"""Optimizers and learning rates of all stages."""
import math

import torch


def learning_rate(options, step: int) -> float:
    """Warm-up over the first share of the steps, then linear to 0, cosine to 3 % or constant; step counts from 0.

    With --restart that is done twice: up to this share of the steps, and from there to the end.
    """
    steps, restart = options.steps, round(options.restart * options.steps)
    step, steps = (step, restart) if step < restart else (step - restart, steps - restart)
    warmup = max(1, round(options.warmup * steps))
    if step < warmup:
        return options.lr * (step + 1) / warmup
    done = (step - warmup) / max(1, steps - warmup)
    return options.lr * {"linear": 1 - done, "cosine": 0.03 + 0.97 * (1 + math.cos(math.pi * done)) / 2,
                         "constant": 1.0}[options.schedule]


class Optimizers:
    """Several optimizers, each with parameters of its own, that act as one."""

    def __init__(self, *parts):
        self.parts = parts

    @property
    def param_groups(self):
        return [group for part in self.parts for group in part.param_groups]

    def step(self):
        for part in self.parts:
            part.step()

    def zero_grad(self, set_to_none=True):
        for part in self.parts:
            part.zero_grad(set_to_none)

    def state_dict(self):
        return {"parts": [part.state_dict() for part in self.parts]}

    def load_state_dict(self, state):
        for part, its in zip(self.parts, state["parts"], strict=True):
            part.load_state_dict(its)


class Muon(torch.optim.Optimizer):
    """Muon (Jordan et al. 2024): Nesterov momentum, each matrix of it made orthogonal, its steps scaled like AdamW's.

    The same as torch.optim.Muon(adjust_lr_fn="match_rms_adamw"), but for the arithmetic: that takes one matrix at a time
    in bf16, which CPUs without bf16 instructions do many times slower than float32. parameters: {name: matrix (a, b)}.
    """

    def __init__(self, parameters: dict, lr: float, weight_decay: float = 0.1, momentum: float = 0.95):
        groups = []
        for matrices in (1, 3):                                             # an attention's in_proj_weight is (q; k; v)
            own = [p for name, p in parameters.items() if (3 if name.endswith("in_proj_weight") else 1) == matrices]
            groups += [{"params": own, "matrices": matrices}] if own else []
        super().__init__(groups, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})

    @torch.no_grad()
    def step(self):
        stacks = {}                                                         # shape -> [(matrix, its update, lr)]
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if not state:
                    state["momentum_buffer"] = torch.zeros_like(p)
                momentum = state["momentum_buffer"].lerp_(p.grad, 1 - group["momentum"])
                update = p.grad.lerp(momentum, group["momentum"])
                p.mul_(1 - group["lr"] * group["weight_decay"])
                for part, its in zip(p.chunk(group["matrices"]), update.chunk(group["matrices"])):
                    stacks.setdefault(its.shape, []).append((part, its, group["lr"]))
        for shape, rows in stacks.items():
            updates = orthogonalize(torch.stack([update for _, update, _ in rows]))
            for (part, _, lr), update in zip(rows, updates):
                part.add_(update, alpha=-lr * 0.2 * max(shape) ** 0.5)


def orthogonalize(stack: torch.Tensor) -> torch.Tensor:
    """For each of n matrices, (n, a, b), about U·Vᵀ of its U·S·Vᵀ: five steps of Newton and Schulz, on a GPU in bf16.

    With Muon's coefficients every singular value above a hundredth of the matrix's norm ends between 0.68 and 1.21.
    """
    x = stack.bfloat16() if stack.is_cuda else stack
    x = x.mT if stack.shape[-2] > stack.shape[-1] else x
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-7)              # no singular value above 1
    for _ in range(5):
        gram = x @ x.mT
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    x = x.mT if stack.shape[-2] > stack.shape[-1] else x
    return x.to(stack.dtype)


def make_optimizer(parameters: dict, options):
    """--optimizer over {name: parameter}. muon: Muon for the matrices between layers, AdamW for the rest, as Muon's
    authors say: embeddings, head, biases, gains, and stacks of matrices.

    The student's norm gains have no weight decay: they multiply and start at 1, and it would pull
    them to 0.
    """
    def groups(names):
        names = list(names)
        gains = [parameters[name] for name in names if name.startswith("norm_gains.")]
        rest = [parameters[name] for name in names if not name.startswith("norm_gains.")]
        both = {"params": rest}, {"params": gains, "weight_decay": 0.0}
        return [group for group in both if group["params"]]

    shared = {"lr": options.lr, "weight_decay": options.weight_decay}
    if options.optimizer == "adafactor":
        return torch.optim.Adafactor(groups(parameters), **shared)
    matrices = {name: p for name, p in parameters.items() if options.optimizer == "muon" and p.ndim == 2
                and not any(part in name for part in ("shared", "embed", "lm_head", "relative_attention_bias"))}
    rest = groups(name for name in parameters if name not in matrices)
    adamw = torch.optim.AdamW(rest, betas=(0.9, options.beta2), fused=True, **shared)
    return Optimizers(adamw, Muon(matrices, **shared)) if matrices else adamw
