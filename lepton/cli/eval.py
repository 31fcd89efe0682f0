"""`python -m lepton eval`: how well a checkpoint predicts text that it was not trained on, and how far it knows it."""

import argparse
import math
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lepton.cli.arguments import add_json, print_json
from lepton.cli.heldout import add_data_set, check_positive, open_data_set
from lepton.cli.loading import add_loading, load
from lepton.errors import InputError

if TYPE_CHECKING:
    from lepton.data.shards import Batch
    from lepton.data.tokenizer import Tokenizer
    from lepton.model import Lepton

SIDE_TOKENS = 1 << 16
"""Tokens on which uncertainty and ablations are measured unless `--max_tokens` is given."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's flags."""
    add_loading(parser)
    add_data_set(parser)
    parser.add_argument(
        "--split", choices=("val", "train"), default="val", help="part of the data set (default: %(default)s)"
    )
    parser.add_argument(
        "--text", nargs="+", metavar="FILE", help="text files, folders, .jsonl or .jsonl.xz instead of a data set"
    )
    parser.add_argument(
        "--max_tokens",
        type=int,
        metavar="N",
        help=f"stop after about so many tokens (default: all; {SIDE_TOKENS} for uncertainty and --ablate)",
    )
    parser.add_argument("--depth", type=float, metavar="X", help="share of the tokens past the stem (default: all)")
    parser.add_argument("--think", type=int, metavar="N", help="rounds of thinking (default: the model's own)")
    parser.add_argument("--ablate", action="store_true", help="also measure with each idea switched off")
    parser.add_argument(
        "--speculation", type=int, metavar="N", help="also measure tokens a cycle on the beginnings of N rows"
    )
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    """Print nats a token, bits a byte, mean depth, how reliable the uncertainty is, and what else was asked for."""
    from lepton.evals.heldout import evaluate

    check_positive(args, "max_tokens", "batch_size", "speculation")
    if args.text and args.data_dir:
        raise InputError(f"--text {args.text[0]} and --data_dir {args.data_dir}: give one of them")
    # Files that are missing are said before the model is loaded.
    open_files = _files(args)
    model, tokenizer, step = load(args)
    source = open_files(tokenizer) if open_files else _data_set(args, model, tokenizer)
    knobs = {"depth": args.depth, "think": args.think}
    start = time.perf_counter()
    result = evaluate(model, source.batches(args.max_tokens), tokenizer, carry=source.carry, **knobs)
    report = {
        "checkpoint": args.checkpoint,
        "step": step,
        "data": source.what,
        "tokens": result.tokens,
        "bytes": result.bytes,
        "nats_per_token": result.nats_per_token,
        "bits_per_byte": result.bits_per_byte if result.bytes else None,
        "mean_depth": result.mean_depth,
        "layers": model.config.layers,
        "uncertainty": _uncertainty(args, model, source, knobs),
    }
    if args.ablate:
        report["ablation"] = _ablation(args, model, tokenizer, source, knobs)
    if args.speculation:
        report["speculation"] = _speculation(args, model, source, knobs)
    report["seconds"] = round(time.perf_counter() - start, 3)
    if args.json:
        print_json(report)
    else:
        print("\n".join(_lines(report)))
    return 0


@dataclass(frozen=True)
class Source:
    """Held-out text, as the measurements read it: each function takes a number of tokens."""

    what: str
    carry: bool
    """Whether batches go on where the ones before ended, as those of text files do."""
    batches: "Callable[[int | None], Iterable[Batch]]"
    measured: "Callable[[int], Iterable[Batch]]"
    """What a calibration has not seen."""
    fitted: "Callable[[int], Iterable[Batch]] | None"
    """What a calibration may see; None where the text has no such part."""
    prompts: "Callable[[int], Iterable[Batch]]"
    """Takes a number of rows instead: at least so many, if there are, to begin texts with."""


def _files(args: argparse.Namespace) -> "Callable[[Tokenizer], Source] | None":
    if not args.text:
        return None
    from lepton.data.sources import Corpus
    from lepton.evals.heldout import document_batches

    corpus = Corpus(args.text)
    what = f"{len(corpus.files)} file{'s' if len(corpus.files) != 1 else ''}"

    def source(tokenizer: "Tokenizer") -> Source:
        def batches(tokens: int | None) -> "Iterable[Batch]":
            return document_batches(corpus.pieces(), tokenizer, tokens)

        return Source(what, True, batches, batches, None, lambda rows: batches(None))

    return source


def _data_set(args: argparse.Namespace, model: "Lepton", tokenizer: "Tokenizer") -> Source:
    from lepton.train.calibration import calibration_batches, evaluation_batches

    what, rows, halves = open_data_set(args, model, tokenizer, args.split)

    def batches(tokens: int | None) -> "Iterable[Batch]":
        limit = None if tokens is None else math.ceil(tokens / (args.batch_size * rows.seq_len))
        return rows.batches(args.batch_size, limit)

    return Source(
        what,
        False,
        batches,
        lambda tokens: evaluation_batches(halves, args.batch_size, tokens),
        lambda tokens: calibration_batches(halves, args.batch_size, tokens),
        lambda count: evaluation_batches(halves, 1, count * halves.seq_len),
    )


def _uncertainty(args: argparse.Namespace, model: "Lepton", source: Source, knobs: dict[str, Any]) -> dict[str, Any]:
    from lepton.evals.calibration import TEMPERATURE_TOKENS, fit_temperature, measure_uncertainty

    tokens = args.max_tokens or SIDE_TOKENS
    temperature = None
    if source.fitted is not None:
        temperature = fit_temperature(model, source.fitted(TEMPERATURE_TOKENS), **knobs)
    batches = source.measured(tokens)
    return measure_uncertainty(model, batches, tokens, temperature=temperature, carry=source.carry, **knobs).to_dict()


def _ablation(
    args: argparse.Namespace, model: "Lepton", tokenizer: "Tokenizer", source: Source, knobs: dict[str, Any]
) -> list[dict[str, Any]]:
    from dataclasses import asdict

    from lepton.evals.ablation import ablate
    from lepton.evals.heldout import evaluate

    def nats_per_token(**options: Any) -> float:
        batches = source.batches(args.max_tokens or SIDE_TOKENS)
        return evaluate(model, batches, tokenizer, carry=source.carry, **options).nats_per_token

    return [asdict(row) for row in ablate(model, nats_per_token, **knobs)]


def _speculation(
    args: argparse.Namespace, model: "Lepton", source: Source, knobs: dict[str, Any]
) -> list[dict[str, Any]]:
    from lepton.evals.speculation import PROMPT_TOKENS, measure_speculation, prompts_of

    prompts = prompts_of(source.prompts(args.speculation), args.speculation)
    found = measure_speculation(model, prompts, **knobs)
    shared = {"prompts": len(prompts), "prompt_tokens": PROMPT_TOKENS}
    return [{"temperature": temperature, **shared, **stats.to_dict()} for temperature, stats in found.items()]


def _lines(report: dict[str, Any]) -> list[str]:
    """Return the report for people."""
    bits = report["bits_per_byte"]
    lines = [
        f"{report['checkpoint']} (step {report['step']}) on {report['data']}",
        f"nats per token  {report['nats_per_token']:.4f}",
        f"bits per byte   {'-' if bits is None else f'{bits:.4f}'}",
        f"mean depth      {report['mean_depth']:.2f} of {report['layers']} blocks",
        f"tokens          {report['tokens']:,} ({report['bytes']:,} bytes, {report['seconds']:.1f} s)",
    ]
    doubt = report["uncertainty"]
    names = {"ece": "ECE", "brier": "Brier", "auroc": "AUROC", "risk_coverage": "risk-coverage"}
    lines += ["", f"chance that the greedy token is wrong ({doubt['wrong']:.1%} are), on {doubt['tokens']:,} tokens"]
    lines += [_row("", list(names.values()))]
    for source, scores in doubt["scores"].items():
        cells = ["-" if scores[name] is None else f"{scores[name]:.4f}" for name in names]
        lines.append(_row(source, cells))
    if doubt["temperature"] is not None:
        lines.append(f"(scaled at temperature {doubt['temperature']:.3f}, fitted on the other half of the split)")
    if "ablation" in report:
        lines += ["", _row("switched off", ["nats", "change"])]
        lines += [
            _row(row["off"], [f"{row['nats_per_token']:.4f}", f"{row['change']:+.4f}"]) for row in report["ablation"]
        ]
    if "speculation" in report:
        lines += ["", _row("speculation", ["tokens/cycle", "calls"]) + "  acceptance of each draft"]
        for row in report["speculation"]:
            shares = " ".join(f"{share:.2f}" for share in row["acceptance"])
            cells = [f"{row['tokens_a_cycle']:.2f}", str(row["forward_calls"])]
            lines.append(_row(f"temperature {row['temperature']:g}", cells) + f"  {shares}")
    return lines


def _row(name: str, cells: list[str]) -> str:
    return f"{name:<22}" + "".join(f"{cell:>14}" for cell in cells)
