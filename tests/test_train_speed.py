"""The speed benchmark runs without `transformers`, and its peers have the parameters that they claim."""

import json

import pytest
import torch

from benchmarks import peer, train_speed
from lepton.errors import InputError
from lepton.model.size_config import count_params, size_config


def test_the_last_line_is_json(capsys: pytest.CaptureFixture[str]) -> None:
    train_speed.main(["--cases", "nano/no_ideas/1x16/plain", "--steps", "1", "--fresh_memory"])
    *_, head, row, last = capsys.readouterr().out.splitlines()
    assert head.split()[0] == "case"
    assert row.split()[0] == json.loads(last)["cases"][0]["case"] == "nano/no_ideas/1x16/plain"


@pytest.mark.parametrize("name", ["nano/complete", "nano/peeer/1x16", "nano/complete/1x16/fast", "nan/complete/1x16"])
def test_a_bad_case_is_named(name: str) -> None:
    with pytest.raises(InputError):
        train_speed.Case.read(name, torch.device("cpu"))


def llama_params(shape: dict[str, int]) -> int:
    width, heads = shape["hidden_size"], shape["num_attention_heads"] + shape["num_key_value_heads"]
    block = 2 * width * heads * shape["head_dim"] + 3 * width * shape["intermediate_size"] + 2 * width
    return shape["vocab_size"] * width + shape["num_hidden_layers"] * block + width


@pytest.mark.parametrize("size", ["nano", "micro", "tiny", "small"])
def test_a_peer_has_as_many_parameters(size: str) -> None:
    config = size_config(size)
    shape = peer.peer_shape(size, "peer")
    assert llama_params(shape) == pytest.approx(count_params(config), rel=0.01)
    assert shape["hidden_size"] == (config.embed_rank if size == "nano" else config.width)
