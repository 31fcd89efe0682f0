"""The result of a pass is plain data, and any prefix of its chunk can be committed."""

import pickle

import pytest
import torch

from lepton.errors import InputError
from tests.laws.lab import assert_states, build, text, views

LENGTH = 30


@pytest.fixture(scope="module")
def passed():
    """A model, tokens, the state before them, and the output."""
    model, tokens = build("complete"), text(1, length=LENGTH)
    with torch.no_grad():
        past = model(text(2, length=20)).state
        return model, tokens, past, model(tokens, past)


@torch.no_grad()
def test_the_state_after_a_prefix_is_that_of_reading_it(passed):
    model, tokens, past, out = passed
    assert_states(past, out.commit(torch.tensor([0, 0])), "nothing read")
    assert_states(out.state, out.commit(torch.tensor([LENGTH, LENGTH])), "all read")
    found = out.commit(torch.tensor([7, 23]))
    for row, count in enumerate((7, 23)):
        one = torch.tensor([row])
        expected = model(tokens[row : row + 1, :count], past.rows(one)).state
        assert_states(expected, found.rows(one), f"row {row}")


@torch.no_grad()
def test_padding_is_not_read(passed):
    model, tokens, past, out = passed
    padded = model(tokens, past, lengths=torch.tensor([7, LENGTH]))
    assert_states(out.commit(torch.tensor([7, LENGTH])), padded.state, "right padding")


def test_it_survives_pickling(passed):
    out = passed[3]
    again = pickle.loads(pickle.dumps(out))
    assert views(out).keys() == views(again).keys()
    assert all(torch.equal(value, views(again)[name]) for name, value in views(out).items())
    counts = torch.tensor([3, LENGTH])
    assert_states(out.commit(counts), again.commit(counts), "pickled")


@pytest.mark.parametrize("counts", [[1], [1, LENGTH + 1], [-1, 1]])
def test_counts_that_fit_no_chunk_are_refused(passed, counts):
    with pytest.raises(InputError, match=r"a count for each of 2 rows|counts must lie in 0\.\.30"):
        passed[3].commit(torch.tensor(counts))
