"""Path-star: every path by a search of the graph."""

import dataclasses

import pytest
import torch

from benchmarks.proving_ground.path_star import PathStar, main
from benchmarks.proving_ground.task import rules
from tests.proving_ground.smoke import smoke


def by_hand(task, row, steps):
    """Return the path from the start to the goal that a row's edges allow, after a check that there is one star.

    Its arms have so many steps.
    """
    words = [token for token in row[: task.place] if token != task.between + 3]
    *listed, mark, start, goal = words
    assert mark == task.between + 1
    assert row[task.place] == task.between + 2
    edges = {}
    for i in range(0, len(listed), 3):
        assert listed[i + 2] == task.between
        edges.setdefault(listed[i], []).append(listed[i + 1])
    assert len(edges.pop(start)) == task.arms
    heads = {target: source for i in range(0, len(listed), 3) for source, target in [listed[i : i + 2]]}
    assert len(heads) == task.arms * steps
    assert goal not in edges
    path = [goal]
    while heads[path[-1]] != start:
        path.append(heads[path[-1]])
    return path[::-1]


@pytest.mark.parametrize(
    "task",
    [
        PathStar(),
        PathStar(arms=2, length=20),
        PathStar(arms=10, ids=50),
        PathStar(reversed=True),
        PathStar(first_only=True),
    ],
)
def test_paths_by_hand(task):
    steps = task.length - 1
    for questions in (task.held_out(3, 20), dataclasses.replace(task, whole_arms=True).training(3, 10, 50)):
        for row, level in zip(questions.tokens.tolist(), questions.level.tolist(), strict=True):
            path = by_hand(task, row, steps)
            assert len(path) == steps
            expected = path[::-1] if task.reversed else path
            expected = expected[:1] if task.first_only else expected
            assert row[task.place + 1 :] == expected
            assert level == [0] * task.place + [*range(1, 1 + len(expected))]


@pytest.mark.parametrize("task", [PathStar(), PathStar(first_only=True), PathStar(reversed=True)])
def test_training_begins_with_short_arms(task):
    seen = []
    generator = torch.Generator().manual_seed(0)
    for share in torch.linspace(0, 1, 401).tolist():
        questions = task.draw(generator, 2, share, test=False)
        row, level = questions.tokens[0].tolist(), questions.level[0].tolist()
        steps = (len([word for word in row[: task.place] if word == task.between])) // task.arms
        path = by_hand(task, row, steps)
        expected = path[::-1] if task.reversed else path
        expected = expected[:1] if task.first_only else expected
        assert row[task.place + 1 : task.place + 1 + len(expected)] == expected
        assert set(row[task.place + 1 + len(expected) :]) <= {task.between + 3}, "then nothing"
        assert [place for place in level if place] == [*range(1, 1 + len(expected))]
        assert len(row) == task.held_out(0, 1).tokens.shape[1]
        seen.append(steps)
    assert set(seen[:100]) == {1}
    assert set(seen[100:200]) == {1, 2}
    assert set(seen[300:]) == {1, 2, 3, 4}
    assert seen[300:].count(4) > 50


def test_the_goal_does_not_lie_on_an_arm_more_often():
    """Neither the order of the edges nor the ids say which arm it is."""
    task = PathStar(arms=2)
    found = rules(task, [task.held_out(index, 1000) for index in range(2)])
    for name in ("the first arm", "the last arm"):
        assert found[name].within(1, 1) == pytest.approx(0.5, abs=0.05)
        assert found[name].within(4, 4) == found[name].within(1, 1)
    nodes = task.held_out(0, 2000).tokens[:, task.place + 1]
    assert nodes.unique().numel() == task.ids


def test_smoke(capsys):
    found = smoke(main, capsys, "--models", "reversed", "first_only", "hint_alone", "--rates", "1")
    back, first, hint = found["rows_of_table"][-3:]
    assert (set(back["right_at_level"]), set(first["right_at_level"])) == ({"1", "2"}, {"1"})
    assert hint["nats"] > 0


def test_a_planted_rule_is_right_at_one_arm_in_two():
    """The rule of the shortcut is the path itself where there is one arm."""
    task = PathStar(arms=1, length=6)
    found = rules(task, [task.held_out(0, 20)])
    assert found["the first arm"].share == 1
    assert torch.equal(
        task.shortcuts(task.held_out(0, 5))["the first arm"][:, task.place :],
        task.held_out(0, 5).answers[:, task.place :],
    )
