"""The constructors: sizes, overrides, the dense baseline."""

import numpy as np
import pytest

import model as seed_entry_point
from lepton.api import create_lepton, create_lepton_nano
from lepton.config import LeptonConfig
from lepton.errors import InputError
from lepton.model.size_config import count_params, size_config
from lepton.presets import SIZES


@pytest.mark.parametrize("size", SIZES)
def test_each_size_has_a_constructor_in_the_seeds_module(size):
    assert callable(getattr(seed_entry_point, f"create_lepton_{size}"))


def test_overrides_are_fields_of_the_configuration():
    model = create_lepton_nano(window=16, layers=3)
    assert (model.config.window, model.config.layers, model.config.width) == (16, 3, 192)


def test_unknown_names_are_answered_with_the_nearest():
    with pytest.raises(InputError, match="did you mean 'window'"):
        create_lepton_nano(windov=16)
    with pytest.raises(InputError, match="did you mean 'nano'"):
        create_lepton("nan")


@pytest.mark.parametrize("overrides", [{"window": np.ones(2)}, {"dense": np.ones(2)}, {"window": "16"}])
def test_values_of_another_type_are_named(overrides):
    with pytest.raises(InputError, match=f"{next(iter(overrides))}=.*must be"):
        create_lepton_nano(**overrides)
    with pytest.raises(InputError, match="unknown model size"):
        create_lepton(np.ones(2))


def test_the_dense_baseline_attends_to_everything():
    config = create_lepton_nano(dense=True, layers=3).config
    assert config.dense
    assert config.window is None
    assert config.layers == 3
    assert size_config("nano", dense=True, ffn=100).ffn == 100


def test_counting_allocates_nothing_and_agrees_with_the_built_model():
    assert count_params(size_config("nano")) == create_lepton_nano().num_params()
    assert count_params(size_config("xxl")) > 2.5e9


@pytest.mark.parametrize("window", [0, -3])
def test_a_window_that_is_none_is_named(window):
    with pytest.raises(InputError, match=f"^window={window}"):
        size_config("nano", window=window)


@pytest.mark.parametrize("name", SIZES)
def test_a_size_trains_the_exit_and_the_drafter_as_won(name):
    config, nano = size_config(name), name == "nano"
    router, drafter = config.idea("router"), config.idea("drafter")
    assert (router.into_stem, router.distil, router.expected, router.reads_exit) == (0.3, True, True, True)
    assert (router.exit_stride, router.served) == (32 if nano else 8, 0)
    assert (drafter.vocab, drafter.reads_stem) == ((4096, False) if nano else (8192, True))
    assert not drafter.distil


@pytest.mark.parametrize("name", SIZES)
def test_a_configuration_stored_before_these_options_is_what_was_trained(name):
    now = size_config(name)
    stored = now.to_dict()
    for field in ("exit_stride", "into_stem", "distil", "expected", "reads_exit", "served"):
        del stored["ideas"]["router"][field]
    for field in ("vocab", "stride", "reads_stem", "distil"):
        del stored["ideas"]["drafter"][field]
    router, drafter = (LeptonConfig.from_dict(stored).idea(idea) for idea in ("router", "drafter"))
    assert (router.exit_width, router.window) == (now.idea("router").exit_width, 64)
    assert (router.exit_stride, router.into_stem, router.served) == (32, 0, 0)
    assert (router.distil, router.expected, router.reads_exit) == (False, False, False)
    assert (drafter.width, drafter.count) == (now.idea("drafter").width, 4)
    assert (drafter.vocab, drafter.stride, drafter.reads_stem, drafter.distil) == (4096, 4, False, False)
