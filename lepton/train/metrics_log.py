"""metrics.jsonl: what a run reports to programs, an object per line."""

import contextlib
import os
from collections.abc import Iterator, Mapping
from functools import partial
from json import dumps
from pathlib import Path
from typing import Any

from lepton.errors import InputError, reason
from lepton.files import as_path, parse_json, readable, replacing

BAD = ".bad"
"""Suffix of the file that keeps those lines of a metrics.jsonl that are not records."""
LONGEST_LINE = 1 << 20
"""Bytes that are read at once: a file that is not a metrics.jsonl may have endless lines."""


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
        """Return the objects of the file, without lines that are not records with a step."""
        return [entry for _, entry in _records(path) if entry is not None] if os.path.exists(path) else []

    @staticmethod
    def rewind(path: Path, step: int) -> int:
        """Drop the lines after `step`, and a last line that a killed process has left incomplete.

        Lines that are not records move to a file beside it, whose name ends in BAD; returns their number.
        """
        if not os.path.exists(path):  # unlike Path.exists, it returns False for names that the system rejects
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
        """Make the lines durable: before each checkpoint, so that a resumed run misses no step."""
        with _writing(self.path):
            os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()


def _records(path: Path) -> Iterator[tuple[bytes, dict[str, Any] | None]]:
    """Yield each line of the file and its object, None if it is not a record of a step; without a torn last line."""
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
