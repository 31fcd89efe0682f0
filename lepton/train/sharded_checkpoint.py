"""Checkpoints that each process writes its shards of, beside the steps: PyTorch's distributed checkpoints (DCP).

`step_N.dcp` is a folder: the tensors as DCP keeps them, and `run.json` with all other values. It is whole once DCP's
`.metadata` is there, which is written last. `consolidated` makes the one file of it that everything else reads, for any
number of processes. DCP reads `.metadata` by pickle, which can run code: resume folders of your own alone.
"""

import json
import shutil
import warnings
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from lepton import checkpoint
from lepton.distributed import Ranks, is_of_others
from lepton.errors import InputError, reason
from lepton.files import parse_json, read_bytes
from lepton.train.folder import RunFolder, sharded_steps
from lepton.train.sharding import gathered

SHARDED_SUFFIX = ".dcp"
VALUES = "run.json"
MAX_VALUES = 1 << 28
"""Bytes of a `run.json`; the tokenizer is the most of it."""
TENSOR = "tensor"
"""Key of an object in `run.json` that stands for the tensor of that name."""


class ShardedSaving:
    """`Saving` for sharded weights. All processes call each method together."""

    def __init__(self, folder: RunFolder, ranks: Ranks, say: Callable[[str], None]) -> None:
        self._folder, self._ranks, self._say = folder, ranks, say
        self._group = dist.new_group(backend="gloo")  # its own: it is used in a thread, beside the steps
        self._under_way: Future[Any] | None = None

    def save(self, payload: dict[str, Any], *, best: bool, step: bool) -> None:
        """Begin to save step_N.dcp; save best.pt at once."""
        self.wait()
        if best:
            whole = gathered(payload, keep=self._ranks.leads)
            if self._ranks.leads:
                self._folder.save(whole, best=True, step=False)
        if not step:
            return
        path = sharded_path(self._folder.path, payload["step"])
        tensors: dict[str, Tensor] = {}
        values = _without_tensors(payload, "", tensors)
        if self._ranks.leads:
            shutil.rmtree(path, ignore_errors=True)
            path.mkdir()
            (path / VALUES).write_text(json.dumps(values), encoding="utf-8")
        self._ranks.wait()
        found = dcp.async_save(tensors, checkpoint_id=path, process_group=self._group)
        assert isinstance(found, Future)
        self._under_way = found

    def wait(self) -> None:
        """Wait until what was begun is on the disk; remove those that are older than the ones to keep.

        Raises:
            InputError: it cannot be written.
        """
        under_way, self._under_way = self._under_way, None
        if under_way is None:
            return
        try:
            under_way.result()
        except (
            Exception,
            dcp.CheckpointException,
        ) as error:
            if is_of_others(error):
                raise self._ranks.lost(error) from error
            raise InputError(f"cannot save a checkpoint in {self._folder.path}: {reason(error)}") from error
        if self._ranks.leads:
            for _, old in sharded_steps(self._folder.path)[: -self._folder.keep]:
                shutil.rmtree(old, ignore_errors=True)

    def check(self) -> None:
        """Nothing: that a save has failed is told at the next one, by all processes together."""

    def close(self) -> None:
        """Wait for what was begun, if it can end."""
        if self._under_way is not None and (error := self._under_way.exception()):
            self._say(f"the newest checkpoint is missing: {reason(error)}")


def sharded_path(folder: Path, step: int) -> Path:
    return folder / f"step_{step}.dcp"


def consolidated(path: Path) -> Path:
    """Return the one file step_N.pt beside the folder step_N.dcp, with the same content, made if it is missing.

    Raises:
        InputError: the folder is missing, not whole or cannot be read.
    """
    target = path.with_suffix(".pt")
    if checkpoint.is_whole(target):
        return target
    if not (path / ".metadata").exists() or not (path / VALUES).exists():
        raise InputError(f"{path} is no whole sharded checkpoint: it lacks .metadata or {VALUES}; take an earlier one")
    values = parse_json(read_bytes(path / VALUES, "checkpoint", MAX_VALUES).decode(), str(path / VALUES))
    try:
        entries = dcp.FileSystemReader(path).read_metadata().state_dict_metadata
        tensors = {
            name: torch.empty(entry.size, dtype=entry.properties.dtype)
            for name, entry in entries.items()
            if isinstance(entry, TensorStorageMetadata)
        }
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # one process loads all
            dcp.load(tensors, checkpoint_id=path, no_dist=True)
    except (Exception, dcp.CheckpointException) as error:  # a damaged one fails in many ways
        raise InputError(f"{path} cannot be read ({reason(error)}); take an earlier checkpoint") from error
    payload = _with_tensors(values, tensors)
    try:
        states = payload["optimizer"]["states"]
        payload["optimizer"]["states"] = {
            name: {int(number): state for number, state in group.items()} for name, group in states.items()
        }
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise InputError(f"{path / VALUES} is not that of a checkpoint ({reason(error)})") from error
    checkpoint.save(target, payload)
    return target


def _without_tensors(value: Any, name: str, tensors: dict[str, Tensor]) -> Any:
    """Return nested dicts and lists as JSON has them; their tensors go to `tensors`, by the path to each."""
    if isinstance(value, Tensor):
        tensors[name] = value
        return {TENSOR: name}
    if isinstance(value, dict):
        return {str(key): _without_tensors(item, f"{name}/{key}", tensors) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_without_tensors(item, f"{name}/{i}", tensors) for i, item in enumerate(value)]
    return value


def _with_tensors(value: Any, tensors: dict[str, Tensor]) -> Any:
    if isinstance(value, dict):
        if value.keys() == {TENSOR} and value[TENSOR] in tensors:
            return tensors[value[TENSOR]]
        return {key: _with_tensors(item, tensors) for key, item in value.items()}
    if isinstance(value, list):
        return [_with_tensors(item, tensors) for item in value]
    return value
