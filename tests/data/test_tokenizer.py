import contextlib
import json
import lzma
import os
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from lepton.data import tokenizer as module
from lepton.data.prepare import prepare
from lepton.data.shards import ShardedDataset
from lepton.data.tokenizer import EOS, MAX_IDS, Tokenizer, load_tokenizer, train_tokenizer
from lepton.errors import InputError

TEXTS = [
    "",
    " ",
    "The quick brown fox.\n\n\tdef f(x):\n        return x  # ok\n",
    "naïve café, 日本語, Ωmega, 👩🏽‍🚀 and \u0000 \u200b \ufffd",
    "\r\n a\rb \x7f\x85\u2028",
    f"say {EOS}, <|pad|> or <|unk|>!",
]


def small(vocab: int = 300, *, added: tuple[str, ...] = (EOS,), decoder: object = None) -> tokenizers.Tokenizer:
    """A tokenizer of single bytes and made-up merges, as the library's object."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = [*added, *letters]
    merges = []
    for a in letters:
        for b in letters[: (vocab - len(tokens) + 255) // 256 or 0]:
            if len(tokens) + len(merges) < vocab:
                merges.append((a, b))
    tokens += [a + b for a, b in merges]
    backend = tokenizers.Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, merges))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoder or decoders.ByteLevel()
    backend.add_special_tokens(list(added))
    return backend


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


def test_the_hash_is_of_the_ids_and_not_of_the_format(shipped: Tokenizer) -> None:
    form = json.loads(shipped.to_json())
    form["model"]["merges"] = [" ".join(merge) for merge in form["model"]["merges"]]
    other = json.dumps(dict(reversed(form.items())), indent=1)
    form["model"]["merges"].pop()
    fewer = json.dumps(form)
    assert Tokenizer.from_json(other).hash == shipped.hash
    assert Tokenizer.from_json(fewer).hash != shipped.hash


def test_the_hash_of_the_public_form_is_what_data_sets_hold() -> None:
    assert Tokenizer(small()).hash == "0472bbfaabb9228b961c852a5375be0075e9d6a68a9a797b63392c3a5cf3f5da"


@pytest.mark.parametrize(
    ("name", "value", "other"),
    [
        ("ignore_merges", True, True),
        ("byte_fallback", True, True),
        ("fuse_unk", True, True),
        ("unk_token", "a", True),
        ("end_of_word_suffix", "é", True),
        ("continuing_subword_prefix", "", False),
        ("end_of_word_suffix", "", False),
        ("unk_token", None, False),
        ("dropout", 0.0, False),
    ],
)
def test_a_setting_that_decides_an_id_changes_the_hash(name: str, value: object, other: bool) -> None:
    form = json.loads(small(280).to_str())
    form["model"][name] = value
    assert (Tokenizer.from_json(json.dumps(form)).hash != Tokenizer(small(280)).hash) == other


@pytest.mark.parametrize(
    "name", ["ignore_merges", "byte_fallback", "fuse_unk", "unk_token", "continuing_subword_prefix"]
)
def test_a_form_without_a_setting_has_the_hash_of_its_default(name: str) -> None:
    form = json.loads(small(280).to_str())
    del form["model"][name]
    assert Tokenizer.from_json(json.dumps(form)).hash == Tokenizer(small(280)).hash


def test_the_flags_of_added_tokens_change_the_hash_where_they_decide_an_id() -> None:
    backend = small(280)
    backend.add_tokens(["<sep>"])
    form = json.loads(backend.to_str())
    hashes = {Tokenizer(backend).hash}
    for flag in ("single_word", "lstrip", "rstrip", "normalized", "special"):
        other = json.loads(backend.to_str())
        other["added_tokens"][-1][flag] ^= True
        hashes.add(Tokenizer.from_json(json.dumps(other)).hash)
    assert len(hashes) == 6
    form["added_tokens"][0]["lstrip"] = True  # of a special, which no text holds
    assert Tokenizer.from_json(json.dumps(form)).hash in hashes


def test_shards_of_a_tokenizer_are_not_read_with_one_that_merges_otherwise(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("some text " * 100)
    form = json.loads(small(280).to_str())
    form["model"]["ignore_merges"] = True
    made, other = Tokenizer(small(280)), Tokenizer.from_json(json.dumps(form))
    prepare([tmp_path / "a.txt"], tmp_path / "data", made)
    for tokenizer in (made, other):
        with contextlib.nullcontext() if tokenizer is made else pytest.raises(InputError, match="another tokenizer"):
            ShardedDataset(
                tmp_path / "data", seq_len=8, seed=0, split="train", vocab_size=300, tokenizer_hash=tokenizer.hash
            )


def test_dropout_is_refused() -> None:
    form = json.loads(small(280).to_str())
    form["model"]["dropout"] = 0.5
    with pytest.raises(InputError, match=r"dropout 0\.5.*set it to null"):
        Tokenizer.from_json(json.dumps(form))


def test_an_id_of_two_tokens_is_refused() -> None:
    form = json.loads(small(280).to_str())
    form["model"]["vocab"]["twice"] = 7
    with pytest.raises(InputError, match="several tokens the id 7: give each its own"):
        Tokenizer.from_json(json.dumps(form))


SEQUENCE = {"Sequence": {"id": "A", "type_id": 0}}
START = {"SpecialToken": {"id": "<s>", "type_id": 0}}


@pytest.mark.parametrize(
    ("single", "fine"), [([SEQUENCE], True), ([START, SEQUENCE], True), ([], False), ([SEQUENCE, SEQUENCE], False)]
)
def test_a_post_processor_decides_no_id(single: list[dict[str, object]], fine: bool) -> None:
    template = {
        "type": "TemplateProcessing",
        "single": single,
        "pair": [SEQUENCE, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {"<s>": {"id": "<s>", "ids": [5], "tokens": ["<s>"]}},
    }
    for processor in (template, {"type": "Sequence", "processors": [template]}):
        form = json.loads(small(280).to_str()) | {"post_processor": processor}
        if fine:
            tokenizer = Tokenizer.from_json(json.dumps(form))
            assert tokenizer.encode("abc") == Tokenizer(small(280)).encode("abc")
            assert tokenizer.hash == Tokenizer(small(280)).hash
        else:
            with pytest.raises(InputError, match="drops or repeats"):
                Tokenizer.from_json(json.dumps(form))


def test_a_text_never_ends_itself_even_where_its_marker_is_no_special_token() -> None:
    form = json.loads(small(280).to_str())
    form["added_tokens"][0]["special"] = False
    tokenizer = Tokenizer.from_json(json.dumps(form))
    assert tokenizer.eos_id not in tokenizer.encode(f"a{EOS}b")
    assert tokenizer.decode(tokenizer.encode(f"a{EOS}b")) == f"a{EOS}b"
    assert tokenizer.hash == Tokenizer(small(280)).hash


# What the library does not survive


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


# Which file is loaded


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


# Training


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
