"""Choosing tokens: Gumbel-max over the kept tokens without a sort.

A program chooses for one row. It draws from all tokens first. Whether the drawn token is kept depends only on the
tokens that rank before it: on their mass for `top_p`, on their number for `top_k`. If it is not kept, neither is any
token after it, so the next draw is among those before it, with the same noise. The result is the best of the kept
tokens. The first draw is kept with a probability of at least `top_p`, so there are few further ones.

A row of up to `RESIDENT` columns is read once and stays in registers. A longer one takes two launches, because the
noise of all its tokens is much work for one multiprocessor: in the first, many programs draw from a part of the row
each. Further passes read the row, and the noise if there are few rows, from the L2 cache.

Loops depend on values on the GPU only, so a CUDA graph can hold them. All arithmetic is in fp32. NaN compares as false,
and fewer tokens rank before a draw than before the last one, so loops end.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from lepton.ops.cross_entropy import soft_cap
from lepton.ops.triton.products import EARLY_ROWS, starts_early

RESIDENT = 8192
"""Most columns of a row that one program keeps."""
PART = 2048
"""Columns of a part of a longer row."""
COLUMNS_A_WARP = 32 * 4
KEEPING_ROWS = 64
"""Most rows whose noise is kept for further draws: 4 bytes a column."""
LOG2_E = tl.constexpr(1.4426950408889634)
LOWEST = tl.constexpr(-3.0e38)
FADES = tl.constexpr(104.0)
"""exp(-104) is 0 in fp32."""
SERIES_BELOW = tl.constexpr(2.0**-5)
"""Below this u, -log(1 - u) is computed as a power series."""


@triton.jit
def _mix(x):
    x ^= x >> 16
    x *= 0x21F0AAAD
    x ^= x >> 15
    x *= 0x735A2D97
    x ^= x >> 15
    return x


@triton.jit
def _exponential(stream_ptr, index_ptr, ids_ptr, row, column, columns: tl.constexpr, OWN_IDS: tl.constexpr):
    """As `exponentials` of `noise_keys` in `lepton/ops/choose.py`."""
    index = tl.load(index_ptr + row).to(tl.uint32)
    key0 = _mix(tl.load(stream_ptr + 2 * row).to(tl.uint32) ^ _mix(index))
    key1 = _mix(tl.load(stream_ptr + 2 * row + 1).to(tl.uint32) ^ _mix(index ^ 0xFFFFFFFF))
    ids = tl.load(ids_ptr + column, mask=column < columns, other=0) if OWN_IDS else column
    bits = _mix(_mix(ids.to(tl.uint32) ^ key0) ^ key1)
    u = tl.minimum((bits.to(tl.float32) + 0.5) * 0.00000000023283064365386963, 0.99999994)  # 2^-32, 1 - 2^-24
    series = u * (1.0 + u * (1 / 2 + u * (1 / 3 + u * (1 / 4 + u * (1 / 5 + u * (1 / 6))))))
    return tl.where(u < SERIES_BELOW, series, -tl.log(1.0 - u))


@triton.jit
def _capped(logit, CAP: tl.constexpr):
    """In fp32, and as `soft_cap` if there is a cap."""
    logit = logit.to(tl.float32)
    if CAP is not None:
        logit = CAP - (2.0 * CAP) / (1.0 + tl.exp2(logit * (2.0 * LOG2_E / CAP)))
    return logit


@triton.jit
def _read(logits_ptr, first, columns: tl.constexpr, CAP: tl.constexpr, BLOCK: tl.constexpr):
    """A block of columns and their logits; -inf past the end."""
    column = first + tl.arange(0, BLOCK)
    logit = _capped(tl.load(logits_ptr + column, mask=column < columns, other=0.0), CAP)
    return column, tl.where(column < columns, logit, float("-inf"))


@triton.jit
def _block(logits_ptr, own, first, columns: tl.constexpr, CAP: tl.constexpr, BLOCK: tl.constexpr):
    """As `_read`, from the registers `own` if they hold the row."""
    column, logit = first + tl.arange(0, BLOCK), own
    if columns > BLOCK:
        column, logit = _read(logits_ptr, first, columns, CAP, BLOCK)
    return column, logit


@triton.jit
def _logit(logits_ptr, own, column, columns: tl.constexpr, CAP: tl.constexpr, BLOCK: tl.constexpr):
    """Return the logit of a column, rounded as in a pass over the row: a cap alone could be rounded otherwise."""
    if CAP is None:
        logit = tl.load(logits_ptr + column).to(tl.float32)
    else:
        near, logits = _block(logits_ptr, own, column // BLOCK * BLOCK, columns, CAP, BLOCK)
        logit = tl.max(tl.where(near == column, logits, float("-inf")))
    return logit


@triton.jit
def _best(value, first, columns: tl.constexpr):
    """Return the greatest value of a block, and the lowest of the columns that have it.

    NaN counts as -inf: with NaN the threads of a program would find different columns.
    """
    value = tl.where(value == value, value, float("-inf"))
    best, index = tl.max(value, 0, return_indices=True)
    return best, tl.minimum(first + index, columns - 1)


@triton.jit
def _race(column, logit, exponential, highest, scale, first, columns: tl.constexpr):
    """Draw from a block; return its mass relative to the greatest logit, the score of the best column, and this."""
    weight = tl.exp2((logit - tl.maximum(highest, LOWEST)) * scale)
    score, chosen = _best(tl.where(column < columns, weight / exponential, -1.0), first, columns)
    return tl.sum(weight), score, chosen


@triton.jit
def _draw_before(
    logits_ptr, own, stream_ptr, index_ptr, ids_ptr, noise_ptr, own_noise, row, highest, top, scale, bound,
    bound_column, columns: tl.constexpr, CAP: tl.constexpr, OWN_IDS: tl.constexpr, KEPT: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Draw among the tokens that rank before a bound; `top` if there is none."""
    best = tl.full([BLOCK], -1.0, tl.float32)
    where = tl.zeros([BLOCK], tl.int32) + top
    for first in range(0, columns, BLOCK):
        column, logit = _block(logits_ptr, own, first, columns, CAP, BLOCK)
        before = (logit > bound) | ((logit == bound) & (column < bound_column))
        exponential = own_noise
        if columns > BLOCK:
            if KEPT:
                exponential = tl.load(noise_ptr + column, mask=column < columns, other=1.0)
            else:
                exponential = _exponential(stream_ptr, index_ptr, ids_ptr, row, column, columns, OWN_IDS)
        score = tl.where(before, tl.exp2((logit - highest) * scale) / exponential, -1.0)
        better = score > best
        best = tl.where(better, score, best)
        where = tl.where(better, column, where)
    return tl.min(tl.where(best == tl.max(best), where, 0x7FFFFFFF))


@triton.jit
def _before(
    logits_ptr, own, highest, scale, bound, bound_column,
    columns: tl.constexpr, CAP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Return mass and number of the tokens that rank before a bound."""
    mass = tl.zeros([BLOCK], tl.float32)
    number = tl.zeros([BLOCK], tl.int32)
    for first in range(0, columns, BLOCK):
        column, logit = _block(logits_ptr, own, first, columns, CAP, BLOCK)
        before = (logit > bound) | ((logit == bound) & (column < bound_column))
        mass += tl.where(before, tl.exp2((logit - highest) * scale), 0.0)
        number += before.to(tl.int32)
    return tl.sum(mass), tl.sum(number)


@triton.jit
def _around(logits_ptr, own, value, columns: tl.constexpr, CAP: tl.constexpr, BLOCK: tl.constexpr):
    """Return how many logits are at least `value`, the least of them, and the greatest below it."""
    number = tl.zeros([BLOCK], tl.int32)
    least = tl.full([BLOCK], float("inf"), tl.float32)
    below = tl.full([BLOCK], float("-inf"), tl.float32)
    for first in range(0, columns, BLOCK):
        _, logit = _block(logits_ptr, own, first, columns, CAP, BLOCK)
        number += (logit >= value).to(tl.int32)
        least = tl.where((logit >= value) & (logit < least), logit, least)
        below = tl.where((logit < value) & (logit > below), logit, below)
    return tl.sum(number), tl.min(least), tl.max(below)


@triton.jit
def _mass_of_top(
    logits_ptr, own, highest, scale, temperature, upper, k,
    columns: tl.constexpr, CAP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Return the mass of the `k` first tokens in rank, of which the last has a logit of at most `upper`.

    That logit is found by bisection. Its bounds move to logits of the row, so they meet after a few passes.
    """
    low = tl.maximum(highest - FADES * temperature, LOWEST)  # tokens below it have no mass
    high = upper
    while low < high:
        middle = 0.5 * low + 0.5 * high
        middle = tl.where(middle > low, tl.minimum(middle, high), high)
        number, least, below = _around(logits_ptr, own, middle, columns, CAP, BLOCK)
        low = tl.where(number >= k, least, low)
        high = tl.where(number == k, low, tl.where(number > k, high, below))
    mass, number = _before(logits_ptr, own, highest, scale, low, -1, columns, CAP, BLOCK)
    return mass + (k - number) * tl.exp2((low - highest) * scale)


@triton.jit
def _parts(
    logits_ptr, stride, stream_ptr, index_ptr, temperature_ptr, top_p_ptr, top_k_ptr, ids_ptr,
    found_ptr, columns_ptr, noise_ptr,
    columns: tl.constexpr, PARTS: tl.constexpr, OWN_IDS: tl.constexpr, KEPT: tl.constexpr,
    BLOCK: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """The greatest logit of a part of a row, and a draw from it."""
    if EARLY:
        gdc_wait()
        gdc_launch_dependents()
    row, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    found_ptr += row * 3 * PARTS + part
    columns_ptr += row * 2 * PARTS + part
    first = part * BLOCK
    column, logit = _read(logits_ptr + row * stride, first, columns, None, BLOCK)
    highest, top = _best(logit, first, columns)
    tl.store(found_ptr, highest)
    tl.store(columns_ptr, top)
    temperature = tl.load(temperature_ptr + row)
    if temperature > 0:
        exponential = _exponential(stream_ptr, index_ptr, ids_ptr, row, column, columns, OWN_IDS)
        mass, score, chosen = _race(column, logit, exponential, highest, LOG2_E / temperature, first, columns)
        tl.store(found_ptr + PARTS, mass)
        tl.store(found_ptr + 2 * PARTS, score)
        tl.store(columns_ptr + PARTS, chosen)
        limited = (tl.load(top_p_ptr + row) < 1) | (tl.load(top_k_ptr + row) > 0)
        if KEPT:
            tl.store(noise_ptr + row * columns + column, exponential, mask=column < tl.where(limited, columns, 0))


@triton.jit
def _choose(
    logits_ptr, stride, stream_ptr, index_ptr, temperature_ptr, top_p_ptr, top_k_ptr, ids_ptr,
    found_ptr, columns_ptr, noise_ptr, chosen_ptr,
    columns: tl.constexpr, PARTS: tl.constexpr, CAP: tl.constexpr, OWN_IDS: tl.constexpr, KEPT: tl.constexpr,
    BLOCK: tl.constexpr, PARTS_BLOCK: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """Choose for a row, of which `_parts` has seen the parts if there are any."""
    if EARLY:
        gdc_wait()
        gdc_launch_dependents()
    row = tl.program_id(0).to(tl.int64)
    logits_ptr += row * stride
    noise_ptr += row * columns
    temperature = tl.load(temperature_ptr + row)
    top_p = tl.load(top_p_ptr + row)
    top_k = tl.load(top_k_ptr + row)
    if PARTS:
        part = tl.arange(0, PARTS_BLOCK)
        found_ptr += row * 3 * PARTS
        columns_ptr += row * 2 * PARTS
        own, own_noise = 0.0, 1.0
        highests = tl.load(found_ptr + part, mask=part < PARTS, other=float("-inf"))
        highest, at = _best(highests, 0, PARTS)
        top = tl.load(columns_ptr + at)
    else:
        column, own = _read(logits_ptr, 0, columns, CAP, BLOCK)
        highest, top = _best(own, 0, columns)
    chosen = top
    if temperature > 0:
        scale = LOG2_E / temperature
        if PARTS:
            factor = tl.exp2((highests - highest) * scale)
            whole = tl.sum(factor * tl.load(found_ptr + PARTS + part, mask=part < PARTS, other=0.0))
            scores = factor * tl.load(found_ptr + 2 * PARTS + part, mask=part < PARTS, other=-1.0)
            _, at = _best(tl.where(part < PARTS, scores, -1.0), 0, PARTS)
            chosen = tl.load(columns_ptr + PARTS + at)
        else:
            own_noise = _exponential(stream_ptr, index_ptr, ids_ptr, row, column, columns, OWN_IDS)
            whole, _, chosen = _race(column, own, own_noise, highest, scale, 0, columns)
        limited_k = (top_k > 0) & (top_k < columns)
        k = tl.where(limited_k, top_k, columns).to(tl.int32)
        # `whole` is the mass that `top_p` is a share of. With both limits it is that of the first k tokens. That takes
        # many passes, so it is computed only when it decides; until then `whole` is an upper bound.
        bounded = limited_k & (top_p < 1)
        last = tl.full([], columns, tl.int32)
        searching = (chosen != top) & (limited_k | (top_p < 1))
        while searching:
            logit = _logit(logits_ptr, own, chosen, columns, CAP, BLOCK)
            mass, number = _before(logits_ptr, own, highest, scale, logit, chosen, columns, CAP, BLOCK)
            kept = (number < k) & ((top_p >= 1) | (mass < top_p * whole))
            lower = mass + tl.exp2((logit - highest) * scale)
            if kept & bounded & (mass >= top_p * lower):
                whole = _mass_of_top(logits_ptr, own, highest, scale, temperature, logit, k, columns, CAP, BLOCK)
                bounded = False
                kept = mass < top_p * whole
            searching = (kept == 0) & (number < last)
            last = number
            if searching:
                chosen = _draw_before(
                    logits_ptr, own, stream_ptr, index_ptr, ids_ptr, noise_ptr, own_noise, row, highest, top, scale,
                    logit, chosen, columns, CAP, OWN_IDS, KEPT, BLOCK,
                )  # fmt: skip
                searching = chosen != top
    tl.store(chosen_ptr + row, chosen.to(tl.int64))


def fused_choose(
    logits_AV: Tensor,
    stream_A2: Tensor,
    index_A: Tensor,
    temperature_A: Tensor,
    top_p_A: Tensor,
    top_k_A: Tensor,
    ids_V: Tensor | None,
    cap: float | None,
) -> Tensor:
    """As `choose` in `lepton/ops/choose.py`, in one or two launches, which can be captured in a CUDA graph.

    Rows may lie any distance apart, such as those of padded logits. A row has less than 2^30 columns.
    """
    rows, columns = logits_AV.shape
    if logits_AV.stride(1) != 1:
        logits_AV = logits_AV.contiguous()
    chosen_A = torch.empty(rows, dtype=torch.int64, device=logits_AV.device)
    if not rows:
        return chosen_A
    parts = triton.cdiv(columns, PART) if columns > RESIDENT else 0
    if parts and cap is not None:
        logits_AV, cap = soft_cap(logits_AV.float(), cap), None
    kept = parts > 0 and rows <= KEEPING_ROWS
    # Of each part: the greatest logit, mass, and score; the columns of the first and the last.
    found = logits_AV.new_empty(rows, 3, parts, dtype=torch.float32)
    places = logits_AV.new_empty(rows, 2, parts, dtype=torch.int32)
    noise_AV = logits_AV.new_empty(rows if kept else 0, columns, dtype=torch.float32)
    given = (
        logits_AV, logits_AV.stride(0), stream_A2.contiguous(), index_A.contiguous(), temperature_A.contiguous(),
        top_p_A.contiguous(), top_k_A.contiguous(), chosen_A if ids_V is None else ids_V.contiguous(),
        found, places, noise_AV,
    )  # fmt: skip
    early = rows <= EARLY_ROWS and starts_early(logits_AV.device)
    flags = {"columns": columns, "PARTS": parts, "OWN_IDS": ids_V is not None, "KEPT": kept, "EARLY": early}
    if early:
        flags["launch_pdl"] = True
    with torch.cuda.device_of(logits_AV):  # Triton launches on the current device
        if parts:
            _parts[(rows, parts)](*given, BLOCK=PART, num_warps=max(1, PART // COLUMNS_A_WARP), **flags)
        block = RESIDENT if parts else triton.next_power_of_2(columns)
        _choose[(rows,)](
            *given, chosen_A, CAP=cap, BLOCK=block, PARTS_BLOCK=triton.next_power_of_2(max(parts, 1)),
            num_warps=min(max(block // COLUMNS_A_WARP, 1), 32), **flags,
        )  # fmt: skip
    return chosen_A
