"""Put a trained checkpoint into a folder that ships with the repository: weights in bf16, no optimizer.

    bash quickstart.sh --from-scratch
    python assets/pack.py runs/from-scratch/meta assets/t5-tiny         # the frozen LLM of the built-in suite
    bash quickstart.sh
    python assets/pack.py runs/sample/finetune assets/tagi-tiny         # a TAGI for it
    (the commands at the head of configs/sample-lora-only.yaml)         # and one that writes LoRA alone
    python assets/pack.py runs/sample/lora-only assets/tagi-lora --results runs/sample/evaluate-lora-only/results.json
    python adapt.py --checkpoint assets/tagi-lora --index
"""
import argparse
import json
import os
import shutil
import sys

import torch
import yaml
from safetensors import safe_open
from safetensors.torch import load_file, save_file

KEPT = ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "log.jsonl",
        "training_tasks.json")
OURS = {*KEPT, "model.safetensors", "config.yaml", "instructions.safetensors"}


def score_of(path) -> str:
    """TAGI's score in an evaluation's results.json, in words."""
    with open(path, encoding="utf-8") as f:
        results = json.load(f)
    score = {row["demos"]: row["exact_match"] for row in results["results"] if row["key"] == "tagi"}
    return (f"exact match {score[0]:.1f} by the definition, {score[2]:.1f} with two demonstrations, on "
            f"{results['tasks']} {results['split']} tasks of the built-in suite")


def pack(source, target, results=None):
    """Copy the checkpoint in the folder `source` to `target`; a TAGI's path to its LLM then starts there.

    Ends the script where the target holds anything but a checkpoint that was packed before.
    """
    there = set(os.listdir(target)) if os.path.isdir(target) else set()
    if there - OURS or (there and "config.yaml" not in there):
        sys.exit(f"error: {target} holds other files than a packed checkpoint's; name a new folder")
    os.makedirs(target, exist_ok=True)
    for name in KEPT:
        if os.path.isfile(f"{source}/{name}"):
            shutil.copy(f"{source}/{name}", f"{target}/{name}")
    with safe_open(f"{source}/model.safetensors", "pt") as f:
        metadata = f.metadata()
    weights = {name: w.to(torch.bfloat16) for name, w in load_file(f"{source}/model.safetensors").items()}
    save_file(weights, f"{target}/model.safetensors", metadata)
    with open(f"{source}/config.yaml", encoding="utf-8") as f:
        record = yaml.safe_load(f)
    if record.get("llm_is_relative"):
        llm = os.path.join(os.path.realpath(source), record["llm_path"])
        record["llm_path"] = os.path.relpath(os.path.realpath(llm), os.path.realpath(target))
    record.pop("cwd", None)                         # whose machine it was is of no use
    if results:
        record["score"] = score_of(results)         # for the cards of exported adapters
    with open(f"{target}/config.yaml", "w", encoding="utf-8") as f:
        yaml.safe_dump(record, f, sort_keys=False)
    size = sum(entry.stat().st_size for entry in os.scandir(target))
    print(f"{target}: {sum(w.numel() for w in weights.values())} weights, {size / 1e6:.2f} MB")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", help="a finished stage's folder")
    parser.add_argument("target", help="the folder to write")
    parser.add_argument("--results", help="an evaluation's results.json, whose score is recorded")
    args = parser.parse_args()
    if not os.path.isfile(f"{args.source}/config.yaml"):
        sys.exit(f"error: {args.source}/config.yaml: no such file; name the folder of a finished stage")
    pack(args.source, args.target, args.results)
