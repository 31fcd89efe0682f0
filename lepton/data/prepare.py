"""Preparing training data: documents -> tokens -> shards of packed rows, in the form that `ShardedDataset` reads."""

import hashlib
import json
import shutil
import uuid
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from lepton.data.sources import Corpus, Piece
from lepton.data.tokenizer import Tokenizer
from lepton.errors import InputError

ROW_LEN = 2048
"""Tokens of a row, as in the public data set."""
SHARD_ROWS = 16384
"""Rows of a full shard: 64 MiB."""
BATCH_CHARACTERS = 1 << 20
"""Text that is encoded at once."""


def prepare(
    sources: Iterable[str | Path],
    out: str | Path,
    tokenizer: Tokenizer,
    *,
    val_fraction: float = 0.01,
    text_field: str = "text",
    force: bool = False,
    name: str | None = None,
    row_len: int = ROW_LEN,
    shard_rows: int = SHARD_ROWS,
    show_progress: bool = False,
) -> dict[str, Any]:
    """Write the documents of `sources` (see `Corpus`) as shards into the folder `out`; return its metadata.

    - Every document ends with the end-of-text id; documents are packed into rows; the last row is filled with that id,
      and the metadata say how far, so that nobody trains on it.
    - About `val_fraction` of the documents, chosen by a hash of their text, go into ``out/val``. The first document
      always trains. With too few documents there is no such folder, and reading holds out the last rows.
    - All is written into a hidden folder beside `out`, which takes its name at the end: a half-made one is never seen.
      An existing data set is only replaced with `force`, and only then; other folders are never touched.

    Raises InputError for sources without text and for an `out` that holds something already.
    """
    if not 0 <= val_fraction < 1:
        raise InputError(f"val_fraction={val_fraction}: must lie in 0..1, 1 excluded")
    sources, out = list(sources), Path(out).absolute()
    _check_out(out, force)
    for source in sources:
        if out.resolve() in (Path(source).resolve(), *Path(source).resolve().parents):
            raise InputError(f"{source} lies in the output folder, which would be replaced: name another with --out")
    corpus = Corpus(sources, text_field=text_field, leave_out=out)
    partial = out.with_name(f".{out.name}.{uuid.uuid4().hex[:8]}.partial")
    try:
        partial.mkdir(parents=True)
        writers = [_ShardWriter(folder, row_len, shard_rows, tokenizer.eos_id) for folder in (partial, partial / "val")]
        quiet = None if show_progress else True  # None: shown on a terminal alone
        with tqdm(total=corpus.size, unit="B", unit_scale=True, desc=f"preparing {out.name}", disable=quiet) as bar:
            counts = _fill(writers, _choose(corpus.pieces(bar.update), val_fraction), tokenizer)
        if not counts["documents"]:
            raise InputError(f"no text found in {', '.join(map(str, sources))} ({len(corpus.skipped)} files skipped)")
        metadata = {
            "name": name or out.name,
            "total_tokens": sum(writer.tokens for writer in writers),
            "val_tokens": writers[1].tokens,
            "documents": counts["documents"],
            "val_documents": counts["val_documents"],
            "text_bytes": counts["text_bytes"],
            "skipped_files": len(corpus.skipped),
            "row_len": row_len,
            "padding": {**writers[0].padding, **{f"val/{name}": count for name, count in writers[1].padding.items()}},
            "vocab_size": tokenizer.size,
            "tokenizer_hash": tokenizer.hash,
        }
        text = json.dumps(metadata, indent=2, ensure_ascii=False)
        (partial / "metadata.json").write_text(text + "\n", encoding="utf-8")
        _publish(partial, out, force)
    except OSError as error:
        raise InputError(f"cannot write {out}: {error.strerror}") from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return metadata


def _check_out(out: Path, force: bool) -> None:
    if out.exists() and not out.is_dir():
        raise InputError(f"{out} is a file: name a folder with --out")
    for path in sorted([*out.glob("*"), *out.glob("val/*")]):
        ours = path.match("shard_*.npy") or path.relative_to(out) in (Path("metadata.json"), Path("val"))
        if not ours:
            raise InputError(f"{out} holds other files ({path.relative_to(out)}): name a new folder with --out")
    if any(out.glob("*")) and not (force and any(out.glob("shard_*.npy"))):
        raise InputError(f"{out} is not empty: name another folder with --out, or replace a data set with --force")


def _publish(partial: Path, out: Path, force: bool) -> None:
    """Give the finished folder its name; a data set that has the name goes only now."""
    if force and out.exists():
        old = partial.with_suffix(".old")
        out.rename(old)
        try:
            partial.rename(out)
        except OSError:
            old.rename(out)
            raise
        shutil.rmtree(old, ignore_errors=True)
    else:
        if out.exists():
            out.rmdir()  # fails unless it is empty
        partial.rename(out)


def _choose(pieces: Iterable[Piece], val_fraction: float) -> Iterator[tuple[Piece, int]]:
    """Yield every piece with its split, 0 for training and 1 for validation: equal documents go the same way."""
    split = 0
    opens, first = True, True
    for piece in pieces:
        if opens:
            digest = hashlib.sha256(piece.text.encode("utf-8", "replace")).digest()
            split = int(not first and int.from_bytes(digest[:8], "big") < val_fraction * 2**64)
        yield piece, split
        opens, first = piece.last, False


def _fill(writers: list["_ShardWriter"], pieces: Iterable[tuple[Piece, int]], tokenizer: Tokenizer) -> Counter[str]:
    """Encode the pieces, a batch at a time, and write them; return the counts of documents and bytes."""
    counts: Counter[str] = Counter()
    batch: list[tuple[Piece, int]] = []
    characters = 0

    def encode() -> None:
        ids_of_piece = tokenizer.encode_batch(piece.text for piece, _ in batch)
        for (piece, split), ids in zip(batch, ids_of_piece, strict=True):
            writers[split].add([*ids, tokenizer.eos_id] if piece.last else ids)
            counts["text_bytes"] += len(piece.text.encode("utf-8", "replace"))
            counts["documents"] += piece.last
            counts["val_documents"] += piece.last and split

    for piece, split in pieces:
        batch.append((piece, split))
        characters += len(piece.text)
        if characters >= BATCH_CHARACTERS:
            encode()
            batch, characters = [], 0
    encode()
    for writer in writers:
        writer.close()
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

    def add(self, ids: list[int]) -> None:
        self.tokens += len(ids)
        rest = np.array(ids, np.uint16)
        while len(rest):
            fits = rest[: len(self._buffer) - self._used]
            self._buffer[self._used : self._used + len(fits)] = fits
            self._used += len(fits)
            rest = rest[len(fits) :]
            if self._used == len(self._buffer):
                self._save()

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
