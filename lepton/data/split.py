"""Which part of the documents validates: a share of them, chosen by a hash of their text, and never too few tokens.

What is measured on a handful of tokens is noise, and the best checkpoint is chosen by it. So if the chosen documents
have fewer than `FLOOR` tokens, or than a tenth of a small corpus, more documents are moved to validation in the order
of their hashes. From one that would bring more than twice the tokens that are wanted, only the end is taken. Equal
documents always go the same way.
"""

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from lepton.data.sources import Piece

FLOOR = 4096
"""Validation has at least this many tokens, or in a small corpus one token in `MOST`."""
MOST = 10
"""In a small corpus, validation has at least one token in this many."""
SHORTEST_END = 16
"""The end of a document that is taken has at least this many tokens, or half of a shorter document. A corpus so small
that validation should have fewer gets no additional documents."""
HELD_BACK = 1 << 21
"""Tokens of the beginning of a corpus that wait in memory until validation has enough. Where these do not bring it,
documents are large, and reading holds out the last rows."""
HELD_OUT_SHARE = 100
"""Without a ``val`` folder, one row in this many is held out for validation, but at least one."""
HELD_OUT_ROWS = 256
"""Largest number of rows that are held out, all from the last shard. If they are almost only filler, with less than a
quarter of a row of tokens, one more row is held out."""


class Writer(Protocol):
    """What takes the tokens of a split."""

    tokens: int

    def add(self, ids: np.ndarray) -> None:
        """Take tokens, uint16 [N]."""

    def take_back(self) -> np.ndarray:
        """Return all tokens so far, none of which may be on the disk yet, and forget them."""


@dataclass
class _Document:
    key: bytes
    split: int
    parts: list[np.ndarray] = field(default_factory=list)
    end: int = 0
    """Tokens at the end that validate, of a document that trains."""

    @property
    def tokens(self) -> int:
        return sum(map(len, self.parts))


class Splitter:
    """Sends documents to the writers of training and validation."""

    def __init__(self, train: Writer, val: Writer, *, val_fraction: float, eos_id: int, whole: bool = False) -> None:
        """Split by `val_fraction`; documents that must stay `whole` do not lend their ends to validation."""
        self.val_documents = 0
        """Documents that validate."""
        self.val_ends = 0
        """Documents that train but for their end, which validates."""
        self._writers, self._eos = (train, val), np.array([eos_id], np.uint16)
        self._whole, self._first = whole, True
        self._limit = val_fraction * 2**64
        self._waiting: list[_Document] | None = [] if val_fraction else None
        self._tokens = [0, 0]

    def choose(self, pieces: Iterable[Piece]) -> Iterator[tuple[Piece, bytes, int]]:
        """Yield every piece with the key of its document and its split, 0 for training and 1 for validation.

        Equal documents have equal keys. The first document always trains.
        """
        key, split, opens = b"", 0, True
        for piece in pieces:
            if opens:
                key, split = self.assign(piece.text.encode("utf-8", "replace"))
            yield piece, key, split
            opens = piece.last

    def assign(self, beginning: bytes) -> tuple[bytes, int]:
        """Return the key of the next document and its split, by its beginning. The first document always trains."""
        key = hashlib.sha256(beginning).digest()[:8]
        split = int(not self._first and int.from_bytes(key, "big") < self._limit)
        self._first = False
        return key, split

    def add(self, ids: np.ndarray, key: bytes, split: int, *, opens: bool) -> None:
        """Take the tokens of the next piece; one that `opens` a document is its first."""
        self.val_documents += opens and split
        self._tokens[split] += len(ids)
        if self._waiting is None:
            self._writers[split].add(ids)
            return
        if opens:
            self._waiting.append(_Document(key, split))
        self._waiting[-1].parts.append(ids)
        if self._tokens[1] >= FLOOR or sum(self._tokens) > HELD_BACK:
            self._release()

    def close(self, row_len: int, shard_rows: int) -> None:
        """Write what waits. Nothing may be added any more."""
        train, val = self._writers
        if self._waiting:
            total = sum(self._tokens)
            wanted = min(FLOOR, total // MOST)
            found = self._tokens[1] or held_out_tokens(total, row_len, shard_rows)
            if found < wanted and wanted >= SHORTEST_END:
                self._choose_more(self._waiting, wanted)
            self._release()
        elif 0 < val.tokens < FLOOR:
            train.add(val.take_back())
            self.val_documents = 0

    def _choose_more(self, documents: list[_Document], wanted: int) -> None:
        missing = wanted - self._tokens[1]
        groups: dict[bytes, list[_Document]] = {}
        for document in documents:
            if not document.split:
                groups.setdefault(document.key, []).append(document)
        first = documents[0].key
        for key in sorted(groups, key=lambda key: (key == first, key)):
            group = groups[key]
            size = sum(document.tokens for document in group)
            if size <= missing + wanted and key != first:
                for document in group:
                    document.split = 1
                self.val_documents += len(group)
            elif self._whole:
                continue
            else:
                size = -(-missing // len(group))
                for document in group:
                    document.end = min(max(size, SHORTEST_END), document.tokens // 2)
                self.val_ends += len(group)
                size *= len(group)
            missing -= size
            if missing <= 0:
                return

    def _release(self) -> None:
        assert self._waiting is not None
        train, val = self._writers
        for document in self._waiting:
            if not document.end:
                for part in document.parts:
                    self._writers[document.split].add(part)
                continue
            ids = np.concatenate(document.parts)
            train.add(ids[: -document.end])
            train.add(self._eos)
            val.add(ids[-document.end :])
        self._waiting = None


def held_out_rows(rows: Sequence[int], row_len: int, padding: int) -> int:
    """Return how many rows at the end of a data set without a ``val`` folder are held out for validation.

    `rows` are those of each shard, and `padding` are the tokens that only fill the last row. At least one row is left.
    """
    total = sum(rows)
    held = min(rows[-1], max(1, min(total // HELD_OUT_SHARE, HELD_OUT_ROWS)))
    hardly_any = held * row_len - padding < row_len / 4
    return min(held + hardly_any, total - 1)


def held_out_tokens(tokens: int, row_len: int, shard_rows: int) -> int:
    """Return how many of `tokens` in shards of `shard_rows` rows are held out without a ``val`` folder."""
    total = -(-tokens // row_len)
    full, rest = divmod(total, shard_rows)
    padding = total * row_len - tokens
    held = held_out_rows([shard_rows] * full + [rest] * (rest > 0), row_len, padding)
    return held * row_len - padding if held else 0
