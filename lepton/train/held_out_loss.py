"""The loss of held-out batches: on a GPU from a CUDA graph, in the memory of the graphs of the steps."""

from collections.abc import Callable

import torch
from torch import Tensor

from lepton.data.shards import Batch
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
        self._places: dict[tuple[object, ...], list[Tensor | None]] = {}
        """Tokens, lengths, targets and openings that the graph of a shape reads."""

    @torch.no_grad()
    def __call__(self, tokens: Tensor, lengths: Tensor, targets: Tensor | None = None) -> Tensor:
        """Return the mean cross-entropy of a batch in nats, a scalar on the device that lasts until the next call.

        Args:
            tokens: int64 [B, T], on the CPU.
            lengths: int64 [B], valid tokens of each row, likewise.
            targets: bool [B, T - 1], the next tokens that count, those of answers; None: all within the lengths.
        """
        given = [tokens, lengths, targets, Batch(tokens, lengths, targets).opens]
        if self._graphs is not None:
            try:
                return self._replayed(self._graphs, given)
            except torch.OutOfMemoryError:
                raise
            except Exception as error:  # of many types; none should stop a run that works without
                self._say(f"cannot capture a validation here ({reason(error)}): going on without, which runs slower")
                self._graphs = None
        device = self._model.device
        return self._loss([None if value is None else value.to(device) for value in given], None)

    def _replayed(self, graphs: CudaGraphs, given: list[Tensor | None]) -> Tensor:
        device, (tokens, _, _, opens) = self._model.device, given
        assert tokens is not None
        _, groups = plan_batch(self._model, tokens, seed=0, step=0, micro=0, opens_BT=opens)
        key = ("held out", tuple(tokens.shape), groups, opens is None)
        if key not in self._places:
            self._places[key] = [None if value is None else value.to(device) for value in given]
        place = self._places[key]
        for mine, value in zip(place, given, strict=True):
            if mine is not None and value is not None:
                mine.copy_(value)
        if key not in graphs:
            self._loss(place, groups)  # loads and compiles kernels, which is impossible during a capture
            synchronize(device)
            graphs.capture(key, lambda: self._loss(place, groups))
        loss: Tensor = graphs.replay(key)
        return loss

    def _loss(self, given: list[Tensor | None], groups: int | None) -> Tensor:
        tokens, lengths, targets, opens = given
        assert tokens is not None
        loss = self._model.loss(tokens, lengths=lengths, targets=targets, groups=groups, opens=opens, auxiliary=False)
        return loss.parts["ce"]
