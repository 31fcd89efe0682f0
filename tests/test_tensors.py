import gc
import random
import sys

import pytest
import torch
from safetensors.torch import save, save_file

from lepton import tensors
from lepton.errors import InputError

WANTED = {"w": torch.zeros(2, 3), "ids": torch.zeros(4, dtype=torch.int64)}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"w": None}, "'w' is NoneType, not a tensor"),
        ({"w": torch.zeros(2, 2)}, r"'w' has shape \(2, 2\), this model needs \(2, 3\)"),
        ({"w": torch.zeros(2, 3, dtype=torch.float64)}, r"'w' holds torch.float64, this model needs torch.float32"),
        ({"ids": torch.zeros(4, dtype=torch.int32)}, "'ids' holds torch.int32"),
        ({"w": torch.tensor([[1.0, 2, 3], [4, float("nan"), 6]])}, "'w' holds NaN or infinity"),
        ({"w": torch.full((2, 3), float("-inf"))}, "'w' holds NaN or infinity"),
        ({"v": torch.zeros(1), "u": torch.zeros(1)}, r"Unexpected key 'u' \(and 1 more\)"),
    ],
)
def test_what_does_not_fit_is_named(change, message):
    tensors.compare(dict(WANTED), WANTED)
    with pytest.raises(InputError, match=message):
        tensors.compare(WANTED | change, WANTED)


def test_a_missing_name_and_another_precision():
    with pytest.raises(InputError, match="Missing key 'ids'"):
        tensors.compare({"w": WANTED["w"]}, WANTED)
    tensors.compare(WANTED | {"w": torch.zeros(2, 3).bfloat16()}, WANTED, casts=True)
    with pytest.raises(InputError, match=r"holds torch\.int64"):
        tensors.compare(WANTED | {"w": torch.zeros(2, 3).long()}, WANTED, casts=True)


def test_any_flipped_bit_is_found(tmp_path):
    path, chance = tmp_path / "a.safetensors", random.Random(0)
    content = {
        "w": torch.randn(3, 5).T,
        "none": torch.zeros(0, 3),
        "yes": torch.tensor(True),
        "half": torch.ones(3).half(),
    }
    tensors.write(path, content, {"kind": "test"})
    found, metadata = tensors.read(path, "file")
    assert metadata == {"kind": "test"}
    assert all(torch.equal(value, found[name]) for name, value in content.items())
    whole = path.read_bytes()
    for place in chance.sample(range(len(whole)), 200):
        damaged = bytearray(whole)
        damaged[place] ^= 1 << chance.randrange(8)
        path.write_bytes(damaged)
        with pytest.raises(InputError, match=r"damaged|not a whole"):
            tensors.read(path, "file")


def test_a_file_without_metadata_has_no_hash(tmp_path):
    save_file({"w": torch.ones(2)}, tmp_path / "a.safetensors")
    assert tensors.read(tmp_path / "a.safetensors", "file")[0]["w"].tolist() == [1, 1]
    save_file({"w": torch.ones(2)}, tmp_path / "a.safetensors", {"kind": "test"})
    with pytest.raises(InputError, match="damaged"):
        tensors.read(tmp_path / "a.safetensors", "file")


def test_what_another_writer_did_not_align(tmp_path):
    path, values = tmp_path / "a.safetensors", {"a": torch.tensor([1.5, -2.0]), "b": torch.arange(3)}
    content = save(values)
    size = int.from_bytes(content[:8], "little")
    header = content[8 : 8 + size].rstrip() + b" "
    path.write_bytes(len(header).to_bytes(8, "little") + header + content[8 + size :])
    found = tensors.read(path, "file")[0]
    assert len(header) % 4, "the tensors begin at odd places"
    assert all(torch.equal(value, found[name]) for name, value in values.items())


def test_reading_again_and_again_keeps_nothing(tmp_path):
    """A server that reads states must not grow; safetensors' own reader keeps two objects a tensor."""
    path = tmp_path / "a.safetensors"
    tensors.write(path, {f"w{i}": torch.ones(300) for i in range(20)}, {"kind": "test"})

    def blocks(times):
        for _ in range(times):
            tensors.read(path, "file")
        gc.collect()
        return sys.getallocatedblocks()

    assert blocks(50) + 500 > blocks(50), "of 1,000 tensors"
