"""Draw the main result and its controls, those of these rows that there are, as an SVG.

    python assets/draw_results.py runs/sample/evaluate/results.json assets/results.svg

Exact match for the built-in suite, else ROUGE-L.
"""
import json
import os
import sys

ROWS = {                                        # key in results.json -> what the picture calls it
    "meta": "the T5 reading the instruction with every input",
    "meta_shuffled": "the T5 reading another task's instruction",
    "meta_lora": "one LoRA for all tasks, reading the instruction",
    "tagi": "TAGI: the instruction once, as LoRA weights",
    "tagi_unseen_wording": "TAGI, instruction in unseen wording",
    "tagi_shuffled": "TAGI with another task's instruction",
    "tagi_empty": "TAGI with an empty instruction",
    "no_instruction": "the frozen T5 without an instruction",
}
SETTINGS = {0: ("definition alone", "#2a6fb0"), 2: ("with two demonstrations", "#8fbbe0")}
LEFT, WIDTH, BAR, GAP, TOP = 370, 390, 13, 14, 46           # pixels


def draw(bench: str, results: list[dict]) -> str:
    """The SVG of results.json's benchmark and list of rows."""
    parts = []
    metric, title = ("exact_match", "exact match") if bench == "sample" else ("rouge_l", "ROUGE-L")
    rows = {(r["key"], r["demos"]): r for r in results}
    largest = 100 if metric == "exact_match" else 40
    for n, (demos, (name, colour)) in enumerate(SETTINGS.items()):
        x = LEFT + 190 * n
        parts.append(f'<rect x="{x}" y="14" width="12" height="12" fill="{colour}"/>'
                     f'<text x="{x + 18}" y="25">{name}</text>')
    y = TOP
    for key, name in ROWS.items():
        if (key, 0) not in rows:
            continue
        parts.append(f'<text x="{LEFT - 10}" y="{y + BAR + 4}" text-anchor="end">{name}</text>')
        for demos, (_, colour) in SETTINGS.items():
            score, (low, high) = rows[key, demos][metric], rows[key, demos][metric + "_interval"]
            middle, scale = y + BAR / 2, WIDTH / largest
            parts.append(
                f'<rect x="{LEFT}" y="{y}" width="{score * scale:.1f}" height="{BAR - 1}" '
                f'fill="{colour}"/>'
                f'<path d="M{LEFT + low * scale:.1f} {middle}H{LEFT + high * scale:.1f}" '
                'stroke="#222" stroke-width="2"/>'
                f'<text x="{LEFT + high * scale + 8:.1f}" y="{y + BAR - 2}" font-size="12">'
                f'{score:.1f}</text>')
            y += BAR
        y += GAP
    parts.append(f'<path d="M{LEFT} {TOP - 6}V{y - GAP + 6}" stroke="#888"/>'
                 f'<text x="{LEFT}" y="{y + 8}" font-size="12">{title} on unseen tasks, with '
                 '95 % intervals over tasks (black)</text>')
    return (f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 820 {y + 20}" '
            'font-family="Helvetica, Arial, sans-serif" font-size="13">\n'
            f'<rect width="820" height="{y + 20}" fill="#fff"/>\n' + "\n".join(parts) + "\n</svg>\n")


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit("error: python assets/draw_results.py RESULTS.json PICTURE.svg")
    if os.path.exists(sys.argv[2]):
        with open(sys.argv[2], "rb") as f:
            if f.read(4) not in (b"<svg", b""):
                sys.exit(f"error: {sys.argv[2]} is no picture of this script's, and stays; name another")
    with open(sys.argv[1], encoding="utf-8") as f:
        found = json.load(f)
    picture = draw(found["bench"], found["results"])
    with open(sys.argv[2], "w", encoding="utf-8") as f:
        f.write(picture)
