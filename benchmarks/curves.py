"""Line charts side by side as SVG text: no library, few bytes, readable on light and dark pages."""

import itertools
import math
from collections.abc import Sequence
from html import escape
from typing import NamedTuple

PANEL, GAP = 312, 16
LEFT, TOP, RIGHT, BOTTOM = 34, 30, 58, 28
"""Margins of a panel, around the lines."""
HEIGHT = 180
"""Of the lines."""
LABEL = 14
"""Least distance of two labels, from line to line."""
TICKS = 4
"""About so many on an axis."""
LIGHT = ("#0969da", "#1a7f37", "#bc4c00", "#8250df", "#59636e")
DARK = ("#4493f8", "#3fb950", "#db6d28", "#ab7df8", "#9198a1")
"""Colours of the lines, in turn."""
STYLE = (
    "text{font:12px system-ui,sans-serif;fill:#1f2328}.h{font-size:13px;font-weight:600}.g{stroke:#d1d9e0}"
    "polyline{fill:none;stroke:currentColor;stroke-width:2;stroke-linejoin:round}.e{fill:currentColor}"
)

Point = tuple[float, float]


class Line(NamedTuple):
    """One curve; its label stands at its end."""

    label: str
    points: Sequence[Point]


class Panel(NamedTuple):
    """What is drawn over one pair of axes."""

    heading: str
    lines: Sequence[Line]


def line_chart(title: str, panels: Sequence[Panel], *, span: float = math.inf) -> str:
    """Draw panels side by side.

    Args:
        title: for readers who do not see the chart.
        panels: from left to right; a line has the colour of its place in its panel, and points of finite numbers.
        span: most of the vertical axis that is shown, upwards from the lowest value; what lies above is cut off.
    """
    colours = [f".c{i}{{color:{colour}}}" for i, colour in enumerate(LIGHT)]
    dark = [f".c{i}{{color:{colour}}}" for i, colour in enumerate(DARK)]
    style = "".join([STYLE, *colours, "@media(prefers-color-scheme:dark){text{fill:#e6edf3}.g{stroke:#3d444d}", *dark])
    width, height = len(panels) * (PANEL + GAP) - GAP, TOP + HEIGHT + BOTTOM
    parts = [part for i, panel in enumerate(panels) for part in _panel(panel, i * (PANEL + GAP), span)]
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {max(width, 1)} {height}" role="img">'
    return "\n".join([head, f"<title>{escape(title)}</title>", f"<style>{style}}}</style>", *parts, "</svg>", ""])


def _panel(panel: Panel, x0: float, span: float) -> list[str]:
    """Return the elements of a panel whose left edge is at x0."""
    lines = [
        Line(label, [point for point in points if all(map(math.isfinite, point))]) for label, points in panel.lines
    ]
    points = [point for line in lines for point in line.points] or [(1.0, 1.0)]
    most_x, low = max(x for x, _ in points) or 1.0, min(y for _, y in points)
    high = min(max(y for _, y in points), low + span)
    if high == low:
        high += 1.0
    width = PANEL - LEFT - RIGHT

    def across(x: float) -> float:
        return width * x / most_x

    def down(y: float) -> float:
        return HEIGHT * (high - y) / (high - low)

    left = x0 + LEFT
    parts = [f'<text class="h" x="{x0}" y="16">{escape(panel.heading)}</text>']
    marks = ticks(low, high)
    digits = max(len(f"{y:g}".partition(".")[2]) for y in marks)
    for y in marks:
        at = TOP + down(y)
        parts.append(f'<path class="g" d="M{left} {at:.1f}h{width}"/>')
        parts.append(f'<text x="{left - 5}" y="{at + 4:.1f}" text-anchor="end">{y:.{digits}f}</text>')
    for x in ticks(0, most_x):
        parts.append(f'<text x="{left + across(x):.1f}" y="{TOP + HEIGHT + 18}" text-anchor="middle">{x:g}</text>')
    # An inner <svg> shows nothing outside itself.
    parts.append(f'<svg x="{left}" y="{TOP - 2}" width="{width + 2}" height="{HEIGHT + 4}">')
    for i, line in enumerate(lines):
        path = " ".join(f"{across(x):.1f},{down(y) + 2:.1f}" for x, y in line.points)
        parts.append(f'<polyline class="c{i % len(LIGHT)}" points="{path}"/>')
    parts.append("</svg>")
    ends = {i: line.points[-1] for i, line in enumerate(lines) if line.points}
    heights = apart([TOP + down(min(y, high)) for _, y in ends.values()], LABEL)
    for (i, (x, _)), at in zip(ends.items(), heights, strict=True):
        label = escape(lines[i].label)
        parts.append(
            f'<text class="e c{i % len(LIGHT)}" x="{left + across(x) + 6:.1f}" y="{at + 4:.1f}">{label}</text>'
        )
    return parts


def ticks(low: float, high: float) -> list[float]:
    """Return the round numbers in [low, high] that an axis shows."""
    step = 10 ** math.floor(math.log10((high - low) / TICKS))
    step *= next(factor for factor in (1, 2, 5, 10) if (high - low) / (factor * step) < TICKS + 1.5)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [round(i * step, 10) for i in range(first, last + 1)]


def apart(places: Sequence[float], distance: float) -> list[float]:
    """Move places apart, upwards and in their order, until no two are closer than `distance`."""
    moved = list(places)
    order = sorted(range(len(places)), key=lambda i: -places[i])
    for below, i in itertools.pairwise(order):
        moved[i] = min(moved[i], moved[below] - distance)
    return moved
