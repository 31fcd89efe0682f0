"""A checkpoint with its tokenizer, as commands load them."""

import argparse

import pytest
import torch

from lepton.cli.loading import add_loading, load
from lepton.data.tokenizer import load_tokenizer
from lepton.errors import InputError
from tests.cli.tiny import save_tiny, small_bpe


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
