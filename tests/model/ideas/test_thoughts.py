"""Rounds of thinking: drawn for training, and the same for a row whatever its neighbours think."""

import pytest
import torch

from lepton.errors import InputError
from lepton.model.ideas.thoughts import (
    MAX_TRAINING_ROUNDS,
    TRAINING_ROUNDS,
    USUAL_ROUNDS,
    late_rows,
    training_rounds,
)
from tests.laws.lab import build, text


def test_rounds_may_differ_from_row_to_row():
    """A row's thoughts do not depend on what its neighbours think."""
    model, tokens = build("complete"), text(2, rows=4)
    mixed = model.trunk(tokens, think=torch.tensor([0, 1, 2, 4])).hidden
    for row, rounds in enumerate((0, 1, 2, 4)):
        alone = model.trunk(tokens[row : row + 1], think=rounds).hidden
        torch.testing.assert_close(mixed[row : row + 1], alone, rtol=0, atol=1e-9)


def test_training_draws_every_number_of_rounds_and_long_ones_for_few_rows():
    thoughts, generator = build("complete").thoughts, torch.Generator().manual_seed(0)
    drawn = [thoughts.rounds_in_training(16, generator) for _ in range(200)]
    assert set(torch.cat(drawn).tolist()) == set(TRAINING_ROUNDS)
    assert max(int((rounds > USUAL_ROUNDS).sum()) for rounds in drawn) == late_rows(16) == 2
    for rounds in drawn:
        thoughts.check_rounds(rounds)


@pytest.mark.parametrize(
    ("rounds", "message"),
    [
        ([MAX_TRAINING_ROUNDS + 1], "rounds of thinking 5"),
        ([-1], "rounds of thinking -1"),
        ([4] * 3 + [2] * 13, "rows that think for more than 2 rounds: 3"),
    ],
)
def test_rounds_that_training_has_no_room_for_are_refused(rounds, message):
    with pytest.raises(InputError, match=message):
        build("complete").thoughts.check_rounds(torch.tensor(rounds))


def test_the_rounds_that_are_computed_for_a_row():
    assert [late_rows(rows) for rows in (1, 8, 15, 16)] == [1, 1, 1, 2]
    assert training_rounds(1) == MAX_TRAINING_ROUNDS
    assert training_rounds(16) == USUAL_ROUNDS + 0.25


@torch.no_grad()
def test_without_rounds_nobody_sees_a_thought():
    model, tokens = build("complete"), text(1)
    group = model(tokens, think=0).state.part("thoughts").group
    assert not group.active_B.any()
    assert not group.states_BSD.any()
    assert model(tokens, think=1).state.part("thoughts").group.active_B.any()
