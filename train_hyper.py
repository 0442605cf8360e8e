"""Train the hypernetwork: an instruction in, an adapter for the frozen LLM out.

    pretrain   Eq. 3: plain text cut at random into a | b | c; a goes into the hypernetwork as if it were an instruction,
               b into the adapted LLM, which predicts c
    finetune   Eq. 4-6: L = L_pred + λ1·L_kl + λ2·L_ins on training tasks; the student reads the instance alone, the
               teacher (the same frozen LLM with a LoRA teacher's weights) instruction and instance

Launch:
    python train_hyper.py --stage pretrain                      # the built-in suite, configs/sample.yaml
    python train_hyper.py --stage finetune
    torchrun --nproc-per-node 8 train_hyper.py --stage finetune --config configs/my.yaml

Table 4's ablations are one flag each: --no-pretrained, --no-fusion, --lambda-ce 0, --lambda-kl 0, --lambda-ins 0,
--no-hypernetwork.
"""
import itertools
import os
import sys

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

import common
import config
import data
import draw
import lora
import optim
import t5
from hypernet import TAGI
from train_teacher import load_teachers


def parser():
    p = config.Parser(__doc__)
    config.add_shared_options(p)
    g = p.add_argument_group("stage")
    g.add_argument("--stage", choices=["pretrain", "finetune"])
    g.add_argument("--name", help="folder under --runs; default: the stage's name")
    config.add_training_options(p, steps=20_000)
    g = p.add_argument_group("student")
    g.add_argument("--hypernetwork", default=True, help="generate LoRA weights; without: fusion alone", **config.flag)
    g.add_argument("--generator", default="attention", choices=["attention", "mean"],
                   help="how the instruction's states become a vector: attention per site, or the released code's mean")
    g.add_argument("--width", type=config.positive, default=128, help="generator width")
    g.add_argument("--bottleneck", type=config.positive, default=128, help="hidden width of the generator's MLPs")
    g.add_argument("--fusion", default=True, help="--no-fusion switches off both parts of Eq. 1", **config.flag)
    g.add_argument("--encoder-fusion", default=True, help="part 1: cross-attention in every encoder block", **config.flag)
    g.add_argument("--decoder-fusion", default=True, help="part 2: the decoder sees (I_x ; encoder output)", **config.flag)
    g.add_argument("--train-norms", default=False, help="the student's own layer norm gains", **config.flag)
    g.add_argument("--train-embeddings", default=False, help="the student's own change to the embeddings", **config.flag)
    g = p.add_argument_group("pretrain")
    g.add_argument("--text", help="plain text or JSON lines, one document a line; default: --data's corpus.txt")
    g.add_argument("--text-length", type=config.at_least(3), default=1024, help="tokens of a document cut into a | b | c")
    g = p.add_argument_group("finetune")
    g.add_argument("--pretrained", default=True, help="start from the pretrain stage", **config.flag)
    g.add_argument("--lambda-ce", type=config.finite, default=1.0, help="weight of L_pred")
    g.add_argument("--lambda-kl", type=config.finite, default=5.0, help="λ1, weight of L_kl")
    g.add_argument("--lambda-ins", type=number_or_sigmoid, default="sigmoid", help="λ2, a number or `sigmoid` (of L_ins)")
    g.add_argument("--alignment", default="factors", choices=["none", "factors", "product"], help="what L_ins compares")
    g.add_argument("--kl-teacher", default="lora", help="lora (Eq. 5), meta, or a checkpoint with the same vocabulary")
    g.add_argument("--teacher-demos", default=True, help="the teacher reads the demonstrations too, where the student's "
                   "instruction has them", **config.flag)
    g.add_argument("--temperature", type=config.at_least(0.01, config.finite), default=1.0,
                   help="of both distributions in L_kl, which is then x T²")
    g.add_argument("--standardize-logits", default=False, help="z-score both models' logits before the softmax",
                   **config.flag)
    return p


def number_or_sigmoid(text):
    return text if text == "sigmoid" else config.finite(text)


# ----------------------------------------------------------------------------------------------------------- losses

CHUNK = 256                        # target positions whose logits exist at a time; for T5's vocabulary 32 MB in float32


def kl_loss(student, teacher, temperature=1.0, standardize=False):
    """Eq. 5: KL(teacher ‖ student) summed over M target positions, × T². student, teacher: logits (M, V).

    The teacher gets no gradient.
    """
    student, teacher = student.float(), teacher.float().detach()
    if standardize:
        student, teacher = ((x - x.mean(-1, keepdim=True)) / (x.std(-1, keepdim=True) + 1e-6) for x in (student, teacher))
    log_s, log_t = F.log_softmax(student / temperature, -1), F.log_softmax(teacher / temperature, -1)
    return F.kl_div(log_s, log_t, reduction="sum", log_target=True) * temperature ** 2


def target_losses(student, teacher, targets, student_head, teacher_head, options, size=CHUNK):
    """L_pred and L_kl, each summed over M target positions. student, teacher: what their heads read, (M, D); targets: (M,).

    teacher None: L_kl is 0. Logits are made for `size` positions at a time, and once more in the backward pass: (M, V)
    never is.
    """
    def of_chunk(student, teacher, targets):
        logits = student_head(student).float()                                                  # (M', V)
        ce = F.cross_entropy(logits, targets, reduction="sum")
        if teacher is None:
            return ce, torch.zeros_like(ce)
        with torch.no_grad():
            teacher_logits = teacher_head(teacher)
        return ce, kl_loss(logits, teacher_logits, options.temperature, options.standardize_logits)

    chunks = zip(student.split(size), itertools.repeat(None) if teacher is None else teacher.split(size), targets.split(size))
    parts = [checkpoint(of_chunk, *chunk, use_reentrant=False, preserve_rng_state=False) for chunk in chunks]
    return [sum(part) for part in zip(*parts)]


def instruction_loss(weights, teacher, kind, lambda_ins):
    """λ2 · L_ins of each of K tasks, and L_ins, (K,) both (Eq. 6); λ2 = sigmoid(L_ins) is a weight, without gradient."""
    loss = lora.alignment_loss(weights, teacher, kind)
    return (torch.sigmoid(loss.detach()) if lambda_ins == "sigmoid" else lambda_ins) * loss, loss


# ---------------------------------------------------------------------------------------------------------- batches

def pretrain_batches(options, tagi, n_micro):
    """Text cut at random into a | b | c: K instructions, K inputs, K targets."""
    documents = data.read_documents(options.text)
    eos, pad, n = tagi.tokenizer.eos_token_id, tagi.tokenizer.pad_token_id, options.tasks * options.instances
    deal = draw.by_length(lambda *at: draw.draw_documents(documents, draw.generator(options.seed, *at), n), options, n_micro)

    def get_batch(step, micro):
        rng = draw.generator(options.seed, step, micro, 3)
        cuts = draw.cut_documents(deal(step, micro), tagi.tokenizer, 3, options.text_length, rng)
        a, b, c = ([part + [eos] for part in parts] for parts in zip(*cuts))
        return {"instruction": data.pad(a, pad, options.device), "input": data.pad(b, pad, options.device), "index": None,
                **targets(data.pad(c, data.IGNORE)[0], options.device)}

    return get_batch


def targets(labels, device):
    """Labels (N, C), and the flat positions of the M that count."""
    return {"labels": labels.to(device), "positions": data.target_positions(labels).to(device)}


def finetune_batches(options, tagi, n_micro, tasks=None):
    """K instructions, N instances: what the hypernetwork reads (K, S), the student (N, T), the teacher (N, T').

    Where the same instruction is drawn twice it is there once. index: instance -> instruction, (N,); None where the
    instances of each are a block of N / K. tasks: the training tasks, where they have been read.
    """
    tasks = data.training_tasks(options) if tasks is None else tasks
    units = sorted({data.unit_of(task, options.unit) for task in tasks})
    tokenizer, device, p = tagi.tokenizer, options.device, draw.chances(tasks, options.balance)

    def draws(step, micro):
        rng, demos = draw.generator(options.seed, step, micro), draw.n_demonstrations(options.demos, options.seed, step)
        return draw.draw_tasks(tasks, rng, options.tasks, options.instances, demos, options.vary_demos, p)

    deal = draw.by_length(draws, options, n_micro)

    def get_batch(step, micro):
        drawn = deal(step, micro)
        keys = [(units.index(data.unit_of(d.task, options.unit)), d.definition, tuple(d.demonstrations)) for d in drawn]
        distinct = list(dict.fromkeys(keys))
        index = torch.tensor([distinct.index(key) for key in keys], device=device).repeat_interleave(options.instances)
        pairs = [(d, prompt, *pair) for d in drawn for prompt, pair in zip(d.prompts, d.pairs)]
        batch = {
            "instruction": data.tokenize_instructed(tokenizer, [key[1:] for key in distinct], options.max_instruction, device),
            "input": data.tokenize(tokenizer, [data.instance_text(x) for _, _, x, _ in pairs], options.max_input, device),
            **targets(data.labels(tokenizer, [y for *_, y in pairs], options.max_output), device),
            "index": index if len(distinct) < len(drawn) else None,
            "unit": torch.tensor([unit for unit, *_ in distinct], device=device)}
        if options.lambda_kl:
            batch["prompt"] = data.tokenize_instructed(tokenizer, [
                (d.definition, d.demonstrations if options.teacher_demos else [], prompt) for d, prompt, _, _ in pairs],
                options.max_input, device)
        return batch

    return get_batch, units


# ------------------------------------------------------------------------------------------------------------- main

def settle(options):
    """Give options the values that others imply."""
    options.encoder_fusion &= options.fusion
    options.decoder_fusion &= options.fusion
    if options.stage == "pretrain":                                         # Eq. 3 has no teacher
        options.lambda_ce, options.lambda_kl, options.lambda_ins = 1.0, 0.0, 0.0


@common.command
def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    stage = parser().parse_known_args(argv)[0].stage
    if stage is None:
        raise common.UserError("which stage? --stage pretrain or --stage finetune")
    options = config.parse(parser(), stage, argv)
    settle(options)
    if not (options.hypernetwork or options.encoder_fusion or options.decoder_fusion):
        raise common.UserError("--no-hypernetwork with --no-fusion leaves nothing to train; drop one of them")
    if stage == "finetune" and not (options.lambda_ce or options.lambda_kl):
        raise common.UserError("--lambda-ce 0 with --lambda-kl 0 leaves no loss on the labels; drop one of them")
    rank, world = common.init_processes(options)
    common.run_stage(os.path.join(options.runs, options.name or stage), options, rank, world, train,
                     data.text_digest if stage == "pretrain" else data.tasks_digest)


def train(options, rank, world):
    folder = os.path.join(options.runs, options.name or options.stage)
    path = common.llm_path(options)
    llm, tokenizer = t5.load_llm(path, options.device, options.precision, options.attention)
    options.llm_is_relative = os.path.isdir(path)
    options.llm_path = os.path.relpath(path, folder) if options.llm_is_relative else path
    options.llm_fingerprint = t5.fingerprint(llm)
    options.tokenizer_digest = common.tokenizer_digest(tokenizer)
    tagi = TAGI(llm, tokenizer, options)
    parameters = tagi.trainable()
    if not parameters:
        raise common.UserError("these options leave nothing to train; drop --no-hypernetwork or --no-encoder-fusion")

    if options.checkpointing:
        lora.checkpoint_blocks(llm, tagi.repetition)

    # What the stage needs from earlier ones.
    tasks = teachers = teacher_llm = None
    if options.stage == "pretrain":
        get_batch = pretrain_batches(options, tagi, world * options.accumulate)
    else:
        tasks = data.training_tasks(options)
        get_batch, units = finetune_batches(options, tagi, world * options.accumulate, tasks)
        if aligns(options) or (options.lambda_kl and options.kl_teacher == "lora"):
            teachers = load_teachers(os.path.join(options.runs, "lora"), units, llm, options,
                                     f"python train_teacher.py --stage lora{common.config_flag(options)}")
        if options.lambda_kl and options.kl_teacher != "lora":
            teacher_llm = load_kl_teacher(options, path, tagi)
    optimizer = optim.make_optimizer(parameters, options)
    start = common.resume(folder, options, parameters, optimizer)
    if options.stage == "finetune" and options.pretrained and start == 0:
        start_from_pretrained(options, parameters)
    common.begin(folder, options, rank)
    if rank == 0 and tasks is not None:
        data.write_training_tasks(folder, tasks)
    stop, log = common.StopSignal(), common.Log(folder, options, start, rank)

    for step in range(start, options.steps):
        lr = optim.learning_rate(options, step)
        for group in optimizer.param_groups:
            group["lr"] = lr
        batches = [get_batch(step, rank + world * i) for i in range(options.accumulate)]
        # Means are over all label tokens, and all tasks, of the step's micro-batches and ranks.
        counts = [sum(len(b["positions"]) for b in batches),
                  sum(len(b["instruction"][0]) for b in batches), stop.asked]
        n_tokens, n_tasks, stopping = common.sum_over_ranks(counts, options.device)
        totals = {}
        for batch in batches:
            terms = losses(tagi, batch, teachers, teacher_llm, options, n_tokens, n_tasks)
            terms["loss"].backward()
            totals = {name: totals.get(name, 0) + term.detach() for name, term in terms.items()}

        common.sum_gradients(parameters.values())
        if options.clip:
            nn.utils.clip_grad_norm_(parameters.values(), options.clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        log(step + 1, lr, totals)
        finished = step + 1 == options.steps
        if rank == 0 and (finished or stopping or (step + 1) % options.save_every == 0):
            common.save_checkpoint(folder, options, parameters, optimizer, step + 1, finished)
        if stopping and not finished:
            common.leave(folder, step + 1, log)
    log.close()
    stop.leave_if_asked(options.device)


def aligns(options):
    """Whether L_ins takes part."""
    return options.hypernetwork and options.alignment != "none" and options.lambda_ins != 0


def losses(tagi, batch, teachers, teacher_llm, options, n_tokens, n_tasks):
    """{"loss", "ce", "kl", "ins"} of a micro-batch: its share in the means over the step's n_tokens labels and n_tasks tasks."""
    labels, positions, index = batch["labels"], batch["positions"], batch["index"]
    teacher = teacher_head = None
    if options.lambda_kl:                                                   # the teacher reads a and b (Eq. 5)
        with torch.no_grad():
            teacher, teacher_head = run_teacher(tagi, teacher_llm, teachers, options, batch)    # (M, D)
    ids, mask = batch["instruction"]
    first, last = tagi.encode_instruction(ids, mask)                                            # (K, S, D)
    adapter = tagi.generate_adapter(first, last, mask)                                          # once per instruction
    rows = adapter if index is None else adapter.select(index)
    student = tagi.target_states(rows, *batch["input"], labels, positions)                      # (M, D), it reads b
    ce, kl = target_losses(student, teacher, labels.flatten()[positions], lambda x: tagi.head(rows, x), teacher_head, options)
    terms = {"ce": ce / n_tokens}
    loss = options.lambda_ce * terms["ce"]
    if options.lambda_kl:
        terms["kl"] = kl / n_tokens
        loss = loss + options.lambda_kl * terms["kl"]
    if aligns(options):
        weighted, ins = instruction_loss(adapter.weights, lora.select(teachers, batch["unit"]), options.alignment,
                                         options.lambda_ins)
        terms["ins"] = ins.sum() / n_tasks
        loss = loss + weighted.sum() / n_tasks
    return {"loss": loss, **terms}


def run_teacher(tagi, teacher_llm, teachers, options, batch):
    """The model that reads instruction and input: what its head reads at the M target positions, (M, D), and the head."""
    ids, mask = batch["prompt"]
    with tagi.adapted(None) as llm:                                         # the same LLM, none of the student's parts
        if options.kl_teacher == "lora":                                    # row k for the k-th block, as the student's
            units = batch["unit"] if batch["index"] is None else batch["unit"][batch["index"]]
            lora.set_weights(llm, lora.select(teachers, units))
        llm = llm if teacher_llm is None else teacher_llm
        with lora.headless(llm):
            states = lora.logits(llm, ids, mask, batch["labels"]).flatten(0, 1).index_select(0, batch["positions"])
        head = llm.get_output_embeddings()

    def run_head(states):
        with tagi.adapted(None):
            return head(states)
    return states, run_head


def load_kl_teacher(options, llm_path, tagi):
    """Another checkpoint as KL teacher; None where it is the frozen LLM itself, which then needs no second copy."""
    path = common.meta_path(options) if options.kl_teacher == "meta" else options.kl_teacher
    if os.path.abspath(path) == os.path.abspath(llm_path):
        return None
    teacher, tokenizer = t5.load_llm(path, options.device, options.precision, options.attention)
    if tokenizer.get_vocab() != tagi.tokenizer.get_vocab() or teacher.config.vocab_size != tagi.llm.config.vocab_size:
        raise common.UserError(f"--kl-teacher {path} has another vocabulary than {llm_path}; choose one that shares it")
    return teacher.requires_grad_(False).eval()


def start_from_pretrained(options, parameters):
    """The parameters that the pretrain stage has too; parts that are switched off here are left out, new ones stay new."""
    folder = os.path.join(options.runs, "pretrain")
    if not common.is_finished(folder):
        raise common.UserError(f"{folder} is not there or not finished; first run python train_hyper.py --stage pretrain"
                               f"{common.config_flag(options)}, or start without it: --no-pretrained")
    old = vars(common.load_options(folder))
    # alpha has no shape: with another one the same weights would load and be another update.
    for key in ("llm_fingerprint", "rank", "alpha", "targets", "generator", "width", "bottleneck"):
        new = getattr(options, key)
        if (options.hypernetwork or key == "llm_fingerprint") and old.get(key, new) != new:
            raise common.UserError(f"{folder} was trained with {key} {old[key]}, not {new}; "
                                   "train it again with --fresh, or start without it: --no-pretrained")
    common.check_digests(options, folder, old)
    common.load_weights(parameters, folder, strict=False)


if __name__ == "__main__":
    main()
