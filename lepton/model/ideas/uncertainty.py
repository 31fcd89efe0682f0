"""Uncertainty: the chance, for each token, that the model's most likely next token is wrong.

A small head reads features without gradient: of the prediction (largest probability, entropy, margin over the second
token), the last hidden state, and the signals of three ideas (expected benefit of depth, last change of the thoughts,
size of the memory's read). It learns from whether the most likely token was right, and is calibrated on a separate
split.

Doubt is ignorance, or an open choice of several right answers. With `pairs` a second head tells them apart. It learns
from pairs of independent answers to one question, as proposed by Johnson et al. (2024, arXiv 2402.08733): the data's
answers agree with each other with chance s, and an answer of the model agrees with one of them with chance v s. If
right answers are drawn alike, v is the chance that the model's answer is a right one; v is 1 wherever the model's
distribution is the true one. Both chances are means over pairs, so nobody has to say which answers are right.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lepton.config import IdeaConfig, LeptonConfig
from lepton.errors import InputError
from lepton.model.ideas.idea import OUTCOME_STRIDE, SIGNALS, Idea, Outcome, Switch, Work, matrices, picks
from lepton.model.layers import Linear
from lepton.model.parameters import BIAS, MATRIX, ZERO_MATRIX
from lepton.model.promise import Promise
from lepton.ops.cross_entropy import LOGIT_BYTES, soft_cap

FEATURES = 3 + len(SIGNALS)
HIDDEN = 64
"""Width of its hidden layer."""
SURE = 1 - 1e-4
"""Largest chance that has a logit here."""
SPREAD = 2654435761
"""Multiplier that scatters the positions of pairs over a batch (Knuth's multiplicative hash)."""
LOG_ODDS = 15.0
"""Bound of the log-odds of a prediction: beyond it, a probability is 0 or 1 in fp32."""


@dataclass(frozen=True, kw_only=True)
class UncertaintyConfig(IdeaConfig):
    """Uncertainty."""

    pairs: int = 0
    """Ignorance is learned from pairs of independent answers, at one in this many of the positions where a batch may
    have any: the rows 2 i and 2 i + 1, as long as their documents are equal so far. 0: it is not learned."""

    name = "uncertainty"
    most = {"pairs": 1 << 20}
    reads_top = True
    flat_switch = "uncertainty"

    def check(self, config: LeptonConfig) -> None:
        self.at_least(0, "pairs")

    def build(self, config: LeptonConfig) -> "Uncertainty":
        return Uncertainty(config, self)


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


def paired(tokens_BT: Tensor, following_BT: Tensor, position_BT: Tensor) -> Tensor:
    """Return where the rows 2 i and 2 i + 1 hold two answers to one question, bool [B // 2, T].

    There the documents of both rows are equal so far, and each has a token that follows.
    """
    half = len(tokens_BT) // 2
    tokens_H2T, following_H2T, position_H2T = (
        each[: 2 * half].unflatten(0, (half, 2)) for each in (tokens_BT, following_BT, position_BT)
    )
    same_HT = (tokens_H2T[:, 0] == tokens_H2T[:, 1]) & (position_H2T[:, 0] == position_H2T[:, 1])
    index_T = torch.arange(tokens_BT.shape[1], device=tokens_BT.device)
    differed_HT = torch.where(same_HT, -1, index_T).cummax(1).values
    begun_HT = index_T - position_H2T[:, 0]
    return (differed_HT < begun_HT) & (following_H2T >= 0).all(1) & (position_H2T[:, 0] >= 0)


def self_agreement(logits: Tensor) -> Tensor:
    """Return the logarithm of the chance [...] that two draws from a prediction [..., V] are equal, no gradient."""
    logits = logits.detach()
    return torch.logsumexp(2 * logits, -1) - 2 * torch.logsumexp(logits, -1)


def knowledge_loss(right_M: Tensor, agree_M: Tensor, chance_M2: Tensor) -> Tensor:
    """Return the cross-entropy [M] of an answer of the model agreeing with those of the data.

    Args:
        right_M: logit that an answer of the model is a right one.
        agree_M: logit that two answers of the data agree; it gets no gradient.
        chance_M2: the model's chance of each of the two answers.
    """
    log_M = F.logsigmoid(right_M) + F.logsigmoid(agree_M).detach()
    mean_M = chance_M2.mean(-1)
    return -mean_M * log_M - (1 - mean_M) * torch.log1p(-log_M.exp().clamp(max=SURE))


class Ignorance(nn.Module):
    """An MLP that says how open a question is, and whether the model's answers to it are right."""

    declares = {
        "state.weight": MATRIX.but(optimizer="adamw", auxiliary=True),
        "features.weight": MATRIX.but(optimizer="adamw", auxiliary=True),
        "features.bias": BIAS.but(auxiliary=True),
        "out.weight": ZERO_MATRIX.but(optimizer="adamw", auxiliary=True),
        "out.bias": BIAS.but(auxiliary=True),
    }
    line: Tensor

    def __init__(self, width: int) -> None:
        super().__init__()
        self.state = Linear(width, HIDDEN)
        self.features = nn.Linear(FEATURES + 1, HIDDEN)
        self.out = nn.Linear(HIDDEN, 2)
        # Scale and shift of the first logit, fitted to pairs that neither head nor trunk learned from.
        self.register_buffer("line", torch.empty(2))

    def reset(self) -> None:
        """Scale 1 and shift 0: not calibrated yet."""
        self.line.copy_(torch.tensor([1.0, 0.0]))

    def forward(self, hidden: Tensor, inputs: Tensor) -> tuple[Tensor, Tensor]:
        """Return the logits [...] of the model's answer being right, not calibrated, and of two answers agreeing.

        `inputs` are features, signals and the model's self-agreement [..., FEATURES + 1], without gradient, as
        `hidden`. A model that is calibrated agrees with the data as with itself; this is where the head starts.
        """
        mixed = self.state(hidden.detach()).to(inputs.dtype) + _linear(self.features, inputs)
        right, agree = _linear(self.out, F.silu(mixed)).unbind(-1)
        share = (inputs[..., -1] - F.logsigmoid(agree).detach()).exp()
        return right + torch.logit(share, eps=1 - SURE), agree

    def loss(self, hidden_MD: Tensor, inputs_MF: Tensor, same_M: Tensor, chance_M2: Tensor) -> Tensor:
        """Return the losses [M] of pairs of answers: whether they are the same, and the model's chance of each."""
        right_M, agree_M = self(hidden_MD, inputs_MF)
        agreeing_M = F.binary_cross_entropy_with_logits(agree_M, same_M.to(agree_M.dtype), reduction="none")
        return agreeing_M + knowledge_loss(right_M, agree_M, chance_M2)


def _linear(layer: nn.Linear, inputs: Tensor) -> Tensor:
    return F.linear(inputs, layer.weight.to(inputs.dtype), layer.bias.to(inputs.dtype))


class Uncertainty(Idea):
    """The log-odds of the prediction plus an MLP's correction, calibrated by a line."""

    name = "uncertainty"
    compiled: tuple[str, ...] = ("loss",)
    loss_weights = {"uncertainty": 0.1, "pairs": 0.1}
    declares = {
        "state.weight": MATRIX.but(auxiliary=True),
        "features.weight": MATRIX.but(auxiliary=True),
        "features.bias": BIAS.but(auxiliary=True),
        "out.weight": ZERO_MATRIX.but(auxiliary=True),
    }
    calibration: Tensor

    def __init__(self, config: LeptonConfig, own: UncertaintyConfig) -> None:
        super().__init__()
        self.own = own
        self.vocab_size, self.cap = config.vocab_size, config.logit_cap
        self.state = Linear(config.width, HIDDEN)
        self.features = nn.Linear(FEATURES, HIDDEN)
        self.out = Linear(HIDDEN, 1)
        self.pairs = Ignorance(config.width) if own.pairs else None
        if own.pairs:
            self.compiled = ("loss", "pair_loss")
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

    def ignorance(self, hidden: Tensor, logits: Tensor, signals: Tensor) -> Tensor:
        """Return the calibrated chance [...] in 0..1 that a token drawn from the prediction is no right answer.

        Arguments are those of `logit`.

        Raises:
            InputError: the head did not learn from pairs.
        """
        if self.pairs is None:
            raise InputError("uncertainty.pairs=0: this model learned nothing of ignorance; train one with it above 0")
        features, _ = prediction_features(logits)
        right, _ = self.pairs(hidden, self._pair_inputs(logits, features, signals))
        scale, shift = self.pairs.line.to(right.dtype)
        return torch.sigmoid(-(scale * right + shift))

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self.promises = ()

    def loss(self, hidden_MD: Tensor, raw_MV: Tensor, signals_M3: Tensor, target_M: Tensor) -> Tensor:
        """Return the mean binary cross-entropy of being wrong, over the positions with a `target_M` of at least 0.

        `raw_MV` are logits before the soft cap, for the vocabulary with its padding.
        """
        features_M3, likely_M = prediction_features(self._capped(raw_MV))
        wrong_M = (likely_M != target_M).to(features_M3.dtype)
        logit_M = self._logit(hidden_MD, features_M3, signals_M3)
        each_M = F.binary_cross_entropy_with_logits(logit_M, wrong_M, reduction="none")
        valid_M = target_M >= 0
        return (each_M * valid_M).sum() / valid_M.sum().clamp(min=1)

    def pair_loss(
        self, hidden_MD: Tensor, raw_MV: Tensor, signals_M3: Tensor, target_M2: Tensor, valid_M: Tensor
    ) -> Tensor:
        """Return the mean loss of the pairs `target_M2` with a true `valid_M`; others are those of `loss`."""
        assert self.pairs is not None
        logits_MV = self._capped(raw_MV)
        features_M3, _ = prediction_features(logits_MV)
        chance_M2 = (logits_MV.gather(1, target_M2.clamp(min=0)) - logits_MV.logsumexp(1, keepdim=True)).exp()
        inputs_MF = self._pair_inputs(logits_MV, features_M3, signals_M3)
        each_M = self.pairs.loss(hidden_MD, inputs_MF, target_M2[:, 0] == target_M2[:, 1], chance_M2)
        return (each_M * valid_M).sum() / valid_M.sum().clamp(min=1)

    def _capped(self, raw_MV: Tensor) -> Tensor:
        raw_MV = raw_MV.detach()[:, : self.vocab_size]
        return soft_cap(raw_MV.to(torch.promote_types(raw_MV.dtype, torch.float32)), self.cap)

    def _pair_inputs(self, logits: Tensor, features: Tensor, signals: Tensor) -> Tensor:
        return torch.cat([features, signals.detach().to(features.dtype), self_agreement(logits)[..., None]], -1)

    def _logit(self, hidden: Tensor, features: Tensor, signals: Tensor) -> Tensor:
        shift = _linear(self.features, torch.cat([features, signals.detach().to(features.dtype)], -1))
        mixed = self.state(hidden.detach()).to(features.dtype) + shift
        return features[..., 0] + self.out(F.silu(mixed))[..., 0]

    def losses(self, outcome: Outcome) -> dict[str, Tensor]:
        """The loss at sampled positions, and that of sampled pairs."""
        index_M = picks(outcome.following_BT, OUTCOME_STRIDE)
        target_M = outcome.following_BT.flatten()[index_M]
        found = {"uncertainty": self.loss(*_seen(outcome, index_M), target_M)}
        if self.pairs is not None:
            index_M, valid_M = self._pairs_of(outcome)
            length = outcome.following_BT.shape[1]
            # In the flattened batch the other answer lies one row further.
            target_M2 = outcome.following_BT.flatten()[torch.stack([index_M, index_M + length], 1)]
            found["pairs"] = self.pair_loss(*_seen(outcome, index_M), target_M2, valid_M)
        return found

    def _pairs_of(self, outcome: Outcome) -> tuple[Tensor, Tensor]:
        """Return indices of sampled positions in the flattened batch, and which of them have a pair.

        Shapes do not depend on values. What is sampled is a pure function of the batch.
        """
        paired_HT = paired(outcome.flow.tokens_BT, outcome.following_BT, outcome.position_BT)
        place_N = torch.arange(paired_HT.numel(), device=paired_HT.device)
        turn_N = (place_N * SPREAD + outcome.following_BT.sum()) % (1 << 31)
        count = -(-len(place_N) // self.own.pairs)
        turn_M, place_M = torch.where(paired_HT.flatten(), turn_N, -1).topk(count)
        length = paired_HT.shape[1]
        return place_M + place_M // length * length, turn_M >= 0

    def flops(self, work: Work) -> float:
        """Generation does not ask for ignorance."""
        return work.length * matrices(self.state, self.features, self.out)

    def extra_training_flops(self, work: Work, head: int) -> float:
        """The losses use sampled positions only, whereas `flops` counts all."""
        once = matrices(self.state, self.features, self.out)
        sampled = 2 * (2 * matrices(self.state, self.features) + 3 * matrices(self.out) + head) / OUTCOME_STRIDE
        if self.pairs is not None:
            inner = matrices(self.pairs.state, self.pairs.features)
            sampled += (2 * inner + 3 * matrices(self.pairs.out) + head) / self.own.pairs
        return sampled - 3 * 2 * once

    def logits_bytes(self, positions: int, vocab_size: int, itemsize: int) -> int:
        return LOGIT_BYTES * vocab_size * -(-positions // min(OUTCOME_STRIDE, 2 * self.own.pairs or OUTCOME_STRIDE))

    def switches(self) -> dict[str, Switch]:
        """No switches: the predictions do not depend on it."""
        return {}


def _seen(outcome: Outcome, index_M: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return hidden states, logits before the soft cap, and signals at positions of the flattened batch."""
    hidden_MD = outcome.hidden_BTD.detach().flatten(0, 1)[index_M]
    with torch.no_grad():
        raw_MV = outcome.model.head_down(hidden_MD) @ outcome.rows_VE.T
    return hidden_MD, raw_MV, outcome.flow.signals(*SIGNALS).flatten(0, 1)[index_M]
