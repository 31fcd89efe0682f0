"""The hash of a tokenizer: two that give other ids for a text have other hashes."""

import contextlib
import json
from pathlib import Path

import pytest

from lepton.data.prepare import prepare
from lepton.data.shards import ShardedDataset
from lepton.data.tokenizer import EOS, Tokenizer
from lepton.errors import InputError
from tests.data.small import small


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
