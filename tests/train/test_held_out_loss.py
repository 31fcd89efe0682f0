import pytest
import torch

from lepton.runtime.cuda_graphs import CudaGraphs
from lepton.train.held_out_loss import HeldOutLoss
from tests.train.small import opened


class Recorded:
    """`CudaGraphs` for a CPU: replaying runs what was captured again."""

    def __init__(self, error=None):
        self.actions, self.error = {}, error

    def __contains__(self, key):
        return key in self.actions

    def capture(self, key, action):
        if self.error:
            raise self.error
        self.actions[key] = action

    def replay(self, key):
        return self.actions[key]()


def batches(data):
    held_out, _ = opened(data)  # rows of 128 targets: windows of 50, 50 and 28
    return list(held_out.batches(2))


def expected(model, data):
    return [float(model.loss(tokens, lengths=lengths).parts["ce"]) for tokens, lengths, _ in batches(data)]


def test_each_shape_is_captured_once_and_reads_its_own_batch(data, model):
    graphs = Recorded()
    loss = HeldOutLoss(model, graphs, print)
    wanted = expected(model, data)
    assert len(set(wanted)) > 1
    for _ in range(2):
        found = [float(loss(*batch)) for batch in batches(data)]
        assert found == pytest.approx(wanted, rel=1e-5)
    assert len(graphs.actions) == len({batch.tokens.shape for batch in batches(data)})
    graphs.actions.clear()  # as before another shape of the steps
    assert float(loss(*batches(data)[0])) == pytest.approx(wanted[0], rel=1e-5)
    assert len(graphs.actions) == 1


def test_without_graphs_nothing_is_captured_and_nothing_has_a_gradient(data, model):
    loss = HeldOutLoss(model, None, print)(*batches(data)[0])
    assert float(loss) == expected(model, data)[0]
    assert not loss.requires_grad


def test_what_cannot_be_captured_runs_as_it_is(data, model):
    loss = HeldOutLoss(model, Recorded(RuntimeError("no graphs here\nand a trace")), (said := []).append)
    assert [float(loss(*batch)) for batch in batches(data)] == expected(model, data)
    assert said == ["cannot capture a validation here (no graphs here): going on without, which runs slower"]
    with pytest.raises(torch.OutOfMemoryError):
        HeldOutLoss(model, Recorded(torch.OutOfMemoryError("full")), print)(*batches(data)[0])


@pytest.mark.gpu
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 1e-3)])
def test_a_captured_validation_is_that_of_the_plain_pass(data, model, dtype, tolerance):
    """Also with weights that have changed since."""
    model.cuda().compute_dtype = dtype

    def unexpected(line):
        raise AssertionError(line)

    plain = HeldOutLoss(model, None, unexpected)
    captured = HeldOutLoss(model, CudaGraphs(torch.device("cuda")), unexpected)
    for _ in range(2):
        for batch in batches(data):
            assert float(captured(*batch)) == pytest.approx(float(plain(*batch)), rel=tolerance)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(1.1)
