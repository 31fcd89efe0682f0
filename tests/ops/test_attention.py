"""Attention against the naive form, one query and one head at a time, in outputs and gradients."""

import pytest
import torch

from lepton.ops import attention
from lepton.ops.attention import attend, attend_with_bias, naive_attention
from lepton.ops.attention_plan import bias
from lepton.ops.query_blocks import BLOCK
from tests.ops.test_attention_plan import example, lay_out


def steps(node):
    """Every step of the computation that ends in `node`."""
    return [] if node is None else [node, *(step for each, _ in node.next_functions for step in steps(each))]


def draw(queries, entries, heads=4, kv_heads=2, head_dim=4, rows=2):
    shapes = ((rows, queries, heads, head_dim), *[(rows, entries, kv_heads, head_dim)] * 2)
    return [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]


def with_gradients(out, given):
    weight = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)
    return [out, *torch.autograd.grad(out, given, weight)]


@pytest.mark.parametrize("most", [0, attention.PRODUCT_ENTRIES])
@pytest.mark.parametrize(("heads", "kv_heads"), [(3, 1), (4, 2), (2, 2)])
@pytest.mark.parametrize(("queries", "entries"), [(1, 9), (7, 20)])
def test_both_ways_on_a_cpu_equal_the_naive_form(heads, kv_heads, queries, entries, most, monkeypatch):
    monkeypatch.setattr(attention, "PRODUCT_ENTRIES", most)
    given = draw(queries, entries, heads, kv_heads)
    mask = torch.rand(2, queries, entries) < 0.4
    mask[..., 0] = True
    out = attend_with_bias(*given, bias(mask, torch.float64))
    assert any("ScaledDotProduct" in step.name() for step in steps(out.grad_fn)) == (most == 0)
    expected = with_gradients(naive_attention(*given, mask), given)
    torch.testing.assert_close(with_gradients(out, given), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("slots", [0, 3])
@pytest.mark.parametrize(("length", "past"), [(1, 5), (9, 0), (2 * BLOCK + 1, 7)])
def test_a_chunk_equals_the_naive_form(length, past, slots):
    position, sees, mask = example(length, 6, slots, past=past)
    given = draw(length, past + length + slots, heads=2, kv_heads=1)
    q, k, v = given
    tokens, behind = slice(past + length), slice(past + length, None)
    keys_values = (k[:, behind], v[:, behind]) if slots else None
    out = attend(q, k[:, tokens], v[:, tokens], lay_out(position, 6, past).plan(sees), keys_values)
    expected = with_gradients(naive_attention(*given, mask), given)
    torch.testing.assert_close(with_gradients(out, given), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("share", [0.0, 0.2, 1.0])
def test_chosen_queries_get_what_all_would(share):
    """Also in blocks and rows where none is chosen."""
    length = 2 * BLOCK + 30
    position, sees, _ = example(length, 24, 3)
    given = draw(length, length + 3)
    q, k, v = given
    slots = (k[:, length:], v[:, length:])
    chosen = torch.rand(2, length) < share
    chosen[0, :BLOCK] = chosen[:, BLOCK : 2 * BLOCK] = False
    near = lay_out(position, 24, routed=True)
    everyone, plan = near.plan(sees), near.plan(sees, chosen)
    expected = plan.take(attend(q, k[:, :length], v[:, :length], everyone, slots))
    found = attend(plan.take(q), k[:, :length], v[:, :length], plan, slots)
    assert found.shape == (int(chosen.sum()), 4, 4)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    if share:
        torch.testing.assert_close(with_gradients(found, given), with_gradients(expected, given), rtol=0, atol=1e-12)
