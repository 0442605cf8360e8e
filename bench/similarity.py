"""How alike is the LoRA that TAGI makes of different tasks' instructions? Cosines, and a heat map.

A task's update is B·A of all sites as one vector. Much of it may be the same for every task, so
cosines are told of the whole update, and of what is left of it without the tasks' mean.

    K  tasks      r  LoRA rank      D_in, D_out  width of an adapted layer
"""
import numpy as np
import torch

from bench import terminal

AT_ONCE = 16                                    # adapters that are made at a time


def of_tasks(tagi, tasks, path: str) -> tuple[dict | None, str]:
    """(mean cosines of two tasks of one category and of two, the words that tell them).

    Draws the heat map, a PNG file at `path`. (None, a sentence) where the model makes no LoRA.
    """
    tasks = sorted(tasks, key=lambda task: task.category)
    categories = [task.category for task in tasks]
    weights = lora_of(tagi, [task.definitions[0] for task in tasks])
    if weights is None:
        return None, "This model has no hypernetwork: there is no LoRA to compare."
    whole = gram(weights)
    own = without_mean(whole)
    share = (own.trace() / whole.trace().clamp_min(1e-30)).item()
    result, told = {"own_share": share}, []
    for name, products in (("whole", whole), ("own", own)):
        within, between = within_and_between(cosines(products), categories)
        result[name] = {"within": within, "between": between}
        told.append(f"within a category {in_digits(within)}, between categories "
                    f"{in_digits(between)}")
    text = (f"Mean cosine similarity of two tasks' LoRA updates: {told[0]}. Without the tasks' "
            f"mean update: {told[1]}; that part has {100 * share:.1f} % of the updates' squared "
            "length.")
    if not heat_map(cosines(own), categories, path):
        text += "\n\nThe picture of it, similarity.png, needs matplotlib: pip install matplotlib"
    return result, text


def in_digits(mean: float | None) -> str:
    return "– (no such pair)" if mean is None else f"{mean:.3f}"


def lora_of(tagi, instructions: list[str]):
    """{site: (A (K, r, D_in), B (K, D_out, r))} of these instructions; None: no hypernetwork."""
    parts = []
    for start in range(0, len(instructions), AT_ONCE):
        weights = tagi.adapt(instructions[start:start + AT_ONCE]).weights
        if weights is None:
            return None
        parts.append(weights)
    stacked = {}
    for site in parts[0]:
        A = torch.cat([part[site][0].cpu() for part in parts])                  # (K, r, D_in)
        B = torch.cat([part[site][1].cpu() for part in parts])                  # (K, D_out, r)
        stacked[site] = A, B
    return stacked


def gram(weights) -> torch.Tensor:
    """Products of K tasks' updates, B·A of all sites as one vector, with each other, (K, K)."""
    # ⟨B1·A1, B2·A2⟩ = ⟨B1ᵀB2, A1·A2ᵀ⟩: r × r, never D_out × D_in. One task against all at a time.
    total = 0
    for A, B in weights.values():
        A, B = A.double(), B.double()
        rows = [((b.mT @ B) * (a @ A.mT)).sum((-2, -1)) for a, b in zip(A, B)]
        total = total + torch.stack(rows)
    return total


def without_mean(products) -> torch.Tensor:
    """The products, (K, K), of the same K vectors less their mean."""
    mean = products.mean(0)                     # of every vector with the mean vector, (K,)
    return products - mean - mean[:, None] + mean.mean()


def cosines(products) -> torch.Tensor:
    lengths = products.diagonal().clamp_min(1e-30).sqrt()       # an update may be zero
    return products / lengths / lengths[:, None]


def within_and_between(similar, categories) -> tuple[float | None, float | None]:
    """The mean over pairs of tasks of one category, and of two; None where there is none."""
    names = np.array(categories)
    same = torch.from_numpy(names[:, None] == names)
    pairs = torch.ones_like(same).triu(1)                       # each once, no task with itself
    means = []
    for chosen in (pairs & same, pairs & ~same):
        means.append(similar[chosen].mean().item() if chosen.any() else None)
    return tuple(means)


def heat_map(similar, categories, path: str) -> bool:
    """Draw the cosines, with lines between categories; False where matplotlib is missing."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return False
    K = len(categories)
    starts = [k for k in range(K) if k == 0 or categories[k] != categories[k - 1]]
    names = [terminal.label(categories[start]) for start in starts]
    middles = [(start + end - 1) / 2 for start, end in zip(starts, [*starts[1:], K])]
    figure = Figure(figsize=(8, 6.5), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(similar.numpy(), vmin=-1, vmax=1, cmap="RdBu_r")
    for start in starts[1:]:
        axes.axhline(start - 0.5, color="black", linewidth=0.6)
        axes.axvline(start - 0.5, color="black", linewidth=0.6)
    axes.set_xticks(middles, names, rotation=90, fontsize=7)
    axes.set_yticks(middles, names, fontsize=7)
    axes.set_title("Cosine similarity of the tasks' LoRA updates, their mean taken off",
                   fontsize=10)
    figure.colorbar(image)
    terminal.save_picture(figure, path, dpi=110)
    return True
