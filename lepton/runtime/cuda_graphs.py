"""CUDA graphs: what a GPU runs often is captured once, and from then on replayed in one launch."""

import gc
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from typing import Any

import torch


class CudaGraphs:
    """CUDA graphs by key. They share one memory pool and never run concurrently: each may overwrite another's results.

    Values that have to survive the next replay lie in memory from before the capture, or are copied out of the pool.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._graphs: dict[Hashable, tuple[torch.cuda.CUDAGraph, Any]] = {}

    def __contains__(self, key: Hashable) -> bool:
        return key in self._graphs

    def capture(self, key: Hashable, action: Callable[[], Any]) -> None:
        """Capture the kernels that `action` launches, without running them."""
        pool = next((graph.pool() for graph, _ in self._graphs.values()), None)
        # Entering the current stream restores it: a capture that fails leaves its own stream current.
        with torch.cuda.device(self._device), torch.cuda.stream(torch.cuda.current_stream(self._device)), _no_garbage():
            graph = torch.cuda.CUDAGraph()
            # What other threads do meanwhile, such as pinning memory, does not break it.
            with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
                result = action()
        self._graphs[key] = graph, result

    def replay(self, key: Hashable) -> Any:
        """Run a captured action and return its result, which lies in the shared pool."""
        graph, result = self._graphs[key]
        with torch.cuda.device(self._device):  # a graph replays on the current device
            graph.replay()
        return result

    def clear(self) -> None:
        """Delete all graphs and free their memory."""
        if self._graphs:
            torch.cuda.synchronize(self._device)
            self._graphs.clear()
            torch.cuda.empty_cache()


@contextmanager
def _no_garbage() -> Iterator[None]:
    """Collect no garbage inside the block: to free another graph would end a capture with an error."""
    gc.collect()
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
