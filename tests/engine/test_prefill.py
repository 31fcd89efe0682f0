"""Reading prompts of different lengths at once, in chunks."""

import pytest
import torch

from lepton.engine import prefill
from lepton.engine.prefill import padded, read_prompts
from tests.generate.models import BATCH, lively
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
