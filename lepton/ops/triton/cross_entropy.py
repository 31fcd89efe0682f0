"""Cross-entropy of a chunk of logits in one kernel, which overwrites the logits with their gradient.

A program computes one row and reads it twice. The first time it sums ``exp(capped)``; the soft cap bounds the exponent,
so no maximum is subtracted. The second time, when the row is still in the L2 cache, it overwrites it with the gradient.
So each half-precision logit is read from GPU memory once and written once. All arithmetic is in fp32.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

# Eight logits per thread are one load of 16 bytes. A row of 50 thousand logits gets 16 warps, and a multiprocessor of
# an H100 holds two such programs: 264 rows of 100 KB in flight, which fit into 50 MB of L2 cache.
BLOCK = 4096
COLUMNS_A_WARP = 32 * 8
LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def _shares(raw, cap: tl.constexpr):
    """Return `w` with ``tanh(raw / cap) = 1 - 2 w`` and ``exp(cap tanh(raw / cap))``.

    This form of tanh subtracts no large numbers, and its derivative, ``4 w (1 - w)``, needs no other exponential. The
    hardware computes powers of two, so all factors are folded into their exponents.
    """
    w = 1.0 / (1.0 + tl.exp2(raw.to(tl.float32) * (2.0 * LOG2_E / cap)))
    return w, tl.exp2(cap * LOG2_E - (2.0 * LOG2_E * cap) * w)


@triton.jit
def _cross_entropy(
    raw_ptr,
    target_ptr,
    count_ptr,
    nats_ptr,
    squares_ptr,
    z_weight,
    # Constants of a model, so the kernel is compiled once or twice. Rows are padded to `columns`, for wide loads.
    vocab_size: tl.constexpr,
    columns: tl.constexpr,
    cap: tl.constexpr,
    IGNORE: tl.constexpr,
    GRADS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    WHOLE: tl.constexpr = vocab_size // BLOCK * BLOCK  # logits in blocks that need no mask
    row = tl.program_id(0).to(tl.int64)
    raw_ptr += row * columns
    label = tl.load(target_ptr + row)
    if label == IGNORE:
        tl.store(nats_ptr + row, 0.0)
        tl.store(squares_ptr + row, 0.0)
        if GRADS:
            for first in range(0, columns, BLOCK):
                column = first + tl.arange(0, BLOCK)
                tl.store(raw_ptr + column, tl.zeros([BLOCK], raw_ptr.dtype.element_ty), mask=column < columns)
    else:
        sums = tl.zeros([BLOCK], tl.float32)
        for first in range(0, WHOLE, BLOCK):
            _, exp = _shares(tl.load(raw_ptr + first + tl.arange(0, BLOCK)), cap)
            sums += exp
        for first in range(WHOLE, vocab_size, BLOCK):
            column = first + tl.arange(0, BLOCK)
            _, exp = _shares(tl.load(raw_ptr + column, mask=column < columns, other=0.0), cap)
            sums += tl.where(column < vocab_size, exp, 0.0)
        total = tl.sum(sums)
        lse = tl.log(total)
        w_label, exp_label = _shares(tl.load(raw_ptr + label), cap)
        tl.store(nats_ptr + row, lse - (cap - 2.0 * cap * w_label))
        tl.store(squares_ptr + row, lse * lse)
        if GRADS:
            # Every thread has read the label's logit before any overwrites it.
            tl.debug_barrier()
            share = 4.0 / tl.load(count_ptr).to(tl.float32)
            scale = (1.0 + 2.0 * z_weight * lse) * share / total
            for first in range(0, WHOLE, BLOCK):
                column = first + tl.arange(0, BLOCK)
                w, exp = _shares(tl.load(raw_ptr + column), cap)
                tl.store(raw_ptr + column, (exp * scale * (w * (1.0 - w))).to(raw_ptr.dtype.element_ty))
            for first in range(WHOLE, columns, BLOCK):
                column = first + tl.arange(0, BLOCK)
                w, exp = _shares(tl.load(raw_ptr + column, mask=column < columns, other=0.0), cap)
                grad = tl.where(column < vocab_size, exp * scale * (w * (1.0 - w)), 0.0)
                tl.store(raw_ptr + column, grad.to(raw_ptr.dtype.element_ty), mask=column < columns)
            # The label's own gradient is written last.
            tl.debug_barrier()
            grad_label = (exp_label * scale - share) * (w_label * (1.0 - w_label))
            tl.store(raw_ptr + label, grad_label.to(raw_ptr.dtype.element_ty))


def fused_chunk(
    raw_OV: Tensor,
    target_O: Tensor,
    count: Tensor,
    vocab_size: int,
    cap: float,
    z_weight: float,
    grads: bool,
    *,
    ignore: int,
) -> tuple[Tensor, Tensor]:
    """As `plain_chunk` in `lepton/ops/cross_entropy.py`, in one launch.

    It does not synchronise with the host, so it can be captured in a CUDA graph. A target must be `ignore` or below
    `vocab_size`: others are read out of bounds.
    """
    rows, columns = raw_OV.shape
    assert raw_OV.is_contiguous()
    nats_O = torch.empty(rows, dtype=torch.float32, device=raw_OV.device)
    squares_O = torch.empty_like(nats_O)
    block = min(BLOCK, triton.next_power_of_2(columns))
    with torch.cuda.device_of(raw_OV):  # Triton launches on the current device
        _cross_entropy[(rows,)](
            raw_OV,
            target_O.contiguous(),
            count,
            nats_O,
            squares_O,
            z_weight,
            vocab_size=vocab_size,
            columns=columns,
            cap=cap,
            IGNORE=ignore,
            GRADS=grads,
            BLOCK=block,
            num_warps=max(1, block // COLUMNS_A_WARP),
        )
    return nats_O, squares_O
