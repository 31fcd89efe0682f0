"""Routes over HTTP: every text is what `generate` gives with its seed."""

import asyncio
import json
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from lepton.serve import app
from lepton.serve.app import Api
from lepton.serve.limits import Limits, Refusal
from lepton.serve.requests import Reader
from tests.serve.http import Running, until
from tests.serve.small import WORDS
from tests.serve.test_worker import KINDS


def expected(model, tokenizer, prompts, n=1, **options):
    """The new texts of `generate` for prompts that stand `n` times each."""
    ids = [ids for prompt in prompts for ids in [tokenizer.encode(prompt) or [model.config.eos_id]] * n]
    rows = model.generate(ids, **options)
    return [tokenizer.decode(row[len(own) :]) for own, row in zip(ids, rows, strict=True)]


def texts(reply):
    return [choice["text"] for choice in sorted(reply["choices"], key=lambda each: each["index"])]


@pytest.mark.parametrize("number", range(len(KINDS)))
def test_a_completion_is_what_generate_gives(server, model, tokenizer, number):
    prompt, options = WORDS[number % len(WORDS)], KINDS[number] | {"seed": number + 40}
    found = server.complete(prompt, max_tokens=20, **options)
    assert texts(found) == expected(model, tokenizer, [prompt], max_new_tokens=20, **options)
    assert (found["object"], found["model"], found["seed"]) == ("text_completion", "lepton", number + 40)
    assert found["usage"]["prompt_tokens"] == len(tokenizer.encode(prompt))
    assert found["usage"]["total_tokens"] == found["usage"]["prompt_tokens"] + found["usage"]["completion_tokens"]
    assert found["choices"][0]["logprobs"] is None


def test_the_defaults_are_those_of_generate(server, model, tokenizer):
    found = server.complete("fox", seed=1)
    assert texts(found) == expected(model, tokenizer, ["fox"], seed=1)
    assert found["choices"][0]["finish_reason"] in ("stop", "length")


def test_a_seed_is_drawn_and_told(server):
    """So that what was given without one can be had again."""
    first, second = (server.complete("fox", max_tokens=8) for _ in range(2))
    assert first["seed"] != second["seed"]
    assert texts(server.complete("fox", max_tokens=8, seed=first["seed"])) == texts(first)


def test_prompts_may_be_texts_or_ids(server, model, tokenizer):
    words, options = ["fox", "dog"], {"seed": 5, "temperature": 1.0}
    wanted = expected(model, tokenizer, words, n=2, max_new_tokens=9, **options)
    assert len(set(wanted)) == 4
    for prompt in (words, [tokenizer.encode(word) for word in words]):
        found = server.complete(prompt, n=2, max_tokens=9, **options)
        assert texts(found) == wanted
    assert found["usage"]["prompt_tokens"] == sum(len(tokenizer.encode(word)) for word in words)
    flat = server.complete(tokenizer.encode("fox"), max_tokens=9, **options)
    assert texts(flat) == wanted[:1]
    empty = server.complete("", max_tokens=9, **options)
    assert texts(empty) == expected(model, tokenizer, [""], max_new_tokens=9, **options)


def test_models_and_health(server, model):
    status, found = server.get("/v1/models")
    assert (status, found["object"], [each["id"] for each in found["data"]]) == (200, "list", ["lepton"])
    assert found["data"][0]["parameters"] == model.num_params()
    assert server.get("/v1/models/lepton") == (200, found["data"][0])
    assert server.get("/v1/models/gpt-4")[1]["error"]["code"] == "model_not_found"
    server.quiet()
    assert server.get("/health") == (200, {"status": "ok", "model": "lepton", "running": 0, "waiting": 0})


def test_many_at_once_are_each_what_they_are_alone(server, model, tokenizer):
    """More than there are places, over connections of their own."""
    connections = []
    for number in range(12):
        connection = server.connection()
        body = {"prompt": WORDS[number % len(WORDS)], "seed": number, "max_tokens": 15} | KINDS[number % len(KINDS)]
        connection.request("POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"})
        connections.append(connection)
    for number, connection in enumerate(connections):
        found = json.loads(connection.getresponse().read())
        connection.close()
        options = {"seed": number, "max_new_tokens": 15} | KINDS[number % len(KINDS)]
        assert texts(found) == expected(model, tokenizer, [WORDS[number % len(WORDS)]], **options)
    server.quiet()


def test_a_bug_is_logged_and_shows_nothing_of_itself(server, monkeypatch, caplog):
    def buggy(self, body, *, chat):
        raise RuntimeError("a secret of the source")

    with monkeypatch.context() as patch:
        patch.setattr(Reader, "task", buggy)
        status, found = server.post("/v1/completions", {"prompt": "fox"})
    assert (status, found["error"]["message"]) == (500, "the server failed; its log says why")
    until(lambda: any("a secret of the source" in str(record.exc_info) for record in caplog.records))
    assert server.complete("fox", max_tokens=1)


def test_a_client_that_does_not_read_is_not_waited_for(model, tokenizer, monkeypatch):
    """Its time ends, and its answer with it, though nothing more can be sent."""
    limits = Limits(max_tokens=1_000_000, max_request=2_000_000, max_seconds=1)
    api = Api(Reader(model, tokenizer, "lepton", limits))
    body = json.dumps({"prompt": "x", "max_tokens": 900_000, "temperature": 0, "stream": True}).encode()
    sent = []

    async def receive():
        await asyncio.sleep(3600)

    async def send(message):
        sent.append(message)
        if len(sent) > 4:
            await asyncio.sleep(3600)

    async def answered():
        api.calls.start()
        await app.Answering(api, api.reader.task(body, chat=False), time.monotonic())({}, receive, send)
        return api.calls.under_way

    monkeypatch.setattr(app, "LAST_SECONDS", 0.1)
    try:
        assert asyncio.run(answered()) == 0
    finally:
        api.calls.worker.close()
    assert b'"code": "timeout"' in sent[-1]["body"]


def test_few_threads_read_requests_and_cache_few_words(model, tokenizer, monkeypatch):
    """Each thread takes memory for as long as the server runs, also where there are many cores."""
    names, words = set(), []

    def task(*_, **__):
        names.add(threading.current_thread().name)
        time.sleep(0.2)  # the others come meanwhile
        raise Refusal("read", status=400)

    monkeypatch.setattr(Reader, "task", task)
    monkeypatch.setattr(type(tokenizer), "limit_cache", lambda _, most: words.append(most))
    with Running(model, tokenizer) as server, ThreadPoolExecutor(12) as clients:
        found = [*clients.map(lambda _: server.post("/v1/completions", {"prompt": "fox"})[0], range(12))]
    assert found == [400] * 12
    assert len(names) == app.THREADS
    assert words == [app.CACHED_WORDS]


def test_the_name_of_the_model_is_the_servers(model, tokenizer):
    with Running(model, tokenizer, name="mine") as server:
        assert server.complete("fox", model="mine", max_tokens=1)["model"] == "mine"
        status, found = server.post("/v1/completions", {"prompt": "fox", "model": "lepton"})
    assert (status, found["error"]["param"], found["error"]["code"]) == (404, "model", "model_not_found")
