"""Going on from a state or a memory: what generation has read, and that nothing is lost at the seam."""

import pytest
import torch

from lepton.engine.options import GenerationOptions
from lepton.errors import InputError
from lepton.generate.generation import Generation
from tests.generate.models import BATCH, PROMPT, lively
from tests.laws.lab import VARIANTS, assert_states, build

GREEDY = {"temperature": 0}
SAMPLED = {"temperature": 1.3, "top_p": 1.0, "seed": 0}


@pytest.fixture(scope="module")
def model():
    return lively("complete")


def read(model, prompt, tokens, **past):
    """The state of a model that has read `tokens`, the first of which are `prompt`, in one pass."""
    opens = torch.arange(len(tokens))[None] == len(prompt) - 1
    with torch.no_grad():
        return model(torch.tensor([tokens]), opens=opens, **past).state


@pytest.mark.parametrize("variant", VARIANTS)
def test_ten_tokens_and_ten_more_are_twenty(variant):
    model = lively(variant)
    whole = model.generate(PROMPT, 20, **GREEDY)
    half = (len(whole) - len(PROMPT)) // 2  # 10, or fewer where the text ends by itself
    tokens, state = model.generate_with_state(PROMPT, half, **GREEDY)
    assert tokens + model.generate(tokens[-1:], 20 - half, state=state, **GREEDY)[1:] == whole
    assert_states(read(model, PROMPT, tokens[:-1]), state, "all but the last token")


@pytest.mark.parametrize("variant", ["complete", "dense"])
@pytest.mark.parametrize("speculative", [False, True])
def test_rows_that_end_at_different_places(variant, speculative):
    """Each row's state is that of its own text, whatever its neighbours do after it has ended."""
    model = lively(variant)
    options = {"use_speculative": speculative, **SAMPLED}
    free = model.generate(BATCH, 24, **options)
    stop = [free[2][len(BATCH[2]) + 3], free[0][len(BATCH[0]) + 9]]
    tokens, state = model.generate_with_state(BATCH, 24, stop=stop, **options)
    assert len({len(row) - len(prompt) for row, prompt in zip(tokens, BATCH, strict=True)}) > 1
    for i, (row, prompt) in enumerate(zip(tokens, BATCH, strict=True)):
        assert_states(read(model, prompt, row[:-1]), state.rows(torch.tensor([i])), f"row {i}")
    last = [row[-1:] for row in tokens]
    further = model.generate(last, 8, state=state, **GREEDY)
    for i in range(len(BATCH)):
        assert further[i] == model.generate(last[i], 8, state=state.rows(torch.tensor([i])), **GREEDY)


def test_a_conversation_goes_on_with_the_next_prompt(model):
    tokens, state = model.generate_with_state(PROMPT, 6, **GREEDY)
    turn = [tokens[-1], 20, 30, 40]
    answer = model.generate(turn, 8, state=state, **GREEDY)
    expected, marks = tokens + turn[1:], (len(PROMPT) - 1, len(tokens) + 2)
    for _ in range(8):
        opens = torch.tensor([[i in marks for i in range(len(expected))]])
        expected.append(int(model(torch.tensor([expected]), opens=opens).logits[0, -1].argmax()))
    assert answer[len(turn) :] == expected[-8:]


def test_a_fresh_state_is_none(model):
    for prompt in (PROMPT, [7]):
        for past in ({"state": model.new_state(1)}, {"memory": model.new_state(1).memory}):
            assert model.generate(prompt, 12, **past, **SAMPLED) == model.generate(prompt, 12, **SAMPLED)


@pytest.mark.parametrize("speculative", [False, True])
def test_a_stream_has_the_state_of_the_tokens_taken(model, speculative):
    options = {"use_speculative": speculative, **GREEDY}
    stream = model.generate_stream(PROMPT, 12, **options)
    tokens = list(PROMPT)
    for taken, token in enumerate(stream):
        tokens.append(token)
        expected = read(model, PROMPT, model.generate(PROMPT, taken + 1, **options)[:-1])
        assert_states(expected, stream.state, f"after {taken + 1} tokens")
        assert stream.uncertainty is None
        if taken == 8:
            stream.close()
            assert_states(expected, stream.state, "closed")
    assert tokens + model.generate(tokens[-1:], 3, state=stream.state, **GREEDY)[1:] == model.generate(
        PROMPT, 12, **GREEDY
    )
    assert stream.stats.new_tokens >= 9


def test_no_new_token_leaves_a_state_that_has_read_the_prompt(model):
    tokens, state = model.generate_with_state(BATCH, 0)
    assert tokens == BATCH
    for i, prompt in enumerate(BATCH):
        assert_states(read(model, prompt, prompt), state.rows(torch.tensor([i])), f"row {i}")
    generation = Generation(model, PROMPT, GenerationOptions(max_new_tokens=3, temperature=0))
    assert_states(read(model, PROMPT, PROMPT), generation.state, "before the first token")
    for outputs in generation:
        assert outputs[0].tokens
    assert generation.stats.new_tokens == 3
    assert generation.stats.forward_calls == 1 + generation.stats.steps, "the prompt is read once"


def test_what_is_remembered_changes_what_is_predicted(model, tmp_path):
    """A fact from an earlier text, out of the window's reach: as a value, from a file, and in `forward`."""
    kept = model.generate_with_state(PROMPT * 3, 4, **SAMPLED)[1].memory
    kept.save(tmp_path / "memory.safetensors")

    def scored(prompt=(7, 8), **memory):
        return model.generate_with_logprobs(list(prompt), 12, **memory, **SAMPLED)

    by_value = scored(memory=kept)
    assert by_value.logprobs != scored().logprobs
    assert scored(memory=tmp_path / "memory.safetensors").tokens == by_value.tokens
    assert scored(memory=str(tmp_path / "memory.safetensors")).tokens == by_value.tokens
    both = model.generate([[7, 8], [7, 8]], 12, memory=kept, **SAMPLED)
    assert both[0] == by_value.tokens, "the rows of a batch share a memory of one row"
    tokens = torch.tensor([[7, 8]])
    with torch.no_grad():
        logits = [model(tokens, model.new_state(1, **memory)).logits for memory in ({}, {"memory": kept})]
    assert (logits[0] - logits[1]).abs().max() > 1e-3


def test_a_memory_is_not_changed_by_being_used(model):
    kept = model.generate_with_state(PROMPT, 4, **SAMPLED)[1].memory
    matrix, crystals = kept.parts["memory"].matrix_BNHU.clone(), list(kept)
    state = model.new_state(2, memory=kept)
    state.memory.clear()
    assert torch.equal(kept.parts["memory"].matrix_BNHU, matrix)
    assert list(kept) == crystals


def test_a_memory_of_another_precision_is_taken(model):
    kept = model.generate_with_state(PROMPT, 4, **SAMPLED)[1].memory
    half = lively("complete", torch.bfloat16)
    assert half.new_state(1, memory=kept).part("crystals").kept.states_BCD.dtype == torch.bfloat16
    assert len(half.generate(PROMPT, 3, seed=0, memory=kept)) == len(PROMPT) + 3


OTHER = {"window": 12}


@pytest.mark.parametrize(
    ("past", "named"),
    [
        (lambda model: {"state": model.new_state(2)}, "the state holds 2 rows and the tokens 1"),
        (lambda model: {"state": "stream.safetensors"}, "state='stream.safetensors': give what new_state"),
        (lambda model: {"state": model.new_state(1).memory}, "give what new_state"),
        (lambda model: {"state": build("complete", **OTHER).new_state(1)}, "of another model, its .stem.keys"),
        (lambda model: {"state": build("complete", layers=5).new_state(1)}, "of another model, its .deep.keys"),
        (
            lambda model: {"state": build("no crystals").new_state(1)},
            r"differs in .memory\.crystals",
        ),
        (lambda model: {"state": build("no thoughts").new_state(1)}, "of another model"),
        (lambda model: {"state": build("complete", memory_heads=1).new_state(1)}, "its .memory.memory.matrix_BNHU"),
        (lambda model: {"state": build("complete", dtype=torch.float32).new_state(1)}, "torch.float32 on cpu"),
        (lambda model: {"memory": model.new_state(3).memory}, r"3 rows; give new_state\(3\), not 1"),
        (
            lambda model: {"memory": build("no crystals").new_state(1).memory},
            r"memory: .* differs in .crystals",
        ),
        (lambda model: {"memory": 5}, "memory=5: give state.memory"),
        (lambda model: {"memory": model.new_state(1)}, "give state.memory"),
        (lambda model: {"memory": "nowhere.safetensors"}, "nowhere.safetensors"),
        (
            lambda model: {"state": model.new_state(1), "memory": model.new_state(1).memory},
            "state and memory are both given",
        ),
    ],
)
def test_a_past_that_cannot_be_used(model, past, named):
    for entry in (model.generate, model.generate_stream, model.generate_with_state):
        with pytest.raises(InputError, match=named) as found:
            entry(PROMPT, 2, **past(model))
        assert "\n" not in str(found.value)


def test_the_model_has_it_as_a_method(model):
    tokens, state = model.generate_with_state(PROMPT, max_new_tokens=4, seed=1)
    assert tokens == model.generate(PROMPT, 4, seed=1)
    assert model.generate([tokens[-1]], 3, seed=1, state=state) == model.generate(tokens[-1:], 3, seed=1, state=state)


def test_without_a_window_all_of_a_long_past_is_seen():
    """It is longer than the prompt and the new tokens, which is all that the pool would else have room for."""
    dense, options = lively("dense"), {"temperature": 0, "use_speculative": False}
    past = PROMPT * 20
    state = dense.generate_with_state(past, 0).state
    found = dense.generate_with_logprobs([5, 6, 7], 4, state=state, **options).logprobs
    wanted = dense.generate_with_logprobs([*past, 5, 6, 7], 4, **options).logprobs
    assert [each.chosen for each in found] == pytest.approx([each.chosen for each in wanted], abs=1e-9)
