"""The runner: which prompts are read together, and in which order results come back."""

import torch

from lepton.engine import runner as runners
from lepton.engine.options import GenerationOptions
from lepton.engine.prefill import read_prompts
from lepton.engine.runner import Runner, joined_past, prefill_batches, wanted_shape
from lepton.engine.scheduler import Launch, Prefill
from lepton.engine.sequence import Sequence
from tests.generate.models import BATCH, PROMPT, lively
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
    places = [2, 0, 3, 1]
    first = {}
    for indices, running in runner.prefill(Prefill(sequences, places)):
        first |= dict(zip(indices, running.read().tokens, strict=True))
    work = Launch(sequences, places, False, 2, True, 0)
    results = runner.launch(work).read()
    for i, prompt in enumerate(BATCH):
        assert prompt + first[i] + results.tokens[i] == model.generate(prompt, 2, temperature=0)


def test_what_any_sequence_wants_is_computed():
    shape = wanted_shape([sequence(), sequence(logprobs=0), sequence(logprobs=3, uncertainty=True)])
    assert (shape.uncertainty, shape.scored, shape.logprobs) == (True, True, 3)
    assert wanted_shape([sequence(logprobs=0)]).scored
    assert not wanted_shape([sequence()]).scored


def test_the_state_after_a_prompt_is_kept_where_it_is_wanted():
    """Of each row its own, as if it had been read alone with the openings that it asks for."""
    model = lively("complete")
    sequences = [sequence(prompt, temperature=0) for prompt in BATCH]
    sequences[0].opens, sequences[0].keeps_read, sequences[3].keeps_read = [4], True, True
    runner = Runner(model, 4, 100)
    runner.prefill(Prefill(sequences, [0, 1, 2, 3]))
    assert [each.read is None for each in sequences] == [False, True, True, False]
    for i, opens in ((0, [[4]]), (3, None)):
        alone = read_prompts(model, [BATCH[i]], None, depth=1, think=None, opens=opens)
        assert_states(alone.state, sequences[i].read, f"prompt {i}")
