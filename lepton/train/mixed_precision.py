"""Mixed precision: passes compute with half-precision copies of the fp32 matrices that the optimizers update."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import cast

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from lepton.model import Network
from lepton.model.layers import Linear


class LowPrecisionCopies:
    """Copies of a model's matrices in the dtype of its activations, beside fp32 masters (Micikevicius et al., 2018).

    By itself a `Linear` casts its matrix at each use, and casts each gradient back before it is accumulated. Here all
    copies are made at once, and gradients are accumulated without a cast.
    """

    def __init__(self, model: Network) -> None:
        self._linears = [
            module
            for module in model.modules()
            if isinstance(module, Linear)
            and module.weight.dtype != model.dtype
            and not isinstance(module.weight, DTensor)  # those are cast when they are gathered
        ]
        self._masters = [cast(nn.Parameter, linear.weight) for linear in self._linears]
        self._copies = [nn.Parameter(master.detach().to(model.dtype)) for master in self._masters]
        for copy, master in zip(self._copies, self._masters, strict=True):
            copy.register_post_accumulate_grad_hook(partial(_hand_over, master))

    @contextmanager
    def swapped_in(self) -> Iterator[None]:
        """Let the model compute with copies of its present weights; gradients go to the master weights."""
        if self._copies:
            torch._foreach_copy_([copy.detach() for copy in self._copies], [each.detach() for each in self._masters])
        for copy, master in zip(self._copies, self._masters, strict=True):
            copy.requires_grad_(master.requires_grad)
        try:
            self._put(self._copies)
            yield
        finally:
            self._put(self._masters)

    def _put(self, weights: list[nn.Parameter]) -> None:
        for linear, weight in zip(self._linears, weights, strict=True):
            linear.weight = weight


@torch.no_grad()
def _hand_over(master: nn.Parameter, copy: Tensor) -> None:
    """Add the gradient of a copy to that of its master weight."""
    assert copy.grad is not None
    if master.grad is None:
        master.grad = copy.grad.to(master.dtype)
    else:
        master.grad += copy.grad
    copy.grad = None
