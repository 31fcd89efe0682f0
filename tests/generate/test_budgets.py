"""`max_cost`: the text is that of the threshold, whatever stands beside it, and what it refuses."""

import pytest
import torch

from lepton.engine.options import GenerationOptions
from lepton.errors import InputError
from lepton.generate.budgets import budget_of
from lepton.model.budget import Budget
from lepton.values import Least
from tests.generate.models import BATCH, PROMPT, lively

OPTIONS = {"temperature": 0, "max_new_tokens": 24}
FIGURES = {"share": 0.5, "cost": 0.01, "error": 0.001, "tokens": 1000, "data": "some text"}


def budgeted(variant="complete", **costs):
    """A model with a threshold for each cost, `c02=0.3` for 0.02 nats."""
    model = lively(variant)
    made = [Budget(max_cost=float(f"0.{name[1:]}"), least=least, **FIGURES) for name, least in costs.items()]
    if made:
        model.router.budgets = tuple(made)
    return model


@torch.no_grad()
def middle(model):
    """A threshold that half of the prompt's tokens are above."""
    return model.trunk(torch.tensor([PROMPT])).flow.contributions["router"].signal_BT.median().item()


def half_easy(variant="complete"):
    model = budgeted(variant)
    model.router.budgets = (Budget(max_cost=0.02, least=middle(model), **FIGURES),)
    return model


@torch.no_grad()
def test_the_text_is_that_of_the_threshold():
    model = half_easy()
    least, ids = model.router.budgets[0].least, [*PROMPT]
    state, piece = None, torch.tensor([PROMPT])
    opens = torch.zeros(1, len(PROMPT), dtype=torch.bool)
    opens[:, -1] = True
    while len(ids) < len(PROMPT) + 24:
        out = model.trunk(piece, state, opens=opens if state is None else None, depth=Least(least))
        ids.append(int(model.head(out.hidden[:, -1]).argmax()))
        state, piece = out.state, torch.tensor([ids[-1:]])
    found = model.generate_with_stats(PROMPT, max_cost=0.02, **OPTIONS)
    assert found.tokens == ids[: len(found.tokens)]
    assert len(found.tokens) > len(PROMPT) + 4
    assert model.config.stem_layers < found.stats.mean_depth < model.config.layers


@pytest.mark.parametrize("speculative", [False, True])
@pytest.mark.parametrize("variant", ["complete", "odd edges"])
def test_a_row_depends_on_nothing_beside_it(variant, speculative):
    model = half_easy(variant)
    options = OPTIONS | {"use_speculative": speculative, "max_cost": 0.02}
    together = model.generate(BATCH, **options)
    assert together == [model.generate(prompt, **options) for prompt in BATCH]
    assert together == model.generate(BATCH, **options | {"use_speculative": not speculative})


def test_ends_are_all_and_none():
    model = budgeted(c01=-1e9, c50=1e9)
    assert model.generate(PROMPT, max_cost=0.01, **OPTIONS) == model.generate(PROMPT, **OPTIONS)
    found = model.generate_with_stats(PROMPT, max_cost=0.5, **OPTIONS)
    assert found.tokens == model.generate(PROMPT, depth=0, **OPTIONS)
    assert found.stats.mean_depth == model.config.stem_layers


def test_the_state_is_that_of_the_same_tokens():
    model = half_easy()
    found = model.generate_with_state(PROMPT, 8, temperature=0, max_cost=0.02)
    more = model.generate(found.tokens[-1:], 8, temperature=0, max_cost=0.02, state=found.state)
    assert found.tokens + more[1:] == model.generate(PROMPT, 16, temperature=0, max_cost=0.02)


@pytest.mark.parametrize(
    ("variant", "given", "message"),
    [
        ("complete", {"max_cost": 0.03}, r"max_cost=0\.03 was not calibrated .* were: 0\.01, 0\.02\): run .* 0\.03"),
        ("complete", {"max_cost": 0.02, "think": 1}, "max_cost=0.02 with think=1: .* leave think out"),
        ("no router", {"max_cost": 0.02}, "max_cost=0.02: this model has no router"),
        ("complete", {"max_cost": 0.02, "abstain_at": 0.1}, r"abstain_at=0\.1 with max_cost=0\.02"),
    ],
)
def test_what_cannot_be_promised_is_refused(variant, given, message):
    model = budgeted(variant, **({} if variant == "no router" else {"c02": 0.1, "c01": 0.0}))
    with pytest.raises(InputError, match=message):
        model.generate(PROMPT, 4, **given)


def test_it_takes_the_place_of_depth():
    with pytest.raises(InputError, match=r"max_cost=0\.02 with depth=0\.5: each says which tokens skip blocks"):
        GenerationOptions(max_cost=0.02, depth=0.5)


@pytest.mark.parametrize("value", [0, -1, float("nan"), float("inf"), "0.1", True])
def test_a_cost_is_a_positive_number(value):
    with pytest.raises(InputError, match=r"max_cost=.*must be a positive number of nats"):
        GenerationOptions(max_cost=value)


def test_none_was_calibrated():
    with pytest.raises(InputError, match="costs that were: none"):
        budget_of(budgeted(), GenerationOptions(max_cost=0.02))


def test_other_weights_have_no_budgets():
    model = half_easy()
    model.load_state_dict(model.state_dict())
    assert model.router.budgets == ()
