"""Replies in OpenAI's form: streamed or whole, conversations, stop texts, log-probabilities, usage."""

import json

import pytest
import torch

from tests.serve.http import Running, until
from tests.serve.small import calibrated_model
from tests.serve.test_app import expected, texts

HELLO = [{"role": "user", "content": "The quick"}]
LIVELY = {"temperature": 1.0, "seed": 11}


def joined(events, index=0):
    """The text of an answer from its chunks."""
    choices = [each for event in events for each in event["choices"] if each["index"] == index]
    return "".join(each["text"] if "text" in each else each["delta"].get("content", "") for each in choices)


@pytest.mark.parametrize("more", [{}, {"n": 3}, {"stop": ["o", "q "]}, {"echo": True, "n": 2}, {"max_tokens": 1}])
def test_a_stream_is_the_reply_in_parts(server, more):
    fields = {"prompt": "Käse", "max_tokens": 40} | LIVELY | more
    whole = server.complete(**fields)
    events = server.events("/v1/completions", fields | {"stream_options": {"include_usage": True}})
    *events, last = events
    assert [joined(events, i) for i in range(fields.get("n", 1))] == texts(whole)
    counts = ("prompt_tokens", "completion_tokens", "total_tokens")  # drafts follow measured times
    assert last["choices"] == []
    assert [last["usage"][name] for name in counts] == [whole["usage"][name] for name in counts]
    assert {event["id"] for event in [*events, last]} == {last["id"]}
    assert last["id"] != whole["id"]
    assert all(event["usage"] is None for event in events)
    ends = {each["index"]: each for event in events for each in event["choices"] if each["finish_reason"]}
    assert [ends[i]["finish_reason"] for i in sorted(ends)] == [each["finish_reason"] for each in whole["choices"]]
    assert [ends[i]["ended_by"] for i in sorted(ends)] == [each["ended_by"] for each in whole["choices"]]


def test_a_text_comes_in_many_parts(server):
    events = server.events("/v1/completions", {"prompt": "fox", "max_tokens": 40} | LIVELY)
    assert len(events) > 8


def test_a_conversation(server, model, tokenizer):
    prompt = "User: The quick\nAssistant:"
    (wanted,) = expected(model, tokenizer, [prompt], max_new_tokens=30, **LIVELY)
    status, whole = server.post("/v1/chat/completions", {"messages": HELLO, "max_tokens": 30} | LIVELY)
    choice = whole["choices"][0]
    assert (status, choice["message"]["role"], choice["message"]["content"]) == (200, "assistant", wanted)
    assert whole["object"] == "chat.completion"
    events = server.events("/v1/chat/completions", {"messages": HELLO, "max_tokens": 30} | LIVELY)
    assert events[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert joined(events) == wanted
    assert {event["object"] for event in events} == {"chat.completion.chunk"}
    assert "usage" not in events[-1]


def test_a_stop_text_is_left_out_and_ends_it(server, model, tokenizer):
    (text,) = expected(model, tokenizer, ["fox"], max_new_tokens=60, **LIVELY)
    stop = text[20:23]
    found = server.complete("fox", max_tokens=60, stop=stop, **LIVELY)
    choice = found["choices"][0]
    assert (choice["text"], choice["finish_reason"], choice["ended_by"]) == (text[: text.index(stop)], "stop", "stop")
    assert found["usage"]["completion_tokens"] < 60
    none = server.complete("fox", max_tokens=60, stop="no such text", **LIVELY)
    assert none["choices"][0]["text"] == text
    assert none["choices"][0]["ended_by"] in ("length", "end_of_document")


def test_echo_puts_the_prompt_before_the_text(server, tokenizer):
    plain = server.complete("Käse", max_tokens=8, **LIVELY)
    for prompt in ("Käse", tokenizer.encode("Käse")):
        assert texts(server.complete(prompt, max_tokens=8, echo=True, **LIVELY)) == ["Käse" + texts(plain)[0]]
    nothing = server.complete("Käse", max_tokens=0, echo=True)
    assert (texts(nothing), nothing["choices"][0]["finish_reason"]) == (["Käse"], "length")
    assert nothing["usage"]["completion_tokens"] == 0
    events = server.events("/v1/completions", {"prompt": "Käse", "max_tokens": 0, "echo": True})
    assert joined(events) == "Käse"


@pytest.mark.parametrize("options", [{}, {"depth": 0.5}, {"use_speculative": False}])
def test_logprobs_are_those_of_generate(server, model, tokenizer, options):
    prompt, ids = "fox", tokenizer.encode("fox")
    wanted = model.generate_with_logprobs(ids, 12, logprobs=3, **LIVELY | options)
    unsure = model.generate_with_uncertainty(ids, 12, **LIVELY | options).uncertainties
    new = wanted.tokens[len(ids) :]
    found = server.complete(prompt, max_tokens=12, logprobs=3, **LIVELY | options)["choices"][0]["logprobs"]
    assert found["token_id"] == new
    assert found["token_logprobs"] == pytest.approx([each.chosen for each in wanted.logprobs])
    assert found["uncertainty"] == pytest.approx(unsure)
    for given, each in zip(found["top_logprobs"], wanted.logprobs, strict=True):
        assert list(given.values()) == pytest.approx(list(each.most_probable.values())[: len(given)])
        assert len(given) == 3
    assert set(found["depth"]) <= set(range(model.config.stem_layers, model.config.layers + 1))
    assert not any(found["drafted"]) if options.get("use_speculative") is False else True
    text = texts(server.complete(prompt, max_tokens=12, **LIVELY | options))[0]
    # A part of a character that nothing completes is seen, as U+FFFD, before the next token's text.
    for offset, token in zip(found["text_offset"], found["tokens"], strict=True):
        assert token.startswith(("bytes:", "<|endoftext|>")) or token in text[offset : offset + len(token) + 1]


@pytest.mark.parametrize("new", [0, 3])
def test_with_echo_the_prompt_has_logprobs_too(server, model, tokenizer, new):
    """As evaluation tools ask for it."""
    text = "The quick brown fox, Käse"
    ids = tokenizer.encode(text)
    log_p = model(torch.tensor([ids])).logits[0].detach().log_softmax(-1)
    fields = {"prompt": [text, "x"], "max_tokens": new, "logprobs": 2, "echo": True, "n": 2} | LIVELY
    whole = server.complete(**fields)
    plain = server.complete(**fields | {"logprobs": None})
    assert texts(whole) == texts(plain)
    for i in (0, 1):
        found = whole["choices"][i]["logprobs"]
        assert found["token_id"][: len(ids)] == ids
        assert len(found["tokens"]) == len(ids) + new
        assert (found["token_logprobs"][0], found["top_logprobs"][0], found["uncertainty"][0]) == (None, None, None)
        wanted = [float(log_p[t, ids[t + 1]]) for t in range(len(ids) - 1)]
        assert found["token_logprobs"][1 : len(ids)] == pytest.approx(wanted)
        best = [max(each.values()) for each in found["top_logprobs"][1 : len(ids)]]
        assert best == pytest.approx(log_p.max(-1).values[: len(ids) - 1].tolist())
        given = whole["choices"][i]["text"]
        for offset, token in zip(found["text_offset"], found["tokens"], strict=True):
            assert token.startswith(("bytes:", "<|endoftext|>")) or token in given[offset : offset + len(token) + 1]
        assert found["text_offset"][len(ids) :] == sorted(found["text_offset"][len(ids) :])
        assert all(offset >= len(text) for offset in found["text_offset"][len(ids) :])
    events = server.events("/v1/completions", fields)
    assert [joined(events, i) for i in range(4)] == texts(whole)
    choices = [choice for event in events for choice in event["choices"] if choice["index"] == 0]
    names = [name for choice in choices if choice["logprobs"] for name in choice["logprobs"]["tokens"]]
    assert names == whole["choices"][0]["logprobs"]["tokens"]


def test_logprobs_of_a_conversation(server):
    fields = {"messages": HELLO, "max_tokens": 12, "logprobs": True, "top_logprobs": 2} | LIVELY
    _, whole = server.post("/v1/chat/completions", fields)
    content = whole["choices"][0]["logprobs"]["content"]
    assert len(content) == whole["usage"]["completion_tokens"]
    for entry in content:
        assert entry["logprob"] <= entry["top_logprobs"][0]["logprob"] <= 0
        assert len(entry["top_logprobs"]) == 2
        assert 0 <= entry["uncertainty"] <= 1
        assert bytes(entry["bytes"]).decode("utf-8", "replace") == entry["token"] or entry["bytes"] == []
    raw = b"".join(bytes(entry["bytes"]) for entry in content)
    text = raw.decode("utf-8", "replace")
    assert text == whole["choices"][0]["message"]["content"]
    plain = [entry for entry in content if "\ufffd" not in entry["token"]]
    assert len(plain) > 3
    for entry in plain:  # a character that is torn before it comes with it
        assert text[entry["text_offset"] :].lstrip("\ufffd").startswith(entry["token"])
    assert [entry["text_offset"] for entry in content] == sorted(entry["text_offset"] for entry in content)
    events = server.events("/v1/chat/completions", fields)
    logprobs = [choice["logprobs"] for event in events for choice in event["choices"] if choice["logprobs"]]
    assert [entry["token_id"] for each in logprobs for entry in each["content"]] == [
        entry["token_id"] for entry in content
    ]


@pytest.fixture(scope="module")
def careful(tokenizer):
    with Running(calibrated_model(), tokenizer, places=4) as server:
        yield server


@pytest.mark.parametrize("risk", [0.2, 0.01])
def test_abstentions_are_those_of_generate(careful, tokenizer, risk):
    model, ids = careful.api.reader.model, tokenizer.encode("fox")
    wanted = model.generate(ids, 20, abstain_at=risk, **LIVELY)
    assert set(wanted.abstained) == ({True, False} if risk == 0.2 else {True})
    fields = {"max_tokens": 20, "logprobs": 0, "abstain_at": risk} | LIVELY
    (choice,) = careful.complete("fox", **fields)["choices"]
    assert choice["text"] == tokenizer.decode(wanted.tokens[len(ids) :])
    assert choice["logprobs"]["abstained"] == wanted.abstained
    events = careful.events("/v1/completions", {"prompt": "fox"} | fields)
    chunks = [choice["logprobs"] for event in events for choice in event["choices"] if choice["logprobs"]]
    assert [each for chunk in chunks for each in chunk["abstained"]] == wanted.abstained


def test_abstentions_of_a_prompt_and_of_a_conversation(careful):
    fields = {"logprobs": 0, "abstain_at": 0.2, "max_tokens": 3} | LIVELY
    limit = careful.api.reader.task(json.dumps({"prompt": "x"} | fields).encode(), chat=False).largest_kept
    found = careful.complete("The quick brown fox", echo=True, **fields)["choices"][0]["logprobs"]
    assert found["abstained"][0] is None
    assert found["abstained"][1:] == [unsure > limit for unsure in found["uncertainty"][1:]]
    assert set(found["abstained"][1:]) == {True, False}
    (choice,) = careful.chat("fox", **fields | {"logprobs": True, "max_tokens": 12})["choices"]
    entries = choice["logprobs"]["content"]
    assert [each["abstained"] for each in entries] == [each["uncertainty"] > limit for each in entries]
    plain = careful.chat("fox", logprobs=True, **LIVELY)["choices"][0]["logprobs"]["content"]
    assert "abstained" not in plain[0]
    assert "abstained" not in careful.complete("fox", logprobs=0)["choices"][0]["logprobs"]


def test_a_cost_is_kept_to_as_by_generate(careful, tokenizer):
    model, ids = careful.api.reader.model, tokenizer.encode("fox")
    wanted = model.generate(ids, 30, max_cost=0.05, **LIVELY)
    assert texts(careful.complete("fox", max_tokens=30, max_cost=0.05, **LIVELY)) == [
        tokenizer.decode(wanted[len(ids) :])
    ]
    found = careful.complete("fox", max_tokens=30, max_cost=0.05, logprobs=0, **LIVELY)["choices"][0]["logprobs"]
    assert set(found["depth"]) == {model.config.stem_layers, model.config.layers}
    said = careful.chat("fox", conversation="cheap", max_cost=0.05, **LIVELY), careful.chat("x", conversation="cheap")
    assert all(each["choices"][0]["ended_by"] for each in said)


def test_the_model_says_what_was_calibrated(careful, server):
    (model,) = careful.get("/v1/models")[1]["data"]
    assert (model["risks"], model["costs"]) == ([0.01, 0.2], [0.05])
    (model,) = server.get("/v1/models")[1]["data"]
    assert (model["risks"], model["costs"]) == ([], [])


def test_single_tokens_stay_out_where_nobody_asked(server):
    assert server.complete("fox", max_tokens=3)["choices"][0]["logprobs"] is None
    asked = server.complete("fox", max_tokens=3, logprobs=0, **LIVELY)["choices"][0]["logprobs"]
    assert asked["top_logprobs"] == [{}, {}, {}]
    assert len(asked["token_logprobs"]) == 3


def test_usage_counts_drafts(server):
    """Whether drafts are tried is decided by measured times; what is counted fits the metrics."""
    server.quiet()
    before = server.api.calls.worker.stats.new_tokens
    usage = server.complete("fox", max_tokens=40, n=2, **LIVELY)["usage"]
    assert 0 <= usage["accepted_tokens"] <= usage["drafted_tokens"]
    assert usage["completion_tokens"] == server.api.calls.worker.stats.new_tokens - before
    until(lambda: not server.api.calls.under_way)
