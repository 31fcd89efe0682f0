"""Cross-entropy of the next token without the logits of all positions in memory.

The head's matrix product, the softmax and the gradients are computed for one chunk of positions at a time. The gradient
of a chunk's logits is known as soon as the logits are, so no tensor of size positions x vocabulary is kept (the idea of
Liger Kernel's fused linear cross-entropy). `plain_chunk`, or in half precision on a GPU a Triton kernel, runs between a
chunk's two matrix products. `naive_linear_cross_entropy` is the slow reference.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from lepton.ops.kernels import HALF, Kernel

IGNORE = -100
"""Target of a position without a loss."""
CHUNK_CPU = 512
"""Positions per chunk on a CPU. Each chunk adds to the gradient of the whole head, so small chunks are slow."""
ENTRIES_CPU = 1 << 20
"""Logits that a CPU processes at once between the matrix products: two fp32 tensors of them fit into its caches."""
ENTRIES_GPU = 1 << 28
"""Logits per chunk on a GPU: 1 GiB in fp32, so that launch costs are negligible."""
LOGIT_BYTES = 16
"""Bytes of a logit in a loss that is not computed in chunks, all its copies and gradients included."""
MULTIPLE_GPU = 128
"""Positions per chunk on a GPU are a multiple of this, the tile size of matrix products."""
LEAST_EXPONENT = 87
"""``exp(-87)`` is about the smallest number of fp32 with all its digits."""
Z_WEIGHT = 1e-4

Chunk: TypeAlias = Callable[
    [Tensor, Tensor, Tensor, int, float, float, bool],
    tuple[Tensor, Tensor],
]
"""The computation between the matrix products of a chunk; `plain_chunk` documents arguments and results."""


class _Options(NamedTuple):
    """Constants of a loss, and which gradients are needed."""

    vocab_size: int
    cap: float
    z_weight: float
    gradients: int
    """Gradients that are needed: 0 none, 1 of the head's inputs, 2 of its weights too."""


def soft_cap(logits: Tensor, cap: float) -> Tensor:
    """Squeeze logits smoothly into (-cap, cap) (Gemma 2)."""
    return cap * torch.tanh(logits / cap)


def linear_cross_entropy(
    x_ME: Tensor, weight_VE: Tensor, target_M: Tensor, *, vocab_size: int, cap: float, z_weight: float = Z_WEIGHT
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Mean cross-entropy of ``soft_cap(x @ weight.T)`` with z-loss, without keeping the logits.

    Args:
        x_ME: inputs of the head, any float dtype. Matrix products run in it, softmax and sums in fp32 or better.
        weight_VE: embedding; its rows beyond `vocab_size` are padding and get no probability.
        target_M: int64 ids, `IGNORE` for positions without a loss.
        vocab_size: rows of `weight_VE` that are real tokens.
        cap: soft cap of the logits.
        z_weight: weight of the mean squared log-normaliser (PaLM).

    Returns:
        The differentiable loss; then, detached, the mean cross-entropy in nats, the z term, and the cross-entropy of
        each position [M], 0 for positions without a loss.
    """
    gradients = 2 if weight_VE.requires_grad else int(x_ME.requires_grad)
    options = _Options(vocab_size, cap, z_weight, gradients if torch.is_grad_enabled() else 0)
    in_kernel = CROSS_ENTROPY.works(x_ME.device, x_ME.dtype)
    return _LinearCrossEntropy.apply(x_ME, weight_VE, target_M, in_kernel, *options)


def naive_linear_cross_entropy(
    x_ME: Tensor, weight_VE: Tensor, target_M: Tensor, *, vocab_size: int, cap: float, z_weight: float = Z_WEIGHT
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As `linear_cross_entropy`, with the logits of all positions in memory; a slow reference."""
    logits = soft_cap(x_ME @ weight_VE[:vocab_size].T, cap)
    nats_M = F.cross_entropy(logits, target_M, ignore_index=IGNORE, reduction="none")
    ce = nats_M.sum() / (target_M != IGNORE).sum()
    z = logits.logsumexp(-1)[target_M != IGNORE].square().mean()
    return ce + z_weight * z, ce, z, nats_M


def plain_chunk(
    raw_OV: Tensor, target_O: Tensor, count: Tensor, vocab_size: int, cap: float, z_weight: float, grads: bool
) -> tuple[Tensor, Tensor]:
    """Losses of a chunk of positions; if `grads`, overwrites the raw logits `raw_OV` with their gradient.

    Returns:
        Cross-entropy in nats and squared log-normaliser of each position [O], 0 for positions without a loss. The
        gradient is that of the mean loss over `count` positions.
    """
    precise = torch.promote_types(raw_OV.dtype, torch.float32)
    valid_O = (target_O != IGNORE).to(precise)
    label_O1 = target_O.clamp(min=0)[:, None]
    share_O1 = (4 * valid_O / count)[:, None]  # with the 4 of the derivative below
    on_cpu = raw_OV.device.type == "cpu"
    at_once = max(1, ENTRIES_CPU // raw_OV.shape[1]) if on_cpu else len(raw_OV)
    by_label = on_cpu and 2 * cap + math.log(vocab_size) < LEAST_EXPONENT
    log_sums, lead = [], []
    parts = (each.split(at_once) for each in (raw_OV, label_O1, share_O1))
    for some, label, share in zip(*parts, strict=True):
        # On a CPU a sigmoid is much cheaper than a tanh, and a softmax than an exponential.
        # With w = sigmoid(-2 raw / cap), tanh(raw / cap) = 1 - 2 w. The derivative of cap x tanh(raw / cap) by raw is
        # 1 - tanh(raw / cap)^2 = 4 w (1 - w).
        w = some.to(precise).mul_(-2 / cap).sigmoid_()
        capped = w * (-2 * cap)  # the logits minus cap: softmax ignores the constant, `log_sum + cap` adds it again
        capped[:, vocab_size:] = float("-inf")
        p = capped.softmax(-1)
        # The log-normaliser is that of any entry whose probability fits: of the target's, which costs nothing to find,
        # or where that could be 0, of the largest.
        at_label = capped.gather(1, label)
        if by_label:
            log_sum = at_label - p.gather(1, label).log()
        else:
            log_sum = capped.amax(-1, keepdim=True) - p.amax(-1, keepdim=True).log()
        log_sums.append(log_sum)
        lead.append(at_label)
        if grads:
            grad = p.mul_((1 + 2 * z_weight * (log_sum + cap)) * share)
            grad.scatter_add_(1, label, -share)
            some.copy_(grad.mul_(w.addcmul_(w, w, value=-1)))
    lse_O, lead_O = torch.cat(log_sums)[:, 0], torch.cat(lead)[:, 0]
    return (lse_O - lead_O) * valid_O, (lse_O + cap).square() * valid_O


def chunk_size(x_ME: Tensor, rows: int) -> int:
    """Positions per chunk: on a GPU the fewest chunks that `ENTRIES_GPU` allows, of about the same size."""
    if x_ME.device.type == "cpu":
        return CHUNK_CPU
    tiles = max(1, -(-x_ME.shape[0] // MULTIPLE_GPU))
    most = max(1, ENTRIES_GPU // (rows * MULTIPLE_GPU))
    passes = -(-tiles // most)
    return MULTIPLE_GPU * -(-tiles // passes)


def _in_chunks(
    chunk: Chunk,
    x_ME: Tensor,
    weight_VE: Tensor,
    target_M: Tensor,
    count: Tensor,
    options: _Options,
    accumulates: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Cross-entropy and squared log-normaliser of each position; then both gradients, empty if not needed.

    `accumulates`: sum the head's gradient over chunks with `_accumulate`.
    """
    grads, weight_grads = options.gradients > 0, options.gradients > 1
    precise = torch.promote_types(x_ME.dtype, torch.float32)
    matrix_VE = weight_VE.to(x_ME.dtype)
    nats_M = torch.empty(len(x_ME), dtype=precise, device=x_ME.device)
    squares_M = torch.empty_like(nats_M)
    dx = torch.empty_like(x_ME) if grads else x_ME.new_empty(0)
    accumulates &= len(x_ME) > 0  # without positions nothing would write to it
    start = torch.empty_like if accumulates else torch.zeros_like
    dweight = start(weight_VE, dtype=precise) if weight_grads else nats_M.new_empty(0)
    size = chunk_size(x_ME, len(weight_VE))
    for first in range(0, len(x_ME), size):
        rows = slice(first, first + size)
        x_OE = x_ME[rows]
        raw_OV = x_OE @ matrix_VE.T
        nats_M[rows], squares_M[rows] = chunk(raw_OV, target_M[rows], count, *options[:3], grads)
        if grads:  # the logits have become their gradients
            dx[rows] = raw_OV @ matrix_VE
        if weight_grads and accumulates:
            _accumulate(dweight, raw_OV.T, x_OE, fresh=first == 0)
        elif weight_grads and x_OE.device.type == "cpu" and x_OE.dtype == precise:
            torch.addmm(dweight, raw_OV.T, x_OE, out=dweight)  # without storing the product
        elif weight_grads:
            dweight += raw_OV.T @ x_OE
        del raw_OV  # before the next chunk's logits are made
    return nats_M, squares_M, dx, dweight


def _accumulate(total_VE: Tensor, one_VO: Tensor, other_OE: Tensor, *, fresh: bool) -> None:
    """Add a half-precision matrix product to an fp32 sum; if `fresh`, overwrite the sum.

    The product is neither rounded to half precision nor stored on its own: adding a stored one would take longer than
    computing it.
    """
    torch.addmm(total_VE, one_VO, other_OE, out_dtype=total_VE.dtype, beta=0 if fresh else 1, out=total_VE)


@functools.cache
def _accumulates(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether `_accumulate` works, found by trying it: only CUDA has it, not in every version and on every device."""
    if device.type != "cuda":
        return False
    total = torch.full((16, 16), torch.nan, device=device)
    ones = torch.ones(16, 16, dtype=dtype, device=device)
    try:
        for fresh in (True, False):
            _accumulate(total, ones.T, ones, fresh=fresh)
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, TypeError):  # not supported here; an older version
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
    x_ME: Tensor,
    weight_VE: Tensor,
    target_M: Tensor,
    count: Tensor,
    vocab_size: int,
    cap: float,
    z_weight: float,
    gradients: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`_in_chunks` with the Triton kernel.

    It is one operator for the compiler, because the kernel works in place: a compiler that looked inside would copy the
    logits.
    """
    options = _Options(vocab_size, cap, z_weight, gradients)
    accumulates = gradients > 1 and _accumulates(x_ME.device, x_ME.dtype)
    return _in_chunks(_kernel_chunk(), x_ME, weight_VE, target_M, count, options, accumulates)


@_in_kernel_chunks.register_fake
def _(x_ME: Tensor, weight_VE: Tensor, *options: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    gradients = options[-1]
    precise = torch.promote_types(x_ME.dtype, torch.float32)
    nats_M = x_ME.new_empty(len(x_ME), dtype=precise)
    dx = torch.empty_like(x_ME) if gradients > 0 else x_ME.new_empty(0)
    dweight = torch.empty_like(weight_VE, dtype=precise) if gradients > 1 else nats_M.new_empty(0)
    return nats_M, torch.empty_like(nats_M), dx, dweight


@register_flop_formula(torch.ops.lepton.in_kernel_chunks)
def _flops(x: Any, weight: Any, *args: Any, out_shape: Any = None, **_: Any) -> int:
    """One matrix product for the logits, and one for each gradient."""
    return 2 * x[0] * x[1] * weight[0] * (1 + args[-1])


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x_ME: Tensor, weight_VE: Tensor, target_M: Tensor, in_kernel: bool, *options: Any
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        count = (target_M != IGNORE).sum().clamp(min=1)
        given = (x_ME, weight_VE, target_M, count)
        if in_kernel:
            nats_M, squares_M, dx, dweight = _in_kernel_chunks(*given, *options)
        else:
            nats_M, squares_M, dx, dweight = _in_chunks(plain_chunk, *given, _Options(*options))
        ce, z = nats_M.sum() / count, squares_M.sum() / count
        ctx.save_for_backward(dx, dweight)
        ctx.mark_non_differentiable(ce, z, nats_M)
        return ce + _Options(*options).z_weight * z, ce, z, nats_M

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_parts: Tensor) -> tuple[Tensor | None, ...]:
        dx, dweight = ctx.saved_tensors
        dweight = dweight * grad if ctx.needs_input_grad[1] else None
        return dx * grad.to(dx.dtype), dweight, None, *[None] * (1 + len(_Options._fields))
