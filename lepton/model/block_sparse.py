"""Attention in blocks of queries and columns, of which those that nobody sees are not computed.

It is PyTorch's FlexAttention, which has its speed from the compiler: run as it is, it computes every block, slowly. So
only compiled training may use it, where `Lepton.block_sparse` says so.
"""

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from lepton.model.timeline import Timeline

BLOCK = 128
"""Queries and columns of a block."""


def block_mask(timeline: Timeline, window: int | None, slots_BTC: Tensor | None) -> BlockMask:
    """Return what the tokens of a chunk without a past see: its tokens, and then the columns of `slots_BTC`.

    Which blocks are computed follows from shapes alone, so that a recording serves every batch: those that the window
    reaches in a row of one document, and all slots. Within them every pair is looked at.
    """
    reach_BT = timeline.position_BT if window is None else timeline.position_BT.clamp(max=window - 1)
    length, device = reach_BT.shape[1], reach_BT.device
    columns = length + (0 if slots_BTC is None else slots_BTC.shape[2])

    def sees(row: Tensor, _head: Tensor, query: Tensor, column: Tensor) -> Tensor:
        distance = query - column
        token = (distance >= 0) & (distance <= reach_BT[row, query])
        if slots_BTC is None:
            return token
        return torch.where(column < length, token, slots_BTC[row, query, (column - length).clamp(min=0)])

    query_Q1 = BLOCK * torch.arange(-(-length // BLOCK), device=device)[:, None]
    column_C = BLOCK * torch.arange(-(-columns // BLOCK), device=device)
    farthest_Q1 = query_Q1 - (length if window is None else window - 1)
    near_QC = (column_C < length) & (column_C < query_Q1 + BLOCK) & (column_C + BLOCK > farthest_Q1)
    computed_QC = near_QC | ((column_C + BLOCK > length) & (columns > length))
    order_QC = computed_QC.int().argsort(dim=1, descending=True, stable=True)
    return BlockMask.from_kv_blocks(
        computed_QC.sum(1).int()[None, None],
        order_QC.int()[None, None],
        BLOCK_SIZE=BLOCK,
        mask_mod=sees,
        seq_lengths=(length, columns),
    )


def attend_in_blocks(q_BTNH: Tensor, k_BJKH: Tensor, v_BJKH: Tensor, blocks: BlockMask) -> Tensor:
    """Softmax attention [B, T, N, H]. Each key/value head serves N / K query heads."""
    q, k, v = (part.transpose(1, 2) for part in (q_BTNH, k_BJKH, v_BJKH))
    answer_BNTH = flex_attention(q, k, v, block_mask=blocks, scale=q_BTNH.shape[-1] ** -0.5, enable_gqa=True)
    return answer_BNTH.transpose(1, 2)
