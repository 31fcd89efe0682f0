"""How attention without a kernel splits the queries of a long chunk, and how many pairs it computes."""

BLOCK = 128
"""Queries per block. A block computes scores only with the kv entries that one of its queries can attend to. With a
window, time and memory are then linear in the length of a chunk; without one, half of all pairs are computed."""


def query_blocks(chunk: int, past: int, window: int | None) -> list[tuple[int, int, int, int]]:
    """Split `chunk` queries that follow `past` kv entries into blocks.

    Returns (first query, end, first kv entry, end) of each block; the ends are exclusive.
    """
    if chunk <= 2 * BLOCK:
        return [(0, chunk, 0, past + chunk)]
    blocks = []
    for first in range(0, chunk, BLOCK):
        last = min(first + BLOCK, chunk)
        left = 0 if window is None else max(0, past + first - window + 1)
        blocks.append((first, last, left, past + last))
    return blocks


def computed_pairs(chunk: int, window: int | None) -> int:
    """Return the number of scores that are computed for a chunk without remembered tokens, in one row and head.

    Masked pairs inside a block are included.
    """
    return sum((last - first) * (right - left) for first, last, left, right in query_blocks(chunk, 0, window))
