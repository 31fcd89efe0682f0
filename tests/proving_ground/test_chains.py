"""Chains: every result by hand."""

import pytest
import torch

from benchmarks.proving_ground.chains import Chains, main
from benchmarks.proving_ground.task import rules
from tests.proving_ground.smoke import smoke

SIGNS = "+-*"


def by_hand(task, row):
    """Return the number of operations of a row, and its result's token."""
    words = [token for token in row[: task.place] if token != task.equals + 1]
    assert row[task.place] == task.equals
    value = words[0] - 1
    for sign, number in zip(words[1::2], words[2::2], strict=True):
        value = eval(f"{value} {SIGNS[sign - task.operation]} {number - 1}") % task.modulus
    return len(words) // 2, 1 + value


@pytest.mark.parametrize("test", [False, True])
@pytest.mark.parametrize("task", [Chains(), Chains(pauses=4, modulus=7)])
def test_results_by_hand(task, test):
    questions = task.draw(torch.Generator().manual_seed(1), 200, 1.0, test=test)
    counts = set()
    for row, level in zip(questions.tokens.tolist(), questions.level.tolist(), strict=True):
        count, result = by_hand(task, row)
        assert row[-1] == result
        assert row[task.place + 1 : -1] == [task.equals + 2] * task.pauses
        assert level == [0] * (len(level) - 1) + [count]
        counts.add(count)
    assert counts == {*range(1, 1 + (task.tested if test else task.trained))}


def test_the_result_stands_nowhere_before_but_by_chance():
    task = Chains()
    questions = task.held_out(0, 2000)
    long = questions.level[:, -1] == 16
    seen = (questions.tokens[long, :-1] == questions.tokens[long, -1:]).any(1).float().mean()
    assert seen == pytest.approx(1 - (1 - 1 / 97) ** 17, abs=0.12)


def test_training_begins_with_one_operation():
    assert int(Chains().training(0, 100, 64).level.max()) == 1
    assert int(Chains().training(60, 100, 64).level.max()) == 8


def test_shortcuts():
    task = Chains()
    found = rules(task, [task.held_out(index, 1000) for index in range(2)])
    assert found["the last operation"].within(1, 1) == 1
    for name in found:
        assert found[name].within(2, 16) < 0.05


def test_smoke(capsys):
    found = smoke(main, capsys, "--models", "no_thoughts", "--rates", "1")
    assert found["rows_of_table"][-1]["search"] == {}
    assert found["rows_of_table"][-1]["rate"] == 1
