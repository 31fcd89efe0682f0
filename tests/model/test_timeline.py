"""Positions, documents and segments against a loop over tokens."""

import pytest
import torch

from lepton.errors import InputError
from lepton.model.timeline import Timeline
from tests.laws.lab import EOS

SEGMENT, LENGTH = 4, 40


def walk(tokens, opens, position, phase):
    """Place each token of a row; return positions, segment ordinals, openings, and position and phase after each."""
    places, groups, openings, after = [], [], [], [(position, phase)]
    for t, token in enumerate(tokens):
        if opens[t]:
            phase = 0
        if phase == 0:
            openings.append(t)
        places.append(position)
        groups.append(len(openings))
        position, phase = (0, 0) if token == EOS else (position + 1, (phase + 1) % SEGMENT)
        after.append((position, phase))
    return places, groups, openings, after


@pytest.mark.parametrize("seed", range(5))
def test_every_place_is_that_of_a_walk_over_the_tokens(seed):
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, 9, (3, LENGTH), generator=generator)
    opens = torch.rand(3, LENGTH, generator=generator) < 0.1
    start, phase = torch.tensor([0, 5, 11]), torch.tensor([0, 1, 3])
    timeline = Timeline.read(tokens, start, phase, eos_id=EOS, segment=SEGMENT, opens_BT=opens)
    for row in range(3):
        places, groups, openings, after = walk(tokens[row].tolist(), opens[row], int(start[row]), int(phase[row]))
        assert timeline.position_BT[row].tolist() == places
        assert timeline.group_BT[row].tolist() == groups
        found = timeline.opening_BG[row].tolist()
        assert found == openings + [-1] * (len(found) - len(openings))
        for count, (position, left) in enumerate(after):
            count_B = torch.full((3,), count)
            assert timeline.position_after(count_B)[row] == position
            assert timeline.phase_after(count_B)[row] == left
            assert timeline.ended(count_B)[row] == (count > 0 and tokens[row, count - 1] == EOS)


def test_room_for_more_segments_changes_no_place_and_too_little_is_refused():
    tokens, zero = torch.full((1, 10), 5), torch.zeros(1, dtype=torch.int64)
    exact, roomy = (Timeline.read(tokens, zero, zero, eos_id=EOS, segment=4, groups=groups) for groups in (None, 7))
    assert exact.opening_BG.tolist() == [[0, 4, 8]]
    assert roomy.opening_BG.tolist() == [[0, 4, 8, -1, -1, -1, -1]]
    assert torch.equal(exact.group_BT, roomy.group_BT)
    with pytest.raises(InputError, match=r"more segments than `groups` allows: 3: must lie in 0\.\.2"):
        Timeline.read(tokens, zero, zero, eos_id=EOS, segment=4, groups=2)


@pytest.mark.parametrize("opening", [False, True])
def test_within_a_document_it_is_that_of_the_tokens(opening):
    """As long as no later token opens a segment."""
    start, phase, tokens = torch.tensor([0, 5, 11, 6]), torch.tensor([0, 1, 4, 3]), torch.full((4, 3), 5)
    read = Timeline.read(tokens, start, phase, eos_id=EOS, segment=8)
    known = Timeline.within_document(start, phase, 3, segment=8, opening=opening)
    assert known.one_document
    assert not read.one_document
    for name in ("position_BT", "ends_BT", "document_BT", "since_BT", *(["group_BT", "opening_BG"] * opening)):
        assert torch.equal(getattr(known, name), getattr(read, name)), name
    for count_B in (torch.tensor([0, 1, 2, 3]), torch.tensor([3, 0, 3, 1])):
        assert torch.equal(known.position_after(count_B), read.position_after(count_B))
        assert torch.equal(known.phase_after(count_B), read.phase_after(count_B))
        assert not known.ended(count_B).any()
    last = Timeline.within_document(start, phase + 3, 3, segment=8, opening=False)
    assert last.phase_after(torch.tensor([3, 3, 1, 2])).tolist() == [6, 7, 0, 0]
