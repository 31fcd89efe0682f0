"""Drafting: the model's recurrent cell guesses what follows the newest token.

Shapes: R rows, K drafts, V vocabulary, W tokens that the cell can propose, D and E widths of states and embeddings.
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

    ids_RK: Tensor
    q_RKV: Tensor
    """fp64."""


def no_drafts(rows: int, vocab_size: int, device: torch.device) -> Drafts:
    """Return the drafts of plain decoding: none."""
    ids_RK = torch.zeros(rows, 0, dtype=torch.int64, device=device)
    return Drafts(ids_RK, torch.zeros(rows, 0, vocab_size, dtype=torch.float64, device=device))


def draft(
    model: Network,
    hidden_RD: Tensor,
    token_R: Tensor,
    draws_RK: Tensor,
    distribution: Callable[[Tensor], Tensor],
) -> Drafts:
    """Draft K tokens after `token_R`, which the model drew from its state `hidden_RD`.

    `distribution` makes probabilities of the cell's logits, `draws_RK` are uniform numbers in [0, 1).
    """
    drafter = model.idea("drafter")
    assert drafter is not None, "a model without a drafter decodes plainly"
    rows, vocab_size = len(token_R), model.config.vocab_size
    none = no_drafts(rows, vocab_size, token_R.device)
    ids, q = [none.ids_RK], [none.q_RKV]
    proposals_WE, cell_RX = drafter.rows(model.embed), drafter.begin(hidden_RD)
    for i in range(draws_RK.shape[1]):
        cell_RX = drafter.step(cell_RX, F.embedding(token_R, model.embed.weight).to(cell_RX.dtype))
        q_RW = distribution(drafter.logits(cell_RX, proposals_WE))
        token_R = drafter.ids[sample(q_RW, draws_RK[:, i])]
        q_RV = q_RW.new_zeros(rows, vocab_size).scatter_add(1, drafter.ids.expand(rows, -1), q_RW)
        ids.append(token_R[:, None])
        q.append(q_RV[:, None])
    return Drafts(torch.cat(ids, 1), torch.cat(q, 1))
