"""Drafting: the model's recurrent cell guesses what follows the newest token.

Shapes: A rows, Y drafts, V vocabulary, Z tokens that the cell can propose, D and E widths of states and embeddings.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from lepton.generate.sampling import sample
from lepton.model import Network


class Drafts(NamedTuple):
    """Guesses for each row, and the distributions that they were drawn from."""

    ids_AY: Tensor
    q_AYV: Tensor
    """fp64."""


def no_drafts(rows: int, vocab_size: int, device: torch.device) -> Drafts:
    """Return the drafts of plain decoding: none."""
    ids_AY = torch.zeros(rows, 0, dtype=torch.int64, device=device)
    return Drafts(ids_AY, torch.zeros(rows, 0, vocab_size, dtype=torch.float64, device=device))


def draft(
    model: Network,
    hidden_AD: Tensor,
    token_A: Tensor,
    uniforms_AY: Tensor,
    distribution: Callable[[Tensor], Tensor],
) -> Drafts:
    """Draft Y tokens after `token_A`, which the model drew from its state `hidden_AD`.

    `distribution` makes probabilities of the cell's logits, `uniforms_AY` are uniform numbers in [0, 1).
    """
    drafter = model.idea("drafter")
    assert drafter is not None, "a model without a drafter decodes plainly"
    rows, vocab_size = len(token_A), model.config.vocab_size
    none = no_drafts(rows, vocab_size, token_A.device)
    ids, q = [none.ids_AY], [none.q_AYV]
    proposals_ZE, cell_AW = drafter.rows(model.embed), drafter.begin(hidden_AD)
    for i in range(uniforms_AY.shape[1]):
        cell_AW = drafter.step(cell_AW, F.embedding(token_A, model.embed.weight).to(cell_AW.dtype))
        q_AZ = distribution(drafter.logits(cell_AW, proposals_ZE))
        token_A = drafter.ids[sample(q_AZ, uniforms_AY[:, i])]
        q_AV = q_AZ.new_zeros(rows, vocab_size).scatter_add(1, drafter.ids.expand(rows, -1), q_AZ)
        ids.append(token_A[:, None])
        q.append(q_AV[:, None])
    return Drafts(torch.cat(ids, 1), torch.cat(q, 1))
