"""Routing against a loop over tokens, and that the share is kept on any text."""

import math

import pytest
import torch

from lepton.model.ideas.router import running_clamp
from lepton.model.timeline import Timeline
from tests.laws.lab import EOS, build, text

WINDOW = 8


def route(model, tokens, score, depth, taken, start):
    timeline = Timeline.read(tokens, start, start, eos_id=EOS, segment=4)
    return model.router.choose(score, depth, taken, timeline)


def slow(wants, positions, depth, taken):
    """One row, a token after the other: what the module's docstring says, in words of a loop."""
    slack, whole, count, deep, counts = 2, round(depth * WINDOW), taken, [], []
    for wanted, position in zip(wants, positions, strict=True):
        place = position % WINDOW
        count = 0 if place == 0 else count
        left = WINDOW - 1 - place
        goes = wanted and count + 1 <= min(math.floor(depth * (place + 1) + slack), whole)
        must = count < max(math.ceil(depth * (place + 1) - slack), whole - left)
        deep.append(goes or must)
        count += deep[-1]
        counts.append(count)
    return deep, counts


@pytest.mark.parametrize("depth", [0.0, 0.1, 0.25, 0.5, 0.8, 1.0])
@pytest.mark.parametrize("tilt", [-2.0, 0.0, 2.0])
def test_equal_to_a_loop_over_tokens(depth, tilt):
    model, tokens = build("complete"), text(1, rows=3, length=60)
    score = torch.randn(3, 60, dtype=torch.float64) + tilt
    # The first row goes on in the middle of a window, with a count that its share allows there.
    start, taken = torch.tensor([5, 0, 16]), torch.tensor([round(5 * depth), 0, 0])
    deep, counts = route(model, tokens, score, depth, taken, start)
    positions = Timeline.read(tokens, start, start, eos_id=EOS, segment=4).position_BT
    wants = (
        (score > model.router.threshold(depth)) if 0 < depth < 1 else torch.full_like(score, depth, dtype=torch.bool)
    )
    for row in range(3):
        expected = slow(wants[row].tolist(), positions[row].tolist(), depth, int(taken[row]))
        assert (deep[row].tolist(), counts[row].tolist()) == expected


@pytest.mark.parametrize("depth", [0.25, 0.5, 0.75])
@pytest.mark.parametrize(
    "score", [torch.full((1, 64), -9.0), torch.full((1, 64), 9.0), torch.linspace(-9, 9, 64)[None]]
)
def test_every_whole_window_takes_its_share_whatever_the_scores(depth, score):
    model, tokens, zero = build("complete"), torch.ones(1, 64, dtype=torch.int64), torch.zeros(1, dtype=torch.int64)
    deep, _ = route(model, tokens, score.double(), depth, zero, zero)
    assert (deep.view(-1, WINDOW).sum(1) == depth * WINDOW).all()


def test_within_a_window_the_hard_ones_go():
    model, tokens, zero = build("complete"), torch.ones(1, 8, dtype=torch.int64), torch.zeros(1, dtype=torch.int64)
    score = torch.tensor([[-9.0, 9, 9, -9, 9, -9, 9, -9]], dtype=torch.float64)
    deep, _ = route(model, tokens, score, 0.5, zero, zero)
    assert torch.equal(deep, score > 0)


@pytest.mark.parametrize("length", [1, 2, 7, 64])
def test_the_scan_is_the_recurrence(length):
    generator = torch.Generator().manual_seed(length)
    add = torch.randint(-2, 3, (4, length), generator=generator)
    low = torch.randint(-5, 3, (4, length), generator=generator)
    high = low + torch.randint(0, 6, (4, length), generator=generator)
    x = start = torch.randint(-5, 6, (4,), generator=generator)
    expected = []
    for t in range(length):
        x = (x + add[:, t]).clamp(low[:, t], high[:, t])
        expected.append(x)
    assert torch.equal(running_clamp(add, low, high, start), torch.stack(expected, 1))
