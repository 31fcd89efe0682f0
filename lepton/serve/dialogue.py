"""A conversation: the messages of a request become the prompt of an answer.

A model that was trained on conversations gets them in the template of its training (`lepton.data.chat`). Any other gets
a transcript, which a model that has read books knows. Either is encoded message by message, and each answer opens
thoughts: so a conversation is read in the same way whole as turn by turn.
"""

from collections.abc import Iterable
from typing import Any

from lepton.data.chat import ChatTemplate, Message
from lepton.data.tokenizer import Tokenizer
from lepton.errors import shown
from lepton.serve.fields import Fields, Schema, clean, schema_of
from lepton.serve.limits import Refusal

SPEAKERS = {"user": "User:", "assistant": "Assistant:"}
TOLD = ("system", "developer")
"""Roles whose messages say how to answer."""
STOP = "\nUser:"
"""Ends an answer of a transcript, beside the stop texts of the request."""


def read_messages(messages: Any) -> list[Message]:
    """Return the messages of a request; those of a developer are of the system.

    Raises:
        Refusal: it is no conversation.
    """
    if not isinstance(messages, list) or not messages:
        raise Refusal(f"messages={shown(messages)}: give a list of at least one message", param="messages")
    return [_message(message, f"messages[{i}]") for i, message in enumerate(messages)]


def transcript(messages: Iterable[Message]) -> str:
    """Return the text that an answer continues.

    What a model has answered, with or without the space at its beginning, gives the same text as before.
    """
    return "".join(SPEAKERS.get(each.role, "") + _line(each) for each in messages) + SPEAKERS["assistant"]


def _line(message: Message) -> str:
    """Return a message without its speaker."""
    role, text = message
    if role == "system":
        return f"{text}\n\n"
    return f"{'' if text.startswith(' ') else ' '}{text}\n"


class Form:
    """How the messages of a conversation become tokens."""

    def __init__(self, tokenizer: Tokenizer, template: ChatTemplate | None = None) -> None:
        """`template` is that of the model's training; None: it was not trained on conversations."""
        self._tokenizer, self._template = tokenizer, template
        self.header = tokenizer.encode(SPEAKERS["assistant"]) if template is None else template.prompt([])
        """The ids before the text of an answer; the last one opens thoughts."""
        self.ends: list[list[int]] = [] if template is None else [[template.end_id]]
        """Sequences of ids that end an answer."""
        self.stops = [STOP] if template is None else []
        """Texts that end an answer."""

    def prompt(self, messages: Iterable[Message]) -> tuple[list[int], list[int]]:
        """Return the ids of `messages` and of the header of the answer to them, and where earlier answers opened."""
        ids: list[int] = []
        opens = []
        for message in messages:
            if message.role == "assistant":
                ids += self.header
                opens.append(len(ids) - 1)
                ids += self.answer(message.content)
            elif self._template is not None:
                ids += self._template.message(message)
            else:
                ids += self._tokenizer.encode(SPEAKERS.get(message.role, "") + _line(message))
        return ids + self.header, opens

    def answer(self, text: str) -> list[int]:
        """Return the ids of the text of an answer, and of what stands between it and the next message."""
        message = Message("assistant", text)
        if self._template is None:
            return self._tokenizer.encode(_line(message))
        return self._template.message(message)[len(self.header) :]


def _message(message: Any, place: str) -> Message:
    if not isinstance(message, dict):
        raise Refusal(f"{place}={shown(message)}: give an object with role and content", param=place)
    return _read_message(Fields(message, f"{place}."))


def _read_message(fields: Fields) -> Message:
    role = fields.take("role", schema={"enum": [*SPEAKERS, *TOLD]})
    if not isinstance(role, str) or role not in (*SPEAKERS, *TOLD):
        fields.refuse("role", role, f"choose from {', '.join([*SPEAKERS, *TOLD])}")
    text = _text(fields)
    fields.take("name")  # of a person: it says nothing that a prompt has
    fields.allow({"refusal": [""], "tool_calls": [[]], "audio": [], "function_call": [], "annotations": [[]]})
    fields.finish()
    return Message("system" if role in TOLD else role, text)


def _text(fields: Fields) -> str:
    """Return a message's content: a string, or a list of parts that are texts."""
    content = fields.take("content", schema={"anyOf": [{"type": "string"}, {"type": "array", "items": PART}]})
    if isinstance(content, str):
        return clean(content)
    if not isinstance(content, list):
        fields.refuse("content", content, "give a string, or a list of parts of type text")
    texts = []
    for i, part in enumerate(content):
        if not isinstance(part, dict) or part.get("type") != "text":
            fields.refuse(f"content[{i}]", part, 'this model reads text alone: give {"type": "text", "text": ...}')
        texts.append(_read_part(fields.inside(f"content[{i}]", part)))
    return "".join(texts)


def _read_part(fields: Fields) -> str:
    fields.take("type", schema={"enum": ["text"]})
    text = fields.text("text")
    fields.finish()
    return text


PART: Schema = schema_of(_read_part, {"type": "text", "text": ""})
"""What a part of a message's content may be."""
MESSAGES: Schema = {
    "type": "array",
    "minItems": 1,
    "items": schema_of(_read_message, {"role": "user", "content": ""}),
}
"""What the messages of a request may be."""
