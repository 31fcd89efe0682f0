"""The public face: a network with files and generation."""

import pytest

import lepton
from lepton import api, presets
from lepton.generate.options import GenerationOptions
from lepton.model import Network
from tests.laws.lab import build

PROMPT = [5, 9, 14, 3]


def test_the_package_offers_all_of_it():
    assert sorted(api.__all__) == sorted(lepton._PUBLIC)
    assert all(getattr(lepton, name) is getattr(api, name) for name in api.__all__)
    constructors = {name.removeprefix("create_lepton_") for name in api.__all__ if name.startswith("create_lepton_")}
    assert constructors == set(presets.SIZES)


def test_results_have_names_and_unpack():
    model = build("complete")
    options = {"max_new_tokens": 5, "seed": 3}
    plain = model.generate(PROMPT, **options)
    unsure, state, stats = (
        getattr(model, f"generate_with_{what}")(PROMPT, **options) for what in ("uncertainty", "state", "stats")
    )
    assert unsure.tokens == state.tokens == stats.tokens == plain
    tokens, uncertainties = unsure
    assert (tokens, len(uncertainties)) == (plain, len(plain) - len(PROMPT))
    assert uncertainties is unsure.uncertainties
    assert model.generate(plain[-1:], 3, temperature=0, state=state.state)[0] == plain[-1]
    assert stats.stats.new_tokens == len(uncertainties)


def test_options_as_an_object_and_by_name_are_the_same():
    model = build("complete")
    options = GenerationOptions(max_new_tokens=6, seed=4, temperature=1.5)
    text = model.generate(PROMPT, options=options)
    assert text == model.generate(PROMPT, 6, seed=4, temperature=1.5)
    assert model.generate(PROMPT, 3, options=options) == text[: len(PROMPT) + 3], "what is given by name wins"


def test_a_network_alone_has_neither_files_nor_generation():
    assert issubclass(api.Lepton, Network)
    own = {name for name in vars(api.Lepton) if not name.startswith("_")}
    assert {"from_checkpoint", "tokenizer", "generate", "generate_stream"} <= own
    assert not any(hasattr(Network, name) for name in own)


@pytest.mark.parametrize("prompt", [[PROMPT], [PROMPT, [1]]])
def test_a_list_of_prompts_gives_a_list_of_rows(prompt):
    rows = build("complete").generate(prompt, 2, seed=0)
    assert [row[: len(given)] for row, given in zip(rows, prompt, strict=True)] == prompt
