"""Where a data set is made, and how it takes its place: nobody ever reads half of one.

- It is made in a hidden folder, which becomes the output folder at the end, in one step. A data set that was there
  goes only then.
- A link stays a link: the folder that it points to is written.
- A mount point, and a folder in one that cannot be written, cannot be replaced: the data set is made in a hidden
  folder inside, and its files move out of there at the end. While they do, the file `UNFINISHED` says so, and
  readers refuse the folder.
- The workshop, the hidden folder around all this, is locked by the operating system: a second process is refused,
  and what a killed one has left is cleared. Where there are no locks, every process has a folder of its own in it.
"""

import contextlib
import os
import shutil
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from lepton.errors import InputError
from lepton.files import as_path

try:
    import fcntl
except ImportError:  # Windows: no locks on folders, so every process writes a folder of its own
    fcntl = None  # type: ignore[assignment]

ANSWERS = "answers"
"""Of conversations, what the names of the files of flags begin with, where those of tokens begin with ``shard``."""
ARRAYS = ("shard_*.npy", f"{ANSWERS}_*.npy")
UNFINISHED = "unfinished"
"""Marker file: the files of this data set are being replaced."""
METADATA = "metadata.json"
WORKSHOP = ".prepare.partial"
"""The workshop's name where it lies in the output folder."""
SYSTEMS_OWN = "lost+found"
"""What the operating system itself puts into a mounted disk."""


@dataclass(frozen=True)
class Place:
    """Where the data set is made, and where it goes."""

    partial: Path
    folder: Path
    """The output folder, links resolved."""
    force: bool
    inside: bool
    """The files move into `folder`, which stays."""

    @property
    def old(self) -> Path:
        """Where a data set is set aside while the new one takes its place."""
        return self.partial.with_name(self.partial.name.replace("new", "old"))


@contextlib.contextmanager
def place_for(out: Path, *, force: bool, wait: bool = False) -> Iterator[Place]:
    """Yield an empty folder to make the data set of `out` in; leftovers in it are deleted at the end.

    Raises InputError, before anything is written, for an `out` that is not a folder or holds anything but a data
    set, or a data set without `force`; and if another process is writing it, for which `wait` waits instead.
    """
    folder = Path(os.path.realpath(as_path(out)))
    if folder.is_symlink():
        raise InputError(f"{out} is a link that leads back to itself: name another folder with --out")
    inside = folder.is_dir() and (_is_mount(folder) or not os.access(folder.parent, os.W_OK))
    check_out(out, force, inside)
    force = force or (out / UNFINISHED).exists()  # nobody can read what is left there
    workshop = folder / WORKSHOP if inside else folder.with_name(f".{folder.name}.partial")
    place = Place(workshop / f"new-{uuid.uuid4().hex[:8]}", folder, force, inside)
    with _workshop(workshop, out, wait) as locked:
        if locked:
            _recover(place)
        check_out(out, force, inside)  # a data set may have come while this process waited, or just come back
        place.partial.mkdir()
        try:
            yield place
        finally:
            shutil.rmtree(place.partial, ignore_errors=True)


def check_out(out: Path, force: bool, inside: bool = False) -> None:
    """Raise InputError unless a data set may be written to `out`."""
    if out.exists() and not out.is_dir():
        raise InputError(f"{out} is a file: name a folder with --out")
    found = [path for path in out.glob("*") if not (inside and path.name in (WORKSHOP, SYSTEMS_OWN))]
    for path in sorted([*found, *out.glob("val/*")]):
        array = any(map(path.match, ARRAYS))
        ours = array or path.relative_to(out) in map(Path, (METADATA, "val", UNFINISHED))
        if not ours:
            raise InputError(f"{out} holds other files ({path.relative_to(out)}): name a new folder with --out")
    replaceable = (out / UNFINISHED).exists() or (force and any(out.glob("shard_*.npy")))
    if found and not replaceable:
        raise InputError(f"{out} is not empty: name another folder with --out, or replace a data set with --force")


def publish(place: Place) -> None:
    """Put the finished data set in its place. Raises OSError if that is taken, or cannot be written."""
    if place.inside:
        _move_in(place)
    elif place.force and place.folder.exists():
        place.folder.rename(place.old)
        try:
            place.partial.rename(place.folder)
        except BaseException:
            place.old.rename(place.folder)
            raise
        shutil.rmtree(place.old, ignore_errors=True)
    else:
        if place.folder.exists():
            place.folder.rmdir()  # fails unless it is empty
        place.partial.rename(place.folder)


def _move_in(place: Place) -> None:
    """Replace the data set in a folder that stays: metadata last, and readers refuse it until then."""
    check_out(place.folder, place.force, inside=True)
    unfinished = place.folder / UNFINISHED
    unfinished.touch()
    arrays = [path for where in ("", "val/") for kind in ARRAYS for path in place.folder.glob(where + kind)]
    for path in [place.folder / METADATA, *arrays]:
        path.unlink(missing_ok=True)
    files = sorted(path.relative_to(place.partial) for path in place.partial.rglob("*") if path.is_file())
    for name in sorted(files, key=lambda name: name == Path(METADATA)):
        (place.folder / name).parent.mkdir(exist_ok=True)
        (place.partial / name).rename(place.folder / name)
    if not any(place.folder.glob("val/*")):
        shutil.rmtree(place.folder / "val", ignore_errors=True)
    unfinished.unlink()


def _recover(place: Place) -> None:
    """Clear what a killed process has left, and give a data set that it had set aside its name again."""
    workshop = place.partial.parent
    for old in workshop.glob("old-*"):
        if not place.folder.exists():
            old.rename(place.folder)
    for left in [*workshop.glob("old-*"), *workshop.glob("new-*")]:
        shutil.rmtree(left)


@contextlib.contextmanager
def _workshop(folder: Path, out: Path, wait: bool) -> Iterator[bool]:
    """Make the workshop and hold its lock, which any death of the process gives back; yield whether there are locks."""
    with contextlib.ExitStack() as stack:
        while True:
            folder.mkdir(parents=True, exist_ok=True)
            if fcntl is None:
                locked = False
                break
            descriptor = os.open(folder, os.O_RDONLY | os.O_NOFOLLOW)
            stack.callback(os.close, descriptor)
            locked = _lock(descriptor, out, wait)
            if _is_same(folder, descriptor):  # else it went with the process that held the lock before
                break
        try:
            yield locked
        finally:
            with contextlib.suppress(OSError):  # another process may be in it, or have removed it
                folder.rmdir()


def _lock(descriptor: int, out: Path, wait: bool) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        raise InputError(f"another process is preparing {out}: wait for it, or name another --out") from None
    except OSError:
        return False  # a file system without locks
    return True


def _is_same(folder: Path, descriptor: int) -> bool:
    """Return whether the locked folder still has its name: the process that held the lock before may have used it."""
    with contextlib.suppress(FileNotFoundError):
        return os.path.samestat(folder.stat(), os.fstat(descriptor))
    return False


def _is_mount(folder: Path) -> bool:
    if os.path.ismount(folder):
        return True
    try:  # a folder that is mounted from the same disk looks like any other
        lines = Path("/proc/self/mountinfo").read_text(encoding="utf-8", errors="surrogateescape").splitlines()
    except OSError:
        return False
    escaped = "".join(f"\\{ord(c):03o}" if c in " \t\n\\" else c for c in str(folder))
    return any(line.split(" ")[4] == escaped for line in lines)
