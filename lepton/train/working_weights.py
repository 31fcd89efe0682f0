"""Matrices in half precision for a forward and backward pass, made of those that the optimizers update in fp32."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import cast

import torch
from torch import Tensor, nn

from lepton.model import Network
from lepton.model.layers import Linear


class WorkingWeights:
    """Copies of a model's matrices in the dtype of its activations, beside masters in fp32 (Micikevicius et al., 2018).

    Alone a `Linear` casts its matrix wherever it is used, and the gradient back before that is added up. Here all
    copies are made at once, and a gradient is added up as it is.
    """

    def __init__(self, model: Network) -> None:
        self._linears = [
            module for module in model.modules() if isinstance(module, Linear) and module.weight.dtype != model.dtype
        ]
        self._masters = [cast(nn.Parameter, linear.weight) for linear in self._linears]
        self._copies = [nn.Parameter(master.detach().to(model.dtype)) for master in self._masters]
        for copy, master in zip(self._copies, self._masters, strict=True):
            copy.register_post_accumulate_grad_hook(partial(_hand_over, master))

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Let the model compute with copies of its present weights; gradients go to the masters."""
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
    """Add the gradient of a copy to its master's."""
    assert copy.grad is not None
    if master.grad is None:
        master.grad = copy.grad.to(master.dtype)
    else:
        master.grad += copy.grad
    copy.grad = None
