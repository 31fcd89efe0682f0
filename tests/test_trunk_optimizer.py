"""The optimizer of a trial: without switches it is the product's, and each switch does something."""

import pytest
import torch
from torch._dynamo.testing import CompileCounter

from benchmarks.trunk_optimizer import (
    QUINTIC,
    Rates,
    Stack,
    TrunkOptimizer,
    equilibrated,
    evened,
    polar_express,
    rates_of,
    update_stack,
)
from lepton.train.optimizer import Optimizers, orthogonal
from lepton.train.settings import TrainSettings
from tests.test_trunk_model import product, renamed
from tests.trunk import shaken, small

MATRICES = "blocks.1.attention.q.weight", "blocks.1.mlp.up.weight", "blocks.1.mlp.down.weight"
SWITCHES = {
    "embed.weight": {
        "embed_lr": 0.01,
        "embed_betas": (0.8, 0.995),
        "betas": (0.9, 0.95),
        "clip": 0.0,
        "warmup_steps": 1,
        "cooldown": 0.65,
        "final_rate": 0.1,
    },
    "head_down.weight": {"projection_lr": 0.01, "projection_decay": 0.0, "betas": (0.9, 0.95)},
    **{
        name: {
            "muon_lr": 0.03,
            "weight_decay": 0.1,
            "decay_schedule": "cosine",
            "cautious": True,
            "newton_schulz": "polar_express",
            "row_equilibration": True,
            "renormalisation": True,
            "second_moments": False,
            "momentum": (0.85, 0.97, 0.9),
            "warmup_steps": 1,
        }
        for name in MATRICES
    },
}
LEARNED = {
    "head.weight": ("head_lr", {"tied": False}),
    "blocks.1.mix.scale": ("scale_lr", {"residual_scale": True}),
    "blocks.1.mix.again": ("reinjection_lr", {"reinjection": True}),
    "smear.share": ("smear_lr", {"smear": "gated"}),
    "smear.gate.weight": ("smear_lr", {"smear": "gated"}),
    "backout": ("backout_lr", {}),
    "blocks.1.attention.key_conv.weight": ("conv_lr", {"conv": 2}),
    "blocks.1.attention.value_conv.weight": ("conv_lr", {"conv": 2}),
    "blocks.1.attention.head_gates.weight": ("gate_lr", {"head_gates": True}),
}


def give_gradients(parameters, step):
    """Add random gradients, equal for equal names; they are longer than what clipping allows."""
    for name, parameter in parameters.items():
        seed = sum(name.encode()) + 1000 * step
        noise = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(seed))
        parameter.grad = noise if parameter.grad is None else parameter.grad.copy_(noise)


def trained(trial, steps=20):
    """Return the parameters of a trial after some steps."""
    model = shaken(trial)
    optimizer = TrunkOptimizer(model)
    for step in range(steps):
        give_gradients(dict(model.named_parameters()), step)
        optimizer.set_rates(step)
        optimizer.step()
    return dict(model.named_parameters())


def test_without_switches_it_is_the_product_s():
    trial, settings = small(), TrainSettings()
    ours, theirs = shaken(trial), product(trial)
    names = renamed(dict(theirs.named_parameters()))
    with torch.no_grad():
        for name, parameter in ours.named_parameters():
            names[name].copy_(parameter)
    rates = {"lr": settings.lr, "muon_lr": settings.muon_lr, "weight_decay": settings.weight_decay}
    one, other = TrunkOptimizer(ours), Optimizers(theirs, kind="muon", **rates)
    before = {name: parameter.detach().clone() for name, parameter in ours.named_parameters()}
    for step in range(trial.steps):
        give_gradients(dict(ours.named_parameters()), step)
        give_gradients(names, step)
        one.set_rates(step)
        torch.testing.assert_close(one.step(), other.step(rates_of(trial, step)[0], settings.grad_clip))
        for name, parameter in ours.named_parameters():
            torch.testing.assert_close(parameter, names[name], rtol=1e-5, atol=1e-6, msg=f"{name}, step {step}")
            assert not parameter.grad.any(), "gradients are 0 again"
    for name, parameter in ours.named_parameters():
        assert (parameter - before[name]).abs().mean() > 1e-3, "it has moved by more than what is tolerated"


@pytest.mark.parametrize(("name", "field"), [(name, field) for name, fields in SWITCHES.items() for field in fields])
def test_each_switch_changes_the_weights(name, field):
    plain, changed = trained(small()), trained(small(**{field: SWITCHES[name][field]}))
    assert not torch.equal(plain[name], changed[name])


@pytest.mark.parametrize("name", LEARNED)
def test_what_a_switch_adds_learns_at_its_own_rate(name):
    field, switch = LEARNED[name]
    start = shaken(small(**switch)).get_parameter(name)
    one, two = (trained(small(**switch, **{field: rate}), steps=1)[name] for rate in (0.01, 0.02))
    torch.testing.assert_close((two - start).abs(), 2 * (one - start).abs(), rtol=1e-3, atol=1e-5)
    assert (one != start).all()


def test_betas_of_an_untied_head():
    plain, changed = (trained(small(tied=False, **each))["head.weight"] for each in ({}, {"head_betas": (0.9, 0.95)}))
    assert not torch.equal(plain, changed)


@pytest.mark.parametrize("shape", [(3, 40, 24), (3, 24, 40)])
def test_polar_express_comes_nearer_to_one_singular_value(shape):
    stack = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    left, _, right = torch.linalg.svd(stack, full_matrices=False)
    near, far = polar_express(stack, torch.float32), orthogonal(stack, torch.float32, QUINTIC, 5, 1e-7)
    singular, others = torch.linalg.svdvals(near), torch.linalg.svdvals(far)
    assert (singular - 1).abs().max() < 0.15 < (others - 1).abs().max()
    turned = left.mT @ near @ right.mT
    torch.testing.assert_close(turned, torch.diag_embed(turned.diagonal(dim1=1, dim2=2)), rtol=0, atol=1e-4)


def test_rows_of_one_norm():
    stack = torch.randn(2, 5, 7) * torch.arange(1, 6)[:, None]
    found = equilibrated(stack)
    rows = found.norm(dim=-1)
    torch.testing.assert_close(rows, rows[:, :1].expand_as(rows))
    torch.testing.assert_close(found.norm(dim=(1, 2)), stack.norm(dim=(1, 2)))


@pytest.mark.parametrize(("shape", "moments", "along"), [((2, 7, 5), (2, 7, 1), 2), ((2, 5, 7), (2, 1, 7), 1)])
def test_second_moments_even_the_rows_of_a_tall_matrix_and_the_columns_of_a_wide_one(shape, moments, along):
    sizes = torch.arange(1.0, 8.0).view(moments[1:])
    update, running = torch.randn(shape) * sizes, torch.zeros(moments)
    found = evened(update, running)
    lines = found.square().mean(along)
    torch.testing.assert_close(lines, lines[:, :1].expand_as(lines))
    torch.testing.assert_close(found.norm(dim=(1, 2)), update.norm(dim=(1, 2)))
    torch.testing.assert_close(running, 0.1 * update.square().mean(along, keepdim=True))


def test_a_cautious_decay_leaves_what_the_update_moves_away_from_zero():
    matrices = torch.tensor([[[1.0, -1.0], [1.0, -1.0]]])
    gradients = torch.tensor([[[1.0, -1.0], [-1.0, 1.0]]])  # orthogonalised, the signs stay
    rates = Rates(*map(torch.tensor, (0.5, 0.0, 0.2)))
    found = []
    for cautious in (False, True):
        stack = Stack(matrices.clone(), gradients.clone(), torch.zeros(1, 2, 2), torch.zeros(1, 2, 1))
        update_stack(stack, rates, small(cautious=cautious), torch.float32)
        found.append(stack.matrices)
    torch.testing.assert_close(found[1] - found[0], torch.tensor([[[0.0, 0.0], [0.1, -0.1]]]))


def test_the_schedules():
    trial = small(
        tokens=100 * 40, momentum=(0.85, 0.97, 0.9), momentum_steps=10, decay_schedule="cosine", final_rate=0.5
    )
    found = [rates_of(trial, step) for step in range(100)]
    scale, momentum, decay = zip(*found, strict=True)
    assert [momentum[step] for step in (0, 5, 10, 60, 80)] == pytest.approx([0.85, 0.91, 0.97, 0.97, 0.935])
    assert [decay[step] for step in (0, 50)] == pytest.approx([1, 0.5])
    assert scale[10:61] == (1.0,) * 51
    assert scale[-1] == pytest.approx(0.5 + 0.5 / 40)
    assert {rates_of(small(), step)[1:] for step in range(20)} == {(0.95, 1.0)}


def test_forgetting_is_a_fresh_start():
    trial = small(second_moments=True)
    model = shaken(trial)
    optimizer = TrunkOptimizer(model)
    for step in range(2):
        give_gradients(dict(model.named_parameters()), step)
        optimizer.step()  # at rates of 0
    for name, parameter in shaken(trial).named_parameters():
        torch.testing.assert_close(model.get_parameter(name), parameter, rtol=0, atol=0)
    optimizer.forget()
    for step in range(3):
        give_gradients(dict(model.named_parameters()), step)
        optimizer.set_rates(step)
        optimizer.step()
    for name, wanted in trained(trial, steps=3).items():
        torch.testing.assert_close(model.get_parameter(name), wanted, rtol=0, atol=0)


def test_an_update_can_be_compiled_whole_and_is_shared_by_trials_of_other_rates():
    torch._dynamo.reset()
    counter = CompileCounter()
    compiled = torch.compile(update_stack, backend=counter, fullgraph=True, dynamic=False)
    for trial in (small(second_moments=True), small(second_moments=True, name="b", muon_lr=0.1)):
        results = []
        for function in (compiled, update_stack):
            torch.manual_seed(0)
            stack = Stack(torch.randn(3, 8, 6), torch.randn(3, 8, 6), torch.zeros(3, 8, 6), torch.zeros(3, 8, 1))
            rates = Rates(*map(torch.tensor, (trial.muon_lr, 0.9, 0.1)))
            with torch.no_grad():
                function(stack, rates, trial, torch.float32)
            results.append(stack.matrices)
        torch.testing.assert_close(*results)
    assert counter.frame_count == 1
