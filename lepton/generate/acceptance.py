"""Which drafts stand: speculative sampling (Leviathan et al. 2023) as arithmetic on probabilities.

Shapes: A rows, Y drafts, T = Y + 1 places, V vocabulary. The draft at place i was drawn from q_i; the model itself says
p_i there, and p_Y after the last draft.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from lepton.generate.sampling import sample


class Verdict(NamedTuple):
    """What comes of a row's drafts."""

    accepted_A: Tensor
    """Drafts that stand, counted from the first."""
    next_A: Tensor
    """The token behind them."""


def accept(p_ATV: Tensor, q_AYV: Tensor, drafts_AY: Tensor, trials_AY: Tensor, draws_A: Tensor) -> Verdict:
    """Accept drafts from the left, and draw the token after the last that stands.

    A draft d stands with probability min(1, p(d) / q(d)). Where the first one falls, the token is drawn from the
    positive part of p - q, normalised; if none falls, from the last p. The accepted drafts and this token together are
    then distributed exactly as tokens drawn from p one by one, whatever q is. Greedy decoding is the case of one-hot p
    and q. A place that nothing was drafted for has q = 0: its token is drawn from p.

    `trials_AY` and `draws_A` are uniform numbers in [0, 1).
    """
    index_AY1 = drafts_AY[..., None]
    p_AY = p_ATV[:, :-1].gather(-1, index_AY1)[..., 0]
    q_AY = q_AYV.gather(-1, index_AY1)[..., 0]
    stands_AY = (q_AY > 0) & (trials_AY * q_AY < p_AY)
    accepted_A = stands_AY.long().cumprod(1).sum(1)
    rows_A = torch.arange(len(accepted_A), device=accepted_A.device)
    p_AV = p_ATV[rows_A, accepted_A]
    rest_AV = (p_AV - F.pad(q_AYV, (0, 0, 0, 1))[rows_A, accepted_A]).clamp(min=0)
    # p and q that differ by rounding alone can leave nothing: then either is right.
    rest_AV = torch.where(rest_AV.sum(-1, keepdim=True) > 0, rest_AV, p_AV)
    return Verdict(accepted_A, sample(rest_AV, draws_A))
