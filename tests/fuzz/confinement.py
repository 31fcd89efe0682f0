"""Code under test may do what a hostile value says, such as replace a device by a file: so writes stay in a folder.

Code that is not Python's own, such as the writer of safetensors, is not watched. So hostile values never name a path
that is absolute, and each case runs in a working folder of its own.
"""

import os
import sys
from pathlib import Path
from typing import Any

CHANGES = {
    "os.rename": 2, "os.link": 2, "os.symlink": 2, "os.remove": 1, "os.rmdir": 1, "os.mkdir": 1, "os.truncate": 1,
    "os.chmod": 1,
    "os.chown": 1, "os.utime": 1, "os.setxattr": 1, "shutil.rmtree": 1, "shutil.move": 2, "shutil.copyfile": 2,
}  # fmt: skip
"""Audit events of calls that change files, and how many paths each names first."""
READ_FIRST = {"os.link", "os.symlink", "shutil.copyfile"}
"""Of these the first path is only read."""
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND


class Escaped(BaseException):
    """Something outside of the folder was about to be changed."""


def confine(folder: Path) -> None:
    """From now on, and for good, Python code of this process changes files in `folder` alone."""
    root = os.path.realpath(folder)
    sys.dont_write_bytecode = True

    def check(path: Any) -> None:
        if isinstance(path, int):
            return
        place = os.fsdecode(path)
        # The name itself is what changes, not what a link of that name points to.
        real = os.path.join(os.path.realpath(os.path.dirname(place) or "."), os.path.basename(place))
        if real != "/dev/null" and not real.startswith(root + os.sep):
            raise Escaped(f"about to change {real}")

    def watch(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open":
            path, _, flags = arguments
            if isinstance(flags, int) and flags & WRITING and isinstance(path, str | bytes | os.PathLike):
                check(path)
                if os.path.islink(path):
                    check(os.path.realpath(path))
        elif event in CHANGES:
            for path in arguments[event in READ_FIRST : CHANGES[event]]:
                check(path)

    sys.addaudithook(watch)
