"""Reading conversations from JSON lines, JSON arrays and Parquet files, one at a time."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO

from lepton.data.chat import Message, read_messages
from lepton.data.formats import TEXTS, Form, form_of, read_entries
from lepton.data.sources import Corpus
from lepton.errors import InputError


class Conversations(Corpus):
    """The conversations of `sources`, files and folders, in a fixed order (see `Corpus`).

    An entry of JSON lines, a JSON array or a Parquet file is a conversation: a list of messages, or an object that
    holds it in `text_field` (see `read_messages`). Files of other forms are skipped in folders, and refused by name.
    """

    def conversations(self, advance: Callable[[int], object] | None = None) -> Iterator[list[Message]]:
        """Yield every conversation. `advance` gets the bytes of the files that were read since its last call.

        Raises InputError, with file and line, for entries that are torn or no conversation.
        """
        for path in self.files:
            done = 0
            try:
                with path.open("rb") as raw:
                    for messages in self._read(raw, path):
                        yield messages
                        if advance and (now := raw.tell()) > done:
                            advance(now - done)
                            done = now
            except OSError as error:
                raise InputError(f"cannot read {path}: {error.strerror}") from None

    def _read(self, raw: IO[bytes], path: Path) -> Iterator[list[Message]]:
        for place, entry in read_entries(raw, path, self._form(path), self.text_field):
            yield read_messages(entry, self.text_field, place)

    def _peek(self, path: Path, *, named: bool) -> Form:
        form = self._form(path)
        with path.open("rb") as raw:
            next(self._read(raw, path), None)
        return form

    def _form(self, path: Path) -> Form:
        form = form_of(path, self.text_field, named=True)
        if form in TEXTS or form == "table":
            raise InputError(
                f"{path}: conversations are read from .jsonl, .parquet and .json arrays: give a file with one a line, "
                f'{{"{self.text_field}": [{{"role": "user", "content": "..."}}, ...]}}'
            )
        return form
