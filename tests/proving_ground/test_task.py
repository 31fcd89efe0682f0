"""Answers are counted right, and what a task draws depends on its seed and a number alone."""

import math

import pytest
import torch

from benchmarks.proving_ground.task import Questions, different, rules, score
from lepton.errors import InputError
from tests.proving_ground.tasks import FILES, Echo


def batches():
    return [Echo().held_out(index, 6) for index in range(2)]


def test_a_planted_oracle_is_counted_right():
    def oracle(questions):
        """Right at level 1, wrong at level 2 and where nothing is scored."""
        wrong = torch.full_like(questions.answers, 99)
        return torch.where(questions.level == 1, questions.answers, wrong), questions.level.float()

    found = score(oracle, batches())
    assert (found.asked, found.right) == ({1: 12, 2: 12}, {1: 12, 2: 0})
    assert (found.within(1, 1), found.within(2, 2), found.within(1, 2), found.share) == (1, 0, 0.5, 0.5)
    assert found.nats == 1.5
    assert math.isnan(found.within(3, 9))
    assert score(lambda questions: (questions.answers, questions.level), batches()).share == 1


def test_an_answer_of_two_tokens_is_right_when_both_are():
    tokens = torch.tensor([[9, 1, 2, 9, 3, 4, 9], [9, 5, 6, 9, 7, 8, 9]])
    level = torch.tensor([[1, 1, 0, 2, 2, 0], [1, 1, 0, 2, 2, 0]])
    questions = Questions(tokens, torch.full((2,), 7), level > 0, level)
    guess = torch.tensor([[1, 2, 0, 0, 4, 0], [5, 0, 0, 7, 8, 0]])
    found = score(lambda _: (guess, 0.5 * (level > 0)), [questions], 2)
    assert (found.asked, found.right) == ({1: 2, 2: 2}, {1: 1, 2: 1})
    assert found.nats == 1, "of an answer"


def test_the_most_frequent_answer():
    tokens = torch.tensor([[1, 7, 1], [1, 7, 2], [1, 8, 2]])
    level = torch.tensor([[1, 2], [1, 2], [1, 2]])
    found = rules(Echo(), [Questions(tokens, torch.full((3,), 3), level > 0, level)])["most frequent answer"]
    assert (found.within(1, 1), found.within(2, 2)) == (2 / 3, 2 / 3)
    assert math.isnan(found.nats)


def test_different_numbers_in_random_order():
    found = different(torch.Generator().manual_seed(0), 4000, 3, 5)
    assert all(len({*row}) == 3 for row in found.tolist())
    counts = torch.stack([(found == number).double().mean(0) for number in range(5)])
    torch.testing.assert_close(counts, torch.full((5, 3), 0.2, dtype=torch.float64), rtol=0, atol=0.03)


@pytest.mark.parametrize("name", FILES)
def test_batches_are_a_pure_function_of_seed_and_step(name):
    task = FILES[name][1]
    first, again, other = task.training(7, 10, 4), task.training(7, 10, 4), task.training(8, 10, 4)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first.tokens, other.tokens)
    assert not torch.equal(first.tokens, type(task)(seed=1).training(7, 10, 4).tokens)
    assert not torch.equal(task.held_out(7, 4).tokens[:, -40:], first.tokens[:, -40:])


@pytest.mark.parametrize(
    ("name", "fields", "message"),
    [
        ("hops", {"trained": 33}, "trained=33"),
        ("hops", {"every": 0}, "every=0, pauses=0: must be at least 1 and 0"),
        ("recall", {"pairs": 100}, "pairs=100"),
        ("recall", {"pairs": 64, "keys": 32}, "at most keys=32"),
        ("path_star", {"arms": 10, "length": 20}, "191 nodes"),
    ],
)
def test_tasks_that_cannot_be_drawn_are_named(name, fields, message):
    with pytest.raises(InputError, match=message):
        type(FILES[name][1])(**fields)


@pytest.mark.parametrize("name", FILES)
def test_rows_are_what_the_model_can_read(name):
    """Ids that it knows, no end of a document, one shape, and no scored answer that has no loss in training."""
    task, shapes = FILES[name][1], set()
    for questions in (*(task.training(step, 8, 16) for step in range(8)), task.held_out(0, 16)):
        shapes.add(questions.tokens.shape)
        assert 1 <= int(questions.tokens.min()) <= int(questions.tokens.max()) < task.vocab_size
        assert questions.targets.shape == questions.level.shape == questions.answers.shape
        assert questions.targets.any()
        assert not ((questions.level > 0) & ~questions.targets).any()
    assert len(shapes) == 1
