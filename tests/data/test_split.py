"""Validation has enough tokens, equal documents go the same way, and what a large corpus gave before it still gives."""

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest

from lepton.data import split
from lepton.data.prepare import prepare
from lepton.data.shards import ShardedDataset
from lepton.data.split import FLOOR, held_out_rows, held_out_tokens
from lepton.data.tokenizer import Tokenizer
from tests.data.test_prepare import documents, read


def write(path: Path, texts: list[str]) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def chosen(text: str, share: float) -> bool:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") < share * 2**64


def test_51_short_documents_validate_on_a_tenth(tmp_path: Path, letters: Tokenizer) -> None:
    texts = [f"Note {i}: rain" for i in range(51)]
    metadata = prepare([write(tmp_path / "a.jsonl", texts)], tmp_path / "out", letters)
    assert metadata["total_tokens"] // 10 <= metadata["val_tokens"] <= metadata["total_tokens"] // 10 + 15
    train, val = documents(read(tmp_path / "out"), letters), documents(read(tmp_path / "out" / "val"), letters)
    assert sorted(train + val) == sorted(texts)
    assert len(val) == metadata["val_documents"] > 4
    assert metadata["val_ends"] == 0
    assert train[0] == texts[0]


def test_enough_documents_are_split_as_before(tmp_path: Path, letters: Tokenizer) -> None:
    texts = [f"Document {i} tells of {i * i} things.\n" * (1 + i % 7) for i in range(1500)]
    metadata = prepare([write(tmp_path / "a.jsonl", texts)], tmp_path / "out", letters, val_fraction=0.03)
    assert documents(read(tmp_path / "out" / "val"), letters) == [text for text in texts[1:] if chosen(text, 0.03)]
    assert metadata["val_tokens"] > FLOOR
    assert (metadata["val_ends"], metadata["held_out_tokens"]) == (0, 0)


def test_few_large_documents_give_their_ends(tmp_path: Path, letters: Tokenizer) -> None:
    texts = ["".join(f"{name}{i} " for i in range(300)) for name in "abc"]
    source = write(tmp_path / "a.jsonl", [*texts, texts[1]])
    metadata = prepare([source], tmp_path / "out", letters, row_len=128, keep_duplicates=True)
    assert metadata["val_documents"] == 0
    train, val = documents(read(tmp_path / "out"), letters), documents(read(tmp_path / "out" / "val"), letters)
    assert metadata["val_ends"] == len(val) in (1, 2)
    assert metadata["val_tokens"] == sum(map(len, val)) + len(val) == 556
    assert metadata["total_tokens"] == sum(len(text) + 1 for text in [*texts, texts[1]]) + len(val)
    assert len(set(val)) == 1
    whole = [text for text in train if text in texts]
    cut = [text + val[0] for text in train if text not in texts]
    assert sorted(whole + cut) == sorted([*texts, texts[1]])


def test_equal_documents_go_the_same_way_when_more_are_chosen(tmp_path: Path, letters: Tokenizer) -> None:
    texts = [f"licence number {i % 12}" for i in range(60)]
    prepare([write(tmp_path / "a.jsonl", texts)], tmp_path / "out", letters, val_fraction=0.001, keep_duplicates=True)
    train, val = (set(documents(read(folder), letters)) for folder in (tmp_path / "out", tmp_path / "out" / "val"))
    assert val
    assert not train & val


def test_a_single_short_document_can_be_trained_on(tmp_path: Path, letters: Tokenizer) -> None:
    (tmp_path / "a.txt").write_text("It was the best of times. " * 40)
    metadata = prepare([tmp_path / "a.txt"], tmp_path / "out", letters)
    assert (metadata["documents"], metadata["val_documents"], metadata["val_ends"]) == (1, 0, 1)
    train, val = (
        ShardedDataset(tmp_path / "out", seq_len=64, seed=0, split=name, vocab_size=300) for name in ("train", "val")
    )
    assert (train.tokens, val.tokens) == (1041 - 104, 104 - 1)


def test_too_little_text_is_left_whole(tmp_path: Path, letters: Tokenizer) -> None:
    (tmp_path / "a.txt").write_text("It was the best of times.")
    metadata = prepare([tmp_path / "a.txt"], tmp_path / "out", letters)
    assert metadata["val_tokens"] == metadata["held_out_tokens"] == 0


def test_a_large_corpus_with_a_tiny_validation_document_holds_its_end_out(
    tmp_path: Path, letters: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(split, "HELD_BACK", 10_000)
    tiny = next(text for i in range(999) if chosen(text := f"tiny {i}", 0.05))
    large = [next(text for i in range(99) if not chosen(text := f"{name}{i} " * 1500, 0.05)) for name in "abc"]
    source = write(tmp_path / "a.jsonl", [large[0], tiny, *large[1:]])
    metadata = prepare([source], tmp_path / "out", letters, val_fraction=0.05, row_len=128)
    assert documents(read(tmp_path / "out"), letters) == [*large, tiny]
    assert (metadata["val_tokens"], metadata["val_documents"]) == (0, 0)
    val = ShardedDataset(tmp_path / "out", seq_len=64, seed=0, split="val", vocab_size=300)
    assert val.tokens + val.rows == metadata["held_out_tokens"] > 32


def test_without_a_share_nothing_is_chosen(tmp_path: Path, letters: Tokenizer) -> None:
    source = write(tmp_path / "a.jsonl", [f"Note {i}" for i in range(100)])
    metadata = prepare([source], tmp_path / "out", letters, val_fraction=0, row_len=64)
    assert not (tmp_path / "out" / "val").exists()
    assert metadata["held_out_tokens"] == held_out_tokens(metadata["total_tokens"], 64, 1 << 19) > 0


@pytest.mark.parametrize(
    ("rows", "padding", "held"),
    [
        ([1], 0, 0),
        ([2], 0, 1),
        ([2], 63, 1),
        ([3], 48, 1),
        ([3], 49, 2),
        ([5, 1], 60, 2),
        ([300, 1], 0, 1),
        ([300, 40], 60, 3),
        ([100_000], 60, 256),
    ],
)
def test_how_many_rows_are_held_out(rows: list[int], padding: int, held: int) -> None:
    assert held_out_rows(rows, 64, padding) == held


def test_held_out_rows_that_are_hardly_more_than_filler_are_joined_by_one(tmp_path: Path) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    np.save(folder / "shard_00000.npy", np.arange(64).reshape(4, 16))
    np.save(folder / "shard_00001.npy", np.arange(64, 80).reshape(1, 16))
    (folder / "metadata.json").write_text('{"padding": {"shard_00001.npy": 14}}')
    train, val = (ShardedDataset(folder, seq_len=16, seed=0, split=name, vocab_size=99) for name in ("train", "val"))
    assert [batch.tokens[0, : batch.lengths[0]].tolist() for batch in val.batches(1)] == [[*range(48, 64)], [64, 65]]
    assert (train.rows, train.tokens) == (3, 45)
