"""Reading training data: a folder of memory-mapped token shards, in batches that are a function of the step.

- A shard is ``shard_*.npy``: integers of any width, shape (rows, row_len). ``metadata.json`` beside them is optional;
  its ``padding`` says how many tokens at the end of a shard only fill its last row, which are never read.
- Conversations have ``answers_*.npy`` beside their shards, 1 where a token belongs to an answer: the other tokens are
  no targets (see `lepton.data.chat_shards`).
- A row of L tokens has L - 1 targets. Its window k covers the tokens k * seq_len .. k * seq_len + seq_len, the last
  one included, so that a row's windows use every target exactly once; a row's last window may be shorter.
- Training visits every window once an epoch, in a pseudo-random order that mixes the whole data set; a batch is a pure
  function of seed, step and micro-batch, so that resuming needs no state of a loader.

Shapes: B batch, T seq_len.
"""

import hashlib
import math
import os
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch

from lepton.data.permutation import permute
from lepton.data.publish import ANSWERS, METADATA, UNFINISHED
from lepton.data.split import held_out_rows
from lepton.errors import InputError, shown
from lepton.files import parse_json, read_bytes, readable

OPEN_SHARDS = 64
"""Shards that are mapped at once: each holds a file open, and there may be thousands."""
MAX_METADATA = 1 << 25
"""Most bytes of metadata.json."""
FINGERPRINT_PIECES, FINGERPRINT_PIECE = 1024, 2048
"""Pieces of a split that its fingerprint is made of, and tokens of a piece."""


class Batch(NamedTuple):
    """Rows of tokens for `Network.loss`."""

    tokens: torch.Tensor
    """int64 [B, T + 1]; short rows are padded with a token that ends no document."""
    lengths: torch.Tensor
    """int64 [B]: valid tokens of each row, one more than its targets."""
    targets: torch.Tensor | None = None
    """bool [B, T], which of the next tokens count, those of answers; None: all within the lengths."""

    @property
    def counted(self) -> int:
        """Number of next tokens that count."""
        if self.targets is not None:
            return int(self.targets.sum())
        return int(self.lengths.sum()) - len(self.lengths)

    @property
    def opens(self) -> torch.Tensor | None:
        """The tokens that open a segment, bool [B, T]: those before the first token of each answer; None: none.

        In generation the last token of the prompt opens one, so that the thoughts of an answer have read what it
        answers.
        """
        if self.targets is None:
            return None
        return self.targets & ~torch.nn.functional.pad(self.targets[:, :-1], (1, 0))

    def rows(self, rows: slice) -> "Batch":
        """Return some of its rows."""
        return Batch(self.tokens[rows], self.lengths[rows], None if self.targets is None else self.targets[rows])


@dataclass(frozen=True)
class Shard:
    """The rows of one file that belong to a split."""

    path: Path
    rows: int
    row_len: int
    first: int = 0
    """The first of the rows, counted in the file."""
    padding: int = 0
    """Tokens at the end of the last row that only fill it."""


class ShardedDataset:
    """One split of the data set in `folder`.

    The validation split is ``folder/val/shard_*.npy`` where that exists; else the last rows, about 1 % of all, which
    are then never trained on (see `held_out_rows`).

    Raises InputError for a folder without whole integer shards, a `seq_len` that no row holds, a data set too small to
    keep a validation row apart, a split without a target, and a `tokenizer_hash` other than the one in metadata.json.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        seq_len: int,
        seed: int,
        split: Literal["train", "val"],
        vocab_size: int,
        eos_id: int = 0,
        tokenizer_hash: str | None = None,
    ) -> None:
        if split not in ("train", "val"):
            raise InputError(f"split={shown(split)}: must be 'train' or 'val'")
        self.folder, self.seq_len, self.seed, self.vocab_size = Path(folder), seq_len, seed, vocab_size
        self.metadata = read_metadata(self.folder)
        self._check_tokenizer(tokenizer_hash)
        # If padding were eos, each padding token would start a document, and a segment with thoughts.
        self._padding_id = int(eos_id == 0)
        self.shards = _shards_of(self.folder, split, _read_padding(self.folder, self.metadata))
        self.has_answers = _have_answers(self.shards)
        """Whether the data are conversations, of which the answers alone count."""
        if self.metadata.get("chat") and not self.has_answers:
            raise InputError(
                f"{self.folder} was prepared from conversations, but its {ANSWERS}_*.npy are missing: prepare it again"
            )
        row_len = self.shards[0].row_len
        if not 1 <= seq_len <= row_len:
            longer = f"; longer rows are made with: prepare --row_len {seq_len}" if seq_len > row_len else ""
            raise InputError(
                f"seq_len={seq_len}: must lie in 1..{row_len}, the length of a row in {self.folder}{longer}"
            )
        self.row_len = row_len
        self.rows = sum(shard.rows for shard in self.shards)
        self.tokens = self.rows * (row_len - 1) - sum(shard.padding for shard in self.shards)
        """Targets of an epoch."""
        if not self.tokens:
            raise InputError(f"{self.folder}: its {split} split holds no token to predict; prepare more text")
        self.windows_per_row = math.ceil((row_len - 1) / seq_len)
        empty = [self.windows_per_row - math.ceil((row_len - 1 - shard.padding) / seq_len) for shard in self.shards]
        counts = [shard.rows * self.windows_per_row - none for shard, none in zip(self.shards, empty, strict=True)]
        self.windows = sum(counts)
        """Windows of an epoch."""
        self._ends = np.cumsum(counts)
        self._open: Callable[[Path], np.ndarray] = lru_cache(maxsize=OPEN_SHARDS)(_map)

    def describe(self) -> str:
        """Return a short text such as ``stdlib: 3.1 M tokens, 2 shards``."""
        shards = f"{len(self.shards)} shard{'s' if len(self.shards) > 1 else ''}"
        name = self.metadata.get("name") or self.folder.resolve().name
        return f"{name}: {_readable(self.tokens)} tokens, {shards}"

    def fingerprint(self) -> dict[str, Any]:
        """Return counts and a hash that are equal where two folders give the same batches, wherever they lie.

        Of a large split only pieces of some rows are hashed, spread evenly: a change of few tokens in place can go
        unnoticed there, one that moves the text cannot.
        """
        ends = np.cumsum([shard.rows for shard in self.shards])
        per_row = math.ceil(self.row_len / FINGERPRINT_PIECE)
        count = min(self.rows * per_row, FINGERPRINT_PIECES)
        padding = [(int(end), shard.padding) for end, shard in zip(ends, self.shards, strict=True) if shard.padding]
        content = hashlib.sha256(repr(padding).encode())
        for piece in range(count):
            row, k = divmod(piece * self.rows * per_row // count, per_row)
            number = int(np.searchsorted(ends, row, side="right"))
            shard = self.shards[number]
            row += shard.first - (int(ends[number - 1]) if number else 0)
            place = row, slice(k * FINGERPRINT_PIECE, (k + 1) * FINGERPRINT_PIECE)
            content.update(self._open(shard.path)[place].astype("<i8").tobytes())
            if self.has_answers:
                content.update(self._open(_answers_of(shard.path))[place].astype(bool).tobytes())
        return {"rows": self.rows, "row_len": self.row_len, "tokens": self.tokens, "content": content.hexdigest()}

    def batch(self, step: int, micro: int = 0, *, batch_size: int, accumulate: int = 1) -> Batch:
        """Return the windows of a step (from 0), of one of its `accumulate` micro-batches.

        The micro-batches of the steps 0, 1, ... walk through epoch after epoch.
        """
        assert step >= 0, step
        assert 0 <= micro < accumulate, (micro, accumulate)
        first = (step * accumulate + micro) * batch_size
        samples = first + np.arange(batch_size, dtype=np.int64)
        return self._read(permute(samples % self.windows, self.windows, self.seed, samples // self.windows))

    def batches(self, batch_size: int, limit: int | None = None) -> Iterator[Batch]:
        """Yield all windows in order; the last batch may be smaller.

        With a `limit`, at most so many batches, of windows spread evenly over the split.
        """
        if batch_size < 1:
            raise InputError(f"batch_size={batch_size}: must be at least 1")
        count = self.windows if limit is None else min(self.windows, limit * batch_size)
        for start in range(0, count, batch_size):
            places = np.arange(start, min(start + batch_size, count), dtype=np.int64)
            yield self._read(places * self.windows // count)

    def _read(self, windows: np.ndarray) -> Batch:
        tokens = np.full((len(windows), self.seq_len + 1), self._padding_id, np.int64)
        lengths = np.zeros(len(windows), np.int64)
        answers = np.zeros(tokens.shape, bool) if self.has_answers else None
        for i, window in enumerate(windows.tolist()):
            shard, stretch, place = self._window(window)
            if answers is not None:
                flags = self._open(_answers_of(shard.path))[place]
                answers[i, : len(flags)] = flags
                stretch = self._without_filler(stretch)
            lengths[i] = len(stretch)
            tokens[i, : len(stretch)] = stretch
        if tokens.min() < 0 or tokens.max() >= self.vocab_size:
            self._raise_bad_id(windows)
        targets = None if answers is None else torch.from_numpy(answers[:, 1:])
        return Batch(torch.from_numpy(tokens), torch.from_numpy(lengths), targets)

    def _window(self, window: int) -> tuple[Shard, np.ndarray, tuple[int, slice]]:
        """Return the shard, the tokens (a view of the file, at most T + 1) and the place in the file of a window."""
        number = int(np.searchsorted(self._ends, window, side="right"))
        shard = self.shards[number]
        row, k = divmod(window - (int(self._ends[number - 1]) if number else 0), self.windows_per_row)
        end = shard.row_len - (shard.padding if row == shard.rows - 1 else 0)
        stretch = slice(k * self.seq_len, min((k + 1) * self.seq_len + 1, end))
        place = (shard.first + row, stretch)
        return shard, self._open(shard.path)[place], place

    def _without_filler(self, stretch: np.ndarray) -> np.ndarray:
        """Return the tokens up to the end of the last conversation, at least one."""
        filled = np.flatnonzero(stretch != self._padding_id)
        return stretch[: int(filled[-1]) + 1 if len(filled) else 1]

    def _raise_bad_id(self, windows: np.ndarray) -> None:
        for shard, stretch, _ in map(self._window, windows.tolist()):
            bad = stretch[(stretch < 0) | (stretch >= self.vocab_size)]
            if len(bad):
                raise InputError(
                    f"{shard.path}: token id {bad[0]} lies outside the vocabulary of {self.vocab_size}; "
                    "these shards were made with another tokenizer, or are damaged"
                )

    def _check_tokenizer(self, tokenizer_hash: str | None) -> None:
        stored = self.metadata.get("tokenizer_hash")
        if tokenizer_hash is not None and stored is not None and stored != tokenizer_hash:
            raise InputError(
                f"{self.folder} was prepared with another tokenizer (hash {str(stored)[:12]}, this one is "
                f"{str(tokenizer_hash)[:12]}): name that one with --tokenizer, or prepare the data again"
            )


def read_metadata(folder: Path) -> dict[str, Any]:
    """Return the contents of ``metadata.json`` in `folder`, or {} where there is none."""
    path = folder / METADATA
    if not os.path.lexists(path):
        return {}
    try:
        metadata = parse_json(read_bytes(path, "metadata file", MAX_METADATA), str(path))
    except InputError as error:
        raise InputError(f"{error}; correct or remove it, it is optional") from None
    if not isinstance(metadata, dict):
        raise InputError(f"{path}: holds no JSON object; correct or remove it, it is optional")
    return metadata


def _read_padding(folder: Path, metadata: dict[str, Any]) -> dict[str, int]:
    """Return how many tokens only fill the last row, of each shard that has such by its name in `folder`."""
    padding = metadata.get("padding", {})
    if not isinstance(padding, dict) or not all(type(count) is int and count >= 0 for count in padding.values()):
        raise InputError(
            f"{folder / 'metadata.json'}: its padding is {padding}, not a count of tokens for each shard; "
            "correct or remove it"
        )
    return padding


def read_header(path: Path) -> Shard:
    """Read a shard's shape, without its tokens. Raises InputError if it is no whole 2-D array of integers."""
    readable(path, "shard")
    try:
        with path.open("rb") as file, warnings.catch_warnings(action="ignore"):
            version = np.lib.format.read_magic(file)
            old = version == (1, 0)
            read = np.lib.format.read_array_header_1_0 if old else np.lib.format.read_array_header_2_0
            shape, _, dtype = read(file)
            start = file.tell()
        size = path.stat().st_size
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from None
    except Exception as error:  # numpy has the header read as Python source, whose parser raises many kinds
        reason = " ".join(str(error).split())
        raise InputError(f"{path}: no .npy file, or a torn one ({reason}); fetch or prepare it again") from None
    if dtype.kind not in "iu":
        raise InputError(f"{path}: holds {dtype}, not integers; a shard holds token ids")
    if len(shape) != 2 or not all(type(length) is int and length >= 0 for length in shape) or shape[1] < 2:
        raise InputError(f"{path}: has the shape {shape}, not (rows, row_len) with rows of at least 2 tokens")
    expected = start + math.prod(shape) * dtype.itemsize
    if size < expected:
        raise InputError(f"{path}: is truncated, {size} bytes of {expected}; fetch or prepare it again")
    return Shard(path, *shape)


def _answers_of(path: Path) -> Path:
    return path.with_name(path.name.replace("shard", ANSWERS, 1))


def _have_answers(shards: list[Shard]) -> bool:
    """Return whether the shards are of conversations. Raises InputError if only some have the flags of answers."""
    found = [os.path.lexists(_answers_of(shard.path)) for shard in shards]
    if not any(found):
        return False
    for shard in shards:
        path = _answers_of(shard.path)
        flags, tokens = read_header(path), read_header(shard.path)
        if (flags.rows, flags.row_len) != (tokens.rows, tokens.row_len):
            raise InputError(
                f"{path} does not fit {shard.path.name} ({flags.rows} rows, not {tokens.rows}): prepare again"
            )
    return True


def _map(path: Path) -> np.ndarray:
    read_header(path)  # it may have been replaced meanwhile
    try:
        with warnings.catch_warnings(action="ignore"):  # of an old form of the header
            return np.asarray(np.lib.format.open_memmap(path, mode="r"))
    except (OSError, ValueError) as error:
        raise InputError(f"cannot map {path} into memory: {' '.join(str(error).split())}") from None


def _shards_of(folder: Path, split: str, padding: dict[str, int]) -> list[Shard]:
    if not os.path.isdir(folder):  # unlike Path's own, it answers for names that the system does not take
        raise InputError(f"no such folder: {folder}; make it with: python -m lepton prepare SOURCE --out {folder}")
    if (folder / UNFINISHED).exists():
        raise InputError(f"{folder} is not whole: `prepare` was interrupted when it replaced the files; run it again")
    shards = _read_headers(folder, "", padding)
    val = _read_headers(folder, "val/", padding)
    if not shards:
        raise InputError(
            f"no tokens in {folder} (no shard_*.npy files with rows); "
            "make them with: python -m lepton prepare SOURCE --out DIR"
        )
    if val:
        return shards if split == "train" else val
    rows = [shard.rows for shard in shards]
    held = held_out_rows(rows, shards[0].row_len, shards[-1].padding)
    if not held:
        raise InputError(
            f"{folder} holds a single row of tokens: too small to keep one for validation; prepare more text"
        )
    return _cut(shards, sum(rows) - held, None) if split == "val" else _cut(shards, 0, sum(rows) - held)


def _cut(shards: list[Shard], start: int, stop: int | None) -> list[Shard]:
    """Return the rows `start` to `stop` of the shards, counted over all of them."""
    found, before = [], 0
    for shard in shards:
        first = min(max(start - before, 0), shard.rows)
        last = shard.rows if stop is None else min(max(stop - before, 0), shard.rows)
        if first < last:
            padding = shard.padding if last == shard.rows else 0
            found.append(replace(shard, rows=last - first, first=first, padding=padding))
        before += shard.rows
    return found


def _read_headers(folder: Path, place: str, padding: dict[str, int]) -> list[Shard]:
    """Return the shards at a `place` in the folder that have rows, by name; all of one row length."""
    paths = sorted((folder / place).glob("shard_*.npy"))
    read = [replace(read_header(path), padding=padding.get(place + path.name, 0)) for path in paths]
    shards = [shard for shard in read if shard.rows]
    for shard in shards:
        if shard.padding >= shard.row_len:
            raise InputError(
                f"{folder / 'metadata.json'}: its padding of {place}{shard.path.name} is {shard.padding}, where a row "
                f"has {shard.row_len} tokens; correct or remove it"
            )
        if shard.row_len != shards[0].row_len:
            raise InputError(
                f"{shard.path}: rows of {shard.row_len} tokens, but {shards[0].path.name} has {shards[0].row_len}; "
                "all shards of a folder need the same row length"
            )
    return shards


def _readable(count: int) -> str:
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return str(count)
