"""What the router and its exit learn from, and how much of it reaches the stem."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from lepton.api import Lepton
from lepton.errors import InputError
from lepton.model.ideas.idea import picks
from lepton.model.layers import norm
from lepton.model.objective import Step
from lepton.model.size_config import size_config
from lepton.train.batch_plan import draw_served, plan_batch
from lepton.train.cost import training_flops_per_token
from tests.laws.lab import build, text

STRIDE = 3


def router(**fields):
    return build("complete", **{f"router.{name}": value for name, value in fields.items()})


def gradients(model, tokens, rate=1.0, losses=None):
    """Gradients by name; `losses` are the weights of auxiliary losses, by default their own."""
    for idea in model.ideas.values():
        kind = type(idea)
        weights = kind.loss_weights if losses is None else dict.fromkeys(kind.loss_weights, 0.0)
        idea.loss_weights = {name: (losses or {}).get(name, value) for name, value in weights.items()}
    model.zero_grad()
    loss = model.loss(tokens, step=Step(rate))
    loss.loss.backward()
    return loss, {name: each.grad.clone() for name, each in model.named_parameters() if each.grad is not None}


def in_router(name):
    return name.startswith("router.")


@pytest.mark.parametrize("distil", [False, True])
@pytest.mark.parametrize("rate", [0.5, torch.tensor(1.0)])
def test_the_stem_pays_for_the_exit_by_the_share_that_is_said(distil, rate):
    """Its gradient is that of the model's own loss, plus `into_stem` times the rate that of the exit's loss."""
    tokens, fields = text(1, rows=3), {"exit_stride": STRIDE, "distil": distil}
    without, alone = gradients(router(**fields), tokens, rate)
    loss, got = gradients(router(**fields, into_stem=0.3), tokens, rate)
    assert loss.loss == without.loss
    # With a weight of 1 for the loss, and for what reaches the stem, the difference is the gradient of the exit's loss.
    _, plain = gradients(router(**fields), tokens, losses={"exit": 1.0})
    _, all_of_it = gradients(router(**fields, into_stem=1.0), tokens, losses={"exit": 1.0})
    moved = 0
    for name, gradient in got.items():
        whole = all_of_it[name] - plain[name]
        torch.testing.assert_close(gradient, alone[name] + 0.3 * float(rate) * whole, rtol=1e-6, atol=1e-9, msg=name)
        assert not (in_router(name) and whole.any()), "the exit's own gradient is the same"
        moved += name.startswith("stem.") and bool(whole.any())
    assert moved == sum(name.startswith("stem.") for name in got), "every matrix of the stem learns"
    assert not (all_of_it["blocks.0.mlp.up.weight"] - plain["blocks.0.mlp.up.weight"]).any()


@pytest.mark.parametrize("rate", [0.0, torch.tensor(0.0)])
def test_at_the_end_of_the_cool_down_the_trunk_is_alone(rate):
    tokens = text(1, rows=3)
    _, expected = gradients(router(), tokens)
    _, got = gradients(router(into_stem=0.3), tokens, rate)
    for name, gradient in got.items():
        torch.testing.assert_close(gradient, expected[name], rtol=0, atol=1e-12, msg=name)


def test_without_a_loss_nothing_reaches_the_stem():
    tokens = text(1, rows=3)
    expected, got = (
        gradients(router(into_stem=weight), tokens, losses={"exit": 0.0, "router": 1.0})[1] for weight in (0.0, 0.3)
    )
    assert all(torch.equal(gradient, expected[name]) for name, gradient in got.items())


def slow_parts(model, tokens):
    """Both losses, and the gradient of each by its own parameters, in single positions."""
    own = model.router.own
    inputs, following = tokens[:, :-1], tokens[:, 1:]
    out = model.trunk(inputs)
    signal_BT = out.flow.contributions["router"].signal_BT
    exits, errors = [], []
    for pick in picks(following, own.exit_stride).tolist():
        row, t = divmod(pick, inputs.shape[1])
        left = model.router.exit(out.flow.x_BTD[row, t].detach())
        embed = model.embed.weight.detach()[: model.config.vocab_size]
        cap = model.config.logit_cap
        student = (cap * torch.tanh(norm(left) @ embed.T / cap)).log_softmax(-1)
        deep = model.head(out.hidden[row, t]).detach().log_softmax(-1)
        beyond = (deep.exp() * (deep - student)).sum()
        exits.append(beyond if own.distil else -student[following[row, t]])
        saved = beyond if own.expected else deep[following[row, t]] - student[following[row, t]]
        errors.append((signal_BT[row, t] - saved.detach().clamp(-5, 5)) ** 2)
    return {"exit": torch.stack(exits).mean(), "router": torch.stack(errors).mean()}


@pytest.mark.parametrize("distil", [False, True])
@pytest.mark.parametrize("expected", [False, True])
@pytest.mark.parametrize("reads_exit", [False, True])
def test_the_losses_equal_single_positions(distil, expected, reads_exit):
    model = router(exit_stride=STRIDE, distil=distil, expected=expected, reads_exit=reads_exit)
    tokens = text(2, rows=4, length=40)
    loss, slow = model.loss(tokens), slow_parts(model, tokens)
    for part, begins in {"exit": "router.exit_", "router": "router.benefit"}.items():
        torch.testing.assert_close(loss.parts[part], slow[part].detach(), rtol=0, atol=1e-9)
        own = [parameter for name, parameter in model.named_parameters() if name.startswith(begins)]
        got = torch.autograd.grad(loss.loss, own, retain_graph=True)
        wanted = torch.autograd.grad(0.1 * slow[part], own, retain_graph=True)
        torch.testing.assert_close(got, wanted, rtol=0, atol=1e-9)


@torch.no_grad()
def test_the_score_reads_what_the_exit_reads():
    """Without memory and hint that is the stem's state; with them it is another one."""
    model, tokens = router(reads_exit=True), text(1)
    flow = model.trunk(tokens).flow
    signal_BT = flow.contributions["router"].signal_BT
    torch.testing.assert_close(signal_BT, model.router.score(norm(flow.x_BTD)), rtol=0, atol=1e-12)
    assert (signal_BT - model.router.score(flow.u_BTD)).abs().max() > 1e-3
    bare = build("complete", memory_heads=0, hint=0, **{"router.reads_exit": True})
    flow = bare.trunk(tokens).flow
    assert [*flow.contributions] == ["thoughts", "crystals", "router"]
    torch.testing.assert_close(flow.contributions["router"].signal_BT, bare.router.score(flow.u_BTD))


@pytest.mark.parametrize("variant", ["complete", "odd edges", "factorised, own keys"])
@torch.no_grad()
def test_to_be_served_is_to_stand_beside_tokens_that_skipped(variant):
    """Deep tokens read the same, whether the others skipped the deep blocks or only serve as if they had."""
    model, tokens = build(variant), text(3, rows=3)
    routed = model.trunk(tokens, depth=0.5)
    deep_BT = routed.flow.deep_BT
    served = model.trunk(tokens, served=~deep_BT)
    assert 0.3 < deep_BT.double().mean() < 0.7
    torch.testing.assert_close(served.hidden[deep_BT], routed.hidden[deep_BT], rtol=0, atol=1e-9)
    plain = model.trunk(tokens)
    assert (served.hidden[deep_BT] - plain.hidden[deep_BT]).abs().max() > 1e-3
    assert torch.equal(model.trunk(tokens, served=torch.zeros_like(deep_BT)).hidden, plain.hidden)
    assert (served.hidden[~deep_BT] - routed.hidden[~deep_BT]).abs().max() > 1e-3, "their own stream runs on"


def test_what_is_served_is_drawn_by_seed_step_and_micro_batch():
    model, tokens = router(served=0.75), text(1, rows=64)
    drawn = torch.stack([draw_served(model, tokens, 7, step, micro) for step in range(30) for micro in range(2)])
    again = torch.stack([draw_served(model, tokens, 7, step, micro) for step in range(30) for micro in range(2)])
    assert torch.equal(drawn, again)
    assert drawn.shape == (60, 64, 99)
    assert len({tuple(each.flatten().tolist()) for each in drawn}) == 60
    share = drawn.double().mean(-1)
    assert (share > 0).double().mean().item() == pytest.approx(0.5, abs=0.03), "half of the rows"
    assert share[share > 0].mean().item() == pytest.approx(0.375, abs=0.02), "uniform up to the largest share"
    assert 0.7 < share.max() < 0.9
    assert not torch.equal(draw_served(model, tokens, 8, 0, 0), drawn[0])
    assert draw_served(router(), tokens, 7, 0, 0) is None
    assert draw_served(build("dense"), tokens, 7, 0, 0) is None


def test_served_tokens_are_flags():
    with pytest.raises(InputError, match="served must have the shape of the tokens"):
        router().loss(text(1), step=Step(served_BT=text(1)[:, 1:]))


@pytest.mark.parametrize("distil", [False, True])
@pytest.mark.parametrize("expected", [False, True])
def test_a_training_step_costs_what_is_said(distil, expected):
    changes = {"into_stem": 0.1, "exit_stride": 8, "distil": distil, "expected": expected, "served": 0.75}
    config = size_config("nano", vocab_size=4200, drafts=0, uncertainty=False)
    model = Lepton(config.replace(**{f"router.{name}": value for name, value in changes.items()})).train()
    tokens = torch.randint(1, 4200, (4, 129))
    think, groups = plan_batch(model, tokens, seed=0, step=0, micro=0)
    served = draw_served(model, tokens, seed=0, step=0, micro=0)
    with FlopCounterMode(display=False) as counter:
        model.loss(tokens, think=think, groups=groups, step=Step(served_BT=served)).loss.backward()
    said = training_flops_per_token(model, 4, 128) * 4 * 128
    assert counter.get_total_flops() == pytest.approx(said, rel=1e-3)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("into_stem", -0.1, "router.into_stem=-0.1: must be at least 0"),
        ("into_stem", 1000.0, "router.into_stem=1000.0: must be at most 100"),
        ("into_stem", "0.1", "router.into_stem='0.1': must be a number"),
        ("exit_stride", 0, "router.exit_stride=0: must be at least 1"),
        ("distil", 1, "router.distil=1: must be True or False"),
    ],
)
def test_impossible_fields_are_refused(field, value, message):
    with pytest.raises(InputError, match=message):
        router(**{field: value})
