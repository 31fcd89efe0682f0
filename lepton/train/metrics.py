"""What a run reports: metrics.jsonl for programs, one moving line or plain lines for people."""

import contextlib
import os
import shutil
import time
from collections.abc import Iterator, Mapping
from functools import partial
from json import dumps
from pathlib import Path
from typing import Any, TextIO

from lepton.errors import InputError, reason
from lepton.files import as_path, parse_json, readable, replacing

BAD = ".bad"
"""Suffix of the file that keeps the lines of a metrics.jsonl that are no records."""
LONGEST_LINE = 1 << 20
"""Bytes that are read at once: a line of a file that is no metrics.jsonl may be endless."""
MOVES_AFTER = 1.0
"""Seconds after which the line on a terminal moves, also while a step runs."""


class MetricsLog:
    """Appends objects to a metrics.jsonl, a line each, every one with its 'step'. Other programs see them at once.

    Raises:
        InputError: the file cannot be written, such as on a full disk.
    """

    def __init__(self, path: Path) -> None:
        self.path = path = as_path(path)
        with _writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = path.open("ab", buffering=0)

    @staticmethod
    def read(path: Path) -> list[dict[str, Any]]:
        """Return the objects of the file, without lines that are no records with a step."""
        return [entry for _, entry in _records(path) if entry is not None] if os.path.exists(path) else []

    @staticmethod
    def rewind(path: Path, step: int) -> int:
        """Drop what stands after `step`, and the end of a line that a killed process has left.

        Lines that are no records move to a file beside, called as this one and BAD; returns how many they are.
        """
        if not os.path.exists(path):  # unlike Path's own, it answers for names that the system does not take
            return 0
        aside, bad = path.with_name(path.name + BAD), 0
        with (
            _writing(path),
            replacing(path) as shorter,
            shorter.open("wb") as kept,
            aside.open("ab") as others,
        ):
            for line, entry in _records(path):
                if entry is None:
                    bad += others.write(line) > 0
                elif entry["step"] <= step:
                    kept.write(line.rstrip(b"\r\n") + b"\n")
            others.flush()
            os.fsync(others.fileno())
        if not aside.stat().st_size:
            aside.unlink()
        return bad

    def write(self, entry: Mapping[str, Any]) -> None:
        """Append one object."""
        line = memoryview((dumps(entry) + "\n").encode())
        with _writing(self.path):
            while line:
                line = line[self._file.write(line) :]

    def sync(self) -> None:
        """Make what was written durable: before a checkpoint is, so that no step of a resumed run is missing."""
        with _writing(self.path):
            os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()


def _records(path: Path) -> Iterator[tuple[bytes, dict[str, Any] | None]]:
    """Yield each line of the file and its object, None where it is no record of a step; not a torn last line."""
    with _reading(path), readable(path, "metrics file").open("rb") as file:
        for line in iter(partial(file.readline, LONGEST_LINE), b""):
            try:
                entry = parse_json(line.decode("utf-8-sig"), "")
            except ValueError:
                entry = None
            if isinstance(entry, dict) and type(entry.get("step")) is int:
                yield line, entry
            elif line.strip() and (line.endswith(b"\n") or len(line) == LONGEST_LINE):
                yield line, None


@contextlib.contextmanager
def _reading(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise InputError(f"cannot read {path}: {reason(error)}") from None


@contextlib.contextmanager
def _writing(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise InputError(
            f"cannot write {path}: {error.strerror}; the checkpoints saved before are intact: once there is room, "
            "go on with --resume auto"
        ) from error


class Progress:
    """Lines for people: on a terminal the progress is one line that moves, elsewhere each is a line of its own.

    A run does not die of what it cannot print: `closed` says that the reader of a pipe has left, and of a terminal
    that is gone or a full disk nothing is said, since metrics.jsonl holds it all.
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
        """Show the present state of things."""
        if not self._moving:
            self.say(text)
            return
        text = text[: shutil.get_terminal_size().columns - 1]
        self._print("\r" + text.ljust(self._shown))
        self._shown = len(text)
        self._moved = time.perf_counter()

    def hint(self, text: str) -> None:
        """Show on a terminal what takes a moment."""
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
        """Return the seconds since the last call and begin anew."""
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
