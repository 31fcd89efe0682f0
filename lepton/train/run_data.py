"""The data of a run: their folder, and a check that a resumed run finds the data of its checkpoint."""

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from lepton.data.chat import TEMPLATE
from lepton.data.shards import ShardedDataset
from lepton.data.stdlib import default_corpus
from lepton.errors import InputError
from lepton.train.settings import TrainSettings
from lepton.train.starting_point import StartingPoint

SPLITS = {"train": "training", "val": "validation"}


@dataclass(frozen=True)
class RunData:
    """Both splits, and their record for checkpoints."""

    train: ShardedDataset
    held_out: ShardedDataset
    origin: dict[str, Any]
    """The absolute folder, the fingerprint of each split, and of conversations the name of their template."""
    notes: list[str] = field(default_factory=list)
    """What has changed since the checkpoint, a line."""


def open_run_data(start: StartingPoint, settings: TrainSettings) -> RunData:
    """Open the data that `settings` name.

    Raises:
        InputError: no usable data, or other data than the checkpoint's without the user's permission.
    """
    folder = Path(settings.data_dir or default_corpus(start.tokenizer))

    def split(name: Literal["train", "val"]) -> ShardedDataset:
        return ShardedDataset(
            folder,
            seq_len=settings.seq_len,
            seed=settings.seed,
            split=name,
            vocab_size=start.config.vocab_size,
            eos_id=start.config.eos_id,
            tokenizer_hash=start.tokenizer.hash,
        )

    train, held_out = split("train"), split("val")
    origin = {"folder": os.path.abspath(folder), "train": train.fingerprint(), "val": held_out.fingerprint()}
    if train.has_answers:
        origin["chat"] = train.metadata.get("chat", TEMPLATE)
    changes = _changes(start.origin, origin)
    if changes and not start.other_data:
        raise InputError(
            f"{folder} holds other data than {start.path} was trained on ({changes}): put those back, name their "
            "folder with --data_dir, or go on with these: --allow_other_data"
        )
    return RunData(train, held_out, origin, [f"other data than before: {changes}"] if changes else [])


def _changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """Return in words what differs between two records; "" if nothing does, or if `before` is empty."""
    return "; ".join(
        f"{words}: {_describe(before[name])} then, {_describe(now[name])} now"
        for name, words in SPLITS.items()
        if name in before and before[name] != now[name]
    )


def _describe(fingerprint: Any) -> str:
    if not isinstance(fingerprint, dict) or type(fingerprint.get("tokens")) is not int:
        return "unknown"
    return f"{fingerprint['tokens']:,} tokens (hash {str(fingerprint.get('content'))[:8]})"
