"""The runner: which prompts are read together, and in which order results come back."""

from dataclasses import replace

import pytest
import torch

from lepton.engine import runner as runners
from lepton.engine.cycle import cycle
from lepton.engine.engine import Engine
from lepton.engine.options import GenerationOptions
from lepton.engine.runner import Runner, joined_past, prefill_batches, wanted_shape
from lepton.engine.scheduler import Launch, Prefill
from lepton.engine.sequence import Sequence
from lepton.errors import InputError
from tests.generate.models import BATCH, PROMPT, always_drafting, lively
from tests.laws.lab import assert_states


def sequence(prompt=PROMPT, *, past=None, uncertainty=False, logprobs=None, **options):
    more = {"uncertainty": uncertainty, "logprobs": logprobs, "past": past}
    return Sequence(prompt, GenerationOptions(**options), stops=[[0]], stream=(1, len(prompt)), **more)


def test_prompts_of_one_kind_are_read_together():
    model = lively("complete")
    state = model.new_state(1)
    given = [{}, {"think": 0}, {}, {"depth": 0.5}, {"past": (state, 0)}, {"think": 0}, {"temperature": 0}]
    batches = prefill_batches([sequence(**each) for each in given])
    assert sorted(map(sorted, batches)) == [[0, 2, 6], [1, 5], [3], [4]]


def test_a_batch_of_prompts_is_not_too_large(monkeypatch):
    monkeypatch.setattr(runners, "PREFILL_TOKENS", 40)
    sequences = [sequence([1] * length) for length in (10, 10, 10, 10, 10, 30, 2)]
    batches = prefill_batches(sequences)
    assert sorted(i for batch in batches for i in batch) == list(range(7))
    for batch in batches:
        assert len(batch) == 1 or len(batch) * max(len(sequences[i].prompt) for i in batch) <= 40


def test_states_are_joined_in_order():
    model = lively("complete")
    with torch.no_grad():
        state = model(torch.tensor([[5, 6], [7, 8], [9, 10]])).state
    assert joined_past([None, None]) is None
    assert joined_past([(state, 0), (state, 1), (state, 2)]) is state
    found = joined_past([(state, 2), (state, 0)])
    assert_states(state.rows(torch.tensor([2, 0])), found, "rows")


def test_results_come_in_the_order_of_the_sequences():
    """Places may be in any order."""
    model = lively("complete")
    runner, sequences = Runner(model, 4, 100), [sequence(prompt, temperature=0) for prompt in BATCH]
    slots = [2, 0, 3, 1]
    first = {}
    for indices, running in runner.prefill(Prefill(sequences, slots)):
        first |= {i: result.tokens for i, result in zip(indices, running.read(), strict=True)}
    work = Launch(sequences, slots, False, 2, True, 0)
    results = runner.launch(work).read()
    for i, prompt in enumerate(BATCH):
        assert prompt + first[i] + results[i].tokens == model.generate(prompt, 2, temperature=0)


def test_tables_of_drafts_follow_the_weights():
    """They are made where they are needed, once for the same weights, and changed in place: a graph reads them."""
    model = lively("complete")
    runner = Runner(model, 1, 10)
    assert runner.prepared(0) is None
    made = []
    drafter = model.drafter
    own, drafter.prepared = drafter.prepared, lambda *given: made.append(given) or own(*given)
    tables = runner.prepared(4)
    for _ in range(2):
        runner.refresh()
        assert runner.prepared(4) is tables
    assert len(made) == 1
    with torch.no_grad():
        for change in (drafter.token.weight, model.embed.weight):
            before = tables.read.clone()
            change.mul_(-1.5)
            runner.refresh()
            assert runner.prepared(4) is tables
            assert not torch.equal(tables.read, before)
            for found, expected in zip(tables, own(model.embed, model.dtype, model.config.eos_id), strict=True):
                assert torch.equal(found, expected)
    tables.read.zero_()
    loss = sum(each.square().sum() for each in (*drafter.parameters(), model.embed.weight))
    loss.backward()
    torch.optim.AdamW(model.parameters(), lr=0.1, fused=True).step()  # it leaves versions as they are
    runner.refresh()
    assert torch.equal(runner.prepared(4).read, own(model.embed, model.dtype, model.config.eos_id).read)
    drafter.learn_frequencies(lambda: torch.arange(model.config.vocab_size))
    runner.refresh()
    assert torch.equal(runner.prepared(4).ids_Z, drafter.ids)


def test_what_any_sequence_wants_is_computed():
    shape = wanted_shape([sequence(), sequence(logprobs=0), sequence(logprobs=3, uncertainty=True)])
    assert (shape.uncertainty, shape.scored, shape.logprobs) == (True, True, 3)
    assert wanted_shape([sequence(logprobs=0)]).scored
    assert not wanted_shape([sequence()]).scored


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

    monkeypatch.setattr(runners, "compiled_cycle", compiled)
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

    monkeypatch.setattr(runners, "compiled_cycle", compiled)
    with pytest.warns(UserWarning, match="cannot be compiled .*no working C"):
        model.warm_up()
    assert model.generate(PROMPT, 12, temperature=0) == expected


def test_warming_up_says_what_it_cannot_do():
    said = []
    lively("complete").warm_up(1, depth=0.5, say=said.append)
    assert said == [], "a CPU compiles nothing for a depth below 1"
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
        monkeypatch.setattr(
            runners, "cycle", lambda *given: cycle(*given[:3], replace(given[3], static=True), given[4])
        )
        assert [model.generate(BATCH, **options, depth=depth) for depth in depths] == expected
    assert len({str(each) for each in expected}) == len(depths)


@pytest.mark.parametrize("static", [False, True])
def test_sequences_of_several_depths_share_their_passes(static, monkeypatch):
    """Each with the text and the blocks that it has alone."""
    model, depths = lively("complete"), (0, 0.25, 0.5, 0.75)
    alone = [
        model.generate_with_stats(prompt, 20, depth=d, temperature=0) for prompt, d in zip(BATCH, depths, strict=True)
    ]
    monkeypatch.setattr(runners, "cycle", lambda *given: cycle(*given[:3], replace(given[3], static=static), given[4]))
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
