import errno
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from lepton.data import prepare as module
from lepton.data.prepare import prepare
from lepton.data.shards import ShardedDataset
from lepton.data.tokenizer import Tokenizer
from lepton.errors import InputError


@pytest.fixture
def texts() -> list[str]:
    return [f"Document {i} tells of {i * i} things.\n" * (1 + i % 7) for i in range(300)]


@pytest.fixture
def source(tmp_path: Path, texts: list[str]) -> Path:
    path = tmp_path / "texts.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def read(folder: Path) -> list[int]:
    """All tokens of the shards right in `folder`."""
    paths = sorted(folder.glob("shard_*.npy"))
    return [i for path in paths for row in np.load(path).tolist() for i in row]


def documents(ids: list[int], tokenizer: Tokenizer) -> list[str]:
    found: list[list[int]] = [[]]
    for i in ids:
        if i == tokenizer.eos_id:
            found.append([])
        else:
            found[-1].append(i)
    return [tokenizer.decode(document) for document in found if document]


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_every_document_is_in_one_split_and_ends_with_eos(
    tmp_path: Path, source: Path, texts: list[str], shipped: Tokenizer
) -> None:
    out = tmp_path / "new" / "data"
    metadata = prepare([source], out, shipped, val_fraction=0.1, row_len=64, shard_rows=16)
    train, val = documents(read(out), shipped), documents(read(out / "val"), shipped)
    assert len(train) + len(val) == len(texts)
    assert [text for text in texts if text in set(train)] == train
    assert [text for text in texts if text in set(val)] == val
    assert 15 <= len(val) <= 45
    assert len(list(out.glob("shard_*.npy"))) > 3
    tokens = sum(len(shipped.encode(text)) + 1 for text in texts)
    assert metadata == {
        "name": "data",
        "total_tokens": tokens,
        "val_tokens": sum(len(shipped.encode(text)) + 1 for text in val),
        "documents": 300,
        "val_documents": len(val),
        "val_ends": 0,
        "held_out_tokens": 0,
        "text_bytes": sum(len(text.encode()) for text in texts),
        "duplicates": 0,
        "separators": 0,
        "markers_kept": 0,
        "skipped_files": 0,
        "skipped": {},
        "row_len": 64,
        "padding": metadata["padding"],
        "vocab_size": 50257,
        "tokenizer_hash": shipped.hash,
    }
    assert json.loads((out / "metadata.json").read_text()) == metadata
    assert sorted(path.name for path in tmp_path.rglob("*") if path.is_dir()) == ["data", "new", "val"]


def test_rows_are_full_and_the_last_is_filled_with_eos(tmp_path: Path, source: Path, shipped: Tokenizer) -> None:
    metadata = prepare([source], tmp_path / "data", shipped, val_fraction=0)
    array = np.load(tmp_path / "data" / "shard_00000.npy")
    assert array.dtype == np.uint16
    assert array.shape == (-(-metadata["total_tokens"] // 2048), 2048)
    ids = array.ravel()
    assert (ids[metadata["total_tokens"] - 1 :] == 0).all()
    assert ids[metadata["total_tokens"] - 2] != 0
    assert metadata["padding"] == {"shard_00000.npy": array.size - metadata["total_tokens"]}


def test_the_result_trains(tmp_path: Path, source: Path, shipped: Tokenizer) -> None:
    out = tmp_path / "data"
    metadata = prepare([source], out, shipped, row_len=64)
    train, val = (
        ShardedDataset(out, seq_len=32, seed=0, split=split, vocab_size=50257, tokenizer_hash=shipped.hash)
        for split in ("train", "val")
    )
    assert train.tokens + val.tokens == metadata["total_tokens"] - train.rows - val.rows
    assert sum(int(batch.lengths.sum()) - len(batch.lengths) for batch in val.batches(3)) == val.tokens
    assert train.batch(0, batch_size=4).tokens.shape == (4, 33)
    with pytest.raises(InputError, match="another tokenizer"):
        ShardedDataset(out, seq_len=32, seed=0, split="val", vocab_size=50257, tokenizer_hash="0" * 64)


def test_the_same_sources_give_the_same_bytes(
    tmp_path: Path, source: Path, shipped: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepare([source], tmp_path / "a" / "data", shipped, val_fraction=0.1, row_len=64)
    monkeypatch.setattr(module, "BATCH_CHARACTERS", 1000)
    prepare([source], tmp_path / "b" / "data", shipped, val_fraction=0.1, row_len=64)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


def test_equal_documents_go_to_the_same_split(tmp_path: Path, shipped: Tokenizer) -> None:
    folder = tmp_path / "texts"
    folder.mkdir()
    for i in range(200):
        (folder / f"{i:03d}.txt").write_text(f"licence number {i % 40}")
    prepare([folder], tmp_path / "data", shipped, val_fraction=0.3, row_len=64, keep_duplicates=True)
    train, val = documents(read(tmp_path / "data"), shipped), documents(read(tmp_path / "data" / "val"), shipped)
    assert len(train) + len(val) == 200
    assert set(train).isdisjoint(val) or set(train) & set(val) == {"licence number 0"}  # the first always trains
    assert val


def test_equal_documents_are_left_out_and_counted(tmp_path: Path, shipped: Tokenizer) -> None:
    texts = [f"number {i % 40}" for i in range(200)]
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    told: list[str] = []
    metadata = prepare([path], tmp_path / "data", shipped, val_fraction=0, row_len=64, note=told.append)
    assert documents(read(tmp_path / "data"), shipped) == texts[:40]
    assert metadata["documents"] == 40
    assert metadata["duplicates"] == 160
    assert "left out: 160 documents equal to an earlier one; --keep_duplicates keeps them" in told
    kept = prepare([path], tmp_path / "kept", shipped, val_fraction=0, row_len=64, keep_duplicates=True)
    assert (kept["documents"], kept["duplicates"]) == (200, 0)


def test_a_single_document_trains_and_lends_its_end(tmp_path: Path, shipped: Tokenizer) -> None:
    book = tmp_path / "book.txt"
    book.write_text("It was the best of times, it was the worst of times. " * 900)
    metadata = prepare([book], tmp_path / "data", shipped, val_fraction=0.999)
    assert metadata["documents"] == 1
    assert metadata["val_documents"] == 0
    assert not (tmp_path / "data" / "val").exists()
    val = ShardedDataset(tmp_path / "data", seq_len=512, seed=0, split="val", vocab_size=50257)
    assert val.tokens == metadata["held_out_tokens"] - val.rows > 512


def test_a_text_about_eos_holds_no_eos(tmp_path: Path, shipped: Tokenizer) -> None:
    text = tmp_path / "a.txt"
    text.write_text("print('<|endoftext|>')")
    prepare([text], tmp_path / "data", shipped, row_len=32)
    ids = read(tmp_path / "data")
    assert shipped.decode(ids) == "print('<|endoftext|>')"
    assert 0 not in ids[: len(shipped.encode("print('<|endoftext|>')"))]


def test_preparing_a_folder_twice_leaves_its_own_output_out(tmp_path: Path, shipped: Tokenizer) -> None:
    (tmp_path / "a.txt").write_text("some text")
    first = prepare([tmp_path], tmp_path / "data", shipped)
    second = prepare([tmp_path], tmp_path / "data", shipped, force=True)
    assert first == second


# Nothing is lost


def test_a_folder_that_holds_something_is_kept(tmp_path: Path, source: Path, shipped: Tokenizer) -> None:
    out = tmp_path / "data"
    prepare([source], out, shipped, row_len=64)
    before = contents(out)
    with pytest.raises(InputError, match=r"data is not empty.*--force"):
        prepare([source], out, shipped)
    assert contents(out) == before
    prepare([source], out, shipped, row_len=32, force=True)
    assert contents(out) != before
    (out / "val").mkdir(exist_ok=True)
    for foreign in ("thesis.txt", "val/photo.jpg"):
        (out / foreign).write_text("mine")
        with pytest.raises(InputError, match=r"holds other files \(.*(thesis|photo)"):
            prepare([source], out, shipped, force=True)
        assert (out / foreign).read_text() == "mine"
        (out / foreign).unlink()


def test_a_file_or_foreign_metadata_is_kept(tmp_path: Path, source: Path, shipped: Tokenizer) -> None:
    with pytest.raises(InputError, match=r"texts\.jsonl is a file"):
        prepare([source], source, shipped, force=True)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "metadata.json").write_text("{}")
    with pytest.raises(InputError, match="not empty"):
        prepare([source], tmp_path / "other", shipped, force=True)
    assert (tmp_path / "other" / "metadata.json").read_text() == "{}"


def test_the_output_is_no_source(tmp_path: Path, source: Path, shipped: Tokenizer) -> None:
    out = tmp_path / "data"
    prepare([source], out, shipped)
    before = contents(out)
    for inside in (out, out / "metadata.json"):
        with pytest.raises(InputError, match="lies in the output folder"):
            prepare([source, inside], out, shipped, force=True)
    assert contents(out) == before


def test_an_empty_folder_is_used(tmp_path: Path, source: Path, shipped: Tokenizer) -> None:
    (tmp_path / "data").mkdir()
    assert prepare([source], tmp_path / "data", shipped)["documents"] == 300


@pytest.mark.parametrize("failure", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()])
def test_a_failure_leaves_no_half_data_set_and_keeps_the_old_one(
    tmp_path: Path, source: Path, shipped: Tokenizer, monkeypatch: pytest.MonkeyPatch, failure: BaseException
) -> None:
    out = tmp_path / "data"
    prepare([source], out, shipped)
    before = contents(tmp_path)
    save: Callable[..., None] = np.save

    def fail(path: Path, rows: np.ndarray) -> None:
        save(path, rows)
        raise failure

    monkeypatch.setattr(np, "save", fail)
    expected = InputError if isinstance(failure, OSError) else KeyboardInterrupt
    for target, force in ((out, True), (tmp_path / "fresh", False)):
        with pytest.raises(expected, match="No space left" if expected is InputError else None):
            prepare([source], target, shipped, force=force)
        assert contents(tmp_path) == before


def test_a_data_set_that_appears_meanwhile_is_kept(
    tmp_path: Path, source: Path, shipped: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "data"
    save: Callable[..., None] = np.save

    def slow(path: Path, rows: np.ndarray) -> None:
        out.mkdir(exist_ok=True)
        (out / "shard_00000.npy").write_text("of the other process")
        save(path, rows)

    monkeypatch.setattr(np, "save", slow)
    with pytest.raises(InputError, match="cannot write"):
        prepare([source], out, shipped)
    assert list(contents(out).values()) == [b"of the other process"]


def test_sources_without_text_are_refused(tmp_path: Path, shipped: Tokenizer) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.bin").write_bytes(b"\0")
    with pytest.raises(InputError, match=r"no text found in .*in \(skipped: 1 binary \(a\.bin\)\)"):
        prepare(iter([tmp_path / "in"]), tmp_path / "data", shipped)
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


@pytest.mark.parametrize("share", [-0.1, 1, 7])
def test_an_impossible_share_is_refused(tmp_path: Path, source: Path, shipped: Tokenizer, share: float) -> None:
    with pytest.raises(InputError, match=f"val_fraction={share}"):
        prepare([source], tmp_path / "data", shipped, val_fraction=share)


@pytest.mark.parametrize("rows", [-1, 2**22, 2**63])
def test_shards_that_no_memory_holds_are_refused(tmp_path: Path, shipped: Tokenizer, rows: int) -> None:
    with pytest.raises(InputError, match=f"shard_rows={rows}: must lie in 1.."):
        prepare([tmp_path / "a.txt"], tmp_path / "data", shipped, row_len=64, shard_rows=rows)
