"""Cross-entropy of a chunk of logits in one kernel: the losses of its rows, and the slopes in the logits' place.

A program owns a row and reads it twice. The soft cap bounds the exponent, so the first reading needs no maximum: it
sums ``exp(capped)``. The second one, which finds the row still in the L2 cache, overwrites it with the gradient. So the
memory of a GPU sees each logit, in half precision, read once and written once; all arithmetic is in fp32.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from lepton.model.loss import IGNORE

# Eight columns a thread are one load of 16 bytes. A row of 50 thousand columns gets 16 warps, of which two fit on a
# multiprocessor of an H100 or H200 at once: 264 rows of 100 KB, which the second reading still finds in 50 MB of cache.
BLOCK = 4096
COLUMNS_A_WARP = 32 * 8


@triton.jit
def _shares(raw_ptr, column, columns, vocab_size, cap):
    """Return `w` with ``tanh(raw / cap) = 1 - 2 w`` and ``exp(cap tanh(raw / cap))``, 0 beyond the vocabulary.

    This form of tanh has no difference of large numbers, and its derivative, ``4 w (1 - w)``, needs no second one.
    """
    # The mask is the row's end and not the vocabulary's: rows are padded to a length that wide loads divide.
    raw = tl.load(raw_ptr + column, mask=column < columns, other=0.0).to(tl.float32)
    w = 1.0 / (1.0 + tl.exp(raw * (2.0 / cap)))
    return w, tl.where(column < vocab_size, tl.exp(cap - 2.0 * cap * w), 0.0)


@triton.jit
def _cross_entropy(
    raw_ptr,
    target_ptr,
    count_ptr,
    nats_ptr,
    squares_ptr,
    vocab_size,
    cap,
    z_weight,
    columns: tl.constexpr,  # of which a model has one or two
    IGNORE: tl.constexpr,
    SLOPES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    raw_ptr += row * columns
    label = tl.load(target_ptr + row)
    if label == IGNORE:
        tl.store(nats_ptr + row, 0.0)
        tl.store(squares_ptr + row, 0.0)
        if SLOPES:
            for first in range(0, columns, BLOCK):
                column = first + tl.arange(0, BLOCK)
                tl.store(raw_ptr + column, tl.zeros([BLOCK], raw_ptr.dtype.element_ty), mask=column < columns)
    else:
        sums = tl.zeros([BLOCK], tl.float32)
        for first in range(0, columns, BLOCK):
            column = first + tl.arange(0, BLOCK)
            _, exp = _shares(raw_ptr, column, columns, vocab_size, cap)
            sums += exp
        total = tl.sum(sums)
        lse = tl.log(total)
        w_label, _ = _shares(raw_ptr, label, columns, vocab_size, cap)
        tl.store(nats_ptr + row, lse - (cap - 2.0 * cap * w_label))
        tl.store(squares_ptr + row, lse * lse)
        if SLOPES:
            # Every thread has read the label's logit before any overwrites it.
            tl.debug_barrier()
            share = 1.0 / tl.load(count_ptr).to(tl.float32)
            scale = (1.0 + 2.0 * z_weight * lse) * share / total
            for first in range(0, columns, BLOCK):
                column = first + tl.arange(0, BLOCK)
                w, exp = _shares(raw_ptr, column, columns, vocab_size, cap)
                slope = (exp * scale - tl.where(column == label, share, 0.0)) * (4.0 * w * (1.0 - w))
                tl.store(raw_ptr + column, slope.to(raw_ptr.dtype.element_ty), mask=column < columns)


def fused_chunk(
    raw_CV: Tensor, target_C: Tensor, count: Tensor, vocab_size: int, cap: float, z_weight: float, grads: bool
) -> tuple[Tensor, Tensor]:
    """As `plain_chunk` in `lepton/model/loss.py`, in one launch.

    The arguments are not looked at on the host, so a launch can be captured in a CUDA graph. A target is `IGNORE` or
    below `vocab_size`; any other is read out of bounds.
    """
    rows, columns = raw_CV.shape
    assert raw_CV.is_contiguous()
    nats_C = torch.empty(rows, dtype=torch.float32, device=raw_CV.device)
    squares_C = torch.empty_like(nats_C)
    block = min(BLOCK, triton.next_power_of_2(columns))
    with torch.cuda.device_of(raw_CV):  # Triton launches on the current device
        _cross_entropy[(rows,)](
            raw_CV,
            target_C.contiguous(),
            count,
            nats_C,
            squares_C,
            vocab_size,
            cap,
            z_weight,
            columns=columns,
            IGNORE=IGNORE,
            SLOPES=grads,
            BLOCK=block,
            num_warps=max(1, block // COLUMNS_A_WARP),
        )
    return nats_C, squares_C
