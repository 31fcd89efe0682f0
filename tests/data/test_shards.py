"""The windows of a data set: which tokens a batch has."""

import json

import numpy as np
import pytest
import torch

from lepton.data import shards
from lepton.data.shards import ShardedDataset
from tests.data.small import Folder, dataset, numbered


def targets(batch: shards.Batch) -> list[int]:
    """The valid targets of a batch, checked to be right behind their inputs."""
    found = []
    for row, length in zip(batch.tokens.tolist(), batch.lengths.tolist(), strict=True):
        assert row[:length] == list(range(row[0], row[0] + length))
        assert row[length:] == [1] * (len(row) - length)
        found += row[1:length]
    return found


def epoch(data: ShardedDataset, number: int = 0) -> list[int]:
    """All targets of an epoch, read one window a step."""
    steps = range(number * data.windows, (number + 1) * data.windows)
    return [target for step in steps for target in targets(data.batch(step, batch_size=1))]


def targets_of(*arrays: np.ndarray) -> list[int]:
    return sorted(np.concatenate([array[:, 1:].ravel() for array in arrays]).tolist())


@pytest.mark.parametrize("seq_len", [1, 5, 8, 31, 32, 33])
def test_an_epoch_uses_every_target_once(shard_folder: Folder, seq_len: int) -> None:
    train = [numbered(3), numbered(4, start=200)]
    data = dataset(shard_folder(*train, val=(numbered(1, start=900),)), seq_len=seq_len)
    for number in (0, 1):
        assert sorted(epoch(data, number)) == targets_of(*train)
    assert data.tokens == len(targets_of(*train))
    assert epoch(data, 0) != epoch(data, 1) or data.windows < 8


def test_batches_have_their_shape_and_are_tensors_of_int64(shard_folder: Folder) -> None:
    tokens, lengths, _ = dataset(shard_folder(numbered(9))).batch(3, batch_size=5)
    assert tokens.shape == (5, 9)
    assert lengths.shape == (5,)
    assert tokens.dtype == lengths.dtype == torch.int64


def test_a_batch_is_a_function_of_its_arguments(shard_folder: Folder) -> None:
    folder = shard_folder(numbered(40), numbered(40, start=2000))
    walked, fresh = dataset(folder), dataset(folder)
    for step in range(30):
        walked.batch(step, batch_size=4)
    for step in (29, 3, 100_000):
        assert torch.equal(walked.batch(step, batch_size=4).tokens, fresh.batch(step, batch_size=4).tokens)
    assert not torch.equal(dataset(folder, seed=1).batch(3, batch_size=4).tokens, fresh.batch(3, batch_size=4).tokens)


def test_micro_batches_share_an_epoch_out(shard_folder: Folder) -> None:
    data = dataset(shard_folder(numbered(49), val=(numbered(1, start=3000),)))
    one = [window for step in range(2) for window in data.batch(step, batch_size=24).tokens.tolist()]
    parts = [
        window
        for step in range(2)
        for micro in range(3)
        for window in data.batch(step, micro, batch_size=8, accumulate=3).tokens.tolist()
    ]
    assert parts == one
    assert len({window[0] for window in parts}) == 48


def test_a_batch_may_span_epochs(shard_folder: Folder) -> None:
    data = dataset(shard_folder(numbered(3), val=(numbered(1),)))
    batch = data.batch(0, batch_size=2 * data.windows)
    half = len(targets(batch)) // 2
    assert targets(batch)[:half] == epoch(data, 0)
    assert targets(batch)[half:] == epoch(data, 1)


@pytest.mark.parametrize(
    "dtype", [np.int8, np.int16, np.int32, np.int64, np.uint8, np.uint16, np.uint32, np.uint64, ">i4"]
)
def test_every_integer_type_is_read(shard_folder: Folder, dtype: type) -> None:
    array = numbered(3, row_len=33).astype(dtype)
    data = dataset(shard_folder(array))
    assert sorted(epoch(data)) == targets_of(array[:2])


def test_an_array_in_column_order_is_read(shard_folder: Folder) -> None:
    data = dataset(shard_folder(np.asfortranarray(numbered(3))))
    assert sorted(epoch(data)) == targets_of(numbered(3)[:2])


@pytest.mark.parametrize("sizes", [[2], [300], [1, 1], [5, 1], [600, 50], [0, 3, 0]])
def test_validation_is_held_out_of_training(shard_folder: Folder, sizes: list[int]) -> None:
    arrays = [numbered(n, row_len=5, start=10_000 * i) for i, n in enumerate(sizes)]
    folder = shard_folder(*arrays)
    train, val = (dataset(folder, seq_len=4, split=split) for split in ("train", "val"))
    seen = [target for batch in val.batches(7) for target in targets(batch)]
    assert sorted(epoch(train) + seen) == targets_of(*arrays)
    assert val.rows == min(max(1, sum(sizes) // 100), [n for n in sizes if n][-1])


def test_many_shards_are_read_without_many_open_files(shard_folder: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards, "OPEN_SHARDS", 3)
    arrays = [numbered(2, row_len=5, start=10 * i) for i in range(50)]
    data = dataset(shard_folder(*arrays), seq_len=4)
    assert sorted(epoch(data)) == targets_of(*arrays)[:-4]
    assert data._open.cache_info().currsize == 3


def test_a_val_folder_is_the_validation_split(shard_folder: Folder) -> None:
    train, val = numbered(4), numbered(3, start=500)
    folder = shard_folder(train, val=(val,))
    seen = [target for batch in dataset(folder, split="val").batches(5) for target in targets(batch)]
    assert seen == targets_of(val)
    assert sorted(epoch(dataset(folder))) == targets_of(train)


def test_validation_batches_come_in_order_and_spread_out_under_a_limit(shard_folder: Folder) -> None:
    data = dataset(shard_folder(numbered(1), val=(numbered(10),)), split="val")
    assert [len(batch.lengths) for batch in data.batches(16)] == [16, 16, 8]
    few = [row[0] for batch in data.batches(5, limit=2) for row in batch.tokens.tolist()]
    assert few == [33 * row for row in range(10)]


def test_describe_names_the_data(shard_folder: Folder) -> None:
    assert dataset(shard_folder(numbered(3))).describe() == "data: 64 tokens, 1 shard"
    folder = shard_folder(np.zeros((101, 101), np.int32), np.zeros((9, 101), np.int32), val=(numbered(1),), name="b")
    (folder / "metadata.json").write_text('{"name": "mine", "total_tokens": 11110}')
    assert dataset(folder).describe() == "mine: 11.0 k tokens, 2 shards"


def test_only_the_headers_are_read_at_the_start(shard_folder: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = shard_folder(numbered(3), numbered(3))
    monkeypatch.setattr(np.lib.format, "open_memmap", None)
    monkeypatch.setattr(np, "load", None)
    assert dataset(folder).rows == 5


def test_the_public_form_is_read(shard_folder: Folder) -> None:
    folder = shard_folder(np.ones((300, 2048), np.int32), np.ones((4, 2048), np.int32))
    (folder / "metadata.json").write_text('{"total_tokens": 622592}')
    data = dataset(folder, seq_len=512, tokenizer_hash="anything")
    assert (data.rows, data.windows, data.tokens) == (301, 1204, 301 * 2047)
    assert sorted(data.batch(0, batch_size=1204).lengths.unique().tolist()) == [512, 513]


@pytest.mark.parametrize("padding", [1, 7, 8, 25, 31, 32])
@pytest.mark.parametrize("seq_len", [5, 8, 32])
def test_what_only_fills_a_row_is_never_read(shard_folder: Folder, padding: int, seq_len: int) -> None:
    train, val = numbered(3), numbered(2, start=500)
    folder = shard_folder(train, val=(val,))
    (folder / "metadata.json").write_text(
        json.dumps({"padding": {"shard_00000.npy": padding, "val/shard_00000.npy": padding}})
    )
    for split, array in (("train", train), ("val", val)):
        data = dataset(folder, seq_len=seq_len, split=split)
        wanted = targets_of(array)[:-padding]
        assert sorted(epoch(data)) == wanted
        assert data.tokens == len(wanted)
        batches = list(data.batches(3))
        assert [target for batch in batches for target in targets(batch)] == wanted
        assert min(length for batch in batches for length in batch.lengths.tolist()) >= 2


def test_held_out_rows_take_the_padding_along(shard_folder: Folder) -> None:
    folder = shard_folder(numbered(2), numbered(4, start=500))
    (folder / "metadata.json").write_text(json.dumps({"padding": {"shard_00001.npy": 20}}))
    train, val = (dataset(folder, split=split) for split in ("train", "val"))
    assert (train.tokens, val.tokens) == (5 * 32, 12)
    assert sorted(epoch(train) + epoch(val)) == targets_of(numbered(2), numbered(4, start=500))[:-20]


@pytest.mark.parametrize(("eos_id", "padding"), [(0, 1), (1, 0), (9, 0)])
def test_short_rows_are_padded_with_what_ends_no_document(shard_folder: Folder, eos_id: int, padding: int) -> None:
    data = dataset(shard_folder(numbered(9, start=100)), seq_len=20, eos_id=eos_id)
    batch = data.batch(0, batch_size=data.windows)
    short = batch.lengths < 21
    assert short.any()
    assert (batch.tokens[short][:, 13:] == padding).all()


def test_a_fingerprint_is_that_of_the_rows_wherever_and_however_they_lie(shard_folder: Folder) -> None:
    rows = numbered(12)
    one = dataset(shard_folder(rows, name="one")).fingerprint()
    two = dataset(shard_folder(rows[:5].astype(np.int64), rows[5:], name="two"), seq_len=4, seed=3).fingerprint()
    assert one == two
    assert (one["rows"], one["row_len"], one["tokens"]) == (11, 33, 11 * 32)


@pytest.mark.parametrize("place", [(0, 0), (5, 20), (10, 32)])
def test_a_fingerprint_shows_one_changed_token_of_a_small_split(shard_folder: Folder, place: tuple[int, int]) -> None:
    rows = numbered(12)
    before = dataset(shard_folder(rows, name="before")).fingerprint()
    rows[place] += 1
    assert dataset(shard_folder(rows, name="after")).fingerprint() != before


def test_a_fingerprint_reads_little_of_a_large_split(shard_folder: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards, "FINGERPRINT_PIECES", 4)
    monkeypatch.setattr(shards, "FINGERPRINT_PIECE", 10)
    rows = numbered(60)
    before = dataset(shard_folder(rows, name="before")).fingerprint()
    unread = rows.copy()
    unread[0, 32] += 1
    assert dataset(shard_folder(unread, name="unread")).fingerprint() == before
    flat = rows.reshape(-1)
    moved = np.concatenate([flat[:500], flat[:1], flat[500:-1]]).reshape(rows.shape)
    assert dataset(shard_folder(moved, name="moved")).fingerprint() != before
