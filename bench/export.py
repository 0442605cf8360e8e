"""An adapter for others: PEFT's files with a card, or a plain T5 with the LoRA merged."""
import json
import os

import torch

import common
import t5


def write_peft(folder: str, base: str, weights: dict, alpha: float, targets: list[str],
               norms: dict) -> None:
    """Write LoRA weights, {site: ((r, D_in), (D_out, r))}, as PEFT's files; needs no peft.

    base: the LLM's hub name or folder; norms: {name: a norm's weight in place of the LLM's}.
    """
    tensors = {}
    for site, (A, B) in weights.items():
        tensors[f"base_model.model.{site}.lora_A.weight"] = A.detach().float()
        tensors[f"base_model.model.{site}.lora_B.weight"] = B.detach().float()
    for name, weight in norms.items():
        tensors[f"base_model.model.{name}"] = weight.float()
    own_modules = sorted({name.split(".")[-2] for name in norms})
    config = {"peft_type": "LORA", "task_type": "SEQ_2_SEQ_LM", "inference_mode": True,
              "base_model_name_or_path": os.path.abspath(base) if os.path.isdir(base) else base,
              "r": len(A), "lora_alpha": alpha, "target_modules": targets, "lora_dropout": 0.0,
              "bias": "none", "fan_in_fan_out": False, "modules_to_save": own_modules or None}
    common.save_tensors(f"{folder}/adapter_model.safetensors", tensors, {"format": "pt"})
    common.write_text(f"{folder}/adapter_config.json", json.dumps(config, indent=2) + "\n")


def card(task: dict, model, numbers: str, lost: list[str], as_trained: bool) -> str:
    """The README.md that goes with an export: what the hypernetwork read, and from what."""
    options = model.options
    data_form = "<the input>" if model.verbatim else "Input: <the input>\n    Output: "
    facts = {"rank, alpha, scale": numbers,
             "hypernetwork's weights (digest)": t5.hypernetwork_digest(model),
             "frozen LLM (fingerprint)": options.llm_fingerprint,
             "training data (digest)": getattr(options, "data_digest", "not recorded"),
             "score of the whole model": getattr(options, "score", "not recorded"),
             "score of what is here": "the same: nothing is left out"}
    if lost:
        facts["score of what is here"] = f"not measured: {' and '.join(lost)} are left out"
    elif not as_trained:
        facts["score of what is here"] = "not measured: it is scaled, or a sum of several"
    parts = []
    for part in task.get("combined", [task]):
        weight = f" (weight {part['weight']:g})" if "weight" in part else ""
        quoted = part["instruction"].replace("\n", "\n> ")
        parts.append(f"Instruction{weight}:\n\n> {quoted}")
        for its_input, output in part["demonstrations"]:
            parts.append(f"Demonstration: `{its_input}` → `{output}`")
    table = "\n".join(f"| {name} | {value} |" for name, value in facts.items())
    return f"""---
library_name: peft
base_model: {json.dumps(model.llm_path)}
tags: [lora, tagi]
---
# A LoRA adapter that a hypernetwork wrote from an instruction

{chr(10).join(part + chr(10) for part in parts)}
No example of the task was trained on. The instruction is not in front of an input, which is read as

    {data_form}

| | |
|---|---|
{table}
"""


def write_merged(folder: str, llm, tokenizer, gains, embedding_delta=None) -> None:
    """Write an LLM into which LoRA is merged, and a student's gains and embeddings: a plain T5."""
    weights = {}
    for name, p in llm.named_parameters():
        weights[name.replace(".linear.", ".")] = p              # as without places for LoRA
    weights |= scaled_norms(llm, gains)
    if embedding_delta is not None:
        weights["shared.weight"] = weights["shared.weight"] + embedding_delta
    t5.save_all_but_weights(folder, llm, tokenizer)
    common.save_tensors(f"{folder}/model.safetensors", weights, {"format": "pt"})


def scaled_norms(llm, gains) -> dict[str, torch.Tensor]:
    """{name: a norm's weight times the student's gain}; gains: by the norm's path with slashes."""
    weights = {}
    for key, gain in gains.items():
        name = key.replace("/", ".")
        weights[f"{name}.weight"] = llm.get_submodule(name).weight * gain
    return weights
