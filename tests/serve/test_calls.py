"""Requests under way: clients that leave, and time that is over."""

import asyncio
import json
import socket

import pytest

from lepton.serve.calls import ClientLeft, watched
from lepton.serve.limits import Limits, Refusal
from tests.serve.http import Running, until

ENDLESS = {"prompt": "x", "max_tokens": 100_000, "temperature": 0}
"""A text in which the most probable token is the same one forever."""
LONG = Limits(max_tokens=1_000_000, max_request=2_000_000, max_streams=4)


@pytest.fixture(scope="module")
def patient(model, tokenizer):
    """A server that lets answers run for long, one at a time."""
    with Running(model, tokenizer, limits=LONG, places=1) as running:
        yield running


def start(server, **fields):
    """Send a request and return its connection."""
    connection = server.connection()
    body = json.dumps(ENDLESS | fields)
    connection.request("POST", "/v1/completions", body, {"Content-Type": "application/json"})
    return connection


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_frees_its_place(patient, stream):
    """The only place: the next request gets it."""
    cancelled = patient.api.calls.cancelled
    connection = start(patient, stream=stream)
    until(lambda: patient.api.calls.worker.running)
    if stream:
        response = connection.getresponse()
        assert response.readline().startswith(b"data: ")
        response.close()
    connection.close()
    assert patient.complete("x", max_tokens=3)["usage"]["completion_tokens"] == 3
    assert patient.api.calls.cancelled == cancelled + 1
    patient.quiet()
    _, _, text = patient.request("GET", "/metrics")
    if not stream:
        assert b'lepton_requests_total{path="/v1/completions",code="499"} 1' in text


def test_a_client_that_leaves_while_it_waits_is_forgotten(patient):
    first = start(patient)
    until(lambda: patient.api.calls.worker.running)
    second = start(patient)
    until(lambda: patient.api.calls.worker.waiting)
    second.close()
    until(lambda: not patient.api.calls.worker.waiting)
    assert patient.api.calls.worker.running == 1
    first.close()
    patient.quiet()


def test_too_many_answers_at_once_are_refused(patient):
    connections = [start(patient) for _ in range(4)]
    until(lambda: patient.api.calls.worker.waiting == 3)
    body = json.dumps(ENDLESS)
    status, headers, body = patient.request("POST", "/v1/completions", body, content_type="application/json")
    error = json.loads(body)["error"]
    assert (status, error["type"], error["code"]) == (429, "rate_limit_error", "too_many_requests")
    assert headers["retry-after"] == "1"
    assert patient.get("/health")[1] == {"status": "ok", "model": "lepton", "running": 1, "waiting": 3}
    for connection in connections:
        connection.close()
    patient.quiet()


def test_a_client_that_leaves_in_the_middle_of_its_body(patient):
    lines = ["POST /v1/completions HTTP/1.1", "Host: localhost", "Content-Type: application/json", "Content-Length: 99"]
    with socket.create_connection(("127.0.0.1", patient.port)) as client:
        client.sendall("\r\n".join([*lines, "", "{"]).encode())
    until(lambda: b'code="499"' in patient.request("GET", "/metrics")[2])
    assert patient.complete("x", max_tokens=1)


def test_time_that_is_over(model, tokenizer):
    limits = Limits(max_tokens=1_000_000, max_request=2_000_000, max_seconds=1)
    with Running(model, tokenizer, limits=limits) as server:
        status, found = server.post("/v1/completions", ENDLESS)
        assert (status, found["error"]["code"]) == (408, "timeout")
        body = json.dumps(ENDLESS | {"stream": True})
        status, _, text = server.request("POST", "/v1/completions", body, content_type="application/json")
        assert status == 200
        *_, last, rest = text.decode().split("\n\n")
        assert (json.loads(last.removeprefix("data: "))["error"]["code"], rest) == ("timeout", "")
        server.quiet()


def test_closing_ends_what_is_left(model, tokenizer):
    """A reply that has not begun when the server stops for good is an error with a status."""
    with Running(model, tokenizer, limits=LONG, places=1) as server:
        connection = start(server)
        until(lambda: server.api.calls.worker.running)
        server.api.calls.worker.close()
        response = connection.getresponse()
        assert (response.status, json.loads(response.read())["error"]["code"]) == (503, "stopping")
        connection.close()
        assert server.get("/health")[0] == 503


def test_an_error_of_the_model_is_told(model, tokenizer, monkeypatch):
    from lepton.engine.runner import Runner

    def failing(self, work):
        raise RuntimeError("no numbers")

    with Running(model, tokenizer) as server, monkeypatch.context() as patch:
        patch.setattr(Runner, "prefill", failing)
        for stream in (False, True):
            status, found = server.post("/v1/completions", {"prompt": "x", "stream": stream})
            assert (status, found["error"]["type"]) == (500, "server_error")
            assert found["error"]["message"] == "the model failed: no numbers"
        patch.undo()
        assert server.complete("x", max_tokens=2)


def messages(*kinds):
    """ASGI's function that gives messages of these kinds, then none."""
    left = list(kinds)

    async def receive():
        if not left:
            await asyncio.sleep(60)
        return {"type": left.pop(0)}

    return receive


def test_watched_work_is_cancelled_when_nobody_wants_it():
    ended = []

    async def work(seconds):
        try:
            await asyncio.sleep(seconds)
            return "done"
        finally:
            ended.append(seconds)

    assert asyncio.run(watched(work(0), messages("http.request"), 60)) == "done"
    with pytest.raises(ClientLeft):
        asyncio.run(watched(work(50), messages("http.request", "http.disconnect"), 60))
    with pytest.raises(Refusal, match="longer than the server allows"):
        asyncio.run(watched(work(51), messages(), 0.01))
    assert ended == [0, 50, 51]
