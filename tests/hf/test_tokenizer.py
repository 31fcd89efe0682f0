"""The tokenizer of an exported folder gives the ids of LEPTON's own."""

import pytest
import tokenizers
from tokenizers import processors
from transformers import AutoTokenizer

from lepton.data.tokenizer import Tokenizer, load_tokenizer
from lepton.hf.tokenizer import as_fast_tokenizer
from tests.cli.tiny import TEXT, small_bpe

TEXTS = [
    TEXT,
    "",
    " ",
    "  two  spaces , and a stop .\n\n\tTab\r\n",
    "It 's not n't don't .",
    "<|endoftext|> is a text, <|pad|> and <|unk|> too<|endoftext|>",
    "Käse 東京 🦊 e\u0301 \x00 \ufffd",
    "a" * 300,
]


def with_template():
    """A tokenizer that would begin every text with an id."""
    backend = small_bpe()
    backend.post_processor = processors.TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)]
    )
    return backend


@pytest.mark.parametrize("own", [small_bpe(), with_template(), None], ids=["small", "template", "shipped"])
def test_ids_and_texts_are_those_of_lepton(own, tmp_path):
    tokenizer = load_tokenizer() if own is None else Tokenizer.from_json(own.to_str())
    as_fast_tokenizer(tokenizer).save_pretrained(tmp_path)
    fast = AutoTokenizer.from_pretrained(tmp_path)
    for text in TEXTS:
        ids = tokenizer.encode(text)
        assert fast(text).input_ids == fast.encode(text, add_special_tokens=False) == ids, text
        assert fast.decode(ids) == tokenizer.decode(ids) == text
    assert fast.decode([tokenizer.eos_id, *tokenizer.encode("fox")], skip_special_tokens=True) == "fox"


def test_batches_are_padded_on_the_left(tmp_path):
    as_fast_tokenizer(Tokenizer.from_json(small_bpe().to_str())).save_pretrained(tmp_path)
    fast = AutoTokenizer.from_pretrained(tmp_path)
    batch = fast(["fox", "The quick brown fox"], padding=True)
    short, long = batch["input_ids"]
    assert short == [1] * (len(long) - len(fast("fox").input_ids)) + fast("fox").input_ids
    assert batch["attention_mask"][0] == [int(i >= len(long) - len(fast("fox").input_ids)) for i in range(len(long))]
    assert (fast.bos_token_id, fast.eos_token_id, fast.pad_token_id, fast.unk_token_id) == (0, 0, 1, 2)


def test_without_an_id_for_padding_it_is_the_end_of_a_document():
    backend = tokenizers.Tokenizer.from_str(small_bpe().to_str().replace("<|pad|>", "<|other|>"))
    fast = as_fast_tokenizer(Tokenizer.from_json(backend.to_str()))
    assert (fast.pad_token, fast.pad_token_id) == ("<|endoftext|>", 0)
