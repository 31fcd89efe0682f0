"""The public face: a network with files and generation."""

import dataclasses
import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest

import lepton
from lepton import api, presets
from lepton.engine.options import GenerationOptions
from lepton.errors import InputError
from lepton.model import Network
from tests.cli.tiny import save_tiny
from tests.laws.lab import build

ROOT = Path(__file__).parents[1]

PROMPT = [5, 9, 14, 3]


def test_the_package_offers_all_of_it():
    assert sorted(api.__all__) == sorted(lepton.__all__)
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


def test_a_signature_shows_the_options_with_their_defaults():
    shown = inspect.signature(api.Lepton.generate).parameters
    for field in dataclasses.fields(GenerationOptions)[1:]:
        assert (shown[field.name].default, shown[field.name].kind) == (field.default, inspect.Parameter.KEYWORD_ONLY)
    assert [*shown][-3:] == ["options", "state", "memory"]
    assert shown.keys() - {"abstain_at"} == inspect.signature(api.Lepton.generate_with_stats).parameters.keys()
    assert "uncertainty" in inspect.signature(api.Lepton.generate_stream).parameters


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"uncertainty": True}, "has no argument 'uncertainty'"),
        ({"model": 1}, "has no argument 'model'"),
        ({"memry": None}, "has no argument 'memry'; did you mean 'memory'"),
        ({"stat": None}, "has no argument 'stat'; did you mean 'state'"),
        ({"temprature": 1}, "generate() has no argument 'temprature'; did you mean 'temperature'"),
    ],
)
def test_a_name_that_is_no_argument_is_refused(arguments, named):
    with pytest.raises(TypeError, match=re.escape(named)):
        build("complete").generate(PROMPT, 1, **arguments)


def test_what_is_given_by_position_and_should_not_be():
    model = build("complete")
    with pytest.raises(TypeError, match="name the rest"):
        model.generate(PROMPT, 1, 0.0)
    with pytest.raises(InputError, match="give it by name, options="):
        model.generate(PROMPT, GenerationOptions())
    with pytest.raises(InputError, match="uncertainty=1: must be True or False"):
        model.generate_stream(PROMPT, uncertainty=1)


def test_a_subclass_comes_from_a_checkpoint_as_itself(tmp_path):
    class Mine(api.Lepton):
        pass

    save_tiny(tmp_path / "x.pt")
    assert type(Mine.from_checkpoint(tmp_path / "x.pt")) is Mine


def test_star_imports_give_the_public_names():
    names = {}
    exec("from lepton import *", names)
    assert {*names} - {"__builtins__"} == {*api.__all__}


def test_the_first_generation_loads_no_compiler():
    """It takes a second, of which the first text would consist."""
    code = "from lepton import create_lepton_nano\nimport sys\n"
    code += "create_lepton_nano(layers=3, vocab_size=300, drafter=None).eval().generate([5, 6], 2)\n"
    code += "sys.exit('torch._dynamo' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0
