"""A cycle as a function of tensors: what may be drafted, and what it returns."""

import pytest
import torch

from lepton.engine.cycle import Shape, allowed_drafts, cycle, drafted, sampling_of_drafts
from lepton.engine.engine import Engine
from lepton.engine.options import GenerationOptions
from lepton.engine.runner import Runner
from lepton.engine.sequence import Sequence
from lepton.ops.choose import sampling_of
from tests.generate.models import BATCH, lively
from tests.laws.lab import assert_close


def started(model, **options):
    """A runner whose pool has read the prompts."""
    runner = Runner(model, len(BATCH), 100)
    engine = Engine(runner)
    for row, prompt in enumerate(BATCH):
        engine.add(Sequence(prompt, GenerationOptions(**options), stops=[[0]], stream=(3, row)))
    engine.step()
    return runner


@pytest.mark.parametrize(("variant", "allowed"), [("complete", [3, 2, 1, 0]), ("dense", [4, 4, 4, 4])])
def test_a_chunk_contains_no_opening_after_its_first_token(variant, allowed):
    assert allowed_drafts(lively(variant), torch.arange(4), 4).tolist() == allowed
    assert allowed_drafts(lively(variant), torch.arange(4), 0).tolist() == [0] * 4


@pytest.mark.parametrize("temperature", [0, 5.0])
def test_the_end_of_a_document_is_never_drafted(temperature):
    model = lively("complete")
    with torch.no_grad():
        model.drafter.leave.weight.zero_()  # all tokens alike: the first would be taken, which ends documents
        assert model.drafter.ids[0] == model.config.eos_id
        runner = started(model, temperature=temperature)
        rows = runner.pool.take(torch.arange(4), read_slots=True, whole=True).rows
        tokens_BT = drafted(model, rows, 4, runner.drafter.get(4))
    assert tokens_BT.shape == (4, 5)
    assert torch.equal(tokens_BT[:, 0], rows.token_B)
    assert not (tokens_BT[:, 1:] == model.config.eos_id).any()


def test_an_outcome_is_what_the_model_says():
    """Tokens, uncertainties and log-probabilities of the newest token, against a pass over it."""
    model = lively("complete")
    runner = started(model, temperature=0)
    places = torch.arange(4)
    token_B = runner.pool.held.rows.token_B.clone()
    states = [runner.pool.read(place, model) for place in range(4)]
    opening = any(int(state.phase_B) == 0 for state in states)
    shape = Shape(4, 2, opening, 2, uncertainty=True, scored=True, logprobs=3, whole=True)
    with torch.no_grad():
        outcome = cycle(model, runner.pool, places, shape, runner.drafter.get(2))
        for row, state in enumerate(states):
            out = model(token_B[row : row + 1, None], state)
            log_p = out.logits[0, 0].log_softmax(-1)
            chosen = int(outcome.counts[row, 0])
            assert chosen == int(log_p.argmax())
            assert_close(outcome.doubts_BT[row, 0], out.uncertainty[0, 0], "uncertainty")
            best = log_p.topk(3)
            assert_close(outcome.scores[row, 0], torch.cat([log_p[chosen : chosen + 1], best.values]), "scores")
            assert torch.equal(outcome.alternatives[row, 0], best.indices)
            assert outcome.depths_BT[row].tolist() == [model.config.layers] * 3
    accepted_B, allowed_B, blocks_B, finite_B = outcome.counts[:, 3:].T
    assert (accepted_B <= allowed_B).all()
    assert blocks_B.tolist() == [3 * model.config.layers] * 4
    assert finite_B.all()


def test_drafts_are_cooler_and_search_no_wide_nucleus():
    found = sampling_of_drafts(sampling_of([(1.0, 1.0, None), (0.5, 0.9, 7), (0.5, 0.3, None), (0.0, 0.9, None)]))
    assert found.temperature_A.tolist() == pytest.approx([0.8, 0.4, 0.4, 0.0])
    assert found.top_p_A.tolist() == pytest.approx([1.0, 1.0, 0.3, 1.0])
    assert found.top_k_A.tolist() == [0, 7, 0, 0]
