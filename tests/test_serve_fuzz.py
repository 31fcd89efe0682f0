"""The fuzzing of the server: what it takes for a fault, and what it says of memory."""

import json
from types import SimpleNamespace

import pytest

from benchmarks.serve_fuzz import Fuzz, Over, figures

CANARY = "tweet tweet"


@pytest.fixture
def fuzz(tmp_path):
    log = tmp_path / "log.txt"
    log.write_text("serving\n")
    return Fuzz(SimpleNamespace(ask=lambda value: CANARY, port=1, log=log), 10, 1000)


def sent(status, body, listed=("200", "400")):
    """A request of schemathesis' and the reply to it."""
    reply = SimpleNamespace(status_code=status, content=body.encode())
    definition = SimpleNamespace(raw={"responses": dict.fromkeys(listed)})
    return SimpleNamespace(
        method="POST",
        formatted_path="/v1/completions",
        body={"prompt": "x"},
        operation=SimpleNamespace(definition=definition),
        call=lambda **given: reply,
    )


def error(message):
    return json.dumps({"error": {"message": message}})


def test_replies_as_they_should_be_are_no_fault(fuzz):
    fuzz._send(sent(200, "{}"))
    fuzz._send(sent(400, error("n=x: must be a whole number")))
    assert fuzz.faults == []
    assert fuzz.statuses == {"200": 1, "400": 1}


@pytest.mark.parametrize(
    ("status", "body", "fault"),
    [
        (500, "sorry", "500 b'sorry'"),
        (503, error("stopping"), "503"),
        (400, error(""), "400 without a message"),
        (201, "{}", "status 201 is not in the document"),
        (200, f"a {CANARY} b", "holds the text of another client"),
    ],
)
def test_faults_are_found(fuzz, status, body, fault):
    fuzz._send(sent(status, body))
    (found,) = fuzz.faults
    assert fault in found


def test_after_its_time_nothing_is_sent(fuzz):
    late = Fuzz(fuzz.server, 10, -1)
    with pytest.raises(Over):
        late._send(sent(200, "{}"))
    assert late.sent == 0


def test_memory_is_compared_from_the_first_tenth_to_the_end(fuzz):
    fuzz.statuses["200"] = 1000
    fuzz.memory = [(i, 50.0 + i if i < 100 else 300.0 + (i > 900)) for i in range(0, 1001, 10)]
    fuzz.server.log.write_text("serving\nTraceback (most recent call last)\n")
    found = figures(fuzz, 12.34)
    assert (found["megabytes_after_a_tenth"], found["megabytes_at_the_end"]) == (300.0, 301.0)
    assert (found["requests"], found["seconds"], found["tracebacks"]) == (1000, 12.3, 1)
