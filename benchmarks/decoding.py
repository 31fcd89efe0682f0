"""LEPTON decoding as the clock sees it: rounds of a prompt and new tokens in each row, cycle by cycle.

A cycle is steady if it and the one before had all rows and read no prompt. Only steady cycles count. A text does not
end: of a thousand rows some would in nearly every cycle, and no two runs would compute the same.
"""

import statistics
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch

from lepton.engine.engine import Engine
from lepton.engine.options import GenerationOptions
from lepton.engine.runner import Launch, Prefill, Runner, Running
from lepton.engine.sequence import Sequence
from lepton.engine.speculation import Always, Speculation
from lepton.engine.stats import Stats
from lepton.errors import InputError
from lepton.model import Network
from lepton.ops.choose import stream_words
from lepton.runtime.device import synchronize

MODES = {
    "plain": "a token a cycle",
    "drafts": "drafts in every cycle",
    "auto": "speculation decides for itself",
    "depth": "plain, half of the tokens past the stem",
}
DEPTH = 0.5
TOP_P = 0.9
MOST_TOKENS = 1 << 30
"""New tokens of a row."""
MOST_TOKENS_WITHOUT_WINDOW = 4096
"""The same where the cache grows, and so has to have room for them."""
COUNTED = 20
"""Cycles in which kernels and waits are counted."""

Found = dict[str, Any]


class Cycle(NamedTuple):
    """A step of the engine."""

    seconds: float
    tokens: int
    drafts: int
    steady: bool


@dataclass
class Round:
    """A prompt and new tokens in each row."""

    first_token: float
    """Seconds to the first token, the median of the rows."""
    cycles: list[float] = field(default_factory=list)
    """Seconds of each steady cycle."""
    tokens: int = 0
    """New tokens of all rows in these."""
    drafted: int = 0
    """Those of them that had drafts."""

    @property
    def tokens_per_s(self) -> float:
        return self.tokens / sum(self.cycles)


class Endless(Sequence):
    """A text that goes on after the end of a document, as after any other token."""

    def take(self, ids: Iterable[int]) -> list[int]:
        counted = list(ids)
        self.new += counted
        return counted


class Watched(Runner):
    """A runner that tells what the engine has launched since it was last asked."""

    launched_rows, launched_drafts, prefills = 0, 0, 0
    compiles = False
    """Whether a case that uses it compiles its cycles first."""

    def forget(self) -> None:
        self.launched_rows, self.launched_drafts, self.prefills = 0, 0, 0

    def prefill(self, work: Prefill) -> list[tuple[list[int], Running]]:
        self.prefills += 1
        return super().prefill(work)

    def launch(self, work: Launch) -> Running:
        self.launched_rows += len(work.sequences)
        self.launched_drafts = work.drafts
        return super().launch(work)


class Shelf:
    """Runners that are free: what one case has captured serves the next one of as many rows."""

    def __init__(self, *, compiled: bool = False) -> None:
        self._compiled = compiled
        self._free: dict[tuple[int, int], list[Watched]] = {}

    def take(self, model: Network, rows: int, context: int) -> Watched:
        """Return a runner that is free, or a new one."""
        free = self._free.setdefault((id(model), rows), [])
        longest = context + MOST_TOKENS_WITHOUT_WINDOW
        found = next((each for each in free if each.fits(rows, longest)), None)
        if found is None:
            found = Watched(model, rows, longest)
            found.compiles = self._compiled
            return found
        free.remove(found)
        return found

    def give(self, runner: Watched) -> None:
        """Put back a runner whose engine has ended well; after an error it is dropped instead."""
        self._free[id(runner.model), runner.places].append(runner)

    def clear(self) -> None:
        """Drop all, with their memory."""
        self._free.clear()


class Decoding:
    """A model that decodes `rows` rows in one of `MODES`."""

    def __init__(self, runner: Watched, mode: str, temperature: float, prompts: list[list[int]], rows: int) -> None:
        """Prepare to continue `prompts`, each in turn, `rows` at a time.

        Raises:
            InputError: the model has no drafter, and the mode needs one.
        """
        self.runner, self.mode, self.rows, self.model = runner, mode, rows, runner.model
        if mode in ("drafts", "auto") and not runner.drafts:
            raise InputError("this model has no drafter")
        windowed = self.model.config.window is not None
        self.options = GenerationOptions(
            max_new_tokens=MOST_TOKENS if windowed else MOST_TOKENS_WITHOUT_WINDOW,
            temperature=temperature,
            top_p=TOP_P,
            depth=DEPTH if mode == "depth" else None,
            use_speculative=mode in ("drafts", "auto"),
        )
        self.stats = Stats()
        self._prompts, self._rounds = prompts, 0
        kind = Always if mode == "drafts" else Speculation
        self.speculation = kind(runner.speculation.choices)
        self._engine: Engine | None = None
        self._undisturbed = 0

    def warm_up(self, _tokens: int) -> None:
        """Run until all that the mode needs is compiled and captured, an opening segment included."""
        if self.runner.compiles:
            drafts, routed = {"drafts": [self.runner.drafts], "auto": None}.get(self.mode, [0]), self.mode == "depth"
            self.runner.warm_up(self.rows, drafts=drafts, routed=routed, say=lambda text: print(text, flush=True))
        own = self.speculation
        before = [Speculation((0,)), Always(own.choices)] if self.mode == "auto" else []
        for speculation in [*before, own]:
            self.speculation = speculation
            self.round(self.model.config.segment + 16)
        self.stats, self._rounds = Stats(), 0

    def round(self, tokens: int) -> Round:
        """Read a prompt in each row, and decode until steady cycles have given `tokens` new ones a row.

        Raises:
            InputError: so many do not fit into a cache that grows.
        """
        if tokens + COUNTED > self.options.max_new_tokens:
            raise InputError(f"{tokens} new tokens: this model has no window, so at most {MOST_TOKENS_WITHOUT_WINDOW}")
        found = Round(self._begin())
        while found.tokens < tokens * self.rows:
            cycle = self.step()
            if cycle.steady:
                found.cycles.append(cycle.seconds)
                found.tokens += cycle.tokens
                found.drafted += cycle.drafts > 0
        self.close()
        return found

    def step(self) -> Cycle:
        """One step of the engine."""
        assert self._engine is not None
        assert not self._engine.idle, "the rows have ended"
        self.runner.forget()
        begun = time.perf_counter()
        outputs = self._engine.step()
        seconds = time.perf_counter() - begun
        alone = self.runner.launched_rows == self.rows and not self.runner.prefills
        self._undisturbed = self._undisturbed + 1 if alone else 0
        tokens = sum(len(output.tokens) for output in outputs)
        return Cycle(seconds, tokens, self.runner.launched_drafts, self._undisturbed >= 2)

    def close(self) -> None:
        """End all rows."""
        if self._engine is not None:
            self._engine.close()
        self._engine = None

    def counted(self, top: int) -> Found:
        """Count in further cycles what a GPU's host waits for, and with `top` the kernels, and name the longest."""
        self._begin()
        self._settle()
        on_gpu = self.model.device.type == "cuda"
        found: Found = {"host_waits": host_waits(self.step, COUNTED)} if on_gpu else {}
        if top:
            self._settle()
            found |= kernels(self.step, COUNTED, self.model.device, top)
        self.close()
        return found

    def figures(self, rounds: list[Round]) -> Found:
        """What a cycle reads at least, what a row keeps, and what drafts brought."""
        drafted = sum(each.drafted for each in rounds) / sum(len(each.cycles) for each in rounds)
        config, row = self.model.config, state_bytes(self.runner)
        # Some row needs the deep blocks in nearly every cycle; a row alone does without where it may.
        deep = (self.stats.mean_depth - config.stem_layers) / max(1, config.layers - config.stem_layers)
        weights = weight_bytes(self.model, drafted=drafted, deep=deep if self.rows == 1 else 1.0)
        found: Found = {"state_bytes": row, "floor_bytes": round(weights + self.rows * row)}
        found["mean_depth"] = round(self.stats.mean_depth, 2)
        if self.options.use_speculative:
            acceptance = [round(each, 3) for each in self.stats.acceptance]
            found |= {"drafted_cycles": round(drafted, 3), "acceptance": acceptance}
            verified = weight_bytes(self.model, drafted=0.0, deep=1.0) + row
            found["draft_bytes_share"] = round(draft_bytes(self.model, self.runner.drafts) / verified, 4)
        if self.mode == "auto":
            found["speculation"] = self.speculation.figures()
        return found

    def _begin(self) -> float:
        """Start anew with the next prompts; return the seconds to the first token, the median of the rows."""
        self.runner.speculation = self.speculation
        self._engine = Engine(self.runner, stats=self.stats)
        first = self._rounds * self.rows  # a round has the same prompts in every mode
        sequences = [
            endless(self.model, self._prompts[i % len(self._prompts)], self.options, i)
            for i in range(first, first + self.rows)
        ]
        self._rounds += 1
        synchronize(self.model.device)
        begun = time.perf_counter()
        for sequence in sequences:
            self._engine.add(sequence)
        seconds: dict[int, float] = {}
        while len(seconds) < self.rows:
            self.step()
            now = time.perf_counter() - begun
            seconds |= {i: now for i, each in enumerate(sequences) if each.new and i not in seconds}
        return statistics.median(seconds.values())

    def _settle(self) -> None:
        for _ in range(8):
            self.step()


def endless(model: Network, prompt: list[int], options: GenerationOptions, row: int) -> Endless:
    """Return a text to add to an engine, with the random numbers of a row of seed 0."""
    return Endless(prompt, options, stops=[[model.config.eos_id]], stream=stream_words(0, row))


def weight_bytes(model: Network, *, drafted: float, deep: float) -> float:
    """Bytes of the weights that a cycle reads, each once.

    Args:
        model: the model.
        drafted: share of the cycles that have drafts; without, the drafter is not read.
        deep: share of the deep blocks that are read.
    """
    parts = {"uncertainty": 0.0, "drafter": drafted}
    unread = sum((1 - share) * nbytes(model.idea(name)) for name, share in parts.items() if model.idea(name))
    return nbytes(model) - unread - (1 - deep) * nbytes(model.blocks)


def draft_bytes(model: Network, drafts: int) -> int:
    """Bytes that so many drafts of one text read, at least one: the cell and its proposals once for each, uncached."""
    cell = model.idea("drafter").prepared(model.embed, model.dtype, model.config.eos_id)
    once = (cell.enter, cell.token, cell.up_token)
    each = (cell.up_cell, cell.down, cell.propose_ZW)
    rows = (drafts - 1) * cell.read[:1].nbytes  # the newest token has no row in the table
    return sum(part.nbytes for part in once) + drafts * sum(part.nbytes for part in each) + rows


def nbytes(module: torch.nn.Module) -> int:
    """Bytes of a module's parameters."""
    return sum(parameter.nbytes for parameter in module.parameters())


def state_bytes(runner: Runner) -> int:
    """Bytes of a row in the pool."""
    return runner.pool.nbytes // runner.pool.places


def bandwidth(device: torch.device) -> float:
    """Measure the bytes a second of a large copy, read and written ones together: the best of a few."""
    on_gpu = device.type == "cuda"
    source = torch.ones(1 << (31 if on_gpu else 27), dtype=torch.uint8, device=device)
    target, copies = torch.empty_like(source), 10 if on_gpu else 1
    seconds = []
    for _ in range(6):
        synchronize(device)
        begun = time.perf_counter()
        for _ in range(copies):
            target.copy_(source)
        synchronize(device)
        seconds.append((time.perf_counter() - begun) / copies)
    return 2 * source.nbytes / min(seconds)


def host_waits(step: Callable[[], object], cycles: int) -> float:
    """Return how often a cycle blocks its host until the GPU has finished.

    PyTorch counts synchronising operations. That the outcome of the cycle before is waited for, by an event, is none.
    """
    before = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            for _ in range(cycles):
                step()
        finally:
            torch.cuda.set_sync_debug_mode(before)
    return sum("synchronizing CUDA operation" in str(each.message) for each in caught) / cycles


def kernels(step: Callable[[], object], cycles: int, device: torch.device, top: int) -> Found:
    """Kernels and copies of a cycle, its time on the GPU, and the longest; on a CPU its operators by their own time."""
    on_gpu = device.type == "cuda"
    kinds = [torch.profiler.ProfilerActivity.CUDA] if on_gpu else []
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU, *kinds]) as profile:
        for _ in range(cycles):
            step()
        synchronize(device)
    spent: Counter[str] = Counter()
    calls: Counter[str] = Counter()
    for event in profile.events():
        # A name that begins with # is a span of the compiler, which lies over kernels.
        if (event.device_type == torch.autograd.DeviceType.CUDA) == on_gpu and not event.name.startswith("#"):
            spent[event.name] += event.device_time_total if on_gpu else event.self_cpu_time_total
            calls[event.name] += 1
    copies = sum(count for name, count in calls.items() if name.startswith("Mem"))
    longest = [
        [round(us / 1e3 / cycles, 4), round(calls[name] / cycles, 2), name[:90]] for name, us in spent.most_common(top)
    ]
    if not on_gpu:
        return {"top": longest}
    counts = {"kernels": round((calls.total() - copies) / cycles, 1), "copies": round(copies / cycles, 1)}
    return {**counts, "kernel_ms": round(spent.total() / 1e3 / cycles, 4), "top": longest}
