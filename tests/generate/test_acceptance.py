"""The acceptance rule alone: exact enumeration, one-hots, and places without a draft."""

import itertools

import pytest
import torch
from lepton.generate.acceptance import accept

V = 4


def conditionals(places, seed, zeros=0.0):
    """Random p_i(. | path) for every path of at most `places` tokens: {path: [V]}."""
    generator = torch.Generator().manual_seed(seed)
    table = {}
    for length in range(places + 1):
        for path in itertools.product(range(V), repeat=length):
            weights = torch.rand(V, generator=generator, dtype=torch.float64) ** 2
            weights *= torch.rand(V, generator=generator) >= zeros
            weights[int(torch.randint(V, (1,), generator=generator))] += 0.1
            table[path] = weights / weights.sum()
    return table


def midpoints(n):
    return (torch.arange(n, dtype=torch.float64) + 0.5) / n


@pytest.mark.parametrize(("seed", "zeros"), [(0, 0.0), (1, 0.4), (2, 0.7)])
def test_one_draft_by_exact_integration(seed, zeros):
    """Every draft, with a fine grid over both uniforms: the token at place 0 is distributed as p."""
    p, q = (conditionals(1, seed + shift, zeros)[()] for shift in (0, 100))
    grid = midpoints(401)
    uniforms, draws = (each.flatten() for each in torch.meshgrid(grid, grid, indexing="ij"))
    total = torch.zeros(V, dtype=torch.float64)
    for d in range(V):
        if q[d] == 0:
            continue
        n = len(uniforms)
        p_ATV = torch.stack([p, p]).expand(n, -1, -1)
        result = accept(p_ATV, q.expand(n, 1, V), torch.full((n, 1), d), uniforms[:, None], draws)
        first = torch.where(result.accepted_A > 0, d, result.next_A)
        total += q[d] * first.bincount(minlength=V) / n
        assert result.accepted_A.double().mean() == pytest.approx(min(1, float(p[d] / q[d])), abs=0.003)
    torch.testing.assert_close(total, p, rtol=0, atol=0.006)
    assert not total[p == 0].any(), "what p excludes is never returned"


def test_a_chain_of_drafts_has_the_joint_distribution_of_p():
    """Three drafts from q, tokens after rejection by p alone: chi-square against the product of p's conditionals."""
    p, q = conditionals(3, 7, 0.3), conditionals(3, 8, 0.3)
    n, places = 60_000, 3
    uniform = torch.rand(n, 2 * places + 1, dtype=torch.float64)
    paths = torch.zeros(n, 0, dtype=torch.int64)

    def table(of, length):
        return torch.stack([of[path] for path in itertools.product(range(V), repeat=length)])

    def code(ids):
        return (ids * V ** torch.arange(ids.shape[1] - 1, -1, -1)).sum(1)

    p_ATV, q_AYV = [table(p, 0)[code(paths)]], []
    for i in range(places):
        q_AYV.append(table(q, i)[code(paths)])
        paths = torch.cat([paths, torch.multinomial(q_AYV[-1], 1)], 1)
        p_ATV.append(table(p, i + 1)[code(paths)])
    result = accept(torch.stack(p_ATV, 1), torch.stack(q_AYV, 1), paths, uniform[:, :places], uniform[:, -1])
    assert set(result.accepted_A.tolist()) == set(range(places + 1))
    # The first token, and the second where there is one: a row that kept at least one draft says both.
    first = torch.where(result.accepted_A > 0, paths[:, 0], result.next_A)
    second = torch.where(result.accepted_A > 1, paths[:, 1], result.next_A)
    assert_frequencies(first.bincount(minlength=V), p[()])
    for token in range(V):
        kept = (result.accepted_A > 0) & (paths[:, 0] == token)
        if kept.any():
            assert_frequencies(second[kept].bincount(minlength=V), p[(token,)])


def assert_frequencies(counts, p):
    """Chi-square below its mean by no more than five standard deviations, and nothing impossible."""
    expected = p * counts.sum()
    assert not counts[p == 0].any()
    possible = expected > 0
    freedom = int(possible.sum()) - 1
    statistic = float(((counts - expected) ** 2 / expected)[possible].sum())
    assert statistic < freedom + 5 * (2 * freedom) ** 0.5 + 1, (counts, expected)


def one_hot(*tokens):
    return torch.nn.functional.one_hot(torch.tensor([tokens]), V).double()


@pytest.mark.parametrize("u", [0.0, 0.5, 1 - 2**-53])
@pytest.mark.parametrize(
    ("drafts", "accepted", "following"),
    [([1, 2, 3], 3, 0), ([1, 2, 0], 2, 3), ([1, 0, 3], 1, 2), ([0, 2, 3], 0, 1), ([2, 2, 2], 0, 1)],
)
def test_greedy_keeps_what_agrees_whatever_the_numbers(u, drafts, accepted, following):
    draws = torch.full((1, 3), u, dtype=torch.float64)
    result = accept(one_hot(1, 2, 3, 0), one_hot(*drafts), torch.tensor([drafts]), draws, draws[:, 0])
    assert [each.tolist() for each in result] == [[accepted], [following]]


def test_a_place_without_a_draft_ends_the_row():
    """Rows of a batch have room for different numbers of drafts; what stands in the rest is not looked at."""
    p = torch.full((3, 3, V), 0.25, dtype=torch.float64)
    q = p[:, :2].clone()
    q[0] = 0
    q[1, 1] = 0
    zeros = torch.zeros(3, 2, dtype=torch.float64)
    result = accept(p, q, torch.ones(3, 2, dtype=torch.int64), zeros, torch.full((3,), 0.6, dtype=torch.float64))
    assert result.accepted_A.tolist() == [0, 1, 2]
    assert result.next_A.tolist() == [2, 2, 2], "drawn from all of p"


def test_no_drafts_is_plain_sampling():
    p = torch.tensor([[[0.1, 0.2, 0.3, 0.4]]], dtype=torch.float64)
    nothing = torch.zeros(1, 0, dtype=torch.float64)
    result = accept(p, p[:, :0], nothing.long(), nothing, torch.tensor([0.65], dtype=torch.float64))
    assert [each.tolist() for each in result] == [[0], [3]]


def test_a_rest_lost_to_rounding_falls_back_to_p():
    p = torch.tensor([[[0.5, 0.5, 0, 0]] * 2], dtype=torch.float64)
    q = p[:, :1].clone()
    q[0, 0, 0] = q[0, 0, 1] = 0.5 + 2**-53
    trial = torch.tensor([[1 - 2**-53]], dtype=torch.float64)
    result = accept(p, q, torch.tensor([[0]]), trial, torch.tensor([0.9], dtype=torch.float64))
    assert result.next_A.tolist() == [1]
