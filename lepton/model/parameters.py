"""What a module declares of its parameters: what they start from, and what trains them.

A module that owns parameters names each of them in its table `declares`, by its name inside the module; ``*`` stands
for any part of a name. `declared` puts the tables of a model together and refuses a parameter that no table names, or
that two do.
"""

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Declared:
    """Initial value and training of a parameter."""

    initial: Callable[[Tensor], object]
    """Fills the parameter in place, from torch's global generator."""
    optimizer: Literal["muon", "adamw"] = "muon"
    """Muon is for matrices that map hidden states to hidden states."""
    rate: float = 1
    """How much faster it learns than its optimizer's rate says."""
    decays: bool = True
    """Whether it shrinks by weight decay."""
    auxiliary: bool = False
    """Whether only auxiliary losses reach it. Its gradient is clipped apart, which leaves the trunk alone."""

    def but(self, **changes: object) -> "Declared":
        """Return a copy with `changes`."""
        return dataclasses.replace(self, **changes)  # type: ignore[arg-type]


Declarations = Mapping[str, Declared]


def scaled(matrix: Tensor) -> None:
    """Normal with std 1/sqrt(inputs): unit scale in, unit scale out."""
    nn.init.normal_(matrix, std=matrix.shape[1] ** -0.5)


def normal(std: float) -> Callable[[Tensor], object]:
    """Return what fills with a normal of this standard deviation."""
    return partial(nn.init.normal_, std=std)


MATRIX = Declared(scaled)
"""A matrix between hidden states."""
ZERO_MATRIX = Declared(nn.init.zeros_)
"""A matrix that leads back into the stream, and starts by adding nothing."""
FEED = ZERO_MATRIX.but(rate=0.1)
"""A zero matrix that leads into the stream of the deep blocks. At the full rate the quick gains of memory and hint
keep these blocks from learning the same and then more (docs/log.md, 2026-11-26)."""
SCORE = Declared(scaled, optimizer="adamw")
"""A matrix of few rows: scores, gates."""
EMBEDDING_MATRIX = SCORE.but(rate=10)
"""A projection of the embedding. The embedding and its projections learn ten times as fast as AdamW's other parameters:
Adam's step does not depend on the size of a weight, and these start at 0.02, tied to the head; at 6e-4 they lag far
behind the matrices (docs/log.md, 2026-11-22)."""
EMBEDDING = Declared(normal(0.02), optimizer="adamw", rate=10, decays=False)
"""The tied embedding: logits start small, and the input is normed."""
BIAS = Declared(nn.init.zeros_, optimizer="adamw", decays=False)
"""A vector that starts at zero."""


def declared(model: nn.Module) -> dict[str, Declared]:
    """Return the declaration of every parameter of `model` by its name, in the model's order.

    Raises:
        TypeError: a parameter that no module's `declares` names, or that two entries name.
    """
    found: dict[str, list[Declared]] = {name: [] for name, _ in model.named_parameters()}
    for prefix, module in model.named_modules():
        table: Declarations = getattr(module, "declares", {})
        inside = [name for name, _ in module.named_parameters(prefix=prefix)] if table else []
        for name in inside:
            own = name.removeprefix(f"{prefix}.")
            found[name] += [entry for pattern, entry in table.items() if fnmatchcase(own, pattern)]
    wrong = {name: len(entries) for name, entries in found.items() if len(entries) != 1}
    if wrong:
        name, count = next(iter(wrong.items()))
        raise TypeError(f"the parameter '{name}' is declared {count} times; name it once in a module's `declares`")
    return {name: entries[0] for name, entries in found.items()}


@torch.no_grad()
def initialise(model: nn.Module) -> None:
    """Give every parameter its declared initial value, and every buffer the one that its module's `reset` gives."""
    entries = declared(model)
    if any(parameter.is_meta for parameter in model.parameters()):
        return  # there is no memory for values
    for name, parameter in model.named_parameters():
        entries[name].initial(parameter)
    for module in model.modules():
        reset: Callable[[], None] | None = getattr(module, "reset", None)
        if reset is not None:
            reset()
