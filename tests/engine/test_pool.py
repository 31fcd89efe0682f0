"""The pool: rows in, rows out, and keys and values of slots that are kept."""

import gc
import weakref

import pytest
import torch

from lepton.engine.options import GenerationOptions
from lepton.engine.pool import Held, Pool, leaves
from lepton.engine.prefill import read_prompts
from lepton.engine.runner import Runner
from lepton.engine.sequence import Sequence
from tests.generate.models import BATCH, lively
from tests.laws.lab import VARIANTS, assert_states


def loaded(model, places):
    runner = Runner(model, places, 80)
    options = GenerationOptions(temperature=0.5, think=0)
    sequences = [Sequence(prompt, options, stops=[[0]], stream=(7, row)) for row, prompt in enumerate(BATCH)]
    read = read_prompts(model, BATCH, None, depth=1, think=0)
    place_B = torch.tensor([3, 0, 5, 1])
    with torch.no_grad():
        runner.pool.load(place_B, Held(read.state, runner._rows(sequences, read.seen_BF)))
    return runner.pool, place_B, read.state


@pytest.mark.parametrize("variant", VARIANTS)
def test_what_is_loaded_is_read(variant):
    model = lively(variant)
    pool, place_B, state = loaded(model, 6)
    for row, place in enumerate(place_B.tolist()):
        assert_states(state.rows(torch.tensor([row])), pool.read(place, model), f"row {row}")


def test_taken_rows_are_in_order_and_put_back():
    model = lively("complete")
    pool, _, _ = loaded(model, 6)
    some = torch.tensor([0, 3])
    before = [value.clone() for value in pool.tensors()]
    taken = pool.take(some, read_slots=True, whole=False)
    assert taken.rows.stream_B2.tolist() == [[7, 1], [7, 0]]
    others = [each.nan_to_num(posinf=5.0) + 1 for each in leaves(taken.rows)]
    changed = Held(taken.state, Held(taken.state, taken.rows).rows.__class__(*others))
    pool.put(some, taken, changed)
    again = pool.take(some, read_slots=True, whole=False)
    for other, new in zip(others, leaves(again.rows), strict=True):
        assert torch.equal(other, new)
    changed_tensors = [i for i, (a, b) in enumerate(zip(before, pool.tensors(), strict=True)) if not torch.equal(a, b)]
    assert len(changed_tensors) == len(leaves(taken.rows)), "nothing else has changed"
    other = pool.take(torch.tensor([1]), read_slots=True, whole=False)
    assert other.rows.stream_B2.tolist() == [[7, 3]]


def test_tensors_can_be_exchanged():
    model = lively("complete")
    pool = Pool(model, 2, 12)
    own = pool.tensors()
    others = [value.clone() for value in own]
    with pool.holding(others):
        assert all(a is b for a, b in zip(pool.tensors(), others, strict=True))
        assert pool.held.state.deep.window == model.config.window
    assert all(a is b for a, b in zip(pool.tensors(), own, strict=True))
    assert pool.nbytes == sum(value.nbytes for value in own)


def test_bytes_do_not_depend_on_what_was_read():
    model = lively("complete")
    assert Pool(model, 4, 12).nbytes == 2 * Pool(model, 2, 12).nbytes


def test_kept_slots_are_those_that_the_blocks_would_compute():
    model = lively("complete")
    pool, place_B, state = loaded(model, 6)
    with torch.no_grad():
        pool.keep_slots(model, place_B, state)
        states, bias = model.lasting_slots(state)
        assert model.config.wide_layers == (False, True)
        for block, (kept,) in zip(model.blocks, (pool.held.state.deep.slots, pool.held.state.wide.slots), strict=True):
            for mine, expected in zip(kept, block.attention.key_value(states, None, bias), strict=True):
                assert torch.equal(mine[place_B], expected)


def test_a_model_without_slots_keeps_none():
    assert not Pool(lively("dense"), 1, 12).keeps_slots
    assert Pool(lively("no thoughts"), 1, 12).keeps_slots


def test_rows_that_were_taken_are_gone_with_their_last_name():
    """Not when Python next looks for cycles."""
    pool, place_B, _ = loaded(lively("complete"), 6)
    gc.disable()
    try:
        old = [weakref.ref(value) for value in leaves(pool.take(place_B, read_slots=True, whole=False))]
        assert len(old) > 10
        assert [each() for each in old if each() is not None] == []
    finally:
        gc.enable()
