"""How near an instruction is to those that a checkpoint was trained on.

Compared is the cosine of two instructions, each the mean of the frozen LLM's embeddings of its
tokens, less the mean over all training tasks. An instruction is far where its nearest training
task is farther than that of 95 % of the validation tasks. Embeddings tell a foreign instruction
better than the encoder's last states do, which are much the same for all (docs/novelty.md).
"""
import json
import os
import time

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import safe_open

import common
import t5
from common import UserError

FILE = "instructions.safetensors"
SHARE = 0.05                    # of the validation tasks, which are to be called far
WORDINGS = 3                    # of a training task that has several


def write_index(tagi, checkpoint: str, tasks, validation) -> None:
    """Write training tasks' instructions, encoded, and the threshold, beside the checkpoint.

    validation: tasks that choose the threshold; without any, each training task beside the others.
    """
    texts, number = [], []
    for n, task in enumerate(tasks):
        for definition in task.definitions[:WORDINGS]:
            texts.append(definition)
            number.append(n)
    number = torch.tensor(number)                               # (U,)
    vectors = encode(tagi, texts)
    mean = vectors.mean(0)
    trained = centered(vectors, mean)
    if validation:
        others = encode(tagi, [task.definitions[0] for task in validation])
        cosines = centered(others, mean) @ trained.T
    else:
        cosines = trained @ trained.T
        cosines = cosines.masked_fill(number[:, None] == number, -1)
    threshold = float(np.quantile(cosines.max(1).values.numpy(), SHARE))
    metadata = {"names": json.dumps([task.name for task in tasks]), "threshold": str(threshold)}
    path = f"{checkpoint}/{FILE}"
    with common.named_file(path, "choose a folder that can be written", "written"):
        tensors = {"vectors": trained.half(), "mean": mean, "task": number.int()}
        common.save_tensors(path, tensors, metadata)
    print(f"{path}: {len(tasks)} tasks, far below a cosine of {threshold:.3f}")


@torch.no_grad()
def encode(tagi, texts: list[str]) -> torch.Tensor:
    """(U, D): the mean embeddings of instructions, of length 1."""
    vectors = []
    for start in range(0, len(texts), 64):
        batch = tagi.tokenizer(texts[start:start + 64], padding=True, truncation=True,
                               max_length=tagi.options.max_instruction, return_tensors="pt")
        states = tagi.llm.get_input_embeddings()(batch.input_ids.to(tagi.device)).float().cpu()
        states = states * batch.attention_mask[..., None]                       # (N, S, D)
        vectors.append(F.normalize(states.sum(1), dim=-1))
    return torch.cat(vectors)


def centered(vectors, mean) -> torch.Tensor:
    return F.normalize(vectors - mean, dim=-1)


def nearest(tagi, instruction: str, checkpoint: str, n: int = 3) -> tuple[dict, float]:
    """({training task: cosine} of the n nearest to an instruction, the threshold)."""
    path = f"{checkpoint}/{FILE}"
    if not os.path.isfile(path):
        raise UserError(f"{path}: no such file; write it with python adapt.py --index --checkpoint "
                        f"{checkpoint}")
    with common.named_file(path, "write it again with python adapt.py --index"):
        with safe_open(path, "pt") as f:
            trained, mean = f.get_tensor("vectors").float(), f.get_tensor("mean")
            number = f.get_tensor("task").tolist()
            names = json.loads(f.metadata()["names"])
            threshold = float(f.metadata()["threshold"])
    cosines = trained @ centered(encode(tagi, [instruction]), mean)[0]          # (U,)
    found = {}
    for k in cosines.argsort(descending=True).tolist():
        if len(found) < n:
            found.setdefault(names[number[k]], cosines[k].item())
    return found, threshold


def tell(tagi, instruction: str, checkpoint: str) -> str:
    """One line on how near the instruction is to what was trained on."""
    found, threshold = nearest(tagi, instruction, checkpoint)
    if max(found.values()) < threshold:
        where = "FAR from"
    elif t5.unknown_words(tagi.tokenizer, [instruction]):
        where = "perhaps far (it has words that are unknown) from"
    else:
        where = "near"
    some = ", ".join(f"{name} {cosine:.2f}" for name, cosine in found.items())
    return f"the instruction is {where} those trained on (far below {threshold:.2f}): {some}"


def compare(inputs, ways: dict, tokenizer) -> None:
    """Print what each way, {name: function of an input}, answers, and its time."""
    for n, text in enumerate(inputs):
        t5.warn_of_unknown_words(tokenizer, [text])
        print(f"input: {text}")
        for name, way in ways.items():
            if n == 0:
                way(text)                       # warms up
            begin = time.perf_counter()
            answer = way(text)
            print(f"  {name:36} {(time.perf_counter() - begin) * 1e3:7.1f} ms   {answer}")
