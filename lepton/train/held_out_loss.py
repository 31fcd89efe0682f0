"""The loss of held-out batches: on a GPU from a CUDA graph, in the memory of the graphs of the steps."""

from collections.abc import Callable

import torch
from torch import Tensor

from lepton.errors import reason
from lepton.model import Network
from lepton.runtime.cuda_graphs import CudaGraphs
from lepton.runtime.device import synchronize
from lepton.train.batch_plan import plan_batch


class HeldOutLoss:
    """Measures batches as `Network.loss` does, without a gradient."""

    def __init__(self, model: Network, graphs: CudaGraphs | None, say: Callable[[str], None]) -> None:
        """Capture into `graphs`, or run eagerly if that is None or fails; `say` prints the message that it failed."""
        self._model, self._graphs, self._say = model, graphs, say
        self._places: dict[tuple[object, ...], tuple[Tensor, Tensor]] = {}
        """Tokens and lengths that the graph of a shape reads."""

    @torch.no_grad()
    def __call__(self, tokens: Tensor, lengths: Tensor) -> Tensor:
        """Return the mean cross-entropy of a batch in nats, a scalar on the device that lasts until the next call.

        Args:
            tokens: int64 [B, T], on the CPU.
            lengths: int64 [B], valid tokens of each row, likewise.
        """
        if self._graphs is not None:
            try:
                return self._replayed(self._graphs, tokens, lengths)
            except torch.OutOfMemoryError:
                raise
            except Exception as error:  # of many types; none should stop a run that works without
                self._say(f"cannot capture a validation here ({reason(error)}): going on without, which runs slower")
                self._graphs = None
        device = self._model.device
        return self._loss(tokens.to(device), lengths.to(device), None)

    def _replayed(self, graphs: CudaGraphs, tokens: Tensor, lengths: Tensor) -> Tensor:
        device = self._model.device
        _, groups = plan_batch(self._model, tokens, seed=0, step=0, micro=0)
        key = ("held out", tuple(tokens.shape), groups)
        if key not in self._places:
            self._places[key] = tokens.to(device), lengths.to(device)
        place = self._places[key]
        for mine, given in zip(place, (tokens, lengths), strict=True):
            mine.copy_(given)
        if key not in graphs:
            self._loss(*place, groups)  # loads and compiles kernels, which is impossible during a capture
            synchronize(device)
            graphs.capture(key, lambda: self._loss(*place, groups))
        loss: Tensor = graphs.replay(key)
        return loss

    def _loss(self, tokens: Tensor, lengths: Tensor, groups: int | None) -> Tensor:
        return self._model.loss(tokens, lengths=lengths, groups=groups, auxiliary=False).parts["ce"]
