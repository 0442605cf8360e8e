"""Damaged files of models and wrong options, each made from a valid one by a seeded random change.

KINDS: name -> function(rng) that changes one file, reads it as the program does, and uses what came of it. It returns where
that works and raises UserError where the program would end in one line; whatever else it raises is a fault of the program.
NonFinite: it worked, with numbers that are none.
"""
import contextlib
import copy
import functools
import io
import json
import os
import shutil
import sys
import tempfile
import warnings
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")            # a wrong path must not become a search of the hub
ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import sentencepiece
import torch
import yaml
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import adapt
import common
import config
import data
import evaluate
import t5
import train_hyper
import train_teacher
from bench import optim
from bench.runs import Run
from conftest import INPUTS, INSTRUCTIONS, OUTPUTS, make_llm, make_tagi, make_tokenizer
from hypernet import TAGI
from lora import Adapter

warnings.filterwarnings("ignore")


class NonFinite(ArithmeticError):
    """A damaged file was taken, and numbers came of it that are none."""


# ---------------------------------------------------------------------------------------------- what is changed

def nested(depth: int):
    value = []
    for _ in range(depth):
        value = [value]
    return value


VALUES = [None, True, False, 0, 1, -1, 3, 5, 17, 0.5, -0.5, 10 ** 6, 10 ** 9, 10 ** 30, -10 ** 30, 1e-300, 1e300, float("nan"),
          float("inf"), -float("inf"), "", " ", "abc", "1", "nan", "../..", "q,v", "cpu", "true", "a\nb", "\0", "\ud83d", "½", "x" * 5000,
          [], [1], ["a"], [[]], {}, {"a": 1}, {"a": {"b": []}}, nested(30), nested(400), b"bytes"]


def places(value, path=()):
    """The paths of all values within: of keys and numbers of elements."""
    found = [path]
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, part in items:
        found += places(part, (*path, key))
    return found


def change_value(rng, value, values=VALUES):
    """A copy with one thing within deleted, replaced by a value of any type, renamed or doubled."""
    value = copy.deepcopy(value)
    path = rng.choice(places(value)[1:] or [()])
    if not path:
        return rng.choice(values)
    parent = at(value, path[:-1])
    key, way = path[-1], rng.choice(["delete", "replace", "replace", "replace", "rename", "near"])
    old = parent[key]
    if way == "delete":
        del parent[key]
    elif way == "rename" and isinstance(parent, dict):
        parent[rng.choice(["module." + str(key), str(key).upper(), 1, "", str(key) + "s"])] = parent.pop(key)
    elif way == "near" and isinstance(old, (int, float)):
        parent[key] = rng.choice([old + 1, old - 1, old * 2, -old, float(old), str(old), [old], bool(old)])
    elif way == "near" and isinstance(old, str):
        parent[key] = rng.choice([old + "x", old[:-1], old.upper(), old * 2, [old], " " + old])
    else:
        parent[key] = copy.deepcopy(rng.choice(values))
    return value


def change_bytes(rng, content: bytes) -> bytes:
    """Cut, flipped, doubled, filled with NULs, in another encoding, or something else altogether."""
    a, b = sorted(rng.randrange(len(content) + 1) for _ in range(2))
    way = rng.randrange(11)
    if way == 0:
        return content[:a]
    if way == 1:
        return content[:a] + content[b:]
    if way == 2:
        flipped = bytearray(content)
        for _ in range(rng.choice([1, 1, 3, 30])):
            flipped[rng.randrange(len(flipped))] ^= 1 << rng.randrange(8)
        return bytes(flipped)
    if way == 3:
        return content[:a] + b"\0" * rng.choice([1, 100]) + content[a:]
    if way == 4:
        return b"\xef\xbb\xbf" + content
    if way == 5:
        return content.decode("latin-1").encode(rng.choice(["utf-16", "utf-32", "utf-8"]))
    if way == 6:
        return content[:b] + content[a:b] + content[b:]
    if way == 7:
        return rng.choice([b"", b"\n", b"{}", b"[]", b"null", b"\xff\xfe", b"PK\x03\x04", b"[" * 100_000, b'{"a":' * 100_000, b"- " * 9999])
    if way == 8:
        return content.replace(b"\n", b"\r\n")
    if way == 9:
        return bytes(rng.randrange(256) for _ in range(rng.choice([1, 10, 1000])))
    digits = rng.choice([b"9" * 30, b"9" * 5000, b"-1", b"1e999", b"0"])
    places = [n for n, c in enumerate(content) if 48 <= c < 58] or [0]
    n = rng.choice(places)
    return content[:n] + digits + content[n + 1:]


def change_text_file(rng, path: Path, read, write) -> None:
    """Change a JSON or YAML file: a value of it, a line that is there twice, or bytes."""
    way = rng.random()
    if way < 0.7:
        text = write(change_value(rng, read(path.read_text(encoding="utf-8"))))
        path.write_bytes(text.encode("utf-8", "surrogatepass"))
    elif way < 0.8:
        lines = path.read_bytes().split(b"\n")
        lines.insert(rng.randrange(len(lines) + 1), rng.choice(lines))
        path.write_bytes(b"\n".join(lines))
    else:
        path.write_bytes(change_bytes(rng, path.read_bytes()))


def change_json(rng, path: Path) -> None:
    change_text_file(rng, path, json.loads, lambda value: json.dumps(value, default=str))


def change_yaml(rng, path: Path) -> None:
    def write(value):
        try:
            return yaml.safe_dump(value, sort_keys=False)
        except RecursionError:                      # nested too deep for that; JSON is YAML too
            return json.dumps(value, default=str)
    change_text_file(rng, path, yaml.safe_load, write)


def change_tensor(rng, x: torch.Tensor) -> torch.Tensor:
    way, x = rng.randrange(8), x.clone()
    if way == 0:
        return x.to(rng.choice([torch.int8, torch.int64, torch.bool, torch.float16, torch.float64, torch.bfloat16, torch.complex64]))
    if way == 1:
        return x.flatten()
    if way == 2:
        return x[..., :-1].clone() if x.dim() else x[None]
    if way == 3:
        return x.new_zeros(rng.choice([(0,), (1,), (2, 3, 4), (*x.shape, 2)]))
    if way == 4:
        return ~x if x.dtype == torch.bool else -x
    if x.numel() and x.is_floating_point():
        x.view(-1)[rng.randrange(x.numel())] = rng.choice([float("nan"), float("inf"), -float("inf"), 1e38, -1e38, 1e5])
    return x


def change_tensors(rng, path: Path) -> None:
    """Change a safetensors file: a tensor, a name, the metadata, or bytes of its head or body."""
    if rng.random() < 0.35:
        content = path.read_bytes()
        head = 8 + int.from_bytes(content[:8], "little")
        if rng.random() < 0.5:
            path.write_bytes(change_bytes(rng, content[:head]) + content[head:])
        else:
            path.write_bytes(change_bytes(rng, content))
        return
    tensors = load_file(path)
    with safe_open(path, "pt") as f:
        metadata = f.metadata() or {}
    name, way = rng.choice(sorted(tensors)), rng.choice(["value", "value", "value", "delete", "rename", "prefix", "add", "metadata"])
    if way == "value":
        tensors[name] = change_tensor(rng, tensors[name])
    elif way == "delete":
        del tensors[name]
    elif way == "rename":
        tensors[rng.choice(["module." + name, name + ".x", name.replace("0", "7"), ""])] = tensors.pop(name)
    elif way == "prefix":
        tensors = {"module." + key: x for key, x in tensors.items()}
    elif way == "add":
        tensors[rng.choice(["extra.weight", "base_model.model.q.lora_A.weight", name + "_2"])] = tensors[name].clone()
    else:
        metadata = {key: x for key, x in change_value(rng, metadata, ["", "abc", "-1", "9" * 5000]).items()} if metadata else {"a": "b"}
        metadata = {str(key): str(x) for key, x in metadata.items()}
    save_file({key: x.contiguous() for key, x in tensors.items()}, path, metadata)


def change_optimizer(rng, path: Path) -> None:
    """Change optimizer.pt: a tensor, a number, a key, or bytes."""
    if rng.random() < 0.3:
        path.write_bytes(change_bytes(rng, path.read_bytes()))
        return
    state = torch.load(path, weights_only=True)
    if rng.random() < 0.5:
        tensors = [place for place in places(state) if torch.is_tensor(at(state, place))]
        place = rng.choice(tensors)
        at(state, place[:-1])[place[-1]] = change_tensor(rng, at(state, place))
    else:
        state = change_value(rng, state, [x for x in VALUES if not isinstance(x, bytes)])
    torch.save(state, path)


def at(value, place):
    for key in place:
        value = value[key]
    return value


# ------------------------------------------------------------------------------------------------ what is valid

@functools.cache
def valid() -> Path:
    """A folder with an LLM, one whose tokenizer is a spiece.model, a student's run with its optimizer, and an adapter."""
    root = Path(tempfile.mkdtemp(prefix="valid-"))
    llm, tokenizer = make_llm("v1.1"), make_tokenizer()
    t5.save_all_but_weights(root / "llm", llm, tokenizer)
    common.save_tensors(f"{root}/llm/model.safetensors", dict(llm.named_parameters()), {"format": "pt"})
    shutil.copytree(root / "llm", root / "pieces")
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([*INSTRUCTIONS, *INPUTS, *OUTPUTS, "Definition: Input: Output: Now complete ."] * 20), model_writer=model,
        model_type="unigram", vocab_size=48, pad_id=0, eos_id=1, unk_id=2, bos_id=-1, minloglevel=2, hard_vocab_limit=False)
    (root / "pieces/spiece.model").write_bytes(model.getvalue())
    (root / "pieces/tokenizer.json").unlink()
    (root / "pieces/tokenizer_config.json").write_text('{"tokenizer_class": "T5Tokenizer", "extra_ids": 0, "eos_token": "</s>", '
                                                       '"pad_token": "<pad>", "unk_token": "<unk>"}')
    tagi = make_tagi("v1.1", "--fusion=both", "--train-norms", "--steps=3", f"--runs={root}", "--name=run")[0]
    optimizer, step = a_step(tagi), 1
    record = vars(tagi.options) | {
        "llm_is_relative": True, "llm_path": "../llm", "llm_fingerprint": t5.fingerprint(llm), "processes": 1,
        "tokenizer_digest": t5.tokenizer_digest(tokenizer), "data_digest": "0123456789abcdef"}
    common.save_checkpoint(str(root / "run"), record, tagi.trainable(), optimizer, step)
    loaded = TAGI.load(str(root / "run"))
    loaded.adapt(INSTRUCTIONS[:1])[0].save(str(root / "adapter"))
    return root


def a_step(tagi) -> optim.Optimizers:
    """One step of an optimizer over a student's parameters."""
    parameters = tagi.trainable()
    optimizer = optim.make_optimizer(parameters, tagi.options)
    for p in parameters.values():
        p.grad = torch.ones_like(p)
    optimizer.step()
    optimizer.zero_grad()
    return optimizer


def damaged(rng, folder: str, name: str, change) -> Path:
    """A copy of the valid files in which this file of this folder is changed; removed with the next one."""
    root = scratch()
    for path in root.iterdir():
        shutil.rmtree(path)
    for path in valid().iterdir():
        if path.name in ("llm", folder):
            shutil.copytree(path, root / path.name)
    change(rng, root / folder / name)
    return root


@functools.cache
def scratch() -> Path:
    return Path(tempfile.mkdtemp(prefix="damaged-"))


# ------------------------------------------------------------------------------------- how the program reads them

def use_llm(rng, folder: str, name: str, change) -> None:
    root = damaged(rng, folder, name, change)
    llm, tokenizer = t5.load_llm(str(root / folder))
    t5.check_knows(tokenizer, INPUTS, "these inputs")
    ids, mask = data.tokenize(tokenizer, [data.instance_text(text) for text in INPUTS], 16)
    labels = data.labels(tokenizer, OUTPUTS, 8)
    with torch.no_grad():
        finite(t5.logits(llm, ids, mask, labels))
        out = llm.generate(input_ids=ids, attention_mask=mask, max_new_tokens=3, num_beams=1, do_sample=False)
    tokenizer.batch_decode(out, skip_special_tokens=True)


def use_tagi(rng, folder: str, name: str, change) -> None:
    root = damaged(rng, folder, name, change)
    tagi = TAGI.load(str(root / folder))
    use(tagi, tagi.adapt(INSTRUCTIONS[:1]))


def use_adapter(rng, folder: str, name: str, change) -> None:
    root = damaged(rng, folder, name, change)
    tagi = TAGI.load(str(root / folder))
    adapter = Adapter.load(str(root / folder))
    adapter.check(tagi)
    use(tagi, adapter)


@torch.no_grad()
def use(tagi, adapter) -> None:
    for A, B in (adapter.weights or {}).values():
        finite(A)
        finite(B)
    for row in tagi.score_choices(INPUTS[:2], [OUTPUTS[:2]] * 2, adapter):
        finite(torch.tensor(row))
    tagi.generate(INPUTS[:2], adapter, max_new_tokens=3)


def resume(rng, folder: str, name: str, change) -> None:
    """As a run goes on: its record is compared, weights and optimizer are filled, a step is made and saved."""
    root = damaged(rng, folder, name, change)
    tagi = student()
    parameters = tagi.trainable()
    options = copy.copy(tagi.options)
    options.runs = str(valid())
    optimizer = optim.make_optimizer(parameters, options)
    with contextlib.redirect_stdout(io.StringIO()):
        run = Run(str(root / folder), options, 0, 1, {"data_digest": "0123456789abcdef"})
    if run.finished:
        return
    step = run.resume(parameters, optimizer)
    for p in parameters.values():
        p.grad = torch.full_like(p, 1e-3)
    optimizer.step()
    common.save_checkpoint(str(root / "next"), run.record(), parameters, optimizer, step + 1)


@functools.cache
def student():
    return make_tagi("v1.1", "--fusion=both", "--train-norms", "--steps=3", "--name=run")[0]


def finite(x: torch.Tensor) -> None:
    if not x.isfinite().all():
        raise NonFinite("a result is not finite")


def read_config(rng) -> None:
    path = scratch() / "configs" / "config.yaml"
    path.parent.mkdir(exist_ok=True)
    path.write_bytes((ROOT / "configs" / rng.choice(["sample.yaml", "sni-base.yaml", "p3-base.yaml"])).read_bytes())
    change_yaml(rng, path)
    parse(rng, [f"--config={path}"])


def command_line(rng) -> None:
    module, stage = rng.choice(SCRIPTS)
    action = rng.choice(module.parser()._actions[1:])
    value = rng.choice(VALUES)
    words = [f"{rng.choice(action.option_strings)}={value}"]
    if rng.random() < 0.2:
        words = [*words[0].split("=", 1)]
    if rng.random() < 0.2:
        words.append(rng.choice(["--", "-x", "--steps", "more", "--steps=\ud83d", ""]))
    parse(rng, words, module, stage)


SCRIPTS = [(train_hyper, "pretrain"), (train_hyper, "finetune"), (train_teacher, "meta"), (train_teacher, "lora"),
           (evaluate, "evaluate"), (adapt, None)]


def parse(rng, words, module=None, stage=None) -> None:
    if module is None:
        module, stage = rng.choice(SCRIPTS[:5])
    first = [] if stage in (None, "evaluate") else [f"--stage={stage}"]
    if module is adapt:
        options = adapt.get_options(["--instruction=a", "--device=cpu", *words])
    elif module is train_hyper:
        options = train_hyper.get_options([*first, "--device=cpu", *words])
    else:
        options = config.parse(module.parser(), stage, [*first, "--device=cpu", *words])
    for value in vars(options).values():
        if isinstance(value, float):
            finite(torch.tensor(value))


KINDS = {
    "config file": read_config,
    "command line": command_line,
    "checkpoint's config.yaml": lambda rng: use_tagi(rng, "run", "config.yaml", change_yaml),
    "run's config.yaml": lambda rng: resume(rng, "run", "config.yaml", change_yaml),
    "checkpoint's weights": lambda rng: use_tagi(rng, "run", "model.safetensors", change_tensors),
    "run's weights": lambda rng: resume(rng, "run", "model.safetensors", change_tensors),
    "optimizer.pt": lambda rng: resume(rng, "run", "optimizer.pt", change_optimizer),
    "adapter's config.yaml": lambda rng: use_adapter(rng, "adapter", "config.yaml", change_yaml),
    "adapter's weights": lambda rng: use_adapter(rng, "adapter", "adapter.safetensors", change_tensors),
    "LLM's config.json": lambda rng: use_llm(rng, "llm", "config.json", change_json),
    "LLM's generation_config.json": lambda rng: use_llm(rng, "llm", "generation_config.json", change_json),
    "LLM's weights": lambda rng: use_llm(rng, "llm", "model.safetensors", change_tensors),
    "tokenizer.json": lambda rng: use_llm(rng, "llm", "tokenizer.json", change_json),
    "tokenizer_config.json": lambda rng: use_llm(rng, "llm", "tokenizer_config.json", change_json),
    "spiece.model": lambda rng: use_llm(rng, "pieces", "spiece.model", lambda rng, path: path.write_bytes(
        change_bytes(rng, path.read_bytes()))),
}
