"""`python -m lepton eval`: how well a checkpoint predicts held-out text, and how reliable its uncertainty is."""

import argparse
import itertools
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from lepton.cli import figures
from lepton.cli.arguments import add_json, print_json
from lepton.cli.data_set import MAX_ROWS, MAX_TOKENS, add_data_set, check_counts, open_data_set, spread
from lepton.cli.loading import add_loading, choose, load
from lepton.cli.tasks import add_tasks, run_tasks
from lepton.cli.threads import share_the_cores
from lepton.errors import InputError

if TYPE_CHECKING:
    from lepton.data.shards import Batch
    from lepton.data.tokenizer import Tokenizer
    from lepton.model import Network

SIDE_TOKENS = 1 << 16
"""Tokens on which uncertainty and ablations are measured unless `--max_tokens` is given."""
PROBE_TOKENS = 256
"""Tokens from whose time that of the rest is estimated."""
BYTES_PER_TOKEN = 4
"""Bytes of text per token, for that estimate."""
MAX_PROMPTS = 1024
"""Most prompts of `--speculation`: all run side by side."""


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
        help="measure about so many tokens, whole rows of a data set, spread evenly (default: all; for uncertainty and "
        f"--ablate {SIDE_TOKENS})",
    )
    parser.add_argument("--depth", type=float, metavar="X", help="share of tokens that pass all blocks (default: 1)")
    parser.add_argument("--think", type=int, metavar="N", help="rounds of thinking (default: the model's own)")
    parser.add_argument("--ablate", action="store_true", help="also measure with each idea switched off")
    parser.add_argument(
        "--speculation",
        type=int,
        metavar="N",
        help="also measure speculative decoding: tokens per pass of the model, on the beginnings of N rows",
    )
    add_tasks(parser)
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    """Print nats per token, bits per byte, mean depth, the reliability of the uncertainty, and what flags ask for.

    Each part is printed as soon as it is known; with `--json` that goes to stderr.
    """
    share_the_cores()
    from lepton.evals.heldout import evaluate

    check_counts(args, max_tokens=MAX_TOKENS, batch_size=MAX_ROWS, speculation=MAX_PROMPTS, limit=MAX_TOKENS)
    if args.tasks is not None:
        return run_tasks(args)
    if args.task_dir is not None:
        raise InputError(f"--task_dir {args.task_dir}: say which of its tasks, --tasks NAME,...")
    if args.text and args.data_dir:
        raise InputError(f"--text {args.text[0]} and --data_dir {args.data_dir}: give one of them")
    # Missing files are reported before the model is loaded.
    open_files = _files(args)
    choose(args)
    model, tokenizer, step = load(args)
    source = open_files(tokenizer) if open_files else _data_set(args, model, tokenizer)
    pass_options = {"depth": args.depth, "think": args.think}
    say = partial(print, sep="\n", file=sys.stderr if args.json else sys.stdout, flush=True)
    start = time.perf_counter()
    _estimate(args, model, source, pass_options)
    result = evaluate(model, source.batches(args.max_tokens), tokenizer, carry=source.carry, **pass_options)
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
    }
    say(*figures.prediction(report, time.perf_counter() - start))
    report["uncertainty"] = _uncertainty(args, model, source, pass_options)
    say(*figures.uncertainty(report["uncertainty"]))
    if args.ablate:
        # With a limit the loss above is of the very same tokens.
        everything = result.nats_per_token if args.max_tokens else None
        report["ablation"] = _ablation(args, model, tokenizer, source, pass_options, everything, say)
    if args.speculation:
        report["speculation"] = _speculation(args, model, source, pass_options)
        say(*figures.speculation(report["speculation"]))
    report["seconds"] = round(time.perf_counter() - start, 3)
    if args.json:
        print_json(report)
    return 0


@dataclass(frozen=True)
class Source:
    """Held-out text, as the measurements read it: each function takes a number of tokens."""

    what: str
    tokens: "Callable[[int | None], int]"
    """About how many tokens `batches` gives."""
    carry: bool
    """Whether batches continue those before, as those of text files do."""
    batches: "Callable[[int | None], Iterable[Batch]]"
    measured: "Callable[[int], Iterable[Batch]]"
    """Text on which calibration is measured."""
    fitted: "Callable[[int], Iterable[Batch]] | None"
    """Text for fitting; None if the text has no such part."""
    prompts: "Callable[[int], Iterable[Batch]]"
    """Takes a number of rows instead: gives at least that many if there are, as prompts."""


def _files(args: argparse.Namespace) -> "Callable[[Tokenizer], Source] | None":
    if not args.text:
        return None
    from lepton.data.sources import Corpus
    from lepton.evals.heldout import document_batches

    corpus = Corpus(args.text)
    if not corpus.size:
        raise InputError(f"--text {' '.join(args.text)}: there is no text in it; name a file that holds some")
    what = f"{len(corpus.files)} file{'s' if len(corpus.files) != 1 else ''}"

    def source(tokenizer: "Tokenizer") -> Source:
        def batches(tokens: int | None) -> "Iterable[Batch]":
            return document_batches(corpus.pieces(), tokenizer, tokens)

        def tokens(limit: int | None) -> int:
            return min(corpus.size // BYTES_PER_TOKEN + 1, limit or MAX_TOKENS)

        return Source(what, tokens, True, batches, batches, None, lambda rows: batches(None))

    return source


def _data_set(args: argparse.Namespace, model: "Network", tokenizer: "Tokenizer") -> Source:
    from lepton.evals.positions import calibration_batches, evaluation_batches

    what, rows, halves = open_data_set(args, model, tokenizer, args.split)

    return Source(
        what,
        lambda tokens: min(rows.tokens, max(tokens or rows.tokens, rows.seq_len)),
        False,
        lambda tokens: spread(rows, args.batch_size, tokens),
        lambda tokens: evaluation_batches(halves, args.batch_size, tokens),
        # A single window is measured, and leaves nothing to fit on.
        (lambda tokens: calibration_batches(halves, args.batch_size, tokens)) if halves.windows > 1 else None,
        lambda count: evaluation_batches(halves, 1, count * halves.seq_len),
    )


def _estimate(args: argparse.Namespace, model: "Network", source: Source, pass_options: dict[str, Any]) -> None:
    """Say on stderr about how long it will take, from the rate on a few tokens."""
    from lepton.data.shards import Batch
    from lepton.evals.ablation import switches
    from lepton.evals.calibration import TEMPERATURE_TOKENS
    from lepton.evals.positions import iterate_positions
    from lepton.evals.speculation import NEW_TOKENS, PROMPT_TOKENS, TEMPERATURES
    from lepton.train.progress import duration

    side = source.tokens(args.max_tokens or SIDE_TOKENS)
    planned = source.tokens(args.max_tokens) + side
    planned += min(TEMPERATURE_TOKENS, side) if source.fitted else 0
    planned += side * len(switches(model)) if args.ablate else 0
    planned += len(TEMPERATURES) * (args.speculation or 0) * (PROMPT_TOKENS + NEW_TOKENS)
    seconds = found = 0.0
    for tokens, lengths, _ in itertools.islice(source.batches(PROBE_TOKENS), 1):
        probe = Batch(tokens[:1, : PROBE_TOKENS + 1], lengths[:1].clamp(max=PROBE_TOKENS + 1))
        for _ in range(2):  # the first pass of a process is slower
            start = time.perf_counter()
            found = sum(len(part.target_M) for part in iterate_positions(model, [probe], **pass_options))
            seconds = time.perf_counter() - start
    if found:
        rate = found / max(seconds, 1e-9)
        print(
            f"about {duration(planned / rate)}: {planned:,} tokens in all, at {rate:,.0f} tokens/s",
            file=sys.stderr,
            flush=True,
        )


def _uncertainty(
    args: argparse.Namespace, model: "Network", source: Source, pass_options: dict[str, Any]
) -> dict[str, Any]:
    from lepton.evals.calibration import MIN_TOKENS, TEMPERATURE_TOKENS, fit_temperature
    from lepton.evals.reliability import measure_uncertainty

    tokens = args.max_tokens or SIDE_TOKENS
    temperature = None
    if source.fitted is not None:
        count = min(TEMPERATURE_TOKENS, max(tokens, MIN_TOKENS))
        temperature = fit_temperature(model, source.fitted(count), count, **pass_options)
    batches = source.measured(tokens)
    return measure_uncertainty(
        model, batches, tokens, temperature=temperature, carry=source.carry, **pass_options
    ).to_dict()


def _ablation(
    args: argparse.Namespace,
    model: "Network",
    tokenizer: "Tokenizer",
    source: Source,
    pass_options: dict[str, Any],
    everything: float | None,
    say: Callable[..., None],
) -> list[dict[str, Any]]:
    from dataclasses import asdict

    from lepton.evals.ablation import ablate
    from lepton.evals.heldout import evaluate

    def nats_per_token(**options: Any) -> float:
        batches = source.batches(args.max_tokens or SIDE_TOKENS)
        return evaluate(model, batches, tokenizer, carry=source.carry, **options).nats_per_token

    say("", figures.row("switched off", ["nats", "change"]))
    rows = []
    for found in ablate(model, nats_per_token, everything=everything, **pass_options):
        say(figures.ablated(found.off, found.nats_per_token, found.change))
        rows.append(asdict(found))
    return rows


def _speculation(
    args: argparse.Namespace, model: "Network", source: Source, pass_options: dict[str, Any]
) -> list[dict[str, Any]]:
    from lepton.evals.speculation import PROMPT_TOKENS, measure_speculation, prompts_of

    prompts = prompts_of(source.prompts(args.speculation), args.speculation)
    found = measure_speculation(model, prompts, **pass_options)
    shared = {"prompts": len(prompts), "prompt_tokens": PROMPT_TOKENS}
    return [{"temperature": temperature, **shared, **stats.to_dict()} for temperature, stats in found.items()]
