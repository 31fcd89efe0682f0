"""`python -m lepton calibrate`: fit what a checkpoint's uncertainty and depth mean, and write it into the file."""

import argparse
from typing import TYPE_CHECKING, Any

from lepton.cli.arguments import add_json, print_json
from lepton.cli.heldout import add_data_set, check_positive, open_data_set
from lepton.cli.loading import add_loading, load
from lepton.errors import InputError

if TYPE_CHECKING:
    from lepton.model import Lepton
    from lepton.train.calibration import Calibration, Outcomes

LABELS = {"ece": "ECE", "brier": "Brier", "auroc": "AUROC", "deep_at_half": "tokens that go deep at depth 0.5"}
"""Figures of the table by their names in JSON."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's flags."""
    add_loading(parser)
    add_data_set(parser)
    parser.add_argument("--out", metavar="PATH", help="checkpoint to write (default: the one that is read)")
    parser.add_argument(
        "--max_tokens",
        type=int,
        default=1 << 16,
        metavar="N",
        help="tokens to fit on, and to measure on (default: %(default)s of each)",
    )
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    """Fit on the first half of the validation split, print figures of the second, before and after, and save."""
    from lepton.train.calibration import calibrate, calibration_batches, collect, evaluation_batches

    check_positive(args, "max_tokens", "batch_size")
    model, tokenizer, step = load(args)
    if model.uncertainty is None and model.router is None:
        raise InputError(f"{args.checkpoint} has neither uncertainty nor router: there is nothing to calibrate")
    what, _, windows = open_data_set(args, model, tokenizer)
    seen = collect(model, evaluation_batches(windows, args.batch_size, args.max_tokens), args.max_tokens)
    before = figures(model, seen)
    fitted = calibrate(model, calibration_batches(windows, args.batch_size, args.max_tokens), args.max_tokens)
    after = figures(model, seen)
    out = args.out or args.checkpoint
    write(args.checkpoint, out, fitted)
    if args.json:
        print_json(
            {
                "checkpoint": args.checkpoint,
                "out": out,
                "step": step,
                "data": what,
                "calibration_tokens": fitted.tokens,
                "tokens": len(seen.wrong_N),
                "scale": fitted.line and fitted.line[0],
                "shift": fitted.line and fitted.line[1],
                "before": before,
                "after": after,
            }
        )
        return 0
    print(f"{args.checkpoint} (step {step}) on {what}")
    print(f"fitted on {fitted.tokens:,} tokens of its first half, measured on {len(seen.wrong_N):,} of its second")
    print(f"{'':<32}  {'before':>8}  {'after':>8}")
    for name, value in before.items():
        print(f"{LABELS[name]:<32}  {_cell(value)}  {_cell(after[name])}")
    print(f"written to {out}")
    return 0


def figures(model: "Lepton", seen: "Outcomes") -> dict[str, float | None]:
    """Return what `model`'s present calibration makes of `seen`; None for a figure that is not defined."""
    import torch

    from lepton.evals.calibration import reliability

    table: dict[str, float | None] = {}
    if model.uncertainty is not None:
        scores = reliability(model, seen).to_dict()["scores"]["uncertainty"]
        table |= {name: scores[name] for name in ("ece", "brier", "auroc")}
    if model.router is not None and seen.benefit_N is not None:
        deep_N = seen.benefit_N > model.router.threshold(0.5).item()
        table["deep_at_half"] = deep_N.to(torch.float64).mean().item()
    return table


def write(source: str, out: str, fitted: "Calibration") -> None:
    """Write the checkpoint `source` with what was fitted, at its own precision, to `out`; all else in it stays."""
    import torch

    from lepton import checkpoint

    content: dict[str, Any] = checkpoint.load(source)
    values = {"uncertainty.calibration": fitted.line, "router.quantiles": fitted.quantiles}
    for name, value in values.items():
        if value is not None:
            content["model"][name] = torch.as_tensor(value, dtype=content["model"][name].dtype)
    checkpoint.save(out, content)


def _cell(value: float | None) -> str:
    return f"{'-':>8}" if value is None else f"{value:8.4f}"
