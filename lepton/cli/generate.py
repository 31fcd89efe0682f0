"""`python -m lepton generate`: continue a prompt, printed as it comes, shaded by uncertainty if asked."""

import argparse
import contextlib
import dataclasses
import itertools
import os
import re
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from lepton.cli.arguments import add_json, print_json
from lepton.cli.loading import add_loading, choose, load
from lepton.cli.shading import DOUBTFUL, MARK, Piece, has_colours, legend, marked, shaded, visible
from lepton.engine.options import GenerationOptions
from lepton.errors import InputError

if TYPE_CHECKING:
    from lepton.data.tokenizer import Tokenizer
    from lepton.engine.stats import Stats
    from lepton.generate.generation import Wanted
    from lepton.generate.stream import Stream
    from lepton.model.promise import Promise


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's flags."""
    add_loading(parser)
    parser.add_argument(
        "--prompt",
        required=True,
        metavar="TEXT",
        help="text to continue; - reads it from stdin, and '' starts a new document",
    )
    add_options(parser)
    parser.add_argument(
        "--memory",
        metavar="FILE",
        help="what the model remembers: read if the file is there, and written with what this text adds",
    )
    parser.add_argument(
        "--uncertainty",
        action="store_true",
        help=f"shade the text on a terminal by how unsure the model was ({MARK} without colours); figures go to stderr",
    )
    parser.add_argument(
        "--abstain_at",
        type=float,
        metavar="RISK",
        help=f"mark words ({MARK}) that the model abstains from; of the other tokens at most this share is wrong, once "
        "calibrate --risk RISK has been run and on text like that",
    )
    add_json(parser)


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add a flag for each field of `GenerationOptions`; what is on by default has the flag `--no_...`."""
    for field in dataclasses.fields(GenerationOptions):
        help, metavar = field.metadata["help"], field.metadata["metavar"]
        if field.default is not None and not isinstance(field.default, bool):
            help += " (default: %(default)s)"
        if field.name == "stop":  # as texts: a token's text may continue one
            parser.add_argument("--stop", action="append", default=[], metavar=metavar, help=f"{help}; may be repeated")
        elif field.default is True:
            name = field.name.removeprefix("use_")
            parser.add_argument(f"--no_{name}", dest=field.name, action="store_false", help=help)
        else:
            kind = float if "float" in str(field.type) else int
            parser.add_argument(f"--{field.name}", type=kind, default=field.default, metavar=metavar, help=help)


def read_options(args: argparse.Namespace) -> GenerationOptions:
    """Return the options that the flags name, but for `stop`: the texts are looked for in the text."""
    names = [field.name for field in dataclasses.fields(GenerationOptions) if field.name != "stop"]
    return GenerationOptions(**{name: getattr(args, name) for name in names})


def read_stops(args: argparse.Namespace) -> list[str]:
    """Return the texts of `--stop`."""
    stops = [unescaped(stop) for stop in args.stop]
    if "" in stops:
        raise InputError("--stop '': give at least one character")
    return stops


def run(args: argparse.Namespace) -> int:
    """Print the prompt and its continuation, or with `--json` one object about both."""
    from lepton.engine.engine import NotFiniteError
    from lepton.generate.generation import Generation
    from lepton.generate.stream import Stream

    stops = read_stops(args)
    options = read_options(args)
    prompt = _read_stdin() if args.prompt == "-" else args.prompt
    if args.memory is not None and not prompt:
        raise InputError("--memory needs a --prompt: a new document would begin by forgetting everything")
    remembered = memory_to_read(args.memory)
    choose(args)
    if sys.stderr.isatty():
        print(f"loading {args.checkpoint}", file=sys.stderr, flush=True)
    model, tokenizer, step = load(args)
    uncertainty = args.uncertainty or (args.json and model.idea("uncertainty") is not None)
    prompt_ids = tokenizer.encode(prompt) or [model.config.eos_id]
    wanted: Wanted = {"uncertainty": uncertainty, "abstain_at": args.abstain_at}
    stream = Stream(Generation(model, prompt_ids, options, memory=remembered, **wanted))
    taken: list[tuple[int, float]] = []
    pieces = continuation(tokens(stream), tokenizer, stops, taken)
    try:
        with _remembering(args.memory, stream, taken):
            if not args.json:
                return _print_live(prompt, pieces, stream, uncertainty=args.uncertainty)
            start = time.perf_counter()
            new_text = "".join(piece.text for piece in pieces)
            seconds = time.perf_counter() - start
    except NotFiniteError as error:
        raise InputError(f"{error}{_earlier(args.checkpoint, step)}") from None
    ids, limit = [token for token, _ in taken], stream.largest_kept
    print_json(
        {
            "prompt": prompt,
            "text": new_text,
            "prompt_tokens": len(prompt_ids),
            "new_tokens": len(ids),
            "ended_by": _ended_by(ids, new_text, stops, model.config.eos_id),
            "seconds": round(seconds, 3),
            "tokens_per_second": round(len(ids) / seconds, 1),
            "tokens": ids,
            "uncertainties": [round(unsure, 4) for _, unsure in taken] if uncertainty else None,
            "abstained": None if limit is None else [unsure > limit for _, unsure in taken],
            "promise": stream.promise.to_dict() if stream.promise else None,
            "stats": stream.stats.to_dict(),
        }
    )
    return 0


def tokens(stream: "Stream") -> Iterator[tuple[int, float]]:
    """Yield the tokens of `stream` with their uncertainties, 0 where these are not computed."""
    for token in stream:
        yield token, stream.uncertainty or 0.0


def unescaped(text: str) -> str:
    r"""Return a stop text with \n, \t, \r and \\ as the characters they stand for, which shells do not make of them."""
    characters = {r"\n": "\n", r"\t": "\t", r"\r": "\r", r"\\": "\\"}
    return re.sub(r"\\[ntr\\]", lambda found: characters[found[0]], text)


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
    # A stop text may begin in what was yielded before: this many characters of it are kept.
    reach = max(map(len, stops), default=1) - 1
    tail, uncertainty = "", 0.0
    for token, unsure in stream:
        taken.append((token, unsure))
        text, uncertainty = decoder.push(token), max(uncertainty, unsure)
        joined = tail + text
        ends = [joined.index(stop) + len(stop) for stop in stops if stop in joined]
        if ends:
            yield Piece(joined[len(tail) : min(ends)], uncertainty)
            return
        if text:
            yield Piece(text, uncertainty)
            uncertainty = 0.0
        tail = joined[-reach:] if reach else ""
    if rest := decoder.flush():
        yield Piece(rest, uncertainty)


def describe(stats: "Stats", seconds: float, *, uncertainty: bool) -> str:
    """Return the figures of a generation as one line, with those of the ideas if `uncertainty` was asked for."""
    speed = f"{stats.new_tokens} new tokens in {seconds:.1f} s ({stats.new_tokens / seconds:.1f} tokens/s)"
    if not uncertainty:
        return speed
    parts = [speed, f"{stats.forward_calls} passes through the model"]
    if stats.drafted:
        shares = ", ".join(f"{share:.0%}" for share in stats.acceptance)
        parts += [f"{stats.tokens_per_step:.2f} tokens per pass", f"drafts accepted by position: {shares}"]
    return "; ".join([*parts, f"mean depth {stats.mean_depth:.2f} blocks"])


def _print_live(prompt: str, pieces: Iterator[Piece], stream: "Stream", *, uncertainty: bool) -> int:
    """Print the text as it comes, on a terminal shaded by `uncertainty`, or marked where the model abstains; figures go
    to stderr where someone reads it.

    What a pipe or a file gets is the text alone.
    """
    stats, promise = stream.stats, stream.promise
    terminal, coloured = sys.stdout.isatty(), has_colours(sys.stdout)
    prompt = visible(prompt) if terminal else prompt
    texts = displayed(pieces, uncertainty=uncertainty, above=stream.largest_kept)
    start = time.perf_counter()
    first = next(texts, "")  # what is wrong with the options shows before anything is printed
    try:
        for text in itertools.chain([prompt, first], texts):
            print(text, end="", flush=True)
    finally:
        print(flush=True)  # also after Ctrl-C: the shell's next line starts on its own
    seconds = time.perf_counter() - start
    if promise is not None:
        print(_promised(terminal, promise), file=sys.stderr)
    elif uncertainty:
        print(meaning(terminal, coloured), file=sys.stderr)
    if uncertainty or sys.stderr.isatty():
        print(describe(stats, seconds, uncertainty=uncertainty), file=sys.stderr)
    return 0


def displayed(pieces: Iterable[Piece], *, uncertainty: bool, above: float | None = None) -> Iterator[str]:
    """Yield the text as stdout shows it: on a terminal without control characters, and shaded by `uncertainty`.

    Instead, words whose uncertainty is greater than `above` are marked, if it is given.
    """
    if not sys.stdout.isatty():
        return (piece.text for piece in pieces)
    safe = (Piece(visible(text), unsure) for text, unsure in pieces)
    if above is not None:
        return marked(safe, above)
    if not uncertainty:
        return (piece.text for piece in safe)
    return (shaded if has_colours(sys.stdout) else marked)(safe)


def meaning(terminal: bool, coloured: bool) -> str:
    """What the text shows of the uncertainty."""
    if not terminal:
        return "stdout is not a terminal, so the text is not shaded; --json gives the uncertainty of each token"
    if not coloured:
        return f"{MARK} marks words with a token of uncertainty {DOUBTFUL} or more"
    return legend()


def _promised(terminal: bool, promise: "Promise") -> str:
    """What the text shows of the abstentions."""
    if promise.threshold is None:
        every = f"{MARK} marks every word" if terminal else "the model abstains from every token"
        return f"{every}: no threshold was found for risk {promise.risk:g} ({promise.data})"
    if not terminal:
        return "stdout is not a terminal, so nothing is marked; --json says from which tokens the model abstains"
    return (
        f"{MARK} marks words that the model abstains from. Of its other best guesses at most {promise.risk:.0%} are "
        f"wrong, on text like that of the calibration ({promise.data}); of other text nothing is promised"
    )


def memory_to_read(path: str | None) -> str | None:
    """Return the memory file to read, None where there is none yet; what cannot work is said before the work."""
    if path is None or os.path.exists(path):
        return path
    folder = next(parent for parent in Path(path).absolute().parents if parent.exists())
    if not (folder.is_dir() and os.access(folder, os.W_OK)):
        raise InputError(f"--memory {path}: {folder} is not a folder that can be written to")
    return None


@contextlib.contextmanager
def _remembering(path: str | None, stream: "Stream", taken: list[tuple[int, float]]) -> Iterator[None]:
    """Write to `path` what the model remembers once the block is done, or left by Ctrl-C or a reader that went away.

    After any other error, and before the first token, the file stays what it was.
    """
    try:
        yield
    except (KeyboardInterrupt, BrokenPipeError):
        if path is not None and taken:
            stream.state.memory.save(path)
        raise
    if path is not None:
        stream.state.memory.save(path)


def _earlier(path: str, step: int) -> str:
    """Name a checkpoint from before the one that gives no numbers, if there is one."""
    from lepton import checkpoint

    earlier = checkpoint.newest_whole(Path(path).parent, before=step)
    return f"; an earlier checkpoint is {earlier}" if earlier else ""


def _read_stdin() -> str:
    """Return stdin as UTF-8, whatever the console's own encoding, without the newline that ends a piped line."""
    if sys.stdin.isatty():
        end = "Ctrl-Z and Enter" if sys.platform == "win32" else "Ctrl-D"
        print(f"type the prompt, and {end} on a line of its own to end it", file=sys.stderr, flush=True)
    text = sys.stdin.buffer.read().decode("utf-8-sig", "replace").removesuffix("\n").removesuffix("\r")
    if not text:
        raise InputError("--prompt -: nothing came from stdin; pipe a text into the command, or give --prompt TEXT")
    return text


def _ended_by(ids: list[int], text: str, stops: Sequence[str], eos_id: int) -> str:
    if any(text.endswith(stop) for stop in stops):
        return "stop"
    return "end of document" if ids[-1:] == [eos_id] else "max_new_tokens"
