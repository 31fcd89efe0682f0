"""Snippets are stretches of the documents, spread over all shards, and never the filler of the last row."""

from pathlib import Path

from lepton.data.prepare import prepare
from lepton.data.snippets import TOKENS, snippets
from lepton.data.tokenizer import Tokenizer


def test_snippets_are_parts_of_documents_and_do_not_overlap(tmp_path: Path, letters: Tokenizer) -> None:
    texts = [f"<{i}" + "é" * (i % 50) + f"{i}>" for i in range(300)]
    for i, text in enumerate(texts):
        (tmp_path / f"{i:03d}.txt").write_text(text)
    metadata = prepare([tmp_path], tmp_path / "out", letters, val_fraction=0, row_len=64, shard_rows=30)
    found = snippets(tmp_path / "out", letters, metadata, count=100)
    assert len(found) == 100
    assert all(any(text in whole for whole in texts) for text in found)
    assert len(set(found)) > 40
    assert found == snippets(tmp_path / "out", letters, metadata, count=100)
    assert found != snippets(tmp_path / "out", letters, metadata, count=100, seed=1)
    all_of_them = snippets(tmp_path / "out", letters, metadata, count=10**6)
    assert len(all_of_them) == -(-64 * 30 // TOKENS) * (metadata["total_tokens"] // (64 * 30)) + -(
        -(metadata["total_tokens"] % (64 * 30)) // TOKENS
    )
    assert not any(text == "" for text in all_of_them[:-1])


def test_a_tiny_data_set_has_few(tmp_path: Path, letters: Tokenizer) -> None:
    (tmp_path / "a.txt").write_text("a few words")
    metadata = prepare([tmp_path / "a.txt"], tmp_path / "out", letters)
    assert snippets(tmp_path / "out", letters, metadata) == ["a few words"]
