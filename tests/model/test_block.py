"""The activation of a block's MLP."""

import torch

from lepton.model.block import SquaredReLU


def test_the_gradient_of_the_squared_relu():
    x = torch.randn(50, dtype=torch.float64)
    x[x.abs() < 1e-3] = 0.5
    assert torch.equal(SquaredReLU.apply(x), torch.where(x > 0, x * x, 0))
    assert torch.autograd.gradcheck(SquaredReLU.apply, x.requires_grad_())
