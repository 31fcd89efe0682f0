"""Softmax attention with the mask of an `AttentionPlan`. `naive_attention` is the slow reference."""

import torch
import torch.nn.functional as F
from torch import Tensor

from lepton.ops.attention_kernel import attend_in_ranges
from lepton.ops.attention_plan import AttentionPlan

PRODUCT_ENTRIES = 1024
"""Largest number of kv entries for which a CPU keeps the matrix of scores. In training that is twice as fast as fused
attention, but the scores of longer inputs would need more memory than everything else."""


def attend(
    q: Tensor, k_BJKH: Tensor, v_BJKH: Tensor, plan: AttentionPlan, slots: tuple[Tensor, Tensor] | None = None
) -> Tensor:
    """Softmax attention of a chunk's queries.

    Args:
        q: queries [B, T, N, H], or [M, N, H] where the plan computes some of them. N is a multiple of K: each kv head
            serves N / K query heads. Queries and keys must be normed: the Triton kernel needs bounded scores.
        k_BJKH: keys of remembered tokens and chunk.
        v_BJKH: their values.
        plan: the mask. Each query attends to at least one entry.
        slots: keys and values of the slots [B, C, K, H], if the plan has slots.

    Returns:
        Outputs of the shape of `q`.
    """
    if plan.ranges is not None:
        return attend_in_ranges(q, _joined(k_BJKH, slots, 0), _joined(v_BJKH, slots, 1), plan.ranges)
    outputs = []
    for block in plan.blocks:
        k, v = _joined(k_BJKH[:, block.entries], slots, 0), _joined(v_BJKH[:, block.entries], slots, 1)
        if (chosen := block.chosen) is None:
            outputs.append(attend_with_bias(q[:, block.queries], k, v, block.bias_BQJ))
        else:
            out = attend_with_bias(chosen.pad(q), k[chosen.rows_A], v[chosen.rows_A], block.bias_BQJ)
            outputs.append(chosen.unpad(out))
    if len(outputs) == 1:
        return outputs[0]
    return torch.cat(outputs, 1 if plan.index_M is None else 0) if outputs else q  # no query is chosen


def _joined(tokens_BJKH: Tensor, slots: tuple[Tensor, Tensor] | None, which: int) -> Tensor:
    """Return the keys (`which` = 0) or values (1) of tokens, followed by those of slots."""
    return tokens_BJKH if slots is None else torch.cat([tokens_BJKH, slots[which]], 1)


def attend_with_bias(q_BTNH: Tensor, k_BJKH: Tensor, v_BJKH: Tensor, bias_BTJ: Tensor) -> Tensor:
    """Softmax attention [B, T, N, H] with the additive mask `bias_BTJ`, the same for all heads."""
    if q_BTNH.device.type == "cpu" and k_BJKH.shape[1] <= PRODUCT_ENTRIES:
        return _attend_by_products(q_BTNH, k_BJKH, v_BJKH, bias_BTJ)
    group = q_BTNH.shape[2] // k_BJKH.shape[2]
    k_BNJH = k_BJKH.transpose(1, 2).repeat_interleave(group, 1)
    v_BNJH = v_BJKH.transpose(1, 2).repeat_interleave(group, 1)
    out_BNTH = F.scaled_dot_product_attention(
        q_BTNH.transpose(1, 2), k_BNJH, v_BNJH, attn_mask=bias_BTJ[:, None], scale=q_BTNH.shape[-1] ** -0.5
    )
    return out_BNTH.transpose(1, 2)


def _attend_by_products(q_BTNH: Tensor, k_BJKH: Tensor, v_BJKH: Tensor, bias_BTJ: Tensor) -> Tensor:
    """As `attend_with_bias`, with the scores in memory, in the queries' dtype. Softmax computes in fp32 or better."""
    rows, length, heads, head_dim = q_BTNH.shape
    kv_heads = k_BJKH.shape[2]
    # One matrix product for all query heads that share a kv head: [B, K, N / K * T, H].
    q = q_BTNH.unflatten(2, (kv_heads, -1)).permute(0, 2, 3, 1, 4).flatten(2, 3)
    scores = (q @ k_BJKH.permute(0, 2, 3, 1)).unflatten(2, (-1, length))
    scores = torch.add(bias_BTJ[:, None, None], scores, alpha=head_dim**-0.5)
    out = scores.softmax(-1).flatten(2, 3) @ v_BJKH.transpose(1, 2)
    return out.view(rows, heads, length, head_dim).transpose(1, 2)


def naive_attention(q_BTNH: Tensor, k_BJKH: Tensor, v_BJKH: Tensor, mask_BTJ: Tensor) -> Tensor:
    """Softmax attention [B, T, N, H] with a bool mask, one query and head at a time; a slow reference."""
    rows, length, heads, head_dim = q_BTNH.shape
    group = heads // k_BJKH.shape[2]
    outputs = []
    for b in range(rows):
        for t in range(length):
            visible = mask_BTJ[b, t].nonzero()[:, 0]
            for n in range(heads):
                keys, values = k_BJKH[b, visible, n // group], v_BJKH[b, visible, n // group]
                weights = (keys @ q_BTNH[b, t, n] / head_dim**0.5).softmax(0)
                outputs.append(weights @ values)
    return torch.stack(outputs).view(rows, length, heads, head_dim)
