"""Hops: every answer by hand, from the text before the question."""

from itertools import pairwise

import pytest
import torch

from benchmarks.proving_ground.hops import DEEPEST, Hops, main
from benchmarks.proving_ground.task import rules
from tests.proving_ground.smoke import smoke


def by_hand(task, row, answer):
    """Return p and the answer's token at index `answer` from the tokens before it; None: the row is too short."""
    head = DEEPEST if task.unary else 2
    p = sum(token == task.hop + 1 for token in row[:head]) if task.unary else row[0] - task.hop + 1
    text = "".join("abcd"[token - 1] for token in row[head:answer] if 1 <= token <= 4)
    at = len(text) - 1
    for _ in range(p):
        before = text[:at].rfind(text[at])
        if before < 0:
            return p, None
        at = before + 1
    return p, "abcd".index(text[at]) + 1 + task.alphabet


@pytest.mark.parametrize("test", [False, True])
@pytest.mark.parametrize(
    "task", [Hops(), Hops(unary=True), Hops(pauses=3, every=4, length=128), Hops(trained=32, length=64)]
)
def test_answers_by_hand(task, test):
    questions = task.draw(torch.Generator().manual_seed(1), 40, 1.0, test=test)
    asked = []
    for row, level in zip(questions.tokens.tolist(), questions.level.tolist(), strict=True):
        assert sum(1 <= token <= task.alphabet for token in row) == task.length
        answers = [place for place, token in enumerate(row) if task.alphabet < token < task.pause]
        assert answers == [place + 1 for place, each in enumerate(level) if each]
        for answer in answers:
            assert row[answer - task.pauses : answer] == [task.pause] * task.pauses
            assert 1 <= row[answer - task.pauses - 1] <= task.alphabet
            assert by_hand(task, row, answer) == (level[answer - 1], row[answer])
        _, expected = by_hand(task, row, len(row))
        assert row[-1] == (task.pause if expected is None else expected)
        asked.append(len(answers))
    possible = task.length // task.every
    assert (max(asked) == 1) if test else (min(asked) < possible / 3 < 2 * possible / 3 < max(asked) <= possible)


def test_half_of_the_rows_of_training_have_all_answers():
    questions = Hops(trained=1).draw(torch.Generator().manual_seed(3), 400, 1.0, test=False)
    full = (questions.targets.sum(1) >= 250).float().mean()
    assert full == pytest.approx(0.5, abs=0.1)


def test_the_test_has_no_answer_before_its_question():
    task = Hops(unary=True)
    questions = task.held_out(3, 64)
    given = questions.tokens[:, :-1]
    assert not ((given > task.alphabet) & (given < task.pause)).any()
    assert set(questions.level[questions.level > 0].tolist()) == {*range(1, DEEPEST + 1)}


@pytest.mark.parametrize("test", [False, True])
def test_no_two_neighbours_are_equal(test):
    for row in Hops().draw(torch.Generator().manual_seed(2), 50, 1.0, test=test).tokens.tolist():
        letters = [token for token in row if 1 <= token <= 4]
        assert all(a != b for a, b in pairwise(letters))
        assert set(letters) == {1, 2, 3, 4}


def test_training_begins_with_few_hops():
    task = Hops()
    most = [int(task.training(step, 100, 64).level.max()) for step in (0, 20, 49, 99)]
    assert most[0] == 1
    assert 4 <= most[1] <= 8
    assert most[2] == most[3] == 16


def test_shortcuts():
    """Too few hops are right where that many are asked for; the last letter is a guess from some hops on."""
    task = Hops()
    found = rules(task, [task.held_out(index, 256) for index in range(8)])
    assert [found[name].within(1, 4) < 1 for name in ("1 hop", "2 hops", "4 hops")] == [True, True, False]
    assert found["2 hops"].within(1, 2) == 1
    assert found["the last letter"].within(1, 1) == 0
    assert found["the last letter"].within(2, 2) > 0.4
    assert found["the last letter"].within(8, 16) == pytest.approx(0.25, abs=0.05)


def test_smoke(capsys):
    found = smoke(main, capsys, "--models", "pauses", "thoughts", "--think", "1")
    pauses, thoughts = found["rows_of_table"][-2:]
    assert found["rates"] == [0.3, 1.0]
    assert set(pauses["search"]) == {"0.3", "1"}
    assert pauses["think"] == {}
    assert set(thoughts["think"]) == {"1"}
    assert thoughts["rate"] in found["rates"]
    assert set(thoughts["right_at_level"]) == {"1", "2", "3", "4"}
