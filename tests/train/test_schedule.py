from itertools import pairwise

import pytest

from lepton.train.schedule import lr_scale, warmup_length


def scales(max_steps, warmup_steps=500, cooldown=0.4, min_lr_ratio=0.0):
    options = {"warmup_steps": warmup_steps, "cooldown": cooldown, "min_lr_ratio": min_lr_ratio}
    return [lr_scale(step, max_steps=max_steps, **options) for step in range(max_steps)]


@pytest.mark.parametrize(
    ("max_steps", "warmup_steps", "length"), [(50_000, 500, 500), (100, 500, 10), (100, 3, 3), (9, 500, 0)]
)
def test_warmup_is_at_most_a_tenth_of_the_run(max_steps, warmup_steps, length):
    assert warmup_length(max_steps, warmup_steps) == length
    run = scales(max_steps, warmup_steps)
    assert run[length] == 1
    assert all(a < b for a, b in pairwise(run[: length + 1]))


def test_it_rises_stays_and_falls_in_a_line_to_the_end():
    run = scales(100)
    assert run[0] == pytest.approx(1 / 11)
    assert run[10:60] == [1] * 50
    steps = [a - b for a, b in pairwise(run[60:])]
    assert steps == pytest.approx([1 / 40] * 39)
    assert run[-1] == pytest.approx(1 / 40), "the last step still learns"


def test_the_floor_holds():
    assert scales(100, min_lr_ratio=0.2)[-1] == pytest.approx(0.2 + 0.8 / 40)
    assert scales(100, min_lr_ratio=1.0)[10:] == [1] * 90
    assert scales(100, cooldown=0.0)[10:] == [1] * 90


@pytest.mark.parametrize("max_steps", [1, 2, 9, 11])
def test_short_runs_learn_in_every_step(max_steps):
    assert all(0 < scale <= 1 for scale in scales(max_steps))
