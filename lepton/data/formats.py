"""How the documents of one file are read, by the file's name: text, JSON lines, a JSON array, a table, also packed.

All are read a block at a time; what a file makes one document of is bounded by `MAX_DOCUMENT`. Files that would come
out as anything but their text are refused by name, with the way to convert them.
"""

import bz2
import codecs
import contextlib
import csv
import gzip
import io
import json
import lzma
import re
import shlex
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any, Literal, cast

from lepton.errors import InputError
from lepton.files import parse_json

MAX_DOCUMENT = 1 << 25
"""Most bytes of a JSON line, and most characters of an element of an array or of a row of a table (32 MiB): these are
taken into memory whole, where text files are not."""
BLOCK = 1 << 16
PACKED: dict[str, Callable[[IO[bytes]], IO[bytes]]] = {
    ".xz": cast(Callable[[IO[bytes]], IO[bytes]], lzma.open),
    ".gz": cast(Callable[[IO[bytes]], IO[bytes]], gzip.open),
    ".bz2": cast(Callable[[IO[bytes]], IO[bytes]], bz2.open),
}
JSON_LINES = (".jsonl", ".ndjson")
TABLES = (".csv", ".tsv")
_UNPACK, _AS_TEXT = "unpack it, and name what was inside", "save it as plain text"
_FRAME = (
    "convert it: python -c \"import pandas; pandas.{read}({path!r}).to_json({path!r} + '.jsonl', "
    "orient='records', lines=True)\""
)
UNREADABLE = {
    **dict.fromkeys((".parquet", ".pq"), _FRAME.replace("{read}", "read_parquet")),
    **dict.fromkeys((".feather", ".arrow"), _FRAME.replace("{read}", "read_feather")),
    **dict.fromkeys((".xlsx", ".xls", ".ods"), "save it as .csv"),
    ".zst": "unpack it: zstd -d {quoted}",
    ".zip": "unpack it: unzip {quoted} -d FOLDER",
    **dict.fromkeys((".tar", ".tgz", ".txz", ".7z", ".rar", ".lz4"), _UNPACK),
    ".pdf": "convert it: pdftotext {quoted}",
    **dict.fromkeys((".docx", ".odt", ".rtf", ".pptx", ".odp", ".epub"), _AS_TEXT),
    **dict.fromkeys((".sqlite", ".sqlite3"), "export the text as .csv or .jsonl"),
    **dict.fromkeys((".npy", ".npz", ".pt", ".pth", ".safetensors", ".pkl"), "it holds arrays, not text"),
}
"""Suffixes of files that are not read, with the way to make them readable."""

Form = Literal["text", "lines", "array", "table"]


def suffixes(path: Path) -> tuple[str, str]:
    """Return the suffix that says what `path` holds, in lower case, and that of its packing, or ''."""
    name = Path(path.name.lower())
    return (Path(name.stem).suffix, name.suffix) if name.suffix in PACKED else (name.suffix, "")


def refuse_unreadable(path: Path) -> None:
    """Raise InputError for a file of a kind that is not read."""
    suffix = suffixes(path)[0]
    if hint := UNREADABLE.get(suffix):
        fix = hint.format(path=str(path), quoted=shlex.quote(str(path)))
        raise InputError(f"{path}: {suffix} files are not read; {fix}")


@contextlib.contextmanager
def unpacked(raw: IO[bytes], path: Path) -> Iterator[IO[bytes]]:
    """Yield the bytes that the open file `raw` holds once unpacked. Raises InputError for a torn one."""
    packing = suffixes(path)[1]
    if not packing:
        yield raw
        return
    empty = not raw.read(1)
    raw.seek(0)
    if empty:  # which gzip and bz2 take for a packed file of no bytes
        raise _torn(path, packing, EOFError("it is empty"))
    try:
        with PACKED[packing](raw) as content:
            yield content
    except (EOFError, lzma.LZMAError, zlib.error) as error:
        raise _torn(path, packing, error) from None
    except OSError as error:
        if error.errno is not None:
            raise
        raise _torn(path, packing, error) from None


def _torn(path: Path, packing: str, error: Exception) -> InputError:
    return InputError(f"{path} is torn or no {packing[1:]} file ({error}): fetch or make it again")


def text_fault(path: Path) -> str:
    """Return why the file is no text, 'binary' or 'not UTF-8'; '' for UTF-8 without zero bytes.

    Reads it a block at a time. Raises InputError for a torn packed file; OSError passes through.
    """
    decoder = codecs.getincrementaldecoder("utf-8")()
    with path.open("rb") as raw, unpacked(raw, path) as file:
        try:
            while block := file.read(1 << 20):
                if b"\0" in block:
                    return "binary"
                decoder.decode(block)
            decoder.decode(b"", final=True)
        except UnicodeDecodeError:
            return "not UTF-8"
    return ""


def form_of(path: Path, field: str, *, named: bool) -> Form:
    """Return how the file is read.

    A .json file that opens with '[' is an array of documents if it is named; in a folder, where it may as well be
    part of a program, only if its first element has the text field. One with an object that has it on every line is
    JSON lines. Every other .json file is source text; of a packed one, which no program reads, that is an InputError.
    """
    suffix, packing = suffixes(path)
    if suffix in JSON_LINES:
        return "lines"
    if suffix in TABLES:
        return "table"
    if suffix != ".json":
        return "text"
    with path.open("rb") as raw, unpacked(raw, path) as file:
        start = file.readline(MAX_DOCUMENT).removeprefix(codecs.BOM_UTF8)
        while start and not start.strip():
            start = file.readline(MAX_DOCUMENT)
    start = start.lstrip()
    if start.startswith(b"["):
        if named or _opens_with_document(path, field):
            return "array"
    elif _has_text(_json_or_none(start), field):
        return "lines"
    if packing:
        raise InputError(
            f"{path}: no documents with the field '{field}'; name it with --text_field, or unpack the file"
        )
    return "text"


def _json_or_none(text: bytes) -> Any:
    try:
        return parse_json(text, "")
    except InputError:
        return None


def _has_text(entry: Any, field: str) -> bool:
    return isinstance(entry, dict) and isinstance(entry.get(field), str)


def _opens_with_document(path: Path, field: str) -> bool:
    try:
        with path.open("rb") as raw, unpacked(raw, path) as file, _text(file) as text:
            return _has_text(next(_elements(text, str(path)), None), field)
    except (InputError, UnicodeDecodeError):
        return False


def read_documents(raw: IO[bytes], path: Path, form: Form, field: str) -> Iterator[IO[str]]:
    """Yield the documents of the open file `raw`, each as an open text. Empty ones of lines and tables are left out.

    Raises InputError, with file and line, for what is torn, too long, or lacks the text field.
    """
    with unpacked(raw, path) as file:
        try:
            if form == "lines":
                yield from map(io.StringIO, filter(None, _lines(file, path, field)))
                return
            # The csv module finds the ends of lines itself.
            with _text(file, newline="" if form == "table" else None) as text:
                if form == "text":
                    yield text
                else:
                    read = _array if form == "array" else _table
                    yield from map(io.StringIO, filter(None, read(text, path, field)))
        except UnicodeDecodeError:
            raise InputError(f"{path} is not UTF-8 text: convert it, or leave it out") from None


def _text(file: IO[bytes], newline: str | None = None) -> io.TextIOWrapper:
    return io.TextIOWrapper(file, "utf-8-sig", newline=newline)


def _lines(file: IO[bytes], path: Path, field: str) -> Iterator[str]:
    number = 0
    while line := file.readline(MAX_DOCUMENT + 1):
        number += 1
        place = f"{path}, line {number}"
        if len(line) > MAX_DOCUMENT:
            raise _too_long(place)
        if line.strip():
            yield _text_of(parse_json(line, place), field, place)


def _text_of(entry: Any, field: str, place: str) -> str:
    if not isinstance(entry, dict) or not isinstance(entry.get(field, 0), str | None):
        found = ", ".join(entry) if isinstance(entry, dict) else type(entry).__name__
        raise _no_field(field, found, place)
    return entry[field] or ""


def _array(file: IO[str], path: Path, field: str) -> Iterator[str]:
    for number, entry in enumerate(_elements(file, str(path)), start=1):
        yield entry if isinstance(entry, str) else _text_of(entry, field, f"{path}, element {number}")


_SPACE = re.compile(r"[ \t\r\n]*")


def _elements(file: IO[str], place: str) -> Iterator[Any]:
    """Yield the elements of a JSON array one by one: only one of them is in memory."""
    decoder = json.JSONDecoder()
    text, at, number, opened = "", 0, 1, False
    problem: object = "torn"
    while block := file.read(max(BLOCK, len(text) - at)):  # ever more, so that trying again costs a constant factor
        text, at = text[at:] + block, 0
        while True:
            at = _end_of(_SPACE, text, at)
            if not opened and text.startswith("[", at):
                opened, at = True, at + 1
                continue
            if text.startswith("]", at):
                return
            start = _end_of(_SPACE, text, at + 1) if number > 1 and text.startswith(",", at) else at
            try:
                value, end = decoder.raw_decode(text, start)
            except RecursionError:
                raise InputError(f"{place}, element {number}: the JSON is nested too deeply") from None
            except ValueError as error:
                problem = error
                break  # it may go on in the next block
            if end == len(text):
                break  # of a number, more digits may follow
            yield value
            at, number = end, number + 1
        if len(text) - at > MAX_DOCUMENT:
            raise _too_long(f"{place}, element {number}")
    raise InputError(f"{place}, element {number}: no JSON, or a torn file ({problem})")


def _end_of(pattern: re.Pattern[str], text: str, at: int) -> int:
    found = pattern.match(text, at)
    return found.end() if found else at


def _table(file: IO[str], path: Path, field: str) -> Iterator[str]:
    header = file.readline(BLOCK)
    delimiters = "\t" if suffixes(path)[0] == ".tsv" else ",;\t"
    columns: list[str] = []
    for delimiter in delimiters:
        columns = next(csv.reader([header], delimiter=delimiter), [])
        if field in columns:
            break
    else:
        columns = next(csv.reader([header], delimiter=delimiters[0]), [])
        raise _no_field(field, ", ".join(columns), f"{path}, line 1")
    used = 0

    def lines() -> Iterator[str]:
        nonlocal used
        while line := file.readline(MAX_DOCUMENT + 1):
            used += len(line)
            if used > MAX_DOCUMENT:
                raise _too_long(f"{path}, the row that ends behind line {rows.line_num + 1}")
            yield line

    csv.field_size_limit(MAX_DOCUMENT)  # one for the whole process; the default is 131,072
    rows = csv.reader(lines(), delimiter=delimiter, strict=True)
    column = columns.index(field)
    try:
        for row in rows:
            used = 0
            yield row[column] if column < len(row) else ""
    except csv.Error as error:
        raise InputError(f"{path}, line {rows.line_num + 1}: no {suffixes(path)[0][1:]} ({error})") from None


def _no_field(field: str, found: str, place: str) -> InputError:
    found = " ".join(found.split())
    shown = found if len(found) <= 200 else found[:200] + "..."
    return InputError(f"{place}: no text in the field '{field}' (found: {shown}); name the field with --text_field")


def _too_long(place: str) -> InputError:
    return InputError(f"{place}: longer than {MAX_DOCUMENT >> 20} MiB, the most that is read at once: split it")
