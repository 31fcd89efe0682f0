"""The server bears what Schemathesis makes of its description, and the benchmark sees what is wrong."""

import json
import logging

import pytest

from tests.cli.tiny import save_tiny

pytest.importorskip("schemathesis", reason="comes with requirements-dev.txt")
pytest.importorskip("starlette", reason="needs: pip install starlette uvicorn")
pytest.importorskip("uvicorn", reason="needs: pip install starlette uvicorn")

from benchmarks import serve_fuzz
from benchmarks.serve_fuzz import MANY, Canaries, Client, mixed, problem_of
from lepton.serve.limits import Limits
from tests.serve.http import Running
from tests.serve.small import small_model, small_tokenizer


def test_memory_is_read_under_a_load(tmp_path, capsys):
    save_tiny(tmp_path / "x.pt")
    words = ["--checkpoint", str(tmp_path / "x.pt"), "--loads", "memory", "--requests", "60", "--every", "20"]
    assert serve_fuzz.main(words) == 0
    memory = json.loads(capsys.readouterr().out.splitlines()[-1])["memory"]
    assert (memory["wrong"], memory["log"]) == ([], [])
    assert len(memory["memory"]) == 3
    assert memory["memory"][1:] == [memory["after_warm_up"], memory["last"]]
    assert memory["bytes_a_request"] == pytest.approx((memory["last"] - memory["after_warm_up"]) / 20, abs=0.1)


@pytest.fixture(scope="module")
def keyed():
    model, tokenizer = small_model(), small_tokenizer()
    model._tokenizer_json = tokenizer.to_json()
    limits = Limits(max_tokens=8, max_prompt=128, max_choices=3, max_request=256, max_think=2)
    with Running(model, tokenizer, limits=limits, keys=[*serve_fuzz.KEYS.values()], places=8) as server:
        yield server


def test_requests_from_the_description(keyed, caplog):
    """Half of them as it says, half of them broken, beside canaries."""
    described = json.loads(Client(keyed.port, "fuzz").send("GET", "/openapi.json")[1])
    made = [*serve_fuzz.cases(described, 30, 0)]  # what the library imports by and by is there before threads run
    assert {case.operation.path for case in made} >= {*MANY, "/v1/models", "/health"}
    with caplog.at_level(logging.WARNING):
        fuzz = serve_fuzz.fuzz(keyed.port, serve_fuzz.canary_texts(keyed.api.reader.model), 120, 4, 1)
    assert fuzz["wrong"] == []
    assert [record.getMessage() for record in caplog.records if record.levelno >= logging.ERROR] == []
    assert fuzz["afterwards"] == {"status": "ok", "model": "lepton", "running": 0, "waiting": 0}
    assert sum(fuzz["statuses"].values()) == 120 + 1  # and the description
    assert min(fuzz["statuses"]["200"], fuzz["statuses"]["400"]) > 20
    assert fuzz["canaries"] >= 12
    assert keyed.api.calls.worker.failures == 0


@pytest.mark.parametrize(
    ("status", "content", "wrong"),
    [
        (200, b"fine", None),
        (200, b"the model may write Traceback", None),
        (400, b'{"error": {"message": "m", "type": "t", "param": null, "code": null}}', None),
        (500, b"{}", "status 500"),
        (200, b"Traceback (most recent call last)", "a traceback"),
        (404, b"not found", "without an error in JSON"),
        (400, b'{"error": {"message": "m"}}', "of another form"),
        (400, b'{"error": {"message": "", "type": "t", "param": null, "code": null}}', "of another form"),
        (200, b"x quartz y", "holds a canary's text"),
        (200, b'data: {"choices": [{"index": 0, "text": "qua"}, {"index": 1, "text": "rtz"}]}\n\n', None),
        (
            200,
            b'data: {"choices": [{"index": 0, "text": "qua"}]}\n\ndata: {"choices": [{"index": 0, "text": "rtz"}]}\n\n',
            "holds a canary's text",
        ),
        (
            200,
            b'data: {"choices": [{"index": 1, "delta": {"content": "qua"}}, {"index": 1, "delta": {}}]}\n\n'
            b'data: {"choices": [{"index": 1, "delta": {"content": "rtz"}}]}\n\n',
            "holds a canary's text",
        ),
    ],
)
def test_what_is_wrong_with_a_reply_is_seen(status, content, wrong):
    found = problem_of(status, content, {b"quartz"})
    assert found is None if wrong is None else wrong in found


def test_a_wrong_text_of_a_canary_is_seen(keyed):
    tokenizer, model = keyed.api.reader.tokenizer, keyed.api.reader.model
    prompt, other = [*serve_fuzz.CANARIES][:2]
    ids = tokenizer.encode(prompt)
    new = model.generate(ids, serve_fuzz.CANARY_TOKENS, seed=serve_fuzz.CANARIES[prompt])[len(ids) :]
    canaries = Canaries(Client(keyed.port, "canary"), {prompt: tokenizer.decode(new)})
    canaries.check()
    assert (canaries.wrong, canaries.asked) == ([], 3)
    canaries = Canaries(Client(keyed.port, "canary"), {other: "something else"})
    canaries.turns = ["another answer"]
    canaries.check()
    assert [each.endswith("is not 'something else'") for each in canaries.wrong[:2]] == [True, True]
    assert "a conversation gave" in canaries.wrong[2]


def test_the_mixed_load_says_what_should_not_be(keyed, monkeypatch):
    client = Client(keyed.port, "fuzz")
    for i in range(20):
        mixed(client, i)
    assert client.wrong == []
    monkeypatch.setattr(client, "send", lambda *_, **__: (418, b""))
    mixed(client, 0)
    assert client.wrong == ["kind 0: status 418"]


def test_a_fault_of_the_server_ends_in_an_answer_that_is_seen(keyed, monkeypatch, caplog):
    """What no route expects: the reply is JSON with status 500, and the fuzz calls it wrong."""

    async def fails(*_, **__):
        raise RuntimeError("not expected")

    monkeypatch.setattr(keyed.api.conversations, "delete", fails)
    with caplog.at_level(logging.CRITICAL, logger="uvicorn.error"):
        reply = Client(keyed.port, "fuzz").send("DELETE", "/v1/conversations/x")
    assert "status 500" in problem_of(*reply, set())
    assert json.loads(reply[1])["error"]["message"] == "the server failed; its log says why"
    assert Client(keyed.port, "fuzz").send("POST", MANY[0], {"prompt": "x", "max_tokens": 1})[0] == 200
