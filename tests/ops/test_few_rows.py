"""Products of few rows as sums: they are the products, and a trace takes them where they pay."""

import pytest
import torch
import torch.nn.functional as F
from torch.fx.experimental.proxy_tensor import make_fx

from lepton.ops.few_rows import FORMS, MOST_ROWS, product_of_few_rows

MM = torch.ops.aten.mm.default


def traced(x, weight):
    return make_fx(F.linear, decomposition_table=FORMS)(x, weight)


def products_in(graph):
    return sum(node.target is MM for node in graph.graph.nodes)


@pytest.mark.parametrize("rows", range(1, MOST_ROWS + 1))
@pytest.mark.parametrize(("outputs", "inputs"), [(1, 5), (12, 32), (7, 1), (30, 64)])
def test_sums_are_the_product(rows, outputs, inputs):
    x, weight = torch.randn(rows, inputs, dtype=torch.float64), torch.randn(outputs, inputs, dtype=torch.float64)
    torch.testing.assert_close(product_of_few_rows(x, weight.t()), F.linear(x, weight))


def test_a_row_does_not_depend_on_the_others():
    x, weight = torch.randn(2, 32), torch.randn(12, 32)
    whole = product_of_few_rows(x, weight.t())
    x[1] = torch.nan
    assert torch.equal(product_of_few_rows(x, weight.t())[0], whole[0])


def test_a_trace_takes_them_for_few_rows_alone():
    weight = torch.randn(12, 32)
    for rows, left in ((1, 0), (MOST_ROWS, 0), (MOST_ROWS + 1, 1)):
        x = torch.randn(rows, 32)
        graph = traced(x, weight)
        assert products_in(graph) == left
        torch.testing.assert_close(graph(x, weight), F.linear(x, weight))
    assert products_in(traced(torch.randn(2, 32), torch.randn(32, 12).t())) == 1, "a weight is read as it lies"


def test_a_trace_takes_them_for_rows_of_several_texts():
    x, weight = torch.randn(1, 5, 32), torch.randn(12, 32)
    assert products_in(traced(x, weight)) == 0
