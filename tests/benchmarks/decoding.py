"""Answers by generated adapters against the other ways to get them."""
import peft
import torch

import hypernet
import lora
from side_by_side import SHAPES, adapt, compare, make_llm, make_tagi, note, tokens


@torch.no_grad()
def generate(llm, n_new, **inputs):
    return llm.generate(do_sample=False, num_beams=1, min_new_tokens=n_new, max_new_tokens=n_new, **inputs)


def decode(llm, ids, mask, n_new, **more):
    return generate(llm, n_new, input_ids=ids, attention_mask=mask, **more)


@torch.no_grad()
def decode_adapted(tagi, adapter, ids, mask, n_new):
    with tagi.adapted(adapter) as llm:
        encoded, mask = tagi.encode(ids, mask)
        return generate(llm, n_new, encoder_outputs=encoded, attention_mask=mask)


def merged(args):
    """One task's adapter merged: T5's own cost without fusion; fusion attends over the instruction as well."""
    S, _, T, C, *_ = SHAPES[args.size]
    plain, (ids, mask) = make_llm(args), tokens(args, args.rows, T)
    ways = {"plain T5": lambda: decode(plain, ids, mask, C)}
    for name, flags in (("merged, no fusion", ["--no-fusion"]), ("merged, with fusion", [])):
        tagi = make_tagi(args, *flags).requires_grad_(False)
        adapter = adapt(tagi, *tokens(args, 1, S))
        tagi.merge(adapter)
        ways[name] = lambda tagi=tagi, adapter=adapter: decode_adapted(tagi, adapter, ids, mask, C)
    compare(f"merged, {args.rows} rows", args, ways)


def mixed(args):
    """A batch of 16 tasks, every task with an adapter of its own."""
    S, _, T, C, rank, alpha, targets = SHAPES[args.size]
    plain, settings = make_llm(args), peft.LoraConfig(r=rank, lora_alpha=alpha, target_modules=targets.split(","),
                                                      init_lora_weights=False)
    of_llms_type = {"autocast_adapter_dtype": False}                        # bf16 with a GPU, as ours
    peft_llm = peft.get_peft_model(make_llm(args), settings, adapter_name="task0", **of_llms_type)
    for n in range(1, 16):
        peft_llm.add_adapter(f"task{n}", settings, **of_llms_type)
    peft_llm.eval()
    students = {name: make_tagi(args, *flags).requires_grad_(False)
                for name, flags in (("no fusion", ["--no-fusion"]), ("with fusion", []))}
    adapters = {name: adapt(tagi, *tokens(args, 16, S)) for name, tagi in students.items()}
    for rows in sorted({16, args.rows}):
        ids, mask = tokens(args, rows, T)
        index = [n % 16 for n in range(rows)]
        names = [f"task{n}" for n in index]
        ways = {"plain T5": lambda: decode(plain, ids, mask, C)}
        for name, tagi in students.items():
            adapter = adapters[name].select(index)
            ways[f"ours, {name}"] = lambda tagi=tagi, adapter=adapter: decode_adapted(tagi, adapter, ids, mask, C)
        ways["PEFT, adapter_names="] = lambda: decode(peft_llm, ids, mask, C, adapter_names=names)
        compare(f"mixed, {rows} rows of 16 tasks", args, ways)


def reread(args):
    """n instances of one task: adapter generated, merged, used, unmerged, against the instruction in every input."""
    S, S2, T, C, *_ = SHAPES[args.size]
    plain, tagi = make_llm(args), make_tagi(args).requires_grad_(False)

    def once(instruction, ids, mask):
        adapter = adapt(tagi, *instruction)
        tagi.merge(adapter)
        decode_adapted(tagi, adapter, ids, mask, C)
        tagi.unmerge()

    for demos, length in ((0, S), (2, S2)):
        instruction, even = tokens(args, 1, length), None
        for n in args.instances:
            short, long = tokens(args, n, T), tokens(args, n, length + T)
            name = f"{n} instances, {demos} demonstrations"
            seconds = compare(name, args, {"instruction in input": lambda: decode(plain, *long, C),
                                           "adapter, once": lambda: once(instruction, *short)}, show=n in (1, 10, 100))
            if even is None and seconds["adapter, once"] <= seconds["instruction in input"]:
                even = n
        note(f"break-even, {demos} demonstrations", f"n = {even} of {', '.join(map(str, args.instances))}")


def regenerate(args):
    """Adapters once a task, against anew before every decoding step, and so for every layer, as the paper's code does."""
    S, _, T, C, *_ = SHAPES[args.size]
    tagi = make_tagi(args).requires_grad_(False)
    ids, mask = tokens(args, args.rows, T)
    instruction, i_mask = tokens(args, 16, S)
    first, last = tagi.encode_instruction(instruction, i_mask)
    index = torch.arange(args.rows, device=args.device) % 16
    of_block, options = {}, tagi.options                                    # a generator for the sites of every block
    for name, block in tagi.llm.named_modules():
        if type(block).__name__ == "T5Block":
            shapes = {site: shape for site, shape in tagi.generator.site_shapes.items() if site.startswith(name + ".")}
            of_block[block] = hypernet.Generator(shapes, tagi.llm.config.d_model, options.rank, options.generator,
                                                 options.width, options.bottleneck).to(args.device).requires_grad_(False)
            for p in of_block[block].parameters():
                torch.nn.init.normal_(p, std=0.01)

    @torch.no_grad()
    def make():
        return tagi.generate_adapter(first, last, i_mask).select(index)

    @torch.no_grad()
    def for_block(block, *args):
        with tagi.autocast():
            weights = lora.select(of_block[block](first, last, i_mask.bool()), index)
        for site, pair in weights.items():
            wrapper = lora.sites(tagi.llm)[site]
            wrapper.lora_A, wrapper.lora_B = pair

    def with_hooks(modules, hook):
        handles = [module.register_forward_pre_hook(hook) for module in modules]
        decode_adapted(tagi, make(), ids, mask, C)
        for handle in handles:
            handle.remove()

    compare(f"regenerate, {args.rows} rows of 16 tasks", args, {
        "once": lambda: decode_adapted(tagi, make(), ids, mask, C),
        "at every step": lambda: with_hooks([tagi.llm.decoder], lambda *_: lora.set_weights(tagi.llm, make().weights)),
        "at every step and layer": lambda: with_hooks(of_block, for_block)})
