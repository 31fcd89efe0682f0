"""What a run takes over from a checkpoint, and that nothing is taken over from one that does not fit."""

import copy
import dataclasses

import pytest
import torch

from lepton import checkpoint
from lepton.api import Lepton
from lepton.errors import InputError
from lepton.train.assembly import _build_model, _restore, assemble
from lepton.train.memory_forecast import USABLE, predicted_memory
from lepton.train.messages import introduce
from lepton.train.starting_point import find_starting_point
from tests.train.small import small_run, small_settings


@pytest.fixture(scope="module")
def run(data, tmp_path_factory):
    """The folder of a finished run of 2 steps."""
    out = tmp_path_factory.mktemp("run") / "out"
    small_run(data, out, max_steps=2, save_every=2, eval_every=2)
    return out


def damaged(run, tmp_path, place, change):
    """Save the run's checkpoint with `change` made to the value at `place`, a path of keys."""
    content = checkpoint.load(run / "step_2.pt")
    part = content
    for key in place[:-1]:
        part = part[key]
    part[place[-1]] = change(part[place[-1]])
    checkpoint.save(tmp_path / "step_2.pt", content)
    return tmp_path / "step_2.pt"


def resume(data, out, path):
    settings = small_settings(data, out, resume=str(path), max_steps=4)
    return find_starting_point(settings, {"max_steps", "checkpoint_dir"})


ADAMW, MUON = ("optimizer", "states", "adamw"), ("optimizer", "states", "muon")


@pytest.mark.parametrize(
    ("place", "change", "message"),
    [
        (
            (*ADAMW, 1, "exp_avg"),
            lambda value: value[:1],
            r"state of adamw: parameter 1: size mismatch: 'exp_avg' has shape",
        ),
        ((*ADAMW, 0, "exp_avg"), lambda value: value.double(), r"'exp_avg' holds torch\.float64"),
        ((*ADAMW, 0, "exp_avg_sq"), lambda value: value - 1, "'exp_avg_sq' holds numbers below 0"),
        ((*ADAMW, 0, "step"), lambda value: -value, "'step' holds numbers below 0"),
        ((*ADAMW, 0, "step"), lambda _: 3, "'step' is int, not a tensor"),
        ((*ADAMW, 0), lambda _: {}, r"Missing key 'exp_avg' \(and 2 more\)"),
        (ADAMW, lambda states: {0: states[0]}, "must be that of parameters"),
        ((*MUON, 1, "momentum_buffer"), lambda value: value.T.contiguous()[:1], "'momentum_buffer' has shape"),
        ((*MUON, 1), lambda state: state | {"more": torch.ones(1)}, "Unexpected key 'more'"),
        (MUON, lambda _: None, "state of muon: it must be that of parameters"),
        (
            ("optimizer", "states"),
            lambda states: {"adamw": states["adamw"]},
            r"has \['adamw'\], not \['adamw', 'muon'\]",
        ),
        (("rng", "cpu"), lambda value: value[:-1], "random generator cannot be set"),
        (("rng", "cpu"), lambda value: value.float(), "random generator cannot be set"),
        (
            ("model", "embed.weight"),
            lambda value: value[:-1],
            r"do not fit this shape: size mismatch: 'embed\.weight' has shape",
        ),
        (("config", "window"), lambda _: 10**9, "window=1000000000: must be at most"),
        (("tokenizer",), lambda _: "{", "no tokenizer"),
    ],
)
def test_a_checkpoint_that_does_not_fit_is_refused_before_anything_is_taken_over(
    run, data, tmp_path, place, change, message
):
    path = damaged(run, tmp_path, place, change)
    with pytest.raises(InputError, match=message) as caught:
        assemble(resume(data, tmp_path, path))
    assert "\n" not in str(caught.value)


def test_optimizer_and_generator_change_together_or_not_at_all(run, data, tmp_path):
    parts = assemble(resume(data, tmp_path, run / "step_2.pt"))
    content = checkpoint.load(run / "step_2.pt")
    kept, random = copy.deepcopy(parts.optimizers.state_dict()), torch.get_rng_state()
    assert torch.equal(random, content["rng"]["cpu"])
    content["optimizer"]["states"]["adamw"][0]["exp_avg"] += 1
    content["optimizer"]["states"]["muon"][1]["momentum_buffer"] = torch.ones(1)
    torch.rand(1)
    random = torch.get_rng_state()
    with pytest.raises(InputError, match="the checkpoint's optimizer: state of muon: parameter 1"):
        _restore(content, parts.optimizers, torch.device("cpu"))
    assert torch.equal(torch.get_rng_state(), random)
    now = parts.optimizers.state_dict()["states"]["adamw"][0]["exp_avg"]
    assert torch.equal(now, kept["states"]["adamw"][0]["exp_avg"])


def test_a_run_says_how_much_of_the_gpu_it_takes(data, tmp_path, monkeypatch):
    settings = small_settings(data, tmp_path, batch_size=16)
    start = find_starting_point(settings, settings.changed())
    parts = assemble(start)
    parts = dataclasses.replace(parts, device=torch.device("cuda"))
    eight_rows = predicted_memory(parts.model, parts.settings.replace(batch_size=8))
    free = [24 * 10**9, int(1.01 * eight_rows / USABLE)]
    monkeypatch.setattr("torch.cuda.get_device_name", lambda device: "NVIDIA H100 80GB HBM3")
    monkeypatch.setattr("torch.cuda.synchronize", lambda device: None)
    monkeypatch.setattr("torch.cuda.memory_reserved", lambda device: 0)
    monkeypatch.setattr("torch.cuda.mem_get_info", lambda device: (free.pop(0), 25 * 10**9))
    monkeypatch.setattr("torch.ones", lambda *size, **_: torch.zeros(2, 2))  # the product whose rate is measured
    for more in ([], ["only 0.0 GB of it are free, which will hardly do: use --batch_size 8 --grad_accum 2 (the same"]):
        said = []
        introduce(parts, start, said.append)
        assert "on NVIDIA H100 80GB HBM3, fp32" in said[0]
        assert said[1] == "GPU memory: about 0.0 GB of 25.0 GB"
        assert [line[: len(each)] for line, each in zip(said[2:], more, strict=True)] == more


def test_a_run_starts_from_weights_alone_and_under_another_configuration(run, data, tmp_path):
    model = Lepton.from_checkpoint(run / "step_2.pt")
    checkpoint.save(tmp_path / "w.safetensors", checkpoint.load(run / "step_2.pt"))
    with pytest.raises(InputError, match=r"w\.safetensors holds weights only: start from it with --init_from"):
        resume(data, tmp_path, tmp_path / "w.safetensors")
    settings = small_settings(data, tmp_path, init_from=str(tmp_path / "w.safetensors"), overrides={"window": 8})
    built = _build_model(find_starting_point(settings, settings.changed()), settings, torch.device("cpu"))
    assert built.config.window == 8
    assert all(torch.equal(value, built.state_dict()[name]) for name, value in model.state_dict().items())
