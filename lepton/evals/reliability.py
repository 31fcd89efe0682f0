"""Reliability of uncertainty: scores of the uncertainty head beside those of the largest probability.

Each score is a pure function of N predicted chances of being wrong and of the N outcomes (1 wrong, 0 right).
"""

import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from lepton.data.shards import Batch
from lepton.evals.positions import DEFAULT_TOKENS, Outcomes, collect_outcomes
from lepton.model import Network

BINS = 15
"""Bins of the calibration error."""


@dataclass(frozen=True)
class Scores:
    """Scores of predicted chances of being wrong."""

    ece: float
    """Expected calibration error; lower is better."""
    brier: float
    """Mean squared distance to the outcomes; lower is better."""
    auroc: float
    """Probability that a wrong token has a larger chance than a right one; 0.5 is chance (NaN if all are alike)."""
    risk_coverage: float
    """Mean share of wrong tokens among those with the smallest chances, over all coverages; lower is better."""


@dataclass(frozen=True)
class Reliability:
    """Scores of each source of chances, on the same tokens."""

    tokens: int
    wrong: float
    """Share of tokens whose most likely prediction is wrong."""
    temperature: float | None
    """That of 'scaled max-probability'."""
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
    model: Network,
    batches: Iterable[Batch],
    max_tokens: int | None = DEFAULT_TOKENS,
    *,
    temperature: float | None = None,
    carry: bool = False,
    depth: float | None = None,
    think: int | None = None,
) -> Reliability:
    """Compare the model's uncertainty with one minus its largest probability as chances that the greedy token is wrong.

    `temperature` is one that `fit_temperature` found on other text; `carry`, `depth` and `think` as in
    `iterate_positions`.

    Raises:
        InputError: there is nothing to predict.
    """
    fitted = 1.0 if temperature is None else temperature
    outcomes = collect_outcomes(model, batches, max_tokens, temperature=fitted, carry=carry, depth=depth, think=think)
    return reliability(model, outcomes, temperature)


def reliability(model: Network, outcomes: Outcomes, temperature: float | None = None) -> Reliability:
    """Score `outcomes` under `model`'s present calibration; `temperature` is that of their scaled probabilities."""
    chances = {}
    if outcomes.uncertainty_logit_M is not None and model.idea("uncertainty") is not None:
        scale, shift = model.idea("uncertainty").calibration.tolist()
        chances["uncertainty"] = torch.sigmoid(scale * outcomes.uncertainty_logit_M + shift)
    chances["max-probability"] = outcomes.least_confidence_M
    if temperature is not None:
        chances["scaled max-probability"] = outcomes.scaled_least_confidence_M
    scores = {name: score(chance_M, outcomes.wrong_M) for name, chance_M in chances.items()}
    return Reliability(len(outcomes.wrong_M), outcomes.wrong_M.mean().item(), temperature, scores)


def score(chance_M: Tensor, wrong_M: Tensor) -> Scores:
    """Return all scores of M >= 1 chances in 0..1."""
    return Scores(
        calibration_error(chance_M, wrong_M),
        brier(chance_M, wrong_M),
        auroc(chance_M, wrong_M),
        risk_coverage(chance_M, wrong_M),
    )


def brier(chance_M: Tensor, wrong_M: Tensor) -> float:
    """Mean squared distance of the chances to the outcomes (Brier, 1950)."""
    return (chance_M.double() - wrong_M.double()).square().mean().item()


def auroc(chance_M: Tensor, wrong_M: Tensor) -> float:
    """Probability that a random wrong token has a larger chance than a random right one; a tie counts half.

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

    It is the mean, over k = 1 ... M, of the share of wrong tokens among the k smallest chances. Equal chances count as
    equally wrong.
    """
    _, wrong_M = sorted_by_chance(chance_M, wrong_M)
    return (wrong_M.cumsum(0) / torch.arange(1, len(wrong_M) + 1)).mean().item()


def calibration_error(chance_M: Tensor, wrong_M: Tensor, bins: int = BINS) -> float:
    """Expected calibration error in 0..1: mean |chance - share of wrong| over bins of equally many positions.

    Equal chances count as equally wrong, so the result does not depend on the order of the positions.
    """
    chance_M, wrong_M = sorted_by_chance(chance_M, wrong_M)
    parts = zip(chance_M.tensor_split(bins), wrong_M.tensor_split(bins), strict=True)
    return sum((chance - wrong).sum().abs().item() for chance, wrong in parts) / len(chance_M)


def sorted_by_chance(chance_M: Tensor, wrong_M: Tensor) -> tuple[Tensor, Tensor]:
    """Return the chances in rising order and the outcomes beside them, those of equal chances averaged; fp64."""
    values, place_M, counts = chance_M.double().unique(return_inverse=True, return_counts=True)
    shares = torch.zeros_like(values).index_add(0, place_M, wrong_M.double()) / counts
    return values.repeat_interleave(counts), shares.repeat_interleave(counts)
