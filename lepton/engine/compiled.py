"""A cycle compiled as a whole: what lies between the large kernels becomes a few fused ones.

The cycle is traced to one graph of operators, whose inputs are all tensors that it reads or writes: weights, pool,
places. Inductor compiles that graph. TorchDynamo is not used: there is no Python left to understand in a trace, and the
result is called with the same tensors each time, so there are no guards to check. What Inductor made is kept on disk
for the next process (`compiled_cache`).
"""

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx

from lepton.engine import compiled_cache
from lepton.engine.cycle import Outcome, Shape, cycle
from lepton.engine.pool import Pool
from lepton.model import Network
from lepton.ops.choose import CHOOSE
from lepton.ops.few_rows import FORMS
from lepton.ops.few_writes import FEW_WRITES
from lepton.ops.products import PRODUCTS
from lepton.ops.ring_attention import RING_ATTENTION

if TYPE_CHECKING:
    from lepton.model.ideas.drafter import Prepared

KERNELS = (CHOOSE, FEW_WRITES, PRODUCTS, RING_ATTENTION)
"""The large kernels of a cycle. A cycle that was traced without one of them works, but is too slow to be kept."""


class _Cycle(nn.Module):
    """A cycle as a module, so that its weights can be arguments."""

    def __init__(self, model: Network, pool: Pool, shape: Shape) -> None:
        super().__init__()
        self.model, self.pool, self.shape = model, pool, shape

    def forward(self, held: list[Tensor], place_B: Tensor, prepared: "Prepared | None") -> Outcome:
        with self.pool.holding(held):
            return cycle(self.model, self.pool, place_B, self.shape, prepared)


def traced_cycle(
    model: Network,
    pool: Pool,
    place_B: Tensor,
    shape: Shape,
    prepared: "Prepared | None",
    forms: Mapping[Any, Callable[..., Any]] | None = None,
) -> tuple[torch.fx.GraphModule, list[Tensor], list[str]]:
    """Run a cycle once; return its graph, the tensors to call it with, and the fields of `Outcome` that it returns.

    `forms` are what the graph has in place of some operators.
    """
    module = _Cycle(model, pool, shape)
    named, held = _weights(module), pool.tensors()
    fields: list[str] = []

    def function(*tensors: Tensor) -> list[Tensor]:
        swapped = dict(zip(named, tensors[: len(named)], strict=True))
        own = tensors[len(named) : len(named) + len(held)]
        place, *parts = tensors[len(named) + len(held) :]
        tables = None if prepared is None else type(prepared)(*parts)
        outcome = torch.func.functional_call(module, swapped, (list(own), place, tables))
        found = {name: value for name, value in outcome._asdict().items() if value is not None}
        fields[:] = list(found)
        return list(found.values())

    tensors = _inputs(module, place_B, prepared)
    return make_fx(function, decomposition_table=forms)(*tensors), tensors, fields


def _weights(module: _Cycle) -> dict[str, Tensor]:
    return dict(module.named_parameters()) | dict(module.named_buffers())


def _inputs(module: _Cycle, place_B: Tensor, prepared: "Prepared | None") -> list[Tensor]:
    """Return the tensors that a traced cycle is called with."""
    weights = (each.detach() for each in _weights(module).values())
    return [*weights, *module.pool.tensors(), place_B, *(prepared or ())]


def compiled_cycle(
    model: Network, pool: Pool, place_B: Tensor, shape: Shape, prepared: "Prepared | None"
) -> Callable[[], Outcome]:
    """Compile a cycle, or load it if it was compiled before; return a function that runs it on the tensors that the
    arguments hold now. It runs once here.
    """
    tensors = _inputs(_Cycle(model, pool, shape), place_B, prepared)
    key = compiled_cache.key_of(model, tensors, (shape, pool.places, pool.columns))

    def runner(fields: list[str], compiled: Callable[..., list[Tensor]]) -> Callable[[], Outcome]:
        nothing = dict.fromkeys(Outcome._fields)
        return lambda: Outcome(**nothing | dict(zip(fields, compiled(*tensors), strict=True)))  # type: ignore[arg-type]

    found = None if key is None else compiled_cache.load(key)
    if found is not None:
        run = runner(*found)
        try:
            run()
        except torch.OutOfMemoryError:
            raise
        except Exception:  # it may have been made where other kernels work: then it is made anew
            pass
        else:
            return run
    forms = FORMS if model.device.type == "cpu" else None
    graph, tensors, fields = traced_cycle(model, pool, place_B, shape, prepared, forms)
    compiled = torch._inductor.standalone_compile(graph, [*tensors], dynamic_shapes="from_example_inputs", aot=True)
    # The key does not tell the values of tensors that are no inputs, and not what went wrong with a kernel.
    whole = not any(node.op == "get_attr" for node in graph.graph.nodes)
    if key is not None and whole and all(each.sound for each in KERNELS):
        compiled_cache.save(key, fields, compiled)
    return runner(fields, compiled)
