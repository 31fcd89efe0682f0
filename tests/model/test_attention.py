"""Both ways to attend, against each other; `tests/model/slow.py` is what the whole layer is compared with."""

import pytest
import torch

from lepton.model import attention
from lepton.model.block import SquaredReLU


@pytest.mark.parametrize(("heads", "kv_heads"), [(3, 1), (4, 2), (2, 2)])
@pytest.mark.parametrize(("length", "columns"), [(1, 9), (7, 20)])
def test_products_equal_the_fused_kernel_in_value_and_gradients(heads, kv_heads, length, columns, monkeypatch):
    torch.manual_seed(0)
    shapes = ((2, length, heads, 8), (2, columns, kv_heads, 8), (2, columns, kv_heads, 8))
    given = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]
    mask = torch.rand(2, length, columns) < 0.4
    mask[..., 0] = True
    slope = torch.randn(shapes[0], dtype=torch.float64)
    found = []
    for most in (columns - 1, columns):
        monkeypatch.setattr(attention, "PRODUCT_COLUMNS", most)
        answer = attention.attend(*given, attention.unseen(mask, torch.float64))
        found.append([answer, *torch.autograd.grad(answer, given, slope)])
    kernels = [[step.name() for step in _steps(each[0].grad_fn)] for each in found]
    assert [any("ScaledDotProduct" in name for name in names) for names in kernels] == [True, False]
    torch.testing.assert_close(*found, rtol=0, atol=1e-12)


def test_one_product_equals_those_of_single_matrices():
    linears = [attention.Linear(6, rows).double() for rows in (4, 2, 3)]
    x = torch.randn(2, 5, 6, dtype=torch.float64, requires_grad=True)
    slopes = [torch.randn(2, 5, each.out_features, dtype=torch.float64) for each in linears]
    found = []
    for results in (attention.products(x, *linears), [x @ each.weight.T for each in linears]):
        found.append([*results, *torch.autograd.grad(results, [x, *(each.weight for each in linears)], slopes)])
    torch.testing.assert_close(*found, rtol=0, atol=1e-12)
    with torch.no_grad():
        torch.testing.assert_close(attention.products(x, *linears), list(found[0][:3]), rtol=0, atol=1e-12)


def test_the_slope_of_the_squared_relu():
    x = torch.randn(50, dtype=torch.float64)
    x[x.abs() < 1e-3] = 0.5
    assert torch.equal(SquaredReLU.apply(x), torch.where(x > 0, x * x, 0))
    assert torch.autograd.gradcheck(SquaredReLU.apply, x.requires_grad_())


def _steps(node):
    """Every step of the computation that ends in `node`."""
    return [] if node is None else [node, *(step for each, _ in node.next_functions for step in _steps(each))]
