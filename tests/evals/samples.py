"""Batches, and chances of being wrong with their outcomes."""

import torch

from lepton.data.shards import Batch
from tests.laws.lab import text


def batches(rows=4, length=40, seed=5):
    tokens = text(seed, rows=rows, length=length)
    return [Batch(tokens[i : i + 2], torch.tensor([length, length - 9])) for i in range(0, rows, 2)]


def chances(count, seed=0, ties=False):
    """Chances of being wrong, and outcomes that follow them somewhat."""
    generator = torch.Generator().manual_seed(seed)
    chance = torch.rand(count, generator=generator, dtype=torch.float64)
    if ties:
        chance = (chance * 4).round() / 4
    wrong = (torch.rand(count, generator=generator, dtype=torch.float64) < 0.2 + 0.6 * chance).double()
    return chance, wrong
