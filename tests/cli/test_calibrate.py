"""`python -m lepton calibrate`: what it writes, what it prints, and what a user can get wrong."""

import numpy as np
import pytest
import torch

from lepton import checkpoint
from lepton.data.shards import ShardedDataset
from lepton.model import Lepton
from lepton.train.calibration import calibrate, calibration_batches
from tests.cli.tiny import TEXT, run, run_json, save_tiny
from tests.laws.lab import build


@pytest.fixture
def saved(tmp_path):
    path = tmp_path / "final.pt"
    return path, *save_tiny(path, optimizer={"state": torch.arange(3)})


@pytest.fixture
def data_dir(tmp_path, saved):
    """Rows of text, of which six are held out."""
    ids = saved[2].encode(TEXT * 9)[: 12 * 33]
    rows = np.array(ids, dtype=np.int32).reshape(12, 33)
    (tmp_path / "shards" / "val").mkdir(parents=True)
    np.save(tmp_path / "shards" / "shard_00000.npy", rows[:6])
    np.save(tmp_path / "shards" / "val" / "shard_00000.npy", rows[6:])
    return tmp_path / "shards"


def command_of(path, data_dir):
    return "calibrate", "--checkpoint", path, "--data_dir", data_dir, "--dtype", "fp32"


def test_it_writes_what_the_function_fits(saved, data_dir):
    path, model, _ = saved
    before = checkpoint.load(path)
    figures = run_json(*command_of(path, data_dir))
    after = checkpoint.load(path)
    data = ShardedDataset(data_dir, seq_len=16, seed=0, split="val", vocab_size=320)
    fitted = calibrate(model, calibration_batches(data, 8))
    assert (figures["scale"], figures["shift"]) == pytest.approx(fitted.line)
    assert figures["calibration_tokens"] == fitted.tokens == 6 * 16
    assert figures["tokens"] == 6 * 16
    assert after["model"]["uncertainty.calibration"].tolist() == pytest.approx(fitted.line)
    assert torch.allclose(after["model"]["router.quantiles"].double(), fitted.quantiles)
    assert after["model"]["router.quantiles"].dtype == torch.float32
    changed = {name for name, value in after["model"].items() if not torch.equal(value, before["model"][name])}
    assert changed == {"uncertainty.calibration", "router.quantiles"}
    assert after["optimizer"]["state"].tolist() == [0, 1, 2]
    assert {**after, "model": 0, "optimizer": 0} == {**before, "model": 0, "optimizer": 0}
    assert set(figures["before"]) == set(figures["after"]) == {"ece", "brier", "auroc", "deep_at_half"}
    assert figures["after"]["auroc"] == pytest.approx(figures["before"]["auroc"])
    assert figures["after"]["ece"] < figures["before"]["ece"]
    assert Lepton.from_checkpoint(path).uncertainty.calibration.tolist() == pytest.approx(fitted.line)


def test_another_file_and_lines_for_people(saved, data_dir, tmp_path):
    path, out = saved[0], tmp_path / "new" / "calibrated.pt"
    content = path.read_bytes()
    code, text, err = run(*command_of(path, data_dir), "--out", out)
    assert code == 0
    assert path.read_bytes() == content
    assert "val split" in err
    for word in ("before", "after", "ECE", "Brier", "AUROC", "depth 0.5", f"written to {out}"):
        assert word in text
    again = run_json(*command_of(out, data_dir), "--out", tmp_path / "again.pt")
    assert again["before"] == pytest.approx(again["after"], abs=1e-6)


def test_mistakes_are_one_line(saved, data_dir, tmp_path):
    for words, named in (
        (["--checkpoint", tmp_path / "none.pt"], "none.pt"),
        (["--checkpoint", saved[0], "--data_dir", "nowhere"], "nowhere"),
        (["--checkpoint", saved[0], "--max_tokens", 0], "--max_tokens 0"),
        (["--checkpoint", saved[0], "--batch_size", 0], "--batch_size 0"),
        (["--checkpoint", saved[0], "--data_dir", data_dir, "--out", tmp_path], "cannot save"),
    ):
        code, out, err = run("calibrate", *words)
        assert (code, out) == (2, "")
        assert err.splitlines()[-1].startswith("error: ")
        assert named in err


def test_a_model_without_the_ideas(saved, data_dir, monkeypatch):
    dense, tokenizer = build("dense").float(), saved[2]
    monkeypatch.setattr("lepton.cli.calibrate.load", lambda args: (dense, tokenizer, 7))
    code, _, err = run(*command_of(saved[0], data_dir))
    assert code == 2
    assert "nothing to calibrate" in err
