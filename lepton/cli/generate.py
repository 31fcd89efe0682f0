"""`python -m lepton generate`: continue a prompt, printed as it comes."""

import argparse
import itertools
import sys
import time
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from lepton.cli.arguments import add_json, print_json
from lepton.cli.loading import add_loading, load
from lepton.errors import InputError

if TYPE_CHECKING:
    from lepton.data.tokenizer import Tokenizer


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
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    """Print the prompt and its continuation, or with `--json` one object about both."""
    from lepton.generate import generate_stream

    prompt = _read_stdin() if args.prompt == "-" else args.prompt
    if not prompt:
        raise InputError("the prompt is empty: give at least one character")
    if "" in args.stop:
        raise InputError("--stop '': give at least one character")
    model, tokenizer, _ = load(args)
    prompt_ids = tokenizer.encode(prompt)
    stream = generate_stream(
        model, prompt_ids, args.max_new_tokens, args.temperature, args.top_p, args.top_k, seed=args.seed
    )
    ids: list[int] = []
    text = continuation(stream, tokenizer, args.stop, ids)
    if not args.json:
        return _print_live(prompt, text)
    start = time.perf_counter()
    new_text = "".join(text)
    seconds = time.perf_counter() - start
    print_json(
        {
            "prompt": prompt,
            "text": new_text,
            "prompt_tokens": len(prompt_ids),
            "new_tokens": len(ids),
            "ended_by": _ended_by(ids, new_text, args.stop, model.config.eos_id),
            "seconds": round(seconds, 3),
            "tokens_per_second": round(len(ids) / seconds, 1),
        }
    )
    return 0


def continuation(stream: Iterator[int], tokenizer: "Tokenizer", stops: Sequence[str], ids: list[int]) -> Iterator[str]:
    """Yield the text of the ids in `stream`, complete characters only, up to and including the first of `stops`.

    `ids` receives the ids that were taken from the stream.
    """
    decoder = tokenizer.stream_decoder()
    # A stop text may begin in what was yielded before: this many characters of it are kept in sight.
    reach = max(map(len, stops), default=1) - 1
    tail = ""
    for token in stream:
        ids.append(token)
        piece = decoder.push(token)
        sight = tail + piece
        ends = [sight.index(stop) + len(stop) for stop in stops if stop in sight]
        if ends:
            yield sight[len(tail) : min(ends)]
            return
        if piece:
            yield piece
        tail = sight[-reach:] if reach else ""
    if rest := decoder.flush():
        yield rest


def _print_live(prompt: str, text: Iterator[str]) -> int:
    try:
        for piece in itertools.chain([prompt], text):
            print(piece, end="", flush=True)
    finally:
        print(flush=True)  # also after Ctrl-C: the shell's next line starts on its own
    return 0


def _read_stdin() -> str:
    """Return stdin as UTF-8, whatever the console's own encoding, without the newline that ends a piped line."""
    return sys.stdin.buffer.read().decode("utf-8-sig", "replace").removesuffix("\n").removesuffix("\r")


def _ended_by(ids: list[int], text: str, stops: Sequence[str], eos_id: int) -> str:
    if any(text.endswith(stop) for stop in stops):
        return "stop"
    return "end of document" if ids[-1:] == [eos_id] else "max_new_tokens"
