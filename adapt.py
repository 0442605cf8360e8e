"""Your own instruction: answers by it, and an adapter to keep, combine or hand on.

    python adapt.py --instruction "Find the city." --input "A cat came to Rome by boat."
    python adapt.py --instruction "Find the city." --demo "Ann is in Oslo. => Oslo" --inputs FILE
    python adapt.py --instructions FILE         # JSON lines: instruction, demonstrations, input
    python adapt.py                             # asks for an instruction, then for inputs
    python adapt.py --instruction "Find the city." --save my-adapter        # the whole adapter
    python adapt.py --adapter my-adapter --input "A cat came to Rome by boat."

The model that comes with the repository knows the built-in suite's world alone. Answers go to
standard output, a line each, everything else to standard error.
"""
import argparse
import itertools
import json
import os
import sys
import time

import torch
from tqdm import tqdm

import common
import config
import data
import t5
from bench import novelty
from common import UserError
from hypernet import TAGI
from lora import Adapter

OWN = os.path.join(os.path.dirname(os.path.abspath(__file__)), "assets", "tagi-lora")

# --------------------------------------------------------------------------------------- options

def demonstration(text):                        # the type of --demo
    if "=>" not in text:
        raise argparse.ArgumentTypeError(f"'{text[:40]}' has no =>; write \"input => output\"")
    return [part.strip() for part in text.split("=>", 1)]


def numbers(text):                              # the type of --combine
    return [float(number) for number in text.split(",")]


def parser():
    p = config.Parser(__doc__)
    add = p.add_argument_group("who answers").add_argument
    add("--checkpoint", default=OWN, help="folder of a finetuned TAGI; default: assets/tagi-lora")
    add("--adapter", help="folder of a saved adapter, in place of a checkpoint and an instruction")
    add("--device", default="auto", choices=["auto", "cpu", "cuda"], help="auto: the GPU, if any")
    add("--precision", default="fp32", choices=["fp32", "bf16"], help="of the frozen LLM")
    add = p.add_argument_group("instruction").add_argument
    add("--instruction", action="append", default=[],
        help="what to do with each input, in words; several with --combine")
    add("--demo", action="append", default=[], type=demonstration, metavar="'INPUT => OUTPUT'",
        help="a demonstration beside the instruction; may be given several times")
    add("--scale", type=config.finite, default=1.0, help="of the adapter: below 1 weakens it")
    add("--combine", nargs="?", type=numbers, const=[], metavar="W1,W2,..",
        help="one adapter for several --instruction: their sum with these weights, or their mean")
    add = p.add_argument_group("inputs").add_argument
    add("--input", action="append", default=[], help="a text to answer; may be given several times")
    add("--inputs", help="file with an input a line; -: standard input, answered line by line")
    add("--instructions", help="file of JSON lines: instruction, input and, if any, demonstrations")
    add("--batch-size", type=config.positive, help="inputs answered at a time; default: 32")
    add = p.add_argument_group("answers, files").add_argument
    add("--choices", help="answers to choose from, with | between them")
    add("--beams", type=config.positive, default=1, help="beam search with so many beams")
    add("--sample", default=False, **config.flag, help="draw the answer, instead of the likeliest")
    add("--seed", type=config.at_least(0), default=0, help="of --sample")
    add("--max-output", type=config.positive, default=128, help="tokens of an answer, at most")
    add("--json", default=False, **config.flag, help="print a JSON object for each answer")
    add("--compare", default=False, **config.flag,
        help="the frozen LLM's answers too, times, and how near the instruction is to training's")
    add("--save", help="new folder for the whole adapter, for --adapter")
    add("--export", help="new folder for the LoRA as PEFT's files")
    add("--merge", help="new folder for a plain T5 with the LoRA merged")
    add("--lossy", default=False, **config.flag, help="also where fusion or embeddings are lost")
    add("--index", default=False, **config.flag, help="write what --compare reads to --checkpoint")
    return p


def get_options(argv=None):
    """The options. Raises UserError where some do not go together."""
    o = parser().parse_args(argv)
    config.choose_device(o)
    n, has_input, writes = len(o.instruction), o.input or o.inputs, o.save or o.export or o.merge
    wrongs = {
        "--adapter brings its instruction and model; drop the others":
            o.adapter and (n or o.demo or o.instructions or o.checkpoint != OWN or o.compare),
        "--instructions FILE brings all instructions and inputs; drop the others":
            o.instructions and (n or o.demo or has_input or writes or o.compare),
        "an --instruction needs some text": not all(map(str.strip, o.instruction)),
        "several --instruction need --combine, and it needs several":
            (n > 1) != (o.combine is not None),
        "--demo and --compare are of a single --instruction": (o.demo or o.compare) and n != 1,
        "give an --instruction or an --adapter": (has_input or writes) and not (n or o.adapter),
        "--compare generates answers; drop --choices, --save, --export, --merge, --json":
            o.compare and (o.choices is not None or writes or o.json),
        f"--choices {o.choices}: give texts with | between them":
            o.choices is not None and not all(map(str.strip, o.choices.split("|")))}
    for reason, wrong in wrongs.items():
        if wrong:
            raise UserError(reason)
    return o


# --------------------------------------------------------------------------------------- answers

def answers(tagi, adapter, inputs: list[str], options) -> list[dict]:
    """{"output": .., "scores": of --choices} for each input; words not known are named."""
    t5.warn_of_unknown_words(tagi.tokenizer, inputs)
    if options.choices is None:
        texts = tagi.generate(inputs, adapter, len(inputs), options.beams, options.max_output,
                              do_sample=options.sample)
        return [{"output": text} for text in texts]
    choices = options.choices.split("|")
    rows = tagi.score_choices(inputs, [choices] * len(inputs), adapter, len(inputs), False,
                              options.max_output)
    return [{"output": choices[row.index(max(row))], "scores": dict(zip(choices, row))}
            for row in rows]


def tell(answer: dict, options, **asked) -> None:
    text = json.dumps(asked | answer, ensure_ascii=False) if options.json else answer["output"]
    print(text, flush=True)


def read_inputs(options):
    """The inputs of --input and --inputs, one after another."""
    yield from options.input
    if options.inputs == "-":
        yield from map(str.rstrip, sys.stdin)
    elif options.inputs:
        remedy = "name a file with an input a line"
        with common.named_file(options.inputs, remedy), open(options.inputs, encoding="utf-8") as f:
            lines = f.read().splitlines()
        yield from tqdm(lines, disable=sys.stdout.isatty() or None)     # else between the answers


def answer_all(tagi, adapter, options) -> None:
    """One adapter for every input."""
    size, inputs = options.batch_size or (1 if options.inputs == "-" else 32), read_inputs(options)
    while batch := list(itertools.islice(inputs, size)):
        for text, answer in zip(batch, answers(tagi, adapter, batch, options)):
            tell(answer, options, input=text)


def answer_file(tagi, options) -> None:
    """The tasks of --instructions, each with its adapter, in mixed batches."""
    remedy = "--instructions reads JSON lines with instruction, input, demonstrations"
    rows = common.read_json_lines(options.instructions, remedy, instruction=str, input=str)
    for n, row in enumerate(rows, 1):
        pairs = row.setdefault("demonstrations", [])
        fine = isinstance(pairs, list) and all(common.is_texts(p) and len(p) == 2 for p in pairs)
        if not (fine and row["instruction"].strip() and row["input"].strip()):
            raise UserError(f"{options.instructions}, object {n}: it needs an instruction, an "
                            "input, and demonstrations as [[input, output], ...]")
    for batch in data.batches(rows, options.batch_size or 32):
        inputs = [row["input"] for row in batch]
        texts = [row["instruction"] for row in batch]
        t5.warn_of_unknown_words(tagi.tokenizer, texts)
        adapters = tagi.adapt(texts, [row["demonstrations"] for row in batch], options.scale)
        for row, answer in zip(batch, answers(tagi, adapters, inputs, options)):
            tell(answer, options, instruction=row["instruction"], input=row["input"])


def ask(tagi, options) -> None:
    """The prompt loop: an instruction, then inputs; an empty line asks for another, Ctrl-D ends."""
    while True:
        try:
            text = input("instruction: ").strip()
            adapter = tagi.adapt([text], scale=options.scale) if text else None
            t5.warn_of_unknown_words(tagi.tokenizer, [text])
            while text and (its_input := input("input: ").strip()):
                options.input = [its_input]
                answer_all(tagi, adapter, options)
        except EOFError:
            return print(file=sys.stderr)


def compare(tagi, options) -> None:
    """Three answers to each input, and how near the instruction is to those trained on."""
    instruction = options.instruction[0]
    tagi.adapt([instruction])                   # warms up
    begin = time.perf_counter()
    adapter = tagi.adapt([instruction], [options.demo], options.scale)
    made = time.perf_counter() - begin

    def reading(text):
        ids, mask = data.tokenize_instructed(tagi.tokenizer, [(instruction, options.demo, text)],
                                             tagi.options.max_input, tagi.device, tagi.verbatim)
        with tagi.adapted(None) as llm:
            out = llm.generate(input_ids=ids, attention_mask=mask, num_beams=options.beams,
                               max_new_tokens=options.max_output, do_sample=options.sample)
        return tagi.tokenizer.batch_decode(out, skip_special_tokens=True)[0]

    ways = {"frozen, input alone": lambda text: answers(tagi, None, [text], options)[0]["output"],
            "frozen, instruction with the input": reading,
            "TAGI, input alone": lambda text: answers(tagi, adapter, [text], options)[0]["output"]}
    for text in read_inputs(options):
        print(f"input: {text}")
        for name, way in ways.items():
            begin = time.perf_counter()
            answer = way(text)
            print(f"  {name:36} {(time.perf_counter() - begin) * 1e3:7.1f} ms   {answer}")
    print(f"adapter made in {made * 1e3:.1f} ms;", novelty.tell(tagi, instruction, options.checkpoint))


def index(tagi, checkpoint: str) -> None:
    """Write beside a checkpoint what `compare` reads."""
    o, split, validation = tagi.options, "validation", []
    if os.path.isfile(data.split_file(o.data, split)):
        validation = data.load_sni(o.data, split, 1)
    novelty.write_index(tagi, checkpoint, data.training_tasks(o, 1), validation)


@common.command
def main(argv=None):
    o = get_options(argv)
    tagi = TAGI.load(o.adapter or o.checkpoint, o.device, o.precision)
    torch.manual_seed(o.seed)                   # after the load, which makes weights
    if o.index:
        return index(tagi, o.checkpoint)
    if o.instructions:
        return answer_file(tagi, o)
    t5.warn_of_unknown_words(tagi.tokenizer, o.instruction)
    if o.compare:
        return compare(tagi, o)
    if o.adapter:
        adapter = Adapter.load(o.adapter)
        adapter.check(tagi)
        adapter.scale *= o.scale
    elif o.instruction:
        adapter = tagi.adapt(o.instruction, [o.demo] * len(o.instruction), o.scale)
        if len(adapter) > 1:
            adapter = Adapter.combine(list(adapter), o.combine or None)
    else:
        return ask(tagi, o)
    if o.save:
        adapter.save(o.save)
    if o.export:
        adapter.export(o.export, o.lossy)
    if o.merge:
        adapter.merge_into_t5(o.merge, o.lossy)
    answer_all(tagi, adapter, o)


if __name__ == "__main__":
    main()
