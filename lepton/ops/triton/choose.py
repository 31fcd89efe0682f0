"""Choosing tokens in one launch: Gumbel-max over the kept tokens without a sort.

A program chooses for one row. It draws from all tokens first. Whether the drawn token is kept depends only on the
tokens that rank before it: on their mass for `top_p`, on their number for `top_k`. If it is not kept, neither is any
token after it, so the next draw is among those before it, with the same noise. The result is the best of the kept
tokens. The first draw is kept with a probability of at least `top_p`, so there are few further ones.

Passes read the row from the L2 cache. Loops depend on values on the GPU only, so a CUDA graph can hold them.
All arithmetic is in fp32. NaN compares as false, and every further draw ranks before the last, so loops end.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 4096
COLUMNS_A_WARP = 32 * 8
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
def _exponential(key0, key1, ids):
    """As `exponentials` in `lepton/ops/choose.py`."""
    bits = _mix(_mix(ids ^ key0) ^ key1)
    u = tl.minimum((bits.to(tl.float32) + 0.5) * 0.00000000023283064365386963, 0.99999994)  # 2^-32, 1 - 2^-24
    series = u * (1.0 + u * (1 / 2 + u * (1 / 3 + u * (1 / 4 + u * (1 / 5 + u * (1 / 6))))))
    return tl.where(u < SERIES_BELOW, series, -tl.log(1.0 - u))


@triton.jit
def _block(logits_ptr, first, columns: tl.constexpr, BLOCK: tl.constexpr):
    column = first + tl.arange(0, BLOCK)
    return column, tl.load(logits_ptr + column, mask=column < columns, other=float("-inf")).to(tl.float32)


@triton.jit
def _first_best(best, where):
    """Return the greatest value, and the lowest of the columns that have it."""
    highest = tl.max(best)
    return highest, tl.min(tl.where(best == highest, where, 0x7FFFFFFF))


@triton.jit
def _greatest(logits_ptr, columns: tl.constexpr, BLOCK: tl.constexpr):
    best = tl.full([BLOCK], float("-inf"), tl.float32)
    where = tl.zeros([BLOCK], tl.int32)
    for first in range(0, columns, BLOCK):
        column, logit = _block(logits_ptr, first, columns, BLOCK)
        better = logit > best
        best = tl.where(better, logit, best)
        where = tl.where(better, column, where)
    return _first_best(best, where)


@triton.jit
def _draw(
    logits_ptr,
    ids_ptr,
    key0,
    key1,
    highest,
    top,
    scale,
    bound,
    bound_column,
    columns: tl.constexpr,
    OWN_IDS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Draw among the tokens that rank before a bound; return their mass too. `top` if there is none."""
    best = tl.full([BLOCK], -1.0, tl.float32)
    where = tl.zeros([BLOCK], tl.int32) + top
    mass = tl.zeros([BLOCK], tl.float32)
    for first in range(0, columns, BLOCK):
        column, logit = _block(logits_ptr, first, columns, BLOCK)
        before = (logit > bound) | ((logit == bound) & (column < bound_column))
        weight = tl.exp2((logit - highest) * scale)
        mass += tl.where(before, weight, 0.0)
        ids = tl.load(ids_ptr + column, mask=column < columns, other=0) if OWN_IDS else column
        score = tl.where(before, weight / _exponential(key0, key1, ids.to(tl.uint32)), -1.0)
        better = score > best
        best = tl.where(better, score, best)
        where = tl.where(better, column, where)
    _, chosen = _first_best(best, where)
    return tl.sum(mass), chosen


@triton.jit
def _before(logits_ptr, highest, scale, bound, bound_column, columns: tl.constexpr, BLOCK: tl.constexpr):
    """Return mass and number of the tokens that rank before a bound."""
    mass = tl.zeros([BLOCK], tl.float32)
    number = tl.zeros([BLOCK], tl.int32)
    for first in range(0, columns, BLOCK):
        column, logit = _block(logits_ptr, first, columns, BLOCK)
        before = (logit > bound) | ((logit == bound) & (column < bound_column))
        mass += tl.where(before, tl.exp2((logit - highest) * scale), 0.0)
        number += before.to(tl.int32)
    return tl.sum(mass), tl.sum(number)


@triton.jit
def _around(logits_ptr, value, columns: tl.constexpr, BLOCK: tl.constexpr):
    """Return how many logits are at least `value`, the least of them, and the greatest below it."""
    number = tl.zeros([BLOCK], tl.int32)
    least = tl.full([BLOCK], float("inf"), tl.float32)
    below = tl.full([BLOCK], float("-inf"), tl.float32)
    for first in range(0, columns, BLOCK):
        _, logit = _block(logits_ptr, first, columns, BLOCK)
        number += (logit >= value).to(tl.int32)
        least = tl.where((logit >= value) & (logit < least), logit, least)
        below = tl.where((logit < value) & (logit > below), logit, below)
    return tl.sum(number), tl.min(least), tl.max(below)


@triton.jit
def _mass_of_top(logits_ptr, highest, scale, temperature, upper, k, columns: tl.constexpr, BLOCK: tl.constexpr):
    """Return the mass of the `k` first tokens in rank, of which the last has a logit of at most `upper`.

    That logit is found by bisection. Its bounds move to logits of the row, so they meet after a few passes.
    """
    low = tl.maximum(highest - FADES * temperature, LOWEST)  # tokens below it have no mass
    high = upper
    while low < high:
        middle = 0.5 * low + 0.5 * high
        middle = tl.where(middle > low, tl.minimum(middle, high), high)
        number, least, below = _around(logits_ptr, middle, columns, BLOCK)
        low = tl.where(number >= k, least, low)
        high = tl.where(number == k, low, tl.where(number > k, high, below))
    mass, number = _before(logits_ptr, highest, scale, low, -1, columns, BLOCK)
    return mass + (k - number) * tl.exp2((low - highest) * scale)


@triton.jit
def _choose(
    logits_ptr,
    stride,
    stream_ptr,
    index_ptr,
    temperature_ptr,
    top_p_ptr,
    top_k_ptr,
    ids_ptr,
    chosen_ptr,
    columns: tl.constexpr,
    OWN_IDS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    logits_ptr += row * stride
    highest, top = _greatest(logits_ptr, columns, BLOCK)
    chosen = top
    temperature = tl.load(temperature_ptr + row)
    if temperature > 0:
        top_p = tl.load(top_p_ptr + row)
        top_k = tl.load(top_k_ptr + row)
        limited_k = (top_k > 0) & (top_k < columns)
        k = tl.where(limited_k, top_k, columns).to(tl.int32)
        index = tl.load(index_ptr + row).to(tl.uint32)
        key0 = _mix(tl.load(stream_ptr + 2 * row).to(tl.uint32) ^ _mix(index))
        key1 = _mix(tl.load(stream_ptr + 2 * row + 1).to(tl.uint32) ^ _mix(index ^ 0xFFFFFFFF))
        scale = LOG2_E / temperature
        whole, chosen = _draw(
            logits_ptr, ids_ptr, key0, key1, highest, top, scale, float("-inf"), columns, columns, OWN_IDS, BLOCK
        )
        # `whole` is the mass that `top_p` is a share of. With both limits it is that of the first k tokens. That takes
        # many passes, so it is computed only when it decides; until then `whole` is an upper bound.
        bounded = limited_k & (top_p < 1)
        searching = (chosen != top) & (limited_k | (top_p < 1))
        while searching:
            logit = tl.load(logits_ptr + chosen).to(tl.float32)
            mass, number = _before(logits_ptr, highest, scale, logit, chosen, columns, BLOCK)
            kept = (number < k) & ((top_p >= 1) | (mass < top_p * whole))
            lower = mass + tl.exp2((logit - highest) * scale)
            if kept & bounded & (mass >= top_p * lower):
                whole = _mass_of_top(logits_ptr, highest, scale, temperature, logit, k, columns, BLOCK)
                bounded = False
                kept = mass < top_p * whole
            searching = kept == 0
            if searching:
                _, chosen = _draw(
                    logits_ptr, ids_ptr, key0, key1, highest, top, scale, logit, chosen, columns, OWN_IDS, BLOCK
                )
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
) -> Tensor:
    """As `choose` in `lepton/ops/choose.py`, in one launch, which can be captured in a CUDA graph.

    Rows may lie any distance apart, such as those of padded logits. A row has less than 2^30 columns.
    """
    rows, columns = logits_AV.shape
    if logits_AV.stride(1) != 1:
        logits_AV = logits_AV.contiguous()
    chosen_A = torch.empty(rows, dtype=torch.int64, device=logits_AV.device)
    if not rows:
        return chosen_A
    block = min(BLOCK, triton.next_power_of_2(columns))
    with torch.cuda.device_of(logits_AV):  # Triton launches on the current device
        _choose[(rows,)](
            logits_AV,
            logits_AV.stride(0),
            stream_A2.contiguous(),
            index_A.contiguous(),
            temperature_A.contiguous(),
            top_p_A.contiguous(),
            top_k_A.contiguous(),
            chosen_A if ids_V is None else ids_V.contiguous(),
            chosen_A,
            columns=columns,
            OWN_IDS=ids_V is not None,
            BLOCK=block,
            num_warps=max(1, block // COLUMNS_A_WARP),
        )
    return chosen_A
