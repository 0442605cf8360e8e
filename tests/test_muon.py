"""Muon: PyTorch's update without its rounding, matrices of one shape at once, attention's three matrices apart."""
import pytest
import torch
import torch.nn as nn

from bench import optim

pytestmark = pytest.mark.numbers
SHAPES = [(24, 24), (24, 40), (40, 24), (24, 24), (16, 48)]


def parameters(seed=0, dtype=torch.float32, shapes=SHAPES):
    generator = torch.Generator().manual_seed(seed)
    return {f"matrix{n}": nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for n, shape in enumerate(shapes)}


def set_gradients(parameters, seed):
    generator = torch.Generator().manual_seed(seed)
    for p in parameters.values():
        p.grad = torch.randn(p.shape, generator=generator).to(p.dtype)


def steps(optimizer, parameters, seeds):
    for seed in seeds:
        set_gradients(parameters, seed)
        optimizer.step()


def test_updates_equal_pytorchs_within_bf16s_rounding():
    ours, theirs = parameters(), parameters()
    optimizer = optim.Muon(ours, lr=0.01, weight_decay=0.1)
    reference = torch.optim.Muon(theirs.values(), lr=0.01, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    for seed in range(3):
        before = {name: p.detach().clone() for name, p in theirs.items()}
        with torch.no_grad():
            for name, p in ours.items():
                p.copy_(before[name])
        steps(optimizer, ours, [seed])
        steps(reference, theirs, [seed])
        for name in ours:
            step = (theirs[name] - before[name]).norm()
            assert (ours[name] - theirs[name]).norm() < 0.04 * step     # ten products in bf16, of 8 bits each


def test_in_float64_updates_equal_the_formula_of_one_matrix():
    ours = parameters(dtype=torch.float64)
    before = {name: p.detach().clone() for name, p in ours.items()}
    momentum = {name: torch.zeros_like(p) for name, p in ours.items()}
    optimizer = optim.Muon(ours, lr=0.02, weight_decay=0.3, momentum=0.9)
    for seed in range(3):
        set_gradients(ours, seed)
        for name, p in ours.items():
            momentum[name] = 0.9 * momentum[name] + 0.1 * p.grad
            x = 0.1 * p.grad + 0.9 * momentum[name]
            x = x / x.norm()
            for _ in range(5):
                a = x @ x.T
                x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
            before[name] = before[name] * (1 - 0.02 * 0.3) - 0.02 * 0.2 * max(p.shape) ** 0.5 * x
        optimizer.step()
    for name, p in ours.items():
        torch.testing.assert_close(p.detach(), before[name], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("shape", [(3, 32, 32), (2, 16, 64), (2, 64, 16), (1, 5, 3)])
def test_orthogonalized_matrices_have_singular_values_near_one(shape):
    stack = torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    U, S, Vh = torch.linalg.svd(stack, full_matrices=False)
    made = U @ torch.diag_embed(S.clamp(min=0.05 * S.max(-1, keepdim=True)[0])) @ Vh      # none too small to be lifted
    values = torch.linalg.svdvals(optim.orthogonalize(made))
    assert values.min() > 0.65 and values.max() < 1.25
    turned = U.mT @ optim.orthogonalize(made) @ Vh.mT                                      # the same singular vectors
    assert (turned - torch.diag_embed(turned.diagonal(dim1=-2, dim2=-1))).abs().max() < 1e-6


def test_an_attentions_in_proj_weight_is_three_matrices():
    whole = parameters(shapes=[(72, 24)])["matrix0"]
    parts = {f"part{n}": nn.Parameter(part.clone()) for n, part in enumerate(whole.detach().chunk(3))}
    optimizer, apart = optim.Muon({"attention.in_proj_weight": whole}, lr=0.1), optim.Muon(parts, lr=0.1)
    set_gradients({"whole": whole}, 5)
    for p, gradient in zip(parts.values(), whole.grad.chunk(3)):
        p.grad = gradient.clone()
    optimizer.step()
    apart.step()
    torch.testing.assert_close(whole.detach(), torch.cat([p.detach() for p in parts.values()]))


def test_saved_and_resumed_it_goes_on_as_if_it_had_not_stopped(tmp_path):
    straight, cut = parameters(), parameters()
    optimizer = optim.Muon(straight, lr=0.05)
    steps(optimizer, straight, range(4))
    first = optim.Muon(cut, lr=0.05)
    steps(first, cut, range(2))
    torch.save(first.state_dict(), tmp_path / "optimizer.pt")
    second = optim.Muon(cut, lr=0.9)                                       # the saved rate counts
    second.load_state_dict(torch.load(tmp_path / "optimizer.pt", weights_only=True))
    steps(second, cut, range(2, 4))
    assert all(torch.equal(cut[name], straight[name]) for name in cut)


def test_a_matrix_without_gradient_stays_as_it_is():
    made = parameters()
    before = {name: p.detach().clone() for name, p in made.items()}
    optimizer = optim.Muon(made, lr=0.1, weight_decay=0.5)
    set_gradients(made, 0)
    made["matrix1"].grad = None
    optimizer.step()
    assert [name for name in made if torch.equal(made[name], before[name])] == ["matrix1"]
