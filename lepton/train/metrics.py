"""What a run tells: metrics.jsonl for programs, one moving line or plain lines for people."""

import json
import os
import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TextIO


class MetricsLog:
    """Appends objects to a metrics.jsonl, a line each, every one with its 'step'."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("a", encoding="utf-8", newline="\n")

    @staticmethod
    def read(path: Path) -> list[dict[str, Any]]:
        """Return the objects of the file, without a last line that a killed process has left torn."""
        if not path.exists():
            return []
        objects = []
        for line in path.read_bytes().splitlines():
            try:
                objects.append(json.loads(line))
            except ValueError:
                break
        return objects

    @classmethod
    def rewind(cls, path: Path, step: int) -> None:
        """Drop what stands after `step`, and a torn line, so that a run resumed there tells each step once."""
        kept = [entry for entry in cls.read(path) if entry["step"] <= step]
        if path.exists():
            shorter = path.with_name(path.name + ".tmp")
            shorter.write_text("".join(json.dumps(entry) + "\n" for entry in kept), encoding="utf-8", newline="\n")
            os.replace(shorter, path)

    def write(self, entry: Mapping[str, Any]) -> None:
        """Append one object."""
        self._file.write(json.dumps(entry) + "\n")

    def sync(self) -> None:
        """Make what was written durable: before a checkpoint is, so that no step of a resumed run is missing."""
        self._file.flush()
        os.fsync(self._file.fileno())

    def flush(self) -> None:
        """Let other programs see what was written."""
        self._file.flush()

    def close(self) -> None:
        self._file.close()


class Progress:
    """Lines for people: on a terminal the progress is one line that moves, elsewhere each is a line of its own."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._moving = stream.isatty()
        self._shown = 0

    def say(self, text: str) -> None:
        """Print a line that stays."""
        self._clear()
        print(text, file=self._stream, flush=True)

    def update(self, text: str) -> None:
        """Show the present state of things."""
        if not self._moving:
            self.say(text)
            return
        text = text[: shutil.get_terminal_size().columns - 1]
        print("\r" + text.ljust(self._shown), end="", file=self._stream, flush=True)
        self._shown = len(text)

    def _clear(self) -> None:
        if self._shown:
            print("\r" + " " * self._shown + "\r", end="", file=self._stream)
            self._shown = 0


class Stopwatch:
    """Seconds since the last `lap`."""

    def __init__(self) -> None:
        self._lap = time.perf_counter()

    def lap(self) -> float:
        """Return the seconds since the last call and begin anew."""
        now = time.perf_counter()
        seconds, self._lap = now - self._lap, now
        return max(seconds, 1e-9)


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
