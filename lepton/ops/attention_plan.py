"""The attention mask of a chunk, computed once per pass for all layers that share it.

A chunk's queries attend to kv entries of three kinds: those of remembered tokens (oldest first), those of the chunk's
own tokens, and slots, which belong to no token. `CausalWindow` computes which tokens attend to which. `AttentionPlan`
is the same in the form that `lepton.ops.attention.attend` takes: ranges of queries where the Triton kernel works, else
an additive mask for each block of queries. The letters of shapes are in `lepton/shapes.py`.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lepton.ops.attention_kernel import ATTENTION, Ranges
from lepton.ops.query_blocks import query_blocks


@dataclass(frozen=True)
class Chosen:
    """With depth routing, the M queries of a block that are computed; they lie in A rows.

    Attention needs a rectangle, so they are padded to A x `most`.
    """

    rows_A: Tensor
    """Indices of the rows that have any."""
    most: int
    """Largest number of them in a row."""
    source: slice
    """Their range among the chosen queries of all blocks."""
    place_M: Tensor
    """Index of each in the flattened rectangle."""

    def pad(self, q_MNH: Tensor) -> Tensor:
        """Return the block's queries in the rectangle, [A, most, N, H]; `q_MNH` are those of all blocks."""
        padded = q_MNH.new_zeros(len(self.rows_A) * self.most, *q_MNH.shape[1:])
        padded = padded.index_copy(0, self.place_M, q_MNH[self.source])
        return padded.unflatten(0, (len(self.rows_A), self.most))

    def unpad(self, out_AQNH: Tensor) -> Tensor:
        """Return the block's outputs without the padding, [M, N, H]."""
        return out_AQNH.flatten(0, 1)[self.place_M]


@dataclass(frozen=True)
class QueryBlock:
    """Consecutive queries, the consecutive kv entries that any of them can attend to, and the mask between them."""

    queries: slice
    """Indices of tokens of the chunk."""
    entries: slice
    """Indices of the kv entries of remembered tokens and chunk. All slots come in addition."""
    bias_BQJ: Tensor
    """Additive mask: 0 where a query attends to an entry, else the lowest number. Slots are last."""
    chosen: Chosen | None = None
    """The queries that are computed; None: all. With some, the mask is [A, most, J]."""


@dataclass(frozen=True)
class AttentionPlan:
    """The mask of a chunk's queries in one of two forms: ranges for the Triton kernel, or blocks."""

    ranges: Ranges | None
    """None: the mask is in `blocks`."""
    blocks: tuple[QueryBlock, ...]
    index_M: Tensor | None = None
    """Index in B x T of each query that is computed; None: all are."""
    wanted_BT: Tensor | None = None
    """Bool: the queries that are wanted. Others may be computed, but `put` drops their results. None: all are."""
    starts_BJ: Tensor | None = None
    """`CausalWindow.starts_BJ`."""

    def of_rows(self, rows_A: Tensor) -> "AttentionPlan":
        """Return the plan of the rows with indices `rows_A`."""
        starts_AJ = None if self.starts_BJ is None else self.starts_BJ.index_select(0, rows_A)
        if self.ranges is not None:
            return AttentionPlan(self.ranges.of_rows(rows_A), (), starts_BJ=starts_AJ)
        blocks = (QueryBlock(b.queries, b.entries, b.bias_BQJ.index_select(0, rows_A)) for b in self.blocks)
        return AttentionPlan(None, tuple(blocks), starts_BJ=starts_AJ)

    def take(self, x: Tensor) -> Tensor:
        """Return the values [M, ...] of `x` [B, T, ...] at the queries that are computed; `x` itself if all are."""
        return x if self.index_M is None else x.flatten(0, 1)[self.index_M]

    def put(self, x: Tensor, computed: Tensor) -> Tensor:
        """Return `x` [B, T, D] with `computed` [M, D] in the places of `take`; `computed` itself if all are."""
        if self.wanted_BT is not None:
            return torch.where(self.wanted_BT[..., None], computed, x)
        return computed if self.index_M is None else x.flatten(0, 1).index_copy(0, self.index_M, computed).view_as(x)


@dataclass(frozen=True)
class CausalWindow:
    """Causal sliding-window attention of a chunk, within documents. It makes the plans of a pass."""

    position_BT: Tensor
    """Position of each token in its own document."""
    past: int
    """Number R of kv entries before the chunk."""
    window: int | None
    """Largest number of tokens that a token attends to, itself included; None: its whole document."""
    dtype: torch.dtype
    """Dtype of queries, keys and values."""
    ranges: Ranges | None
    """The mask where the Triton kernel runs; None: it is in `masks`."""
    masks: tuple[tuple[slice, slice, Tensor], ...]
    """For each block: its queries, its kv entries, and a bool mask [B, Q, J]."""
    starts_BJ: Tensor
    """Bool: the kv entries of tokens that start the document of a query."""

    @staticmethod
    def of(
        position_BT: Tensor, *, past: int, window: int | None, dtype: torch.dtype, head_dim: int, routed: bool = False
    ) -> "CausalWindow":
        """Return the window of a chunk.

        The Triton kernel takes chunks without remembered tokens, of which all queries are computed. `routed` says that
        plans will choose some.
        """
        past_R = torch.arange(-past, 0, device=position_BT.device)
        starts_BJ = torch.cat([position_BT[:, :1] + past_R, position_BT], 1) == 0
        if past == 0 and not routed and ATTENTION.works(position_BT.device, dtype, head_dim):
            ranges = Ranges.causal(position_BT, window)
            return CausalWindow(position_BT, past, window, dtype, ranges, (), starts_BJ)
        rows, length = position_BT.shape
        masks = []
        for first, last, left, right in query_blocks(length, past, window):
            query_BQ = torch.arange(first, last, device=position_BT.device).expand(rows, -1)
            entry_J = torch.arange(left - past, right - past, device=position_BT.device)
            masks.append((slice(first, last), slice(left, right), visible(position_BT, query_BQ, entry_J, window)))
        return CausalWindow(position_BT, past, window, dtype, None, tuple(masks), starts_BJ)

    def mask_of(self, query_BQ: Tensor) -> Tensor:
        """Return a bool mask [B, Q, J]: the kv entries that the chunk's tokens with indices `query_BQ` attend to."""
        length = self.position_BT.shape[1]
        entry_J = torch.arange(-self.past, length, device=query_BQ.device)
        return visible(self.position_BT, query_BQ, entry_J, self.window)

    def plan(
        self, mask_BTC: Tensor | None = None, chosen_BT: Tensor | None = None, *, static: bool = False
    ) -> AttentionPlan:
        """Return the plan of the chunk's tokens.

        Args:
            mask_BTC: bool, the slots that each token attends to; None: there are no slots.
            chosen_BT: bool, the tokens that are computed, for a `routed` chunk; None: all. Counting them synchronises
                with a GPU.
            static: whether shapes must not depend on values. Then no token is left out, and those that are not chosen
                are masked.
        """
        if self.ranges is not None:
            assert chosen_BT is None
            ranges = self.ranges if mask_BTC is None else self.ranges.with_slots(mask_BTC)
            return AttentionPlan(ranges, (), starts_BJ=self.starts_BJ)
        blocks = []
        for queries, entries, mask_BQJ in self.masks:
            if mask_BTC is not None:
                mask_BQJ = torch.cat([mask_BQJ, mask_BTC[:, queries]], 2)
            blocks.append(QueryBlock(queries, entries, bias(mask_BQJ, self.dtype)))
        if chosen_BT is None or static:
            return AttentionPlan(None, tuple(blocks), wanted_BT=chosen_BT, starts_BJ=self.starts_BJ)
        return replace(_of_chosen(blocks, chosen_BT), starts_BJ=self.starts_BJ)

    def plan_of_mask(self, mask_BQJ: Tensor) -> AttentionPlan:
        """Return the plan of queries that are not tokens of the chunk, such as thoughts.

        `mask_BQJ` is bool, over the kv entries of remembered tokens, chunk and slots. The queries that attend to an
        entry must be consecutive.
        """
        if self.ranges is not None:
            return AttentionPlan(Ranges.of_mask(mask_BQJ), ())
        every = slice(None)
        return AttentionPlan(None, (QueryBlock(every, every, bias(mask_BQJ, self.dtype)),))


def visible(position_BT: Tensor, query_BQ: Tensor, entry_J: Tensor, window: int | None) -> Tensor:
    """Return a bool mask [B, Q, J]: whether the token with index `query_BQ` attends to the one with index `entry_J`.

    Indices count from the chunk's first token; remembered tokens have negative ones. A token attends to itself and to
    the tokens before it in its own document, at most `window` in all. Remembered tokens are those right before the
    chunk, so the distance between two entries is the distance between their tokens. An entry is in the token's document
    exactly if this distance is at most the token's position. That one comparison also covers a cache that is not full.
    """
    reach_BQ = position_BT.gather(1, query_BQ)
    if window is not None:
        reach_BQ = reach_BQ.clamp(max=window - 1)
    distance_BQJ = query_BQ[:, :, None] - entry_J
    return (distance_BQJ >= 0) & (distance_BQJ <= reach_BQ[:, :, None])


def bias(mask_BQJ: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the additive mask of a bool mask: 0 where it is true, else the lowest number of `dtype`."""
    entries = mask_BQJ.shape[2]
    # PyTorch's GPU kernels need rows that begin at multiples of 16 bytes, and copy a mask that has others in each call.
    added = torch.zeros(*mask_BQJ.shape[:2], -(-entries // 8) * 8, dtype=dtype, device=mask_BQJ.device)
    return added[..., :entries].masked_fill_(~mask_BQJ, torch.finfo(dtype).min)


def _of_chosen(blocks: list[QueryBlock], chosen_BT: Tensor) -> AttentionPlan:
    """Return the plan of the queries where `chosen_BT` is true, without the blocks that have none of them."""
    kept, indices, start = [], [], 0
    for block in blocks:
        here = chosen_BT[:, block.queries]
        row_M, query_M = here.nonzero(as_tuple=True)
        if not len(row_M):
            continue
        count_B = here.sum(1)
        rows_A, most = count_B.nonzero()[:, 0], int(count_B.max())
        order_M = (here.cumsum(1) - 1)[row_M, query_M]
        place_M = ((count_B > 0).cumsum(0) - 1)[row_M] * most + order_M
        query = query_M.new_zeros(len(rows_A) * most).index_copy(0, place_M, query_M).view(len(rows_A), most)
        chosen = Chosen(rows_A, most, slice(start, start + len(row_M)), place_M)
        kept.append(QueryBlock(block.queries, block.entries, block.bias_BQJ[rows_A[:, None], query], chosen))
        indices.append(row_M * chosen_BT.shape[1] + query_M + block.queries.start)
        start += len(row_M)
    nothing = torch.zeros(0, dtype=torch.int64, device=chosen_BT.device)
    return AttentionPlan(None, tuple(kept), torch.cat(indices) if indices else nothing)
