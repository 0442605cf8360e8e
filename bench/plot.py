"""Draw the curves of training runs: losses, validation and scores over steps, in one picture.

    python -m bench.plot runs/a/finetune runs/b/finetune --out curves.svg
    python -m bench.plot runs/a --out all.png               # every stage below it
    python -m bench.plot runs/a/finetune --terms loss,grad_norm

A run is a stage's folder with its log.jsonl. Scores are those that evaluate.py left for its
checkpoints, step-000500, best or the last, each at its checkpoint's step: results.json in a folder
beside the stage's or in it, and those that were set aside there for a later checkpoint's.
Needs matplotlib.
"""
import glob
import io
import json
import math
import os
import re
import sys
import tempfile

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))  # started by path
import common
import config
from bench import terminal
from common import UserError, named_file

# What a line of a log holds beside losses: drawn only where --terms names it.
NO_LOSSES = ("lr", "grad_norm", "tokens_per_second", "peak_gib", "skipped", "seconds")
# A loss on validation tasks with the right instruction, and that with a wrong one: one panel.
PAIRS = {"validation": "validation_shuffled"}
SCORES = {"exact_match": "exact match", "rouge_l": "ROUGE-L"}       # key of a result -> title
LARGEST = 1e30                                  # beyond it axes overflow
WRITER = "TAGI bench.plot"                      # in a picture: it may be replaced


def parser():
    p = config.Parser(__doc__)
    p.add_argument("run", nargs="+", type=config.beside,
                   help="folders of stages, or of runs that hold some")
    p.add_argument("--out", type=config.path, default="curves.svg",
                   help="the picture, .svg or .png")
    p.add_argument("--terms", help="what to draw, as the logs name it, with commas between; "
                                   "default: all losses")
    return p


# ------------------------------------------------------------------------------------------ logs
# A curve is {step: value}.

def stage_folders(paths: list[str]) -> list[str]:
    """The folders with a log among these and those right below them, each once."""
    found = []
    for path in paths:
        below = sorted(glob.glob(f"{glob.escape(path)}/*/log.jsonl"))
        logs = [path] if os.path.isfile(f"{path}/log.jsonl") else map(os.path.dirname, below)
        logs = list(logs)
        if not logs:
            raise UserError(f"{path}: no log.jsonl there or one folder below; name the folder of "
                            "a stage that was trained, such as runs/sample/finetune")
        found += logs
    return list({os.path.realpath(folder): folder for folder in found}.values())


def read_log(folder: str) -> dict:
    """{group: {term: curve}} of a stage's logs; groups are those of LoRA teachers, elsewhere "".

    What a kill cut off is left out; of a step that was run again after one the later counts.
    Raises UserError where nothing is left.
    """
    groups = {}
    paths = [f"{folder}/log.jsonl", *sorted(glob.glob(f"{glob.escape(folder)}/log-*.jsonl"))]
    for path in paths:                          # log-1.jsonl: of a rank with teachers of its own
        with named_file(path, "name another run"):
            with open(path, encoding="utf-8", errors="replace") as f:
                lines = f.read().split("\n")
        for line in lines:
            try:
                row = json.loads(line)
            except (ValueError, RecursionError):
                continue
            if not isinstance(row, dict) or not is_number(row.get("step")):
                continue
            terms = groups.setdefault(str(row.get("group", "")), {})
            for term, value in row.items():
                if term != "step" and is_number(value):
                    terms.setdefault(term, {})[row["step"]] = float(value)
    if not groups:
        raise UserError(f"{paths[0]} has no step yet, or is no log; train on, or name another run")
    return groups


def is_number(value) -> bool:
    """Whether it can be drawn; a loss that was no number is a gap."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return False
    return abs(value) < LARGEST and not math.isnan(value)


# ---------------------------------------------------------------------------------------- scores

def read_scores(folder: str) -> dict:
    """{metric: {row: curve}} of the evaluations of this run's checkpoints, definition alone.

    A metric is one of SCORES; of other tasks than those of the test, "metric, split".
    """
    above = os.path.dirname(os.path.abspath(folder))
    scores = {metric: {} for metric in SCORES}
    for path in results_below(above):
        try:
            checkpoint = checkpoint_of(path, above, folder)
            if checkpoint is None:
                continue
            step, split, results = read_results(path, checkpoint)
        except UserError as error:              # the curves are there without it
            print(f"left out: {error}")
            continue
        for (row, metric), value in results.items():
            metric += "" if split == "test" else f", {split}"
            scores.setdefault(metric, {}).setdefault(row, {})[step] = value
    return scores


def results_below(folder: str) -> list[str]:
    """Evaluations' results; those first that were set aside, as results.json.1, for later ones."""
    found = {}                                  # path -> its number
    for pattern in ("*/results.json*", "*/*/results.json*"):
        for path in sorted(glob.glob(f"{glob.escape(folder)}/{pattern}")):
            number = os.path.basename(path).removeprefix("results.json")
            if number == "" or re.fullmatch(r"\.\d+", number):
                found[path] = int(number[1:]) if number else math.inf
    return sorted(found, key=found.get)


def checkpoint_of(path: str, runs: str, folder: str) -> str | None:
    """The checkpoint in this stage's folder of which this results.json tells; else None.

    runs: the folder that holds the stage's, wherever it was when the evaluation was written.
    """
    place = read_json(path).get("checkpoint")
    if isinstance(place, str):                  # it may be gone since: its step is told, too
        place = os.path.join(os.path.dirname(path), place)
        return place if is_within(place, folder) else None
    # Earlier ones do not tell. What is beside them is of the newest evaluation there.
    beside = os.path.join(os.path.dirname(path), "config.yaml")
    if not path.endswith(".json") or not os.path.isfile(beside):
        return None
    options = common.read_yaml(beside, "evaluate again")
    then = str(options.get("runs") or runs)
    checkpoint = str(options.get("checkpoint") or os.path.join(then, "finetune"))
    moved = os.path.join(runs, os.path.relpath(checkpoint, then))
    place = checkpoint if os.path.exists(checkpoint) else moved
    is_ours = is_within(place, folder) and os.path.isfile(f"{place}/config.yaml")
    return place if is_ours else None


def is_within(path: str, folder: str) -> bool:
    between = os.path.relpath(os.path.realpath(path), os.path.realpath(folder))
    return between.split(os.sep)[0] != os.pardir


def read_json(path: str) -> dict:
    """What an evaluation's results.json holds; {} where it is damaged."""
    try:
        with open(path, encoding="utf-8") as f:
            told = json.load(f)
    except (OSError, ValueError, RecursionError):
        return {}
    return told if isinstance(told, dict) else {}


def read_results(path: str, checkpoint: str) -> tuple[int, str, dict]:
    """(the checkpoint's step, the split of the tasks, {(row, metric): value})."""
    found, told = {}, read_json(path)
    with named_file(path, "evaluate again"):
        try:
            step = told.get("step")
            if step is None:                    # it was not told, once
                step = common.read_record(checkpoint)["step"]
            for result in told["results"]:
                row = result["key"]
                if row in ("tagi", "tagi_shuffled") and not result["demos"]:
                    for metric in SCORES:
                        if is_number(result[metric]):
                            found[row, metric] = float(result[metric])
        except (KeyError, TypeError) as error:
            raise ValueError(f"no results of an evaluation: {error}") from None
    return int(step), str(told.get("split", "test"))[:40], found


# --------------------------------------------------------------------------------------- picture

def panels_of(runs: dict, terms: list[str] | None) -> dict:
    """{title: [(run's number, is it that of a wrong instruction, curve)]}, in the order to draw.

    runs: {name: (groups of its log, its scores)}. Raises UserError where a term is in no log.
    """
    logged = []
    for groups, _ in runs.values():
        for its_terms in groups.values():
            logged += [term for term in its_terms if term not in logged]
    for term in terms or []:
        if term not in logged:
            raise UserError(f"--terms: no log has {term[:40]}{config.closest(term, logged)}; they "
                            f"have {', '.join(logged)[:120]}")
    wrong = set(PAIRS.values())
    wanted = terms or [x for x in logged if x not in NO_LOSSES and x not in wrong]
    panels = {}
    for term in wanted:
        for n, (groups, _) in enumerate(runs.values()):
            for its_terms in groups.values():
                for name in (term, PAIRS.get(term)):
                    if name in its_terms:
                        curves = panels.setdefault(term.replace("_", " "), [])
                        curves.append((n, name in wrong, its_terms[name]))
    for n, (_, scores) in enumerate(runs.values()):
        for metric, rows in scores.items():
            name, _, split = metric.partition(", ")
            title = SCORES[name] + (f", {split} tasks" if split else "")
            for row, curve in rows.items():
                panels.setdefault(title, []).append((n, row == "tagi_shuffled", curve))
    if not panels:
        raise UserError("these logs have no loss; choose with --terms among "
                        f"{', '.join(logged)[:120]}")
    return panels


def names_of(folders: list[str]) -> list[str]:
    """Each run's name: its last two folders, or all of its path where two would be alike."""
    places = [os.path.abspath(folder).split(os.sep) for folder in folders]
    names = ["/".join(place[-2:]) for place in places]
    if len(set(names)) < len(names):
        names = [os.sep.join(place) for place in places]
    return ["".join(c if c.isprintable() else "?" for c in name) for name in names]


def draw(names: list[str], panels: dict, kind: str) -> bytes:
    """The picture, a panel for each title, a colour for each run, wrong instructions dashed."""
    try:
        import matplotlib
        from matplotlib.figure import Figure
        from matplotlib.lines import Line2D
        from matplotlib.ticker import MaxNLocator
    except ImportError:
        raise UserError("a picture needs matplotlib: pip install matplotlib") from None
    columns = min(3, math.ceil(len(panels) ** 0.5))
    rows = -(-len(panels) // columns)
    figure = Figure((4.2 * columns, 2.8 * rows + 0.25 * len(names) + 0.4), layout="constrained")
    last = max(max(curve) for curves in panels.values() for *_, curve in curves) or 1
    axes = figure.subplots(rows, columns, squeeze=False).flatten()
    for place in axes[len(panels):]:
        place.set_axis_off()
    for place, (title, curves) in zip(axes, panels.items()):
        place.set_title(terminal.label(title), fontsize=10, loc="left")
        place.set_xlabel("step", fontsize=8)
        place.set_xlim(0, 1.02 * last)
        place.tick_params(labelsize=8)
        place.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))
        place.grid(alpha=0.3)
        for n, is_wrong, curve in curves:
            steps = sorted(curve)
            place.plot(steps, [curve[step] for step in steps], color=f"C{n % 10}", linewidth=1.2,
                       linestyle="--" if is_wrong else "-", marker="o" if len(steps) < 5 else "",
                       markersize=3)
    lines = [Line2D([], [], color=f"C{n % 10}") for n in range(len(names))]
    labels = [terminal.label(name) for name in names]
    if any(is_wrong for curves in panels.values() for _, is_wrong, _ in curves):
        lines.append(Line2D([], [], color="grey", linestyle="--"))
        labels.append("with another task's instruction")
    figure.legend(lines, labels, loc="outside lower left", fontsize=8, frameon=False)
    picture = io.BytesIO()
    # Text stays text, and the same curves make the same file.
    metadata = {"Creator": WRITER, "Date": None} if kind == "svg" else {"Software": WRITER}
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "plot"}):
        terminal.save_picture(figure, picture, format=kind, dpi=150, metadata=metadata)
    return picture.getvalue()


def check_ours(path: str) -> None:
    """Raises UserError where a file is there that is no picture of ours: it is not replaced."""
    if os.path.lexists(path):
        with named_file(path, "choose another --out"), open(path, "rb") as f:
            ours = WRITER.encode() in f.read(4096)
        if not ours:
            raise UserError(f"{path} is there and was not drawn by this program; choose another "
                            "--out, or remove it")


def write(path: str, picture: bytes) -> None:
    """Write it in one step, to a folder that is made where there is none."""
    with named_file(path, "choose another --out", "written"):
        folder = os.path.dirname(os.path.abspath(path))
        os.makedirs(folder, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as new:
            with open(f"{new}/picture", "wb") as f:
                f.write(picture)
            os.replace(f"{new}/picture", path)


@common.command
@terminal.printing
def main(argv=None):
    args = parser().parse_args(argv)
    kind = os.path.splitext(args.out)[1].lower().removeprefix(".")
    if kind not in ("svg", "png"):
        raise UserError(f"--out {args.out[:80]}: a picture's name ends in .svg or .png")
    check_ours(args.out)
    folders = stage_folders(args.run)
    runs = {}
    for folder, name in zip(folders, names_of(folders)):
        runs[name] = (read_log(folder), read_scores(folder))
    terms = args.terms.split(",") if args.terms else None
    panels = panels_of(runs, terms)
    write(args.out, draw(list(runs), panels, kind))
    print(f"{args.out}: {', '.join(panels)} of {', '.join(runs)}")


if __name__ == "__main__":
    main()
