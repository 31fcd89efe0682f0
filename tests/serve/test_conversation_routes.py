"""Conversations over HTTP: whose they are, what they remember, and how they are saved and loaded."""

import json
import random

import pytest

from lepton.serve.conversations import Conversations
from lepton.serve.limits import Limits
from tests.generate.models import enlivened
from tests.laws.lab import build
from tests.serve.http import Running, until

PATH = "/v1/conversations"
LONG = "The quick brown fox jumps over the lazy dog. " * 3
LIMITS = Limits(max_prompt=400, max_tokens=100_000, max_request=200_000, max_conversations=40)


def text_of(reply):
    return reply["choices"][0]["message"]["content"]


@pytest.fixture(scope="module")
def server(model, tokenizer):
    with Running(model, tokenizer, limits=LIMITS, places=4) as running:
        yield running


def ask(server, method, path, body=None, **headers):
    """Return the status and the JSON of a reply."""
    status, _, content = server.request(method, f"{PATH}{path}", body, **headers)
    return status, json.loads(content)


def code_of(found):
    status, body = found
    return status, body["error"]["code"]


def test_a_conversation_is_begun_listed_and_deleted(server):
    status, begun = server.post(PATH, {})
    assert (status, begun["object"], begun["turns"], begun["tokens"]) == (200, "conversation", 0, 0)
    name = begun["id"]
    assert server.post(PATH, {"id": "chosen"})[1]["id"] == "chosen"
    reply = server.chat("secret words", conversation=name, seed=1)
    known = ask(server, "GET", f"/{name}")[1]
    assert known == begun | {"turns": 1, "tokens": known["tokens"]}
    assert known["tokens"] > reply["usage"]["prompt_tokens"]
    listed = server.get(PATH)[1]
    assert {"chosen", name} <= {each["id"] for each in listed["data"]}
    assert "secret" not in json.dumps(listed)
    assert ask(server, "DELETE", f"/{name}") == (200, {"id": name, "object": "conversation.deleted", "deleted": True})
    for method, path in (("GET", ""), ("DELETE", ""), ("GET", "/memory"), ("GET", "/state"), ("DELETE", "/memory/1")):
        assert code_of(ask(server, method, f"/{name}{path}")) == (404, "conversation_not_found")
    asked = {"messages": [{"role": "user", "content": "x"}], "conversation": name}
    assert code_of(server.post("/v1/chat/completions", asked)) == (404, "conversation_not_found")


@pytest.mark.parametrize("name", ["", "a b", "a/b", "..", "ä", "x" * 65, 5, ["x"], {"id": "x"}, True])
def test_what_is_no_id_is_refused(server, name):
    for path, body in ((PATH, {"id": name}), ("/v1/chat/completions", {"conversation": name})):
        status, found = server.post(
            path, body | ({"messages": [{"role": "user", "content": "x"}]} if "chat" in path else {})
        )
        assert (status, found["error"]["type"]) == (400, "invalid_request_error")


@pytest.mark.parametrize("fields", [{"n": 2}, {"max_tokens": 0}, {"max_completion_tokens": 0}])
def test_a_turn_is_one_answer(server, fields):
    body = {"messages": [{"role": "user", "content": "x"}], "conversation": "one"} | fields
    status, found = server.post("/v1/chat/completions", body)
    assert (status, found["error"]["param"]) == (400, "n" if "n" in fields else "max_tokens")
    status, found = server.post("/v1/completions", {"prompt": "x", "conversation": "one"})
    assert (status, found["error"]["code"]) == (400, "unknown_parameter")


def test_the_second_of_two_at_once_gets_409_and_the_first_goes_on(server):
    """Whatever the second one wants to change; and a turn that its client leaves changes nothing."""
    first = server.chat("fox", conversation="busy", seed=1)
    before = ask(server, "GET", "/busy")[1]
    connection = server.connection()
    body = {
        "messages": [{"role": "user", "content": "x"}],
        "conversation": "busy",
        "max_tokens": 90_000,
        "stream": True,
    }
    connection.request("POST", "/v1/chat/completions", json.dumps(body | {"temperature": 0, "stop": None}),
                       {"Content-Type": "application/json"})  # fmt: skip
    response = connection.getresponse()
    assert response.readline().startswith(b"data: ")
    short = {"messages": [{"role": "user", "content": "x"}], "conversation": "busy", "max_tokens": 2}
    assert code_of(server.post("/v1/chat/completions", short)) == (409, "conversation_busy")
    for method, path in (("DELETE", ""), ("DELETE", "/memory/1"), ("PUT", "/state")):
        assert code_of(ask(server, method, f"/busy{path}", "x")) == (409, "conversation_busy")
    assert ask(server, "GET", "/busy/memory")[0] == 200
    assert server.chat("fox", conversation="other", seed=1)["choices"] == first["choices"]
    response.close()
    connection.close()
    until(lambda: not server.api.conversations.find("", "busy").changing)
    assert ask(server, "GET", "/busy")[1] == before
    wanted = server.said("fox", {"role": "assistant", "content": text_of(first)}, "x", seed=2)
    assert server.said("x", conversation="busy", seed=2) == (wanted[0], pytest.approx(wanted[1], abs=1e-8))


def test_the_next_turn_may_follow_at_once(server):
    """Also on another connection, as soon as a stream says that it has ended."""
    for turn in range(5):
        connection = server.connection()
        body = {
            "messages": [{"role": "user", "content": "x"}],
            "conversation": "quick",
            "max_tokens": 3,
            "stream": True,
        }
        connection.request("POST", "/v1/chat/completions", json.dumps(body), {"Content-Type": "application/json"})
        response = connection.getresponse()
        assert response.status == 200, response.read()
        while b'"finish_reason": "' not in response.readline():
            pass
        assert ask(server, "GET", "/quick")[1]["turns"] == turn + 1
        response.close()
        connection.close()


def test_a_conversation_that_was_not_answered_is_not_kept(server):
    body = {"messages": [{"role": "user", "content": LONG * 50}], "conversation": "never"}
    assert server.post("/v1/chat/completions", body)[0] == 400
    assert code_of(ask(server, "GET", "/never")) == (404, "conversation_not_found")


def test_the_memory_is_a_list_of_texts_with_scores(server, model, tokenizer):
    server.chat(LONG, conversation="remembers", seed=1)
    state = server.api.conversations.find("", "remembers").state
    found = ask(server, "GET", "/remembers/memory")[1]["data"]
    wanted = [(each.position, each.score, tokenizer.decode(each.tokens)) for each in state.memory]
    assert [(each["slot"], each["score"], each["text"]) for each in found] == wanted
    assert len(found) == model.config.idea("crystals").slots
    assert all(0 <= each["score"] <= 1 and each["text"].endswith(each["token"]) for each in found)
    begun = server.post(PATH, {})[1]["id"]
    assert ask(server, "GET", f"/{begun}/memory") == (200, {"object": "list", "data": []})


def test_a_crystal_that_is_removed_is_forgotten(server):
    """The answer is another one, and it is not remembered again."""
    for name in ("whole", "poorer"):
        server.chat(LONG, conversation=name, seed=1)
    found = ask(server, "GET", "/poorer/memory")[1]["data"]
    slots = [each["slot"] for each in found]
    for slot in slots[1:]:
        status, left = ask(server, "DELETE", f"/poorer/memory/{slot}")
        found = [each for each in found if each["slot"] != slot]
        assert (status, left["data"]) == (200, found)
        assert code_of(ask(server, "DELETE", f"/poorer/memory/{slot}")) == (404, "slot_not_found")
    assert [each["slot"] for each in ask(server, "GET", "/poorer/memory")[1]["data"]] == slots[:1]
    known = ask(server, "GET", "/poorer")[1]
    assert known["turns"] == 1
    asked = {"temperature": 0, "max_tokens": 60, "logprobs": True}
    answers = [server.chat("x", conversation=name, **asked)["choices"][0]["logprobs"] for name in ("whole", "poorer")]
    assert answers[0] != answers[1]
    assert not {*slots[1:]} & {each["slot"] for each in ask(server, "GET", "/poorer/memory")[1]["data"]}


@pytest.mark.parametrize("slot", ["x", "1.5", "-", "99999999999999999999", "%20", "12345"])
def test_a_slot_that_is_not_there(server, slot):
    server.chat(LONG, conversation="slots", seed=1, max_tokens=2)
    assert code_of(ask(server, "DELETE", f"/slots/memory/{slot}")) == (404, "slot_not_found")


def test_a_conversation_is_saved_and_loaded(server):
    """It goes on as the first one would have, also in place of another."""
    server.chat(LONG, conversation="saved", seed=1)
    status, headers, content = server.request("GET", f"{PATH}/saved/state")
    assert (status, headers["content-type"]) == (200, "application/octet-stream")
    assert headers["content-disposition"] == 'attachment; filename="saved.safetensors"'
    assert b"quick brown" not in content
    server.chat("something else", conversation="replaced", seed=3)
    for name in ("loaded", "replaced"):
        status, known = ask(server, "PUT", f"/{name}/state", content)
        assert (status, known["id"], known["turns"]) == (200, name, 1)
    wanted, forgetful = server.said("x", conversation="saved", seed=2), server.said("x", seed=2)
    for name in ("loaded", "replaced"):
        assert server.said("x", conversation=name, seed=2) == (wanted[0], pytest.approx(wanted[1], abs=1e-8))
    assert forgetful[1] != pytest.approx(wanted[1], abs=1e-5)
    begun = server.post(PATH, {})[1]["id"]
    assert code_of(ask(server, "GET", f"/{begun}/state")) == (409, None)
    assert ask(server, "PUT", f"/{begun}/state", content)[1]["turns"] == 1


def test_what_is_no_saved_conversation_is_refused(server):
    server.chat(LONG, conversation="source", seed=1)
    content = server.request("GET", f"{PATH}/source/state")[2]
    generator = random.Random(1)
    bad = [b"", b"{}", content[:100], content[:-1], content + b"x"]
    for _ in range(30):
        place = generator.randrange(len(content))
        bad.append(content[:place] + bytes([content[place] ^ (1 << generator.randrange(8))]) + content[place + 1 :])
    for each in bad:
        status, found = ask(server, "PUT", "/damaged/state", each)
        assert (status, found["error"]["code"]) == (400, "not_a_conversation"), found
        assert "/tmp" not in found["error"]["message"]
    assert code_of(ask(server, "GET", "/damaged")) == (404, "conversation_not_found")
    most = 2 * server.api.reader.model.state_bytes(1) + (1 << 20)
    assert code_of(ask(server, "PUT", "/damaged/state", bytes(most + 1))) == (413, "body_too_large")
    assert code_of(ask(server, "PUT", "/conv_x/state", content)) == (404, "conversation_not_found")
    assert ask(server, "PUT", "/a%20b/state", content)[0] == 400
    server.quiet()
    assert server.api.calls.worker.failures == 0


def test_each_key_has_its_own_conversations(model, tokenizer):
    with Running(model, tokenizer, limits=Limits(max_conversations=2), keys=["one", "two"], any_host=True) as server:
        one, two = ({"authorization": f"Bearer {key}"} for key in ("one", "two"))
        body = {"messages": [{"role": "user", "content": LONG}], "conversation": "mine", "max_tokens": 3, "seed": 1}
        assert server.post("/v1/chat/completions", body, **one)[0] == 200
        assert server.get(PATH, **two) == (200, {"object": "list", "data": []})
        for method, path in (("GET", ""), ("GET", "/memory"), ("GET", "/state"), ("DELETE", "")):
            assert code_of(ask(server, method, f"/mine{path}", **two)) == (404, "conversation_not_found")
        other = body | {"messages": [{"role": "user", "content": "x"}]}
        assert server.post("/v1/chat/completions", other, **two)[0] == 200
        tokens = [server.get(f"{PATH}/mine", **key)[1]["tokens"] for key in (one, two)]
        assert tokens[0] > tokens[1]
        assert ask(server, "DELETE", "/mine", **two)[0] == 200
        assert [each["id"] for each in server.get(PATH, **one)[1]["data"]] == ["mine"]
        assert server.post(PATH, {}, **one)[0] == 200
        assert code_of(server.post(PATH, {}, **one)) == (429, "too_many_conversations")
        assert server.post(PATH, {}, **two)[0] == 200
        for headers in ({}, {"authorization": "Bearer three"}):
            for method, path in (("GET", ""), ("POST", ""), ("GET", "/mine/memory"), ("DELETE", "/mine")):
                assert code_of(ask(server, method, path, **headers)) == (401, "invalid_api_key")


def test_conversations_outlive_the_server_in_a_folder(model, tokenizer, tmp_path):
    def kept():
        return Conversations(model, in_memory=4, most=9, folder=tmp_path)

    with Running(model, tokenizer, conversations=kept()) as server:
        server.chat(LONG, conversation="lasting", seed=1, max_tokens=9)
    with Running(model, tokenizer, conversations=kept()) as server:
        given = server.said("x", conversation="lasting", seed=2)
        metrics = server.request("GET", "/metrics")[2].decode()
        answer = text_of(server.chat(LONG, seed=1, max_tokens=9))
        wanted = server.said(LONG, {"role": "assistant", "content": answer}, "x", seed=2)
        forgetful = server.said("x", seed=2)
    assert given == (wanted[0], pytest.approx(wanted[1], abs=1e-8))
    assert forgetful[1] != pytest.approx(given[1], abs=1e-5)
    assert "lepton_conversations 1\n" in metrics
    assert "lepton_conversations_in_memory 1\n" in metrics


def test_without_a_window_a_conversation_ends_where_the_model_does(tokenizer):
    dense = enlivened(build("dense", vocab_size=300)).eval()
    limits = Limits(max_prompt=100, max_tokens=64, max_request=160)
    with Running(dense, tokenizer, limits=limits, places=2) as server:
        history, said = [], ["fox", "x", "y", "z"]
        for turn, each in enumerate(said):
            body = {
                "messages": [{"role": "user", "content": each}],
                "conversation": "dense",
                "max_tokens": 20,
                "seed": 1,
                "logprobs": True,
            }
            status, found = server.post("/v1/chat/completions", body)
            if status != 200:
                break
            history += [each]
            if turn < 2:
                wanted = server.said(*history, seed=1, max_tokens=20)
                given = [entry["logprob"] for entry in found["choices"][0]["logprobs"]["content"]]
                assert (text_of(found), given) == (wanted[0], pytest.approx(wanted[1], abs=1e-8))
            history += [{"role": "assistant", "content": text_of(found)}]
        assert turn > 1
        assert code_of((status, found)) == (400, "context_length_exceeded")
        assert ask(server, "GET", "/dense/memory") == (200, {"object": "list", "data": []})
        content = server.request("GET", f"{PATH}/dense/state")[2]
        assert ask(server, "PUT", "/copy/state", content)[1]["turns"] == turn
