"""What the commands that measure a checkpoint print for people: rows of figures, and what they mean."""

from typing import Any

SCORES = {"ece": "ECE", "brier": "Brier", "auroc": "AUROC", "risk_coverage": "risk-coverage"}
"""Headings of the figures of uncertainty by their names in JSON."""
MEANINGS = {
    "ece": "ECE: how far the stated chances are from the share of wrong tokens (expected calibration error)",
    "brier": "Brier: mean squared error of the stated chances",
    "auroc": "AUROC: how often a wrong token is doubted more than a right one (1 is best, 0.5 is guessing)",
    "risk_coverage": "risk-coverage: share of wrong tokens among the least doubted, over all shares that are kept",
}


def legend(*names: str) -> list[str]:
    """Return what the figures `names` mean, a line each; all but AUROC are better where they are lower."""
    return [f"  {MEANINGS[name]}" for name in names]


def prediction(report: dict[str, Any], seconds: float) -> list[str]:
    """How well the text is predicted, and at what depth."""
    bits = report["bits_per_byte"]
    return [
        f"{report['checkpoint']} (step {report['step']}) on {report['data']}",
        f"nats per token  {report['nats_per_token']:.4f}",
        f"bits per byte   {'-' if bits is None else f'{bits:.4f}'}",
        f"mean depth      {report['mean_depth']:.2f} of {report['layers']} blocks",
        f"tokens          {report['tokens']:,} ({report['bytes']:,} bytes, {seconds:.1f} s)",
    ]


def uncertainty(report: dict[str, Any]) -> list[str]:
    """Reliability of each source of chances."""
    lines = [
        "",
        f"chance that the most likely token is wrong ({report['wrong']:.1%} are), on {report['tokens']:,} tokens",
    ]
    lines.append(row("", list(SCORES.values())))
    for source, scores in report["scores"].items():
        lines.append(row(source, ["-" if scores[name] is None else f"{scores[name]:.4f}" for name in SCORES]))
    if report["temperature"] is not None:
        lines.append(f"(scaled at temperature {report['temperature']:.3f}, fitted on the other half of the split)")
    return lines + legend(*SCORES)


def ablated(off: str, nats: float, change: float) -> str:
    """The loss with one idea off."""
    return row(off, [f"{nats:.4f}", f"{change:+.4f}"])


def speculation(rows: list[dict[str, Any]]) -> list[str]:
    """What drafting gives, at each temperature."""
    lines = ["", row("speculation", ["tokens/pass", "passes"]) + "  share accepted of the first, second, ... draft"]
    for found in rows:
        shares = " ".join(f"{share:.2f}" for share in found["acceptance"])
        cells = [f"{found['tokens_per_step']:.2f}", str(found["forward_calls"])]
        lines.append(row(f"temperature {found['temperature']:g}", cells) + f"  {shares}")
    return [*lines, "  tokens/pass: what one pass of the model over drafted tokens adds to a text (1 without drafts)"]


def tasks(report: dict[str, Any]) -> list[str]:
    """The metrics of each task of lm-evaluation-harness."""
    lines = [f"{report['checkpoint']} (step {report['step']}), {report['seconds']:.1f} s", row("", ["value", "error"])]
    for name, found in report["tasks"].items():
        count = "" if found["samples"] is None else f" ({found['samples']:,} examples)"
        lines.append(f"{name}{count}")
        for metric, each in found["metrics"].items():
            value, error = each["value"], each["stderr"]
            shown = f"{value:.4f}" if isinstance(value, float) else str(value)
            lines.append(row(f"  {metric}", [shown, "-" if error is None else f"{error:.4f}"]))
    return [*lines, "  error: standard error of the value, as the harness estimates it"]


def row(name: str, cells: list[str]) -> str:
    """A name and right-aligned cells."""
    return f"{name:<22}" + "".join(f"{cell:>14}" for cell in cells)
