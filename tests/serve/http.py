"""A server in a thread, and a client of the standard library."""

import http.client
import json
import threading
import time

import pytest

pytest.importorskip("starlette", reason="needs: pip install starlette uvicorn")
pytest.importorskip("uvicorn", reason="needs: pip install starlette uvicorn")

from lepton.serve.app import Api
from lepton.serve.limits import Limits
from lepton.serve.requests import Reader
from lepton.serve.server import listening, server_of


class Running:
    """A server on a free port of this machine, inside a `with` block."""

    def __init__(self, model, tokenizer, *, limits=None, name="lepton", template=None, **arguments):
        self.api = Api(Reader(model, tokenizer, name, limits or Limits(), template), **arguments)
        self.listener = listening("127.0.0.1", 0)
        self.port = self.listener.getsockname()[1]
        self.server = server_of(self.api)
        self.thread = threading.Thread(target=self.server.run, kwargs={"sockets": [self.listener]})

    def __enter__(self):
        self.thread.start()
        until(lambda: self.server.started)
        return self

    def __exit__(self, *error):
        self.server.should_exit = True
        self.thread.join()
        self.listener.close()

    def connection(self):
        return http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)

    def request(self, method, path, body=None, **headers):
        """Return the status, the headers and the body of a reply."""
        connection = self.connection()
        try:
            connection.request(method, path, body, {name.replace("_", "-"): value for name, value in headers.items()})
            response = connection.getresponse()
            return response.status, dict(response.getheaders()), response.read()
        finally:
            connection.close()

    def get(self, path, **headers):
        """Return the status and the JSON of a reply."""
        status, _, body = self.request("GET", path, **headers)
        return status, json.loads(body)

    def post(self, path, value, **headers):
        """Send a value as JSON; return the status and the JSON of the reply."""
        body = json.dumps(value)
        status, _, body = self.request("POST", path, body, content_type="application/json", **headers)
        return status, json.loads(body)

    def chat(self, *said, **fields):
        """Return the reply to messages, texts of the user or whole messages, that must succeed."""
        messages = [{"role": "user", "content": each} if isinstance(each, str) else each for each in said]
        status, found = self.post("/v1/chat/completions", {"messages": messages, "max_tokens": 24} | fields)
        assert status == 200, found
        return found

    def said(self, *said, **fields):
        """Return what `chat` answers, as text and log-probabilities: these tell any two pasts apart."""
        (choice,) = self.chat(*said, logprobs=True, **fields)["choices"]
        return choice["message"]["content"], [entry["logprob"] for entry in choice["logprobs"]["content"]]

    def complete(self, prompt="fox", **fields):
        """Return the reply to a completion that must succeed."""
        status, found = self.post("/v1/completions", {"prompt": prompt} | fields)
        assert status == 200, found
        return found

    def events(self, path, value):
        """Return the events of a stream that must succeed."""
        body = json.dumps(value | {"stream": True})
        status, headers, body = self.request("POST", path, body, content_type="application/json")
        assert (status, headers["content-type"]) == (200, "text/event-stream; charset=utf-8"), body
        *events, last, rest = body.decode().split("\n\n")
        assert (last, rest) == ("data: [DONE]", "")
        return [json.loads(event.removeprefix("data: ")) for event in events]

    def quiet(self):
        """Wait until nothing runs or waits."""
        worker = self.api.calls.worker
        until(lambda: not (worker.running or worker.waiting or self.api.calls.under_way))


def until(condition, seconds=30):
    """Wait until a condition holds."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it never came true"
        time.sleep(0.005)
