"""Divergence of one prediction from another through the same head, without the logits of all positions in memory.

KL(teacher || student) is the loss that a student has beyond the teacher's own entropy, if the tokens follow the
teacher's distribution: the soft target of distillation (Hinton et al., 2015). Only the student's inputs get a gradient.
As in `lepton.ops.cross_entropy`, it is known as soon as the logits of a chunk are.
"""

from collections.abc import Callable
from typing import Any, TypeAlias

import torch
from torch import Tensor

from lepton.ops.cross_entropy import chunk_size, soft_cap

Chunk: TypeAlias = Callable[[Tensor, Tensor, Tensor, int, float], tuple[Tensor, Tensor]]
"""The computation between the matrix products of a chunk, `divergence_chunk` or a compiled form of it."""


def linear_divergence(
    x_ME: Tensor,
    teacher_ME: Tensor,
    weight_VE: Tensor,
    valid_M: Tensor,
    *,
    vocab_size: int,
    cap: float,
    chunk: Chunk | None = None,
) -> tuple[Tensor, Tensor]:
    """Return the mean KL(teacher || student) in nats over the valid positions, and that of each, fp32 [M].

    Args:
        x_ME: inputs of the head for the student, any float dtype. Softmax and sums run in fp32 or better.
        teacher_ME: those for the teacher. They get no gradient.
        weight_VE: embedding; its rows beyond `vocab_size` are padding and get no probability. It gets no gradient.
        valid_M: bool, the positions that count. The others have 0 nats.
        vocab_size: rows of `weight_VE` that are real tokens.
        cap: soft cap of the logits.
        chunk: what runs between the matrix products; by default `divergence_chunk`.

    The mean is differentiable, the nats of each position are detached.
    """
    given = (x_ME, teacher_ME.detach(), weight_VE.detach().to(x_ME.dtype), valid_M)
    return _LinearDivergence.apply(*given, vocab_size, cap, chunk or divergence_chunk)


def naive_linear_divergence(
    x_ME: Tensor, teacher_ME: Tensor, weight_VE: Tensor, valid_M: Tensor, *, vocab_size: int, cap: float
) -> tuple[Tensor, Tensor]:
    """As `linear_divergence`, with the logits of all positions in memory; a slow reference."""
    student, teacher = (soft_cap(x @ weight_VE[:vocab_size].T, cap).log_softmax(-1) for x in (x_ME, teacher_ME))
    nats_M = (teacher.exp() * (teacher - student)).sum(-1) * valid_M
    return nats_M.sum() / valid_M.sum().clamp(min=1), nats_M


def divergence_chunk(
    raw_OV: Tensor, teacher_OV: Tensor, share_O: Tensor, vocab_size: int, cap: float
) -> tuple[Tensor, Tensor]:
    """Return the divergence of each position of a chunk [O], and the gradient of the student's raw logits [O, V].

    Both logits are before the soft cap. `share_O` is the share of each position in the loss. Nothing here depends on
    values but by arithmetic, so a compiler makes a few loops over the logits of it.
    """
    precise = torch.promote_types(raw_OV.dtype, torch.float32)
    real_V = torch.arange(raw_OV.shape[1], device=raw_OV.device) < vocab_size
    bend_OV = torch.tanh(raw_OV.to(precise) / cap)
    capped, wanted = cap * bend_OV, soft_cap(teacher_OV.to(precise), cap)
    # Logits within the cap need no largest one subtracted: its exponential fits fp32.
    q, p = (torch.where(real_V, each.exp(), 0) for each in (capped, wanted))
    sum_O1, total_O1 = q.sum(-1, keepdim=True), p.sum(-1, keepdim=True)
    q, p = q / sum_O1, p / total_O1
    nats_O = (p * (wanted - capped)).sum(-1) + (sum_O1 / total_O1).log()[:, 0]
    gradient = share_O[:, None] * (q - p) * (1 - bend_OV.square())
    return nats_O * (share_O > 0), gradient.to(raw_OV.dtype)


class _LinearDivergence(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_ME: Tensor,
        teacher_ME: Tensor,
        weight_VE: Tensor,
        valid_M: Tensor,
        vocab_size: int,
        cap: float,
        chunk: Chunk,
    ) -> tuple[Tensor, Tensor]:
        precise = torch.promote_types(x_ME.dtype, torch.float32)
        share_M = valid_M.to(precise) / valid_M.sum().clamp(min=1)
        nats_M, dx = torch.empty_like(share_M), torch.empty_like(x_ME)
        size = chunk_size(x_ME, len(weight_VE))
        for first in range(0, len(x_ME), size):
            rows = slice(first, first + size)
            raw_OV, teacher_OV = (each[rows] @ weight_VE.T for each in (x_ME, teacher_ME))
            nats_M[rows], gradient_OV = chunk(raw_OV, teacher_OV, share_M[rows], vocab_size, cap)
            if ctx.needs_input_grad[0]:
                dx[rows] = gradient_OV @ weight_VE
        ctx.save_for_backward(dx)
        ctx.mark_non_differentiable(nats_M)
        return (nats_M * share_M).sum(), nats_M

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_parts: Tensor) -> tuple[Tensor | None, ...]:
        (dx,) = ctx.saved_tensors
        return dx * grad.to(dx.dtype), *[None] * 6
