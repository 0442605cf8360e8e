"""Train the hypernetwork: an instruction in, an adapter for the frozen LLM out.

    pretrain   Eq. 3: plain text cut at random into a | b | c; a goes into the hypernetwork as if it
               were an instruction, b into the adapted LLM, which predicts c
    finetune   Eq. 4-6: L = L_pred + λ1·L_kl + λ2·L_ins on training tasks; the student reads the
               instance alone, the teacher (the same frozen LLM with a LoRA teacher's weights)
               instruction and instance

Launch:
    python train_hyper.py --stage pretrain                      # the built-in suite
    python train_hyper.py --stage finetune
    torchrun --nproc-per-node 8 train_hyper.py --stage finetune --config configs/my.yaml

Table 4's ablations are one option each: --no-pretrained, --fusion none, --lambda-ce 0,
--lambda-kl 0, --lambda-ins 0, --generator none.
"""
import argparse
import os

import common  # before PyTorch: Ctrl-C
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

import config
import data
import lora
import t5
from bench import optim, recorded, records, sample, shard, terminal
from bench.runs import Run
from bench.teachers import (load_kl_teacher, load_teachers, rows_of, start_from_pretrained,
                            svd_factors)
from bench.validation import Validation, check_stage
from common import UserError
from hypernet import TAGI

# Letters of the shapes in comments:
#   K  instructions (tasks)    S  instruction tokens    D  d_model       r  LoRA rank
#   N  instances               T  input tokens          C  target tokens
#   M  target positions that count, of the N·C          V  vocabulary    P  sites of one shape

# --------------------------------------------------------------------------------------- options

def number_or_sigmoid(text):                    # the type of --lambda-ins
    return text if text == "sigmoid" else config.weight(text)


def parser():
    p = config.Parser(__doc__)
    config.add_shared_options(p)
    config.add_training_options(p, ["pretrain", "finetune"], steps=20_000, text_length=1024)
    recorded.add_student_options(p)
    add = p.add_argument_group("finetune").add_argument
    add("--pretrained", default=True, **config.flag, help="start from the pretrain stage")
    add("--lambda-ce", type=config.weight, default=1.0, help="weight of L_pred")
    add("--lambda-kl", type=config.weight, default=5.0, help="λ1, weight of L_kl")
    add("--lambda-ins", type=number_or_sigmoid, default="sigmoid",
        help="λ2, weight of L_ins: a number, or sigmoid (of L_ins)")
    add("--alignment", default="factors", choices=["none", "factors", "product", "svd"],
        help="what L_ins compares: A with A and B with B, the products B·A, or (svd) A and B with "
             "those that an SVD makes of the teachers' products")
    add("--kl-teacher", type=config.beside, default="lora",
        help="lora (Eq. 5), meta (stage meta), or a checkpoint with the same vocabulary")
    add("--teacher-demos", default=True, **config.flag,
        help="the teacher reads demonstrations too, where the student's instruction has them")
    add("--temperature", type=config.number(0.01, 1000, float), default=1.0,
        help="of both distributions in L_kl, which is then multiplied by its square")
    add("--standardize-logits", default=False, **config.flag,
        help="z-score both models' logits before the softmax of L_kl, as the released code can")
    return p


def get_options(argv=None):
    """The options of the stage that is asked for. Raises UserError where nothing is to train."""
    stage = parser().parse_known_args(argv)[0].stage
    if stage is None:
        raise UserError("which stage? --stage pretrain or --stage finetune")
    options = config.parse(parser(), stage, argv)
    check_stage(options, stage)
    if options.generator == "none" and options.fusion == "none":
        raise UserError("--generator none with --fusion none leaves nothing to train; drop one of "
                        "them")
    if stage == "pretrain":                                     # Eq. 3 has no teacher
        options.lambda_ce, options.lambda_kl, options.lambda_ins = 1.0, 0.0, 0.0
    elif not (options.lambda_ce or options.lambda_kl):
        raise UserError("--lambda-ce 0 with --lambda-kl 0 leaves no loss on the labels; drop one "
                        "of them")
    return options


def aligns(options) -> bool:
    """Whether L_ins takes part."""
    return options.generator != "none" and options.alignment != "none" and options.lambda_ins != 0


# ------------------------------------------------------------------------------------------ data

def located(labels, device):
    # (N, C), and where the M that count are in N·C: found before they go to a GPU
    return {"labels": labels.to(device), "positions": data.target_positions(labels).to(device)}


def pretrain_batches(options, tagi, n_micro):
    """Text cut at random into a | b | c: K instructions, K inputs, K targets."""
    documents = records.read_documents(options.text)
    tokenizer, device = tagi.tokenizer, options.device
    t5.check_knows(tokenizer, documents, options.text)
    n = options.tasks * options.instances

    def draws(step, micro):
        return data.draw_documents(documents, data.rng_of(options.seed, step, micro), n)

    deal = data.by_length(draws, options.bucket_steps, options.seed, n_micro)

    def get_batch(step, micro):
        rng = data.rng_of(options.seed, step, micro, 3)
        drawn = deal(step, micro)
        cuts = data.cut_documents(drawn, tokenizer, 3, options.text_length, rng)
        a, b, c = [], [], []                    # each a list of K rows of ids
        for parts in cuts:
            for rows, ids in zip((a, b, c), parts):
                rows.append(ids + [tokenizer.eos_token_id])
        return {"drawn": drawn,
                "instruction": data.pad(a, tokenizer.pad_token_id, device),
                "input": data.pad(b, tokenizer.pad_token_id, device),
                **located(data.pad(c, data.IGNORE)[0], device), "index": None}
    return get_batch


def finetune_batches(options, tagi, n_micro, tasks):
    """(the function (step, micro) -> batch, the names of the tasks' teachers)."""
    teachers = sorted({data.teacher_of(task, options.unit) for task in tasks})
    p = data.chances(tasks, options.balance)

    def draws(step, micro):
        rng = data.rng_of(options.seed, step, micro)
        demos = data.n_demonstrations(options.demos, options.seed, step)
        return data.draw_tasks(tasks, rng, options.tasks, options.instances, demos,
                               options.vary_demos, p)

    deal = data.by_length(draws, options.bucket_steps, options.seed, n_micro)

    def get_batch(step, micro):
        return finetune_batch(options, tagi, deal(step, micro), teachers)
    return get_batch, teachers


def finetune_batch(options, tagi, drawn, teachers=()):
    """A micro-batch of these draws; teachers: the names that its numbers of teachers are among."""
    tokenizer, device, verbatim = tagi.tokenizer, options.device, options.format == "p3"
    # An instruction that is drawn twice is there once, for all its instances.
    rows = {}                                   # (teacher, definition, demonstrations) -> number
    index, inputs, outputs, prompts = [], [], [], []            # of N instances
    for draw in drawn:
        teacher = data.teacher_of(draw.task, options.unit)
        key = (teacher, draw.definition, tuple(draw.demonstrations))
        row = rows.setdefault(key, len(rows))
        demos = draw.demonstrations if options.teacher_demos else []
        for prompt, (its_input, output) in zip(draw.prompts, draw.pairs):
            index.append(row)
            inputs.append(data.instance_text(its_input, verbatim))
            outputs.append(output)
            prompts.append((draw.definition, demos, prompt))
    batch = {
        "drawn": drawn,                         # for an error that names tasks
        # what the hypernetwork reads, (K, S), and the student, (N, T), each with its mask
        "instruction": data.tokenize_instructed(tokenizer, [key[1:] for key in rows],
                                                options.max_instruction, device, verbatim),
        "input": data.tokenize(tokenizer, inputs, options.max_input, device),
        **located(data.labels(tokenizer, outputs, options.max_output), device),         # (N, C)
        # instance -> instruction, (N,); None where each one's instances are a block of N / K
        "index": torch.tensor(index, device=device) if len(rows) < len(drawn) else None}
    if teachers:
        numbers = [teachers.index(key[0]) for key in rows]
        batch["teacher"] = torch.tensor(numbers, device=device)                         # (K,)
    if options.lambda_kl:                       # what the teacher reads
        batch["prompt"] = data.tokenize_instructed(tokenizer, prompts, options.max_input, device,
                                                   verbatim)
    return batch


# ----------------------------------------------------------------------------------------- model

def make_student(options, run):
    """(the TAGI to train, where its frozen LLM is)."""
    path = t5.llm_path(options, run.found)
    llm, tokenizer = t5.load_llm(path, shard.home(options), options.precision, options.attention)
    is_local = os.path.isdir(path)
    run.found |= {
        "llm_is_relative": is_local,            # so that runs/ can be moved
        "llm_path": t5.path_from(run.folder, path) if is_local else path,
        "llm_fingerprint": t5.fingerprint(llm),
        "tokenizer_digest": t5.tokenizer_digest(tokenizer)}
    tagi = TAGI(llm, tokenizer, options)
    if not tagi.trainable():                    # part 2 of fusion has no weights
        raise UserError("these options leave nothing to train; choose --fusion both")
    if options.checkpointing:
        t5.checkpoint_blocks(llm, tagi.repetition)
    return tagi, path


def run_teacher(tagi, teacher_llm, teachers, options, batch):
    """(what the teacher's head reads at the M target positions, (M, D); the head)."""
    ids, mask = batch["prompt"]
    with tagi.adapted(None) as llm:             # without any of the student's parts
        # Eq. 5: with LoRA teachers' weights, row k for the k-th block as the student's.
        if options.kl_teacher == "lora":
            its = batch["teacher"]
            its = its if batch["index"] is None else its[batch["index"]]
            lora.set_weights(llm, rows_of(teachers, its))
        # Or another LLM.
        llm = llm if teacher_llm is None else teacher_llm
        with t5.headless(llm):
            states = t5.logits(llm, ids, mask, batch["labels"])                     # (N, C, D)
        head = llm.get_output_embeddings()

    def run_head(states):
        with tagi.adapted(None):
            return head(states)
    return states.flatten(0, 1).index_select(0, batch["positions"]), run_head


# ---------------------------------------------------------------------------------------- losses

CHUNK = 256     # target positions whose logits exist at a time; of T5's vocabulary 32 MB in float32


def target_losses(student, teacher, labels, student_head, teacher_head, options, size=CHUNK):
    """L_pred (Eq. 3, 4) and L_kl (Eq. 5), each summed over M target positions.

    student, teacher: what their heads read, (M, D); labels: (M,). teacher None: L_kl is 0.
    """
    # Logits are made for `size` positions at a time, and once more in the backward pass: all of
    # (M, V) never exists.
    def of_chunk(student, teacher, labels):
        logits = student_head(student).float()                                      # (size, V)
        ce = F.cross_entropy(logits, labels, reduction="sum")
        if teacher is None:
            return ce, torch.zeros_like(ce)
        with torch.no_grad():
            teacher_logits = teacher_head(teacher)                                  # (size, V)
        return ce, kl_loss(logits, teacher_logits, options.temperature, options.standardize_logits)

    ce = kl = 0.0
    for start in range(0, len(labels), size):
        rows = slice(start, start + size)
        its_teacher = None if teacher is None else teacher[rows]
        its_ce, its_kl = checkpoint(of_chunk, student[rows], its_teacher, labels[rows],
                                    use_reentrant=False, preserve_rng_state=False)
        ce, kl = ce + its_ce, kl + its_kl
    return ce, kl


def kl_loss(student, teacher, temperature=1.0, standardize=False):
    """Eq. 5: KL(teacher ‖ student) summed over M target positions, × T²; logits (M, V) both.

    The teacher gets no gradient.
    """
    student, teacher = student.float(), teacher.float().detach()
    if standardize:
        student, teacher = z_scores(student), z_scores(teacher)
    log_s = F.log_softmax(student / temperature, -1)
    log_t = F.log_softmax(teacher / temperature, -1)
    return F.kl_div(log_s, log_t, reduction="sum", log_target=True) * temperature ** 2


def z_scores(logits):
    return (logits - logits.mean(-1, keepdim=True)) / (logits.std(-1, keepdim=True) + 1e-6)


def instruction_loss(generated, teacher, kind, lambda_ins):
    """Eq. 6: λ2 · L_ins of each of K tasks, and L_ins, (K,) both."""
    loss = alignment_loss(generated, teacher, kind)
    if lambda_ins == "sigmoid":                 # a weight, so it carries no gradient
        lambda_ins = torch.sigmoid(loss.detach())
    return lambda_ins * loss, loss


def alignment_loss(generated, teacher, kind):
    """L_ins of each of K tasks, (K,): mean squared error between two sets of LoRA weights."""
    # ⟨B1·A1, B2·A2⟩ for each site and task, (P, K), from r × r Gram matrices, without forming
    # D_out × D_in: ⟨B1·A1, B2·A2⟩ = ⟨B1ᵀB2, A1·A2ᵀ⟩.
    def inner(A1, B1, A2, B2):
        return ((B1.mT @ B2) * (A1 @ A2.mT)).sum((-2, -1))

    shapes = {}                                 # (shape of A, of B) -> its sites, taken together
    for name, (A, B) in generated.items():
        shapes.setdefault((A.shape, B.shape), []).append(name)
    total, count = 0.0, 0
    for names in shapes.values():
        A = torch.stack([generated[name][0] for name in names])                 # (P, K, r, D_in)
        B = torch.stack([generated[name][1] for name in names])                 # (P, K, D_out, r)
        A_t = torch.stack([teacher[name][0] for name in names])
        B_t = torch.stack([teacher[name][1] for name in names])
        if kind == "product":                   # ‖BA − B'A'‖², of what the layer computes: unique
            errors = inner(A, B, A, B) - 2 * inner(A, B, A_t, B_t) + inner(A_t, B_t, A_t, B_t)
            count += len(names) * B.shape[-2] * A.shape[-1]
        else:                                   # factors, the paper's: A against A, B against B;
                                                # svd: the same, of teachers factored anew
            errors = (A - A_t).square().sum((-2, -1)) + (B - B_t).square().sum((-2, -1))
            count += len(names) * (A[0, 0].numel() + B[0, 0].numel())
        total = total + errors.sum(0)                                               # (K,)
    return total / count


def losses(tagi, batch, teachers, teacher_llm, options, n_tokens, n_tasks):
    """Eq. 4: {"loss", "ce", "kl", "ins"} of a micro-batch, as shares of the step's means."""
    labels, positions, index = batch["labels"], batch["positions"], batch["index"]
    # The teacher reads a and b.
    teacher = teacher_head = None
    if options.lambda_kl:
        with torch.no_grad():
            teacher, teacher_head = run_teacher(tagi, teacher_llm, teachers, options, batch)
    # The hypernetwork reads a, once for each instruction.
    first, last = tagi.encode_instruction(*batch["instruction"])                    # (K, S, D)
    adapter = tagi.generate_adapter(first, last, batch["instruction"][1])
    rows = adapter if index is None else adapter.select(index)
    # The student reads b.
    student = tagi.target_states(rows, *batch["input"], labels, positions)          # (M, D)
    ce, kl = target_losses(student, teacher, labels.flatten()[positions],
                           lambda states: tagi.head(rows, states), teacher_head, options)
    # n_tokens and n_tasks are labels and tasks of all the step's micro-batches and ranks.
    terms = {"ce": ce / n_tokens}
    loss = options.lambda_ce * terms["ce"]
    if options.lambda_kl:
        terms["kl"] = kl / n_tokens
        loss = loss + options.lambda_kl * terms["kl"]
    if aligns(options):
        its_teachers = rows_of(teachers, batch["teacher"])
        weighted, ins = instruction_loss(adapter.weights, its_teachers, options.alignment,
                                         options.lambda_ins)
        terms["ins"] = ins.sum() / n_tasks
        loss = loss + weighted.sum() / n_tasks
    return {"loss": loss, **terms}


def validation_loss(tagi, options):
    """The function draws -> (L_pred summed over their label tokens, how many there are)."""
    plain = argparse.Namespace(**vars(options) | {"lambda_kl": 0.0, "lambda_ins": 0.0})

    def loss_of(draws):
        batch = finetune_batch(plain, tagi, draws)
        return losses(tagi, batch, None, None, plain, 1, 1)["ce"], len(batch["positions"])
    return loss_of


# ------------------------------------------------------------------------------------------ loop

def train(options, run):
    """Train a student in this run's folder."""
    # Model.
    tagi, path = make_student(options, run)
    parameters = tagi.trainable()
    # Data, and the teachers.
    n_micro = run.world * options.accumulate
    tasks = teachers = teacher_llm = None
    if options.stage == "pretrain":
        get_batch = pretrain_batches(options, tagi, n_micro)
    else:
        tasks = data.training_tasks(options)
        t5.check_knows(tagi.tokenizer, data.texts_of(tasks), options.data)
        get_batch, names = finetune_batches(options, tagi, n_micro, tasks)
        if aligns(options) or (options.lambda_kl and options.kl_teacher == "lora"):
            command = f"python {config.script('train_teacher.py')} --stage lora"
            command += t5.config_flag(options)
            teachers = load_teachers(f"{options.runs}/lora", names, tagi.llm, run.record(), command)
            if options.alignment == "svd":      # the same products, so L_kl's teachers stay as is
                teachers = svd_factors(teachers)
        if options.lambda_kl and options.kl_teacher != "lora":
            teacher_llm = load_kl_teacher(options, run, path, tagi)
    if options.validate_every:
        its_loss = validation_loss(tagi, options)
        run.validation = Validation(run, tagi, its_loss, tasks, path, shuffle=True)

    # Where it starts: at 0, or where a run that was stopped left off.
    optimizer = optim.make_optimizer(parameters, options)
    start = run.resume(parameters, optimizer)
    if options.stage == "finetune" and options.pretrained and start == 0:
        start_from_pretrained(options, run, parameters)
    run.begin(path)
    if run.rank == 0 and tasks is not None:
        data.write_training_tasks(run.folder, tasks)
    parameters, optimizer, run.saved = optim.deal_out(parameters, optimizer, options,
                                                      [tagi.llm, teacher_llm], tagi)

    def save(folder, step, finished, optimizer=run.saved):
        weights = run.saved.weights
        common.save_checkpoint(folder, run.record(), weights, optimizer, step, finished)

    for step in range(start, options.steps):
        lr = optim.learning_rate(options, step)
        for group in optimizer.param_groups:
            group["lr"] = lr

        # This rank's micro-batches, numbered among all ranks'.
        micros = [run.rank + run.world * i for i in range(options.accumulate)]
        batches = [get_batch(step, micro) for micro in micros]

        # Means are over all label tokens, and all tasks, of the step's micro-batches and ranks.
        n_tokens = sum(len(batch["positions"]) for batch in batches)
        n_tasks = sum(len(batch["instruction"][0]) for batch in batches)
        counts = [n_tokens, n_tasks, run.stop.asked]
        n_tokens, n_tasks, stopping = common.sum_over_ranks(counts, options.device)
        totals = {}
        for batch in batches:
            terms = losses(tagi, batch, teachers, teacher_llm, options, n_tokens, n_tasks)
            terms["loss"].backward()
            for name, term in terms.items():
                totals[name] = totals.get(name, 0) + term.detach()

        # One step with the gradients of all ranks, unless they are no numbers.
        optim.sum_gradients(parameters.values())
        norm = optim.clip_gradients(parameters.values(), options.clip)
        if run.is_finite(step, totals["loss"], norm, lambda: [batch["drawn"] for batch in batches]):
            optimizer.step()
        optimizer.zero_grad(set_to_none=True)

        # Log, save when due, leave after a Ctrl-C.
        run.after_step(step + 1, lr, totals, stopping, save, norm=norm, tokens=n_tokens)
    run.end()


@common.command
@terminal.printing
def main(argv=None):
    options = get_options(argv)
    rank, world = common.init_processes(options.device, options.timeout)
    if options.model == "tiny":
        sample.ensure_suite(options.data, rank)
    common.wait_for_all_ranks()                 # rank 0 may be writing it
    is_text = options.stage == "pretrain"
    read = data.text_digest(options.text) if is_text else data.tasks_digest(options)
    folder = config.folder_of(options, options.stage)
    run = Run(folder, options, rank, world, read)
    if run.finished:
        return
    if is_text and not os.path.isfile(options.text):
        raise UserError(f"{options.text}: no such file; --text names plain text, one document a "
                        "line, or JSON lines with a text; without any, leave this stage out: "
                        "--stage finetune --no-pretrained")
    if rank == 0:
        config.tell(options, parser(), options.stage)
    train(options, run)


if __name__ == "__main__":
    main()
