"""Figures of generation from the steps that were counted."""

from lepton.engine.stats import Stats


def test_nothing_counted_is_zero():
    stats = Stats()
    assert (stats.tokens_per_step, stats.acceptance, stats.mean_depth) == (0.0, [], 0.0)


def test_shares_of_the_first_second_and_later_drafts():
    stats = Stats()
    stats.add_steps([(3, 4, 2), (1, 4, 0), (1, 4, 0), (1, 0, 0), (0, 4, 4)])
    stats.add_steps([(2, 1, 1)])
    assert stats.drafted == [4, 3, 3, 3]
    assert stats.accepted == [2, 1, 0, 0]
    assert stats.acceptance == [2 / 4, 1 / 3, 0, 0]
    assert stats.tokens_per_step == 8 / 5


def test_the_figures_for_people_are_rounded():
    stats = Stats(forward_calls=5, new_tokens=7, positions=3, blocks=10)
    stats.add_steps([(2, 3, 1)])
    assert stats.to_dict() == {
        "new_tokens": 7,
        "forward_calls": 5,
        "tokens_per_step": 2.0,
        "acceptance": [1.0, 0.0, 0.0],
        "mean_depth": 3.333,
    }
