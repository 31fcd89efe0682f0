"""How much each row of a batch thinks in training: a pure function of seed, step and micro-batch."""

import torch
from torch import Tensor

from lepton.config import LeptonConfig
from lepton.model.thoughts import USUAL_ROUNDS, late_rows
from lepton.model.timeline import Timeline

ROUNDS = (0, 1, 2, 2, 2, 2, 2, 2, 2, 2, 2, 2, 2, 2, 2, 4)
"""Rounds are drawn from these, so that any number works afterwards, and none at all. Mostly it is the usual number:
drawing all of them alike may cost it (docs/log.md). More than the usual goes to `late_rows` rows of a batch at most."""
GROUPS = 4
"""The usual bound on a row's segments is a multiple of this, and leaves room for so many documents in a row that few
batches need another one, twice as large: each bound is a program of its own."""


def usual_groups(length: int, segment: int) -> int:
    """Return the bound on the segments that open in a row of `length` targets, unless it holds many documents."""
    return -(-((length + 1) // segment + GROUPS) // GROUPS) * GROUPS


def plan_thoughts(
    config: LeptonConfig, tokens_BT: Tensor, seed: int, step: int, micro: int
) -> tuple[Tensor | None, int | None]:
    """Return the rounds of each row [B], or None without thoughts, and a bound on the segments that open in a row.

    Args:
        config: of the model.
        tokens_BT: a batch as `Lepton.loss` takes it, on the CPU.
        seed: of the run.
        step: of the optimizer.
        micro: which part of the step's batch.
    """
    rows = len(tokens_BT)
    nothing = torch.zeros(rows, dtype=torch.int64)
    timeline = Timeline.read(tokens_BT[:, :-1], nothing, nothing, eos_id=config.eos_id, segment=config.segment)
    groups = usual_groups(tokens_BT.shape[1] - 1, config.segment)
    while groups < timeline.opening_BG.shape[1]:
        groups *= 2
    if not config.thoughts:
        return None, groups
    generator = torch.Generator().manual_seed(((seed * 1_000_003 + step) * 1_009 + micro) % 2**64)
    rounds_B = torch.tensor(ROUNDS)[torch.randint(len(ROUNDS), (rows,), generator=generator)]
    rounds_B[(rounds_B > USUAL_ROUNDS).nonzero()[late_rows(rows) :]] = USUAL_ROUNDS
    return rounds_B, groups
