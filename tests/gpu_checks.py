"""The numbers of the method on a GPU: against the CPU's in float64, and every stage through its script.

    TAGI_TEST_DEVICE=cuda python -m pytest -q tests/gpu_checks.py         (tests/gpu.sh does it)

Without the variable: on the GPU where there is one, else on the CPU, where all must pass too.
"""
import contextlib
import os

import pytest
import torch
import torch.nn as nn

pytest.register_assert_rewrite("stages")
pytest_plugins = ("stages",)
from conftest import (ALL, INPUTS, INSTRUCTIONS, apart, close, exactly, make_llm, make_random_tagi, make_tokenizer, randomize,
                      student_options, tokens)
from stages import at_step, interrupt

import data
import lora
import train_hyper
from bench import optim, shard
from bench.teachers import svd_factors
from hypernet import TAGI

DEVICE = os.environ.get("TAGI_TEST_DEVICE") or ("cuda" if torch.cuda.is_available() else "cpu")
TEXTS = [INSTRUCTIONS[0], INSTRUCTIONS[3]]
CHOICES = [["cat", "a dog", "e"], ["c d", "word"], ["up", "u", "red"], ["e", "b"]]


def on(x, device=DEVICE):
    """A tree of tensors, moved."""
    if isinstance(x, dict):
        return {name: on(value, device) for name, value in x.items()}
    if isinstance(x, (list, tuple)):
        return type(x)(on(value, device) for value in x)
    return x.to(device) if torch.is_tensor(x) else x


def pair(kind="v1.1", *flags):
    """The same random TAGI in float64 on the CPU and on the device."""
    return make_random_tagi(kind, *flags), make_random_tagi(kind, *flags).to(DEVICE)


@pytest.fixture(autouse=True)
def float64(request):
    """All in float64, but for scripts, which are run as they are."""
    with contextlib.nullcontext() if request.node.get_closest_marker("scripts") else exactly():
        yield


def test_the_device_is_the_one_that_was_asked_for():
    assert torch.zeros(1, device=DEVICE).device.type == DEVICE


@pytest.mark.parametrize("kind", ["v1.0", "v1.1", "mt5"])
@pytest.mark.parametrize("pooling", ["attention", "mean"])
def test_generated_adapters_and_logits_are_those_of_the_cpu(kind, pooling):
    here, there = pair(kind, f"--generator={pooling}", *ALL)
    ours, theirs = there.adapt(TEXTS), here.adapt(TEXTS)
    close(on(ours.weights, "cpu"), theirs.weights)
    close(on(ours.fusion, "cpu"), theirs.fusion)
    batch = tokens(here)
    close(there(ours, *on(batch)).cpu(), here(theirs, *batch), 1e-8)


def test_a_mixed_batch_is_what_each_adapter_gives_alone():
    _, there = pair()
    adapters, (ids, mask, labels) = there.adapt(TEXTS), on(tokens(there))
    mixed = there(adapters, ids, mask, labels)
    for k in range(2):
        rows = slice(2 * k, 2 * k + 2)
        close(mixed[rows], there(adapters[k], ids[rows], mask[rows], labels[rows]), 1e-8)


def test_merged_is_unmerged_and_unmerging_is_exact():
    _, there = pair("v1.1", "--fusion=none")
    adapter, batch = there.adapt(TEXTS[:1]), on(tokens(there))
    before = there(adapter, *batch)
    weights = {name: p.clone() for name, p in there.llm.state_dict().items()}
    there.merge(adapter)
    close(there(adapter, *batch), before, 1e-6)         # the sum is made in float32
    there.unmerge()
    assert all(torch.equal(p, weights[name]) for name, p in there.llm.state_dict().items())


@pytest.mark.parametrize("beams", [1, 3])
def test_answers_are_those_of_the_cpu(beams):
    here, there = pair()
    ours = there.generate(INPUTS, there.adapt(INSTRUCTIONS), num_beams=beams, max_new_tokens=8)
    assert ours == here.generate(INPUTS, here.adapt(INSTRUCTIONS), num_beams=beams, max_new_tokens=8)


def test_scores_of_choices_are_those_of_the_cpu():
    here, there = pair()
    ours = there.score_choices(INPUTS, CHOICES, there.adapt(INSTRUCTIONS))
    theirs = here.score_choices(INPUTS, CHOICES, here.adapt(INSTRUCTIONS))
    for a, b in zip(ours, theirs, strict=True):
        assert a == pytest.approx(b, rel=1e-7)


def batch_of(tagi):
    ids, mask, labels = tokens(tagi)
    return {"instruction": data.tokenize(tagi.tokenizer, TEXTS, 20), "input": (ids, mask), "prompt": (ids, mask),
            **train_hyper.located(labels, "cpu"), "index": torch.tensor([0, 1, 1, 0]), "teacher": torch.tensor([1, 0])}


def teachers_of(tagi):
    torch.manual_seed(5)
    fresh = lora.init_weights(tagi.llm, tagi.options.rank, 0, 2)
    return {site: (A.double().cpu(), torch.randn(B.shape).double()) for site, (A, B) in fresh.items()}


@pytest.mark.parametrize("alignment", ["factors", "product", "svd"])
@pytest.mark.parametrize("size", [3, 10 ** 6])
def test_losses_and_gradients_are_those_of_the_cpu(alignment, size, monkeypatch):
    monkeypatch.setattr(train_hyper.target_losses, "__defaults__", (size,))             # positions at a time
    found = []
    for tagi, device in zip(pair("v1.1", f"--alignment={alignment}", *ALL), ("cpu", DEVICE)):
        teachers = teachers_of(tagi)
        teachers = on(svd_factors(teachers) if alignment == "svd" else teachers, device)
        terms = train_hyper.losses(tagi, on(batch_of(tagi), device), teachers, None, tagi.options, 7, 2)
        terms["loss"].backward()
        gradients = {name: p.grad.cpu() for name, p in tagi.trainable().items() if p.grad is not None}
        found.append(({name: term.detach().cpu() for name, term in terms.items()}, gradients))
    close(*found, 1e-7)
    assert {"loss", "ce", "kl", "ins"} <= found[0][0].keys() and len(found[0][1]) > 20


def test_lora_weights_of_each_example_are_a_loop_over_examples():
    torch.manual_seed(0)
    layer = lora.LoRALinear(nn.Linear(6, 5, bias=False).double(), 0.7).to(DEVICE)
    x, A, B = on([torch.randn(4, 3, 6).double(), torch.randn(2, 2, 6).double(), torch.randn(2, 5, 2).double()])
    layer.lora_A, layer.lora_B = A, B
    for n, y in enumerate(layer(x)):
        close(y, x[n] @ (layer.weight + 0.7 * B[n // 2] @ A[n // 2]).T)


@pytest.mark.parametrize("shape", [(64, 64), (32, 96), (96, 32)])
def test_muons_matrices_become_orthogonal_in_the_devices_arithmetic(shape):
    torch.manual_seed(0)
    made = optim.orthogonalize(torch.randn(3, *shape, device=DEVICE, dtype=torch.float32))
    values = torch.linalg.svdvals(made.double())
    assert values.max() < 1.3 and values.median() > 0.6


@pytest.mark.parametrize("optimizer", ["adamw", "adafactor", "muon"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_student_dealt_out_by_shard_trains_as_one_that_is_not(optimizer, checkpointing):
    """One rank alone: fully_shard's streams and types. Two ranks on CPUs: test_shard.py."""
    import t5
    dist, trained = torch.distributed, []
    dist.init_process_group("nccl" if DEVICE == "cuda" else "gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        for is_dealt in (False, True):
            tagi = make_random_tagi("v1.1", *ALL, f"--optimizer={optimizer}", "--lr=0.01")
            options = tagi.options
            options.device, options.shard = DEVICE, is_dealt
            if checkpointing:
                t5.checkpoint_blocks(tagi.llm, tagi.repetition)
            if not is_dealt:
                tagi.to(DEVICE)
            parameters = tagi.trainable()
            optimizer_of = optim.make_optimizer(parameters, options)
            parameters, optimizer_of, saved = optim.deal_out(parameters, optimizer_of, options, [tagi.llm], tagi)
            batch, teachers = on(batch_of(tagi)), on(teachers_of(tagi))
            for _ in range(3):
                train_hyper.losses(tagi, batch, teachers, None, options, 7, 2)["loss"].backward()
                optim.sum_gradients(parameters.values())
                optim.clip_gradients(parameters.values(), 1.0)
                optimizer_of.step()
                optimizer_of.zero_grad(set_to_none=True)
            saved.gather()
            # A bias of keys has no gradient but rounding's, which Adafactor makes as large as any.
            trained.append({name: p.detach().cpu() for name, p in saved.weights.items() if "in_proj_bias" not in name})
            assert any(map(shard.is_part, parameters.values())) == is_dealt
    finally:
        dist.destroy_process_group()
    close(*trained, 1e-5 if DEVICE == "cuda" and optimizer == "muon" else 1e-7)    # Muon's are in bf16 there


def test_a_step_in_bf16_is_near_one_in_float32():
    found = []
    for precision in ("fp32", "bf16"):
        tagi = randomize(TAGI(make_llm("v1.1"), make_tokenizer(), student_options(*ALL)), scale=0.1).to(DEVICE)
        if precision == "bf16":
            tagi.llm.bfloat16()
        teachers = {site: (A.float(), B.float()) for site, (A, B) in on(teachers_of(tagi)).items()}
        loss = train_hyper.losses(tagi, on(batch_of(tagi)), teachers, None, tagi.options, 7, 2)["loss"]
        loss.backward()
        found.append(loss.item())
        assert all(p.grad.isfinite().all() for p in tagi.trainable().values() if p.grad is not None)
    assert found[1] == pytest.approx(found[0], rel=0.05)


# ---------------------------------------------------------------------- through the scripts, in float32

@pytest.mark.scripts
@pytest.mark.parametrize("stage", ["meta", "finetune"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_stage_that_was_stopped_goes_on_as_if_it_was_not(finished, tmp_path, monkeypatch, stage, precision):
    reads = ("base",) if stage == "meta" else ("meta", "lora", "pretrain")
    flags = (f"--device={DEVICE}", "--steps=4", "--save-every=2", f"--precision={precision}")
    straight, cut = (finished.copy(tmp_path / name, reads) for name in ("straight", "cut"))
    straight.run(stage, *flags)
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        at_step(patch, 2, interrupt)
        cut.run(stage, *flags)
    cut.run(stage, *flags)
    # On a GPU sums are made in any order.
    assert apart(cut.weights(stage), straight.weights(stage), straight.record(stage)["lr"]) < 0.1
    assert cut.record(stage)["finished"] and cut.record(stage)["device"] == DEVICE


@pytest.mark.scripts
def test_every_stage_and_the_evaluation_run_on_the_device(finished, tmp_path):
    project = finished.copy(tmp_path / "runs", ())
    for stage in ("base", "meta", "lora", "lora-all", "pretrain", "finetune"):
        project.run(stage, f"--device={DEVICE}", "--precision=bf16")
        assert project.record(stage)["finished"]
    assert "TAGI" in project.run("evaluate", f"--device={DEVICE}", "--precision=bf16")
