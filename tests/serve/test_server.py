"""The process: its port, and what SIGTERM does."""

import json
import os
import signal
import socket
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest

from lepton.errors import InputError
from tests.cli.tiny import save_tiny
from tests.serve.http import listening, until

ROOT = Path(__file__).parents[2]


def test_a_port_that_is_taken_is_named():
    with listening("127.0.0.1", 0) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(InputError, match=f"cannot listen at 127.0.0.1, port {port}: .*choose another --port"):
            listening("127.0.0.1", port)


@pytest.mark.parametrize(("host", "port"), [("203.0.113.7", 0), ("::zz", 0)])
def test_no_such_address(host, port):
    with pytest.raises(InputError, match="cannot listen"):
        listening(host, port)


@pytest.mark.parametrize("port", [-1, 65_536])
def test_no_such_port(port):
    with pytest.raises(InputError, match=f"port {port}: must lie in 0..65535"):
        listening("127.0.0.1", port)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    path = tmp_path_factory.mktemp("serve") / "x.pt"
    save_tiny(path)
    return path


class Command:
    """`python -m lepton serve` in a process of its own."""

    def __init__(self, checkpoint, *flags):
        words = [sys.executable, "-m", "lepton", "serve", "--checkpoint", str(checkpoint), "--dtype", "fp32"]
        words += ["--port", "0", *flags]
        self.process = subprocess.Popen(words, cwd=ROOT, stderr=subprocess.PIPE, text=True, env=dict(os.environ))
        self.lines = [self.process.stderr.readline() for _ in range(2)]
        assert "serving lepton at http://127.0.0.1:" in self.lines[1], self.lines + self.process.stderr.readlines()
        self.port = int(self.lines[1].partition("127.0.0.1:")[2].partition("/")[0])

    def __enter__(self):
        return self

    def __exit__(self, *error):
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        self.process.stderr.close()

    def ask(self, path="completions", /, **fields):
        """Begin a request; its reply can be read later."""
        headers = {"Content-Type": "application/json"}
        body = json.dumps(fields).encode()
        url = f"http://127.0.0.1:{self.port}/v1/{path}"
        return urllib.request.urlopen(urllib.request.Request(url, body, headers), timeout=60)

    def end(self):
        """Wait for the end; return the exit code and what was said since it serves."""
        _, said = self.process.communicate(timeout=60)
        return self.process.returncode, said


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no SIGTERM")
def test_sigterm_lets_answers_end_and_accepts_no_more(checkpoint):
    with Command(checkpoint, "--max_tokens", "100000", "--max_request", "200000") as command:
        # It takes a second or more: none ends before its last token.
        stream = command.ask(prompt="fox", max_tokens=600, temperature=0, n=4, stream=True)
        assert stream.readline().startswith(b"data: ")
        command.process.send_signal(signal.SIGTERM)
        until(lambda: refused(command.port))
        events = stream.read().decode().split("\n\n")
        stream.close()
        assert events[-2:] == ["data: [DONE]", ""]
        assert command.end() == (0, "stopped\n")


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no SIGTERM")
def test_what_does_not_end_in_time_is_ended(checkpoint):
    flags = ["--max_tokens", "1000000", "--max_request", "2000000", "--drain_seconds", "0"]
    with Command(checkpoint, *flags) as command:
        stream = command.ask(prompt="fox", max_tokens=900_000, n=2, temperature=0, stream=True)
        assert stream.readline().startswith(b"data: ")
        command.process.send_signal(signal.SIGTERM)
        events = stream.read().decode().split("\n\n")
        stream.close()
        code, said = command.end()
    assert json.loads(events[-2].removeprefix("data: "))["error"]["code"] == "stopping"
    assert code == 0
    assert "Traceback" not in said


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no SIGTERM")
def test_conversations_in_a_folder_go_on_with_the_next_server(checkpoint, tmp_path):
    flags = ["--conversation_folder", str(tmp_path / "kept"), "--conversations", "1"]
    asked, path = {"max_tokens": 5, "seed": 1, "logprobs": True}, "chat/completions"
    turns = [[{"role": "user", "content": text}] for text in ("fox", "x")]
    with Command(checkpoint, *flags) as command:
        for name in ("a", "b"):
            command.ask(path, messages=turns[0], conversation=name, **asked).close()
        command.process.send_signal(signal.SIGTERM)
        assert command.end() == (0, "stopped\n")
    assert len([*(tmp_path / "kept").iterdir()]) == 2
    with Command(checkpoint, *flags) as command:
        replies = [command.ask(path, messages=turns[1], conversation=name, **asked) for name in ("a", "b", "c")]
        found = [json.load(reply)["choices"][0]["logprobs"]["content"] for reply in replies]
    scores = [[entry["logprob"] for entry in content] for content in found]
    assert scores[1] == pytest.approx(scores[0], abs=1e-4)
    assert scores[2] != pytest.approx(scores[0], abs=1e-3)


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no SIGINT for one process")
def test_ctrl_c_stops(checkpoint):
    with Command(checkpoint) as command:
        found = json.loads(command.ask(prompt="fox", max_tokens=3).read())
        assert found["usage"]["completion_tokens"] == 3
        command.process.send_signal(signal.SIGINT)
        code, said = command.end()
    assert (code, said) == (130, "")


def refused(port):
    """Whether nobody listens."""
    with socket.socket() as client:
        return client.connect_ex(("127.0.0.1", port)) != 0
