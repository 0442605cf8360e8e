"""What answers cost: FLOPs and time of functions that are handed in, and the paper's formula.

Whoever answers hands in the very code that answered: nothing is measured that no row runs.
"""
import time

import numpy as np
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

# Rows that are measured, and those that compute just what another row does.
MEASURED = ("meta", "no_instruction", "teachers", "tagi", "tagi_shuffled", "tagi_empty")
SAME = {"meta_lora": "teachers", "no_finetuning": "meta"}


def measure(ways: list[dict], n: int, repeats: int, told: str = "") -> dict:
    """{row: {"flops": .., "ms": ..}} of one instance: FLOPs a mean over tasks, time a median.

    ways: for every task {row: a function of no arguments that answers n of its instances}. Each
    is run once to count its FLOPs, which also warms up. Then all rows take turns, so that whatever
    else the machine does slows all of them alike. told: what is measured, for the progress bar.
    """
    flops = {row: [] for row in ways[0]}                # row -> a number for each task
    seconds = {row: [] for row in ways[0]}              # row -> one for each task and repeat
    bar = tqdm(total=len(ways) * len(ways[0]) * (1 + repeats), desc=f"cost{told}", leave=False,
               disable=None, dynamic_ncols=True)
    for task in ways:
        for row, run in task.items():
            flops[row].append(count_flops(run))
            bar.update(1)
        for _ in range(repeats):
            for row, run in task.items():
                seconds[row].append(timed(run))
                bar.update(1)                           # between two timings
    bar.close()
    costs = {}
    for row in ways[0]:
        ms = 1000 * float(np.median(seconds[row]))
        costs[row] = {"flops": float(np.mean(flops[row])) / n, "ms": ms / n}
    return costs


def count_flops(run) -> int:
    # PyTorch's counter does not know a CPU's flash attention: the counted run goes without.
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        run()
    return counter.get_total_flops()


def timed(run) -> float:
    """Seconds of one run, the GPU's work included."""
    synchronize()
    start = time.perf_counter()
    run()
    synchronize()
    return time.perf_counter() - start


def synchronize():
    if torch.cuda.is_available():
        torch.cuda.synchronize()


# -------------------------------------------------------------------------- the paper's formula

def formula(tokens) -> dict:
    """{row: N(t + n·i) for TAGI, over the N·n(t + i) of the instruction in the input}.

    t and i: mean tokens of instruction and instance. tokens: as `count_tokens` counts them.
    """
    instruction, instances, alone, together = tokens
    once = (instruction + instances) / together
    return {"meta": 1.0, "teachers": 1.0, "no_instruction": alone / together,
            "tagi": once, "tagi_shuffled": once, "tagi_empty": instances / together}


def count_tokens(texts, tagi, instruction, inputs: list[str], max_input: int):
    """What the formula counts for inputs of one task, each model's cut made, (4,).

    t as the hypernetwork reads the instruction, (definition, demonstrations); the sum of i as the
    student reads the inputs, and as a plain LLM does, up to max_input; the sum of t + i where an
    LLM reads both together. Demonstrations that do not fit are left out. texts: the module data,
    which words them.
    """
    def length(text):
        return len(tagi.tokenizer(text)["input_ids"])

    def fitting(limit, *its_input):
        """Tokens of the instruction, less demonstrations that do not fit beside the input."""
        definition, demonstrations = instruction
        write = texts.prompt_text if its_input else texts.instruction_text
        while demonstrations and length(write(definition, demonstrations, *its_input)) > limit:
            demonstrations = demonstrations[:-1]
        return length(texts.instruction_text(definition, demonstrations))

    limit, own_limit = tagi.options.max_instruction, tagi.options.max_input
    i = np.array([length(texts.instance_text(x)) for x in inputs])
    t = np.array([fitting(max_input, x) for x in inputs])
    return np.array([min(fitting(limit), limit), np.minimum(i, own_limit).sum(),
                     np.minimum(i, max_input).sum(), np.minimum(t + i, max_input).sum()])


# -------------------------------------------------------------------------- of the rows of a table

COST_TASKS = 4                                  # whose cost is measured
COST_P3_ROWS = 20                               # P3's are answered one by one


def of_rows(loaded, wanted, settings, n: int, repeats: int, way, texts) -> dict:
    """{demos: {row: {"flops": .., "ms": .., "formula": ..}}} of one instance, by those rows' code.

    For n instances of a task, every answer as long as the mean reference, adapters made and
    merged. P3: ranking a row's choices at batch size 1, as in the paper's Table 3. way(loaded, row,
    demos, pairs, size, limits) -> a function that answers these pairs; texts: the module data.
    """
    o, tagi = loaded.options, loaded.tagi
    measured = {SAME.get(row, row) for row in wanted} & set(MEASURED)
    size, limits = o.batch_size, {"max_new_tokens": o.max_output}
    if o.bench == "p3":
        n, size = COST_P3_ROWS, 1
        measured &= {"meta", "no_instruction", "tagi"}
    else:
        references = [x.outputs[0] for task in loaded.tasks for x in task.instances]
        lengths = [len(ids) for ids in tagi.tokenizer(references)["input_ids"]]
        length = min(round(np.mean(lengths)), o.max_output)
        limits = {"min_new_tokens": length, "max_new_tokens": length}
    costs = {}
    for demos in settings:
        ways, tokens = [], np.zeros(4)
        for task in loaded.tasks[::max(1, len(loaded.tasks) // COST_TASKS)][:COST_TASKS]:
            pairs = [(task, task.instances[k % len(task.instances)]) for k in range(n)]
            ways.append({row: way(loaded, row, demos, pairs, size, limits)
                         for row in MEASURED if row in measured})
            if o.bench != "p3":
                instruction = task.definitions[0], task.demonstrations[:demos]
                inputs = [x.input for _, x in pairs]
                tokens += count_tokens(texts, tagi, instruction, inputs, o.max_input)
        told = f" of the rows, {len(costs) + 1} of {len(settings)}"
        costs[demos] = measure(ways, n, repeats, told)
        if o.bench != "p3":
            ratios = formula(tokens)
            for row, its in costs[demos].items():
                its["formula"] = ratios[row]
            for row, other in SAME.items():
                costs[demos][row] = costs[demos].get(other, {})
    return costs
