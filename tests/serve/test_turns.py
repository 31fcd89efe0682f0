"""A turn of a conversation that is kept is what the whole conversation gives, and costs its new tokens alone."""

import json

import pytest
import torch

from lepton.data.chat import ChatTemplate
from lepton.engine.prefill import read_on, read_prompts
from lepton.serve import worker as workers
from lepton.serve.dialogue import Form, read_messages
from lepton.serve.limits import Limits
from lepton.serve.requests import Reader
from lepton.serve.turns import placed
from tests.generate.models import always_drafting
from tests.laws.lab import assert_states
from tests.serve.http import Running
from tests.serve.small import Collected

SAID = ["The quick brown fox", "Käse, 東京", "and then? " * 8, "x"]
ASKED = [{"temperature": 0}, {"temperature": 1.0}, {"temperature": 1.0, "think": 0}, {"temperature": 0.9, "depth": 0.5}]
LIMITS = Limits(max_prompt=4000, max_request=9000)
SYSTEM = {"role": "system", "content": "Be brief."}


def text_of(reply):
    return reply["choices"][0]["message"]["content"]


def scores(choices):
    """The log-probabilities of an answer, whole or from a stream: they tell any two pasts apart, which texts do not."""
    return [entry["logprob"] for choice in choices if choice["logprobs"] for entry in choice["logprobs"]["content"]]


@pytest.fixture(scope="module")
def server(request, model, tokenizer):
    """With room for the state of one conversation in memory: two that take turns go to disk and come back."""
    template = ChatTemplate(tokenizer) if request.param == "template" else None
    with Running(model, tokenizer, limits=LIMITS, template=template, places=1) as running:
        yield running


@pytest.mark.parametrize(
    ("server", "options"),
    # How an answer is computed does not depend on the form; that the form ends a turn right shows with two of them.
    [*(("transcript", options) for options in ASKED[::3]), *(("template", options) for options in ASKED)],
    indirect=["server"],
    ids=str,
)
def test_each_turn_is_what_the_whole_conversation_gives(server, options):
    """Also streamed, with a stop text, and while another conversation goes on in between."""
    name, history, read = f"turns-{ASKED.index(options)}", [], []
    for turn, said in enumerate(SAID):
        new = [{"role": "user", "content": said}]
        new = new if turn else [SYSTEM, *new]
        history += new
        asked = options | {"seed": turn, "max_tokens": 14} | ({"stop": ["e", "a"]} if turn == 2 else {})
        asked["logprobs"] = True
        wanted, forgetful = server.chat(*history, **asked), server.chat(*new, **asked)
        if turn % 2:
            events = server.events("/v1/chat/completions", {"messages": new, "conversation": name} | asked)
            given = [choice for event in events for choice in event["choices"]]
            text = "".join(choice["delta"].get("content", "") for choice in given)
            assert {event["conversation"] for event in events} == {name}
        else:
            reply = server.chat(*new, conversation=name, **asked)
            given, text = reply["choices"], text_of(reply)
            read.append((reply["usage"]["prompt_tokens"], wanted["usage"]["prompt_tokens"]))
            assert reply["conversation"] == name
        assert text == text_of(wanted), f"turn {turn}"
        assert scores(given) == pytest.approx(scores(wanted["choices"]), abs=1e-8)
        if turn:
            assert scores(given) != pytest.approx(scores(forgetful["choices"]), abs=1e-5), "the past is not seen"
        history.append({"role": "assistant", "content": text})
        server.chat("and?", conversation=f"{name}-other", seed=turn)
    assert read[0][0] == read[0][1]
    assert read[1][0] < read[1][1] / 2, "the third turn costs its own tokens"
    form = server.api.reader.form
    tokens = len(form.prompt(read_messages(history))[0]) - len(form.header)
    known = server.get(f"/v1/conversations/{name}")[1]
    assert (known["turns"], known["tokens"]) == (len(SAID), tokens)
    assert server.api.conversations.in_memory == 1


def answer_in(model, tokenizer, said, past=None, *, template, **options):
    """The answer to a message in a conversation that has come to `past`, and the ids that it was asked with."""
    reader = Reader(model, tokenizer, "lepton", LIMITS, template)
    body = {"messages": [{"role": "user", "content": said}], "conversation": "x"} | options
    task = reader.task(json.dumps(body).encode(), chat=True)
    (answer,) = task.answers(past)
    return answer, task.prompts[0]


@pytest.mark.parametrize("ahead", [0, 2])
def test_answers_leave_the_state_of_what_was_said(model, tokenizer, ahead):
    """Of several that run at once, with drafts, cut by a stop text or by a length, and one by one in two turns."""
    template = ChatTemplate(tokenizer)
    given = [{"max_tokens": 9}, {"stop": "e", "max_tokens": 40}, {"depth": 0.5, "max_tokens": 12}, {"think": 0}]
    more = {"template": template, "temperature": 1.0}
    asked = [answer_in(model, tokenizer, "fox", seed=i, **each, **more) for i, each in enumerate(given)]
    answers = [answer for answer, _ in asked]
    with always_drafting(), Collected(model, places=3, ahead=ahead) as collected:
        collected.worker.submit(answers)
        collected.wait(*answers)
        second, ids = answer_in(model, tokenizer, "x", answers[0].state, seed=9, max_tokens=5, **more)
        collected.worker.submit([second])
        collected.wait(second)
    for answer, prompt in asked:
        options = {"depth": answer.sequence.depth, "think": answer.sequence.options.think}
        said = Form(tokenizer, template).answer(collected.text(answer))
        wanted = read_on(model, [said], read_prompts(model, [prompt], None, **options).state, **options)
        assert_states(wanted, answer.state, collected.text(answer))
    assert {answer.ended_by for answer in answers} >= {"length", "stop"}
    turns = asked[0][1] + Form(tokenizer, template).answer(collected.text(answers[0])) + ids
    opens, said = [[len(asked[0][1]) - 1]], Form(tokenizer, template).answer(collected.text(second))
    whole = read_prompts(model, [turns], None, depth=1, think=None, opens=opens).state
    assert_states(read_on(model, [said], whole, depth=1, think=None), second.state, "two turns")
    assert second.state.nbytes == answers[0].state.nbytes


def test_an_answer_of_no_conversation_keeps_nothing(model, tokenizer):
    answer = (
        Reader(model, tokenizer, "lepton", LIMITS)
        .task(b'{"messages": [{"role": "user", "content": "fox"}], "max_tokens": 3}', chat=True)
        .answers()[0]
    )
    with Collected(model, places=1) as collected:
        collected.worker.submit([answer])
        collected.wait(answer)
    assert (answer.state, answer.sequence.read, answer.text) == (None, None, "")


def test_where_an_answer_cannot_be_read_it_ends_with_the_error(model, tokenizer, monkeypatch):
    """And those beside it go on."""

    def failing(*_):
        raise MemoryError("no memory for the state")

    monkeypatch.setattr(workers, "read_answers", failing)
    kept, _ = answer_in(model, tokenizer, "fox", max_tokens=3, template=None)
    with Collected(model, places=2) as collected:
        collected.worker.submit([kept])
        collected.wait(kept)
    assert [(piece.ended_by, piece.error) for piece in collected.pieces[kept]][-1] == (
        "error",
        "no memory for the state",
    )
    assert kept.state is None


def test_a_past_goes_to_the_device_of_the_model(model, tokenizer):
    answer, _ = answer_in(model, tokenizer, "fox", model.new_state(1), template=None)
    placed(answer, torch.device("meta"))
    assert answer.sequence.past[0].position_B.is_meta
    assert answer.sequence.past[1] == 0
    fresh, _ = answer_in(model, tokenizer, "fox", template=None)
    placed(fresh, torch.device("meta"))
    assert fresh.sequence.past is None
