"""`python -m lepton eval`: figures of data sets and of text files, and what a user can get wrong."""

import json
import lzma

import numpy as np
import pytest

from lepton.data.shards import ShardedDataset
from lepton.data.sources import Corpus
from lepton.evals.heldout import evaluate_documents, evaluate_rows
from tests.cli.tiny import TEXT, run, run_json, save_tiny


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    path = tmp_path_factory.mktemp("eval") / "final.pt"
    return path, *save_tiny(path)


def command_of(path):
    """Run in fp32, as the comparisons do, also where the hardware has bf16."""
    return "eval", "--checkpoint", path, "--dtype", "fp32"


@pytest.fixture
def data_dir(tmp_path, saved):
    """Twelve rows of text, so that one is held out."""
    ids = saved[2].encode(TEXT * 8)[: 12 * 32]
    folder = tmp_path / "shards"
    folder.mkdir()
    np.save(folder / "shard_00000.npy", np.array(ids, dtype=np.int32).reshape(12, 32))
    return folder


def test_a_data_set(saved, data_dir):
    path, model, tokenizer = saved
    for split in ("val", "train"):
        figures = run_json(*command_of(path), "--data_dir", data_dir, "--split", split)
        data = ShardedDataset(data_dir, seq_len=31, seed=0, split=split, vocab_size=320)
        expected = evaluate_rows(model, data.batches(8), tokenizer)
        assert figures["tokens"] == expected.tokens == data.tokens
        assert figures["bytes"] == expected.bytes
        assert figures["nats_per_token"] == pytest.approx(expected.nats_per_token)
        assert figures["bits_per_byte"] == pytest.approx(expected.bits_per_byte)
        assert figures["step"] == 7


def test_a_limit_on_tokens(saved, data_dir):
    words = [*command_of(saved[0]), "--data_dir", data_dir, "--split", "train", "--batch_size", 2]
    assert run_json(*words, "--max_tokens", 63)["tokens"] == 4 * 31


def test_the_default_data_set(saved, data_dir, monkeypatch):
    monkeypatch.setattr("lepton.data.stdlib.default_corpus", lambda tokenizer: data_dir)
    assert run_json(*command_of(saved[0]))["tokens"] == 31


def test_text_files_and_json_lines(saved, tmp_path):
    path, model, tokenizer = saved
    (tmp_path / "a.txt").write_text(TEXT, encoding="utf-8")
    with lzma.open(tmp_path / "b.jsonl.xz", "wt", encoding="utf-8") as file:
        file.writelines(json.dumps({"text": text}) + "\n" for text in ("fox", TEXT))
    files = [tmp_path / "a.txt", tmp_path / "b.jsonl.xz"]
    figures = run_json(*command_of(path), "--text", *files)
    expected = evaluate_documents(model, Corpus(files).pieces(), tokenizer)
    assert figures["nats_per_token"] == pytest.approx(expected.nats_per_token)
    assert figures["bytes"] == 2 * len(TEXT.encode()) + 3
    assert figures["data"] == "2 files"
    assert run_json(*command_of(path), "--text", *files, "--max_tokens", 9)["tokens"] == 9


def test_lines_for_people(saved, data_dir):
    code, out, err = run(*command_of(saved[0]), "--data_dir", data_dir)
    assert code == 0
    figures = run_json(*command_of(saved[0]), "--data_dir", data_dir)
    assert f"nats per token  {figures['nats_per_token']:.4f}\n" in out
    assert f"bits per byte   {figures['bits_per_byte']:.4f}\n" in out
    assert "val split" in err


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["--data_dir", "nowhere"], "nowhere"),
        (["--text", "nowhere.txt"], "nowhere.txt"),
        (["--text", "a.txt", "--data_dir", "b"], "give one of them"),
        (["--max_tokens", 0], "--max_tokens 0"),
        (["--batch_size", 0], "--batch_size 0"),
    ],
)
def test_mistakes_are_one_line(saved, flags, named):
    code, out, err = run(*command_of(saved[0]), *flags)
    assert (code, out) == (2, "")
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert named in err


def test_data_of_another_tokenizer(saved, data_dir):
    (data_dir / "metadata.json").write_text(json.dumps({"tokenizer_hash": "0" * 64}), encoding="utf-8")
    code, _, err = run(*command_of(saved[0]), "--data_dir", data_dir)
    assert code == 2
    assert "another tokenizer" in err
