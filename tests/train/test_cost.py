"""What training is said to compute, against torch's FLOP counter over forward and backward passes."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from lepton.api import Lepton
from lepton.model.size_config import size_config
from lepton.runtime.device import pick_dtype
from lepton.train.batch_plan import plan_batch
from lepton.train.cost import training_flops_per_token, training_seconds

IDEAS = ("thoughts", "memory_heads", "slots", "hint", "router", "drafts", "uncertainty")
OFF = [{name: False if name in ("router", "uncertainty") else 0} for name in IDEAS]
WHOLE = [{}, {"dense": True}]


@pytest.mark.parametrize(
    ("changes", "length"),
    [
        *((changes, length) for changes in WHOLE for length in (100, 512)),
        # With fewer ids: the head is most of the work, is the same without an idea, and would hide what is missing.
        *(({**changes, "vocab_size": 4200}, length) for changes in OFF for length in (100, 512)),
    ],
    ids=str,
)
def test_a_training_step_costs_what_is_said(changes, length):
    model = Lepton(size_config("nano", **changes)).train()
    model.compute_dtype = pick_dtype("auto", torch.device("cpu"))  # without bf16 in hardware it takes minutes
    if model.drafter is not None:
        model.drafter.ids.copy_(torch.arange(len(model.drafter.ids)))
    rows = 8 if length < 200 else 4
    tokens = torch.randint(1, model.config.vocab_size, (rows, length + 1))
    think, groups = plan_batch(model, tokens, seed=0, step=0, micro=0)
    with FlopCounterMode(display=False) as counter:
        model.loss(tokens, think=think, groups=groups).loss.backward()
    said = training_flops_per_token(model, rows, length) * rows * length
    assert counter.get_total_flops() == pytest.approx(said, rel=1e-3)


def test_an_estimate_of_time_is_plausible():
    assert 1e-4 < training_seconds(1e10, 1, torch.device("cpu"), torch.float32) < 1e3
