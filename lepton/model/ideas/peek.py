"""Future peek: a hint about the next tokens, predicted from the past. The future itself appears only in its loss.

The hint is the output of a small MLP, which reads the stem state, the memory's read and the current thoughts. A
projection that starts at zero adds it to the residual stream. Its loss compares it with a summary of the tokens ahead,
the next one excluded: a right-to-left sum of their embeddings. The gradient of this loss stops at the MLP's inputs, so
it does not change the trunk, unless `into_trunk` says so: then the trunk learns to know what is ahead.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lepton.config import IdeaConfig, LeptonConfig
from lepton.model.ideas.idea import Contribution, Flow, Idea, Outcome, Switch, Work, matrices, picks
from lepton.model.layers import Linear, norm
from lepton.model.parameters import FEED, MATRIX, replaced

FADE = 0.8
"""Weight of a token in the summary, relative to the token before it."""
ROW_STRIDE = 4
"""The loss uses one row in this many, and all its tokens, because a summary needs consecutive ones."""
SOURCES = ("memory", "thoughts")
"""Ideas whose features the hint reads, in addition to the stem state."""


@dataclass(frozen=True, kw_only=True)
class PeekConfig(IdeaConfig):
    """Future peek."""

    width: int = 64
    """Width of the hint."""
    horizon: int = 8
    """The summary covers the tokens 2..horizon ahead."""
    into_trunk: bool = False
    """Whether the gradient of its loss reaches what the hint reads."""

    name = "peek"
    most = {"width": 1 << 15, "horizon": 1024}
    flat = {"hint": "width", "peek": "horizon"}
    flat_switch = "hint"

    def check(self, config: LeptonConfig) -> None:
        self.at_least(1, "width")
        self.at_least(2, "horizon")  # the next token is not in the summary

    def build(self, config: LeptonConfig) -> "Peek":
        features = [part.feature_width(config) for name in SOURCES if (part := config.idea(name)) is not None]
        return Peek(config, self, config.width + sum(features))

    @classmethod
    def preset(cls, size: str, width: int) -> "PeekConfig":
        return cls(width=32 if size == "nano" else 64)


class Peek(Idea):
    """The hint, its projection into the stream, and the projection that the loss compares with the summary."""

    name = "peek"
    compiled = ("loss",)
    loss_weights = {"peek": 0.1}
    declares = {
        "up.weight": MATRIX,
        "down.weight": MATRIX,
        "back.weight": FEED,
        "summary.weight": MATRIX.but(auxiliary=True),
    }

    def __init__(self, config: LeptonConfig, own: PeekConfig, inputs: int) -> None:
        super().__init__()
        self.up = Linear(inputs, 2 * own.width)
        self.down = Linear(2 * own.width, own.width)
        self.back = Linear(own.width, config.width)
        self.summary = Linear(own.width, config.embed_rank or config.width)
        self.horizon, self.into_trunk = own.horizon, own.into_trunk

    def contribute(self, flow: Flow, past: Any) -> Contribution:
        """Compute the hint and add it to the stream."""
        inputs_BTI = torch.cat([flow.u_BTD, *flow.features(*SOURCES)], -1)
        hint_BTF = self.hint(inputs_BTI)
        return Contribution(added_BTD=self.back(hint_BTF), feature_BTF=hint_BTF, inputs_BTI=inputs_BTI)

    def hint(self, inputs_BTI: Tensor) -> Tensor:
        """Return the hint [B, T, F]."""
        return norm(self.down(F.silu(self.up(inputs_BTI))))

    def loss(self, inputs_BTI: Tensor, embedded_BTE: Tensor, position_BT: Tensor) -> Tensor:
        """Return the mean of 1 - cosine(projected hint, summary), over the tokens that have a summary.

        `embedded_BTE` are the embeddings of the tokens, which get no gradient; nor do the inputs without `into_trunk`.
        """
        target_BTE, has_BT = summary(embedded_BTE.detach().float(), position_BT, self.horizon)
        hint_BTF = self.hint(inputs_BTI if self.into_trunk else inputs_BTI.detach())
        predicted_BTE = self.summary(hint_BTF).float()
        distance_BT = 1 - F.cosine_similarity(predicted_BTE, target_BTE, dim=-1)
        return (distance_BT * has_BT).sum() / has_BT.sum().clamp(min=1)

    def losses(self, outcome: Outcome) -> dict[str, Tensor]:
        """The loss on some rows. Padding has position -1 and is in no summary."""
        rows_A = picks(outcome.following_BT[:, 0], ROW_STRIDE)
        inputs_BTI = outcome.flow.contributions[self.name].inputs_BTI
        assert inputs_BTI is not None
        embedded_ATE, position_AT = outcome.flow.embedded_BTE[rows_A], outcome.position_BT[rows_A]
        return {"peek": self.loss(inputs_BTI[rows_A], embedded_ATE, position_AT)}

    def flops(self, work: Work) -> float:
        return work.length * (matrices(self) - matrices(self.summary))

    def extra_training_flops(self, work: Work, head: int) -> float:
        passes = 3 if self.into_trunk else 2
        return 2 * (passes * matrices(self.up) + 3 * matrices(self.down, self.summary)) / ROW_STRIDE

    def kept_bytes(self, work: Work) -> float:
        """Its inputs, and the stream before and after the hint is added."""
        return work.itemsize * work.length * (2 * self.up.in_features + 2 * self.back.out_features)

    def switches(self) -> dict[str, Switch]:
        """Off: the hint is not added to the stream."""

        @contextmanager
        def off(model: Any) -> Iterator[dict[str, Any]]:
            with replaced(self.back.weight, torch.zeros_like(self.back.weight)):
                yield {}

        return {self.name: off}


def summary(embedded_BTE: Tensor, position_BT: Tensor, horizon: int) -> tuple[Tensor, Tensor]:
    """Return the summary of the tokens ahead [B, T, E], and whether any are in it, bool [B, T].

    It is the sum of the normed embeddings of the tokens 2 .. horizon ahead in the same document, each weighted by
    `FADE` relative to the one before it.
    """
    length = position_BT.shape[1]
    normed = norm(embedded_BTE)
    total = torch.zeros_like(normed)
    has_BT = torch.zeros_like(position_BT, dtype=torch.bool)
    for ahead in range(min(horizon, length - 1), 1, -1):
        same_BT = torch.zeros_like(has_BT)
        # Two tokens are in the same document exactly if their positions differ by as much as their indices.
        same_BT[:, : length - ahead] = position_BT[:, ahead:] == position_BT[:, : length - ahead] + ahead
        shifted = F.pad(normed[:, ahead:], (0, 0, 0, ahead))
        total = FADE * total + shifted * same_BT[..., None]
        has_BT = has_BT | same_BT
    return total, has_BT
