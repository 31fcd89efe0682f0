"""Depth: rules choose as they say, and the parts of what is lost add up."""

import json

import numpy as np
import pytest
import torch

from benchmarks.proving_ground.depth import Sums, at_flops, chosen_by, exit_lacks, judge, main, nats_at
from lepton.data.shards import Batch, ShardedDataset
from lepton.errors import InputError
from lepton.model.layers import norm
from tests.cli.tiny import save_tiny
from tests.laws.lab import build, text


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("depth")
    rows = np.random.default_rng(0).integers(2, 50, (120, 129), dtype=np.uint16)
    np.save(folder / "shard_00000.npy", rows)
    return folder


def test_smoke(data_dir, capsys):
    main(["--smoke", "--dense_layers", "3", "--windows", "16", "64", "--data_dir", str(data_dir), "--change",
          "router.into_stem=0.1", "router.exit_stride=8", "router.served=0.75", "router.distil=true",
          "router.expected=true", "router.reads_exit=true"])  # fmt: skip
    *_, last = capsys.readouterr().out.splitlines()
    found = json.loads(last)
    assert [table["window"] for table in found["tables"]] == [16, 64]
    assert [row["layers"] for row in found["dense"]] == [3]
    assert found["dense"][0]["params"] < found["params"]
    for row in found["tables"][0]["depths"]:
        assert row["share"] == pytest.approx(row["depth"], abs=0.02)
        assert row["loss"] == pytest.approx(found["tables"][0]["loss"] + row["change"])
        parts = row["share"] * row["deep_change"] + (1 - row["share"]) * row["easy_change"]
        assert row["change"] == pytest.approx(parts, abs=1e-9)
    flops = [row["flops"] for row in found["tables"][0]["depths"]]
    assert flops == sorted(flops, reverse=True)
    assert flops[0] < found["tables"][0]["flops"]


def test_a_checkpoint_is_judged_without_training(data_dir, tmp_path, capsys):
    save_tiny(tmp_path / "x.pt")
    main(["--smoke", "--checkpoint", str(tmp_path / "x.pt"), "--dense_layers", "--data_dir", str(data_dir)])
    *lines, last = capsys.readouterr().out.splitlines()
    found = json.loads(last)
    assert found["dense"] == []
    assert not any("step" in line for line in lines)
    assert all(row["beside_dense"] is None for row in found["tables"][0]["depths"])


@torch.no_grad()
def test_the_oracle_is_no_worse_than_a_lot(data_dir):
    """By its own measure: what the exit lacks on the tokens that it leaves to the exit."""
    model = build("complete", vocab_size=97)
    data = ShardedDataset(data_dir, split="val", seq_len=64, seed=0, vocab_size=97)
    found = judge(model, data, 2, 256)
    by = {(row["rule"], row["depth"]): row for row in found["depths"]}
    assert found["kl"] > 0
    assert by["exit", 0.0]["deep_change"] == 0
    for depth in (0.75, 0.5, 0.25):
        assert by["oracle", depth]["expected"] < 0.9 * by["lot", depth]["expected"]
    assert by["lot", 0.5]["expected"] == pytest.approx(found["kl"] / 2, rel=0.2)
    assert by["exit", 0.0]["expected"] == pytest.approx(found["kl"])
    assert "score" not in vars(model.router), "the router is as before"


@torch.no_grad()
def test_given_scores_choose():
    model, tokens = build("complete"), text(1, rows=2, documents=False)
    best_BT = torch.zeros(2, 100, dtype=torch.float64)
    best_BT[:, ::2] = 1
    with chosen_by(model.router, best_BT, torch.linspace(0, 1, 65)):
        deep_BT = model.trunk(tokens, depth=0.5).flow.deep_BT
    assert torch.equal(deep_BT, best_BT > 0)


@torch.no_grad()
def test_what_the_exit_lacks_is_a_divergence():
    model, tokens = build("factorised, own keys"), text(1)
    out = model.trunk(tokens)
    deep = model.head(out.hidden).log_softmax(-1)
    left = model.head(norm(model.router.exit(out.flow.x_BTD))).log_softmax(-1)
    torch.testing.assert_close(exit_lacks(model, out), (deep.exp() * (deep - left)).sum(-1), rtol=0, atol=1e-9)
    alone = model.trunk(tokens, depth=0.0).hidden
    torch.testing.assert_close(model.head(alone).log_softmax(-1), left, rtol=0, atol=1e-9)


@torch.no_grad()
def test_nats_are_those_of_the_loss():
    model, tokens = build("complete"), text(1, rows=3)
    lengths = torch.tensor([100, 40, 2])
    nats_BT = nats_at(model, model.trunk(tokens[:, :-1]).hidden, Batch(tokens, lengths))
    mean = nats_BT.sum() / (lengths - 1).sum()
    assert mean.item() == pytest.approx(model.loss(tokens, lengths=lengths).parts["ce"].item(), rel=1e-5)


def test_sums_are_means_over_what_counts():
    sums, valid = Sums(), torch.tensor([[True, True, True], [True, False, False]])
    change, deep = torch.tensor([[1.0, 2, 3], [4, 9, 9]]), torch.tensor([[True, False, False], [False, True, True]])
    sums.add(change, 2 * change, deep, valid)
    found = sums.to_dict()
    assert found["share"] == 1 / 4
    assert (found["change"], found["deep_change"], found["easy_change"]) == (2.5, 1.0, 3.0)
    assert found["expected"] == 2 * (2 + 3 + 4) / 4
    assert found["error"] == pytest.approx((1.5**2 + 1.5**2) ** 0.5 / 4)


def test_the_dense_curve_is_linear_between_its_points():
    curve = [(4.0, 2.0), (2.0, 3.0)]
    assert [at_flops(curve, flops) for flops in (2.0, 3.0, 4.0)] == [3.0, 2.5, 2.0]
    assert at_flops(curve, 1.9) is None
    assert at_flops([], 1.0) is None


def test_a_model_of_one_depth_is_refused(data_dir):
    with pytest.raises(InputError, match="no router"):
        main(["--smoke", "--data_dir", str(data_dir), "--variant", "no_router", "--dense_layers"])
