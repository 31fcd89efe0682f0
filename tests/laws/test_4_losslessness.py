"""Law 4: speculation changes what is computed at once, never what comes out, nor what the model then remembers."""

import dataclasses
import functools
import itertools

import pytest
import torch

from lepton.engine import cycle
from lepton.engine.engine import Engine
from lepton.engine.options import GenerationOptions
from lepton.engine.prefill import read_prompts
from lepton.engine.runner import Runner
from lepton.engine.sequence import Sequence
from lepton.model.ideas.drafter import DrafterConfig
from tests.engine.repeats import found_by_loop
from tests.generate.models import always_drafting, lively, oracle
from tests.laws.lab import CANARIES, VARIANTS, VOCAB, assert_states, half_depth, once_a_device, text

GREEDY = {"temperature": 0}
PLAIN = {"use_speculative": False}
DRAFTS, NEW = 4, 20


@pytest.fixture(autouse=True)
def _always_drafting():
    with always_drafting():
        yield


@once_a_device
def model_of(variant, dtype=torch.float64, **changes):
    return lively(variant, dtype, **changes)


def prompts_of(count, seed=0):
    """Prompts of 1 to 40 tokens: within the window of 8, at its edge and far across it, some with document ends."""
    lengths = torch.randint(1, 41, (count,), generator=torch.Generator().manual_seed(seed)).tolist()
    return [
        text(100 * seed + i, rows=1, length=length, documents=i % 3 == 0)[0].tolist()
        for i, length in enumerate(lengths)
    ]


def with_drafter(model, drafter, action):
    """Run `action` while the model drafts with `drafter`."""
    own, config, model.drafter = model.drafter, model.config, drafter
    if own is None:
        model.config = dataclasses.replace(config, ideas=(*config.ideas, DrafterConfig(vocab=1)))
    try:
        return action()
    finally:
        model.drafter, model.config = own, config


def assert_same_tokens(model, plain, drafted, prompts, **options):
    """Equal, save that fp32 may take the other of two tokens whose logits lie within 1e-5."""
    for a, b, prompt in zip(plain, drafted, prompts, strict=True):
        if a == b:
            continue
        at = next(i for i, (x, y) in enumerate(itertools.zip_longest(a, b)) if x != y)
        assert model.dtype == torch.float32, f"differs at token {at} of {len(a)}"
        opens = torch.arange(at)[None] == len(prompt) - 1
        logits = model(torch.tensor([a[:at]]), opens=opens, **options).logits[0, -1]
        assert abs(float(logits[a[at]] - logits[b[at]])) < 1e-5, f"differs at token {at} of {len(a)}"


# Token for token


@pytest.mark.parametrize(
    ("variant", "dtype"),
    [*((variant, torch.float32) for variant in VARIANTS), *((variant, torch.float64) for variant in CANARIES)],
)
def test_greedy_text_is_that_of_plain_decoding(variant, dtype):
    """With the model's own drafts, and with some that are right three times in four, so that many are kept."""
    model, prompts = model_of(variant, dtype), prompts_of(10)
    plain = model.generate(prompts, NEW, **GREEDY, **PLAIN)
    new = [token for row, prompt in zip(plain, prompts, strict=True) for token in row[len(prompt) :]]
    assert len(set(new)) > 12, "constant text would show nothing"
    assert_same_tokens(model, plain, model.generate(prompts, NEW, **GREEDY), prompts)
    drafter = oracle(model, prompts, NEW, right=0.75)
    drafted, stats = with_drafter(model, drafter, lambda: model.generate_with_stats(prompts, NEW, **GREEDY))
    assert_same_tokens(model, plain, drafted, prompts)
    assert 1.7 < stats.tokens_per_step < 4.5


def test_fifty_prompts_in_fp32():
    model, prompts = model_of("complete", torch.float32), prompts_of(50, seed=1)
    plain = model.generate(prompts, 40, **GREEDY, **PLAIN)
    assert_same_tokens(model, plain, model.generate(prompts, 40, **GREEDY), prompts)


@pytest.mark.parametrize("options", [half_depth("complete"), {"depth": 0}, {"think": 0}, {"think": 4}])
def test_greedy_text_with_the_models_knobs(options):
    model, prompts = model_of("complete"), prompts_of(8, seed=2)
    plain = model.generate(prompts, 30, **GREEDY, **PLAIN, **options)
    assert plain == model.generate(prompts, 30, **GREEDY, **options)
    drafter = oracle(model, prompts, 30, right=0.75, **options)
    assert plain == with_drafter(model, drafter, lambda: model.generate(prompts, 30, **GREEDY, **options))


@pytest.mark.parametrize("new", [1, 2, 3, 5, 6, 7])
def test_the_last_token_is_the_last_that_was_asked_for(new):
    model, prompts = model_of("complete"), prompts_of(6, seed=3)
    plain = model.generate(prompts, new, **GREEDY, **PLAIN)
    for right in (1.0, 0.5):
        drafter = oracle(model, prompts, new, right=right)
        assert plain == with_drafter(model, drafter, lambda: model.generate(prompts, new, **GREEDY))


def test_what_ends_the_text_ends_it_inside_a_chunk():
    """At every place of a chunk: an id, a pair of ids that two cycles may share, and the end of the document."""
    model, prompts = model_of("complete"), prompts_of(4, seed=4)
    whole = model.generate(prompts, 20, **GREEDY, **PLAIN)
    drafter = oracle(model, prompts, 20)
    cuts = set()
    texts = [row[len(prompt) :] for row, prompt in zip(whole, prompts, strict=True)]
    for new, at in itertools.product(texts, range(2, 8)):
        if at >= len(new):  # that text ended by itself
            continue
        for stop in ([new[at]], [new[at - 1 : at + 1]]):
            plain = [until(stop, row, len(prompt)) for row, prompt in zip(whole, prompts, strict=True)]
            options = {"max_new_tokens": 20, "stop": stop, **GREEDY}
            assert plain == with_drafter(model, drafter, functools.partial(model.generate, prompts, **options))
            cuts |= {(len(row) - len(prompt) - 2) % (DRAFTS + 1) for row, prompt in zip(plain, prompts, strict=True)}
    assert cuts == set(range(DRAFTS + 1))
    assert plain == model.generate(prompts, **options, **PLAIN)


def until(stop, row, start):
    """A row cut after the first `stop`, an id or a pair of ids, that follows its prompt of `start` tokens."""
    wanted = stop[0] if isinstance(stop[0], list) else stop
    ends = (end for end in range(start + len(wanted), len(row)) if row[end - len(wanted) : end] == wanted)
    return row[: next(ends, len(row))]


def test_the_end_of_the_document_is_the_last_token():
    tokens = [
        token for row in model_of("complete").generate(prompts_of(6, seed=4), 40, **GREEDY) for token in row[-30:]
    ]
    eos = max(set(tokens), key=tokens.count)
    model, prompts = model_of("complete", eos_id=eos), prompts_of(24, seed=5)
    plain = model.generate(prompts, 30, **GREEDY, **PLAIN)
    ends = {len(row) - len(prompt) for row, prompt in zip(plain, prompts, strict=True) if row[-1] == eos}
    assert len(ends - {30}) > 3, "rows end at different places"
    for right in (1.0, 0.75):
        drafter = oracle(model, prompts, 30, right=right)
        assert plain == with_drafter(model, drafter, lambda: model.generate(prompts, 30, **GREEDY))


# What the model then remembers


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_state_is_that_of_a_model_that_never_drafted(variant):
    """In the pool, after each cycle, of rows of different lengths: keys, values, memory, crystals and thoughts."""
    model, prompts = model_of(variant), prompts_of(4, seed=6)
    drafter = oracle(model, prompts, 24, right=0.6)

    def check():
        runner = Runner(model, len(prompts), max(map(len, prompts)) + 24)
        engine = Engine(runner, ahead=0)
        options = GenerationOptions(max_new_tokens=24, temperature=0)
        sequences = [
            Sequence(prompt, options, stops=[[model.config.eos_id]], stream=(0, row))
            for row, prompt in enumerate(prompts)
        ]
        for sequence in sequences:
            engine.add(sequence)
        plain, read = [read_prompts(model, [prompt], None, depth=1, think=None).state for prompt in prompts], [0] * 4
        while not engine.idle:
            engine.step()
            for row, sequence in enumerate(sequences):
                if sequence.place is None:
                    continue
                for token in sequence.new[read[row] : -1]:
                    plain[row] = model.trunk(torch.tensor([[token]]), plain[row]).state
                read[row] = max(0, len(sequence.new) - 1)
                assert_states(plain[row], runner.pool.read(sequence.place, model), f"row {row}")
        return engine.stats

    with torch.no_grad():
        stats = with_drafter(model, drafter, check)
    assert 1.3 < stats.tokens_per_step < 4.5


# What it saves


def chunks(new, segment):
    """Tokens of each cycle if all drafts are right: a chunk begins at an opening or contains none."""
    found, phase = [], 1  # the last prompt token opened a segment
    while sum(found) < new - 1:
        found.append(min(DRAFTS + 1, segment - phase, new - 1 - sum(found)))
        phase = (phase + found[-1]) % segment
    return found


@pytest.mark.parametrize("right", [1.0, 0.0, 0.5])
@pytest.mark.parametrize("variant", ["complete", "dense"])
def test_tokens_per_step_follow_the_drafter(variant, right, monkeypatch):
    monkeypatch.setattr(cycle, "looked_up", lambda _text, drafts_BY, _never: drafts_BY)
    model, new = model_of(variant), 1 + 8 * (DRAFTS + 1)
    candidates = prompts_of(12, seed=7)
    plain = model.generate(candidates, new, **GREEDY, **PLAIN)
    whole = [(p, row) for p, row in zip(candidates, plain, strict=True) if len(row) == len(p) + new and len(p) > 1]
    prompts, rows = zip(*whole, strict=True)
    drafter = oracle(model, list(prompts), new, right=right)
    tokens, stats = with_drafter(model, drafter, lambda: model.generate_with_stats(list(prompts), new, **GREEDY))
    assert tokens == list(rows)
    most = chunks(new, model.config.segment if variant == "complete" else 1 << 20)
    if right == 1:
        assert stats.forward_calls == 1 + len(most)
        assert stats.tokens_per_step == (new - 1) / len(most)
        assert len(stats.acceptance) == max(most) - 1
        assert min(stats.acceptance) > 0.85, "the oracle does not know what follows the last token"
    elif right == 0:
        assert stats.forward_calls == new
        assert stats.acceptance == [0.0] * (max(most) - 1)
        assert stats.tokens_per_step == 1
    else:
        assert 1.5 < stats.tokens_per_step < 2.4


def test_text_that_repeats_itself_is_drafted_from_itself():
    """Its drafter is always wrong: each pass accepts what a loop finds by lookup, and no more."""
    model, new = model_of("dense"), 200
    prompts = prompts_of(12, seed=7)
    plain = model.generate(prompts, new, **GREEDY, **PLAIN)
    drafter = oracle(model, prompts, new, right=0)
    tokens, stats = with_drafter(model, drafter, lambda: model.generate_with_stats(prompts, new, **GREEDY))
    assert tokens == plain
    steps, written = 0, 0
    for prompt, row in zip(prompts, plain, strict=True):
        known = len(prompt) + 1  # the pass over the prompt gave one
        written += len(row) - known
        while known < len(row):
            pairs = zip(found_by_loop(row[:known], DRAFTS, model.config.eos_id), row[known:], strict=False)
            known += 1 + sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))
            steps += 1
    assert stats.tokens_per_step == pytest.approx(written / steps, rel=0.02)  # the last pass of a text writes less
    assert stats.tokens_per_step > 1.5


def test_a_model_without_a_drafter_decodes_plainly():
    prompts = prompts_of(3, seed=8)
    sampled = {"temperature": 1.0, "seed": 4}
    for variant in ("dense", "no drafts"):
        model = model_of(variant)
        tokens, stats = model.generate_with_stats(prompts, 12, **sampled)
        assert tokens == model.generate(prompts, 12, **sampled, **PLAIN)
        assert (stats.drafted, stats.tokens_per_step) == ([], 1.0)


def test_speculation_computes_no_more_than_it_drafts():
    model, shapes = model_of("complete"), []
    hook = model.stem[0].register_forward_pre_hook(lambda _, args: shapes.append(args[0].shape[:2].numel()))
    prompt = prompts_of(1, seed=9)[0]
    tokens = model.generate(prompt, 20, **GREEDY, **PLAIN)
    assert sum(shapes) == len(tokens) - 1
    shapes.clear()
    stats = model.generate_with_stats(prompt, 20, **GREEDY)[1]
    hook.remove()
    assert sum(shapes) == stats.positions == len(prompt) + stats.steps * (1 + DRAFTS)
    assert sum(stats.drafted) <= stats.steps * DRAFTS
    assert stats.drafted[0] <= stats.steps < VOCAB


@pytest.mark.parametrize("options", [{"temperature": 1.3, "top_p": 0.9}, {"temperature": 0.7, "top_k": 9}])
@pytest.mark.parametrize("variant", CANARIES)
def test_sampled_text_is_that_of_plain_decoding(variant, options):
    """The noise of a token belongs to its place in the text, not to the pass that computes it."""
    model, prompts = model_of(variant), prompts_of(12, seed=11)
    plain = model.generate(prompts, 30, seed=3, **options, **PLAIN)
    drafted, stats = model.generate_with_stats(prompts, 30, seed=3, **options)
    assert drafted == plain
    assert model.generate(prompts[4:6], 30, seed=3, **options) != plain[4:6], "rows have noise of their own"
    if model.drafter is not None:
        assert stats.drafted
