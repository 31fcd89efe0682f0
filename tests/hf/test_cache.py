"""`LeptonCache`: a state that transformers can carry, repeat and sort."""

import pytest
import torch

from lepton.errors import InputError
from lepton.hf.cache import LeptonCache
from tests.hf.small import CLOSE, pair, text


@pytest.fixture
def read():
    model, wrapped = pair()
    tokens = text(30, rows=3)
    with torch.no_grad():
        return model, wrapped, tokens, wrapped(tokens).cache


def logits_after(wrapped, cache):
    with torch.no_grad():
        return wrapped(torch.full((cache.batch_size, 1), 7), cache=cache).logits


def expected(model, tokens):
    with torch.no_grad():
        return model(torch.cat([tokens, torch.full((len(tokens), 1), 7)], 1)).logits[:, -1:]


def test_rows_are_selected_repeated_and_sorted(read):
    model, wrapped, tokens, cache = read
    cache.reorder_cache(torch.tensor([2, 0]))
    cache.batch_repeat_interleave(2)
    cache.batch_select_indices(torch.tensor([0, 2, 3]))
    assert (cache.batch_size, cache.get_seq_length()) == (3, 30)
    torch.testing.assert_close(logits_after(wrapped, cache), expected(model, tokens[[2, 0, 0]]), **CLOSE)


def test_a_text_goes_on_from_a_memory_or_any_state(read, tmp_path):
    model, wrapped, tokens, cache = read
    cache.state.memory.save(tmp_path / "memory.safetensors")
    remembering = LeptonCache(wrapped.network.new_state(3, memory=tmp_path / "memory.safetensors"))
    with torch.no_grad():
        own = model(tokens[:, :9], model.new_state(3, memory=tmp_path / "memory.safetensors")).logits
        found = wrapped(tokens[:, :9], cache=remembering).logits
        fresh = wrapped(tokens[:, :9]).logits
    torch.testing.assert_close(found, own, **CLOSE)
    assert (found - fresh).abs().max() > 1e-3


def test_its_size_does_not_grow(read):
    _, wrapped, tokens, cache = read
    before = cache.state.nbytes
    with torch.no_grad():
        wrapped(tokens, cache=cache)
    assert (cache.state.nbytes, cache.get_seq_length(), cache.get_max_length()) == (before, 60, -1)


def test_it_starts_empty_and_can_be_emptied(read):
    model, wrapped, tokens, cache = read
    for empty in (LeptonCache(), cache):
        empty.reset()
        assert (empty.batch_size, empty.get_seq_length(), empty.is_initialized) == (-1, 0, False)
        empty.reorder_cache(torch.tensor([0]))
        empty.batch_repeat_interleave(2)
    with torch.no_grad():
        torch.testing.assert_close(wrapped(tokens, cache=cache).logits, model(tokens).logits, **CLOSE)


def test_what_a_state_cannot_do_is_said(read):
    cache = read[-1]
    cache.crop(0)
    with pytest.raises(InputError, match=r"crop\(3\): a state cannot go back"):
        cache.crop(3)
    with pytest.raises(InputError, match="the state of a whole model"):
        cache.update(None, None, 0)
    assert (cache.is_croppable, cache.is_compileable, len(cache)) == (False, False, 1)
    assert repr(cache) == "LeptonCache(30 columns, 3 rows)"
