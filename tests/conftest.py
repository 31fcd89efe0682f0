"""One thread and fixed seeds for every test: results on a CPU are then the same in each run."""

import os
import signal

os.environ["OMP_NUM_THREADS"] = "1"  # for processes that tests start, too

import pytest
import torch

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # a script's background job; what is ignored stays so in a run
    signal.signal(signal.SIGINT, signal.default_int_handler)
torch.set_num_threads(1)  # for fixtures of a whole module too, which are made before those of a test


LONGEST = (
    "test_seed_surface.py",
    "test_6_no_leak.py",
    "test_2_one_path.py",
    "test_4_losslessness.py",
    "test_trainer.py",
    "test_7_exact_resume.py",
    "test_alive.py",
    "test_several_processes.py",
    "test_ideas_removed.py",
)
"""Files that take longest. They run first, so that all workers end at about the same time."""


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: item.path.name not in LONGEST)
    if not torch.cuda.is_available():
        skip = pytest.mark.skip(reason="needs a CUDA device")
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(skip)


@pytest.fixture(autouse=True)
def _deterministic():
    torch.set_num_threads(1)
    torch.manual_seed(0)
