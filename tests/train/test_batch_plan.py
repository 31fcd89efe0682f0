import pytest
import torch

from lepton.errors import InputError
from lepton.model.ideas.thoughts import ThoughtsConfig, late_rows
from lepton.train.batch_plan import draw_served, plan_batch, plan_step
from tests.laws.lab import build, text


@pytest.mark.parametrize("rows", [1, 4, 64])
def test_no_batch_wants_more_late_rounds_than_there_is_room_for(rows):
    model, tokens, seen = build("complete"), text(1, rows=rows), set()
    for step in range(200):
        rounds_B, groups = plan_batch(model, tokens, 0, step, 0)
        assert (rounds_B > ThoughtsConfig.rounds).sum() <= late_rows(rows)
        again_B, again = plan_batch(model, tokens, 0, step, 0)
        assert torch.equal(rounds_B, again_B)
        assert groups == again
        seen |= set(rounds_B.tolist())
    assert seen == {0, 1, ThoughtsConfig.rounds, ThoughtsConfig.most_rounds}


@pytest.mark.parametrize("seed", [20241126130100, 2**63, 2**64 - 1])
def test_every_seed_of_64_bits_plans(seed):
    model, tokens = build("complete"), text(1, rows=4)
    rounds = [plan_batch(model, tokens, seed, step, 1)[0].tolist() for step in range(40)]
    assert rounds == [plan_batch(model, tokens, seed, step, 1)[0].tolist() for step in range(40)]
    assert len(set(map(tuple, rounds))) > 1


def test_a_plan_has_all_that_is_drawn():
    model, tokens = build("complete", router={"served": 0.5}), text(1, rows=4)
    think, groups, step = plan_step(model, tokens, 7, 3, 1, scale=0.25)
    expected, bound = plan_batch(model, tokens, 7, 3, 1)
    assert torch.equal(think, expected)
    assert (groups, step.rate) == (bound, 0.25)
    assert torch.equal(step.served_BT, draw_served(model, tokens, 7, 3, 1))
    assert 0 < step.served_BT.double().mean() < 1


def test_a_plan_counts_the_segments_that_a_batch_marks():
    model, tokens = build("complete"), text(1)
    opens = torch.zeros_like(tokens[:, :-1], dtype=torch.bool)
    opens[:, ::2] = True
    usual, marked = (plan_step(model, tokens, 0, 0, 0, opens_BT=each).groups for each in (None, opens))
    assert usual < opens.sum(1).max() <= marked


def test_a_bound_on_segments_is_at_most_the_tokens_of_a_row():
    model = build("complete")
    tokens = torch.full((1, 49), model.config.eos_id)  # each of 48 begins a document, and so a segment
    groups = plan_step(model, tokens, 0, 0, 0).groups
    assert groups == 48
    with torch.no_grad():
        assert model.loss(tokens, groups=groups).loss.isfinite()


@pytest.mark.parametrize("place", range(4))
def test_rows_think_as_long_as_they_want_to(place):
    """Together as each alone, the one that thinks for long in any place."""
    model, tokens = build("complete"), text(1, rows=4)
    rounds = [0, 1, 2]
    rounds.insert(place, 4)
    together = model.trunk(tokens, think=torch.tensor(rounds)).hidden
    for row, think in enumerate(rounds):
        alone = model.trunk(tokens[row : row + 1], think=think).hidden
        torch.testing.assert_close(together[row : row + 1], alone, rtol=0, atol=1e-9)


@pytest.mark.parametrize(
    ("rounds", "message"),
    [
        ([3, 3, 0, 0], "rows that think for more than 2 rounds: 2: must lie in 0..1"),
        ([0, 5, 0, 0], "rounds of thinking 5: must lie in 0..4"),
        ([0, -1, 0, 0], "rounds of thinking -1: must lie in 0..4"),
        ([1, 2], "one number of rounds for each of 4 rows"),
    ],
)
def test_rounds_that_there_is_no_room_for_are_refused(rounds, message):
    with pytest.raises(InputError, match=message):
        build("complete").loss(text(1, rows=4), think=torch.tensor(rounds))
