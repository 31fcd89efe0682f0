import torch
from torch import nn

from lepton.distributed import Ranks
from lepton.train.gradients import FlatGradients
from tests.processes import in_ranks


def parameters():
    torch.manual_seed(0)
    small = [nn.Parameter(torch.randn(shape)) for shape in ((3, 5), (70,), (2, 2))]
    return [*small, nn.Parameter(torch.randn(4, dtype=torch.float64)), nn.Parameter(torch.ones(2), requires_grad=False)]


def test_gradients_are_views_that_a_backward_pass_adds_to():
    given = parameters()
    flat = FlatGradients(given)
    assert given[-1].grad is None
    assert [buffer.dtype for buffer in flat.buffers] == [torch.float64, torch.float32], "the last parameter comes first"
    for _ in range(2):
        sum((each.double() ** 2).sum() for each in given).backward()
    for each in given[:-1]:
        torch.testing.assert_close(each.grad, 4 * each.detach())
    assert sum(int((buffer != 0).sum()) for buffer in flat.buffers) == sum(each.numel() for each in given[:-1])
    kept = [buffer.clone() for buffer in flat.buffers]
    flat.add_up(Ranks())
    assert all(torch.equal(a, b) for a, b in zip(flat.buffers, kept, strict=True))


def test_buckets_are_bounded_unless_one_gradient_is_larger():
    given = [nn.Parameter(torch.zeros(shape)) for shape in (10, 10, 100, 10)]
    assert [len(buffer) for buffer in FlatGradients(given, bucket_bytes=80).buffers] == [64, 128, 128]


def add_up(ranks):
    given = parameters()
    flat = FlatGradients(given)
    sum(((1 + ranks.rank) * each.double()).sum() for each in given).backward()
    flat.add_up(ranks)
    return [each.grad.unique().tolist() for each in given[:-1]]


def test_processes_add_up_their_gradients(tmp_path):
    assert in_ranks(tmp_path, add_up) == [[[3.0]] * 4] * 2
