"""Basic operations: the norm, linear layers without bias, and the values at some tokens."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lepton.ops.heads import norm as norm  # used as one of the layers
from lepton.ops.products import PRODUCTS
from lepton.ops.products import products as few_products


def at_indices(x: Tensor, index_BC: Tensor) -> Tensor:
    """Return the values [B, C, ...] of `x` [B, T, ...] at the tokens (or other entries) with indices `index_BC`."""
    index = index_BC.view(*index_BC.shape, *[1] * (x.dim() - 2)).expand(-1, -1, *x.shape[2:])
    return x.gather(1, index)


FEW_ROWS = 8
"""Most inputs for which a kernel that reads the weight once is faster than a general product."""


class Linear(nn.Linear):
    """A linear layer without bias that computes in the dtype of its input, whatever the dtype of its weight."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__(in_features, out_features, bias=False)

    def reset_parameters(self) -> None:
        """Leave the weight as it is: `initialise` draws all, and to draw twice takes XXL half a minute."""

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight.to(x.dtype)
        rows = x.numel() // x.shape[-1]
        if 0 < rows <= FEW_ROWS and not torch.is_grad_enabled() and PRODUCTS.works(x.device, x.dtype):
            (y,) = few_products(x.reshape(rows, x.shape[-1]), [weight])
            return y.view(*x.shape[:-1], -1)
        return F.linear(x, weight)


def products(x: Tensor, *linears: Linear) -> Sequence[Tensor]:
    """Apply several linear layers to the same input.

    With gradients it is one matrix product, so that the gradient of `x` is written once instead of once per layer.
    """
    if not torch.is_grad_enabled():
        return [linear(x) for linear in linears]
    matrix = torch.cat([linear.weight for linear in linears]).to(x.dtype)
    return F.linear(x, matrix).split([linear.out_features for linear in linears], -1)
