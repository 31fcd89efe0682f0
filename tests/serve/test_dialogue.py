"""A conversation as a transcript."""

import pytest

from lepton.data.chat import ChatTemplate
from lepton.serve import dialogue
from lepton.serve.dialogue import Form
from lepton.serve.limits import Refusal


def said(role, content, **more):
    return {"role": role, "content": content} | more


def transcript(messages):
    return dialogue.transcript(dialogue.read_messages(messages))


def test_messages_become_a_transcript():
    messages = [said("system", "Be brief."), said("user", "Hi"), said("assistant", "Hello."), said("user", "Bye")]
    assert transcript(messages) == "Be brief.\n\nUser: Hi\nAssistant: Hello.\nUser: Bye\nAssistant:"
    assert transcript([said("developer", "x"), said("user", "y", name="Eve")]) == "x\n\nUser: y\nAssistant:"


def test_an_answer_goes_back_as_it_was_given():
    """The text of the next turn then begins with that of this one."""
    first = transcript([said("user", "Hi")])
    for answer in (" Hello.", "Hello."):
        assert transcript([said("user", "Hi"), said("assistant", answer), said("user", "x")]).startswith(
            f"{first} Hello.\nUser:"
        )


def test_a_content_may_be_a_list_of_texts():
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    assert transcript([said("user", parts)]) == "User: ab\nAssistant:"
    assert transcript([said("user", [])]) == "User: \nAssistant:"


@pytest.mark.parametrize("template", [False, True])
def test_a_conversation_has_the_same_tokens_however_it_is_cut(tokenizer, template):
    form = Form(tokenizer, ChatTemplate(tokenizer) if template else None)
    messages = [said("system", "Be brief."), said("user", "Hi"), said("assistant", "Hello.\n"), said("user", "Käse")]
    whole, opens = form.prompt(dialogue.read_messages(messages))
    first, none = form.prompt(dialogue.read_messages(messages[:2]))
    second, _ = form.prompt(dialogue.read_messages(messages[3:]))
    assert (first + form.answer("Hello.\n") + second, none) == (whole, [])
    assert opens == [len(first) - 1], "an answer opens thoughts where its header ends"
    if not template:
        assert tokenizer.decode(whole) == transcript(messages)
        assert (form.ends, form.stops) == ([], [dialogue.STOP])
    else:
        known = ChatTemplate(tokenizer)
        assert whole == known.prompt(dialogue.read_messages(messages))
        assert (form.ends, form.stops) == ([[known.end_id]], [])


@pytest.mark.parametrize(
    ("messages", "param"),
    [
        (None, "messages"),
        ([], "messages"),
        ("Hi", "messages"),
        ({}, "messages"),
        (["Hi"], "messages[0]"),
        ([said("user", "x"), said("robot", "x")], "messages[1].role"),
        ([said(None, "x")], "messages[0].role"),
        ([said(["user"], "x")], "messages[0].role"),
        ([said("tool", "x")], "messages[0].role"),
        ([said("user", None)], "messages[0].content"),
        ([said("user", 3)], "messages[0].content"),
        ([said("user", ["x"])], "messages[0].content[0]"),
        ([said("user", [{"type": "image_url", "image_url": {}}])], "messages[0].content[0]"),
        ([said("user", [{"type": "text"}])], "messages[0].content[0].text"),
        ([said("user", [{"type": "text", "text": "x", "more": 1}])], "messages[0].content[0].more"),
        ([said("user", "x", tool_calls=[{}])], "messages[0].tool_calls"),
        ([said("user", "x", colour="red")], "messages[0].colour"),
    ],
)
def test_what_is_no_conversation_is_refused(messages, param):
    with pytest.raises(Refusal) as refused:
        transcript(messages)
    assert (refused.value.status, refused.value.param) == (400, param)
