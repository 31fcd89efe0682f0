"""Uncertainty: the chance, for each token, that the model's most likely next token is wrong.

A small head reads features without gradient: of the prediction (largest probability, entropy, margin over the second
token), the last hidden state, and the signals of three ideas (expected benefit of depth, last change of the thoughts,
size of the memory's read). It learns from whether the most likely token was right, and is calibrated on a separate
split.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lepton.config import IdeaConfig, LeptonConfig
from lepton.model.ideas.idea import OUTCOME_STRIDE, SIGNALS, Idea, Outcome, Switch, Work, matrices, picks
from lepton.model.layers import Linear
from lepton.model.parameters import BIAS, MATRIX, ZERO_MATRIX
from lepton.model.promise import Promise
from lepton.ops.cross_entropy import soft_cap

FEATURES = 3 + len(SIGNALS)
HIDDEN = 64
"""Width of its hidden layer."""
LOG_ODDS = 15.0
"""Bound of the log-odds of a prediction: beyond it, a probability is 0 or 1 in fp32."""


@dataclass(frozen=True, kw_only=True)
class UncertaintyConfig(IdeaConfig):
    """Uncertainty; it has no fields."""

    name = "uncertainty"
    reads_top = True
    flat_switch = "uncertainty"

    def build(self, config: LeptonConfig) -> "Uncertainty":
        return Uncertainty(config)


def prediction_features(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Return features of a prediction [..., 3], without gradient, and the most likely next token [...].

    The features are the log-odds that this token is wrong, the entropy, and the margin over the second token, in nats.
    `logits` are [..., V]. Nothing is sorted, and everything of the size of the logits goes into a sum, so a compiler
    stores none of it.
    """
    logits = logits.detach()
    likely = logits.argmax(-1)
    place = torch.arange(logits.shape[-1], device=logits.device)
    relative = logits - logits.amax(-1, keepdim=True)
    others = relative.masked_fill(place == likely[..., None], float("-inf"))
    odds = others.exp()  # of each other token, relative to the most likely one
    against = odds.sum(-1)
    entropy = against.log1p() - (odds * relative).sum(-1) / (1 + against)
    features = torch.stack([against.log().clamp(-LOG_ODDS, LOG_ODDS), entropy, -others.amax(-1)], -1)
    return features, likely


class Uncertainty(Idea):
    """The log-odds of the prediction plus an MLP's correction, calibrated by a line."""

    name = "uncertainty"
    compiled = ("loss",)
    loss_weights = {"uncertainty": 0.1}
    declares = {
        "state.weight": MATRIX.but(auxiliary=True),
        "features.weight": MATRIX.but(auxiliary=True),
        "features.bias": BIAS.but(auxiliary=True),
        "out.weight": ZERO_MATRIX.but(auxiliary=True),
    }
    calibration: Tensor

    def __init__(self, config: LeptonConfig) -> None:
        super().__init__()
        self.vocab_size, self.cap = config.vocab_size, config.logit_cap
        self.state = Linear(config.width, HIDDEN)
        self.features = nn.Linear(FEATURES, HIDDEN)
        self.out = Linear(HIDDEN, 1)
        # Scale and shift of the logit, fitted by `lepton calibrate`.
        self.register_buffer("calibration", torch.empty(2))
        self.promises: tuple[Promise, ...] = ()
        """What `lepton calibrate --risk` found for these weights; other weights, once loaded, have none."""

    def reset(self) -> None:
        """Scale 1 and shift 0: not calibrated yet."""
        self.calibration.copy_(torch.tensor([1.0, 0.0]))

    def logit(self, hidden: Tensor, logits: Tensor, signals: Tensor) -> Tensor:
        """Return the logit [...] of being wrong, not calibrated; `signals` are those of `SIGNALS`, [..., 3]."""
        features, _ = prediction_features(logits)
        return self._logit(hidden, features, signals)

    def forward(self, hidden: Tensor, logits: Tensor, signals: Tensor) -> Tensor:
        """Return the calibrated chance [...] in 0..1 that the most likely token is wrong."""
        return self.chance(self.logit(hidden, logits, signals))

    def chance(self, logit: Tensor) -> Tensor:
        """Return the calibrated chance for what `logit` returned."""
        scale, shift = self.calibration.to(logit.dtype)
        return torch.sigmoid(scale * logit + shift)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self.promises = ()

    def loss(self, hidden_MD: Tensor, raw_MV: Tensor, signals_M3: Tensor, target_M: Tensor) -> Tensor:
        """Return the mean binary cross-entropy of being wrong, over the positions with a `target_M` of at least 0.

        `raw_MV` are logits before the soft cap, for the vocabulary with its padding.
        """
        raw_MV = raw_MV.detach()[:, : self.vocab_size]
        logits_MV = soft_cap(raw_MV.to(torch.promote_types(raw_MV.dtype, torch.float32)), self.cap)
        features_M3, likely_M = prediction_features(logits_MV)
        wrong_M = (likely_M != target_M).to(logits_MV.dtype)
        logit_M = self._logit(hidden_MD, features_M3, signals_M3)
        each_M = F.binary_cross_entropy_with_logits(logit_M, wrong_M, reduction="none")
        valid_M = target_M >= 0
        return (each_M * valid_M).sum() / valid_M.sum().clamp(min=1)

    def _logit(self, hidden: Tensor, features: Tensor, signals: Tensor) -> Tensor:
        inputs = torch.cat([features, signals.detach().to(features.dtype)], -1)
        layer = self.features
        shift = F.linear(inputs, layer.weight.to(inputs.dtype), layer.bias.to(inputs.dtype))
        mixed = self.state(hidden.detach()).to(features.dtype) + shift
        return features[..., 0] + self.out(F.silu(mixed))[..., 0]

    def losses(self, outcome: Outcome) -> dict[str, Tensor]:
        """The loss at sampled positions."""
        index_M, model = picks(outcome.following_BT, OUTCOME_STRIDE), outcome.model
        hidden_MD = outcome.hidden_BTD.detach().flatten(0, 1)[index_M]
        with torch.no_grad():
            raw_MV = model.head_down(hidden_MD) @ outcome.rows_VE.T
        signals_M3 = outcome.flow.signals(*SIGNALS).flatten(0, 1)[index_M]
        target_M = outcome.following_BT.flatten()[index_M]
        return {"uncertainty": self.loss(hidden_MD, raw_MV, signals_M3, target_M)}

    def flops(self, work: Work) -> float:
        return work.length * matrices(self)

    def extra_training_flops(self, work: Work, head: int) -> float:
        """The loss uses sampled positions only, whereas `flops` counts all."""
        sampled = 2 * (2 * matrices(self.state, self.features) + 3 * matrices(self.out) + head) / OUTCOME_STRIDE
        return sampled - 3 * 2 * matrices(self)

    def logits_stride(self) -> int:
        return OUTCOME_STRIDE

    def switches(self) -> dict[str, Switch]:
        """No switches: the predictions do not depend on it."""
        return {}
