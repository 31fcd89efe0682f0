"""What makes queries and keys of the projections of a block: the norm, rotary positions, and the bias coordinate."""

import torch
import torch.nn.functional as F
from torch import Tensor

NORM_EPS = 1e-6


def norm(x: Tensor) -> Tensor:
    """RMSNorm over the last dimension, without weights (Zhang and Sennrich, 2019)."""
    return F.rms_norm(x, (x.shape[-1],), eps=NORM_EPS)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the first half of each head of `x` [..., heads, H]; the second half has no position.

    Coordinate i and coordinate H / 4 + i are a pair; `cos` and `sin` are [..., 1, H / 4].
    """
    pairs = cos.shape[-1]
    first, second, rest = x.split([pairs, pairs, x.shape[-1] - 2 * pairs], -1)
    return torch.cat([first * cos - second * sin, first * sin + second * cos, rest], -1)


def shifted(k_BJKH: Tensor, starts_BJ: Tensor) -> Tensor:
    """Return keys whose second half, the position-free one, is that of the token before.

    Each entry is one token later than the one before it; the first follows the last, as in a ring. A token that starts
    its document (`starts_BJ`) gets zeros.
    """
    half = k_BJKH.shape[-1] // 2
    before = k_BJKH[..., half:].roll(1, 1).masked_fill(starts_BJ[..., None, None], 0)
    return torch.cat([k_BJKH[..., :half], before], -1)


def ending_in(x: Tensor, last: Tensor) -> Tensor:
    """Return heads [..., N, H] with `last` [...] as their last coordinate.

    It does not use `F.pad`: PyTorch 2.11's Inductor drops the padded constant if the same kernel produces the tensor
    (pytorch/pytorch#189895).
    """
    is_last_H = torch.arange(x.shape[-1], device=x.device) == x.shape[-1] - 1
    return torch.where(is_last_H, last[..., None, None], x)
