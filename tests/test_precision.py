"""--precision bf16: losses, softmax, L_kl, alignment and norms stay in float32, and training follows float32's."""
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

pytest.register_assert_rewrite("stages")
pytest_plugins = ("stages",)
from conftest import apart, make_llm, make_tokenizer, randomize, student_options, tokens

import data
import lora
import train_hyper
from hypernet import TAGI

pytestmark = pytest.mark.numbers
STEPS = 20


class Types(TorchDispatchMode):
    """The types of what each operator reads, {its name: types of the floating-point tensors}."""

    def __init__(self):
        super().__init__()
        self.read = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        found = self.read.setdefault(func.overloadpacket.__name__, set())
        found |= {x.dtype for x in args if torch.is_tensor(x) and x.is_floating_point()}
        return func(*args, **kwargs or {})


@pytest.mark.parametrize("alignment", ["factors", "product"])
def test_losses_softmax_divergence_alignment_and_squares_of_norms_are_computed_in_float32(alignment):
    options = student_options("--precision=bf16", "--train-norms", "--train-embeddings", f"--alignment={alignment}")
    tagi = randomize(TAGI(make_llm("v1.1").bfloat16(), make_tokenizer(), options))
    ids, mask, labels = tokens(tagi)
    instructions = data.tokenize(tagi.tokenizer, ["say the word", "upper"], 20)
    teachers = lora.init_weights(tagi.llm, options.rank, 0, 2)
    batch = {"instruction": instructions, "input": (ids, mask), "prompt": (ids, mask), "index": None,
             **train_hyper.located(labels, "cpu"), "teacher": torch.tensor([0, 1])}
    with Types() as types:
        terms = train_hyper.losses(tagi, batch, teachers, None, options, len(batch["positions"]), 2)
        terms["loss"].backward()
    assert all(term.dtype == torch.float32 for term in terms.values())
    single = {torch.float32}
    for operator in ("_log_softmax", "nll_loss_forward", "_log_softmax_backward_data", "exp", "rsqrt", "sigmoid"):
        assert types.read.get(operator, single) == single, operator
    assert {"_log_softmax", "nll_loss_forward", "rsqrt"} <= types.read.keys()
    assert torch.bfloat16 in types.read["mm"]                   # while what is large is multiplied in bf16
    assert all(p.grad.dtype == torch.float32 for p in tagi.trainable().values() if p.grad is not None)


def test_the_gradient_of_a_norms_gain_is_summed_in_float32():
    tagi = TAGI(make_llm("v1.1").bfloat16(), make_tokenizer(), student_options("--precision=bf16", "--train-norms"))
    torch.manual_seed(0)
    output, weight = torch.randn(2, 400, 24).bfloat16()
    key = next(iter(tagi.norm_gains))
    tagi.active = object()
    changed = tagi._gain(key, output)
    assert changed.dtype == torch.bfloat16 and torch.equal(changed, output)          # a gain of 1
    (changed.double() * weight.double()).sum().backward()
    torch.testing.assert_close(tagi.norm_gains[key].grad.double(), (output.double() * weight.double()).sum(0), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("stage, flags", [("meta", ["--optimizer=adamw", "--lr=1e-3"]),
                                          ("finetune", ["--alignment=factors", "--train-norms", "--lr=1e-3"])])
def test_twenty_steps_in_bf16_follow_those_in_float32(project, tmp_path, stage, flags):
    logs, weights = {}, {}
    for precision in ("fp32", "bf16"):
        own = project.copy(tmp_path / precision, ("base", "meta", "lora", "pretrain")[:1 if stage == "meta" else 4])
        own.run(stage, f"--steps={STEPS}", f"--precision={precision}", *flags)
        logs[precision], weights[precision] = own.log(stage), own.weights(stage)
    terms = [name for name in ("loss", "ce", "kl", "ins") if name in logs["fp32"][0]]
    for single, half in zip(logs["fp32"], logs["bf16"], strict=True):
        for name in terms:
            assert half[name] == pytest.approx(single[name], rel=0.02, abs=0.02 * single["loss"]), (name, single, half)
    moved = abs(logs["fp32"][-1]["loss"] - logs["fp32"][0]["loss"])
    assert moved > 0.02 * logs["fp32"][0]["loss"], "nothing was learned, so nothing was compared"
    assert all(p.dtype == torch.float32 for p in weights["bf16"].values())
    assert apart(weights["bf16"], weights["fp32"], 1e-3) < 0.5 * STEPS
