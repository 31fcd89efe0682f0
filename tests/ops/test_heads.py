"""Queries and keys of heads, one coordinate at a time."""

import pytest
import torch

from lepton.ops.heads import NORM_EPS, ending_in, norm, rotate, shifted


def test_the_norm_divides_by_the_root_of_the_mean_square():
    x = torch.randn(3, 5, dtype=torch.float64)
    expected = torch.stack([row / (sum(value**2 for value in row) / 5 + NORM_EPS) ** 0.5 for row in x])
    torch.testing.assert_close(norm(x), expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize("head_dim", [4, 16, 20])
def test_a_pair_turns_by_its_angle(head_dim):
    """As complex numbers; the second half stays."""
    pairs = head_dim // 4
    x, angle = torch.randn(2, 3, head_dim, dtype=torch.float64), torch.randn(2, 1, pairs, dtype=torch.float64)
    turned = torch.complex(x[..., :pairs], x[..., pairs : 2 * pairs]) * torch.exp(1j * angle)
    expected = torch.cat([turned.real, turned.imag, x[..., 2 * pairs :]], -1)
    torch.testing.assert_close(rotate(x, angle.cos(), angle.sin()), expected, rtol=1e-12, atol=1e-12)


def test_only_the_last_coordinate_is_replaced():
    x, last = torch.randn(2, 3, 4, 8), torch.randn(2, 3)
    found = ending_in(x, last)
    assert torch.equal(found[..., :-1], x[..., :-1])
    assert torch.equal(found[..., -1], last[..., None].expand(2, 3, 4))
    assert torch.equal(ending_in(x, x.new_zeros(()))[..., -1], torch.zeros(2, 3, 4))


def test_shifted_keys_are_half_of_the_token_before():
    k_BJKH = torch.randn(2, 5, 3, 8)
    starts_BJ = torch.tensor([[True, False, False, False, False], [False, False, True, False, False]])
    found = shifted(k_BJKH, starts_BJ)
    assert torch.equal(found[..., :4], k_BJKH[..., :4])
    for b in range(2):
        for j in range(5):
            before = torch.zeros(3, 4) if starts_BJ[b, j] else k_BJKH[b, j - 1, :, 4:]
            assert torch.equal(found[b, j, :, 4:], before)
