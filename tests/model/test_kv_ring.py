"""Rings: keys and values by position, whatever is rejected or overwritten."""

import dataclasses

import pytest
import torch

from lepton.model.fresh_state import fresh_state
from lepton.model.ideas.idea import Call
from lepton.model.kv_cache import KVCache
from lepton.model.kv_ring import KVRing, RingWindow, joined
from lepton.model.state import flatten
from tests.laws.lab import VARIANTS, assert_close, build, text


@pytest.mark.parametrize("window", [4, None])
@pytest.mark.parametrize("columns", [9, 12])
def test_a_ring_window_sees_what_a_causal_window_sees(window, columns):
    """At every position, with chunks of several lengths, in rings with room to spare."""
    for start, length in [(0, 1), (0, 3), (2, 3), (5, 1), (5, 4), *([(31, 5), (17, 2)] if window else [])]:
        if window is None and start + length > columns:
            continue
        position_BT = torch.arange(start, start + length)[None]
        found = RingWindow.over(position_BT, columns=columns, window=window, dtype=torch.float32)
        ((_, _, mask_BTR),) = found.masks
        for t in range(length):
            first = 0 if window is None else max(0, start + t - window + 1)
            expected = {position % columns for position in range(first, start + t + 1)}
            assert set(mask_BTR[0, t].nonzero()[:, 0].tolist()) == expected
        query_BQ = torch.tensor([[length - 1, 0]])
        assert torch.equal(found.mask_of(query_BQ)[0], mask_BTR[0, [length - 1, 0]])


def test_loading_and_reading_are_inverse():
    """Of rows at different positions, in any place; entries from before the document are 0."""
    generator = torch.Generator().manual_seed(0)
    cache = KVCache(*(torch.randn(3, 2, 7, 2, 4, generator=generator) for _ in range(2)))
    position_B = torch.tensor([3, 7, 25])
    early = torch.arange(7) < 7 - position_B[:, None]
    blank = early[:, None, :, None, None]
    cache = KVCache(cache.keys_BLRKH.masked_fill(blank, 0), cache.values_BLRKH.masked_fill(blank, 0))
    ring = KVRing.empty(cache, 5, 12, 8)
    for each in (*ring.keys, *ring.values):
        each.fill_(float("nan"))
    ring.load(torch.tensor([4, 0, 2]), cache, position_B)
    for row, place in enumerate((4, 0, 2)):
        found = ring.read(place, int(position_B[row]), 7)
        assert torch.equal(found.keys_BLRKH[0], cache.keys_BLRKH[row])
        assert torch.equal(found.values_BLRKH[0], cache.values_BLRKH[row])


def test_a_chunk_is_written_to_its_rows_alone():
    cache = KVCache(torch.zeros(1, 1, 4, 1, 2), torch.zeros(1, 1, 4, 1, 2))
    ring = KVRing.empty(cache, 3, 6, 4)
    place_B, position_B = torch.tensor([2, 0]), torch.tensor([5, 9])
    layer = ring.of_rows(place_B, position_B, read_slots=False, whole=False).layer(0)
    new = torch.arange(1.0, 9).view(2, 2, 1, 2)
    keys, values = joined(layer, new, -new)
    assert keys.shape == (2, 6, 1, 2)
    assert torch.equal(keys[0, [5, 0]], new[0]), "positions 5 and 6 of 6 columns"
    assert torch.equal(ring.keys[0][0, [3, 4]], new[1])
    assert torch.equal(values, -keys)
    assert not ring.keys[0][1].any()
    assert ring.keys[0].count_nonzero() == new.numel()


@pytest.mark.parametrize("variant", VARIANTS)
def test_decode_equals_the_pass_over_the_same_tokens(variant):
    """`Network.decode` is `Network.trunk` with rings: chunks of several lengths, all counts of accepted tokens, across
    openings and the end of the window."""
    model = build(variant)
    tokens = text(3, rows=2, length=60, documents=False)
    state = model.trunk(tokens[:, :5]).state
    drafts, window = 4, model.config.window
    columns = 80 if window is None else window + drafts

    def ring(cache):
        made = KVRing.empty(cache, 2, columns, window)
        made.load(torch.arange(2), cache, state.position_B)
        return made

    def changed(part, caches):
        return {
            name: caches(value) if isinstance(value, KVCache | KVRing) else value for name, value in vars(part).items()
        }

    def with_rings(value):
        ideas = {name: dataclasses.replace(part, **changed(part, ring)) for name, part in value.ideas.items()}
        return dataclasses.replace(value, stem=ring(value.stem), deep=ring(value.deep), ideas=ideas)

    rings, at, whole = with_rings(state), 5, torch.arange(2)
    generator = torch.Generator().manual_seed(1)

    def bound(part, position_B):
        def of_rows(each):
            return each.of_rows(whole, position_B, read_slots=False, whole=True)

        ideas = {name: dataclasses.replace(value, **changed(value, of_rows)) for name, value in part.ideas.items()}
        return dataclasses.replace(part, stem=of_rows(part.stem), deep=of_rows(part.deep), ideas=ideas)

    with torch.no_grad():
        while at < 30:
            phase = int(state.phase_B[0])
            room = model.config.segment - phase if any(idea.opens for idea in model.ideas.values()) else drafts + 1
            length = int(torch.randint(1, drafts + 2, (1,), generator=generator))
            count = int(torch.randint(1, min(length, room) + 1, (1,), generator=generator))
            chunk = tokens[:, at : at + length]
            expected = model.trunk(chunk[:, :count], state)
            got = model.decode(chunk, bound(rings, rings.position_B), Call(), opening=phase == 0)
            assert_close(expected.hidden, got.hidden[:, :count], f"{variant} at {at}")
            state, rings, at = expected.state, got.commit(torch.full((2,), count)), at + count
            for name in state.ideas.keys() | state.memory.parts.keys():
                mine, theirs = flatten(state.part(name)), flatten(rings.part(name))
                for key in mine.keys() & theirs.keys():
                    value = theirs[key]
                    assert_close(mine[key], value, f"{name}.{key} at {at}")


def test_a_state_with_rings_is_no_argument_of_a_pass():
    model = build("complete")
    state = fresh_state(model, 1)
    rings = dataclasses.replace(state, stem=KVRing.empty(state.stem, 1, 12, 8))
    with pytest.raises(Exception, match="state"):
        model(torch.tensor([[1]]), rings)
