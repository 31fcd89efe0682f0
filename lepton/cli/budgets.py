"""`python -m lepton calibrate --max_cost`: find which tokens may skip blocks at a cost, and write it into the file."""

import argparse
from typing import TYPE_CHECKING, Any

from lepton.cli.arguments import print_json
from lepton.cli.data_set import MAX_ROWS, MAX_TOKENS, check_counts, open_data_set
from lepton.cli.loading import load, rewrite, target
from lepton.errors import InputError
from lepton.values import positive_nats

if TYPE_CHECKING:
    from lepton.evals.budgets import Cost
    from lepton.model.budget import Budget

TOKENS = 1 << 16
"""Positions of each half that are read by default, about seven times the first."""


def run(args: argparse.Namespace) -> int:
    """Find a threshold for each cost on the first half of the validation split, measure it on the second, and save.

    Nothing is written where the second half loses more.
    """
    from lepton.evals.budgets import cost_of, find_budget, read
    from lepton.evals.positions import calibration_batches, evaluation_batches

    costs = sorted({positive_nats(cost, "--max_cost") for cost in args.max_cost})
    check_counts(args, max_tokens=MAX_TOKENS, batch_size=MAX_ROWS)
    limit = TOKENS if args.max_tokens is None else args.max_tokens
    out = target(args)
    model, tokenizer, step = load(args)
    if model.idea("router") is None:
        raise InputError(f"{args.checkpoint} has no router: its tokens go through all blocks")
    what, _, windows = open_data_set(args, model, tokenizer)

    def first() -> Any:
        return calibration_batches(windows, args.batch_size, limit)

    made = [find_budget(model, first, limit, cost, data=what) for cost in costs]
    second = [*evaluation_batches(windows, args.batch_size, limit)]
    whole = read(model, second, limit)
    measured = [cost_of(whole, read(model, second, limit, each.least)) for each in made]
    broken = [each for each, found in zip(made, measured, strict=True) if found.cost > each.max_cost]
    written = args.force or not broken
    if written:
        rewrite(args.checkpoint, out, step, lambda content: add(content, made))
    report = {
        "checkpoint": args.checkpoint,
        "out": out,
        "written": written,
        "step": step,
        "data": what,
        "tokens": whole.tokens,
        "budgets": [_entry(each, found) for each, found in zip(made, measured, strict=True)],
    }
    print_json(report) if args.json else print(*lines(report), sep="\n", flush=True)
    if not written:
        named = ", ".join(f"{each.max_cost:g}" for each in broken)
        raise InputError(
            f"cost {named}: the half that was not calibrated on loses more, so its text is of another kind and nothing "
            "is written; name more or other text with --data_dir, or write it all the same with --force"
        )
    return 0


def add(content: dict[str, Any], made: "list[Budget]") -> None:
    """Put budgets into the content of a checkpoint, in the place of those with the same cost."""
    costs = {each.max_cost for each in made}
    others = [each for each in content.get("budgets", []) if each["max_cost"] not in costs]
    content["budgets"] = [*others, *(each.to_dict() for each in made)]


def lines(report: dict[str, Any]) -> list[str]:
    """Return the report for people."""
    budgets = report["budgets"]
    return [
        f"{report['checkpoint']} (step {report['step']}) on {report['data']}",
        f"calibrated on {budgets[0]['tokens']:,} tokens of its first half, measured on {report['tokens']:,} tokens of "
        "its second",
        f"{'nats a token at most':>20}  {'deep if saving above':>20}  {'lost':>8}  {'+-':>8}  {'went deep':>9}",
        *(
            f"{each['max_cost']:>20g}  {each['least']:>20.4f}  {each['measured_cost']:>8.4f}  "
            f"{each['measured_error']:>8.4f}  {each['measured_share']:>9.1%}"
            for each in budgets
        ),
        "  on other text more may be lost",
        *([f"written to {report['out']}"] if report["written"] else []),
    ]


def _entry(made: "Budget", found: "Cost") -> dict[str, Any]:
    """Return a budget for the report, with what the second half says of it."""
    measured = {"measured_cost": found.cost, "measured_error": found.error, "measured_share": found.share}
    return made.to_dict() | measured
