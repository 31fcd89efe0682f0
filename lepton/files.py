"""Files that users name: what may be read, how much of it is taken into memory, and how one is replaced.

Every loader and writer of the project goes through these functions, so that a pipe, a device, a file that unpacks to
gigabytes or a full disk is answered the same way everywhere.
"""

import contextlib
import json
import lzma
import os
import secrets
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lepton.errors import InputError, shown

UNFINISHED = ".tmp"
"""Suffix of a file that is still being written. Its name is hidden and has a random part, so that no two processes
write the same one."""
CACHE_VARIABLE = "LEPTON_CACHE"
"""Environment variable that names another folder than the user's cache folder for what can be made again."""


def cache_folder() -> Path:
    """Return the folder for what can be made again: $LEPTON_CACHE, or the user's cache folder of this platform."""
    if named := os.environ.get(CACHE_VARIABLE):
        return Path(named)
    import platformdirs  # which nothing else needs, and machines without a package index may lack

    return platformdirs.user_cache_path("lepton", appauthor=False)


def as_path(path: object) -> Path:
    """Return `path` as a `Path`; raises InputError if it is neither a text nor a path, or none that a system takes."""
    if isinstance(path, str | os.PathLike):
        with contextlib.suppress(TypeError, ValueError):  # a path of bytes; half of a surrogate pair
            if b"\0" not in os.fsencode(path):
                return Path(path)
    raise InputError(f"{shown(path)} is not a path: give a text or a Path, without zero bytes")


def readable(path: str | Path, what: str = "file") -> Path:
    """Return `path` as a `Path` if it is a regular file, or a link to one.

    Opening a pipe would wait for a writer, and a device may never end, so neither is opened.

    Raises:
        InputError: there is nothing, a folder, a pipe, a device or a socket; `what` names the file in the message.
    """
    path = as_path(path)
    try:
        mode = path.stat().st_mode
    except (FileNotFoundError, NotADirectoryError):
        raise InputError(f"no such {what}: {path}") from None
    except (OSError, ValueError) as error:  # ValueError: a zero byte in the name
        raise InputError(f"cannot read the {what} {str(path)!r}: {_reason(error)}") from None
    if not stat.S_ISREG(mode):
        raise InputError(f"{path} is {_kind(mode)}, not a {what}: give a regular file")
    return path


def read_bytes(path: str | Path, what: str, limit: int) -> bytes:
    """Return the content of a regular file of at most `limit` bytes.

    Raises:
        InputError: no such regular file, one that cannot be read, or a larger one.
    """
    path = readable(path, what)
    try:
        with path.open("rb") as file:
            content = file.read(limit + 1)
    except OSError as error:
        raise InputError(f"cannot read the {what} {path}: {_reason(error)}") from None
    if len(content) > limit:
        raise InputError(f"{path} is larger than {limit:,} bytes: too large for a {what}")
    return content


def unpack_xz(content: bytes, place: str, limit: int) -> bytes:
    """Return what xz-compressed `content` holds, at most `limit` bytes; `place` names it in messages.

    Raises:
        InputError: no xz data, torn or damaged, or more than `limit` bytes, which are then not unpacked.
    """
    parts, room = [], limit
    while content:  # a file may hold several streams
        decoder = lzma.LZMADecompressor()
        try:
            part = decoder.decompress(content, max_length=room + 1)
        except (lzma.LZMAError, EOFError) as error:
            raise InputError(f"{place} is torn or no xz data ({error}): fetch or make it again") from None
        room -= len(part)
        if room < 0:
            raise InputError(f"{place} unpacks to more than {limit:,} bytes: too large")
        if not decoder.eof:
            raise InputError(f"{place} is torn: its xz data has no end; fetch or make it again")
        parts.append(part)
        content = decoder.unused_data.lstrip(b"\0")
    return b"".join(parts)


def parse_json(text: str | bytes, place: str) -> Any:
    """Return the value of a JSON text; `place`, such as a file and a line, names it in messages.

    Raises:
        InputError: no JSON, or JSON that is nested too deeply to be read.
    """
    try:
        return json.loads(text)
    except RecursionError:
        raise InputError(f"{place}: the JSON is nested too deeply") from None
    except ValueError as error:
        raise InputError(f"{place}: no JSON ({error})") from None


@contextlib.contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """Write a file whole or not at all: yields a name beside `path` to write to, which then takes the place of `path`.

    Whatever happens, `path` holds its old content or all of the new one. A link stays a link: what it points to is
    replaced. Missing folders are made.

    Raises:
        InputError: `path` is a folder, a pipe or a device.
        OSError: the file cannot be written, such as on a full disk; callers say what that means.
    """
    path = as_path(path)
    if path.is_symlink():
        path = Path(os.path.realpath(path))  # of links in a circle `Path.resolve` raises RuntimeError
    with contextlib.suppress(FileNotFoundError):
        mode = path.stat().st_mode
        if not stat.S_ISREG(mode):
            raise InputError(f"{path} is {_kind(mode)}: give the name of a regular file to write")
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.{secrets.token_hex(4)}{UNFINISHED}")
    try:
        yield unfinished
        _make_durable(unfinished)
        os.replace(unfinished, path)
        if os.name == "posix":  # Windows cannot open a folder
            _make_durable(path.parent)
    except BaseException:
        with contextlib.suppress(OSError):  # it is only clutter, and the error under way says more
            unfinished.unlink(missing_ok=True)
        raise


def remove_unfinished(folder: str | Path) -> None:
    """Delete what writers that were killed have left in `folder`; no other process may be writing there."""
    for path in Path(folder).glob(f".*{UNFINISHED}"):
        with contextlib.suppress(OSError):
            path.unlink(missing_ok=True)


def _make_durable(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _reason(error: Exception) -> str:
    return (error.strerror if isinstance(error, OSError) else None) or str(error)


def _kind(mode: int) -> str:
    kinds = {stat.S_IFDIR: "a folder", stat.S_IFIFO: "a pipe", stat.S_IFSOCK: "a socket"}
    return kinds.get(stat.S_IFMT(mode), "a device")
