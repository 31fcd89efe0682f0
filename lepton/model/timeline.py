"""Where the tokens of a chunk stand: positions, documents, and which token may look at which.

Shape suffixes here and in the whole package:
B rows, T tokens of the chunk, R remembered tokens before it (the past columns), J = R + T columns in all,
D width, N query heads, K key/value heads, H head width, L blocks, V vocabulary.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

# Queries are answered in bands of this many tokens (or a window, if that is longer), each against the
# columns it can see at all, so a long chunk costs time and memory linear in its length.
BAND = 256


@dataclass(frozen=True)
class Timeline:
    """Integers only; nothing here depends on a parameter."""

    position_BT: Tensor
    """Tokens of its own document that stand before each token."""
    ends_BT: Tensor
    """Whether the token ends its document (it is `eos_id`); it still belongs to it."""
    start_B: Tensor
    """Position of the chunk's first token: how many tokens of its document the past already holds."""

    @staticmethod
    def read(tokens_BT: Tensor, start_B: Tensor, eos_id: int) -> "Timeline":
        """Place a chunk that continues a document of which `start_B` tokens have been read."""
        index_T = torch.arange(tokens_BT.shape[1], device=tokens_BT.device)
        ends_BT = tokens_BT == eos_id
        opens_BT = torch.nn.functional.pad(ends_BT[:, :-1], (1, 0))
        opened_BT = torch.where(opens_BT, index_T, -1).cummax(1).values
        position_BT = torch.where(opened_BT >= 0, index_T - opened_BT, start_B[:, None] + index_T)
        return Timeline(position_BT, ends_BT, start_B)

    def position_after(self, count_B: Tensor) -> Tensor:
        """Return the position [B] that the next token has once the first `count_B` tokens are read."""
        last_B1 = (count_B - 1).clamp(min=0)[:, None]
        ended_B = self.ends_BT.gather(1, last_B1)[:, 0]
        after_B = torch.where(ended_B, 0, self.position_BT.gather(1, last_B1)[:, 0] + 1)
        return torch.where(count_B > 0, after_B, self.start_B)


@dataclass(frozen=True)
class Band:
    """A run of queries and the run of columns that any of them can see."""

    queries: slice
    columns: slice
    mask_B1TJ: Tensor


def band_edges(chunk: int, past: int, window: int | None) -> list[tuple[int, int, int, int]]:
    """Split `chunk` queries after `past` columns into bands: (first query, last, first column, last)."""
    if window is None or chunk <= 2 * max(window, BAND):
        return [(0, chunk, 0, past + chunk)]
    size = max(window, BAND)
    edges = []
    for first in range(0, chunk, size):
        last = min(first + size, chunk)
        edges.append((first, last, max(0, past + first - window + 1), past + last))
    return edges


def bands(timeline: Timeline, past: int, window: int | None) -> list[Band]:
    """Return the attention masks of a chunk: a token sees itself and what stands before it in its own
    document, at most `window` tokens in all.

    Past columns hold the tokens right before the chunk, oldest first, so the distance of two columns is the
    distance of their tokens, and a column lies in the token's document exactly if it is no farther away than
    the token's position. That one comparison covers documents, short pasts and fresh states alike.
    """
    reach_BT = timeline.position_BT if window is None else timeline.position_BT.clamp(max=window - 1)
    device = reach_BT.device
    result = []
    for first, last, left, right in band_edges(reach_BT.shape[1], past, window):
        query_T1 = torch.arange(first, last, device=device)[:, None]
        column_J = torch.arange(left - past, right - past, device=device)
        distance_TJ = query_T1 - column_J
        mask_BTJ = (distance_TJ >= 0) & (distance_TJ <= reach_BT[:, first:last, None])
        result.append(Band(slice(first, last), slice(left, right), mask_BTJ[:, None]))
    return result
