"""Random snippets of a prepared data set, read back from its shards: what training will see."""

import itertools
import random
from pathlib import Path
from typing import Any

import numpy as np

from lepton.data.tokenizer import Tokenizer

TOKENS = 24
"""Tokens of a snippet."""


def snippets(
    folder: Path, tokenizer: Tokenizer, metadata: dict[str, Any], *, count: int = 10, seed: int = 0
) -> list[str]:
    """Return the text at `count` random places of the training shards in `folder`, in the order of the data.

    Each place is as probable as any other, and none is drawn twice. A snippet ends where its document does. Small data
    sets have fewer snippets, which never overlap.
    """
    paths = sorted(folder.glob("shard_*.npy"))
    shards = [np.load(path, mmap_mode="r").reshape(-1) for path in paths]
    sizes = [len(shard) - metadata["padding"].get(path.name, 0) for path, shard in zip(paths, shards, strict=True)]
    places = [-(-size // TOKENS) for size in sizes]  # of TOKENS tokens each
    chosen = sorted(random.Random(seed).sample(range(sum(places)), min(count, sum(places))))
    firsts = [0, *itertools.accumulate(places)]
    found = []
    for place in chosen:
        number = next(i for i, first in enumerate(firsts[1:]) if place < first)
        start = (place - firsts[number]) * TOKENS
        ids = shards[number][start : min(start + TOKENS, sizes[number])].tolist()
        start = ids[0] == tokenizer.eos_id
        end = ids.index(tokenizer.eos_id, 1) if tokenizer.eos_id in ids[1:] else len(ids)
        found.append(tokenizer.decode(ids[start:end]).strip("\N{REPLACEMENT CHARACTER}"))
    return [text for text in found if text]  # what fills the rows of conversations has none
