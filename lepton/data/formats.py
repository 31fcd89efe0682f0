"""How the documents of one file are read, by the file's name: text, HTML, JSON lines, a JSON array, a table, Parquet.

All but Parquet may be packed. All are read a block at a time; what a file makes one document of is bounded by
`MAX_DOCUMENT`. `lepton.data.packing` refuses files that would come out as anything but their text.
"""

import codecs
import csv
import io
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, Literal

from lepton.data.html_text import text_of_page
from lepton.data.packing import suffixes, unpacked
from lepton.errors import InputError, reason
from lepton.files import parse_json
from lepton.requirements import need

MAX_DOCUMENT = 1 << 25
"""Most bytes of a JSON line, and most characters of an element of an array, of a row of a table or of an HTML page
(32 MiB): these are taken into memory whole, where text files are not."""
BLOCK = 1 << 16
JSON_LINES = (".jsonl", ".ndjson")
TABLES = (".csv", ".tsv")
PAGES = (".html", ".htm", ".xhtml")
COLUMNS = (".parquet", ".pq")
PARQUET_ROWS = 256
"""Rows of a Parquet file that are in memory at once, beside what the file's own pages hold."""

Form = Literal["text", "page", "lines", "array", "table", "parquet"]
TEXTS = ("text", "page")
"""Forms that are one document, and of which a file that is no UTF-8 text is found out by reading it to its end."""


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
    if suffix in PAGES:
        return "page"
    if suffix in COLUMNS:
        if packing:
            raise InputError(f"{path}: a packed {suffix} file is not read; unpack it")
        return "parquet"
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
    """Yield the documents of the open file `raw`, each as an open text. Empty ones are left out, but for text files.

    Raises InputError, with file and line, for what is torn, too long, or lacks the text field.
    """
    if form in ("lines", "array", "parquet"):
        for place, entry in read_entries(raw, path, form, field):
            plain = form == "array" and isinstance(entry, str)
            if text := entry if plain else _text_of(entry, field, place):
                yield io.StringIO(text)
        return
    with unpacked(raw, path) as file:
        try:
            # The csv module finds the ends of lines itself.
            with _text(file, newline="" if form == "table" else None) as text:
                if form == "text":
                    yield text
                else:
                    yield from map(io.StringIO, filter(None, (_table if form == "table" else _page)(text, path, field)))
        except UnicodeDecodeError:
            raise not_utf8(path) from None


def read_entries(raw: IO[bytes], path: Path, form: Form, field: str) -> Iterator[tuple[str, Any]]:
    """Yield the entries of JSON lines, a JSON array or a Parquet file, each with its place: ``a.jsonl, line 3``.

    Of a Parquet file only the column `field` is read: an entry is a dict with it alone.

    Raises InputError, with that place, for what is torn or too long.
    """
    if form == "parquet":
        yield from _parquet(raw, path, field)
        return
    with unpacked(raw, path) as file:
        try:
            if form == "lines":
                yield from _lines(file, path)
                return
            with _text(file) as text:
                for number, entry in enumerate(_elements(text, str(path)), start=1):
                    yield f"{path}, element {number}", entry
        except UnicodeDecodeError:
            raise not_utf8(path) from None


def not_utf8(path: Path) -> InputError:
    """Return the error for a file that is no UTF-8 text, with the first line that is none."""
    place = f"{path}"
    try:
        with path.open("rb") as raw, unpacked(raw, path) as file:
            number, line = 1, file.readline(BLOCK)
            while line:
                if b"\0" in line:
                    break
                line.decode()
                number += line.endswith(b"\n")
                line = file.readline(BLOCK)
    except UnicodeDecodeError:
        place = f"{path}, line {number}"
    return InputError(f"{place} is not UTF-8 text: convert the file (iconv -f LATIN1 -t UTF-8), or leave it out")


def _text(file: IO[bytes], newline: str | None = None) -> io.TextIOWrapper:
    return io.TextIOWrapper(file, "utf-8-sig", newline=newline)


def _page(file: IO[str], path: Path, field: str) -> Iterator[str]:
    page = file.read(MAX_DOCUMENT + 1)
    if len(page) > MAX_DOCUMENT:
        raise _too_long(str(path))
    yield text_of_page(page)


def _lines(file: IO[bytes], path: Path) -> Iterator[tuple[str, Any]]:
    number = 0
    while line := file.readline(MAX_DOCUMENT + 1):
        number += 1
        place = f"{path}, line {number}"
        if len(line) > MAX_DOCUMENT:
            raise _too_long(place)
        if line.strip():
            try:
                yield place, parse_json(line, place)
            except InputError as error:
                raise InputError(f"{error}; correct the line, or remove it") from None


def _text_of(entry: Any, field: str, place: str) -> str:
    if not isinstance(entry, dict) or not isinstance(entry.get(field, 0), str | None):
        found = ", ".join(entry) if isinstance(entry, dict) else type(entry).__name__
        raise _no_field(field, found, place)
    return entry[field] or ""


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
        raise InputError(
            f"{path}, line {rows.line_num + 1}: no {suffixes(path)[0][1:]} ({error}); correct the quotes there"
        ) from None


def _parquet(raw: IO[bytes], path: Path, field: str) -> Iterator[tuple[str, Any]]:
    """Yield the rows of a Parquet file, {field: value}. `raw` is only moved, to tell how far the reading is."""
    need("pyarrow", f"{path}: a Parquet file")
    import pyarrow as pa
    import pyarrow.parquet as pq

    size, done = path.stat().st_size, 0
    try:
        with pq.ParquetFile(str(path)) as file:
            names = file.schema_arrow.names
            if field not in names:
                raise _no_field(field, ", ".join(names), str(path))
            for batch in file.iter_batches(PARQUET_ROWS, columns=[field]):
                values = batch.column(0).to_pylist()
                raw.seek(size * (done + len(values)) // file.metadata.num_rows)
                for row, value in enumerate(values, start=done + 1):
                    yield f"{path}, row {row}", {field: value}
                done += len(values)
    except (pa.ArrowException, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:  # the system's, where pyarrow's own have none
            raise
        raise InputError(f"{path} is torn or no Parquet file ({reason(error)}): fetch or make it again") from None


def _no_field(field: str, found: str, place: str) -> InputError:
    found = " ".join(found.split())
    shown = found if len(found) <= 200 else found[:200] + "..."
    return InputError(f"{place}: no text in the field '{field}' (found: {shown}); name the field with --text_field")


def _too_long(place: str) -> InputError:
    return InputError(f"{place}: longer than {MAX_DOCUMENT >> 20} MiB, the most that is read at once: split it")
