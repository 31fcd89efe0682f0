"""The threshold that keeps to a budget: what it costs, and that the next one would cost too much."""

import pytest
import torch
import torch.nn.functional as F

from lepton.data.shards import Batch
from lepton.errors import InputError
from lepton.evals.budgets import CANDIDATES, MARGIN, Reading, cost_of, find_budget, read
from lepton.values import Least
from tests.generate.models import lively
from tests.laws.lab import text

EVERYTHING = 1 << 20


@pytest.fixture(scope="module")
def model():
    return lively("complete")


@torch.no_grad()
def of_the_model(model, rows=24, length=40):
    """Windows of what a model says at full depth, so that the exit is worse."""
    ids = text(1, rows, 1, documents=False)
    for _ in range(length):
        logits = model(ids).logits[:, -1]
        ids = torch.cat([ids, (3 * logits).softmax(-1).multinomial(1)], 1)
    return [Batch(part, torch.full((len(part),), length + 1)) for part in ids.split(8)]


@pytest.fixture(scope="module")
def batches(model):
    torch.manual_seed(0)
    return of_the_model(model)


@torch.no_grad()
def test_a_reading_by_hand(model, batches):
    found = read(model, batches, EVERYTHING, least=0.0)
    nats, deep = [], 0
    for batch in batches:
        out = model.trunk(batch.tokens[:, :-1], depth=Least(0.0))
        logits = model.head(out.hidden)
        each = F.cross_entropy(logits.flatten(0, 1), batch.tokens[:, 1:].flatten(), reduction="none")
        nats.append(each.view(len(batch.tokens), -1).sum(1))
        deep += int((out.depth == model.config.layers).sum())
    torch.testing.assert_close(found.nats_W, torch.cat(nats))
    assert found.tokens_W.tolist() == [40] * 24
    assert (found.tokens, found.deep) == (960, deep)
    assert len(found.scores) == 960
    assert 0 < deep < 960


def test_cost_and_error_by_hand():
    tokens = torch.tensor([10.0, 10.0, 20.0], dtype=torch.float64)
    whole = Reading(torch.tensor([20.0, 30.0, 40.0], dtype=torch.float64), tokens, 40.0, torch.zeros(40))
    less = Reading(torch.tensor([21.0, 33.0, 44.0], dtype=torch.float64), tokens, 10.0, torch.zeros(40))
    found = cost_of(whole, less)
    assert (found.cost, found.share) == (0.2, 0.25)
    assert found.error == pytest.approx(((1 + 1 + 0) * 3 / 2) ** 0.5 / 40)


def test_the_threshold_is_the_largest_within_the_budget(model, batches):
    whole = read(model, batches, EVERYTHING)
    alone = cost_of(whole, read(model, batches, EVERYTHING, least=1e9))
    assert alone.cost > 0.05, "the exit is worse"
    assert alone.share == 0
    places = torch.arange(1, CANDIDATES + 1, dtype=torch.float64) / CANDIDATES
    thresholds = whole.scores.quantile(places).unique().tolist()
    shares = []
    for max_cost in (alone.cost / 4, alone.cost / 2):
        found = find_budget(model, lambda: batches, EVERYTHING, max_cost, data="some text")
        cost = cost_of(whole, read(model, batches, EVERYTHING, found.least))
        assert (found.cost, found.error, found.share) == (cost.cost, cost.error, cost.share)
        assert cost.cost + MARGIN * cost.error <= max_cost
        after = next(each for each in thresholds if each > found.least)
        more = cost_of(whole, read(model, batches, EVERYTHING, after))
        assert more.cost + MARGIN * more.error > max_cost
        assert (found.max_cost, found.tokens, found.data) == (max_cost, 960, "some text")
        shares.append(found.share)
    assert 1 > shares[0] > shares[1] > 0


def test_a_budget_for_everything_and_for_nothing(model, batches):
    whole = read(model, batches, EVERYTHING)
    assert find_budget(model, lambda: batches, EVERYTHING, 1e6).share == 0
    found = find_budget(model, lambda: batches, EVERYTHING, 1e-9)
    assert (found.share, found.cost) == (1.0, 0.0)
    assert found.least < whole.scores.min()


def test_too_little_text(model, batches):
    with pytest.raises(InputError, match="a single window"):
        find_budget(model, lambda: [batches[0].rows(slice(1))], EVERYTHING, 0.1)
    with pytest.raises(InputError, match="no token to predict"):
        find_budget(model, list, EVERYTHING, 0.1)
    with pytest.raises(InputError, match="max_cost=0: must be a positive number"):
        find_budget(model, lambda: batches, EVERYTHING, 0)
