"""Cross-entropy of the next token without the logits of all positions.

The head's product, the softmax and their gradients are computed for a chunk of positions at a time, in one
pass: the gradient of a chunk's logits is known as soon as the logits are, so nothing of size positions x vocabulary
is ever kept (the idea of Liger Kernel's fused linear cross-entropy). What happens between a chunk's products is
`plain_chunk`, or in half precision on a GPU a Triton kernel. `naive_linear_cross_entropy` says what both compute.

Shapes: M positions, C positions of a chunk, V rows of the vocabulary with padding, D width.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from lepton.ops.kernels import HALF, Kernel

IGNORE = -100
"""The target of a position that predicts nothing."""
CHUNK_CPU = 512
"""Positions a pass on a CPU: each pass adds to the gradient of the whole vocabulary."""
ENTRIES_CPU = 1 << 20
"""Logits between two products at once on a CPU: in fp32 and twice, they stay in the caches."""
ENTRIES_GPU = 1 << 28
"""Logits a pass on a GPU: 1 GiB of them in fp32, enough that launching costs nothing beside computing."""
MULTIPLE_GPU = 128
"""Positions a pass on a GPU are a multiple of this, the tiles of its matrix products."""
Z_WEIGHT = 1e-4

Chunk: TypeAlias = Callable[
    [Tensor, Tensor, Tensor, int, float, float, bool],
    tuple[Tensor, Tensor],
]
"""What happens between the two products of a chunk; `plain_chunk` says what goes in and comes out."""


class _Options(NamedTuple):
    """Numbers of a loss, and the gradients that are wanted: of the head's inputs, and of its weights."""

    vocab_size: int
    cap: float
    z_weight: float
    grads: bool
    weight_grads: bool


def soft_cap(logits: Tensor, cap: float) -> Tensor:
    """Squeeze logits smoothly into (-cap, cap) (Gemma 2)."""
    return cap * torch.tanh(logits / cap)


def linear_cross_entropy(
    x_MD: Tensor, weight_VD: Tensor, target_M: Tensor, *, vocab_size: int, cap: float, z_weight: float = Z_WEIGHT
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Mean cross-entropy of ``soft_cap(x @ weight.T)`` with z-loss, without keeping the logits.

    Args:
        x_MD: head inputs, any float dtype; the products run in it, softmax and sums in fp32 or better.
        weight_VD: embedding rows; those beyond `vocab_size` are padding and get no probability.
        target_M: int64 ids, `IGNORE` where there is nothing to predict.
        vocab_size: rows of `weight_VD` that are real tokens.
        cap: soft cap of the logits.
        z_weight: weight of the mean squared log-normaliser (PaLM).

    Returns:
        The differentiable loss; detached, the mean cross-entropy, the z term, and the nats of each position [M], 0
        where there is nothing to predict.
    """
    weight_grads = torch.is_grad_enabled() and weight_VD.requires_grad
    grads = (torch.is_grad_enabled() and x_MD.requires_grad) or weight_grads
    options = _Options(vocab_size, cap, z_weight, grads, weight_grads)
    in_kernel = CROSS_ENTROPY.works(x_MD.device, x_MD.dtype)
    return _LinearCrossEntropy.apply(x_MD, weight_VD, target_M, in_kernel, *options)


def naive_linear_cross_entropy(
    x_MD: Tensor, weight_VD: Tensor, target_M: Tensor, *, vocab_size: int, cap: float, z_weight: float = Z_WEIGHT
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As `linear_cross_entropy`, with the logits of all positions in memory; a slow reference."""
    logits_MV = soft_cap(x_MD @ weight_VD[:vocab_size].T, cap)
    nats_M = F.cross_entropy(logits_MV, target_M, ignore_index=IGNORE, reduction="none")
    ce = nats_M.sum() / (target_M != IGNORE).sum()
    z = logits_MV.logsumexp(-1)[target_M != IGNORE].square().mean()
    return ce + z_weight * z, ce, z, nats_M


def plain_chunk(
    raw_OV: Tensor, target_O: Tensor, count: Tensor, vocab_size: int, cap: float, z_weight: float, grads: bool
) -> tuple[Tensor, Tensor]:
    """Losses of a chunk's rows; overwrites `raw_OV` with its gradient if `grads`.

    Returns:
        Nats and the squared log-normaliser of each position, 0 where there is nothing to predict. The gradient is that
        of the mean loss of `count` valid positions.
    """
    precise = torch.promote_types(raw_OV.dtype, torch.float32)
    valid_O = (target_O != IGNORE).to(precise)
    label_O1 = target_O.clamp(min=0)[:, None]
    share_O1 = (4 * valid_O / count)[:, None]  # the derivative of tanh is 4 w (1 - w)
    at_once = max(1, ENTRIES_CPU // raw_OV.shape[1]) if raw_OV.device.type == "cpu" else len(raw_OV)
    lse, lead = [], []
    parts = (each.split(at_once) for each in (raw_OV, label_O1, share_O1))
    for some_RV, label_R1, share_R1 in zip(*parts, strict=True):
        # These passes are the cost on a CPU, where a sigmoid is much cheaper than a tanh and a softmax than an
        # exponential: with w = sigmoid(-2 raw / cap), tanh(raw / cap) = 1 - 2 w.
        w_RV = some_RV.to(precise).mul_(-2 / cap).sigmoid_()
        capped_RV = w_RV * (-2 * cap)  # less the cap itself, which is in every logit
        capped_RV[:, vocab_size:] = float("-inf")
        p_RV = capped_RV.softmax(-1)
        lse_R1 = capped_RV.amax(-1, keepdim=True) - p_RV.amax(-1, keepdim=True).log()
        lse.append(lse_R1)
        lead.append(capped_RV.gather(1, label_R1))
        if grads:
            grad_RV = p_RV.mul_((1 + 2 * z_weight * (lse_R1 + cap)) * share_R1)
            grad_RV.scatter_add_(1, label_R1, -share_R1)
            some_RV.copy_(grad_RV.mul_(w_RV.addcmul_(w_RV, w_RV, value=-1)))
    lse_O, lead_O = torch.cat(lse)[:, 0], torch.cat(lead)[:, 0]
    return (lse_O - lead_O) * valid_O, (lse_O + cap).square() * valid_O


def _chunk_size(x_MD: Tensor, rows: int) -> int:
    """Positions a pass: on a GPU the fewest passes that `ENTRIES_GPU` allows, of about the same size."""
    if x_MD.device.type == "cpu":
        return CHUNK_CPU
    tiles = max(1, -(-x_MD.shape[0] // MULTIPLE_GPU))
    most = max(1, ENTRIES_GPU // (rows * MULTIPLE_GPU))
    passes = -(-tiles // most)
    return MULTIPLE_GPU * -(-tiles // passes)


def _in_chunks(
    chunk: Chunk,
    x_MD: Tensor,
    weight_VD: Tensor,
    target_M: Tensor,
    count: Tensor,
    options: _Options,
    accumulates: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Nats and squared log-normaliser of each position; then the gradients, empty where they are not wanted.

    With `accumulates`, products of half precision add themselves to the head's gradient, as `_accumulate` says.
    """
    grads, weight_grads = options.grads, options.weight_grads
    precise = torch.promote_types(x_MD.dtype, torch.float32)
    matrix_VD = weight_VD.to(x_MD.dtype)
    nats_M = torch.empty(len(x_MD), dtype=precise, device=x_MD.device)
    squares_M = torch.empty_like(nats_M)
    dx_MD = torch.empty_like(x_MD) if grads else x_MD.new_empty(0)
    accumulates &= len(x_MD) > 0  # or nothing would write to it
    start = torch.empty_like if accumulates else torch.zeros_like
    dweight_VD = start(weight_VD, dtype=precise) if weight_grads else nats_M.new_empty(0)
    size = _chunk_size(x_MD, len(weight_VD))
    for first in range(0, len(x_MD), size):
        rows = slice(first, first + size)
        x_OD = x_MD[rows]
        raw_OV = x_OD @ matrix_VD.T
        nats_M[rows], squares_M[rows] = chunk(raw_OV, target_M[rows], count, *options[:4])
        if grads:  # the logits have become their gradients
            dx_MD[rows] = raw_OV @ matrix_VD
        if weight_grads and accumulates:
            _accumulate(dweight_VD, raw_OV.T, x_OD, fresh=first == 0)
        elif weight_grads:
            dweight_VD += raw_OV.T @ x_OD
        del raw_OV  # before the next chunk's logits are made
    return nats_M, squares_M, dx_MD, dweight_VD


def _accumulate(total_VD: Tensor, one_VO: Tensor, other_OD: Tensor, *, fresh: bool) -> None:
    """Add a product of matrices in half precision to a sum in fp32, or start the sum with it if `fresh`.

    The product is never rounded, and never stored beside the sum: for a whole vocabulary, adding it takes longer than
    a small chunk's product does.
    """
    torch.addmm(total_VD, one_VO, other_OD, out_dtype=total_VD.dtype, beta=0 if fresh else 1, out=total_VD)


@functools.cache
def _accumulates(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether `_accumulate` is right here, by a trial: it is for CUDA alone, and not for every version and device."""
    if device.type != "cuda":
        return False
    total = torch.full((16, 16), torch.nan, device=device)
    ones = torch.ones(16, 16, dtype=dtype, device=device)
    try:
        for fresh in (True, False):
            _accumulate(total, ones.T, ones, fresh=fresh)
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, TypeError):  # cannot be computed here; no such argument
        return False
    return bool((total == 32).all())


def _kernel_chunk() -> Chunk:
    from lepton.ops.triton.cross_entropy import fused_chunk

    return functools.partial(fused_chunk, ignore=IGNORE)


def _trial(device: torch.device, dtype: torch.dtype) -> None:
    raw_OV = torch.zeros(1, 16, dtype=dtype, device=device)
    zero, one = (torch.full((1,), value, device=device) for value in (0, 1))
    _kernel_chunk()(raw_OV, zero, one, 16, 15.0, 0.0, True)


CROSS_ENTROPY = Kernel("the loss", HALF, _trial)


@torch.library.custom_op("lepton::in_kernel_chunks", mutates_args=())
def _in_kernel_chunks(
    x_MD: Tensor,
    weight_VD: Tensor,
    target_M: Tensor,
    count: Tensor,
    vocab_size: int,
    cap: float,
    z_weight: float,
    grads: bool,
    weight_grads: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`_in_chunks` with the kernel. One operator, so that a compiled model calls it as it is: the kernel works in
    place, and a compiler that cannot see that nobody else reads the logits would copy them."""
    options = _Options(vocab_size, cap, z_weight, grads, weight_grads)
    accumulates = weight_grads and _accumulates(x_MD.device, x_MD.dtype)
    return _in_chunks(_kernel_chunk(), x_MD, weight_VD, target_M, count, options, accumulates)


@_in_kernel_chunks.register_fake
def _(x_MD: Tensor, weight_VD: Tensor, *options: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    *_, grads, weight_grads = options
    precise = torch.promote_types(x_MD.dtype, torch.float32)
    nats_M = x_MD.new_empty(len(x_MD), dtype=precise)
    dx_MD = torch.empty_like(x_MD) if grads else x_MD.new_empty(0)
    dweight_VD = torch.empty_like(weight_VD, dtype=precise) if weight_grads else nats_M.new_empty(0)
    return nats_M, torch.empty_like(nats_M), dx_MD, dweight_VD


@register_flop_formula(torch.ops.lepton.in_kernel_chunks)
def _flops(x: Any, weight: Any, *args: Any, out_shape: Any = None, **_: Any) -> int:
    """The products of a pass: logits, and each gradient that is wanted."""
    return 2 * x[0] * x[1] * weight[0] * (1 + args[-2] + args[-1])


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x_MD: Tensor, weight_VD: Tensor, target_M: Tensor, in_kernel: bool, *options: Any
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        count = (target_M != IGNORE).sum().clamp(min=1)
        given = (x_MD, weight_VD, target_M, count)
        if in_kernel:
            nats_M, squares_M, dx_MD, dweight_VD = _in_kernel_chunks(*given, *options)
        else:
            nats_M, squares_M, dx_MD, dweight_VD = _in_chunks(plain_chunk, *given, _Options(*options))
        ce, z = nats_M.sum() / count, squares_M.sum() / count
        ctx.save_for_backward(dx_MD, dweight_VD)
        ctx.mark_non_differentiable(ce, z, nats_M)
        return ce + _Options(*options).z_weight * z, ce, z, nats_M

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_parts: Tensor) -> tuple[Tensor | None, ...]:
        dx_MD, dweight_VD = ctx.saved_tensors
        dweight_VD = dweight_VD * grad if ctx.needs_input_grad[1] else None
        return dx_MD * grad.to(dx_MD.dtype), dweight_VD, None, *[None] * (1 + len(_Options._fields))
