"""Which drafts are accepted: speculative sampling (Leviathan et al. 2023) as arithmetic on probabilities.

Shapes: R rows, K drafts, T = K + 1 places, V vocabulary. The draft at place i was drawn from q_i. The model's own
distribution is p_i there, and p_K after the last draft.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from lepton.generate.sampling import sample


class Acceptance(NamedTuple):
    """The result of verifying each row's drafts."""

    accepted_R: Tensor
    """Number of accepted drafts; they are the first ones."""
    next_R: Tensor
    """The token after them."""


def accept(p_RTV: Tensor, q_RKV: Tensor, drafts_RK: Tensor, uniforms_RK: Tensor, uniforms_R: Tensor) -> Acceptance:
    """Accept drafts from the left, and draw the token after the last accepted one.

    A draft d is accepted with probability min(1, p(d) / q(d)). Where the first one is rejected, the token is drawn
    from the positive part of p - q, normalised; if none is, from the last p. The accepted drafts and this token
    together are then distributed exactly as tokens drawn from p one by one, whatever q is. Greedy decoding is the case
    of one-hot p and q. A place that nothing was drafted for has q = 0: its token is drawn from p.

    `uniforms_RK` and `uniforms_R` are uniform numbers in [0, 1).
    """
    index_RK1 = drafts_RK[..., None]
    p_RK = p_RTV[:, :-1].gather(-1, index_RK1)[..., 0]
    q_RK = q_RKV.gather(-1, index_RK1)[..., 0]
    accepted_RK = (q_RK > 0) & (uniforms_RK * q_RK < p_RK)
    accepted_R = accepted_RK.long().cumprod(1).sum(1)
    rows_R = torch.arange(len(accepted_R), device=accepted_R.device)
    p_RV = p_RTV[rows_R, accepted_R]
    rest_RV = (p_RV - F.pad(q_RKV, (0, 0, 0, 1))[rows_R, accepted_R]).clamp(min=0)
    # p and q that differ by rounding alone can leave nothing: then either is right.
    rest_RV = torch.where(rest_RV.sum(-1, keepdim=True) > 0, rest_RV, p_RV)
    return Acceptance(accepted_R, sample(rest_RV, uniforms_R))
