"""A T5 v1.1 with random weights, saved as the real ones are: for smoke runs and benchmarks where none can be downloaded.

    python tests/random_t5.py FOLDER --size smoke --data SNI_FOLDER

--size base, large, xl, xxl are the published shapes. The tokenizer is a SentencePiece unigram model trained on the training
tasks' texts, a sample of which is also written to FOLDER/text.txt, to pretrain the hypernetwork on.
"""
import argparse
import os
import random
import sys

sys.path.insert(0, os.path.join(os.path.dirname(__file__), ".."))

import torch

import common
import data
from bench.folders import new_folder
from bench.listed import replaceable, write_list
from bench.scratch import train_tokenizer

SIZES = {  # d_model, d_ff, layers, heads, d_kv, vocabulary
    "tiny": (64, 128, 2, 4, 16, 593),          # small enough for tests
    "smoke": (64, 128, 2, 4, 16, 8000),
    "small": (512, 1024, 8, 6, 64, 32128),
    "base": (768, 2048, 12, 12, 64, 32128),
    "large": (1024, 2816, 24, 16, 64, 32128),
    "xl": (2048, 5120, 24, 32, 64, 32128),
    "xxl": (4096, 10240, 24, 64, 64, 32128),
}


def t5_config(size: str):
    from transformers import T5Config
    d_model, d_ff, layers, heads, d_kv, vocabulary = SIZES[size]
    return T5Config(vocab_size=vocabulary, d_model=d_model, d_ff=d_ff, d_kv=d_kv, num_layers=layers, num_heads=heads,
                    feed_forward_proj="gated-gelu_pytorch_tanh" if size == "tiny" else "gated-gelu", tie_word_embeddings=False, decoder_start_token_id=0)


def random_t5(size: str, seed: int = 0):
    """On PyTorch's default device and in its default type."""
    from transformers import AutoModelForSeq2SeqLM
    torch.manual_seed(seed)
    llm = AutoModelForSeq2SeqLM.from_config(t5_config(size))
    # Transformers 5 ties the head whatever the config says. Its own one starts with logits of about 1, to train at once.
    llm.lm_head.weight = torch.nn.Parameter(llm.shared.weight.detach() * llm.config.d_model ** -0.5)
    return llm


@common.command
def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("folder")
    p.add_argument("--size", default="smoke", choices=SIZES)
    p.add_argument("--data", required=True, help="a folder in Super-NaturalInstructions' layout, or with P3's data")
    p.add_argument("--format", default="sni", choices=["sni", "p3"])
    args = p.parse_args()
    folder = replaceable(args.folder)
    tasks = data.load_sni(args.data, "train", 20) if args.format == "sni" else data.load_p3(args.data, "train", 20)
    texts = [" ".join(text.split()) for t in tasks for text in (t.definitions[0], *(x.input for x in t.instances))]
    random.Random(0).shuffle(texts)
    tokenizer = train_tokenizer([text[:500] for text in texts], SIZES[args.size][-1])
    llm = random_t5(args.size)
    with new_folder(folder, replace=True) as unfinished:
        for part in (tokenizer, llm):
            part.save_pretrained(unfinished)
        with open(os.path.join(unfinished, "text.txt"), "w", encoding="utf-8") as f:
            f.writelines(text + "\n" for text in texts[:5000])
        write_list(unfinished)
    print(f"{args.folder}: {llm.num_parameters():,} parameters, {len(tokenizer)} pieces")


if __name__ == "__main__":
    main()
