"""`generate`, pipelines and streamers of transformers: without sampling, texts are those of LEPTON."""

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    TextIteratorStreamer,
    pipeline,
)

from lepton.errors import InputError
from lepton.hf.cache import LeptonCache
from tests.cli.tiny import run, save_tiny
from tests.generate.models import BATCH, PROMPT
from tests.hf.small import left_padded, pair

NEW = 24
GREEDY = {"do_sample": False, "max_new_tokens": NEW, "pad_token_id": 1}


def own(model, prompts, **options):
    return model.generate(prompts, NEW, temperature=0, **options)


def new_tokens(row, prompt_columns):
    """The new tokens of a row up to the end of its text."""
    new = row[prompt_columns:].tolist()
    return new[: new.index(0) + 1] if 0 in new else new


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("generate")
    save_tiny(path / "final.pt")
    assert run("export", "--to", "hf", "--checkpoint", path / "final.pt", "--out", path / "hf")[0] == 0
    return path / "hf"


@pytest.mark.parametrize("variant", ["complete", "over tokens", "no thoughts", "odd edges", "dense"])
def test_greedy_text_is_that_of_lepton(variant):
    model, wrapped = pair(variant, torch.float64)
    for prompt in (PROMPT, [7], [0]):
        found = wrapped.generate(torch.tensor([prompt]), **GREEDY)
        assert found[0].tolist() == own(model, prompt), prompt


@pytest.mark.parametrize("variant", ["complete", "over tokens", "dense"])
def test_a_batch_that_is_padded_on_the_left_is_each_prompt_alone(variant):
    model, wrapped = pair(variant, torch.float64)
    tokens, mask = left_padded([torch.tensor(prompt) for prompt in BATCH], 1)
    found = wrapped.generate(tokens, attention_mask=mask, **GREEDY)
    for prompt, row in zip(BATCH, found, strict=True):
        assert new_tokens(row, tokens.shape[1]) == own(model, prompt)[len(prompt) :]


@pytest.mark.parametrize(
    "options", [{"use_cache": False}, {"prefill_chunk_size": 5}, {"depth": 0.4}, {"think": 0}], ids=str
)
def test_however_it_is_read_the_text_is_the_same(options):
    model, wrapped = pair("complete", torch.float64)
    tokens, mask = left_padded([torch.tensor(PROMPT), torch.tensor(PROMPT[:6])], 1)
    found = wrapped.generate(tokens, attention_mask=mask, **GREEDY, **options)
    passed = {name: value for name, value in options.items() if name in ("depth", "think")}
    for prompt, row in zip((PROMPT, PROMPT[:6]), found, strict=True):
        assert new_tokens(row, len(PROMPT)) == own(model, prompt, **passed)[len(prompt) :]


def test_a_conversation_goes_on_from_its_cache():
    model, wrapped = pair("complete", torch.float64)
    first, state = model.generate_with_state(PROMPT, NEW, temperature=0)
    found = wrapped.generate(torch.tensor([PROMPT]), return_dict_in_generate=True, **GREEDY)
    assert found.sequences[0].tolist() == first
    more = [*first, 12, 13, 14]
    second = wrapped.generate(torch.tensor([more]), cache=found.cache, **GREEDY)[0].tolist()
    assert second[len(more) :] == model.generate(more[len(first) - 1 :], NEW, temperature=0, state=state)[4:]


def test_without_a_prompt_a_text_begins_with_the_end_of_a_document():
    model, wrapped = pair("complete", torch.float64)
    assert wrapped.generate(**GREEDY)[0].tolist() == own(model, [0])


def test_a_memory_is_given_as_a_cache(tmp_path):
    model, wrapped = pair("complete", torch.float64)
    _, state = model.generate_with_state(PROMPT, 0)
    state.memory.save(tmp_path / "memory.safetensors")
    cache = LeptonCache(wrapped.network.new_state(1, memory=tmp_path / "memory.safetensors"))
    found = wrapped.generate(torch.tensor([[9, 8, 7]]), cache=cache, **GREEDY)
    assert found[0].tolist() == own(model, [9, 8, 7], memory=tmp_path / "memory.safetensors")


@pytest.mark.parametrize(
    "options", [{"num_beams": 3}, {"do_sample": True, "num_return_sequences": 3, "top_k": 0}], ids=str
)
def test_rows_that_share_a_prompt_are_kept_apart(options):
    """Each text that beams or sampling give is as probable as it is when it is read anew."""
    _, wrapped = pair("complete", torch.float64)
    torch.manual_seed(0)
    found = wrapped.generate(
        torch.tensor([PROMPT]),
        return_dict_in_generate=True,
        output_scores=True,
        **{"max_new_tokens": 12, "pad_token_id": 1, "do_sample": False, **options},
    )
    scores = wrapped.compute_transition_scores(
        found.sequences, found.scores, getattr(found, "beam_indices", None), normalize_logits=True
    )
    opens = (torch.arange(found.sequences.shape[1]) == len(PROMPT) - 1).expand(found.sequences.shape)
    with torch.no_grad():
        logs = wrapped(found.sequences, opens=opens).logits.log_softmax(-1)
    new = found.sequences[:, len(PROMPT) :]
    read = logs[:, len(PROMPT) - 1 : -1].gather(2, new[..., None])[..., 0]
    assert len({tuple(row.tolist()) for row in new}) > 1 or "num_beams" in options
    for row, score, again in zip(new.tolist(), scores, read, strict=True):
        count = row.index(0) + 1 if 0 in row else len(row)
        torch.testing.assert_close(score[:count].double(), again[:count], rtol=0, atol=1e-5)


def test_sampling_draws_from_the_distribution_of_the_logits():
    _, wrapped = pair("complete", torch.float64)
    torch.manual_seed(0)
    prompt = torch.tensor([PROMPT]).expand(2000, -1)
    drawn = wrapped.generate(prompt, do_sample=True, top_k=0, max_new_tokens=1, pad_token_id=1)[:, -1]
    opens = torch.arange(len(PROMPT))[None] == len(PROMPT) - 1
    with torch.no_grad():
        expected = wrapped(prompt[:1], opens=opens).logits[0, -1].softmax(-1)
    share = torch.bincount(drawn, minlength=len(expected)) / len(drawn)
    deviation = (expected * (1 - expected) / len(drawn)).sqrt()
    assert ((share - expected).abs() < 5 * deviation + 1 / len(drawn)).all()


def test_what_generate_cannot_do_with_it_is_said():
    _, wrapped = pair()
    ids = torch.tensor([PROMPT])
    with pytest.raises(InputError, match="cache_implementation='static': the model has a cache of its own"):
        wrapped.generate(ids, cache_implementation="static", **GREEDY)
    with pytest.raises(ValueError, match="assisted generation is not supported with stateful models"):
        wrapped.generate(ids, assistant_model=wrapped, **GREEDY)
    with pytest.raises(ValueError, match="not used by the model"):
        wrapped.generate(ids, dept=0.5, **GREEDY)


def test_a_streamer_gets_the_text_as_it_comes(folder):
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    inputs = tokenizer("The quick", return_tensors="pt")
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True)
    text = model.generate(**inputs, do_sample=False, max_new_tokens=20, streamer=streamer)[0]
    assert "".join(streamer) == tokenizer.decode(text[inputs.input_ids.shape[1] :])


def test_a_pipeline_continues_texts_alone_and_in_a_batch(folder):
    write = pipeline("text-generation", model=str(folder), device="cpu")
    prompts = ["The quick brown fox", "Ein", "The quick brown fox jumps over the lazy dog. Ein süßer Käse"]
    options = {"do_sample": False, "max_new_tokens": 12, "return_full_text": False}
    alone = [write(prompt, **options)[0]["generated_text"] for prompt in prompts]
    together = [found[0]["generated_text"] for found in write(prompts, batch_size=3, **options)]
    assert alone == together
    assert any(alone)


def test_generation_configurations_stand_beside_the_model(folder, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(folder)
    model.generation_config.temperature = 0.5
    model.save_pretrained(tmp_path)
    assert AutoModelForCausalLM.from_pretrained(tmp_path).generation_config.temperature == 0.5
    torch.manual_seed(0)
    text = model.generate(torch.tensor([[5, 6, 7]]))
    assert 3 < text.shape[1] <= 103, "max_new_tokens of the file"
