"""The held-out data of the commands that measure a checkpoint."""

import argparse
import math
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Literal

from lepton.errors import InputError

if TYPE_CHECKING:
    from lepton.data.shards import Batch, ShardedDataset
    from lepton.data.tokenizer import Tokenizer
    from lepton.model import Network

MAX_ROWS = 4096
"""Most rows at once: far more than any device needs to be busy, and less memory than a machine has."""
MAX_TOKENS = 1 << 40
"""Most tokens that can be asked for."""


def add_data_set(parser: argparse.ArgumentParser) -> None:
    """Add the flags that `open_data_set` reads."""
    parser.add_argument(
        "--data_dir", metavar="DIR", help="folder of shard_*.npy (default: the Python standard library's source)"
    )
    parser.add_argument("--batch_size", type=int, default=8, metavar="N", help="rows at once (default: %(default)s)")


def check_counts(args: argparse.Namespace, **most: int) -> None:
    """Raise InputError for a flag that is given and does not lie in 1..`most`."""
    for name, limit in most.items():
        value = getattr(args, name)
        if value is not None and not 1 <= value <= limit:
            raise InputError(f"--{name} {value}: must lie in 1..{limit}")


def spread(data: "ShardedDataset", batch_size: int, max_tokens: int | None) -> "Iterator[Batch]":
    """Yield all windows of a split, or as many as come nearest to `max_tokens` targets, spread evenly over it."""
    if max_tokens is None:
        return data.batches(batch_size)
    windows = min(max(1, (max_tokens + data.seq_len // 2) // data.seq_len), data.windows)
    count = -(-windows // batch_size)
    return data.batches(-(-windows // count), count)


def open_data_set(
    args: argparse.Namespace,
    model: "Network",
    tokenizer: "Tokenizer",
    split: Literal["train", "val"] = "val",
) -> "tuple[str, ShardedDataset, ShardedDataset]":
    """Return a description of a split, and the split in windows of whole rows and in windows of half a row.

    With half rows, even a single row has one window to calibrate on and another to measure. The description is
    printed on stderr.
    """
    from lepton.data.shards import ShardedDataset
    from lepton.data.stdlib import default_corpus

    folder = args.data_dir or default_corpus(tokenizer)

    def windows(seq_len: int) -> ShardedDataset:
        return ShardedDataset(
            folder,
            seq_len=seq_len,
            seed=0,
            split=split,
            vocab_size=model.config.vocab_size,
            eos_id=model.config.eos_id,
            tokenizer_hash=tokenizer.hash,
        )

    targets = windows(1).row_len - 1
    rows, halves = windows(targets), windows(math.ceil(targets / 2))
    what = f"{rows.describe()}, {split} split"
    print(what, file=sys.stderr)
    return what, rows, halves
