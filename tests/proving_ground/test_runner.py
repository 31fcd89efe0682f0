"""The runner of the proving ground trains on answers alone, and is fair to its contenders."""

import math
from types import SimpleNamespace

import pytest
import torch

from benchmarks.proving_ground import hops
from benchmarks.proving_ground.runner import Contender, TaskTraining, answers_of, best_rate, read
from benchmarks.proving_ground.task import Questions, Score, score
from lepton.api import Lepton
from lepton.config import LeptonConfig
from lepton.errors import InputError
from lepton.model.size_config import count_params
from tests.proving_ground.tasks import FILES, Echo


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
