"""The promise: the share of wrong tokens among those kept is at most the risk, in nearly every calibration."""

import math

import pytest
import torch

from lepton.errors import InputError
from lepton.evals.conformal import CONFIDENCE, Kept, kept, log_evidence, promise, windows_wanted

LENGTH = 32
TRIALS = 100


def world(windows, seed, *, ties=False, mood=1.0, shift=0.0):
    """Scores and outcomes of windows; the score is the logit of the chance but for the window's own `mood`.

    So the tokens of a window depend on each other: a window may be wrong all over while its scores are low.
    """
    generator = torch.Generator().manual_seed(seed)
    draw = torch.randn(windows, LENGTH, generator=generator, dtype=torch.float64)
    mood_W1 = mood * torch.randn(windows, 1, generator=generator, dtype=torch.float64)
    score = 2 * draw - 1
    if ties:
        score = (score / 2).round() * 2
    chance = torch.sigmoid(score + mood_W1 + shift)
    wrong = (torch.rand(windows, LENGTH, generator=generator, dtype=torch.float64) < chance).double()
    number = torch.arange(windows)[:, None].expand(-1, LENGTH)
    return score.flatten(), wrong.flatten(), number.flatten()


def all_wrong(windows, seed):
    score, _, number = world(windows, seed)
    return score, torch.ones_like(score), number


@pytest.mark.parametrize(
    ("options", "risk", "least"),
    [
        ({"mood": 0.0}, 0.2, 0.2),  # tokens on their own
        ({"mood": 0.0}, 0.05, 0.0),
        ({"mood": 1.0}, 0.2, 0.1),  # windows that are wrong all over
        ({"mood": 2.0}, 0.3, 0.1),
        ({"mood": 1.0, "ties": True}, 0.2, 0.05),
    ],
)
def test_the_promise_is_kept_in_95_of_100_calibrations(options, risk, least):
    """On as many windows as were calibrated on, where the measurement errs too, and on six times as many."""
    count, true, measured, shares = 800, 0, 0, 0.0
    for seed in range(TRIALS):
        threshold = promise(*world(count, seed, **options), LENGTH, risk).threshold
        score, wrong, _ = world(6 * count, 10_000 + seed, **options)
        every, part = (
            kept(score, wrong, threshold),
            kept(*(each[: count * LENGTH] for each in (score, wrong)), threshold),
        )
        true, measured = true + ((every.risk or 0.0) <= risk), measured + ((part.risk or 0.0) <= risk)
        shares += every.share / TRIALS
    assert min(true, measured) >= 95
    assert shares >= least, "a promise that keeps nothing is kept by everyone"


@pytest.mark.parametrize("windows", [0, 1, 2, 12])
def test_few_windows_promise_nothing(windows):
    made = promise(*world(windows, 0), LENGTH, 0.2)
    assert (made.threshold, made.windows, made.tokens) == (None, windows, windows * LENGTH)


def test_where_all_is_wrong_everything_is_abstained_from():
    assert all(promise(*all_wrong(1000, seed), LENGTH, 0.9).threshold is None for seed in range(5))


def test_where_all_is_right_everything_is_kept():
    score, wrong, number = world(1000, 0)
    made = promise(score, torch.zeros_like(wrong), number, LENGTH, 0.05)
    assert made.threshold == score[number % 4 == 0].max()
    assert kept(score, wrong, made.threshold).share > 0.999


def test_equal_scores_are_kept_or_abstained_from_together():
    """All alike: the threshold keeps everything where the share of wrong ones is low, and nothing where it is high."""
    _, wrong, number = world(1000, 0, shift=-3.0, mood=0.0)
    score = torch.zeros_like(wrong)
    assert wrong.mean() < 0.15
    assert promise(score, wrong, number, LENGTH, 0.2).threshold == 0
    assert promise(score, wrong, number, LENGTH, 0.05).threshold is None


def test_a_larger_risk_keeps_more():
    draw = world(2000, 3, shift=0.5)
    shares = [kept(*draw[:2], promise(*draw, LENGTH, risk).threshold).share for risk in (0.1, 0.2, 0.3, 0.4)]
    assert shares == sorted(shares)
    assert shares[0] > 0
    assert shares[-1] < 1


def test_the_windows_that_are_wanted_are_about_those_that_suffice():
    few = world(60, 0, mood=1.0)
    assert promise(*few, LENGTH, 0.2).threshold is None
    wanted = windows_wanted(*few, LENGTH, 0.2)
    assert 100 < wanted < 2000
    found = [promise(*world(2 * wanted, seed), LENGTH, 0.2).threshold for seed in range(10)]
    assert sum(each is not None for each in found) >= 8
    assert windows_wanted(*all_wrong(100, 0), LENGTH, 0.2) is None
    assert windows_wanted(*(each[:0] for each in few), LENGTH, 0.2) is None


def test_out_of_domain_the_promise_does_not_hold():
    """What the documentation warns of: the same scores, and three times the errors."""
    made = promise(*world(1000, 0), LENGTH, 0.2)
    assert kept(*world(6000, 1)[:2], made.threshold).risk <= 0.2
    assert kept(*world(6000, 1, shift=2.0)[:2], made.threshold).risk > 0.3


def test_the_evidence_is_rarely_large_where_the_risk_is_too_high():
    """On the border, windows are right or wrong as a whole: the worst case for the bound."""
    generator = torch.Generator().manual_seed(0)
    risk, large = 0.1, 0
    for _ in range(2000):
        wrong_W = (torch.rand(300, generator=generator, dtype=torch.float64) < risk).double()
        large += log_evidence((wrong_W - risk)[:, None], risk).item() >= -math.log(1 - CONFIDENCE)
    assert large / 2000 <= 1 - CONFIDENCE


def test_the_evidence_grows_with_the_windows():
    balance_WC = torch.full((400, 1), -0.05, dtype=torch.float64)
    few, many = (log_evidence(balance_WC[:count], 0.1).item() for count in (40, 400))
    assert few < math.log(100) < many


def test_what_is_kept_is_counted():
    score, wrong = torch.tensor([0.0, 1.0, 1.0, 3.0]), torch.tensor([0.0, 1.0, 0.0, 1.0])
    assert kept(score, wrong, 1.0) == Kept(0.75, 1 / 3)
    assert kept(score, wrong, None) == Kept(0.0, None)
    assert kept(score, wrong, -1.0) == Kept(0.0, None)
    assert kept(score[:0], wrong[:0], 1.0) == Kept(0.0, None)


@pytest.mark.parametrize("risk", [0, 1, -0.1, 2, math.nan, "0.1", None, True])
def test_a_risk_that_is_none_is_refused(risk):
    with pytest.raises(InputError, match="must lie between 0 and 1"):
        promise(*world(10, 0), LENGTH, risk)
