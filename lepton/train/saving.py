"""Saving checkpoints while the steps go on: a GPU does not wait for the disk."""

from concurrent.futures import Future, ThreadPoolExecutor
from copy import copy
from typing import Any

import torch

from lepton.train.folder import RunFolder


class Saving:
    """Saves into a `RunFolder`: at once, or beside the steps, in a thread and from a copy in the host's memory.

    One checkpoint is saved at a time. What goes wrong beside the steps is raised at the next call.
    """

    def __init__(self, folder: RunFolder, *, beside: bool) -> None:
        self._folder = folder
        self._thread = ThreadPoolExecutor(1) if beside else None
        self._under_way: Future[None] | None = None

    def save(self, payload: dict[str, Any], *, best: bool, step: bool) -> None:
        """Save `payload` as `RunFolder.save` does, or begin to. Its tensors may change afterwards.

        Raises:
            InputError: it, or what was under way, cannot be written.
        """
        self.wait()
        if self._thread is None:
            self._folder.save(payload, best=best, step=step)
        else:
            self._under_way = self._thread.submit(self._folder.save, copied(payload), best=best, step=step)

    def wait(self) -> None:
        """Wait until what was begun is on the disk.

        Raises:
            InputError: it cannot be written.
        """
        under_way, self._under_way = self._under_way, None
        if under_way is not None:
            under_way.result()

    def close(self) -> None:
        """End the thread, once what was begun is on the disk or has failed."""
        if self._thread is not None:
            self._thread.shutdown()


def copied(value: Any) -> Any:
    """Return a copy, on the CPU, of the tensors in nested dicts and lists; other values are shared.

    A state_dict keeps its `_metadata`, where the model's configuration is.
    """
    if isinstance(value, torch.Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, dict):
        kept = copy(value)
        kept.update((key, copied(item)) for key, item in value.items())
        return kept
    if isinstance(value, list | tuple):
        return type(value)(copied(item) for item in value)
    return value
