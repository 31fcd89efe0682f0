"""Uncertainty: the chance, for each token, that the model's most likely next token is wrong.

A small head on stopped features: what the prediction looks like (largest probability, entropy, lead over the second),
and what the model knows beside it (top state, expected benefit of depth, how much the thoughts still moved, how
strongly the memory answered). Trained by the true outcomes, calibrated on a split of its own.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lepton.config import LeptonConfig
from lepton.model.attention import Linear

FEATURES = 6
HIDDEN = 64
# Bound of the log-odds that a prediction shows: further out a chance is 0 or 1 in fp32.
LOG_ODDS = 15.0


def prediction_features(logits: Tensor) -> Tensor:
    """Log-odds that the most likely next token is wrong, entropy, and lead over the second: [..., 3], no gradient.

    `logits` are [..., V]; all in nats.
    """
    logits = logits.detach()
    log_p = logits.log_softmax(-1)
    first, second = log_p.topk(2, -1).values.unbind(-1)
    entropy = -(log_p.exp() * log_p).sum(-1)
    odds = torch.log(-torch.expm1(first).clamp(max=-1e-7)) - first
    return torch.stack([odds.clamp(-LOG_ODDS, LOG_ODDS), entropy, first - second], -1)


class Uncertainty(nn.Module):
    """The log-odds that the prediction shows, plus what an MLP adds to them, and the line that calibrates the sum."""

    calibration: Tensor

    def __init__(self, config: LeptonConfig) -> None:
        super().__init__()
        self.state = Linear(config.width, HIDDEN)
        self.features = nn.Linear(FEATURES, HIDDEN)
        self.out = Linear(HIDDEN, 1)
        # Scale and shift of the logit, fitted by `lepton calibrate`.
        self.register_buffer("calibration", torch.empty(2))

    def logit(self, hidden: Tensor, logits: Tensor, signals: Tensor) -> Tensor:
        """Raw logit [...] of being wrong. `signals` [..., 3]: benefit of depth, thought change, memory strength."""
        shown = prediction_features(logits)
        features = torch.cat([shown, signals.detach().to(logits.dtype)], -1)
        layer = self.features
        shift = F.linear(features, layer.weight.to(features.dtype), layer.bias.to(features.dtype))
        mixed = self.state(hidden.detach()).to(logits.dtype) + shift
        return shown[..., 0] + self.out(F.silu(mixed))[..., 0]

    def forward(self, hidden: Tensor, logits: Tensor, signals: Tensor) -> Tensor:
        """Calibrated chance [...] in 0..1 that the most likely token is wrong."""
        scale, shift = self.calibration.to(logits.dtype)
        return torch.sigmoid(scale * self.logit(hidden, logits, signals) + shift)

    def loss(self, hidden: Tensor, logits: Tensor, signals: Tensor, target: Tensor) -> Tensor:
        """Mean binary cross-entropy against what happened; positions with a negative `target` do not count."""
        wrong = (logits.argmax(-1) != target).to(logits.dtype)
        each = F.binary_cross_entropy_with_logits(self.logit(hidden, logits, signals), wrong, reduction="none")
        valid = target >= 0
        return (each * valid).sum() / valid.sum().clamp(min=1)
