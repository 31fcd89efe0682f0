"""The trace of a cycle: one graph of operators that does what the cycle does."""

import pytest
import torch

from lepton.engine import compiled
from lepton.engine.compiled import traced_cycle
from lepton.engine.cycle import Shape, cycle
from lepton.engine.engine import Engine
from lepton.engine.options import GenerationOptions
from lepton.engine.runner import Runner
from lepton.engine.sequence import Sequence
from lepton.ops.few_rows import FORMS
from tests.generate.models import BATCH, lively
from tests.laws.lab import CANARIES


@pytest.mark.parametrize(
    ("variant", "drafts", "opening", "routed", "forms"),
    [
        *[
            (variant, drafts, opening, False, None)
            for variant in CANARIES
            for drafts in (0, 4)
            for opening in (False, True)
        ],
        *[("complete", drafts, True, True, None) for drafts in (0, 4)],
        ("complete", 4, True, False, FORMS),
    ],
)
def test_a_cycle_traces_whole(variant, drafts, opening, routed, forms):
    """Nothing in it depends on values: the graph gives the same outcome and the same pool, also for other values."""
    check = torch.equal if forms is None else torch.allclose
    model = lively(variant)
    if (drafts and model.drafter is None) or (routed and model.router is None):
        pytest.skip("it has no drafter or no router")
    runner = Runner(model, 4, 100)
    engine = Engine(runner)
    for row, prompt in enumerate(BATCH):
        options = GenerationOptions(temperature=row % 2, depth=row / 4 if routed else 1)
        engine.add(Sequence(prompt, options, stops=[[0]], stream=(1, row)))
    engine.step()
    pool, place_B = runner.pool, torch.tensor([0, 2, 3])
    shape = Shape(3, drafts, opening, 2 if opening else 0, routed, True, variant != "dense", scored=True, logprobs=2)
    with torch.no_grad():
        before = [value.clone() for value in pool.tensors()]
        graph, tensors, fields = traced_cycle(model, pool, place_B, shape, runner.drafter.get(drafts), forms)
        assert not [node for node in graph.graph.nodes if node.op == "get_attr"], "all tensors are inputs"
        for other in (0, 1):  # the second time from the state after the first
            start = [value.clone() for value in (before if other == 0 else pool.tensors())]
            for value, old in zip(pool.tensors(), start, strict=True):
                value.copy_(old)
            expected = cycle(model, pool, place_B, shape, runner.drafter.get(drafts))
            after = [value.clone() for value in pool.tensors()]
            for value, old in zip(pool.tensors(), start, strict=True):
                value.copy_(old)
            found = dict(zip(fields, graph(*tensors), strict=True))
            for name, value in expected._asdict().items():
                assert (value is None and name not in found) or check(value, found[name])
            assert all(check(a, b) for a, b in zip(after, pool.tensors(), strict=True))


@pytest.mark.gpu
@pytest.mark.parametrize("depth", [1, 0.5])
def test_a_compiled_cycle_gives_the_same_text_and_is_loaded_later(depth, tmp_path, monkeypatch):
    monkeypatch.setenv("LEPTON_CACHE", str(tmp_path))
    model = lively("complete", torch.float32).cuda()
    options = {"temperature": 1.2, "seed": 4, "max_new_tokens": 40, "depth": depth}
    expected = model.generate(BATCH, **options)
    said = []
    model.warm_up(4, depth=depth, say=said.append)
    assert len(said) == 4
    assert model.generate(BATCH, **options) == expected
    monkeypatch.setattr(compiled, "traced_cycle", lambda *_: pytest.fail("traced again"))
    later = lively("complete", torch.float32).cuda()
    later.warm_up(4, depth=depth)
    assert later.generate(BATCH, **options) == expected
