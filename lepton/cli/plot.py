"""`python -m lepton plot`: the metrics of one or several runs as a chart."""

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lepton.errors import InputError, reason
from lepton.requirements import need

METRICS = "metrics.jsonl"
PANELS = {
    "loss": "training loss, nats per token",
    "val_loss": "validation loss, nats per token",
    "grad_norm": "norm of the gradients",
    "tokens_per_s": "tokens a second",
    "tokens_per_step": "tokens per pass with drafts",
    "calibration_error": "calibration error",
}
"""What is drawn, in this order, if a run has it: the name in metrics.jsonl and the title."""
COLUMNS = 3
SMOOTHED = ("loss", "grad_norm")
"""What is noisy: the raw values are drawn pale, and their running mean in full."""
FORMATS = (".svg", ".png", ".pdf")
Runs = Mapping[str, Sequence[Mapping[str, Any]]]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's flags."""
    parser.add_argument("runs", nargs="+", metavar="RUN", help=f"checkpoint folder, or its {METRICS}")
    parser.add_argument("--out", default="runs.svg", metavar="FILE", help="SVG, PNG or PDF (default: %(default)s)")
    parser.add_argument(
        "--smooth", type=int, default=20, metavar="N", help="steps of the running mean (default: %(default)s)"
    )


def run(args: argparse.Namespace) -> int:
    """Draw a panel for each metric, with a line for each run, and say where the file is."""
    out = Path(args.out)
    if out.suffix not in FORMATS:
        raise InputError(f"--out {args.out}: give a name that ends in {', '.join(FORMATS)}")
    if args.smooth < 1:
        raise InputError(f"--smooth {args.smooth}: must be at least 1")
    need("matplotlib", "a chart")
    import matplotlib

    figure = chart(read_runs(args.runs), args.smooth)
    try:
        with matplotlib.rc_context({"svg.hashsalt": "lepton"}):  # equal runs give equal files
            figure.savefig(out, metadata={"Date": None} if out.suffix == ".svg" else None)
    except OSError as error:
        raise InputError(f"cannot write {out}: {reason(error)}") from None
    print(f"{len(args.runs)} run{'s' * (len(args.runs) > 1)}: {out}")
    return 0


def read_runs(places: Sequence[str]) -> Runs:
    """Return the records of each run, by a name as short as tells them apart.

    Raises:
        InputError: a place is no run, or has no records yet.
    """
    from lepton.train.metrics_log import MetricsLog

    found = {}
    for place in places:
        path = Path(place) / METRICS if Path(place).is_dir() else Path(place)
        if not path.is_file():
            raise InputError(f"{place}: no {METRICS} there; give the --checkpoint_dir of a run")
        records = MetricsLog.read(path)
        if not records:
            raise InputError(f"{path}: holds no records; has the run done a step?")
        found[path.absolute()] = records
    return dict(zip(short_names([*found]), found.values(), strict=True))


def short_names(paths: Sequence[Path]) -> list[str]:
    """Return the last folders of each path, as many as make all of them different."""
    folders = [path.parent.parts for path in paths]
    for count in range(1, max(map(len, folders))):
        names = ["/".join(parts[-count:]) for parts in folders]
        if len({*names}) == len(names):
            return names
    return [str(path.parent) for path in paths]


def chart(runs: Runs, smooth: int) -> Any:
    """Return a matplotlib figure: a panel for each metric that a run has, a line for each run."""
    from matplotlib.figure import Figure

    given = [name for name in PANELS if any(name in record for records in runs.values() for record in records)]
    rows = -(-len(given) // COLUMNS)
    figure = Figure(figsize=(4.2 * min(len(given), COLUMNS), 2.9 * rows), layout="constrained")
    for place, name in enumerate(given, 1):
        axes = figure.add_subplot(rows, min(len(given), COLUMNS), place)
        axes.set_title(PANELS[name], fontsize=10, loc="left")
        axes.set_xlabel("step", fontsize=8)
        axes.tick_params(labelsize=8)
        axes.grid(alpha=0.3)
        for number, (label, records) in enumerate(runs.items()):
            steps = [record["step"] for record in records if name in record]
            values = [record[name] for record in records if name in record]
            colour = f"C{number % 10}"
            if name in SMOOTHED and smooth > 1:
                axes.plot(steps, values, color=colour, alpha=0.25, linewidth=0.8)
                values = running_mean(values, smooth)
            axes.plot(steps, values, color=colour, label=label, marker="." if len(steps) < 10 else None)
        if place == 1 and len(runs) > 1:
            axes.legend(fontsize=8)
    return figure


def running_mean(values: Sequence[float], count: int) -> list[float]:
    """Return for each value the mean of it and up to `count` - 1 before it."""
    means, total = [], 0.0
    for place, value in enumerate(values):
        total += value - (values[place - count] if place >= count else 0)
        means.append(total / min(place + 1, count))
    return means
