"""Products of several matrices at once, against single ones."""

import torch

from lepton.model.layers import Linear, products


def test_one_product_equals_those_of_single_matrices():
    linears = [Linear(6, rows).double() for rows in (4, 2, 3)]
    for each in linears:
        torch.nn.init.normal_(each.weight)
    x = torch.randn(2, 5, 6, dtype=torch.float64, requires_grad=True)
    weights = [torch.randn(2, 5, each.out_features, dtype=torch.float64) for each in linears]
    found = []
    for results in (products(x, *linears), [x @ each.weight.T for each in linears]):
        found.append([*results, *torch.autograd.grad(results, [x, *(each.weight for each in linears)], weights)])
    torch.testing.assert_close(*found, rtol=0, atol=1e-12)
    with torch.no_grad():
        torch.testing.assert_close(products(x, *linears), list(found[0][:3]), rtol=0, atol=1e-12)
