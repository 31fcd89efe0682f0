"""What a file's name says: how it is packed, and whether it is of a kind that is not read; and whether it is text."""

import bz2
import codecs
import contextlib
import gzip
import importlib
import lzma
import shlex
import sys
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any, cast

from lepton.errors import InputError
from lepton.requirements import need


def zstd() -> Any:
    """Return the module that reads Zstandard: Python's own from 3.14 on, before that its backport.

    Raises MissingLibrary where that is missing.
    """
    if sys.version_info >= (3, 14):
        return importlib.import_module("compression.zstd")
    need("backports.zstd", "a .zst file")
    return importlib.import_module("backports.zstd")


def _open_zst(file: IO[bytes]) -> IO[bytes]:
    return cast(IO[bytes], zstd().open(file))


PACKED: dict[str, Callable[[IO[bytes]], IO[bytes]]] = {
    ".xz": cast(Callable[[IO[bytes]], IO[bytes]], lzma.open),
    ".gz": cast(Callable[[IO[bytes]], IO[bytes]], gzip.open),
    ".bz2": cast(Callable[[IO[bytes]], IO[bytes]], bz2.open),
    ".zst": _open_zst,
}
_UNPACK, _AS_TEXT = "unpack it, and name what was inside", "save it as plain text"
_FRAME = (
    "convert it: python -c \"import pandas; pandas.{read}({path!r}).to_json({path!r} + '.jsonl', "
    "orient='records', lines=True)\""
)
UNREADABLE = {
    **dict.fromkeys((".feather", ".arrow"), _FRAME.replace("{read}", "read_feather")),
    **dict.fromkeys((".xlsx", ".xls", ".ods"), "save it as .csv"),
    ".zip": "unpack it: unzip {quoted} -d FOLDER",
    **dict.fromkeys((".tar", ".tgz", ".txz", ".7z", ".rar", ".lz4"), _UNPACK),
    ".pdf": "convert it: pdftotext {quoted}",
    **dict.fromkeys((".docx", ".odt", ".rtf", ".pptx", ".odp", ".epub"), _AS_TEXT),
    **dict.fromkeys((".sqlite", ".sqlite3"), "export the text as .csv or .jsonl"),
    **dict.fromkeys((".npy", ".npz", ".pt", ".pth", ".safetensors", ".pkl"), "it holds arrays, not text"),
}
"""Suffixes of files that are not read, with the way to make them readable."""


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
    except Exception as error:
        if packing != ".zst" or not isinstance(error, zstd().ZstdError):
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
