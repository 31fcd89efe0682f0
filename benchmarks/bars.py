"""A bar chart as SVG text: no library, few bytes, readable on light and dark pages."""

from collections.abc import Sequence
from html import escape
from typing import NamedTuple

WIDTH, LABEL, VALUE, BAR, GAP, HEAD = 640, 190, 80, 18, 6, 30
STYLE = (
    "text{font:13px system-ui,sans-serif;fill:#1f2328}.h{font-weight:600}.own{fill:#0969da}.peer{fill:#8c959f}"
    "@media(prefers-color-scheme:dark){text{fill:#e6edf3}.own{fill:#4493f8}.peer{fill:#7d8590}}"
)


class Bar(NamedTuple):
    """One value."""

    label: str
    value: float
    own: bool
    """Whether it is ours, and not what it is compared with."""
    digits: int = 0
    """Digits of the value that are shown after the point."""


def bar_chart(title: str, panels: Sequence[tuple[str, Sequence[Bar]]]) -> str:
    """Draw panels of horizontal bars, a heading and a scale each."""
    parts, y = [], 0
    for heading, bars in panels:
        parts.append(f'<text class="h" x="0" y="{y + 20}">{escape(heading)}</text>')
        y += HEAD
        most = max((bar.value for bar in bars), default=0) or 1
        for bar in bars:
            width = max(1.0, (WIDTH - LABEL - VALUE) * bar.value / most)
            kind = "own" if bar.own else "peer"
            parts += [
                f'<text x="{LABEL - 8}" y="{y + 14}" text-anchor="end">{escape(bar.label)}</text>',
                f'<rect class="{kind}" x="{LABEL}" y="{y}" width="{width:.1f}" height="{BAR}" rx="3"/>',
                f'<text x="{LABEL + width + 6:.1f}" y="{y + 14}">{bar.value:,.{bar.digits}f}</text>',
            ]
            y += BAR + GAP
        y += GAP
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {max(y, 1)}" role="img">'
    return "\n".join([head, f"<title>{escape(title)}</title>", f"<style>{STYLE}</style>", *parts, "</svg>", ""])
