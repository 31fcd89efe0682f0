"""Cross-entropy of the next token without the logits of all positions.

The head's product, the softmax and their gradients are computed for a chunk of positions at a time, in one
pass: the gradient of a chunk's logits is known as soon as the logits are, so nothing of size positions x vocabulary
is ever kept (the idea of Liger Kernel's fused linear cross-entropy). `tests/model/test_loss.py` holds the slow
reference it is compared with, in value and gradients.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

IGNORE = -100
# Positions a pass: on a CPU few enough that a chunk of logits stays near the caches.
CHUNK_CPU = 128
ENTRIES_GPU = 1 << 28
"""Logits a pass on a GPU: 1 GiB of them in fp32, enough that launching costs nothing beside computing."""
Z_WEIGHT = 1e-4


@dataclass(frozen=True)
class Loss:
    """A training loss and the terms it is made of."""

    loss: Tensor
    """Scalar to differentiate: cross-entropy plus the weighted auxiliary terms."""
    parts: dict[str, Tensor]
    """Each term before weighting, detached; 'ce' is the mean cross-entropy in nats a token."""


def soft_cap(logits: Tensor, cap: float) -> Tensor:
    """Squeeze logits smoothly into (-cap, cap) (Gemma 2)."""
    return cap * torch.tanh(logits / cap)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_MD: Tensor,
        weight_VD: Tensor,
        target_M: Tensor,
        vocab_size: int,
        cap: float,
        z_weight: float,
        grads: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        precise = torch.promote_types(x_MD.dtype, torch.float32)
        matrix_VD = weight_VD.to(x_MD.dtype)
        count = (target_M != IGNORE).sum().clamp(min=1)
        nats = torch.zeros((), dtype=precise, device=x_MD.device)
        squares = torch.zeros_like(nats)
        dx_MD = torch.empty_like(x_MD) if grads else None
        dweight_VD = torch.zeros_like(weight_VD, dtype=precise) if grads else None
        chunk = CHUNK_CPU if x_MD.device.type == "cpu" else max(1, ENTRIES_GPU // len(weight_VD))
        for first in range(0, x_MD.shape[0], chunk):
            rows = slice(first, first + chunk)
            x, target = x_MD[rows], target_M[rows]
            valid = target != IGNORE
            label = target.clamp(min=0)[:, None]
            # In place wherever it can be: the passes over these chunk x vocabulary tensors are the cost on a CPU.
            tanh = (x @ matrix_VD.T).to(precise).div_(cap).tanh_()
            # No maximum is subtracted: the cap bounds the exponent.
            exp = (tanh * cap).exp_()
            exp[:, vocab_size:] = 0
            total = exp.sum(-1)
            lse = total.log()
            nats += ((lse - cap * tanh.gather(1, label)[:, 0]) * valid).sum()
            squares += (lse.square() * valid).sum()
            if dx_MD is not None and dweight_VD is not None:
                share = valid.to(precise) / count
                slope = exp.mul_(((1 + 2 * z_weight * lse) * share / total)[:, None])
                slope.scatter_add_(1, label, -share[:, None])
                slope.addcmul_(slope, tanh.square_(), value=-1)
                slope = slope.to(x.dtype)
                dx_MD[rows] = slope @ matrix_VD
                dweight_VD += slope.T @ x
        ce, z = nats / count, squares / count
        ctx.save_for_backward(dx_MD, dweight_VD)
        ctx.mark_non_differentiable(ce, z)
        return ce + z_weight * z, ce, z

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _ce: Tensor, _z: Tensor) -> tuple[Tensor | None, ...]:
        dx_MD, dweight_VD = ctx.saved_tensors
        return dx_MD * grad.to(dx_MD.dtype), dweight_VD * grad, None, None, None, None, None


def linear_cross_entropy(
    x_MD: Tensor, weight_VD: Tensor, target_M: Tensor, *, vocab_size: int, cap: float, z_weight: float = Z_WEIGHT
) -> tuple[Tensor, Tensor, Tensor]:
    """Mean cross-entropy of ``soft_cap(x @ weight.T)`` with z-loss, without keeping the logits.

    Args:
        x_MD: head inputs, any float dtype; the products run in it, softmax and sums in fp32 or better.
        weight_VD: embedding rows; those beyond `vocab_size` are padding and get no probability.
        target_M: int64 ids, `IGNORE` where there is nothing to predict.
        vocab_size: rows of `weight_VD` that are real tokens.
        cap: soft cap of the logits.
        z_weight: weight of the mean squared log-normaliser (PaLM).

    Returns:
        The differentiable loss, and the detached cross-entropy and z term.
    """
    grads = torch.is_grad_enabled() and (x_MD.requires_grad or weight_VD.requires_grad)
    return _LinearCrossEntropy.apply(x_MD, weight_VD, target_M, vocab_size, cap, z_weight, grads)
