"""The rules that accept drafts: that of blocks keeps the distribution, and lengths are what is expected."""

import itertools

import pytest
import torch

from benchmarks.acceptance_rules import accept_blocks, accepted_drafts, expected_lengths, measure, prompts_of
from lepton.data.shards import ShardedDataset
from lepton.engine.prefill import read_prompts
from tests.cli.test_calibrate import write_shards
from tests.cli.tiny import tiny_model
from tests.laws.test_4_distribution import chi_square_p

TOKENS, DRAFTS, ROWS = 3, 2, 60_000


@pytest.fixture(scope="module")
def drafted():
    """Distributions that depend on the tokens before; q lacks the last token. With drafts of q, and all of p."""
    generator = torch.Generator().manual_seed(0)

    def table(places):
        return (1.5 * torch.randn(places, TOKENS, generator=generator, dtype=torch.float64)).softmax(-1)

    p, q = ([table(TOKENS**i) for i in range(DRAFTS + 1)] for _ in range(2))
    lacking = torch.tensor([1.0, 1.0, 0.0], dtype=torch.float64)
    q = [each * lacking / (each * lacking).sum(-1, keepdim=True) for each in q]
    place, drafts = torch.zeros(ROWS, dtype=torch.int64), []
    p_B, q_B = [p[0][place]], []
    for i in range(DRAFTS):
        q_B.append(q[i][place])
        drafts.append(torch.multinomial(q_B[-1], 1, generator=generator)[:, 0])
        place = TOKENS * place + drafts[-1]
        p_B.append(p[i + 1][place])
    return torch.stack(p_B, 1), torch.stack(q_B, 1), torch.stack(drafts, 1), p, generator


def test_blocks_keep_the_distribution(drafted):
    p_BTV, q_BKV, drafts_BK, p, generator = drafted
    accepted_B, next_B = accept_blocks(p_BTV, q_BKV, drafts_BK, generator)
    place = torch.zeros(ROWS, dtype=torch.int64)
    for i in range(DRAFTS + 1):  # accepted drafts, the token after them, then tokens of p
        own_B = torch.multinomial(p[i][place], 1, generator=generator)[:, 0]
        kept_B = drafts_BK[:, i] if i < DRAFTS else own_B
        place = TOKENS * place + torch.where(i < accepted_B, kept_B, torch.where(i == accepted_B, next_B, own_B))
    counts, expected = {}, {}
    for path in itertools.product(range(TOKENS), repeat=DRAFTS + 1):
        number = [sum(token * TOKENS ** (i - 1 - j) for j, token in enumerate(path[:i])) for i in range(DRAFTS + 2)]
        counts[path] = int((place == number[-1]).sum())
        expected[path] = ROWS * float(torch.stack([p[i][number[i], path[i]] for i in range(DRAFTS + 1)]).prod())
    assert sum(expected.values()) == pytest.approx(ROWS)
    assert chi_square_p(counts, expected) > 1e-3
    wrong = {path: expected[path] * (1.1 if path[0] else 0.9) for path in expected}
    assert chi_square_p(counts, wrong) < 1e-3, "the test must see a distribution that is a tenth off"


def test_lengths_are_those_that_are_drawn_and_blocks_are_longer(drafted):
    p_BTV, q_BKV, drafts_BK, _, generator = drafted
    token_B, block_B = expected_lengths(p_BTV, q_BKV, drafts_BK)
    drawn_B = accept_blocks(p_BTV, q_BKV, drafts_BK, generator).accepted_B.double()
    assert drawn_B.mean().item() == pytest.approx(block_B.mean().item(), abs=0.01)
    assert block_B.mean() > token_B.mean() + 0.005
    least = torch.minimum(p_BTV[:, 0], q_BKV[:, 0]).sum(-1).mean()
    assert token_B.mean() > least  # the first draft alone


def test_equal_distributions_accept_everything(drafted):
    p_BTV, _, _, _, generator = drafted
    drafts_BK = torch.stack([torch.multinomial(p_BTV[:, i], 1, generator=generator)[:, 0] for i in range(DRAFTS)], 1)
    for lengths_B in expected_lengths(p_BTV, p_BTV[:, :-1], drafts_BK):
        assert torch.allclose(lengths_B, torch.full_like(lengths_B, DRAFTS))


def test_a_model_is_measured(tmp_path):
    """Its figures are means over the cycles of rows that still run."""
    model = tiny_model().eval()
    rows = torch.randint(3, 300, (8, 130), generator=torch.Generator().manual_seed(0)).numpy()
    data = ShardedDataset(write_shards(tmp_path, rows), seq_len=64, seed=0, split="val", vocab_size=320)
    prompts = prompts_of(data, 6)
    assert {len(prompt) for prompt in prompts} == {64}
    prefilled = read_prompts(model, prompts, None, depth=1.0, think=None)
    options = {"temperature": 1.0, "top_p": 0.9, "new_tokens": 12}
    found = measure(model, prefilled, **options)
    cycles = list(accepted_drafts(model, prefilled, **options))
    assert found["cycles"] == sum(each.shape[1] for each in cycles)
    mean = 1 + torch.cat(cycles, 1).mean(1)
    assert list(found["tokens_per_cycle"].values()) == pytest.approx(mean.tolist(), abs=1e-4)
    assert all(1 < each <= 1 + model.drafter.count for each in found["tokens_per_cycle"].values())
