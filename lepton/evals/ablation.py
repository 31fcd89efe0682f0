"""Run-time ablation: the loss of a trained model with one idea switched off.

The other parts were trained together with the idea. So this measures how much the model uses it, and not how good a
model trained without it would be. Each idea declares how it is switched off (`Idea.switches`).
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

from lepton.model import Network
from lepton.model.ideas.idea import Switch


@dataclass(frozen=True)
class Ablated:
    """A model with one idea switched off."""

    off: str
    nats_per_token: float
    change: float
    """Nats per token more than with everything on."""


def switches(model: Network) -> dict[str, Switch]:
    """Return the switches of the ideas of `model`, by the name that a table shows."""
    return {name: switch for idea in model.ideas.values() for name, switch in idea.switches().items()}


def switched_off(model: Network, name: str) -> AbstractContextManager[dict[str, Any]]:
    """Switch one of `switches(model)` off inside the block, and restore the very same parameters and modules after it.

    Yields the arguments (`think`, `depth`) with which the model is to be called. No state may cross the block's border.
    """
    return switches(model)[name](model)


def ablate(
    model: Network, nats_per_token: Callable[..., float], *, everything: float | None = None, **options: Any
) -> Iterator[Ablated]:
    """Measure `model` with everything on, and then with one idea off at a time; yield each row as soon as it is known.

    `nats_per_token(**options)` measures it; `options` (`depth`, `think`) hold where a switch does not decide them.
    `everything` is what it gives with everything on, where that is known already.
    """
    if everything is None:
        everything = nats_per_token(**options)
    yield Ablated("nothing", everything, 0.0)
    for name, switch in switches(model).items():
        with switch(model) as arguments:
            nats = nats_per_token(**options | arguments)
        yield Ablated(name, nats, nats - everything)
