"""A T5 made from nothing: its size, and what meta's --curriculum draws for it, easy tasks first."""
import dataclasses

import config
import data
from common import UserError

# The curriculum of a model that knows nothing; a checkpoint learns all tasks at once. Shares of
# the steps:
EASY_FIRST = 0.13       # at the start only tasks with answers of one or two words, in one wording
DEMOS_AFTER = 0.71      # no demonstrations before that; there the learning rate starts anew
UNINSTRUCTED = 0.05     # share of the draws whose input is the instance alone


def add_options(parser) -> None:
    """The options of stages base and meta that only `--model tiny` has a use for."""
    add = parser.add_argument_group("base and meta of --model tiny").add_argument
    add("--d-model", type=config.width, default=64, help="base: the model's width")
    add("--layers", type=config.number(1, 100), default=3,
        help="base: layers of the encoder, and as many of the decoder")
    add("--heads", type=config.number(1, 100), default=4,
        help="base: heads of attention, which share the width out among them")
    add("--d-ff", type=config.width, default=192, help="base: width of the feed-forward layers")
    add("--curriculum", default=False, **config.flag,
        help="meta: easy tasks first, demonstrations last")


def size_of(options) -> dict:
    """The size of `t5.tiny_t5`. Raises UserError where the heads cannot share the width."""
    if options.d_model % options.heads:
        raise UserError(f"--d-model {options.d_model} cannot be shared out among --heads "
                        f"{options.heads}; choose a multiple")
    return {key: getattr(options, key) for key in ("d_model", "layers", "heads", "d_ff")}


def curriculum_draws(tasks, options):
    """`train_teacher.mixed_draws` with easy tasks first and demonstrations last."""
    if all(x.prompt == x.input for task in tasks for x in task.instances):
        raise UserError("--curriculum: here every input is the whole prompt, instruction included, "
                        "and some are to be without; choose --p3-input fields and rows with them")
    # A short answer is learned first.
    easy = []
    for task in tasks:
        lengths = [len(output.split()) for x in task.instances for output in x.outputs]
        if max(lengths) <= 2:
            easy.append(dataclasses.replace(task, definitions=task.definitions[:1]))

    def draws(step, micro):
        rng, demos = data.rng_of(options.seed, step, micro), 0
        if step >= DEMOS_AFTER * options.steps:
            demos = data.n_demonstrations(options.demos, options.seed, step)
        is_easy = step < EASY_FIRST * options.steps
        drawn = data.draw_tasks(easy if is_easy and easy else tasks, rng, options.tasks,
                                options.instances, demos, options.vary_demos)
        for n, draw in enumerate(drawn):
            if not is_easy and rng.random() < UNINSTRUCTED:
                inputs = [its_input for its_input, _ in draw.pairs]     # P3: fields, not the prompt
                drawn[n] = dataclasses.replace(draw, definition="", demonstrations=[],
                                               prompts=inputs)
        return drawn
    return draws
