"""Switching ideas off: each switch does something, says what it does, and leaves no trace."""

import pytest
import torch

from lepton.evals.ablation import ablate, switched_off, switches
from tests.laws.lab import build, text

ALL = ["thoughts", "working memory", "crystals", "peek", "depth 0.75", "depth 0.5", "depth 0.5 at random", "depth 0"]


def snapshot(model):
    """Where every tensor lies and what it holds, and every module."""
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    return (
        {name: (id(value), value.data_ptr(), value.clone()) for name, value in tensors.items()},
        {name: id(module) for name, module in model.named_modules()},
    )


def assert_same(before, after):
    assert before[1] == after[1]
    assert list(before[0]) == list(after[0])
    for name, (identity, place, value) in before[0].items():
        assert after[0][name][:2] == (identity, place)
        assert torch.equal(after[0][name][2], value)


def test_a_complete_model_has_all_switches():
    assert [*switches(build("complete"))] == ALL
    assert [*switches(build("no peek"))] == [name for name in ALL if name != "peek"]
    assert not switches(build("dense"))


@pytest.mark.parametrize("idea", ALL)
def test_a_switch_changes_the_output_and_leaves_no_trace(idea):
    model, tokens = build("complete"), text(1, documents=False)
    before, expected = snapshot(model), model(tokens).logits
    with switched_off(model, idea) as options:
        ablated = model(tokens, **options).logits
        # It works on any path: in chunks as in one pass.
        first = model(tokens[:, :37], **options)
        rest = model(tokens[:, 37:], first.state, **options)
    assert (ablated - expected).abs().max() > 1e-3
    assert (torch.cat([first.logits, rest.logits], 1) - ablated).abs().max() < 1e-9
    assert_same(before, snapshot(model))
    assert torch.equal(model(tokens).logits, expected)


@pytest.mark.parametrize("idea", ALL)
def test_an_error_inside_leaves_no_trace_either(idea):
    model = build("complete")
    before = snapshot(model)
    with pytest.raises(KeyError), switched_off(model, idea):
        raise KeyError
    assert_same(before, snapshot(model))


def test_what_the_switches_switch_off():
    model, tokens = build("complete"), text(2, documents=False)
    with switched_off(model, "working memory"):
        assert not model(tokens).flow.contributions["memory"].feature_BTF.any()
    with switched_off(model, "crystals"):
        out = model(tokens)
        assert not list(out.state.memory)
    with switched_off(model, "thoughts") as options:
        assert not model(tokens, **options).flow.contributions["thoughts"].feature_BTF.any()
    with switched_off(model, "depth 0") as options:
        assert (model(tokens, **options).depth == model.config.stem_layers).all()
    depths = []
    for idea in ("depth 0.5", "depth 0.5 at random"):
        with switched_off(model, idea) as options:
            depths.append(model(tokens, **options).depth > model.config.stem_layers)
    assert depths[0].sum() == pytest.approx(depths[1].sum(), abs=8)
    assert 0.3 < (depths[0] != depths[1]).float().mean() < 0.7
    with switched_off(model, "peek"):
        flow, plain = model(tokens).flow, build("complete")(tokens).flow
        assert torch.equal(flow.contributions["peek"].feature_BTF, plain.contributions["peek"].feature_BTF)
        assert not torch.equal(flow.x_BTD, plain.x_BTD)


def test_without_crystals_is_a_model_built_without_them():
    complete, tokens = build("complete"), text(3)
    bare = build("no crystals")
    bare.load_state_dict({n: v for n, v in complete.state_dict().items() if not n.startswith("crystals.")})
    with switched_off(complete, "crystals"):
        assert torch.equal(complete(tokens).logits, bare(tokens).logits)


def test_the_table():
    model, tokens = build("complete"), text(4)

    def nats(**options):
        logits = model(tokens[:, :-1], **options).logits
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()).item()

    rows = ablate(model, nats, think=1)
    first = next(rows)  # known before the others are measured
    table = [first, *rows]
    assert [row.off for row in table] == ["nothing", *ALL]
    assert table[0].nats_per_token == nats(think=1)
    assert table[1].nats_per_token == nats(think=0)
    assert table[-1].nats_per_token == nats(think=1, depth=0)
    assert all(row.change == row.nats_per_token - table[0].nats_per_token for row in table)


def test_what_is_known_is_not_measured_again():
    seen = []
    table = list(ablate(build("no router"), lambda **options: seen.append(options) or 2.0, everything=1.5))
    assert [row.off for row in table] == ["nothing", "thoughts", "working memory", "crystals", "peek"]
    assert [row.change for row in table] == [0, 0.5, 0.5, 0.5, 0.5]
    assert len(seen) == 4
