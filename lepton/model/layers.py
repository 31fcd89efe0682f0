"""Layers that everything is built of: the norm, and matrices without bias."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

NORM_EPS = 1e-6


def norm(x: Tensor) -> Tensor:
    """RMSNorm without gains, over the last dimension (Zhang and Sennrich, 2019)."""
    return F.rms_norm(x, (x.shape[-1],), eps=NORM_EPS)


class Linear(nn.Linear):
    """A matrix without bias that computes in its input's dtype; the parameter keeps its own."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__(in_features, out_features, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.to(x.dtype))


def products(x: Tensor, *linears: Linear) -> Sequence[Tensor]:
    """Apply some matrices to the same states.

    With gradients it is one product, so that the gradient of `x` is written once, and not once per matrix and summed.
    """
    if not torch.is_grad_enabled():
        return [linear(x) for linear in linears]
    matrix = torch.cat([linear.weight for linear in linears]).to(x.dtype)
    return F.linear(x, matrix).split([linear.out_features for linear in linears], -1)
