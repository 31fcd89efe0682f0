"""The keys and values that are kept, against a list of the document's tokens."""

import pytest
import torch

from lepton.model.kv_cache import KVCache
from lepton.model.timeline import Timeline
from tests.laws.lab import EOS, build

LAYERS, LENGTH = 2, 12


def chunk_of(tokens):
    """Keys and values of each layer: `layer + 1` plus a number that is the token's own."""
    own = torch.arange(1, 1 + tokens.numel(), dtype=torch.float64).view(*tokens.shape, 1, 1).expand(-1, -1, 2, 8)
    return [(own + 1000 * layer, -own - 1000 * layer) for layer in range(LAYERS)]


@pytest.mark.parametrize("remembered", [0, 1, 4, None])
def test_what_is_kept_is_the_end_of_the_document(remembered):
    config = build("dense" if remembered is None else "complete").config
    tokens = torch.full((3, LENGTH), 7)
    tokens[1, 6] = tokens[2, 11] = EOS
    zero = torch.zeros(3, dtype=torch.int64)
    timeline = Timeline.read(tokens, zero, zero, eos_id=EOS, segment=4)
    chunk = chunk_of(tokens)
    past = KVCache.fresh(config, LAYERS, 3, torch.float64, torch.device("cpu"), allocate=False)
    assert past.entries == 0
    for count in range(LENGTH + 1):
        found = past.after(chunk, torch.full((3,), count), timeline, remembered)
        for row in range(3):
            document = []
            for t in range(count):
                document = [] if tokens[row, t] == EOS else [*document, t]
            kept = document if remembered is None else document[max(0, len(document) - remembered) :]
            for layer in range(LAYERS):
                for got, whole in zip(found.layer(layer), chunk[layer], strict=True):
                    first = found.entries - len(kept)
                    assert torch.equal(got[row, first:], whole[row, kept])
                    assert not got[row, :first].any(), "zeros from before the document"


@pytest.mark.parametrize("shifted", [False, True])
def test_allocated_is_a_whole_window_and_what_shifted_keys_need(shifted):
    config = build("complete").config.replace(shifted_keys=shifted)
    cache = KVCache.fresh(config, LAYERS, 3, torch.float32, torch.device("cpu"), allocate=True)
    assert cache.entries == config.window - 1 + shifted
    assert cache.keys_BLRKH.dtype == torch.float32
