"""Leaving out documents that are equal to an earlier one, by a hash of their whole text."""

import hashlib
from collections.abc import Iterable, Iterator

from lepton.data.sources import Piece

HELD = 1 << 25
"""Most characters of a document that waits in memory until its end is known (32 Mi). Longer ones are not compared."""
DIGEST_BYTES = 16
"""Of a hash: two different texts among a billion have the same one with a probability of 1e-21."""


class Distinct:
    """Passes on every document but those whose text has come before. Memory: about 100 bytes a document."""

    def __init__(self) -> None:
        self.dropped = 0
        """Documents that were left out so far."""
        self._seen: set[bytes] = set()

    def pieces(self, pieces: Iterable[Piece]) -> Iterator[Piece]:
        """Yield the pieces of the documents that are kept, in their order."""
        waiting: list[Piece] = []
        size, too_long = 0, False
        for piece in pieces:
            waiting.append(piece)
            size += len(piece.text)
            too_long = too_long or size > HELD
            if too_long:
                yield from waiting
                waiting = []
            elif piece.last:
                if self.is_new("".join(each.text for each in waiting).encode("utf-8", "surrogatepass")):
                    yield from waiting
                waiting = []
            if piece.last:
                size, too_long = 0, False

    def is_new(self, content: bytes) -> bool:
        """Return whether a document with this content has not come before; count it where it has."""
        digest = hashlib.blake2b(content, digest_size=DIGEST_BYTES).digest()
        if digest in self._seen:
            self.dropped += 1
            return False
        self._seen.add(digest)
        return True
