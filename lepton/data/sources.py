"""Reading documents from text, Markdown, code folders, .jsonl and .jsonl.xz, a piece at a time.

A document of any length arrives in pieces of at most `PIECE` characters, so memory stays bounded. Pieces end where
a tokenizer would cut anyway: after a newline between two visible characters.
"""

import codecs
import io
import json
import lzma
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import IO

from lepton.errors import InputError

PIECE = 1 << 16
"""Most characters of a piece."""
SKIPPED_FOLDERS = {"__pycache__", "node_modules"}
"""Folders that are left out, besides hidden ones."""
JSON_LINES = (".jsonl", ".jsonl.xz")


@dataclass(frozen=True)
class Piece:
    """A stretch of a document's text."""

    text: str
    last: bool
    """The document ends with this piece."""


class Corpus:
    """The documents of `sources`, files and folders, in a fixed order: as given, and within a folder by name.

    A text file is one document; a .jsonl or .jsonl.xz file holds one a line, in `text_field`. In folders, hidden,
    binary and undecodable files and the folder `leave_out` are skipped; a file that is named must be readable.
    """

    def __init__(
        self, sources: Iterable[str | Path], *, text_field: str = "text", leave_out: Path | None = None
    ) -> None:
        self.text_field = text_field
        self.skipped: list[Path] = []
        """Files of folders that hold no readable text; complete once `pieces` is exhausted."""
        self._named: set[Path] = set()
        files: dict[Path, None] = {}
        for source in map(Path, sources):
            if source.is_dir():
                files.update(dict.fromkeys(path for path in _walk(source, leave_out) if self._may_hold_text(path)))
            else:
                self._check_named(source)
                self._named.add(source)
                files[source] = None
        self.files = list(files)
        """All files that are read, in order."""
        self.size = sum(path.stat().st_size for path in self.files)
        """Bytes of all files as they lie on the disk."""

    def _may_hold_text(self, path: Path) -> bool:
        """Tell whether a file of a folder is worth reading: JSON lines of another kind are not."""
        try:
            if _is_json_lines(path):
                self._peek(path)
        except (InputError, OSError):
            self.skipped.append(path)
            return False
        return True

    def _check_named(self, path: Path) -> None:
        if not path.exists():
            raise InputError(f"no such file or folder: {path}")
        try:
            if _is_json_lines(path):
                self._peek(path)
            elif not is_text(path):
                raise InputError(f"{path} is not UTF-8 text: convert it, or leave it out")
        except OSError as error:
            raise InputError(f"cannot read {path}: {error.strerror}") from None

    def _peek(self, path: Path) -> None:
        with path.open("rb") as raw:
            next(self._json_documents(raw, path), None)

    def pieces(self, advance: Callable[[int], object] | None = None) -> Iterator[Piece]:
        """Yield every document's pieces. `advance` is told the bytes of the files that were read since its last call.

        Raises InputError, with file and line, for JSON lines that are torn or lack the text field.
        """
        for path in self.files:
            try:
                yield from self._file(path, advance or (lambda _: None))
            except OSError as error:
                if path in self._named:
                    raise InputError(f"cannot read {path}: {error.strerror}") from None
                self.skipped.append(path)

    def _file(self, path: Path, advance: Callable[[int], object]) -> Iterator[Piece]:
        json_lines = _is_json_lines(path)
        if not json_lines and path not in self._named and not is_text(path):
            self.skipped.append(path)
            advance(path.stat().st_size)
            return
        documents: Iterable[IO[str]]
        with path.open("rb") as raw:
            told = 0
            documents = self._json_documents(raw, path) if json_lines else [io.TextIOWrapper(raw, "utf-8-sig")]
            for piece in chain.from_iterable(map(_cut, documents)):
                yield piece
                if (now := raw.tell()) > told:
                    advance(now - told)
                    told = now

    def _json_documents(self, raw: IO[bytes], path: Path) -> Iterator[io.StringIO]:
        try:
            with lzma.open(raw) if path.name.endswith(".xz") else nullcontext(raw) as lines:
                for number, line in enumerate(lines, start=1):
                    if text := self._text_of_line(line, f"{path}, line {number}"):
                        yield io.StringIO(text)
        except (EOFError, lzma.LZMAError) as error:
            raise InputError(f"{path} is torn or no xz file ({error}): fetch or make it anew") from None

    def _text_of_line(self, line: bytes, place: str) -> str:
        if not line.strip():
            return ""
        try:
            entry = json.loads(line)
        except ValueError as error:
            raise InputError(f"{place}: no JSON ({error})") from None
        if not isinstance(entry, dict) or not isinstance(entry.get(self.text_field, 0), str | None):
            found = ", ".join(entry) if isinstance(entry, dict) else type(entry).__name__
            raise InputError(
                f"{place}: no text in the field '{self.text_field}' (found: {found}); name the field with --text_field"
            )
        return entry[self.text_field] or ""


def is_text(path: Path) -> bool:
    """Tell whether the file is UTF-8 without zero bytes. Reads it a block at a time; OSError passes through."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    with path.open("rb") as file:
        try:
            while block := file.read(1 << 20):
                if b"\0" in block:
                    return False
                decoder.decode(block)
            decoder.decode(b"", final=True)
        except UnicodeDecodeError:
            return False
    return True


def _is_json_lines(path: Path) -> bool:
    return path.name.endswith(JSON_LINES)


def _walk(folder: Path, leave_out: Path | None) -> Iterator[Path]:
    for here, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith(".") and name not in SKIPPED_FOLDERS)
        if leave_out is not None:
            folders[:] = [name for name in folders if not _same(Path(here, name), leave_out)]
        for name in sorted(names):
            path = Path(here, name)
            if not name.startswith(".") and path.is_file():
                yield path


def _same(a: Path, b: Path) -> bool:
    return a.resolve() == b.resolve()


def _cut(document: IO[str]) -> Iterator[Piece]:
    rest = document.read(2 * PIECE)
    while len(rest) > PIECE:
        end = _end_of_piece(rest)
        yield Piece(rest[:end], last=False)
        rest = rest[end:] + document.read(PIECE)
    if rest:
        yield Piece(rest, last=True)


def _end_of_piece(text: str) -> int:
    at = text.rfind("\n", PIECE // 2, PIECE)
    while at > 0:
        if not text[at - 1].isspace() and not text[at + 1].isspace():
            return at + 1
        at = text.rfind("\n", PIECE // 2, at)
    return PIECE
