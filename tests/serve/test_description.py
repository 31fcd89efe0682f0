"""The OpenAPI document: every route and every field of a body is in it, and nothing else."""

import json
import re

import pytest

from lepton.serve.description import REFUSED, chat, completion, description
from lepton.serve.fields import Fields
from lepton.serve.limits import Limits, Refusal
from lepton.serve.requests import Reader

BODIES = {
    "/v1/completions": ({"prompt": "x"}, completion),
    "/v1/chat/completions": ({"messages": [{"role": "user", "content": "x"}]}, chat),
}


@pytest.fixture(scope="module")
def reader(model, tokenizer):
    return Reader(model, tokenizer, "lepton", Limits(max_tokens=33, max_choices=6))


def test_every_route_is_there(server):
    status, found = server.get("/openapi.json")
    assert status == 200
    assert found == json.loads(json.dumps(description(server.api.reader)))
    routes = {(route.path, method.lower()) for route in server.api.app().routes for method in route.methods}
    listed = {(path, method) for path, methods in found["paths"].items() for method in methods}
    assert listed == {(path, method) for path, method in routes if method != "head"}
    for path, methods in found["paths"].items():
        for route in methods.values():
            assert [each["name"] for each in route["parameters"]] == re.findall(r"\{(\w+)\}", path)
            assert {*route["responses"]} == {"200", *REFUSED}


@pytest.mark.parametrize("path", BODIES)
def test_every_field_is_there_and_no_other(reader, path, monkeypatch):
    body, schema = BODIES[path]
    known = []
    finish = Fields.finish
    monkeypatch.setattr(Fields, "finish", lambda fields: known.append(fields._known) or finish(fields))
    reader.task(json.dumps(body).encode(), chat="chat" in path)
    (taken,) = [names for names in known if "temperature" in names]
    found = schema(reader)
    assert {*found["properties"]} == {*taken}
    assert found["additionalProperties"] is False


def bounds(reader):
    """Each bounded number of both bodies: its path, name, and a value inside and one outside of each bound."""
    for path, (_, schema) in BODIES.items():
        for name, field in schema(reader)["properties"].items():
            (kind, *_) = field.get("anyOf", [field])
            for bound, step in (("minimum", -1), ("maximum", 1)):
                if bound in kind:
                    yield path, name, kind[bound], kind[bound] + step


def test_numbers_have_the_bounds_that_the_reader_has(reader):
    tried = 0
    for path, name, inside, outside in bounds(reader):
        body, is_chat = BODIES[path][0] | ({"logprobs": True} if "chat" in path else {}), "chat" in path
        reader.task(json.dumps(body | {name: inside}).encode(), chat=is_chat)
        with pytest.raises(Refusal) as caught:
            reader.task(json.dumps(body | {name: outside}).encode(), chat=is_chat)
        assert caught.value.param == name
        tried += 1
    assert tried > 20
