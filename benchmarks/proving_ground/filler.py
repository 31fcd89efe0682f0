"""Text that stands between what a question is about and the question: prose of a prepared data set, or noise."""

from functools import lru_cache

import torch
from torch import Tensor

from lepton.data.shards import ShardedDataset
from lepton.errors import InputError

WINDOW = 512
"""Tokens of a piece of prose; longer filler is several pieces of the same split."""
TRIES = 64
"""Draws of pieces, some of which are the short end of a row."""
PADDING = 1
"""Stands for the end of a document: no row of a task has one inside."""


@lru_cache(maxsize=4)
def _split(folder: str, vocab_size: int, test: bool) -> ShardedDataset:
    return ShardedDataset(folder, split="val" if test else "train", seq_len=WINDOW - 1, seed=0, vocab_size=vocab_size)


def prose(folder: str, vocab_size: int, generator: torch.Generator, rows: int, length: int, *, test: bool) -> Tensor:
    """Return pieces of a prepared data set, ids 1 .. vocab_size - 1 [rows, length]; the test has the validation split.

    Raises InputError for a folder that is no prepared data set of this vocabulary.
    """
    data, wanted, found = _split(folder, vocab_size, test), rows * -(-length // WINDOW), list[Tensor]()
    for _ in range(TRIES):
        step = int(torch.randint(1 << 24, (1,), generator=generator))
        batch = data.batch(step, batch_size=wanted + 1)
        found.append(batch.tokens[batch.lengths == WINDOW].long())
        if sum(map(len, found)) >= wanted:
            return torch.cat(found)[:wanted].clamp(min=PADDING).reshape(rows, -1)[:, :length]
    raise InputError(f"{folder}: hardly a piece of {WINDOW} tokens without padding; prepare longer text")


def noise(generator: torch.Generator, rows: int, length: int, first: int, count: int) -> Tensor:
    """Return random ids first .. first + count - 1 [rows, length], the k-th of them 1 / k as often as the first."""
    weights = 1 / torch.arange(1, count + 1, dtype=torch.float64)
    if not length:
        return torch.zeros(rows, 0, dtype=torch.int64)
    return first + torch.multinomial(weights, rows * length, replacement=True, generator=generator).view(rows, length)
