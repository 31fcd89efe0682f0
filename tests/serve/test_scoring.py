"""The scores of a prompt, against one pass over it."""

import pytest
import torch

from lepton.engine.options import GenerationOptions
from lepton.serve import scoring
from lepton.serve.scoring import Scoring, prompt_scores
from tests.generate.models import lively

PROMPT = [5, 9, 33, 71, 9, 2, 60, 61, 62, 63, 64, 8, 14, 12, 0, 7, 7, 3]


@pytest.mark.parametrize("options", [{}, {"depth": 0.5}, {"think": 3}])
@pytest.mark.parametrize("chunk", [1, 5, 17, 100])
def test_scores_are_those_of_one_pass(model, monkeypatch, options, chunk):
    monkeypatch.setattr(scoring, "CHUNK", chunk)
    with torch.no_grad():
        out = model(torch.tensor([PROMPT]), **options)
    log_p = out.logits[0].log_softmax(-1)
    found = prompt_scores(model, PROMPT, GenerationOptions(**options), 4)
    assert [each.chosen for each in found.logprobs] == pytest.approx(
        [float(log_p[t, i]) for t, i in enumerate(PROMPT[1:])]
    )
    for t, each in enumerate(found.logprobs):
        assert list(each.most_probable.values()) == pytest.approx(log_p[t].topk(4).values.tolist())
        assert list(each.most_probable) == log_p[t].topk(4).indices.tolist()
    assert found.uncertainties == pytest.approx(out.uncertainty[0, :-1].tolist())
    assert found.depths == out.depth[0, :-1].tolist()


def test_one_token_has_no_scores(model):
    found = prompt_scores(model, [5], GenerationOptions(), 4)
    assert (found.logprobs, found.uncertainties, found.depths) == ([], [], [])


def test_a_model_without_an_uncertainty_head_has_the_others():
    found = prompt_scores(lively("dense"), PROMPT, GenerationOptions(), 1)
    assert (len(found.logprobs), found.uncertainties, len(found.depths)) == (len(PROMPT) - 1, [], len(PROMPT) - 1)


def test_the_answers_to_a_prompt_share_its_scores(model):
    wish = Scoring(PROMPT, GenerationOptions(), 2)
    assert wish.scores(model) is wish.scores(model)
