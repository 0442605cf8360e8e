"""TAGI: step 0, mixed batches, merging, padding, what is the student's own, learning, checkpoints."""
import copy
import json
import warnings
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
import yaml
from transformers.modeling_outputs import BaseModelOutput

import common
import config
import data
import lora
import t5
from bench import optim
from conftest import (ALL, INPUTS, INSTRUCTIONS, KINDS, OUTPUTS, close, lengthen, make_llm, make_random_tagi, make_tagi,
                      make_tokenizer, randomize, student_options, tokens)
from hypernet import TAGI
from test_lora import TARGETS

pytestmark = pytest.mark.numbers
GENERATORS = ["attention", "mean"]


def adapter_of(tagi, instructions=INSTRUCTIONS):
    """Adapters with gradient, and the ids and mask that they come from."""
    ids, mask = data.tokenize_instructed(tagi.tokenizer, [(i, []) for i in instructions], 64)
    return tagi.generate_adapter(*tagi.encode_instruction(ids, mask), mask), ids, mask


def ce(tagi, labels, logits):
    return F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=data.IGNORE)


# ----------------------------------------------------------------------------------------------------------- step 0

@pytest.mark.parametrize("generator", GENERATORS)
@pytest.mark.parametrize("kind", KINDS)
def test_step_0_is_exactly_the_frozen_llm(kind, generator):
    """LoRA on every projection, encoder cross-attention, gains and embeddings in place: the same logits, bit for bit."""
    tagi, plain = make_tagi(kind, *ALL, "--fusion=encoder", "--targets=" + ",".join(TARGETS[kind]), f"--generator={generator}")
    adapter = tagi.adapt(INSTRUCTIONS)
    assert len(adapter.fusion) == 2 and all(A.std() > 0 and not B.any() for A, B in adapter.weights.values())
    ids, mask, labels = tokens(tagi)
    with torch.no_grad():
        assert torch.equal(tagi(adapter, ids, mask, labels), plain(input_ids=ids, attention_mask=mask, labels=labels).logits)


@pytest.mark.parametrize("kind", KINDS)
def test_step_0_with_concatenation_is_t5_over_concatenated_states(kind, exact):
    """With the decoder's part of fusion on, step 0 is Transformers' T5 given (I_x ; F) and its mask: logits and answers."""
    tagi, plain = (model.double() for model in make_tagi(kind, *ALL))
    a, a_mask = data.tokenize(tagi.tokenizer, [data.instruction_text(i) for i in INSTRUCTIONS], 64)
    ids, mask, labels = tokens(tagi)
    with torch.no_grad():
        states = [plain.get_encoder()(input_ids=i, attention_mask=m)[0] for i, m in ((a, a_mask), (ids, mask))]
        both = {"encoder_outputs": BaseModelOutput(torch.cat(states, 1)), "attention_mask": torch.cat([a_mask, mask], 1)}
        expected = plain(**both, labels=labels).logits
        alone = plain(input_ids=ids, attention_mask=mask, labels=labels).logits
        answers = tagi.tokenizer.batch_decode(plain.generate(**both, max_new_tokens=8, do_sample=False), skip_special_tokens=True)
    adapter = tagi.adapt(INSTRUCTIONS)
    close(tagi(adapter, ids, mask, labels), expected)
    assert (alone - expected).abs().max() > 0.1
    assert tagi.generate(INPUTS, adapter, max_new_tokens=8) == answers


@pytest.mark.parametrize("kind", KINDS)
def test_fusion_starts_as_the_blocks_own_self_attention(kind, exact):
    """With the block's own output projection it computes what Transformers' layer does over the instruction's states,
    the bias of relative positions aside."""
    tagi = make_tagi(kind)[0].double()
    torch.manual_seed(0)
    states, x = (torch.randn(1, n, tagi.llm.config.d_model, dtype=torch.double) for n in (7, 5))
    for block, layer in zip(tagi.fusion, t5.self_attentions(tagi.llm), strict=True):
        own = layer.SelfAttention
        bias = torch.zeros(1, own.n_heads, 5, 7, dtype=torch.double)
        expected = own(layer.layer_norm(x), key_value_states=states, position_bias=bias)[0]
        with torch.no_grad():
            block.o.weight.copy_(own.o.weight)
        close(block(x, *block.keys_values(states), torch.ones(1, 7, dtype=torch.bool)) - x, expected,
              1e-5)                                                         # the query was scaled in float32
        assert expected.std() > 0.01


@pytest.mark.parametrize("generator", GENERATORS)
def test_from_step_0_every_part_is_reached_by_training(generator):
    """The zeros are no dead end: after two steps of the loss every trainable parameter has had a gradient."""
    tagi, _ = make_tagi("v1.1", *ALL, f"--generator={generator}")
    ids, mask, labels = tokens(tagi)
    reached = set()
    optimizer = torch.optim.SGD(tagi.trainable().values(), lr=0.1)
    for _ in range(2):
        adapter, *_ = adapter_of(tagi)
        ce(tagi, labels, tagi(adapter, ids, mask, labels)).backward()
        reached |= {name for name, p in tagi.trainable().items() if p.grad is not None and p.grad.any()}
        optimizer.step()
        optimizer.zero_grad()
    assert reached == set(tagi.trainable())


# ---------------------------------------------------------------------------------------------------- mixed batches

@pytest.mark.parametrize("kind", KINDS)
def test_mixed_batch_gives_the_logits_of_tasks_one_by_one(kind, exact):
    """Row n of a batch of four tasks and lengths equals the same instance run alone with its own adapter."""
    tagi = make_random_tagi(kind)
    ids, mask, labels = tokens(tagi)
    mixed = tagi(tagi.adapt(INSTRUCTIONS), ids, mask, labels)
    for n in range(4):
        one = tagi(tagi.adapt([INSTRUCTIONS[n]]), *tokens(tagi, [INPUTS[n]], [OUTPUTS[n]]))
        close(mixed[n, :one.shape[1]], one[0])
    other = tagi(tagi.adapt(INSTRUCTIONS).select([1, 2, 3, 0]), ids, mask, labels)
    assert ((mixed - other).abs().amax((1, 2)) > 0.1).all()


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_mixed_batch_gives_the_answers_of_tasks_one_by_one(kind, beams, exact):
    """Greedy and beam search; the same input gets other answers from other tasks; batches may be smaller than the tasks."""
    tagi = make_random_tagi(kind)
    adapters = tagi.adapt(INSTRUCTIONS)
    for inputs in (INPUTS, ["a red cat"] * 4):
        alone = [tagi.generate([x], tagi.adapt([i]), num_beams=beams, max_new_tokens=8)[0] for x, i in zip(inputs, INSTRUCTIONS)]
        assert len(set(alone)) >= 3, alone
        for batch_size in (4, 3):
            assert tagi.generate(inputs, adapters, batch_size, num_beams=beams, max_new_tokens=8) == alone
    rows = adapters.select(torch.tensor([2, 0, 2]))
    again = tagi.generate(["a red cat"] * 3, rows, num_beams=beams, max_new_tokens=8)
    assert again == [alone[2], alone[0], alone[2]]


def test_beam_search_with_rows_in_another_order_would_be_noticed(exact, monkeypatch):
    """The test above has power: where beams took their rows in turn instead of in blocks, answers would change."""
    tagi = make_random_tagi("v1.1")
    adapters = tagi.adapt(INSTRUCTIONS)
    right = tagi.generate(INPUTS, adapters, num_beams=3, max_new_tokens=8)
    set_weights = lora.set_weights

    def tiled(model, weights):
        set_weights(model, weights and {s: (A.repeat(3, 1, 1), B.repeat(3, 1, 1)) if s.startswith("decoder.") else (A, B)
                                        for s, (A, B) in weights.items()})

    monkeypatch.setattr(lora, "set_weights", tiled)
    assert tagi.generate(INPUTS, adapters, num_beams=3, max_new_tokens=8) != right


def test_several_answers_per_input_use_the_inputs_own_adapter(exact):
    """num_return_sequences with sampling and with beams: a mixed batch's answers are those of one by one."""
    tagi = make_random_tagi("v1.1")
    adapters = tagi.adapt(INSTRUCTIONS)
    greedy = tagi.generate(INPUTS, adapters, max_new_tokens=8)
    sampled = tagi.generate(INPUTS, adapters, max_new_tokens=8, do_sample=True, top_k=1, num_return_sequences=3)
    assert sampled == [answer for answer in greedy for _ in range(3)]
    beams = tagi.generate(INPUTS, adapters, max_new_tokens=8, num_beams=3, num_return_sequences=2)
    assert beams[::2] == tagi.generate(INPUTS, adapters, max_new_tokens=8, num_beams=3)
    torch.manual_seed(0)
    free = tagi.generate(INPUTS, adapters, max_new_tokens=8, do_sample=True, num_return_sequences=3, temperature=3.0, top_k=0)
    assert len(free) == 12 and len(set(free)) > 4


@pytest.mark.parametrize("kind", KINDS)
def test_one_adapter_for_all_equals_a_row_per_instance(kind, exact):
    """A single adapter row serves any number of instances."""
    tagi = make_random_tagi(kind)
    one = tagi.adapt(INSTRUCTIONS[:1])
    close(tagi(one, *tokens(tagi)), tagi(one.select([0] * 4), *tokens(tagi)))
    assert tagi.generate(INPUTS, one, max_new_tokens=6) == tagi.generate(INPUTS, one.select([0] * 4), max_new_tokens=6)


@pytest.mark.parametrize("kind", KINDS)
def test_a_row_for_a_block_of_instances_is_a_row_for_each_of_them(kind, exact):
    """Two instructions, four instances: the same logits, and the same gradients, as with a copy of its row per instance."""
    found = []
    for copies in (False, True):
        tagi = make_random_tagi(kind)
        adapter, *_ = adapter_of(tagi, INSTRUCTIONS[:2])
        logits = tagi(adapter.select([0, 0, 1, 1]) if copies else adapter, *tokens(tagi))
        logits.square().mean().backward()
        found.append((logits, *(p.grad for p in tagi.trainable().values())))
    for block, each in zip(*found, strict=True):
        close(block, each)


def test_wrong_number_of_adapters_and_empty_inputs_are_refused():
    """Neither is broadcast or answered silently."""
    tagi, _ = make_tagi()
    with pytest.raises(ValueError, match="4 inputs cannot be shared out among 3 adapters"):
        tagi(tagi.adapt(INSTRUCTIONS[:3]), *tokens(tagi))
    with pytest.raises(ValueError, match="2 adapters for 3 inputs"):
        tagi.generate(INPUTS[:3], tagi.adapt(INSTRUCTIONS[:2]))
    with pytest.raises(common.UserError, match="input 2 is empty"):
        tagi.generate(["a", " \n"], tagi.adapt(INSTRUCTIONS[:1]))


# ---------------------------------------------------------------------------------------------------------- merging

@pytest.mark.parametrize("kind", KINDS)
def test_merged_equals_unmerged_and_unmerge_restores_every_bit(kind, exact):
    """Logits in float64 and greedy and beam answers; afterwards the LLM's weights are the old ones, bit for bit."""
    tagi = make_random_tagi(kind)
    before = copy.deepcopy(tagi.llm.state_dict())
    adapter = tagi.adapt(INSTRUCTIONS[:1])

    def run():
        return tagi(adapter, *tokens(tagi)), [tagi.generate(INPUTS, adapter, num_beams=b, max_new_tokens=8) for b in (1, 3)]

    unmerged = run()
    tagi.merge(adapter)
    assert any(not torch.equal(before[k], v) for k, v in tagi.llm.state_dict().items())
    merged = run()
    close(merged[0], unmerged[0])
    assert merged[1] == unmerged[1]
    tagi.unmerge()
    assert all(torch.equal(before[k], v) for k, v in tagi.llm.state_dict().items())
    assert torch.equal(run()[0], unmerged[0])


@pytest.mark.parametrize("flags", [(), ("--generator=none",)])
def test_while_merged_nothing_else_can_run(flags):
    """Merging again, another adapter, the frozen LLM, or encoding another instruction raise until unmerge."""
    tagi, _ = make_tagi("v1.1", *flags)
    randomize(tagi)
    a, b = tagi.adapt(INSTRUCTIONS[:1]), tagi.adapt(INSTRUCTIONS[1:2])
    with pytest.raises(ValueError, match="only one task"):
        tagi.merge(tagi.adapt(INSTRUCTIONS[:2]))
    tagi.merge(a)
    for attempt in (lambda: tagi.generate(INPUTS, b), lambda: tagi.generate(INPUTS, None), lambda: tagi.adapt(INSTRUCTIONS),
                    lambda: tagi(b, *tokens(tagi)), lambda: tagi.merge(a), lambda: tagi.merge(b)):
        with pytest.raises(ValueError, match="merged"):
            attempt()
    tagi.generate(INPUTS, a, max_new_tokens=2)
    tagi.unmerge()
    tagi.generate(INPUTS, b, max_new_tokens=2)


# ---------------------------------------------------------------------------------------------------------- padding

@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("generator", GENERATORS)
@pytest.mark.parametrize("kind", KINDS)
def test_padding_changes_nothing(kind, generator, attention, exact):
    """Longer padding, with any token in it, of instruction, input and labels: the same weights, pooling, fusion, loss."""
    tagi = make_random_tagi(kind, *ALL, f"--generator={generator}", attention=attention)
    adapter, a, a_mask = adapter_of(tagi)
    long_a, long_mask = lengthen(a, 7), lengthen(a_mask, 0)
    first, last = tagi.encode_instruction(a, a_mask)
    long_first, long_last = tagi.encode_instruction(long_a, long_mask)
    long = tagi.generate_adapter(long_first, long_last, long_mask)

    close(long.weights, adapter.weights)
    close(tagi.generator.pool_instruction(long_first, long_last, long_mask.bool()),
          tagi.generator.pool_instruction(first, last, a_mask.bool()))
    close(long.states[:, :a.shape[1]], adapter.states)
    x = torch.randn(4, 5, last.shape[-1], dtype=torch.float64)
    for l, block in enumerate(tagi.fusion):
        close(block(x, *long.fusion[l], long.mask), block(x, *adapter.fusion[l], adapter.mask))
        assert (block(x, *adapter.fusion[l], adapter.mask) - x).abs().max() > 0.1

    ids, mask, labels = tokens(tagi)
    short_logits = tagi(adapter, ids, mask, labels)
    C = labels.shape[1]
    for new in (long, adapter):
        logits = tagi(new, lengthen(ids, 9), lengthen(mask, 0), lengthen(labels, data.IGNORE))
        keep = labels != data.IGNORE
        close(logits[:, :C][keep], short_logits[keep])
        close(ce(tagi, lengthen(labels, data.IGNORE), logits), ce(tagi, labels, short_logits))
    assert not torch.allclose(tagi(adapter, lengthen(ids, 9), lengthen(mask, 1), labels), short_logits, atol=1e-3)


@pytest.mark.parametrize("beams", [1, 3])
def test_padding_changes_no_answer(beams, exact):
    """A long instruction and a long input in the batch change nobody else's answer."""
    tagi = make_random_tagi("v1.0")
    more, longest = INSTRUCTIONS + ["repeat the first word " * 5], "a red dog " * 5
    short = tagi.generate(INPUTS, tagi.adapt(INSTRUCTIONS), num_beams=beams, max_new_tokens=6)
    assert tagi.generate(INPUTS + [longest], tagi.adapt(more), num_beams=beams, max_new_tokens=6)[:4] == short


# ------------------------------------------------------------------------------------------ what is the student's own

@pytest.mark.parametrize("kind", KINDS)
def test_the_frozen_llm_is_untouched_by_the_student(kind):
    """With every student part random, `adapted(None)` gives the frozen LLM's logits exactly, also after an error inside."""
    tagi, plain = make_tagi(kind, *ALL)
    randomize(tagi)
    ids, mask, labels = tokens(tagi)
    expected = plain(input_ids=ids, attention_mask=mask, labels=labels).logits
    adapter = tagi.adapt(INSTRUCTIONS)
    assert (tagi(adapter, ids, mask, labels) - expected).abs().max() > 0.1
    with pytest.raises(KeyError), tagi.adapted(adapter):
        raise KeyError
    assert torch.equal(tagi.llm(input_ids=ids, attention_mask=mask, labels=labels).logits, expected)
    assert torch.equal(tagi(None, ids, mask, labels), expected)


def test_the_instruction_is_read_by_the_frozen_encoder():
    """I_x depends on no trained parameter, and is the plain encoder's last hidden state."""
    tagi, plain = make_tagi("v1.0", *ALL)
    ids, mask = data.tokenize(tagi.tokenizer, [data.instruction_text(i) for i in INSTRUCTIONS], 64)
    randomize(tagi)
    first, last = tagi.encode_instruction(ids, mask)
    assert torch.equal(first, plain.shared(ids)) and torch.equal(last, plain.get_encoder()(input_ids=ids, attention_mask=mask)[0])


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_reach_all_that_is_trained_and_nothing_of_the_llm(kind):
    """The adapter is generated with gradient; after backward no LLM parameter has one."""
    tagi, _ = make_tagi(kind, *ALL)
    randomize(tagi)
    ids, mask, labels = tokens(tagi)
    adapter, *_ = adapter_of(tagi)
    assert all(w.requires_grad for pair in adapter.weights.values() for w in pair)
    ce(tagi, labels, tagi(adapter, ids, mask, labels)).backward()
    assert all(p.grad is None and not p.requires_grad for p in tagi.llm.parameters())
    assert all(p.grad is not None and p.grad.any() for p in tagi.trainable().values())
    assert not any(name.startswith("llm.") for name in tagi.trainable())


@pytest.mark.parametrize("kind", KINDS)
def test_gains_and_embedding_delta_are_a_t5_with_those_weights(kind, exact):
    """Equal to a plain T5 whose norm weights are multiplied and embeddings moved; a tied head moves along, an untied stays."""
    tagi, plain = make_tagi(kind, *ALL, "--fusion=encoder")
    tagi, plain = tagi.double(), plain.double()
    torch.manual_seed(0)
    with torch.no_grad():
        for name, gain in tagi.norm_gains.items():
            gain.normal_(1, 0.5)
            plain.get_submodule(name.replace("/", ".")).weight *= gain
        tagi.embedding_delta.normal_()
        assert (plain.lm_head.weight is plain.shared.weight) == (kind == "v1.0")
        plain.shared.weight += tagi.embedding_delta
    ids, mask, labels = tokens(tagi)
    student, frozen = tagi(tagi.adapt(INSTRUCTIONS), ids, mask, labels), tagi(None, ids, mask, labels)
    close(student, plain(input_ids=ids, attention_mask=mask, labels=labels).logits)
    assert (student - frozen).abs().max() > 0.1


@pytest.mark.parametrize("name", ["adamw", "adafactor", "muon"])
def test_weight_decay_leaves_the_students_norm_gains_alone(name):
    """A gain without gradient stays 1, where everything else that is not 0 shrinks."""
    tagi, _ = make_tagi("v1.1", *ALL, f"--optimizer={name}", "--weight-decay=0.5", "--lr=0.1")
    parameters = tagi.trainable()
    optimizer = optim.make_optimizer(parameters, tagi.options)
    before = {key: p.detach().clone() for key, p in parameters.items()}
    for p in parameters.values():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    for key, p in parameters.items():
        if key.startswith("norm_gains."):
            assert torch.equal(p, torch.ones_like(p))
        else:
            assert before[key].norm() == 0 or p.norm() < 0.99 * before[key].norm()


@pytest.mark.parametrize("name", ["adamw", "adafactor", "muon"])
def test_a_run_whose_optimizer_had_all_in_one_group_goes_on(name, tmp_path):
    """Its moments find their parameters: the next step is that of a run that was never cut off."""
    def trained(steps, optimizer, parameters):
        for step in steps:
            generator = torch.Generator().manual_seed(step)
            for p in parameters.values():
                p.grad = torch.randn(p.shape, generator=generator)
            optimizer.step()

    def start():
        tagi, _ = make_tagi("v1.1", *ALL, f"--optimizer={name}")
        return tagi.options, tagi.trainable()

    options, straight = start()
    optimizer = optim.make_optimizer(straight, options)
    trained(range(2), optimizer, straight)
    state = optimizer.state_dict()
    adamw = state["parts"][0]
    first, gains = adamw["param_groups"]
    adamw["param_groups"] = [{**first, "params": first["params"] + gains["params"]}]           # as it was saved then
    state = state if name == "muon" else adamw                          # and a single one as it is
    saved = mock.Mock(state_dict=lambda: state)
    common.save_checkpoint(str(tmp_path), vars(options), straight, saved, step=2)
    trained([2], optimizer, straight)
    options, resumed = start()
    optimizer = optim.make_optimizer(resumed, options)
    assert common.resume(str(tmp_path), resumed, optimizer) == 2
    trained([2], optimizer, resumed)
    assert all(torch.equal(straight[key], resumed[key]) for key in straight)


@pytest.mark.parametrize("kind", KINDS)
def test_embedding_delta_of_an_unread_token_moves_only_a_tied_heads_logit(kind):
    """A token that is in no text: its own logit changes where head and embedding are tied, and nothing where not."""
    tagi, _ = make_tagi(kind, *ALL)
    batch, adapter = tokens(tagi), tagi.adapt(INSTRUCTIONS)
    before = tagi(adapter, *batch)
    with torch.no_grad():
        tagi.embedding_delta[59] = 1
    changed = (tagi(adapter, *batch) != before).any(0).any(0)
    assert changed.nonzero().flatten().tolist() == ([59] if kind == "v1.0" else [])


def test_generation_is_a_pure_function_of_the_instruction():
    """The same instruction gives the same adapter, before and after others; another one gives another."""
    tagi = make_random_tagi("v1.1")
    one = tagi.adapt(INSTRUCTIONS[:1])
    other = tagi.adapt(INSTRUCTIONS[1:2])
    tagi.generate(INPUTS, other, max_new_tokens=2)
    again = tagi.adapt(INSTRUCTIONS[:1])
    for site in one.weights:
        for x, y, z in zip(one.weights[site], again.weights[site], other.weights[site]):
            assert torch.equal(x, y) and not torch.allclose(x, z, rtol=1e-2)


@pytest.mark.parametrize("generator", GENERATORS)
def test_generator_tells_layers_and_projections_apart(generator):
    """No two sites of a shape get the same weights, and every one of its MLPs serves its own layer."""
    tagi = make_random_tagi("v1.1", f"--generator={generator}", "--targets=q,k,v,o,wo")
    before = tagi.adapt(INSTRUCTIONS).weights
    first_rows = [A[0, 0, :3] for A, _ in before.values()]
    assert len({tuple(row.tolist()) for row in first_rows}) == len(before)
    group, names = next((i, g[2]) for i, g in enumerate(tagi.generator.groups))
    with torch.no_grad():
        tagi.generator.mlps[group]["b1"][1] += 1                        # the MLP of this group's second layer
    after = tagi.adapt(INSTRUCTIONS).weights
    assert {s for s in before if not torch.equal(before[s][0], after[s][0])} == set(names[1])


def test_an_empty_instruction_and_demonstrations_make_adapters():
    """"" is no instruction; demonstrations change the adapter; a long instruction is cut with a warning."""
    tagi = make_random_tagi("v1.1", "--max-instruction=40")
    none, plain, shown = tagi.adapt(["", "upper", "upper"], [[], [], [("a", "b")]]).states.unbind()
    assert not torch.allclose(none, plain) and not torch.allclose(plain[:4], shown[:4])
    data._warned.clear()
    with pytest.warns(UserWarning, match="cut to the limit of 40"):
        assert tagi.adapt(["the cat " * 40]).mask.shape == (1, 40)


def test_bf16_llm_trains_and_answers():
    """A frozen LLM in bf16 under autocast: finite gradients to float32 parameters, merged answers, bits restored."""
    llm = make_llm("v1.1").to(torch.bfloat16)
    tagi = randomize(TAGI(llm, make_tokenizer(), student_options(*ALL, "--precision=bf16")), scale=0.1)
    adapter, *_ = adapter_of(tagi)
    ids, mask, labels = tokens(tagi)
    ce(tagi, labels, tagi(adapter, ids, mask, labels).float()).backward()
    assert all(p.dtype == p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in tagi.trainable().values())
    before, one = copy.deepcopy(llm.state_dict()), tagi.adapt(INSTRUCTIONS[:1])
    tagi.merge(one)
    assert len(tagi.generate(INPUTS, one, num_beams=2, max_new_tokens=4)) == 4
    tagi.unmerge()
    assert all(torch.equal(before[k], v) for k, v in llm.state_dict().items())


# --------------------------------------------------------------------------------------------------------- learning

@pytest.mark.parametrize("flags", [(), ("--fusion=none",), ("--generator=none", "--train-norms"),
                                   ("--generator=mean", "--fusion=decoder")], ids=lambda f: " ".join(f) or "whole")
def test_two_examples_overfit(flags):
    """One input, two instructions, two answers: the loss falls below 0.01, so it is the instruction that is followed."""
    tagi, _ = make_tagi("v1.1", "--rank=4", "--alpha=4", "--targets=q,k,v,o", *flags)
    instructions, outputs = ["say the first word", "upper"], ["cat dog", "the e"]
    ids, mask, labels = tokens(tagi, ["a red cat"] * 2, outputs)
    optimizer = torch.optim.Adam(tagi.trainable().values(), lr=1e-2)
    for step in range(400):
        adapter, *_ = adapter_of(tagi, instructions)
        loss = ce(tagi, labels, tagi(adapter, ids, mask, labels))
        if loss < 0.005:
            break
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.01
    answers = tagi.generate(["a red cat"] * 2, tagi.adapt(instructions), max_new_tokens=6)
    assert answers == outputs


# ------------------------------------------------------------------------------------------------------ checkpoints

@pytest.fixture
def checkpoint(tmp_path):
    """(TAGI, its checkpoint folder, its LLM's folder)"""
    tagi, plain = make_tagi("v1.1", *ALL)
    randomize(tagi)
    options = tagi.options
    t5.save_llm(str(tmp_path / "llm"), vars(options), plain, tagi.tokenizer, finished=True)
    options.llm_path, options.llm_is_relative, options.llm_fingerprint = "../llm", True, t5.fingerprint(plain)
    common.save_checkpoint(str(tmp_path / "tagi"), vars(options), tagi.trainable(), step=3, finished=True)
    return tagi, tmp_path / "tagi", tmp_path / "llm"


def test_a_loaded_checkpoint_gives_the_same_answers(checkpoint):
    """Every trainable parameter comes back bit for bit, and so do logits and answers."""
    tagi, folder, _ = checkpoint
    loaded = TAGI.load(str(folder))
    assert loaded.trainable().keys() == tagi.trainable().keys()
    assert all(torch.equal(p, tagi.trainable()[name]) for name, p in loaded.trainable().items())
    a, b = (t(t.adapt(INSTRUCTIONS), *tokens(t)) for t in (tagi, loaded))
    assert torch.equal(a, b)
    assert loaded.generate(INPUTS, loaded.adapt(INSTRUCTIONS), max_new_tokens=8) == tagi.generate(
        INPUTS, tagi.adapt(INSTRUCTIONS), max_new_tokens=8)


@pytest.mark.parametrize("key, value", [("rank", 3), ("targets", "q,k,v"), ("generator", "mean"), ("width", 32),
                                        ("train_norms", False)])
def test_a_checkpoint_of_other_options_is_refused(checkpoint, key, value):
    """A rank, set of layers or generator that the weights are not of: one line that names the file."""
    _, folder, _ = checkpoint
    config = yaml.safe_load((folder / "config.yaml").read_text())
    (folder / "config.yaml").write_text(yaml.safe_dump(config | {key: value}))
    with pytest.raises(common.UserError, match="model.safetensors does not fit"):
        TAGI.load(str(folder))


@pytest.mark.parametrize("kind, seed", [("v1.1", 1), ("v1.0", 0)])
def test_a_checkpoint_of_another_llm_is_refused(checkpoint, kind, seed):
    """Also where all shapes are the same."""
    tagi, folder, llm_folder = checkpoint
    t5.save_llm(str(llm_folder), vars(tagi.options), make_llm(kind, seed), tagi.tokenizer, finished=True)
    with pytest.raises(common.UserError, match="another LLM"):
        TAGI.load(str(folder))


def test_a_checkpoint_whose_llm_has_another_tokenizer_is_refused(checkpoint):
    """As many tokens in another order fit every shape; a checkpoint of earlier code tells no tokenizer."""
    tagi, folder, llm_folder = checkpoint
    record = yaml.safe_load((folder / "config.yaml").read_text())
    record["tokenizer_digest"] = t5.tokenizer_digest(tagi.tokenizer)
    (folder / "config.yaml").write_text(yaml.safe_dump(record))
    TAGI.load(str(folder))
    path = llm_folder / "tokenizer.json"
    written = json.loads(path.read_text())
    pieces = written["model"]["vocab"]
    pieces[-1][0], pieces[-2][0] = pieces[-2][0], pieces[-1][0]
    path.write_text(json.dumps(written))
    with pytest.raises(common.UserError, match="another tokenizer"):
        TAGI.load(str(folder))


def test_a_missing_checkpoint_is_one_line(checkpoint, tmp_path):
    """A missing folder, weights file or LLM is a UserError that names it."""
    _, folder, llm_folder = checkpoint
    with pytest.raises(common.UserError, match="nowhere"):
        TAGI.load(str(tmp_path / "nowhere"))
    (folder / "model.safetensors").rename(tmp_path / "moved")
    with pytest.raises(common.UserError, match="model.safetensors cannot be read: no such file"):
        TAGI.load(str(folder))
    llm_folder.rename(tmp_path / "gone")
    with warnings.catch_warnings(), pytest.raises(common.UserError, match="llm"):
        TAGI.load(str(folder))


# ------------------------------------------------------------------------------------------- gradient checkpointing

@pytest.mark.parametrize("kind", KINDS)
def test_checkpointing_changes_no_gradient_and_keeps_less(kind, exact):
    """Per-example LoRA, both fusions, own norms and embeddings; the adapter is gone by the time of the backward pass."""
    gradients, kept = {}, {}
    for checkpointing in (False, True):
        tagi = make_random_tagi(kind)
        if checkpointing:
            t5.checkpoint_blocks(tagi.llm, tagi.repetition)
        parameters, size = tagi.trainable(), [0]

        def pack(x):
            size[0] += x.numel()
            return x

        ids, mask = data.tokenize_instructed(tagi.tokenizer, [(i, []) for i in INSTRUCTIONS], 64)
        first, last = tagi.encode_instruction(ids, mask)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            adapter = tagi.generate_adapter(first, last, mask)
            start = size[0]
            loss = tagi(adapter, *tokens(tagi)).square().mean()
        with tagi.adapted(None):                                        # another state, as the next teacher's pass leaves it
            loss.backward()
        assert tagi.active is None and lora.weights_of(tagi.llm) is None
        gradients[checkpointing] = {name: p.grad for name, p in parameters.items()}
        kept[checkpointing] = size[0] - start
    assert all(g is not None for g in gradients[False].values())
    close(gradients[True], gradients[False])
    assert kept[True] < kept[False] / 2
