"""Recall: every answer by hand, from the pairs before the question."""

import pytest
import torch

from benchmarks.proving_ground.recall import Recall, main
from benchmarks.proving_ground.task import rules
from tests.proving_ground.smoke import smoke


def by_hand(task, row, pairs):
    """Return the level of each question by the index of its key, after a check of its answer."""
    found, at = {}, 1
    questions = pairs // 2 if task.two_step else pairs
    while at < len(row):
        stated = {}
        for _ in range(pairs):
            if task.two_step:
                assert row[at] == task.begin
                at += 1
            stated[row[at]] = row[at + 1], at + 1
            at += 2
        assert len(stated) == pairs
        for _ in range(questions):
            key, nearest = row[at], 0
            for _ in range(2 if task.two_step else 1):
                key, place = stated[key]
                nearest = max(nearest, place)
            assert row[at + 1] == key >= task.value
            found[at] = (at - nearest) // task.window
            at += 2
    return found


@pytest.mark.parametrize("share", [0.1, 0.5, 1.0])
@pytest.mark.parametrize("two_step", [False, True])
def test_answers_by_hand(two_step, share):
    task = Recall(two_step=two_step)
    questions = task.draw(torch.Generator().manual_seed(1), 8, share, test=False)
    pairs = {0.1: 32, 0.5: 64, 1.0: 256}[share]
    lists = (each.tolist() for each in (questions.tokens, questions.level, questions.targets))
    for row, level, targets in zip(*lists, strict=True):
        expected = by_hand(task, row, pairs)
        assert {place for place, counts in enumerate(targets) if counts} == set(expected)
        assert level == [expected.get(place, 0) for place in range(len(level))]
    assert questions.tokens.shape[1] == 1 + 1024


@pytest.mark.parametrize("two_step", [False, True])
def test_a_key_stands_in_its_pairs_and_in_its_question_alone(two_step):
    task = Recall(two_step=two_step)
    for row in task.held_out(0, 4).tokens.tolist():
        keys = [token for token in row if task.begin < token < task.value]
        assert all(keys.count(key) == 2 for key in keys)


def test_what_is_scored_lies_beyond_the_window():
    """A query of a window of 64 reads the 63 tokens before its own; the value of level 1 lies 64 or more before."""
    task = Recall()
    questions = task.held_out(0, 16)
    levels = questions.level[questions.targets]
    assert int(levels.max()) <= 1024 // task.window
    assert 0 < (levels == 0).float().mean() < 0.05


def test_shortcuts():
    task = Recall()
    found = rules(task, [task.held_out(0, 16)])
    assert found["the value before"].share < 0.02
    assert 0.01 < found["a value not asked for yet"].share < 0.05
    assert 1 / 256 < found["most frequent answer"].share < 0.03


def test_smoke(capsys):
    found = smoke(main, capsys, "--models", "window_only", "complete", "--two_step", "--rates", "1")
    assert found["two_step"] is True
    only, complete = found["rows_of_table"][-2:]
    assert only["params"] == pytest.approx(complete["params"], rel=0.05)
    assert complete["training_flops_per_token"] > 0
