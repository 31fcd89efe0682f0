"""`python -m lepton sizes`: the table of sizes, counted on the built models."""

import argparse
from typing import Any

from lepton.cli.arguments import add_json, print_json
from lepton.presets import SIZES

STATE_LENGTH = 8192
"""Tokens after which the state is measured; its size does not depend on it."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's flags."""
    add_json(parser)
    parser.add_argument("--markdown", action="store_true", help="print the table in the README's form")


def run(args: argparse.Namespace) -> int:
    """Print the sizes as a table, as Markdown or as a JSON list."""
    sizes = measure()
    if args.json:
        print_json(sizes)
    else:
        print(markdown(sizes) if args.markdown else table(sizes))
    return 0


def measure() -> list[dict[str, Any]]:
    """Return an entry for each size, its parameters counted on the model that is built (without allocating it)."""
    from lepton.api import create_lepton
    from lepton.model.weights import on_meta_device

    entries = []
    for name, preset in SIZES.items():
        with on_meta_device():
            model = create_lepton(name)
        entries.append(
            {
                "name": name,
                "params": model.num_params(),
                "target": preset.target_params,
                "width": preset.width,
                "layers": preset.layers,
                "state_bytes": model.state_bytes(STATE_LENGTH),
                "purpose": preset.purpose,
            }
        )
    return entries


def table(sizes: list[dict[str, Any]]) -> str:
    """Return the sizes as text in aligned columns."""
    rows = [("size", "params", "target", "width", "layers", "state", "for"), *map(_cells, sizes)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]

    lines = []
    for cells in rows:
        left, *right, last = zip(cells, widths, strict=True)
        figures = (cell.rjust(width) for cell, width in right)
        lines.append("  ".join([left[0].ljust(left[1]), *figures, last[0]]))
    return "\n".join(lines)


def markdown(sizes: list[dict[str, Any]]) -> str:
    """Return the sizes as the Markdown table that stands in the README."""
    rows = [f"| {' | '.join((cells[0].upper(), *cells[1:]))} |" for cells in map(_cells, sizes)]
    head = "| Model | Params | Target | Width | Layers | State per sequence, fp32 | When to use it |"
    return "\n".join([head, "|---|--:|--:|--:|--:|--:|---|", *rows])


def _cells(size: dict[str, Any]) -> tuple[str, ...]:
    return (
        size["name"],
        f"{size['params'] / 1e6:,.1f} M",
        f"{size['target'] / 1e6:,.0f} M",
        str(size["width"]),
        str(size["layers"]),
        f"{size['state_bytes'] / 1e6:.1f} MB",
        size["purpose"],
    )
