"""Reading documents from text, HTML, code folders, JSON lines, JSON arrays, tables and Parquet, a piece at a time.

A document of any length arrives in pieces of at most `PIECE` characters, so memory stays bounded. Pieces end where
a tokenizer would cut anyway: after a newline between two visible characters.
"""

import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from lepton.data.formats import TEXTS, Form, form_of, not_utf8, read_documents
from lepton.data.packing import refuse_unreadable, suffixes, text_fault
from lepton.errors import InputError
from lepton.files import readable

PIECE = 1 << 16
"""Most characters of a piece."""
SKIPPED_FOLDERS = {"__pycache__", "node_modules"}
"""Folders that are left out, besides hidden ones."""
MARKER = "<|endoftext|>"
"""What public sets of text put between documents, on a line of its own."""
MAX_SEPARATOR = 1024
"""Most characters of a separator."""
NAMES_SHOWN = 3
"""Names of skipped files that are shown of each kind."""


@dataclass(frozen=True)
class Piece:
    """A stretch of a document's text."""

    text: str
    last: bool
    """The document ends with this piece."""


class Corpus:
    """The documents of `sources`, files and folders, in a fixed order: as given, and within a folder by name.

    A text file and a page of HTML are one document; JSON lines, JSON arrays, tables and Parquet files hold one an
    entry, in `text_field` (see `lepton.data.formats`). A document that holds separators is as many documents: without a
    `separator`, these are lines with nothing but `MARKER`; with one, the text wherever it stands; with an empty one,
    none.

    In folders, hidden, binary and undecodable files, linked folders and the folders `leave_out` are skipped; a file
    that is named must be readable.
    """

    def __init__(
        self,
        sources: Iterable[str | Path],
        *,
        text_field: str = "text",
        leave_out: Iterable[Path] = (),
        separator: str | None = None,
    ) -> None:
        if separator is not None and len(separator) > MAX_SEPARATOR:
            raise InputError(f"the separator has {len(separator):,} characters: give at most {MAX_SEPARATOR:,}")
        self.text_field, self.separator = text_field, separator
        self.skipped: dict[Path, str] = {}
        """Files of folders that hold no readable text, with their kind; complete once `pieces` is exhausted."""
        self.left_out: dict[Path, str] = {}
        """What was not looked into, with its kind: hidden files and folders, linked folders, pipes."""
        self.separators = 0
        """Separators that were found so far."""
        self.markers_kept = 0
        """Markers that stand inside a line and were kept as text so far; only counted without a `separator`."""
        self._named: set[Path] = set()
        self._leave_out = {os.path.realpath(folder) for folder in leave_out}
        files: dict[Path, None] = {}
        for source in map(Path, sources):
            if os.path.isdir(source):  # unlike Path's own, it answers for names that the system does not take
                files.update(dict.fromkeys(path for path in self._walk(source) if self._is_usable(path)))
            else:
                self._check_named(source)
                self._named.add(source)
                files[source] = None
        self.files = list(files)
        """All files that are read, in order."""
        self.size = sum(path.stat().st_size for path in self.files)
        """Bytes of all files as they lie on the disk."""

    def skipped_counts(self) -> dict[str, int]:
        """Return how many files and folders of each kind were skipped, most first."""
        return dict(Counter([*self.skipped.values(), *self.left_out.values()]).most_common())

    def skipped_summary(self) -> str:
        """Return what was skipped, such as ``3 .parquet (a.parquet, b.parquet, ...), 1 hidden (.git)``; or ''."""
        parts = []
        for kind, count in self.skipped_counts().items():
            names = [path.name for path, its in (self.skipped | self.left_out).items() if its == kind][:NAMES_SHOWN]
            plural = "s" if count > 1 and kind.endswith(("folder", "link")) else ""
            more = ", ..." if count > NAMES_SHOWN else ""
            parts.append(f"{count:,} {kind}{plural} ({', '.join(names)}{more})")
        return ", ".join(parts)

    def pieces(self, advance: Callable[[int], object] | None = None) -> Iterator[Piece]:
        """Yield every document's pieces. `advance` gets the bytes of the files that were read since its last call.

        Raises InputError, with file and line, for entries that are torn or lack the text field.
        """
        for path in self.files:
            try:
                yield from self._file(path, advance or (lambda _: None))
            except OSError as error:
                if path in self._named:
                    raise InputError(f"cannot read {path}: {error.strerror}") from None
                self.skipped[path] = "unreadable"

    def _is_usable(self, path: Path) -> bool:
        """Decide whether a file of a folder is read, by its name, and by its first entry if it should have some."""
        kind = suffixes(path)[0]
        try:
            refuse_unreadable(path)
            kind = f"{kind} without usable '{self.text_field}'"
            self._peek(path, named=False)
        except InputError:
            self.skipped[path] = kind
            return False
        except OSError:
            self.skipped[path] = "unreadable"
            return False
        return True

    def _check_named(self, path: Path) -> None:
        readable(path, "file or folder")
        refuse_unreadable(path)
        try:
            if self._peek(path, named=True) in TEXTS and text_fault(path):
                raise not_utf8(path)
        except OSError as error:
            raise InputError(f"cannot read {path}: {error.strerror}") from None

    def _peek(self, path: Path, *, named: bool) -> Form:
        """Return the form of the file. Raises InputError if it should have entries and the first is none."""
        form = form_of(path, self.text_field, named=named)
        if form not in TEXTS:
            with path.open("rb") as raw:
                next(read_documents(raw, path, form, self.text_field), None)
        return form

    def _file(self, path: Path, advance: Callable[[int], object]) -> Iterator[Piece]:
        form = form_of(path, self.text_field, named=path in self._named)
        if form in TEXTS and path not in self._named and (fault := self._fault(path)):
            self.skipped[path] = fault
            advance(path.stat().st_size)
            return
        with path.open("rb") as raw:
            done = 0
            for document in read_documents(raw, path, form, self.text_field):
                for piece in _cut(self._parts(document)):
                    yield piece
                    if (now := raw.tell()) > done:
                        advance(now - done)
                        done = now

    def _fault(self, path: Path) -> str:
        try:
            return text_fault(path)
        except InputError:
            return f"torn {suffixes(path)[1]}"

    def _parts(self, document: IO[str]) -> Iterator[str | None]:
        """Yield the text in parts of at most about `PIECE` characters, and None where a separator stood."""
        if self.separator is None:
            return self._parts_between_markers(document)
        return self._parts_between(document, self.separator) if self.separator else _blocks(document)

    def _parts_between_markers(self, document: IO[str]) -> Iterator[str | None]:
        at_line_start = True
        while line := document.readline(PIECE):
            if MARKER not in line:
                yield line
            elif at_line_start and line.strip() == MARKER:
                self.separators += 1
                yield None
            else:
                self.markers_kept += line.count(MARKER)
                yield line
            at_line_start = line.endswith("\n")

    def _parts_between(self, document: IO[str], separator: str) -> Iterator[str | None]:
        rest = ""
        for block in _blocks(document):
            *whole, rest = (rest + block).split(separator)
            for part in whole:
                yield part
                yield None
            self.separators += len(whole)
            kept = max(0, len(rest) - len(separator) + 1)  # what follows may be the beginning of a separator
            yield rest[:kept]
            rest = rest[kept:]
        yield rest

    def _walk(self, folder: Path) -> Iterator[Path]:
        def unreadable(error: OSError) -> None:
            self.left_out[Path(error.filename)] = "unreadable folder"

        for here, folders, names in os.walk(folder, onerror=unreadable):
            kept = []
            for name in sorted(folders):
                path = Path(here, name)
                if os.path.realpath(path) in self._leave_out:
                    continue
                if reason := _why_not_enter(path):
                    self.left_out[path] = reason
                else:
                    kept.append(name)
            folders[:] = kept
            for path in (Path(here, name) for name in sorted(names)):
                if reason := _why_not_open(path):
                    self.left_out[path] = reason
                else:
                    yield path


def is_text(path: Path) -> bool:
    """Return whether the file is UTF-8 without zero bytes. OSError passes through."""
    return not text_fault(path)


def _why_not_enter(folder: Path) -> str:
    if folder.name.startswith("."):
        return "hidden"
    if folder.name in SKIPPED_FOLDERS:
        return folder.name
    return "linked folder" if folder.is_symlink() else ""


def _why_not_open(path: Path) -> str:
    if path.name.startswith("."):
        return "hidden"
    if path.is_file():
        return ""
    return "broken link" if path.is_symlink() else "pipe or device"


def _blocks(document: IO[str]) -> Iterator[str]:
    while block := document.read(PIECE):
        yield block


def _cut(parts: Iterable[str | None]) -> Iterator[Piece]:
    """Make pieces of a document's parts. When separators (None) split the document, blank parts are dropped."""
    waiting: list[str] = []
    size, begun, split = 0, False, False
    for part in parts:
        if part is None:
            rest, split = "".join(waiting), True
            if begun or rest.strip():
                yield Piece(rest, last=True)
            waiting, size, begun = [], 0, False
            continue
        waiting.append(part)
        size += len(part)
        if size > PIECE:
            rest = "".join(waiting)
            while len(rest) > PIECE:
                end = _end_of_piece(rest)
                yield Piece(rest[:end], last=False)
                rest, begun = rest[end:], True
            waiting, size = [rest], len(rest)
    rest = "".join(waiting)
    if begun or (rest.strip() if split else rest):
        yield Piece(rest, last=True)


def _end_of_piece(text: str) -> int:
    at = text.rfind("\n", PIECE // 2, PIECE)
    while at > 0:
        if not text[at - 1].isspace() and not text[at + 1].isspace():
            return at + 1
        at = text.rfind("\n", PIECE // 2, at)
    return PIECE
