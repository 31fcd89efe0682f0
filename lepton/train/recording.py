"""What is run on a GPU once and then replayed in one launch: CUDA graphs that work in the same memory."""

from collections.abc import Callable, Hashable
from typing import Any

import torch


class Recordings:
    """CUDA graphs by their keys, none of which runs beside another: so each may overwrite what another one computed.

    Whatever outlives a replay lies in memory from before the recording, or is copied out of it.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._graphs: dict[Hashable, tuple[torch.cuda.CUDAGraph, Any]] = {}

    def __contains__(self, key: Hashable) -> bool:
        return key in self._graphs

    def record(self, key: Hashable, action: Callable[[], Any]) -> None:
        """Record what `action` launches; nothing of it runs."""
        pool = next((graph.pool() for graph, _ in self._graphs.values()), None)
        # Entering the current stream restores it: a recording that fails leaves its own one current.
        with torch.cuda.device(self._device), torch.cuda.stream(torch.cuda.current_stream(self._device)):
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=pool):
                result = action()
        self._graphs[key] = graph, result

    def replay(self, key: Hashable) -> Any:
        """Run what was recorded and return the action's result, which lies in the recordings' memory."""
        graph, result = self._graphs[key]
        with torch.cuda.device(self._device):  # recordings belong to the current one
            graph.replay()
        return result

    def clear(self) -> None:
        """Forget all recordings and give their memory back."""
        if self._graphs:
            torch.cuda.synchronize(self._device)
            self._graphs.clear()
            torch.cuda.empty_cache()
