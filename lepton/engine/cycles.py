"""How cycles run: operator by operator, compiled, or as CUDA graphs."""

import itertools
import warnings
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import cast

import torch
from torch import Tensor

from lepton.engine.compiled import compiled_cycle
from lepton.engine.cycle import Outcome, Shape, cycle
from lepton.engine.pool import Pool
from lepton.engine.prepared_drafter import PreparedDrafter
from lepton.engine.scheduler import ENOUGH
from lepton.engine.speculation import bucket_of
from lepton.errors import reason
from lepton.model import Network
from lepton.ops.choose import CHOOSE
from lepton.runtime.cuda_graphs import CudaGraphs

TOGETHER = 32
"""On a GPU: rows that share a pass whether they open a segment or not."""


class Cycles:
    """The cycles of a model over a pool, in which `places` sequences have a place. On a GPU one more is nobody's."""

    def __init__(self, model: Network, pool: Pool, places: int, drafter: PreparedDrafter) -> None:
        self._model, self._pool, self._places, self._drafter = model, pool, places, drafter
        self._device = model.device
        self._graphs = CudaGraphs(self._device)
        self._place_B = torch.zeros(2 * bucket_of(places), dtype=torch.int64, device=self._device)
        self._places_before: list[int] = []
        self._compiled: dict[Shape, Callable[[], Outcome]] = {}

    @property
    def are_compiled(self) -> bool:
        """Whether some of them were compiled."""
        return bool(self._compiled)

    def run(self, places: list[int], shape: Shape) -> Outcome:
        """Run the cycle of the sequences in some places, which rise."""
        return self._captured(places, shape) if self._captures else self._plain(places, shape)

    def _plain(self, places: list[int], shape: Shape) -> Outcome:
        """Run a cycle without a CUDA graph: as `warm_up` has compiled it, else operator by operator."""
        shape = replace(shape, whole=places == list(range(self._pool.places)))
        place_B = torch.tensor(places, device=self._device)
        prepared = self._drafter.get(shape.drafts)
        compiled = self._compiled.get(replace(shape, rounds=self._bound(shape.opening, shape.rounds)))
        if compiled is None:
            return cycle(self._model, self._pool, place_B, shape, prepared)
        self._place_B[: len(places)].copy_(place_B)
        return compiled()

    @property
    def _captures(self) -> bool:
        """Whether cycles can be captured: nothing in one may wait for the device."""
        on_gpu = self._device.type == "cuda" and CHOOSE.works(self._device, torch.float32)
        return on_gpu and self._model.dtype != torch.float64

    def _captured(self, places: list[int], shape: Shape) -> Outcome:
        """Run a cycle as a CUDA graph. Rows are padded to a power of two with those of a place that nobody has."""
        rows = self._bucket(len(places), shape.opening, shape.drafts)
        shape = replace(shape, rows=rows, rounds=self._bound(shape.opening, shape.rounds), static=True)
        place_B = self._place_B[:rows]
        self._drafter.get(shape.drafts)
        if shape not in self._graphs:
            self._capture(shape, place_B)
        padded = places + [self._places] * (rows - len(places))
        if self._places_before != padded:
            place_B.copy_(torch.tensor(padded).pin_memory(), non_blocking=True)
            self._places_before = padded
        return cast(Outcome, self._graphs.replay(shape))

    def _bucket(self, rows: int, opening: bool, drafts: int) -> int:
        """Return the number of rows that a captured cycle has: a power of two.

        Openings apart have few different ones: a least number for those that open, or with drafts those that may, and
        then four times as many.
        """
        bucket = bucket_of(rows)
        if not opening or self._places <= TOGETHER:
            return bucket
        padded = bucket_of(self._places) // (4 if drafts else ENOUGH)
        while padded < bucket:
            padded *= 4
        return padded

    def _buckets(self, rows: int, opening: bool, drafts: int) -> list[int]:
        """Return the numbers of rows that the cycles of `rows` sequences have."""
        apart = opening and rows > TOGETHER
        counts = [1 << i for i in range(bucket_of(rows).bit_length())] if apart else [rows]
        return sorted({self._bucket(count, opening, drafts) for count in counts})

    def _bound(self, opening: bool, rounds: int) -> int:
        """Return the bound of the rounds of thinking of a captured cycle: few different ones."""
        thinks = opening or any(idea.thinks_always for idea in self._model.ideas.values())
        return bucket_of(rounds) if thinks and rounds else 0

    def _capture(self, shape: Shape, place_B: Tensor) -> None:
        """Capture a cycle; it runs once before, on the place that nobody has, so that what it needs is built."""
        place_B.fill_(self._places)
        self._places_before = []
        action = self._compiled.get(shape) or self._action(shape, place_B)
        action()
        torch.cuda.synchronize(self._device)
        self._graphs.capture(shape, action)

    def _action(self, shape: Shape, place_B: Tensor) -> Callable[[], Outcome]:
        prepared = self._drafter.get(shape.drafts)
        return lambda: cycle(self._model, self._pool, place_B, shape, prepared)

    def _compile(self, shape: Shape, place_B: Tensor) -> None:
        """Compile a cycle; it runs on places that nobody has."""
        try:
            compiled = compiled_cycle(self._model, self._pool, place_B, shape, self._drafter.get(shape.drafts))
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # a compiler can fail in many ways, or be missing; the cycle works without it
            warnings.warn(f"generation runs slower: its cycle cannot be compiled ({reason(error)})", stacklevel=3)
            compiled = self._action(shape, place_B)
        self._compiled[shape] = compiled

    @torch.no_grad()
    def warm_up(
        self, rows: int, drafts: Iterable[int], rounds: int, *, routed: bool, say: Callable[[str], None] | None
    ) -> None:
        """See `Runner.warm_up`; `rounds` is the bound of the rounds of thinking."""
        on_gpu = self._device.type == "cuda"
        opens = [False, True] if any(idea.opens for idea in self._model.ideas.values()) else [False]
        for count, opening in itertools.product(sorted(drafts), opens):
            for bucket in self._buckets(rows, opening, count) if on_gpu else [rows]:
                whole = not on_gpu and rows == self._pool.places
                bound = self._bound(opening, rounds)
                shape = Shape(bucket, count, opening, bound, routed, static=on_gpu, whole=whole)
                if shape in self._compiled:
                    continue
                can = self._captures if on_gpu else not routed
                if say is not None:
                    what = f"{count} drafts" if count else "plain decoding"
                    more = f"{', opening a segment' if opening else ''}{', depth below 1' if routed else ''}"
                    does = "compiling or loading" if can else "not compiled here:"
                    say(f"{does} a cycle: {bucket} rows, {what}{more}")
                if not can:
                    continue
                place_B = self._place_B[:bucket]
                place_B.copy_(torch.full_like(place_B, self._places) if on_gpu else torch.arange(bucket))
                self._compile(shape, place_B)
                if on_gpu:
                    self._capture(shape, place_B)
