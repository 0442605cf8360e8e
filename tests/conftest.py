"""Tiny random models, a tokenizer, tasks and options that the tests share. Nothing is downloaded."""
import contextlib
import copy
import os
import sys
from unittest import mock

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from transformers import AutoModelForSeq2SeqLM, MT5Config, T5Config, T5Tokenizer
from transformers.models.longt5.modeling_longt5 import LongT5LayerNorm
from transformers.models.mt5.modeling_mt5 import MT5LayerNorm
from transformers.models.t5.modeling_t5 import T5LayerNorm
from transformers.models.umt5.modeling_umt5 import UMT5LayerNorm

sys.path.insert(0, os.path.join(os.path.dirname(__file__), ".."))
import common
import data
import train_hyper
from hypernet import TAGI

THREADS = int(os.environ.get("TAGI_TEST_THREADS", 1))       # more than one add up in another order
torch.set_num_threads(THREADS)


def pytest_configure(config):
    config.addinivalue_line("markers", "numbers: compares numbers, so another CPU may differ")
    config.addinivalue_line("markers", "scripts: of gpu_checks.py, runs stages as their scripts do")


KINDS = ("v1.0", "v1.1", "mt5")
VOCAB = 60
ALL = ("--train-norms", "--train-embeddings")                       # everything that can be trained

INSTRUCTIONS = ["say the first word", "repeat the last letter of the input", "upper", "count the cats"]
INPUTS = ["a red cat", "dog b c", "the word", "blue dog blue"]
OUTPUTS = ["cat", "c d", "word word", "e"]


def make_tokenizer():
    """A Unigram T5 tokenizer of words and letters: pad 0, eos 1, unk 2."""
    words = ("Definition: Input: Output: Now complete the following example - Positive Example 1 2 say first word repeat last "
             "letter of input upper count cat dog red blue").split()
    pieces = ["<pad>", "</s>", "<unk>", "▁", *"abcdefghijklmnopqrstuvwxyz", ".", *("▁" + w for w in words)]
    tokenizer = T5Tokenizer(vocab=[(p, -float(not p[0] == "<") * (2 if len(p) > 1 else 5)) for p in pieces], extra_ids=0)
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id) == (0, 1, 2)
    return tokenizer


def make_llm(kind, seed=0, attention="sdpa"):
    """A two-layer T5 with random weights everywhere, the sizes of no two dimensions alike.

    v1.0: ReLU, tied head. v1.1: gated GELU, untied head. mt5: the same in its own classes, and as in mT5-small and
    T5-v1.1-small d_model is no multiple of the number of heads.
    """
    sizes = dict(vocab_size=VOCAB, num_layers=2, num_decoder_layers=2, d_ff=20, dropout_rate=0.0, decoder_start_token_id=0,
                 pad_token_id=0, eos_token_id=1, relative_attention_num_buckets=8, relative_attention_max_distance=16)
    config = {"v1.0": lambda: T5Config(**sizes, d_model=24, num_heads=4, d_kv=4, feed_forward_proj="relu"),
              "v1.1": lambda: T5Config(**sizes, d_model=24, num_heads=4, d_kv=8, feed_forward_proj="gated-gelu",
                                       tie_word_embeddings=False),
              "mt5": lambda: MT5Config(**sizes, d_model=16, num_heads=3, d_kv=4)}[kind]()
    torch.manual_seed(seed)
    llm = AutoModelForSeq2SeqLM.from_config(config, attn_implementation=attention).eval()
    with torch.no_grad():
        if kind != "v1.0":
            llm.lm_head.weight = nn.Parameter(torch.empty_like(llm.shared.weight))
        for p in llm.parameters():
            p.normal_(std=p.shape[1] ** -0.5 if p.dim() == 2 else 0.3).add_(0 if p.dim() == 2 else 1)
        llm.shared.weight *= 3
        if kind != "v1.0":
            llm.lm_head.weight *= 3                                  # logits wide enough to be sure of a token
    return llm


def student_options(*flags, stage="finetune"):
    """The options that train_hyper.py hands to its stage when called with these flags."""
    small = ["--rank=2", "--alpha=3", "--targets=q,v", "--width=16", "--bottleneck=6", "--max-output=8"]
    with mock.patch.object(common, "read_yaml", lambda *args: {}):
        return train_hyper.get_options([f"--stage={stage}", "--device=cpu", *small, *flags])


def make_tagi(kind="v1.1", *flags, seed=0, attention="sdpa"):
    """(TAGI as it starts, a copy of its LLM that nothing was ever injected into)."""
    llm = make_llm(kind, seed, attention)
    plain = copy.deepcopy(llm).requires_grad_(False)
    return TAGI(llm, make_tokenizer(), student_options(*flags)), plain


def randomize(tagi, seed=1, scale=0.4):
    """Move every trainable parameter off its start, where B, the fusion's o and embedding_delta are 0 and gains are 1."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in tagi.trainable().values():
            p += scale * torch.randn(p.shape, generator=generator)
    return tagi


def make_random_tagi(kind="v1.1", *flags, **kwargs):
    """A TAGI of which every trainable parameter is random, in float64."""
    return randomize(make_tagi(kind, *(flags or ALL), **kwargs)[0]).double()


def tokens(tagi, inputs=INPUTS, outputs=OUTPUTS):
    """(ids, mask, labels) of instances as the student reads them."""
    ids, mask = data.tokenize(tagi.tokenizer, [data.instance_text(x) for x in inputs], 64)
    return ids, mask, data.labels(tagi.tokenizer, outputs, 64)


def lengthen(x, value, n=3):
    """n more columns of padding."""
    return F.pad(x, (0, n), value=value)


def close(a, b, tolerance=1e-9):
    """Equal to rounding in float64; trees of tensors leaf by leaf."""
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def apart(a: dict, b: dict, lr: float) -> float:
    """How far apart two trainings are, in learning rates: the mean over the worst tensor.

    Adam-like optimizers move a weight by about lr a step whatever its gradient's size. Where
    rounding decides a gradient's sign, two orders of summing are up to 2·lr a step apart: at few
    weights, so the mean stays small.
    """
    assert a.keys() == b.keys()
    return max(((a[name] - b[name]).abs().mean().item() for name in a), default=0) / lr


def _double_norm(self, x):
    return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon))


@contextlib.contextmanager
def exactly():
    """float64 through and through: T5's layer norm and attention, and the losses, otherwise round to float32 inside."""
    with contextlib.ExitStack() as stack:
        for norm in (T5LayerNorm, MT5LayerNorm, UMT5LayerNorm, LongT5LayerNorm):
            stack.enter_context(mock.patch.object(norm, "forward", _double_norm))
        stack.enter_context(mock.patch.object(torch.Tensor, "float", torch.Tensor.double))
        yield


@pytest.fixture
def tmp_path(tmp_path_factory):
    """A folder with a short name: an error line that names three paths in it stays below 300 characters."""
    return tmp_path_factory.mktemp("t")


@pytest.fixture
def exact():
    with exactly():
        yield


@pytest.fixture(scope="session")
def tasks():
    """Three small tasks of two categories."""
    def task(n, category):
        pairs = [(INPUTS[(i + n) % 4], OUTPUTS[(i * n + n) % 4]) for i in range(6)]
        return data.Task(f"task{n}", category, [INSTRUCTIONS[n], "Please " + INSTRUCTIONS[n]], pairs[:2],
                         [data.Instance(f"task{n}-{i}", x, [y]) for i, (x, y) in enumerate(pairs[2:])])
    return [task(0, "one"), task(1, "two"), task(2, "one")]
