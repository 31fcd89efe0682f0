"""Law 4, for sampled text: with drafts or without, it has the distribution of plain decoding."""

import itertools

import pytest
import torch

from lepton.api import Lepton
from lepton.config import LeptonConfig
from lepton.generate.sampling import probabilities
from tests.laws.lab import IDEAS, SHAPE, once_a_device

SMALL = {"vocab_size": 6, "draft_vocab": 4, "drafts": 3}
PROMPT = [1, 5, 2, 3, 1, 4, 4, 2, 5, 3]
ROWS = 3000
AHEAD = 4


@once_a_device
def small_model(seed=3):
    """Few ids, so that whole continuations can be counted; two of them are never drafted."""
    torch.manual_seed(seed)
    model = Lepton(LeptonConfig.from_dict({**SHAPE, **IDEAS, **SMALL})).double().eval()
    for parameter in model.parameters():
        parameter.data += 0.6 * torch.randn_like(parameter) / parameter.shape[-1] ** 0.5
    return model


def exact(model, **sampling):
    """The probability of every continuation of AHEAD tokens, or up to the end of the document, under plain decoding."""
    prefixes = list(itertools.product(range(SMALL["vocab_size"]), repeat=AHEAD - 1))
    tokens = torch.tensor([[*PROMPT, *prefix] for prefix in prefixes])
    opens = (torch.arange(tokens.shape[1]) == len(PROMPT) - 1).expand_as(tokens)
    logits = model(tokens, opens=opens).logits[:, len(PROMPT) - 1 :]
    p = probabilities(logits, **sampling).tolist()
    found = {}
    for prefix, steps in zip(prefixes, p, strict=True):
        chance = 1.0
        for i, token in enumerate(prefix):
            chance *= steps[i][token]
            if token == model.config.eos_id:
                found[prefix[: i + 1]] = chance
                break
        else:
            found |= {(*prefix, token): chance * steps[-1][token] for token in range(SMALL["vocab_size"])}
    assert sum(found.values()) == pytest.approx(1)
    return found


@pytest.mark.parametrize(
    ("sampling", "speculative"),
    [
        ({"temperature": 1.0, "top_p": 1.0, "top_k": None}, True),
        ({"temperature": 1.0, "top_p": 0.8, "top_k": None}, True),
        ({"temperature": 1.0, "top_p": 1.0, "top_k": 3}, True),
        ({"temperature": 1.6, "top_p": 0.9, "top_k": 5}, True),
        ({"temperature": 1.6, "top_p": 0.9, "top_k": 5}, False),
    ],
)
def test_sampled_text_has_the_distribution_of_plain_decoding(sampling, speculative):
    for seed in range(3, 9):
        model = small_model(seed)
        expected = exact(model, **sampling)
        options = {**sampling, "seed": 11, "use_speculative": speculative}
        rows, stats = model.generate_with_stats([PROMPT] * ROWS, AHEAD, **options)
        counts = dict.fromkeys(expected, 0)
        for row in rows:
            counts[tuple(row[len(PROMPT) :])] += 1
        assert not any(count for path, count in counts.items() if expected[path] == 0), "an excluded token was returned"
        assert chi_square_p(counts, {path: ROWS * chance for path, chance in expected.items()}) > 1e-3
        # A model drawn on another device may keep nearly all drafts of a place or none: then the next one says more.
        if not speculative or all(0.05 < share < 0.95 for share in stats.acceptance):
            return
    pytest.fail("no model had drafts kept and rejected at every place")


def test_a_row_with_less_room_than_its_neighbours_is_what_it_would_be_alone():
    """Where the row has no room for a draft its neighbours do; accepting it there would draw another token."""
    model = small_model()
    for seed in range(12):
        options = {"max_new_tokens": 8, "temperature": 1.0, "top_p": 1.0, "seed": seed}
        assert model.generate([PROMPT] * 8, **options)[0] == model.generate(PROMPT, **options)


def chi_square_p(counts, expected):
    """The chance of counts at least this far from what is expected; rare outcomes count as one."""
    often = [(counts[path], value) for path, value in expected.items() if value >= 5]
    rest = sum(counts.values()) - sum(count for count, _ in often), sum(expected.values()) - sum(v for _, v in often)
    cells = [*often, rest] if rest[1] >= 5 else often
    statistic = sum((count - value) ** 2 / value for count, value in cells)
    half = torch.tensor([(len(cells) - 1) / 2, statistic / 2], dtype=torch.float64)
    return float(torch.special.gammaincc(half[0], half[1]))
