"""Rounds of thinking: drawn for training, and the same for a row whatever its neighbours think."""

import itertools

import pytest
import torch

from lepton.errors import InputError
from lepton.model.ideas.thoughts import ThoughtsConfig, late_rows
from tests.laws.lab import build, text

VARIANTS = ("complete", "over tokens")


@pytest.mark.parametrize("variant", VARIANTS)
def test_rounds_may_differ_from_row_to_row(variant):
    """A row's thoughts do not depend on what its neighbours think."""
    model, tokens = build(variant), text(2, rows=4)
    mixed = model.trunk(tokens, think=torch.tensor([0, 1, 2, 4])).hidden
    for row, rounds in enumerate((0, 1, 2, 4)):
        alone = model.trunk(tokens[row : row + 1], think=rounds).hidden
        torch.testing.assert_close(mixed[row : row + 1], alone, rtol=0, atol=1e-9)


def test_training_draws_every_number_of_rounds_and_long_ones_for_few_rows():
    thoughts, generator = build("complete").thoughts, torch.Generator().manual_seed(0)
    drawn = [thoughts.rounds_in_training(16, generator) for _ in range(200)]
    assert set(torch.cat(drawn).tolist()) == {0, 1, ThoughtsConfig.rounds, ThoughtsConfig.most_rounds}
    assert max(int((rounds > ThoughtsConfig.rounds).sum()) for rounds in drawn) == late_rows(16) == 2
    for rounds in drawn:
        thoughts.check_rounds(rounds)


@pytest.mark.parametrize(
    ("rounds", "message"),
    [
        ([ThoughtsConfig.most_rounds + 1], "rounds of thinking 5"),
        ([-1], "rounds of thinking -1"),
        ([4] * 3 + [2] * 13, "rows that think for more than 2 rounds: 3"),
    ],
)
def test_rounds_that_training_has_no_room_for_are_refused(rounds, message):
    with pytest.raises(InputError, match=message):
        build("complete").thoughts.check_rounds(torch.tensor(rounds))


def test_the_rounds_that_are_computed_for_a_row():
    assert [late_rows(rows) for rows in (1, 8, 15, 16)] == [1, 1, 1, 2]
    thoughts = build("complete").thoughts
    assert thoughts.think_in_training(1) == ThoughtsConfig.most_rounds
    assert thoughts.think_in_training(16) == ThoughtsConfig.rounds + 0.25


@torch.no_grad()
def test_the_rounds_may_change_from_chunk_to_chunk():
    """A token keeps keys and values for every round, whatever its own number was."""
    model, tokens = build("over tokens"), text(3)
    whole = model.trunk(tokens[:, :50], think=4)
    for think in (0, 1, 3):
        first = model.trunk(tokens[:, :30], think=think)
        then = model.trunk(tokens[:, 30:50], first.state, think=4).hidden
        alike = torch.equal(then, whole.hidden[:, 30:])
        assert then.isfinite().all()
        assert not alike, "earlier tokens have thought less"
        state, single = model.trunk(tokens[:, :30], think=think).state, []
        for t in range(30, 50):
            out = model.trunk(tokens[:, t : t + 1], state, think=4)
            state = out.state
            single.append(out.hidden)
        torch.testing.assert_close(torch.cat(single, 1), then, rtol=0, atol=1e-9)


def test_more_rounds_than_there_are_states_of_are_refused():
    with pytest.raises(InputError, match=r"think=5: this model keeps the states of 4 rounds; give at most 4"):
        build("over tokens")(text(1), think=5)
    with pytest.raises(InputError, match=r"thoughts\.rounds=5: must be at most most_rounds=4"):
        build("over tokens", rounds=5)


def test_each_round_moves_the_tokens():
    model, tokens = build("over tokens"), text(1)
    hidden = [model.trunk(tokens, think=think).flow.h_BTD for think in range(5)]
    for before, after in itertools.pairwise(hidden):
        assert (before - after).abs().amax(-1).min() > 1e-6


@torch.no_grad()
def test_without_rounds_nobody_sees_a_thought():
    model, tokens = build("complete"), text(1)
    group = model(tokens, think=0).state.part("thoughts").group
    assert not group.active_B.any()
    assert not group.states_BSD.any()
    assert model(tokens, think=1).state.part("thoughts").group.active_B.any()
