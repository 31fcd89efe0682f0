import pytest
import torch
from torch import nn

from lepton.train import faster_split as module
from lepton.train.faster_split import faster_split
from lepton.train.settings import TrainSettings

SETTINGS = TrainSettings(batch_size=2, grad_accum=32)


class Fake:
    """A `MicroStep` whose micro-batch takes 10 ms and 1 ms a row."""

    made = ()

    def __init__(self, model, *, compiled, say):
        assert not compiled
        self.prepared = None
        Fake.made = (*Fake.made, self)

    def prepare(self, batch_size, seq_len, *, answers=False):
        self.prepared = batch_size, seq_len

    def seconds(self, batch_size, seq_len):
        assert self.prepared == (batch_size, seq_len)
        return 0.010 + 0.001 * batch_size


class Compiled(Fake):
    """That of the run, prepared for its split."""

    def __init__(self):
        self.prepared = 2, 512


class Full(Fake):
    def prepare(self, batch_size, seq_len, *, answers=False):
        raise torch.OutOfMemoryError("CUDA out of memory")


@pytest.fixture
def model(monkeypatch):
    """On a card of 100 GB, of which a row takes one."""
    Fake.made = ()
    monkeypatch.setattr(module, "gpu_memory", lambda device: (100 * 10**9, 100 * 10**9))
    monkeypatch.setattr(module, "predicted_memory", lambda model, settings: settings.split[0] * 10**9)
    monkeypatch.setattr(module, "MicroStep", Fake)
    monkeypatch.setattr(module, "free_unused_memory", lambda device: None)
    model = nn.Module()
    model.device = torch.device("cuda")
    return model


def test_the_gain_is_that_of_the_two_measured_times(model):
    """32 micro-batches of 12 ms beside one of 74 ms."""
    found = faster_split(model, SETTINGS, Compiled(), 1000)
    assert found == "--batch_size 64 --grad_accum 1 is the same step, at least 5.2 times faster here"


def test_the_other_split_fits_the_memory(model, monkeypatch):
    monkeypatch.setattr(module, "gpu_memory", lambda device: (20 * 10**9, 100 * 10**9))
    assert faster_split(model, SETTINGS, Compiled(), 1000).startswith("--batch_size 16 --grad_accum 4 is the same step")
    monkeypatch.setattr(module, "gpu_memory", lambda device: (2 * 10**9, 100 * 10**9))
    assert faster_split(model, SETTINGS, Compiled(), 1000) is None


@pytest.mark.parametrize(
    ("changes", "steps"),
    [
        ({"batch_size": 16, "seq_len": 1024}, 1000),
        ({"grad_accum": 1}, 100_000),
        ({}, 100),
    ],
)
def test_nothing_is_measured_where_it_hardly_matters(model, changes, steps):
    """Large micro-batches, a step of one, a run of some seconds."""
    assert faster_split(model, SETTINGS.replace(**changes), Compiled(), steps) is None
    assert Fake.made == ()


def test_a_small_gain_is_not_told(model, monkeypatch):
    monkeypatch.setattr(Fake, "seconds", lambda self, batch_size, seq_len: 0.001 * (10 + 50 * batch_size))
    assert faster_split(model, SETTINGS, Compiled(), 1000) is None
    assert len(Fake.made) == 1


def test_what_does_not_fit_after_all_is_not_told(model, monkeypatch):
    monkeypatch.setattr(module, "MicroStep", Full)
    assert faster_split(model, SETTINGS, Compiled(), 1000) is None


def test_a_cpu_is_told_nothing(model, monkeypatch):
    monkeypatch.setattr(module, "gpu_memory", lambda device: None)
    assert faster_split(model, SETTINGS, Compiled(), 1000) is None
