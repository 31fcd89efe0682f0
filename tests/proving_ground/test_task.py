"""The runner of the proving ground counts right, learns from answers alone, and is fair to its contenders."""

import math
from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch

from benchmarks.proving_ground import chains, hops, path_star, recall
from benchmarks.proving_ground.task import (
    Contender,
    Questions,
    Score,
    Task,
    TaskTraining,
    answers_of,
    best_rate,
    read,
    rules,
    score,
)
from lepton.api import Lepton
from lepton.config import LeptonConfig
from lepton.errors import InputError
from lepton.model.size_config import count_params

FILES = {"hops": (hops, hops.Hops()), "chains": (chains, chains.Chains()), "recall": (recall, recall.Recall()),
         "path_star": (path_star, path_star.PathStar())}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Echo(Task):
    """Random tokens; the answer is the token before the question, three places back."""

    small = {}
    columns = ((1, 1), (2, 2))
    vocab_size = 12
    chance = 0.1

    def draw(self, generator, rows, share, *, test):
        tokens = torch.randint(1, 11, (rows, 12), generator=generator)
        tokens[:, 5::6] = tokens[:, 3::6]
        tokens[:, 4::6] = 11
        level = torch.zeros(rows, 11, dtype=torch.int64)
        level[:, 4::6] = torch.tensor([1, 2])
        return Questions(tokens, torch.full((rows,), 12), level > 0, level)


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


def test_the_most_frequent_answer():
    tokens = torch.tensor([[1, 7, 1], [1, 7, 2], [1, 8, 2]])
    level = torch.tensor([[1, 2], [1, 2], [1, 2]])
    found = rules(Echo(), [Questions(tokens, torch.full((3,), 3), level > 0, level)])["most frequent answer"]
    assert (found.within(1, 1), found.within(2, 2)) == (2 / 3, 2 / 3)
    assert math.isnan(found.nats)


class Counter:
    """Stands for a model that says of each token the next larger one."""

    device = torch.device("cpu")

    def eval(self):
        return self

    def trunk(self, tokens, think):
        return SimpleNamespace(hidden=torch.nn.functional.one_hot(tokens + 1, 20).float())

    def head(self, hidden):
        return 5 * hidden


@pytest.mark.parametrize(
    ("row", "forced", "free"),
    [
        ([9, 1, 2, 3, 4], (1, 1, 1), (1, 1, 1)),
        ([9, 1, 3, 4, 5], (0, 1, 1), (0, 0, 0)),  # right only by a look at the true first step
        ([9, 1, 3, 3, 4], (0, 0, 1), (0, 0, 0)),  # its own second step is right, the path is not
        ([9, 1, 2, 3, 9], (1, 1, 0), (1, 1, 0)),
    ],
)
def test_free_running_answers_read_themselves(row, forced, free):
    questions = Questions(
        torch.tensor([row]), torch.tensor([5]), torch.arange(4)[None] > 0, torch.tensor([[0, 1, 2, 3]])
    )
    for free_running, expected in ((False, forced), (True, free)):
        found = score(answers_of(Counter(), free_running=free_running), [questions])
        assert tuple(found.right[level] for level in (1, 2, 3)) == expected


def test_the_best_rate():
    def found(right, nats):
        return Score({1: 1000}, {1: right}, nats)

    assert best_rate({0.3: found(500, 1.0), 1.0: found(900, 2.0), 3.0: found(100, 0.5)}) == 1.0
    assert best_rate({0.3: found(101, 1.0), 1.0: found(99, 0.9), 3.0: found(100, math.nan)}) == 1.0


def test_a_model_learns_from_the_answers_alone():
    """The other tokens are random: a loss on them could not fall below ln 10."""
    task = Echo()
    config = LeptonConfig(width=32, layers=2, heads=2, kv_heads=2, head_dim=16, ffn=64, vocab_size=task.vocab_size)
    torch.manual_seed(0)
    training = TaskTraining(Lepton(config), "plain")
    training.prepare(32, 11)
    lines = []
    training.learn(task, 32, 120, 1.0, lines.append)
    found = score(answers_of(training.model, free_running=False), [task.held_out(0, 64)])
    assert found.share > 0.9
    assert found.nats < 0.5
    assert float(lines[-1].rpartition(" ")[2]) < 0.5


@pytest.mark.parametrize("name", FILES)
def test_batches_are_a_pure_function_of_seed_and_step(name):
    task = FILES[name][1]
    first, again, other = task.training(7, 10, 4), task.training(7, 10, 4), task.training(8, 10, 4)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first.tokens, other.tokens)
    assert not torch.equal(first.tokens, type(task)(seed=1).training(7, 10, 4).tokens)
    assert not torch.equal(task.held_out(7, 4).tokens[:, -40:], first.tokens[:, -40:])


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


@pytest.mark.parametrize("name", FILES)
def test_contenders_have_equal_parameters(name):
    file, task = FILES[name]
    complete = file.shape(task)
    params = count_params(complete)
    for contender in file.CONTENDERS.values():
        found = count_params(contender.config(complete))
        assert abs(found / params - 1) < 0.01 if contender.equal else found > 1.2 * params
        assert set(contender.data) <= set(vars(task))
    assert any(contender == Contender() for contender in file.CONTENDERS.values())


def test_an_unknown_contender_is_named():
    with pytest.raises(InputError, match=r"'thought'.*thoughts"):
        read(hops.Hops, hops.CONTENDERS, {"steps": 1, "rows": 1, "test_batches": 1}, ["--models", "thought"])
