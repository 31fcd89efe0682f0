"""The model of a trial: without switches it is the product's; each switch does something, and none sees the future."""

import math

import pytest
import torch
from torch._dynamo.testing import CompileCounter

from benchmarks import trunk_model
from lepton.api import Lepton
from lepton.config import LeptonConfig
from lepton.model.size_config import DENSE
from tests.trunk import rows, shaken, small

SWITCHES = {
    "untied": {"tied": False},
    "rotary_share": {"rotary_share": 1.0},
    "unshared": {"rotary_share": 0.25, "shifted_keys": "all"},
    "rope_base": {"rope_base": 100.0},
    "query_gain": {"query_gain": 1.44},
    "no shift": {"shifted_keys": "none"},
    "even": {"shifted_keys": "even"},
    "all": {"shifted_keys": "all"},
    "gated": {"smear": "gated"},
    "no smear": {"smear": "none"},
    "residual_scale": {"residual_scale": True},
    "reinjection": {"reinjection": True},
    "no backout": {"backout": False},
    "conv": {"conv": 3},
    "head_gates": {"head_gates": True},
}
NEUTRAL = {name: SWITCHES[name] for name in ("gated", "conv", "head_gates")} | {"channels": {"smear": "channels"}}
"""Switches that change nothing at first."""


def product(trial):
    """Return the dense model of the product with the shape of a trial."""
    shape = {name: getattr(trial, name) for name in ("width", "layers", "heads", "kv_heads", "head_dim", "ffn")}
    shape |= {"embed_rank": trial.embed_rank, "vocab_size": trial.vocab_size}
    return Lepton(LeptonConfig(**shape, **DENSE, shifted_keys=True, token_shift=True, backout=True))


def renamed(entries):
    """Return a dict of a product's parameters with the names that they have in a trial's model."""
    found = {}
    for name, value in entries.items():
        room, _, rest = name.partition(".")
        layer, _, rest_of_block = rest.partition(".")
        if room in ("stem", "blocks"):
            name = f"blocks.{int(layer) + (2 if room == 'blocks' else 0)}.{rest_of_block}"
        found["smear.share" if name == "shift_D" else name] = value
    return found


@pytest.mark.parametrize("embed_rank", [24, None])
def test_without_switches_it_is_the_dense_model(embed_rank):
    trial = small(embed_rank=embed_rank)
    theirs, ours = product(trial), shaken(trial)
    with torch.no_grad():
        names = renamed(dict(theirs.named_parameters()))
        assert names.keys() == dict(ours.named_parameters()).keys()
        for name, parameter in ours.named_parameters():
            names[name].copy_(parameter)
    tokens, lengths = rows(trial)
    lengths[1] -= 5
    wanted = theirs.loss(tokens, lengths=lengths)
    loss, ce, nats = ours.loss(tokens, lengths)
    torch.testing.assert_close(loss, wanted.loss)
    torch.testing.assert_close(ce, wanted.parts["ce"])
    assert (nats[1, -5:] == 0).all()
    torch.testing.assert_close(nats.sum() / (lengths - 1).sum(), wanted.parts["ce"])
    loss.backward()
    wanted.loss.backward()
    gradients = renamed({name: each.grad for name, each in theirs.named_parameters()})
    for name, parameter in ours.named_parameters():
        torch.testing.assert_close(parameter.grad, gradients[name], rtol=1e-3, atol=1e-6, msg=name)


def test_initial_values_have_the_spread_of_the_product():
    """Another order of the parameters gives other numbers."""
    trial = small(width=64, ffn=96, embed_rank=48)
    torch.manual_seed(0)
    theirs = renamed(dict(product(trial).named_parameters()))
    for name, parameter in trunk_model.TrunkModel(trial).named_parameters():
        spread = parameter.std(correction=0).item()
        assert spread == pytest.approx(theirs[name].std(correction=0).item(), rel=0.1), name
        assert abs(parameter.mean() - theirs[name].mean()) <= 0.1 * spread, name


def losses(model, trial, tokens=None):
    given, lengths = rows(trial)
    with torch.no_grad():
        return model.loss(given if tokens is None else tokens, lengths)[2]


@pytest.mark.parametrize("name", SWITCHES)
def test_each_switch_changes_the_loss(name):
    plain, trial = small(), small(**SWITCHES[name])
    assert not torch.allclose(losses(shaken(plain), plain), losses(shaken(trial), trial), rtol=1e-4)


@pytest.mark.parametrize("name", NEUTRAL)
def test_what_is_added_begins_as_nothing(name):
    plain, trial = small(smear="none"), small(**{"smear": "none", **NEUTRAL[name]})
    model = trunk_model.TrunkModel(trial)
    before = shaken(plain).state_dict()
    missing, unexpected = model.load_state_dict(before, strict=False)
    assert missing
    assert not unexpected
    torch.testing.assert_close(losses(model, trial), losses(shaken(plain), plain))


def seen_too_early(trial):
    """Return how many hidden states change although the token that is changed comes later."""
    model, (tokens, _) = shaken(trial), rows(trial)
    found = 0
    for place in (1, trial.seq_len // 2, trial.seq_len - 1):
        changed = tokens.clone()
        changed[:, place] = changed[:, place] % (trial.vocab_size - 1) + 1
        with torch.no_grad():
            different = (model.hidden(tokens[:, :-1]) != model.hidden(changed[:, :-1])).any(-1)
        assert different[:, place].all(), "its own state does change"
        found += int(different[:, :place].sum())
    return found


@pytest.mark.parametrize("name", ["none", *SWITCHES])
def test_no_switch_sees_the_future(name):
    assert seen_too_early(small(**SWITCHES.get(name, {}))) == 0


@pytest.mark.parametrize("name", ["gated", "channels", "conv"])
def test_a_planted_leak_is_found(monkeypatch, name):
    monkeypatch.setattr(trunk_model, "before", lambda x, tokens=1: x.roll(-tokens, 1))
    assert seen_too_early(small(**{"smear": "none", **NEUTRAL[name]})) > 0


@pytest.mark.parametrize("name", ["none", *SWITCHES])
def test_every_parameter_learns(name):
    trial = small(**SWITCHES.get(name, {}))
    model = shaken(trial)
    model.loss(*rows(trial))[0].backward()
    assert [key for key, each in model.named_parameters() if each.grad is None or not each.grad.any()] == []


def test_scales_and_reinjection_begin_on_a_line():
    model = trunk_model.TrunkModel(small(residual_scale=True, reinjection=True, layers=3))
    mixes = [block.mix for block in model.blocks]
    assert [mix.scale.item() for mix in mixes] == pytest.approx([1.15, 1.1, 1.05])
    assert [mix.again.item() for mix in mixes] == pytest.approx([0.2, 0.125, 0.05])


def test_a_fresh_model_knows_nothing():
    trial = small()
    assert losses(trunk_model.TrunkModel(trial), trial).mean().item() == pytest.approx(math.log(97), rel=0.01)


def test_blocks_can_be_compiled_whole_and_are_shared_by_trials_of_one_shape():
    """The tracing is that of a GPU; what is generated from it is not."""
    torch._dynamo.reset()
    counter = CompileCounter()
    for trial in (small(conv=3), small(conv=3, embed_lr=0.01)):
        model, wanted = shaken(trial), losses(shaken(trial), trial)
        for block in model.blocks:
            block.forward = torch.compile(block.forward, backend=counter, fullgraph=True, dynamic=False)
        torch.testing.assert_close(losses(model, trial), wanted)
    assert counter.frame_count == 2, "blocks with shifted keys, and those without"
