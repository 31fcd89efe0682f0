"""Initial value and optimizer group of parameters, which each module declares for its own.

A module that owns parameters has a table `declares`, with an entry for each by its name inside the module; ``*`` in a
name matches anything. `declared` collects the tables of a model. It refuses a parameter that no entry names, or more
than one.
"""

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Declared:
    """Initial value and optimizer group of a parameter."""

    initial: Callable[[Tensor], object]
    """Fills the parameter in place; random values are from torch's global generator."""
    optimizer: Literal["muon", "adamw"] = "muon"
    """Muon is for matrices between hidden states."""
    rate: float = 1
    """Factor on the optimizer's learning rate."""
    decays: bool = True
    """Whether weight decay applies."""
    auxiliary: bool = False
    """Whether its gradient comes only from auxiliary losses. It is then clipped separately from the trunk's."""
    eps: float | None = None
    """AdamW's: gradients far below it hardly move the parameter. None: the usual one of `lepton.train.optimizer`."""

    def but(self, **changes: object) -> "Declared":
        """Return a copy with `changes`."""
        return dataclasses.replace(self, **changes)  # type: ignore[arg-type]


Declarations = Mapping[str, Declared]


def scaled(matrix: Tensor) -> None:
    """Fill with a normal of standard deviation 1 / sqrt(inputs), which preserves the scale of its input."""
    nn.init.normal_(matrix, std=matrix.shape[1] ** -0.5)


def normal(std: float) -> Callable[[Tensor], object]:
    """Return a function that fills with a normal of this standard deviation."""
    return partial(nn.init.normal_, std=std)


MATRIX = Declared(scaled)
"""A matrix between hidden states."""
ZERO_MATRIX = Declared(nn.init.zeros_)
"""A matrix whose output is added to the residual stream; it starts at 0."""
FEED = ZERO_MATRIX.but(rate=0.1)
"""A zero matrix with which an idea adds to the stream before the deep blocks. At the full rate, memory
and peek learn first, and the deep blocks end up learning less (docs/log.md, 2026-11-26)."""
SCORE = Declared(scaled, optimizer="adamw")
"""A matrix with few rows: scores, gates."""
EMBEDDING_MATRIX = SCORE.but(rate=10)
"""A projection of the embedding. The embedding and its projections learn ten times as fast as AdamW's other parameters:
at AdamW's base rate of 6e-4 they would learn far more slowly than Muon's matrices (docs/log.md, 2026-11-22)."""
EMBEDDING = Declared(normal(0.02), optimizer="adamw", rate=10, decays=False)
"""The embedding, which is also the head: small, so that logits start small. The blocks' input is normed."""
BIAS = Declared(nn.init.zeros_, optimizer="adamw", decays=False)
"""A vector that starts at zero."""


SHIFT = BIAS.but(rate=30)
"""The factors of the token shift. They end far from zero, and start to learn at once (docs/log.md, 2026-11-27)."""
BACKOUT = BIAS.but(initial=lambda number: nn.init.constant_(number, 0.2), rate=100, eps=1e-5)
"""The factor of the stream that is subtracted before the head. It ends near 1 in TINY (docs/log.md, 2026-11-27). Before
the first step blocks add nothing, and its gradient is nothing but rounding: 1e-7, then 1e-3 and more."""


def declared(model: nn.Module) -> dict[str, Declared]:
    """Return the entry of every parameter of `model`, by name, in the order of the model.

    Raises:
        TypeError: no entry names a parameter, or more than one does.
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
    """Set every parameter to its declared initial value, and every buffer by the `reset` of its module."""
    entries = declared(model)
    if any(parameter.is_meta for parameter in model.parameters()):
        return  # on the meta device there are no values
    for name, parameter in model.named_parameters():
        entries[name].initial(parameter)
    for module in model.modules():
        reset: Callable[[], None] | None = getattr(module, "reset", None)
        if reset is not None:
            reset()


@contextmanager
def replaced(parameter: Tensor, value: Tensor) -> Iterator[None]:
    """Let `parameter` have the value `value` inside the block, without writing to its tensor."""
    own = parameter.data
    parameter.data = value
    try:
        yield
    finally:
        parameter.data = own
