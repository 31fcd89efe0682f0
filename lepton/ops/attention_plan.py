"""What attends to what in a chunk, laid out once per pass for all layers that share it.

A chunk's queries attend to the kv entries of the tokens before it (the past, oldest first), to those of its own tokens,
and to slots, which are no tokens. `CausalWindow` says which tokens see which; `AttentionPlan` is that, laid out for
`lepton.ops.attention.attend`: in ranges where the kernel works, else as a bias for each block of queries.

Shapes: B rows, T tokens of the chunk, Q queries of a block, J kv entries of past and chunk, C slots, X = J + C;
R rows and M queries that are chosen.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from lepton.ops.attention_kernel import ATTENTION, Ranges
from lepton.ops.query_blocks import query_blocks


@dataclass(frozen=True)
class Chosen:
    """The chosen queries of a block: M of them, in R rows."""

    rows_A: Tensor
    """The rows that have any."""
    most: int
    """The most that one row has."""
    source: slice
    """Where they stand among all chosen ones of the chunk."""
    place_M: Tensor
    """Where each of them stands in the padded R x most."""

    def pad(self, q_MNH: Tensor) -> Tensor:
        """Lay the block's queries out as [R, most, N, H]."""
        padded = q_MNH.new_zeros(len(self.rows_A) * self.most, *q_MNH.shape[1:])
        padded = padded.index_copy(0, self.place_M, q_MNH[self.source])
        return padded.unflatten(0, (len(self.rows_A), self.most))

    def unpad(self, out_AQNH: Tensor) -> Tensor:
        """Take the block's outputs back out of the padding: [M, N, H]."""
        return out_AQNH.flatten(0, 1)[self.place_M]


@dataclass(frozen=True)
class QueryBlock:
    """A run of queries, the run of kv entries that any of them can see, and the bias between them."""

    queries: slice
    entries: slice
    """Of past and chunk; all slots follow."""
    bias_BQJ: Tensor
    """What is added to scores: 0 where a query sees the entry, and the lowest number elsewhere."""
    chosen: Chosen | None = None
    """Where only some queries are computed: which. The bias is then [R, most, X]."""


@dataclass(frozen=True)
class AttentionPlan:
    """What the queries of a chunk attend to, in one of two forms: ranges for the kernel, or blocks."""

    ranges: Ranges | None
    blocks: tuple[QueryBlock, ...]
    index_M: Tensor | None = None
    """Each chosen query in the flattened B x T; None where all are computed."""

    def of_rows(self, rows_A: Tensor) -> "AttentionPlan":
        """Return the plan of some rows."""
        if self.ranges is not None:
            return AttentionPlan(self.ranges.of_rows(rows_A), ())
        blocks = (QueryBlock(b.queries, b.entries, b.bias_BQJ.index_select(0, rows_A)) for b in self.blocks)
        return AttentionPlan(None, tuple(blocks))

    def take(self, x_BT: Tensor) -> Tensor:
        """Return the values [M, ...] of [B, T, ...] at the chosen queries; `x_BT` where all are computed."""
        return x_BT if self.index_M is None else x_BT.flatten(0, 1)[self.index_M]

    def put(self, x_BT: Tensor, x_M: Tensor) -> Tensor:
        """Return `x_BT` with `x_M` at the chosen queries; `x_M` where all are computed."""
        return x_M if self.index_M is None else x_BT.flatten(0, 1).index_copy(0, self.index_M, x_M).view_as(x_BT)


@dataclass(frozen=True)
class CausalWindow:
    """Which tokens of past and chunk each token of the chunk sees; from it follow the plans of a pass."""

    position_BT: Tensor
    """Tokens of its own document before each token."""
    past: int
    """kv entries before the chunk."""
    window: int | None
    """Tokens that a token sees at most, itself included; None: its whole document."""
    dtype: torch.dtype
    """Of queries, keys and values."""
    ranges: Ranges | None
    """Where the kernel runs."""
    masks: tuple[tuple[slice, slice, Tensor], ...]
    """Elsewhere: the queries and kv entries of each block, and which sees which [B, Q, J]."""

    @staticmethod
    def of(
        position_BT: Tensor, *, past: int, window: int | None, dtype: torch.dtype, head_dim: int, routed: bool = False
    ) -> "CausalWindow":
        """Lay out a chunk. The kernel takes one without a past of which all queries are computed (not `routed`)."""
        if past == 0 and not routed and ATTENTION.works(position_BT.device, dtype, head_dim):
            return CausalWindow(position_BT, past, window, dtype, Ranges.causal(position_BT, window), ())
        rows, length = position_BT.shape
        masks = []
        for first, last, left, right in query_blocks(length, past, window):
            query_BQ = torch.arange(first, last, device=position_BT.device).expand(rows, -1)
            entry_J = torch.arange(left - past, right - past, device=position_BT.device)
            masks.append((slice(first, last), slice(left, right), visible(position_BT, query_BQ, entry_J, window)))
        return CausalWindow(position_BT, past, window, dtype, None, tuple(masks))

    def seen_by(self, query_BQ: Tensor) -> Tensor:
        """Return [B, Q, J]: which kv entries of past and chunk the chunk's tokens `query_BQ` see."""
        length = self.position_BT.shape[1]
        entry_J = torch.arange(-self.past, length, device=query_BQ.device)
        return visible(self.position_BT, query_BQ, entry_J, self.window)

    def plan(self, slots_BTC: Tensor | None = None, chosen_BT: Tensor | None = None) -> AttentionPlan:
        """Return the plan of the chunk's tokens.

        Args:
            slots_BTC: which token sees which slot; None: there are none.
            chosen_BT: the tokens that are computed, for a `routed` chunk; None: all. Counting them waits for a GPU.
        """
        if self.ranges is not None:
            assert chosen_BT is None
            return AttentionPlan(self.ranges if slots_BTC is None else self.ranges.with_slots(slots_BTC), ())
        blocks = []
        for queries, entries, mask_BQJ in self.masks:
            if slots_BTC is not None:
                mask_BQJ = torch.cat([mask_BQJ, slots_BTC[:, queries]], 2)
            blocks.append(QueryBlock(queries, entries, bias(mask_BQJ, self.dtype)))
        return AttentionPlan(None, tuple(blocks)) if chosen_BT is None else _of_chosen(blocks, chosen_BT)

    def plan_of_mask(self, sees_BQJ: Tensor) -> AttentionPlan:
        """Return the plan of other queries, such as thoughts', that see what `sees_BQJ` says of the chunk's kv entries
        and of slots. Each entry is seen by one run of queries, if by any.
        """
        if self.ranges is not None:
            return AttentionPlan(Ranges.of_mask(sees_BQJ), ())
        every = slice(None)
        return AttentionPlan(None, (QueryBlock(every, every, bias(sees_BQJ, self.dtype)),))


def visible(position_BT: Tensor, query_BQ: Tensor, entry_J: Tensor, window: int | None) -> Tensor:
    """Return [B, Q, J]: whether the chunk's token `query_BQ` sees the token `entry_J` (below 0: of the past).

    A token sees itself and what stands before it in its own document, at most `window` tokens in all. The past holds
    the tokens right before the chunk, oldest first, so the distance of two entries is the distance of their tokens, and
    an entry lies in the token's document exactly if it is no farther away than the token's position. That one
    comparison covers documents, short pasts and fresh states alike.
    """
    reach_BQ = position_BT.gather(1, query_BQ)
    if window is not None:
        reach_BQ = reach_BQ.clamp(max=window - 1)
    distance_BQJ = query_BQ[:, :, None] - entry_J
    return (distance_BQJ >= 0) & (distance_BQJ <= reach_BQ[:, :, None])


def bias(mask_BQJ: Tensor, dtype: torch.dtype) -> Tensor:
    """Return what is added to scores: 0 where the mask is true, elsewhere so little that no share is left."""
    entries = mask_BQJ.shape[2]
    # The kernels of GPUs want rows that begin at whole multiples of 16 bytes, and would copy each time what has none.
    added_BQJ = torch.zeros(*mask_BQJ.shape[:2], -(-entries // 8) * 8, dtype=dtype, device=mask_BQJ.device)
    return added_BQJ[..., :entries].masked_fill_(~mask_BQJ, torch.finfo(dtype).min)


def _of_chosen(blocks: list[QueryBlock], chosen_BT: Tensor) -> AttentionPlan:
    """Return the plan of the queries where `chosen_BT` is true; blocks without any are left out."""
    kept, indices, start = [], [], 0
    for block in blocks:
        part_BQ = chosen_BT[:, block.queries]
        row_M, query_M = part_BQ.nonzero(as_tuple=True)
        if not len(row_M):
            continue
        count_B = part_BQ.sum(1)
        rows_A, most = count_B.nonzero()[:, 0], int(count_B.max())
        order_M = (part_BQ.cumsum(1) - 1)[row_M, query_M]
        place_M = ((count_B > 0).cumsum(0) - 1)[row_M] * most + order_M
        query_AQ = query_M.new_zeros(len(rows_A) * most).index_copy(0, place_M, query_M).view(len(rows_A), most)
        chosen = Chosen(rows_A, most, slice(start, start + len(row_M)), place_M)
        kept.append(QueryBlock(block.queries, block.entries, block.bias_BQJ[rows_A[:, None], query_AQ], chosen))
        indices.append(row_M * chosen_BT.shape[1] + query_M + block.queries.start)
        start += len(row_M)
    nothing = torch.zeros(0, dtype=torch.int64, device=chosen_BT.device)
    return AttentionPlan(None, tuple(kept), torch.cat(indices) if indices else nothing)
