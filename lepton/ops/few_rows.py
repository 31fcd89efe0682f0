"""Products of a few rows with a weight, as sums that a compiler joins into one loop over the weight.

A CPU's library reads a weight at the speed of memory for one row, but takes about as long again for each further one.
A loop that multiplies a weight with all rows as soon as it is loaded needs the time of one. PyTorch has no such
kernel; its compiler makes one of sums that share what they read.
"""

from collections.abc import Callable

import torch
from torch import Tensor

MOST_ROWS = 8
"""With more rows their sums no longer fit into the registers of a core."""
MOST_SUMS = 10
"""Sums that are computed at once. Several for each row, so that none waits for the one before it."""


def product_of_few_rows(x_MK: Tensor, weight_KN: Tensor) -> Tensor:
    """As `torch.mm` where a linear layer of few rows calls it; NotImplemented elsewhere.

    The result may differ in rounding. Outside of a compiled graph it is slow, and needs much memory.
    """
    rows, outputs = x_MK.shape[0], weight_KN.shape[1]
    weight_NK = weight_KN.t()
    if not (0 < rows <= MOST_ROWS and x_MK.device.type == "cpu" and weight_NK.is_contiguous() and outputs):
        return NotImplemented
    parts = next(each for each in (4, 2, 1) if each * rows <= MOST_SUMS and outputs % each == 0)
    size = outputs // parts
    pieces = [weight_NK.narrow(0, i * size, size) for i in range(parts)]
    sums = [(piece * x_K).sum(1) for x_K in x_MK.unbind(0) for piece in pieces]
    return torch.cat(sums).view(rows, outputs)


FORMS: dict[torch._ops.OpOverload, Callable[..., Tensor]] = {torch.ops.aten.mm.default: product_of_few_rows}
"""For `make_fx`: what a graph for a CPU's compiler has in place of some operators."""
