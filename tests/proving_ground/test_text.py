"""Text: the same text for all models, and a loss by quarter that is the loss."""

import json

import numpy as np
import pytest

from benchmarks.proving_ground.text import main
from lepton.errors import InputError


def test_smoke(tmp_path, capsys):
    rows = np.random.default_rng(0).integers(2, 50, (120, 129), dtype=np.uint16)
    np.save(tmp_path / "shard_00000.npy", rows)
    main(["--smoke", "--models", "dense", "complete", "--data_dir", str(tmp_path)])
    *_, dense_line, complete_line, last = capsys.readouterr().out.splitlines()
    dense, complete = json.loads(last)["rows_of_table"]
    assert dense_line.startswith("dense ")
    assert complete_line.startswith("complete ")
    assert dense["params"] == pytest.approx(complete["params"], rel=0.02)
    for row in (dense, complete):
        assert row["steps"] == 3
        assert np.mean(row["loss_of_quarters"]) == pytest.approx(row["val_loss"], abs=1e-3)
        assert row["training_flops_per_token"] > 6 * 5e6


def test_a_limit_shortens_the_run_with_its_schedule(tmp_path, capsys):
    rows = np.random.default_rng(0).integers(2, 50, (120, 129), dtype=np.uint16)
    np.save(tmp_path / "shard_00000.npy", rows)
    main(["--smoke", "--models", "dense", "--seconds", "0.01", "--data_dir", str(tmp_path)])
    (dense,) = json.loads(capsys.readouterr().out.splitlines()[-1])["rows_of_table"]
    assert dense["steps"] == 1


def test_an_unknown_model_is_named():
    with pytest.raises(InputError, match=r"'no_thought'.*no_thoughts"):
        main(["--models", "no_thought"])
