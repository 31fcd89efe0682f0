"""Block-sparse attention against the bands that it stands in for. The compiler that makes it fast needs a GPU."""

import pytest
import torch
from torch.nn.attention import flex_attention

from lepton.model import block_sparse
from lepton.model.timeline import Timeline, sees
from tests.laws.lab import EOS, VARIANTS, build, text

LENGTH = 300  # three blocks of queries, the last one cut off; slots begin within a block
pytestmark = pytest.mark.filterwarnings(
    "ignore:flex_attention called without torch.compile",
    "ignore:The .grad attribute of a Tensor that is not a leaf",  # the library's own tracing looks at it
)


@pytest.fixture
def _differentiable(monkeypatch):
    """On a CPU the library refuses to differentiate, though what it computes there is differentiable."""
    monkeypatch.setattr(flex_attention, "_validate_device", lambda *tensors: None)


def passes(variant, **overrides):
    """Loss and gradients, once in bands and once in blocks."""
    model, tokens, found = build(variant, **overrides), text(3, rows=3, length=LENGTH), []
    for model.block_sparse in (False, True):
        loss = model.loss(tokens).loss
        found.append([loss, *torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)])
    return found


@pytest.mark.usefixtures("_differentiable")
@pytest.mark.parametrize("variant", VARIANTS)
def test_equal_to_bands_in_value_and_gradients(variant):
    torch.testing.assert_close(*passes(variant), rtol=0, atol=1e-12)


@pytest.mark.usefixtures("_differentiable")
@pytest.mark.parametrize("window", [24, 200])
def test_equal_to_bands_in_any_window(window):
    torch.testing.assert_close(*passes("complete", window=window, segment=8), rtol=0, atol=1e-12)


def test_a_past_a_route_and_a_short_chunk_are_left_to_bands(monkeypatch):
    monkeypatch.setattr("lepton.model.lepton.block_mask", None)
    model, tokens = build("complete"), text(3, length=LENGTH)
    model.block_sparse = True
    state = model(tokens[:, :8]).state
    model(tokens, state)
    model.trunk(tokens[:, : block_sparse.BLOCK - 1])
    with pytest.raises(TypeError):
        model.trunk(tokens)


@pytest.mark.parametrize("slots", [None, 1, 90, 300])
@pytest.mark.parametrize("window", [None, 1, 24, 128, 129, 130, 256])
@pytest.mark.parametrize("length", [128, 256, LENGTH])
def test_what_is_skipped_is_what_nobody_sees(length, window, slots):
    """In a row of one document the blocks computed are exactly those with a pair that is seen, and all with slots."""
    tokens = torch.ones(2, length, dtype=torch.long)
    tokens[1, 40::50] = EOS
    zero = torch.zeros(2, dtype=torch.long)
    timeline = Timeline.read(tokens, zero, zero, eos_id=EOS, segment=8)
    slots_BTC = None if slots is None else torch.rand(2, length, slots) < 0.5
    blocks = block_sparse.block_mask(timeline, window, slots_BTC)
    columns = length + (slots or 0)
    found = flex_attention.create_mask(blocks.mask_mod, 2, 1, length, columns, device="cpu")[:, 0]
    index_BT = torch.arange(length).expand(2, -1)
    expected = sees(timeline, index_BT, torch.arange(length), window)
    expected = expected if slots_BTC is None else torch.cat([expected, slots_BTC], 2)
    assert torch.equal(found, expected)
    alone = sees(timeline, index_BT, torch.arange(length), window)[0]
    alone = torch.cat([alone, torch.ones(length, slots or 0, dtype=torch.bool)], 1)
    size = block_sparse.BLOCK
    padded = torch.nn.functional.pad(alone, (0, -columns % size, 0, -length % size))
    needed = padded.unflatten(1, (-1, size)).unflatten(0, (-1, size)).any(3).any(1)
    assert torch.equal(blocks.to_dense()[0, 0].bool(), needed)
