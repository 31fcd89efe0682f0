"""The description of the server holds each route and each field of a body, and nothing else."""

import json

import pytest

pytest.importorskip("jsonschema_rs", reason="comes with schemathesis: requirements-dev.txt")

import jsonschema_rs

from lepton.serve.fields import Fields
from lepton.serve.limits import Limits, Refusal
from lepton.serve.requests import NEUTRAL, Reader
from tests.serve.http import Running
from tests.serve.test_fuzz import GOOD

OWN = {
    "/v1/completions": {"prompt", "echo"},
    "/v1/chat/completions": {
        "messages", "max_completion_tokens", "top_logprobs", "conversation",
    },
}  # fmt: skip
SHARED = {
    "model", "logprobs", "n", "max_tokens", "seed", "temperature", "top_p", "top_k", "depth", "max_cost", "think",
    "use_speculative", "abstain_at", "stop", "stream", "stream_options", "user", "metadata", "safety_identifier",
    "prompt_cache_key",
}  # fmt: skip


@pytest.fixture(scope="module")
def described(server):
    return server.get("/openapi.json")[1]


def body_of(described, path, method="post"):
    (content,) = described["paths"][path][method]["requestBody"]["content"].values()
    return content["schema"]


def reply_of(described, path, method="get"):
    return described["paths"][path][method]["responses"]["200"]["content"]["application/json"]["schema"]


def test_each_route_is_in_it_and_no_other(server, described):
    routes = server.api.app().routes
    wanted = {(route.path, method.lower()) for route in routes for method in route.methods - {"HEAD"}}
    assert {(path, method) for path, known in described["paths"].items() for method in known} == wanted
    assert len(wanted) == 16
    for route in routes:
        for method in route.methods - {"HEAD"}:
            found = described["paths"][route.path][method.lower()]
            assert found["summary"], route.path
            assert [part["name"] for part in found.get("parameters", [])] == list(route.param_convertors)
    assert described["openapi"] == "3.1.0"


def test_the_library_of_the_fuzz_reads_it(described):
    schemathesis = pytest.importorskip("schemathesis")
    found = schemathesis.openapi.from_dict(described)
    found.validate()
    assert len([*found.get_all_operations()]) == 16


@pytest.mark.parametrize("path", OWN)
def test_each_field_of_a_body_is_in_it_and_no_other(described, path):
    found = body_of(described, path)
    assert found["properties"].keys() == OWN[path] | SHARED | NEUTRAL.keys()
    assert found["additionalProperties"] is False
    assert found["required"] == (["messages"] if "chat" in path else ["prompt"])


@pytest.mark.parametrize("path", OWN)
def test_no_field_of_it_is_unknown_to_the_reader_and_the_bounds_are_those_of_the_reader(server, described, path):
    """Values at the bounds are taken, those beyond are refused."""
    schema = body_of(described, path)
    base = {name: GOOD[path][name] for name in schema["required"]}

    def status(name, value):
        return server.post(path, base | {"max_tokens": 0, "logprobs": None, name: value})

    tried = 0
    for name, known in schema["properties"].items():
        assert status(name, None)[0] == (400 if name in schema["required"] else 200), name
        if {"max_cost", "abstain_at"} & {name} or "maximum" not in known:
            continue
        if name not in ("top_logprobs", "max_completion_tokens", "think", "max_tokens"):
            assert status(name, known["maximum"])[0] == 200, name
        assert status(name, known["maximum"] + (1e30 if name == "seed" else 1))[1]["error"]["param"] == name
        assert status(name, known.get("minimum", 0) - (1e30 if name == "seed" else 1))[1]["error"]["param"] == name
        tried += 1
    assert tried >= 7
    assert schema["properties"]["n"] == {"type": ["integer", "null"], "minimum": 1, "maximum": 6}
    assert schema["properties"]["top_p"] == {"type": ["number", "null"], "exclusiveMinimum": 0, "maximum": 1}
    assert status("top_p", 0)[1]["error"]["message"] == "top_p=0: must be a number above 0..1"


def test_what_is_inside_a_body_is_what_is_read(model, tokenizer, described, monkeypatch):
    """Of messages, their parts and the options of a stream."""
    read = {}

    def finish(fields):
        read[fields._place] = set(fields._known)
        finished(fields)

    finished = Fields.finish
    monkeypatch.setattr(Fields, "finish", finish)
    said = {"role": "user", "content": [{"type": "text", "text": "x"}]}
    body = {"messages": [said], "stream": True, "stream_options": {"include_usage": True}}
    Reader(model, tokenizer, "lepton", Limits()).task(json.dumps(body).encode(), chat=True)
    known = body_of(described, "/v1/chat/completions")["properties"]
    message = known["messages"]["items"]
    part = message["properties"]["content"]["anyOf"][1]["items"]
    assert read == {
        "": set(known),
        "messages[0].": set(message["properties"]),
        "messages[0].content[0].": set(part["properties"]),
        "stream_options.": set(known["stream_options"]["properties"]),
    }
    assert (message["required"], part["required"]) == (["role", "content"], ["type", "text"])


@pytest.mark.parametrize("path", OWN)
def test_what_the_description_allows_is_read_and_what_it_does_not_is_refused(server, described, path):
    valid = jsonschema_rs.validator_for(body_of(described, path)).is_valid
    good = {name: value for name, value in GOOD[path].items() if value is not None} | {"max_tokens": 1}
    assert valid(good)
    assert server.post(path, good)[0] == 200
    for change in (
        {"n": 0}, {"n": 1.5}, {"temperature": -1}, {"stop": [""]}, {"stop": ["x"] * 17}, {"depth": 1.1}, {"x": 1},
        {"stream_options": {"x": 1}}, {"tools": [1]}, {"model": "y"}, {"prompt": []}, {"messages": []},
        {"messages": [{"role": "user"}]}, {"messages": [{"role": "x", "content": ""}]}, {"think": 5},
    ):  # fmt: skip
        assert not valid(good | change), change
        assert server.post(path, good | change)[0] in (400, 404), change


def test_replies_are_as_it_says(server, described):
    def check(found, path, method="get"):
        jsonschema_rs.validate(reply_of(described, path, method), found)

    for path in ("/health", "/v1/models", "/v1/conversations"):
        check(server.get(path)[1], path)
    check(server.get("/v1/models/lepton")[1], "/v1/models/{name}")
    check(server.complete("fox", max_tokens=3, logprobs=2), "/v1/completions", "post")
    check(server.complete("fox", max_tokens=3, n=2), "/v1/completions", "post")
    check(server.post("/v1/conversations", {"id": "described"})[1], "/v1/conversations", "post")
    check(server.chat("fox " * 20, conversation="described"), "/v1/chat/completions", "post")
    check(server.get("/v1/conversations/described")[1], "/v1/conversations/{id}")
    found = server.get("/v1/conversations/described/memory")[1]
    check(found, "/v1/conversations/{id}/memory")
    status, _, state = server.request("GET", "/v1/conversations/described/state")
    assert status == 200
    status, _, body = server.request("PUT", "/v1/conversations/described/state", state)
    check(json.loads(body), "/v1/conversations/{id}/state", "put")
    place = f"/v1/conversations/described/memory/{found['data'][0]['slot']}"
    check(json.loads(server.request("DELETE", place)[2]), "/v1/conversations/{id}/memory/{slot}", "delete")
    gone = json.loads(server.request("DELETE", "/v1/conversations/described")[2])
    check(gone, "/v1/conversations/{id}", "delete")
    refused = described["components"]["schemas"]["Error"]
    for path in ("/v1/conversations/described", "/x", "/v1/models/x"):
        status, error = server.get(path)
        assert status == 404
        jsonschema_rs.validate(refused, error)


def test_the_key_is_in_it_where_there_are_keys(model, tokenizer, described):
    assert "securitySchemes" not in described["components"]
    with Running(model, tokenizer, keys=["k"]) as server:
        assert server.get("/openapi.json")[0] == 401
        found = server.get("/openapi.json", Authorization="Bearer k")[1]
    open_ = {path for path, known in found["paths"].items() if "security" not in next(iter(known.values()))}
    assert open_ == {"/", "/health"}
    assert found["components"]["securitySchemes"]["key"]["scheme"] == "bearer"


def test_a_small_limit_is_no_reason_to_fail(model, tokenizer):
    """The description is made also where the sample that it is read with would be too long."""
    reader = Reader(model, tokenizer, "x", Limits(max_prompt=1, max_tokens=1, max_request=1, max_choices=1))
    assert reader.schema(chat=True)["properties"]["n"]["maximum"] == 1
    with pytest.raises(Refusal, match="the prompt has"):
        reader.task(b'{"messages": [{"role": "user", "content": "x"}]}', chat=True)
