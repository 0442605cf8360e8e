"""--shard: every rank holds a part of each weight; a block is whole only while it runs (FSDP2).

A script makes and loads its model as without --shard, whole and on the CPU, and then `cut`s it:
PyTorch's fully_shard deals out the rows of each weight among the ranks. It gathers a block before
it runs, forwards and backwards, and adds up the gradients, of which each rank gets its rows.
Optimizers work on `Part`s: this rank's rows of a weight.

    n  rows of a weight (the length of its first dimension), of which a rank has ceil(n / world)
"""
import warnings

import torch
import torch.distributed as dist
import torch.nn as nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.fsdp._fully_shard import _fsdp_collectives as collectives
from torch.distributed.tensor import DTensor

import common
from common import UserError


class Part(nn.Parameter):
    """This rank's rows of a weight, in the same memory as fully_shard's; whole: that weight."""

    def __new__(cls, whole: DTensor):
        part = super().__new__(cls, whole.detach().to_local())
        part.whole = whole
        return part


def home(options) -> str:
    """Where a model is made and loaded. Raises UserError for --shard of a single process."""
    if options.shard and not dist.is_initialized():
        raise UserError("--shard deals out weights among processes, and here is but one; launch "
                        "several with torchrun --nproc-per-node N, or leave it out")
    return "cpu" if options.shard else options.device


def leave_out_where_useless(options, rank: int) -> None:
    """LoRA teachers are independent: their stage goes on without --shard, and says why."""
    if options.shard and options.stage == "lora":
        options.shard = False
        if rank == 0:
            print("lora: every rank trains teachers of its own, so --shard has no use here")


def autocast(options):
    """--precision's. A cache of it would keep bf16 copies of all blocks, which are dealt out."""
    return torch.autocast(options.device, torch.bfloat16, options.precision == "bf16",
                          cache_enabled=not options.shard)


def cut(parameters: dict, options, llms, student=None) -> dict:
    """Deal out these models' weights among the ranks; {name: Part, or parameter that stays whole}.

    parameters: what is trained, {name: tensor}, in these models or not; llms: whole ones on the
    CPU, trained or frozen, or None; student: a TAGI. Afterwards all is on options.device.
    """
    # Outputs that are views are warned of, since none may be changed in place; none is.
    warnings.filterwarnings("ignore", "FSDP2-wrapped module")
    mesh = init_device_mesh(options.device, (dist.get_world_size(),))
    models = [model for model in (*llms, student) if model is not None]
    places = {}                                 # parameter -> (module that holds it, its name)
    for model in models:
        for module in model.modules():
            for name, p in module.named_parameters(recurse=False):
                places.setdefault(p, (module, name))
    if student is not None:
        shard_student(student, mesh, options.precision)
    for llm in llms:
        if llm is not None:
            shard_llm(llm, mesh)
    for model in models:
        meet(model)

    # What each rank has whole goes to its GPU as it is.
    with torch.no_grad():
        for p in [p for model in models for p in model.parameters()] + list(parameters.values()):
            if not isinstance(p, DTensor):
                p.data = p.data.to(options.device)
    cut_parameters = {}
    for name, p in parameters.items():
        if p in places:
            module, attribute = places[p]
            p = getattr(module, attribute)
        cut_parameters[name] = Part(p) if isinstance(p, DTensor) else p
    # fully_shard takes for the outermost module that which runs first: the LLM, not its encoder.
    for llm in llms:
        if llm is not None and not any(p.requires_grad for p in llm.parameters()):
            start = torch.zeros(1, 1, dtype=torch.long, device=options.device)
            with torch.no_grad():
                llm(input_ids=start, decoder_input_ids=start, use_cache=False)
    return cut_parameters


def shard_llm(llm, mesh) -> None:
    """Block by block. Embeddings, head and last norms are dealt out only where they are trained.

    A frozen head runs alone, on as many chunks of positions as a rank's batch has, and ranks may
    only gather what all of them gather.
    """
    outside = {p for name, p in llm.named_parameters() if ".block." not in name}
    is_trained = any(p.requires_grad for p in llm.parameters())
    for stack in (llm.get_encoder(), llm.get_decoder()):
        for block in stack.block:
            fully_shard(block, mesh=mesh, reshard_after_forward=True)
        if not is_trained:                      # so that the encoder, run alone, gathers in advance
            fully_shard(stack, mesh=mesh, ignored_params=outside)
    fully_shard(llm, mesh=mesh, ignored_params=None if is_trained else outside)
    add_up(llm)


def shard_student(tagi, mesh, precision: str) -> None:
    """The generator's MLPs and fusion's linear layers: all of a student that grows with its LLM.

    Under bf16's autocast they would be computed in bf16 and are gathered so; gradients are added up
    in float32. Norms and biases, which stay in float32, are whole.
    """
    kwargs = {"mesh": mesh, "reshard_after_forward": True}
    if precision == "bf16":
        kwargs["mp_policy"] = MixedPrecisionPolicy(torch.bfloat16, torch.float32,
                                                   cast_forward_inputs=False)
    if tagi.generator is not None:
        small = {p for name, p in tagi.generator.named_parameters()
                 if not name.endswith((".w1", ".w2"))}
        add_up(fully_shard(tagi.generator, ignored_params=small, **kwargs))
    for attention in tagi.fusion:
        for linear in (attention.q, attention.k, attention.v, attention.o):
            add_up(fully_shard(linear, **kwargs))


def add_up(model) -> None:
    """Gradients are sums over ranks, not means: losses are already shares of the step's mean."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)      # gloo has no other


class AllGather(collectives.DefaultAllGather):
    """A block's weights from all ranks: where one is gone, the others end in one line."""

    def __call__(self, *args, **kwargs):
        with common.meeting():
            return super().__call__(*args, **kwargs)


class ReduceScatter(collectives.DefaultReduceScatter):
    """The sum of a block's gradients to all ranks, likewise."""

    def __call__(self, *args, **kwargs):
        with common.meeting():
            return super().__call__(*args, **kwargs)


def meet(model) -> None:
    """What fully_shard's ranks do together are meetings, as all of their traffic is."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_custom_all_gather(AllGather())
            module.set_custom_reduce_scatter(ReduceScatter())


# ------------------------------------------------------------------------------- parts and wholes

def is_part(p) -> bool:
    return isinstance(p, Part)


def rows(part: Part, whole: torch.Tensor) -> torch.Tensor:
    """This rank's rows of a tensor that has as many rows as the whole weight."""
    n = len(part.whole)
    size = -(-n // dist.get_world_size())
    start = min(n, size * dist.get_rank())
    return whole[start:start + size]


def gather(part: Part, its: torch.Tensor) -> torch.Tensor:
    """The inverse of `rows`, which all ranks call: all rows of a tensor of which this has some."""
    n, world = len(part.whole), dist.get_world_size()
    size = -(-n // world)
    padded = its.new_zeros(size, *its.shape[1:])
    padded[:len(its)] = its
    whole = its.new_empty(world * size, *its.shape[1:])
    with common.meeting():
        dist.all_gather(list(whole.chunk(world)), padded)
    return whole[:n]


def total(x: torch.Tensor) -> torch.Tensor:
    """The sum of a tensor over ranks."""
    x = x.clone()
    with common.meeting():
        dist.all_reduce(x)
    return x


def take_gradient(part: Part) -> None:
    """The gradient that fully_shard made, of all ranks, becomes this part's."""
    part.data = part.whole.detach().to_local()  # the first forward pass may have moved it
    gradient = part.whole.grad
    part.grad = torch.zeros_like(part) if gradient is None else gradient.to_local()
    part.whole.grad = None
