"""The losses, Table 4's switches, and one step of train_hyper.py against the same step written out by hand."""
import argparse
import contextlib
import json
import os
from unittest import mock

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.func import functional_call

import bench.runs
import common
import data
import hypernet
import lora
from bench import optim
from bench.runs import Run
from bench.teachers import load_teachers, save_teacher
import t5
import train_hyper
import train_teacher
from conftest import (ALL, INSTRUCTIONS, close, exactly, make_llm, make_random_tagi, make_tagi,
                      make_tokenizer, randomize, student_options, tokens)
from hypernet import TAGI
from train_hyper import instruction_loss, kl_loss, target_losses

pytestmark = pytest.mark.numbers
GROUPS = {"generator", "fusion", "norm_gains", "embedding_delta"}


@pytest.fixture
def pair():
    """(student, teacher): logits (5, 7)."""
    torch.manual_seed(0)
    return tuple(2 * torch.randn(5, 7, dtype=torch.float64) for _ in range(2))


# --------------------------------------------------------------------------------------------------------- L_kl, Eq. 5

@pytest.mark.parametrize("standardize", [False, True])
@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_kl_is_zero_of_a_model_with_itself_and_positive_of_different_ones(pair, temperature, standardize):
    """Every position adds something positive where the models differ, nothing where they agree."""
    student, teacher = pair
    close(kl_loss(teacher, teacher, temperature, standardize).double(), torch.zeros((), dtype=torch.float64), 1e-6)
    for m in range(5):
        one = teacher.clone()
        one[m] = student[m]
        assert kl_loss(one, teacher, temperature, standardize) > 1e-3


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_kl_is_that_of_torch_distributions_teacher_first(pair, temperature, exact):
    """Σ over positions of KL(teacher ‖ student) at the temperature, × T²."""
    student, teacher = pair
    p, q = (torch.distributions.Categorical(logits=x / temperature) for x in (teacher, student))
    expected = torch.distributions.kl_divergence(p, q).sum() * temperature ** 2
    close(kl_loss(student, teacher, temperature), expected)
    assert not torch.isclose(kl_loss(teacher, student, temperature), expected, rtol=0.01)


def test_standardized_kl_ignores_shift_and_scale_of_logits(pair, exact):
    """z-scored logits: only their shape counts; without it shift is still free and scale is not."""
    student, teacher = pair
    moved = 3 * student + 5
    loss = kl_loss(student, teacher, 2.0, True)
    close(kl_loss(moved, teacher, 2.0, True), loss, 1e-4)
    close(kl_loss(student, 0.5 * teacher - 1, 2.0, True), loss, 1e-4)
    close(kl_loss(student + 5, teacher), kl_loss(student, teacher))
    assert not torch.isclose(kl_loss(moved, teacher), kl_loss(student, teacher), rtol=0.01)


@pytest.mark.parametrize("standardize", [False, True])
@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_gradcheck_of_kl(pair, temperature, standardize, exact):
    """The gradient to the student's logits agrees with finite differences in float64."""
    student, teacher = pair
    assert torch.autograd.gradcheck(lambda s: kl_loss(s, teacher, temperature, standardize), student.requires_grad_())


# ------------------------------------------------------------------------------------- both losses at target positions

@pytest.mark.parametrize("tied", [False, True])
def test_chunked_losses_are_those_of_all_logits_and_keep_none_of_them(tied, exact):
    """Values and gradients for every chunk size; no tensor as wide as the vocabulary waits for the backward pass."""
    torch.manual_seed(0)
    student, teacher = (torch.randn(11, 6, dtype=torch.float64) for _ in range(2))
    W = torch.randn(6, 50, dtype=torch.float64)
    targets, student_head = torch.randint(0, 50, (11,)), W.clone().requires_grad_(tied)
    options = argparse.Namespace(temperature=2.0, standardize_logits=True)
    student.requires_grad_()
    logits, teacher_logits = student @ student_head, teacher @ W
    expected = F.cross_entropy(logits, targets, reduction="sum"), kl_loss(logits, teacher_logits, 2.0, True)
    inputs = [student, student_head] if tied else [student]
    gradient = torch.autograd.grad(expected[0] + 5 * expected[1], inputs)
    for size in (1, 3, 11, 100):
        widths = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x: (widths.append(x.shape), x)[1], lambda x: x):
            ce, kl = target_losses(student, teacher, targets, lambda x: x @ student_head, lambda x: x @ W, options, size)
        close(ce, expected[0]), close(kl, expected[1])
        for a, b in zip(torch.autograd.grad(ce + 5 * kl, inputs), gradient):
            close(a, b)
        assert not any(50 in shape and shape != W.shape for shape in widths)
    ce, kl = target_losses(student, None, targets, lambda x: x @ student_head, None, options, 4)
    close(ce, expected[0])
    assert kl == 0


@pytest.mark.parametrize("kind", ["v1.0", "v1.1", "mt5"])
def test_head_reads_the_target_positions_of_the_logits(kind, exact):
    """target_states and head: `forward`'s logits where a label counts, with the head's own scale and the student's embeddings."""
    tagi = make_random_tagi(kind, *ALL)
    ids, mask, labels = tokens(tagi)
    labels[0, -1] = data.IGNORE
    adapter = tagi.adapt(INSTRUCTIONS)
    logits = tagi(adapter, ids, mask, labels)
    close(tagi.head(adapter, tagi.target_states(adapter, ids, mask, labels, data.target_positions(labels))), logits[labels != data.IGNORE], 1e-9)
    assert tagi.llm.get_output_embeddings()(logits.new_zeros(1, tagi.llm.config.d_model)).shape[-1] == logits.shape[-1]


# -------------------------------------------------------------------------------------------------------- L_ins, Eq. 6

def adapters(K=3):
    torch.manual_seed(0)
    return [{site: (torch.randn(K, 2, 5, dtype=torch.float64), torch.randn(K, 7, 2, dtype=torch.float64)) for site in "ab"}
            for _ in range(2)]


@pytest.mark.parametrize("kind", ["factors", "product"])
def test_sigmoid_is_a_weight_without_gradient_for_each_task(kind):
    """λ2 = sigmoid(L_ins): each task's loss and gradient are scaled by its own number, as by a constant."""
    generated, teacher = adapters()
    B = generated["a"][1].requires_grad_()
    weighted, ins = instruction_loss(generated, teacher, kind, "sigmoid")
    assert ins.shape == weighted.shape == (3,) and len(set(ins.tolist())) == 3
    close(weighted, torch.sigmoid(ins) * ins)
    by_sigmoid, = torch.autograd.grad(weighted.sum(), B, retain_graph=True)
    plain, = torch.autograd.grad(ins.sum(), B)
    close(by_sigmoid, torch.sigmoid(ins.detach())[:, None, None] * plain)
    weighted, ins = instruction_loss(generated, teacher, kind, 0.25)
    close(weighted, 0.25 * ins)


@pytest.mark.parametrize("kind", ["factors", "product"])
def test_gradcheck_of_the_instruction_loss(kind):
    """With a fixed λ2 the gradient to the generated weights agrees with finite differences in float64."""
    generated, teacher = adapters()
    flat = [w.requires_grad_() for pair in generated.values() for w in pair]
    assert torch.autograd.gradcheck(
        lambda *w: instruction_loss(dict(zip("ab", zip(w[::2], w[1::2]))), teacher, kind, 0.5)[0], flat)


# ------------------------------------------------------------------------------------------------- gradchecks of the whole

@pytest.mark.parametrize("pooling", ["attention", "mean"])
def test_gradcheck_of_the_generator(pooling):
    """To both hidden states and to every parameter, with padding, in float64."""
    torch.manual_seed(0)
    generator = hypernet.Generator({"0.q": (3, 2), "0.v": (3, 2), "1.q": (3, 2), "1.v": (3, 2), "1.wo": (2, 3)}, d_model=3, r=2,
                                   pooling=pooling, width=4, bottleneck=3, heads=2).double()
    for p in generator.parameters():
        nn.init.normal_(p)
    names, parameters = zip(*generator.named_parameters())
    states = [torch.randn(2, 3, 3, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    mask = torch.tensor([[True, True, True], [True, True, False]])

    def run(first, last, *parameters):
        weights = functional_call(generator, dict(zip(names, parameters)), (first, last, mask))
        return tuple(w for pair in weights.values() for w in pair)

    assert torch.autograd.gradcheck(run, (*states, *parameters), fast_mode=True)
    for weights in zip(*[iter(run(*states, *parameters))] * 2):
        assert all(w.abs().max() > 0.01 for w in weights)


@pytest.mark.parametrize("generator", ["attention", "mean"])
def test_gradcheck_of_all_three_losses_through_the_whole_model(generator, exact):
    """From every trainable parameter through generation, fusion and the LLM to L_pred, L_kl and L_ins."""
    tagi = make_random_tagi("v1.0", *ALL, f"--generator={generator}")
    ids, mask, labels = tokens(tagi)
    a, a_mask = data.tokenize(tagi.tokenizer, [data.instruction_text(i) for i in INSTRUCTIONS], 64)
    names, parameters = zip(*tagi.trainable().items())
    torch.manual_seed(0)
    teacher = {s: (torch.randn_like(A), torch.randn_like(B)) for s, (A, B) in tagi.adapt(INSTRUCTIONS).weights.items()}
    keep = labels != data.IGNORE
    teacher_logits = torch.randn(keep.sum(), 60, dtype=torch.float64)
    options = argparse.Namespace(temperature=1.0, standardize_logits=False)

    class Losses(nn.Module):
        def __init__(self):
            super().__init__()
            self.tagi = tagi

        def forward(self):
            adapter = tagi.generate_adapter(*tagi.encode_instruction(a, a_mask), a_mask)
            states = tagi.target_states(adapter, ids, mask, labels, data.target_positions(labels))
            return (*target_losses(states, teacher_logits, labels[keep], lambda x: tagi.head(adapter, x), lambda x: x, options, 4),
                    *(instruction_loss(adapter.weights, teacher, kind, 0.5)[0].sum() for kind in ("factors", "product")))

    losses = Losses()
    assert torch.autograd.gradcheck(lambda *p: functional_call(losses, {f"tagi.{n}": x for n, x in zip(names, p)}, ()),
                                    parameters, fast_mode=True, rtol=1e-4, atol=1e-4)


# -------------------------------------------------------------------------------------------- Table 4: trained parameters

def shapes(*flags):
    tagi, _ = make_tagi("v1.1", *flags)
    return {name: p.shape for name, p in tagi.trainable().items()}


def part(names, *groups):
    return {n: s for n, s in names.items() if n.partition(".")[0] in groups}


@pytest.mark.parametrize("flag, removed", [
    ("--generator=none", ["generator"]), ("--fusion=none", ["fusion"]), ("--fusion=decoder", ["fusion"]),
    ("--fusion=encoder", []), ("--no-train-norms", ["norm_gains"]), ("--no-train-embeddings", ["embedding_delta"]),
    ("--no-pretrained", []), ("--lambda-ce=0", []), ("--lambda-kl=0", []), ("--lambda-ins=0", []), ("--alignment=product", []),
    ("--temperature=3", []), ("--standardize-logits", []), ("--kl-teacher=meta", [])])
def test_a_switch_removes_its_part_and_nothing_else(flag, removed):
    """The trained parameters are all of them less exactly the part switched off; loss weights remove none."""
    full = shapes(*ALL)
    assert {n.partition(".")[0] for n in full} == GROUPS
    assert shapes(*ALL, flag) == part(full, *GROUPS - set(removed))


def test_default_and_added_parts():
    """By default generator and fusion are trained; norms and embeddings add a gain each and one table."""
    default, full = shapes(), shapes(*ALL)
    assert default == part(full, "generator", "fusion")
    assert sorted(part(full, "embedding_delta").values()) == [(60, 24)]
    assert len(part(full, "norm_gains")) == 2 * 2 + 1 + 2 * 3 + 1 and set(part(full, "norm_gains").values()) == {(24,)}


@pytest.mark.parametrize("flag, fused, concatenated", [("--fusion=both", 2, True), ("--fusion=none", 0, False),
                                                       ("--fusion=decoder", 0, True), ("--fusion=encoder", 2, False)])
def test_fusion_switches_decide_what_the_decoder_attends_to(flag, fused, concatenated):
    """Part 2 puts the S instruction states before the T input's, part 1 gives keys and values to each encoder block."""
    tagi, _ = make_tagi("v1.1", flag)
    randomize(tagi)
    ids, mask, _ = tokens(tagi)
    adapter = tagi.adapt(INSTRUCTIONS)
    with tagi.adapted(adapter):
        encoded, encoded_mask = tagi.encode(ids, mask)
    length = ids.shape[1] + concatenated * adapter.mask.shape[1]
    assert encoded.last_hidden_state.shape[1] == encoded_mask.shape[1] == length and len(adapter.fusion) == fused
    with tagi.adapted(None):
        frozen, _ = tagi.encode(ids, mask)
    if concatenated:
        assert torch.equal(encoded.last_hidden_state[:, :-ids.shape[1]], adapter.states)
        assert torch.equal(encoded_mask, torch.cat([adapter.mask.long(), mask], 1))
    assert adapter.weights.keys() == lora.sites(tagi.llm).keys() and len(frozen.last_hidden_state[0]) == ids.shape[1]


def test_fusion_alone_leaves_the_projections_plain():
    """Without the hypernetwork an adapter holds no LoRA weights, and the layers run as they are."""
    tagi, _ = make_tagi("v1.1", "--generator=none")
    adapter = tagi.adapt(INSTRUCTIONS)
    assert adapter.weights is None
    with tagi.adapted(adapter):
        assert all(wrapper.lora_A is None for wrapper in lora.sites(tagi.llm).values())


@pytest.mark.parametrize("flags", [("--generator=none", "--fusion=none"), ("--lambda-ce=0", "--lambda-kl=0")])
def test_switching_off_everything_is_refused(flags, capsys):
    """Nothing to train, or no loss on the labels: one line, exit code 2."""
    with mock.patch.object(common, "read_yaml", lambda *args: {}), \
            pytest.raises(SystemExit) as exit:
        train_hyper.main(["--stage=finetune", *flags])
    assert exit.value.code == 2 and "drop one of them" in capsys.readouterr().err


# ----------------------------------------------------------------------------------- Table 4: gradients of one real step

FINGERPRINT = "of the runs' LLM"                        # which in float64 would have another


@contextlib.contextmanager
def in_float64():
    """Within, what train_hyper.train loads and makes is in float64, and so is its arithmetic."""
    load = t5.load_llm

    def load_llm(*args):
        llm, tokenizer = load(*args)
        return llm.double(), tokenizer

    with exactly(), mock.patch.object(t5, "load_llm", load_llm), \
            mock.patch.object(t5, "fingerprint", lambda llm: FINGERPRINT):
        torch.set_default_dtype(torch.float64)
        try:
            yield
        finally:
            torch.set_default_dtype(torch.float32)


@pytest.fixture(scope="module")
def runs(tmp_path_factory, tasks):
    """A folder as the earlier stages leave it: three tasks, a frozen LLM, LoRA teachers, a random pretrained student."""
    root = tmp_path_factory.mktemp("runs")
    for folder in ("data/tasks", "data/splits/default"):
        (root / folder).mkdir(parents=True)
    (root / "data/splits/default/train_tasks.txt").write_text("\n".join(t.name for t in tasks))
    for t in tasks:
        (root / f"data/tasks/{t.name}.json").write_text(json.dumps({
            "Definition": t.definitions, "Categories": [t.category],
            "Positive Examples": [{"input": x, "output": y} for x, y in t.demonstrations],
            "Instances": [{"id": i.id, "input": i.input, "output": i.outputs} for i in t.instances]}))
    llm = make_llm("v1.1").requires_grad_(False)
    common_flags = [f"--runs={root}", f"--data={root}/data", "--llm=meta", "--rank=2", "--alpha=3", "--device=cpu", "--unit=task"]
    options = train_teacher.parser().parse_args(common_flags)
    t5.save_llm(f"{root}/meta", vars(options), llm, make_tokenizer(), finished=True)
    options.llm_fingerprint = FINGERPRINT
    lora.inject_lora(llm, ["q", "v"], 2, 3)
    torch.manual_seed(0)
    for t in tasks:
        weights = {s: (A, 0.5 * torch.randn_like(B)) for s, (A, B) in lora.init_weights(llm, 2, 0).items()}
        save_teacher(f"{root}/lora", vars(options), t.name, weights)
    start = make_tagi("v1.1", *ALL, *common_flags)[0]
    start.options.llm_fingerprint = options.llm_fingerprint
    weights = randomize(start, scale=0.2).trainable()
    common.save_checkpoint(f"{root}/pretrain", vars(start.options), weights, finished=True)
    return common_flags + list(ALL) + ["--steps=1", "--clip=0", "--tasks=3", "--instances=2", "--alignment=factors"]


@contextlib.contextmanager
def one_step():
    """Within, train_hyper.train makes its step without saving, moving anything or touching signal handlers; yields
    {name: gradient} and, under "start", {name: value}."""
    seen = {}

    class Recorder:
        param_groups, parts = [{}], []

        def state_dict(self):
            return {"parts": []}

        def step(self):
            seen.update({n: p.grad.clone() if p.grad is not None else torch.zeros_like(p) for n, p in self.parameters.items()})
            seen["start"] = {n: p.detach().clone() for n, p in self.parameters.items()}

        def zero_grad(self, set_to_none):
            pass

    def resume(folder, parameters, optimizer):
        optimizer.parameters = parameters
        return 0

    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.object(optim, "make_optimizer", lambda *args: Recorder()))
        stack.enter_context(mock.patch.object(common, "resume", resume))
        stack.enter_context(mock.patch.object(common.StopSignal, "listen"))
        for name in ("Log", "save_step", "publish", "sweep"):
            stack.enter_context(mock.patch.object(bench.runs, name))
        yield seen


def train(options):
    """What train_hyper.py does with these options."""
    folder = os.path.join(options.runs, options.name or options.stage)
    train_hyper.train(options, Run(folder, options, 0, 1, {}))


@pytest.fixture(scope="module")
def step(runs):
    """step(*flags) -> the gradients of train_hyper.py's first finetuning step with these flags, each made once."""
    made = {}

    def run(*flags):
        if flags not in made:
            with in_float64(), one_step() as seen:
                train(student_options(*runs, *flags))
            made[flags] = seen
        return made[flags]
    return run


def combine(*terms):
    """Σ weight · gradients, by parameter name."""
    return {n: sum(w * g[n] for w, g in terms) for n in terms[0][1] if n != "start"}


def same(a, b):
    """Gradients of float64 backward passes that add up in another order."""
    for n in combine((1, a)):
        torch.testing.assert_close(a[n], b[n], rtol=1e-6, atol=1e-9, msg=n)


def differ(a, b):
    equal = {n: torch.allclose(a[n], b[n], rtol=1e-6, atol=1e-9) for n in combine((1, a))}
    return {n.partition(".")[0] for n in equal if not equal[n]}


CE, KL = ("--lambda-kl=0", "--lambda-ins=0"), ("--lambda-ce=0", "--lambda-ins=0")      # only this loss is left


@pytest.mark.parametrize("lambda_ins", ["sigmoid", "1000"])           # 1000: errors in L_ins cannot hide behind L_kl
def test_a_step_is_the_three_losses_written_out_by_hand(step, runs, lambda_ins):
    """Teachers merged into a plain LLM one instance at a time, torch's own KL and cross-entropy, explicit alignment."""
    options = student_options(*runs)
    with in_float64():
        expected = by_hand(options, lambda_ins)
    same(step(f"--lambda-ins={lambda_ins}"), expected)


def by_hand(options, lambda_ins):
    """{name: gradient} of the first step."""
    llm, tokenizer = t5.load_llm(f"{options.runs}/meta")
    tagi = TAGI(llm, tokenizer, options)
    common.load_weights(tagi.trainable(), f"{options.runs}/pretrain")
    get_batch, units = train_hyper.finetune_batches(options, tagi, 1, data.training_tasks(options))
    batch = get_batch(0, 0)
    K, labels = len(batch["teacher"]), batch["labels"]
    assert sorted(batch["teacher"].tolist()) == [0, 1, 2] and len(labels) == 6

    plain = t5.load_llm(f"{options.runs}/meta")[0].requires_grad_(False)
    options.llm_fingerprint = t5.fingerprint(plain)
    lora.inject_lora(plain, ["q", "v"], 2, 3)
    teachers = load_teachers(f"{options.runs}/lora", units, plain, vars(options), "")
    teacher_logits = []
    for n in range(6):
        lora.merge(plain, lora.select(teachers, batch["teacher"][n // 2].item()))
        ids, mask = (x[n:n + 1] for x in batch["prompt"])
        teacher_logits.append(plain(input_ids=ids, attention_mask=mask, labels=labels[n:n + 1]).logits)
        lora.unmerge(plain)

    ids, mask = batch["instruction"]
    adapter = tagi.generate_adapter(*tagi.encode_instruction(ids, mask), mask)
    logits = tagi(adapter.select([n // 2 for n in range(6)]), *batch["input"], labels)
    keep = labels != data.IGNORE
    p, q = (torch.distributions.Categorical(logits=x[keep]) for x in (torch.cat(teacher_logits), logits))
    kl = torch.distributions.kl_divergence(p, q).mean()
    ins = [torch.cat([(w[k] - teachers[s][i][batch["teacher"][k]]).flatten() for s, ab in adapter.weights.items()
                      for i, w in enumerate(ab)]).square().mean() for k in range(K)]
    loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=data.IGNORE) + 5 * kl + sum(
        (torch.sigmoid(x.detach()) if lambda_ins == "sigmoid" else 1000) * x for x in ins) / K
    loss.backward()
    return {n: p.grad for n, p in tagi.trainable().items()}


def test_every_loss_weight_removes_its_own_loss_and_nothing_else(step):
    """The gradient is that of L_pred + 5·L_kl + λ2·L_ins; each flag takes its own term away; L_ins reaches the generator."""
    full, ce, kl = step(), step(*CE), step(*KL)
    same(step("--lambda-ins=0"), combine((1, ce), (1, kl)))
    same(combine((1, full), (-1, step("--lambda-ce=0"))), ce)
    same(combine((1, full), (-1, step("--lambda-kl=0"))), kl)
    assert differ(full, step("--lambda-ins=0")) == {"generator"}
    assert differ(full, step("--lambda-ce=0")) == differ(full, step("--lambda-kl=0")) == GROUPS
    same(step("--alignment=none"), step("--lambda-ins=0"))
    same(step("--lambda-kl=10", "--lambda-ce=0", "--lambda-ins=0"), combine((2, kl)))
    same(step("--lambda-ce=3", *CE), combine((3, ce)))


def test_alignment_options_change_only_the_generators_gradient(step):
    """product, svd, a number for λ2 and a larger number."""
    base = step("--lambda-ins=0")
    for flags in (("--alignment=product",), ("--alignment=svd",), ("--lambda-ins=1",)):
        assert differ(step(*flags), base) == differ(step(*flags), step()) == {"generator"}
    same(combine((1, step("--lambda-ins=2")), (-1, base)), combine((2, step("--lambda-ins=1")), (-2, base)))


@pytest.mark.parametrize("flag", ["--temperature=3", "--standardize-logits", "--kl-teacher=meta"])
def test_kl_options_change_the_gradient_of_kl_and_of_nothing_else(step, flag):
    """Everything moves while λ1 > 0, and nothing with λ1 = 0."""
    assert differ(step(*KL, flag), step(*KL)) == GROUPS
    same(step("--lambda-kl=0", flag), step("--lambda-kl=0"))


def test_no_pretrained_starts_anew_and_otherwise_from_the_pretrain_stage(step, runs):
    """The start values are the checkpoint's, or a fresh student's; parts that are off are left out."""
    options = student_options(*runs)
    with in_float64():                                          # where random numbers are others
        fresh = TAGI(*t5.load_llm(f"{options.runs}/meta"), options).trainable()
    saved = common.load_file(f"{options.runs}/pretrain/model.safetensors")
    for flags, expected in (((), saved), (("--no-pretrained",), fresh),
                            (("--generator=none",), part(saved, *GROUPS - {"generator"})),
                            (("--fusion=none",), part(saved, *GROUPS - {"fusion"}))):
        start = step(*flags)["start"]
        assert start.keys() == expected.keys()
        assert all(torch.equal(start[n], expected[n].double()) for n in start)


def test_a_step_over_two_micro_batches_is_the_mean_over_their_tokens_and_tasks(step, runs):
    """Accumulating two micro-batches: gradients weighted by label tokens (L_pred, L_kl) and tasks (L_ins), not averaged."""
    flags = ("--tasks=2", "--instances=1", "--seed=5")
    options = student_options(*runs, *flags)
    llm, tokenizer = t5.load_llm(f"{options.runs}/meta")
    get_batch, units = train_hyper.finetune_batches(options, TAGI(llm, tokenizer, options), 2, data.training_tasks(options))
    batches = [get_batch(0, micro) for micro in range(2)]
    a, b = ((batch["labels"] != data.IGNORE).sum().item() for batch in batches)
    assert a != b
    alone = []
    for batch in batches:
        with mock.patch.object(train_hyper, "finetune_batches", lambda *args: (lambda step, micro: batch, units)):
            for own in (CE, KL, ("--lambda-kl=0",)):
                with in_float64(), one_step() as seen:
                    train(student_options(*runs, *flags, *own))
                alone.append(seen)
    first_ce, first_kl, first_ins, second_ce, second_kl, second_ins = alone
    for own, first, second in ((CE, first_ce, second_ce), (KL, first_kl, second_kl)):
        same(step(*flags, *own, "--accumulate=2"), combine((a / (a + b), first), (b / (a + b), second)))
    n = [len(batch["teacher"]) for batch in batches]
    share = n[0] / sum(n)
    ins = combine((share, first_ins), (-share, first_ce), (1 - share, second_ins), (share - 1, second_ce))
    both = combine((1, step(*flags, "--lambda-kl=0", "--accumulate=2")), (-1, step(*flags, *CE, "--accumulate=2")))
    same(both, ins)


@pytest.mark.parametrize("instances", [1, 2])
def test_an_instruction_drawn_twice_is_read_once(step, runs, instances):
    """Five draws of three tasks: three distinct instructions; the gradient is that of five, but for L_ins over three tasks."""
    flags = ("--tasks=5", f"--instances={instances}", "--lambda-ins=0")
    options = student_options(*runs, *flags)
    tagi = make_tagi("v1.1", *runs)[0]
    get_batch, units = train_hyper.finetune_batches(options, tagi, 1, data.training_tasks(options))
    batch = get_batch(0, 0)
    K = len(batch["teacher"])
    assert K == len(batch["instruction"][0]) < 5 and len(batch["index"]) == 5 * instances == len(batch["labels"])
    index, rows = batch["index"], range(5 * instances)
    repeated = batch | {"instruction": [x[index] for x in batch["instruction"]], "teacher": batch["teacher"][index], "index": None}
    assert len({tuple(row) for row in repeated["instruction"][0].tolist()}) == K and len(rows) == len(repeated["teacher"])
    with mock.patch.object(train_hyper, "finetune_batches", lambda *args: (lambda step, micro: repeated, units)), \
            in_float64(), one_step() as expected:
        train(options)
    same(step(*flags), expected)


def test_the_teacher_runs_without_any_of_the_students_parts(runs, exact):
    """run_teacher reads the prompt with the frozen LLM, plain or with each instance's LoRA teacher, and resets it."""
    tagi, plain = (model.double() for model in make_tagi("v1.1", *runs))
    randomize(tagi)
    batch = train_hyper.finetune_batches(tagi.options, tagi, 1, data.training_tasks(tagi.options))[0](0, 0)
    ids, mask = batch["prompt"]
    with torch.no_grad():
        expected = plain(input_ids=ids, attention_mask=mask, labels=batch["labels"]).logits[batch["labels"] != data.IGNORE]

        def teacher_logits(teachers):
            options = argparse.Namespace(kl_teacher="meta" if teachers is None else "lora")
            states, head = train_hyper.run_teacher(tagi, None, teachers, options, batch)
            return head(states)

        close(teacher_logits(None), expected)
        teachers = lora.init_weights(tagi.llm, 2, 0, 3)
        close(teacher_logits(teachers), expected)                           # B = 0
        teachers = {s: (A, torch.randn_like(B)) for s, (A, B) in teachers.items()}
        assert not torch.allclose(teacher_logits(teachers), expected, atol=0.1)
        assert torch.equal(tagi(None, *batch["input"], batch["labels"]),
                           plain(input_ids=batch["input"][0], attention_mask=batch["input"][1], labels=batch["labels"]).logits)
