"""Runs as dots on a common scale, as SVG text: no library, few bytes, readable on light and dark pages."""

from collections.abc import Sequence
from html import escape
from typing import NamedTuple

WIDTH, LABEL, VALUE, ROW, HEAD = 640, 150, 70, 22, 30
RADIUS = 4
STYLE = (
    "text{font:13px system-ui,sans-serif;fill:#1f2328}.h{font-weight:600}.z{stroke:#8c959f}.g{stroke:#d1d9e0}"
    ".d{fill:#0969da;fill-opacity:.6}.m{stroke:#0969da;stroke-width:2}"
    "@media(prefers-color-scheme:dark){text{fill:#e6edf3}.z{stroke:#7d8590}.g{stroke:#3d444d}.d{fill:#4493f8}"
    ".m{stroke:#4493f8}}"
)


class Row(NamedTuple):
    """The runs of one kind, at least one."""

    label: str
    values: Sequence[float]


def dot_chart(title: str, panels: Sequence[tuple[str, Sequence[Row]]], *, digits: int = 3) -> str:
    """Draw panels of rows, a dot a run and a stroke at their mean, which also stands at the right with its sign.

    All panels have one scale, in which a line shows 0.

    Args:
        title: for readers who do not see the chart.
        panels: a heading and its rows, from top to bottom.
        digits: of a mean, after the point.
    """
    values = [value for _, rows in panels for row in rows for value in row.values]
    low, high = min([0.0, *values]), max([0.0, *values])
    span = (high - low) or 1.0

    def across(value: float) -> float:
        return LABEL + RADIUS + (WIDTH - LABEL - VALUE - 2 * RADIUS) * (value - low) / span

    parts, y = [], 0
    for heading, rows in panels:
        parts.append(f'<text class="h" x="0" y="{y + 20}">{escape(heading)}</text>')
        y += HEAD
        parts.append(f'<path class="z" d="M{across(0):.1f} {y}v{ROW * len(rows)}"/>')
        for row in rows:
            middle, mean = y + ROW / 2, sum(row.values) / len(row.values)
            parts.append(f'<text x="{LABEL - 8}" y="{middle + 4}" text-anchor="end">{escape(row.label)}</text>')
            parts.append(f'<path class="g" d="M{LABEL} {middle}H{WIDTH - VALUE}"/>')
            parts += [f'<circle class="d" cx="{across(x):.1f}" cy="{middle}" r="{RADIUS}"/>' for x in row.values]
            parts.append(f'<path class="m" d="M{across(mean):.1f} {middle - 8}v16"/>')
            parts.append(f'<text x="{WIDTH}" y="{middle + 4}" text-anchor="end">{mean:+.{digits}f}</text>')
            y += ROW
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {max(y + 6, 1)}" role="img">'
    return "\n".join([head, f"<title>{escape(title)}</title>", f"<style>{STYLE}</style>", *parts, "</svg>", ""])
