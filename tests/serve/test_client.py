"""OpenAI's own client of today: what it reads of our replies, and what it raises."""

import asyncio

import pytest

from tests.serve.http import until
from tests.serve.test_app import expected

openai = pytest.importorskip("openai", reason="needs OpenAI's client: pip install -r requirements-dev.txt")

OPTIONS = {"temperature": 1.0, "seed": 11}
HELLO = [{"role": "user", "content": "The quick"}]
TRANSCRIPT = "User: The quick\nAssistant:"


@pytest.fixture(scope="module")
def client(server):
    with openai.OpenAI(base_url=f"http://127.0.0.1:{server.port}/v1", api_key="any", max_retries=0) as client:
        yield client


def test_models(client):
    assert [model.id for model in client.models.list()] == ["lepton"]
    assert client.models.retrieve("lepton").owned_by == "lepton"
    with pytest.raises(openai.NotFoundError, match="choose 'lepton'"):
        client.models.retrieve("gpt-4")


def test_a_completion_and_its_stream(client, model, tokenizer):
    (wanted,) = expected(model, tokenizer, ["fox"], max_new_tokens=20, **OPTIONS)
    found = client.completions.create(model="lepton", prompt="fox", max_tokens=20, **OPTIONS)
    assert (found.choices[0].text, found.seed) == (wanted, 11)
    with client.completions.create(model="lepton", prompt="fox", max_tokens=20, stream=True, **OPTIONS) as stream:
        assert "".join(chunk.choices[0].text for chunk in stream) == wanted


def test_a_conversation_and_its_stream(client, model, tokenizer):
    (wanted,) = expected(model, tokenizer, [TRANSCRIPT], max_new_tokens=20, **OPTIONS)
    asked = {"model": "lepton", "messages": HELLO, "max_completion_tokens": 20} | OPTIONS
    found = client.chat.completions.create(**asked)
    assert (found.choices[0].message.role, found.choices[0].message.content) == ("assistant", wanted)
    with client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True}) as stream:
        *chunks, last = stream
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == wanted
    assert last.usage.completion_tokens == found.usage.completion_tokens
    stop = wanted[4:7]  # its helper, which puts the chunks together, takes an answer that is cut for an error
    with client.chat.completions.stream(**asked, stop=[stop]) as stream:
        assert stream.get_final_completion().choices[0].message.content == wanted.partition(stop)[0]


def test_our_fields_go_both_ways(client, model, tokenizer):
    (wanted,) = expected(model, tokenizer, [TRANSCRIPT], max_new_tokens=12, depth=0.5, think=1, top_k=9, **OPTIONS)
    found = client.chat.completions.create(
        model="lepton",
        messages=HELLO,
        max_tokens=12,
        logprobs=True,
        top_logprobs=2,
        extra_body={"depth": 0.5, "think": 1, "top_k": 9},
        **OPTIONS,
    )
    choice = found.choices[0]
    assert (choice.message.content, choice.ended_by) == (wanted, "length")
    for entry in choice.logprobs.content:
        assert len(entry.top_logprobs) == 2
        assert 0 <= entry.uncertainty <= 1
        assert model.config.stem_layers <= entry.depth <= model.config.layers
        assert isinstance(entry.drafted, bool)
    assert found.usage.drafted_tokens >= found.usage.accepted_tokens


def test_a_conversation_that_is_kept(client):
    """Whole and streamed; each turn as with all messages."""
    history, asked = [], {"model": "lepton", "max_tokens": 20} | OPTIONS
    for turn, text in enumerate(["fox", "and?", "x"]):
        new = {"role": "user", "content": text}
        history.append(new)
        wanted = client.chat.completions.create(messages=history, **asked).choices[0].message.content
        kept = {"messages": [new], "extra_body": {"conversation": "of-the-client"}}
        if turn == 1:
            chunks = client.chat.completions.create(stream=True, **kept, **asked)
            found = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
        else:
            found = client.chat.completions.create(**kept, **asked).choices[0].message.content
        assert found == wanted
        history.append({"role": "assistant", "content": found})
    with pytest.raises(openai.NotFoundError, match="no conversation 'conv_x'"):
        client.chat.completions.create(messages=[new], extra_body={"conversation": "conv_x"}, **asked)


def test_several_answers_and_stop_texts(client, model, tokenizer):
    wanted = expected(model, tokenizer, ["fox"], n=3, max_new_tokens=30, **OPTIONS)
    stop = wanted[1][5:7]
    found = client.completions.create(model="lepton", prompt="fox", max_tokens=30, n=3, stop=[stop], **OPTIONS)
    assert [choice.text for choice in found.choices] == [text.partition(stop)[0] for text in wanted]
    assert found.choices[1].finish_reason == "stop"


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"prompt": "fox", "max_tokens": 10_000}, "max_tokens=10000"),
        ({"prompt": "fox", "frequency_penalty": 1.0}, "does not support it"),
        ({"prompt": "fox", "extra_body": {"dept": 1}}, "did you mean 'depth'"),
        ({"prompt": "x" * 2000}, "at most 200 are taken"),
    ],
)
def test_what_cannot_be_served_raises(client, fields, text):
    with pytest.raises(openai.BadRequestError, match=text):
        client.completions.create(model="lepton", **fields)


def test_a_stream_that_is_left_frees_its_place(client, server):
    stream = client.completions.create(model="lepton", prompt="x", max_tokens=300, n=2, stream=True, temperature=0)
    next(iter(stream))
    stream.close()
    until(lambda: not server.api.calls.under_way)


def test_many_streams_at_once(server, model, tokenizer):
    """Forty over four places, each with a seed of its own."""

    async def text(client, seed):
        asked = {"model": "lepton", "prompt": "fox", "max_tokens": 8, "temperature": 1.0, "seed": seed}
        stream = await client.completions.create(**asked, stream=True)
        return "".join([chunk.choices[0].text async for chunk in stream])

    async def all_texts():
        async with openai.AsyncOpenAI(base_url=f"http://127.0.0.1:{server.port}/v1", api_key="any") as client:
            return await asyncio.gather(*(text(client, seed) for seed in range(40)))

    for seed, found in enumerate(asyncio.run(all_texts())):
        assert [found] == expected(model, tokenizer, ["fox"], max_new_tokens=8, temperature=1.0, seed=seed)
