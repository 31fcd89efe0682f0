"""`python -m lepton calibrate`: what it writes, what it prints, and what a user can get wrong."""

import dataclasses

import numpy as np
import pytest
import torch

from lepton import checkpoint
from lepton.api import Lepton
from lepton.cli.calibrate import worse
from lepton.data.shards import ShardedDataset
from lepton.evals.calibration import calibrate
from lepton.evals.positions import calibration_batches
from tests.cli.tiny import TEXT, run, run_json, save_tiny
from tests.streams import Watched


@pytest.fixture
def saved(tmp_path):
    path = tmp_path / "final.pt"
    return path, *save_tiny(path, optimizer={"state": torch.arange(3)})


@pytest.fixture
def data_dir(tmp_path, saved):
    """Rows of text, of which so many are held out that each half has 1,024 tokens."""
    return write_shards(tmp_path / "shards", np.resize(saved[2].encode(TEXT), (64, 33)))


def write_shards(folder, held_out):
    (folder / "val").mkdir(parents=True)
    np.save(folder / "shard_00000.npy", held_out[:6].astype(np.int32))
    np.save(folder / "val" / "shard_00000.npy", held_out.astype(np.int32))
    return folder


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
    assert figures["calibration_tokens"] == fitted.tokens == 64 * 16
    assert figures["tokens"] == 64 * 16
    assert figures["written"] is True
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


def test_few_tokens_are_refused_and_the_file_stays(saved, tmp_path):
    """Four validation tokens were both fitted and measured, and the checkpoint was overwritten."""
    path = saved[0]
    content = path.read_bytes()
    ids = saved[2].encode(TEXT)
    for rows, row_len, counts in ((1, 5, "2 tokens to fit on and 2 others"), (62, 33, "992 tokens to fit on and 992")):
        folder = write_shards(tmp_path / str(rows), np.resize(ids, (rows, row_len)))
        code, out, err = run(*command_of(path, folder))
        assert (code, out) == (2, "")
        assert counts in err
        assert "needs 1,000 of each" in err
        assert err.splitlines()[-1].startswith("error: ")
        assert path.read_bytes() == content
    code, out, err = run(*command_of(path, tmp_path / "1"), "--max_tokens", 999)
    assert (code, "must be at least 1,000" in err) == (2, True)
    # A single window cannot be split: nothing is fitted where it is measured, forced or not.
    single = write_shards(tmp_path / "single", np.resize(ids, (1, 2)))
    code, out, err = run(*command_of(path, single), "--force")
    assert (code, out) == (2, "")
    assert "0 tokens to fit on and 1 others" in err
    assert path.read_bytes() == content


def test_what_makes_the_measured_half_worse_is_written_by_force_alone(saved, tmp_path):
    path, model, _ = saved
    content = path.read_bytes()
    # One half is what the model itself says, the other one noise: what fits the first is wrong of the second.
    rows = [torch.full((32, 1), 40)]
    with torch.no_grad():
        for _ in range(32):
            rows.append(model(torch.cat(rows, 1)).logits[:, -1:].argmax(-1))
    noise = torch.randint(1, 300, (32, 33))
    folder = write_shards(tmp_path / "unlike", torch.cat([torch.cat(rows, 1), noise]).numpy())
    for flags in ([], ["--json"]):
        code, out, err = run(*command_of(path, folder), *flags)
        assert code == 2
        assert "ECE " in err.splitlines()[-1]
        assert "--force" in err.splitlines()[-1]
        assert "written to" not in out
        assert path.read_bytes() == content
    figures = run_json(*command_of(path, folder), "--force")
    assert figures["written"] is True
    assert figures["after"]["ece"] > figures["before"]["ece"]
    assert checkpoint.load(path)["model"]["uncertainty.calibration"].tolist() == pytest.approx(
        [figures["scale"], figures["shift"]]
    )


def test_a_checkpoint_that_is_replaced_meanwhile_is_left_alone(saved, data_dir, tmp_path):
    path = saved[0]
    save_tiny(tmp_path / "newer.pt", step=8)
    content = (tmp_path / "newer.pt").read_bytes()

    def screen():  # the data are named after the model is loaded
        return Watched("val split", lambda: (tmp_path / "newer.pt").replace(path))

    code, _, err = run(*command_of(path, data_dir), screen=screen)
    assert (code, "step 7 -> 8" in err) == (2, True)
    assert path.read_bytes() == content


def test_what_counts_as_worse():
    before = {"ece": 0.02, "brier": 0.1, "auroc": 0.8, "deep_at_half": 0.5}
    assert worse(before, before) == []
    assert worse(before, {"ece": 0.01, "brier": 0.1, "auroc": 0.8, "deep_at_half": 0.54}) == []
    assert worse(before, {"ece": 0.03, "brier": 0.1, "auroc": None, "deep_at_half": 0.5}) == ["ECE 0.0200 -> 0.0300"]
    changed = {"ece": 0.02, "brier": 0.11, "auroc": 0.7, "deep_at_half": 0.4}
    assert worse(before, changed) == [
        "Brier 0.1000 -> 0.1100",
        "AUROC 0.8000 -> 0.7000",
        "tokens that go deep at depth 0.5 0.5000 -> 0.4000",
    ]


def test_a_model_without_the_ideas(saved, data_dir):
    dense = Lepton(dataclasses.replace(saved[1].config, ideas=()))
    save_tiny(saved[0], model=dense.state_dict(), config=dense.config.to_dict())
    code, _, err = run(*command_of(saved[0], data_dir))
    assert code == 2
    assert "nothing to calibrate" in err
