"""Conversations: what a message is, and the tokens that stand for it, in training and in the answers of a model.

The template, for the messages of a system, a user and an assistant:

    System:
    Be brief.<|unk|>
    User:
    What is the capital of France?<|unk|>
    Assistant:
    Paris.<|unk|>

`<|unk|>` is the special token that ends a message. A byte-level tokenizer never makes it from a text, so no message can
hold it: what a message says cannot end it, or begin another. The line with the role, the content and the line break
after `<|unk|>` are encoded one by one, so that a conversation has the same tokens however it is cut into turns.
"""

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np

from lepton.data.tokenizer import Tokenizer
from lepton.errors import InputError, nearest, shown

TEMPLATE = "lepton-1"
"""Name of this template, which a data set and a checkpoint record."""
HEADERS = {"system": "System:\n", "user": "User:\n", "assistant": "Assistant:\n"}
"""The line before the content of a message, by its role."""
END = "<|unk|>"
ANSWER = 1 << 16
"""Flag of a marked token that belongs to an answer; token ids lie below."""


class Message(NamedTuple):
    """One message of a conversation."""

    role: str
    content: str


class ChatTemplate:
    """The template with the ids of a tokenizer."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        """Look up the ids. Raises InputError for a tokenizer without the special token `END`."""
        end = tokenizer.special_id(END)
        if end is None:
            raise InputError(
                f"the tokenizer has no special token {END}, which ends a message: take LEPTON's own, or train one "
                "with: python -m lepton tokenizer train"
            )
        self.end_id: int = end
        """Ends a message: where an answer stops."""
        self._tokenizer = tokenizer
        self._headers = {role: tokenizer.encode(header) for role, header in HEADERS.items()}
        self._after = [end, *tokenizer.encode("\n")]

    def message(self, message: Message) -> list[int]:
        """Return the ids of a message, from its header to the line break behind its end."""
        return [*self._headers[message.role], *self._tokenizer.encode(message.content), *self._after]

    def prompt(self, messages: Iterable[Message]) -> list[int]:
        """Return the ids of `messages` and of the header of the answer to them."""
        ids = [token for message in messages for token in self.message(message)]
        return ids + self._headers["assistant"]

    def closing(self, last: int, eos_id: int) -> list[int]:
        """Return the ids between the answer that a model has drawn and the next message.

        `last` is the last token of the answer, which no pass has read yet. It is the first of the ids, but for the end
        of a document, which would make the model forget the conversation.
        """
        return self._after if last in (self.end_id, eos_id) else [last, *self._after]

    def marked(self, messages: Sequence[Message], eos_id: int) -> np.ndarray:
        """Return the ids of a whole conversation, uint32 [N], those of answers with the flag `ANSWER`.

        An answer is the content of a message of the assistant, and its end. The document's end follows the last
        message.
        """
        parts: list[tuple[list[int], int]] = []
        for message in messages:
            content = [*self._tokenizer.encode(message.content), self.end_id]
            flag = ANSWER if message.role == "assistant" else 0
            parts += [(self._headers[message.role], 0), (content, flag), (self._after[1:], 0)]
        parts.append(([eos_id], 0))
        return np.concatenate([np.array(ids, np.uint32) | np.uint32(flag) for ids, flag in parts])


def read_messages(entry: Any, field: str, place: str) -> list[Message]:
    """Return the messages of a conversation: a list of {"role": ..., "content": ...}, or an object that holds it.

    A system message may come first; user and assistant then take turns, and the assistant has the last word.

    Args:
        entry: a value of JSON.
        field: name of the list in an object.
        place: names the entry in messages, such as a file and a line.

    Raises:
        InputError: what is wrong with the conversation, with its place.
    """
    if isinstance(entry, dict):
        if field not in entry:
            found = " ".join(", ".join(map(str, entry)).split())[:200]
            raise InputError(f"{place}: no field '{field}' (found: {found}); name that of the messages: --text_field")
        entry = entry[field]
    if not isinstance(entry, list):
        raise InputError(f"{place}: {shown(entry)} is no list of messages: give [{{'role': ..., 'content': ...}}, ...]")
    messages = [_message(message, f"{place}, message {number}") for number, message in enumerate(entry, 1)]
    expected = "user"
    for number, message in enumerate(messages, 1):
        if message.role == "system" and number == 1:
            continue
        if message.role != expected:
            raise InputError(
                f"{place}, message {number}: is of role '{message.role}' where the {expected} must speak: a system "
                "message may come first, then user and assistant take turns"
            )
        expected = "assistant" if expected == "user" else "user"
    if not messages or expected == "assistant" or messages[-1].role != "assistant":
        raise InputError(f"{place}: the conversation does not end with an answer: remove it, or its last message")
    return messages


def _message(value: Any, place: str) -> Message:
    if not isinstance(value, dict) or not {"role", "content"} <= value.keys():
        raise InputError(f"{place}: {shown(value)} is no message: give an object with 'role' and 'content'")
    role, content = value["role"], value["content"]
    if not isinstance(role, str) or role not in HEADERS:
        raise InputError(f"{place}: unknown role {shown(role)}{nearest(role, HEADERS)}")
    if not isinstance(content, str):
        raise InputError(f"{place}: its content is {shown(content)}: give a text")
    return Message(role, content)
