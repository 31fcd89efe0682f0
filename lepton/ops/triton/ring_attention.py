"""Attention of a few new tokens over a ring of keys and values, with the norm, rotary positions and the write.

A program computes the queries of a row that one kv head serves, so keys and values are read once; only many queries
are shared by several programs. The first loads are issued before anything waits for them. A program writes only
columns that none reads, because a ring has room for the window and the new tokens.

Numbers are rounded where PyTorch rounds them: after the norm, after each product and the sum of a rotation, and before
each matrix product; all else is fp32. In a kernel, Q are the queries of a program, J the entries of a block.
"""

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from lepton.ops.heads import NORM_EPS


class Blocks(NamedTuple):
    """How the kernel reads, for heads of width 64; half as many entries at once for heads of 128."""

    entries: int
    """Entries of the ring that are read at once."""
    extra: int
    """Most extra entries that are read at once."""
    warps: int
    stages: int
    eager: bool
    """Whether all loads of the first blocks are under way before any is waited for. That reads extra entries which no
    query sees, and takes more registers."""


# The table of the kernel's sizes, for an H100 (132 multiprocessors).
BLOCKS = ((132, Blocks(64, 64, 4, 2, False)), (0, Blocks(256, 128, 8, 1, True)))
"""The first line whose number of programs, rows times kv heads, is reached. With few, a program has a multiprocessor to
itself, and reads a whole window at once."""

OUTPUTS = 2048
"""Most outputs of a program, queries times the width of a head: more do not fit into the registers of a warp."""

EARLY = False
"""Whether a launch starts while the one before it ends, as in `products.py`."""

LOWEST = tl.constexpr(-1e30)
"""The score of what a query does not see. It is finite, so that differences are numbers."""


@triton.jit
def _load_head(x_ptr, x_at, cos_ptr, sin_ptr, angle_at, HEAD: tl.constexpr):
    """Heads at places `x_at`, the partners of their coordinates in the rotation, and cosines and sines."""
    PAIRS: tl.constexpr = HEAD // 4
    h = tl.arange(0, HEAD)
    pair = tl.max_contiguous(tl.multiple_of(h % PAIRS, PAIRS), PAIRS)
    partner = tl.where(h < 2 * PAIRS, h ^ PAIRS, h)
    partner = tl.max_contiguous(tl.multiple_of(partner, PAIRS), PAIRS)  # so that loads are wide
    x = tl.load(x_ptr + x_at[:, None] + h[None, :])
    other = tl.load(x_ptr + x_at[:, None] + partner[None, :])
    cos = tl.load(cos_ptr + angle_at[:, None] + pair[None, :])
    return x, other, cos, tl.load(sin_ptr + angle_at[:, None] + pair[None, :])


@triton.jit
def _head(x, other, cos, sin, last, eps, HEAD: tl.constexpr, BIASED: tl.constexpr):
    """Heads normed and rotated; `last` is their last coordinate."""
    PAIRS: tl.constexpr = HEAD // 4
    dtype: tl.constexpr = x.dtype
    h = tl.arange(0, HEAD)
    x, other = x.to(tl.float32), other.to(tl.float32)
    scale = tl.rsqrt(tl.sum(x * x, 1) / HEAD + eps)[:, None]
    x, other = (x * scale).to(dtype).to(tl.float32), (other * scale).to(dtype).to(tl.float32)
    along, across = x * cos.to(tl.float32), other * sin.to(tl.float32)
    along, across = along.to(dtype).to(tl.float32), across.to(dtype).to(tl.float32)
    x = tl.where(h < PAIRS, along - across, tl.where(h < 2 * PAIRS, along + across, x))
    if BIASED:
        x = tl.where(h == HEAD - 1, last, x)
    return x.to(dtype)


@triton.jit
def _shared(index, PARTS: tl.constexpr, ENTRIES: tl.constexpr):
    """Indices [PARTS, ENTRIES] of a block's entries from `index` on."""
    return index + tl.arange(0, PARTS)[:, None] * ENTRIES + tl.arange(0, ENTRIES)[None, :]


@triton.jit
def _ring_block(
    k_ptr, v_ptr, index, before, oldest, columns,
    KV_HEADS: tl.constexpr, HEAD: tl.constexpr,
):  # fmt: skip
    """Keys and values of the ring's entries, counted from the oldest that is visible."""
    column = oldest + index
    column = tl.where(column >= columns, column - columns, column)
    at = column[:, :, None] * (KV_HEADS * HEAD) + tl.arange(0, HEAD)[None, None, :]
    exists = (index < before)[:, :, None]
    return tl.load(k_ptr + at, mask=exists, other=0.0), tl.load(v_ptr + at, mask=exists, other=0.0)


@triton.jit
def _visible(mask_ptr, index, count):
    """Which query sees which extra entries, [PARTS, Q, EXTRA], and which of them any query sees, [PARTS, EXTRA, 1]."""
    visible = tl.load(mask_ptr[None, :, None] + index[:, None, :], mask=(index < count)[:, None, :], other=0) != 0
    return visible, (tl.max(visible.to(tl.int32), 1) > 0)[:, :, None]


@triton.jit
def _extra_block(k_ptr, v_ptr, index, mask, KV_HEADS: tl.constexpr, HEAD: tl.constexpr):
    """Keys and values of extra entries."""
    at = index[:, :, None] * (KV_HEADS * HEAD) + tl.arange(0, HEAD)[None, None, :]
    return tl.load(k_ptr + at, mask=mask, other=0.0), tl.load(v_ptr + at, mask=mask, other=0.0)


@triton.jit
def _late(x):
    """`x`, for the compiler a result of its own: else it moves the first use of a load up to it, before other loads."""
    return tl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [x], dtype=x.dtype, is_pure=False, pack=2)


@triton.jit
def _score(q, k, visible, scale, EXACT: tl.constexpr):
    """Scores [PARTS, Q, J], in units of a factor of two."""
    return tl.where(visible, tl.dot(q, tl.permute(k, (0, 2, 1)), input_precision=EXACT) * scale, LOWEST)


@triton.jit
def _add(score, v, visible, most, sums, out, EXACT: tl.constexpr):
    """Take entries into sums whose weights are relative to `most`."""
    p = tl.where(visible, tl.exp2(score - most[:, :, None]), 0.0)
    return sums + tl.sum(p, 2), tl.dot(p.to(v.dtype), v, out, input_precision=EXACT)


@triton.jit
def _attend(q, k, v, visible, most, sums, out, scale, EXACT: tl.constexpr):
    """Take a block of entries into the softmax: the largest score, the sum of weights, the weighted sum of values."""
    score = _score(q, k, visible, scale, EXACT)
    new = tl.maximum(most, tl.max(score, 2))
    kept = tl.exp2(most - new)
    sums, out = _add(score, v, visible, new, sums * kept, out * kept[:, :, None], EXACT)
    return new, sums, out


@triton.jit
def _ring_attention(
    q_ptr, k_ptr, v_ptr, cos_ptr, sin_ptr, ring_k_ptr, ring_v_ptr, slot_ptr, position_ptr,
    extra_k_ptr, extra_v_ptr, extra_ptr, mask_ptr, out_ptr, columns, count, window, last, scale, eps,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, HEAD: tl.constexpr, TOKENS: tl.constexpr,
    QUERIES: tl.constexpr, NEW: tl.constexpr, PARTS: tl.constexpr, ENTRIES: tl.constexpr, EXTRA: tl.constexpr,
    BIASED: tl.constexpr, EAGER: tl.constexpr, LATE: tl.constexpr, EARLY: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """The first block of the ring, the first extra entries and the new tokens at once; then what is left of each.

    Each warp takes a part of a block, with a softmax of its own, and the parts are merged at the end: warps do not wait
    for each other between. `ENTRIES` and `EXTRA` are those of a part.
    """
    if EARLY:
        gdc_wait()
        gdc_launch_dependents()
    kv_head, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    GROUP: tl.constexpr = HEADS // KV_HEADS
    PAIRS: tl.constexpr = HEAD // 4
    # Loads in this order, since a thread stops at the first that needs another one's result.
    slot, position = tl.load(slot_ptr + row), tl.load(position_ptr + row)
    if EXTRA > 0:
        extra_at = (tl.load(extra_ptr + row) * count * KV_HEADS + kv_head) * HEAD
    first_query = tl.program_id(2) * QUERIES
    query_Q = tl.minimum(first_query + tl.arange(0, QUERIES), GROUP * TOKENS - 1)  # the last query fills the block
    token_Q = query_Q // GROUP
    if EXTRA > 0:
        extra_at = (tl.load(extra_ptr + row) * count * KV_HEADS + kv_head) * HEAD
        mask_ptr = mask_ptr + row * TOKENS * count + token_Q * count
        extra = _shared(0, PARTS, EXTRA)
        extra_seen, any_sees = _visible(mask_ptr, extra, count)
    h, new = tl.arange(0, HEAD), tl.arange(0, NEW)
    place_Q = ((row * TOKENS + token_Q) * HEADS + kv_head * GROUP + query_Q % GROUP) * HEAD
    x, other, cos, sin = _load_head(q_ptr, place_Q, cos_ptr, sin_ptr, (row * TOKENS + token_Q) * PAIRS, HEAD)
    new_row = row * TOKENS + tl.minimum(new, TOKENS - 1)
    new_at = (new_row * KV_HEADS + kv_head) * HEAD
    own_x, own_other, own_cos, own_sin = _load_head(k_ptr, new_at, cos_ptr, sin_ptr, new_row * PAIRS, HEAD)
    own_v = tl.load(v_ptr + new_at[:, None] + h[None, :])

    before = tl.minimum(position, window - 1).to(tl.int32)  # entries that the first query sees
    oldest = ((position - before) % columns).to(tl.int32)
    ring_at = (slot * columns * KV_HEADS + kv_head) * HEAD
    ring_k_ptr += ring_at
    ring_v_ptr += ring_at
    index = _shared(0, PARTS, ENTRIES)
    k, v = _ring_block(ring_k_ptr, ring_v_ptr, index, before, oldest, columns, KV_HEADS, HEAD)
    if EXTRA > 0:
        extra_k_ptr += extra_at
        extra_v_ptr += extra_at
        extra_mask = (extra < count)[:, :, None] if EAGER else any_sees
        extra_k, extra_v = _extra_block(extra_k_ptr, extra_v_ptr, extra, extra_mask, KV_HEADS, HEAD)
    if LATE:
        k, v = _late(k), _late(v)
        if EXTRA > 0:
            extra_k, extra_v = _late(extra_k), _late(extra_v)
    if EXTRA > 0 and EAGER:  # what no query sees may be nan
        extra_k = tl.where(any_sees, extra_k, 0.0).to(extra_k.dtype)
        extra_v = tl.where(any_sees, extra_v, 0.0).to(extra_v.dtype)

    q = tl.broadcast_to(_head(x, other, cos, sin, last, eps, HEAD, BIASED)[None], [PARTS, QUERIES, HEAD])
    own_k = _head(own_x, own_other, own_cos, own_sin, 0.0, eps, HEAD, BIASED)
    written_at = ((position + new) % columns)[:, None] * (KV_HEADS * HEAD) + h[None, :]
    written = ((new < TOKENS) & (first_query == 0))[:, None]
    tl.store(ring_k_ptr + written_at, own_k, mask=written)
    tl.store(ring_v_ptr + written_at, own_v, mask=written)
    own_k = tl.broadcast_to(own_k[None], [PARTS, NEW, HEAD])
    own_v = tl.broadcast_to(own_v[None], [PARTS, NEW, HEAD])

    age = token_Q[:, None] - new[None, :]
    own_seen = (tl.arange(0, PARTS) == 0)[:, None, None] & ((age >= 0) & (age < window))[None]
    # Entry j of the ring, counted from the oldest, is before - j tokens before the first new token.
    reach = (before + token_Q - window)[None, :, None]
    seen = (index < before)[:, None, :] & (index[:, None, :] > reach)
    score, own_score = _score(q, k, seen, scale, EXACT), _score(q, own_k, own_seen, scale, EXACT)
    most = tl.maximum(tl.max(score, 2), tl.max(own_score, 2))
    if EXTRA > 0:
        extra_score = _score(q, extra_k, extra_seen, scale, EXACT)
        most = tl.maximum(most, tl.max(extra_score, 2))
    sums = tl.zeros([PARTS, QUERIES], tl.float32)
    out = tl.zeros([PARTS, QUERIES, HEAD], tl.float32)
    sums, out = _add(score, v, seen, most, sums, out, EXACT)
    sums, out = _add(own_score, own_v, own_seen, most, sums, out, EXACT)
    if EXTRA > 0:
        sums, out = _add(extra_score, extra_v, extra_seen, most, sums, out, EXACT)
    for left in range(PARTS * ENTRIES, before, PARTS * ENTRIES):
        index = _shared(left, PARTS, ENTRIES)
        k, v = _ring_block(ring_k_ptr, ring_v_ptr, index, before, oldest, columns, KV_HEADS, HEAD)
        seen = (index < before)[:, None, :] & (index[:, None, :] > reach)
        most, sums, out = _attend(q, k, v, seen, most, sums, out, scale, EXACT)
    if EXTRA > 0:
        for left in range(PARTS * EXTRA, count, PARTS * EXTRA):
            extra = _shared(left, PARTS, EXTRA)
            extra_seen, any_sees = _visible(mask_ptr, extra, count)
            extra_k, extra_v = _extra_block(extra_k_ptr, extra_v_ptr, extra, any_sees, KV_HEADS, HEAD)
            most, sums, out = _attend(q, extra_k, extra_v, extra_seen, most, sums, out, scale, EXACT)

    share = tl.exp2(most - tl.max(most, 0)[None, :])
    out_QH = tl.sum(out * share[:, :, None], 0) / tl.sum(sums * share, 0)[:, None]
    is_query = first_query + tl.arange(0, QUERIES) < GROUP * TOKENS
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
    window: int,
    biased: bool,
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
    wide, asked = max(64, head_dim), heads // kv_heads * tokens
    queries = max(16, min(triton.next_power_of_2(asked), OUTPUTS // wide))
    each, most_extra = (max(16, most * 64 // wide // blocks.warps) for most in (blocks.entries, blocks.extra))
    root = head_dim**0.5
    flags = {"BIASED": biased, "EAGER": blocks.eager, "LATE": blocks.eager and new[0].is_cuda, "EARLY": EARLY}
    if EARLY:
        flags["launch_pdl"] = True
    out = torch.empty_like(new[0])
    with torch.cuda.device_of(out):  # Triton launches on the current device
        _ring_attention[(kv_heads, rows, triton.cdiv(asked, queries))](
            *new, *ring, slot_B, position_B, *entries, out, columns, count, window, root,
            math.log2(math.e) / root, NORM_EPS,
            HEADS=heads, KV_HEADS=kv_heads, HEAD=head_dim, TOKENS=tokens,
            QUERIES=queries, NEW=max(16, triton.next_power_of_2(tokens)), PARTS=blocks.warps, ENTRIES=each,
            EXTRA=count and max(16, min(triton.next_power_of_2(count) // blocks.warps, most_extra)),
            EXACT="ieee" if out.dtype == torch.float32 else "tf32", num_warps=blocks.warps,
            num_stages=blocks.stages, **flags,
        )  # fmt: skip
    return out
