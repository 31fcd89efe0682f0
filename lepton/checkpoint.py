"""Checkpoint files: written whole or not at all, checked before they are believed.

A checkpoint is what ``torch.save`` writes for a dict of plain values and CPU tensors, so ``torch.load(path)`` reads it
anywhere with its safe default. `lepton.train` and `Lepton.from_checkpoint` agree on these keys:

| key          | value                                                                    |
|--------------|--------------------------------------------------------------------------|
| `format`     | 1                                                                        |
| `model`      | the model's state_dict                                                   |
| `config`     | `LeptonConfig.to_dict()`                                                 |
| `size`       | name of the size, or None for a shape of one's own                       |
| `tokenizer`  | the tokenizer's JSON, or None                                            |
| `step`       | optimizer steps done                                                     |
| `optimizer`, `rng`, `training`, `validation` | what resuming needs; see `lepton.train` |
"""

import contextlib
import os
import re
import shutil
import zipfile
from pathlib import Path
from typing import Any

import torch

from lepton.errors import InputError

FORMAT = 1
STEP_NAME = re.compile(r"step_(\d+)\.pt")
UNFINISHED = ".tmp"
"""Suffix of a file that is still being written; `remove_unfinished` clears what a killed process left."""


def save(path: str | Path, payload: dict[str, Any]) -> None:
    """Write `payload` to `path` atomically: whatever happens, `path` holds its old content or all of the new.

    Raises:
        InputError: the file cannot be written, such as on a full disk; nothing that was there before has changed.
    """
    path = Path(path)
    unfinished = path.with_name(path.name + UNFINISHED)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(unfinished, "wb") as file:
            torch.save({"format": FORMAT, **_to_cpu(payload)}, file)
            file.flush()
            os.fsync(file.fileno())
        _install(unfinished, path)
    except BaseException as error:
        _discard(unfinished)
        # Amid a file, torch's writer covers the disk's error by one of its own.
        cause = error.__context__ if isinstance(error, RuntimeError) else error
        if isinstance(cause, OSError):
            raise InputError(_failure(path, cause)) from error
        raise


def duplicate(source: Path, target: Path) -> None:
    """Make `target` the same checkpoint as `source`, atomically, and without a second copy where the disk can link.

    Raises:
        InputError: as `save`.
    """
    unfinished = target.with_name(target.name + UNFINISHED)
    _discard(unfinished)
    try:
        try:
            os.link(source, unfinished)
        except OSError:
            shutil.copyfile(source, unfinished)
        _install(unfinished, target)
    except OSError as error:
        _discard(unfinished)
        raise InputError(_failure(target, error)) from error


def load(path: str | Path) -> dict[str, Any]:
    """Read the checkpoint `path`, tensors on the CPU.

    Raises:
        InputError: the file is missing, torn or no checkpoint; the message names the newest whole one before it.
    """
    path = Path(path)
    if path.is_dir():
        raise InputError(f"{path} is a folder; give a checkpoint file{_instead(path)}")
    if not path.is_file():
        raise InputError(f"checkpoint {path} does not exist{_alternative(path)}")
    if not is_whole(path):
        raise InputError(f"checkpoint {path} is torn (cut short or damaged){_alternative(path)}")
    try:
        payload = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many kinds for a file that is not what it seems
        raise InputError(f"{path} is no LEPTON checkpoint ({str(error).splitlines()[0]})") from error
    if not isinstance(payload, dict) or not {"model", "config", "step"} <= payload.keys():
        raise InputError(f"{path} is no LEPTON checkpoint: it lacks 'model', 'config' or 'step'")
    if payload.get("format") != FORMAT:
        raise InputError(f"{path} has checkpoint format {payload.get('format')}; this version reads format {FORMAT}")
    return payload


def is_whole(path: Path) -> bool:
    """Return whether the file can be read to its end and every checksum in it agrees (torch.load checks none)."""
    try:
        with zipfile.ZipFile(path) as archive:
            return archive.testzip() is None
    except Exception:  # a damaged archive fails in many ways
        return False


def step_of(path: Path) -> int | None:
    """Return N of a file called step_N.pt, None for any other name."""
    match = STEP_NAME.fullmatch(path.name)
    return int(match[1]) if match else None


def steps_in(folder: str | Path) -> list[tuple[int, Path]]:
    """Return (N, path) of each step_N.pt in `folder`, oldest first."""
    folder = Path(folder)
    found = [(step_of(path), path) for path in folder.iterdir()] if folder.is_dir() else []
    return sorted((step, path) for step, path in found if step is not None)


def newest_whole(folder: str | Path, *, before: int | None = None) -> Path | None:
    """Return the newest whole step_N.pt of `folder` (N < `before`); without `before`, else final.pt or best.pt."""
    candidates = [path for step, path in reversed(steps_in(folder)) if before is None or step < before]
    if before is None:
        candidates += [Path(folder) / "final.pt", Path(folder) / "best.pt"]
    return next((path for path in candidates if is_whole(path)), None)


def remove_unfinished(folder: str | Path) -> None:
    """Delete what saves that never finished have left in `folder`."""
    for path in Path(folder).glob(f"*.pt{UNFINISHED}"):
        _discard(path)


def _to_cpu(value: Any) -> Any:
    """Return `value` with every tensor in it on the CPU, so that the file loads on any machine."""
    if isinstance(value, torch.Tensor):
        return value.detach().cpu()
    if isinstance(value, dict):
        return {key: _to_cpu(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_to_cpu(item) for item in value)
    return value


def _install(unfinished: Path, path: Path) -> None:
    os.replace(unfinished, path)
    if os.name == "posix":  # make the new name itself durable; Windows cannot open a folder
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def _discard(path: Path) -> None:
    with contextlib.suppress(OSError):  # it is only clutter, and an error under way says more
        path.unlink(missing_ok=True)


def _failure(path: Path, error: OSError) -> str:
    reason = error.strerror or str(error)
    return f"cannot save {path}: {reason}; checkpoints saved before are intact, make room and use --resume auto"


def _alternative(path: Path) -> str:
    step = step_of(path)
    before = None if step is None else newest_whole(path.parent, before=step)
    return f"; the newest whole one before it is {before}" if before else _instead(path.parent)


def _instead(folder: Path) -> str:
    newest = newest_whole(folder)
    return f"; the newest whole one there is {newest}" if newest else "; no whole checkpoint is there"
