"""A request's JSON becomes prompts and options, or a refusal that names the field."""

import json
import math

import pytest
import torch

from lepton.data.chat import ChatTemplate, Message
from lepton.data.tokenizer import load_tokenizer
from lepton.engine.options import GenerationOptions
from lepton.serve.dialogue import read_messages
from lepton.serve.limits import Limits, Refusal
from lepton.serve.requests import CHAT_TOKENS, NEW_TOKENS, Reader
from lepton.values import Least
from tests.generate.models import lively
from tests.serve.small import calibrated_model

LIMITS = Limits(max_prompt=50, max_tokens=600, max_choices=6, max_request=1500, max_think=4)
HELLO = [{"role": "user", "content": "Hello"}]


@pytest.fixture(scope="module")
def reader(model, tokenizer):
    return Reader(model, tokenizer, "lepton", LIMITS)


def task(reader, **fields):
    chat = "messages" in fields
    return reader.task(json.dumps(fields).encode(), chat=chat)


def test_what_is_left_out_is_as_in_generate(reader, tokenizer):
    found = task(reader, prompt="fox")
    assert found.options == GenerationOptions(seed=found.options.seed)
    assert (found.options.max_new_tokens, found.n, found.stops, found.stream) == (NEW_TOKENS, 1, [], False)
    assert (found.logprobs, found.echo, found.include_usage) == (None, False, False)
    assert (found.prompts, found.texts) == ([tokenizer.encode("fox")], ["fox"])
    assert task(reader, messages=HELLO).options.max_new_tokens == CHAT_TOKENS


def test_every_option_arrives(reader):
    options = {"temperature": 0.5, "top_p": 0.7, "top_k": 3, "seed": -5, "depth": 0.5, "think": 2}
    found = task(reader, prompt="fox", max_tokens=7, use_speculative=False, **options)
    assert found.options == GenerationOptions(max_new_tokens=7, use_speculative=False, **options)
    answers = task(reader, prompt=["a", "b"], n=2, stop=["x", "yz"], logprobs=3, seed=1).answers()
    assert len(answers) == 4
    assert {each.stops for each in answers} == {("x", "yz")}
    assert all(each.sequence.uncertainty and each.sequence.logprobs == 20 for each in answers)
    assert len({each.sequence.stream for each in answers}) == 4
    assert not any(each.sequence.uncertainty or each.sequence.logprobs for each in task(reader, prompt="a").answers())


def test_a_chat_has_its_own_names(reader):
    found = task(reader, messages=HELLO, max_completion_tokens=5, logprobs=True, top_logprobs=2, stop="x")
    assert (found.options.max_new_tokens, found.logprobs, found.stops) == (5, 2, ["x", "\nUser:"])
    assert found.texts == ["User: Hello\nAssistant:"]
    assert task(reader, messages=HELLO, logprobs=True).logprobs == 0
    assert task(reader, messages=HELLO, logprobs=False).logprobs is None
    assert task(reader, messages=HELLO, max_tokens=5, max_completion_tokens=5).options.max_new_tokens == 5


def test_a_turn_of_a_conversation_goes_on_from_its_past(reader, model):
    said = [*HELLO, {"role": "assistant", "content": "x"}, *HELLO]
    found = task(reader, messages=said, conversation="a-B_9", max_tokens=5)
    past = model.new_state(1)
    (answer,) = found.answers(past)
    assert found.conversation == "a-B_9"
    assert answer.sequence.past == (past, 0)
    assert answer.sequence.keeps_read
    assert answer.sequence.opens == reader.form.prompt(read_messages(said))[1]
    assert answer.closing("x") == reader.form.answer("x")
    assert found.most_tokens == len(found.prompts[0]) + 5
    (alone,) = task(reader, messages=said).answers()
    assert (alone.sequence.opens, alone.sequence.past) == (answer.sequence.opens, None)
    assert (alone.closing, alone.sequence.keeps_read) == (None, False)


def test_fields_that_ask_for_nothing_are_accepted(reader):
    task(reader, prompt="fox", user="me", frequency_penalty=0, presence_penalty=0.0, logit_bias={}, best_of=1)
    task(reader, prompt="fox", suffix=None, metadata={"a": "b"}, store=False, model="lepton", stop=None)
    task(reader, messages=HELLO, tools=[], tool_choice="none", response_format={"type": "text"}, modalities=["text"])
    task(reader, prompt="fox", stream=True, stream_options={"include_usage": True, "include_obfuscation": False})


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({}, "prompt"),
        ({"prompt": []}, "prompt"),
        ({"prompt": 7}, "prompt"),
        ({"prompt": {}}, "prompt"),
        ({"prompt": [[]]}, "prompt"),
        ({"prompt": ["a", 1]}, "prompt"),
        ({"prompt": [1, "a"]}, "prompt"),
        ({"prompt": [[1], 1]}, "prompt"),
        ({"prompt": [1, 10_000]}, "prompt"),
        ({"prompt": [-1]}, "prompt"),
        ({"prompt": [1.5]}, "prompt"),
        ({"prompt": [True]}, "prompt"),
        ({"prompt": [None]}, "prompt"),
        ({"prompt": "a", "messages": HELLO}, "messages"),
        ({"prompt": "a", "max_completion_tokens": 3}, "max_completion_tokens"),
        ({"prompt": "a", "max_tokens": -1}, "max_tokens"),
        ({"prompt": "a", "max_tokens": 601}, "max_tokens"),
        ({"prompt": "a", "temperature": -1}, "temperature"),
        ({"prompt": "a", "temperature": "hot"}, "temperature"),
        ({"prompt": "a", "temperature": 1e999}, None),
        ({"prompt": "a", "top_p": 0}, "top_p"),
        ({"prompt": "a", "top_p": 1.1}, "top_p"),
        ({"prompt": "a", "top_k": 0}, "top_k"),
        ({"prompt": "a", "seed": 1 << 64}, "seed"),
        ({"prompt": "a", "seed": 0.5}, "seed"),
        ({"prompt": "a", "depth": 2}, "depth"),
        ({"prompt": "a", "think": 5}, "think"),
        ({"prompt": "a", "max_cost": 0.1}, "max_cost"),
        ({"prompt": "a", "max_cost": 0}, "max_cost"),
        ({"prompt": "a", "max_cost": "0.1"}, "max_cost"),
        ({"prompt": "a", "logprobs": 0, "abstain_at": 0.1}, "abstain_at"),
        ({"prompt": "a", "logprobs": 0, "abstain_at": 1}, "abstain_at"),
        ({"prompt": "a", "logprobs": 0, "abstain_at": True}, "abstain_at"),
        ({"prompt": "a", "n": 0}, "n"),
        ({"prompt": "a", "n": 7}, "n"),
        ({"prompt": ["a"] * 4, "n": 2}, "n"),
        ({"prompt": ["a"] * 7}, "n"),
        ({"prompt": "a", "stop": ""}, "stop"),
        ({"prompt": "a", "stop": ["a", ""]}, "stop"),
        ({"prompt": "a", "stop": 3}, "stop"),
        ({"prompt": "a", "stop": ["x"] * 17}, "stop"),
        ({"prompt": "a", "stop": "x" * 257}, "stop"),
        ({"prompt": "a", "logprobs": 21}, "logprobs"),
        ({"prompt": "a", "logprobs": True}, "logprobs"),
        ({"prompt": "a", "echo": 1}, "echo"),
        ({"prompt": "a", "stream": "yes"}, "stream"),
        ({"prompt": "a", "stream_options": {"include_usage": True}}, "stream_options"),
        ({"prompt": "a", "stream": True, "stream_options": []}, "stream_options"),
        ({"prompt": "a", "stream": True, "stream_options": {"x": 1}}, "stream_options.x"),
        ({"prompt": "a", "best_of": 2}, "best_of"),
        ({"prompt": "a", "suffix": "x"}, "suffix"),
        ({"prompt": "a", "logit_bias": {"5": 1}}, "logit_bias"),
        ({"prompt": "a", "frequency_penalty": 0.1}, "frequency_penalty"),
        ({"prompt": "a", "max_token": 3}, "max_token"),
        ({"messages": HELLO, "tools": [{}]}, "tools"),
        ({"messages": HELLO, "response_format": {"type": "json_object"}}, "response_format"),
        ({"messages": HELLO, "top_logprobs": 3}, "top_logprobs"),
        ({"messages": HELLO, "logprobs": 3}, "logprobs"),
        ({"messages": HELLO, "logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"messages": HELLO, "max_tokens": 3, "max_completion_tokens": 4}, "max_completion_tokens"),
        ({"messages": HELLO, "echo": True}, "echo"),
        ({"messages": [{"role": "user"}]}, "messages[0].content"),
    ],
)
def test_what_cannot_be_served_is_refused(reader, fields, param):
    chat = "messages" in fields and "prompt" not in fields
    body = json.dumps(fields).replace("Infinity", "1e999").encode()
    with pytest.raises(Refusal) as refused:
        reader.task(body, chat=chat)
    assert refused.value.status == 400
    assert refused.value.param == param or (param is None and "temperature" in str(refused.value))


def test_what_is_too_large_is_refused(reader):
    for prompt in ("x" * 400, list(range(1, 52)), ["a", [2] * 51][1]):
        with pytest.raises(Refusal, match="at most 50") as refused:
            task(reader, prompt=prompt)
        assert refused.value.code == "context_length_exceeded"
    task(reader, prompt=[2] * 50, max_tokens=600)
    with pytest.raises(Refusal, match=r"1,803 tokens together: at most 1,500") as refused:
        task(reader, prompt=[2], max_tokens=600, n=3)
    assert refused.value.code == "context_length_exceeded"


def test_the_wrong_model_is_not_found(reader):
    for name in ("gpt-4", 3, ["lepton"], ""):
        with pytest.raises(Refusal) as refused:
            task(reader, prompt="a", model=name)
        assert (refused.value.status, refused.value.code) == (404, "model_not_found")


@pytest.fixture(scope="module")
def calibrated(tokenizer):
    return Reader(calibrated_model(), tokenizer, "lepton", LIMITS)


def test_a_risk_and_a_cost_that_were_calibrated_are_taken(calibrated):
    assert (calibrated.risks, calibrated.costs) == ([0.01, 0.2], [0.05])
    found = task(calibrated, prompt="a", logprobs=0, abstain_at=0.2)
    head = calibrated.model.idea("uncertainty")
    assert found.largest_kept == float(head.chance(torch.tensor(head.promises[0].threshold, dtype=torch.float64)))
    assert task(calibrated, prompt="a", logprobs=0, abstain_at=0.01).largest_kept == -math.inf
    assert task(calibrated, prompt="a", logprobs=0).largest_kept is None
    found = task(calibrated, messages=HELLO, max_cost=0.05)
    assert (found.options.depth, found.options.max_cost) == (Least(0.0), None)
    properties = calibrated.schema(chat=False)["properties"]
    assert properties["abstain_at"] == {"enum": [0.01, 0.2, None]}
    assert properties["max_cost"] == {"enum": [0.05, None]}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"abstain_at": 0.1, "logprobs": 0}, r"abstain_at=0.1 was not calibrated .*\(risks that were: 0.01, 0.2\)"),
        ({"abstain_at": 0.2, "logprobs": 0, "depth": 0.5}, "abstain_at=0.2 with depth=0.5: it was calibrated at full"),
        ({"abstain_at": 0.2, "logprobs": 0, "think": 1}, "abstain_at=0.2 with think=1"),
        ({"abstain_at": 0.2, "logprobs": 0, "max_cost": 0.05}, "abstain_at=0.2 with max_cost=0.05"),
        ({"max_cost": 0.1}, r"max_cost=0.1 was not calibrated .*\(costs that were: 0.05\)"),
        ({"max_cost": 0.05, "depth": 0.5}, "max_cost=0.05 with depth=0.5: each says which tokens skip"),
        ({"max_cost": 0.05, "think": 1}, "max_cost=0.05 with think=1"),
    ],
)
def test_a_risk_and_a_cost_that_cannot_be_kept_are_refused(calibrated, fields, message):
    with pytest.raises(Refusal, match=message) as refused:
        task(calibrated, prompt="a", **fields)
    assert refused.value.param == next(iter(fields))


def test_a_model_without_ideas_refuses_what_needs_them(tokenizer):
    reader = Reader(lively("dense"), tokenizer, "lepton", LIMITS)
    assert (reader.risks, reader.costs) == ([], [])
    for fields in ({"depth": 0.5}, {"think": 2}, {"max_cost": 0.1}, {"abstain_at": 0.1, "logprobs": 1}):
        with pytest.raises(Refusal) as refused:
            task(reader, prompt=[3], **fields)
        assert refused.value.param == next(iter(fields))
    assert task(reader, prompt=[3], logprobs=1).answers()[0].sequence.uncertainty is False


def test_a_model_of_conversations_gets_the_template_of_its_training(model):
    """And its answers end where it ends a message."""
    own = load_tokenizer(None)
    template = ChatTemplate(own)
    reader = Reader(model, own, "lepton", LIMITS, template)
    said = [{"role": "developer", "content": "Be brief."}, {"role": "user", "content": "Hi\nUser: no"}]
    task = reader.task(json.dumps({"messages": said, "stop": "x"}).encode(), chat=True)
    assert task.prompts == [template.prompt([Message("system", "Be brief."), Message("user", "Hi\nUser: no")])]
    assert task.texts == ["System:\nBe brief.\nUser:\nHi\nUser: no\nAssistant:\n"]
    assert task.stops == ["x"]
    (answer,) = task.answers()
    assert answer.sequence.stops == [[model.config.eos_id], [template.end_id]]
    plain = reader.task(b'{"prompt": "Hi"}', chat=False)
    assert plain.answers()[0].sequence.stops == [[model.config.eos_id]]
