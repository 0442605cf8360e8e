"""Rank classification, as T0 evaluates: the likeliest of a row's answer choices is the answer."""
import pytest
import torch
from conftest import KINDS, close, make_random_tagi, make_tagi

import data
import t5

CHOICES = [["cat", "dog dog"], ["word", "red", "blue cat dog"], ["yes"], ["a", "b", "c", "d"]]
INPUTS = ["a red cat", "dog b c", "the word", "blue dog blue"]


def of_p3(tagi):
    """The same student for P3, whose texts are read as they stand."""
    tagi.verbatim = True
    return tagi


def by_the_loss(llm, tokenizer, ids, mask, choice):
    """Minus the summed loss of a plain T5, for one row and one choice."""
    labels = tokenizer(choice, return_tensors="pt")["input_ids"]
    return -llm(input_ids=ids, attention_mask=mask, labels=labels).loss.item() * labels.numel()


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.numbers
def test_choices_score_as_by_the_loss_of_a_plain_t5_called_choice_by_choice(kind, normalize, exact):
    tagi, llm = make_tagi(kind)
    tagi, llm, tokenizer = of_p3(tagi).double(), llm.double(), tagi.tokenizer
    ids, mask = data.tokenize(tokenizer, INPUTS, 64)
    labels = data.labels(tokenizer, [choice for row in CHOICES for choice in row], 64)
    owner = torch.tensor([n for n, row in enumerate(CHOICES) for _ in row])
    scores = tagi.score_choices(INPUTS, CHOICES, None, normalize=normalize)
    with torch.no_grad():
        encoded = llm.get_encoder()(input_ids=ids, attention_mask=mask)[0]
        sums = t5.score_choices(llm, encoded, mask, labels, owner)
        for n, row in enumerate(CHOICES):
            own, own_mask = data.tokenize(tokenizer, [INPUTS[n]], 64)
            expected = [by_the_loss(llm, tokenizer, own, own_mask, choice) for choice in row]
            assert sums[n] == pytest.approx(expected, abs=1e-9)
            if normalize:
                lengths = [len(tokenizer(choice)["input_ids"]) for choice in row]
                expected = [x / length for x, length in zip(expected, lengths)]
            assert scores[n] == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.numbers
def test_a_mixed_batch_ranks_as_the_tasks_one_by_one_and_as_the_students_logits_have_it(
        kind, exact):
    """Per-example LoRA, both fusions, own norms and embeddings; and one adapter for all."""
    tagi = of_p3(make_random_tagi(kind))
    adapters = tagi.adapt(["say the first word", "upper"])
    index = [0, 1, 1, 0]
    mixed = tagi.score_choices(INPUTS, CHOICES, adapters.select(index), batch_size=3)
    alone = [tagi.score_choices([x], [row], adapters.select([i]))[0]
             for x, row, i in zip(INPUTS, CHOICES, index)]
    close([torch.tensor(row) for row in mixed], [torch.tensor(row) for row in alone])
    for n, row in enumerate(CHOICES):
        for choice, score in zip(row, mixed[n]):
            ids, mask = data.tokenize(tagi.tokenizer, [INPUTS[n]], 64)
            labels = data.labels(tagi.tokenizer, [choice], 64)
            with torch.no_grad():
                logits = tagi(adapters.select([index[n]]), ids, mask, labels)
            chosen = logits.log_softmax(-1)[0].gather(1, labels.T)
            assert chosen.sum().item() == pytest.approx(score, abs=1e-9)
    one = tagi.score_choices(INPUTS, CHOICES, adapters.select([1]))
    tagi.merge(adapters.select([1]))
    merged = tagi.score_choices(INPUTS, CHOICES, tagi.merged)
    close([torch.tensor(row) for row in one], [torch.tensor(row) for row in merged])


def test_the_encoder_runs_once_a_row_however_many_choices_it_has():
    tagi = of_p3(make_random_tagi("v1.1")).float()
    adapters, seen = tagi.adapt(["upper"]), []
    hook = tagi.llm.get_encoder().register_forward_hook(
        lambda module, args, kwargs, out: seen.append(len(out[0])), with_kwargs=True)
    tagi.score_choices(INPUTS, CHOICES, adapters, batch_size=3)
    hook.remove()
    assert seen == [3, 1]                                   # rows, in two batches; ten choices


def test_a_student_of_p3_reads_texts_as_they_stand():
    read = {}
    for name in ("sni", "p3"):
        tagi = make_random_tagi("v1.1", f"--format={name}").float()
        ids = next(tagi._batches(["a red cat"], None, 1))[1].tolist()
        read[name] = [ids, tagi.adapt(["upper"]).mask.shape[1]]
    assert read["p3"][0] == tagi.tokenizer(["a red cat"])["input_ids"] != read["sni"][0]
    assert read["p3"][1] == len(tagi.tokenizer("upper")["input_ids"]) < read["sni"][1]
