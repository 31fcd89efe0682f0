"""Trials are read from a queue: what is left out is the product's, and what cannot be is refused."""

import dataclasses
import json

import pytest

from benchmarks.trunk_switches import CHOICES, Trial, read_queue
from lepton.errors import InputError
from lepton.model.size_config import size_config
from lepton.train.settings import TrainSettings


@pytest.mark.parametrize("size", ["nano", "micro", "tiny"])
def test_the_shape_is_that_of_the_dense_baseline(size):
    trial, config = Trial.read({"name": "x", "size": size}), size_config(size, dense=True)
    for name in ("width", "layers", "heads", "kv_heads", "head_dim", "ffn", "embed_rank", "rope_base", "vocab_size"):
        assert getattr(trial, name) == getattr(config, name)
    shifts = [trial.shifts_keys(layer) for layer in range(trial.layers)]
    assert shifts == [config.shifts_keys(layer) for layer in range(config.layers)]
    assert trial.padded_vocab_size == config.padded_vocab_size


def test_the_rest_is_what_train_does_by_itself():
    trial, settings = Trial.read({"name": "x"}), TrainSettings()
    assert trial.muon_lr == settings.muon_lr
    assert trial.weight_decay * trial.muon_lr == pytest.approx(settings.weight_decay * settings.lr)
    assert trial.embed_lr == pytest.approx(10 * settings.lr)
    schedule = (trial.warmup_steps, trial.cooldown, trial.final_rate, trial.clip, trial.seq_len)
    assert schedule == (
        settings.warmup_steps, settings.cooldown, settings.min_lr_ratio, settings.grad_clip, settings.seq_len
    )  # fmt: skip


def test_which_blocks_shift_their_keys():
    found = {kind: [Trial.read({"name": "x", "shifted_keys": kind}).shifts_keys(layer) for layer in range(4)]
             for kind in CHOICES["shifted_keys"]}  # fmt: skip
    assert found == {"none": [0, 0, 0, 0], "odd": [0, 1, 0, 1], "even": [1, 0, 1, 0], "all": [1, 1, 1, 1]}


def test_a_trial_survives_json():
    trial = Trial.read({"name": "x", "betas": [0.9, 0.95], "head_betas": [0.8, 0.9], "momentum": [0.85, 0.97, 0.9]})
    assert trial.momentum == (0.85, 0.97, 0.9)
    assert Trial.read(json.loads(json.dumps(dataclasses.asdict(trial)))) == trial


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"shifted_key": "all"}, "unknown field 'shifted_key'; did you mean 'shifted_keys'"),
        ({"shifted_keys": "evn"}, "did you mean 'even'"),
        ({"smear": True}, "smear=True"),
        ({"size": "tinny"}, "did you mean 'tiny'"),
        ({"width": "wide"}, "width='wide'"),
        ({"heads": 5, "kv_heads": 2}, "heads=5"),
        ({"betas": [0.9]}, "betas=[0.9]: must be 2 numbers"),
        ({"betas": [0.9, 1.0]}, "betas=[0.9, 1.0]"),
        ({"momentum": 0.95}, "momentum=0.95: must be 3 numbers"),
        ({"embed_betas": [0.9, "x"]}, "embed_betas"),
        ({"tokens": 100}, "steps=0"),
        ({"cooldown": 1.5}, "cooldown=1.5: must lie in 0..1"),
        ({"tokens": float("inf")}, "tokens=inf: must be a finite number"),
        ({"conv": -1}, "conv=-1: must not be negative"),
        ({"name": "a/b"}, "name='a/b'"),
        ({"name": None}, "name=None"),
    ],
)
def test_what_cannot_be_is_refused(fields, said):
    with pytest.raises(InputError) as caught:
        Trial.read({"name": "x", **fields})
    assert said in str(caught.value)


def test_a_queue_is_read_line_by_line(tmp_path):
    path = tmp_path / "queue"
    path.write_text('# widths\n{"name": "a", "size": "nano"}\n\n{"name": "b", "size": "nano", "conv": 3}\n')
    assert [(trial.name, trial.conv) for trial in read_queue(path)] == [("a", 0), ("b", 3)]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('{"name": "a"}\n{"name": "b", "cov": 3}', "line 2: unknown field 'cov'; did you mean 'conv'"),
        ('{"name": "a"}\n{"name": "a"}', "line 2: there is a trial 'a' already"),
        ('{"name": "a"', "line 1: the line: no JSON"),
        ("[1]", "line 1: [1] is no trial"),
    ],
)
def test_a_wrong_line_is_named(tmp_path, text, said):
    path = tmp_path / "queue"
    path.write_text(text)
    with pytest.raises(InputError) as caught:
        read_queue(path)
    assert said in str(caught.value)
    with pytest.raises(InputError, match="cannot read the queue"):
        read_queue(tmp_path / "none")
