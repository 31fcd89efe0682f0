"""Matrix products of a block with few tokens, with the norm before them and what follows them in the same launch.

In a decode step a block is bound by memory and by the number of launches. `products` reads each weight once, from
where it is, and leaves no launch between the norm and the squared ReLU or the residual stream. `plain_products` is the
same in PyTorch.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from lepton.ops.heads import norm
from lepton.ops.kernels import HALF, Kernel

MOST_ROWS = 128
"""With more rows PyTorch's products are faster, and the launches between them cost little."""
NORMING_ROWS = 8
"""Most rows whose residual the kernel norms: each of its programs reads it whole."""


class Added(NamedTuple):
    """Rows of a table, one for each row of a product."""

    table: Tensor
    """[any number, outputs], in the dtype of the product."""
    row_M: Tensor
    """int64, the index of each row."""


def products(
    x: Tensor,
    weights: Sequence[Tensor],
    *,
    normed: bool = False,
    added: Added | None = None,
    squared_relu: bool = False,
    residual: Tensor | None = None,
    residual_normed: bool = False,
    wanted_M: Tensor | None = None,
) -> list[Tensor]:
    """Return the products of the same rows with one to three matrices: ``f(norm(x) @ weight.T + added) + residual``.

    On a GPU in half precision it is one launch, for at most `MOST_ROWS` rows. There the result is the same in each
    call, and that of a row does not depend on the other rows. It may differ in rounding where a call has more rows, and
    from `plain_products`: the kernel applies the norm to the sums, not to the inputs. It has no gradient, and neither
    copies nor synchronises, so it can be captured in a CUDA graph after a first call that builds the kernel.

    Args:
        x: inputs [M, D] of any width D.
        weights: matrices [outputs, D] in the dtype of `x`, contiguous; one to three of them.
        normed: whether the inputs are normed first, as by `heads.norm`.
        added: rows of a table that are added to the product; only with one matrix.
        squared_relu: whether f is ``relu(y) ** 2``; else it is y.
        residual: added to the result [M, outputs]; only with one matrix.
        residual_normed: whether the residual is normed first.
        wanted_M: bool, the rows whose product with the first matrix is wanted; that of the others is 0, whatever their
            inputs are. Where no row of a tile is wanted, the kernel does not read the matrix.

    Returns:
        A new tensor [M, outputs] for each matrix.
    """
    assert (residual is None and added is None) or len(weights) == 1
    if x.shape[0] <= MOST_ROWS and PRODUCTS.works(x.device, x.dtype):
        if residual is not None and residual_normed and x.shape[0] > NORMING_ROWS:
            residual, residual_normed = norm(residual), False
        table, row_M = (None, None) if added is None else added
        return _products(x, list(weights), residual, normed, squared_relu, table, row_M, residual_normed, wanted_M)
    return plain_products(
        x,
        weights,
        normed=normed,
        added=added,
        squared_relu=squared_relu,
        residual=residual,
        residual_normed=residual_normed,
        wanted_M=wanted_M,
    )


def plain_products(
    x: Tensor,
    weights: Sequence[Tensor],
    *,
    normed: bool = False,
    added: Added | None = None,
    squared_relu: bool = False,
    residual: Tensor | None = None,
    residual_normed: bool = False,
    wanted_M: Tensor | None = None,
) -> list[Tensor]:
    """As `products`, in PyTorch."""
    x = norm(x) if normed else x
    outputs = [F.linear(x, weight) for weight in weights]
    if wanted_M is not None:
        outputs[0] = torch.where(wanted_M[:, None], outputs[0], 0)
    if added is not None:
        outputs = [outputs[0] + added.table.index_select(0, added.row_M)]
    if squared_relu:
        outputs = [F.relu(y).square() for y in outputs]
    if residual is None:
        return outputs
    return [(norm(residual) if residual_normed else residual) + outputs[0]]


def _trial(device: torch.device, dtype: torch.dtype) -> None:
    from lepton.ops.triton.products import TRIAL_ROWS

    weight = torch.zeros(1536, 256, dtype=dtype, device=device)
    for rows in TRIAL_ROWS:
        x = weight.new_zeros(rows, 256)
        _products(x, [weight, weight], None, True, True)
        table, row_M = x.new_zeros(2, 1536), torch.ones(rows, dtype=torch.int64, device=device)
        _products(x, [weight], x.new_zeros(rows, 1536), False, False, table, row_M, rows <= NORMING_ROWS, row_M > 0)


PRODUCTS = Kernel("decoding", HALF, _trial)
"""`PRODUCTS.works(device, dtype)`."""


@torch.library.custom_op("lepton::products", mutates_args=())
def _products(
    x: Tensor,
    weights: list[Tensor],
    residual: Tensor | None,
    normed: bool,
    squared_relu: bool,
    table: Tensor | None = None,
    row_M: Tensor | None = None,
    residual_normed: bool = False,
    wanted_M: Tensor | None = None,
) -> list[Tensor]:
    from lepton.ops.triton import products as kernels

    residual, wanted_M = (None if each is None else each.contiguous() for each in (residual, wanted_M))
    more = (table, row_M, residual_normed, wanted_M)
    return kernels.products(x.contiguous(), weights, residual, normed, squared_relu, *more)


@_products.register_fake
def _(x: Tensor, weights: list[Tensor], *_: Any) -> list[Tensor]:
    return [x.new_empty(x.shape[0], weight.shape[0]) for weight in weights]


@register_flop_formula(torch.ops.lepton.products)
def _flops(x: Any, weights: Any, *args: Any, out_shape: Any = None, **_: Any) -> int:
    return int(2 * x[0] * x[1] * sum(weight[0] for weight in weights))
