"""The tokenizer of a checkpoint as one of transformers."""

import tokenizers
from tokenizers import processors
from transformers import PreTrainedTokenizerFast

from lepton.data.tokenizer import EOS, SPECIALS, Tokenizer


def as_fast_tokenizer(tokenizer: Tokenizer) -> PreTrainedTokenizerFast:
    """Return a tokenizer that gives every text the ids of `tokenizer`, and pads on the left.

    No special id is added, and a text that spells one is a text about it. It pads with an id of its own if there is
    one, else with the end of a document.
    """
    backend = tokenizers.Tokenizer.from_str(tokenizer.to_json())
    backend.post_processor = processors.ByteLevel(trim_offsets=False)  # adds no ids
    known = [name for name in SPECIALS if backend.token_to_id(name) is not None]
    pad, unknown = (name if name in known else EOS for name in SPECIALS[1:])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=EOS,
        eos_token=EOS,
        pad_token=pad,
        unk_token=unknown,
        padding_side="left",
        split_special_tokens=True,
        clean_up_tokenization_spaces=False,
    )
