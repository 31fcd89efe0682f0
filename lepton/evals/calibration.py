"""Calibration: fitting what a model's scores mean, on text that it was not trained on.

Three things are fitted, none of which changes a prediction at full depth: the line that turns the logit of the
uncertainty head into a chance (Platt, 1999), the router's table of quantiles, which turns a share of tokens into a
score, and a temperature of the logits (Guo et al., 2017), for comparison alone.

Shapes: N positions.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from lepton.data.shards import Batch
from lepton.errors import InputError
from lepton.evals.positions import DEFAULT_TOKENS, collect_outcomes, iterate_positions
from lepton.model import Network

MIN_TOKENS = 1000
"""Fewest positions that anything is fitted on. Sampling alone moves a fitted chance by about sqrt(p (1 - p) / N):
0.01 for N = 1,000 and 0.2 for N = 4, while calibration removes an error of 0.01 to 0.05. After 80 steps of a NANO, fits
to 4, 64, 250, 1,000 and 4,000 random positions left calibration errors of 0.166, 0.052, 0.025, 0.022 and 0.021 on other
text; without a fit it was 0.016. So below 1,000 positions a fit can only do harm."""
PRIOR = 1e-3
"""Weight, in observations, of the identity as prior of the line: it decides where all logits are equal."""
TEMPERATURE_TOKENS = 4096
"""Positions on which a temperature is fitted: it is a single number."""
TEMPERATURES = 2.0 ** torch.linspace(-1, 1, 17, dtype=torch.float64)
"""Grid on which the loss is computed; a parabola through three points of it gives the minimum."""


@dataclass(frozen=True)
class Calibration:
    """Result of `calibrate`."""

    tokens: int
    """Positions that were read."""
    line: tuple[float, float] | None
    """Scale and shift of the uncertainty's logit (None without the idea, or where nothing was fitted)."""
    quantiles: Tensor | None
    """Scores of the router at the quantiles 0, 1/64, ..., 1, fp64 (None as above)."""


@torch.no_grad()
def calibrate(
    model: Network, batches: Iterable[Batch], max_tokens: int = DEFAULT_TOKENS, *, min_tokens: int = MIN_TOKENS
) -> Calibration:
    """Fit the uncertainty's line and the router's quantiles on `batches`, and put them into `model`'s buffers.

    A model without router and uncertainty is left unchanged. So is one with fewer than `min_tokens` positions: its
    present calibration, at first the identity, is then better than a fit.

    Args:
        model: in eval mode.
        batches: windows that the model was not trained on, such as those of `calibration_batches`.
        max_tokens: positions that are read, at most.
        min_tokens: fewest positions that anything is fitted on.
    """
    if model.idea("router") is None and model.idea("uncertainty") is None:
        return Calibration(0, None, None)
    outcomes = collect_outcomes(model, batches, max_tokens, allow_none=True)
    tokens = len(outcomes.wrong_M)
    if tokens < max(min_tokens, 1):
        return Calibration(tokens, None, None)
    line, quantiles = None, None
    if model.idea("uncertainty") is not None and outcomes.uncertainty_logit_M is not None:
        line = fit_line(outcomes.uncertainty_logit_M, outcomes.wrong_M)
        model.idea("uncertainty").calibration.copy_(torch.tensor(line))
    if model.idea("router") is not None and outcomes.router_score_M is not None:
        places = torch.linspace(0, 1, len(model.idea("router").quantiles), dtype=torch.float64)
        quantiles = outcomes.router_score_M.quantile(places)
        model.idea("router").quantiles.copy_(quantiles)
    return Calibration(tokens, line, quantiles)


def fit_line(logit_M: Tensor, wrong_M: Tensor) -> tuple[float, float]:
    """Return the scale and shift under which `sigmoid(scale * logit + shift)` fits the outcomes best.

    Maximum likelihood by Newton's method in fp64 (Platt, 1999; Lin, Lin and Weng, 2007). Platt's targets, a little
    inside of 0 and 1, keep the line finite where the logits separate the outcomes.
    """
    wrongs = wrong_M.double().sum()
    rights = len(wrong_M) - wrongs
    target_M = torch.where(wrong_M > 0, (wrongs + 1) / (wrongs + 2), 1 / (rights + 2))
    input_M2 = torch.stack([logit_M.double(), torch.ones_like(target_M)], -1)
    neutral_2 = torch.tensor([1.0, 0.0], dtype=torch.float64)

    def cost(line_2: Tensor) -> Tensor:
        score_M = input_M2 @ line_2
        return (F.softplus(score_M) - target_M * score_M).sum() + PRIOR / 2 * (line_2 - neutral_2).square().sum()

    line_2 = neutral_2
    for _ in range(100):
        chance_M = torch.sigmoid(input_M2 @ line_2)
        gradient_2 = input_M2.T @ (chance_M - target_M) + PRIOR * (line_2 - neutral_2)
        weight_M1 = (chance_M * (1 - chance_M))[:, None]
        hessian_22 = input_M2.T @ (weight_M1 * input_M2) + PRIOR * torch.eye(2, dtype=torch.float64)
        step_2 = torch.linalg.solve(hessian_22, gradient_2)
        while cost(line_2 - step_2) > cost(line_2) and step_2.abs().max() > 1e-12:
            step_2 = step_2 / 2
        line_2 = line_2 - step_2
        if step_2.abs().max() < 1e-10:
            break
    scale, shift = line_2.tolist()
    return scale, shift


@torch.no_grad()
def fit_temperature(
    model: Network,
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
    for part in iterate_positions(model, batches, max_tokens=max_tokens, depth=depth, think=think):
        nats = [F.cross_entropy(part.logits_MV / t, part.target_M, reduction="sum") for t in TEMPERATURES.tolist()]
        sums += torch.stack(nats).cpu().double()
        tokens += len(part.target_M)
    if not tokens:
        raise InputError("the text holds no token to predict: give a longer one")
    best = min(max(int(sums.argmin()), 1), len(sums) - 2)
    left, middle, right = (sums[best + shift].item() for shift in (-1, 0, 1))
    curvature = left - 2 * middle + right
    shift = (left - right) / (2 * curvature) if curvature > 0 else 0.0
    ratio = (TEMPERATURES[1] / TEMPERATURES[0]).item()
    return TEMPERATURES[best].item() * ratio ** min(max(shift, -1.0), 1.0)
