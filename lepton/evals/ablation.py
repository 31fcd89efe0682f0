"""What each idea is worth at run time: the model's loss with the idea switched off, nothing retrained.

The other parts were trained with the idea at hand, so this is how much the model uses it, not how good a model
without it could be.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lepton.model import Lepton
from lepton.model.router import Router

BY_LOT = "depth 0.5 by lot"
"""Half depth with tokens drawn at random: what the router's choice is worth is the difference to it."""
DEPTHS = {"depth 0.75": 0.75, "depth 0.5": 0.5, BY_LOT: 0.5, "depth 0": 0.0}


@dataclass(frozen=True)
class Ablated:
    """A model with one idea switched off."""

    off: str
    nats_per_token: float
    change: float
    """Nats a token more than with everything on."""


def ideas(model: Lepton) -> list[str]:
    """Return the names of what can be switched off in `model`."""
    parts = {
        "thoughts": model.thoughts,
        "working memory": model.memory,
        "crystals": model.crystals,
        "peek": model.peek,
        **dict.fromkeys(DEPTHS, model.router),
    }
    return [name for name, part in parts.items() if part is not None]


@contextmanager
def without(model: Lepton, idea: str) -> Iterator[dict[str, Any]]:
    """Switch one of `ideas(model)` off inside the block, and restore the very same parameters and modules after it.

    Yields the arguments (`think`, `depth`) with which the model is to be called. No state may cross the block's border.

    - thoughts: no rounds, so that no group is visible.
    - working memory: its values are zero, and so is all that is read from it.
    - crystals: the store is left out, as in a model that is built without it.
    - peek: the hint is not fed back.
    - depth D: only that share of the tokens goes past the stem; by lot: whatever the router says.
    """
    if idea == "thoughts":
        yield {"think": 0}
    elif idea == "working memory":
        assert model.memory is not None
        memory = model.memory
        with _replaced(memory.qkv.weight, _without_values(memory.qkv.weight, memory.heads, memory.value_dim)):
            yield {}
    elif idea == "crystals":
        crystals, model.crystals = model.crystals, None
        try:
            yield {}
        finally:
            model.crystals = crystals
    elif idea == "peek":
        assert model.peek is not None
        weight = model.peek.back.weight
        with _replaced(weight, weight.new_zeros(weight.shape)):
            yield {}
    elif idea == BY_LOT:
        assert model.router is not None
        with _drawing_lots(model.router):
            yield {"depth": DEPTHS[idea]}
    else:
        yield {"depth": DEPTHS[idea]}


def ablate(
    model: Lepton, nats_per_token: Callable[..., float], *, everything: float | None = None, **options: Any
) -> Iterator[Ablated]:
    """Measure `model` with everything on, and then with one idea off at a time; yields each row once it is known.

    `nats_per_token(**options)` measures it; `options` (`depth`, `think`) hold where a switch does not decide them.
    `everything` is what it gives with everything on, where that is known already.
    """
    if everything is None:
        everything = nats_per_token(**options)
    yield Ablated("nothing", everything, 0.0)
    for idea in ideas(model):
        with without(model, idea) as switch:
            nats = nats_per_token(**options | switch)
        yield Ablated(idea, nats, nats - everything)


@contextmanager
def _drawing_lots(router: Router) -> Iterator[None]:
    """Let the router's scores be uniform in 0..1: far digits of a projection of each state, the same on any path."""
    direction_D = torch.randn(router.benefit.in_features, generator=torch.Generator().manual_seed(0))

    def score(u_BTD: Tensor) -> Tensor:
        precise = u_BTD.to(torch.promote_types(u_BTD.dtype, torch.float32))
        return (precise @ (1000 * direction_D).to(precise)) % 1

    router.score = score  # type: ignore[method-assign]
    try:
        with _replaced(router.quantiles, torch.linspace(0, 1, len(router.quantiles)).to(router.quantiles)):
            yield
    finally:
        del router.score


@contextmanager
def _replaced(parameter: Tensor, value: Tensor) -> Iterator[None]:
    """Let `parameter` hold `value` for a while; its own tensor is put aside, not written to."""
    own = parameter.data
    parameter.data = value
    try:
        yield
    finally:
        parameter.data = own


def _without_values(weight: Tensor, heads: int, value_dim: int) -> Tensor:
    """Return the projection [heads x (query, key, value), width] with zero values."""
    changed = weight.detach().clone()
    changed.unflatten(0, (heads, -1))[:, -value_dim:] = 0
    return changed
