"""The sequential parts of the gated delta rule: substitution within a chunk, and the state from chunk to chunk.

Everything is fp32 and stays it between the products too, because the state is a sum over the whole past. The state's
products are as precise as `torch.backends.cuda.matmul.fp32_precision` says. Shapes:
P chunks of C = 64 tokens, H heads, K keys, V values of a program's block of columns, S terms of a product at a time;
R rows of a block of the inverse.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

SIZE = 64
"""Tokens of a chunk."""
SLICE = 16
"""Terms of a product at a time: as many as registers hold of both sides. 64 of them spill on an H100 or H200."""
STAGES = 5
"""Slices of 64 terms that are on their way at once, and one: all, so that a product waits once."""
INVERT_WARPS = 2


class Columns(NamedTuple):
    """How a kernel cuts the values, none of which needs another: columns of a block, and warps."""

    size: int
    warps: int


MANY = Columns(32, 4)
FEW = Columns(16, 4)
"""Where blocks of `MANY` would leave much of a GPU idle: 132 multiprocessors in an H100 or H200."""
ENOUGH = 256


@triton.jit
def _row(inverse_RR, block_ptr, i, SIZE: tl.constexpr):
    """Put in row `i` of the inverse, less the identity, of a block whose rows before are there."""
    r = tl.arange(0, 16)
    mix_R = tl.load(block_ptr + i * SIZE + r, mask=r < i, other=0.0)
    row_R = -mix_R - tl.sum(mix_R[:, None] * inverse_RR, 0)
    return tl.where((r == i)[:, None], row_R[None, :], inverse_RR)


@triton.jit
def _invert(mix_ptr, inverse_ptr, SIZE: tl.constexpr):
    """Invert identity plus mix: blocks on the diagonal by substitution, those below as products with them.

    Block (i, j) of the inverse is -D_i times the sum over j <= l < i of block (i, l) of mix and (l, j) of the inverse.
    """
    place = tl.program_id(0).to(tl.int64) * SIZE * SIZE
    mix_ptr += place
    inverse_ptr += place
    r = tl.arange(0, 16)
    at_RR = r[:, None] * SIZE + r[None, :]
    DOWN: tl.constexpr = 16 * SIZE
    zero_RR = tl.zeros([16, 16], tl.float32)
    x00, x11, x22, x33 = zero_RR, zero_RR, zero_RR, zero_RR
    for i in range(1, 16):
        x00 = _row(x00, mix_ptr, i, SIZE)
        x11 = _row(x11, mix_ptr + DOWN + 16, i, SIZE)
        x22 = _row(x22, mix_ptr + 2 * DOWN + 32, i, SIZE)
        x33 = _row(x33, mix_ptr + 3 * DOWN + 48, i, SIZE)
    one_RR = tl.where(r[:, None] == r[None, :], 1.0, 0.0)
    x00 += one_RR
    x11 += one_RR
    x22 += one_RR
    x33 += one_RR
    m10 = tl.load(mix_ptr + DOWN + at_RR)
    m20 = tl.load(mix_ptr + 2 * DOWN + at_RR)
    m21 = tl.load(mix_ptr + 2 * DOWN + 16 + at_RR)
    m30 = tl.load(mix_ptr + 3 * DOWN + at_RR)
    m31 = tl.load(mix_ptr + 3 * DOWN + 16 + at_RR)
    m32 = tl.load(mix_ptr + 3 * DOWN + 32 + at_RR)
    x10 = -tl.dot(x11, tl.dot(m10, x00, input_precision="ieee"), input_precision="ieee")
    x21 = -tl.dot(x22, tl.dot(m21, x11, input_precision="ieee"), input_precision="ieee")
    x32 = -tl.dot(x33, tl.dot(m32, x22, input_precision="ieee"), input_precision="ieee")
    sum_RR = tl.dot(m21, x10, tl.dot(m20, x00, input_precision="ieee"), input_precision="ieee")
    x20 = -tl.dot(x22, sum_RR, input_precision="ieee")
    sum_RR = tl.dot(m32, x21, tl.dot(m31, x11, input_precision="ieee"), input_precision="ieee")
    x31 = -tl.dot(x33, sum_RR, input_precision="ieee")
    sum_RR = tl.dot(m31, x10, tl.dot(m30, x00, input_precision="ieee"), input_precision="ieee")
    sum_RR = tl.dot(m32, x20, sum_RR, input_precision="ieee")
    x30 = -tl.dot(x33, sum_RR, input_precision="ieee")
    tl.store(inverse_ptr + at_RR, x00)
    tl.store(inverse_ptr + 16 + at_RR, zero_RR)
    tl.store(inverse_ptr + 32 + at_RR, zero_RR)
    tl.store(inverse_ptr + 48 + at_RR, zero_RR)
    tl.store(inverse_ptr + DOWN + at_RR, x10)
    tl.store(inverse_ptr + DOWN + 16 + at_RR, x11)
    tl.store(inverse_ptr + DOWN + 32 + at_RR, zero_RR)
    tl.store(inverse_ptr + DOWN + 48 + at_RR, zero_RR)
    tl.store(inverse_ptr + 2 * DOWN + at_RR, x20)
    tl.store(inverse_ptr + 2 * DOWN + 16 + at_RR, x21)
    tl.store(inverse_ptr + 2 * DOWN + 32 + at_RR, x22)
    tl.store(inverse_ptr + 2 * DOWN + 48 + at_RR, zero_RR)
    tl.store(inverse_ptr + 3 * DOWN + at_RR, x30)
    tl.store(inverse_ptr + 3 * DOWN + 16 + at_RR, x31)
    tl.store(inverse_ptr + 3 * DOWN + 32 + at_RR, x32)
    tl.store(inverse_ptr + 3 * DOWN + 48 + at_RR, x33)


@triton.jit
def _forward(
    solved_ptr, into_ptr, decay_ptr, state_ptr, written_ptr, entry_ptr, end_ptr, chunks,
    HEADS: tl.constexpr, SIZE: tl.constexpr, KEYS: tl.constexpr, VALUES: tl.constexpr, COLUMNS: tl.constexpr,
    SLICE: tl.constexpr, STAGES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A state has no rows to index: what a product needs slice by slice it loads from where the state is stored."""
    row, part = tl.program_id(0) // (VALUES // COLUMNS), tl.program_id(0) % (VALUES // COLUMNS)
    batch, head = row // HEADS, row % HEADS
    c, key, s = tl.arange(0, SIZE), tl.arange(0, KEYS), tl.arange(0, SLICE)
    v = part * COLUMNS + tl.arange(0, COLUMNS)
    WIDTH: tl.constexpr = VALUES + KEYS
    at_KV = key[:, None] * VALUES + v[None, :]
    at_SV = s[:, None] * VALUES + v[None, :]
    state_KV = tl.load(state_ptr + row.to(tl.int64) * (KEYS * VALUES) + at_KV)
    for p in range(chunks):
        place = (batch.to(tl.int64) * chunks + p) * HEADS + head
        solved_place = solved_ptr + place * (SIZE * WIDTH) + c[:, None] * WIDTH
        into_place = into_ptr + place * (SIZE * KEYS) + s[:, None] * KEYS + key[None, :]
        entry_place = entry_ptr + place * (KEYS * VALUES)
        written_place = written_ptr + place * (SIZE * VALUES)
        tl.store(entry_place + at_KV, state_KV)
        less_CV = -tl.load(solved_place + v[None, :])
        tl.debug_barrier()  # every thread has stored what others load
        for first in tl.range(0, KEYS, SLICE, num_stages=STAGES):
            w_CS = tl.load(solved_place + VALUES + first + s[None, :])
            state_SV = tl.load(entry_place + first * VALUES + at_SV)
            less_CV = tl.dot(w_CS, state_SV, less_CV, input_precision=PRECISION)
        tl.store(written_place + c[:, None] * VALUES + v[None, :], -less_CV)
        state_KV *= tl.load(decay_ptr + place)
        tl.debug_barrier()
        for first in tl.range(0, SIZE, SLICE, num_stages=STAGES):
            into_SK = tl.load(into_place + first * KEYS)
            written_SV = tl.load(written_place + first * VALUES + at_SV)
            state_KV = tl.dot(tl.trans(into_SK), written_SV, state_KV, input_precision=PRECISION)
    tl.store(end_ptr + row.to(tl.int64) * (KEYS * VALUES) + at_KV, state_KV)


@triton.jit
def _backward(
    written_grad_ptr, entry_grad_ptr, end_grad_ptr, solved_ptr, into_ptr, decay_ptr, entry_ptr,
    solved_grad_ptr, decay_grad_ptr, after_grad_ptr, state_grad_ptr, chunks, places,
    HEADS: tl.constexpr, SIZE: tl.constexpr, KEYS: tl.constexpr, VALUES: tl.constexpr, COLUMNS: tl.constexpr,
    SLICE: tl.constexpr, STAGES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradients of u, of the state after each chunk and on entry, and each block of columns' part of the decays'."""
    row, part = tl.program_id(0) // (VALUES // COLUMNS), tl.program_id(0) % (VALUES // COLUMNS)
    batch, head = row // HEADS, row % HEADS
    c, key, s = tl.arange(0, SIZE), tl.arange(0, KEYS), tl.arange(0, SLICE)
    v = part * COLUMNS + tl.arange(0, COLUMNS)
    WIDTH: tl.constexpr = VALUES + KEYS
    at_KV = key[:, None] * VALUES + v[None, :]
    at_SV = s[:, None] * VALUES + v[None, :]
    state_place = row.to(tl.int64) * (KEYS * VALUES)
    grad_KV = tl.load(end_grad_ptr + state_place + at_KV)
    for turn in range(chunks):
        place = (batch.to(tl.int64) * chunks + (chunks - 1 - turn)) * HEADS + head
        at_state = place * (KEYS * VALUES)
        at_solved = place * (SIZE * WIDTH)
        into_place = into_ptr + place * (SIZE * KEYS) + c[:, None] * KEYS
        w_place = solved_ptr + at_solved + VALUES + s[:, None] * WIDTH + key[None, :]
        u_grad_place = solved_grad_ptr + at_solved + v[None, :]
        tl.store(after_grad_ptr + at_state + at_KV, grad_KV)
        entry_KV = tl.load(entry_ptr + at_state + at_KV)
        tl.store(decay_grad_ptr + part.to(tl.int64) * places + place, tl.sum(tl.sum(entry_KV * grad_KV, 1), 0))
        u_grad_CV = tl.load(written_grad_ptr + place * (SIZE * VALUES) + c[:, None] * VALUES + v[None, :])
        tl.debug_barrier()  # every thread has stored what others load
        for first in tl.range(0, KEYS, SLICE, num_stages=STAGES):
            into_CS = tl.load(into_place + first + s[None, :])
            grad_SV = tl.load(after_grad_ptr + at_state + first * VALUES + at_SV)
            u_grad_CV = tl.dot(into_CS, grad_SV, u_grad_CV, input_precision=PRECISION)
        tl.store(u_grad_place + c[:, None] * WIDTH, u_grad_CV)
        less_KV = -(grad_KV * tl.load(decay_ptr + place) + tl.load(entry_grad_ptr + at_state + at_KV))
        tl.debug_barrier()
        for first in tl.range(0, SIZE, SLICE, num_stages=STAGES):
            w_SK = tl.load(w_place + first * WIDTH)
            u_grad_SV = tl.load(u_grad_place + (first + s[:, None]) * WIDTH)
            less_KV = tl.dot(tl.trans(w_SK), u_grad_SV, less_KV, input_precision=PRECISION)
        grad_KV = -less_KV
    tl.store(state_grad_ptr + state_place + at_KV, grad_KV)


def invert(mix_BPHCC: Tensor) -> Tensor:
    """Return the inverse of identity plus what is below the diagonal; the rest is not read."""
    assert mix_BPHCC.shape[-1] == SIZE
    assert mix_BPHCC.is_contiguous()
    inverse_BPHCC = torch.empty_like(mix_BPHCC)
    with torch.cuda.device_of(mix_BPHCC):  # Triton launches on the current device
        _invert[(mix_BPHCC.shape[:-2].numel(),)](
            mix_BPHCC, inverse_BPHCC, SIZE=SIZE, num_warps=INVERT_WARPS, num_stages=1
        )
    return inverse_BPHCC


def _cut(rows: int, values: int) -> Columns:
    return MANY if rows * values >= ENOUGH * MANY.size and values >= MANY.size else FEW


def _options(state_BHKV: Tensor, columns: Columns) -> dict[str, int | str]:
    return {
        "HEADS": state_BHKV.shape[1],
        "SIZE": SIZE,
        "KEYS": state_BHKV.shape[2],
        "VALUES": state_BHKV.shape[3],
        "COLUMNS": columns.size,
        "SLICE": SLICE,
        "STAGES": STAGES,
        "PRECISION": "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee",
        "num_warps": columns.warps,
        "num_stages": 1,  # beyond a product nothing is loaded ahead: what one turn stores, the next loads
    }


def forward(
    solved_BPHCX: Tensor, into_BPHCK: Tensor, decay_BPH: Tensor, state_BHKV: Tensor, columns: Columns | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """What the chunks write [B, P, H, C, V], the state on entry to each [B, P, H, K, V] and the last one.

    All tensors are contiguous; `solved_BPHCX` holds u and behind it w.
    """
    rows, chunks, heads, size, _ = solved_BPHCX.shape
    keys, values = state_BHKV.shape[2:]
    columns = columns or _cut(rows * heads, values)
    written_BPHCV = solved_BPHCX.new_empty(rows, chunks, heads, size, values)
    entry_BPHKV = solved_BPHCX.new_empty(rows, chunks, heads, keys, values)
    end_BHKV = torch.empty_like(state_BHKV)
    with torch.cuda.device_of(solved_BPHCX):
        _forward[(rows * heads * (values // columns.size),)](
            solved_BPHCX, into_BPHCK, decay_BPH, state_BHKV, written_BPHCV, entry_BPHKV, end_BHKV, chunks,
            **_options(state_BHKV, columns),
        )  # fmt: skip
    return written_BPHCV, entry_BPHKV, end_BHKV


def backward(
    written_grad_BPHCV: Tensor,
    entry_grad_BPHKV: Tensor,
    end_grad_BHKV: Tensor,
    solved_BPHCX: Tensor,
    into_BPHCK: Tensor,
    decay_BPH: Tensor,
    written_BPHCV: Tensor,
    entry_BPHKV: Tensor,
    columns: Columns | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of what `forward` reads.

    The kernel goes back from chunk to chunk. The products that wait for nothing follow, for all chunks at once.
    """
    rows, chunks, heads, _, values = written_BPHCV.shape
    columns = columns or _cut(rows * heads, values)
    solved_grad_BPHCX, state_grad_BHKV = torch.empty_like(solved_BPHCX), torch.empty_like(end_grad_BHKV)
    after_grad_BPHKV = torch.empty_like(entry_BPHKV)
    parts = values // columns.size
    decay_grad_SBPH = decay_BPH.new_empty(parts, *decay_BPH.shape)
    with torch.cuda.device_of(solved_BPHCX):
        _backward[(rows * heads * parts,)](
            written_grad_BPHCV, entry_grad_BPHKV, end_grad_BHKV, solved_BPHCX, into_BPHCK, decay_BPH, entry_BPHKV,
            solved_grad_BPHCX, decay_grad_SBPH, after_grad_BPHKV, state_grad_BHKV, chunks, decay_BPH.numel(),
            **_options(end_grad_BHKV, columns),
        )  # fmt: skip
    u_grad, w_grad = solved_grad_BPHCX.flatten(0, 2).split([values, solved_BPHCX.shape[-1] - values], -1)
    torch.baddbmm(w_grad, u_grad, entry_BPHKV.flatten(0, 2).mT, beta=0, alpha=-1, out=w_grad)
    into_grad_BPHCK = written_BPHCV @ after_grad_BPHKV.mT
    return solved_grad_BPHCX, into_grad_BPHCK, decay_grad_SBPH.sum(0), state_grad_BHKV
