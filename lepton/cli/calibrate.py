"""`python -m lepton calibrate`: calibrate uncertainty, or find thresholds, and write them into the checkpoint."""

import argparse
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from lepton.cli import budgets, promises
from lepton.cli.arguments import add_json, print_json
from lepton.cli.data_set import MAX_ROWS, MAX_TOKENS, add_data_set, check_counts, open_data_set
from lepton.cli.figures import SCORES, legend
from lepton.cli.loading import add_loading, choose, load, rewrite, target
from lepton.cli.threads import share_the_cores
from lepton.errors import InputError

if TYPE_CHECKING:
    from lepton.evals.calibration import Calibration
    from lepton.evals.positions import Outcomes
    from lepton.model import Network

TOKENS = 1 << 16
"""Positions of each half that are read by default."""
MEASURED = ("ece", "brier", "auroc")
LABELS = SCORES | {"deep_at_half": "tokens that go deep at depth 0.5"}
"""Figures of the table by their names in JSON."""
TOLERANCE = {"ece": 1e-4, "brier": 1e-4, "auroc": 1e-4, "deep_at_half": 0.05}
"""By how much a figure may be worse: by what the table hardly shows, and the share of deep tokens by what two halves of
a text differ in."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's flags."""
    add_loading(parser)
    add_data_set(parser)
    parser.add_argument("--out", metavar="PATH", help="checkpoint to write (default: the one that --checkpoint names)")
    parser.add_argument(
        "--max_tokens",
        type=int,
        metavar="N",
        help=f"tokens to calibrate on, and as many to measure on (default: {TOKENS}; with --risk {promises.TOKENS})",
    )
    parser.add_argument(
        "--risk",
        type=float,
        action="append",
        default=[],
        metavar="X",
        help="instead, find the threshold for generate --abstain_at X: of the tokens that are not marked, at most this "
        "share is wrong; may be repeated",
    )
    parser.add_argument(
        "--max_cost",
        type=float,
        action="append",
        default=[],
        metavar="X",
        help="instead, find the threshold for generate --max_cost X: tokens skip blocks, and the loss rises by at most "
        "X nats per token; may be repeated",
    )
    parser.add_argument(
        "--force",
        action="store_true",
        help="write the result also if few tokens were read, or if it is worse on the half that is measured",
    )
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    """Fit on the first half of the validation split, print figures of the second, before and after, and save.

    Nothing is written where the second half got worse.
    """
    share_the_cores()
    choose(args)
    if args.risk or args.max_cost:
        return _with_threshold(args)
    from lepton.evals.calibration import MIN_TOKENS, calibrate
    from lepton.evals.positions import calibration_batches, collect_outcomes, evaluation_batches

    check_counts(args, max_tokens=MAX_TOKENS, batch_size=MAX_ROWS)
    limit = TOKENS if args.max_tokens is None else args.max_tokens
    out = target(args)
    model, tokenizer, step = load(args)
    if model.idea("uncertainty") is None and model.idea("router") is None:
        raise InputError(f"{args.checkpoint} has neither uncertainty nor router: there is nothing to calibrate")
    what, _, windows = open_data_set(args, model, tokenizer)
    least = 1 if args.force else MIN_TOKENS
    if limit < least:
        raise InputError(f"--max_tokens {limit}: must be at least {least:,}, or with --force at least 1")
    batches = [half(windows, args.batch_size, limit) for half in (calibration_batches, evaluation_batches)]
    outcomes = collect_outcomes(model, batches[1], limit)
    before = figures(model, outcomes)
    fitted = calibrate(model, batches[0], limit, min_tokens=least)
    counts = fitted.tokens, len(outcomes.wrong_M)
    if min(counts) < least:
        raise InputError(
            f"{what}: {counts[0]:,} tokens to fit on and {counts[1]:,} others to measure, where calibration needs "
            f"{MIN_TOKENS:,} of each; {args.checkpoint} is unchanged: name more held-out text with --data_dir"
        )
    after = figures(model, outcomes)
    faults = worse(before, after)
    written = args.force or not faults
    if written:
        write(args.checkpoint, out, fitted, step)
    report = {
        "checkpoint": args.checkpoint,
        "out": out,
        "written": written,
        "step": step,
        "data": what,
        "calibration_tokens": counts[0],
        "tokens": counts[1],
        "scale": fitted.line and fitted.line[0],
        "shift": fitted.line and fitted.line[1],
        "before": before,
        "after": after,
    }
    if args.json:
        print_json(report)
    else:
        print(*lines(report), sep="\n", flush=True)
    if not written:
        raise InputError(
            f"{', '.join(faults)}: worse on text that was not fitted, so nothing is written; name more or other text "
            "with --data_dir, or write it all the same with --force"
        )
    return 0


def _with_threshold(args: argparse.Namespace) -> int:
    if args.risk and args.max_cost:
        raise InputError("--risk with --max_cost: they measure other things, so run the command once for each")
    return budgets.run(args) if args.max_cost else promises.run(args)


def lines(report: dict[str, Any]) -> list[str]:
    """Return the report for people."""
    before, after = report["before"], report["after"]
    return [
        f"{report['checkpoint']} (step {report['step']}) on {report['data']}",
        f"fitted on {report['calibration_tokens']:,} tokens of its first half, measured on {report['tokens']:,} others "
        "of its second",
        f"{'':<32}  {'before':>8}  {'after':>8}",
        *(f"{LABELS[name]:<32}  {_cell(value)}  {_cell(after[name])}" for name, value in before.items()),
        *legend(*(name for name in MEASURED if name in before)),
        *([f"written to {report['out']}"] if report["written"] else []),
    ]


def figures(model: "Network", outcomes: "Outcomes") -> dict[str, float | None]:
    """Return the figures of `outcomes` under `model`'s present calibration; None for one that is not defined."""
    import torch

    from lepton.evals.reliability import reliability

    table: dict[str, float | None] = {}
    if model.idea("uncertainty") is not None:
        scores = reliability(model, outcomes).to_dict()["scores"]["uncertainty"]
        table |= {name: scores[name] for name in MEASURED}
    if model.idea("router") is not None and outcomes.router_score_M is not None:
        deep_M = outcomes.router_score_M > model.idea("router").threshold(0.5).item()
        table["deep_at_half"] = deep_M.to(torch.float64).mean().item()
    return table


def worse(before: dict[str, float | None], after: dict[str, float | None]) -> list[str]:
    """Return what is worse `after`, a few words each."""
    cost: dict[str, Callable[[float], float]] = {
        "auroc": lambda value: -value,
        "deep_at_half": lambda value: abs(value - 0.5),
    }
    found = []
    for name, old in before.items():
        new, of = after[name], cost.get(name, float)
        if old is not None and new is not None and of(new) > of(old) + TOLERANCE[name]:
            found.append(f"{LABELS[name]} {old:.4f} -> {new:.4f}")
    return found


def write(source: str, out: str, fitted: "Calibration", step: int) -> None:
    """Write the checkpoint `source` with what was fitted, at its own precision, to `out`; all else in it stays.

    Raises:
        InputError: as `rewrite`.
    """
    import torch

    def change(content: dict[str, Any]) -> None:
        values = {"uncertainty.calibration": fitted.line, "router.quantiles": fitted.quantiles}
        for name, value in values.items():
            if value is not None:
                content["model"][name] = torch.as_tensor(value, dtype=content["model"][name].dtype)

    rewrite(source, out, step, change)


def _cell(value: float | None) -> str:
    return f"{'-':>8}" if value is None else f"{value:8.4f}"
