"""Products of the same rows with up to three matrices; the norm, the squared ReLU and the residual in one launch.

Two kernels. `_stream`, for a few rows, multiplies without matrix units: a program reads a few rows of a matrix from
end to end, and sums stay in its threads until the end. So there are many programs, and many loads under way. `_tiles`
is the usual product in tiles; for small tiles it cuts the depth in parts that groups of warps compute beside each
other, since a chain of small products would take longer than the loads. No sum goes through an atomic operation: the
order of additions is fixed.

The norm multiplies the sums at the end, since a program that has read its rows has also seen all their squares.

Where only some rows are wanted, a program of the first matrix that has none of them reads no weights. An early launch
looks twice: before it waits, when the mask may not be there yet, for what to prefetch; afterwards for the result. It
waits in any case, since the launch after it relies on that.

In a kernel, N are the outputs of a block, D is the part of the depth that a step reads.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from lepton.ops.heads import NORM_EPS


class Stream(NamedTuple):
    """How `_stream` splits its work."""

    outputs: int
    """Rows of a matrix that a program reads."""
    warps: int
    """Each reads 256 columns at a time."""
    steps: int
    """Most steps whose loads are under way at once."""


class Tile(NamedTuple):
    """How `_tiles` splits its work."""

    rows: int
    outputs: int
    depth: int
    """Columns that each part reads at a time."""
    parts: int
    """Parts of the depth that are summed beside each other; with more than one, one for each warp."""
    warps: int
    stages: int

    @property
    def norms(self) -> bool:
        """Whether it can apply the norm: not if its products are Hopper's asynchronous ones (WGMMA).

        The norm reads the inputs beside the product. For a load with such a second use, Triton reserves one buffer less
        than an asynchronous product needs, and the next load overwrites what the product still reads
        (triton-lang/triton#7110, in 3.6).
        """
        return self.parts > 1 or self.rows < 64 or self.warps < 4


# The tables of the kernels' sizes, for an H100 (132 multiprocessors).
MOST = 1 << 30
FEW: tuple[tuple[int, int, int, Stream | Tile], ...] = (
    (1, 4096, MOST, Stream(4, 1, 4)),
    (1, 2048, MOST, Stream(2, 1, 8)),
    (1, 0, MOST, Stream(1, 1, 3)),
    (8, 0, 1024, Tile(16, 8, 128, 2, 2, 4)),
    (8, 4096, MOST, Stream(4, 1, 4)),
    (8, 0, MOST, Stream(2, 4, 4)),
)
"""Most rows, least outputs of all matrices, most columns, and sizes for them: the first line that fits. A tile fits if
its parts divide the columns. If no line fits, `TILES`."""
TILES = (
    Tile(128, 64, 64, 1, 4, 4),
    Tile(64, 64, 64, 1, 4, 4),
    Tile(32, 64, 64, 1, 4, 4),
    Tile(32, 32, 64, 4, 4, 3),
    Tile(32, 16, 64, 4, 4, 3),
    Tile(16, 16, 64, 4, 4, 4),
)
"""The first that makes enough programs and has the norm if needed, else the last."""
ENOUGH = 96
"""Programs that are enough."""
TRIAL_ROWS = (1, 9, 512)
"""Numbers of rows that take each form of the kernels, for the trial."""
EARLY_ROWS = 16
"""Most rows with which a launch starts while the one before it ends (programmatic dependent launch, from Hopper on): it
then brings its weights into the L2 cache before it waits for its inputs. With more rows that takes longer."""


@triton.jit
def _reads(wanted_ptr, m, rows, is_first):
    """Whether a program reads its matrix: it is not the first, or one of its rows is wanted. L1 is passed by."""
    wanted_M = tl.load(wanted_ptr + m, mask=m < rows, other=0, volatile=True)
    return (tl.max(wanted_M.to(tl.int32), 0) > 0) | (is_first == 0)


@triton.jit
def _prefetch(w_ptr, first_output, outputs, OUTPUTS: tl.constexpr, DEPTH: tl.constexpr):
    """Bring the weights of a block into the L2 cache."""
    LINE: tl.constexpr = 128 // (w_ptr.dtype.element_ty.primitive_bitwidth // 8)
    LINES: tl.constexpr = (DEPTH + LINE - 1) // LINE
    n = tl.minimum(first_output + tl.arange(0, OUTPUTS), outputs - 1)
    for first in tl.static_range(0, LINES, 32):
        line = tl.minimum(first + tl.arange(0, 32), LINES - 1)
        at = n[:, None] * DEPTH + line[None, :] * LINE
        tl.inline_asm_elementwise(
            "prefetch.global.L2 [$1]; mov.b32 $0, 0;", "=r,l", [w_ptr + at], dtype=tl.int32, is_pure=False, pack=1
        )


@triton.jit
def _wait(
    w_ptr, first_output, outputs, wanted_ptr, m, rows, is_first,
    OUTPUTS: tl.constexpr, DEPTH: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Prefetch the weights that are likely to be read, then wait until earlier launches have ended."""
    if MASKED:
        if _reads(wanted_ptr, m, rows, is_first):
            _prefetch(w_ptr, first_output, outputs, OUTPUTS, DEPTH)
    else:
        _prefetch(w_ptr, first_output, outputs, OUTPUTS, DEPTH)
    gdc_wait()
    gdc_launch_dependents()


@triton.jit
def _matrix(
    block, w0_ptr, w1_ptr, w2_ptr, y0_ptr, y1_ptr, y2_ptr,
    N0: tl.constexpr, N1: tl.constexpr, N2: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The matrix of a block of outputs, where they go, how many there are, and the first of the block."""
    w_ptr, y_ptr, outputs = w0_ptr, y0_ptr, N0
    BLOCKS0: tl.constexpr = (N0 + BLOCK - 1) // BLOCK
    BLOCKS1: tl.constexpr = (N1 + BLOCK - 1) // BLOCK
    if N1 > 0 and block >= BLOCKS0:
        if N2 > 0 and block >= BLOCKS0 + BLOCKS1:
            w_ptr, y_ptr, outputs, block = w2_ptr, y2_ptr, N2, block - (BLOCKS0 + BLOCKS1)
        else:
            w_ptr, y_ptr, outputs, block = w1_ptr, y1_ptr, N1, block - BLOCKS0
    return w_ptr, y_ptr, outputs, block * BLOCK


@triton.jit
def _finish(
    y_MN, y_ptr, residual_ptr, table_ptr, row_ptr, wanted_ptr, m, n, rows, outputs, is_first, eps,
    N0: tl.constexpr, ADDED: tl.constexpr, SQUARED: tl.constexpr, RESIDUAL: tl.constexpr, NORMED_RESIDUAL: tl.constexpr,
    MASKED: tl.constexpr,
):  # fmt: skip
    """Round, apply what follows, and store."""
    place_MN = m.to(tl.int64)[:, None] * outputs + n[None, :]
    mask_MN = (m < rows)[:, None] & (n < outputs)[None, :]
    y_MN = y_MN.to(y_ptr.dtype.element_ty)
    if MASKED:
        wanted_M = (tl.load(wanted_ptr + m, mask=m < rows, other=0) != 0) | (is_first == 0)
        y_MN = tl.where(wanted_M[:, None], y_MN, 0.0)
    if ADDED:
        row_M = tl.load(row_ptr + m, mask=m < rows, other=0)
        added_MN = tl.load(table_ptr + row_M[:, None] * outputs + n[None, :], mask=mask_MN, other=0.0)
        y_MN = (y_MN.to(tl.float32) + added_MN.to(tl.float32)).to(y_ptr.dtype.element_ty)
    if SQUARED:
        positive_MN = tl.maximum(y_MN.to(tl.float32), 0.0)
        y_MN = (positive_MN * positive_MN).to(y_ptr.dtype.element_ty)
    if RESIDUAL:
        residual_MN = tl.load(residual_ptr + place_MN, mask=mask_MN, other=0.0)
        if NORMED_RESIDUAL:
            d = tl.arange(0, triton.next_power_of_2(N0))
            mask_MD = (m < rows)[:, None] & (d < N0)[None, :]
            whole_MD = tl.load(residual_ptr + m[:, None] * N0 + d[None, :], mask=mask_MD, other=0.0).to(tl.float32)
            scale_M = tl.rsqrt(tl.sum(whole_MD * whole_MD, 1) / N0 + eps)
            residual_MN = (residual_MN.to(tl.float32) * scale_M[:, None]).to(y_ptr.dtype.element_ty)
        y_MN = (residual_MN.to(tl.float32) + y_MN.to(tl.float32)).to(y_ptr.dtype.element_ty)
    tl.store(y_ptr + place_MN, y_MN, mask=mask_MN)


@triton.jit
def _stream(
    x_ptr, w0_ptr, w1_ptr, w2_ptr, y0_ptr, y1_ptr, y2_ptr, residual_ptr, table_ptr, row_ptr, wanted_ptr, rows, eps,
    N0: tl.constexpr, N1: tl.constexpr, N2: tl.constexpr, DEPTH: tl.constexpr,
    ROWS: tl.constexpr, OUTPUTS: tl.constexpr, LANES: tl.constexpr, UNROLL: tl.constexpr,
    NORMED: tl.constexpr, ADDED: tl.constexpr, SQUARED: tl.constexpr, RESIDUAL: tl.constexpr,
    NORMED_RESIDUAL: tl.constexpr, MASKED: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """A thread reads 8 neighbouring columns of all its rows in each step."""
    w_ptr, y_ptr, outputs, first_output = _matrix(
        tl.program_id(0), w0_ptr, w1_ptr, w2_ptr, y0_ptr, y1_ptr, y2_ptr, N0, N1, N2, OUTPUTS
    )
    m, n = tl.arange(0, ROWS), first_output + tl.arange(0, OUTPUTS)
    is_first = (tl.program_id(0) * OUTPUTS < N0).to(tl.int32)
    if EARLY:
        _wait(w_ptr, first_output, outputs, wanted_ptr, m, rows, is_first, OUTPUTS, DEPTH, MASKED)
    if MASKED:
        reads = _reads(wanted_ptr, m, rows, is_first)
        if not reads:
            y_MN = tl.zeros([ROWS, OUTPUTS], tl.float32)
            _finish(
                y_MN, y_ptr, residual_ptr, table_ptr, row_ptr, wanted_ptr, m, n, rows, outputs, is_first, eps,
                N0, ADDED, SQUARED, RESIDUAL, NORMED_RESIDUAL, MASKED,
            )  # fmt: skip
            return
    # [lanes, rows, outputs, 8]: the compiler gives each thread one lane of all the rest.
    d = tl.arange(0, LANES)[:, None, None, None] * 8 + tl.arange(0, 8)[None, None, None, :]
    # What is past the end is read twice, and not stored.
    x_at = tl.minimum(m, rows - 1)[None, :, None, None] * DEPTH + d
    w_at = tl.minimum(n, outputs - 1)[None, None, :, None] * DEPTH + d
    sums = tl.zeros([LANES, ROWS, OUTPUTS], tl.float32)
    squares = tl.zeros([LANES, ROWS, 1], tl.float32)
    for first in tl.range(0, DEPTH, LANES * 8, loop_unroll_factor=UNROLL):
        if DEPTH % (LANES * 8) == 0:
            w = tl.load(w_ptr + first + w_at)
            x = tl.load(x_ptr + first + x_at).to(tl.float32)
        else:
            w = tl.load(w_ptr + first + w_at, mask=first + d < DEPTH, other=0.0)
            x = tl.load(x_ptr + first + x_at, mask=first + d < DEPTH, other=0.0).to(tl.float32)
        sums += tl.sum(x * w.to(tl.float32), 3)
        if NORMED:
            squares += tl.sum(x * x, 3)
    y_MN = tl.sum(sums, 0)
    if NORMED:
        y_MN *= tl.rsqrt(tl.sum(squares, 0) / DEPTH + eps)
    _finish(
        y_MN, y_ptr, residual_ptr, table_ptr, row_ptr, wanted_ptr, m, n, rows, outputs, is_first, eps,
        N0, ADDED, SQUARED, RESIDUAL, NORMED_RESIDUAL, MASKED,
    )  # fmt: skip


@triton.jit
def _tiles(
    x_ptr, w0_ptr, w1_ptr, w2_ptr, y0_ptr, y1_ptr, y2_ptr, residual_ptr, table_ptr, row_ptr, wanted_ptr, rows, eps,
    N0: tl.constexpr, N1: tl.constexpr, N2: tl.constexpr, DEPTH: tl.constexpr,
    ROWS: tl.constexpr, OUTPUTS: tl.constexpr, STEP: tl.constexpr, PARTS: tl.constexpr,
    NORMED: tl.constexpr, ADDED: tl.constexpr, SQUARED: tl.constexpr, RESIDUAL: tl.constexpr,
    NORMED_RESIDUAL: tl.constexpr, MASKED: tl.constexpr, EARLY: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """A tile of outputs. With parts, each reads every `PARTS`-th step of the depth."""
    w_ptr, y_ptr, outputs, first_output = _matrix(
        tl.program_id(1), w0_ptr, w1_ptr, w2_ptr, y0_ptr, y1_ptr, y2_ptr, N0, N1, N2, OUTPUTS
    )
    m, n = tl.program_id(0) * ROWS + tl.arange(0, ROWS), first_output + tl.arange(0, OUTPUTS)
    is_first = (tl.program_id(1) * OUTPUTS < N0).to(tl.int32)
    if EARLY:
        _wait(w_ptr, first_output, outputs, wanted_ptr, m, rows, is_first, OUTPUTS, DEPTH, MASKED)
    if MASKED:
        reads = _reads(wanted_ptr, m, rows, is_first)
        if not reads:
            y_MN = tl.zeros([ROWS, OUTPUTS], tl.float32)
            _finish(
                y_MN, y_ptr, residual_ptr, table_ptr, row_ptr, wanted_ptr, m, n, rows, outputs, is_first, eps,
                N0, ADDED, SQUARED, RESIDUAL, NORMED_RESIDUAL, MASKED,
            )  # fmt: skip
            return
    w_row = tl.minimum(n, outputs - 1)  # what is past the end is read twice, and not stored
    WHOLE: tl.constexpr = DEPTH % (PARTS * STEP) == 0
    if PARTS == 1:
        d = tl.arange(0, STEP)
        x_at, w_at = m[:, None] * DEPTH + d[None, :], w_row[:, None] * DEPTH + d[None, :]
        y_MN = tl.zeros([ROWS, OUTPUTS], tl.float32)
        squares_M = tl.zeros([ROWS], tl.float32)
        for first in range(0, DEPTH, STEP):
            x_mask, w_mask = (m < rows)[:, None], None if WHOLE else first + d[None, :] < DEPTH
            x_mask = x_mask if WHOLE else x_mask & w_mask
            x_MD = tl.load(x_ptr + first + x_at, mask=x_mask, other=0.0)
            w_ND = tl.load(w_ptr + first + w_at, mask=w_mask, other=None if WHOLE else 0.0)
            y_MN = tl.dot(x_MD, tl.trans(w_ND), y_MN, input_precision=EXACT)
            if NORMED:
                squares_M += tl.sum(x_MD.to(tl.float32) * x_MD.to(tl.float32), 1)
    else:
        d = (tl.arange(0, PARTS)[:, None] * STEP + tl.arange(0, STEP)[None, :])[:, None, :]
        x_at, w_at = m[None, :, None] * DEPTH + d, w_row[None, :, None] * DEPTH + d
        parts = tl.zeros([PARTS, ROWS, OUTPUTS], tl.float32)
        squares = tl.zeros([PARTS, ROWS, ROWS], tl.float32)
        for first in range(0, DEPTH, PARTS * STEP):
            x_mask, w_mask = (m < rows)[None, :, None], None if WHOLE else first + d < DEPTH
            x_mask = x_mask if WHOLE else x_mask & w_mask
            x = tl.load(x_ptr + first + x_at, mask=x_mask, other=0.0)
            w = tl.load(w_ptr + first + w_at, mask=w_mask, other=None if WHOLE else 0.0)
            parts = tl.dot(x, tl.permute(w, (0, 2, 1)), parts, input_precision=EXACT)
            if NORMED:
                squares = tl.dot(x, tl.permute(x, (0, 2, 1)), squares, input_precision=EXACT)
        y_MN = tl.sum(parts, 0)
        if NORMED:
            # The product of the inputs with themselves has them on its diagonal, and costs less.
            r = tl.arange(0, ROWS)
            squares_M = tl.sum(tl.sum(tl.where(r[:, None] == r[None, :], squares, 0.0), 2), 0)
    if NORMED:
        y_MN *= tl.rsqrt(squares_M / DEPTH + eps)[:, None]
    _finish(
        y_MN, y_ptr, residual_ptr, table_ptr, row_ptr, wanted_ptr, m, n, rows, outputs, is_first, eps,
        N0, ADDED, SQUARED, RESIDUAL, NORMED_RESIDUAL, MASKED,
    )  # fmt: skip


def unroll_of(depth: int, stream: Stream) -> int:
    """Return how many steps of `_stream` are unrolled: a divisor of their number, so that none remains."""
    steps = triton.cdiv(depth, 256 * stream.warps)
    return max(each for each in range(1, stream.steps + 1) if steps % each == 0)


def sizes_of(rows: int, outputs: int, depth: int, normed: bool) -> Stream | Tile:
    """Return the kernel's sizes for so many rows, and matrices with so many outputs in all and so many columns."""
    for most_rows, least_outputs, most_depth, sizes in FEW:
        fits = isinstance(sizes, Stream) or depth % (sizes.depth * sizes.parts) == 0
        if fits and rows <= most_rows and outputs >= least_outputs and depth <= most_depth:
            return sizes
    for tile in TILES:
        programs = triton.cdiv(rows, tile.rows) * triton.cdiv(outputs, tile.outputs)
        if programs >= ENOUGH and (tile.norms or not normed):
            return tile
    return TILES[-1]


def starts_early(device: torch.device) -> bool:
    return device.type == "cuda" and torch.version.hip is None and torch.cuda.get_device_capability(device) >= (9, 0)


def products(
    x_MD: Tensor,
    weights: list[Tensor],
    residual: Tensor | None,
    normed: bool,
    squared_relu: bool,
    table: Tensor | None = None,
    row_M: Tensor | None = None,
    residual_normed: bool = False,
    wanted_M: Tensor | None = None,
) -> list[Tensor]:
    """As `plain_products` in `lepton/ops/products.py`, in one launch. All tensors are contiguous."""
    rows, depth = x_MD.shape
    assert all(weight.is_contiguous() and weight.dtype == x_MD.dtype for weight in weights)
    counts = [weight.shape[0] for weight in weights]
    outputs = [x_MD.new_empty(rows, count) for count in counts]
    absent = 3 - len(weights)
    given = (
        x_MD, *weights, *weights[:1] * absent, *outputs, *outputs[:1] * absent,
        outputs[0] if residual is None else residual, outputs[0] if table is None else table,
        outputs[0] if row_M is None else row_M, outputs[0] if wanted_M is None else wanted_M.view(torch.uint8),
        rows, NORM_EPS, *counts, *[0] * absent, depth,
    )  # fmt: skip
    early = rows <= EARLY_ROWS and starts_early(x_MD.device)
    flags = {"NORMED": normed, "ADDED": table is not None, "SQUARED": squared_relu, "RESIDUAL": residual is not None}
    flags |= {"NORMED_RESIDUAL": residual_normed, "MASKED": wanted_M is not None, "EARLY": early}
    if early:
        flags["launch_pdl"] = True
    sizes = sizes_of(rows, sum(counts), depth, normed)
    blocks = sum(triton.cdiv(count, sizes.outputs) for count in counts)
    with torch.cuda.device_of(x_MD):  # Triton launches on the current device
        if isinstance(sizes, Stream):
            _stream[(blocks,)](
                *given, ROWS=triton.next_power_of_2(rows), OUTPUTS=sizes.outputs, LANES=32 * sizes.warps,
                UNROLL=unroll_of(depth, sizes), num_warps=sizes.warps, **flags,
            )  # fmt: skip
        else:
            assert sizes.norms or not normed
            _tiles[(triton.cdiv(rows, sizes.rows), blocks)](
                *given, ROWS=sizes.rows, OUTPUTS=sizes.outputs, STEP=sizes.depth, PARTS=sizes.parts,
                EXACT="ieee" if x_MD.dtype == torch.float32 else "tf32", num_warps=sizes.warps,
                num_stages=sizes.stages, **flags,
            )  # fmt: skip
    return outputs
