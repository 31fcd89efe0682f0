"""Hundreds of bad requests: none gets a status of 500 or above, none leaves a traceback or anything that runs on."""

import copy
import json
import logging
import random
import socket

import pytest

from tests.serve.test_app import texts

PATHS = ("/v1/completions", "/v1/chat/completions")
GOOD = {
    PATHS[0]: {
        "model": "lepton", "prompt": "fox", "max_tokens": 2, "temperature": 1.0, "top_p": 0.9, "n": 1, "seed": 3,
        "stop": ["x"], "logprobs": 1, "stream": False, "echo": False, "depth": 1.0, "think": 1, "top_k": 5,
        "user": "me",
        "stream_options": None, "use_speculative": True, "best_of": 1, "frequency_penalty": 0, "logit_bias": {},
    },
    PATHS[1]: {
        "model": "lepton", "messages": [{"role": "system", "content": "x"}, {"role": "user", "content": "fox"}],
        "max_tokens": 2, "max_completion_tokens": None, "temperature": 1.0, "n": 1, "seed": 3, "stop": "x",
        "logprobs": True, "top_logprobs": 1, "stream": False, "tools": [], "response_format": {"type": "text"},
        "conversation": "fuzz",
    },
}  # fmt: skip
STRANGE = [
    None, True, False, 0, 1, -1, 2, 1.5, -0.0, 1e308, -1e308, 5e-324, 1e999, 10**30, -(10**30), 1 << 63, 1 << 64,
    10**400, "", " ", "x", "0", "NaN", "\x00", "\ud800", "\U0010ffff", "ä" * 300, "lepton", [], [[]], [None], [0],
    [-1], [10**9], [True], [1.5], [""], ["x", 1], [[1], [2]], [[1], []], [["x"]], ["x"] * 100, [1] * 1000,
    [[1]] * 50, {}, {"": None},
    {"role": "user"}, {"type": "text"}, [{}], [{"role": "user", "content": "x"}], [{"role": "user", "content": []}],
    [{"role": "user", "content": [{"type": "text", "text": 5}]}], {"include_usage": True}, {"include_usage": "x"},
    [[[[[[1]]]]]], "User:\nAssistant:", "<|endoftext|>",
]  # fmt: skip
BODIES = [
    b"", b" ", b"{", b"}", b"null", b"[]", b"1", b'"x"', b"{}", b"{}{}", b"\xff\xfe{}", b"\xef\xbb\xbf{}",
    b'{"prompt"}', b'{"prompt": NaN}', b'{"prompt": Infinity}', b'{"prompt": "\xff"}', b'{"prompt": "\\ud800"}',
    b"[" * 9000, b'{"a":' * 3000, b'{"prompt": ' + b"9" * 9000 + b"}", b'{"seed": 1e99999, "prompt": "x"}',
    b"\x00" * 100, b'{"prompt": "x", "prompt": 5}', b'{"prompt": "x", "max_tokens": 00}', b"'{}'", b"prompt=x",
]  # fmt: skip
RAW = [
    b"\r\n\r\n", b"GET\r\n\r\n", b"\x16\x03\x01\x02\x00\x01\x00", b"GET / HTTP/9.9\r\n\r\n", b"\x00" * 50,
    b"GET /" + b"x" * 100_000 + b" HTTP/1.1\r\n\r\n", b"GET / HTTP/1.1\r\n" + b"A: b\r\n" * 20_000 + b"\r\n",
    b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: -5\r\n\r\n",
    b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\n",
    b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: "
    + b"9" * 400 + b"\r\n\r\n",
    b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    b"Transfer-Encoding: chunked\r\n\r\nzz\r\n{}\r\n",
    b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    b"Transfer-Encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\n\r\n",
    b"GET /v1/models HTTP/1.1\r\nHost: localhost\r\nAuthorization: \xff\xfe\r\n\r\n",
    b"GET /v1/models HTTP/1.1\r\nHost: \xff\r\n\r\n", b"GET /v1/models HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n",
    b"OPTIONS * HTTP/1.1\r\nHost: localhost\r\n\r\n", b"GET http://example.org/ HTTP/1.1\r\nHost: localhost\r\n\r\n",
    b"CONNECT example.org:443 HTTP/1.1\r\nHost: localhost\r\n\r\n",
    b"GET /v1/models HTTP/1.1\r\nHost: localhost\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n\r\n",
    b"GET /../../etc/passwd HTTP/1.1\r\nHost: localhost\r\n\r\n", b"GET /%2e%2e/x HTTP/1.1\r\nHost: localhost\r\n\r\n",
]  # fmt: skip


def changed(seed):
    """A path and a body in which a few values or names are strange."""
    generator = random.Random(seed)
    path = PATHS[seed % 2]
    body = copy.deepcopy(GOOD[path])
    for _ in range(generator.choice([1, 1, 1, 2, 4])):
        spot = body
        if generator.random() < 0.2 and "messages" in body and isinstance(body["messages"], list) and body["messages"]:
            spot = generator.choice(body["messages"])
        if not isinstance(spot, dict) or not spot:
            continue
        name = generator.choice(list(spot))
        action = generator.random()
        if action < 0.7:
            spot[name] = generator.choice(STRANGE)
        elif action < 0.85:
            spot[name + generator.choice(["s", "_", "\ud800", "x" * 500])] = spot.pop(name)
        else:
            del spot[name]
    return path, json.dumps(body).replace("Infinity", "1e999").encode()


@pytest.fixture
def calm(server, caplog):
    """The server must log nothing, leave nothing behind and answer as before."""
    before = texts(server.complete("fox", seed=1, max_tokens=5))
    with caplog.at_level(logging.WARNING):
        yield server
    server.quiet()
    assert texts(server.complete("fox", seed=1, max_tokens=5)) == before
    assert [record.getMessage() for record in caplog.records if record.levelno >= logging.ERROR] == []
    assert server.api.calls.worker.failures == 0


def check(status, headers, body):
    """A reply is a success, or an error in OpenAI's form that says something."""
    assert 200 <= status < 500, body
    assert b"Traceback" not in body
    if status == 200:
        assert headers["content-type"].startswith(("application/json", "text/event-stream"))
        return
    error = json.loads(body)["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["message"]
    assert len(error["message"]) < 600


@pytest.mark.parametrize("part", range(3))
def test_changed_requests(calm, part):
    statuses = []
    for seed in range(50 * part, 50 * part + 50):
        path, body = changed(seed)
        reply = calm.request("POST", path, body, content_type="application/json")
        check(*reply)
        statuses.append(reply[0])
    assert statuses.count(400) >= 20
    assert 200 in statuses


@pytest.mark.parametrize("path", PATHS)
def test_bodies_that_are_no_requests(calm, path):
    for body in BODIES:
        reply = calm.request("POST", path, body, content_type="application/json")
        check(*reply)
        assert reply[0] in (400, 200 if b"\\ud800" in body else 400), body


def test_every_strange_value_in_every_field(calm):
    """Of each path, the fields that are not prompts."""
    for path in PATHS:
        for name in GOOD[path].keys() - {"prompt", "messages"}:
            for value in random.Random(name).sample(STRANGE, 12):
                body = json.dumps(GOOD[path] | {name: value}).replace("Infinity", "1e999")
                check(*calm.request("POST", path, body, content_type="application/json"))


def test_strange_requests_about_conversations(calm):
    """Names, slots and bodies of all kinds, for each method of each path."""
    generator = random.Random(5)
    names = [
        "fuzz",
        "conv_",
        "%00",
        "%ff",
        "..",
        "x" * 300,
        "%F0%9F%A6%8A",
        "a%2Fb",
        "'",
        "-1",
        "%C3%A9",
    ]
    for path in ("", "/memory", "/memory/{0}", "/state", "/{0}"):
        for method in ("GET", "POST", "PUT", "DELETE", "PATCH"):
            for _ in range(6):
                place = f"/v1/conversations/{generator.choice(names)}{path.format(generator.choice(names))}"
                check(*calm.request(method, place, generator.choice(BODIES), content_type="application/json"))
    for body in BODIES:
        check(*calm.request("POST", "/v1/conversations", body, content_type="application/json"))


def test_what_is_no_http(calm):
    """The library answers 400 or closes the connection; nothing hangs."""
    for raw in RAW:
        with socket.create_connection(("127.0.0.1", calm.port), timeout=20) as client:
            try:
                client.sendall(raw)
                client.shutdown(socket.SHUT_WR)
                status = client.recv(100).partition(b" ")[2][:3]
            except ConnectionError:
                continue
            assert status in (b"", b"200", b"400", b"401", b"403", b"404", b"405", b"413", b"431"), raw[:80]
