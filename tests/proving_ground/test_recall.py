"""Recall: every answer by hand, from the pairs before the question."""

import pytest
import torch

from benchmarks.proving_ground.recall import Recall, main
from benchmarks.proving_ground.task import rules
from tests.proving_ground.smoke import smoke


def by_hand(task, row, pairs):
    """Return the level of each question by the index of its key, and its steps, after a check of its answer."""
    found, asked, at = {}, [], 1
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
            steps = 1
            if task.two_step:
                steps = row[at] - task.ask + 1
                at += 1
            asked.append(steps)
            key, nearest = row[at], 0
            for _ in range(steps):
                key, place = stated[key]
                nearest = max(nearest, place)
            assert row[at + 1] == key
            assert key >= task.value or (task.two_step and steps == 1)
            found[at] = (at - nearest) // task.window
            at += 2
    return found, asked


@pytest.mark.parametrize(("share", "test"), [(0.1, False), (0.5, False), (1.0, False), (1.0, True)])
@pytest.mark.parametrize("two_step", [False, True])
def test_answers_by_hand(two_step, share, test):
    task, seen = Recall(two_step=two_step), set()
    questions = task.draw(torch.Generator().manual_seed(1), 8, share, test=test)
    pairs = {0.1: 32, 0.5: 64, 1.0: 256}[share]
    lists = (each.tolist() for each in (questions.tokens, questions.level, questions.targets))
    for row, level, targets in zip(*lists, strict=True):
        expected, steps = by_hand(task, row, pairs)
        seen.update(steps)
        assert {place for place, counts in enumerate(targets) if counts} == set(expected)
        assert level == [expected.get(place, 0) for place in range(len(level))]
    assert questions.tokens.shape[1] == 1 + (3 * 256 + 3 * 128 if two_step else 1024)
    assert seen == ({1} if not two_step else {2} if test else {1, 2})


def test_half_of_the_rows_in_training_ask_as_the_test_does():
    task = Recall(two_step=True)

    def of_two(test):
        tokens_BX = task.draw(torch.Generator().manual_seed(0), 256, 1.0, test=test).tokens
        one_B, two_B = ((tokens_BX == mark).sum(1) for mark in (task.ask, task.ask + 1))
        assert ((one_B + two_B) == task.pairs // 2).all()
        return two_B / (one_B + two_B)

    assert (of_two(True) == 1).all()
    share_B = of_two(False)
    assert (share_B == 1).float().mean() == pytest.approx(0.5, abs=0.1)
    assert share_B[share_B < 1].mean() == pytest.approx(0.5, abs=0.02)
    assert share_B[share_B < 1].max() < 0.7


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
