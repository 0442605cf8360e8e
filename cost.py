"""What it costs to answer n instances of a task: adapter generation once, against reading the instruction every time."""
import time

import numpy as np
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import common
import data
import lora


def timed(run, *arguments) -> float:
    """Seconds of one run, the GPU's work included."""
    synchronize()
    start = time.perf_counter()
    run(*arguments)
    synchronize()
    return time.perf_counter() - start


def synchronize():
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def take_turns(ways, arguments, repeats, seconds):
    """Run every way `repeats` times, one after another, and append how long each took to its list."""
    for _ in range(repeats):
        for way, run in ways.items():
            seconds[way].append(timed(run, *arguments))


def measure_cost(bench, demos, n=100, repeats=5, n_tasks=4):
    """FLOPs and milliseconds per instance for n instances of one task, every answer as long as the mean reference.

    bench: an `evaluate.Bench`. Returns {row: {"flops": .., "ms": .., "formula": ..}} for the rows that a model answers. FLOPs are
    from PyTorch's counter, adapter generation and merging included; times are medians over tasks and repeats, the ways
    taking turns. formula: the paper's N(t + n·i) for TAGI and N·n(t + i) with the instruction in the input, relative to the
    latter, t and i being the mean tokens of instruction and instance, cut where each model cuts
    them. LoRA teachers are measured unmerged, as they answer; a model without finetuning computes
    just what the meta-trained one does.
    """
    references = [x.outputs[0] for t in bench.tasks for x in t.instances]
    tagi, length = bench.tagi, round(np.mean([len(ids) for ids in bench.tagi.tokenizer(references)["input_ids"]]))
    length = min(length, bench.options.max_output)
    fixed = {"min_new_tokens": length, "max_new_tokens": length}
    meta, size = bench.llm(common.meta_path(bench.options)), bench.options.batch_size
    teacher = lora.select(lora.init_weights(tagi.llm, tagi.options.rank, 0, 1), 0)
    tasks = bench.tasks[::max(1, len(bench.tasks) // n_tasks)][:n_tasks]

    def merged(instruction, inputs):
        adapter = tagi.adapt([instruction[0]], [instruction[1]])
        tagi.merge(adapter)
        tagi.generate(inputs, adapter, batch_size=size, **fixed)
        tagi.unmerge()

    def read(instruction, inputs, weights=None, llm=None):
        for batch in data.batches(inputs, size):
            bench.ask([(*instruction, x) for x in batch], weights=weights, llm=llm, **fixed)

    ways = {"meta": lambda own, other, inputs: read(own, inputs, llm=meta),
            "no_instruction": lambda own, other, inputs: read(("", []), inputs),
            "teachers": lambda own, other, inputs: read(own, inputs, teacher),
            "tagi": lambda own, other, inputs: merged(own, inputs),
            "tagi_shuffled": lambda own, other, inputs: merged(other, inputs),
            "tagi_empty": lambda own, other, inputs: merged(("", []), inputs)}
    flops, seconds, tokens = {w: [] for w in ways}, {w: [] for w in ways}, np.zeros(4)
    for k, task in enumerate(tasks):
        inputs = [task.instances[j % len(task.instances)].input.strip() or "." for j in range(n)]
        own, other = ((x.definitions[0], x.demonstrations[:demos]) for x in (task, tasks[k - 1]))
        tokens += count_tokens(tagi, own, inputs, bench.options.max_input)
        for way, run in ways.items():                                       # the first run, counted, also warms up; without
            with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):     # flash attention, which the
                run(own, other, inputs)                                     # counter does not know on a CPU
            flops[way].append(counter.get_total_flops() / n)
        take_turns(ways, (own, other, inputs), repeats, seconds)
    instruction, instances, alone, together = tokens
    once = (instruction + instances) / together
    formula = {"meta": 1.0, "teachers": 1.0, "no_instruction": alone / together,
               "tagi": once, "tagi_shuffled": once, "tagi_empty": instances / together}
    costs = {way: {"flops": float(np.mean(flops[way])), "ms": float(np.median(seconds[way])) / n * 1000,
                   "formula": formula[way]} for way in ways}
    return costs | {"meta_lora": costs["teachers"], "no_finetuning": costs["meta"]}


def count_tokens(tagi, instruction, inputs, max_input):
    """What the formula counts for inputs of one task, each model's cut made: an array of four.

    t as the hypernetwork reads the instruction; the sum of i as the student reads the inputs, and
    as a plain LLM does; the sum of t + i where an LLM reads both together. Demonstrations that do
    not fit are left out.
    """
    def length(text):
        return len(tagi.tokenizer(text)["input_ids"])

    def fitting(limit, *inputs):
        """Tokens of the instruction less the demonstrations that do not fit beside the input."""
        definition, demonstrations = instruction
        write = data.prompt_text if inputs else data.instruction_text
        while demonstrations and length(write(definition, demonstrations, *inputs)) > limit:
            demonstrations = demonstrations[:-1]
        return length(data.instruction_text(definition, demonstrations))

    limit, own_limit = tagi.options.max_instruction, tagi.options.max_input
    i = np.array([length(data.instance_text(x)) for x in inputs])
    t = np.array([fitting(max_input, x) for x in inputs])
    return np.array([min(fitting(limit), limit), np.minimum(i, own_limit).sum(),
                     np.minimum(i, max_input).sum(), np.minimum(t + i, max_input).sum()])


def measure_ranking(bench, demos, repeats=5, n=20, n_tasks=4):
    """{way: {"ms": ..}} for one P3 row at batch size 1, as in the paper's Table 3: ranking its choices with the prompt in
    the input (meta), with the fields alone (no_instruction), or by TAGI, adapter generation over n rows included."""
    tagi, meta = bench.tagi, bench.llm(common.meta_path(bench.options))

    def merged(task, rows):
        adapter = tagi.adapt([task.definitions[0]])
        tagi.merge(adapter)
        for x in rows:
            tagi.rank([x.input], [x.choices], adapter, max_new_tokens=bench.options.max_output)
        tagi.unmerge()

    def read(rows, text, llm=None):
        for x in rows:
            bench.ask([("", [], text(x))], [x.choices], llm=llm)

    ways = {"meta": lambda task, rows: read(rows, lambda x: x.prompt, meta), "tagi": merged,
            "no_instruction": lambda task, rows: read(rows, lambda x: x.input)}
    seconds = {way: [] for way in ways}
    for task in bench.tasks[::max(1, len(bench.tasks) // n_tasks)][:n_tasks]:
        rows = [task.instances[k % len(task.instances)] for k in range(n)]
        for run in ways.values():                                           # warms up
            run(task, rows)
        take_turns(ways, (task, rows), repeats, seconds)
    return {way: {"ms": float(np.median(x)) / n * 1000} for way, x in seconds.items()}
