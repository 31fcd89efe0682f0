"""A configuration: what fits, how it changes, and that it comes back from a checkpoint."""

import dataclasses

import pytest

from lepton.api import Lepton
from lepton.config import IDEAS as REGISTERED
from lepton.config import LeptonConfig, check_names
from lepton.errors import InputError
from tests.laws.lab import IDEAS, SHAPE, VARIANTS, VOCAB


def config_of(variant):
    return LeptonConfig.from_dict({**SHAPE, **VARIANTS[variant]})


@pytest.mark.parametrize("variant", VARIANTS)
def test_it_comes_back_from_its_fields(variant):
    config = config_of(variant)
    assert LeptonConfig.from_dict(config.to_dict()) == config
    assert config.replace() == config
    changed = config.replace(window=8 if config.window != 8 else 9)
    assert changed != config
    assert dataclasses.replace(changed, window=config.window) == config


def test_an_idea_is_put_in_taken_out_and_changed():
    config = config_of("complete")
    assert config.replace(peek=False).idea("peek") is None
    assert config.replace(peek=None) == config.replace(peek=False)
    again = config.replace(peek=False).replace(peek={"horizon": 3})
    assert again.idea("peek").horizon == 3
    assert [idea.name for idea in again.ideas] == [idea.name for idea in config.ideas], "in the order of the flow"
    assert config.replace(**{"peek.horizon": 3}).idea("peek").horizon == 3
    assert config.replace(peek=False).replace(**{"peek.horizon": 3}).idea("peek") is None
    assert config.replace(hint=0) == config.replace(peek=False), "a name of flat configurations"


def test_dense_is_without_ideas():
    assert config_of("dense").dense
    assert not config_of("complete").dense
    assert {idea.name for idea in config_of("complete").ideas} <= REGISTERED.keys()


def test_flat_names_show_what_is_left_out():
    flat = config_of("no peek").flat_dict()
    assert flat["peek"] is None
    assert flat["thoughts.count"] == IDEAS["thoughts"]
    assert LeptonConfig.from_dict({**SHAPE, **IDEAS}).flat_dict()["peek.horizon"] == IDEAS["peek"]


@pytest.mark.parametrize(
    ("name", "near"), [("widow", "window"), ("thoughts.cout", "count"), ("thoght", "thoughts"), ("draft", "drafts")]
)
def test_unknown_names_get_the_nearest(name, near):
    for call in (lambda: check_names({name: 1}), lambda: config_of("complete").replace(**{name: 1})):
        with pytest.raises(InputError, match=f"unknown configuration field .*; did you mean '{near}'"):
            call()


def test_the_vocabulary_is_padded_for_matrix_units():
    assert config_of("complete").padded_vocab_size == 128
    assert config_of("complete").replace(vocab_size=50257).padded_vocab_size == 50304


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"kv_heads": 3}, "heads=4 is not a multiple of kv_heads=3"),
        ({"head_dim": 6}, "head_dim=6"),
        ({"window": 0}, "window=0"),
        ({"eos_id": VOCAB}, "eos_id=97"),
        ({"stem_layers": 9}, "stem_layers=9"),
        ({"width": 0}, "width=0"),
        ({"logit_cap": 1000.0}, "logit_cap=1000.0"),
        ({"window": 8, "segment": 16}, "segment=16"),
        ({"window": None, "wide_window": None}, "crystals"),
        ({"window": None}, "wide_window=20: must be at least window=None, or None"),
        ({"wide_window": 7}, "wide_window=7: must be at least window=8, or None"),
        ({"peek": 1}, "peek.horizon=1"),
        ({"draft_vocab": 98}, "drafter.vocab=98"),
        ({"thoughts": -1}, "thoughts.count=-1"),
        ({"crystals": 0}, "crystals.per_segment=0"),
        ({"window": 16.5}, r"window=16.5: must be a whole number \(int\), or None"),
        ({"layers": True}, "layers=True: must be a whole number"),
        ({"width": None}, "width=None: must be a whole number"),
        ({"rope_base": "long"}, "rope_base='long': must be a number"),
        ({"ideas": {"router": 1}}, "must hold the fields of each idea"),
        ({"ideas": 5}, "must hold the fields of each idea"),
        ({"rope_base": 0}, "rope_base=0"),
        ({"embed_rank": -3}, "embed_rank=-3"),
        ({"vocab_size": 1}, "vocab_size=1"),
        ({"width": 10**6}, "width=1000000: must be at most 32,768"),
        ({"layers": 10**9}, "layers=1000000000: must be at most 256"),
        ({"vocab_size": 10**12}, "vocab_size=1000000000000: must be at most"),
        ({"window": 10**9}, "window=1000000000: must be at most"),
        ({"rounds": 10**6}, "thoughts.rounds=1000000: must be at most 256"),
        ({"slots": 10**4000 * 10**4000}, "crystals.slots=a number of [0-9,]+ bits: must be at most"),
        ({"eos_id": -(10**5000)}, "eos_id=a number of [0-9,]+ bits"),
        ({"width": 32.0}, r"width=32\.0: must be a whole number"),
        ({"width": "32"}, "width='32': must be a whole number"),
        ({"rope_base": float("nan")}, "rope_base=nan: must lie in"),
        ({"rope_base": 1e-300}, "rope_base=1e-300: must lie in"),
        ({"logit_cap": float("nan")}, "logit_cap=nan"),
        ({"logit_cap": True}, "logit_cap=True: must be a number"),
    ],
)
def test_bad_shapes_are_named(overrides, message):
    with pytest.raises(InputError, match=message):
        Lepton(LeptonConfig.from_dict({**SHAPE, **IDEAS, **overrides}))


def test_a_flat_dense_configuration_has_no_ideas_whatever_else_it_says():
    flat = {"width": 32, "layers": 3, "heads": 2, "kv_heads": 1, "ffn": 48, "window": None, "dense": True}
    config = LeptonConfig.from_dict({**flat, "memory_heads": 2, "slots": 8, "rounds": 1})
    assert config.ideas == ()
    assert not config.slot_bias
