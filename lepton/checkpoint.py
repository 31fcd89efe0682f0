"""Checkpoint files: written whole or not at all, checked before they are trusted.

A checkpoint is what ``torch.save`` writes for a dict of plain values and CPU tensors, so ``torch.load(path)`` reads it
anywhere with its safe default. `lepton.train` and `Lepton.from_checkpoint` agree on these keys:

| key          | value                                                                    |
|--------------|--------------------------------------------------------------------------|
| `format`     | 1                                                                        |
| `model`      | the model's state_dict; its `_metadata` holds the configuration as well  |
| `config`     | `LeptonConfig.to_dict()`                                                 |
| `size`       | name of the size, or None for a shape of one's own                       |
| `tokenizer`  | the tokenizer's JSON, or None                                            |
| `step`       | optimizer steps done                                                     |
| `promises`   | what `lepton calibrate --risk` found, a dict each; missing where it was not run |
| `budgets`    | what `lepton calibrate --max_cost` found, likewise                       |
| `data`       | what it was trained on; `chat` is among its keys if that was conversations |
| `optimizer`, `rng`, `training`, `validation`, `best` | what resuming needs; see `lepton.train`          |

A file whose name ends in .safetensors holds only the weights, in that format: all above but what resuming needs, and of
`data` only `chat`; see `lepton.weight_files`.
"""

import os
import pickle
import re
import shutil
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from types import NoneType
from typing import Any

import torch

from lepton import archive, tensors, weight_files
from lepton.errors import InputError, naming, reason
from lepton.files import as_path, readable, replacing
from lepton.files import remove_unfinished as remove_hidden

FORMAT = 1
STEP_NAME = re.compile(r"step_(\d+)\.pt")
CONFIG = "config"
"""Key of the configuration in the `_metadata` of a state_dict, where `Network.load_state_dict` compares it."""

KINDS: dict[str, tuple[type, ...]] = {
    "model": (dict,),
    "config": (dict,),
    "step": (int,),
    "size": (str, NoneType),
    "tokenizer": (str, NoneType),
    "optimizer": (dict,),
    "rng": (dict,),
    "training": (dict,),
    "validation": (dict, NoneType),
    "best": (float, int),
}
"""What a checkpoint holds; the first three must be there."""
LATER_KINDS: dict[str, tuple[type, ...]] = {"promises": (list,), "budgets": (list,)}
"""What a checkpoint holds once a command has added it."""
RUN_KINDS: dict[str, dict[str, type]] = {
    "optimizer": {"kind": str, "states": dict},
    "rng": {"cpu": torch.Tensor},
    "training": {"dense": bool, "overrides": dict},
}
"""Fields that resuming reads."""


def save(path: str | Path, payload: dict[str, Any]) -> None:
    """Write `payload` to `path` atomically: whatever happens, `path` holds its old content or all of the new.

    To a name that ends in .safetensors go the weights alone.

    Raises:
        InputError: the file cannot be written, such as on a full disk; nothing that was there before has changed.
    """
    path = as_path(path)
    if path.suffix == weight_files.SUFFIX:
        save_weights(path, payload)
        return
    try:
        content = {"format": FORMAT, **_to_cpu(payload)}
        content["model"] = _with_config(content["model"], content["config"])
        with replacing(path) as unfinished, unfinished.open("wb") as file:
            torch.save(content, file)
    except InputError as error:
        raise InputError(f"cannot save {error}") from error
    except BaseException as error:
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
    try:
        with replacing(target) as unfinished:
            try:
                os.link(source, unfinished)
            except OSError:
                shutil.copyfile(source, unfinished)
    except OSError as error:
        raise InputError(_failure(target, error)) from error


def load(path: str | Path) -> dict[str, Any]:
    """Read the checkpoint `path`, tensors on the CPU, once everything in it is what it should be.

    Whether weights and optimizer state fit the model is compared where they are taken over, before anything is.

    Raises:
        InputError: the file is missing, torn or no checkpoint; the message names the newest whole one before it.
    """
    path = as_path(path)
    if os.path.isdir(path):  # unlike Path's own, it answers for names that the system does not take
        raise InputError(f"{path} is a folder; give a checkpoint file{_instead(path)}")
    if not os.path.exists(path):
        raise InputError(f"checkpoint {path} does not exist{_alternative(path)}")
    readable(path, "checkpoint")
    payload = weight_files.read(path) if path.suffix == weight_files.SUFFIX else _load_archive(path)
    if not isinstance(payload, dict) or not {"model", "config", "step"} <= payload.keys():
        raise InputError(f"{path} is not a LEPTON checkpoint: it lacks 'model', 'config' or 'step'")
    if payload.get("format") != FORMAT:
        raise InputError(f"{path} has checkpoint format {payload.get('format')}; this version reads format {FORMAT}")
    with naming(path):
        _check_content(payload)
    try:
        for name, value in _tensors(payload):
            tensors.check_finite(name, value)
    except RecursionError as error:
        raise InputError(f"{path} is not a LEPTON checkpoint: it is nested too deeply") from error
    except InputError as error:
        raise InputError(f"{path}: {error}: training has diverged before it{_alternative(path)}") from error
    payload["model"] = dict(payload["model"])  # without `_metadata`: what counts is payload["config"]
    return payload


def check_run(path: str | Path, content: dict[str, Any]) -> None:
    """Raise unless the `content` of the checkpoint `path` holds what a run needs to go on.

    Raises:
        InputError: weights alone, or something is missing or of another type.
    """
    if "optimizer" not in content or "training" not in content:
        raise InputError(f"{path} holds weights only: start from it with --init_from instead of --resume")
    if missing := [name for name in KINDS if name not in content]:
        raise InputError(f"{path} lacks '{missing[0]}': start from it with --init_from instead of --resume")
    for name, kinds in RUN_KINDS.items():
        for key, kind in kinds.items():
            if not isinstance(content[name].get(key), kind):
                raise InputError(f"{path}: '{name}' lacks a '{key}' of type {kind.__name__}")


def is_whole(path: Path) -> bool:
    """Return whether the file can be read to its end, and all checksums and sizes in it agree (torch compares none)."""
    try:
        _check_archive(readable(path))
    except Exception:  # a damaged archive fails in many ways
        return False
    return True


def step_of(path: Path) -> int | None:
    """Return N of a file called step_N.pt, None for any other name."""
    match = STEP_NAME.fullmatch(path.name)
    return int(match[1]) if match else None


def steps_in(folder: str | Path) -> list[tuple[int, Path]]:
    """Return (N, path) of each step_N.pt in `folder`, oldest first."""
    folder = Path(folder)
    found = [(step_of(path), path) for path in folder.iterdir()] if os.path.isdir(folder) else []
    return sorted((step, path) for step, path in found if step is not None)


def newest_whole(folder: str | Path, *, before: int | None = None) -> Path | None:
    """Return the newest whole step_N.pt of `folder` (N < `before`); without `before`, else final.pt or best.pt."""
    candidates = [path for step, path in reversed(steps_in(folder)) if before is None or step < before]
    if before is None:
        candidates += [Path(folder) / "final.pt", Path(folder) / "best.pt"]
    return next((path for path in candidates if is_whole(path)), None)


def remove_unfinished(folder: str | Path) -> None:
    """Delete what saves that never finished have left in `folder`; no other process may be writing there."""
    remove_hidden(folder)
    for path in Path(folder).glob("*.pt.tmp"):  # as versions up to 0.1 called them
        path.unlink(missing_ok=True)


def _check_archive(path: Path) -> None:
    archive.check(path)
    torch.load(path, map_location="meta", weights_only=True)  # torch's own reader finds all records, and reads none


def _load_archive(path: Path) -> Any:
    try:
        _check_archive(path)
    except pickle.UnpicklingError as error:
        raise InputError(f"{path} is not a LEPTON checkpoint ({reason(error)})") from error
    except Exception as error:  # a damaged archive fails in many ways
        raise InputError(
            f"checkpoint {path} is torn (cut short or damaged: {reason(error)}){_alternative(path)}"
        ) from error
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many kinds for a file that is not what it seems
        raise InputError(f"{path} is not a LEPTON checkpoint ({reason(error)})") from error


def save_weights(path: Path, payload: dict[str, Any], most: int | None = None) -> list[Path]:
    """Write the weights of `payload` alone, to several files if they have more than `most` bytes; return the files.

    Raises:
        InputError: as `save`.
    """
    about = {"format": FORMAT, **{name: payload.get(name) for name in ("config", "size", "step")}}
    about |= {name: payload[name] for name in LATER_KINDS if name in payload}
    if isinstance(origin := payload.get("data"), dict):  # the rest of it names folders of the machine
        about["data"] = {name: value for name, value in origin.items() if name == "chat"}
    try:
        return weight_files.write(path, payload["model"], about, payload.get("tokenizer"), most)
    except InputError as error:
        raise InputError(f"cannot save {error}") from error
    except (OSError, tensors.SafetensorError) as error:
        raise InputError(_failure(path, error)) from error


def _check_content(payload: dict[str, Any]) -> None:
    """Raise InputError for a value of another type than `KINDS` says, or one that no checkpoint has."""
    for name, kinds in (KINDS | LATER_KINDS | {"data": (dict, NoneType)}).items():
        value = payload.get(name)
        if name in payload and (not isinstance(value, kinds) or isinstance(value, bool)):
            raise InputError(f"'{name}' is of type {type(value).__name__}, which no checkpoint has")
    if not 0 <= payload["step"] < 1 << 62:
        raise InputError(f"'step' is {payload['step']}: must be a number of steps")
    if payload.get("best", 0.0) != payload.get("best", 0.0):
        raise InputError("'best' is NaN: must be a loss")
    for name in ("model", "config"):
        if unnamed := [key for key in payload[name] if not isinstance(key, str)]:
            raise InputError(f"'{name}' has the key {unnamed[0]!r}, which is not a name")
    for name, value in payload["model"].items():
        if not isinstance(value, torch.Tensor):
            raise InputError(f"'model.{name}' is {type(value).__name__}, not a tensor")


def _tensors(value: Any, name: str = "") -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the tensors of nested dicts and lists by their dotted names."""
    if isinstance(value, torch.Tensor):
        yield name, value
    elif isinstance(value, dict | list | tuple):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        for key, item in items:
            yield from _tensors(item, f"{name}.{key}" if name else str(key))


def _to_cpu(value: Any) -> Any:
    """Return `value` with every tensor in it on the CPU, so that the file loads on any machine."""
    if isinstance(value, torch.Tensor):
        return value.detach().cpu()
    if isinstance(value, dict):
        return {key: _to_cpu(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_to_cpu(item) for item in value)
    return value


def _with_config(weights: dict[str, Any], config: dict[str, Any]) -> "OrderedDict[str, Any]":
    """Return a state_dict that knows its model's configuration, also once it is taken out of its checkpoint."""
    known = OrderedDict(weights)
    known._metadata = {"": {"version": 1, CONFIG: config}}  # type: ignore[attr-defined]
    return known


def _failure(path: Path, error: Exception) -> str:
    why = (isinstance(error, OSError) and error.strerror) or reason(error)
    return (
        f"cannot save {path}: {why}; checkpoints saved before are intact: make room and repeat the command "
        "(training with --resume auto)"
    )


def _alternative(path: Path) -> str:
    step = step_of(path)
    before = None if step is None else newest_whole(path.parent, before=step)
    return f"; the newest whole one before it is {before}" if before else _instead(path.parent)


def _instead(folder: Path) -> str:
    newest = newest_whole(folder)
    return f"; the newest whole one there is {newest}" if newest else "; no whole checkpoint is there"
