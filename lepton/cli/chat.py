"""`python -m lepton chat`: talk with a model in the terminal, or answer the lines of a pipe."""

import argparse
import contextlib
import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING

from lepton.cli.generate import (
    add_options,
    continuation,
    describe,
    displayed,
    meaning,
    memory_to_read,
    read_options,
    read_stops,
)
from lepton.cli.loading import add_loading, choose, load_with_record
from lepton.cli.shading import MARK, has_colours

if TYPE_CHECKING:
    from lepton.data.tokenizer import Tokenizer
    from lepton.generate.conversation import Conversation

NEW_TOKENS = 512
"""Tokens of an answer, at most, unless `--max_new_tokens` is given."""
YOU = "> "


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's flags."""
    add_loading(parser)
    parser.add_argument("--system", metavar="TEXT", help="message that comes first: how the model should answer")
    add_options(parser)
    parser.set_defaults(max_new_tokens=NEW_TOKENS)
    parser.add_argument(
        "--memory",
        metavar="FILE",
        help="what the model remembers: read if the file is there, and written when the conversation ends",
    )
    parser.add_argument(
        "--uncertainty",
        action="store_true",
        help=f"shade answers on a terminal by how unsure the model was ({MARK} without colours); figures go to stderr",
    )
    parser.epilog = (
        "On a terminal Ctrl-C stops an answer and Ctrl-D leaves. From a pipe each line is a message, and each answer "
        "is printed with a new line behind it."
    )


def run(args: argparse.Namespace) -> int:
    """Talk until the input ends."""
    from lepton.generate.conversation import Conversation

    stops, options, memory = read_stops(args), read_options(args), memory_to_read(args.memory)
    choose(args)
    on_terminal = sys.stdin.isatty() and sys.stdout.isatty()
    if sys.stderr.isatty():
        print(f"loading {args.checkpoint}", file=sys.stderr, flush=True)
    model, tokenizer, record = load_with_record(args)
    origin = record.get("data")
    if isinstance(origin, dict) and "chat" not in origin:
        print(
            f"note: {args.checkpoint} was not trained on conversations, so expect no answers; `prepare --chat` and "
            "`train --init_from` fine-tune it",
            file=sys.stderr,
        )
    talk = Conversation(model, tokenizer, options, system=args.system, memory=memory, uncertainty=args.uncertainty)
    if on_terminal:
        print("Ctrl-C stops an answer, Ctrl-D leaves", file=sys.stderr)
        if args.uncertainty:
            print(meaning(True, has_colours(sys.stdout)), file=sys.stderr)
    try:
        for message in _typed() if on_terminal else _piped():
            _answer(talk, message, tokenizer, stops, on_terminal=on_terminal, uncertainty=args.uncertainty)
    finally:
        if args.memory is not None and talk.state is not None:
            talk.state.memory.save(args.memory)
    return 0


def _answer(
    talk: "Conversation",
    message: str,
    tokenizer: "Tokenizer",
    stops: list[str],
    *,
    on_terminal: bool,
    uncertainty: bool,
) -> None:
    """Print the answer as it comes. On a terminal Ctrl-C ends it, and what was said until then stays said."""
    start, answer = time.perf_counter(), talk.answer(message)
    with _noted_interrupt() if on_terminal else contextlib.nullcontext(lambda: False) as interrupted:
        with contextlib.closing(answer):  # which brings the state up to date
            tokens = _until(interrupted, answer)
            for text in displayed(continuation(tokens, tokenizer, stops, []), uncertainty=uncertainty):
                print(text, end="", flush=True)
        print(flush=True)
    if uncertainty and talk.stream is not None:
        seconds = time.perf_counter() - start
        print(describe(talk.stream.stats, seconds, uncertainty=True), file=sys.stderr)


def _until(stopped: Callable[[], bool], tokens: Iterable[tuple[int, float]]) -> Iterator[tuple[int, float]]:
    for token in tokens:
        yield token
        if stopped():
            return


@contextlib.contextmanager
def _noted_interrupt() -> Iterator[Callable[[], bool]]:
    """Yield what tells whether Ctrl-C was pressed inside the block; pressed again, it raises KeyboardInterrupt."""
    pressed: list[int] = []

    def note(signum: int, frame: object) -> None:
        if pressed:
            raise KeyboardInterrupt
        pressed.append(signum)

    before = signal.signal(signal.SIGINT, note)
    try:
        yield lambda: bool(pressed)
    finally:
        signal.signal(signal.SIGINT, before)


def _typed() -> Iterator[str]:
    """Yield the lines that are typed on a terminal, until Ctrl-D; Ctrl-C begins the line anew."""
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  (gives `input` its keys and history)
    while True:
        try:
            line = input(YOU)
        except EOFError:
            print()
            return
        except KeyboardInterrupt:
            print()
            continue
        if line.strip():
            yield line


def _piped() -> Iterator[str]:
    """Yield the lines of stdin that are not empty, read as UTF-8 whatever the console's own encoding."""
    for line in sys.stdin.buffer:
        if text := line.decode("utf-8-sig", "replace").rstrip("\r\n"):
            yield text
