"""The divergence through a head, against the plain formula."""

import pytest
import torch

from lepton.ops import divergence
from lepton.ops.divergence import linear_divergence, naive_linear_divergence

WIDTH, VOCAB, PADDED = 12, 50, 64


def inputs(positions: int = 9, dtype: torch.dtype = torch.float64, scale: float = 1.0):
    generator = torch.Generator().manual_seed(positions)
    x, teacher = (scale * torch.randn(positions, WIDTH, generator=generator, dtype=dtype) for _ in range(2))
    weight = torch.randn(PADDED, WIDTH, generator=generator, dtype=dtype)
    return x.requires_grad_(), teacher, weight, torch.arange(positions) % 3 != 1


@pytest.mark.parametrize("positions", [1, 2, 9])
@pytest.mark.parametrize("scale", [0.1, 1.0, 100.0])
def test_equal_to_the_plain_formula(positions, scale, monkeypatch):
    """Values and gradient, in chunks of which the last is shorter; at the largest scale most logits are at the cap."""
    monkeypatch.setattr(divergence, "chunk_size", lambda *_: 4)
    x, *rest = inputs(positions, scale=scale)
    got, expected = (
        function(x, *rest, vocab_size=VOCAB, cap=15.0) for function in (linear_divergence, naive_linear_divergence)
    )
    for ours, theirs in zip(got, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)
    ours, theirs = (torch.autograd.grad(3 * loss, x)[0] for loss, _ in (got, expected))
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)


def test_a_prediction_does_not_diverge_from_itself():
    x, _, weight, valid = inputs()
    loss, nats = linear_divergence(x, x, weight, valid, vocab_size=VOCAB, cap=15.0)
    assert loss.item() == pytest.approx(0, abs=1e-12)
    assert nats.abs().max() < 1e-12
    assert torch.autograd.grad(loss, x)[0].abs().max() < 1e-12


@pytest.mark.parametrize("positions", [0, 5])
def test_without_valid_positions_there_is_no_loss(positions):
    x, teacher, weight, valid = inputs(positions)
    loss, nats = linear_divergence(x, teacher, weight, torch.zeros_like(valid), vocab_size=VOCAB, cap=15.0)
    assert loss.item() == 0
    assert not nats.any()
    assert not torch.autograd.grad(loss, x)[0].any()


def test_neither_teacher_nor_head_gets_a_gradient():
    x, teacher, weight, valid = inputs()
    teacher.requires_grad_(), weight.requires_grad_()
    linear_divergence(x, teacher, weight, valid, vocab_size=VOCAB, cap=15.0)[0].backward()
    assert x.grad.any()
    assert teacher.grad is None
    assert weight.grad is None


def test_half_precision_is_near():
    x, teacher, weight, valid = inputs(33)
    expected, _ = naive_linear_divergence(x, teacher, weight, valid, vocab_size=VOCAB, cap=15.0)
    wanted = torch.autograd.grad(expected, x)[0]
    low = x.detach().bfloat16().requires_grad_()
    got, nats = linear_divergence(low, teacher.bfloat16(), weight, valid, vocab_size=VOCAB, cap=15.0)
    got.backward()
    assert nats.dtype == torch.float32
    assert got.item() == pytest.approx(expected.item(), rel=0.02)
    assert (low.grad - wanted).norm() < 0.03 * wanted.norm()
