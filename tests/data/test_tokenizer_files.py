"""Which file is loaded as the tokenizer, and what is refused, also where the library itself fails."""

import json
import lzma
import os
from pathlib import Path

import pytest
from tokenizers import decoders

from lepton.data import tokenizer as module
from lepton.data.tokenizer import EOS, MAX_IDS, Tokenizer, load_tokenizer
from lepton.errors import InputError
from tests.data.small import small


@pytest.mark.parametrize(
    "change",
    [
        {"normalizer": {"type": "Replace", "pattern": {"String": ""}, "content": "x"}},
        {"normalizer": {"type": "Precompiled", "precompiled_charsmap": "AAAA"}},
        {"pre_tokenizer": {"type": "FixedLength", "length": 0}},
        {"model": {"type": "WordLevel", "vocab": {EOS: 0}, "unk_token": "?"}},
        {"model": {"type": "Unigram", "vocab": [[EOS, -1.0], ["a", -2.0]], "unk_id": None, "byte_fallback": False}},
        {"model": {"type": "BPE", "vocab": {EOS: 10**12}, "merges": []}},
        {"model": {"type": "BPE", "vocab": {EOS: 0, "a": 4 * 10**9}, "merges": []}},
        {"added_tokens": [{"id": -1}]},
        {
            "model": {
                "type": "BPE",
                "vocab": {EOS: 0, "a": 1, "é": 2, "aé": 3},
                "merges": [["a", "é"]],
                "continuing_subword_prefix": "x",
            }
        },
        {
            "model": {
                "type": "BPE",
                "vocab": {EOS: 0, "a": 1, "éb": 2, "ab": 3},
                "merges": ["a éb"],
                "continuing_subword_prefix": "é",
            }
        },
    ],
)
def test_panics_and_bare_exceptions_become_input_errors(change: dict[str, object]) -> None:
    form = json.loads(small(260).to_str()) | change
    with pytest.raises(InputError) as caught:
        Tokenizer.from_json(json.dumps(form)).encode("some text")
    assert "\n" not in str(caught.value)
    with pytest.raises(InputError):
        Tokenizer.from_json(json.dumps(form)).encode_batch(["some text"])


@pytest.mark.parametrize("text", [None, 5, b"{}", ["{}"], "", "5", "null", "[]", "\ud800", "[" * 200_000])
def test_what_is_no_tokenizer_at_all_is_refused(text: object) -> None:
    with pytest.raises(InputError, match="no tokenizer"):
        Tokenizer.from_json(text)  # type: ignore[arg-type]


def test_other_errors_than_the_librarys_pass() -> None:
    for error in (KeyboardInterrupt(), InputError("mine"), MemoryError()):
        with pytest.raises(type(error)), module._library("the library failed"):
            raise error


def test_the_order_of_places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shipped: Tokenizer) -> None:
    here, beside = tmp_path / "here", tmp_path / "beside"
    for number, folder in enumerate((here, beside)):
        folder.mkdir()
        (folder / "pile_tokenizer.json").write_text(small(280 + number).to_str(), encoding="utf-8")
    named = tmp_path / "named.json.xz"
    named.write_bytes(lzma.compress(small(290).to_str().encode()))
    monkeypatch.chdir(here)
    assert load_tokenizer(named, beside).size == 290
    assert load_tokenizer(str(named)).size == 290
    assert load_tokenizer(beside=beside).size == 280
    (here / "pile_tokenizer.json").unlink()
    assert load_tokenizer(beside=beside).size == 281
    assert load_tokenizer().hash == shipped.hash


def test_a_file_that_cannot_be_used_is_named(tmp_path: Path) -> None:
    whole = small().to_str().encode()
    contents = {
        "torn.json": whole[:100],
        "torn.json.xz": lzma.compress(whole)[:200],
        "binary.json": b"\xff\xfe\x00",
        "empty.json": b"",
        "words.json": small(decoder=decoders.WordPiece()).to_str().encode(),
        "endless.json": small(added=("<pad>",)).to_str().encode(),
        "huge.json": small(MAX_IDS + 1).to_str().encode(),
    }
    hints = {"words.json": "byte-level", "endless.json": EOS, "huge.json": "50258"}
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(InputError, match=hints.get(name)) as caught:
            load_tokenizer(tmp_path / name)
        assert name in str(caught.value)
        assert "\n" not in str(caught.value)
    with pytest.raises(InputError, match=r"no such tokenizer: .*missing\.json"):
        load_tokenizer(tmp_path / "missing.json")
    with pytest.raises(InputError, match="is a folder, not a tokenizer"):
        load_tokenizer(tmp_path)
    (tmp_path / "bomb.json.xz").write_bytes(lzma.compress(bytes(2 * module.MAX_BYTES)))
    with pytest.raises(InputError, match=r"bomb\.json\.xz unpacks to more than"):
        load_tokenizer(tmp_path / "bomb.json.xz")
    with pytest.raises(InputError, match=r"empty\.json is empty"):
        load_tokenizer(tmp_path / "empty.json")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="pipes with names are of Unix")
def test_a_pipe_is_no_tokenizer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    os.mkfifo(tmp_path / "pile_tokenizer.json")
    monkeypatch.chdir(tmp_path)
    for path in (tmp_path / "pile_tokenizer.json", None):
        with pytest.raises(InputError, match="is a pipe, not a tokenizer"):
            load_tokenizer(path)


def test_exactly_the_models_vocabulary_fits() -> None:
    assert Tokenizer(small(MAX_IDS)).size == MAX_IDS
