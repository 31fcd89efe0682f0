"""What two processes share is what one has, to the rounding of fp64: gradients, norms, and the weights after steps."""

import dataclasses

import pytest
import torch

from lepton.api import Lepton
from lepton.config import LeptonConfig
from lepton.distributed import Ranks
from lepton.train.gradients import FlatGradients
from lepton.train.micro_step import MicroStep
from lepton.train.optimizer import Optimizers, local
from lepton.train.sharding import gathered, like, shard
from tests.processes import in_ranks
from tests.train.small import SHAPE

MICRO_BATCHES = 4
STEPS = 3


def made(dtype, recomputed):
    """A model all of whose parameters do something, and batches longer than its window, some rows shorter."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = Lepton(LeptonConfig.from_dict(SHAPE)).to(torch.float32 if dtype is torch.bfloat16 else dtype).train()
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter) / parameter.shape[-1] ** 0.5
    model.compute_dtype = dtype if dtype is torch.bfloat16 else None
    model.checkpoint_activations = recomputed
    tokens = torch.randint(1, 300, (MICRO_BATCHES, 2, 41))
    lengths = torch.tensor([[41, 41], [41, 25], [41, 41], [30, 3]])
    return model, tokens, lengths


def trained(ranks, way, dtype=torch.float64, recomputed=False):
    """Train for some steps; return the gradients of the first one, the norm of each step, weights and state."""
    model, tokens, lengths = made(dtype, recomputed)
    if way == "hosts":
        ranks = dataclasses.replace(ranks, local_rank=ranks.rank % 2, local_size=2)
    mesh = ranks.mesh("cpu", by_host=way == "hosts") if ranks.several else None
    if way in ("shard", "hosts"):
        shard(model, mesh)
    optimizers = Optimizers(model, kind="muon", lr=1e-3, muon_lr=0.02, weight_decay=0.1, mesh=mesh)
    gradients = FlatGradients(model.parameters() if way == "copies" else ())
    micro_step = MicroStep(model, compiled=False)
    counts = lengths.sum(1) - 2
    norms, first = [], None
    for _ in range(STEPS):
        for micro in ranks.share(MICRO_BATCHES):
            think = torch.tensor([1, 2])
            micro_step(tokens[micro], lengths[micro], think, None, float(counts[micro] / counts.sum()))
        ranks.add_(gradients.buffers)
        first = first or {name: gathered(each.grad, keep=True).clone() for name, each in model.named_parameters()}
        norms.append(float(optimizers.step(1.0, 1.0)))
    weights = gathered(dict(model.state_dict()), keep=True)
    return first, norms, weights, gathered(optimizers.state_dict(), keep=True)["states"]


@pytest.mark.parametrize(("way", "recomputed"), [("copies", False), ("shard", False), ("shard", True)])
def test_two_processes_have_the_gradients_and_the_weights_of_one(tmp_path, way, recomputed):
    expected = trained(Ranks(), "one")
    assert all(grad.norm() > 0 for grad in expected[0].values()), "nothing to compare"
    for found in in_ranks(tmp_path, trained, way, torch.float64, recomputed):
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


def test_four_processes_on_two_hosts_share_within_each(tmp_path):
    expected = trained(Ranks(), "one")
    for found in in_ranks(tmp_path, trained, "hosts", size=4):
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


def test_sharded_blocks_compute_in_half_precision_as_copies_do(tmp_path):
    """fp32 masters and bf16 products: gradients differ by the rounding of their sums alone."""
    copies, _ = in_ranks(tmp_path / "copies", trained, "copies", torch.bfloat16)
    sharded, _ = in_ranks(tmp_path / "shard", trained, "shard", torch.bfloat16)
    for name, grad in copies[0].items():
        assert (sharded[0][name] - grad).norm() <= 0.02 * grad.norm(), name
    assert sharded[1][0] == pytest.approx(copies[1][0], rel=1e-2)


def parts(ranks):
    model, *_ = made(torch.float32, False)
    whole = {name: each.detach().clone() for name, each in model.named_parameters()}
    shard(model, ranks.mesh("cpu"))
    numbers = sum(local(each).numel() for each in model.parameters())
    again = all(torch.equal(local(like(whole[name], each)), local(each)) for name, each in model.named_parameters())
    kept = gathered({"a": [*model.parameters()][:2], "b": 3}, keep=ranks.leads)
    return numbers, again, [len(each) > 0 for each in kept["a"]], kept["b"]


def test_each_process_keeps_its_share(tmp_path):
    model, *_ = made(torch.float32, False)
    (first, again, kept, number), (second, *others) = in_ranks(tmp_path, parts)
    assert first + second == sum(each.numel() for each in model.parameters())
    assert abs(first - second) < 0.2 * first
    assert (again, kept, number) == (True, [True, True], 3)
    assert others == [True, [False, False], 3]
