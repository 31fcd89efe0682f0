"""`LeptonForCausalLM`: its predictions are those of LEPTON, however a text is cut, padded and batched."""

import pytest
import torch

from lepton.errors import InputError
from lepton.hf import modeling
from tests.hf.small import CLOSE, left_padded, pair, text
from tests.laws.lab import VARIANTS, VOCAB


@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_and_uncertainty_are_those_of_lepton(variant):
    model, wrapped = pair(variant)
    tokens = text(60, rows=2)
    with torch.no_grad():
        own, found = model(tokens), wrapped(tokens)
    torch.testing.assert_close(found.logits, own.logits, **CLOSE)
    assert found.logits.dtype == torch.float32
    if own.uncertainty is None:
        assert found.uncertainty is None
    else:
        torch.testing.assert_close(found.uncertainty, own.uncertainty, **CLOSE)


@pytest.mark.parametrize("variant", ["complete", "over tokens", "dense"])
def test_a_text_in_chunks_is_the_text(variant):
    model, wrapped = pair(variant)
    tokens = text(60, rows=2)
    with torch.no_grad():
        whole, cache, parts = model(tokens).logits, None, []
        for part in tokens.split([17, 1, 1, 30, 11], 1):
            found = wrapped(part, cache=cache)
            cache, _ = found.cache, parts.append(found.logits)
    torch.testing.assert_close(torch.cat(parts, 1), whole, **CLOSE)
    assert (cache.get_seq_length(), cache.batch_size) == (60, 2)


@pytest.mark.parametrize("filler", [0, 1, 50])
@pytest.mark.parametrize("variant", ["complete", "over tokens", "dense"])
def test_left_padding_in_a_batch_changes_nothing(variant, filler):
    model, wrapped = pair(variant)
    rows = [text(length, seed=length)[0] for length in (40, 23, 1)]
    tokens, mask = left_padded(rows, filler)
    with torch.no_grad():
        found = wrapped(tokens, attention_mask=mask)
        doubts = found.logits if found.uncertainty is None else found.uncertainty
        for row, logits, doubt in zip(rows, found.logits, doubts, strict=True):
            own = model(row[None])
            torch.testing.assert_close(logits[-len(row) :], own.logits[0], **CLOSE)
            if own.uncertainty is not None:
                torch.testing.assert_close(doubt[-len(row) :], own.uncertainty[0], **CLOSE)


def test_padding_on_the_right_and_within_a_row_changes_nothing():
    model, wrapped = pair()
    tokens = text(30)
    mask = torch.ones(1, 30, dtype=torch.long)
    mask[0, [3, 4, 11, 28, 29]] = 0
    holds = mask[0].bool()
    with torch.no_grad():
        found, own = wrapped(tokens, attention_mask=mask), model(tokens[:, holds])
    torch.testing.assert_close(found.logits[:, holds], own.logits, **CLOSE)


def test_padded_batches_go_on_from_a_cache():
    """As in `generate`: the mask also has the columns of earlier passes."""
    model, wrapped = pair()
    rows = [text(length, seed=length)[0] for length in (40, 23, 12)]
    tokens, mask = left_padded(rows, 1)
    with torch.no_grad():
        cache, parts = None, []
        for start, end in ((0, 25), (25, 30), (30, 31), (31, 40)):
            found = wrapped(tokens[:, start:end], attention_mask=mask[:, :end], cache=cache)
            cache, _ = found.cache, parts.append(found.logits)
        for row, logits in zip(rows, torch.cat(parts, 1), strict=True):
            torch.testing.assert_close(logits[-len(row) :], model(row[None]).logits[0], **CLOSE)


def test_a_long_text_is_read_in_parts_where_no_gradients_are_wanted(monkeypatch):
    model, wrapped = pair()
    rows = [text(length, seed=length)[0] for length in (70, 31)]
    tokens, mask = left_padded(rows, 1)
    monkeypatch.setattr(modeling, "CHUNK", 16)
    passes = []
    handle = wrapped.network.embed.register_forward_hook(lambda _, given, __: passes.append(given[0].shape[1]))
    with torch.no_grad():
        found = wrapped(tokens, attention_mask=mask)
    handle.remove()
    assert passes == [16, 16, 16, 16, 6]
    for row, logits in zip(rows, found.logits, strict=True):
        torch.testing.assert_close(logits[-len(row) :], model(row[None]).logits[0], **CLOSE)


def test_depth_thinking_and_openings_are_handed_on():
    model, wrapped = pair()
    tokens, opens = text(40, rows=2), torch.rand(2, 40) < 0.1
    with torch.no_grad():
        usual = wrapped(tokens).logits
        for options in ({"depth": 0.3}, {"think": 0}, {"opens": opens}):
            found = wrapped(tokens, **options).logits
            torch.testing.assert_close(found, model(tokens, **options).logits, **CLOSE)
            assert (found - usual).abs().max() > 1e-3, options


def test_only_the_columns_that_are_kept_get_logits():
    _, wrapped = pair()
    tokens = text(20, rows=2)
    with torch.no_grad():
        everything = wrapped(tokens)
        last, picked = wrapped(tokens, logits_to_keep=1), wrapped(tokens, logits_to_keep=torch.tensor([3, 7]))
    assert last.logits.shape == (2, 1, VOCAB)
    torch.testing.assert_close(last.logits, everything.logits[:, -1:], **CLOSE)
    torch.testing.assert_close(picked.logits, everything.logits[:, [3, 7]], **CLOSE)
    torch.testing.assert_close(picked.uncertainty, everything.uncertainty[:, [3, 7]], **CLOSE)


def test_forms_of_the_result():
    model, wrapped = pair()
    tokens = text(12)
    with torch.no_grad():
        found = wrapped(tokens, output_hidden_states=True, use_cache=False)
        assert found.cache is None
        torch.testing.assert_close(found.hidden_states[-1], model(tokens).hidden, **CLOSE)
        logits, cache, *_ = wrapped(tokens, return_dict=False)
        torch.testing.assert_close(logits, found.logits, **CLOSE)
        assert wrapped(tokens[:, :1], past_key_values=cache).cache is cache


def test_what_it_cannot_take_is_said():
    _, wrapped = pair()
    tokens = text(12)
    for arguments, message in (
        ({"inputs_embeds": torch.zeros(1, 2, 3)}, "give input_ids"),
        ({"position_ids": tokens}, "positions follow from the documents"),
        ({"output_attentions": True}, "leave it out"),
        ({"attention_mask": torch.ones(1, 1, 12, 12)}, "1 for tokens and 0 for padding"),
        ({"attention_mask": torch.ones(1, 5)}, "1 for tokens and 0 for padding"),
        ({"cache": object()}, "give the cache of an earlier pass"),
        ({"depth": 3}, "depth=3"),
    ):
        with pytest.raises(InputError, match=message):
            wrapped(tokens, **arguments)
    with pytest.raises(TypeError, match="did you mean 'use_cache'"):
        wrapped(tokens, use_cach=True)
    with pytest.raises(InputError, match="a loss is that of a whole text"):
        wrapped(tokens, labels=tokens, cache=wrapped(tokens).cache)
    with pytest.raises(InputError, match="another tokenizer"):
        wrapped.resize_token_embeddings(VOCAB + 1)
    assert wrapped.resize_token_embeddings(VOCAB) is wrapped.get_input_embeddings()
    with pytest.raises(InputError, match="cannot be replaced"):
        wrapped.set_input_embeddings(torch.nn.Embedding(3, 3))
