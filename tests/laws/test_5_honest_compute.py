"""Law 5: a skipped block is not computed. torch's FLOP counter agrees with `flops_per_token`."""

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from lepton.api import create_lepton_nano

OVERRIDES = {"window": 16, "segment": 8, "layers": 5}


def counted(model, tokens, state=None, **options) -> tuple[int, torch.Tensor]:
    """Return the FLOPs that torch counts in one forward pass, and the depth of each token."""
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        out = model(tokens, state, **options)
    return counter.get_total_flops(), out.depth


@pytest.fixture(scope="module")
def nano():
    torch.manual_seed(0)
    return create_lepton_nano(**OVERRIDES).eval()


@pytest.fixture(scope="module")
def tokens():
    return torch.randint(1, 50257, (2, 700), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("depth", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("think", [0, 2])
def test_prefill_costs_what_is_said(nano, tokens, depth, think):
    flops, depths = counted(nano, tokens, depth=depth, think=think)
    assert flops / tokens.numel() == pytest.approx(nano.flops_per_token(700, depth=depth, think=think), rel=0.02)
    share = (depths > nano.config.stem_layers).float().mean().item()
    assert share == pytest.approx(depth, abs=0.05)
    assert flops / tokens.numel() == pytest.approx(nano.flops_per_token(700, depth=share, think=think), rel=0.005)


def test_a_model_without_an_idea_does_not_pay_for_it(tokens):
    for off in (
        {"thoughts": 0},
        {"memory_heads": 0},
        {"slots": 0},
        {"hint": 0},
        {"router": False},
        {"uncertainty": False},
    ):
        model = create_lepton_nano(**OVERRIDES | off)
        assert counted(model, tokens[:1, :300])[0] / 300 == pytest.approx(model.flops_per_token(300), rel=1e-6), off


@torch.no_grad()
def test_decode_skips_the_blocks_of_easy_tokens(nano, tokens):
    """Token by token: an easy token costs the deep blocks' keys and values and nothing else of them."""
    state = nano(tokens[:1, :100]).state
    costs = {}
    for t in range(100, 160):
        flops, depths = counted(nano, tokens[:1, t : t + 1], state, depth=0.5)
        opens = t % 8 == 0
        costs.setdefault((int(depths), opens), set()).add(flops)
        state = nano(tokens[:1, t : t + 1], state, depth=0.5).state
    easy, deep = costs[2, False], costs[5, False]
    assert len(easy) == len(deep) == 1, "the cost of a decode step depends on its depth alone"
    block = nano.blocks[0]
    always = block.attention.k.weight.numel() + block.attention.v.weight.numel()
    skipped = 3 * 2 * (sum(part.numel() for part in block.parameters()) - always)
    assert next(iter(deep)) - next(iter(easy)) > 0.8 * skipped
    assert {(2, True), (5, True)} & costs.keys(), "openings think"


def test_rows_that_stop_early_cost_nothing_beside_rows_that_do_not(nano, tokens):
    """In a batch of single tokens the deep blocks run on the deep rows alone."""
    rows = tokens.reshape(-1)[:64, None]
    all_deep, _ = counted(nano, rows)
    none_deep, _ = counted(nano, rows, depth=0.0)
    half, depths = counted(nano, rows, depth=0.5)
    share = (depths > 2).float().mean().item()
    assert 0.2 < share < 0.8
    # Keys and values of crystals and thoughts are made for the whole batch as soon as one row goes deep.
    config, block = nano.config, nano.blocks[0].attention
    columns = 2 * (config.idea("crystals").per_segment + config.idea("thoughts").count)
    slots = len(rows) * len(nano.blocks) * columns * 2 * (block.k.weight.numel() + block.v.weight.numel())
    assert half == pytest.approx(none_deep + slots + share * (all_deep - none_deep - slots), rel=0.01)
