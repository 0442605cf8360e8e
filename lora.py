"""LoRA written by hand: injection, shared or per-example weights, merging, adapters.

LoRA (Hu et al. 2021) adds a low-rank update to a frozen linear map: W x + scaling · B A x. Here the
wrapper holds no weights of its own. They are set from outside, so that one frozen model serves
every teacher and the student: a teacher's weights are parameters, a student's are the output of the
hypernetwork, and both run through one expression.
"""
import math
import os
from dataclasses import dataclass

import torch
import torch.nn as nn
from safetensors.torch import load_file

import common
import t5
from bench import export, recorded
from bench.folders import new_folder
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
    for name, wrapper in sites(model).items():      # before anything is changed
        if wrapper.original is not None:
            raise ValueError("already merged; call unmerge first")
        if weights[name][0].dim() != 2:
            raise ValueError("only one task's weights can be merged; select one first")
    for name, wrapper in sites(model).items():
        A, B = weights[name]
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


def flatten(weights: Weights) -> dict[str, torch.Tensor]:
    """{site: (lora_A, lora_B)} as a checkpoint's {"site.lora_A": tensor, "site.lora_B": tensor}."""
    flat = {}
    for site, (A, B) in weights.items():
        flat[f"{site}.lora_A"] = A
        flat[f"{site}.lora_B"] = B
    return flat


# --------------------------------------------------- adapters: what instructions become, and files

# What of a model's record says whether an adapter is for it, and is run as it was.
MARKS = ("llm_fingerprint", "targets", "rank", "alpha", "format", "fusion", "shared_digest")


@dataclass(repr=False, eq=False)
class Adapter:
    """What K instructions become: made once, used for every instance and every decoding step.
    `adapters[k]` and slices are adapters too."""
    weights: Weights | None     # site -> (K, r, D_in), (K, D_out, r); None: no hypernetwork
    states: torch.Tensor        # (K, S, D) I_x, the encoded instruction
    mask: torch.Tensor          # (K, S) bool, False on padding
    fusion: list                # per encoder block keys and values, (K, H, S, d_kv) both
    scale: float = 1.0          # of the LoRA update and the encoder's cross-attention alone
    tasks: list | None = None   # of each row: {"instruction": .., "demonstrations": [..]}
    model: object = None        # the TAGI whose adapter it is
    record: dict | None = None  # of a file: config.yaml

    def __len__(self):
        return len(self.mask)

    def __getitem__(self, index) -> "Adapter":
        rows = range(len(self))[index]                          # raises IndexError
        return self.select(rows if isinstance(index, slice) else [rows])

    def __repr__(self):
        rank = next(iter(self.weights.values()))[0].shape[1] if self.weights else 0
        plural = "" if len(self) == 1 else "s"
        return f"Adapter({len(self)} task{plural}, rank {rank}, scale {self.scale:g})"

    def select(self, index) -> "Adapter":
        """Rows for a mixed batch: row index[n] for instance n; a list or tensor of N integers."""
        index = torch.as_tensor(index, device=self.mask.device)
        if index.numel() and (index.is_floating_point() or index.dtype == torch.bool):
            raise UserError("select takes whole numbers, the rows' places; no others, and no mask")
        index = index.long()
        weights = None if self.weights is None else select(self.weights, index)
        fusion = [(keys[index], values[index]) for keys, values in self.fusion]
        tasks = None if self.tasks is None else [self.tasks[k] for k in index.tolist()]
        return Adapter(weights, self.states[index], self.mask[index], fusion, self.scale, tasks,
                       self.model, self.record)

    def scaled_weights(self) -> Weights | None:
        """The LoRA weights, `scale` in B."""
        if self.weights is None or self.scale == 1:
            return self.weights
        return {name: (A, B * self.scale) for name, (A, B) in self.weights.items()}

    @staticmethod
    def combine(adapters: list["Adapter"], weights: list[float] | None = None) -> "Adapter":
        """The weighted sum of adapters of one task each, as one adapter; weights: 1/n by default.

        Exact for LoRA, whose factors are concatenated along the rank. The instructions' states
        stand one after the other and fusion attends to all of them; in the encoder each one's
        values are multiplied by n times its weight, so that an adapter with itself is itself.
        The decoder reads all states whatever their weight. Raises UserError where there is nothing
        to combine, and for adapters of several models.
        """
        adapters = list(adapters)
        fine = all(isinstance(adapter, Adapter) for adapter in adapters)
        if not fine or isinstance(weights, (dict, set, str)):
            raise UserError("combine takes a list of adapters and a list of their weights")
        weights = [1 / len(adapters) for _ in adapters] if weights is None else list(weights)
        pairs = [(adapter, w) for adapter, w in zip(adapters, weights) if w != 0]
        if (len(weights) != len(adapters) or not pairs or not all(map(math.isfinite, weights))
                or any(len(adapter) != 1 for adapter in adapters)):
            raise UserError(f"weights {weights} for {len(adapters)} adapters: give each a finite "
                            "one, not all of them 0, and adapters of one task")
        models = [adapter.model for adapter in adapters if adapter.model is not None]
        for adapter in adapters if models else []:
            adapter.check(models[0])
        marks = {repr([(adapter.record or {}).get(key) for key in MARKS]) for adapter in adapters}
        if not models and len(marks) > 1:
            raise UserError("these adapters are of several models; combine those of one")
        first, n = pairs[0][0], len(pairs)
        combined = {}
        # Σ w·B·A of all is one product of factors that stand side by side.
        for site in first.weights or {}:
            A, B = [], []
            for adapter, w in pairs:
                A.append(adapter.weights[site][0])
                B.append(adapter.weights[site][1] * (w * adapter.scale))
            combined[site] = torch.cat(A, 1), torch.cat(B, 2)   # (1, n·r, D_in), (1, D_out, n·r)
        fusion = []
        for l in range(len(first.fusion)):
            keys = [adapter.fusion[l][0] for adapter, _ in pairs]
            values = [adapter.fusion[l][1] * (n * w * adapter.scale) for adapter, w in pairs]
            fusion.append((torch.cat(keys, 2), torch.cat(values, 2)))           # (1, H, ΣS, d_kv)
        parts, states, masks = [], [], []
        for adapter, w in pairs:
            states.append(adapter.states)
            masks.append(adapter.mask)
            # Told as a sum of instructions, however it was made.
            for task in (adapter.tasks or [{}])[0].get("combined", adapter.tasks or []):
                parts.append(task | {"weight": w * adapter.scale * task.get("weight", 1)})
        return Adapter(combined or None, torch.cat(states, 1), torch.cat(masks, 1), fusion, 1.0,
                       [{"combined": parts}], first.model, first.record)

    # ------------------------------------------------------------------------------------- files

    def check(self, model) -> None:
        """Make it `model`'s own. Raises UserError where another model made it."""
        if self.model is model or (self.model is None and self.record is None):
            return                                      # its own, or a training step's
        theirs, ours = self.record or record_of(self.model), record_of(model)
        for key in MARKS:
            if theirs.get(key) != ours.get(key):
                raise UserError(f"this adapter is for a model with {key} {theirs.get(key)}, not "
                                f"{ours.get(key)}; use the one that made it, or that it holds")
        self.model, device = model, model.device
        self.states, self.mask = self.states.to(device), self.mask.to(device)
        self.fusion = [(keys.to(device), values.to(device)) for keys, values in self.fusion]
        for name, (A, B) in (self.weights or {}).items():
            self.weights[name] = (A.to(device), B.to(device))

    def save(self, folder: str) -> None:
        """Write all that answers need beside the frozen LLM: a checkpoint without a hypernetwork,
        for TAGI.load, and adapter.safetensors, for `load`. Raises UserError where the folder is
        there already or cannot be written, and then leaves nothing."""
        model, folder = loaded(self.model), os.path.expanduser(folder)
        tensors = {"states": self.states, "mask": self.mask} | flatten(self.weights or {})
        for l, (keys, values) in enumerate(self.fusion):
            tensors |= {f"fusion.{l}.keys": keys, f"fusion.{l}.values": values}
        record = record_of(model) | {"scale": self.scale, "adapted_to": self.tasks}
        record["adapter_digest"] = digest_of(record, tensors)
        record["hypernetwork_digest"] = t5.hypernetwork_digest(model)
        if record["llm_is_relative"]:                   # so that both can be moved together
            record["llm_path"] = t5.path_from(folder, model.llm_path)
        with new_folder(folder) as unfinished:
            common.save_checkpoint(unfinished, record, shared_of(model), finished=True)
            common.save_tensors(f"{unfinished}/adapter.safetensors", tensors)

    @classmethod
    def load(cls, folder: str) -> "Adapter":
        """What `save` wrote; a model that uses it first checks it, and takes it to its device."""
        folder = os.path.expanduser(folder)
        if not os.path.isfile(f"{folder}/adapter.safetensors"):
            raise UserError(f"{folder} is no saved adapter; write one with adapt.py --save")
        needs = ("adapter_digest", "scale", "adapted_to", *recorded.OF_A_STUDENT)
        record = vars(recorded.load_options(folder, needs))
        with common.named_file(f"{folder}/adapter.safetensors", "save the adapter again"):
            tensors = load_file(f"{folder}/adapter.safetensors")
            if digest_of(record, tensors) != record["adapter_digest"]:
                raise ValueError("it is not what config.yaml beside it tells of")
            states, mask, fusion, weights = tensors.pop("states"), tensors.pop("mask"), [], {}
            while f"fusion.{len(fusion)}.keys" in tensors:
                name = f"fusion.{len(fusion)}"
                fusion.append((tensors.pop(f"{name}.keys"), tensors.pop(f"{name}.values")))
            for name in [name for name in tensors if name.endswith(".lora_A")]:
                site = name.removesuffix(".lora_A")
                weights[site] = tensors[name], tensors[f"{site}.lora_B"]
            check_shapes(states, mask, fusion, weights)
        return cls(weights or None, states, mask, fusion, record["scale"], record["adapted_to"],
                   record=record)

    def _for_others(self, lossy: bool, parts: list[str]):
        """(its model, which of these parts a LoRA cannot hold). Raises UserError for a loss."""
        model = loaded(self.model)
        has = {"fusion": model.options.fusion != "none",
               "embeddings": model.embedding_delta is not None}
        lost = [part for part in parts if has[part]]
        if lost and not lossy:
            lost = " and ".join(lost)
            raise UserError(f"{lost} would be lost, being no LoRA: --save the adapter, "
                            "use a checkpoint of --fusion none --no-train-embeddings, or --lossy")
        if len(self) != 1 or self.weights is None:
            raise UserError("this takes the LoRA of one task; select one")
        return model, lost

    def export(self, folder: str, lossy: bool = False) -> None:
        """Write it as PEFT's files, with a card. Norm gains go along as `modules_to_save`, which
        PEFT reads, but Transformers 5.17's own load_adapter reads wrong. Raises UserError where
        fusion or embeddings would be lost, unless lossy, and as `save`."""
        model, lost = self._for_others(lossy, ["fusion", "embeddings"])
        options, (task,) = model.options, self.tasks
        r = next(iter(self.weights.values()))[0].shape[1]       # a combination's is larger
        alpha = options.alpha / options.rank * r * self.scale
        with new_folder(folder) as unfinished:
            norms = export.scaled_norms(model.llm, model.norm_gains)
            export.write_peft(unfinished, model.llm_path, select(self.weights, 0), alpha,
                              options.targets.split(","), norms)
            text = export.card(task, model, f"{r}, {alpha:g}, {self.scale:g}",
                           lost, as_trained=self.scale == 1 and "combined" not in task)
            common.write_text(f"{unfinished}/README.md", text)

    def merge_into_t5(self, folder: str, lossy: bool = False) -> None:
        """Write the frozen LLM, this LoRA, gains, embeddings as a plain T5; raises as `export`."""
        model, _ = self._for_others(lossy, ["fusion"])          # embeddings are not lost here
        # The frozen LLM holds the adapter only while it is written.
        with new_folder(folder) as unfinished:
            model.merge(self)
            try:
                export.write_merged(unfinished, model.llm, model.tokenizer, model.norm_gains,
                                model.embedding_delta)
            finally:
                model.unmerge()


def check_shapes(states, mask, fusion, weights) -> None:
    """Raises ValueError where a file's tensors are not of one adapter; a digest has no shapes."""
    K, S = mask.shape
    D = states.shape[-1]
    fine = mask.dtype == torch.bool and states.shape == (K, S, D)
    for keys, values in fusion:
        K_, H, S_, d_kv = keys.shape
        fine = fine and keys.shape == values.shape == (K, H, S, d_kv)
    for A, B in weights.values():
        r, D_in = A.shape[1:]
        fine = fine and A.shape == (K, r, D_in) and B.shape == (K, B.shape[1], r)
    if not fine:
        raise ValueError("its tensors do not belong together")
    tensors = {"states": states} | flatten(weights)
    for l, (keys, values) in enumerate(fusion):
        tensors |= {f"fusion {l}, keys": keys, f"fusion {l}, values": values}
    common.check_finite(tensors, "it is not loaded")


def loaded(model):
    if model is None or model.llm_path is None:
        raise UserError("this adapter is of no model that TAGI.load loaded; call its "
                        "check(model), or make it by one")
    return model


def shared_of(model) -> dict:
    """What is trained and the same for all adapters: fusion's weights, gains, embeddings."""
    return {name: p for name, p in model.trainable().items() if not name.startswith("generator.")}


def record_of(model) -> dict:
    """What a saved adapter of this TAGI is to be known by and loaded with."""
    return vars(model.options) | {"generator": "none", "adapter": True,
                                  "shared_digest": t5.tensors_digest(shared_of(model))}


def digest_of(record: dict, tensors: dict) -> str:
    """Of a saved adapter's tensors and what they are to be run with."""
    marks = [record.get(key) for key in (*MARKS, "scale", "adapted_to")]
    return common.digest(repr(marks) + t5.tensors_digest(tensors))
