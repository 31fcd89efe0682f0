"""Cycles operator by operator, compiled and captured: the same text, at any depth."""

from dataclasses import replace

import pytest
import torch

from lepton.engine import cycles as module
from lepton.engine.cycle import cycle
from lepton.engine.engine import Engine
from lepton.engine.options import GenerationOptions
from lepton.engine.runner import Runner
from lepton.engine.sequence import Sequence
from lepton.errors import InputError
from tests.generate.models import BATCH, PROMPT, always_drafting, lively


def sequence(prompt, **options):
    return Sequence(prompt, GenerationOptions(**options), stops=[[0]], stream=(1, len(prompt)))


def test_a_cpu_runs_what_was_compiled(monkeypatch):
    """For as many rows as it was compiled for; fewer run operator by operator, with the same text."""
    model, said, made, ran = lively("complete"), [], [], []
    prompts = [PROMPT, PROMPT * 2]
    expected = model.generate(prompts, 24, temperature=0)

    def compiled(model, pool, place_B, shape, *more):
        def run():
            ran.append(shape)
            return cycle(model, pool, place_B, shape, *more)

        made.append(shape)
        return run

    monkeypatch.setattr(module, "compiled_cycle", compiled)
    model.warm_up(2, say=said.append)
    assert len(said) == len(made) == 4
    model.warm_up(2, say=said.append)
    assert len(said) == 4, "it is done once"
    assert model.generate(prompts, 24, temperature=0) == expected
    assert {shape.opening for shape in ran} == {False, True}
    before = len(ran)
    assert model.generate(PROMPT, 12, temperature=0) == lively("complete").generate(PROMPT, 12, temperature=0)
    assert len(ran) == before


def test_without_a_compiler_a_cpu_goes_on(monkeypatch):
    model = lively("complete")
    expected = model.generate(PROMPT, 12, temperature=0)

    def compiled(*_):
        raise RuntimeError("no working C++ compiler")

    monkeypatch.setattr(module, "compiled_cycle", compiled)
    with pytest.warns(UserWarning, match="cannot be compiled .*no working C"):
        model.warm_up()
    assert model.generate(PROMPT, 12, temperature=0) == expected


def test_warming_up_says_what_it_cannot_do():
    said = []
    lively("complete").warm_up(1, depth=0.5, say=said.append)
    assert said, "a CPU compiles nothing for a depth below 1"
    assert all(text.startswith("not compiled here") for text in said)
    with pytest.raises(InputError, match="no router"):
        lively("dense").warm_up(1, depth=0.5)


@pytest.mark.parametrize("options", [{"temperature": 0}, {"temperature": 1.5, "seed": 3}])
@pytest.mark.parametrize("speculative", [False, True])
def test_text_does_not_depend_on_whether_what_skips_is_masked(options, speculative, monkeypatch):
    """As in the cycles of a GPU, where no shape may depend on values."""
    model, depths = lively("complete"), (0, 0.25, 0.5, 0.75)
    options = {**options, "use_speculative": speculative, "max_new_tokens": 40}
    with always_drafting():
        expected = [model.generate(BATCH, **options, depth=depth) for depth in depths]
        monkeypatch.setattr(module, "cycle", lambda *given: cycle(*given[:3], replace(given[3], static=True), given[4]))
        assert [model.generate(BATCH, **options, depth=depth) for depth in depths] == expected
    assert len({str(each) for each in expected}) == len(depths)


@pytest.mark.parametrize("static", [False, True])
def test_sequences_of_several_depths_share_their_passes(static, monkeypatch):
    """Each with the text and the blocks that it has alone."""
    model, depths = lively("complete"), (0, 0.25, 0.5, 0.75)
    alone = [
        model.generate_with_stats(prompt, 20, depth=d, temperature=0) for prompt, d in zip(BATCH, depths, strict=True)
    ]
    monkeypatch.setattr(module, "cycle", lambda *given: cycle(*given[:3], replace(given[3], static=static), given[4]))
    runner = Runner(model, 4, 100)
    engine = Engine(runner)
    sequences = [
        sequence(prompt, depth=depth, temperature=0, max_new_tokens=20)
        for prompt, depth in zip(BATCH, depths, strict=True)
    ]
    for each in sequences:
        engine.add(each)
    while not engine.idle:
        engine.step()
    for row, prompt, each in zip(alone, BATCH, sequences, strict=True):
        assert row.tokens == prompt + each.new


@pytest.mark.gpu
@pytest.mark.parametrize("depth", [0, 0.25, 0.75])
def test_graphs_of_depths_below_1_give_the_same_text(depth):
    options = {"temperature": 0, "max_new_tokens": 40, "depth": depth}
    expected = lively("complete", torch.float32).generate(BATCH, **options)
    assert lively("complete", torch.float32).cuda().generate(BATCH, **options) == expected


def test_openings_apart_have_few_sizes():
    """So that warming up compiles all of them."""
    small, large = Runner(lively("complete"), 8, 10), Runner(lively("complete"), 64, 10)
    assert [small._cycles._buckets(rows, True, 0) for rows in (1, 5, 8)] == [[1], [8], [8]]
    assert large._cycles._buckets(64, True, 0) == [4, 16, 64]
    assert large._cycles._buckets(64, True, 4) == [16, 64]
    assert large._cycles._buckets(64, False, 0) == [64]
    for rows in range(1, 65):
        assert rows <= large._cycles._bucket(rows, True, 0) <= max(4, 4 * rows)
