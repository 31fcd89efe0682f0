"""Who is let in, what a body may be, and what is counted."""

import json

import pytest

from lepton.serve.limits import Limits
from tests.serve.http import Running


@pytest.fixture(scope="module")
def locked(model, tokenizer):
    with Running(model, tokenizer, keys=["open-sesame"], any_host=True) as running:
        yield running


BODY = {"prompt": "fox", "max_tokens": 2}


def test_without_the_key_nobody_is_let_in(locked):
    for headers in ({}, {"authorization": "Bearer x"}, {"authorization": "open-sesame"}, {"authorization": "Bearer "}):
        for path in ("/v1/models", "/metrics", "/nothing"):
            status, given, body = locked.request("GET", path, **headers)
            error = json.loads(body)["error"]
            assert (status, error["type"], error["code"]) == (401, "authentication_error", "invalid_api_key")
            assert given["www-authenticate"] == "Bearer"
        assert locked.post("/v1/completions", BODY, **headers)[0] == 401
    assert locked.get("/health")[0] == 200


def test_with_the_key_all_is_served(locked):
    for word in ("Bearer", "bearer"):
        headers = {"authorization": f"{word} open-sesame"}
        assert locked.get("/v1/models", **headers)[0] == 200
        assert locked.post("/v1/completions", BODY, **headers)[0] == 200
    assert locked.get("/v1/models", authorization="Bearer open-sesame", host="example.org")[0] == 200


def test_each_of_several_keys_lets_in(model, tokenizer):
    with Running(model, tokenizer, keys=["one", "two"], any_host=True) as running:
        for key, status in (("one", 200), ("two", 200), ("three", 401), ("onetwo", 401), ("", 401)):
            assert running.get("/v1/models", authorization=f"Bearer {key}")[0] == status


def test_a_server_without_a_key_goes_by_the_names_of_this_machine(server):
    """A page of the web may give its own name the address of this machine."""
    for host in ("127.0.0.1", "localhost", "localhost:8000", "[::1]:8000", "[::1]", "LOCALHOST"):
        assert server.get("/v1/models", host=host)[0] == 200
    for host in ("example.org", "example.org:8000", "127.0.0.1.example.org", ""):
        status, found = server.get("/v1/models", host=host)
        assert (status, found["error"]["code"]) == (403, "wrong_host")


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data", ""])
def test_a_body_must_be_said_to_be_json(server, kind):
    """Browsers send the other kinds to any server without asking it."""
    status, _, body = server.request("POST", "/v1/completions", json.dumps(BODY), content_type=kind)
    assert (status, json.loads(body)["error"]["type"]) == (415, "invalid_request_error")


def test_the_type_may_name_a_charset(server):
    body = json.dumps(BODY)
    status, *_ = server.request("POST", "/v1/completions", body, content_type="Application/JSON; charset=utf-8")
    assert status == 200


def test_a_large_body_is_refused(server):
    limit = server.api.limits.max_body
    fits = json.dumps(BODY | {"user": "x" * (limit - 60)})
    assert len(fits) <= limit
    assert server.request("POST", "/v1/completions", fits, content_type="application/json")[0] == 200
    large = b" " * (limit + 1)
    status, _, body = server.request("POST", "/v1/completions", large, content_type="application/json")
    assert (status, json.loads(body)["error"]["code"]) == (413, "body_too_large")
    # Without its length it is read no further than the limit.
    status, _, body = server.request("POST", "/v1/completions", iter([large]), content_type="application/json")
    assert (status, json.loads(body)["error"]["code"]) == (413, "body_too_large")


def test_unknown_paths_and_methods_have_openais_form(server):
    for method, path, expected in [
        ("GET", "/v1/nothing", 404),
        ("GET", "/v1/completions", 405),
        ("POST", "/v1/models", 405),
        ("DELETE", "/health", 405),
        ("GET", "/v1/models/%ff%00", 404),
        ("GET", "//", 404),
    ]:
        status, _, body = server.request(method, path)
        error = json.loads(body)["error"]
        assert (status, error["type"]) == (expected, "invalid_request_error"), path


def test_requests_are_counted_by_path_and_status(model, tokenizer):
    with Running(model, tokenizer, limits=Limits(max_tokens=5)) as server:
        server.complete("fox", max_tokens=5)
        server.post("/v1/completions", {"prompt": "fox", "max_tokens": 6})
        for _ in range(3):
            server.request("GET", "/secret/path")
        server.quiet()
        status, headers, body = server.request("GET", "/metrics")
    lines = body.decode().splitlines()
    assert (status, headers["content-type"]) == (200, "text/plain; version=0.0.4; charset=utf-8")
    assert 'lepton_requests_total{path="/v1/completions",code="200"} 1' in lines
    assert 'lepton_requests_total{path="/v1/completions",code="400"} 1' in lines
    assert 'lepton_requests_total{path="other",code="404"} 3' in lines
    assert "lepton_time_to_first_token_seconds_count 1" in lines
    assert "lepton_request_seconds_count 1" in lines
    assert "lepton_answers_running 0" in lines
    (tokens,) = [line for line in lines if line.startswith("lepton_tokens_total ")]
    assert 1 <= int(tokens.split()[1]) <= 5
