"""Forward and backward of micro-batches: eager, compiled, or captured on a GPU and replayed.

A GPU's host takes longer to launch the thousands of kernels of a micro-batch than the GPU to run them. So the first
micro-batch of a shape is captured as a CUDA graph, which later ones replay in one launch. The parts that the model
repeats are compiled, each once, and not the whole model: compile time grows with the size of the program.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch._functorch import config as autograd_config

from lepton.errors import reason
from lepton.model import Network
from lepton.model.objective import WHOLE, Step
from lepton.runtime.cuda_graphs import CudaGraphs
from lepton.train.batch_plan import plan_step
from lepton.train.cost import seconds_of
from lepton.train.mixed_precision import LowPrecisionCopies

WARM_UP = 2
"""Runs of a shape before its first capture, so that compilation and setup at first use are done."""
TIMED = 3
"""Runs of which the fastest is the time of a micro-batch."""
CACHE_ALL = "autograd_cache_allow_custom_autograd_functions"
"""PyTorch's option, off by default, to keep on disk also what it has traced of functions with a gradient of their own,
such as `SquaredReLU` (benchmarks/results/2026-11-27-compile-cache.json)."""


@dataclass(frozen=True)
class Inputs:
    """A micro-batch on the device."""

    tokens: Tensor
    lengths_B: Tensor
    think_B: Tensor | None
    share: Tensor
    targets_BT: Tensor | None = None
    opens_BT: Tensor | None = None
    rate: Tensor | None = None
    """Share of the peak learning rate."""
    served_BT: Tensor | None = None

    def copy_(self, other: "Inputs") -> None:
        """Copy the values of another micro-batch of the same shape into these tensors."""
        for mine, theirs in zip(vars(self).values(), vars(other).values(), strict=True):
            if mine is not None:
                mine.copy_(theirs, non_blocking=True)


class MicroStep:
    """Adds the gradients of micro-batches to the parameters' own, and their loss terms to `figures`.

    The gradients' memory is kept from step to step: whoever uses them sets them to zero, and not to None.
    """

    def __init__(
        self,
        model: Network,
        *,
        compiled: bool,
        captured: bool = True,
        say: Callable[[str], None] = print,
        phase: Callable[[str], AbstractContextManager[None]] = lambda name: nullcontext(),
    ) -> None:
        """Make one for `model`.

        Args:
            model: on its device.
            compiled: whether the parts that repeat are compiled.
            captured: whether micro-batches are captured, on a GPU.
            say: prints messages: what takes long, and what does not work here.
            phase: names what a block of the work is, so that its seconds can be counted; see `Phases`.
        """
        self._model = model
        self._copies = LowPrecisionCopies(model)
        self._say, self._phase = say, phase
        self._parts: list[tuple[nn.Module, str, Callable[..., Any]]] = []
        if compiled:
            self._parts = [
                (module, name, torch.compile(getattr(module, name), dynamic=False))
                for module, name in compiled_parts(model)
            ]
        device = model.device
        self.graphs = CudaGraphs(device) if captured and device.type == "cuda" else None
        """Of micro-batches, by their shapes; None without capture. Gradients and figures lie outside their memory."""
        self._places: dict[Any, Inputs] = {}
        """The tensors that the graph of a shape reads."""
        self._names: list[str] = []
        self._sums: Tensor | None = None

    def prepare(self, batch_size: int, seq_len: int, *, answers: bool = False) -> None:
        """Compile and capture batches of this shape before the clock runs; if that fails, say why and do without.

        `answers`: whether only those are targets, and open segments.
        """
        if not self._parts and self.graphs is None:
            return
        if self._parts:
            self._say("compiling, which takes a minute or so; --no_compile starts at once and runs slower")
        while self._parts or self.graphs is not None:
            try:
                self._run_idle(batch_size, seq_len, answers=answers)
                break
            except torch.OutOfMemoryError:
                self._forget()
                raise
            except Exception as error:  # of many types; none should stop a run that works without
                what = "compile" if self._parts else "capture"
                self._say(f"cannot {what} here ({reason(error)}): going on without, which runs slower")
                self.graphs = CudaGraphs(self._model.device) if self._parts and self.graphs is not None else None
                self._parts = []
                self._places.clear()
        self._forget()

    def seconds(self, batch_size: int, seq_len: int) -> float:
        """Return the seconds of a micro-batch of a shape that is prepared. Nothing is added, gradients are set to zero.

        What compilation and capture have not done before is counted.
        """
        device = self._model.device
        found = min(seconds_of(lambda: self._run_idle(batch_size, seq_len), device) for _ in range(TIMED))
        self._forget()
        return found

    def _run_idle(self, batch_size: int, seq_len: int, *, answers: bool = False) -> None:
        """Run a micro-batch of this shape that has no share in a step."""
        tokens = torch.full((batch_size, seq_len + 1), int(self._model.config.eos_id == 0))
        think, groups, step = plan_step(self._model, tokens, seed=0, step=0, micro=0)
        targets = torch.ones(batch_size, seq_len, dtype=torch.bool) if answers else None
        opens = None if targets is None else torch.zeros_like(targets)
        self(tokens, torch.full((batch_size,), seq_len + 1), think, groups, 0.0, targets, opens, step)

    def _forget(self) -> None:
        """Set the gradients and the sums of the figures to zero."""
        for parameter in self._model.parameters():
            if parameter.grad is not None:
                parameter.grad.zero_()
        if self._sums is not None:
            self._sums.zero_()

    def __call__(
        self,
        tokens: Tensor,
        lengths: Tensor,
        think: Tensor | None,
        groups: int | None,
        share: float,
        targets: Tensor | None = None,
        opens: Tensor | None = None,
        step: Step = WHOLE,
    ) -> None:
        """Run a micro-batch that makes up `share` of its step; the rest on the CPU, as `Network.loss` takes it."""
        device = self._model.device
        of_step = (torch.tensor(step.rate), step.served_BT)
        given = (tokens, lengths, think, torch.tensor(share), targets, opens, *of_step)
        inputs = Inputs(*(None if value is None else _to_device(value, device) for value in given))  # type: ignore[arg-type]
        if self.graphs is None:
            with self._compiled():
                self._run(inputs, groups)
            return
        counted = any(idea.opens for idea in self._model.ideas.values())
        key = (
            tuple(tokens.shape),
            groups if counted else None,
            *(value is None for value in (targets, opens, step.served_BT)),
        )
        with torch.cuda.device(device):  # streams belong to the current one
            if key not in self._places:
                self.graphs.clear()  # the first run of another shape needs the memory that they hold
                with self._phase("compile" if self._parts else "load"):
                    self._places[key] = self._warmed_up(inputs, groups)
            place = self._places[key]
            if key not in self.graphs:
                with self._compiled(), self._phase("record"):
                    self.graphs.capture(key, lambda: self._run(place, groups))
            place.copy_(inputs)
            self.graphs.replay(key)

    def take_figures(self) -> dict[str, Tensor]:
        """Return the sums of the loss terms since the last call, each weighted by its micro-batch's share."""
        assert self._sums is not None
        figures = dict(zip(self._names, self._sums.clone().unbind(), strict=True))
        self._sums.zero_()
        return figures

    def _run(self, inputs: Inputs, groups: int | None) -> None:
        with _tf32_products(self._model), self._copies.swapped_in():
            loss = self._model.loss(
                inputs.tokens,
                lengths=inputs.lengths_B,
                targets=inputs.targets_BT,
                think=inputs.think_B,
                groups=groups,
                opens=inputs.opens_BT,
                step=Step(1.0 if inputs.rate is None else inputs.rate, inputs.served_BT),
            )
            (loss.loss * inputs.share).backward()
        self._names = ["loss" if name == "ce" else name for name in loss.parts]
        terms = torch.stack([term.float() for term in loss.parts.values()])
        if self._sums is None:
            self._sums = torch.zeros_like(terms)
        self._sums += terms * inputs.share

    def _warmed_up(self, inputs: Inputs, groups: int | None) -> Inputs:
        """Run a micro-batch of this shape without adding anything; return the inputs that its graph will read."""
        idle = replace(inputs, share=torch.zeros_like(inputs.share))
        for parameter in self._model.parameters():
            if parameter.grad is None and parameter.requires_grad:
                parameter.grad = torch.zeros_like(parameter)
        aside = torch.cuda.Stream()
        aside.wait_stream(torch.cuda.current_stream())
        with self._compiled(), torch.cuda.stream(aside):
            for _ in range(WARM_UP):
                self._run(idle, groups)
        torch.cuda.current_stream().wait_stream(aside)
        return idle

    @contextmanager
    def _compiled(self) -> Iterator[None]:
        """Run the compiled parts inside the block. Outside, shapes vary, and the model runs eagerly."""
        cached = bool(self._parts) and hasattr(autograd_config, CACHE_ALL)
        try:
            for module, name, function in self._parts:
                setattr(module, name, function)
            with autograd_config.patch(CACHE_ALL, True) if cached else nullcontext():
                yield
        finally:
            for module, name, _ in self._parts:
                module.__dict__.pop(name, None)


def compiled_parts(model: Network) -> list[tuple[nn.Module, str]]:
    """Return modules and the names of their functions that are compiled, each by itself; equal ones share a graph."""
    blocks: list[tuple[nn.Module, str]] = [(block, "forward") for block in [*model.stem, *model.blocks]]
    own = [(idea, *name.rpartition(".")) for idea in model.ideas.values() for name in idea.compiled]
    return blocks + [(idea.get_submodule(inside), name) for idea, inside, _, name in own]


@contextmanager
def _tf32_products(model: Network) -> Iterator[None]:
    """Allow TF32 for fp32 products on a GPU, if the model's activations have a lower precision.

    Those are products of the memory, whose queries, keys and values come from products in half precision.
    """
    if not model.embed.weight.is_cuda or model.dtype.itemsize >= torch.float32.itemsize:
        yield
        return
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def _to_device(value: Tensor, device: torch.device) -> Tensor:
    if device.type == "cuda":
        return value.pin_memory().to(device, non_blocking=True)
    return value.to(device)
