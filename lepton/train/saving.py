"""Saving checkpoints while the steps go on: a GPU does not wait for the disk."""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from copy import copy
from typing import Any

import torch

from lepton.errors import reason
from lepton.train.folder import RunFolder


class Saving:
    """Saves into a `RunFolder`: at once, or beside the steps, in a thread and from a copy in the host's memory.

    One checkpoint is saved at a time. What goes wrong beside the steps is raised at the next call, such as `check`.
    """

    def __init__(self, folder: RunFolder, *, beside: bool, say: Callable[[str], None]) -> None:
        """`say` prints a message, such as that the newest checkpoint could not be saved."""
        self._folder, self._say = folder, say
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

    def check(self) -> None:
        """Raise what went wrong beside the steps, if something has: `wait` without waiting."""
        if self._under_way is not None and self._under_way.done():
            self.wait()

    def close(self) -> None:
        """End the thread, once what was begun is on the disk or has failed."""
        if self._thread is None:
            return
        self._thread.shutdown()
        if self._under_way is not None and (error := self._under_way.exception()):
            self._say(f"the newest checkpoint is missing: {reason(error)}")


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
