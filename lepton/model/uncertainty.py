"""Uncertainty: the chance, for each token, that the model's most likely next token is wrong.

A small head on stopped features: what the prediction looks like (largest probability, entropy, lead over the second),
and what the model knows beside it (top state, expected benefit of depth, how much the thoughts still moved, how
strongly the memory answered). Trained by the true outcomes, calibrated on a split of its own.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lepton.config import LeptonConfig
from lepton.model.layers import Linear
from lepton.ops.cross_entropy import soft_cap

FEATURES = 6
HIDDEN = 64
# Bound of the log-odds that a prediction shows: further out a chance is 0 or 1 in fp32.
LOG_ODDS = 15.0


def prediction_features(logits: Tensor) -> tuple[Tensor, Tensor]:
    """What the prediction looks like [..., 3], without gradient, and the most likely next token [...].

    The former are the log-odds that this token is wrong, entropy, and lead over the second. `logits` are [..., V]; all
    in nats. Nothing is sorted, and what is as large as the logits is made only to be summed up: a compiler stores none
    of it.
    """
    logits = logits.detach()
    likely = logits.argmax(-1)
    place = torch.arange(logits.shape[-1], device=logits.device)
    behind = logits - logits.amax(-1, keepdim=True)
    others = behind.masked_fill(place == likely[..., None], float("-inf"))
    odds = others.exp()  # of each other token against the most likely
    against = odds.sum(-1)
    entropy = against.log1p() - (odds * behind).sum(-1) / (1 + against)
    shown = torch.stack([against.log().clamp(-LOG_ODDS, LOG_ODDS), entropy, -others.amax(-1)], -1)
    return shown, likely


class Uncertainty(nn.Module):
    """The log-odds that the prediction shows, plus what an MLP adds to them, and the line that calibrates the sum."""

    calibration: Tensor

    def __init__(self, config: LeptonConfig) -> None:
        super().__init__()
        self.vocab_size, self.cap = config.vocab_size, config.logit_cap
        self.state = Linear(config.width, HIDDEN)
        self.features = nn.Linear(FEATURES, HIDDEN)
        self.out = Linear(HIDDEN, 1)
        # Scale and shift of the logit, fitted by `lepton calibrate`.
        self.register_buffer("calibration", torch.empty(2))

    def logit(self, hidden: Tensor, logits: Tensor, signals: Tensor) -> Tensor:
        """Raw logit [...] of being wrong. `signals` [..., 3]: benefit of depth, thought change, memory strength."""
        shown, _ = prediction_features(logits)
        return self._logit(hidden, shown, signals)

    def forward(self, hidden: Tensor, logits: Tensor, signals: Tensor) -> Tensor:
        """Calibrated chance [...] in 0..1 that the most likely token is wrong."""
        scale, shift = self.calibration.to(logits.dtype)
        return torch.sigmoid(scale * self.logit(hidden, logits, signals) + shift)

    def loss(self, hidden_MD: Tensor, raw_MV: Tensor, signals_M3: Tensor, target_M: Tensor) -> Tensor:
        """Mean binary cross-entropy against what happened; positions with a negative `target_M` do not count.

        `raw_MV` are the products that the head makes logits of, for the vocabulary with its padding.
        """
        raw_MV = raw_MV.detach()[:, : self.vocab_size]
        logits_MV = soft_cap(raw_MV.to(torch.promote_types(raw_MV.dtype, torch.float32)), self.cap)
        shown_M3, likely_M = prediction_features(logits_MV)
        wrong_M = (likely_M != target_M).to(logits_MV.dtype)
        logit_M = self._logit(hidden_MD, shown_M3, signals_M3)
        each_M = F.binary_cross_entropy_with_logits(logit_M, wrong_M, reduction="none")
        valid_M = target_M >= 0
        return (each_M * valid_M).sum() / valid_M.sum().clamp(min=1)

    def _logit(self, hidden: Tensor, shown: Tensor, signals: Tensor) -> Tensor:
        features = torch.cat([shown, signals.detach().to(shown.dtype)], -1)
        layer = self.features
        shift = F.linear(features, layer.weight.to(features.dtype), layer.bias.to(features.dtype))
        mixed = self.state(hidden.detach()).to(shown.dtype) + shift
        return shown[..., 0] + self.out(F.silu(mixed))[..., 0]
