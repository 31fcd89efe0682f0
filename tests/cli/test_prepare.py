"""`python -m lepton prepare` and `python -m lepton tokenizer`."""

import argparse
import ast
import json
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from lepton.cli import prepare, tokenizer, train
from lepton.data.shards import ShardedDataset
from lepton.data.tokenizer import load_tokenizer
from lepton.errors import InputError
from tests.cli.tiny import small_bpe

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
    assert "bytes of text per token" in out
    assert "skipped: 1 binary (photo.jpg)" in out
    assert "train on it: python -m lepton train --data_dir data" in out
    assert np.load("data/shard_00000.npy").shape[1] == 2048


def test_ten_random_snippets_are_shown_the_same_each_time(
    call: Call, notes: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = []
    for folder in ("data", "again"):
        call(prepare, "notes", "--out", folder)
        lines = capsys.readouterr().out.splitlines()
        start = lines.index("random snippets of what trains:") + 1
        found.append([ast.literal_eval(line.strip()) for line in lines[start : start + 10]])
        assert lines[start + 10].startswith("train on it: ")
    assert found[0] == found[1]
    assert len(set(found[0])) == 10
    whole = "".join((notes / f"{i:02d}.md").read_text() for i in range(40))
    assert all(text in whole for text in found[0])
    assert any("It rained on day" in text for text in found[0])


def test_duplicates_are_said_and_can_be_kept(call: Call, notes: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree("notes", "notes/again")
    call(prepare, "notes", "--out", "data")
    out = capsys.readouterr().out
    assert "data: 40 documents, " in out
    assert "left out: 40 documents equal to an earlier one" in out
    call(prepare, "notes", "--out", "data", "--force", "--keep_duplicates")
    assert "data: 80 documents, " in capsys.readouterr().out


def test_conversations_are_prepared_and_the_suggested_command_fits(
    call: Call, capsys: pytest.CaptureFixture[str]
) -> None:
    talk = [{"role": "user", "content": "How many?"}, {"role": "assistant", "content": "Seven of nine."}]
    lines = [json.dumps({"talk": [*talk, {"role": "user", "content": str(i)}, talk[1]]}) for i in range(50)]
    Path("chats.jsonl").write_text("\n".join([*lines, lines[0]]))
    with pytest.raises(
        InputError, match=r"no field 'messages' \(found: talk\); name that of the messages: --text_field"
    ):
        call(prepare, "chats.jsonl", "--out", "data", "--chat")
    with pytest.raises(InputError, match="--separator: conversations are not split"):
        call(prepare, "chats.jsonl", "--out", "data", "--chat", "--separator", "x")
    for words, seq_len in (([], 512), (["--row_len", "100", "--force"], 99)):
        call(prepare, "chats.jsonl", "--out", "data", "--chat", "--text_field", "talk", *words)
        out = capsys.readouterr().out
        assert "data: 50 conversations, " in out
        assert f" tokens, {50 * 10} of them in answers" in out
        assert "left out: 1 conversations equal to an earlier one" in out
        assert "How many?" in out
        (line,) = [line for line in out.splitlines() if line.startswith("fine-tune a model on it: ")]
        parser = argparse.ArgumentParser(exit_on_error=False)
        train.add_arguments(parser)
        given = vars(parser.parse_args(shlex.split(line.partition(": ")[2])[4:]))
        settings = train.settings_of({name: value for name, value in given.items() if name != "json"})
        assert (settings.data_dir, settings.init_from) == ("data", "checkpoints/final.pt")
        assert settings.checkpoint_dir != "checkpoints"
        assert settings.seq_len == seq_len
        ShardedDataset("data", seq_len=seq_len, seed=0, split="train", vocab_size=50257)


def suggested(out: str) -> list[str]:
    """The command that the output suggests, as a shell would read it."""
    (line,) = [line for line in out.splitlines() if line.startswith("train on it: ")]
    return shlex.split(line.removeprefix("train on it: "))


def test_the_suggested_command_works_when_pasted(
    call: Call, notes: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    notes.rename("my notes")
    Path("my tokenizer.json").write_text(small_bpe().to_str())
    for gpu in (None, "/usr/bin/nvidia-smi"):
        monkeypatch.setattr(shutil, "which", lambda name, gpu=gpu: gpu)
        call(
            prepare, "my notes", "--out", "it's mine", "--tokenizer", "my tokenizer.json", "--row_len", "64", "--force"
        )
        python, m, module, command, *words = suggested(capsys.readouterr().out)
        assert (python, m, module, command) == ("python", "-m", "lepton", "train")
        parser = argparse.ArgumentParser(exit_on_error=False)
        train.add_arguments(parser)
        settings = train.settings_of({k: v for k, v in vars(parser.parse_args(words)).items() if k != "json"})
        assert settings.data_dir == "it's mine"
        assert settings.tokenizer == "my tokenizer.json"
        assert settings.model_size == (None if gpu else "nano")
        for split in ("train", "val"):
            ShardedDataset(settings.data_dir, seq_len=settings.seq_len, seed=0, split=split, vocab_size=320)


def test_no_command_is_suggested_that_training_refuses(call: Call, capsys: pytest.CaptureFixture[str]) -> None:
    Path("tokenizer.json").write_text(small_bpe().to_str())
    for text, share, row_len in (
        ("a few words", "0.01", "2048"),
        ("a few words " * 60, "0", "2048"),
        ("é" * 32, "0", "64"),
    ):
        Path("a.txt").write_text(text)
        call(
            prepare, "a.txt", "--out", "data", "--tokenizer", "tokenizer.json", "--val_fraction", share, "--force",
            "--row_len", row_len,
        )  # fmt: skip
        out = capsys.readouterr().out
        assert "train on it" not in out
        assert "too little to train on" in out
        with pytest.raises(InputError):
            ShardedDataset("data", seq_len=8, seed=0, split="val", vocab_size=320)


def test_little_validation_is_said(call: Call, notes: Path, capsys: pytest.CaptureFixture[str]) -> None:
    call(prepare, "notes", "--out", "data", "--json")
    tokens = json.loads(capsys.readouterr().out)["val_tokens"]
    assert 20 < tokens < 200
    call(prepare, "notes", "--out", "data", "--force")
    assert f" documents, {tokens} tokens; this is little" in capsys.readouterr().out


def test_separators_and_rows_have_flags(call: Call, capsys: pytest.CaptureFixture[str]) -> None:
    Path("a.txt").write_text("One.\n<|endoftext|>\nTwo with <|endoftext|> inside.\n--\nThree.")
    Path("tokenizer.json").write_text(small_bpe().to_str())
    for words, count, note in (
        ([], 2, "kept as text: 1 <|endoftext|> inside lines"),
        (["--separator", "<|endoftext|>"], 3, "separators between documents: 2"),
        (["--separator", "\\n--\\n"], 2, "separators between documents: 1"),
        (["--separator", ""], 1, ""),
    ):
        call(prepare, "a.txt", "--out", "data", "--tokenizer", "tokenizer.json", "--force", "--row_len", "32", *words)
        out = capsys.readouterr().out
        assert f"data: {count} documents" in out
        assert note in out
    assert np.load("data/shard_00000.npy").shape[1] == 32
    for row_len in ("1", "-4", "9999999"):
        with pytest.raises(InputError, match=f"row_len={row_len}"):
            call(prepare, "a.txt", "--out", "data", "--force", "--row_len", row_len, "--tokenizer", "tokenizer.json")


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


def test_a_tokenizer_is_trained_on_the_way(call: Call, notes: Path, capsys: pytest.CaptureFixture[str]) -> None:
    call(prepare, "notes", "--out", "data", "--train_tokenizer", "280", "--row_len", "64")
    words = suggested(capsys.readouterr().out)
    assert words[words.index("--tokenizer") + 1] == "data.tokenizer.json.xz"
    own = load_tokenizer("data.tokenizer.json.xz")
    assert 259 < own.size <= 280
    metadata = json.loads(Path("data/metadata.json").read_text())
    assert (metadata["tokenizer_hash"], metadata["vocab_size"]) == (own.hash, own.size)
    before = Path("data.tokenizer.json.xz").read_bytes()
    for flags, problem in (
        (["--train_tokenizer", "270"], "data is not empty: .*--force"),
        (["--train_tokenizer", "270", "--tokenizer", "x.json", "--force"], "--train_tokenizer: give one of them"),
        (["--train_tokenizer", "3", "--force"], "vocab_size=3"),
        (["--train_tokenizer", "270", "--chat", "--force"], "has a tokenizer already"),
    ):
        with pytest.raises(InputError, match=problem):
            call(prepare, "notes", "--out", "data", *flags)
        assert Path("data.tokenizer.json.xz").read_bytes() == before
    call(prepare, "notes", "--out", "data", "--train_tokenizer", "270", "--force")
    assert load_tokenizer("data.tokenizer.json.xz").size <= 270


def test_info_shows_the_tokenizer_that_would_be_used(call: Call, capsys: pytest.CaptureFixture[str]) -> None:
    call(tokenizer, "info")
    assert f"ids: 50257\neos_id: 0\nhash: {load_tokenizer().hash}\n" == capsys.readouterr().out
    with pytest.raises(InputError, match=r"nowhere\.json"):
        call(tokenizer, "info", "--tokenizer", "nowhere.json")
