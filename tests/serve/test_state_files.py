"""Conversations on disk: what is written comes back, and what is no conversation of this model does not."""

import dataclasses

import pytest
import torch

from lepton.errors import InputError
from lepton.serve.state_files import Notes, StateFiles
from tests.generate.models import PROMPT, lively
from tests.laws.lab import assert_states

NOTES = Notes("mine", "0f" * 16, created=1_700_000_000, turns=3, tokens=len(PROMPT))


@pytest.fixture
def files(model, tmp_path):
    return StateFiles(model, tmp_path / "kept")


@pytest.fixture(scope="module")
def state(model):
    with torch.no_grad():
        return model(torch.tensor([PROMPT])).state


def test_what_is_saved_is_found_by_the_next_server(files, model, state, tmp_path):
    files.save(NOTES, state)
    files.save(dataclasses.replace(NOTES, owner=""), state)
    again = StateFiles(model, tmp_path / "kept")
    assert sorted(each.owner for each in again.found()) == ["", NOTES.owner]
    assert NOTES in [*again.found()]
    assert_states(state, again.load(NOTES), "state")
    again.delete(NOTES)
    again.delete(NOTES)
    assert [each.owner for each in again.found()] == [""]
    with pytest.raises(InputError, match="no such file"):
        again.load(NOTES)


def test_names_of_files_tell_nothing(files):
    assert "mine" not in files.path(NOTES).name
    assert files.path(NOTES) != files.path(dataclasses.replace(NOTES, owner="aa"))
    assert files.path(NOTES) != files.path(dataclasses.replace(NOTES, id="other"))


def test_what_is_not_of_this_server_is_not_found(files, model, state):
    """Of other weights, under another name, damaged, or with notes that nobody has written."""
    files.save(NOTES, state)
    good = files.path(NOTES)
    assert [*files.found()] == [NOTES]
    good.with_name("other.safetensors").write_bytes(good.read_bytes())
    good.with_name("torn.safetensors").write_bytes(good.read_bytes()[:50])
    for i, changes in enumerate([{"id": "a/b"}, {"owner": "../x"}, {"turns": -1}, {"turns": 1.5}, {"id": 5}]):
        files.save(dataclasses.replace(NOTES, **{"id": f"x{i}"} | changes), state)
    assert [*files.found()] == [NOTES]
    assert [*StateFiles(lively("complete"), good.parent).found()] == []


def test_a_folder_that_cannot_be_used_is_named(model, tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(InputError, match="file: conversations cannot be kept there"):
        StateFiles(model, tmp_path / "file")


def test_a_download_can_be_uploaded_under_another_name(files, state):
    content = files.packed(NOTES, state)
    assert NOTES.owner.encode() not in content
    assert b"mine" not in content
    notes, again = files.unpacked(Notes("new", "", created=5), content)
    assert notes == Notes("new", "", created=5, turns=3, tokens=len(PROMPT))
    assert_states(state, again, "state")
    assert [*files.path(NOTES).parent.iterdir()] == [], "nothing is left behind"


def test_a_state_that_another_program_has_saved_can_be_uploaded(files, state, tmp_path):
    state.save(tmp_path / "x.safetensors")
    notes, _ = files.unpacked(Notes("new", "", created=5), (tmp_path / "x.safetensors").read_bytes())
    assert (notes.turns, notes.tokens) == (0, len(PROMPT))


def test_what_is_no_conversation_is_refused(files, model, state, tmp_path):
    new, content = Notes("new", "", created=5), files.packed(NOTES, state)
    path = tmp_path / "x.safetensors"

    def refused(content, message):
        with pytest.raises(InputError, match=message) as error:
            files.unpacked(new, content)
        assert str(tmp_path) not in str(error.value)

    for torn in (b"", b"x" * 100, content[:-1], content[:200]):
        refused(torn, "the file: not a whole safetensors file")
    refused(content[:-8] + bytes(8), "the file is damaged")
    state.memory.save(path)
    refused(path.read_bytes(), "not the state of this model")
    state.rows(torch.tensor([0, 0])).save(path)
    refused(path.read_bytes(), "holds 2 texts")
    model.new_state(1).rows(torch.tensor([], dtype=torch.int64)).save(path)
    refused(path.read_bytes(), "holds 0 texts")
    other = lively("complete")
    with torch.no_grad():
        other(torch.tensor([PROMPT])).state.save(path)
    refused(path.read_bytes(), "the file: made by other weights than this model's")
    huge = dataclasses.replace(state.deep, values_BLRKH=torch.full_like(state.deep.values_BLRKH, 1e308))
    dataclasses.replace(state, deep=huge).save(path)
    refused(path.read_bytes(), "numbers that this model cannot go on from")
