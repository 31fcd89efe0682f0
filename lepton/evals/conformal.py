"""A threshold on the uncertainty with a promise: of the positions kept, at most a given share is wrong.

The method is split fixed sequence testing of "Learn then test" (Angelopoulos, Bates, Candès, Jordan and Lei, 2021).
For each threshold, "the share of wrong positions among those kept is above the risk" is a hypothesis. A quarter of the
windows says in which order to test: from the threshold with the strongest evidence to looser ones. The other windows
test them in this order until one is not rejected. So the chance that any true hypothesis is rejected, which would be a
broken promise, is at most 1 - `CONFIDENCE`, for any number of windows and any distribution.

The evidence against a hypothesis is the wealth of a gambler who bets against it, window by window (Waudby-Smith and
Ramdas, 2020): if the hypothesis is true, the expected wealth is at most the stake, and by Markov's inequality the
chance of a hundred stakes is at most 1 %.

The unit is the window and not the position. Errors come in bunches, so a bound that takes positions for independent
promises too much. What must hold is that the windows are drawn alike: those to come as those of the calibration.

Shapes: M positions, W windows, C thresholds.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lepton.model.promise import Promise, checked_risk

CONFIDENCE = 0.99
"""With 0.95, the share that is *measured* on as many windows again would be too high in one of eight calibrations
(1.645 / sqrt(2) standard deviations of both measurements); with 0.99 it is in one of twenty."""
ORDER_EVERY = 4
"""Each fourth window orders the thresholds; the others test them."""
CANDIDATES = 200
"""Thresholds that are considered: they keep shares 1/200, 2/200, ..., 1 of the positions."""
BETS = torch.tensor([1 / 64, 1 / 32, 1 / 16, 1 / 8, 1 / 4, 1 / 2, 3 / 4, 0.95], dtype=torch.float64)
"""Shares of the wealth that the worst window takes; an eighth of the stake is on each."""


@dataclass(frozen=True)
class Kept:
    """What a threshold keeps of some positions."""

    share: float
    """Share of the positions that are kept, in 0..1."""
    risk: float | None
    """Share of wrong ones among these; None if nothing is kept."""


def promise(score_M: Tensor, wrong_M: Tensor, window_M: Tensor, length: int, risk: Any, *, data: str = "") -> Promise:
    """Return the loosest threshold whose promise can be made, if there is one.

    Args:
        score_M: the larger, the more doubtful; such as `Outcomes.uncertainty_logit_M`.
        wrong_M: 1 where the most likely token is wrong, else 0.
        window_M: number of the window that a position belongs to, int64 in 0..W-1.
        length: positions of a window, at most.
        risk: share of wrong positions that is accepted, between 0 and 1.
        data: what the windows are of.

    Raises:
        InputError: a risk that does not lie between 0 and 1.
    """
    risk = checked_risk(risk)
    score_M, wrong_M = score_M.double(), wrong_M.double()
    windows = int(window_M.max()) + 1 if len(window_M) else 0
    return Promise(
        risk=risk,
        confidence=CONFIDENCE,
        threshold=_threshold(score_M, wrong_M, window_M, windows, length, risk),
        windows=windows,
        tokens=len(score_M),
        data=data,
    )


def kept(score_M: Tensor, wrong_M: Tensor, threshold: float | None) -> Kept:
    """Return what `threshold` keeps of some positions; None keeps nothing."""
    keep_M = score_M.double() <= (-math.inf if threshold is None else threshold)
    count = int(keep_M.sum())
    if not count:
        return Kept(0.0, None)
    return Kept(count / len(keep_M), wrong_M.double()[keep_M].mean().item())


def log_evidence(balance_WC: Tensor, risk: float) -> Tensor:
    """Return the logarithm of the evidence [C] that the windows' expected balance is negative.

    Where it is not, exp of it is c or more with chance 1 / c at most: it is the wealth of a gambler, averaged over
    `BETS`, whose expectation is then at most 1. It does not depend on the order of the windows.

    Args:
        balance_WC: for independent windows, what each threshold keeps: (wrong positions - risk x positions) / length
            of a window, so in [-risk, 1 - risk]; fp64.
        risk: share of wrong positions that is promised.
    """
    wealth = [torch.log1p(-bet / (1 - risk) * balance_WC).sum(0) for bet in BETS]
    return torch.stack(wealth).logsumexp(0) - math.log(len(BETS))


def windows_wanted(score_M: Tensor, wrong_M: Tensor, window_M: Tensor, length: int, risk: float) -> int | None:
    """Return an estimate of the windows that `promise` needs to find a threshold in text like this.

    None: in these windows no threshold has so few errors. Arguments are those of `promise`.
    """
    if not len(score_M):
        return None
    balance_WC = _balances(score_M, wrong_M, window_M, _thresholds(score_M), length, risk)
    growth = max(torch.log1p(-bet / (1 - risk) * balance_WC).mean(0).max().item() for bet in BETS)
    if growth <= 0:
        return None
    testing = (math.log(len(BETS)) - math.log(1 - CONFIDENCE)) / growth
    return math.ceil(testing * ORDER_EVERY / (ORDER_EVERY - 1))


def _threshold(
    score_M: Tensor, wrong_M: Tensor, window_M: Tensor, windows: int, length: int, risk: float
) -> float | None:
    ordering_W = torch.arange(windows) % ORDER_EVERY == 0
    ordering_M = ordering_W[window_M]
    if ordering_M.all():
        return None
    threshold_C = _thresholds(score_M[ordering_M])
    balance_WC = _balances(score_M, wrong_M, window_M, threshold_C, length, risk)
    first = int(log_evidence(balance_WC[ordering_W], risk).argmax())
    rejected = log_evidence(balance_WC[~ordering_W, first:], risk) >= -math.log(1 - CONFIDENCE)
    count = int(rejected.cumprod(0).sum())
    return threshold_C[first + count - 1].item() if count else None


def _thresholds(score_M: Tensor) -> Tensor:
    """Return the scores up to which shares 1 / `CANDIDATES`, ..., 1 of some positions are kept, in rising order."""
    ranked = score_M.double().sort().values
    places = (torch.linspace(0, 1, CANDIDATES + 1)[1:].double() * len(ranked)).ceil().long().clamp(min=1) - 1
    return ranked[places].unique() if len(ranked) else ranked


def _balances(
    score_M: Tensor, wrong_M: Tensor, window_M: Tensor, threshold_C: Tensor, length: int, risk: float
) -> Tensor:
    """Return the balance [W, C] of each window under each threshold; see `log_evidence`."""
    windows = int(window_M.max()) + 1 if len(window_M) else 0
    # Each position counts from the first threshold that keeps it; the last column is for those that none keeps.
    columns = len(threshold_C) + 1
    place_M = window_M * columns + torch.bucketize(score_M.double(), threshold_C)
    each_M = (wrong_M.double() - risk) / length
    balance = torch.zeros(windows * columns, dtype=torch.float64).index_add(0, place_M, each_M)
    return balance.view(windows, columns)[:, :-1].cumsum(1)
