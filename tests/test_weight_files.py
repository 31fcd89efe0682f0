"""Weights in int8, and in several files."""

import json

import pytest
import torch

from lepton import checkpoint, tensors
from lepton.errors import InputError
from lepton.weight_files import SCALE, about, from_int8, parts_beside, read, to_int8, write


def weights():
    generator = torch.Generator().manual_seed(0)
    return {
        "a": torch.randn(6, 50, generator=generator) * torch.tensor([1e-3, 1, 30, 0, 1e-30, 1])[:, None],
        "b": torch.randn(4, 10, generator=generator, dtype=torch.bfloat16),
        "c": torch.randn(7, generator=generator),
        "ids": torch.arange(5),
    }


def save(path, most=None, step=1, tokenizer='{"a": 1}', **changes):
    payload = {"model": weights() | changes, "config": {"width": 3}, "step": step, "tokenizer": tokenizer}
    return checkpoint.save_weights(path, payload, most)


def test_int8_is_within_half_a_step_of_each_row():
    given = weights()
    stored = to_int8(given, {"a", "b"})
    assert {name: value.dtype for name, value in stored.items()} == {
        "a": torch.int8,
        "b": torch.int8,
        "c": torch.float32,
        "ids": torch.int64,
        f"a{SCALE}": torch.float32,
        f"b{SCALE}": torch.float32,
    }
    found = from_int8(stored)
    assert found.keys() == given.keys()
    for name in ("a", "b"):
        assert found[name].dtype == torch.float32
        wanted = given[name].float()
        largest = wanted.abs().amax(1, keepdim=True)
        assert ((found[name] - wanted).abs() <= largest / 127 * 0.5001).all()
        assert torch.allclose(found[name].abs().amax(1, keepdim=True), largest), "the largest value is exact"
    assert (found["a"][3] == 0).all()
    assert all(torch.equal(found[name], given[name]) for name in ("c", "ids"))


def test_int8_that_is_rounded_again_stays():
    """What was read from int8 and calibrated is written as int8 again."""
    once = to_int8(weights(), {"a"})
    again = to_int8(from_int8(once), {"a"})
    assert torch.equal(once["a"], again["a"])
    assert torch.allclose(once[f"a{SCALE}"], again[f"a{SCALE}"], rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({f"c{SCALE}": torch.ones(7, 1)}, "is the scale of no int8 matrix"),
        ({f"x{SCALE}": torch.ones(6, 1)}, "is the scale of no int8 matrix"),
        ({f"a{SCALE}": torch.ones(6)}, r"has shape \(6,\): 'a' needs fp32 \(6, 1\)"),
    ],
)
def test_scales_that_fit_nothing_are_refused(change, message):
    with pytest.raises(InputError, match=message):
        from_int8(to_int8(weights(), {"a"}) | change)


def test_several_files_are_one_set_of_weights(tmp_path):
    files = save(tmp_path / "m.safetensors", most=1 << 9)
    assert [file.name for file in files] == [f"m-0000{i}-of-00002.safetensors" for i in (1, 2)]
    assert parts_beside(tmp_path / "m.safetensors") == files
    assert parts_beside(tmp_path / "other.safetensors") == []
    for file in files:
        content = checkpoint.load(file)
        assert (content["step"], content["config"], content["tokenizer"]) == (1, {"width": 3}, '{"a": 1}')
        assert all(torch.equal(value, content["model"][name]) for name, value in weights().items())
    assert list(tensors.read(files[0], "checkpoint")[0]) == ["a"], "a larger tensor has a file of its own"


def test_the_tokenizer_counts_where_it_stands(tmp_path):
    """Quotes in it take two bytes each."""
    files = save(tmp_path / "m.safetensors", most=2000, tokenizer='"' * 500)
    assert [sorted(tensors.read(file, "checkpoint")[0]) for file in files] == [[], ["a", "b", "c", "ids"]]
    assert len(save(tmp_path / "n.safetensors", most=2000)) == 1


def test_few_bytes_are_one_file(tmp_path):
    path = tmp_path / "m.safetensors"
    assert save(path, most=1 << 20) == [path]
    assert "all_parts" not in json.loads(tensors.read(path, "checkpoint")[1]["lepton"])


def test_a_missing_part_is_named(tmp_path):
    files = save(tmp_path / "m.safetensors", most=1 << 9)
    files[1].unlink()
    with pytest.raises(InputError, match=r"no such checkpoint: .*m-00002-of-00002\.safetensors"):
        read(files[0])


@pytest.mark.parametrize("changes", [{"step": 2}, {"c": torch.ones(7)}])
def test_parts_of_different_weights_are_refused(tmp_path, changes):
    """Such as after a second export that was interrupted."""
    files = save(tmp_path / "m.safetensors", most=1 << 9)
    first = files[0].read_bytes()
    save(tmp_path / "m.safetensors", most=1 << 9, **changes)
    files[0].write_bytes(first)
    with pytest.raises(InputError, match="are parts of different weights: export them again"):
        read(files[0])


def test_what_is_said_beside_the_weights_comes_back(tmp_path):
    (path,) = write(tmp_path / "m.safetensors", weights(), {"format": 1, "step": 3}, None)
    found = read(path)
    assert (found["format"], found["step"], found["tokenizer"]) == (1, 3, None)


def test_what_stands_beside_the_weights_is_read_without_them(tmp_path):
    path = save(tmp_path / "w.safetensors")[0]
    assert about(path) == {"format": 1, "config": {"width": 3}, "size": None, "step": 1}
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(InputError, match="not a whole safetensors file"):
        about(path)
    with pytest.raises(InputError, match="no such checkpoint"):
        about(tmp_path / "none.safetensors")


def test_of_the_data_only_that_they_were_conversations_is_kept(tmp_path):
    """`serve` and `chat` ask for it; the folder is nobody's business."""
    payload = {"model": weights(), "config": {}, "step": 1}
    origin = {"folder": "/home/me/data", "train": "x", "chat": {"version": 1}}
    for data, kept in ((origin, {"chat": {"version": 1}}), ({"folder": "/home/me"}, {}), (None, None)):
        path = checkpoint.save_weights(tmp_path / "w.safetensors", payload | {"data": data})[0]
        assert checkpoint.load(path).get("data") == kept
