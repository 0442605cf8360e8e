"""Score a trained TAGI on unseen tasks, with its controls, its baselines and its cost.

Launch:
    python evaluate.py                                      # the built-in suite
    python evaluate.py --checkpoint DIR                     # what it was trained for
    python -m bench.launch --nproc-per-node 8 evaluate.py --checkpoint DIR      # on 8 GPUs
    python evaluate.py --bench sni --data DIR --rows copy_input,copy_demo
    python evaluate.py --rescore predictions.jsonl --references test_references.jsonl
    python evaluate.py --ablations                          # of what bench/ablations.sh trained
    python evaluate.py --probe                              # does the instruction matter?

Here is who answers each row of the table, and what it reads: TAGI the input alone, its adapter
made from the task's instruction, another's or an empty one; an LLM the instruction with every
input, or the input alone. bench/ keeps, scores and tells the answers.
"""
import contextlib
import functools
import io
import itertools
import os

import common  # before PyTorch: Ctrl-C
import torch
from tqdm import tqdm
from transformers import LogitsProcessorList

import config
import data
import lora
import t5
from bench import ablations, cost, kept, machine, p3, predictions, probe, report, sample, terminal
from bench.kept import Kept
from bench.loaded import Loaded
from bench.predictions import HEURISTICS
from bench.report import ROWS
from bench.rouge import rouge_l     # noqa: F401  for those who import it from here
from bench.teachers import load_teachers
from common import UserError
from hypernet import TAGI           # noqa: F401  as that

TASKS_AT_ONCE = 16                              # whose adapters are held at a time
COST_INSTANCES = 100                            # of a task whose cost is measured
COST_REPEATS = 3                                # timed runs of each row and task

# --------------------------------------------------------------------------------------- options

def parser():
    p = config.Parser(__doc__)
    config.add_shared_options(p)
    add = p.add_argument_group("evaluation").add_argument
    add("--bench", choices=["sample", "sni", "p3"],
        help="sample: the built-in suite, exact match counts every sign; sni: tasks in "
             "Super-NaturalInstructions' layout, scored as its official script does; p3: the "
             "likeliest answer choice is the answer; default: what the checkpoint was trained for")
    add("--checkpoint", type=config.beside,
        help="folder of a finetuned TAGI, whose own options are the defaults of --data, --runs "
             "and the like; default: finetune under --runs")
    add("--split", default="test", help="test tasks, or validation to choose settings on")
    add("--eval-instances", type=config.positive,
        help="answer the first N instances of each task; default: 100, for p3 all")
    add("--normalize", default=False, **config.flag,
        help="p3: compare choices by their log-likelihood per token, not by its sum")
    add("--rows", help="make only these rows, with commas between; default: all, which are "
                       + ", ".join(ROWS))
    add("--batch-size", type=config.many,
        help="instances answered at a time; default: 250 for the built-in suite, else 20")
    add("--out", type=config.path,
        help="folder for the results; default: evaluate under --runs, or probe, and evaluate-2, .. "
             "where that holds those of other data, instances or models")
    add("--cost", default=True, **config.flag,
        help="measure what the rows cost, where tagi and meta are among them")
    add("--timeout", type=config.at_least(0.01, config.finite), default=30.0,
        help="minutes after which a process that does nothing ends all of them")
    add = p.add_argument_group("predictions that are there").add_argument
    add("--rescore", type=config.path,
        help="score a file of JSON lines with id and prediction; needs no model; default: none")
    add("--references", type=config.path,
        help="for a --rescore file without references: JSON lines with id and references (the "
             "official test_references.jsonl); default: those in that file")
    add = p.add_argument_group("ablations").add_argument
    add("--ablations", default=False, **config.flag,
        help="print the table of the runs that bench/ablations.sh left under --runs")
    add = p.add_argument_group("does the instruction matter?").add_argument
    add("--probe", default=False, **config.flag,
        help="score TAGI with the right instruction, a paraphrase and four wrong ones")
    add("--paraphrases", type=config.path,
        help="for --probe: a JSON file of {task name: its paraphrase}; default: the built-in "
             "suite's, or a task's second definition")
    return p


# --------------------------------------------------------------------- who answers, reading what
# An answerer is a function from a batch of (task, instance) pairs to texts. limits: of their
# lengths, as Transformers' `generate` has them.

def answerer(loaded, row, demos, tasks, limits):
    """How a row of the table answers instances of these tasks."""
    match row:
        case "tagi" | "tagi_shuffled" | "tagi_empty" | "tagi_unseen_wording":
            return student(loaded, instructed(loaded, row, demos, tasks), tasks, limits)
        case "meta" | "meta_unseen_wording":
            return reader(loaded, demos, limits, llm=loaded.llm(t5.meta_path(loaded.options)))
        case "meta_shuffled":
            llm = loaded.llm(t5.meta_path(loaded.options))
            return reader(loaded, demos, limits, llm=llm, givers=loaded.givers)
        case "no_finetuning":
            return reader(loaded, demos, limits, llm=loaded.llm(t5.base_path(loaded.options)))
        case "no_instruction":
            return reader(loaded, None, limits)
        case "teachers" | "meta_lora":
            folder, unit, command = loaded.teachers_of(row)
            names, tagi = loaded.teacher_names(tasks, unit), loaded.tagi
            stacked = load_teachers(folder, names, tagi.llm, vars(tagi.options), command)
            number = {task.name: names.index(data.teacher_of(task, unit)) for task in tasks}
            return reader(loaded, demos, limits, teachers=(stacked, number))
        case "copy_input":
            return lambda pairs: [x.input for _, x in pairs]
        case "copy_demo":
            return lambda pairs: [task.demonstrations[0][1] if task.demonstrations else ""
                                  for task, _ in pairs]


def instructed(loaded, row, demos, tasks):
    """TAGI's adapters for these tasks, a row each, of the instruction that it is given there."""
    definitions, demonstrations = [], []
    for task in tasks:
        giver = loaded.givers[task.name] if row == "tagi_shuffled" else task
        empty = row == "tagi_empty"
        definitions.append("" if empty else giver.definitions[0])
        demonstrations.append([] if empty else giver.demonstrations[:demos])
    return loaded.tagi.adapt(definitions, demonstrations)


def student(loaded, adapters, tasks, limits):
    """TAGI, which reads the input alone; row k of the adapters is for tasks[k]."""
    o, tagi = loaded.options, loaded.tagi
    number = {task.name: k for k, task in enumerate(tasks)}

    def answer(pairs):
        index = [number[task.name] for task, _ in pairs]
        if len(set(index)) == 1:
            index = index[:1]                   # one row for all, not a copy for each
        rows = adapters if len(adapters) == 1 else adapters.select(index)
        inputs = [x.input if x.input.strip() else "." for _, x in pairs]    # "" is read as "."
        if o.bench != "p3":
            finite = LogitsProcessorList([predictions.RefuseNaN(pairs)])
            return tagi.generate(inputs, rows, batch_size=len(pairs), logits_processor=finite,
                                 **limits)
        choices = [x.choices for _, x in pairs]
        scores = tagi.score_choices(inputs, choices, rows, len(pairs), o.normalize, **limits)
        return predictions.likeliest(pairs, scores)
    return answer


def reader(loaded, demos, limits, llm=None, teachers=None, givers=None):
    """An LLM that reads the instruction with every input; demos None: the input alone.

    llm: None for the frozen one. teachers: LoRA weights for it, stacked, and {task: their row}.
    givers: {task: the one whose instruction is read}; None: its own.
    """
    def answer(pairs):
        weights, items = None, []
        if teachers is not None:
            stacked, number = teachers
            index = [number[task.name] for task, _ in pairs]
            one = len(set(index)) == 1
            weights = lora.select(stacked, index[0] if one else torch.tensor(index))
        for task, x in pairs:
            if demos is None:
                items.append(("", [], x.input))
            else:
                giver = givers[task.name] if givers else task
                text = x.prompt or x.input
                items.append((giver.definitions[0], giver.demonstrations[:demos], text))
        return ask(loaded, items, pairs, limits, llm, weights)
    return answer


@torch.no_grad()
def ask(loaded, items, pairs, limits, llm=None, weights=None) -> list[str]:
    """What a plain LLM answers to N (definition, demonstrations, input) items of N pairs.

    For P3 the likeliest of each pair's choices, else what it generates greedily. weights: of
    LoRA, (r, D_in) and (D_out, r) for all items or (N, r, D_in) and (N, D_out, r).
    """
    o, tagi = loaded.options, loaded.tagi
    ids, mask = data.tokenize_instructed(tagi.tokenizer, items, o.max_input, tagi.device,
                                         verbatim=o.bench == "p3")              # (N, T)
    with tagi.adapted(None) as frozen:
        lora.set_weights(frozen, weights)
        llm = llm or frozen
        if o.bench != "p3":
            finite = LogitsProcessorList([predictions.RefuseNaN(pairs)])
            out = llm.generate(input_ids=ids, attention_mask=mask, do_sample=False, num_beams=1,
                               logits_processor=finite, **limits)
            return tagi.tokenizer.batch_decode(out, skip_special_tokens=True)
        encoded = llm.get_encoder()(input_ids=ids, attention_mask=mask)[0]      # (N, T, D)
        choices = [x.choices for _, x in pairs]
        labels, owner = data.choice_labels(tagi.tokenizer, choices, limits["max_new_tokens"],
                                           ids.device)                          # (M, C), (M,)
        if weights is not None and next(iter(weights.values()))[0].dim() == 3:
            lora.set_weights(frozen, lora.select(weights, owner))               # (M, r, D_in), ..
        scores = t5.score_choices(llm, encoded, mask, labels, owner, o.normalize)
    return predictions.likeliest(pairs, scores)


def predict(loaded, row, demos, answers, at="", tasks=None, name=None) -> None:
    """Answer this process's share of a row's instances that `answers`, a Kept, lacks.

    Batches are those that one process forms when nothing is there, and are shared out whole: their
    padding, and so the answers, do not depend on how many there are or where it was stopped. With
    `tasks` those are answered as the row's, under a name of their own. at: told with the progress.
    """
    o, name = loaded.options, name or ROWS[row]
    shares = []                                 # (tasks whose adapters are held, batches of them)
    for group in data.batches(tasks or loaded.tasks_of(row), TASKS_AT_ONCE):
        pairs, todo = [(task, x) for task in group for x in task.instances], []
        for batch in data.batches(pairs, o.batch_size):
            if any((name, demos, task.name, x.id) not in answers.done for task, x in batch):
                todo.append(batch)
        shares.append((group, loaded.share(todo)))
    bar = tqdm(total=sum(len(batch) for _, batches in shares for batch in batches), leave=False,
               disable=None if loaded.rank == 0 else True, dynamic_ncols=True,
               desc=f"{at}{name}, {report.SETTINGS[demos]}{loaded.told}")
    for group, batches in shares:
        if batches:
            answer = answerer(loaded, row, demos, group, {"max_new_tokens": o.max_output})
        for batch in batches:
            texts, records = answer(batch), []
            for (task, x), text in zip(batch, texts, strict=True):
                if (name, demos, task.name, x.id) not in answers.done:
                    records.append(predictions.record_of(o.bench, name, demos, task, x, text))
            answers.append(records)
            bar.update(len(batch))
    bar.close()


# ------------------------------------------------------------------------------------------- cost

def measure_costs(loaded, wanted, settings) -> dict:
    """{demos: {row: {"flops": .., "ms": .., "formula": ..}}} of one instance (`cost.of_rows`)."""
    return cost.of_rows(loaded, wanted, settings, COST_INSTANCES, COST_REPEATS, way, data)


def way(loaded, row, demos, pairs, size, limits):
    """A function of no arguments that answers these pairs, all of one task, as the row does.

    For what it costs: TAGI makes its adapter anew, and merges it, as one does for one task.
    """
    task, answer = pairs[0][0], None
    if row == "teachers":                       # all cost the same; a test task has none
        fresh = lora.init_weights(loaded.tagi.llm, loaded.tagi.options.rank, 0, 1)
        answer = reader(loaded, demos, limits, teachers=(fresh, {task.name: 0}))
    elif not row.startswith("tagi"):
        answer = answerer(loaded, row, demos, [task], limits)

    def in_batches(answer):
        for batch in data.batches(pairs, size):
            answer(batch)

    def adapted_and_merged():
        adapter = instructed(loaded, row, demos, [task])
        loaded.tagi.merge(adapter)
        in_batches(student(loaded, adapter, [task], limits))
        loaded.tagi.unmerge()

    return functools.partial(in_batches, answer) if answer else adapted_and_merged


# ------------------------------------------------------------------------------------------- main

def load(options, rank: int, world: int) -> Loaded:
    """Tasks and models. Raises UserError where benchmark, data and model are of two kinds."""
    sample.ensure_suite(options.data, rank)
    common.wait_for_all_ranks()                 # rank 0 may be writing it
    options.bench = options.bench or predictions.bench_for(options)
    if options.bench == "sni" and sample.is_default(options.data):
        raise UserError(f"--bench sni needs --data, a folder in its layout: {data.GET_SNI}")
    if (options.bench == "p3") != (options.format == "p3"):
        raise UserError(f"--bench {options.bench} with --format {options.format}: a model reads P3 "
                        "as it was trained to; name a checkpoint or config of the other kind, or "
                        "another --bench")
    options.batch_size = options.batch_size or (250 if options.bench == "sample" else 20)
    options.eval_instances = options.eval_instances or (None if options.bench == "p3" else 100)
    if rank == 0:
        with contextlib.redirect_stdout(io.StringIO()) as told:
            config.tell(options, parser(), "probe" if options.probe else "evaluate")
        report.say(told.getvalue().rstrip())
    return Loaded(options, rank, world)


def run(options, rank: int, world: int) -> None:
    """Answer each row at Def and Def + 2 Pos, score it, measure its cost; write and print them."""
    loaded = load(options, rank, world)
    wanted = predictions.chosen_rows(loaded, loaded.has_unseen_wording)
    if set(wanted) - HEURISTICS:
        loaded.check_training_tasks()
    sources = predictions.sources_of(loaded, wanted)
    options.out = options.out or kept.place(os.path.join(options.runs, "evaluate"), sources, rank)
    settings = (0,) if options.bench == "p3" else tuple(report.SETTINGS)
    asked = list(itertools.product(wanted, settings))
    with Kept(options, sources, rank, world) as answers:
        keys = []
        for row, demos in asked:
            keys += predictions.keys_of(ROWS[row], demos, loaded.tasks_of(row))
        answers.tell(keys)
        for n, (row, demos) in enumerate(asked, 1):
            predict(loaded, row, demos, answers, f"{n} of {len(asked)}: ")
        if not answers.gather(keys):
            return                                      # the rest is for one process
        scores = []
        for row, demos in asked:
            records = answers.records(ROWS[row], demos, loaded.tasks_of(row))
            its = report.score(ROWS[row], demos, records, strict=options.bench != "sni")
            scores.append({"key": row} | its)
        results = kept.earlier_results(options.out)
        results = describe(loaded, wanted, results) | {"results": report.join(results, scores)}
        report.write(results, options.out)
        if options.cost and {"tagi", "meta"} <= set(wanted):    # all are told relative to meta's
            report.say("measuring what the rows cost; --no-cost leaves it out")
            costs = measure_costs(loaded, [r["key"] for r in results["results"]], settings)
            for result in results["results"]:
                result |= costs.get(result["demos"], {}).get(result["key"], {})
            report.write(results, options.out)
    report.tell(results, options.out, options.checkpoint or f"{options.runs}/finetune")


def describe(loaded, wanted: list[str], before: dict) -> dict:
    """What results.json says beside the rows. before: what it held of the same question."""
    options, published = loaded.options, before.get("published", [])
    if options.bench == "p3":
        tasks, listed = {task.category for task in loaded.tasks}, list(p3.TEST)
        published = report.published_p3(loaded.tagi.llm.config)
    else:
        tasks, listed = loaded.tasks, data.listed_tasks(options.data, options.split)
        official = options.bench == "sni" and report.is_official(options.split, listed)
        if official and set(wanted) - HEURISTICS:
            published = report.published_sni(loaded.tagi.llm.config)
    # Which checkpoint, from here, so that both can be moved; copied answers are of none.
    evaluated = {key: before[key] for key in ("checkpoint", "step") if key in before}
    if set(wanted) - HEURISTICS:
        place = os.path.relpath(os.path.realpath(loaded.checkpoint), os.path.realpath(options.out))
        step = common.read_record(loaded.checkpoint).get("step")
        evaluated = {"checkpoint": place, "step": step}
    return {"bench": options.bench, "split": options.split, "tasks": len(tasks),
            "listed": len(listed), "published": published, "versions": machine.versions(),
            **evaluated}


@common.command
@terminal.printing
def main(argv=None):
    argv = predictions.with_checkpoint(parser(), argv)
    options = config.parse(parser(), "evaluate", argv)
    if options.references and not options.rescore:
        raise UserError("--references belongs to --rescore FILE; name the predictions too")
    if options.paraphrases and not options.probe:
        raise UserError("--paraphrases belongs to --probe; name that too")
    if options.probe:
        config.refuse(argv, probe.NOT_WITH, "--probe says by itself who answers what")
    if options.rescore or options.ablations:
        if common.launched_processes() > 1:
            raise UserError("--rescore and --ablations need one process: python evaluate.py")
        if options.ablations:
            return ablations.tell(options.runs, options.split)
        return kept.rescore(options)
    config.refuse(argv, config.OF_A_CHECKPOINT, "an evaluation takes it from the checkpoint")
    if not config.given(argv, ["llm"]):
        if t5.is_meta_itself(options):
            options.meta_model = options.meta_model or options.model
        options.llm = None                      # the checkpoint's own
    rank, world = common.init_processes(options.device, options.timeout)
    with kept.stoppable(options, rank):
        if options.probe:
            return probe.run(load(options, rank, world), predict)
        run(options, rank, world)


if __name__ == "__main__":
    main()
