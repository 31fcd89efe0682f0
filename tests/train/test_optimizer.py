import copy

import pytest
import torch

from lepton.api import Lepton, create_lepton
from lepton.config import LeptonConfig
from lepton.runtime.cuda_graphs import CudaGraphs
from lepton.train import optimizer
from lepton.train.optimizer import Optimizers, split_parameters
from tests.train.small import SHAPE

EMBEDDING = ("embed.", "embed_up.", "head_down.")
FEEDS = ("memory.out.", "peek.back.")


def small_model(**changes):
    torch.manual_seed(0)
    return Lepton(LeptonConfig.from_dict(SHAPE | changes))


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
    assert [name for name, *_ in rest] == [
        "shift_D",
        "backout",
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
    assert {name for name, *_ in muon} == {name for name, _ in model.named_parameters()} - {name for name, *_ in rest}
    for block in blocks:
        assert any(name.startswith(f"{block}.attention.") for name, *_ in muon)
        assert any(name.startswith(f"{block}.mlp.") for name, *_ in muon)
    assert all(parameter.ndim == 2 for _, parameter, _ in muon)


def test_a_parameter_that_nobody_declares_is_refused():
    model = small_model()
    model.blocks[0].scale = torch.nn.Parameter(torch.ones(3))
    with pytest.raises(TypeError, match=r"blocks\.0\.scale.*declared 0 times"):
        split_parameters(model)


def test_what_is_frozen_is_not_trained():
    model = small_model()
    next(model.stem[0].parameters()).requires_grad_(False)
    muon, rest = split_parameters(model)
    frozen = next(name for name, _ in model.named_parameters() if name.startswith("stem.0."))
    assert frozen not in [name for name, *_ in muon + rest]


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
    largest = max(float((after[name] - before[name]).abs().max()) for name, *_ in muon)
    assert (largest > 2.5e-3) == (kind == "muon"), "AdamW's two steps move no weight by more than 2 lr (1 + decay)"


@pytest.mark.parametrize("kind", ["muon", "adamw"])
def test_matrices_decay_alike_under_either_optimizer_and_the_embedding_does_not(kind):
    model = small_model()
    before = copy.deepcopy(model.state_dict())
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizers_of(model, kind, lr=1e-2, weight_decay=0.5).step(1.0, 1.0)
    for name, parameter in model.named_parameters():
        rate = 10 if name.startswith(EMBEDDING) else 0.1 if name.startswith(FEEDS) else 1
        shrunk = 1.0 if name == "embed.weight" or parameter.ndim < 2 else 1 - rate * 1e-2 * 0.5
        torch.testing.assert_close(parameter.data, before[name] * shrunk)


@pytest.mark.parametrize("kind", ["muon", "adamw"])
def test_parameters_learn_at_their_rates(kind, monkeypatch):
    """In a first step without decay a parameter moves in proportion to its rate."""

    def moves():
        model = small_model()
        before = copy.deepcopy(model.state_dict())
        noisy_gradients(model, 0)
        optimizers_of(model, kind, weight_decay=0.0).step(1.0, 1e6)
        return {name: (parameter - before[name]).norm().item() for name, parameter in model.named_parameters()}

    found = moves()
    entries = optimizer.declared
    monkeypatch.setattr(
        optimizer, "declared", lambda model: {name: entry.but(rate=1) for name, entry in entries(model).items()}
    )
    for name, alike in moves().items():
        rate = 10 if name.startswith(EMBEDDING) else 0.1 if name.startswith(FEEDS) else 1
        assert found[name] == pytest.approx(rate * alike, rel=1e-3), name


@pytest.mark.parametrize("stacked", [2**25, 3000, 1])
def test_batched_muon_is_torchs_muon_but_for_the_second_moments(monkeypatch, stacked):
    monkeypatch.setattr(optimizer, "STACKED", stacked)
    monkeypatch.setattr(optimizer, "evened", lambda stack, moments: stack)
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


@pytest.mark.parametrize("shape", [(6, 4), (4, 6), (4, 4)])
def test_second_moments_even_out_the_rows_of_updates(shape):
    """Of the columns, where there are more of them."""
    axis = 1 if shape[0] >= shape[1] else 0
    matrices = torch.randn(2, *shape) * torch.logspace(0, 1, shape[1 - axis]).unsqueeze(axis)
    moments = [optimizer.row_moments(matrix) for matrix in matrices]
    for _ in range(100):  # the mean of what is always the same is that
        update = optimizer.evened(matrices, moments)
    sizes = update.norm(dim=1 + axis)
    torch.testing.assert_close(sizes, sizes[:, :1].expand_as(sizes), rtol=1e-4, atol=0)
    torch.testing.assert_close(update.norm(dim=(1, 2)), matrices.norm(dim=(1, 2)))
    torch.testing.assert_close(torch.stack(moments), matrices.square().mean(1 + axis, keepdim=True), rtol=1e-4, atol=0)


def test_the_second_moments_are_running_means():
    first, second = torch.tensor([[1.0, 1.0], [3.0, 3.0]]), torch.tensor([[2.0, 2.0], [0.0, 0.0]])
    moments = [optimizer.row_moments(first)]
    optimizer.evened(first[None], moments)
    torch.testing.assert_close(moments[0], torch.tensor([[0.1], [0.9]]))
    optimizer.evened(second[None], moments)
    torch.testing.assert_close(moments[0], torch.tensor([[0.49], [0.81]]))
    assert not optimizer.evened(torch.zeros(1, 2, 2), moments).any()


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
        update = optimizer.orthogonal(stack, torch.bfloat16, (3.4445, -4.775, 2.0315), 5, 1e-7)
        values = torch.linalg.svdvals(update)
        assert update.shape == shape
        assert 0.4 < float(values.min()) <= float(values.max()) < 1.6
    assert not optimizer.orthogonal(torch.zeros(1, 4, 4), torch.bfloat16, (3.4445, -4.775, 2.0315), 5, 1e-7).any()


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


class Rerun:
    """Stands in for `CudaGraphs` where there is no GPU: runs the actions each time."""

    def __init__(self, device=None):
        self.actions, self.captured, self.replays = {}, 0, 0

    def __contains__(self, key):
        return key in self.actions

    def capture(self, key, action):
        self.actions[key] = action
        self.captured += 1

    def replay(self, key):
        self.replays += 1
        return self.actions[key]()


def noisy_gradients(model, seed):
    """Fill the gradients where they lie; the same numbers on every device."""
    noise = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        parameter.grad.copy_(torch.randn(parameter.shape, generator=noise) / 100)


def test_a_step_is_captured_the_second_time_in_a_row():
    model, twin, graphs = small_model(), small_model(), Rerun()
    optimizers, plain = optimizers_of(model), optimizers_of(twin)
    optimizers._capture = True
    made_and_replayed = []

    def step(clip=1.0):
        for which in (model, twin):
            noisy_gradients(which, len(made_and_replayed))
        norm, expected = optimizers.step(0.5, clip, graphs), plain.step(0.5, clip)
        assert torch.equal(norm, expected)
        made_and_replayed.append((graphs.captured, graphs.replays))
        return made_and_replayed[-1]

    assert [step() for _ in range(4)] == [(0, 0), (1, 1), (1, 2), (1, 3)]
    assert [step(clip=0.5) for _ in range(3)] == [(1, 3), (2, 4), (2, 5)]
    moved = model.embed.weight.grad.clone()
    model.embed.weight.grad = moved
    assert [step(clip=0.5) for _ in range(2)] == [(2, 5), (3, 6)]
    optimizers.load_state_dict(copy.deepcopy(optimizers.state_dict()))
    assert [step(clip=0.5) for _ in range(2)] == [(3, 6), (4, 7)]
    graphs.actions.clear()
    assert [step(clip=0.5) for _ in range(2)] == [(5, 8), (5, 9)], "nothing that it rests on has changed"
    for a, b in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(a, b)


def test_a_gradient_that_comes_later_gets_its_state_before_it_is_captured():
    model, graphs = small_model(), Rerun()
    optimizers = optimizers_of(model)
    optimizers._capture = True
    noisy_gradients(model, 0)
    late = model.stem[0].mlp.up.weight
    gradient, late.grad = late.grad, None
    for _ in range(2):
        optimizers.step(1.0, 1.0, graphs)
    assert graphs.captured == 1
    assert not optimizers._members["muon"].state[late]
    late.grad = gradient
    optimizers.step(1.0, 1.0, graphs)
    assert graphs.captured == 1
    assert optimizers._members["muon"].state[late]


@pytest.mark.parametrize("captured", [False, True])
def test_on_a_cpu_nothing_is_captured_and_rates_are_numbers(monkeypatch, captured):
    monkeypatch.setattr(CudaGraphs, "capture", lambda *_: pytest.fail("captured"))
    model = small_model()
    optimizers = optimizers_of(model, captured=captured)
    train_some(model, optimizers, 3)
    rates = [group["lr"] for member in optimizers._members.values() for group in member.param_groups]
    assert all(isinstance(rate, float) for rate in rates)


def test_where_capturing_fails_it_says_so_once_and_goes_on(monkeypatch):
    def failing(*_):
        raise RuntimeError("operation not permitted when stream is capturing\nand a long trace")

    monkeypatch.setattr(CudaGraphs, "capture", failing)
    model = small_model()
    optimizers = optimizers_of(model)
    optimizers._capture = True
    noisy_gradients(model, 0)
    optimizers.step(1.0, 1.0)
    noisy_gradients(model, 1)
    with pytest.warns(RuntimeWarning, match=r"cannot capture .* \(operation not permitted .* capturing\): going on"):
        norm = optimizers.step(1.0, 1.0)
    assert norm > 0
    for _ in range(3):
        optimizers.step(1.0, 1.0)
    assert optimizers._members["adamw"].state[model.embed.weight]["step"] == 5


def test_a_full_gpu_is_no_failing_capture(monkeypatch):
    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(CudaGraphs, "capture", full)
    model = small_model()
    optimizers = optimizers_of(model)
    optimizers._capture = True
    noisy_gradients(model, 0)
    optimizers.step(1.0, 1.0)
    with pytest.raises(torch.OutOfMemoryError):
        optimizers.step(1.0, 1.0)


def noisy_run(kind, captured, device):
    """Five steps at changing rates; then other clipping, then a state of before, then a gradient that lies elsewhere.

    Returns the norms, whether a step was replayed, and what came out.
    """
    model = small_model().to(device)
    optimizers = optimizers_of(model, kind, captured=captured)
    norms, values, replayed = [], [], []

    def steps(*scales, grad_clip):
        for scale in scales:
            noisy_gradients(model, len(norms))
            norms.append(optimizers.step(scale, grad_clip))
            values.append(norms[-1].item())
            replayed.append(captured and optimizers._asked in optimizers._own)
            assert not any(parameter.grad.any() for parameter in model.parameters())

    steps(0.1, 1.0, 0.5, 0.0, 0.7, grad_clip=0.1)
    saved = copy.deepcopy(optimizers.state_dict())
    steps(0.6, 0.5, 0.4, grad_clip=1e6)
    optimizers.load_state_dict(saved)
    steps(0.3, 0.2, 0.9, grad_clip=1e6)
    moved = model.embed.weight.grad.clone()
    model.embed.weight.grad = moved
    steps(0.8, 0.4, 0.1, grad_clip=1e6)
    assert [norm.item() for norm in norms] == values, "a norm that was returned stays what it was"
    assert len(set(values)) == len(values)
    assert min(values) > 0.1, "the first ones are clipped"
    return values, replayed, [*model.parameters()], optimizers.state_dict()["states"]


@pytest.mark.parametrize("kind", ["muon", "adamw"])
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_captured_steps_are_the_plain_ones_bit_for_bit(kind, device):
    norms, none, expected, expected_states = noisy_run(kind, False, device)
    found_norms, replayed, found, states = noisy_run(kind, True, device)
    assert found_norms == norms
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    torch.testing.assert_close(states, expected_states, rtol=0, atol=0)
    assert not any(none)
    first_and_others = [False, True, True, True, True] + 3 * [False, True, True]
    assert replayed == [device == "cuda" and other for other in first_and_others]


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["muon", "adamw"])
def test_a_state_moves_from_a_cpu_to_a_gpu_and_back(kind):
    model = small_model()
    saved = None
    for device in ("cpu", "cuda", "cpu"):
        model.to(device)
        optimizers = optimizers_of(model, kind)
        for parameter in model.parameters():
            parameter.grad = None
        if saved:
            optimizers.load_state_dict(saved)
        for step in range(3):
            noisy_gradients(model, step)
            assert optimizers.step(0.5, 1.0).isfinite()
        saved = copy.deepcopy(optimizers.state_dict())
        for state in (state for states in saved["states"].values() for state in states.values()):
            assert {value.device.type for value in state.values()} == {device}
    counters = [state["step"].item() for state in saved["states"]["adamw"].values()]
    assert set(counters) == {9}
    assert all(parameter.isfinite().all() for parameter in model.parameters())
