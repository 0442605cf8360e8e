"""Splits, plain text and a vocabulary for a T5 that is trained from nothing on people's tasks.

    python -m bench.scratch --data natural-instructions --out data/sni-scratch --seed 0

The command writes a folder in Super-NaturalInstructions' layout, for configs/sni-scratch*.yaml:

    tasks                       a link to the tasks of --data
    splits/default/*_tasks.txt  test: as in --data. Held out of its training tasks, of categories
                                with at least four: test_seen_categories, 60 tasks, and validation,
                                30. train: the others
    splits/twins.txt            pairs of training tasks that are nearly the same, neither held out
    corpus.txt                  one document a line: definitions, positive examples and inputs of
                                the split train; of its instances' answers none
    tokenizer/                  a SentencePiece unigram model of that text
    files.sha256                their digests: only a folder that is as they say is replaced

Two tasks are twins where at least three quarters of their definitions' words are the same, in the
same order (difflib's ratio), or where their names are, without the numbers. Those of one source
whose definitions differ in a word are, and more.
"""
import difflib
import io
import itertools
import os
import random
import re
import sys
from collections import Counter

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))  # started by path
import common
import config
import data
from bench import records, terminal
from bench.folders import new_folder
from bench.listed import replaceable, write_list
from bench.predictions import plain_name

SIZES = {"test_seen_categories": 60, "validation": 30}      # split -> tasks held out
FEWEST = 4                      # tasks of a category that some are held out of
ALIKE = 0.75                    # share of two definitions' words that makes them twins
EXTRA_IDS = 100                 # T5's sentinels
TOKENIZER_TEXTS = 60_000        # documents that the vocabulary is made from


# ---------------------------------------------------------------------------------------- splits

def twins(tasks: list[data.Task]) -> list[tuple[str, str]]:
    """The pairs of names whose definitions are nearly the same, or the names themselves."""
    words = {task.name: re.findall(r"\w+", task.definitions[0].lower()) for task in tasks}
    plain = {task.name: plain_name(task.name) for task in tasks}
    pairs = []
    for one, other in itertools.combinations(sorted(words), 2):
        match = difflib.SequenceMatcher(None, words[one], words[other], autojunk=False)
        # Two upper bounds first: most pairs need no more.
        alike = match.real_quick_ratio() >= ALIKE and match.quick_ratio() >= ALIKE
        if plain[one] == plain[other] or alike and match.ratio() >= ALIKE:
            pairs.append((one, other))
    return pairs


def hold_out(tasks: list[data.Task], has_twin: set[str], seed: int) -> dict[str, list[str]]:
    """{split: names of tasks}: SIZES' from as many categories as there are, and train, the rest.

    Of a category at most half of the tasks are held out, and none that has a twin. Raises UserError
    where that is too few.
    """
    rng, sizes = random.Random(seed), Counter(task.category for task in tasks)
    queues = []                                 # of each category the names that may be held out
    for category in sorted(sizes):
        names = sorted(task.name for task in tasks
                       if task.category == category and task.name not in has_twin)
        rng.shuffle(names)
        if sizes[category] >= FEWEST:
            queues.append(names[:sizes[category] // 2])
    rng.shuffle(queues)
    rounds = itertools.chain.from_iterable(itertools.zip_longest(*queues))
    chosen = [name for name in rounds if name is not None]      # one of each category in turn
    if len(chosen) < sum(SIZES.values()):
        raise common.UserError(f"{len(chosen)} tasks may be held out, {sum(SIZES.values())} are "
                               "needed; name the folder of all of Super-NaturalInstructions")
    splits, start = {}, 0
    for split, size in SIZES.items():
        splits[split] = sorted(chosen[start:start + size])
        start += size
    held_out = set(chosen[:start])
    splits["train"] = [task.name for task in tasks if task.name not in held_out]
    return splits


# -------------------------------------------------------------------------- text and vocabulary

def documents(root: str, tasks: list[data.Task]) -> list[str]:
    """Of each task its definition with its positive examples, explained, and its inputs."""
    texts = []
    for task in tasks:
        path = data.task_path(root, task.name)
        record = records.read_json(path, "fetch it again")
        for definition in task.definitions:
            texts.append(definition)
            for example in record.get("Positive Examples") or []:
                parts = [example.get(key) for key in ("input", "output", "explanation")]
                texts.append(" ".join([definition, *(str(part) for part in parts if part)]))
        texts += [x.input for x in task.instances]
    lines = [" ".join(text.split()) for text in texts]
    return [line for line in lines if line]


def train_tokenizer(texts: list[str], pieces: int):
    """A T5 tokenizer of at most so many pieces, the 100 sentinels among them.

    Raises UserError where the texts have more characters than that.
    """
    import sentencepiece
    from transformers import T5Tokenizer
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(texts), model_writer=model, model_type="unigram",
            vocab_size=pieces - EXTRA_IDS, hard_vocab_limit=False, pad_id=0, eos_id=1, unk_id=2,
            bos_id=-1, minloglevel=2)
    except RuntimeError as error:
        raise common.UserError(f"no vocabulary of {pieces} pieces can be made of these texts "
                               f"({error}); name a larger --vocabulary") from None
    model = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
    vocab = [(model.id_to_piece(i), model.get_score(i)) for i in range(model.get_piece_size())]
    vocab += [(f"<extra_id_{i}>", 0.0) for i in reversed(range(EXTRA_IDS))]
    return T5Tokenizer(vocab=vocab, extra_ids=EXTRA_IDS)


# ------------------------------------------------------------------------------------------ main

def write_scratch(root: str, out: str, seed: int, vocabulary: int) -> None:
    """Write the folder `out` (module docstring). Raises UserError for what is wrong with `root`."""
    folder = replaceable(out)
    if os.path.realpath(root) == os.path.realpath(out):
        raise common.UserError(f"--data and --out both name {out}; --data is the folder of all of "
                               "Super-NaturalInstructions")
    tasks = data.load_sni(root, "train", None)
    pairs = twins(tasks)
    has_twin = {name for pair in pairs for name in pair}
    splits = hold_out(tasks, has_twin, seed)
    splits["test"] = data.listed_tasks(root, "test")
    trained = set(splits["train"])
    texts = documents(root, [task for task in tasks if task.name in trained])
    random.Random(seed).shuffle(texts)
    tokenizer = train_tokenizer(texts[:TOKENIZER_TEXTS], vocabulary)
    with new_folder(folder, replace=True) as unfinished:
        os.makedirs(f"{unfinished}/splits/default")
        for split, names in splits.items():
            common.write_text(data.split_file(unfinished, split), "\n".join(names) + "\n")
        common.write_text(f"{unfinished}/splits/twins.txt", "".join(f"{a} {b}\n" for a, b in pairs))
        common.write_text(f"{unfinished}/corpus.txt", "\n".join(texts) + "\n")
        tokenizer.save_pretrained(f"{unfinished}/tokenizer")
        os.symlink(os.path.realpath(os.path.join(root, "tasks")), f"{unfinished}/tasks")
        write_list(unfinished)

    counts = ", ".join(f"{split} {len(names)}" for split, names in splits.items())
    categories = {task.category for task in tasks if task.name not in trained}
    print(f"{out}: tasks of {counts}; {len(has_twin)} of {len(tasks)} training tasks have a twin "
          f"and are not held out ({len(pairs)} pairs); the held-out ones are of {len(categories)} "
          f"categories; {len(texts):,} documents, {len(tokenizer):,} pieces")


@common.command
@terminal.printing
def main(argv=None):
    parser = config.Parser("Write splits, plain text and a vocabulary from a folder like SNI's.",
                           epilog=None)
    add = parser.add_argument
    add("--data", type=config.path, default="natural-instructions",
        help="folder in Super-NaturalInstructions' layout")
    add("--out", type=config.path, default="data/sni-scratch",
        help="folder to write; one that is there is replaced, nothing else")
    add("--seed", type=config.seed, default=0, help="decides which tasks are held out")
    add("--vocabulary", type=config.number(500, 100_000), default=6000,
        help="pieces of the tokenizer")
    args = parser.parse_args(argv)
    write_scratch(args.data, args.out, args.seed, args.vocabulary)


if __name__ == "__main__":
    main()
