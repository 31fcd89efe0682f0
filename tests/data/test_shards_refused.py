"""Data sets that cannot be read are refused in one line that names the file and the fault."""

import json
import os
from pathlib import Path

import numpy as np
import pytest

from lepton.errors import InputError
from tests.data.small import Folder, dataset, numbered


def refused(folder: Path, *words: str, **options: object) -> None:
    with pytest.raises(InputError) as caught:
        dataset(folder, **options)
    assert "\n" not in str(caught.value)
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize("bad", [-1, -32768, 50257, 60000])
def test_ids_outside_the_vocabulary_name_shard_value_and_vocabulary(shard_folder: Folder, bad: int) -> None:
    array = numbered(4).astype(np.int32)
    array[2, 20] = bad
    data = dataset(shard_folder(numbered(4), array, val=(numbered(1),)))
    with pytest.raises(InputError, match=rf"shard_00001\.npy: token id {bad} .*50257"):
        data.batch(0, batch_size=data.windows)


def test_unsigned_ids_beyond_int64_are_refused(shard_folder: Folder) -> None:
    data = dataset(shard_folder(np.full((2, 33), 2**63 + 5, np.uint64)))
    with pytest.raises(InputError, match=f"token id {2**63 + 5} "):
        data.batch(0, batch_size=1)


def test_a_missing_or_empty_folder_is_refused(tmp_path: Path, shard_folder: Folder) -> None:
    refused(tmp_path / "nowhere", "no such folder", "nowhere", "prepare")
    refused(tmp_path, "no tokens", str(tmp_path), "prepare")
    refused(shard_folder(numbered(0)), "no tokens")


def test_a_truncated_shard_is_named(shard_folder: Folder) -> None:
    folder = shard_folder(numbered(4), numbered(4))
    path = folder / "shard_00001.npy"
    for length in (path.stat().st_size - 1, 100, 40, 3, 0):
        path.write_bytes(path.read_bytes()[:length])
        refused(folder, "shard_00001.npy", "again")


@pytest.mark.parametrize(
    ("array", "words"),
    [
        (np.zeros((4, 33), np.float32), "float32"),
        (np.zeros((4, 33), bool), "bool"),
        (np.array([[None] * 33] * 4), "object"),
        (np.zeros(33, np.int32), "(33,)"),
        (np.zeros((2, 3, 4), np.int32), "(2, 3, 4)"),
        (np.zeros((4, 1), np.int32), "(4, 1)"),
    ],
)
def test_other_arrays_are_named(shard_folder: Folder, array: np.ndarray, words: str) -> None:
    refused(shard_folder(array), "shard_00000.npy", words)


def test_a_file_that_is_no_array_is_named(shard_folder: Folder) -> None:
    folder = shard_folder(numbered(4))
    (folder / "shard_00001.npy").write_text("not an array at all")
    refused(folder, "shard_00001.npy")


HEADER = "{'descr': '<u2', 'fortran_order': False, 'shape': (4, 33), }"


@pytest.mark.parametrize(
    "header",
    [
        HEADER.replace("(4, 33)", "(-4, 33)"),
        HEADER.replace("(4, 33)", "(-4, -33)"),
        HEADER.replace("(4, 33)", "(True, 33)"),
        HEADER.replace("(4, 33)", f"({2**70}, 33)"),
        HEADER.replace("(4, 33)", f"(4, {2**62})"),
        HEADER.replace("(4, 33)", "(4L, 33"),
        HEADER.replace("(4, 33)", "4"),
        HEADER.replace("}", ""),
        HEADER.replace("'<u2'", "'<m8'"),
        HEADER.replace("'<u2'", "'|O'"),
        HEADER.replace("'<u2'", "('<u2', (2,))"),
        HEADER.replace("'<u2'", "[('a', '<u2')]"),
        HEADER.replace("'<u2'", "'<u7'"),
        HEADER.replace("'<u2'", "5"),
        HEADER.replace("'shape'", "'form'"),
        "{" * 3000,
        "(" * 9000,
        "-" * 9000,
        3 * "'" + "never closed",
        "  \n\t  indented\n dedent",
        "\0",
        "",
    ],
)
def test_a_damaged_header_is_named(shard_folder: Folder, header: str) -> None:
    folder = shard_folder(numbered(4))
    for version in (b"\1\0", b"\2\0", b"\3\0", b"\7\0"):
        length = len(header).to_bytes(2 if version == b"\1\0" else 4, "little")
        content = b"\x93NUMPY" + version + length + header.encode() + bytes(264)
        (folder / "shard_00000.npy").write_bytes(content)
        refused(folder, "shard_00000.npy")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="pipes with names are of Unix")
@pytest.mark.parametrize("name", ["shard_00000.npy", "val/shard_00000.npy", "metadata.json"])
def test_pipes_and_folders_in_the_place_of_files_are_named(shard_folder: Folder, name: str) -> None:
    for put, kind in ((os.mkfifo, "a pipe"), (os.mkdir, "a folder")):
        folder = shard_folder(numbered(4), val=(numbered(1),), name=kind)
        (folder / name).unlink(missing_ok=True)
        put(folder / name)
        refused(folder, name, kind)


def test_a_shard_that_shrinks_meanwhile_is_named(shard_folder: Folder) -> None:
    folder = shard_folder(numbered(4))
    data = dataset(folder)
    (folder / "shard_00000.npy").write_bytes((folder / "shard_00000.npy").read_bytes()[:200])
    with pytest.raises(InputError, match="is truncated"):
        data.batch(0, batch_size=1)


def test_rows_of_several_lengths_are_refused(shard_folder: Folder) -> None:
    refused(shard_folder(numbered(4), numbered(4, row_len=20)), "shard_00001.npy", "20", "33")


def test_seq_len_must_fit_a_row(shard_folder: Folder) -> None:
    folder = shard_folder(numbered(4))
    refused(folder, "seq_len=34", "33", "prepare --row_len 34", seq_len=34)
    refused(folder, "seq_len=0", seq_len=0)


def test_a_name_that_no_folder_has_is_refused() -> None:
    with pytest.raises(InputError, match="no such folder"):
        dataset(Path("x" * 300))


def test_another_split_and_no_batch_are_refused(shard_folder: Folder) -> None:
    folder = shard_folder(np.ones((200, 9), np.uint16))
    with pytest.raises(InputError, match="split='test': must be 'train' or 'val'"):
        dataset(folder, split="test")
    for size in (0, -1):
        with pytest.raises(InputError, match=f"batch_size={size}: must be at least 1"):
            next(dataset(folder).batches(size))


def test_a_data_set_too_small_for_validation_is_refused(shard_folder: Folder) -> None:
    folder = shard_folder(numbered(1))
    refused(folder, "too small")
    refused(folder, "too small", split="val")


def test_another_tokenizer_is_refused(shard_folder: Folder) -> None:
    folder = shard_folder(numbered(4))
    (folder / "metadata.json").write_text(json.dumps({"tokenizer_hash": "a" * 64}))
    refused(folder, "a" * 12, "b" * 12, "--tokenizer", tokenizer_hash="b" * 64)
    assert dataset(folder, tokenizer_hash="a" * 64).rows == 3
    assert dataset(folder).rows == 3


@pytest.mark.parametrize("padding", [3, ["shard_00000.npy"], {"shard_00000.npy": -1}, {"shard_00000.npy": 1.5}])
def test_padding_that_is_none_is_named(shard_folder: Folder, padding: object) -> None:
    folder = shard_folder(numbered(4))
    (folder / "metadata.json").write_text(json.dumps({"padding": padding}))
    refused(folder, "metadata.json", "padding", str(padding))


def test_padding_that_leaves_nothing_is_named(shard_folder: Folder) -> None:
    folder = shard_folder(numbered(4), val=(numbered(1),))
    (folder / "metadata.json").write_text(json.dumps({"padding": {"val/shard_00000.npy": 33}}))
    refused(folder, "metadata.json", "val/shard_00000.npy", "33", split="val")
    (folder / "metadata.json").write_text(json.dumps({"padding": {"val/shard_00000.npy": 32}}))
    refused(folder, "val split", "no token", "prepare", split="val")
    assert dataset(folder).rows == 4


@pytest.mark.parametrize("text", ["{torn", "[1]", "[" * 200_000])
def test_unreadable_metadata_is_named(shard_folder: Folder, text: str) -> None:
    folder = shard_folder(numbered(4))
    (folder / "metadata.json").write_text(text)
    refused(folder, "metadata.json", "JSON")
