"""One run in a folder at a time.

The lock is the operating system's, on a file in the folder. It ends with the process that holds it, and a file that a
killed process has left is used again. On a file system without locks (some network drives) the run prints a warning
and continues.
"""

import contextlib
import errno
import os
import socket
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

from lepton.errors import InputError

LOCK = ".lock"
IN_USE = (errno.EAGAIN, errno.EACCES, errno.EDEADLK)
"""Errors of locking where another process holds the lock: on POSIX, on network drives, and on Windows."""
LOCKED_BYTE = 1 << 30
"""Windows lets nobody read a byte that is locked, so this one lies after the text."""


@contextlib.contextmanager
def locked(folder: Path, say: Callable[[str], None]) -> Iterator[None]:
    """Hold the lock of `folder`. A missing folder is made, and removed again if it stays empty.

    Raises:
        InputError: another run has the lock, or the folder cannot be made or written to.
    """
    made = _make(folder)
    try:
        file = _take(folder / LOCK, say)
        try:
            yield
        finally:
            _release(file, folder / LOCK)
    finally:
        for path in made:
            with contextlib.suppress(OSError):  # it holds something by now
                path.rmdir()


def _make(folder: Path) -> list[Path]:
    """Make `folder`; return the folders that were not there before, the innermost first."""
    try:
        missing = [path for path in (folder, *folder.parents) if not path.exists()]
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"checkpoint_dir={folder} is not a folder and cannot be made one: {error.strerror}") from None
    return missing


def _take(path: Path, say: Callable[[str], None]) -> BinaryIO:
    while True:
        try:
            file = path.open("a+b")
        except OSError as error:
            raise InputError(
                f"cannot write in {path.parent}: {error.strerror}; name another --checkpoint_dir"
            ) from None
        try:
            _lock(file)
        except OSError as error:
            if error.errno in IN_USE:
                holder = _holder(file)
                file.close()
                raise InputError(
                    f"{path.parent} is in use by another run{holder}: wait until it ends, or name another "
                    "--checkpoint_dir"
                ) from None
            say(f"{path.parent} cannot be locked here ({error.strerror}): do not start a second run in it")
        if _is_at(file, path):
            break
        file.close()  # the run before has just removed it, so a file without a name is locked
    with contextlib.suppress(OSError):  # only the message of other runs needs it
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}\n".encode())
        file.flush()
    return file


def _lock(file: BinaryIO) -> None:
    if sys.platform == "win32":
        import msvcrt

        file.seek(LOCKED_BYTE)
        msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
    else:
        import fcntl

        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


def _holder(file: BinaryIO) -> str:
    file.seek(0)
    text = file.read(200).decode("ascii", "replace").strip()
    return f" ({text})" if text else ""


def _is_at(file: BinaryIO, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False


def _release(file: BinaryIO, path: Path) -> None:
    """Remove the file while its lock is still held, so that nobody else's is removed; Windows removes no open file."""
    with contextlib.suppress(OSError):
        if sys.platform == "win32":
            file.close()
        path.unlink()
    with contextlib.suppress(OSError):
        file.close()
