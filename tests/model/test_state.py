"""A state as a value: its tensors by name, some of its rows, several states as one."""

import gc
import weakref

import pytest
import torch
from safetensors import safe_open

from lepton.errors import InputError
from lepton.model.state import State, flatten, rebuild
from tests.laws.lab import assert_states, build, text


def state_of(variant, rows=3, length=30, seed=1):
    with torch.no_grad():
        return build(variant)(text(seed, rows=rows, length=length, documents=False)).state


@pytest.mark.parametrize("variant", ["complete", "dense"])
def test_a_state_is_its_tensors(variant):
    state = state_of(variant)
    names = []
    again = rebuild(state, lambda name, value: names.append(name) or value.clone())
    assert_states(state, again, "rebuilt")
    found = flatten(state)
    assert names == [*found]
    assert {"position_B", "stem.keys_BLRKH", "deep.values_BLRKH"} <= found.keys()
    assert state.nbytes == sum(value.numel() * value.itemsize for value in found.values())


def test_what_an_idea_keeps_is_found_by_its_name():
    state = state_of("complete")
    assert state.part("memory") is state.memory.parts["memory"], "it outlives the window"
    assert state.part("thoughts") is state.ideas["thoughts"]
    assert state.part("peek") is None


@pytest.mark.parametrize("variant", ["complete", "dense"])
def test_rows_in_any_order_and_joined_again(variant):
    state = state_of(variant)
    picked = state.rows(torch.tensor([2, 0, 2]))
    assert picked.batch_size == 3
    for place, row in enumerate((2, 0, 2)):
        one = torch.tensor([place])
        assert_states(state.rows(torch.tensor([row])), picked.rows(one), f"row {row}")
    assert_states(state, State.join([state.rows(torch.tensor([0])), state.rows(torch.tensor([1, 2]))]), "joined")
    with pytest.raises(InputError, match="rows of a state of 3"):
        state.rows(torch.tensor([3]))


def test_rows_of_several_lengths_join_at_their_ends():
    """Without a window a longer text has more entries; those of the shorter one stay the newest."""
    long, short = state_of("dense", rows=1, length=30), state_of("dense", rows=1, length=10, seed=2)
    joined = State.join([long, short])
    assert joined.deep.entries == 30
    assert torch.equal(joined.deep.keys_BLRKH[1, :, 20:], short.deep.keys_BLRKH[0])
    assert not joined.deep.keys_BLRKH[1, :, :20].any()
    model, more = build("dense"), text(3, rows=2, length=5, documents=False)
    with torch.no_grad():
        both = model(more, joined).logits
        alone = torch.cat([model(more[:1], long).logits, model(more[1:], short).logits])
    torch.testing.assert_close(both, alone, rtol=0, atol=1e-9)


def test_a_file_keeps_notes_and_is_read_as_without(tmp_path):
    state = state_of("complete", rows=1)
    state.save(tmp_path / "x", notes={"from": "me", "kind": "other"})
    with safe_open(tmp_path / "x", framework="pt") as file:
        assert (file.metadata()["from"], file.metadata()["kind"]) == ("me", "state")
    assert_states(state, build("complete").load_state(tmp_path / "x"), "state")


def test_a_state_goes_to_a_device():
    """There it shares what is there already; where nothing has values, it has shapes alone."""
    state = state_of("complete")
    assert flatten(state.to("cpu"))["stem.keys_BLRKH"] is flatten(state)["stem.keys_BLRKH"]
    moved = flatten(state.to("meta"))
    assert {name: value.shape for name, value in moved.items()} == {
        name: value.shape for name, value in flatten(state).items()
    }
    assert all(value.is_meta for value in moved.values())


def test_an_old_state_is_gone_with_its_last_name():
    """Not when Python next looks for cycles: on a GPU that may be too late."""
    state = state_of("complete")
    gc.disable()
    try:
        parts = [state.rows(torch.tensor([row])) for row in range(3)]
        joined = State.join(parts).to("cpu")
        old = [weakref.ref(value) for each in (*parts, joined) for value in flatten(each).values()]
        del parts, joined
        assert [each() for each in old if each() is not None] == []
    finally:
        gc.enable()
