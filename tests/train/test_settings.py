from pathlib import Path

import numpy as np
import pytest

from lepton.errors import InputError
from lepton.train.settings import TrainSettings


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"batch_size": 0}, "batch_size=0: must be at least 1"),
        ({"grad_accum": -1}, "grad_accum=-1: must be at least 1"),
        ({"keep": 0}, "keep=0: must be at least 1"),
        ({"lr": 0.0}, "lr=0.0: must be a positive number"),
        ({"muon_lr": float("nan")}, "muon_lr=nan: must be a positive number"),
        ({"grad_clip": float("inf")}, "grad_clip=inf: must be a positive number"),
        ({"weight_decay": -0.1}, "weight_decay=-0.1: must not be negative"),
        ({"cooldown": 1.5}, "cooldown=1.5: must lie in 0..1"),
        ({"optimizer": "mu0n"}, "unknown optimizer 'mu0n'; did you mean 'muon'?"),
        ({"dtype": "bf61"}, "unknown dtype 'bf61'; did you mean 'bf16'?"),
        ({"seed": -1}, "seed=-1: must lie in 0..18446744073709551615"),
        ({"seed": 2**64}, "seed=a number of more bits: must be a whole number of 64 bits"),
        ({"seed": 10**5000}, "seed=a number of more bits"),
        ({"seed": 1.5}, "seed=1.5: must be a whole number"),
        ({"seed": True}, "seed=True: must be a whole number"),
        ({"max_steps": "8"}, "max_steps='8': must be a whole number"),
        ({"max_steps": None}, "max_steps=None: must be a whole number"),
        ({"lr": "fast"}, "lr='fast': must be a number"),
        ({"lr": 10**400}, "lr=a number of more bits: must be a number"),
        ({"dense": 1}, "dense=1: must be True or False"),
        ({"compile": "no"}, "compile='no': must be True or False or None"),
        ({"data_dir": 3}, "data_dir=3: must be a text or None"),
        ({"data_dir": "a\0b"}, "data_dir='a\\x00b': must be a text"),
        ({"overrides": [1]}, "overrides=[1]: must be a dict"),
        ({"batch_size": "auto"}, "batch_size='auto': must be a whole number of 64 bits or None"),
        ({"batch_size": None, "grad_accum": 10**9}, "batch_size=4 x grad_accum=1000000000 x seq_len=512 are"),
        ({"grad_accum": 10**9}, "tokens per step: must be at most 268,435,456"),
        ({"threads": 10**9}, "threads=1000000000: must be at most"),
        ({"sample_prompt": ""}, "sample_prompt is empty"),
        ({"resume": "auto", "init_from": "x.pt"}, "give one of them"),
    ],
)
def test_values_that_cannot_be_used(change, message):
    with pytest.raises(InputError) as error:
        TrainSettings(**change)
    assert message in str(error.value)


def test_values_become_plain_ones_that_a_checkpoint_can_hold():
    settings = TrainSettings(data_dir=Path("d"), seed=np.int64(3), lr=np.float64(0.5), weight_decay=0)
    saved = settings.to_dict()
    found = [(saved[name], type(saved[name])) for name in ("data_dir", "seed", "lr", "weight_decay")]
    assert found == [("d", str), (3, int), (0.5, float), (0.0, float)]


def test_what_is_allowed_once_is_not_inherited():
    saved = TrainSettings(allow_other_data=True).to_dict()
    assert not TrainSettings().resumed_from(saved, set())[0].allow_other_data


def test_the_changed_ones_are_those_that_differ():
    assert TrainSettings().changed() == set()
    assert TrainSettings(lr=1e-3, max_steps=50_000, overrides={"window": 8}).changed() == {"lr", "overrides"}


def test_a_resumed_run_keeps_what_is_not_given_again():
    saved = TrainSettings(
        lr=1e-3,
        batch_size=8,
        data_dir="d",
        checkpoint_dir="a",
        device="cpu",
        grad_accum=16,
        checkpoint_activations=True,
    ).to_dict()
    asked = TrainSettings(lr=6e-4, max_steps=100, checkpoint_dir="b")
    settings, changes = asked.resumed_from(saved, {"lr", "max_steps", "checkpoint_dir"})
    assert (settings.batch_size, settings.grad_accum, settings.data_dir) == (8, 16, "d")
    assert settings.checkpoint_activations
    assert (settings.lr, settings.max_steps, settings.checkpoint_dir, settings.device) == (6e-4, 100, "b", None)
    assert changes == ["max_steps: 50000 -> 100", "lr: 0.001 -> 0.0006"]


def test_settings_of_an_older_version_resume():
    saved = TrainSettings(lr=1e-3).to_dict()
    del saved["cooldown"]
    settings, changes = TrainSettings().resumed_from({**saved, "gone": 1}, set())
    assert (settings.lr, settings.cooldown, changes) == (1e-3, 0.4, [])


def test_auto_resumes_the_split_of_the_run():
    saved = TrainSettings(batch_size=64, grad_accum=2).to_dict()
    for asked in (TrainSettings(batch_size=None), TrainSettings(batch_size=None, grad_accum=32)):
        settings, changes = asked.resumed_from(saved, asked.changed())
        assert (settings.split, changes) == ((64, 2), [])
    asked = TrainSettings(batch_size=None, grad_accum=16)
    message = "--batch_size auto --grad_accum 16 is a step of 64 rows, the run to resume has 64 x 2: leave both"
    with pytest.raises(InputError, match=message):
        asked.resumed_from(saved, asked.changed())
