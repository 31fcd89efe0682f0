"""Sampling: exact distributions, ties, borders of the unit interval, and bad values."""

import math

import pytest
import torch

from lepton.engine.options import check_sampling
from lepton.errors import InputError
from lepton.generate.sampling import probabilities


def logits_of(*p):
    return torch.tensor([p]).log()


def naive(logits, temperature, top_p, top_k):
    """The definition, token by token."""
    weights = [math.exp((x - max(logits)) / temperature) for x in logits]
    ranking = sorted(range(len(logits)), key=lambda i: (-weights[i], i))[:top_k]
    mass = sum(weights[i] for i in ranking)
    kept, held = [], 0.0
    for i in ranking:
        if held / mass >= top_p:
            break
        kept.append(i)
        held += weights[i]
    return [weights[i] / held if i in kept else 0.0 for i in range(len(logits))]


@pytest.mark.parametrize("top_k", [None, 1, 7, 500])
@pytest.mark.parametrize("top_p", [1.0, 0.9, 0.31, 1e-9])
@pytest.mark.parametrize("temperature", [0.2, 1.0, 3.0])
def test_probabilities_match_the_definition(temperature, top_p, top_k):
    torch.manual_seed(0)
    logits = torch.randn(3, 53).mul(2).round(decimals=1)  # rounding makes ties
    found = probabilities(logits, temperature=temperature, top_p=top_p, top_k=top_k)
    expected = [naive(row.tolist(), temperature, top_p, top_k) for row in logits.double()]
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64), rtol=0, atol=1e-12)


def test_a_nucleus_wider_than_the_usual_one_is_exact():
    torch.manual_seed(1)
    logits = torch.randn(2, 4096) * torch.tensor([[0.1], [6.0]])  # a flat row beside a peaked one
    found = probabilities(logits, temperature=1.0, top_p=0.95)
    expected = [naive(row.tolist(), 1.0, 0.95, None) for row in logits.double()]
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64), rtol=0, atol=1e-12)
    alone = probabilities(logits[1:], temperature=1.0, top_p=0.95)
    assert torch.equal(found[1:], alone), "a row does not depend on its neighbours"


def test_more_places_than_rows():
    logits = torch.randn(3, 4, 53)
    found = probabilities(logits, temperature=0.7, top_p=0.8, top_k=20)
    alone = probabilities(logits.flatten(0, 1), temperature=0.7, top_p=0.8, top_k=20)
    assert torch.equal(found.flatten(0, 1), alone)


def test_equals_rank_by_id():
    kept = probabilities(torch.zeros(1, 6), temperature=1.0, top_k=4)
    assert kept.tolist() == [[0.25] * 4 + [0.0] * 2]
    kept = probabilities(torch.zeros(1, 4), temperature=1.0, top_p=0.5)
    assert kept.tolist() == [[0.5, 0.5, 0.0, 0.0]]


def test_greedy_is_an_exact_one_hot():
    p = probabilities(torch.tensor([[0.0, 3.0, 3.0], [-1.0, -2.0, -3.0]]), temperature=0)
    assert p.tolist() == [[0, 1, 0], [1, 0, 0]]
    assert p.dtype == torch.float64


def test_a_tiny_temperature_is_finite():
    p = probabilities(torch.tensor([[1.0, 2.0, float("-inf")]]), temperature=1e-310)
    assert p.tolist() == [[0.0, 1.0, 0.0]]


def test_a_temperature_beyond_64_bits():
    p = probabilities(torch.tensor([1.0, 2.0]), temperature=2**64)
    assert p.tolist() == [0.5, 0.5]


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ((-0.5, 0.9, None), "temperature=-0.5"),
        ((float("nan"), 0.9, None), "temperature=nan"),
        ((float("inf"), 0.9, None), "temperature=inf"),
        ((1.0, 0.0, None), "top_p=0"),
        ((1.0, 1.5, None), "top_p=1.5"),
        ((1.0, float("nan"), None), "top_p=nan"),
        ((1.0, 0.9, 0), "top_k=0"),
    ],
)
def test_values_that_name_no_distribution(values, named):
    with pytest.raises(InputError, match=named):
        check_sampling(*values)
