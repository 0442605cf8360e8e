"""Answers by generated adapters beside the other ways to get them."""
import peft
import torch

import hypernet
import lora
from pages import paragraph
from side_by_side import SHAPES, adapt, make_llm, make_tagi, tokens

FUSION = {"no fusion": ["--fusion=none"], "with fusion": []}        # way -> its options


@torch.no_grad()
def generate(llm, n_new, **inputs):
    """Greedy answers of exactly n_new tokens."""
    return llm.generate(do_sample=False, num_beams=1, min_new_tokens=n_new, max_new_tokens=n_new,
                        **inputs)


def decode(llm, ids, mask, n_new, **more):
    return generate(llm, n_new, input_ids=ids, attention_mask=mask, **more)


@torch.no_grad()
def decode_adapted(tagi, adapter, ids, mask, n_new):
    with tagi.adapted(adapter) as llm:
        encoded, mask = tagi.encode(ids, mask)
        return generate(llm, n_new, encoder_outputs=encoded, attention_mask=mask)


def frozen_tagi(args, *flags):
    return make_tagi(args, *flags).requires_grad_(False)


def merged(section, args):
    """One task's adapter is merged into the LLM, or the LLM runs as it is.

    Both read inputs without the instruction. Merged and without fusion (Eq. 1) a task computes
    what plain T5 does, so 1 is to be expected; with fusion, the default, it attends over the
    instruction as well.
    """
    shape = SHAPES[args.size]
    plain, (ids, mask) = make_llm(args), tokens(args, args.rows, shape.instance)
    ways = {"plain T5": lambda: decode(plain, ids, mask, shape.answer)}
    for name, flags in FUSION.items():
        tagi = frozen_tagi(args, *flags)
        adapter = adapt(tagi, *tokens(args, 1, shape.instruction))
        tagi.merge(adapter)

        def run(tagi=tagi, adapter=adapter):
            decode_adapted(tagi, adapter, ids, mask, shape.answer)
        ways[f"merged, {name}"] = run
    section.compare(f"{args.rows} rows", ways)


def mixed(section, args):
    """A batch of sixteen tasks runs, each row with its task's adapter, or with none.

    Adapters are made beforehand. PEFT's way to do so is `adapter_names=`, with adapters of the
    same size. What a relative time has above 1 is the price of tasks that share a batch.
    """
    shape = SHAPES[args.size]
    plain = make_llm(args)
    settings = peft.LoraConfig(r=shape.rank, lora_alpha=shape.alpha, init_lora_weights=False,
                               target_modules=shape.targets.split(","))
    as_llm = {"autocast_adapter_dtype": False}          # bf16 on a GPU, as ours
    peft_llm = peft.get_peft_model(make_llm(args), settings, adapter_name="task0", **as_llm)
    for n in range(1, 16):
        peft_llm.add_adapter(f"task{n}", settings, **as_llm)
    peft_llm.eval()
    students = {name: frozen_tagi(args, *flags) for name, flags in FUSION.items()}
    adapters = {}
    for name, tagi in students.items():
        adapters[name] = adapt(tagi, *tokens(args, 16, shape.instruction))

    for rows in sorted({16, args.rows}):
        ids, mask = tokens(args, rows, shape.instance)
        index = [n % 16 for n in range(rows)]
        names = [f"task{n}" for n in index]
        ways = {"plain T5": lambda: decode(plain, ids, mask, shape.answer)}
        for name, tagi in students.items():
            def run(tagi=tagi, adapter=adapters[name].select(index)):
                decode_adapted(tagi, adapter, ids, mask, shape.answer)
            ways[f"ours, {name}"] = run
        ways["PEFT, adapter_names="] = lambda: decode(peft_llm, ids, mask, shape.answer,
                                                      adapter_names=names)
        section.compare(f"{rows} rows of 16 tasks", ways)


def reread(section, args):
    """n instances of a task are answered by its adapter, or with the instruction in every input.

    The adapter's time holds all of it: the instruction is read, the adapter generated, merged,
    used for all n instances, and unmerged. It saves reading the instruction n - 1 times: below 1
    that has paid for the rest.
    """
    shape = SHAPES[args.size]
    plain, tagi = make_llm(args), frozen_tagi(args)

    def once(instruction, inputs):
        adapter = adapt(tagi, *instruction)
        tagi.merge(adapter)
        decode_adapted(tagi, adapter, *inputs, shape.answer)
        tagi.unmerge()

    pays = []                                           # from which n on, in words
    for demos, length in (("no", shape.instruction), ("two", shape.with_demos)):
        instruction, first = tokens(args, 1, length), None
        for n in args.instances:
            short, long = tokens(args, n, shape.instance), tokens(args, n, length + shape.instance)
            seconds = section.compare(f"n = {n}, {demos} demonstrations", {
                "instruction in input": lambda: decode(plain, *long, shape.answer),
                "adapter, once": lambda: once(instruction, short)}, show=n in (1, 10, 100))
            usual, ours = seconds.values()
            if ours > usual:
                first = None
            elif first is None:
                first = n
        pays.append(f"{first or 'none'} with {demos} demonstrations")
    tried = ", ".join(map(str, args.instances))
    section.notes.append(paragraph("The n from which on the adapter takes no more time:",
                                   f"{', '.join(pays)} (tried: {tried})."))


def regenerate(section, args):
    """Adapters are generated once a task, or anew at every decoding step.

    The first way is what this code does, the last what the paper's released code does: weights
    for each layer just before it runs. A relative time of 2 says that generating once halves the
    time.
    """
    shape = SHAPES[args.size]
    tagi = frozen_tagi(args)
    ids, mask = tokens(args, args.rows, shape.instance)
    instruction, i_mask = tokens(args, 16, shape.instruction)
    first, last = tagi.encode_instruction(instruction, i_mask)
    index = torch.arange(args.rows, device=args.device) % 16

    # A generator of its own for the sites of every block.
    options, of_block = tagi.options, {}
    for name, block in tagi.llm.named_modules():
        if type(block).__name__ != "T5Block":
            continue
        shapes = {}                                     # site -> (D_in, D_out)
        for site, its_shape in tagi.generator.site_shapes.items():
            if site.startswith(name + "."):
                shapes[site] = its_shape
        generator = hypernet.Generator(shapes, tagi.llm.config.d_model, options.rank,
                                       options.generator, options.width, options.bottleneck)
        for p in generator.to(args.device).requires_grad_(False).parameters():
            torch.nn.init.normal_(p, std=0.01)
        of_block[block] = generator

    @torch.no_grad()
    def make():
        return tagi.generate_adapter(first, last, i_mask).select(index)

    def for_llm(*_):
        lora.set_weights(tagi.llm, make().weights)

    @torch.no_grad()
    def for_block(block, _):
        with tagi.autocast():
            weights = lora.select(of_block[block](first, last, i_mask.bool()), index)
        for site, (A, B) in weights.items():
            wrapper = lora.sites(tagi.llm)[site]
            wrapper.lora_A, wrapper.lora_B = A, B

    def run_with(hook, modules):
        handles = [module.register_forward_pre_hook(hook) for module in modules]
        decode_adapted(tagi, make(), ids, mask, shape.answer)
        for handle in handles:
            handle.remove()

    section.compare(f"{args.rows} rows of 16 tasks", {
        "once": lambda: decode_adapted(tagi, make(), ids, mask, shape.answer),
        "at every step": lambda: run_with(for_llm, [tagi.llm.decoder]),
        "at every step and layer": lambda: run_with(for_block, of_block)})
