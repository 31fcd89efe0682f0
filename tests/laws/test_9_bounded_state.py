"""Law 9: the state is preallocated. Its bytes do not depend on how much was read."""

import pytest
import torch

from lepton.api import create_lepton_nano
from tests.laws.lab import VARIANTS, build, text

BOUNDED = [name for name, variant in VARIANTS.items() if not variant.get("dense")]


@pytest.mark.parametrize("variant", BOUNDED)
def test_the_state_never_grows(variant):
    model = build(variant)
    state, sizes = model.new_state(2), set()
    for chunk in range(12):
        sizes.add(state.nbytes)
        state = model(text(chunk), state).state
    sizes.add(state.nbytes)
    sizes.add(model(text(0)[:, :1], model.new_state(2)).state.nbytes)
    assert sizes == {2 * model.state_bytes(1)} == {2 * model.state_bytes(1_000_000)}


@torch.no_grad()
def test_nano_has_equal_states_at_one_and_eight_thousand_tokens():
    model = create_lepton_nano(window=64)
    tokens = torch.randint(1, 50257, (1, 8192))
    short, long = (model.trunk(tokens[:, :length]).state for length in (1024, 8192))
    assert short.nbytes == long.nbytes == model.state_bytes(1024) == model.state_bytes(8192)


def test_the_dense_baseline_reports_that_it_grows():
    model = build("dense")
    for length in (1, 50, 100):
        assert model(text(1, documents=False)[:, :length]).state.nbytes == 2 * model.state_bytes(length)
