"""Law 6: what cannot be predicted is not predicted. A model that beats chance on noise sees its targets."""

import math

import pytest
import torch
import torch.nn.functional as F

from lepton.api import Lepton
from lepton.config import LeptonConfig
from lepton.ops import attention_plan
from tests.laws.lab import CANARIES, SHAPE, VARIANTS, VOCAB

STEPS, ROWS, LENGTH = 100, 16, 64  # a leak shows after so many steps, as the last test says
TO_COPY = 160  # steps after which what can be copied is, and what cannot be is at chance again
FRESH = 256


def noise(rows: int, generator: torch.Generator) -> torch.Tensor:
    return torch.randint(0, VOCAB, (rows, LENGTH), generator=generator)


def pairs(rows: int, generator: torch.Generator) -> torch.Tensor:
    """Rows r r s s t t ...: the first of each pair is chance, the second is certain."""
    return noise(rows, generator)[:, : LENGTH // 2].repeat_interleave(2, 1)


def train(variant: str, sample, steps: int = STEPS) -> tuple[Lepton, torch.Generator]:
    torch.manual_seed(0)
    # No id ends a document here, so that every position has a past to copy from.
    shape = {**SHAPE, **VARIANTS[variant], "vocab_size": VOCAB + 1, "eos_id": VOCAB}
    model = Lepton(LeptonConfig.from_dict(shape))
    generator = torch.Generator().manual_seed(1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3)
    for _ in range(steps):
        optimizer.zero_grad()
        model.loss(sample(ROWS, generator)).loss.backward()
        optimizer.step()
    return model, generator


@torch.no_grad()
def token_losses(model: Lepton, tokens: torch.Tensor) -> torch.Tensor:
    """Nats [B, T - 1] of each token after the first, through the logits."""
    logits = model(tokens[:, :-1]).logits
    return F.cross_entropy(logits.transpose(1, 2), tokens[:, 1:], reduction="none")


def assert_chance(losses: torch.Tensor) -> None:
    error = losses.std().item() / math.sqrt(losses.numel())
    chance = math.log(VOCAB)
    assert losses.mean().item() >= chance - 4 * error, f"{losses.mean():.4f} beats ln V = {chance:.4f}"


@pytest.mark.parametrize("variant", CANARIES)
def test_noise_stays_unpredictable(variant):
    model, generator = train(variant, noise)
    fresh = noise(FRESH, generator)
    losses = token_losses(model, fresh)
    assert losses.numel() > 16_000
    assert_chance(losses)
    through_training_loss = model.loss(fresh).parts["ce"].item()
    assert through_training_loss == pytest.approx(losses.mean().item(), abs=1e-4)


@pytest.mark.parametrize("variant", CANARIES)
def test_only_the_second_of_a_pair_is_predictable(variant):
    model, generator = train(variant, pairs, TO_COPY)
    losses = token_losses(model, pairs(2 * FRESH, generator))
    assert_chance(losses[:, 1::2])
    assert losses[:, 0::2].mean() < 0.5 * math.log(VOCAB), "the canary must be alive: copying is learnable"


def test_the_canary_would_die_of_a_leak(monkeypatch):
    honest = attention_plan.visible

    def leaky(*arguments):
        return honest(*arguments) | honest(*arguments).roll(1, -1)

    monkeypatch.setattr(attention_plan, "visible", leaky)
    model, generator = train("complete", noise)
    with pytest.raises(AssertionError, match="beats ln V"):
        assert_chance(token_losses(model, noise(FRESH, generator)))
