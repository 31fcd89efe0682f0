"""Generated text on a terminal: shaded or marked by uncertainty, with nothing in it that the terminal would obey."""

import itertools
import os
import re
import sys
from collections.abc import Iterable, Iterator
from typing import NamedTuple, TextIO

# 256-colour backgrounds from sure to unsure, each for an equal share of 0..1, with black text; sure text is left alone.
SHADES = (None, 229, 222, 216, 210)
# Without colours a word is marked if one of its tokens is at least this unsure.
DOUBTFUL = 0.8
MARK = "[?]"
# All control characters but tab and newline: an escape sequence could move the cursor, or worse.
CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")
RUNS = re.compile(r"\s+|\S+")


class Piece(NamedTuple):
    """Complete characters, and how unsure the model was of the least sure of their tokens."""

    text: str
    uncertainty: float


def has_colours(stream: TextIO) -> bool:
    """Whether `stream` is a terminal that shows colours, and its user has not said no (https://no-color.org)."""
    console = (
        sys.platform != "win32" or "WT_SESSION" in os.environ
    )  # the old Windows console prints escapes as they are
    return stream.isatty() and console and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


def visible(text: str) -> str:
    """Return `text` with a sign in place of each control character, such as U+241B for escape."""
    return CONTROL.sub(lambda found: _sign(ord(found[0])), text)


def shaded(pieces: Iterable[Piece]) -> Iterator[str]:
    """Yield the text for a colour terminal, words on a background that says how unsure the model was."""
    for text, uncertainty in pieces:
        colour = SHADES[min(int(uncertainty * len(SHADES)), len(SHADES) - 1)]
        for run in RUNS.findall(text):
            yield run if run.isspace() else _on(colour, run)


def marked(pieces: Iterable[Piece], above: float | None = None) -> Iterator[str]:
    """Yield the text word by word, those of which the model was unsure with a mark behind them.

    It was unsure if the uncertainty is greater than `above`; None: `DOUBTFUL` or more.
    """

    def mark(word: str, uncertainty: float) -> str:
        unsure = uncertainty >= DOUBTFUL if above is None else uncertainty > above
        return word + MARK if word and unsure else word

    word, uncertainty = "", 0.0
    for text, unsure in pieces:
        for space, run in itertools.groupby(text, str.isspace):
            if not space:
                word, uncertainty = word + "".join(run), max(uncertainty, unsure)
                continue
            yield mark(word, uncertainty) + "".join(run)
            word, uncertainty = "", 0.0
    yield mark(word, uncertainty)


def legend() -> str:
    """Return what the shades mean, on a line of its own."""
    share = 100 // len(SHADES)
    steps = [_on(colour, f" {share * i}-{share * (i + 1)} % ") for i, colour in enumerate(SHADES)]
    return "chance that the model's best guess is wrong: " + "".join(steps)


def _on(colour: int | None, text: str) -> str:
    return text if colour is None else f"\033[30;48;5;{colour}m{text}\033[0m"


def _sign(code: int) -> str:
    if code == 0x7F:
        return "\u2421"
    return chr(0x2400 + code) if code < 0x20 else "\ufffd"
