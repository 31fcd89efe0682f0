"""Reading prompts of different lengths at once, in chunks."""

import pytest
import torch

from lepton.engine import prefill
from lepton.engine.prefill import padded, read_on, read_prompts
from tests.generate.models import BATCH, PROMPT, lively
from tests.laws.lab import assert_close, assert_states


@pytest.mark.parametrize("chunk", [5, 9, 1024])
@pytest.mark.parametrize("variant", ["complete", "dense"])
def test_rows_are_what_they_are_alone(variant, chunk, monkeypatch):
    monkeypatch.setattr(prefill, "PREFILL_CHUNK", chunk)
    model = lively(variant)
    read = read_prompts(model, BATCH, None, depth=1, think=None)
    for row, prompt in enumerate(BATCH):
        opens = torch.arange(len(prompt))[None] == (len(prompt) - 1 if len(prompt) > 1 else -1)
        with torch.no_grad():
            out = model.trunk(torch.tensor([prompt]), opens=opens)
        assert_close(read.hidden_BD[row], out.hidden[0, -1], f"row {row}")
        assert_close(read.signals_B3[row], out.signals[0, -1], f"signals {row}")
        assert_states(out.state, read.state.rows(torch.tensor([row])), f"state {row}")
        assert read.blocks_B[row] == len(prompt) * model.config.layers
    assert read.passes == -(-max(map(len, BATCH)) // chunk)


@pytest.mark.parametrize("eos_id", [0, 7])
def test_padding_ends_no_document(eos_id):
    tokens = padded([[3, 4, 5], [], [6]], eos_id, torch.device("cpu"))
    assert tokens[0].tolist() == [3, 4, 5]
    assert tokens[2, 0] == 6
    assert not (tokens[1:, 1:] == eos_id).any()


@pytest.mark.parametrize("chunk", [5, 9, 1024])
def test_a_conversation_in_one_prompt_is_its_turns_one_by_one(chunk, monkeypatch):
    """Each answer opens a segment where its prompt ended, and no other token does."""
    monkeypatch.setattr(prefill, "PREFILL_CHUNK", chunk)
    model, options = lively("complete"), {"depth": 1, "think": None}
    first, answer, second = PROMPT, [30, 31, 32, 33, 34, 35, 36], [*PROMPT[3:], 4, 5]
    state = read_on(model, [answer], read_prompts(model, [first], None, **options).state, **options)
    turns = read_prompts(model, [second], state, **options)
    opens = [[], [len(first) - 1]]
    whole = read_prompts(model, [[7, 8], first + answer + second], None, **options, opens=opens)
    row = torch.tensor([1])
    assert_close(turns.hidden_BD, whole.hidden_BD[row], "hidden states")
    assert_states(turns.state, whole.state.rows(row), "state")
    plain = read_prompts(model, [first + answer + second], None, **options)
    assert (plain.hidden_BD - turns.hidden_BD).abs().max() > 1e-3, "an opening makes no difference"


def test_reading_on_without_a_text_changes_nothing():
    model = lively("complete")
    state = read_prompts(model, BATCH[:2], None, depth=1, think=None).state
    assert read_on(model, [[], []], state, depth=1, think=None) is state
    one = read_on(model, [[], [5, 6]], state, depth=1, think=None)
    assert_states(state.rows(torch.tensor([0])), one.rows(torch.tensor([0])), "the row without a text")
    assert one.position_B.tolist() == [len(BATCH[0]), len(BATCH[1]) + 2]
