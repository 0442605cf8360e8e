"""T0's split of P3 (Public Pool of Prompts; Sanh et al. 2022): a task is a data set and a template.

A row of COPA's, and one of promptsource's templates for it (input ||| target):

    {"premise": "The sun rose.", "choice1": "It got warm.", "choice2": "It got dark.",
     "question": "effect", "label": 0}

    0edd8660-f299-4819-a5ac-633c11177228: !Template
      name: exercise
      answer_choices: '{{choice1}} ||| {{choice2}}'
      jinja: "Exercise: choose the most plausible alternative. {{ premise }}
        {% if question == "cause" %} because... {% else %} so... {% endif %}
        - {{choice1}} - {{choice2}} ||| {% if label != -1 %}{{ answer_choices[label] }}{%endif%}"
      metadata: !TemplateMetadata {original_task: true, metrics: [Accuracy]}

The hypernetwork reads the template, with names for fields; the student reads the row's fields;
teachers read both as one prompt, "Exercise: .. The sun rose. so... - It got warm. - It got dark."
"""
import glob
import itertools
import os
import re
import statistics
import warnings

from bench.records import brief, numbered_rows, read_json_lines, read_names
from bench.templates import LONGEST_FIELD, Template, load_templates
from common import UserError

TRAIN = (
    "adversarial_qa/dbert adversarial_qa/dbidaf adversarial_qa/droberta ag_news amazon_polarity "
    "app_reviews cnn_dailymail/3.0.0 common_gen cosmos_qa dbpedia_14 dream duorc/ParaphraseRC "
    "duorc/SelfRC gigaword glue/mrpc glue/qqp imdb kilt_tasks/hotpotqa multi_news "
    "paws/labeled_final qasc quarel quartz quoref ropes rotten_tomatoes samsum sciq social_i_qa "
    "trec wiki_bio wiki_hop/original wiki_qa wiqa xsum yelp_review_full").split()

TEST = {                                    # task -> data set
    "anli_r1": "anli", "anli_r2": "anli", "anli_r3": "anli", "hellaswag": "hellaswag",
    "cb": "super_glue/cb", "copa": "super_glue/copa", "rte": "super_glue/rte",
    "wic": "super_glue/wic", "wsc": "super_glue/wsc.fixed",
    "winogrande": "winogrande/winogrande_xl", "story_cloze": "story_cloze/2016",
}
HELD_OUT = re.compile(                      # finds the name of such a data set in a task's name
    "anli|hellaswag|winogrande|story_?cloze|copa|wsc|wic(?![a-z])|(?<![a-z])(cb|rte)(?![a-z])",
    re.IGNORECASE)

NLI = "entailment|e neutral|n contradiction|c"
ANSWERS = {     # task or data set -> field: number of its first answer, all in words or how many
    "anli_r1": {"label": (0, NLI)}, "anli_r2": {"label": (0, NLI)}, "anli_r3": {"label": (0, NLI)},
    "hellaswag": {"label": (0, 4)},
    "cb": {"label": (0, "entailment contradiction neutral")},
    "copa": {"label": (0, "choice1 choice2")},
    "rte": {"label": (0, "entailment not_entailment")},
    "wic": {"label": (0, "false true")},
    "wsc": {"label": (0, "false true")},
    "winogrande": {"answer": (1, 2)},
    "story_cloze": {"answer_right_ending": (1, 2)},
    "ag_news": {"label": (0, "world sports business sci/tech")},
    "amazon_polarity": {"label": (0, "negative positive")},
    "app_reviews": {"star": (1, 5)},
    "cosmos_qa": {"label": (0, 4)},
    "dbpedia_14": {"label": (0, "company educationalinstitution artist athlete officeholder "
                             "meanoftransportation building naturalplace village animal plant "
                             "album film writtenwork")},
    "duorc/ParaphraseRC": {"no_answer": (0, "false true")},
    "duorc/SelfRC": {"no_answer": (0, "false true")},
    "glue/mrpc": {"label": (0, "not_equivalent equivalent")},
    "glue/qqp": {"label": (0, "not_duplicate duplicate")},
    "imdb": {"label": (0, "neg pos")},
    "paws/labeled_final": {"label": (0, 2)},
    "quarel": {"answer_index": (0, 2)},
    "rotten_tomatoes": {"label": (0, "neg pos")},
    "social_i_qa": {"label": (1, 3)},
    "trec": {"coarse_label": (0, "abbr enty desc hum loc num"), "fine_label": (0, 50)},
    "wiki_qa": {"label": (0, 2)},
    "yelp_review_full": {"label": (0, "1_star 2_star 3_stars 4_stars 5_stars")},
}
AS_TEXT = {"winogrande", "social_i_qa"}     # whose templates ask for answer == '1', not 1


# -------------------------------------------------------------------------------------------- tasks

def load(root: str, split: str = "test", max_instances: int | None = None,
         p3_input: str = "fields", skip: int = 0) -> list[dict]:
    """A task for every data set and template of T0's split, with rows skip : skip + max_instances.

        root/templates/super_glue/rte/templates.yaml    promptsource's folder of templates
        root/rte/validation.jsonl                       rows in the data set's own form
        root/imdb/train.jsonl                           (super_glue/rte/… is found as well)
        root/prompted/imdb_Reviewer_Enjoyment.jsonl     prompted ones: {"prompt", "completion"}

    split: test (the held-out tasks that are there, with T0's evaluation templates) or train (all
    templates of the 36 data sets). p3_input: a row's input is its "fields" that the template shows
    or the whole "prompt", which is the only choice for prompted rows and for templates that
    p3_fields.yaml does not list. A row to which a template does not apply is left out. A task:

        {"name": "rte: can we infer", "category": "rte", "instruction": the template's text,
         "instances": [{"id": "rte-0", "input": .., "output": .., "prompt": .., "choices": (..)}]}

    Raises UserError, naming data set, template and row, for what cannot be rendered, a label
    outside the choices, a file that is not JSON lines, and where no task is there.
    """
    if split not in ("train", "test"):
        raise UserError(f"P3 has the splits train and test here, no {split}")
    templates = load_templates(os.path.join(root, "templates"))
    end = None if max_instances is None else skip + max_instances
    tasks = []
    for name, dataset in TEST.items() if split == "test" else zip(TRAIN, TRAIN):
        rows = read_rows(root, name, dataset, "validation" if split == "test" else "train")
        for template in templates.get(dataset, []):
            if split == "test" and not template.for_evaluation:
                continue
            if rows is None and split == "train":
                instances = prompted_instances(root, template)
            else:
                instances = rendered_instances(name, template, rows or [], p3_input)
            instances = list(itertools.islice(instances, skip, end))    # the rest isn't rendered
            if instances:
                tasks.append({"name": f"{name}: {template.name}", "category": name,
                              "instruction": template.text, "instances": instances})
    if not tasks:
        example = "rte/validation.jsonl" if split == "test" else "imdb/train.jsonl"
        raise UserError(f"{root} has no rows of T0's {split} data sets; put them into "
                        f"{root}/{example} and the like (docs/p3.md)")
    return tasks


def training_files(root: str) -> list[str]:
    """The files there that the training split is made of, in the order in which they are hashed."""
    files = [f"{root}/templates/{dataset}/templates.yaml" for dataset in TRAIN]
    files += [f"{root}/{dataset}/train.jsonl" for dataset in TRAIN]
    files += sorted(glob.glob(f"{glob.escape(root)}/*prompted*/*.jsonl"))
    return [file for file in files if os.path.isfile(file)]


def held_out_names(names: list[str]) -> list[str]:
    """Those of these names of training tasks that hold the name of a data set in TEST."""
    return [name for name in names if HELD_OUT.search(name)]


def warn_of_leaks(names: list[str], test_file: str | None = None) -> None:
    """Warn where training tasks of these names are P3's test tasks, or those that a file names."""
    if leaks := held_out_names(names):
        warnings.warn(f"{len(leaks)} training tasks are named after data sets that P3 holds out "
                      f"({', '.join(leaks[:2])} …): scores of this model on P3 would be leaks")
    if test_file and os.path.isfile(test_file):
        both = sorted(set(names).intersection(read_names(test_file, "write the split again")))
        if both:
            warnings.warn(f"{len(both)} training tasks are test tasks too ({both[0][:60]} …): an "
                          "evaluation would refuse this model; take them out of one split")


def read_rows(root: str, name: str, dataset: str, split: str) -> list[dict] | None:
    """Rows of a data set with labels as integers, None where there are none."""
    # ANLI's three rounds are one data set to promptsource, so its folder cannot hold their rows
    folders = [name] if dataset == "anli" else [name, dataset]
    paths = [os.path.join(root, folder, split + ".jsonl") for folder in folders]
    found = {os.path.realpath(path): path for path in paths if os.path.isfile(path)}
    path = the_only(list(found.values()))
    if path is None:
        return None
    remedy = "rows are JSON objects with the data set's own field names, one a line"
    rows = []
    for n, (where, row) in enumerate(numbered_rows(path, remedy)):
        rows.append(with_plain_label(name, row, f"{where} (row {n})"))
    return rows


def the_only(paths: list[str]) -> str | None:
    """The one of these files, None where there is none. Raises UserError where there are two."""
    if len(paths) > 1:
        raise UserError(f"{paths[0]} and {paths[1]} are for the same rows; keep one")
    return paths[0] if paths else None


def with_plain_label(name: str, row: dict, where: str) -> dict:
    """The row as templates want it: what counts its answers is a number, or the text of one.

    A template would take 1 for another answer than "1", -1 for the last one and "false" for true,
    without a word. Raises UserError for what is no answer of this task or data set.
    """
    if isinstance(row.get("target"), dict):     # WSC's spans
        row = row | row["target"]
    for key, (first, names) in ANSWERS.get(name, {}).items():
        if key in row or name in TEST:
            number = answer_number(row.get(key), first, names, f"{where}: {key}")
            row = row | {key: str(number) if name in AS_TEXT else number}
    if isinstance(row.get("choices"), dict) and "answerKey" in row:             # QASC, QuaRTz
        letters = row["choices"].get("label")
        if not isinstance(letters, list) or row["answerKey"] not in letters:
            raise UserError(f"{where}: answerKey {brief(row['answerKey'])} is none of the choices' "
                            f"labels {brief(letters)}")
    return row


def answer_number(value, first: int, names: str | int, where: str) -> int:
    """The number of an answer that is written as 1, "1", 1.0, true or in words.

    names: the answers in words, from number `first` on, with | between two for one; or their count.
    """
    words = names.split() if isinstance(names, str) else [""] * names
    plain = isinstance(value, (str, int, float))        # true and false are ints to Python
    text = str(value).strip().lower().replace(" ", "_")[:40] if plain else ""
    if value is None or plain and text in ("", "nan", "-1", "-1.0"):
        raise UserError(f"{where} is not there: the answers of this split are hidden; take the "
                        "validation split, or for training the training split")
    for n, word in enumerate(words, first):
        if isinstance(value, (str, bool)) and text in word.split("|"):
            return n
    number = re.fullmatch(r"([0-9]{1,9})(\.0*)?", text)
    if number and first <= int(number[1]) < first + len(words):
        return int(number[1])
    last = first + len(words) - 1
    in_words = f" or {', '.join(names.split())}" if isinstance(names, str) else ""
    raise UserError(f"{where} is {brief(value)}, not {first} to {last}{in_words}")


def rendered_instances(name: str, template: Template, rows: list[dict], p3_input: str):
    """Yields an instance for every row to which the template applies."""
    for n, row in enumerate(rows):
        rendered = template.render(row, n)
        if rendered is None:
            continue
        prompt, target, choices = rendered
        if name in TEST and target not in choices:
            raise UserError(f"{template.dataset}, template '{template.name}', row {n}: "
                            f"the answer '{target}' is none of the choices {choices}")
        text = prompt
        if p3_input == "fields" and template.fields:
            there = [key for key in template.fields if key in row]
            with template.blamed(n):
                text = " ".join(f"{key}: {field_text(row[key])}" for key in there)
        yield {"id": f"{name}-{n}", "input": text, "output": target, "prompt": prompt,
               "choices": tuple(choices)}


def field_text(value) -> str:
    if value is None:
        raise ValueError("a field that the student reads is null")
    if isinstance(value, dict):
        return "; ".join(f"{key}: {field_text(x)}" for key, x in value.items())
    if isinstance(value, list):
        return ", ".join(map(field_text, value))
    return " ".join(str(value)[:LONGEST_FIELD].split())


def prompted_instances(root: str, template: Template) -> list[dict]:
    """Rows already prompted with this template: of the file in root/*prompted*/ named after it."""
    def plain(name):
        return re.sub("[^A-Za-z0-9]+", "_", name)

    paths = sorted(glob.glob(f"{glob.escape(root)}/*prompted*/*.jsonl"))
    own = plain(f"{template.dataset}_{template.name}")
    named = [x for x in paths if plain(os.path.basename(x).removesuffix(".jsonl")) == own]
    path = the_only([path for path in named if os.path.getsize(path)])
    if path is None:
        return []
    rows = read_json_lines(path, "rows are JSON objects with prompt and completion",
                           prompt=str, completion=str)
    instances = []
    for n, row in enumerate(rows):
        prompt = row["prompt"].strip()
        target = row["completion"].removesuffix("<|endoftext|>").strip()
        if prompt and target:
            instances.append({"id": f"{template.dataset}-{n}", "input": prompt, "output": target,
                              "prompt": prompt, "choices": ()})
    return instances


# ----------------------------------------------------------------------------------------- averages

HYPERT5 = [name for name in TEST if not name.startswith("anli") and name != "story_cloze"]
AVERAGES = {                                # average -> its parts; a part: tasks that count as one
    "MTest11": [(name,) for name in TEST],
    "HyperT5": [("anli_r1", "anli_r2", "anli_r3"), *((name,) for name in HYPERT5)],
}


def summarize(by_template: dict) -> dict:
    """Each task's mean, median and spread over templates, and the averages.

    by_template: {"rte: can we infer": accuracy, ..}. An average takes the parts that are there
    whole, and says how many of how many that is.
    """
    accuracies = {}                         # task -> its templates' accuracies
    for name, accuracy in by_template.items():
        accuracies.setdefault(name.partition(": ")[0], []).append(accuracy)
    tasks, averages = {}, {}
    for task, x in accuracies.items():
        tasks[task] = {"mean": statistics.fmean(x), "median": statistics.median(x),
                       "min": min(x), "max": max(x), "templates": len(x)}
    for average, parts in AVERAGES.items():
        whole = [part for part in parts if all(task in tasks for task in part)]
        means = [statistics.fmean(tasks[task]["mean"] for task in part) for part in whole]
        averages[average] = {"mean": statistics.fmean(means) if means else None,
                             "over": len(means), "of": len(parts)}
    return {"tasks": tasks, "averages": averages}
