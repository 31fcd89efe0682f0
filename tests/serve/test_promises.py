"""What was calibrated, over HTTP: texts that the model abstains from, and a cost in place of a depth."""

import math

import pytest
import torch

from lepton.model.budget import Budget
from lepton.model.promise import Promise
from lepton.values import Least
from tests.serve.http import Running
from tests.serve.small import small_model
from tests.serve.test_app import expected

LIVELY = {"temperature": 1.0, "seed": 11, "top_p": 1.0}
LINE = (6.0, -31.0)
"""Calibrated so that the chances, all near 1 in a model that has learned nothing, spread over 0..1."""
THRESHOLD = -LINE[1] / LINE[0]
"""The logit of a chance of one half."""


@pytest.fixture(scope="module")
def calibrated():
    model = small_model()
    told = {"confidence": 0.99, "windows": 1000, "tokens": 64000, "data": "some text"}
    model.uncertainty.promises = tuple(Promise(risk=risk, threshold=THRESHOLD, **told) for risk in (0.2, 0.1))
    model.uncertainty.calibration.copy_(torch.tensor(LINE))
    found = {"share": 0.5, "cost": 0.01, "error": 0.001, "tokens": 1000, "data": "some text"}
    model.router.budgets = (Budget(max_cost=0.02, least=0.0, **found),)
    return model


@pytest.fixture(scope="module")
def server(calibrated, tokenizer):
    with Running(calibrated, tokenizer, places=4) as running:
        yield running


def test_the_model_says_what_was_calibrated(server):
    model = server.get("/v1/models")[1]["data"][0]
    assert (model["risks"], model["costs"]) == ([0.1, 0.2], [0.02])


def test_a_completion_names_the_texts_of_tokens_that_are_abstained_from(server, calibrated, tokenizer):
    asked = {"max_tokens": 60, "abstain_at": 0.1} | LIVELY
    choice = server.complete("fox", **asked)["choices"][0]
    found = calibrated.generate(tokenizer.encode("fox"), 60, abstain_at=0.1, **LIVELY)
    new = found.tokens[len(tokenizer.encode("fox")) :]
    assert 0 < sum(found.abstained) < len(new)
    assert choice["text"] == tokenizer.decode(new)
    assert len(choice["abstained"]) == sum(found.abstained)
    detailed = server.complete("fox", logprobs=0, **asked)["choices"][0]
    assert detailed["logprobs"]["abstained"] == found.abstained
    offsets = detailed["logprobs"]["text_offset"]
    assert [begin for begin, _ in choice["abstained"]] == [
        offset for offset, unsure in zip(offsets, found.abstained, strict=True) if unsure
    ]
    assert all(begin < end <= len(choice["text"]) for begin, end in choice["abstained"])
    named = [token for token, unsure in zip(new, found.abstained, strict=True) if unsure]
    for (begin, end), text in zip(choice["abstained"], [tokenizer.decode([token]) for token in named], strict=True):
        assert "\ufffd" in text or choice["text"][begin:end] == text


@pytest.mark.parametrize("more", [{}, {"echo": True}, {"stop": ["e", "o"]}, {"logprobs": 1}])
def test_a_stream_names_the_same_texts(server, more):
    asked = {"prompt": "Käse", "max_tokens": 40, "abstain_at": 0.2} | LIVELY | more
    whole = server.complete(**asked)["choices"][0]
    events = server.events("/v1/completions", asked)
    parts = [span for event in events for choice in event["choices"] for span in choice["abstained"]]
    assert parts == whole["abstained"]


def test_a_conversation_does_too(server):
    reply = server.chat("The quick", abstain_at=0.1, logprobs=True, max_tokens=100, **LIVELY)["choices"][0]
    content = reply["logprobs"]["content"]
    unsure = [entry["text_offset"] for entry in content if entry["abstained"]]
    assert [begin for begin, _ in reply["abstained"]] == unsure
    assert {entry["abstained"] for entry in content} == {True, False}


def test_who_does_not_ask_is_told_nothing(server):
    choice = server.complete("fox", max_tokens=5, logprobs=1, **LIVELY)["choices"][0]
    assert "abstained" not in choice
    assert "abstained" not in choice["logprobs"]


def test_a_cost_is_its_threshold_as_depth(server, calibrated, tokenizer):
    asked = {"temperature": 0, "max_new_tokens": 40}
    (wanted,) = expected(calibrated, tokenizer, ["fox"], depth=Least(0.0), **asked)
    (full,) = expected(calibrated, tokenizer, ["fox"], **asked)
    assert wanted != full
    found = server.complete("fox", max_tokens=40, temperature=0, max_cost=0.02)
    assert found["choices"][0]["text"] == wanted


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"abstain_at": 0.3}, "risks that were: 0.1, 0.2"),
        ({"abstain_at": "x"}, "abstain_at='x'"),
        ({"abstain_at": math.pi}, "abstain_at=3.14"),
        ({"abstain_at": 0.1, "depth": 0.5}, "abstain_at=0.1 with depth=0.5"),
        ({"abstain_at": 0.1, "max_cost": 0.02}, "abstain_at=0.1 with max_cost=0.02"),
        ({"max_cost": 0.03}, "costs that were: 0.02"),
        ({"max_cost": 0}, "max_cost=0"),
        ({"max_cost": -1}, "max_cost=-1"),
        ({"max_cost": 0.02, "depth": 0.5}, "max_cost=0.02 with depth=0.5"),
    ],
    ids=str,
)
def test_what_was_not_calibrated_is_refused(server, fields, message):
    messages = [{"role": "user", "content": "x"}]
    for path, said in (("completions", {"prompt": "x"}), ("chat/completions", {"messages": messages})):
        status, found = server.post(f"/v1/{path}", said | fields)
        assert status == 400
        assert message in found["error"]["message"]
        assert found["error"]["param"] == next(iter(fields))
