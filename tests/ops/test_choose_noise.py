"""The noise of choosing tokens: uniform, independent in all of its inputs, and accurate where it decides."""

import math

import pytest
import torch

from lepton.ops.choose import Noise, exponentials, noise_bits, noise_keys, stream_words
from tests.ops.choosing import assert_frequencies, in_one_stream, noise_of


def words(what, count=512):
    """Random words [512, 512] whose neighbours differ by 1 in one input, in each direction."""
    ids = torch.arange(count)[None]
    if what == "ids and indices":
        return noise_bits(noise_keys(in_one_stream(count)), ids)
    if what == "ids and rows":
        return noise_bits(noise_keys(noise_of(count, index=torch.zeros(count, dtype=torch.int64))), ids)
    if what == "ids and seeds":
        seeds = torch.tensor([stream_words(seed, 0) for seed in range(count)])
        return noise_bits(noise_keys(Noise(seeds, torch.zeros(count, dtype=torch.int64))), ids)
    if what == "stride of ids":
        return noise_bits(noise_keys(in_one_stream(count)), 4096 * ids)
    assert what == "indices and rows"
    keys = [noise_keys(noise_of(count, index=torch.full((count,), index))) for index in range(count)]
    return torch.stack([noise_bits(each, torch.tensor([[7]]))[:, 0] for each in keys])


WORDS = ["ids and indices", "ids and rows", "ids and seeds", "stride of ids", "indices and rows"]


@pytest.mark.parametrize("what", WORDS)
def test_words_are_uniform(what):
    bits = words(what)
    assert 0 <= bits.min() <= bits.max() < 2**32
    for shift in (0, 8, 16, 24):
        byte = (bits >> shift) & 255
        assert_frequencies(byte.flatten().bincount(minlength=256), torch.full((256,), 1 / 256))
    # Each row and each column on its own: their chi-squares have the mean and the spread of chance.
    for lines in (bits, bits.T):
        counts = torch.stack([(line >> 28).bincount(minlength=16) for line in lines]).double()
        expected = bits.shape[1] / 16
        chi_squares = (counts - expected).square().sum(1) / expected
        assert abs(chi_squares.mean() - 15) < 5 * math.sqrt(30 / len(lines))
        assert chi_squares.max() < 60


@pytest.mark.parametrize("what", WORDS)
def test_neighbouring_words_are_independent(what):
    bits = words(what)
    u = bits.double() / 2**32 - 0.5
    limit = 5 / math.sqrt(bits.numel())
    for one, other in ((u[1:], u[:-1]), (u[:, 1:], u[:, :-1]), (u[1:, 1:], u[:-1, :-1]), (u[2:], u[:-2])):
        assert abs(12 * (one * other).mean()) < limit
        assert abs(180 * ((one**2 - 1 / 12) * (other**2 - 1 / 12)).mean()) < limit
    for one, other in ((bits[1:], bits[:-1]), (bits[:, 1:], bits[:, :-1])):
        pairs = 16 * (one >> 28) + (other >> 28)
        assert_frequencies(pairs.flatten().bincount(minlength=256), torch.full((256,), 1 / 256))
        for bit in range(32):  # every bit changes in half of the cases
            changed = ((one ^ other) >> bit & 1).double().mean()
            assert abs(changed - 0.5) < 0.5 * limit * 1.1


def test_every_place_has_noise_of_its_own():
    keys = {tuple(stream_words(seed, row)) for seed in (0, 1, 2**64 - 1, -(2**63)) for row in range(50)}
    assert len(keys) == 200
    assert len(noise_keys(in_one_stream(5000)).unique(dim=0)) == 5000
    assert torch.equal(noise_keys(in_one_stream(9))[4:], noise_keys(Noise(*(each[4:] for each in in_one_stream(9)))))


def test_exponentials_have_their_distribution_and_accurate_small_values():
    keys, ids = noise_keys(in_one_stream(200)), torch.arange(10_000)[None]
    found = exponentials(keys, ids)
    assert found.dtype == torch.float32
    expected = -torch.log1p(-(noise_bits(keys, ids).double() + 0.5) / 2**32)
    small = expected < 1
    torch.testing.assert_close(found[small].double(), expected[small], rtol=1e-6, atol=0)
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=0.3)  # far out, fp32 is coarse
    assert abs(found.mean() - 1) < 5 / math.sqrt(found.numel())
    bins = (found.double().neg().expm1().neg() * 1000).long().clamp(max=999)
    assert_frequencies(bins.flatten().bincount(minlength=1000), torch.full((1000,), 1e-3))
    tiny = (-torch.expm1(-found.double()) * 2e6).long()  # the smallest ones alone
    counts = tiny.flatten().bincount(minlength=20)[:20]
    assert abs(counts.sum() - 20) < 5 * math.sqrt(20)
