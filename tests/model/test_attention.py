"""Both ways to attend, against each other; `tests/model/slow.py` is what the whole layer is compared with."""

import pytest
import torch

from lepton.model import attention


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


def _steps(node):
    """Every step of the computation that ends in `node`."""
    return [] if node is None else [node, *(step for each, _ in node.next_functions for step in _steps(each))]
