import pytest
import torch

from lepton.config import LeptonConfig
from lepton.model import Lepton
from lepton.train.compiling import compiled_loss
from tests.train.small import SHAPE


@pytest.fixture
def model():
    return Lepton(LeptonConfig(**SHAPE))


def test_it_is_tried_and_leaves_no_gradients(model, monkeypatch):
    calls = []

    def compile(function, *, dynamic):
        def compiled(tokens, *, lengths, think, groups):
            calls.append((tuple(tokens.shape), lengths.tolist(), dynamic))
            return function(tokens, lengths=lengths)

        return compiled

    monkeypatch.setattr("torch.compile", compile)
    said = []
    assert compiled_loss(model, 2, 8, said.append) is not model.loss
    assert calls == [((2, 9), [9, 9], False)]
    assert len(said) == 1
    assert all(parameter.grad is None for parameter in model.parameters())


def test_without_a_compiler_it_says_so_and_goes_on(model, monkeypatch):
    def failing(tokens, **_):
        raise RuntimeError("no C++ compiler found\nand a long trace")

    monkeypatch.setattr("torch.compile", lambda function, *, dynamic: failing)
    said = []
    assert compiled_loss(model, 2, 8, said.append) == model.loss
    assert said[1] == "cannot compile here (no C++ compiler found): going on without, which runs slower"


def test_a_full_gpu_is_no_missing_compiler(model, monkeypatch):
    def full(tokens, **_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr("torch.compile", lambda function, *, dynamic: full)
    with pytest.raises(torch.OutOfMemoryError):
        compiled_loss(model, 2, 8, [].append)
