"""A conversation as a text: the messages become a transcript, which the model continues.

No LEPTON model has been trained on a form of its own for conversations. A transcript is what a model that has read
books knows.
"""

from typing import Any

from lepton.errors import shown
from lepton.serve.fields import Fields, clean
from lepton.serve.limits import Refusal

SPEAKERS = {"user": "User:", "assistant": "Assistant:"}
TOLD = ("system", "developer")
"""Roles whose messages stand in the text as they are."""
STOP = "\nUser:"
"""Ends an answer, beside the stop texts of the request."""


def transcript(messages: Any) -> str:
    """Return the text that an answer continues.

    What a model has answered, with or without the space at its beginning, gives the same text as before.
    """
    if not isinstance(messages, list) or not messages:
        raise Refusal(f"messages={shown(messages)}: give a list of at least one message", param="messages")
    text = "".join(_line(message, f"messages[{i}]") for i, message in enumerate(messages))
    return text + SPEAKERS["assistant"]


def _line(message: Any, place: str) -> str:
    if not isinstance(message, dict):
        raise Refusal(f"{place}={shown(message)}: give an object with role and content", param=place)
    fields = Fields(message, f"{place}.")
    role, content = fields.take("role"), fields.take("content")
    if not isinstance(role, str) or role not in (*SPEAKERS, *TOLD):
        fields.refuse("role", role, f"choose from {', '.join([*SPEAKERS, *TOLD])}")
    text = _text(content, fields, place)
    fields.take("name")  # of a person: it says nothing that a transcript has
    fields.allow({"refusal": [""], "tool_calls": [[]], "audio": [], "function_call": [], "annotations": [[]]})
    fields.finish()
    if role in TOLD:
        return f"{text}\n\n"
    return f"{SPEAKERS[role]}{'' if text.startswith(' ') else ' '}{text}\n"


def _text(content: Any, fields: Fields, place: str) -> str:
    """Return a message's content: a string, or a list of parts that are texts."""
    if isinstance(content, str):
        return clean(content)
    if not isinstance(content, list):
        fields.refuse("content", content, "give a string, or a list of parts of type text")
    texts = []
    for i, part in enumerate(content):
        if not isinstance(part, dict) or part.get("type") != "text":
            fields.refuse(f"content[{i}]", part, 'this model reads text alone: give {"type": "text", "text": ...}')
        own = Fields(part, f"{place}.content[{i}].")
        own.take("type")
        texts.append(own.text("text"))
        own.finish()
    return "".join(texts)
