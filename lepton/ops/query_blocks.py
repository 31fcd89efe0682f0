"""How attention without a kernel splits the queries of a long chunk, and how many pairs it computes."""

BLOCK = 128
"""Queries of a block. Each block takes only the keys and values that one of its queries can see: so with a window a
chunk costs time and memory linear in its length, and without one half of the square."""


def query_blocks(chunk: int, past: int, window: int | None) -> list[tuple[int, int, int, int]]:
    """Split `chunk` queries after `past` kv entries: (first query, last, first kv entry, last), the last excluded."""
    if chunk <= 2 * BLOCK:
        return [(0, chunk, 0, past + chunk)]
    blocks = []
    for first in range(0, chunk, BLOCK):
        last = min(first + BLOCK, chunk)
        left = 0 if window is None else max(0, past + first - window + 1)
        blocks.append((first, last, left, past + last))
    return blocks


def computed_pairs(chunk: int, window: int | None) -> int:
    """Return the pairs of a query and a kv entry whose scores are computed for a chunk without a past."""
    return sum((last - first) * (right - left) for first, last, left, right in query_blocks(chunk, 0, window))
