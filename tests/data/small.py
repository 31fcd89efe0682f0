"""Small tokenizers and data sets."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from lepton.data.shards import ShardedDataset
from lepton.data.tokenizer import EOS

VOCAB = 50257
Folder = Callable[..., Path]


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


def numbered(rows: int, row_len: int = 33, start: int = 0, dtype: type = np.uint16) -> np.ndarray:
    """Rows in which every token is a different number."""
    return (start + np.arange(rows * row_len)).reshape(rows, row_len).astype(dtype)


def dataset(
    folder: Path, *, seq_len: int = 8, seed: int = 0, split: str = "train", **options: object
) -> ShardedDataset:
    return ShardedDataset(folder, seq_len=seq_len, seed=seed, split=split, **{"vocab_size": VOCAB} | options)
