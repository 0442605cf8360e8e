"""Curves of percentages in rows of small panels, as an SVG."""

WIDTH, HEIGHT, GAP, LEFT, TOP = 180, 130, 26, 60, 84            # of a panel, and around it; pixels
ROW = HEIGHT + 84


def line(colour: str, dashed: bool) -> str:
    dashes = ' stroke-dasharray="5 3"' if dashed else ""
    return f'fill="none" stroke="{colour}" stroke-width="2"{dashes}/>'


def panel(curves: list, xs: list, left: float, top: float) -> list[str]:
    """The parts of one panel whose upper left corner is (left, top); xs are evenly spaced."""
    parts = [f'<rect x="{left}" y="{top}" width="{WIDTH}" height="{HEIGHT}" fill="none" '
             'stroke="#bbb"/>']
    place = {x: left + 10 + n * (WIDTH - 20) / (len(xs) - 1) for n, x in enumerate(xs)}
    for x in xs:
        parts.append(f'<text x="{place[x]:.0f}" y="{top + HEIGHT + 14}" text-anchor="middle" '
                     f'font-size="11">{x}</text>')
    for colour, dashed, values in curves:
        points = [f"{place[x]:.1f},{top + height(y):.1f}" for x, y in values.items()]
        parts.append(f'<polyline points="{" ".join(points)}" {line(colour, dashed)}')
    return parts


def height(percent: float) -> float:
    """Where in a panel a percentage is, from its top."""
    return HEIGHT - 5 - percent / 100 * (HEIGHT - 10)


def draw(legend: list, rows: dict, xs: list, foot: str) -> str:
    """The SVG.

    legend: (name, colour, dashed); rows: {title: {panel's title: [(colour, dashed, {x: y})]}}.
    """
    parts = []
    for n, (name, colour, dashed) in enumerate(legend):
        x = LEFT + 150 * n
        parts.append(f'<path d="M{x} 16h24" {line(colour, dashed)}'
                     f'<text x="{x + 30}" y="20">{name}</text>')
    for m, (title, panels) in enumerate(rows.items()):
        top = TOP + m * ROW
        parts.append(f'<text x="{LEFT}" y="{top - 32}" font-weight="bold">{title}</text>')
        for percent in (0, 50, 100):
            parts.append(f'<text x="{LEFT - 6}" y="{top + height(percent) + 4:.0f}" '
                         f'text-anchor="end" font-size="11">{percent}</text>')
        for n, (name, curves) in enumerate(panels.items()):
            left = LEFT + n * (WIDTH + GAP)
            parts.append(f'<text x="{left}" y="{top - 8}" font-size="12">{name}</text>')
            parts += panel(curves, xs, left, top)
    columns = max(len(panels) for panels in rows.values())
    width, bottom = LEFT + columns * (WIDTH + GAP), TOP + len(rows) * ROW - 28
    parts.append(f'<text x="{LEFT}" y="{bottom - 8}" font-size="12">{foot}</text>')
    return (f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {bottom}" '
            'font-family="Helvetica, Arial, sans-serif" font-size="13">\n'
            f'<rect width="{width}" height="{bottom}" fill="#fff"/>\n'
            + "\n".join(parts) + "\n</svg>\n")
