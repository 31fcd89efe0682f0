"""The training loss: cross-entropy of the next token, and a small loss for each idea that has one.

Every auxiliary loss stops at the inputs of its own parameters, so none of them moves the trunk. The
positions that they look at are picked by a pure function of the batch.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lepton.model.layers import norm
from lepton.model.output import Traces
from lepton.ops.cross_entropy import IGNORE, linear_cross_entropy

if TYPE_CHECKING:
    from lepton.model.lepton import Lepton

# Auxiliary losses in the sum. Most of their parameters see no other loss, and their optimizers normalise scale away.
WEIGHTS = {"exit": 0.1, "router": 0.1, "uncertainty": 0.1, "draft": 0.1, "peek": 0.1}
# One position in so many teaches exit, router and uncertainty.
OUTCOME_STRIDE = 32
# One position in so many teaches the drafter, and one row in so many the hint, whose summary needs neighbours.
DRAFT_STRIDE = 4


@dataclass(frozen=True)
class Loss:
    """A training loss and the terms it is made of."""

    loss: Tensor
    """Scalar to differentiate: cross-entropy plus the weighted auxiliary terms."""
    parts: dict[str, Tensor]
    """Each term before weighting, detached; 'ce' is the mean cross-entropy in nats a token."""


def objective(
    model: "Lepton", hidden_BTD: Tensor, traces: Traces, tokens: Tensor, lengths: Tensor | None, *, auxiliary: bool
) -> Loss:
    """Return the loss of predicting `tokens[:, 1:]` from what the trunk's pass over `tokens[:, :-1]` gave."""
    following_BT, position_BT = tokens[:, 1:].long(), traces.timeline.position_BT
    if lengths is not None:
        index_T = torch.arange(1, tokens.shape[1], device=tokens.device)
        following_BT = following_BT.masked_fill(index_T >= lengths[:, None], IGNORE)
        position_BT = position_BT.masked_fill(index_T > lengths[:, None], -1)
    total, ce, z, nats_M = linear_cross_entropy(
        model.head_down(hidden_BTD).flatten(0, 1),
        model.embed.weight,
        following_BT.flatten(),
        vocab_size=model.config.vocab_size,
        cap=model.config.logit_cap,
    )
    small: dict[str, Tensor] = {}
    if auxiliary:
        small = {
            **_outcomes(model, hidden_BTD, traces, following_BT, nats_M),
            **_drafts(model, hidden_BTD, position_BT, following_BT),
            **_peek(model, traces, position_BT, following_BT),
        }
    for name, value in small.items():
        total = total + WEIGHTS[name] * value
    return Loss(total, {"ce": ce, "z": z, **{name: value.detach() for name, value in small.items()}})


def _picks(tokens_BT: Tensor, stride: int) -> Tensor:
    """Every `stride`-th position of the flattened batch, from a start that depends on the batch alone."""
    stride = min(stride, tokens_BT.numel())
    count = tokens_BT.numel() // stride
    return tokens_BT.sum() % stride + stride * torch.arange(count, device=tokens_BT.device)


def _outcomes(
    model: "Lepton", hidden_BTD: Tensor, traces: Traces, following_BT: Tensor, nats_M: Tensor
) -> dict[str, Tensor]:
    """Losses that compare predictions with what came: exit, router and uncertainty, at sampled positions."""
    if model.router is None and model.uncertainty is None:
        return {}
    index_M = _picks(following_BT, OUTCOME_STRIDE)
    target_M = following_BT.flatten()[index_M]
    rows_VE = model.embed.weight.detach().to(hidden_BTD.dtype)
    losses = {}
    if model.router is not None:
        early_MD = model.router.exit(traces.early_BTD.flatten(0, 1)[index_M])
        losses["exit"], early_nats_M = _frozen_head(model, early_MD, rows_VE, target_M)
        assert traces.benefit_BT is not None
        valid_M = target_M >= 0
        saved_M = (early_nats_M - nats_M[index_M]).clamp(-5, 5)
        error_M = (traces.benefit_BT.flatten()[index_M] - saved_M).square() * valid_M
        losses["router"] = error_M.sum() / valid_M.sum().clamp(min=1)
    if model.uncertainty is not None:
        hidden_MD = hidden_BTD.detach().flatten(0, 1)[index_M]
        with torch.no_grad():
            raw_MV = model.head_down(hidden_MD) @ rows_VE.T
        signals_M3 = traces.signals_BT3.flatten(0, 1)[index_M]
        losses["uncertainty"] = model.uncertainty.loss(hidden_MD, raw_MV, signals_M3, target_M)
    return losses


def _frozen_head(model: "Lepton", x_MD: Tensor, rows_VE: Tensor, target_M: Tensor) -> tuple[Tensor, Tensor]:
    """Mean cross-entropy, differentiable in `x_MD` and not in the head's weights, and the nats of each position.

    `rows_VE` are the embedding without gradient.
    """
    x = norm(x_MD)
    if isinstance(model.head_down, nn.Linear):
        x = F.linear(x, model.head_down.weight.detach().to(x.dtype))
    loss, _, _, nats_M = linear_cross_entropy(
        x,
        rows_VE,
        target_M,
        vocab_size=model.config.vocab_size,
        cap=model.config.logit_cap,
        z_weight=0.0,
    )
    return loss, nats_M


def _drafts(model: "Lepton", hidden_BTD: Tensor, position_BT: Tensor, following_BT: Tensor) -> dict[str, Tensor]:
    """The drafter's loss at a quarter of the positions."""
    if model.drafter is None:
        return {}
    ahead = model.drafter.count + 1
    columns = []
    for i in range(ahead):
        # The token i + 1 after each position, if it is in the chunk and the same document.
        token_BT = F.pad(following_BT[:, i:], (0, min(i, following_BT.shape[1])), value=IGNORE)
        if i:
            place_BT = F.pad(position_BT[:, i:], (0, min(i, position_BT.shape[1])), value=-1)
            token_BT = token_BT.masked_fill(place_BT != position_BT + i, IGNORE)
        columns.append(token_BT)
    following_MX = torch.stack(columns, -1).flatten(0, 1)
    index_M = _picks(following_BT, DRAFT_STRIDE)
    hidden_MD = hidden_BTD.flatten(0, 1)[index_M]
    return {"draft": model.drafter.loss(hidden_MD, following_MX[index_M], model.embed)}


def _peek(model: "Lepton", traces: Traces, position_BT: Tensor, following_BT: Tensor) -> dict[str, Tensor]:
    """The hint's loss: what it says about the tokens ahead. Padding, at position -1, is none of them."""
    if model.peek is None or traces.hint_inputs_BTX is None:
        return {}
    rows_R = _picks(following_BT[:, 0], DRAFT_STRIDE)
    inputs_RTX, embedded_RTE = traces.hint_inputs_BTX[rows_R], traces.embedded_BTE[rows_R]
    return {"peek": model.peek.loss(inputs_RTX, embedded_RTE, position_BT[rows_R])}
