"""Your own instruction: answers by it, and an adapter to keep, combine or hand on.

    python adapt.py --instruction "Find the city." --input "A cat came to Rome by boat."
    python adapt.py --instruction "Find the city." --demo "Ann is in Oslo. => Oslo" --inputs FILE
    python adapt.py --instructions FILE         # JSON lines: instruction, demonstrations, input
    python adapt.py                             # asks for an instruction, then for inputs
    python adapt.py --instruction "Find the city." --save my-adapter    # then: --adapter my-adapter

The model that comes with the repository knows the built-in suite's world alone. Answers go to
standard output, a line each, everything else to standard error.
"""
import itertools
import json
import os
import sys
import time

import common  # before PyTorch: Ctrl-C
import torch
from tqdm import tqdm

import config
import data
import t5
from bench import novelty, records, report, terminal
from common import UserError
from hypernet import TAGI
from lora import Adapter

OWN = os.path.join(os.path.dirname(os.path.abspath(__file__)), "assets", "tagi-lora")

# --------------------------------------------------------------------------------------- options

def parser():
    p = config.Parser(__doc__)
    add = p.add_argument_group("who answers").add_argument
    add("--checkpoint", type=config.beside,
        help="folder of a finetuned TAGI; default: assets/tagi-lora")
    add("--llm", type=config.beside,
        help="folder of its frozen LLM; default: the one that its config.yaml names")
    add("--adapter", type=config.path,
        help="folder of a saved adapter, in place of an instruction; default: none")
    add("--device", default="auto", choices=["auto", "cpu", "cuda"], help="auto: the GPU, if any")
    add("--precision", default="fp32", choices=["fp32", "bf16"], help="of the frozen LLM")
    add = p.add_argument_group("instruction, inputs").add_argument
    add("--instruction", action="append", default=[],
        help="what to do with each input, in words; several with --combine; default: you are asked")
    add("--demo", action="append", default=[], type=config.demonstration,
        metavar="'INPUT => OUTPUT'",
        help="a demonstration beside the instruction; may be given several times; default: none")
    add("--scale", type=config.scale, default=1.0, help="of LoRA and the encoder's fusion")
    add("--combine", nargs="?", type=config.numbers, const=[], metavar="W1,W2",
        help="one adapter for several --instruction: their sum with these weights, or, without "
             "any, their mean; default: only one instruction is taken")
    add("--input", action="append", default=[],
        help="a text to answer; may be given several times; default: you are asked")
    add("--inputs", type=config.path,
        help="file with an input a line; -: standard input, answered line by line; default: none")
    add("--instructions", type=config.path,
        help="file of JSON lines: instruction, input, [demonstrations]; default: none")
    add("--batch-size", type=config.many,
        help="inputs answered at a time; default: 32, and 1 for --inputs -")
    add = p.add_argument_group("answers, files").add_argument
    add("--choices",
        help="answers to choose from, with | between them; default: the answer is generated")
    add("--beams", type=config.number(1, 100), default=1, help="beam search with so many beams")
    add("--sample", default=False, **config.flag, help="draw the answer, instead of the likeliest")
    add("--seed", type=config.seed, default=0, help="of --sample")
    add("--max-output", type=config.many, default=128, help="tokens of an answer, at most")
    add("--json", default=False, **config.flag, help="print a JSON object for each answer")
    add("--compare", default=False, **config.flag,
        help="the frozen LLM's answers too, times, and how near the instruction is to training's")
    add("--save", type=config.path,
        help="new folder for the whole adapter, for --adapter; default: not saved")
    add("--export", type=config.path,
        help="new folder for the LoRA as PEFT's files; default: not exported")
    add("--merge", type=config.path,
        help="new folder for a plain T5 with the LoRA merged; default: not merged")
    add("--lossy", default=False, **config.flag, help="also where fusion or embeddings are lost")
    add("--index", default=False, **config.flag, help="write what --compare reads to --checkpoint")
    return p


def get_options(argv=None):
    """The options. Raises UserError where some do not go together."""
    o = parser().parse_args(argv)
    o.device = config.device_of(o.device)
    n, has_input = len(o.instruction), bool(o.input or o.inputs)
    folders = [folder for folder in (o.save, o.export, o.merge) if folder is not None]
    o.choices = o.choices and [choice.strip() for choice in o.choices.split("|")]
    wrongs = {
        "--adapter brings its instruction; drop --instruction, --demo, --instructions, --compare":
            o.adapter and (n or o.demo or o.instructions or o.compare),
        "--instructions FILE brings all instructions and inputs; drop the others":
            o.instructions and (n or o.demo or has_input or folders or o.compare),
        "an --instruction needs some text": not all(map(str.strip, o.instruction)),
        "several --instruction need --combine, and it needs several":
            (n > 1) != (o.combine is not None),
        "--demo and --compare are of a single --instruction": (o.demo or o.compare) and n != 1,
        "give an --instruction or an --adapter": (has_input or folders) and not (n or o.adapter),
        "--compare generates answers; drop --choices, --save, --export, --merge, --json":
            o.compare and (o.choices or folders or o.json),
        "--choices takes different texts with | between them, and neither --beams nor --sample":
            o.choices and (not all(o.choices) or len(set(o.choices)) < len(o.choices)
                           or o.beams > 1 or o.sample),
        "--save, --export and --merge each take a folder that is not there yet":
            len(set(folders)) < len(folders) or any(map(os.path.lexists, folders)),
        "--lossy is for --export and --merge": o.lossy and not (o.export or o.merge),
        f"--inputs {o.inputs}: no such file":
            o.inputs not in (None, "-") and not os.path.exists(o.inputs)}     # a pipe is fine
    for reason, wrong in wrongs.items():
        if wrong:
            raise UserError(reason)
    return o


# --------------------------------------------------------------------------------------- answers

def answers(tagi, adapter, inputs: list[str], options) -> list[dict]:
    """{"output": .., "scores": of --choices} for each input."""
    choices, n = options.choices, len(inputs)
    if choices is None:
        texts = tagi.generate(inputs, adapter, n, options.beams, options.max_output,
                              do_sample=options.sample)
        return [{"output": text} for text in texts]
    rows = tagi.score_choices(inputs, [choices] * n, adapter, n, False, options.max_output)
    report.check_finite(rows, "a choice's score")
    return [{"output": choices[row.index(max(row))], "scores": dict(zip(choices, row))}
            for row in rows]


def tell(answer: dict, options, **asked) -> None:
    text = answer["output"]
    if options.json:                            # \u00e9 where the terminal has no é
        text = json.dumps(asked | answer, ensure_ascii=not terminal.has_unicode(sys.stdout))
    print(text, flush=True)


def read_inputs(options):
    """The inputs of --input and --inputs, one after another; UserError names an empty line."""
    yield from options.input
    if options.inputs is None:
        return
    name, path = ("standard input", 0) if options.inputs == "-" else (options.inputs,) * 2
    with common.named_file(name, "give an input a line"), open(path, encoding="utf-8-sig") as f:
        n = 0
        for n, line in enumerate(tqdm(f, disable=sys.stdout.isatty() or None), 1):
            if not line.strip():
                raise ValueError(f"line {n} is empty")
            yield line.strip()
        if n == 0 and path != 0:
            raise ValueError("it is empty")


def answer_all(tagi, adapter, options) -> None:
    """One adapter for every input."""
    size, inputs = options.batch_size or (1 if options.inputs == "-" else 32), read_inputs(options)
    while batch := list(itertools.islice(inputs, size)):
        t5.warn_of_unknown_words(tagi.tokenizer, batch)
        for text, answer in zip(batch, answers(tagi, adapter, batch, options)):
            tell(answer, options, input=text)


def answer_file(tagi, options) -> None:
    """The tasks of --instructions, each with its adapter, in mixed batches."""
    remedy = "--instructions reads JSON lines with instruction, input, demonstrations"
    numbered = records.numbered_rows(options.instructions, remedy, instruction=str, input=str)
    rows = []
    for where, row in numbered:
        pairs = row.setdefault("demonstrations", [])
        fine = isinstance(pairs, list) and all(common.is_texts(p) and len(p) == 2 for p in pairs)
        if not (fine and row["instruction"].strip() and row["input"].strip()):
            raise UserError(f"{where}: it needs an instruction, an input, and demonstrations as "
                            "[[input, output], ...]")
        rows.append(row)
    for batch in data.batches(rows, options.batch_size or 32):
        inputs = [row["input"] for row in batch]
        texts = [row["instruction"] for row in batch]
        t5.warn_of_unknown_words(tagi.tokenizer, texts + inputs)
        adapters = tagi.adapt(texts, [row["demonstrations"] for row in batch], options.scale)
        for row, answer in zip(batch, answers(tagi, adapters, inputs, options)):
            tell(answer, options, instruction=row["instruction"], input=row["input"])


def prompt(text: str) -> str:
    print(text, end=": ", file=sys.stderr, flush=True)
    if sys.stdin is None:                       # started with <&-
        raise EOFError
    try:
        answer = input().strip()
        answer.encode()                         # in a C locale other bytes come as half signs
    except UnicodeError:
        raise UserError(f"this {text} is no text in UTF-8; type or send it again") from None
    return answer


def ask(tagi, options, adapter) -> None:
    """The prompt loop: an instruction, unless there is one, then inputs, up to an empty line."""
    try:
        while True:
            while adapter is None:
                text = prompt("instruction")
                t5.warn_of_unknown_words(tagi.tokenizer, [text])
                adapter = tagi.adapt([text], scale=options.scale) if text else None
            while text := prompt("input"):
                options.input = [text]
                answer_all(tagi, adapter, options)
            adapter = None
    except (EOFError, KeyboardInterrupt):
        print(file=sys.stderr)


def compare(tagi, options) -> None:
    """Three answers to each input, and how near the instruction is to those trained on."""
    instruction = options.instruction[0]
    near = novelty.tell(tagi, instruction, options.checkpoint or OWN)
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
    novelty.compare(read_inputs(options), ways, tagi.tokenizer)
    print(f"adapter made in {made * 1e3:.1f} ms; {near}")


def index(tagi, checkpoint: str) -> None:
    """Write beside a checkpoint what `compare` reads."""
    o, split, validation = tagi.options, "validation", []
    if os.path.isfile(data.split_file(o.data, split)):
        validation = data.load_sni(o.data, split, 1)
    novelty.write_index(tagi, checkpoint, data.training_tasks(o, 1), validation)


@common.command
@terminal.printing
def main(argv=None):
    o = get_options(argv)
    tagi = TAGI.load(o.checkpoint or o.adapter or OWN, o.device, o.precision, o.llm)
    torch.manual_seed(o.seed)                   # after the load, which makes weights
    if o.index:
        return index(tagi, o.checkpoint or OWN)
    if o.instructions:
        return answer_file(tagi, o)
    t5.warn_of_unknown_words(tagi.tokenizer, o.instruction)
    if o.compare:
        return compare(tagi, o)
    adapter = None
    if o.adapter:
        adapter = Adapter.load(o.adapter)
        adapter.check(tagi)
        adapter.scale *= o.scale
    elif o.instruction:
        adapter = tagi.adapt(o.instruction, [o.demo] * len(o.instruction), o.scale)
        if len(adapter) > 1:
            adapter = Adapter.combine(list(adapter), o.combine or None)
    if o.export:                                # before --save: it may be refused
        adapter.export(o.export, o.lossy)
    if o.merge:
        adapter.merge_into_t5(o.merge, o.lossy)
    if o.save:
        adapter.save(o.save)
    if o.input or o.inputs:
        answer_all(tagi, adapter, o)
    elif not (o.save or o.export or o.merge):
        ask(tagi, o, adapter)


if __name__ == "__main__":
    main()
