"""The runner of the proving ground trains on answers alone, and is fair to its contenders."""

import math
from types import SimpleNamespace

import pytest
import torch

from benchmarks.proving_ground import hops
from benchmarks.proving_ground.clock import TIMED, Clock, fitted
from benchmarks.proving_ground.runner import TRAINED, Contender, Proof, TaskTraining, answers_of, best_rate, read
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


def test_how_many_steps_fit():
    assert fitted(1000, 10, 0.1, 1) == 100
    assert fitted(1000, 10, 0.1, 1.45) == 68
    assert fitted(50, 10, 0.1, 1.45) == 50
    assert fitted(50, -3, 0.1, 1.45) == 1


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


class Slow(Echo):
    """A task whose test has two parts; batches of the second have longer rows and take a second of the clock."""

    def part(self, index):
        return "long" if index % 2 else "short"

    def longer(self, index):
        return index % 2 == 1


def proof(monkeypatch, *words):
    """Return a proof of it, and the time, which tests move on."""
    now = [0.0]
    monkeypatch.setattr("time.perf_counter", lambda: now[0])
    chosen = read(Slow, {"all": Contender()}, {"steps": 400, "rows": 8, "test_batches": 8}, ["--rates", "1", *words])
    config = LeptonConfig(width=32, layers=2, heads=2, kv_heads=2, head_dim=16, ffn=64, vocab_size=Slow.vocab_size)
    return Proof(Slow(), config, chosen), now


def test_each_part_of_the_test_has_its_share_of_the_time(monkeypatch):
    found, now = proof(monkeypatch)
    lines = []

    def answer(questions):
        now[0] += 1.0
        return questions.answers, torch.zeros_like(questions.level)

    def asked(seconds, *, longer):
        score = found.tested(found.task, answer, Clock(seconds), lines.append, longer=longer)
        return score.asked[1] // 8  # rows of a batch

    assert asked(100, longer=True) == 8
    assert not lines
    assert asked(100, longer=False) == 4
    assert not lines
    assert asked(5.5, longer=True) == 3 + 3
    assert lines == ["short: 3 of 4 batches in 3.0 s, then the time is up",
                     "long: 3 of 4 batches in 3.0 s, then the time is up"]  # fmt: skip
    assert asked(0, longer=True) == 2, "one batch of each part at least"


def test_training_takes_the_steps_that_fit_and_stops_when_time_is_up(monkeypatch, capsys):
    found, now = proof(monkeypatch, "--seconds", "40")
    step = TaskTraining.step

    def slow(self, *arguments):
        now[0] += 0.25 if self.rate > 0 else 0.1
        return step(self, *arguments)

    monkeypatch.setattr(TaskTraining, "rate", 0.0, raising=False)
    monkeypatch.setattr(TaskTraining, "step", slow)
    found.enter_all({"all": Contender()})
    (row,) = found.rows
    used = 0.1 * (2 + TIMED)  # to prepare, and to measure
    assert row["steps"] == row["steps_of_schedule"] == int((TRAINED * 40 - used) / 0.1)
    assert "of 400 steps fit into 40 s" in capsys.readouterr().out
    learn = TaskTraining.learn

    def slower(self, *arguments):
        self.rate = 1.0
        return learn(self, *arguments)

    monkeypatch.setattr(TaskTraining, "learn", slower)
    found.enter_all({"all": Contender()})
    row = found.rows[-1]
    assert row["steps_of_schedule"] > row["steps"] == 120, "a step takes longer than was measured"
    assert row["asked_at_level"] == {1: 64, 2: 64}
    assert "stopped after step 120" in capsys.readouterr().out


def test_what_one_contender_leaves_is_the_others(monkeypatch):
    found, now = proof(monkeypatch)
    limits = []

    def enter(name, contender, clock):
        limits.append(clock.seconds)
        now[0] += 100

    monkeypatch.setattr(found, "enter", enter)
    found.enter_all(dict.fromkeys("abc", Contender()))
    assert limits == [160, 190, 280]


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
