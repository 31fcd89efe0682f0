"""A model whose attention runs in the kernel; `tests/model/slow.py` is what the layer itself is compared with."""

import pytest
import torch

from lepton.ops.attention_kernel import ATTENTION
from tests.laws.lab import VARIANTS, build, text
from tests.ops.devices import DEVICES, force


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_model_with_the_kernel_equals_one_without(device, variant, monkeypatch):
    """Loss and all gradients; in fp32, which the kernel can do and nobody but a test asks it to."""
    model, tokens = build(variant, dtype=torch.float32, head_dim=16).to(device), text(3, rows=3, length=90).to(device)
    found = []
    for answer in (False, True):
        asked = force(monkeypatch, ATTENTION, answer)
        loss = model.loss(tokens, think=torch.tensor([0, 1, 4], device=device) if model.thoughts else None).loss
        found.append([loss, *torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)])
        assert len(asked) == 2
    torch.testing.assert_close(*found, rtol=1e-3, atol=1e-5)


@torch.no_grad()
def test_only_a_whole_pass_without_a_past_asks_for_the_kernel(monkeypatch):
    """And once for all layers with equal windows."""
    asked = force(monkeypatch, ATTENTION, answer=False)
    model, tokens = build("complete"), text(3, length=30)
    model(tokens)
    assert asked == [(tokens.device, torch.float64, 8)] * 2
    model(tokens, model.new_state(2))
    model(tokens, depth=0.5)
    assert len(asked) == 2
