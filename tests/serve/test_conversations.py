"""What is kept of conversations: few in memory, the others on disk, and one change of each at a time."""

import asyncio
import contextlib
import functools

import pytest
import torch

from lepton.errors import InputError
from lepton.serve.conversations import Conversations
from lepton.serve.limits import Refusal
from lepton.serve.state_files import StateFiles
from tests.laws.lab import assert_states


def state_of(model, *ids):
    with torch.no_grad():
        return model(torch.tensor([ids])).state


def running(test):
    """Run a test that is a coroutine."""

    @functools.wraps(test)
    def run(*arguments, **fixtures):
        asyncio.run(test(*arguments, **fixtures))

    return run


async def opened(model, **options):
    found = Conversations(model, **{"in_memory": 2, "most": 5} | options)
    await found.open()
    return found


@contextlib.contextmanager
def refused(status, code):
    with pytest.raises(Refusal) as refusal:
        yield
    assert (refusal.value.status, refusal.value.code) == (status, code)


async def turn(kept, name, state, owner=""):
    async with kept.change(owner, name, create=True) as found:
        kept.commit(found, state, turns=1)


@running
async def test_the_least_recently_used_go_to_disk_and_come_back(model, tmp_path):
    kept = await opened(model, folder=tmp_path)
    states = {name: state_of(model, i, 5, 6) for i, name in enumerate("abcd")}
    for name, state in states.items():
        await turn(kept, name, state)
    assert (kept.count, kept.in_memory) == (4, 2)
    assert [kept.find("", name).state is None for name in "abcd"] == [True, True, False, False]
    assert len([*tmp_path.iterdir()]) == 2
    assert_states(states["a"], await kept.load(kept.find("", "a")), "a")
    assert [kept.find("", name).state is None for name in "abcd"] == [False, True, True, False]
    for name, state in states.items():
        assert_states(state, await kept.load(kept.find("", name)), name)
    assert kept.in_memory == 2
    await kept.close()


@running
async def test_what_has_not_changed_is_not_written_again(model, tmp_path, monkeypatch):
    kept, saved, save = await opened(model, in_memory=1, folder=tmp_path), [], StateFiles.save
    monkeypatch.setattr(
        StateFiles, "save", lambda self, notes, state: (saved.append(notes.id), save(self, notes, state))
    )
    for name in ("a", "b", "a", "b"):
        if name in saved:
            await kept.load(kept.find("", name))
        else:
            await turn(kept, name, state_of(model, 1, 2))
    assert saved == ["a", "b"]
    await turn(kept, "a", state_of(model, 3, 4))
    await kept.close()
    assert saved == ["a", "b", "a"]


@running
async def test_a_folder_outlives_the_server(model, tmp_path):
    kept, state = await opened(model, folder=tmp_path), state_of(model, 7, 8, 9)
    await turn(kept, "a", state, owner="0f")
    kept.create("", "nothing was said")
    await kept.close()
    again = await opened(model, folder=tmp_path)
    (found,) = again.of("0f")
    assert (again.count, found.to_dict()["tokens"], found.to_dict()["turns"]) == (1, 3, 1)
    assert_states(state, await again.load(found), "state")
    await again.delete("0f", "a")
    assert (again.count, [*tmp_path.iterdir()]) == (0, [])
    await again.close()


@running
async def test_a_folder_of_its_own_ends_with_the_server(model):
    kept = await opened(model, in_memory=1)
    for name in "ab":
        await turn(kept, name, state_of(model, 1, 2))
    folder = kept.files.path(kept.find("", "a").notes).parent
    assert len([*folder.iterdir()]) == 1
    await kept.close()
    assert not folder.exists()


@running
async def test_one_change_at_a_time(model):
    kept = await opened(model)
    await turn(kept, "a", state_of(model, 1, 2))
    async with kept.change("", "a") as found:
        with refused(409, "conversation_busy"):
            async with kept.change("", "a"):
                pass
        with refused(409, "conversation_busy"):
            await kept.delete("", "a")
        assert await kept.load(found) is found.state, "it may be read"
        async with kept.change("other", "a", create=True):
            pass
        kept.commit(found, state_of(model, 1, 2, 3), turns=1)
        async with kept.change("", "a"):  # what was committed is over
            assert found.changing
            with refused(409, "conversation_busy"):
                await kept.delete("", "a")
    assert (found.notes.turns, found.notes.tokens, found.changing) == (2, 3, False)
    await kept.close()


@running
async def test_what_fails_changes_nothing(model):
    kept = await opened(model)
    state = state_of(model, 1, 2)
    await turn(kept, "a", state)
    for name in ("a", "new"):
        with pytest.raises(ZeroDivisionError):
            async with kept.change("", name, create=True):
                raise ZeroDivisionError
    assert [each.notes.id for each in kept.of("")] == ["a"]
    assert (await kept.load(kept.find("", "a")), kept.find("", "a").changing) == (state, False)
    empty = kept.create("", "begun")
    with pytest.raises(ZeroDivisionError):
        async with kept.change("", "begun", create=True):
            raise ZeroDivisionError
    assert kept.find("", "begun") is empty
    await kept.close()


@running
async def test_states_in_use_stay_in_memory(model):
    kept = await opened(model, in_memory=1)
    async with kept.change("", "a", create=True) as first, kept.change("", "b", create=True) as second:
        kept.commit(first, state_of(model, 1), turns=1)
        kept.commit(second, state_of(model, 2), turns=1)
        assert kept.in_memory == 2
    await turn(kept, "c", state_of(model, 3))
    assert kept.in_memory == 1
    await kept.close()


@running
async def test_ids_are_drawn_or_chosen(model):
    kept = await opened(model)
    given = [kept.create("").notes.id for _ in range(2)]
    assert len({*given}) == 2
    assert all(name.startswith("conv_") for name in given)
    kept.create("", "chosen")
    with refused(409, "conversation_exists"):
        kept.create("", given[0])
    for name in ("chosen", given[0]):
        assert kept.find("", name)
    with refused(404, "conversation_not_found"):
        async with kept.change("", "conv_ff", create=True):
            pass
    with refused(404, "conversation_not_found"):
        kept.find("other", "chosen")
    await kept.close()


@running
async def test_an_owner_has_so_many_and_no_more(model):
    kept = await opened(model, most=2)
    for owner in ("", "other"):
        kept.create(owner, "a")
        kept.create(owner)
        with refused(429, "too_many_conversations"):
            await turn(kept, "b", state_of(model, 1), owner=owner)
    await kept.delete("", "a")
    kept.create("")
    await kept.close()


@running
async def test_a_file_that_is_gone_is_told_and_can_be_deleted(model, tmp_path):
    kept = await opened(model, in_memory=1, folder=tmp_path)
    for name in "ab":
        await turn(kept, name, state_of(model, 1, 2))
    kept.files.path(kept.find("", "a").notes).write_bytes(b"x")
    with refused(410, "conversation_lost"):
        await kept.load(kept.find("", "a"))
    with refused(410, "conversation_lost"):
        async with kept.change("", "a"):
            pass
    await kept.delete("", "a")
    assert [each.notes.id for each in kept.of("")] == ["b"]
    await kept.close()


@running
async def test_where_nothing_can_be_written_a_new_turn_is_refused_and_nothing_is_lost(model, tmp_path, monkeypatch):
    def failing(self, notes, state):
        raise InputError("no space left")

    kept, state = await opened(model, in_memory=1, folder=tmp_path), state_of(model, 1, 2)
    await turn(kept, "a", state)
    with monkeypatch.context() as patch:
        patch.setattr(StateFiles, "save", failing)
        with refused(503, "cannot_keep"):
            await turn(kept, "b", state)
        assert await kept.load(kept.find("", "a")) is state
        await kept.close()
    await turn(kept, "b", state)
    assert len([*tmp_path.iterdir()]) == 1
    await kept.close()


@running
async def test_many_at_once_over_one_place(model):
    """Each gets its own state back, however they take turns on disk."""
    kept = await opened(model, in_memory=1, most=50)
    states = {str(i): state_of(model, *range(i + 1)) for i in range(12)}

    async def several(name, state):
        await turn(kept, name, state)
        for _ in range(3):
            assert_states(state, await kept.load(kept.find("", name)), name)
            async with kept.change("", name) as found:
                assert_states(state, found.state, name)
                kept.commit(found, found.state, turns=1)

    await asyncio.gather(*(several(*item) for item in states.items()))
    assert [each.notes.turns for each in kept.of("")] == [4] * 12
    await turn(kept, "last", state_of(model, 1))
    assert kept.in_memory == 1
    await kept.close()
