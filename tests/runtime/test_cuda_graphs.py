"""What is captured and replayed. That training with graphs is training is tested in tests/train/test_micro_step.py."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from lepton.runtime.cuda_graphs import CudaGraphs


@pytest.mark.gpu
def test_what_other_threads_do_does_not_break_a_capture():
    x = torch.zeros(4, device="cuda")
    graphs = CudaGraphs(x.device)
    with ThreadPoolExecutor(1) as pool:

        def action():
            pool.submit(lambda: torch.empty(1 << 22).pin_memory()).result()
            return x.add_(1)

        graphs.capture("one", action)
    assert x.tolist() == [0] * 4, "a capture runs nothing"
    assert graphs.replay("one").tolist() == [1] * 4
