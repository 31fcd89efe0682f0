"""Copies of the matrices in half precision: the model computes with them, and the masters get the gradients."""

import pytest
import torch

from lepton.model.layers import Linear
from lepton.train.mixed_precision import LowPrecisionCopies
from tests.laws.lab import build, text


def model_matrices(model):
    return [part.weight for part in model.modules() if isinstance(part, Linear)]


def test_where_the_dtype_is_that_of_the_weights_there_are_no_copies():
    model = build("complete", dtype=torch.float32)
    before = model_matrices(model)
    with LowPrecisionCopies(model).swapped_in():
        assert all(a is b for a, b in zip(before, model_matrices(model), strict=True))


def test_copies_are_present_and_gone_afterwards_whatever_happens():
    model = build("complete", dtype=torch.float32)
    model.compute_dtype = torch.bfloat16
    working, masters = LowPrecisionCopies(model), model_matrices(model)
    with torch.no_grad():
        masters[0].add_(1)  # an optimizer's step
    inside = []

    def interrupted():
        inside.extend(model_matrices(model))
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), working.swapped_in():
        interrupted()
    assert {each.dtype for each in inside} == {torch.bfloat16}
    assert all(torch.equal(a, b.bfloat16()) for a, b in zip(inside, masters, strict=True))
    assert all(a is b for a, b in zip(model_matrices(model), masters, strict=True))


def test_gradients_of_two_passes_add_up_in_the_masters():
    model = build("complete", dtype=torch.float32)
    model.compute_dtype = torch.bfloat16
    working, masters = LowPrecisionCopies(model), model_matrices(model)
    masters[0].requires_grad_(False)
    found = []
    for _ in range(2):
        with working.swapped_in():
            model.loss(text(1)).loss.backward()
        found.append([each.grad.clone() for each in masters[1:]])
    assert masters[0].grad is None
    assert all(each.dtype == torch.float32 for each in found[0])
    for once, twice in zip(*found, strict=True):
        torch.testing.assert_close(twice, 2 * once)
