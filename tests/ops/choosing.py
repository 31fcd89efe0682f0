"""Noise for tests of choosing tokens, and a test of frequencies."""

import math

import torch

from lepton.ops.choose import Noise, stream_words


def noise_of(rows, seed=0, device="cpu", index=None):
    words = torch.tensor([stream_words(seed, row) for row in range(rows)], dtype=torch.int64).reshape(rows, 2)
    index = torch.arange(rows) if index is None else index
    return Noise(words.to(device), index.to(device))


def in_one_stream(count, seed=0):
    """The noise of the first tokens of one text."""
    return Noise(torch.tensor([stream_words(seed, 0)]).expand(count, 2), torch.arange(count))


def assert_frequencies(counts, p):
    """Chi-square, against 5 standard deviations; outcomes that are expected fewer than 5 times count as one."""
    counts, expected = counts.double(), p.double() * counts.sum()
    assert not counts[p == 0].any()
    rare = expected < 5
    counts = torch.cat([counts[~rare], counts[rare].sum()[None]])
    expected = torch.cat([expected[~rare], expected[rare].sum()[None]])
    counts, expected = counts[expected > 0], expected[expected > 0]
    chi_square = ((counts - expected).square() / expected).sum()
    freedom = max(1, len(counts) - 1)
    assert chi_square < freedom + 5 * math.sqrt(2 * freedom)
