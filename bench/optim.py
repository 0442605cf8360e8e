"""What --optimizer, --lr and --schedule name: rates, optimizers, gradients of all ranks."""
import math

import torch
import torch.distributed as dist

import common
from bench import shard


def learning_rate(options, step: int, restart: float = 0.0) -> float:
    """The rate of a step, counted from 0: warm-up, then --schedule down to the end.

    restart: the share of the steps after which all of that begins anew.
    """
    steps, first = options.steps, round(restart * options.steps)
    if step < first:
        steps = first
    else:
        step, steps = step - first, steps - first
    # 1. Warm-up: a straight line up to the largest rate.
    warmup = max(1, round(options.warmup * steps))
    if step < warmup:
        return options.lr * (step + 1) / warmup
    # 2. Constant: stays there.
    if options.schedule == "constant":
        return options.lr
    # 3. A straight line down to 0, or half a cosine down to 3 %.
    done = (step - warmup) / max(1, steps - warmup)
    if options.schedule == "linear":
        return options.lr * (1 - done)
    return options.lr * (0.03 + 0.97 * (1 + math.cos(math.pi * done)) / 2)


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
        # Runs of earlier code saved a single optimizer as it is, and some had all parameters in
        # one group, in the same order: the groups are always those of now.
        parts = state["parts"] if "parts" in state else [state]
        for part, its in zip(self.parts, parts, strict=True):
            part.load_state_dict({**its, "param_groups": part.state_dict()["param_groups"]})
            check_state(part)


# Optimizer -> what it may keep of a parameter.
STATES = {"AdamW": [{"step", "exp_avg", "exp_avg_sq"}], "Muon": [{"momentum_buffer"}],
          "Adafactor": [{"step", "row_var", "col_var"}, {"step", "variance"}]}
SQUARES = ("step", "exp_avg_sq", "row_var", "col_var", "variance")


def check_state(optimizer) -> None:
    """Raises ValueError where it does not hold for every parameter what a step left there."""
    parameters = {p for group in optimizer.param_groups for p in group["params"]}
    if parameters != set(optimizer.state):
        raise ValueError("it is of other parameters")
    for p, state in optimizer.state.items():
        if set(state) not in STATES[type(optimizer).__name__]:
            raise ValueError(f"it is no {type(optimizer).__name__}'s")
        for name, value in state.items():
            if not torch.is_tensor(value) or not value.is_floating_point():
                raise ValueError(f"its {name} holds no numbers")
            # PyTorch's kernels read as many numbers as the parameter has, there or not.
            shapes = {"step": (), "row_var": (*p.shape[:-1], 1),
                      "col_var": (*p.shape[:-2], 1, *p.shape[-1:])}
            if value.shape != shapes.get(name, p.shape) or not value.is_contiguous():
                raise ValueError(f"a parameter {tuple(p.shape)} has {name} {tuple(value.shape)}")
            smallest = 0 if name in SQUARES else -math.inf
            if not (value.isfinite() & (value >= smallest)).all():
                raise ValueError(f"{name} holds numbers that it cannot have")


class Muon(torch.optim.Optimizer):
    """Muon (Jordan et al. 2024): momentum whose matrices are made orthogonal, steps like AdamW's.

    The same as torch.optim.Muon(adjust_lr_fn="match_rms_adamw") except for the arithmetic: that
    takes one matrix at a time in bf16, which CPUs without bf16 instructions do many times slower
    than float32. parameters: {name: matrix (a, b)}.
    """

    def __init__(self, parameters: dict, lr: float, weight_decay=0.1, momentum=0.95):
        whole = [p for name, p in parameters.items() if not name.endswith("in_proj_weight")]
        three = [p for name, p in parameters.items() if name.endswith("in_proj_weight")]
        groups = [{"params": whole, "matrices": 1}, {"params": three, "matrices": 3}]   # (q; k; v)
        groups = [group for group in groups if group["params"]]
        super().__init__(groups, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})

    @torch.no_grad()
    def step(self):
        stacks = {}                             # shape -> [(matrix, its update, learning rate)]
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if not state:
                    state["momentum_buffer"] = torch.zeros_like(p)
                momentum = state["momentum_buffer"].lerp_(p.grad, 1 - group["momentum"])
                update = p.grad.lerp(momentum, group["momentum"])           # Nesterov's
                p.mul_(1 - group["lr"] * group["weight_decay"])
                if shard.is_part(p):            # a matrix is whole for as long as this takes
                    update = orthogonalize(shard.gather(p, update)[None])[0]
                    scale = 0.2 * max(update.shape) ** 0.5
                    p.add_(shard.rows(p, update), alpha=-group["lr"] * scale)
                    continue
                n = group["matrices"]
                for part, its in zip(p.chunk(n), update.chunk(n)):
                    stacks.setdefault(its.shape, []).append((part, its, group["lr"]))
        for shape, rows in stacks.items():
            updates = orthogonalize(torch.stack([update for _, update, _ in rows]))
            for (part, _, lr), update in zip(rows, updates):
                part.add_(update, alpha=-lr * 0.2 * max(shape) ** 0.5)


class Adafactor(torch.optim.Adafactor):
    """PyTorch's, also for matrices of which each rank holds some rows."""

    @torch.no_grad()
    def step(self):
        gradients = {}                          # of parts; what has none is left out by PyTorch's
        for group in self.param_groups:
            for p in group["params"]:
                if shard.is_part(p) and p.grad is not None:
                    gradients[p], p.grad = p.grad, None
        super().step()
        for group in self.param_groups:
            for p in group["params"]:
                if p in gradients:
                    p.grad = gradients[p]
                    self.step_rows(p, group)

    def step_rows(self, p, group):
        """The same arithmetic; what goes over all rows of a matrix is added up over ranks."""
        g, eps, state = p.grad, group["eps"][0] or torch.finfo(p.dtype).eps, self.state[p]
        if not state:
            state["step"] = torch.tensor(0.0)
            if g.dim() > 1:
                state["row_var"] = g.new_zeros(*g.shape[:-1], 1)
                state["col_var"] = g.new_zeros(*g.shape[:-2], 1, g.shape[-1])
            else:
                state["variance"] = torch.zeros_like(g)
        state["step"] += 1
        step, size = state["step"].item(), p.whole.numel()
        new = step ** group["beta2_decay"]      # the share of what is new in the averages
        norm = shard.total(p.square().sum()).sqrt().item()
        alpha = max(group["eps"][1], norm / size ** 0.5) * min(group["lr"], step ** -0.5)
        p.mul_(1 - group["lr"] * group["weight_decay"])
        # A matrix is dealt out by rows, a stack of matrices (L, a, b) by matrices.
        one = g.dim() == 2
        if g.dim() > 1:
            rows, a = state["row_var"], len(p.whole) if one else g.shape[-2]
            columns, sums = g.square().sum(-2, keepdim=True), shard.total if one else torch.clone
            rows.lerp_(g.square().mean(-1, keepdim=True), new)
            state["col_var"].lerp_(sums(columns) / a, new)
            mean = sums(rows.sum(-2, keepdim=True)) / a
            variance = rows @ state["col_var"] / mean.clamp(min=eps)
        else:
            variance = state["variance"].lerp_(g.square(), new).clone()
        update = variance.clamp_(min=eps * eps).rsqrt_().mul_(g)
        rms = shard.total(update.square().sum()).sqrt().item() / size ** 0.5
        p.add_(update, alpha=-alpha / max(1.0, rms / group["d"]))


def orthogonalize(stack: torch.Tensor) -> torch.Tensor:
    """About U·Vᵀ for each U·S·Vᵀ of n matrices (n, a, b): five steps of Newton and Schulz.

    With Muon's coefficients every singular value above a hundredth of the matrix's norm ends
    between 0.68 and 1.21. On a GPU the steps are made in bf16.
    """
    x = stack.bfloat16() if stack.is_cuda else stack
    x = x.mT if stack.shape[-2] > stack.shape[-1] else x
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-7)      # no singular value above 1
    for _ in range(5):
        gram = x @ x.mT
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    x = x.mT if stack.shape[-2] > stack.shape[-1] else x
    return x.to(stack.dtype)


def make_optimizer(parameters: dict, options) -> Optimizers:
    """--optimizer over {name: parameter}.

    Muon takes the matrices between layers and AdamW the rest, as Muon's authors say: embeddings,
    head, biases, gains, and stacks of matrices.
    """
    apart = ("shared", "embed", "lm_head", "relative_attention_bias")
    matrices, rest, gains = {}, [], []
    for name, p in parameters.items():
        if options.optimizer == "muon" and p.ndim == 2 and not any(x in name for x in apart):
            matrices[name] = p
        elif name.startswith("norm_gains."):    # the student's: they multiply and start at 1, and
            gains.append(p)                     # weight decay would pull them to 0
        else:
            rest.append(p)
    groups = [{"params": rest}, {"params": gains, "weight_decay": 0.0}]
    groups = [group for group in groups if group["params"]]
    shared = {"lr": options.lr, "weight_decay": options.weight_decay}
    if options.optimizer == "adafactor":
        return Optimizers(Adafactor(groups, **shared))
    adamw = torch.optim.AdamW(groups, betas=(0.9, options.beta2), fused=True, **shared)
    return Optimizers(adamw, Muon(matrices, **shared)) if matrices else Optimizers(adamw)


def clip_gradients(parameters, largest: float) -> float:
    """The norm of all gradients together; where it is above `largest`, they are scaled down to it.

    largest 0: they stay as they are.
    """
    parameters = [p for p in parameters if p.grad is not None]
    norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if not shard.is_part(p)])
    parts = [p.grad for p in parameters if shard.is_part(p)]
    if parts:
        squares = shard.total(torch.nn.utils.get_total_norm(parts).square())
        norm = (norm.to(squares).square() + squares).sqrt()
    if largest:
        torch.nn.utils.clip_grads_with_norm_(parameters, largest, norm)
    return float(norm)


def sum_gradients(parameters, size: int = 2 ** 26) -> None:
    """Add up the ranks' gradients; every loss was already divided by the count over all ranks.

    A message holds the gradients of many parameters, but a copy of about `size` numbers (256 MB)
    at a time.
    """
    if not dist.is_initialized():
        return
    messages, total = {}, 0                     # number of a message -> its parameters
    for p in parameters:
        if shard.is_part(p):
            shard.take_gradient(p)              # fully_shard has added it up
            continue
        total += p.numel()
        messages.setdefault(total // size, []).append(p)
    for group in messages.values():
        for p in group:
            if p.grad is None:
                p.grad = torch.zeros_like(p)
        flat = torch.cat([p.grad.flatten() for p in group])
        with common.meeting():
            dist.all_reduce(flat)
        for p, gradient in zip(group, flat.split([p.numel() for p in group])):
            p.grad.copy_(gradient.view_as(p))


# ------------------------------------------------------------------- checkpoints, with --shard too

class Saved:
    """What a checkpoint holds of what is trained: `weights`, {name: tensor}, and `state_dict()`.

    gather() makes it: with --shard all ranks call it, and rank 0 then has all that is dealt out.
    """

    def __init__(self, parameters: dict, optimizer: Optimizers):
        self.parameters, self.optimizer = parameters, optimizer
        self.weights, self.state = {}, None

    def gather(self, optimizer: bool = True) -> None:
        self.weights = {name: whole(p, p) for name, p in self.parameters.items()}
        if optimizer:
            self.state = over_state(self.optimizer, self.optimizer.state_dict(), whole)

    def state_dict(self) -> dict:
        return self.state


def deal_out(parameters: dict, optimizer: Optimizers, options, llms, student=None):
    """(parameters, optimizer, Saved): with --shard this rank's part of them; see `shard.cut`."""
    if not options.shard:
        return parameters, optimizer, Saved(parameters, optimizer)
    parameters = shard.cut(parameters, options, llms, student)
    new, state = make_optimizer(parameters, options), optimizer.state_dict()

    def rows(p, tensor):
        return shard.rows(p, tensor).clone() if shard.is_part(p) else tensor
    if any(its["state"] for its in state["parts"]):         # of a run that goes on
        new.load_state_dict(over_state(new, state, rows))
    return parameters, new, Saved(parameters, new)


def whole(p, tensor):
    """A tensor of which each rank has as many rows as of p, on rank 0."""
    if not shard.is_part(p):
        return tensor
    tensor = shard.gather(p, tensor.detach())
    return tensor.cpu() if dist.get_rank() == 0 else None


def over_state(optimizer: Optimizers, state: dict, change) -> dict:
    """A state_dict like the optimizer's, with change(parameter, tensor) for all that has rows."""
    parts = []
    for part, its in zip(optimizer.parts, state["parts"]):
        parameters, changed = [p for group in part.param_groups for p in group["params"]], {}
        for n, values in its["state"].items():
            changed[n] = {}
            for key, value in values.items():
                # Of a matrix's columns Adafactor's average has one row, which all ranks have.
                has_rows = value.dim() and not (key == "col_var" and value.dim() == 2)
                changed[n][key] = change(parameters[n], value) if has_rows else value
        parts.append({**its, "state": changed})
    return {"parts": parts}
