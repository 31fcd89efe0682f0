"""How far a model's doubt can be trusted: the uncertainty head beside the largest probability, on the same tokens.

All figures are pure functions of M chances of being wrong and of what happened.
"""

import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from lepton.data.shards import Batch
from lepton.errors import InputError
from lepton.model import Lepton
from lepton.train.calibration import TOKENS, Outcomes, calibration_error, collect, sorted_by_chance, walk

TEMPERATURE_TOKENS = 4096
"""Positions on which a temperature is fitted: it is a single number."""
TEMPERATURES = 2.0 ** torch.linspace(-1, 1, 17, dtype=torch.float64)
"""Where its loss is looked at, before a parabola finds the place between."""


@dataclass(frozen=True)
class Scores:
    """How good some chances of being wrong are."""

    ece: float
    """Expected calibration error; lower is better."""
    brier: float
    """Mean squared distance to what happened; lower is better."""
    auroc: float
    """Chance that a wrong token is doubted more than a right one; 0.5 is chance (NaN if all are wrong or right)."""
    risk_coverage: float
    """Mean share of wrong tokens among the least doubted, over all coverages; lower is better."""


@dataclass(frozen=True)
class Reliability:
    """Sources of doubt, measured on the same tokens."""

    tokens: int
    wrong: float
    """Share of tokens whose most likely prediction is not what came."""
    temperature: float | None
    """Under which the scaled largest probability was taken."""
    scores: dict[str, Scores]
    """By source: 'uncertainty' (if the model has it), 'max-probability', 'scaled max-probability' (if fitted)."""

    def to_dict(self) -> dict[str, Any]:
        """Return it as plain values, None for a figure that is not defined."""
        scores = {
            name: {key: None if math.isnan(value) else value for key, value in asdict(part).items()}
            for name, part in self.scores.items()
        }
        return asdict(self) | {"scores": scores}


def measure_uncertainty(
    model: Lepton,
    batches: Iterable[Batch],
    max_tokens: int | None = TOKENS,
    *,
    temperature: float | None = None,
    carry: bool = False,
    depth: float | None = None,
    think: int | None = None,
) -> Reliability:
    """Compare the model's uncertainty with one minus its largest probability as chances that the greedy token is wrong.

    `temperature` is one that `fit_temperature` found on other text; `carry` as in `walk`.

    Raises:
        InputError: there is nothing to predict.
    """
    fitted = 1.0 if temperature is None else temperature
    seen = collect(model, batches, max_tokens, temperature=fitted, carry=carry, depth=depth, think=think)
    return reliability(model, seen, temperature)


def reliability(model: Lepton, seen: Outcomes, temperature: float | None = None) -> Reliability:
    """Score what was collected, under `model`'s present calibration; `temperature` is the one it was collected with."""
    chances = {}
    if seen.logit_M is not None and model.idea("uncertainty") is not None:
        scale, shift = model.idea("uncertainty").calibration.tolist()
        chances["uncertainty"] = torch.sigmoid(scale * seen.logit_M + shift)
    chances["max-probability"] = seen.doubt_M
    if temperature is not None:
        chances["scaled max-probability"] = seen.scaled_doubt_M
    scores = {name: score(chance_M, seen.wrong_M) for name, chance_M in chances.items()}
    return Reliability(len(seen.wrong_M), seen.wrong_M.mean().item(), temperature, scores)


def score(chance_M: Tensor, wrong_M: Tensor) -> Scores:
    """Return all figures of M >= 1 chances in 0..1 against what happened (1 wrong, 0 right)."""
    return Scores(
        calibration_error(chance_M, wrong_M),
        brier(chance_M, wrong_M),
        auroc(chance_M, wrong_M),
        risk_coverage(chance_M, wrong_M),
    )


def brier(chance_M: Tensor, wrong_M: Tensor) -> float:
    """Mean squared distance of the chances to what happened (Brier, 1950)."""
    return (chance_M.double() - wrong_M.double()).square().mean().item()


def auroc(chance_M: Tensor, wrong_M: Tensor) -> float:
    """Chance that a random wrong token has the higher value than a random right one; a tie counts half.

    Exact: the Mann-Whitney statistic, by mean ranks. NaN if there is no wrong token or no right one.
    """
    _, place_M, counts = chance_M.double().unique(return_inverse=True, return_counts=True)
    ranks = counts.cumsum(0) - (counts - 1) / 2
    wrong_M = wrong_M.double()
    wrongs = wrong_M.sum()
    above = (ranks.double()[place_M] * wrong_M).sum() - wrongs * (wrongs + 1) / 2
    return (above / (wrongs * (len(wrong_M) - wrongs))).item()


def risk_coverage(chance_M: Tensor, wrong_M: Tensor) -> float:
    """Area under the risk-coverage curve (Geifman and El-Yaniv, 2017).

    It is the mean, over k = 1 ... M, of the share of wrong among the k least doubted tokens. Equal chances count as
    equally wrong.
    """
    _, wrong_M = sorted_by_chance(chance_M, wrong_M)
    return (wrong_M.cumsum(0) / torch.arange(1, len(wrong_M) + 1)).mean().item()


@torch.no_grad()
def fit_temperature(
    model: Lepton,
    batches: Iterable[Batch],
    max_tokens: int = TEMPERATURE_TOKENS,
    *,
    depth: float | None = None,
    think: int | None = None,
) -> float:
    """Return the temperature by which dividing the logits predicts the tokens best (Guo et al., 2017).

    Raises:
        InputError: there is nothing to predict.
    """
    sums = torch.zeros_like(TEMPERATURES)
    tokens = 0
    for part in walk(model, batches, max_tokens=max_tokens, depth=depth, think=think):
        nats = [cross_entropy(part.logits_MV / t, part.target_M, reduction="sum") for t in TEMPERATURES.tolist()]
        sums += torch.stack(nats).cpu().double()
        tokens += len(part.target_M)
    if not tokens:
        raise InputError("the text holds no token to predict: give a longer one")
    best = min(max(int(sums.argmin()), 1), len(sums) - 2)
    left, middle, right = (sums[best + shift].item() for shift in (-1, 0, 1))
    bend = left - 2 * middle + right
    shift = (left - right) / (2 * bend) if bend > 0 else 0.0
    ratio = (TEMPERATURES[1] / TEMPERATURES[0]).item()
    return TEMPERATURES[best].item() * ratio ** min(max(shift, -1.0), 1.0)
