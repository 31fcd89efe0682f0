"""The sequential parts of the gated delta rule: the triangular solve within a chunk, and the recurrence over chunks.

All tensors are fp32, because the state is a sum over the whole past. The products of the recurrence have the precision
of `torch.backends.cuda.matmul.fp32_precision`. A kernel's program computes a block of the values (`Columns`): in a
kernel U is the width of that block.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

SIZE = 64
"""Tokens per chunk (O)."""
SLICE = 16
"""Terms of a matrix product that are loaded at a time, so that both factors fit into registers. 64 spill on an H100."""
STAGES = 5
"""Pipeline stages: all slices of 64 terms, and one more, so that a product waits for memory once."""
INVERT_WARPS = 2


class Columns(NamedTuple):
    """How a kernel splits the values, which do not depend on each other."""

    size: int
    """Values per program."""
    warps: int


MANY = Columns(32, 4)
FEW = Columns(16, 4)
"""For few rows: with `MANY` there would be too few programs for a GPU (132 multiprocessors in an H100)."""
ENOUGH = 256
"""Programs from which on `MANY` is used."""


@triton.jit
def _row(inverse, block_ptr, i, SIZE: tl.constexpr):
    """Compute row `i` of the inverse of a 16 x 16 block, without the identity, from the rows before it."""
    r = tl.arange(0, 16)
    mix = tl.load(block_ptr + i * SIZE + r, mask=r < i, other=0.0)
    row = -mix - tl.sum(mix[:, None] * inverse, 0)
    return tl.where((r == i)[:, None], row[None, :], inverse)


@triton.jit
def _invert(mix_ptr, inverse_ptr, SIZE: tl.constexpr):
    """Invert identity + mix in 16 x 16 blocks: on the diagonal by substitution, below it by matrix products.

    Block (i, j) of the inverse is -D_i times the sum over j <= l < i of mix (i, l) times inverse (l, j), where D_i is
    the inverse's block on the diagonal.
    """
    place = tl.program_id(0).to(tl.int64) * SIZE * SIZE
    mix_ptr += place
    inverse_ptr += place
    r = tl.arange(0, 16)
    at = r[:, None] * SIZE + r[None, :]
    DOWN: tl.constexpr = 16 * SIZE
    zero = tl.zeros([16, 16], tl.float32)
    x00, x11, x22, x33 = zero, zero, zero, zero
    for i in range(1, 16):
        x00 = _row(x00, mix_ptr, i, SIZE)
        x11 = _row(x11, mix_ptr + DOWN + 16, i, SIZE)
        x22 = _row(x22, mix_ptr + 2 * DOWN + 32, i, SIZE)
        x33 = _row(x33, mix_ptr + 3 * DOWN + 48, i, SIZE)
    one = tl.where(r[:, None] == r[None, :], 1.0, 0.0)
    x00 += one
    x11 += one
    x22 += one
    x33 += one
    m10 = tl.load(mix_ptr + DOWN + at)
    m20 = tl.load(mix_ptr + 2 * DOWN + at)
    m21 = tl.load(mix_ptr + 2 * DOWN + 16 + at)
    m30 = tl.load(mix_ptr + 3 * DOWN + at)
    m31 = tl.load(mix_ptr + 3 * DOWN + 16 + at)
    m32 = tl.load(mix_ptr + 3 * DOWN + 32 + at)
    x10 = -tl.dot(x11, tl.dot(m10, x00, input_precision="ieee"), input_precision="ieee")
    x21 = -tl.dot(x22, tl.dot(m21, x11, input_precision="ieee"), input_precision="ieee")
    x32 = -tl.dot(x33, tl.dot(m32, x22, input_precision="ieee"), input_precision="ieee")
    total = tl.dot(m21, x10, tl.dot(m20, x00, input_precision="ieee"), input_precision="ieee")
    x20 = -tl.dot(x22, total, input_precision="ieee")
    total = tl.dot(m32, x21, tl.dot(m31, x11, input_precision="ieee"), input_precision="ieee")
    x31 = -tl.dot(x33, total, input_precision="ieee")
    total = tl.dot(m31, x10, tl.dot(m30, x00, input_precision="ieee"), input_precision="ieee")
    total = tl.dot(m32, x20, total, input_precision="ieee")
    x30 = -tl.dot(x33, total, input_precision="ieee")
    tl.store(inverse_ptr + at, x00)
    tl.store(inverse_ptr + 16 + at, zero)
    tl.store(inverse_ptr + 32 + at, zero)
    tl.store(inverse_ptr + 48 + at, zero)
    tl.store(inverse_ptr + DOWN + at, x10)
    tl.store(inverse_ptr + DOWN + 16 + at, x11)
    tl.store(inverse_ptr + DOWN + 32 + at, zero)
    tl.store(inverse_ptr + DOWN + 48 + at, zero)
    tl.store(inverse_ptr + 2 * DOWN + at, x20)
    tl.store(inverse_ptr + 2 * DOWN + 16 + at, x21)
    tl.store(inverse_ptr + 2 * DOWN + 32 + at, x22)
    tl.store(inverse_ptr + 2 * DOWN + 48 + at, zero)
    tl.store(inverse_ptr + 3 * DOWN + at, x30)
    tl.store(inverse_ptr + 3 * DOWN + 16 + at, x31)
    tl.store(inverse_ptr + 3 * DOWN + 32 + at, x32)
    tl.store(inverse_ptr + 3 * DOWN + 48 + at, x33)


@triton.jit
def _forward(
    solved_ptr, into_ptr, decay_ptr, state_ptr, written_ptr, entry_ptr, end_ptr, chunks,
    HEADS: tl.constexpr, SIZE: tl.constexpr, KEYS: tl.constexpr, VALUES: tl.constexpr, COLUMNS: tl.constexpr,
    SLICE: tl.constexpr, STAGES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The recurrence. Registers cannot be indexed, so slices of the state are loaded from where it has been stored."""
    row, part = tl.program_id(0) // (VALUES // COLUMNS), tl.program_id(0) % (VALUES // COLUMNS)
    batch, head = row // HEADS, row % HEADS
    c, key, s = tl.arange(0, SIZE), tl.arange(0, KEYS), tl.arange(0, SLICE)
    v = part * COLUMNS + tl.arange(0, COLUMNS)
    WIDTH: tl.constexpr = VALUES + KEYS
    at_HU = key[:, None] * VALUES + v[None, :]
    at_slice = s[:, None] * VALUES + v[None, :]
    state_HU = tl.load(state_ptr + row.to(tl.int64) * (KEYS * VALUES) + at_HU)
    for p in range(chunks):
        place = (batch.to(tl.int64) * chunks + p) * HEADS + head
        solved_place = solved_ptr + place * (SIZE * WIDTH) + c[:, None] * WIDTH
        into_place = into_ptr + place * (SIZE * KEYS) + s[:, None] * KEYS + key[None, :]
        entry_place = entry_ptr + place * (KEYS * VALUES)
        written_place = written_ptr + place * (SIZE * VALUES)
        tl.store(entry_place + at_HU, state_HU)
        less_OU = -tl.load(solved_place + v[None, :])
        tl.debug_barrier()  # wait until all threads have stored what others load
        for first in tl.range(0, KEYS, SLICE, num_stages=STAGES):
            w_slice = tl.load(solved_place + VALUES + first + s[None, :])
            state_slice = tl.load(entry_place + first * VALUES + at_slice)
            less_OU = tl.dot(w_slice, state_slice, less_OU, input_precision=PRECISION)
        tl.store(written_place + c[:, None] * VALUES + v[None, :], -less_OU)
        state_HU *= tl.load(decay_ptr + place)
        tl.debug_barrier()
        for first in tl.range(0, SIZE, SLICE, num_stages=STAGES):
            into_slice = tl.load(into_place + first * KEYS)
            written_slice = tl.load(written_place + first * VALUES + at_slice)
            state_HU = tl.dot(tl.trans(into_slice), written_slice, state_HU, input_precision=PRECISION)
    tl.store(end_ptr + row.to(tl.int64) * (KEYS * VALUES) + at_HU, state_HU)


@triton.jit
def _backward(
    written_grad_ptr, entry_grad_ptr, end_grad_ptr, solved_ptr, into_ptr, decay_ptr, entry_ptr,
    solved_grad_ptr, decay_grad_ptr, after_grad_ptr, state_grad_ptr, chunks, places,
    HEADS: tl.constexpr, SIZE: tl.constexpr, KEYS: tl.constexpr, VALUES: tl.constexpr, COLUMNS: tl.constexpr,
    SLICE: tl.constexpr, STAGES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradients of u, of the states after each chunk and before the first, and this program's part of the decays'."""
    row, part = tl.program_id(0) // (VALUES // COLUMNS), tl.program_id(0) % (VALUES // COLUMNS)
    batch, head = row // HEADS, row % HEADS
    c, key, s = tl.arange(0, SIZE), tl.arange(0, KEYS), tl.arange(0, SLICE)
    v = part * COLUMNS + tl.arange(0, COLUMNS)
    WIDTH: tl.constexpr = VALUES + KEYS
    at_HU = key[:, None] * VALUES + v[None, :]
    at_slice = s[:, None] * VALUES + v[None, :]
    state_place = row.to(tl.int64) * (KEYS * VALUES)
    grad_HU = tl.load(end_grad_ptr + state_place + at_HU)
    for turn in range(chunks):
        place = (batch.to(tl.int64) * chunks + (chunks - 1 - turn)) * HEADS + head
        at_state = place * (KEYS * VALUES)
        at_solved = place * (SIZE * WIDTH)
        into_place = into_ptr + place * (SIZE * KEYS) + c[:, None] * KEYS
        w_place = solved_ptr + at_solved + VALUES + s[:, None] * WIDTH + key[None, :]
        u_grad_place = solved_grad_ptr + at_solved + v[None, :]
        tl.store(after_grad_ptr + at_state + at_HU, grad_HU)
        entry_HU = tl.load(entry_ptr + at_state + at_HU)
        tl.store(decay_grad_ptr + part.to(tl.int64) * places + place, tl.sum(tl.sum(entry_HU * grad_HU, 1), 0))
        u_grad_OU = tl.load(written_grad_ptr + place * (SIZE * VALUES) + c[:, None] * VALUES + v[None, :])
        tl.debug_barrier()  # wait until all threads have stored what others load
        for first in tl.range(0, KEYS, SLICE, num_stages=STAGES):
            into_slice = tl.load(into_place + first + s[None, :])
            grad_slice = tl.load(after_grad_ptr + at_state + first * VALUES + at_slice)
            u_grad_OU = tl.dot(into_slice, grad_slice, u_grad_OU, input_precision=PRECISION)
        tl.store(u_grad_place + c[:, None] * WIDTH, u_grad_OU)
        less_HU = -(grad_HU * tl.load(decay_ptr + place) + tl.load(entry_grad_ptr + at_state + at_HU))
        tl.debug_barrier()
        for first in tl.range(0, SIZE, SLICE, num_stages=STAGES):
            w_slice = tl.load(w_place + first * WIDTH)
            u_grad_slice = tl.load(u_grad_place + (first + s[:, None]) * WIDTH)
            less_HU = tl.dot(tl.trans(w_slice), u_grad_slice, less_HU, input_precision=PRECISION)
        grad_HU = -less_HU
    tl.store(state_grad_ptr + state_place + at_HU, grad_HU)


def invert(mix_BPNOO: Tensor) -> Tensor:
    """Return the inverse of identity + mix; only what is below the diagonal of mix is read."""
    assert mix_BPNOO.shape[-1] == SIZE
    assert mix_BPNOO.is_contiguous()
    inverse_BPNOO = torch.empty_like(mix_BPNOO)
    with torch.cuda.device_of(mix_BPNOO):  # Triton launches on the current device
        _invert[(mix_BPNOO.shape[:-2].numel(),)](
            mix_BPNOO, inverse_BPNOO, SIZE=SIZE, num_warps=INVERT_WARPS, num_stages=1
        )
    return inverse_BPNOO


def _cut(rows: int, values: int) -> Columns:
    return MANY if rows * values >= ENOUGH * MANY.size and values >= MANY.size else FEW


def _options(state_BNHU: Tensor, columns: Columns) -> dict[str, int | str]:
    return {
        "HEADS": state_BNHU.shape[1],
        "SIZE": SIZE,
        "KEYS": state_BNHU.shape[2],
        "VALUES": state_BNHU.shape[3],
        "COLUMNS": columns.size,
        "SLICE": SLICE,
        "STAGES": STAGES,
        "PRECISION": "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee",
        "num_warps": columns.warps,
        "num_stages": 1,  # no loads ahead of the loop over chunks, which loads what it stored
    }


def forward(
    solved: Tensor, into_BPNOH: Tensor, decay_BPN: Tensor, state_BNHU: Tensor, columns: Columns | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Return what each chunk writes, the state before each, and the state after the last.

    All tensors are contiguous; `solved` is [B, P, N, O, U + H], u and then w.
    """
    rows, chunks, heads, size, _ = solved.shape
    keys, values = state_BNHU.shape[2:]
    columns = columns or _cut(rows * heads, values)
    written_BPNOU = solved.new_empty(rows, chunks, heads, size, values)
    entry_BPNHU = solved.new_empty(rows, chunks, heads, keys, values)
    end_BNHU = torch.empty_like(state_BNHU)
    with torch.cuda.device_of(solved):
        _forward[(rows * heads * (values // columns.size),)](
            solved, into_BPNOH, decay_BPN, state_BNHU, written_BPNOU, entry_BPNHU, end_BNHU, chunks,
            **_options(state_BNHU, columns),
        )  # fmt: skip
    return written_BPNOU, entry_BPNHU, end_BNHU


def backward(
    written_grad_BPNOU: Tensor,
    entry_grad_BPNHU: Tensor,
    end_grad_BNHU: Tensor,
    solved: Tensor,
    into_BPNOH: Tensor,
    decay_BPN: Tensor,
    written_BPNOU: Tensor,
    entry_BPNHU: Tensor,
    columns: Columns | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of the inputs of `forward`.

    The kernel runs backwards over the chunks. Products that need no recurrence follow for all chunks at once.
    """
    rows, chunks, heads, _, values = written_BPNOU.shape
    columns = columns or _cut(rows * heads, values)
    solved_grad, state_grad_BNHU = torch.empty_like(solved), torch.empty_like(end_grad_BNHU)
    after_grad_BPNHU = torch.empty_like(entry_BPNHU)
    parts = values // columns.size
    decay_grads = decay_BPN.new_empty(parts, *decay_BPN.shape)
    with torch.cuda.device_of(solved):
        _backward[(rows * heads * parts,)](
            written_grad_BPNOU, entry_grad_BPNHU, end_grad_BNHU, solved, into_BPNOH, decay_BPN, entry_BPNHU,
            solved_grad, decay_grads, after_grad_BPNHU, state_grad_BNHU, chunks, decay_BPN.numel(),
            **_options(end_grad_BNHU, columns),
        )  # fmt: skip
    u_grad, w_grad = solved_grad.flatten(0, 2).split([values, solved.shape[-1] - values], -1)
    torch.baddbmm(w_grad, u_grad, entry_BPNHU.flatten(0, 2).mT, beta=0, alpha=-1, out=w_grad)
    into_grad_BPNOH = written_BPNOU @ after_grad_BPNHU.mT
    return solved_grad, into_grad_BPNOH, decay_grads.sum(0), state_grad_BNHU
