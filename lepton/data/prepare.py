"""Preparing training data: documents -> tokens -> shards of packed rows, in the form that `ShardedDataset` reads."""

import contextlib
import json
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypedDict, TypeVar, Unpack

import numpy as np
from tqdm import tqdm

from lepton.data.duplicates import Distinct
from lepton.data.publish import METADATA, Place, place_for
from lepton.data.publish import publish as _publish
from lepton.data.sources import MARKER, Corpus, Piece
from lepton.data.split import Splitter, held_out_tokens
from lepton.data.tokenizer import Tokenizer
from lepton.errors import InputError

ROW_LEN = 2048
"""Tokens of a row, as in the public data set."""
MAX_ROW_LEN = 1 << 20
SHARD_TOKENS = 1 << 25
"""Tokens of a full shard: 64 MiB."""
MAX_SHARD_TOKENS = 1 << 27
"""Most tokens of a shard, which is made in memory."""
BATCH_CHARACTERS = 1 << 20
"""Text that is encoded at once."""
Kind = TypeVar("Kind", bound=Corpus)


@dataclass(frozen=True, kw_only=True)
class Preparation:
    """How documents become rows. Values that cannot be used raise InputError."""

    val_fraction: float = 0.01
    """About this share of the documents goes into ``out/val`` (see `Splitter`). The first document always trains. Where
    there is no such folder, reading holds out the last rows."""
    text_field: str = "text"
    """Field of a JSON entry, or column of a table, that holds the text."""
    separator: str | None = None
    """Text between the documents of a file; None: a line that is the marker alone; '': one document a file."""
    row_len: int = ROW_LEN
    """Tokens of a row."""
    keep_duplicates: bool = False
    """Whether documents that are equal to an earlier one are kept."""
    shard_rows: int | None = None
    """Rows of a full shard; None: as many as make `SHARD_TOKENS` tokens."""

    def __post_init__(self) -> None:
        if not 0 <= self.val_fraction < 1:
            raise InputError(f"val_fraction={self.val_fraction}: must lie in 0..1, 1 excluded")
        if not 2 <= self.row_len <= MAX_ROW_LEN:
            raise InputError(f"row_len={self.row_len}: must lie in 2..{MAX_ROW_LEN}")
        most = MAX_SHARD_TOKENS // self.row_len
        if self.shard_rows and not 1 <= self.shard_rows <= most:
            raise InputError(f"shard_rows={self.shard_rows}: must lie in 1..{most} for rows of {self.row_len} tokens")

    @property
    def rows_per_shard(self) -> int:
        """Rows of a full shard."""
        return self.shard_rows or SHARD_TOKENS // self.row_len


class PreparationFields(TypedDict, total=False):
    """The fields of `Preparation` as keyword arguments, for editors and type checkers."""

    val_fraction: float
    text_field: str
    separator: str | None
    row_len: int
    keep_duplicates: bool
    shard_rows: int | None


def prepare(
    sources: Iterable[str | Path],
    out: str | Path,
    tokenizer: Tokenizer,
    *,
    force: bool = False,
    wait: bool = False,
    name: str | None = None,
    show_progress: bool = False,
    note: Callable[[str], object] = lambda _: None,
    **how: Unpack[PreparationFields],
) -> dict[str, Any]:
    """Write the documents of `sources` (see `Corpus`) as shards into the folder `out`; return its metadata.

    - Documents that are equal to an earlier one are left out (see `Distinct`).
    - Every document ends with the end-of-text id; documents are packed into rows; the last row is filled with that id,
      and the metadata say how far, so that nobody trains on it.
    - `out` is decided on before anything is read, and holds the whole data set or nothing new (see
      `lepton.data.publish`). An existing data set is only replaced with `force`, and only when the new one is whole;
      other folders are never touched. Where another process is writing it, that is an error, or `wait` waits.
    - `note` gets a line on each thing that a user may not expect, such as what was skipped.
    - `how` are the fields of `Preparation`.

    Raises InputError for sources without text and for an `out` that holds something already.
    """
    settled = Preparation(**how)
    sources, out = list(sources), Path(out).absolute()
    with making(out, force=force, wait=wait) as place:
        corpus = corpus_of(Corpus, sources, out, place, settled)
        distinct = None if settled.keep_duplicates else Distinct()
        quiet = None if show_progress else True  # None: shown on a terminal alone
        with tqdm(total=corpus.size, unit="B", unit_scale=True, desc=f"preparing {out.name}", disable=quiet) as bar:
            pieces = corpus.pieces(bar.update)
            pieces = distinct.pieces(pieces) if distinct else pieces
            encoded = _encode(pieces, tokenizer, place.partial, settled)
        dropped = distinct.dropped if distinct else 0
        metadata = {"name": name or out.name, **encoded, "duplicates": dropped, **about(corpus)}
        if not metadata["documents"]:
            skipped = corpus.skipped_summary()
            why = f" (skipped: {skipped})" if skipped else ""
            raise InputError(f"no text found in {', '.join(map(str, sources))}{why}")
        finish(place, metadata)
        for line in notes(corpus, dropped):
            note(line)
    return metadata


@contextlib.contextmanager
def making(out: Path, *, force: bool, wait: bool = False) -> Iterator[Place]:
    """Yield the place to make the data set of `out` in (see `place_for`). Raises InputError if it cannot be written."""
    try:
        with place_for(out, force=force, wait=wait) as place:
            yield place
    except OSError as error:
        # numpy says of a full disk only how much of an array was written
        raise InputError(f"cannot write {out}: {error.strerror or f'{error} (is the disk full?)'}") from None


def finish(place: Place, metadata: dict[str, Any]) -> None:
    """Write the metadata of a data set that is whole, and let it take its place."""
    text = json.dumps(metadata, indent=2, ensure_ascii=False)
    (place.partial / METADATA).write_text(text + "\n", encoding="utf-8", errors="replace")
    _publish(place)


def corpus_of(kind: type[Kind], sources: list[str | Path], out: Path, place: Place, how: Preparation) -> Kind:
    """Return the documents to prepare, a `Corpus` or what derives from it; none may lie where they are written to."""
    for source in sources:
        path = Path(os.path.realpath(source))
        if place.folder in (path, *path.parents):
            raise InputError(f"{source} lies in the output folder {out}: name another with --out")
    own = (place.folder, place.partial.parent)
    return kind(sources, text_field=how.text_field, separator=how.separator, leave_out=own)


def about(corpus: Corpus) -> dict[str, Any]:
    """Return what the metadata say of the sources, once they are read."""
    return {
        "separators": corpus.separators,
        "markers_kept": corpus.markers_kept,
        "skipped_files": len(corpus.skipped),
        "skipped": corpus.skipped_counts(),
    }


def _encode(pieces: Iterable[Piece], tokenizer: Tokenizer, folder: Path, how: Preparation) -> dict[str, Any]:
    """Write the tokens of all pieces as shards into `folder` and ``folder/val``; return the metadata on them."""
    row_len, shard_rows = how.row_len, how.rows_per_shard
    train, val = (_ShardWriter(place, row_len, shard_rows, tokenizer.eos_id) for place in (folder, folder / "val"))
    splitter = Splitter(train, val, val_fraction=how.val_fraction, eos_id=tokenizer.eos_id)
    counts = _fill(splitter, pieces, tokenizer)
    splitter.close(row_len, shard_rows)
    for writer in (train, val):
        writer.close()
    held_out = not val.tokens and train.tokens
    return {
        "total_tokens": train.tokens + val.tokens,
        "val_tokens": val.tokens,
        "documents": counts["documents"],
        "val_documents": splitter.val_documents,
        "val_ends": splitter.val_ends,
        "held_out_tokens": held_out_tokens(train.tokens, row_len, shard_rows) if held_out else 0,
        "text_bytes": counts["text_bytes"],
        "row_len": row_len,
        "padding": {**train.padding, **{f"val/{name}": count for name, count in val.padding.items()}},
        "vocab_size": tokenizer.size,
        "tokenizer_hash": tokenizer.hash,
    }


def notes(corpus: Corpus, dropped: int, units: str = "documents") -> Iterator[str]:
    """Yield a line on each thing that a user may not expect; `dropped` are the duplicates that were left out."""
    if dropped:
        yield f"left out: {dropped:,} {units} equal to an earlier one; --keep_duplicates keeps them"
    if skipped := corpus.skipped_summary():
        yield f"skipped: {skipped}"
    if corpus.separators:
        yield f"separators between documents: {corpus.separators:,}"
    if corpus.markers_kept:
        yield f"kept as text: {corpus.markers_kept:,} {MARKER} inside lines; --separator '{MARKER}' splits there"


def _fill(splitter: Splitter, pieces: Iterable[Piece], tokenizer: Tokenizer) -> Counter[str]:
    """Encode the pieces, a batch at a time, and hand them on; return the counts of documents and bytes."""
    counts: Counter[str] = Counter()
    batch: list[tuple[Piece, bytes, int]] = []
    characters = 0
    opens = True

    def encode() -> None:
        nonlocal opens
        ids_of_piece = tokenizer.encode_batch(piece.text for piece, _, _ in batch)
        for (piece, key, split), ids in zip(batch, ids_of_piece, strict=True):
            ids = [*ids, tokenizer.eos_id] if piece.last else ids
            splitter.add(np.array(ids, np.uint16), key, split, opens=opens)
            counts["text_bytes"] += len(piece.text.encode("utf-8", "replace"))
            counts["documents"] += piece.last
            opens = piece.last

    for piece, key, split in splitter.choose(pieces):
        batch.append((piece, key, split))
        characters += len(piece.text)
        if characters >= BATCH_CHARACTERS:
            encode()
            batch, characters = [], 0
    encode()
    return counts


class _ShardWriter:
    """Packs tokens into rows and writes a shard whenever one is full."""

    def __init__(self, folder: Path, row_len: int, shard_rows: int, eos_id: int) -> None:
        self.tokens = 0
        self.padding: dict[str, int] = {}
        """Of the shard whose last row had to be filled up: with how many tokens."""
        self._folder, self._eos_id, self._row_len = folder, eos_id, row_len
        self._buffer = np.empty(row_len * shard_rows, np.uint16)
        self._used = 0
        self._shards = 0

    def add(self, ids: np.ndarray) -> None:
        """Take tokens, uint16 [N]."""
        self.tokens += len(ids)
        rest = ids
        while len(rest):
            fits = rest[: len(self._buffer) - self._used]
            self._buffer[self._used : self._used + len(fits)] = fits
            self._used += len(fits)
            rest = rest[len(fits) :]
            if self._used == len(self._buffer):
                self._save()

    def take_back(self) -> np.ndarray:
        """Return all tokens so far, none of which may be on the disk yet, and forget them."""
        assert not self._shards
        ids = self._buffer[: self._used].copy()
        self.tokens = self._used = 0
        return ids

    def close(self) -> None:
        """Write what is left, its last row filled up with the end-of-text id."""
        if self._used:
            end = -(-self._used // self._row_len) * self._row_len
            if end > self._used:
                self.padding[self._name()] = end - self._used
            self._buffer[self._used : end] = self._eos_id
            self._used = end
            self._save()

    def _name(self) -> str:
        return f"shard_{self._shards:05d}.npy"

    def _save(self) -> None:
        self._folder.mkdir(exist_ok=True)
        rows = self._buffer[: self._used].reshape(-1, self._row_len)
        np.save(self._folder / self._name(), rows)
        self._shards += 1
        self._used = 0
