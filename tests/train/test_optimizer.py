import copy

import pytest
import torch

from lepton.config import LeptonConfig
from lepton.model import Lepton, create_lepton
from lepton.train import optimizer
from lepton.train.optimizer import EMBEDDING, EMBEDDING_RATE, Optimizers, split_parameters
from tests.train.small import SHAPE

MATRICES = {"attention.qkv", "attention.out", "mlp.up", "mlp.down"}


def small_model(**changes):
    torch.manual_seed(0)
    return Lepton(LeptonConfig(**(SHAPE | changes)))


def optimizers_of(model, kind="muon", **changes):
    return Optimizers(model, **({"kind": kind, "lr": 1e-3, "muon_lr": 0.02, "weight_decay": 0.1} | changes))


def train_some(model, optimizers, steps, first=0):
    for step in range(first, first + steps):
        tokens = torch.randint(1, 300, (2, 65), generator=torch.Generator().manual_seed(step))
        model.loss(tokens).loss.backward()
        optimizers.step(1.0, 1.0)


def test_which_parameter_goes_where_in_nano():
    with torch.device("meta"):
        model = create_lepton("nano")
    muon, rest = split_parameters(model)
    assert [name for name, _ in rest] == [
        "embed.weight",
        "embed_up.weight",
        "thoughts.start",
        "memory.conv",
        "memory.decay_bias",
        "memory.gates.weight",
        "crystals.score.weight",
        "crystals.score.bias",
        "router.benefit.weight",
        "router.benefit.bias",
        "head_down.weight",
        "uncertainty.features.bias",
    ]
    blocks = [f"stem.{i}" for i in range(2)] + [f"blocks.{i}" for i in range(5)]
    assert {name for name, _ in muon} == {name for name, _ in model.named_parameters()} - {name for name, _ in rest}
    for block in blocks:
        assert any(name.startswith(f"{block}.attention.") for name, _ in muon)
        assert any(name.startswith(f"{block}.mlp.") for name, _ in muon)
    assert all(parameter.ndim == 2 for _, parameter in muon)


def test_what_is_no_matrix_or_frozen_is_not_muons():
    model = small_model()
    model.blocks[0].scale = torch.nn.Parameter(torch.ones(3))
    next(model.stem[0].parameters()).requires_grad_(False)
    muon, rest = split_parameters(model)
    assert "blocks.0.scale" in [name for name, _ in rest]
    frozen = next(name for name, _ in model.named_parameters() if name.startswith("stem.0."))
    assert frozen not in [name for name, _ in muon + rest]


@pytest.mark.parametrize("kind", ["muon", "adamw"])
def test_every_parameter_is_updated_at_its_own_rate(kind):
    model = small_model()
    before = copy.deepcopy(model.state_dict())
    optimizers = optimizers_of(model, kind)
    train_some(model, optimizers, 2)  # the second step reaches what lies behind projections that start at zero
    after = model.state_dict()
    still = [name for name, _ in model.named_parameters() if torch.equal(before[name], after[name])]
    assert still == []
    muon, _ = split_parameters(model)
    largest = max(float((after[name] - before[name]).abs().max()) for name, _ in muon)
    assert (largest > 2.5e-3) == (kind == "muon"), "AdamW's two steps move no weight by more than 2 lr (1 + decay)"


@pytest.mark.parametrize("kind", ["muon", "adamw"])
def test_matrices_decay_alike_under_either_optimizer_and_the_embedding_does_not(kind):
    model = small_model()
    before = copy.deepcopy(model.state_dict())
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizers_of(model, kind, lr=1e-2, weight_decay=0.5).step(1.0, 1.0)
    for name, parameter in model.named_parameters():
        rate = EMBEDDING_RATE if name.startswith(EMBEDDING) else 1
        shrunk = 1.0 if name == "embed.weight" or parameter.ndim < 2 else 1 - rate * 1e-2 * 0.5
        torch.testing.assert_close(parameter.data, before[name] * shrunk)


@pytest.mark.parametrize("stacked", [2**25, 3000, 1])
def test_batched_muon_is_torchs_muon(monkeypatch, stacked):
    monkeypatch.setattr(optimizer, "STACKED", stacked)
    shapes = [(32, 48), (48, 32), (32, 48), (16, 16), (32, 48)]
    start = [torch.randn(shape) for shape in shapes]
    results = []
    for kind in (torch.optim.Muon, optimizer.BatchedMuon):
        matrices = [torch.nn.Parameter(matrix.clone()) for matrix in start]
        muon = kind(matrices, lr=0.02, weight_decay=0.1)
        for step in range(4):
            noise = torch.Generator().manual_seed(step)
            for matrix in matrices:
                matrix.grad = torch.randn(matrix.shape, generator=noise)
            if step == 2:
                matrices[3].grad = None
            muon.step()
        results.append((matrices, [muon.state[matrix]["momentum_buffer"] for matrix in matrices]))
    for ours, theirs in zip(*results, strict=True):
        for a, b in zip(ours, theirs, strict=True):
            torch.testing.assert_close(a, b, atol=2e-3, rtol=0)  # bf16 products of updates of up to 0.02 each
    moved = [float((matrix.detach() - first).norm()) for matrix, first in zip(results[1][0], start, strict=True)]
    assert min(moved) > 0.05


def test_batched_muon_takes_its_rate_as_a_number_or_where_the_matrices_lie():
    shapes = [(32, 48), (48, 32), (32, 48)]
    start, found = [torch.randn(shape) for shape in shapes], []
    for place in (float, torch.tensor):
        matrices = [torch.nn.Parameter(matrix.clone()) for matrix in start]
        muon = optimizer.BatchedMuon(matrices, lr=0.0, weight_decay=0.5)
        for step, rate in enumerate((0.02, 0.0, 0.01)):
            noise = torch.Generator().manual_seed(step)
            for matrix in matrices:
                matrix.grad = torch.randn(matrix.shape, generator=noise)
            muon.param_groups[0]["lr"] = place(rate)
            muon.step()
        found.append([matrix.detach() for matrix in matrices])
    torch.testing.assert_close(*found, rtol=1e-6, atol=1e-6)
    assert not torch.allclose(found[0][0], start[0], atol=1e-2)


def test_an_orthogonal_update_has_singular_values_near_one():
    for shape in ((3, 24, 40), (3, 40, 24)):
        stack = torch.randn(shape) * torch.tensor([1e-6, 1.0, 1e3])[:, None, None]
        update = optimizer.orthogonal(stack, (3.4445, -4.775, 2.0315), 5, 1e-7)
        values = torch.linalg.svdvals(update)
        assert update.shape == shape
        assert 0.4 < float(values.min()) <= float(values.max()) < 1.6
    assert not optimizer.orthogonal(torch.zeros(1, 4, 4), (3.4445, -4.775, 2.0315), 5, 1e-7).any()


def test_gradients_are_clipped_and_cleared():
    model = small_model()
    norms = []
    for clip in (1e9, 1e-3):
        model.loss(torch.randint(1, 300, (2, 65), generator=torch.Generator().manual_seed(1))).loss.backward()
        norms.append(float(optimizers_of(model).step(0.0, clip)))
        assert not any(parameter.grad is None or parameter.grad.any() for parameter in model.parameters())
    assert norms[0] == norms[1] > 1e-3, "the norm before clipping is returned, and a rate of 0 changes nothing"


@pytest.mark.parametrize("kind", ["muon", "adamw"])
def test_its_state_goes_on_bit_for_bit(kind):
    model = small_model()
    optimizers = optimizers_of(model, kind)
    train_some(model, optimizers, 3)
    twin = small_model()
    twin.load_state_dict(model.state_dict())
    saved = copy.deepcopy(optimizers.state_dict())
    again = optimizers_of(twin, kind)
    again.load_state_dict(saved)
    train_some(model, optimizers, 3, first=3)
    train_some(twin, again, 3, first=3)
    for a, b in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(a, b)


def test_a_restored_state_keeps_the_new_rates():
    model = small_model()
    first = optimizers_of(model)
    train_some(model, first, 1)
    second = optimizers_of(model, weight_decay=0.0)
    second.load_state_dict(first.state_dict())
    assert all(group["weight_decay"] == 0 for member in second._members.values() for group in member.param_groups)
