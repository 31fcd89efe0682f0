"""`python -m lepton prepare` and `python -m lepton tokenizer`."""

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from lepton.cli import prepare, tokenizer
from lepton.data.tokenizer import load_tokenizer
from lepton.errors import InputError

Call = Callable[..., int]


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Call:
    """A function that runs a command module with arguments, in an empty folder."""
    monkeypatch.chdir(tmp_path)

    def run(command: ModuleType, *words: str) -> int:
        parser = argparse.ArgumentParser(exit_on_error=False)
        command.add_arguments(parser)
        code: int = command.run(parser.parse_args(words))
        return code

    return run


@pytest.fixture
def notes(tmp_path: Path) -> Path:
    path = tmp_path / "notes"
    path.mkdir()
    for i in range(40):
        (path / f"{i:02d}.md").write_text(f"# Note {i}\n\nIt rained on day {i}.\n")
    (path / "photo.jpg").write_bytes(b"\xff\xd8\0")
    return path


def test_prepare_says_what_it_made(call: Call, notes: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call(prepare, "notes", "--out", "data", "--val_fraction", "0.2") == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert "data: 40 documents, " in out
    assert "bytes of text a token" in out
    assert "skipped: 1 binary (photo.jpg)" in out
    assert "train on it: python -m lepton train --data_dir data" in out
    assert np.load("data/shard_00000.npy").shape[1] == 2048


def test_prepare_json_is_json_alone(call: Call, notes: Path, capsys: pytest.CaptureFixture[str]) -> None:
    call(prepare, "notes", "--out", "data", "--json")
    figures = json.loads(capsys.readouterr().out)
    assert figures["out"] == "data"
    assert figures["documents"] == 40
    assert figures == {"out": "data", **json.loads(Path("data/metadata.json").read_text())}


def test_prepare_reads_the_named_field(call: Call, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.jsonl").write_text('{"body": "one"}\n{"body": "two"}\n')
    with pytest.raises(InputError, match="--text_field"):
        call(prepare, "a.jsonl", "--out", "data")
    assert not Path("data").exists()
    call(prepare, "a.jsonl", "--out", "data", "--text_field", "body", "--json")
    assert json.loads(capsys.readouterr().out)["documents"] == 2


def test_prepare_replaces_a_data_set_only_with_force(call: Call, notes: Path) -> None:
    call(prepare, "notes", "--out", "data")
    with pytest.raises(InputError, match="--force"):
        call(prepare, "notes", "--out", "data")
    assert call(prepare, "notes", "--out", "data", "--force") == 0


def test_a_tokenizer_is_trained_shown_and_used(call: Call, notes: Path, capsys: pytest.CaptureFixture[str]) -> None:
    call(tokenizer, "train", "notes", "--out", "mine.json.xz", "--vocab_size", "280", "--json")
    trained = json.loads(capsys.readouterr().out)
    assert trained["eos_id"] == 0
    assert 259 < trained["ids"] <= 280
    call(tokenizer, "info", "--tokenizer", "mine.json.xz", "--json")
    assert json.loads(capsys.readouterr().out) == trained
    call(prepare, "notes", "--out", "data", "--tokenizer", "mine.json.xz")
    assert "--data_dir data --tokenizer mine.json.xz" in capsys.readouterr().out
    assert json.loads(Path("data/metadata.json").read_text())["tokenizer_hash"] == trained["hash"]
    with pytest.raises(InputError, match="--force"):
        call(tokenizer, "train", "notes", "--out", "mine.json.xz")


def test_info_shows_the_tokenizer_that_would_be_used(call: Call, capsys: pytest.CaptureFixture[str]) -> None:
    call(tokenizer, "info")
    assert f"ids: 50257\neos_id: 0\nhash: {load_tokenizer().hash}\n" == capsys.readouterr().out
    with pytest.raises(InputError, match=r"nowhere\.json"):
        call(tokenizer, "info", "--tokenizer", "nowhere.json")
