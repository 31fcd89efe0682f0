"""Positions, documents and segments of the tokens of a chunk.

The letters of shape suffixes, here and in the whole package, are in `lepton/shapes.py`.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from lepton.model.checks import check_range


class Rounds(NamedTuple):
    """Rounds of thinking at the openings of a pass, where rows differ."""

    each_B: Tensor
    most: int
    """Bound of them, a constant of the pass."""


@dataclass(frozen=True)
class Timeline:
    """Positions, documents and segments of a chunk: integers that depend only on the tokens."""

    position_BT: Tensor
    """Position of each token: the number of tokens before it in its own document."""
    ends_BT: Tensor
    """Whether the token is `eos_id`, the last token of its document."""
    document_BT: Tensor
    """Ordinal of the token's document in the chunk. 0 is the document that is open before the chunk."""
    since_BT: Tensor
    """Tokens since the start of the document or the last requested opening of a segment; known only modulo `segment`
    if that lies before the chunk."""
    group_BT: Tensor
    """Ordinal of the token's segment in the chunk. 0 is the segment that is open before the chunk."""
    opening_BG: Tensor
    """Index of the token that opens each new segment (1, 2, ...), -1 in rows that have fewer."""
    start_B: Tensor
    """Position of the chunk's first token."""
    phase_B: Tensor
    """Tokens since a segment opened, modulo `segment`, at the first token, without regard to `opens_BT`; 0: it opens a
    segment."""
    segment: int
    """Tokens per segment."""
    one_document: bool = False
    """Whether it is known without a look at the tokens that none of them ends a document or, after the first, starts
    one."""

    @staticmethod
    def read(
        tokens_BT: Tensor,
        start_B: Tensor,
        phase_B: Tensor,
        *,
        eos_id: int,
        segment: int,
        opens_BT: Tensor | None = None,
        groups: int | None = None,
    ) -> "Timeline":
        """Return the timeline of a chunk.

        Args:
            tokens_BT: token ids.
            start_B: position of the first token.
            phase_B: tokens since a segment opened, modulo `segment`, before the first token.
            eos_id: id that ends a document.
            segment: tokens per segment.
            opens_BT: bool, tokens that open a segment in addition; None: none.
            groups: bound of the new segments per row, for static shapes; None counts them, synchronising with a GPU.

        Raises:
            InputError: a row has more new segments than `groups` (checked on a CPU).
        """
        index_T = torch.arange(tokens_BT.shape[1], device=tokens_BT.device)
        ends_BT = tokens_BT == eos_id
        first_BT = F.pad(ends_BT[:, :-1], (1, 0))
        position_BT = _since(first_BT, index_T, start_B)
        since_BT = _since(first_BT if opens_BT is None else first_BT | opens_BT, index_T, phase_B)
        open_BT = since_BT % segment == 0
        group_BT = open_BT.cumsum(1)
        if groups is None:
            groups = int(group_BT[:, -1].max())
        else:
            check_range(group_BT[:, -1], 0, groups, "more segments than `groups` allows:")
        # Tokens that open no segment, and segments beyond the bound, write to an extra column, which is dropped.
        target_BT = torch.where(open_BT, group_BT - 1, groups).clamp(max=groups)
        opening_BG = torch.full((len(start_B), groups + 1), -1, device=index_T.device)
        opening_BG = opening_BG.scatter(1, target_BT, index_T.expand_as(target_BT))[:, :groups]
        return Timeline(
            position_BT, ends_BT, first_BT.cumsum(1), since_BT, group_BT, opening_BG, start_B, phase_B, segment
        )

    @staticmethod
    def within_document(start_B: Tensor, phase_B: Tensor, length: int, *, segment: int, opening: bool) -> "Timeline":
        """Return the timeline of a chunk of `length` tokens, none of which ends a document.

        Only the first token may open a segment, and only if `opening`: shapes then have space for one new segment.
        A later token that would is taken for one of the same segment; the caller drops it.
        """
        index_T = torch.arange(length, device=start_B.device)
        nothing_BT = torch.zeros(len(start_B), length, dtype=torch.int64, device=start_B.device)
        opens_B = phase_B % segment == 0
        return Timeline(
            position_BT=start_B[:, None] + index_T,
            ends_BT=nothing_BT.bool(),
            document_BT=nothing_BT,
            since_BT=phase_B[:, None] + index_T,
            group_BT=nothing_BT + opens_B[:, None] if opening else nothing_BT,
            opening_BG=opens_B[:, None].long() - 1 if opening else nothing_BT[:, :0],
            start_B=start_B,
            phase_B=phase_B,
            segment=segment,
            one_document=True,
        )

    def at(self, value_BT: Tensor, count_B: Tensor, before: Tensor | int) -> Tensor:
        """Return `value_BT` at the last of each row's first `count_B` tokens, or `before` if `count_B` is 0."""
        last_B = value_BT.gather(1, (count_B - 1).clamp(min=0)[:, None])[:, 0]
        return torch.where(count_B > 0, last_B, before)

    def ended(self, count_B: Tensor) -> Tensor:
        """Return whether the last of each row's first `count_B` tokens ends its document."""
        return self.at(self.ends_BT.long(), count_B, 0) > 0

    def position_after(self, count_B: Tensor) -> Tensor:
        """Return the position [B] of the token after the first `count_B` tokens."""
        if self.one_document:
            return self.start_B + count_B
        return torch.where(self.ended(count_B), 0, self.at(self.position_BT + 1, count_B, self.start_B))

    def phase_after(self, count_B: Tensor) -> Tensor:
        """Return the phase [B] of the token after the first `count_B` tokens."""
        if self.one_document:
            return (self.phase_B + count_B) % self.segment
        return torch.where(self.ended(count_B), 0, self.at((self.since_BT + 1) % self.segment, count_B, self.phase_B))


def _since(restart_BT: Tensor, index_T: Tensor, before_B: Tensor) -> Tensor:
    """Return the tokens since the last restart of the row; without one, `before_B` more than since the first token."""
    last_BT = torch.where(restart_BT, index_T, -1).cummax(1).values
    return torch.where(last_BT >= 0, index_T - last_BT, before_B[:, None] + index_T)
