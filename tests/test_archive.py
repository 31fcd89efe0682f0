"""What torch's reader believes of a checkpoint's container is compared first."""

import random
import shutil
import zipfile
from pathlib import Path

import pytest
import torch

from lepton import archive, checkpoint
from lepton.errors import InputError

CONTENT = {"model": {"a": torch.arange(600.0) + 1, "b": torch.arange(40)}, "config": {"eos_id": 1}, "step": 3}


@pytest.fixture
def path(tmp_path):
    checkpoint.save(tmp_path / "step_3.pt", CONTENT)
    return tmp_path / "step_3.pt"


def assert_refused(path, message):
    assert not checkpoint.is_whole(path)
    with pytest.raises(InputError, match=message):
        checkpoint.load(path)


def rewritten(path, change, method=zipfile.ZIP_STORED):
    """Write the archive again by Python, with `change(name, content)` in each record's place; None leaves it out."""
    other = path.with_name("other.pt")
    with zipfile.ZipFile(path) as source, zipfile.ZipFile(other, "w", method) as target:
        for name in source.namelist():
            content = change(name, source.read(name))
            if content is not None:
                target.writestr(name, content)
    return other


def test_an_archive_of_another_writer_is_read(path):
    assert torch.equal(
        checkpoint.load(rewritten(path, lambda _, content: content))["model"]["a"], CONTENT["model"]["a"]
    )


@pytest.mark.parametrize("record", ["data/0", "data/1", "data.pkl", "byteorder"])
def test_a_record_that_torch_would_skip_as_a_folder(path, record):
    """One flipped attribute of the directory, which no checksum covers: memory that nothing filled became weights."""
    content = bytearray(path.read_bytes())
    place = content.rindex(f"archive/{record}".encode()) - 8  # its external attributes
    content[place] ^= archive.FOLDER
    path.write_bytes(content)
    assert_refused(path, rf"torn .*'archive/{record}' is not a plain record")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda name, content: content[:-8] if name.endswith("data/0") else content,
            "should hold 2,400 bytes and has 2",
        ),
        (lambda name, content: content + b"x" if name.endswith("data/0") else content, "should hold 2,400 bytes and"),
        (
            lambda name, content: None if name.endswith("data/1") else content,
            "storage 1 should hold 320 bytes and has no",
        ),
        (lambda name, content: None if name.endswith("data.pkl") else content, "its pickle is missing"),
        (lambda name, content: content[:40] if name.endswith("data.pkl") else content, "not a LEPTON checkpoint"),
    ],
)
def test_records_and_storages_must_agree(path, change, message):
    assert_refused(rewritten(path, change), message)


def test_records_must_be_plain_and_have_names_of_their_own(path):
    assert_refused(rewritten(path, lambda _, content: content, zipfile.ZIP_DEFLATED), "not a plain record")
    for name in ("archive/DATA/0", "elsewhere/data/0"):
        shutil.copy(path, path.with_name("twice.pt"))
        with zipfile.ZipFile(path.with_name("twice.pt"), "a") as file:
            file.writestr(name, bytes(2400))
        assert_refused(path.with_name("twice.pt"), "contradict each other")


def test_sizes_that_nothing_fills_take_no_memory(path):
    for tensor in (torch.zeros(1).expand(10**6, 10**6), torch.zeros(4).as_strided((2, 2), (1, 1))):
        torch.save(CONTENT | {"model": {"a": tensor}}, path)
        if tensor.numel() > 4:
            assert_refused(path, "does not fit its storage of 1 numbers")
        else:
            assert checkpoint.is_whole(path)


def test_nothing_is_called_that_a_pickle_names(path, tmp_path):
    class Bomb:
        def __reduce__(self):
            return Path.touch, (tmp_path / "called",)

    torch.save({"model": {}, "config": Bomb(), "step": 1}, path)
    with pytest.raises(InputError, match=r"not a LEPTON checkpoint \(it asks for"):
        checkpoint.load(path)
    assert not (tmp_path / "called").exists()


def test_whatever_loads_after_a_flipped_bit_is_what_was_saved(path):
    """Bits of the directory and of the records' own headers; the script of all of them takes minutes."""
    whole, chance = path.read_bytes(), random.Random(0)
    with zipfile.ZipFile(path) as file:
        places = [*range(file.start_dir, len(whole))]
        for info in file.infolist():
            places += range(info.header_offset, info.header_offset + 30 + len(info.filename))
    loaded = 0
    for place in chance.sample(places, 250):
        content = bytearray(whole)
        content[place] ^= 1 << chance.randrange(8)
        path.write_bytes(content)
        try:
            got = checkpoint.load(path)
        except InputError:
            assert not checkpoint.is_whole(path)
            continue
        loaded += 1
        assert all(torch.equal(value, got["model"][name]) for name, value in CONTENT["model"].items())
        assert (got["config"], got["step"]) == ({"eos_id": 1}, 3)
    assert 20 < loaded < 230, "dates and version numbers do not matter, the rest does"
