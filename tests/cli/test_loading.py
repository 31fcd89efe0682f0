"""A checkpoint with its tokenizer, as commands load them."""

import argparse

import pytest
import torch

from lepton import checkpoint, weights
from lepton.cli.loading import SEEN, add_loading, choose, load
from lepton.data.tokenizer import load_tokenizer
from lepton.errors import InputError
from tests.cli.tiny import save_tiny, small_bpe


@pytest.fixture
def shipped(saved, tmp_path, monkeypatch):
    """A folder with the weights of `saved`, where those of the package are looked for."""
    checkpoint.save(tmp_path / "model.safetensors", checkpoint.load(saved[0]))
    monkeypatch.setattr(weights, "FOLDER", tmp_path)
    return tmp_path / "model.safetensors"


def loaded(*words):
    parser = argparse.ArgumentParser()
    add_loading(parser)
    return load(parser.parse_args([*map(str, words), "--device", "cpu", "--dtype", "fp32"]))


def test_model_tokenizer_and_step(saved):
    path, model, tokenizer = saved
    found, its_tokenizer, step = loaded("--checkpoint", path)
    assert step == 7
    assert its_tokenizer.hash == tokenizer.hash
    assert not found.training
    assert all(torch.equal(value, found.state_dict()[name]) for name, value in model.state_dict().items())


def test_a_named_tokenizer_comes_first(saved, tmp_path):
    small_bpe(280).save(str(tmp_path / "other.json"))
    assert loaded("--checkpoint", saved[0], "--tokenizer", tmp_path / "other.json")[1].size == 280


def test_a_tokenizer_that_is_missing_or_too_large_is_refused(tmp_path):
    save_tiny(tmp_path / "without.pt", tokenizer=None)
    with pytest.raises(InputError, match=r"without\.pt carries no tokenizer: .* --tokenizer FILE"):
        loaded("--checkpoint", tmp_path / "without.pt")
    (tmp_path / "large.json").write_text(load_tokenizer().to_json(), encoding="utf-8")
    with pytest.raises(InputError, match=r"the tokenizer has 50257 ids, the model 320: they do not fit"):
        loaded("--checkpoint", tmp_path / "without.pt", "--tokenizer", tmp_path / "large.json")


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ({}, False),
        ({"data_dir": None}, True),
        ({"data_dir": None, "text": None, "tasks": None}, True),
        ({"data_dir": "mine"}, False),
        ({"data_dir": None, "text": ["mine.txt"]}, False),
        ({"data_dir": None, "tasks": "arc_easy"}, False),
    ],
)
def test_that_the_model_has_read_the_default_text_is_said(shipped, capsys, flags, said):
    args = argparse.Namespace(checkpoint=None, **flags)
    choose(args)
    assert args.checkpoint == str(shipped)
    out, err = capsys.readouterr()
    assert out == ""
    assert err.splitlines() == ["no --checkpoint: a model of step 7, which comes with LEPTON", *[SEEN] * said]


def test_nothing_is_said_of_a_checkpoint_that_is_named(capsys):
    args = argparse.Namespace(checkpoint="no.pt", data_dir=None)
    choose(args)
    assert (args.checkpoint, capsys.readouterr()) == ("no.pt", ("", ""))
