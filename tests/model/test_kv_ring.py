"""Rings: keys and values by position, whatever is rejected or overwritten."""

import dataclasses

import pytest
import torch

from lepton.model.fresh_state import fresh_state
from lepton.model.ideas.idea import Call
from lepton.model.kv_cache import KVCache
from lepton.model.kv_ring import KVRing, RingWindow, joined
from lepton.model.state import State, flatten
from lepton.ops.products import PRODUCTS
from lepton.ops.ring_attention import RING_ATTENTION
from tests.laws.lab import VARIANTS, assert_close, build, text
from tests.ops.devices import CPU_MARK, force


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


def rings_of(state, columns, config):
    """The state with rings in place of caches, and a function that binds them to all rows."""
    whole = torch.arange(state.batch_size)

    def ring(cache):
        is_wide = cache is state.wide
        more = config.wide_window - config.window if is_wide else 0
        made = KVRing.empty(cache, len(whole), columns + more, config.wide_window if is_wide else config.window)
        made.load(whole, cache, state.position_B)
        return made

    def changed(part, caches):
        found = {name: caches(value) for name, value in vars(part).items() if isinstance(value, KVCache | KVRing)}
        return dataclasses.replace(part, **found)

    def through(value, caches):
        ideas = {name: changed(part, caches) for name, part in value.ideas.items()}
        return dataclasses.replace(changed(value, caches), ideas=ideas)

    def bound(value):
        position_B = value.position_B
        return through(value, lambda each: each.of_rows(whole, position_B, read_slots=False, whole=True))

    return through(state, ring), bound


def compare_with_passes(model, call, until, **options):
    """Decode two rows in chunks of several lengths, with any count of accepted tokens, across openings and the end of
    the window; compare hidden states, depths and states with passes over each row. `options` are those of the rows."""
    tokens = text(3, rows=2, length=60, documents=False)
    rows = [{name: values[row] for name, values in options.items()} for row in range(2)]
    states = [model.trunk(tokens[row : row + 1, :5], **rows[row]).state for row in range(2)]
    drafts, remembered = 4, model.config.remembered
    columns = 80 if remembered is None else remembered + 1 + drafts
    rings, bound = rings_of(State.join(states), columns, model.config)
    generator, at, found = torch.Generator().manual_seed(1), 5, []
    with torch.no_grad():
        while at < until:
            phase = int(states[0].phase_B)
            room = model.config.segment - phase if any(idea.opens for idea in model.ideas.values()) else drafts + 1
            length = int(torch.randint(1, drafts + 2, (1,), generator=generator))
            count = int(torch.randint(1, min(length, room) + 1, (1,), generator=generator))
            chunk = tokens[:, at : at + length]
            got = model.decode(chunk, bound(rings), call, opening=phase == 0)
            outs = [
                model.trunk(chunk[row : row + 1, :count], states[row], **options) for row, options in enumerate(rows)
            ]
            assert_close(torch.cat([out.hidden for out in outs]), got.hidden[:, :count], f"hidden at {at}")
            found.append(got.depth[:, :count])
            assert_close(torch.cat([out.depth for out in outs]), found[-1], f"depth at {at}")
            states, rings, at = [out.state for out in outs], got.commit(torch.full((2,), count)), at + count
            state = State.join(states)
            for name in state.ideas.keys() | state.memory.parts.keys():
                mine, theirs = flatten(state.part(name)), flatten(rings.part(name))
                for key in mine.keys() & theirs.keys():
                    assert_close(mine[key], theirs[key], f"{name}.{key} at {at}")
    return torch.cat(found, 1)


@pytest.mark.parametrize("variant", VARIANTS)
def test_decode_equals_the_pass_over_the_same_tokens(variant):
    compare_with_passes(build(variant), Call(), 30)


@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("depths", [(0.5, 0.25), (0.75, 0.0), (1.0, 0.5)])
def test_decode_with_depths_equals_the_pass_over_the_same_tokens(depths, static):
    """Of rows with different ones: tokens that skip the deep blocks are left out, or masked where shapes are static."""
    call = Call(torch.tensor(depths, dtype=torch.float64), static=static)
    blocks = compare_with_passes(build("complete"), call, 50, depth=depths)
    for depth, row in zip(depths, blocks, strict=True):
        assert len(row.unique()) == (2 if 0 < depth < 1 else 1)


@CPU_MARK
def test_the_kernels_for_a_few_tokens_skip_the_same(monkeypatch):
    from lepton.ops.triton import products as kernels

    for kernel in (PRODUCTS, RING_ATTENTION):
        force(monkeypatch, kernel)
    monkeypatch.setattr(kernels, "FEW", ((16, 0, kernels.MOST, kernels.Tile(16, 64, 32, 1, 4, 2)),))
    depths = (0.5, 0.25)
    call = Call(torch.tensor(depths, dtype=torch.float64), static=True)
    compare_with_passes(build("complete", dtype=torch.float32), call, 9, depth=depths)


def test_a_state_with_rings_is_no_argument_of_a_pass():
    model = build("complete")
    state = fresh_state(model, 1)
    rings = dataclasses.replace(state, stem=KVRing.empty(state.stem, 1, 12, 8))
    with pytest.raises(Exception, match="state"):
        model(torch.tensor([[1]]), rings)
