"""Declarations: every parameter has exactly one, which sets its first value."""

import pytest
import torch
from torch import nn

from lepton.model.parameters import BIAS, EMBEDDING, MATRIX, ZERO_MATRIX, declared, initialise
from tests.laws.lab import VARIANTS, build


class Part(nn.Module):
    declares = {"matrix": MATRIX, "bias": BIAS, "lists.*": ZERO_MATRIX}

    def __init__(self):
        super().__init__()
        self.matrix = nn.Parameter(torch.full((400, 100), torch.nan))
        self.bias = nn.Parameter(torch.full((7,), torch.nan))
        self.lists = nn.ParameterList([torch.full((2, 3), torch.nan) for _ in range(2)])
        self.register_buffer("count", torch.full((1,), torch.nan))

    def reset(self):
        self.count.fill_(5)


class Whole(nn.Module):
    declares = {"embed": EMBEDDING}

    def __init__(self):
        super().__init__()
        self.embed = nn.Parameter(torch.full((500, 80), torch.nan))
        self.part = Part()


def test_declarations_have_the_full_names_and_the_models_order():
    found = declared(Whole())
    assert [*found] == ["embed", "part.matrix", "part.bias", "part.lists.0", "part.lists.1"]
    assert found["part.lists.1"] is ZERO_MATRIX
    assert MATRIX.but(rate=3).rate == 3 != MATRIX.rate


def test_first_values_are_the_declared_ones():
    model = Whole()
    initialise(model)
    assert model.embed.std().item() == pytest.approx(0.02, rel=0.05)
    assert model.part.matrix.std().item() == pytest.approx(100**-0.5, rel=0.05), "one over the root of its inputs"
    assert not any(each.any() for each in (model.part.bias, *model.part.lists))
    assert model.part.count.item() == 5
    again = Whole()
    torch.manual_seed(0)
    initialise(again)
    torch.manual_seed(0)
    initialise(model)
    assert torch.equal(model.embed, again.embed), "from torch's generator alone"


def test_without_memory_there_are_no_values():
    with torch.device("meta"):
        model = Whole()
    initialise(model)
    assert model.embed.is_meta


@pytest.mark.parametrize(("table", "times"), [({}, 0), ({"embed": EMBEDDING, "e*": BIAS}, 2)])
def test_a_parameter_without_a_declaration_or_with_two_is_an_error(table, times):
    model = Whole()
    model.declares = table
    with pytest.raises(TypeError, match=f"'embed' is declared {times} times"):
        declared(model)


@pytest.mark.parametrize("variant", VARIANTS)
def test_muon_has_matrices_alone(variant):
    model = build(variant)
    entries = declared(model)
    assert all(each.ndim == 2 for name, each in model.named_parameters() if entries[name].optimizer == "muon")
