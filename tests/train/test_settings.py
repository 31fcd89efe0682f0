import pytest

from lepton.errors import InputError
from lepton.train import TrainSettings


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
        ({"sample_prompt": ""}, "sample_prompt is empty"),
        ({"resume": "auto", "init_from": "x.pt"}, "give one of them"),
    ],
)
def test_values_that_cannot_be_used(change, message):
    with pytest.raises(InputError) as error:
        TrainSettings(**change)
    assert message in str(error.value)


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
