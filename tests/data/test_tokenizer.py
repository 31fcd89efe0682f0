"""What text becomes, and that it comes back."""

import ctypes
import json
import lzma
import platform
from pathlib import Path

import numpy as np
import pytest
from tokenizers import pre_tokenizers

from lepton.data.tokenizer import EOS, MAX_IDS, Tokenizer, load_tokenizer, train_tokenizer
from lepton.errors import InputError
from tests.data.small import small

LIBC = ctypes.CDLL("libc.so.6") if platform.libc_ver()[0] == "glibc" else None
TEXTS = [
    "",
    " ",
    "The quick brown fox.\n\n\tdef f(x):\n        return x  # ok\n",
    "naïve café, 日本語, Ωmega, 👩🏽‍🚀 and \u0000 \u200b \ufffd",
    "\r\n a\rb \x7f\x85\u2028",
    f"say {EOS}, <|pad|> or <|unk|>!",
]


@pytest.mark.parametrize("text", TEXTS)
def test_text_comes_back_and_no_special_id_appears(shipped: Tokenizer, text: str) -> None:
    ids = shipped.encode(text)
    assert shipped.decode(ids) == text
    assert min(ids, default=3) > 2
    assert sum(shipped.token_bytes()[ids]) == len(text.encode())


def test_the_shipped_tokenizer_has_the_public_form(shipped: Tokenizer) -> None:
    form = json.loads(shipped.to_json())
    vocab = form["model"]["vocab"]
    assert (shipped.size, shipped.eos_id) == (MAX_IDS, 0)
    assert [vocab[token] for token in (EOS, "<|pad|>", "<|unk|>")] == [0, 1, 2]
    assert {token for token, i in vocab.items() if 3 <= i < 259} == set(pre_tokenizers.ByteLevel.alphabet())
    assert (form["pre_tokenizer"]["type"], form["decoder"]["type"], form["normalizer"]) == (
        "ByteLevel",
        "ByteLevel",
        None,
    )
    assert len(form["model"]["merges"]) == MAX_IDS - 259
    note = Path(load_tokenizer.__code__.co_filename).with_name("TOKENIZER.md").read_text(encoding="utf-8")
    assert shipped.hash in note


def test_english_and_code_take_few_tokens(shipped: Tokenizer) -> None:
    assert len(shipped.encode("The history of the United States is a long one.")) <= 11
    assert len(shipped.encode("        for i in range(10):\n            print(i)\n")) <= 20


def test_encode_batch_gives_what_encode_gives(shipped: Tokenizer) -> None:
    assert shipped.encode_batch(TEXTS) == [shipped.encode(text) for text in TEXTS]
    assert shipped.encode_batch([]) == []


def test_lone_surrogates_become_question_marks(shipped: Tokenizer) -> None:
    assert shipped.decode(shipped.encode("a\ud800b")) == "a?b"
    assert shipped.decode(shipped.encode_batch(["\udcff"])[0]) == "?"


def test_any_list_of_ids_decodes(shipped: Tokenizer) -> None:
    ids = shipped.encode("né")
    assert shipped.decode([0, *ids, 1, 2, 99_999, -1]) == "né"
    rocket = shipped.encode("\U00010330")  # a rare character of four bytes, several tokens
    assert len(rocket) > 1
    assert shipped.decode(rocket[:-1]) == "\ufffd"
    assert shipped.decode(np.array(ids)) == "né"


def test_the_stream_decoder_gives_complete_characters_only(shipped: Tokenizer) -> None:
    for text in TEXTS:
        decoder = shipped.stream_decoder()
        pieces = [decoder.push(i) for i in shipped.encode(text)]
        assert "".join(pieces) == text
        assert decoder.flush() == ""
        assert "\ufffd" not in "".join(pieces).replace("\ufffd", "", text.count("\ufffd"))
    first, *_ = shipped.encode("\U00010330")
    decoder = shipped.stream_decoder()
    assert [decoder.push(first), decoder.push(0), decoder.flush(), decoder.flush()] == ["", "", "\ufffd", ""]


def test_the_stream_decoder_agrees_with_decode_on_any_ids(shipped: Tokenizer) -> None:
    for ids in np.random.default_rng(0).integers(-2, 1000, (200, 12)).tolist():
        decoder = shipped.stream_decoder()
        assert "".join(map(decoder.push, ids)) + decoder.flush() == shipped.decode(ids)


def test_token_bytes_counts_utf8(shipped: Tokenizer) -> None:
    count = shipped.token_bytes()
    assert count.shape == (MAX_IDS,)
    assert count.dtype == np.int64
    assert count[:3].tolist() == [0, 0, 0]
    assert (count[3:259] == 1).all()
    assert (count[259:] > 1).all()


def test_json_gives_the_same_tokenizer_again(shipped: Tokenizer) -> None:
    again = Tokenizer.from_json(shipped.to_json())
    assert again.hash == shipped.hash
    assert all(again.encode(text) == shipped.encode(text) for text in TEXTS)


def test_settings_that_drop_tokens_are_undone() -> None:
    backend = small()
    backend.enable_truncation(2)
    backend.enable_padding(length=40)
    assert len(Tokenizer.from_json(backend.to_str()).encode("abcdefgh!!")) > 2
    assert len(Tokenizer.from_json(backend.to_str()).encode("a")) == 1


def test_an_added_token_that_is_not_special_keeps_its_text() -> None:
    backend = small()
    backend.add_tokens(["<sep é>"])
    tokenizer = Tokenizer(backend)
    assert tokenizer.decode(tokenizer.encode("a<sep é>b")) == "a<sep é>b"
    assert tokenizer.token_bytes()[-1] == len("<sep é>".encode())


def test_training_gives_the_public_form_and_is_deterministic(tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("low lower lowest, new newer newest. " * 50 + EOS, encoding="utf-8")
    tokenizer = train_tokenizer([text], tmp_path / "deep" / "a.json", 300)
    train_tokenizer([text], tmp_path / "b.json.xz", 300)
    assert (tmp_path / "deep" / "a.json").read_bytes() == lzma.decompress((tmp_path / "b.json.xz").read_bytes())
    assert load_tokenizer(tmp_path / "b.json.xz").hash == tokenizer.hash
    assert 259 < tokenizer.size <= 300
    assert tokenizer.eos_id == 0
    assert 0 not in tokenizer.encode(text.read_text(encoding="utf-8"))
    assert tokenizer.decode(tokenizer.encode("Ω is new")) == "Ω is new"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["b.json.xz", "deep", "text.txt"]


@pytest.mark.parametrize("vocab", [258, 50258])
def test_an_impossible_vocabulary_is_refused(tmp_path: Path, vocab: int) -> None:
    with pytest.raises(InputError, match=f"vocab_size={vocab}"):
        train_tokenizer([tmp_path], tmp_path / "t.json", vocab)


def test_training_never_loses_a_file(tmp_path: Path) -> None:
    (tmp_path / "t.json").write_text("mine")
    text = tmp_path / "text.txt"
    text.write_text("a b a b a b")
    with pytest.raises(InputError, match=r"t\.json exists.*--force"):
        train_tokenizer([text], tmp_path / "t.json")
    assert (tmp_path / "t.json").read_text() == "mine"
    train_tokenizer([text], tmp_path / "t.json", force=True)
    assert load_tokenizer(tmp_path / "t.json").size > 259


def test_training_writes_through_a_link_and_never_over_a_source(tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("a b a b a b")
    try:
        (tmp_path / "t.json").symlink_to("real.json")
    except OSError:
        pytest.skip("this system has no links for ordinary users")
    train_tokenizer([text], tmp_path / "t.json", 270)
    assert (tmp_path / "t.json").is_symlink()
    assert load_tokenizer(tmp_path / "real.json").size > 259
    with pytest.raises(InputError, match=r"text\.txt is one of the sources"):
        train_tokenizer([text], text, force=True)
    with pytest.raises(InputError, match="cannot write the tokenizer"):
        train_tokenizer([text], text / "t.json")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["real.json", "t.json", "text.txt"]


def test_training_on_nothing_is_refused(tmp_path: Path) -> None:
    (tmp_path / "empty.txt").touch()
    with pytest.raises(InputError, match=r"nothing to learn from in .*empty\.txt"):
        train_tokenizer([tmp_path / "empty.txt"], tmp_path / "t.json")
    assert not (tmp_path / "t.json").exists()


@pytest.mark.parametrize("ids", [[[1, 2]], "a", [1.5], 3, [None]])
def test_ids_that_are_none_are_named(ids):
    with pytest.raises(InputError, match="give the ids of one text, a list of integers"):
        load_tokenizer().decode(ids)


@pytest.mark.parametrize("text", [3, None, b"a"])
def test_a_text_that_is_none_is_named(text):
    for encode in (load_tokenizer().encode, lambda text: load_tokenizer().encode_batch([text])):
        with pytest.raises(InputError, match=f"text={text!r}: must be a string"):
            encode(text)


class Counts(ctypes.Structure):
    """What glibc counts of its heap (`struct mallinfo2`)."""

    _fields_ = [
        *((f"other{i}", ctypes.c_size_t) for i in range(7)),
        ("used", ctypes.c_size_t),
        *((f"other{i}", ctypes.c_size_t) for i in (7, 8)),
    ]


@pytest.mark.skipif(not hasattr(LIBC, "mallinfo2"), reason="counts what glibc (2.33) has given out")
def test_a_limited_cache_stops_growing(shipped: Tokenizer) -> None:
    """It is the library's, out of Python's sight."""
    assert LIBC is not None
    LIBC.mallinfo2.restype = Counts

    def grown(tokenizer: Tokenizer) -> int:
        before = LIBC.mallinfo2().used
        for i in range(3000):
            tokenizer.encode(f"{i}th{i}word{i}")
        return LIBC.mallinfo2().used - before

    free, limited = (Tokenizer.from_json(shipped.to_json()) for _ in range(2))
    limited.limit_cache(100)
    assert limited.encode("The quick brown fox 東京") == shipped.encode("The quick brown fox 東京")
    assert grown(limited) < 100_000
    assert grown(free) > 400_000
