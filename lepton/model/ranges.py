"""Attention in one kernel on a GPU, where every column is seen by one run of queries.

That holds for a chunk without a past: the tokens of a window and a document lie next to each other, a crystal is seen
from when its token has left the window until better ones push it out, a thought while its segment is open.
"""

import functools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from lepton.model import kernels
from lepton.model.kernels import HAS_TRITON
from lepton.model.timeline import Timeline, band_edges


@dataclass(frozen=True)
class Ranges:
    """Which queries see which columns, int32."""

    start_BT: Tensor
    """The first token that each token sees; it sees all from there up to itself."""
    first_BJ: Tensor
    """The first query that sees a column, of tokens or, behind them, of slots."""
    last_BJ: Tensor
    """One more than the last query that sees it; as much as the first where there is none."""
    tokens: int
    """How many of the columns are those of the queries' own tokens: all of them, or none."""
    window: int | None

    @staticmethod
    def of(timeline: Timeline, window: int | None, slots_BTC: Tensor | None) -> "Ranges":
        """Read off the ranges of a chunk without a past, and of slots with the mask `slots_BTC`."""
        reach_BT = timeline.position_BT if window is None else timeline.position_BT.clamp(max=window - 1)
        index_T = torch.arange(reach_BT.shape[1], device=reach_BT.device)
        start_BT = index_T - reach_BT
        first_BJ = index_T.expand_as(start_BT).contiguous()
        # Starts never decrease, so a token is seen by all from itself until the first that starts behind it.
        last_BJ = torch.searchsorted(start_BT, first_BJ, right=True)
        if slots_BTC is not None:
            slot_first_BC, slot_last_BC = runs(slots_BTC)
            first_BJ, last_BJ = torch.cat([first_BJ, slot_first_BC], 1), torch.cat([last_BJ, slot_last_BC], 1)
        return Ranges(start_BT.int(), first_BJ.int(), last_BJ.int(), len(index_T), window)

    @staticmethod
    def of_slots(mask_BTC: Tensor) -> "Ranges":
        """Read off the ranges of columns none of which are the queries' own tokens."""
        first_BC, last_BC = runs(mask_BTC)
        start_BT = torch.zeros(mask_BTC.shape[:2], dtype=torch.int32, device=mask_BTC.device)
        return Ranges(start_BT, first_BC.int(), last_BC.int(), 0, None)

    def of_rows(self, rows_R: Tensor) -> "Ranges":
        """Return those of some rows."""
        start, first, last = (each.index_select(0, rows_R) for each in (self.start_BT, self.first_BJ, self.last_BJ))
        return Ranges(start, first, last, self.tokens, self.window)


def runs(mask_BTC: Tensor) -> tuple[Tensor, Tensor]:
    """Return the first query that sees each column and one more than the last; T twice where there is none."""
    count_BC = mask_BTC.sum(1)
    first_BC = torch.where(count_BC > 0, mask_BTC.int().argmax(1), mask_BTC.shape[1])
    return first_BC, first_BC + count_BC


@functools.cache
def has_kernel(device: torch.device, dtype: torch.dtype, head_dim: int) -> bool:
    """Whether this device can attend in ranges; a warning says so where it should and cannot."""
    if device.type != "cuda" or dtype not in (torch.bfloat16, torch.float16) or not HAS_TRITON:
        return False
    if head_dim < 16 or head_dim & (head_dim - 1):
        return False

    def trial() -> None:
        with torch.inference_mode(False), torch.enable_grad():  # whoever asks first may be generating
            q = torch.zeros(1, 16, 1, head_dim, dtype=dtype, device=device, requires_grad=True)
            index = torch.arange(16, dtype=torch.int32, device=device)[None]
            attend_in_ranges(q, q, q, Ranges(index, index, index + 1, 16, 1)).sum().backward()

    return kernels.works("attention", trial)


def attend_in_ranges(q_BTNH: Tensor, k_BJKH: Tensor, v_BJKH: Tensor, ranges: Ranges) -> Tensor:
    """Softmax attention [B, T, N, H]. Each key/value head serves N / K query heads.

    Queries and keys are normed, so that scores are bounded, and every query sees a column.
    """
    given = (q_BTNH.contiguous(), k_BJKH.contiguous(), v_BJKH.contiguous())
    answer_BTNH, _ = _attend(*given, ranges.start_BT, ranges.first_BJ, ranges.last_BJ, ranges.tokens, ranges.window)
    return answer_BTNH


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
    from lepton.model.kernels import attention

    return attention.forward(q_BTNH, k_BJKH, v_BJKH, start_BT, first_BJ, last_BJ, tokens)


@_attend.register_fake
def _(q_BTNH: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    rows, length, heads, _width = q_BTNH.shape
    return torch.empty_like(q_BTNH), q_BTNH.new_empty(rows, heads, length, dtype=torch.float32)


@torch.library.custom_op("lepton::attend_in_ranges_backward", mutates_args=())
def _attend_backward(
    slope_BTNH: Tensor,
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
    from lepton.model.kernels import attention

    given = (q_BTNH, k_BJKH, v_BJKH, start_BT, first_BJ, last_BJ, out_BTNH, norm_BNT, tokens)
    return attention.backward(slope_BTNH.contiguous(), *given)


@_attend_backward.register_fake
def _(slope_BTNH: Tensor, q_BTNH: Tensor, k_BJKH: Tensor, v_BJKH: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(q_BTNH), torch.empty_like(k_BJKH), torch.empty_like(v_BJKH)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, tokens, window = inputs
    ctx.save_for_backward(*tensors, *output)
    ctx.tokens, ctx.window = tokens, window


def _differentiate(ctx: Any, slope_BTNH: Tensor, _norm: Tensor | None) -> tuple[Tensor | None, ...]:
    gradients = _attend_backward(slope_BTNH, *ctx.saved_tensors, ctx.tokens, ctx.window)
    return *gradients, None, None, None, None, None


_attend.register_autograd(_differentiate, setup_context=_keep)


def _pairs(q: Any, k: Any, tokens: int, window: int | None) -> int:
    """Pairs of queries and columns that are computed where a document fills its row."""
    slots = q[1] * (k[1] - tokens)
    near = sum((last - first) * (right - left) for first, last, left, right in band_edges(tokens, 0, window))
    return int(q[0] * q[2] * (slots + near))


@register_flop_formula(torch.ops.lepton.attend_in_ranges)
def _flops(q: Any, k: Any, *args: Any, out_shape: Any = None, **_: Any) -> int:
    """Scores and answers."""
    return 2 * 2 * q[3] * _pairs(q, k, *args[-2:])


@register_flop_formula(torch.ops.lepton.attend_in_ranges_backward)
def _flops_backward(slope: Any, q: Any, k: Any, *args: Any, out_shape: Any = None, **_: Any) -> int:
    """Two gradients of each of the two products; what is computed again does not count."""
    return 4 * 2 * q[3] * _pairs(q, k, *args[-2:])
