"""`python -m lepton calibrate --risk`: find what can be promised of a checkpoint, and write it into the file."""

import argparse
from typing import TYPE_CHECKING, Any

from lepton.cli.arguments import print_json
from lepton.cli.data_set import MAX_ROWS, MAX_TOKENS, check_counts, open_data_set
from lepton.cli.loading import load, rewrite, target
from lepton.errors import InputError

if TYPE_CHECKING:
    from torch import Tensor

    from lepton.data.shards import ShardedDataset
    from lepton.evals.conformal import Kept
    from lepton.evals.positions import Outcomes
    from lepton.model import Network
    from lepton.model.promise import Promise

TOKENS = 1 << 18
"""Positions of each half that are read by default. The promise is of windows, and hundreds of them are needed."""


def run(args: argparse.Namespace) -> int:
    """Find a threshold for each risk on the first half of the validation split, measure it on the second, and save.

    Nothing is written where the second half breaks a promise.
    """
    from lepton.evals.conformal import kept, promise, windows_wanted
    from lepton.model.promise import checked_risk

    risks = sorted({checked_risk(risk, "--risk") for risk in args.risk})
    check_counts(args, max_tokens=MAX_TOKENS, batch_size=MAX_ROWS)
    out = target(args)
    model, tokenizer, step = load(args)
    if model.idea("uncertainty") is None:
        raise InputError(f"{args.checkpoint} has no uncertainty: there is nothing to abstain by")
    what, _, windows = open_data_set(args, model, tokenizer)
    first, second = halves(model, windows, args)
    if not len(first.wrong_M):
        raise InputError(f"{what}: a single window, and half of them is calibrated on: name more text with --data_dir")
    columns = *_columns(first), first.window_M, windows.seq_len
    made = [promise(*columns, risk, data=what) for risk in risks]
    measured = [kept(*_columns(second), each.threshold) for each in made]
    broken = [
        each for each, found in zip(made, measured, strict=True) if found.risk is not None and found.risk > each.risk
    ]
    written = args.force or not broken
    if written:
        rewrite(args.checkpoint, out, step, lambda content: add(content, made))
    report = {
        "checkpoint": args.checkpoint,
        "out": out,
        "written": written,
        "step": step,
        "data": what,
        "calibration_tokens": len(first.wrong_M),
        "calibration_windows": made[0].windows,
        "tokens": len(second.wrong_M),
        "wrong": second.wrong_M.mean().item(),
        "promises": [
            _entry(model, each, found) | {"windows_wanted": windows_wanted(*columns, each.risk)}
            for each, found in zip(made, measured, strict=True)
        ],
    }
    print_json(report) if args.json else print(*lines(report), sep="\n", flush=True)
    if not written:
        named = ", ".join(f"{each.risk:g}" for each in broken)
        raise InputError(
            f"risk {named}: more is wrong in the half that was not calibrated on, so its text is of another kind and "
            "nothing is written; name more or other text with --data_dir, or write it all the same with --force"
        )
    return 0


def halves(model: "Network", windows: "ShardedDataset", args: argparse.Namespace) -> "list[Outcomes]":
    """Return the outcomes of the first half of a validation split, and those of the second."""
    from lepton.evals.positions import calibration_batches, collect_outcomes, evaluation_batches

    limit = TOKENS if args.max_tokens is None else args.max_tokens
    batches = (half(windows, args.batch_size, limit) for half in (calibration_batches, evaluation_batches))
    return [collect_outcomes(model, each, limit, allow_none=True) for each in batches]


def add(content: dict[str, Any], made: "list[Promise]") -> None:
    """Put promises into the content of a checkpoint, in the place of those with the same risk."""
    risks = {each.risk for each in made}
    others = [each for each in content.get("promises", []) if each["risk"] not in risks]
    content["promises"] = [*others, *(each.to_dict() for each in made)]


def lines(report: dict[str, Any]) -> list[str]:
    """Return the report for people."""
    promises = report["promises"]
    table = [
        f"{report['checkpoint']} (step {report['step']}) on {report['data']}",
        f"calibrated on {report['calibration_windows']:,} windows ({report['calibration_tokens']:,} tokens) of its "
        f"first half, measured on {report['tokens']:,} tokens of its second, where the most likely token is wrong "
        f"{report['wrong']:.1%} of the time",
        f"{'risk':>8}  {'abstains from':>16}  {'not abstained':>14}  {'wrong of these':>14}",
    ]
    for each in promises:
        above = "everything" if each["threshold"] is None else f"above {each['largest_kept']:.4f}"
        wrong = "-" if each["measured_risk"] is None else f"{each['measured_risk']:.2%}"
        table.append(f"{each['risk']:>8g}  {above:>16}  {each['kept']:>14.1%}  {wrong:>14}")
    table.append(
        "  at most the risk of the tokens that are not abstained from is wrong, on text like this one, in "
        f"{promises[0]['confidence']:.0%} of calibrations; on other text nothing is promised"
    )
    for each in promises:
        if each["threshold"] is None:
            wanted = each["windows_wanted"]
            enough = wanted is None or wanted <= report["calibration_windows"]
            remedy = "a larger risk" if enough else f"about {wanted:,} windows of such text (--data_dir, --max_tokens)"
            table.append(
                f"  risk {each['risk']:g}: nothing can be promised, so all tokens will be marked; try {remedy}"
            )
    return [*table, *([f"written to {report['out']}"] if report["written"] else [])]


def _columns(outcomes: "Outcomes") -> "tuple[Tensor, Tensor]":
    assert outcomes.uncertainty_logit_M is not None
    return outcomes.uncertainty_logit_M, outcomes.wrong_M


def _entry(model: "Network", made: "Promise", found: "Kept") -> dict[str, Any]:
    """Return a promise for the report, with what the second half says of it."""
    from lepton.generate.abstention import largest_kept

    largest = None if made.threshold is None else largest_kept(model, made)
    return made.to_dict() | {"largest_kept": largest, "kept": found.share, "measured_risk": found.risk}
