"""Preparing conversations: messages -> tokens -> shards of rows, with a shard of flags that says which are answers.

- A row holds whole conversations, each as if it were alone, and behind them filler, which is never read. Conversations
  that are longer than a row are cut.
- Beside each ``shard_*.npy`` lies an ``answers_*.npy`` of the same shape: 1 where the token belongs to an answer.
"""

from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Unpack

import numpy as np
from tqdm import tqdm

from lepton.data.chat import ANSWER, TEMPLATE, ChatTemplate, Message
from lepton.data.conversations import Conversations
from lepton.data.duplicates import Distinct
from lepton.data.prepare import Preparation, PreparationFields, about, corpus_of, finish, making, notes
from lepton.data.publish import ANSWERS
from lepton.data.split import Splitter, held_out_rows
from lepton.data.tokenizer import Tokenizer
from lepton.errors import InputError

ROW_LEN = 513
"""Tokens of a row: a window of 512 targets."""
FIELD = "messages"
OPEN_ROWS = 64
"""Rows that wait for a conversation that fits into their rest."""


def prepare_chat(
    sources: Iterable[str | Path],
    out: str | Path,
    tokenizer: Tokenizer,
    *,
    force: bool = False,
    show_progress: bool = False,
    note: Callable[[str], object] = lambda _: None,
    **how: Unpack[PreparationFields],
) -> dict[str, Any]:
    """Write the conversations of `sources` (see `Conversations`) as shards into the folder `out`; return its metadata.

    As `lepton.data.prepare.prepare`, which describes the arguments; `text_field` is 'messages' and `row_len` 513 by
    default, and there is no `separator`.

    Raises InputError for sources without conversations and for an `out` that holds something already.
    """
    how.setdefault("text_field", FIELD)
    how.setdefault("row_len", ROW_LEN)
    settled = Preparation(**how)
    sources, out = list(sources), Path(out).absolute()
    template, distinct = ChatTemplate(tokenizer), None if settled.keep_duplicates else Distinct()
    with making(out, force=force) as place:
        corpus = corpus_of(Conversations, sources, out, place, settled)
        quiet = None if show_progress else True  # None: shown on a terminal alone
        with tqdm(total=corpus.size, unit="B", unit_scale=True, desc=f"preparing {out.name}", disable=quiet) as bar:
            talks = corpus.conversations(bar.update)
            written, cut = _write(talks, template, tokenizer, distinct, place.partial, settled)
        if not written["documents"]:
            raise InputError(f"no conversation found in {', '.join(map(str, sources))}")
        dropped = distinct.dropped if distinct else 0
        metadata = {"name": out.name, "chat": TEMPLATE, **written, "duplicates": dropped, **about(corpus)}
        finish(place, metadata)
        for line in notes(corpus, dropped, "conversations"):
            note(line)
        if cut:
            note(f"cut into rows: {cut:,} conversations longer than {settled.row_len:,} tokens; see --row_len")
    return metadata


def _write(
    talks: Iterable[list[Message]],
    template: ChatTemplate,
    tokenizer: Tokenizer,
    distinct: Distinct | None,
    folder: Path,
    how: Preparation,
) -> tuple[dict[str, Any], int]:
    """Write all conversations as shards; return the metadata on them, and how many were cut."""
    eos_id, counts = tokenizer.eos_id, Counter[str]()
    train, val = (RowWriter(each, how.row_len, how.rows_per_shard, eos_id) for each in (folder, folder / "val"))
    splitter = Splitter(train, val, val_fraction=how.val_fraction, eos_id=eos_id, whole=True)
    for messages in talks:
        marked = template.marked(messages, eos_id)
        content = marked.tobytes()
        if distinct is not None and not distinct.is_new(content):
            continue
        counts["documents"] += 1
        counts["text_bytes"] += sum(len(message.content.encode("utf-8", "replace")) for message in messages)
        counts["answer_tokens"] += int((marked >= ANSWER).sum())
        splitter.add(marked, *splitter.assign(content), opens=True)
    splitter.close(how.row_len, how.rows_per_shard)
    for writer in (train, val):
        writer.close()
    held = 0 if val.tokens or not train.tokens else train.held_out()
    metadata = {
        "total_tokens": train.tokens + val.tokens,
        "val_tokens": val.tokens,
        "documents": counts["documents"],
        "val_documents": splitter.val_documents,
        "val_ends": 0,
        "held_out_tokens": held,
        "answer_tokens": counts["answer_tokens"],
        "text_bytes": counts["text_bytes"],
        "row_len": how.row_len,
        "padding": {},
        "vocab_size": tokenizer.size,
        "tokenizer_hash": tokenizer.hash,
    }
    return metadata, train.cut + val.cut


class RowWriter:
    """Packs conversations of marked tokens into rows, best fit first, and writes a shard whenever one is full."""

    def __init__(self, folder: Path, row_len: int, shard_rows: int, eos_id: int) -> None:
        self.tokens = 0
        self.cut = 0
        """Conversations that were longer than a row."""
        self._folder, self._row_len, self._shard_rows, self._eos_id = folder, row_len, shard_rows, eos_id
        self._filler = int(eos_id == 0)  # not the end of a document: each would start a segment
        self._open: list[list[np.ndarray]] = []
        self._rows: list[list[np.ndarray]] = []
        self._used: list[int] = []
        """Tokens of each row that is full, in the order of the files."""
        self._shards = 0

    def add(self, ids: np.ndarray) -> None:
        """Take the marked tokens, uint32 [N], of some whole conversations."""
        self.tokens += len(ids)
        for talk in np.split(ids, np.flatnonzero(ids == self._eos_id) + 1):
            self.cut += len(talk) > self._row_len
            while len(talk) > self._row_len:
                self._close_row([talk[: self._row_len]])
                talk = talk[self._row_len :]
            if len(talk):
                self._place(talk)

    def take_back(self) -> np.ndarray:
        """Return all tokens so far, none of which may be on the disk yet, and forget them."""
        assert not self._shards
        ids = np.concatenate([part for row in [*self._rows, *self._open] for part in row])
        self.tokens = self.cut = 0
        self._open, self._rows, self._used = [], [], []
        return ids

    def held_out(self) -> int:
        """Return the tokens of the rows that are held out where there is no ``val`` folder."""
        full, rest = divmod(len(self._used), self._shard_rows)
        held = held_out_rows([self._shard_rows] * full + [rest] * (rest > 0), self._row_len, 0)
        return sum(self._used[-held:]) if held else 0

    def close(self) -> None:
        """Write what is left."""
        for row in self._open:
            self._close_row(row)
        self._open = []
        if self._rows:
            self._save()

    def _place(self, talk: np.ndarray) -> None:
        used = [sum(map(len, row)) for row in self._open]
        fitting = [i for i, count in enumerate(used) if count + len(talk) <= self._row_len]
        if fitting:
            best = max(fitting, key=used.__getitem__)
            self._open[best].append(talk)
            if used[best] + len(talk) == self._row_len:
                self._close_row(self._open.pop(best))
            return
        if len(self._open) == OPEN_ROWS:
            self._close_row(self._open.pop(max(range(OPEN_ROWS), key=used.__getitem__)))
        self._open.append([talk])

    def _close_row(self, row: list[np.ndarray]) -> None:
        self._rows.append(row)
        self._used.append(sum(map(len, row)))
        if len(self._rows) == self._shard_rows:
            self._save()

    def _save(self) -> None:
        self._folder.mkdir(exist_ok=True)
        marked = np.full((len(self._rows), self._row_len), self._filler, np.uint32)
        for line, row in zip(marked, self._rows, strict=True):
            joined = np.concatenate(row)
            line[: len(joined)] = joined
        name = f"shard_{self._shards:05d}.npy"
        np.save(self._folder / name, (marked % ANSWER).astype(np.uint16))
        np.save(self._folder / name.replace("shard", ANSWERS), (marked >= ANSWER).astype(np.uint8))
        self._rows = []
        self._shards += 1
