"""One thread and fixed seeds for every test: results on a CPU are then the same in each run."""

import pytest
import torch


@pytest.fixture(autouse=True)
def _deterministic():
    torch.set_num_threads(1)
    torch.manual_seed(0)
