"""Attention for masks that are ranges of queries, forward and backward, without a matrix of scores in memory.

Flash attention (Dao, 2023) in three kernels. The queries from `first` to `last`, exclusive, attend to a kv entry.
Entries of the chunk's own tokens come first; for them, `start` is the same mask by query: a query attends to the tokens
from `start` up to itself. From these integers a program knows which blocks it can skip, those of other documents and
those outside the window, and the mask of a pair is one comparison.

Scores must be bounded, as they are with normed queries and keys: then no maximum is subtracted before the exponential.
Arithmetic between matrix products is in fp32. In a kernel, Q and J are the queries and kv entries of a block.
"""

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor


class Blocks(NamedTuple):
    """How a kernel splits its work."""

    rows: int
    """Queries per block."""
    entries: int
    """kv entries per block."""
    warps: int
    stages: int


FORWARD = Blocks(64, 32, 4, 3)
TO_QUERIES = Blocks(64, 32, 4, 3)
TO_ENTRIES = Blocks(64, 64, 4, 3)


@triton.jit
def _within(index, begin, count):
    """Whether begin <= index < begin + count, in one comparison of unsigned numbers."""
    return (index - begin).to(tl.uint32, bitcast=True) < count.to(tl.uint32, bitcast=True)


@triton.jit
def _any_visible(first_J, last_J, begin, count: tl.constexpr):
    """Whether any of `count` queries from `begin` on attends to any of these entries."""
    return tl.max(((first_J < begin + count) & (last_J > begin) & (last_J > first_J)).to(tl.int32)) > 0


@triton.jit
def _forward(
    q_ptr, k_ptr, v_ptr, start_ptr, first_ptr, last_ptr, out_ptr, norm_ptr, length, tokens, entries, scale,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, WIDTH: tl.constexpr,
    ROWS: tl.constexpr, ENTRIES: tl.constexpr, SLOTS: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    batch, head = tl.program_id(1) // HEADS, tl.program_id(1) % HEADS
    q_ptr += (batch.to(tl.int64) * length * HEADS + head) * WIDTH
    out_ptr += (batch.to(tl.int64) * length * HEADS + head) * WIDTH
    kv_place = (batch.to(tl.int64) * entries * KV_HEADS + head // (HEADS // KV_HEADS)) * WIDTH
    begin = tl.program_id(0) * ROWS
    row_Q = begin + tl.arange(0, ROWS)
    h = tl.arange(0, WIDTH)
    place_QH = row_Q[:, None] * (HEADS * WIDTH) + h
    q_QH = tl.load(q_ptr + place_QH, mask=row_Q[:, None] < length, other=0.0)
    start_Q = tl.load(start_ptr + batch * length + row_Q, mask=row_Q < length, other=length)
    count_Q = row_Q + 1 - start_Q
    sum_Q = tl.zeros([ROWS], tl.float32)
    out_QH = tl.zeros([ROWS, WIDTH], tl.float32)
    lowest = tl.load(start_ptr + batch * length + begin) // ENTRIES * ENTRIES
    for left in range(lowest, tl.minimum(begin + ROWS, tokens), ENTRIES):
        entry_J = left + tl.arange(0, ENTRIES)
        place_JH = kv_place + entry_J[:, None] * (KV_HEADS * WIDTH) + h
        k_JH = tl.load(k_ptr + place_JH, mask=entry_J[:, None] < tokens, other=0.0)
        score_QJ = tl.dot(q_QH, tl.trans(k_JH), input_precision=EXACT)
        visible_QJ = _within(entry_J[None, :], start_Q[:, None], count_Q[:, None])
        p_QJ = tl.where(visible_QJ, tl.exp2(score_QJ * scale), 0.0)
        sum_Q += tl.sum(p_QJ, 1)
        v_JH = tl.load(v_ptr + place_JH, mask=entry_J[:, None] < tokens, other=0.0)
        out_QH = tl.dot(p_QJ.to(v_JH.dtype), v_JH, out_QH, input_precision=EXACT)
    if SLOTS:
        for left in range(tokens, entries, ENTRIES):
            entry_J = left + tl.arange(0, ENTRIES)
            place_JH = kv_place + entry_J[:, None] * (KV_HEADS * WIDTH) + h
            first_J = tl.load(first_ptr + batch * entries + entry_J, mask=entry_J < entries, other=0)
            last_J = tl.load(last_ptr + batch * entries + entry_J, mask=entry_J < entries, other=0)
            # Few blocks of queries attend to a slot: thoughts are visible in their segment, crystals late in a row.
            if _any_visible(first_J, last_J, begin, ROWS):
                k_JH = tl.load(k_ptr + place_JH, mask=entry_J[:, None] < entries, other=0.0)
                score_QJ = tl.dot(q_QH, tl.trans(k_JH), input_precision=EXACT)
                visible_QJ = _within(row_Q[:, None], first_J[None, :], (last_J - first_J)[None, :])
                p_QJ = tl.where(visible_QJ, tl.exp2(score_QJ * scale), 0.0)
                sum_Q += tl.sum(p_QJ, 1)
                v_JH = tl.load(v_ptr + place_JH, mask=entry_J[:, None] < entries, other=0.0)
                out_QH = tl.dot(p_QJ.to(v_JH.dtype), v_JH, out_QH, input_precision=EXACT)
    sum_Q = tl.where(row_Q < length, sum_Q, 1.0)
    out_QH = out_QH / sum_Q[:, None]
    tl.store(out_ptr + place_QH, out_QH.to(out_ptr.dtype.element_ty), mask=row_Q[:, None] < length)
    tl.store(norm_ptr + tl.program_id(1).to(tl.int64) * length + row_Q, tl.log2(sum_Q), mask=row_Q < length)


@triton.jit
def _to_queries(
    q_ptr, k_ptr, v_ptr, start_ptr, first_ptr, last_ptr, out_ptr, norm_ptr, grad_ptr, mean_ptr, dq_ptr,
    length, tokens, entries, scale,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, WIDTH: tl.constexpr,
    ROWS: tl.constexpr, ENTRIES: tl.constexpr, SLOTS: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """Gradients of queries. Also stores each query's sum of out * grad in `mean`, which `_to_entries` needs."""
    batch, head = tl.program_id(1) // HEADS, tl.program_id(1) % HEADS
    q_place = (batch.to(tl.int64) * length * HEADS + head) * WIDTH
    kv_place = (batch.to(tl.int64) * entries * KV_HEADS + head // (HEADS // KV_HEADS)) * WIDTH
    begin = tl.program_id(0) * ROWS
    row_Q = begin + tl.arange(0, ROWS)
    h = tl.arange(0, WIDTH)
    place_QH = q_place + row_Q[:, None] * (HEADS * WIDTH) + h
    q_QH = tl.load(q_ptr + place_QH, mask=row_Q[:, None] < length, other=0.0)
    grad_QH = tl.load(grad_ptr + place_QH, mask=row_Q[:, None] < length, other=0.0)
    out_QH = tl.load(out_ptr + place_QH, mask=row_Q[:, None] < length, other=0.0)
    mean_Q = tl.sum(out_QH.to(tl.float32) * grad_QH.to(tl.float32), 1)
    row_place = tl.program_id(1).to(tl.int64) * length + row_Q
    tl.store(mean_ptr + row_place, mean_Q, mask=row_Q < length)
    norm_Q = tl.load(norm_ptr + row_place, mask=row_Q < length, other=0.0)
    start_Q = tl.load(start_ptr + batch * length + row_Q, mask=row_Q < length, other=length)
    count_Q = row_Q + 1 - start_Q
    dq_QH = tl.zeros([ROWS, WIDTH], tl.float32)
    lowest = tl.load(start_ptr + batch * length + begin) // ENTRIES * ENTRIES
    for left in range(lowest, tl.minimum(begin + ROWS, tokens), ENTRIES):
        entry_J = left + tl.arange(0, ENTRIES)
        place_JH = kv_place + entry_J[:, None] * (KV_HEADS * WIDTH) + h
        k_JH = tl.load(k_ptr + place_JH, mask=entry_J[:, None] < tokens, other=0.0)
        v_JH = tl.load(v_ptr + place_JH, mask=entry_J[:, None] < tokens, other=0.0)
        score_QJ = tl.dot(q_QH, tl.trans(k_JH), input_precision=EXACT)
        dp_QJ = tl.dot(grad_QH, tl.trans(v_JH), input_precision=EXACT)
        visible_QJ = _within(entry_J[None, :], start_Q[:, None], count_Q[:, None])
        p_QJ = tl.where(visible_QJ, tl.exp2(score_QJ * scale - norm_Q[:, None]), 0.0)
        ds_QJ = p_QJ * (dp_QJ - mean_Q[:, None])
        dq_QH = tl.dot(ds_QJ.to(k_JH.dtype), k_JH, dq_QH, input_precision=EXACT)
    if SLOTS:
        for left in range(tokens, entries, ENTRIES):
            entry_J = left + tl.arange(0, ENTRIES)
            place_JH = kv_place + entry_J[:, None] * (KV_HEADS * WIDTH) + h
            first_J = tl.load(first_ptr + batch * entries + entry_J, mask=entry_J < entries, other=0)
            last_J = tl.load(last_ptr + batch * entries + entry_J, mask=entry_J < entries, other=0)
            if _any_visible(first_J, last_J, begin, ROWS):
                k_JH = tl.load(k_ptr + place_JH, mask=entry_J[:, None] < entries, other=0.0)
                v_JH = tl.load(v_ptr + place_JH, mask=entry_J[:, None] < entries, other=0.0)
                score_QJ = tl.dot(q_QH, tl.trans(k_JH), input_precision=EXACT)
                dp_QJ = tl.dot(grad_QH, tl.trans(v_JH), input_precision=EXACT)
                visible_QJ = _within(row_Q[:, None], first_J[None, :], (last_J - first_J)[None, :])
                p_QJ = tl.where(visible_QJ, tl.exp2(score_QJ * scale - norm_Q[:, None]), 0.0)
                ds_QJ = p_QJ * (dp_QJ - mean_Q[:, None])
                dq_QH = tl.dot(ds_QJ.to(k_JH.dtype), k_JH, dq_QH, input_precision=EXACT)
    dq_QH *= scale * 0.6931471805599453  # the scale is for powers of 2
    tl.store(dq_ptr + place_QH, dq_QH.to(dq_ptr.dtype.element_ty), mask=row_Q[:, None] < length)


@triton.jit
def _to_entries(
    q_ptr, k_ptr, v_ptr, first_ptr, last_ptr, norm_ptr, grad_ptr, mean_ptr, dk_ptr, dv_ptr,
    length, tokens, entries, scale,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, WIDTH: tl.constexpr,
    ROWS: tl.constexpr, ENTRIES: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """Gradients of keys and values, summed over their query heads. A block holds either tokens or slots."""
    batch, kv_head = tl.program_id(1) // KV_HEADS, tl.program_id(1) % KV_HEADS
    group: tl.constexpr = HEADS // KV_HEADS
    token_blocks = tl.cdiv(tokens, ENTRIES)
    block = tl.program_id(0)
    is_token = block < token_blocks
    left = tl.where(is_token, block * ENTRIES, tokens + (block - token_blocks) * ENTRIES)
    limit = tl.where(is_token, tokens, entries)
    entry_J = left + tl.arange(0, ENTRIES)
    h = tl.arange(0, WIDTH)
    place_JH = (batch.to(tl.int64) * entries * KV_HEADS + kv_head) * WIDTH
    place_JH += entry_J[:, None] * (KV_HEADS * WIDTH) + h
    k_JH = tl.load(k_ptr + place_JH, mask=entry_J[:, None] < limit, other=0.0)
    v_JH = tl.load(v_ptr + place_JH, mask=entry_J[:, None] < limit, other=0.0)
    first_J = tl.load(first_ptr + batch * entries + entry_J, mask=entry_J < limit, other=length)
    last_J = tl.load(last_ptr + batch * entries + entry_J, mask=entry_J < limit, other=0)
    count_J = tl.maximum(last_J - first_J, 0)
    lowest = tl.min(first_J) // ROWS * ROWS
    blocks = tl.maximum(tl.cdiv(tl.max(last_J) - lowest, ROWS), 0)
    dk_JH = tl.zeros([ENTRIES, WIDTH], tl.float32)
    dv_JH = tl.zeros([ENTRIES, WIDTH], tl.float32)
    for turn in range(group * blocks):
        head = kv_head * group + turn // blocks
        row_Q = lowest + turn % blocks * ROWS + tl.arange(0, ROWS)
        place_QH = (batch.to(tl.int64) * length * HEADS + head) * WIDTH + row_Q[:, None] * (HEADS * WIDTH) + h
        row_place = (batch.to(tl.int64) * HEADS + head) * length + row_Q
        q_QH = tl.load(q_ptr + place_QH, mask=row_Q[:, None] < length, other=0.0)
        grad_QH = tl.load(grad_ptr + place_QH, mask=row_Q[:, None] < length, other=0.0)
        norm_Q = tl.load(norm_ptr + row_place, mask=row_Q < length, other=0.0)
        mean_Q = tl.load(mean_ptr + row_place, mask=row_Q < length, other=0.0)
        score_JQ = tl.dot(k_JH, tl.trans(q_QH), input_precision=EXACT)
        visible_JQ = _within(row_Q[None, :], first_J[:, None], count_J[:, None])
        p_JQ = tl.where(visible_JQ, tl.exp2(score_JQ * scale - norm_Q[None, :]), 0.0)
        dv_JH = tl.dot(p_JQ.to(grad_QH.dtype), grad_QH, dv_JH, input_precision=EXACT)
        dp_JQ = tl.dot(v_JH, tl.trans(grad_QH), input_precision=EXACT)
        ds_JQ = p_JQ * (dp_JQ - mean_Q[None, :])
        dk_JH = tl.dot(ds_JQ.to(q_QH.dtype), q_QH, dk_JH, input_precision=EXACT)
    dk_JH *= scale * 0.6931471805599453
    tl.store(dk_ptr + place_JH, dk_JH.to(dk_ptr.dtype.element_ty), mask=entry_J[:, None] < limit)
    tl.store(dv_ptr + place_JH, dv_JH.to(dv_ptr.dtype.element_ty), mask=entry_J[:, None] < limit)


def _options(q_BTNH: Tensor, k_BJKH: Tensor, blocks: Blocks) -> dict[str, object]:
    return {
        "HEADS": q_BTNH.shape[2],
        "KV_HEADS": k_BJKH.shape[2],
        "WIDTH": q_BTNH.shape[3],
        "ROWS": blocks.rows,
        "ENTRIES": blocks.entries,
        "EXACT": "ieee" if q_BTNH.dtype == torch.float32 else "tf32",  # which halves ignore
        "num_warps": blocks.warps,
        "num_stages": blocks.stages,
    }


def _scale(q_BTNH: Tensor) -> float:
    """Scale of scores whose exponential is a power of 2, not e."""
    return q_BTNH.shape[3] ** -0.5 * math.log2(math.e)


def forward(
    q_BTNH: Tensor,
    k_BJKH: Tensor,
    v_BJKH: Tensor,
    start_BT: Tensor,
    first_BJ: Tensor,
    last_BJ: Tensor,
    tokens: int,
) -> tuple[Tensor, Tensor]:
    """Return the outputs [B, T, N, H] and the base-2 logarithms of the softmax's denominators [B, N, T].

    All tensors are contiguous. The first `tokens` kv entries, either T or 0, are the chunk's own tokens.
    """
    rows, length, heads, _ = q_BTNH.shape
    entries = k_BJKH.shape[1]
    out_BTNH = torch.empty_like(q_BTNH)
    norm_BNT = torch.empty(rows, heads, length, dtype=torch.float32, device=q_BTNH.device)
    with torch.cuda.device_of(q_BTNH):  # Triton launches on the current device
        _forward[(triton.cdiv(length, FORWARD.rows), rows * heads)](
            q_BTNH, k_BJKH, v_BJKH, start_BT, first_BJ, last_BJ, out_BTNH, norm_BNT, length, tokens, entries,
            _scale(q_BTNH), SLOTS=entries > tokens, **_options(q_BTNH, k_BJKH, FORWARD),
        )  # fmt: skip
    return out_BTNH, norm_BNT


def backward(
    grad_BTNH: Tensor,
    q_BTNH: Tensor,
    k_BJKH: Tensor,
    v_BJKH: Tensor,
    start_BT: Tensor,
    first_BJ: Tensor,
    last_BJ: Tensor,
    out_BTNH: Tensor,
    norm_BNT: Tensor,
    tokens: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v from that of the outputs."""
    rows, length, heads, _ = q_BTNH.shape
    entries, kv_heads = k_BJKH.shape[1], k_BJKH.shape[2]
    dq_BTNH, dk_BJKH, dv_BJKH = torch.empty_like(q_BTNH), torch.empty_like(k_BJKH), torch.empty_like(v_BJKH)
    mean_BNT = torch.empty_like(norm_BNT)
    scale = _scale(q_BTNH)
    with torch.cuda.device_of(q_BTNH):
        _to_queries[(triton.cdiv(length, TO_QUERIES.rows), rows * heads)](
            q_BTNH, k_BJKH, v_BJKH, start_BT, first_BJ, last_BJ, out_BTNH, norm_BNT, grad_BTNH, mean_BNT, dq_BTNH,
            length, tokens, entries, scale, SLOTS=entries > tokens, **_options(q_BTNH, k_BJKH, TO_QUERIES),
        )  # fmt: skip
        size = TO_ENTRIES.entries
        _to_entries[(triton.cdiv(tokens, size) + triton.cdiv(entries - tokens, size), rows * kv_heads)](
            q_BTNH, k_BJKH, v_BJKH, first_BJ, last_BJ, norm_BNT, grad_BTNH, mean_BNT, dk_BJKH, dv_BJKH,
            length, tokens, entries, scale, **_options(q_BTNH, k_BJKH, TO_ENTRIES),
        )  # fmt: skip
    return dq_BTNH, dk_BJKH, dv_BJKH
