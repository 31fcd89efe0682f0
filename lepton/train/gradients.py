"""Gradients of a model in a few large buffers, which several processes add up in few large messages."""

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn

from lepton.distributed import Ranks

BUCKET_BYTES = 1 << 28
"""Bytes of a buffer, unless a single parameter has more: large enough for a network's full rate."""
ALIGNED = 64
"""Elements that each gradient starts at a multiple of: kernels read whole lines of memory."""


class FlatGradients:
    """Gives parameters gradients that are views of a few flat buffers, set to zero.

    Whoever uses the gradients sets them to zero in place, and not to None.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], bucket_bytes: int = BUCKET_BYTES) -> None:
        trained = [each for each in parameters if each.requires_grad]
        self.buffers: list[Tensor] = []
        for bucket in _buckets(trained[::-1], bucket_bytes):  # about the order in which a backward pass reaches them
            first = bucket[0]
            sizes = [-(-each.numel() // ALIGNED) * ALIGNED for each in bucket]
            flat = torch.zeros(sum(sizes), dtype=first.dtype, device=first.device)
            self.buffers.append(flat)
            for parameter, part in zip(bucket, flat.split(sizes), strict=True):
                parameter.grad = part[: parameter.numel()].view_as(parameter)

    def add_up(self, ranks: Ranks) -> None:
        """Replace the gradients by their sums over all processes."""
        ranks.add_(self.buffers)


def _buckets(parameters: list[nn.Parameter], most: int) -> Iterator[list[nn.Parameter]]:
    """Yield the parameters, in order, in groups of one dtype and at most so many bytes."""
    bucket: list[nn.Parameter] = []
    filled = 0
    for each in parameters:
        if bucket and (each.dtype != bucket[0].dtype or filled + each.nbytes > most):
            yield bucket
            bucket, filled = [], 0
        bucket.append(each)
        filled += each.nbytes
    if bucket:
        yield bucket
