"""LoRA: injection by walking modules, one expression for shared and per-example weights, merging, alignment."""
import copy

import pytest
import torch
import torch.nn as nn

import lora
from bench.teachers import svd_factors
import train_hyper
from conftest import KINDS, close, make_llm

pytestmark = pytest.mark.numbers
TARGETS = {"v1.0": ["q", "k", "v", "o", "wi", "wo"], "v1.1": ["q", "k", "v", "o", "wi_0", "wi_1", "wo"],
           "mt5": ["q", "k", "v", "o", "wi_0", "wi_1", "wo"]}


def random_weights(llm, r, n=None, seed=0):
    """LoRA weights of which B is not zero, n of them or one."""
    torch.manual_seed(seed)
    return {site: tuple(torch.randn_like(w) for w in pair) for site, pair in lora.init_weights(llm, r, 0, n).items()}


def logits(llm):
    torch.manual_seed(0)
    ids = torch.randint(3, 60, (3, 7))
    return llm(input_ids=ids, labels=ids[:, :4].contiguous()).logits


@pytest.fixture
def layer():
    torch.manual_seed(0)
    return lora.LoRALinear(nn.Linear(5, 7, dtype=torch.float64), scaling=1.5)


# -------------------------------------------------------------------------------------------------------- injection

@pytest.mark.parametrize("kind", KINDS)
def test_injection_wraps_every_target_of_every_model_and_nothing_else(kind):
    """All attention and feed-forward projections are found: 2 blocks, 3 attentions, 2 feed-forwards; the head is not."""
    llm = make_llm(kind)
    n_ff = len(TARGETS[kind]) - 4
    for targets, count in ((TARGETS[kind], 2 * (3 * 4 + 2 * n_ff)), (["q", "v"], 2 * 3 * 2), (["wo"], 2 * 2)):
        sites = lora.inject_lora(llm, targets, r=2, alpha=4)
        assert len(sites) == count and sites == lora.sites(llm)
        assert {name.rpartition(".")[2] for name in sites} == set(targets)
        assert all(isinstance(w.linear, nn.Linear) and w.scaling == 2 for w in sites.values())


def test_injecting_again_replaces_the_wrappers_and_removing_leaves_the_model_as_it_was():
    """A second injection does not wrap the wrappers, undoes a merge, and remove_lora gives back the same state_dict."""
    llm = make_llm("v1.1")
    before = copy.deepcopy(llm.state_dict())
    lora.inject_lora(llm, ["q", "v"], 2, 2)
    lora.merge(llm, random_weights(llm, 2))
    lora.inject_lora(llm, ["wo"], 2, 2)
    assert {name.rpartition(".")[2] for name in lora.sites(llm)} == {"wo"}
    lora.remove_lora(llm)
    after = llm.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[k], after[k]) for k in before)


@pytest.mark.parametrize("targets, r, message", [(["query"], 2, "query"), (["q", "wi_2"], 2, "wi_2"), (["q"], 0, "at least 1"),
                                                 (["q"], -1, "at least 1")])
def test_injection_that_finds_nothing_or_has_no_rank_is_refused(targets, r, message):
    """Each target must match a layer, and the rank must be positive."""
    with pytest.raises(ValueError, match=message):
        lora.inject_lora(make_llm("v1.1"), targets, r, 1)


def test_fresh_weights_share_a_across_teachers_and_depend_on_the_seed_alone():
    """B is zero; A is one draw from the seed for all teachers, whatever the global generator's state."""
    llm = make_llm("v1.1")
    lora.inject_lora(llm, ["q", "v"], 3, 3)
    one, many = lora.init_weights(llm, 3, seed=5), lora.init_weights(llm, 3, seed=5, n=4)
    for site, (A, B) in many.items():
        D_out, D_in = lora.sites(llm)[site].weight.shape
        assert A.shape == (4, 3, D_in) and B.shape == (4, D_out, 3) and not B.any()
        assert all(torch.equal(a, one[site][0]) for a in A)
        A[0] += 1                                                       # rows are copies, not views of one
        assert not torch.equal(A[0], A[1])
        assert 0.2 < one[site][0].abs().max() * D_in ** 0.5 <= 1         # Kaiming-uniform, a = sqrt(5)
    other = lora.init_weights(llm, 3, seed=6)
    assert all(not torch.equal(one[site][0], other[site][0]) for site in one)
    assert len({A.flatten()[0].item() for A, _ in one.values()}) == len(one)          # sites differ from each other


def test_weights_of_other_sites_or_shapes_are_refused():
    """set_weights checks names and widths before a forward pass can broadcast them silently."""
    llm = make_llm("v1.1")
    lora.inject_lora(llm, ["q"], 2, 2)
    weights = random_weights(llm, 2)
    with pytest.raises(ValueError, match="other layers"):
        lora.set_weights(llm, dict(list(weights.items())[1:]))
    site = next(iter(weights))
    with pytest.raises(ValueError, match="do not fit"):
        lora.set_weights(llm, weights | {site: (weights[site][0][:, 1:], weights[site][1])})


# ------------------------------------------------------------------------------------------------------- expression

def test_update_is_scaled_b_a_x(layer):
    """The layer computes W x + b + scaling · B A x."""
    x, A, B = (torch.randn(*s, dtype=torch.float64) for s in ((4, 3, 5), (2, 5), (7, 2)))
    layer.lora_A, layer.lora_B = A, B
    close(layer(x), x @ (layer.weight + 1.5 * B @ A).T + layer.bias)


def test_per_example_weights_equal_shared_ones_row_by_row(layer):
    """Row n of the batch runs with row n of the weights and no other."""
    x, A, B = (torch.randn(*s, dtype=torch.float64) for s in ((4, 3, 5), (4, 2, 5), (4, 7, 2)))
    layer.lora_A, layer.lora_B = A, B
    mixed = layer(x)
    for n in range(4):
        layer.lora_A, layer.lora_B = A[n], B[n]
        close(mixed[n:n + 1], layer(x[n:n + 1]))


@pytest.mark.parametrize("batch", [(), (4,)], ids=["shared", "per example"])
def test_gradcheck_of_the_lora_expression(layer, batch):
    """Gradients to x, A and B agree with finite differences in float64."""
    def run(x, A, B):
        layer.lora_A, layer.lora_B = A, B
        return layer(x)
    inputs = [torch.randn(*s, dtype=torch.float64, requires_grad=True) for s in ((4, 3, 5), (*batch, 2, 5), (*batch, 7, 2))]
    assert torch.autograd.gradcheck(run, inputs)


def test_zero_b_is_exactly_the_plain_model():
    """A fresh adapter changes not one bit."""
    llm = make_llm("v1.1")
    plain = logits(llm)
    lora.inject_lora(llm, ["q", "k", "v", "o", "wo"], 2, 2)
    lora.set_weights(llm, lora.init_weights(llm, 2, 0))
    assert torch.equal(logits(llm), plain)


def test_a_row_of_weights_serves_a_block_of_examples(layer):
    """As many beams or instances of one task as there are examples for a row; a number that does not divide is refused."""
    x, A, B = (torch.randn(*s, dtype=torch.float64) for s in ((6, 3, 5), (2, 2, 5), (2, 7, 2)))
    layer.lora_A, layer.lora_B = A.repeat_interleave(3, 0), B.repeat_interleave(3, 0)
    each = layer(x)
    layer.lora_A, layer.lora_B = A, B
    close(layer(x), each)
    layer.lora_A, layer.lora_B = A.flip(0), B.flip(0)
    assert (layer(x) - each).abs().max() > 0.1
    layer.lora_A, layer.lora_B = torch.cat([A, A]), torch.cat([B, B])
    for tokens in (1, 4):                                               # 6 x 4 tokens could be cut into 4 parts
        with pytest.raises(ValueError, match="6 examples are no multiple of 4 adapters"):
            layer(torch.randn(6, tokens, 5, dtype=torch.float64))


# ---------------------------------------------------------------------------------------------------------- merging

@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_merge_equals_unmerged_and_unmerge_restores_every_bit(dtype, exact):
    """Also in bf16, where adding and subtracting the update again would not give the weights back."""
    llm = make_llm("v1.1").to(dtype)
    lora.inject_lora(llm, ["q", "v", "wo"], 2, 2)
    before = copy.deepcopy(llm.state_dict())
    weights = {site: (A / 8, B / 8) for site, (A, B) in random_weights(llm, 2).items()}
    plain = logits(llm)
    lora.set_weights(llm, weights)
    unmerged = logits(llm)
    lora.merge(llm, weights)
    merged = logits(llm)
    rounding, update = ((merged - x).abs().double().mean() for x in (unmerged, plain))
    assert rounding < update * {torch.float64: 1e-9, torch.bfloat16: 0.2}[dtype]
    assert all(not torch.equal(w.weight, before[f"{site}.linear.weight"]) for site, w in lora.sites(llm).items())
    lora.unmerge(llm)
    after = llm.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[k], after[k]) for k in before)
    assert torch.equal(logits(llm), plain)


def test_merging_in_bf16_rounds_the_float32_sum_once():
    """Every merged weight is the bf16 number nearest to W + scaling · B A; rounding the update first is not."""
    llm = make_llm("v1.1").to(torch.bfloat16)
    lora.inject_lora(llm, ["q", "v", "wo"], 2, 2)
    weights = {site: (A / 8, B / 8) for site, (A, B) in random_weights(llm, 2).items()}
    expected = {site: (w.weight.float() + w.scaling * (weights[site][1].float() @ weights[site][0].float())).bfloat16()
                for site, w in lora.sites(llm).items()}
    lora.merge(llm, weights)
    assert all(torch.equal(w.weight, expected[site]) for site, w in lora.sites(llm).items())


def test_merging_twice_mixing_merged_with_other_weights_and_merging_a_batch_are_refused():
    """Each would silently compute something else."""
    llm = make_llm("v1.1")
    lora.inject_lora(llm, ["q"], 2, 2)
    weights = random_weights(llm, 2)
    with pytest.raises(ValueError, match="one task"):
        lora.merge(llm, random_weights(llm, 2, n=3))
    lora.merge(llm, weights)
    with pytest.raises(ValueError, match="already merged"):
        lora.merge(llm, weights)
    with pytest.raises(ValueError, match="merged"):
        lora.set_weights(llm, weights)
    lora.unmerge(llm)
    lora.set_weights(llm, weights)


def test_train_and_eval_never_merge():
    """Unlike loralib, switching modes leaves the weights alone."""
    llm = make_llm("v1.1")
    lora.inject_lora(llm, ["q"], 2, 2)
    lora.set_weights(llm, random_weights(llm, 2))
    before, expected = copy.deepcopy(llm.state_dict()), logits(llm)
    llm.train(), llm.eval(), llm.eval(), llm.train()
    assert all(torch.equal(before[k], v) for k, v in llm.state_dict().items()) and torch.equal(logits(llm), expected)


# -------------------------------------------------------------------------------------------------- alignment, Eq. 6

def sets(K=3, r=2, seed=0):
    """Two sets of weights of K tasks: q and v of two layers look alike, wo does not."""
    torch.manual_seed(seed)
    shapes = {"0.q": (5, 7), "0.v": (5, 7), "1.q": (5, 7), "1.v": (5, 7), "1.wo": (4, 6)}
    return [{site: (torch.randn(K, r, i, dtype=torch.float64), torch.randn(K, o, r, dtype=torch.float64))
             for site, (i, o) in shapes.items()} for _ in range(2)]


def test_product_is_the_explicit_mean_squared_error_of_b_a():
    """The r × r form equals the mean over all entries, and over nothing else, of (B A − B' A')², task by task."""
    a, b = sets()
    explicit = torch.stack([torch.cat([(a[s][1][k] @ a[s][0][k] - b[s][1][k] @ b[s][0][k]).flatten() for s in a]).square().mean()
                            for k in range(3)])
    loss = train_hyper.alignment_loss(a, b, "product")
    assert loss.shape == (3,)
    close(loss, explicit)


def test_factors_pair_a_with_a_and_b_with_b():
    """The mean over all entries of A and B of (A − A')² and (B − B')², task by task."""
    a, b = sets()
    explicit = torch.stack([torch.cat([(x[k] - y[k]).flatten() for s in a for x, y in zip(a[s], b[s])]).square().mean()
                            for k in range(3)])
    close(train_hyper.alignment_loss(a, b, "factors"), explicit)


@pytest.mark.parametrize("kind", ["factors", "product"])
def test_alignment_of_a_set_with_itself_is_zero_and_of_different_ones_positive(kind):
    """Zero to rounding, task by task: only the task that differs has a loss."""
    a, b = sets()
    close(train_hyper.alignment_loss(a, a, kind), torch.zeros(3, dtype=torch.float64))
    one = {s: (torch.stack([A[0], b[s][0][1], A[2]]), B) for s, (A, B) in a.items()}
    assert ((train_hyper.alignment_loss(a, one, kind) > 1e-3) == torch.tensor([False, True, False])).all()


def test_product_ignores_the_freedom_of_the_factors_and_factors_do_not():
    """M·A with B·M⁻¹ is the same update: no change in product, for either side; a change in factors."""
    a, b = sets()
    M = torch.randn(3, 2, 2, dtype=torch.float64)
    moved = {s: (M @ A, B @ torch.linalg.inv(M)) for s, (A, B) in a.items()}
    for x, y in ((moved, b), (b, moved)):
        close(train_hyper.alignment_loss(x, y, "product"), train_hyper.alignment_loss(a, b, "product"))
    assert not torch.allclose(train_hyper.alignment_loss(moved, b, "factors"), train_hyper.alignment_loss(a, b, "factors"), rtol=0.01)


@pytest.mark.parametrize("kind", ["factors", "product"])
@pytest.mark.parametrize("x, y", [("0.q", "0.v"), ("0.q", "1.q"), ("1.v", "0.v")])
def test_weights_of_another_layer_or_projection_give_another_loss(kind, x, y):
    """A teacher whose sites of one shape are permuted is another teacher."""
    a, b = sets()
    permuted = b | {x: b[y], y: b[x]}
    assert not torch.isclose(train_hyper.alignment_loss(a, permuted, kind), train_hyper.alignment_loss(a, b, kind), rtol=1e-3).any()


@pytest.mark.parametrize("kind", ["factors", "product"])
def test_gradcheck_of_alignment(kind):
    """Gradients to the generated A and B agree with finite differences in float64."""
    a, b = sets()
    flat = [w.requires_grad_() for pair in a.values() for w in pair]
    assert torch.autograd.gradcheck(lambda *w: train_hyper.alignment_loss(dict(zip(a, zip(w[::2], w[1::2]))), b, kind), flat)


# ------------------------------------------------------------------------------ factors by SVD

def products(weights):
    return torch.cat([(B @ A).flatten(1) for A, B in weights.values()], 1)


def singular_values(product, r):
    return torch.linalg.svd(product)[1][..., :r]


def test_svd_factors_keep_the_products_and_split_singular_values_evenly():
    """Rows of A and columns of B are orthogonal, each of length √s, the largest first; one task alone gives the same."""
    a, _ = sets()
    factors = svd_factors(a)
    close(products(factors), products(a))
    for site, (A, B) in factors.items():
        assert (A.shape, B.shape) == (a[site][0].shape, a[site][1].shape)
        S = torch.diag_embed(singular_values(a[site][1] @ a[site][0], 2))
        close(A @ A.mT, S), close(B.mT @ B, S)
    alone = svd_factors(lora.select(a, 1))
    for site, pair in lora.select(factors, 1).items():
        close(pair[0], alone[site][0]), close(pair[1], alone[site][1])


def test_svd_factors_are_the_same_however_the_product_was_factored():
    """A → M·A with B → B·M⁻¹, and any flip of signs, give the same factors."""
    a, _ = sets()
    M = torch.randn(3, 2, 2, dtype=torch.float64)
    flips = torch.tensor([-1.0, 1.0], dtype=torch.float64)
    expected = svd_factors(a)
    for moved in ({s: (M @ A, B @ torch.linalg.inv(M)) for s, (A, B) in a.items()},
                  {s: (flips[:, None] * A, B * flips) for s, (A, B) in a.items()}):
        for site, pair in svd_factors(moved).items():
            close(pair[0], expected[site][0]), close(pair[1], expected[site][1])


def test_the_largest_entry_of_each_row_of_a_is_positive():
    for A, _ in svd_factors(sets()[0]).values():
        assert (A.gather(-1, A.abs().argmax(-1, keepdim=True)) > 0).all()


def test_svd_factors_of_teachers_of_lower_rank_are_finite_and_zero_beyond_it():
    """B = 0, an A with two rows alike, and a rank larger than the layer's own sizes."""
    zero = {"q": (torch.randn(2, 3, 5), torch.zeros(2, 7, 3))}
    A, B = svd_factors(zero)["q"]
    assert not A.any() and not B.any() and A.dtype == B.dtype == torch.float32
    A, B = torch.randn(3, 5, dtype=torch.float64), torch.randn(7, 3, dtype=torch.float64)
    A[2] = A[1]
    new_A, new_B = svd_factors({"q": (A, B)})["q"]
    close(new_B @ new_A, B @ A)
    assert new_A[2].norm() < 1e-6 and new_B[:, 2].norm() < 1e-6
    wide = {"q": (torch.randn(2, 6, 5, dtype=torch.float64), torch.randn(2, 4, 6, dtype=torch.float64))}
    new_A, new_B = svd_factors(wide)["q"]
    assert new_A.shape == (2, 6, 5) and new_B.shape == (2, 4, 6)
    assert not new_A[:, 4:].any() and not new_B[..., 4:].any()
    close(products({"q": (new_A, new_B)}), products(wide))


def test_svd_alignment_is_that_of_factors_against_the_new_factors():
    """It does not depend on how a teacher's product was factored, as the plain kind does."""
    a, b = sets()
    M = torch.randn(3, 2, 2, dtype=torch.float64)
    moved = {s: (M @ A, B @ torch.linalg.inv(M)) for s, (A, B) in b.items()}
    losses = [train_hyper.alignment_loss(a, svd_factors(x), "svd") for x in (b, moved)]
    close(losses[0], losses[1])
    close(losses[0], train_hyper.alignment_loss(a, svd_factors(b), "factors"))
