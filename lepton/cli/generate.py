"""`python -m lepton generate`: continue a prompt, printed as it comes, shaded by uncertainty if asked."""

import argparse
import itertools
import os
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple, TextIO

from lepton.cli.arguments import add_json, print_json
from lepton.cli.loading import add_loading, load
from lepton.errors import InputError

if TYPE_CHECKING:
    from lepton.data.tokenizer import Tokenizer
    from lepton.generate import Generation, Stats

# 256-colour backgrounds from sure to unsure, each for an equal share of 0..1, with black text; sure text is left alone.
SHADES = (None, 229, 222, 216, 210)
# Without colours a word is marked if one of its tokens is at least this unsure.
DOUBTFUL = 0.8
MARK = "[?]"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's flags."""
    add_loading(parser)
    parser.add_argument("--prompt", required=True, metavar="TEXT", help="text to continue; - reads it from stdin")
    parser.add_argument("--max_new_tokens", type=int, default=100, metavar="N", help="default: %(default)s")
    parser.add_argument(
        "--temperature", type=float, default=0.8, metavar="X", help="0 is greedy (default: %(default)s)"
    )
    parser.add_argument(
        "--top_p", type=float, default=0.9, metavar="X", help="1 keeps every token (default: %(default)s)"
    )
    parser.add_argument("--top_k", type=int, metavar="N", help="most probable tokens to keep (default: all)")
    parser.add_argument("--seed", type=int, metavar="N", help="makes sampling repeatable")
    parser.add_argument(
        "--stop", action="append", default=[], metavar="TEXT", help="end after this text; may be given several times"
    )
    parser.add_argument("--depth", type=float, metavar="X", help="share of tokens allowed past the stem (default: 1)")
    parser.add_argument("--think", type=int, metavar="N", help="rounds of thinking (default: the model's own)")
    parser.add_argument("--no_speculative", action="store_true", help="decode one token at a time, without drafts")
    parser.add_argument(
        "--uncertainty",
        action="store_true",
        help=f"shade the text by how unsure the model was ({MARK} without colours); figures go to stderr",
    )
    add_json(parser)


class Piece(NamedTuple):
    """Complete characters, and how unsure the model was of the least sure of their tokens."""

    text: str
    uncertainty: float


def run(args: argparse.Namespace) -> int:
    """Print the prompt and its continuation, or with `--json` one object about both."""
    from lepton.generate import Generation, Options

    prompt = _read_stdin() if args.prompt == "-" else args.prompt
    if not prompt:
        raise InputError("the prompt is empty: give at least one character")
    if "" in args.stop:
        raise InputError("--stop '': give at least one character")
    model, tokenizer, _ = load(args)
    options = Options(
        max_new_tokens=args.max_new_tokens,
        temperature=args.temperature,
        top_p=args.top_p,
        top_k=args.top_k,
        use_speculative=not args.no_speculative,
        seed=args.seed,
        depth=args.depth,
        think=args.think,
        uncertainty=args.uncertainty or (args.json and model.uncertainty is not None),
    )
    prompt_ids = tokenizer.encode(prompt)
    generation = Generation(model, [prompt_ids], options)
    taken: list[tuple[int, float]] = []
    pieces = continuation(tokens(generation), tokenizer, args.stop, taken)
    if not args.json:
        return _print_live(prompt, pieces, generation.stats if args.uncertainty else None)
    start = time.perf_counter()
    new_text = "".join(piece.text for piece in pieces)
    seconds = time.perf_counter() - start
    ids = [token for token, _ in taken]
    print_json(
        {
            "prompt": prompt,
            "text": new_text,
            "prompt_tokens": len(prompt_ids),
            "new_tokens": len(ids),
            "ended_by": _ended_by(ids, new_text, args.stop, model.config.eos_id),
            "seconds": round(seconds, 3),
            "tokens_per_second": round(len(ids) / seconds, 1),
            "tokens": ids,
            "uncertainties": [round(unsure, 4) for _, unsure in taken] if options.uncertainty else None,
            "stats": generation.stats.to_dict(),
        }
    )
    return 0


def tokens(generation: "Generation") -> Iterator[tuple[int, float]]:
    """Yield the new tokens of one prompt with their uncertainties, 0 where these are not computed."""
    for (news,) in generation:
        yield from itertools.zip_longest(news.tokens, news.uncertainties, fillvalue=0.0)


def continuation(
    stream: Iterable[tuple[int, float]],
    tokenizer: "Tokenizer",
    stops: Sequence[str],
    taken: list[tuple[int, float]],
) -> Iterator[Piece]:
    """Yield the text of the tokens in `stream`, complete characters only, up to and including the first of `stops`.

    `taken` receives what was taken from the stream.
    """
    decoder = tokenizer.stream_decoder()
    # A stop text may begin in what was yielded before: this many characters of it are kept in sight.
    reach = max(map(len, stops), default=1) - 1
    tail, uncertainty = "", 0.0
    for token, unsure in stream:
        taken.append((token, unsure))
        text, uncertainty = decoder.push(token), max(uncertainty, unsure)
        sight = tail + text
        ends = [sight.index(stop) + len(stop) for stop in stops if stop in sight]
        if ends:
            yield Piece(sight[len(tail) : min(ends)], uncertainty)
            return
        if text:
            yield Piece(text, uncertainty)
            uncertainty = 0.0
        tail = sight[-reach:] if reach else ""
    if rest := decoder.flush():
        yield Piece(rest, uncertainty)


def shaded(pieces: Iterable[Piece]) -> Iterator[str]:
    """Yield the text for a colour terminal, on a background that says how unsure the model was."""
    for text, uncertainty in pieces:
        colour = SHADES[min(int(uncertainty * len(SHADES)), len(SHADES) - 1)]
        if colour is None:
            yield text
            continue
        # A background that is on when the line ends would fill the rest of the line.
        for line in text.splitlines(keepends=True):
            bare = line.rstrip("\r\n")
            yield (f"\033[30;48;5;{colour}m{bare}\033[0m" if bare else "") + line[len(bare) :]


def marked(pieces: Iterable[Piece]) -> Iterator[str]:
    """Yield the text word by word, those of which the model was unsure with a mark behind them."""
    word, uncertainty = "", 0.0
    for text, unsure in pieces:
        for space, run in itertools.groupby(text, str.isspace):
            if not space:
                word, uncertainty = word + "".join(run), max(uncertainty, unsure)
                continue
            yield word + (MARK if uncertainty >= DOUBTFUL else "") + "".join(run)
            word, uncertainty = "", 0.0
    yield word + (MARK if uncertainty >= DOUBTFUL else "")


def has_colours(stream: TextIO) -> bool:
    """Whether `stream` is a terminal that shows colours, and its user has not said no (https://no-color.org)."""
    console = (
        sys.platform != "win32" or "WT_SESSION" in os.environ
    )  # the old Windows console prints escapes as they are
    return stream.isatty() and console and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


def describe(stats: "Stats") -> str:
    """Return the figures of a generation as one line."""
    parts = [f"{stats.new_tokens} new tokens", f"{stats.forward_calls} forward calls"]
    if stats.drafted:
        shares = ", ".join(f"{share:.0%}" for share in stats.acceptance)
        parts += [f"{stats.tokens_a_cycle:.2f} tokens a cycle", f"drafts accepted by position: {shares}"]
    return "; ".join([*parts, f"mean depth {stats.mean_depth:.2f} blocks"])


def _print_live(prompt: str, pieces: Iterator[Piece], stats: "Stats | None") -> int:
    """Print the text as it comes; with `stats`, shaded by uncertainty and with the figures behind it."""
    coloured = has_colours(sys.stdout)
    if stats is None:
        texts: Iterator[str] = (piece.text for piece in pieces)
    else:
        texts = shaded(pieces) if coloured else marked(pieces)
    first = next(texts, "")  # what is wrong with the options shows before anything is printed
    try:
        for text in itertools.chain([prompt, first], texts):
            print(text, end="", flush=True)
    finally:
        print(flush=True)  # also after Ctrl-C: the shell's next line starts on its own
    if stats is not None:
        if not coloured:
            print(f"{MARK} marks words with a token of uncertainty {DOUBTFUL} or more", file=sys.stderr)
        print(describe(stats), file=sys.stderr)
    return 0


def _read_stdin() -> str:
    """Return stdin as UTF-8, whatever the console's own encoding, without the newline that ends a piped line."""
    return sys.stdin.buffer.read().decode("utf-8-sig", "replace").removesuffix("\n").removesuffix("\r")


def _ended_by(ids: list[int], text: str, stops: Sequence[str], eos_id: int) -> str:
    if any(text.endswith(stop) for stop in stops):
        return "stop"
    return "end of document" if ids[-1:] == [eos_id] else "max_new_tokens"
