"""Held-out data of the commands that measure: how much of it is read."""

import argparse

import numpy as np
import pytest

from lepton.cli.data_set import check_counts, spread
from lepton.data.shards import ShardedDataset
from lepton.errors import InputError


@pytest.fixture
def rows(tmp_path):
    """Twelve windows of 8 targets."""
    (tmp_path / "val").mkdir()
    array = np.arange(12 * 9, dtype=np.uint16).reshape(12, 9)
    for folder in (tmp_path, tmp_path / "val"):
        np.save(folder / "shard_00000.npy", array)
    return ShardedDataset(tmp_path, seq_len=8, seed=0, split="val", vocab_size=200)


@pytest.mark.parametrize(("asked", "windows"), [(None, 12), (1, 1), (8, 1), (12, 2), (40, 5), (95, 12), (10**9, 12)])
def test_as_many_windows_as_come_nearest(rows, asked, windows):
    batches = list(spread(rows, 5, asked))
    assert max(len(batch.lengths) for batch in batches) <= 5
    assert windows <= sum(len(batch.lengths) for batch in batches) < windows + 5
    firsts = [int(row[0]) for batch in batches for row in batch.tokens]
    assert firsts == sorted(set(firsts)), "each once, in order"


def test_counts_out_of_range_name_their_flag():
    args = argparse.Namespace(batch_size=8, max_tokens=None)
    check_counts(args, batch_size=8, max_tokens=5)
    for value in (0, 9):
        args.batch_size = value
        with pytest.raises(InputError, match=rf"--batch_size {value}: must lie in 1\.\.8"):
            check_counts(args, batch_size=8)
