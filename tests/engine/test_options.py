"""The options of a generation: one object, its fields by name, and the flags made of it."""

import argparse
import dataclasses

import pytest

from lepton.cli.generate import add_options, read_options
from lepton.engine.options import GenerationOptions, OptionFields, resolved
from lepton.errors import InputError

NAMES = [field.name for field in dataclasses.fields(GenerationOptions)]


def test_the_fields_by_name_are_those_of_the_object():
    assert ["max_new_tokens", *OptionFields.__annotations__] == NAMES
    for field in dataclasses.fields(GenerationOptions)[1:]:
        assert str(OptionFields.__annotations__[field.name]) == str(field.type)


def test_what_is_given_by_name_replaces_the_objects_value():
    options = GenerationOptions(temperature=1.5, seed=3)
    assert resolved(None) == GenerationOptions()
    assert resolved(options) == options
    assert resolved(options, 7, seed=4) == GenerationOptions(temperature=1.5, seed=4, max_new_tokens=7)


@pytest.mark.parametrize(
    ("name", "near"), [("temprature", "temperature"), ("topp", "top_p"), ("max_tokens", "max_new")]
)
def test_an_unknown_option_is_an_error_that_names_the_nearest(name, near):
    with pytest.raises(TypeError, match=f"unexpected argument '{name}'; did you mean '{near}"):
        resolved(None, **{name: 1})
    with pytest.raises(InputError, match="options=5: give GenerationOptions"):
        resolved(5)


@pytest.mark.parametrize("fields", [{"depth": 7}, {"depth": "x"}, {"think": -1}, {"think": "a"}, {"think": 1000}])
def test_what_no_model_can_use_is_refused_at_once(fields):
    ((name, value),) = fields.items()
    with pytest.raises(InputError, match=f"{name}={value!r}"):
        GenerationOptions(**fields)


def test_every_option_is_a_flag_of_the_command():
    parser = argparse.ArgumentParser()
    add_options(parser)
    assert read_options(parser.parse_args([])) == GenerationOptions()
    values = {"temperature": 0.5, "top_p": 0.7, "depth": 0.25, "max_new_tokens": 9, "top_k": 4, "seed": 8, "think": 1}
    assert {*values, "use_speculative", "stop", "max_cost"} == {*NAMES}
    words = [f"--{name}={value}" for name, value in values.items()] + ["--no_speculative"]
    assert read_options(parser.parse_args(words)) == GenerationOptions(**values, use_speculative=False)
    assert read_options(parser.parse_args(["--max_cost=0.02"])) == GenerationOptions(max_cost=0.02)
