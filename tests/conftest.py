"""One thread and fixed seeds for every test: results on a CPU are then the same in each run."""

import os
import signal

os.environ["OMP_NUM_THREADS"] = "1"  # for processes that tests start, too

import pytest
import torch

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # a script's background job; what is ignored stays so in a run
    signal.signal(signal.SIGINT, signal.default_int_handler)
torch.set_num_threads(1)  # for fixtures of a whole module too, which are made before those of a test


def pytest_collection_modifyitems(items):
    if not torch.cuda.is_available():
        skip = pytest.mark.skip(reason="needs a CUDA device")
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(skip)


@pytest.fixture(autouse=True)
def _deterministic():
    torch.set_num_threads(1)
    torch.manual_seed(0)
