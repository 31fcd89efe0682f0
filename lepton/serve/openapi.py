"""The server's description of itself, OpenAPI 3.1: its routes, and the bodies as what reads them says.

The form of bodies comes from the fields that are read (`lepton.serve.fields`), names and bounds of paths from the
routes. The form of replies is written here.
"""

import re
from collections.abc import Iterable
from typing import Any

from lepton import __version__
from lepton.serve.conversation_routes import BEGIN, SLOT
from lepton.serve.fields import Schema
from lepton.serve.http import OPEN
from lepton.serve.metrics import CONTENT_TYPE
from lepton.serve.requests import NAMED, Reader

JSON, FILE, EVENTS = "application/json", "application/octet-stream", "text/event-stream"
TEXT, WHOLE, REAL, FLAG = ({"type": kind} for kind in ("string", "integer", "number", "boolean"))
BYTES = TEXT | {"format": "binary"}
STATE = "/v1/conversations/{id}/state"
IN_PATHS: dict[str, Schema] = {"id": NAMED, "slot": TEXT | {"pattern": f"^{SLOT}$"}, "name": TEXT}
"""What the parts of paths may be."""


def _object(**known: Schema) -> Schema:
    return {"type": "object", "properties": known, "required": [*known], "additionalProperties": False}


def _array(items: Schema) -> Schema:
    return {"type": "array", "items": items}


def _or_null(schema: Schema) -> Schema:
    return {"anyOf": [schema, {"type": "null"}]}


ERROR = _object(error=_object(message=TEXT, type=TEXT, param=_or_null(TEXT), code=_or_null(TEXT)))
MODEL = _object(
    id=TEXT,
    object={"const": "model"},
    created=WHOLE,
    owned_by=TEXT,
    parameters=WHOLE,
    ideas=_array(TEXT),
    layers=WHOLE,
    stem_layers=WHOLE,
    rounds=WHOLE,
    max_tokens=WHOLE,
    max_think=WHOLE,
    risks=_array(REAL),
    costs=_array(REAL),
)
CONVERSATION = _object(id=TEXT, object={"const": "conversation"}, created_at=WHOLE, turns=WHOLE, tokens=WHOLE)
CRYSTAL = _object(object={"const": "crystal"}, slot=WHOLE, score=REAL, token=TEXT, text=TEXT)
USAGE = _object(
    **dict.fromkeys(("prompt_tokens", "completion_tokens", "total_tokens", "drafted_tokens", "accepted_tokens"), WHOLE)
)
ENDS = {
    "finish_reason": {"enum": ["length", "stop"]},
    "ended_by": {"enum": ["length", "stop", "end_of_document"]},
    "logprobs": _or_null({"type": "object"}),
}
MESSAGE = _object(role={"const": "assistant"}, content=TEXT, refusal={"type": "null"})


def _listed(items: Schema) -> Schema:
    return _object(object={"const": "list"}, data=_array(items))


def _choice(**known: Schema) -> Schema:
    """Return what a choice is; with `abstain_at` it also says where in its text the model abstains."""
    found = _object(index=WHOLE, **known, **ENDS)
    found["properties"]["abstained"] = _array(_array(WHOLE))
    return found


def _answer(kind: str, choice: Schema, **more: Schema) -> dict[str, Any]:
    """Return the contents of a reply with answers: whole, or streamed as events whose data are of nearly this form."""
    head: dict[str, Schema] = {"id": TEXT, "object": {"const": kind}, "created": WHOLE, "model": TEXT}
    head |= {"system_fingerprint": TEXT, "seed": WHOLE, "choices": _array(choice), "usage": USAGE}
    whole = _object(**head)
    whole["properties"] |= more
    return {JSON: {"schema": whole}, EVENTS: {"schema": TEXT}}


REPLIES: dict[tuple[str, str], dict[str, Any]] = {
    ("get", "/"): {"text/html": {"schema": TEXT}},
    ("get", "/health"): {
        JSON: {"schema": _object(status={"enum": ["ok", "failed"]}, model=TEXT, running=WHOLE, waiting=WHOLE)}
    },
    ("get", "/metrics"): {CONTENT_TYPE.partition(";")[0]: {"schema": TEXT}},
    ("get", "/openapi.json"): {JSON: {"schema": {"type": "object"}}},
    ("get", "/v1/models"): {JSON: {"schema": _listed(MODEL)}},
    ("get", "/v1/models/{name}"): {JSON: {"schema": MODEL}},
    ("post", "/v1/completions"): _answer("text_completion", _choice(text=TEXT)),
    ("post", "/v1/chat/completions"): _answer("chat.completion", _choice(message=MESSAGE), conversation=TEXT),
    ("get", "/v1/conversations"): {JSON: {"schema": _listed(CONVERSATION)}},
    ("post", "/v1/conversations"): {JSON: {"schema": CONVERSATION}},
    ("get", "/v1/conversations/{id}"): {JSON: {"schema": CONVERSATION}},
    ("delete", "/v1/conversations/{id}"): {
        JSON: {"schema": _object(id=TEXT, object={"const": "conversation.deleted"}, deleted=FLAG)}
    },
    ("get", "/v1/conversations/{id}/memory"): {JSON: {"schema": _listed(CRYSTAL)}},
    ("delete", "/v1/conversations/{id}/memory/{slot}"): {JSON: {"schema": _listed(CRYSTAL)}},
    ("get", STATE): {FILE: {"schema": BYTES}},
    ("put", STATE): {JSON: {"schema": CONVERSATION}},
}
"""What each route replies if all goes well."""


def description(routes: Iterable[Any], reader: Reader, *, with_keys: bool) -> dict[str, Any]:
    """Return the description of a server with these routes of Starlette; `with_keys`: clients must give a key."""
    bodies = {
        ("post", "/v1/completions"): {JSON: {"schema": reader.schema(chat=False)}},
        ("post", "/v1/chat/completions"): {JSON: {"schema": reader.schema(chat=True)}},
        ("post", "/v1/conversations"): {JSON: {"schema": BEGIN}},
        ("put", STATE): {FILE: {"schema": BYTES}},
    }
    paths: dict[str, Any] = {}
    for route in routes:
        for method in sorted(each.lower() for each in route.methods - {"HEAD"}):
            place = method, route.path
            paths.setdefault(route.path, {})[method] = _operation(route, REPLIES[place], bodies.get(place), with_keys)
    about = "A server of OpenAI's form for a LEPTON, with fields and routes of its own."
    key = {"type": "http", "scheme": "bearer", "description": "One of the server's keys."}
    return {
        "openapi": "3.1.0",
        "info": {"title": "LEPTON", "version": __version__, "description": about},
        "paths": paths,
        "components": {
            "schemas": {"Error": ERROR},
            "responses": {
                "Refused": {
                    "description": "A request that is not served: an error that names the value and says what to do.",
                    "content": {JSON: {"schema": {"$ref": "#/components/schemas/Error"}}},
                }
            },
        }
        | ({"securitySchemes": {"key": key}} if with_keys else {}),
    }


def _operation(route: Any, reply: Schema, body: Schema | None, with_keys: bool) -> dict[str, Any]:
    """Return what is said of a route's one method."""
    parts = re.findall(r"\{(\w+)\}", route.path)
    found = {
        "operationId": route.endpoint.__name__,
        "summary": route.endpoint.__doc__.partition("`: ")[2].partition("\n")[0],
        "responses": {
            "200": {"description": "What was asked for.", "content": reply},
            "default": {"$ref": "#/components/responses/Refused"},
        },
    }
    if parts:
        found["parameters"] = [{"name": p, "in": "path", "required": True, "schema": IN_PATHS[p]} for p in parts]
    if body is not None:
        found["requestBody"] = {"required": True, "content": body}
    if with_keys and route.path not in OPEN:
        found["security"] = [{"key": []}]
    return found
