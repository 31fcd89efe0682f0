"""The chunked cross-entropy against the naive form, in value and gradients."""

import math

import pytest
import torch

from lepton.ops import cross_entropy as module
from lepton.ops.cross_entropy import IGNORE, linear_cross_entropy, naive_linear_cross_entropy


@pytest.mark.parametrize("rows", [5, 128, 300])
@pytest.mark.parametrize("z_weight", [0.0, 0.1])
def test_equal_to_the_naive_form_in_value_and_gradients(rows, z_weight):
    torch.manual_seed(rows)
    x = torch.randn(rows, 16, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(128, 16, dtype=torch.float64, requires_grad=True)
    target = torch.randint(0, 97, (rows,))
    target[::4] = IGNORE
    options = {"vocab_size": 97, "cap": 15.0, "z_weight": z_weight}
    expected = naive_linear_cross_entropy(x, weight, target, **options)
    expected_grads = torch.autograd.grad(3 * expected[0], (x, weight))
    got = linear_cross_entropy(x, weight, target, **options)
    got_grads = torch.autograd.grad(3 * got[0], (x, weight))
    torch.testing.assert_close(got, tuple(part.detach() for part in expected), rtol=0, atol=1e-10, check_stride=False)
    torch.testing.assert_close(got_grads, expected_grads, rtol=0, atol=1e-10)


def test_the_chunk_size_does_not_matter(monkeypatch):
    x, weight, target = torch.randn(50, 8), torch.randn(128, 8), torch.randint(0, 128, (50,))
    losses = []
    for chunk in (1, 7, 64):
        monkeypatch.setattr(module, "CHUNK_CPU", chunk)
        losses.append(linear_cross_entropy(x, weight, target, vocab_size=128, cap=15.0)[0])
    torch.testing.assert_close(losses[0], losses[1])
    torch.testing.assert_close(losses[0], losses[2])


def test_nothing_to_predict_is_zero_and_finite():
    x = torch.randn(4, 8, requires_grad=True)
    loss, *_ = linear_cross_entropy(x, torch.randn(128, 8), torch.full((4,), IGNORE), vocab_size=97, cap=15.0)
    loss.backward()
    assert loss.item() == 0
    assert not x.grad.any()


def test_the_extremes_of_the_cap_stay_finite_in_fp32():
    x = 1e4 * torch.randn(8, 8)
    weight = torch.randn(128, 8, requires_grad=True)
    loss, *_ = linear_cross_entropy(x, weight, torch.randint(0, 128, (8,)), vocab_size=128, cap=50.0)
    loss.backward()
    assert torch.isfinite(loss)
    assert torch.isfinite(weight.grad).all()


@pytest.mark.parametrize("cap", [15.0, 30.0, 50.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_least_likely_target_has_its_whole_loss(cap, dtype):
    x, weight = torch.ones(2, 1, dtype=dtype), torch.full((128, 1), 1e4, dtype=dtype)
    weight[3] = -1e4
    x.requires_grad_(), weight.requires_grad_()
    loss, ce, *_ = linear_cross_entropy(x, weight, torch.tensor([3, 3]), vocab_size=97, cap=cap, z_weight=0.0)
    loss.backward()
    assert ce.item() == pytest.approx(2 * cap + math.log(96), rel=1e-6)
    assert weight.grad.isfinite().all()


def test_a_frozen_weight_costs_no_gradient():
    x, weight = torch.randn(5, 8, requires_grad=True), torch.randn(128, 8, requires_grad=True)
    target = torch.randint(0, 128, (5,))
    linear_cross_entropy(x, weight, target, vocab_size=128, cap=15.0)[0].backward()
    both, x.grad = x.grad, None
    linear_cross_entropy(x, weight.detach(), target, vocab_size=128, cap=15.0)[0].backward()
    torch.testing.assert_close(x.grad, both, rtol=0, atol=0)
