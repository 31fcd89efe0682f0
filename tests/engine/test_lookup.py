"""Drafts by lookup: against a loop over the text, and in the engine."""

import pytest
import torch

from lepton.engine.lookup import NOTHING, REMEMBERED, appended, looked_up, remembered
from tests.engine.repeats import found_by_loop

CPU = torch.device("cpu")
OWN = 77
"""What the cell drafts."""
NEVER = 0


def proposals(text, drafts=4):
    return looked_up(remembered([text], CPU), torch.full((1, drafts), OWN), NEVER)[0].tolist()


def by_loop(text, drafts):
    return found_by_loop(text, drafts, NEVER) or [OWN] * drafts


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ([5, 1, 2, 3, 4, 9, 8, 1, 2, 3, 4], [9, 8, 1, 2]),
        ([1, 2, 3, 4, 6, 1, 2, 3, 4, 7, 8, 9, 6, 1, 2, 3, 4], [7, 8, 9, 6]),  # the latest place counts
        ([1, 2, 1, 2, 1, 2], [1, 2, 1, 2]),  # a circle goes on
        ([3] * 5, [3] * 4),
        ([3] * 4, [OWN] * 4),  # nothing but the newest tokens themselves
        ([1, 2, 3, 9, 1, 2, 3], [OWN] * 4),  # three tokens are too few
        ([3, 3], [OWN] * 4),  # the places before the text are no tokens
        ([7, 1, 2, 3, 4, NEVER, 5, 1, 2, 3, 4], [OWN] * 4),
    ],
)
def test_by_hand(text, expected):
    assert proposals(text) == expected == by_loop(text, 4)


def test_against_a_loop():
    generator = torch.Generator().manual_seed(0)
    texts = [torch.randint(0, 3, (n,), generator=generator).tolist() for n in (1, 4, 9, 40, 300, 1500)]
    for drafts in (1, 2, 4, 7):
        assert [proposals(text, drafts) for text in texts] == [by_loop(text, drafts) for text in texts]
    alone = torch.cat([looked_up(remembered([text], CPU), torch.full((1, 4), OWN), NEVER) for text in texts])
    assert torch.equal(looked_up(remembered(texts, CPU), torch.full((6, 4), OWN), NEVER), alone)


def test_only_the_newest_tokens_are_remembered():
    text = list(range(1, REMEMBERED + 9))
    assert remembered([text], CPU)[0].tolist() == text[8:]
    assert remembered([[4, 5]], CPU)[0].tolist() == [NOTHING] * (REMEMBERED - 2) + [4, 5]
    assert proposals([1, 2, 3, 4, *range(10, REMEMBERED + 2), 1, 2, 3, 4]) == [10, 11, 12, 13]
    assert proposals([1, 2, 3, 4, *range(10, REMEMBERED + 3), 1, 2, 3, 4]) == [OWN] * 4


def test_appended():
    before = remembered([[1, 2], [3], [4, 5, 6]], CPU)
    after = appended(before, torch.tensor([[7, 8], [7, 8], [7, 8]]), torch.tensor([2, 1, 0]))
    assert after.dtype == before.dtype
    assert torch.equal(after, remembered([[1, 2, 7, 8], [3, 7], [4, 5, 6]], CPU))
