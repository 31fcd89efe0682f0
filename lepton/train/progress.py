"""Progress for people: one moving line on a terminal, plain lines elsewhere; a stopwatch; durations in words."""

import shutil
import time
from typing import TextIO

MOVES_AFTER = 1.0
"""Seconds after which the line on a terminal moves, also while a step runs."""


class Progress:
    """Lines for people: on a terminal the progress is one line that moves, elsewhere each is a line of its own.

    A failing print never stops a run. `closed` says that the reader of a pipe has left. Other errors, such as a lost
    terminal or a full disk, are ignored, since metrics.jsonl holds all figures. Without a stream nothing is printed.
    """

    def __init__(self, stream: TextIO | None) -> None:
        self.closed = False
        self._stream = stream
        self._moving = stream is not None and stream.isatty()
        self._shown = 0
        self._moved = time.perf_counter()

    def say(self, text: str) -> None:
        """Print a line that stays."""
        self.clear()
        self._print(text + "\n")

    def update(self, text: str) -> None:
        """Show the present state of the run."""
        if not self._moving:
            self.say(text)
            return
        text = text[: shutil.get_terminal_size().columns - 1]
        self._print("\r" + text.ljust(self._shown))
        self._shown = len(text)
        self._moved = time.perf_counter()

    def hint(self, text: str) -> None:
        """Show `text`, only on a terminal, before something that takes a moment."""
        if self._moving:
            self.update(text)

    @property
    def still(self) -> bool:
        """Whether there is a terminal whose line has not moved for a while."""
        return self._moving and time.perf_counter() - self._moved >= MOVES_AFTER

    def clear(self) -> None:
        """Wipe the moving line."""
        if self._shown:
            self._print("\r" + " " * self._shown + "\r")
            self._shown = 0

    def _print(self, text: str) -> None:
        if self._stream is None:
            return
        encoding = getattr(self._stream, "encoding", None) or "utf-8"
        try:
            # What the console lacks (cp1252) prints as "?".
            print(text.encode(encoding, "replace").decode(encoding), end="", file=self._stream, flush=True)
        except BrokenPipeError:
            self.closed = True
        except OSError:
            pass


class Stopwatch:
    """Seconds since the last `lap`."""

    def __init__(self) -> None:
        self._lap = time.perf_counter()

    def lap(self) -> float:
        """Return the seconds since the last call and start the next lap."""
        now = time.perf_counter()
        seconds, self._lap = now - self._lap, now
        return max(seconds, 1e-9)

    def peek(self) -> float:
        """Return the seconds since the last `lap`."""
        return time.perf_counter() - self._lap


def duration(seconds: float) -> str:
    """Return a duration for people: '45 s', '3 min', '2 h 05 min', '3 d 4 h'."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    if minutes < 90:
        return f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    if hours < 48:
        return f"{hours} h {minutes:02d} min"
    return f"{hours // 24} d {hours % 24} h"
