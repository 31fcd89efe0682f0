"""The engine: what comes back, what is computed, what stays untouched."""

import contextlib
import itertools
import random

import numpy as np
import pytest
import torch

from lepton.engine import prefill
from lepton.errors import InputError
from tests.generate.models import BATCH, PROMPT, always_drafting, lively
from tests.laws.lab import VARIANTS, build

GREEDY = {"temperature": 0}


@pytest.fixture(autouse=True)
def _always_drafting():
    with always_drafting():
        yield


@pytest.fixture(scope="module")
def model():
    return lively("complete")


@contextlib.contextmanager
def embedded_shapes(model):
    """Note the shape [rows, tokens] of each chunk that passes the token embedding."""
    shapes = []
    hook = model.embed.register_forward_pre_hook(lambda module, args: shapes.append(tuple(args[0].shape)))
    yield shapes
    hook.remove()


def naive_greedy(model, prompt, new, **options):
    """Recompute everything for every token."""
    tokens = list(prompt)
    for _ in range(new):
        opens = torch.arange(len(tokens))[None] == len(prompt) - 1
        tokens.append(int(model(torch.tensor([tokens]), opens=opens, **options).logits[0, -1].argmax()))
        if tokens[-1] == model.config.eos_id:
            break
    return tokens


def is_greedy(model, prompt, tokens, **options):
    """Whether each new token is the likeliest in one pass over the text: by law 1 that is what `naive_greedy` takes."""
    opens = torch.arange(len(tokens))[None] == len(prompt) - 1
    logits = model(torch.tensor([tokens]), opens=opens, **options).logits[0, len(prompt) - 1 : -1]
    return tokens == prompt + logits.argmax(-1).tolist()


@pytest.mark.parametrize("variant", VARIANTS)
def test_greedy_equals_recomputing_everything(variant):
    model = lively(variant)
    assert model.generate(PROMPT, 16, temperature=0) == naive_greedy(model, PROMPT, 16)


def test_the_models_knobs_reach_every_pass(model):
    knobs = [{"depth": 0.5}, {"depth": 0}, {"think": 0}, {"think": 1}, {}]
    found = [model.generate(PROMPT, 40, temperature=0, **each) for each in knobs]
    assert {len(tokens) for tokens in found} == {len(PROMPT) + 40}
    for tokens, each in zip(found, knobs, strict=True):
        assert [is_greedy(model, PROMPT, tokens, **other) for other in knobs] == [other == each for other in knobs]
    assert len(set(map(tuple, found))) == len(knobs)


@pytest.mark.parametrize("speculative", [False, True])
def test_a_prompt_longer_than_a_prefill_chunk(model, monkeypatch, speculative):
    options = {"temperature": 0, "use_speculative": speculative}
    expected = naive_greedy(model, PROMPT * 3, 12)
    for chunk, parts in ((7, [7] * 6), (41, [41, 1]), (42, [42])):
        monkeypatch.setattr(prefill, "PREFILL_CHUNK", chunk)
        with embedded_shapes(model) as shapes:
            assert model.generate(PROMPT * 3, 12, **options) == expected
        assert shapes[: len(parts)] == [(1, part) for part in parts]
        if not speculative:
            assert shapes[len(parts) :] == [(1, 1)] * 11


@pytest.mark.parametrize("chunk", [5, 1024])
def test_rows_of_a_batch_equal_the_rows_alone(model, monkeypatch, chunk):
    monkeypatch.setattr(prefill, "PREFILL_CHUNK", chunk)
    stop = [[11], [42, 17]]
    together = model.generate(BATCH, 24, temperature=0, stop=stop)
    assert together == [model.generate(row, 24, temperature=0, stop=stop) for row in BATCH]
    sampled = model.generate(BATCH, 24, temperature=1.3, seed=5)
    assert sampled[0] == model.generate(BATCH[0], 24, temperature=1.3, seed=5)
    assert sampled[:2] == model.generate(BATCH[:2], 24, temperature=1.3, seed=5)


def test_equal_rows_draw_from_different_streams(model):
    first, second = model.generate([PROMPT, PROMPT], 20, seed=5)
    assert first != second


def test_a_seed_repeats_and_none_does_not(model):
    assert model.generate(PROMPT, 20, seed=7) == model.generate(PROMPT, 20, seed=7)
    assert model.generate(PROMPT, 20, seed=7) != model.generate(PROMPT, 20, seed=8)
    assert model.generate(PROMPT, 20, temperature=2.0) != model.generate(PROMPT, 20, temperature=2.0)


def test_sampling_arguments_reach_the_sampler(model):
    greedy = model.generate(PROMPT, 10, temperature=0)
    assert model.generate(PROMPT, 10, temperature=5.0, top_k=1) == greedy
    assert model.generate(PROMPT, 10, temperature=5.0, top_p=1e-9) == greedy
    assert model.generate(PROMPT, 10, temperature=5.0, top_p=1.0, seed=1) != greedy


# Stopping


def test_end_of_document_stops_and_is_kept(model):
    whole = model.generate(PROMPT, 20, temperature=0)
    ending = next(i for i in range(len(PROMPT) + 3, len(whole)) if whole[i] not in whole[:i])
    assert model.config.eos_id not in whole, "the text is one document in both models"
    ends = lively("complete", eos_id=whole[ending])
    assert ends.generate(PROMPT, 50, temperature=0) == whole[: ending + 1]


def test_stop_ids_and_sequences_are_kept(model):
    def run(stop=None):
        return model.generate(PROMPT, 30, temperature=2.0, seed=4, stop=stop)

    whole = run()
    new = whole[len(PROMPT) :]
    assert len(new) == 30
    assert len(set(new)) > 20
    for stop in (new[10], [new[10]], [[new[10]]], torch.tensor([new[10]]), np.int64(new[10])):
        assert run(stop) == PROMPT + new[: new.index(new[10]) + 1]
    pairs = list(itertools.pairwise(new))
    assert run([list(pairs[10])]) == PROMPT + new[: pairs.index(pairs[10]) + 2]
    assert run([[new[11], new[10]], list(pairs[10]), new[20]]) == run([list(pairs[10])])
    across = (PROMPT[-1], new[0])
    assert across not in pairs
    assert run([list(across)]) == whole, "only new tokens count"


def test_no_new_tokens_cost_nothing(model):
    with embedded_shapes(model) as shapes:
        assert model.generate(PROMPT, 0) == PROMPT
        assert list(model.generate_stream(PROMPT, 0)) == []
        assert model.generate_with_uncertainty([PROMPT, [1]], 0) == ([PROMPT, [1]], [[], []])
    assert shapes == []


# Honest compute and purity


def test_only_new_tokens_are_computed(model):
    with embedded_shapes(model) as shapes:
        new = len(model.generate(PROMPT, 20, temperature=0, use_speculative=False)) - len(PROMPT)
    assert sum(rows * tokens for rows, tokens in shapes) == len(PROMPT) + new - 1


def test_every_cycle_drafts_alike(model):
    """A cycle computes the newest token and all drafts, also where fewer could still be handed out."""
    with embedded_shapes(model) as shapes:
        model.generate(PROMPT, 1)
        assert shapes == [(1, len(PROMPT))], "the prompt alone gives the first token"
        model.generate(PROMPT, 2)
        model.generate(PROMPT, 40)
    assert {shape for shape in shapes if shape[1] != len(PROMPT)} == {(1, 1 + model.drafter.count)}


@pytest.mark.parametrize(
    ("variant", "seed"),
    [*(("complete", seed) for seed in (0, 20241126130100, (1 << 64) - 1, -(1 << 63), np.int64(7))), ("dense", 7)],
)
def test_asking_for_more_changes_no_token(variant, seed):
    model = lively(variant)
    options = {"temperature": 1.3, "top_p": 1.0, "seed": seed}
    most = model.generate(BATCH, 30, **options)
    for new in (1, 2, 3, 5, 7, 12):
        asked = model.generate(BATCH, new, **options)
        assert asked == [row[: len(prompt) + new] for row, prompt in zip(most, BATCH, strict=True)]
    assert [*PROMPT, *model.generate_stream(PROMPT, 7, **options)] == most[0][: len(PROMPT) + 7]
    new = most[0][len(PROMPT) :]
    end = new.index(new[len(new) // 2]) + 1
    assert model.generate(PROMPT, 30, stop=new[end - 1], **options) == PROMPT + new[:end]


def test_padding_opens_no_segments(model, monkeypatch):
    """Shorter prompts are filled up with a token that does not end a document: each end would be thought about."""
    groups = []
    monkeypatch.setattr(model.thoughts, "forward", lambda *args: groups.append(args[4].opening_BG) or forward(*args))
    forward = type(model.thoughts).forward.__get__(model.thoughts)
    model.generate([[7], PROMPT * 2], 1)
    assert groups[0].shape == (2, len(PROMPT) * 2 // model.config.segment + 1)


def test_finished_rows_leave_the_batch(model):
    options = {"temperature": 2.0, "seed": 3, "use_speculative": False}
    whole = model.generate(BATCH, 30, **options)
    stop = whole[2][len(BATCH[2]) + 4]
    ended = model.generate(BATCH, 30, stop=stop, **options)
    lengths = [len(row) - len(prompt) for row, prompt in zip(ended, BATCH, strict=True)]
    assert len(set(lengths)) > 1
    with embedded_shapes(model) as shapes:
        model.generate(BATCH, 30, stop=stop, **options)
    prefill, *decoding = shapes
    assert prefill == (len(BATCH), max(map(len, BATCH)))
    assert decoding == [(sum(length > step for length in lengths), 1) for step in range(1, max(lengths))]


@pytest.mark.parametrize("training", [True, False])
def test_nothing_changes(training):
    model = build("complete").train(training)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    random_states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    model.generate(PROMPT, 8)
    model.generate(BATCH, 8, seed=3)
    model.generate_with_uncertainty(PROMPT, 8)
    stream = model.generate_stream(PROMPT, 8)
    next(stream)
    assert torch.is_grad_enabled(), "between two tokens the caller's own mode holds"
    stream.close()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert model.training is training
    assert torch.equal(torch.get_rng_state(), random_states[0])
    assert random.getstate() == random_states[1]
    assert np.random.get_state()[1].tolist() == random_states[2]


def test_no_graph_is_kept(model):
    """Memory would grow with every token if the state carried a graph."""
    made = []
    hook = model.embed.register_forward_hook(lambda module, args, out: made.append(out.requires_grad))
    model.generate(PROMPT, 9, temperature=0)
    hook.remove()
    assert len(made) > 1
    assert not any(made)


# The other two ways in


def test_the_stream_is_generate_token_by_token(model):
    stream = model.generate_stream(PROMPT, 15, seed=4, stop=[[3, 3]])
    assert [*PROMPT, *stream] == model.generate(PROMPT, 15, seed=4, stop=[[3, 3]])


def test_the_stream_computes_on_demand_and_can_be_left(model):
    with embedded_shapes(model) as shapes:
        stream = model.generate_stream(PROMPT, 15, temperature=0)
        assert shapes == []
        next(stream)
        assert len(shapes) == 1
        next(stream)
        assert len(shapes) == 2
        stream.close()
        assert list(stream) == []
    assert len(shapes) == 2


def test_the_stream_follows_one_prompt(model):
    with pytest.raises(InputError, match="one prompt, not a list of 4"):
        model.generate_stream(BATCH)


def test_stats_count_what_was_done(model):
    (tokens, stats), plain = (
        model.generate_with_stats(BATCH, 30, seed=2, depth=0.5, temperature=1.5),
        model.generate_with_stats(BATCH, 30, seed=2, depth=0.5, temperature=1.5, use_speculative=False)[1],
    )
    assert tokens == model.generate(BATCH, 30, seed=2, depth=0.5, temperature=1.5)
    new = sum(len(row) - len(prompt) for row, prompt in zip(tokens, BATCH, strict=True))
    assert stats.new_tokens == new
    assert stats.step_tokens == new - len(BATCH)
    assert stats.steps >= stats.drafted[0]
    assert stats.drafted == sorted(stats.drafted, reverse=True)
    assert stats.accepted == sorted(stats.accepted, reverse=True)
    assert model.config.stem_layers < stats.mean_depth < model.config.layers
    assert stats.forward_calls < plain.forward_calls
    assert (plain.tokens_per_step, plain.drafted, plain.acceptance) == (1.0, [], [])
    assert plain.positions == sum(map(len, BATCH)) + plain.steps


def test_stats_of_nothing(model):
    stats = model.generate_with_stats(PROMPT, 0)[1]
    assert stats.to_dict() == {
        "new_tokens": 0,
        "forward_calls": 0,
        "tokens_per_step": 0.0,
        "acceptance": [],
        "mean_depth": 0.0,
    }


@pytest.mark.parametrize("depth", [0, 1])
def test_mean_depth_at_its_ends(model, depth):
    stats = model.generate_with_stats(BATCH, 12, depth=depth, seed=1)[1]
    assert stats.mean_depth == (model.config.layers if depth else model.config.stem_layers)


def test_the_model_has_them_as_methods(model):
    assert model.generate(PROMPT, max_new_tokens=6, seed=1) == model.generate(PROMPT, 6, seed=1)
    assert [*PROMPT, *model.generate_stream(PROMPT, max_new_tokens=6, seed=1)] == model.generate(PROMPT, 6, seed=1)
    tokens, doubts = model.generate_with_uncertainty(PROMPT, max_new_tokens=6, seed=1)
    assert (len(tokens), len(doubts)) == (len(PROMPT) + 6, 6)


@pytest.mark.parametrize("mixed", [False, True])
def test_bf16_models_generate(mixed):
    """Parameters in bf16, or in fp32 with activations in bf16 as in training."""
    model = lively("complete", torch.float32 if mixed else torch.bfloat16)
    model.compute_dtype = torch.bfloat16 if mixed else None
    tokens, stats = model.generate_with_stats(BATCH, 12, seed=0)
    assert len(tokens) == len(BATCH)
    assert stats.drafted
    assert all(0 <= doubt <= 1 for row in model.generate_with_uncertainty(BATCH, 5)[1] for doubt in row)


@pytest.mark.gpu
def test_a_gpu_gives_the_same_tokens(model):
    on_gpu = lively("complete").cuda()
    stop = [[11], [42, 17]]
    options = {"max_new_tokens": 40, "temperature": 1.3, "top_p": 0.8, "seed": 5, "stop": stop}
    assert on_gpu.generate(BATCH, **options) == model.generate(BATCH, **options)
    assert on_gpu.generate(torch.tensor(PROMPT).cuda(), **options) == model.generate(PROMPT, **options)
    (tokens, doubts), expected = (made.generate_with_uncertainty(PROMPT, **options) for made in (on_gpu, model))
    assert tokens == expected[0]
    assert doubts == pytest.approx(expected[1])


def test_a_diverged_model_is_named():
    model = build("complete")
    with torch.no_grad():
        model.blocks[0].mlp.down.weight.fill_(float("nan"))
    with pytest.raises(InputError, match="not finite"):
        model.generate(PROMPT, 3)


@torch.no_grad()
@pytest.mark.parametrize("think", [None, 0, 1, 4])
def test_tokens_that_think_are_generated_as_by_plain_passes(think):
    """With and without drafts, alone and in a batch, whatever the number of rounds."""
    model = build("over tokens", dtype=torch.float32)
    prompts = [[5, 6, 7, 8, 9, 10, 11], [3], [9, 8, 7, 6, 5, 4, 3, 2, 1, 9, 8, 7]]
    greedy = {"temperature": 0.0, "think": think}
    found = model.generate(prompts, 24, use_speculative=True, **greedy)
    assert found == model.generate(prompts, 24, use_speculative=False, **greedy)
    assert found[0] == model.generate([prompts[0]], 24, **greedy)[0]
    tokens = torch.tensor([prompts[2]])
    opens = torch.arange(tokens.shape[1])[None] == tokens.shape[1] - 1
    out, text = model(tokens, opens=opens, think=think), [*prompts[2]]
    while len(text) < len(found[2]):
        text.append(int(out.logits[0, -1].argmax()))
        out = model(torch.tensor([text[-1:]]), out.state, think=think)
    assert text == found[2]
