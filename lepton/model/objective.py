"""The training loss: cross-entropy of the next token, and the small losses of the ideas.

Every auxiliary loss stops at the inputs of its own parameters, so none of them moves the trunk, unless a field such as
`peek.into_trunk` or `router.into_stem` says so. The positions that they look at are picked by a pure function of the
batch.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from lepton.model.ideas.idea import Flow, Outcome
from lepton.model.modules import COMMON_LOSSES, Modules
from lepton.ops.cross_entropy import IGNORE, linear_cross_entropy


@dataclass(frozen=True)
class Loss:
    """A training loss and the terms it is made of."""

    loss: Tensor
    """Scalar to differentiate: cross-entropy plus the weighted auxiliary terms."""
    parts: dict[str, Tensor]
    """Each term before weighting, detached; 'ce' is the mean cross-entropy in nats per token."""


@dataclass(frozen=True)
class Step:
    """What belongs to a step of training: where it lies in the schedule, and what is drawn for its micro-batch."""

    rate: float | Tensor = 1.0
    """Share of the peak learning rate; a tensor [] where a CUDA graph reads it."""
    served_BT: Tensor | None = None
    """Bool: the tokens that serve the deep blocks earlier keys and values; see `Network.trunk`. None: no token."""


WHOLE = Step()
"""A step at the peak, with nothing drawn."""


def objective(
    model: Modules,
    hidden_BTD: Tensor,
    flow: Flow,
    tokens: Tensor,
    lengths: Tensor | None,
    targets_BT: Tensor | None,
    *,
    auxiliary: bool,
    rate: float | Tensor = 1.0,
) -> Loss:
    """Return the loss of predicting `tokens[:, 1:]`, or those that `targets_BT` picks, from a pass over the others.

    `rate` is the share of the peak learning rate.
    """
    following_BT, position_BT = tokens[:, 1:].long(), flow.timeline.position_BT
    if lengths is not None:
        index_T = torch.arange(1, tokens.shape[1], device=tokens.device)
        following_BT = following_BT.masked_fill(index_T >= lengths[:, None], IGNORE)
        position_BT = position_BT.masked_fill(index_T > lengths[:, None], -1)
    if targets_BT is not None:
        following_BT = following_BT.masked_fill(~targets_BT, IGNORE)
    total, ce, z, nats_M = linear_cross_entropy(
        model.head_down(hidden_BTD).flatten(0, 1),
        model.embed.weight,
        following_BT.flatten(),
        vocab_size=model.config.vocab_size,
        cap=model.config.logit_cap,
    )
    parts = dict(zip(COMMON_LOSSES, (ce, z), strict=True))
    if auxiliary:
        outcome = Outcome(model, hidden_BTD, flow, following_BT, position_BT, nats_M, rate)
        ideas = [*model.ideas.values()]
        # From the last idea back: those at the end look at logits, which takes the most memory, and what the other
        # losses keep for the backward pass is then not there yet.
        found = {idea.name: idea.losses(outcome) for idea in reversed(ideas)}
        for idea in ideas:
            for name, value in found[idea.name].items():
                total = total + idea.loss_weights[name] * value
                parts[name] = value.detach()
    return Loss(total, parts)
