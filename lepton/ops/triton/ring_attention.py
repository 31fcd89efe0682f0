"""Attention of a few new tokens over a ring of keys and values, with the norm, rotary positions and the write.

A program computes all queries of a row that one kv head serves, so keys and values are read once. A row's first loads
are issued before anything waits for them: those of its ring and of its extra entries, then those of its new tokens. A
program writes only columns that none reads, because a ring has room for the window and the new tokens. A program none
of whose tokens is wanted only writes.

Numbers are rounded where PyTorch rounds them: after the norm, after each product and the sum of a rotation, and before
each matrix product; all else is fp32. In a kernel, Q are the queries of a program, J the entries of a block.
"""

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from lepton.ops.heads import NORM_EPS


class Blocks(NamedTuple):
    """How the kernel reads, for heads of width 64; half as many entries at once for heads of 128."""

    entries: int
    """Entries of the ring that are read at once."""
    extra: int
    """Most extra entries that are read at once."""
    warps: int
    stages: int


# The table of the kernel's sizes, for an H100 (132 multiprocessors).
BLOCKS = ((132, Blocks(64, 64, 4, 2)), (0, Blocks(256, 128, 8, 1)))
"""The first line whose number of programs, rows times kv heads, is reached. With few, a program has a multiprocessor to
itself, and reads a whole window at once."""

SCORES = 8192
"""Most scores of a block, queries times entries: more of them do not fit into registers."""

LOWEST = tl.constexpr(-1e30)
"""The score of what a query does not see. It is finite, so that differences are numbers."""


@triton.jit
def _head(x_ptr, x_at, cos_ptr, sin_ptr, angle_at, last, eps, HEAD: tl.constexpr, BIASED: tl.constexpr):
    """Heads at places `x_at`, normed and rotated by the angles at `angle_at`; `last` is their last coordinate."""
    PAIRS: tl.constexpr = HEAD // 4
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    h = tl.arange(0, HEAD)
    pair = tl.max_contiguous(tl.multiple_of(h % PAIRS, PAIRS), PAIRS)
    partner = tl.where(h < 2 * PAIRS, h ^ PAIRS, h)
    partner = tl.max_contiguous(tl.multiple_of(partner, PAIRS), PAIRS)  # so that loads are wide
    x = tl.load(x_ptr + x_at[:, None] + h[None, :]).to(tl.float32)
    other = tl.load(x_ptr + x_at[:, None] + partner[None, :]).to(tl.float32)
    cos = tl.load(cos_ptr + angle_at[:, None] + pair[None, :]).to(tl.float32)
    sin = tl.load(sin_ptr + angle_at[:, None] + pair[None, :]).to(tl.float32)
    scale = tl.rsqrt(tl.sum(x * x, 1) / HEAD + eps)[:, None]
    x, other = (x * scale).to(dtype).to(tl.float32), (other * scale).to(dtype).to(tl.float32)
    along, across = (x * cos).to(dtype).to(tl.float32), (other * sin).to(dtype).to(tl.float32)
    x = tl.where(h < PAIRS, along - across, tl.where(h < 2 * PAIRS, along + across, x))
    if BIASED:
        x = tl.where(h == HEAD - 1, last, x)
    return x.to(dtype)


@triton.jit
def _ring_block(
    k_ptr, v_ptr, left, before, oldest, columns, is_first,
    KV_HEADS: tl.constexpr, HEAD: tl.constexpr, ENTRIES: tl.constexpr, SHIFTED: tl.constexpr,
):  # fmt: skip
    """Keys and values of the ring's entries from the `left`-th on, counted from the oldest that is visible.

    `is_first` says whether that one starts the document.
    """
    index = left + tl.arange(0, ENTRIES)
    h = tl.arange(0, HEAD)
    column = oldest + index
    column = tl.where(column >= columns, column - columns, column)
    at = column[:, None] * (KV_HEADS * HEAD) + h[None, :]
    exists = (index < before)[:, None]
    v = tl.load(v_ptr + at, mask=exists, other=0.0)
    if SHIFTED:
        HALF: tl.constexpr = HEAD // 2
        earlier = tl.where(column == 0, columns, column) - 1
        shifts = (h >= HALF)[None, :]
        at = tl.where(shifts, earlier[:, None], column[:, None]) * (KV_HEADS * HEAD) + h[None, :]
        at = tl.max_contiguous(tl.multiple_of(at, (1, HALF)), (1, HALF))  # so that loads are wide
        exists = exists & ((index > 0)[:, None] | ~shifts | ~is_first)
    return tl.load(k_ptr + at, mask=exists, other=0.0), v


@triton.jit
def _extra_block(
    k_ptr, v_ptr, mask_ptr, left, count,
    KV_HEADS: tl.constexpr, HEAD: tl.constexpr, EXTRA: tl.constexpr,
):  # fmt: skip
    """Keys and values of the extra entries that any query sees, and which query sees which."""
    index = left + tl.arange(0, EXTRA)
    visible = tl.load(mask_ptr[:, None] + index[None, :], mask=(index < count)[None, :], other=0) != 0
    at = index[:, None] * (KV_HEADS * HEAD) + tl.arange(0, HEAD)[None, :]
    seen = (tl.max(visible.to(tl.int32), 0) > 0)[:, None]
    k = tl.load(k_ptr + at, mask=seen, other=0.0)
    return k, tl.load(v_ptr + at, mask=seen, other=0.0), visible


@triton.jit
def _attend(q_QH, k_JH, v_JH, visible_QJ, most_Q, sum_Q, out_QH, scale, EXACT: tl.constexpr):
    """Take a block of entries into the softmax: the largest score, the sum of weights, the weighted sum of values."""
    score_QJ = tl.dot(q_QH, tl.trans(k_JH), input_precision=EXACT) * scale
    score_QJ = tl.where(visible_QJ, score_QJ, LOWEST)
    new_Q = tl.maximum(most_Q, tl.max(score_QJ, 1))
    p_QJ = tl.where(visible_QJ, tl.exp2(score_QJ - new_Q[:, None]), 0.0)
    kept_Q = tl.exp2(most_Q - new_Q)
    out_QH = tl.dot(p_QJ.to(v_JH.dtype), v_JH, out_QH * kept_Q[:, None], input_precision=EXACT)
    return new_Q, sum_Q * kept_Q + tl.sum(p_QJ, 1), out_QH


@triton.jit
def _write(
    k_ptr, v_ptr, cos_ptr, sin_ptr, ring_k_ptr, ring_v_ptr, row, kv_head, position, columns, eps,
    KV_HEADS: tl.constexpr, HEAD: tl.constexpr, TOKENS: tl.constexpr, NEW: tl.constexpr, BIASED: tl.constexpr,
    SHIFTED: tl.constexpr,
):  # fmt: skip
    """Write the keys and values of new tokens to the ring; return those that queries attend to."""
    h, new = tl.arange(0, HEAD), tl.arange(0, NEW)
    new_row = row * TOKENS + tl.minimum(new, TOKENS - 1)
    new_at = (new_row * KV_HEADS + kv_head) * HEAD
    own_k = _head(k_ptr, new_at, cos_ptr, sin_ptr, new_row * (HEAD // 4), 0.0, eps, HEAD, BIASED)
    own_v = tl.load(v_ptr + new_at[:, None] + h[None, :])
    written_at = ((position + new) % columns)[:, None] * (KV_HEADS * HEAD) + h[None, :]
    tl.store(ring_k_ptr + written_at, own_k, mask=(new < TOKENS)[:, None])
    tl.store(ring_v_ptr + written_at, own_v, mask=(new < TOKENS)[:, None])
    if SHIFTED:
        earlier_row = row * TOKENS + tl.minimum(tl.maximum(new - 1, 0), TOKENS - 1)
        earlier_at = (earlier_row * KV_HEADS + kv_head) * HEAD
        earlier_k = _head(k_ptr, earlier_at, cos_ptr, sin_ptr, earlier_row * (HEAD // 4), 0.0, eps, HEAD, BIASED)
        last_at = ((position + columns - 1) % columns) * (KV_HEADS * HEAD) + h
        last_k = tl.load(ring_k_ptr + last_at, mask=(h >= 0) & (position > 0), other=0.0)
        earlier_k = tl.where((new == 0)[:, None], last_k[None, :], earlier_k)
        own_k = tl.where((h < HEAD // 2)[None, :], own_k, earlier_k)
    return own_k, own_v


@triton.jit
def _ring_attention(
    q_ptr, k_ptr, v_ptr, cos_ptr, sin_ptr, ring_k_ptr, ring_v_ptr, slot_ptr, position_ptr,
    extra_k_ptr, extra_v_ptr, extra_ptr, mask_ptr, wanted_ptr, out_ptr, columns, count, window, last, scale, eps,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, HEAD: tl.constexpr, TOKENS: tl.constexpr,
    QUERIES: tl.constexpr, NEW: tl.constexpr, ENTRIES: tl.constexpr, EXTRA: tl.constexpr,
    BIASED: tl.constexpr, SHIFTED: tl.constexpr, MASKED: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """Blocks of the ring first, then extra entries, then the new tokens."""
    kv_head, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    GROUP: tl.constexpr = HEADS // KV_HEADS
    slot, position = tl.load(slot_ptr + row), tl.load(position_ptr + row)
    before = tl.minimum(position, window - 1).to(tl.int32)  # entries that the first query sees
    oldest = ((position - before) % columns).to(tl.int32)
    ring_at = (slot * columns * KV_HEADS + kv_head) * HEAD
    ring_k_ptr += ring_at
    ring_v_ptr += ring_at
    h = tl.arange(0, HEAD)
    query_Q = tl.minimum(tl.arange(0, QUERIES), GROUP * TOKENS - 1)  # the last query fills the block
    token_Q = query_Q // GROUP
    place_Q = ((row * TOKENS + token_Q) * HEADS + kv_head * GROUP + query_Q % GROUP) * HEAD
    is_query = tl.arange(0, QUERIES) < GROUP * TOKENS
    if MASKED:
        wanted_Q = tl.load(wanted_ptr + row * TOKENS + token_Q)
        if tl.max(wanted_Q.to(tl.int32), 0) == 0:
            _write(
                k_ptr, v_ptr, cos_ptr, sin_ptr, ring_k_ptr, ring_v_ptr, row, kv_head, position, columns, eps,
                KV_HEADS, HEAD, TOKENS, NEW, BIASED, SHIFTED,
            )  # fmt: skip
            nothing_QH = tl.zeros([QUERIES, HEAD], out_ptr.dtype.element_ty)
            tl.store(out_ptr + place_Q[:, None] + h[None, :], nothing_QH, mask=is_query[:, None])
            return
    is_first = position < window
    k_JH, v_JH = _ring_block(
        ring_k_ptr, ring_v_ptr, 0, before, oldest, columns, is_first, KV_HEADS, HEAD, ENTRIES, SHIFTED
    )
    if EXTRA > 0:
        extra_at = (tl.load(extra_ptr + row) * count * KV_HEADS + kv_head) * HEAD
        extra_k_ptr += extra_at
        extra_v_ptr += extra_at
        mask_ptr = mask_ptr + row * TOKENS * count + token_Q * count
        k_CH, v_CH, visible_QC = _extra_block(extra_k_ptr, extra_v_ptr, mask_ptr, 0, count, KV_HEADS, HEAD, EXTRA)

    q_QH = _head(q_ptr, place_Q, cos_ptr, sin_ptr, (row * TOKENS + token_Q) * (HEAD // 4), last, eps, HEAD, BIASED)
    own_k, own_v = _write(
        k_ptr, v_ptr, cos_ptr, sin_ptr, ring_k_ptr, ring_v_ptr, row, kv_head, position, columns, eps,
        KV_HEADS, HEAD, TOKENS, NEW, BIASED, SHIFTED,
    )  # fmt: skip

    most_Q = tl.full([QUERIES], LOWEST, tl.float32)
    sum_Q = tl.zeros([QUERIES], tl.float32)
    out_QH = tl.zeros([QUERIES, HEAD], tl.float32)
    # Entry j of the ring, counted from the oldest, is before - j tokens before the first new token.
    reach_Q = before + token_Q - window
    j = tl.arange(0, ENTRIES)
    visible_QJ = (j < before)[None, :] & (j[None, :] > reach_Q[:, None])
    most_Q, sum_Q, out_QH = _attend(q_QH, k_JH, v_JH, visible_QJ, most_Q, sum_Q, out_QH, scale, EXACT)
    for left in range(ENTRIES, before, ENTRIES):
        k_JH, v_JH = _ring_block(
            ring_k_ptr, ring_v_ptr, left, before, oldest, columns, is_first, KV_HEADS, HEAD, ENTRIES, SHIFTED
        )
        visible_QJ = (left + j < before)[None, :] & (left + j[None, :] > reach_Q[:, None])
        most_Q, sum_Q, out_QH = _attend(q_QH, k_JH, v_JH, visible_QJ, most_Q, sum_Q, out_QH, scale, EXACT)
    if EXTRA > 0:
        most_Q, sum_Q, out_QH = _attend(q_QH, k_CH, v_CH, visible_QC, most_Q, sum_Q, out_QH, scale, EXACT)
        for left in range(EXTRA, count, EXTRA):
            k_CH, v_CH, visible_QC = _extra_block(
                extra_k_ptr, extra_v_ptr, mask_ptr, left, count, KV_HEADS, HEAD, EXTRA
            )
            most_Q, sum_Q, out_QH = _attend(q_QH, k_CH, v_CH, visible_QC, most_Q, sum_Q, out_QH, scale, EXACT)
    age = token_Q[:, None] - tl.arange(0, NEW)[None, :]
    most_Q, sum_Q, out_QH = _attend(
        q_QH, own_k, own_v, (age >= 0) & (age < window), most_Q, sum_Q, out_QH, scale, EXACT
    )
    out_QH /= sum_Q[:, None]
    if MASKED:
        out_QH = tl.where((wanted_Q != 0)[:, None], out_QH, 0.0)
    tl.store(out_ptr + place_Q[:, None] + h[None, :], out_QH.to(out_ptr.dtype.element_ty), mask=is_query[:, None])


def blocks_of(programs: int) -> Blocks:
    """Return the sizes for so many programs."""
    return next(blocks for least, blocks in BLOCKS if programs >= least)


def ring_attention(
    new: list[Tensor],
    ring: tuple[Tensor, Tensor],
    slot_B: Tensor,
    position_B: Tensor,
    extra: tuple[Tensor | None, ...],
    wanted_BT: Tensor | None,
    window: int,
    biased: bool,
    shifted: bool,
) -> Tensor:
    """As `plain_ring_attention` in `lepton/ops/ring_attention.py`, in one launch.

    `new` are q, k, v, cosines and sines, contiguous; `extra` the fields of `Extra`, or None four times.
    """
    rows, tokens, width = new[0].shape
    _, columns, kv_heads, head_dim = ring[0].shape
    heads = width // head_dim
    extra_k, extra_v, extra_B, mask_BTC = extra
    assert all(each.is_contiguous() for each in ring)
    count, entries = 0, (new[0],) * 4
    if extra_k is not None and extra_v is not None and extra_B is not None and mask_BTC is not None:
        assert extra_k.is_contiguous()
        assert extra_v.is_contiguous()
        count, entries = extra_k.shape[1], (extra_k, extra_v, extra_B, mask_BTC.contiguous().view(torch.uint8))
    blocks = blocks_of(rows * kv_heads)
    queries = max(16, triton.next_power_of_2(heads // kv_heads * tokens))
    root, wide = head_dim**0.5, max(64, head_dim)
    most = max(16, min(blocks.entries * 64 // wide, SCORES // queries))
    most_extra = max(16, min(blocks.extra * 64 // wide, SCORES // queries))
    out = torch.empty_like(new[0])
    wanted = out if wanted_BT is None else wanted_BT.contiguous().view(torch.uint8)
    with torch.cuda.device_of(out):  # Triton launches on the current device
        _ring_attention[(kv_heads, rows)](
            *new, *ring, slot_B, position_B, *entries, wanted, out, columns, count, window, root,
            math.log2(math.e) / root, NORM_EPS,
            HEADS=heads, KV_HEADS=kv_heads, HEAD=head_dim, TOKENS=tokens,
            QUERIES=queries, NEW=max(16, triton.next_power_of_2(tokens)), ENTRIES=most,
            EXTRA=count and max(16, min(triton.next_power_of_2(count), most_extra)),
            BIASED=biased, SHIFTED=shifted, MASKED=wanted_BT is not None,
            EXACT="ieee" if out.dtype == torch.float32 else "tf32",
            num_warps=blocks.warps, num_stages=blocks.stages,
        )  # fmt: skip
    return out
