"""Which drafts are accepted: speculative sampling (Leviathan et al. 2023) as arithmetic on probabilities.

Shapes: A rows, Y drafts, T = Y + 1 places, V vocabulary. The draft at place i was drawn from q_i. The model's own
distribution is p_i there, and p_Y after the last draft.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from lepton.generate.sampling import sample


class Acceptance(NamedTuple):
    """The result of verifying each row's drafts."""

    accepted_A: Tensor
    """Number of accepted drafts; they are the first ones."""
    next_A: Tensor
    """The token after them."""


def accept(p_ATV: Tensor, q_AYV: Tensor, drafts_AY: Tensor, uniforms_AY: Tensor, uniforms_A: Tensor) -> Acceptance:
    """Accept drafts from the left, and draw the token after the last accepted one.

    A draft d is accepted with probability min(1, p(d) / q(d)). After a rejection, the next token is drawn from the
    positive part of p - q at that place, normalised. If all drafts are accepted, it is drawn from p at the last place.
    The accepted drafts and this token together are then distributed exactly as tokens drawn from p one by one, whatever
    q is. Greedy decoding is the case of one-hot p and q. At a place without a draft q is 0: its token is drawn from p.

    `uniforms_AY` and `uniforms_A` are uniform numbers in [0, 1).
    """
    index_AY1 = drafts_AY[..., None]
    p_AY = p_ATV[:, :-1].gather(-1, index_AY1)[..., 0]
    q_AY = q_AYV.gather(-1, index_AY1)[..., 0]
    accepted_AY = (q_AY > 0) & (uniforms_AY * q_AY < p_AY)
    accepted_A = accepted_AY.long().cumprod(1).sum(1)
    rows_A = torch.arange(len(accepted_A), device=accepted_A.device)
    p_AV = p_ATV[rows_A, accepted_A]
    rest_AV = (p_AV - F.pad(q_AYV, (0, 0, 0, 1))[rows_A, accepted_A]).clamp(min=0)
    # If p and q differ only by rounding, nothing may be left: then either is right.
    rest_AV = torch.where(rest_AV.sum(-1, keepdim=True) > 0, rest_AV, p_AV)
    return Acceptance(accepted_A, sample(rest_AV, uniforms_A))
