"""A cycle compiled as a whole: what lies between the large kernels becomes a few fused ones.

The cycle is traced to one graph of operators, whose inputs are all tensors that it reads or writes: weights, pool,
places. Inductor compiles that graph. TorchDynamo is not used: there is no Python left to understand in a trace, and the
result is called with the same tensors each time, so there are no guards to check.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx

from lepton.engine.cycle import Outcome, Shape, cycle
from lepton.engine.pool import Pool
from lepton.model import Network


class _Cycle(nn.Module):
    """A cycle as a module, so that its weights can be arguments."""

    def __init__(self, model: Network, pool: Pool, shape: Shape) -> None:
        super().__init__()
        self.model, self.pool, self.shape = model, pool, shape

    def forward(self, held: list[Tensor], place_B: Tensor, proposals_ZE: Tensor | None) -> Outcome:
        with self.pool.holding(held):
            return cycle(self.model, self.pool, place_B, self.shape, proposals_ZE)


def traced_cycle(
    model: Network, pool: Pool, place_B: Tensor, shape: Shape, proposals_ZE: Tensor | None
) -> tuple[torch.fx.GraphModule, list[Tensor], list[str]]:
    """Run a cycle once; return its graph, the tensors to call it with, and the fields of `Outcome` that it returns."""
    module = _Cycle(model, pool, shape)
    named = dict(module.named_parameters()) | dict(module.named_buffers())
    weights, held = [value.detach() for value in named.values()], pool.tensors()
    given = [place_B] if proposals_ZE is None else [place_B, proposals_ZE]
    fields: list[str] = []

    def function(*tensors: Tensor) -> list[Tensor]:
        swapped = dict(zip(named, tensors[: len(weights)], strict=True))
        own = tensors[len(weights) : len(weights) + len(held)]
        place, proposals = (*tensors[len(weights) + len(held) :], None)[:2]
        outcome = torch.func.functional_call(module, swapped, (list(own), place, proposals))
        found = {name: value for name, value in outcome._asdict().items() if value is not None}
        fields[:] = list(found)
        return list(found.values())

    tensors: list[Tensor] = [*weights, *held, *given]
    return make_fx(function)(*tensors), tensors, fields


def compiled_cycle(
    model: Network, pool: Pool, place_B: Tensor, shape: Shape, proposals_ZE: Tensor | None
) -> Callable[[], Outcome]:
    """Compile a cycle; return a function that runs it on the tensors that the arguments hold now."""
    graph, tensors, fields = traced_cycle(model, pool, place_B, shape, proposals_ZE)
    compiled = torch._inductor.compile(graph, list(tensors))
    nothing = dict.fromkeys(Outcome._fields)

    def run() -> Outcome:
        return Outcome(**nothing | dict(zip(fields, compiled(*tensors), strict=True)))  # type: ignore[arg-type]

    return run
