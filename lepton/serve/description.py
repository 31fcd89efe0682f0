"""What the server takes and gives, as an OpenAPI document: `/openapi.json`."""

from collections.abc import Mapping
from typing import Any, TypeAlias

from lepton import __version__
from lepton.serve.requests import (
    CONVERSATION,
    LONGEST_STOP,
    MOST_PROBABLE,
    MOST_STOPS,
    NEUTRAL,
    NOTES,
    Reader,
)
from lepton.values import SEEDS

Schema: TypeAlias = dict[str, Any]

BINARY, FLAG, TEXT = {"type": "string", "format": "binary"}, {"type": "boolean"}, {"type": "string"}
ROLES = ("system", "developer", "user", "assistant")
ERROR = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": TEXT,
                "type": TEXT,
                "param": {"type": ["string", "null"]},
                "code": {"type": ["string", "null"]},
            },
        }
    },
}
REFUSED = ("400", "401", "403", "404", "405", "408", "409", "413", "415", "429", "503")
"""Statuses of requests that are not served: each reply says what is wrong and what to do. 503 comes while the server
stops, or once its engine has failed."""


def description(reader: Reader) -> Schema:
    """Return the OpenAPI document of a server that reads requests with `reader`."""
    name, crystals = _parameter("name"), "its crystals as texts, the oldest first"
    slots = [_parameter("id"), _parameter("slot")]
    stream = {"text/event-stream": {"schema": TEXT}}
    paths = {
        "/": {"get": _route("a page to write and talk with the model", found={"text/html": {"schema": TEXT}})},
        "/openapi.json": {"get": _route("this document")},
        "/health": {"get": _route("whether the server can answer, and how much it has to do")},
        "/metrics": {
            "get": _route("everything that is counted, for Prometheus", found={"text/plain": {"schema": TEXT}})
        },
        "/v1/models": {"get": _route("the one model")},
        "/v1/models/{name}": {"get": _route("the model of this name", [name])},
        "/v1/completions": {"post": _route("the continuation of prompts", body=completion(reader), more=stream)},
        "/v1/chat/completions": {"post": _route("the next message of a conversation", body=chat(reader), more=stream)},
        "/v1/conversations": {
            "get": _route("the conversations of this key"),
            "post": _route("begin a conversation", body=_object({"id": _conversation()})),
        },
        "/v1/conversations/{id}": {
            "get": _route("what is known of a conversation", slots[:1]),
            "delete": _route("forget a conversation", slots[:1]),
        },
        "/v1/conversations/{id}/memory": {"get": _route(crystals, slots[:1])},
        "/v1/conversations/{id}/memory/{slot}": {"delete": _route("take one crystal out", slots)},
        "/v1/conversations/{id}/state": {
            "get": _route("its state as a file", slots[:1], found={"application/octet-stream": {"schema": BINARY}}),
            "put": _route("go on from such a file", slots[:1], body=BINARY, kind="application/octet-stream"),
        },
    }
    return {
        "openapi": "3.1.0",
        "info": {"title": "LEPTON", "version": __version__, "license": {"name": "MIT", "identifier": "MIT"}},
        "components": {"securitySchemes": {"key": {"type": "http", "scheme": "bearer"}}},
        "security": [{}, {"key": []}],
        "paths": paths,
    }


def completion(reader: Reader) -> Schema:
    """Return the schema of a body for `/v1/completions`."""
    ids = {"type": "array", "items": _whole(0, reader.model.config.vocab_size - 1), "minItems": 1}
    several = [
        {"type": "array", "items": each, "minItems": 1, "maxItems": reader.limits.max_choices} for each in (TEXT, ids)
    ]
    own = {"prompt": {"anyOf": [TEXT, ids, *several]}, "echo": FLAG, "logprobs": _whole(0, MOST_PROBABLE)}
    return _object(own | _common(reader), ("prompt",))


def chat(reader: Reader) -> Schema:
    """Return the schema of a body for `/v1/chat/completions`."""
    message = {
        "type": "object",
        "required": ["role", "content"],
        "properties": {"role": {"enum": [*ROLES]}, "content": TEXT},
    }
    own = {
        "messages": {"type": "array", "items": message, "minItems": 1},
        "conversation": _conversation(),
        "logprobs": FLAG,
        "top_logprobs": _whole(0, MOST_PROBABLE),
        "max_completion_tokens": _whole(0, reader.limits.max_tokens),
    }
    return _object(own | _common(reader), ("messages",))


def _common(reader: Reader) -> Schema:
    """Return the fields of both kinds of bodies."""
    limits, share = reader.limits, {"type": "number", "minimum": 0, "maximum": 1}
    stop = TEXT | {"minLength": 1, "maxLength": LONGEST_STOP}
    options = {"include_usage": FLAG, "include_obfuscation": {"const": False}}
    own = {
        "model": {"const": reader.name},
        "max_tokens": _whole(0, limits.max_tokens),
        "temperature": {"type": "number", "minimum": 0},
        "top_p": {"type": "number", "exclusiveMinimum": 0, "maximum": 1},
        "top_k": _whole(1, reader.model.config.vocab_size),
        "seed": _whole(*SEEDS),
        "stop": {"anyOf": [stop, {"type": "array", "items": stop, "maxItems": MOST_STOPS}]},
        "n": _whole(1, limits.max_choices),
        "stream": FLAG,
        "stream_options": _object(options),
        "depth": share,
        "max_cost": {"type": "number", "exclusiveMinimum": 0},
        "think": _whole(0, limits.max_think),
        "use_speculative": FLAG,
        "abstain_at": {"type": "number", "exclusiveMinimum": 0, "exclusiveMaximum": 1},
    }
    return own | {name: {"enum": [*values]} for name, values in NEUTRAL.items()} | {name: {} for name in NOTES}


def _route(
    summary: str,
    parameters: list[Schema] | None = None,
    *,
    body: Schema | None = None,
    kind: str = "application/json",
    found: Mapping[str, Any] | None = None,
    more: Mapping[str, Any] | None = None,
) -> Schema:
    """Return a route; `found` is what it gives where that is no JSON, `more` what it may give beside."""
    content = dict(found or {"application/json": {"schema": {"type": "object"}}}) | dict(more or {})
    refused = {"description": "refused", "content": {"application/json": {"schema": ERROR}}}
    answers = {"200": {"description": summary, "content": content}} | dict.fromkeys(REFUSED, refused)
    route: Schema = {"summary": summary, "parameters": parameters or [], "responses": answers}
    return route if body is None else route | {"requestBody": {"required": True, "content": {kind: {"schema": body}}}}


def _parameter(name: str) -> Schema:
    return {"name": name, "in": "path", "required": True, "schema": TEXT}


def _object(fields: Schema, required: tuple[str, ...] = ()) -> Schema:
    """Return the schema of an object; null stands for a field that is left out."""
    optional = {
        name: field if name in required else {"anyOf": [field, {"type": "null"}]} for name, field in fields.items()
    }
    return {"type": "object", "properties": optional, "required": [*required], "additionalProperties": False}


def _whole(low: int, high: int) -> Schema:
    return {"type": "integer", "minimum": low, "maximum": high}


def _conversation() -> Schema:
    return TEXT | {"pattern": f"^{CONVERSATION.pattern}$"}
