"""Attention of a decode step: a few new tokens of each sequence, over a ring of the keys and values before them.

A ring has R columns. The token at position p is in column p % R, so a new token takes the place of one that left the
window, and nothing moves. `ring_attention` does all that stands between the projections of a block: the norm and the
rotary positions of queries and keys, the write, and attention to the window and to entries that belong to no token. In
half precision on a GPU that is one launch; `plain_ring_attention` is the same in PyTorch.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from lepton.ops.attention import attend_with_bias
from lepton.ops.attention_plan import bias
from lepton.ops.heads import ending_in, norm, rotate, shifted
from lepton.ops.kernels import HALF, Kernel


@dataclass(frozen=True)
class Ring:
    """Keys and values of one layer: a pool of rings, and which of them the rows use."""

    k: Tensor
    """Keys [rings, R, K, H], normed and rotated. R is at least window - 1 + T, and one more if keys are shifted."""
    v: Tensor
    """Values, of the same shape."""
    slot_B: Tensor
    """The ring of each row, int64. Rows that share one, such as those that only fill a batch, have no defined result,
    but disturb no other."""
    position_B: Tensor
    """Position of the first new token in its document, int64. The ring holds the tokens before it."""
    wanted_BT: Tensor | None = None
    """Bool: the new tokens that attend. The outputs of the others are 0, whatever their queries are, and the kernel
    reads no past of a row that has none. None: all do."""
    shifted: bool = False
    """Whether the position-free half of the keys that tokens attend to is that of the token before. The ring holds the
    tokens' own."""


@dataclass(frozen=True)
class Extra:
    """Entries that belong to no token, such as those of crystals and thoughts: a pool, and what the rows see of it."""

    k: Tensor
    """Complete keys [pool, C, K, H]: normed, and with their bias as the last coordinate."""
    v: Tensor
    """Values, of the same shape."""
    row_B: Tensor
    """The pool's row of each row, int64."""
    mask_BTC: Tensor
    """Bool: which of its entries each token attends to."""


def ring_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rotary: tuple[Tensor, Tensor],
    ring: Ring,
    extra: Extra | None = None,
    *,
    window: int,
    biased: bool,
) -> Tensor:
    """Write the keys and values of new tokens to the rings, in place; return the outputs of attention, [B, T, N*H].

    A token attends to itself and the tokens before it in its document, at most `window` in all, and to what it sees of
    `extra`. What no token of a row attends to may hold anything, also nan. It has no gradient, and neither copies nor
    synchronises, so it can be captured in a CUDA graph after a first call that builds the kernel.

    Args:
        q: projected queries [B, T, N*H], before norm and rotation. N is a multiple of K: each kv head serves N / K
            query heads.
        k: projected keys [B, T, K*H].
        v: values [B, T, K*H].
        rotary: cosines and sines [B, T, 1, H / 4] of the tokens' positions, in the dtype of `q`.
        ring: the past of this layer. Its keys and values are written.
        extra: entries in addition to those of tokens.
        window: largest number of tokens that a token attends to, itself included.
        biased: whether the last coordinate carries the bias of entries' scores: it becomes sqrt(H) in queries and 0 in
            keys of tokens.
    """
    assert ring.k.shape[1] >= window - 1 + ring.shifted + q.shape[1], (
        "a ring has room for the window and the new tokens"
    )
    if not RING_ATTENTION.works(q.device, q.dtype, ring.k.shape[-1]):
        return plain_ring_attention(q, k, v, rotary, ring, extra, window=window, biased=biased)
    entries = (None,) * 4 if extra is None or not extra.k.shape[1] else tuple(vars(extra).values())
    return _ring_attention(q, k, v, *rotary, *vars(ring).values(), *entries, window, biased)


def plain_ring_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rotary: tuple[Tensor, Tensor],
    ring: Ring,
    extra: Extra | None = None,
    *,
    window: int,
    biased: bool,
) -> Tensor:
    """As `ring_attention`, in PyTorch."""
    _, columns, kv_heads, head_dim = ring.k.shape
    q_BTNH = rotate(norm(q.unflatten(-1, (-1, head_dim))), *rotary)
    k_BTKH = rotate(norm(k.unflatten(-1, (kv_heads, head_dim))), *rotary)
    v_BTKH = v.unflatten(-1, (kv_heads, head_dim))
    if biased:
        q_BTNH = ending_in(q_BTNH, q.new_full((), head_dim**0.5))
        k_BTKH = ending_in(k_BTKH, k.new_zeros(()))
    index_T = torch.arange(q.shape[1], device=q.device)
    slot_B1, position_B1 = ring.slot_B[:, None], ring.position_B[:, None]
    written_BT = (position_B1 + index_T) % columns
    ring.k[slot_B1, written_BT] = k_BTKH
    ring.v[slot_B1, written_BT] = v_BTKH

    # Counted from the first new token. With shifted keys, the first entry only has the other half for the next one.
    index_R = torch.arange(1 - window - ring.shifted, 0, device=q.device)
    exists_BR = position_B1 + index_R >= 0
    read_BR = (position_B1 + index_R) % columns
    k_BRKH, v_BRKH = ring.k[slot_B1, read_BR], ring.v[slot_B1, read_BR]
    kept = [torch.where(exists_BR[:, :, None, None], each, 0) for each in (k_BRKH, v_BRKH)]
    k_BJKH = torch.cat([kept[0], k_BTKH], 1)
    if ring.shifted:
        k_BJKH = shifted(k_BJKH, F.pad(position_B1 == 0, (len(index_R), q.shape[1] - 1)))
    index_J = torch.cat([index_R, index_T])
    distance_TJ = index_T[:, None] - index_J
    exists_BJ = torch.cat([exists_BR, exists_BR.new_ones(written_BT.shape)], 1)
    seen = [exists_BJ[:, None] & (distance_TJ >= 0) & (distance_TJ < window)]
    keys, values = [k_BJKH], [kept[1], v_BTKH]
    if extra is not None:
        is_seen = extra.mask_BTC.any(1)[:, :, None, None]
        keys.append(torch.where(is_seen, extra.k[extra.row_B], 0))
        values.append(torch.where(is_seen, extra.v[extra.row_B], 0))
        seen.append(extra.mask_BTC)
    mask = bias(torch.cat(seen, 2), q.dtype)
    out = attend_with_bias(q_BTNH, torch.cat(keys, 1), torch.cat(values, 1), mask).flatten(-2)
    return out if ring.wanted_BT is None else torch.where(ring.wanted_BT[..., None], out, 0)


def _trial(device: torch.device, dtype: torch.dtype, head_dim: int) -> None:
    for rows in (1, 1024):  # the kernel splits its work by their number
        x = torch.zeros(rows, 1, head_dim, dtype=dtype, device=device)
        angle = x.new_zeros(rows, 1, 1, head_dim // 4)
        pool = x.new_zeros(1, 16, 1, head_dim)
        index_B = torch.zeros(rows, dtype=torch.int64, device=device)
        wanted = torch.ones(rows, 1, dtype=torch.bool, device=device)
        ring = (pool.clone(), pool.clone(), index_B, index_B + 15, wanted if rows == 1 else None)
        extra = (pool, pool, index_B, wanted[..., None].expand(-1, -1, 16))
        for shifts in (False, True):
            _ring_attention(x, x, x, angle, angle, *ring, shifts, *extra, 15, True)


RING_ATTENTION = Kernel("attention of decoding", HALF, _trial)
"""`RING_ATTENTION.works(device, dtype, head_dim)`."""


@torch.library.custom_op("lepton::ring_attention", mutates_args=("ring_k", "ring_v"))
def _ring_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos: Tensor,
    sin: Tensor,
    ring_k: Tensor,
    ring_v: Tensor,
    slot_B: Tensor,
    position_B: Tensor,
    wanted_BT: Tensor | None,
    shifted: bool,
    extra_k: Tensor | None,
    extra_v: Tensor | None,
    extra_B: Tensor | None,
    mask_BTC: Tensor | None,
    window: int,
    biased: bool,
) -> Tensor:
    from lepton.ops.triton import ring_attention as kernels

    new = [each.contiguous() for each in (q, k, v, cos, sin)]
    extra = (extra_k, extra_v, extra_B, mask_BTC)
    return kernels.ring_attention(new, (ring_k, ring_v), slot_B, position_B, extra, wanted_BT, window, biased, shifted)


@_ring_attention.register_fake
def _(q: Tensor, *_: Any) -> Tensor:
    return q.new_empty(q.shape)


@register_flop_formula(torch.ops.lepton.ring_attention)
def _flops(q: Any, k: Any, v: Any, cos: Any, sin: Any, ring: Any, *args: Any, out_shape: Any = None, **_: Any) -> int:
    """Two products, scores and outputs, of each query with a window and all extra entries."""
    extra, window = args[5], args[-2]
    return int(2 * 2 * q[0] * q[1] * q[2] * (window + (extra[1] if extra else 0)))
