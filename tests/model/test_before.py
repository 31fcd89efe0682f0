"""Files from before ideas had configurations and parts of the state of their own (2026-11-26) load, and mean the same.

`before/` was written by the code of then: a checkpoint with a flat configuration, the state after 61 tokens, its
memory, and the logits that followed.
"""

from pathlib import Path

import pytest
import torch

from lepton import checkpoint
from lepton.api import Lepton

BEFORE = Path(__file__).parent / "before"


@pytest.fixture(scope="module")
def content():
    return checkpoint.load(BEFORE / "checkpoint.pt")


@torch.no_grad()
def test_checkpoint_state_and_memory_go_on_as_they_did(content):
    model = Lepton.from_checkpoint(BEFORE / "checkpoint.pt")
    assert [idea.name for idea in model.config.ideas] == [
        "thoughts", "memory", "crystals", "peek", "router", "drafter", "uncertainty"
    ]  # fmt: skip
    tokens = content["tokens"][:, 61:]
    pasts = {
        "rest": model.load_state(BEFORE / "state.safetensors"),
        "remembered": model.new_state(2, memory=BEFORE / "memory.safetensors"),
    }
    for name, past in pasts.items():
        logits = model(tokens, past).logits[:, -5:]
        torch.testing.assert_close(logits, content[name], rtol=0, atol=1e-4)


@torch.no_grad()
def test_the_state_is_that_of_todays_pass(content):
    model = Lepton.from_checkpoint(BEFORE / "checkpoint.pt")
    past = model(content["tokens"][:, :61]).state
    logits = model(content["tokens"][:, 61:], past).logits[:, -5:]
    torch.testing.assert_close(logits, content["rest"], rtol=0, atol=1e-4)
