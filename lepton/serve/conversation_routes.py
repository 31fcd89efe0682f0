"""The routes of conversations that the server keeps: listed, begun, deleted, with their memory, loaded and saved."""

import asyncio
import re
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from lepton.errors import InputError
from lepton.serve.conversations import GIVEN, Conversation, Conversations
from lepton.serve.fields import Fields, Schema, parse_body, schema_of
from lepton.serve.http import OWNER, read_body, read_content, reply
from lepton.serve.limits import Refusal
from lepton.serve.replies import name_of
from lepton.serve.requests import CONVERSATION, NAMED, Reader

if TYPE_CHECKING:
    from starlette.requests import Request

SLOT = "-?[0-9]{1,12}"
"""What numbers of slots are."""
SPARE = 1 << 20
"""Bytes of a file beside the numbers of a state, at most."""


class ConversationRoutes:
    """What the routes below `/v1/conversations` do. Each sees the conversations of the key that was given."""

    def __init__(self, reader: Reader, conversations: Conversations) -> None:
        self._reader, self._kept = reader, conversations

    def routes(self) -> list[Any]:
        """Return the routes."""
        from starlette.routing import Route

        start = "/v1/conversations"
        return [
            Route(start, self.listed, methods=["GET"]),
            Route(start, self.begin, methods=["POST"]),
            Route(f"{start}/{{id}}", self.one, methods=["GET"]),
            Route(f"{start}/{{id}}", self.delete, methods=["DELETE"]),
            Route(f"{start}/{{id}}/memory", self.memory, methods=["GET"]),
            Route(f"{start}/{{id}}/memory/{{slot}}", self.remove, methods=["DELETE"]),
            Route(f"{start}/{{id}}/state", self.save, methods=["GET"]),
            Route(f"{start}/{{id}}/state", self.load, methods=["PUT"]),
        ]

    async def listed(self, request: "Request") -> Any:
        """`GET /v1/conversations`: those of this key, the oldest first, without any text."""
        found = [each.to_dict() for each in self._kept.of(request.scope[OWNER])]
        return reply({"object": "list", "data": found})

    async def begin(self, request: "Request") -> Any:
        """`POST /v1/conversations`: a new one, under the `id` of the body or one that is drawn."""
        name = _read_begin(Fields(parse_body(await read_body(request, self._reader.limits))))
        return reply(self._kept.create(request.scope[OWNER], name).to_dict())

    async def one(self, request: "Request") -> Any:
        """`GET /v1/conversations/ID`: what is known of one."""
        return reply(self._find(request).to_dict())

    async def delete(self, request: "Request") -> Any:
        """`DELETE /v1/conversations/ID`: forget one, on disk, too."""
        owner, name = _named(request)
        await self._kept.delete(owner, name)
        return reply({"id": name, "object": "conversation.deleted", "deleted": True})

    async def memory(self, request: "Request") -> Any:
        """`GET /v1/conversations/ID/memory`: its crystals as texts, the oldest first."""
        state = await self._kept.load(self._find(request))
        return reply({"object": "list", "data": [] if state is None else self._crystals(state.memory)})

    async def remove(self, request: "Request") -> Any:
        """`DELETE /v1/conversations/ID/memory/SLOT`: take one crystal out; the reply lists the others."""
        (owner, name), slot = _named(request), request.path_params["slot"]
        async with self._kept.change(owner, name) as found:
            try:
                if found.state is None or not re.fullmatch(SLOT, slot):
                    raise InputError("no such crystal")
                memory = found.state.memory.without(0, int(slot))
            except InputError:
                text = f"conversation {name!r} remembers no crystal {slot[:20]!r}: its list says which there are"
                raise Refusal(text, param="slot", code="slot_not_found", status=404) from None
            self._kept.commit(found, replace(found.state, memory=memory))
        return reply({"object": "list", "data": self._crystals(memory)})

    async def save(self, request: "Request") -> Any:
        """`GET /v1/conversations/ID/state`: the whole state as a safetensors file."""
        from starlette.responses import Response

        found = self._find(request)
        state, notes = await self._kept.load(found), found.notes
        if state is None:
            raise Refusal(f"conversation {notes.id!r} has read nothing yet", param="conversation", status=409)
        content = await asyncio.to_thread(self._kept.files.packed, notes, state)
        name = f'attachment; filename="{notes.id}.safetensors"'
        return Response(content, media_type="application/octet-stream", headers={"Content-Disposition": name})

    async def load(self, request: "Request") -> Any:
        """`PUT /v1/conversations/ID/state`: go on from such a file, in a new conversation or in place of its state."""
        (owner, name), limits = _named(request), self._reader.limits
        _check(name)
        tokens = min(limits.max_request, 1 << 16)  # without a window a state grows
        most = 2 * self._reader.model.state_bytes(tokens) + SPARE  # its numbers may be of twice the precision
        content = await read_content(request, most, limits.max_seconds)
        async with self._kept.change(owner, name, create=not name.startswith(GIVEN)) as found:
            try:
                notes, state = await asyncio.to_thread(self._kept.files.unpacked, found.notes, content)
            except InputError as error:
                raise Refusal(str(error)[:400], code="not_a_conversation") from None
            self._kept.commit(found, state, notes=notes)
        return reply(found.to_dict())

    def _find(self, request: "Request") -> Conversation:
        return self._kept.find(*_named(request))

    def _crystals(self, memory: Any) -> list[dict[str, Any]]:
        tokenizer = self._reader.tokenizer
        return [
            {
                "object": "crystal",
                "slot": each.position,
                "score": each.score,
                "token": name_of(tokenizer, each.tokens[-1]),
                "text": tokenizer.decode(each.tokens),
            }
            for each in memory
        ]


def _named(request: "Request") -> tuple[str, str]:
    """Return the owner and the id that a request is about."""
    return request.scope[OWNER], request.path_params["id"]


def _check(name: object) -> None:
    if not isinstance(name, str) or not CONVERSATION.fullmatch(name):
        raise Refusal("id: give 1 to 64 letters, digits, _ and -", param="id")


def _read_begin(fields: Fields) -> str | None:
    name = fields.take("id", schema=NAMED)
    fields.finish()
    if name is not None:
        _check(name)
    return name


BEGIN: Schema = schema_of(_read_begin, {})
"""What the body of a request that begins a conversation may be."""
