"""Attention in a Triton kernel, for masks where each kv entry is visible to one contiguous run of queries.

Every chunk without remembered tokens has such a mask: a token is visible until the window or the document ends, a
crystal from when its token leaves the window until better crystals replace it, a thought while its segment is open.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from lepton.ops.kernels import HALF, Kernel
from lepton.ops.query_blocks import computed_pairs


@dataclass(frozen=True)
class Ranges:
    """An attention mask as ranges, int32. The kv entries of the chunk's own tokens come first, then those of slots."""

    start_BT: Tensor
    """For each query, the first token that it attends to; it attends to all from there up to itself."""
    first_BJ: Tensor
    """For each kv entry, the first query that attends to it."""
    last_BJ: Tensor
    """One more than the last such query; equal to the first if no query attends to it."""
    tokens: int
    """Number of kv entries that belong to the chunk's own tokens: T, or 0 where queries are not tokens."""
    window: int | None
    """Largest number of tokens that a query attends to; None: no limit. Only FLOP counts read it."""

    @staticmethod
    def causal(position_BT: Tensor, window: int | None) -> "Ranges":
        """Return the causal mask of a chunk without remembered tokens, as `attention_plan.visible` defines it."""
        reach_BT = position_BT if window is None else position_BT.clamp(max=window - 1)
        index_T = torch.arange(reach_BT.shape[1], device=reach_BT.device)
        start_BT = index_T - reach_BT
        first_BJ = index_T.expand_as(start_BT).contiguous()
        # Starts never decrease, so the queries that attend to a token end before the first that starts after it.
        last_BJ = torch.searchsorted(start_BT, first_BJ, right=True)
        return Ranges(start_BT.int(), first_BJ.int(), last_BJ.int(), len(index_T), window)

    @staticmethod
    def of_mask(mask_BTC: Tensor) -> "Ranges":
        """Return the ranges of a mask of queries that are not tokens of the chunk: every kv entry counts as a slot."""
        first_BC, last_BC = runs(mask_BTC)
        start_BT = torch.zeros(mask_BTC.shape[:2], dtype=torch.int32, device=mask_BTC.device)
        return Ranges(start_BT, first_BC, last_BC, 0, None)

    def with_slots(self, mask_BTC: Tensor) -> "Ranges":
        """Return these ranges, followed by those of slots with a bool mask."""
        first_BC, last_BC = runs(mask_BTC)
        first_BJ, last_BJ = torch.cat([self.first_BJ, first_BC], 1), torch.cat([self.last_BJ, last_BC], 1)
        return Ranges(self.start_BT, first_BJ, last_BJ, self.tokens, self.window)

    def of_rows(self, rows_A: Tensor) -> "Ranges":
        """Return the ranges of the rows with indices `rows_A`."""
        start, first, last = (each.index_select(0, rows_A) for each in (self.start_BT, self.first_BJ, self.last_BJ))
        return Ranges(start, first, last, self.tokens, self.window)


def runs(mask_BTC: Tensor) -> tuple[Tensor, Tensor]:
    """Return the first query that attends to each slot, and one more than the last, int32; T twice if there is none."""
    count_BC = mask_BTC.sum(1)
    first_BC = torch.where(count_BC > 0, mask_BTC.int().argmax(1), mask_BTC.shape[1])
    return first_BC.int(), (first_BC + count_BC).int()


def attend_in_ranges(q_BTNH: Tensor, k_BJKH: Tensor, v_BJKH: Tensor, ranges: Ranges) -> Tensor:
    """Softmax attention [B, T, N, H]. Each kv head serves N / K query heads.

    Queries and keys must be normed, so that scores are bounded, and every query must attend to a kv entry.
    """
    given = (q_BTNH.contiguous(), k_BJKH.contiguous(), v_BJKH.contiguous())
    out_BTNH, _ = _attend(*given, ranges.start_BT, ranges.first_BJ, ranges.last_BJ, ranges.tokens, ranges.window)
    return out_BTNH


def _trial(device: torch.device, dtype: torch.dtype, head_dim: int) -> None:
    q = torch.zeros(1, 16, 1, head_dim, dtype=dtype, device=device, requires_grad=True)
    index = torch.arange(16, dtype=torch.int32, device=device)[None]
    attend_in_ranges(q, q, q, Ranges(index, index, index + 1, 16, 1)).sum().backward()


ATTENTION = Kernel("attention", HALF, _trial)
"""`ATTENTION.works(device, dtype, head_dim)`."""


@torch.library.custom_op("lepton::attend_in_ranges", mutates_args=())
def _attend(
    q_BTNH: Tensor,
    k_BJKH: Tensor,
    v_BJKH: Tensor,
    start_BT: Tensor,
    first_BJ: Tensor,
    last_BJ: Tensor,
    tokens: int,
    window: int | None,
) -> tuple[Tensor, Tensor]:
    from lepton.ops.triton import attention

    return attention.forward(q_BTNH, k_BJKH, v_BJKH, start_BT, first_BJ, last_BJ, tokens)


@_attend.register_fake
def _(q_BTNH: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    rows, length, heads, _width = q_BTNH.shape
    return torch.empty_like(q_BTNH), q_BTNH.new_empty(rows, heads, length, dtype=torch.float32)


@torch.library.custom_op("lepton::attend_in_ranges_backward", mutates_args=())
def _attend_backward(
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
    window: int | None,
) -> tuple[Tensor, Tensor, Tensor]:
    from lepton.ops.triton import attention

    given = (q_BTNH, k_BJKH, v_BJKH, start_BT, first_BJ, last_BJ, out_BTNH, norm_BNT, tokens)
    return attention.backward(grad_BTNH.contiguous(), *given)


@_attend_backward.register_fake
def _(grad_BTNH: Tensor, q_BTNH: Tensor, k_BJKH: Tensor, v_BJKH: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(q_BTNH), torch.empty_like(k_BJKH), torch.empty_like(v_BJKH)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, tokens, window = inputs
    ctx.save_for_backward(*tensors, *output)
    ctx.tokens, ctx.window = tokens, window


def _differentiate(ctx: Any, grad_BTNH: Tensor, _norm: Tensor | None) -> tuple[Tensor | None, ...]:
    gradients = _attend_backward(grad_BTNH, *ctx.saved_tensors, ctx.tokens, ctx.window)
    return *gradients, None, None, None, None, None


_attend.register_autograd(_differentiate, setup_context=_keep)


def _pairs(q: Any, k: Any, tokens: int, window: int | None) -> int:
    """Return the number of scores that are computed if each row is one document."""
    return int(q[0] * q[2] * (q[1] * (k[1] - tokens) + computed_pairs(tokens, window)))


@register_flop_formula(torch.ops.lepton.attend_in_ranges)
def _flops(q: Any, k: Any, *args: Any, out_shape: Any = None, **_: Any) -> int:
    """Two products: scores and outputs."""
    return 2 * 2 * q[3] * _pairs(q, k, *args[-2:])


@register_flop_formula(torch.ops.lepton.attend_in_ranges_backward)
def _flops_backward(grad: Any, q: Any, k: Any, *args: Any, out_shape: Any = None, **_: Any) -> int:
    """Two gradients of each of the two products. Recomputed scores do not count."""
    return 4 * 2 * q[3] * _pairs(q, k, *args[-2:])
