"""`python -m lepton tune`: what it writes, what it prints, and what a user can get wrong."""

import numpy as np
import pytest
import torch

from lepton import checkpoint
from lepton.api import Lepton
from lepton.cli.tune import worse
from lepton.model.size_config import size_config
from tests.cli.tiny import TEXT, run, run_json, save_tiny


@pytest.fixture
def saved(tmp_path):
    path = tmp_path / "final.pt"
    return path, *save_tiny(path, optimizer={"state": torch.arange(3)})


@pytest.fixture
def command(tmp_path, saved):
    path, _, tokenizer = saved
    rows = np.resize(tokenizer.encode(TEXT), (40, 33)).astype(np.int32)
    (tmp_path / "data" / "val").mkdir(parents=True)
    np.save(tmp_path / "data" / "shard_00000.npy", rows[:30])
    np.save(tmp_path / "data" / "val" / "shard_00000.npy", rows[30:])
    sizes = "--prompts", "16", "--new_tokens", "16", "--steps", "3"
    return "tune", "--checkpoint", path, "--data_dir", tmp_path / "data", *sizes


def test_it_writes_the_drafter_and_nothing_else(saved, command, tmp_path):
    path, before = saved[0], checkpoint.load(saved[0])
    figures = run_json(*command, "--steps", "30", "--force")
    after = checkpoint.load(path)
    changed = {name for name, value in after["model"].items() if not torch.equal(value, before["model"][name])}
    assert changed == {f"drafter.{name}.weight" for name in ("enter", "token", "up", "down", "leave")}
    assert {after["model"][name].dtype for name in changed} == {torch.float32}
    assert after["optimizer"]["state"].tolist() == [0, 1, 2]
    assert {**after, "model": 0, "optimizer": 0} == {**before, "model": 0, "optimizer": 0}
    assert figures["texts"] == 3 * 16
    assert 3 * 16 <= figures["new_tokens"] <= 3 * 16 * 16
    assert figures["written"] is True
    assert list(figures["tokens_per_pass"]["before"]) == ["temperature 0", "temperature 1"]


def test_the_report_says_what_was_learnt_and_where_it_is(command, tmp_path):
    out = tmp_path / "tuned.pt"
    code, printed, told = run(*command, "--out", out, "--force")
    assert code == 0
    assert "its drafter learnt" in printed
    assert f"written to {out}" in printed
    assert "writing 48 texts of 16 tokens" in told
    assert "step 1/3  loss " in told
    assert checkpoint.load(out)["step"] == checkpoint.load(command[2])["step"]


def test_what_is_worse_is_named():
    before = {"temperature 0": 2.0, "temperature 1": 1.5}
    assert worse(before, {"temperature 0": 2.1, "temperature 1": 1.5}) == []
    assert worse(before, {"temperature 0": 1.9, "temperature 1": 1.6}) == ["temperature 0"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--prompts", "0"), "--prompts 0: must lie in 1.."),
        (("--steps", "0"), "--steps 0: must lie in 1.."),
        (("--new_tokens", "-3"), "--new_tokens -3: must lie in 1.."),
    ],
)
def test_mistakes_are_one_line(command, flags, message):
    code, _, told = run(*command, *flags)
    assert code == 2
    assert message in told.splitlines()[-1]


def test_a_model_without_drafts_is_refused(tmp_path, command):
    path, model = tmp_path / "plain.pt", Lepton(size_config("nano", drafts=0, vocab_size=320, width=64, heads=1))
    save_tiny(path, model=model.state_dict(), config=model.config.to_dict())
    code, _, told = run("tune", "--checkpoint", path, *command[3:])
    assert code == 2
    assert "built without drafts" in told
