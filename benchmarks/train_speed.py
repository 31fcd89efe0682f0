"""How fast a model trains: tokens/s, share of the card's peak, memory, kernel launches, and what each part costs.

Each case is a size, a variant, a batch and a way to run: `size/variant/rows x tokens[/way]`. Variants are those of
`benchmarks.ideas`, and `peer` and `wide_peer`, the Llamas of `transformers` that `benchmarks.peer` describes. Ways are
`plain` (the usual one on a CPU), `recorded` and `compiled` (the usual one on a GPU). Timed are whole optimizer steps on
random tokens. Cases of one size and batch take their steps in turns, each round beginning with another, so that
whatever else the machine does hits them alike; `ratio` is a case's median tokens/s over that of the fastest `peer` of
its size and batch. Prints what is found as it is found, then a table, then all of it as one line of JSON.

On a CPU the process keeps the memory that it frees, as training does. Otherwise the logits of the peer, fresh pages in
each step, cost it more than all its arithmetic, and a ratio says more about the system's pages than about the models.
`--fresh_memory` leaves the allocator as it is.

    python -m benchmarks.train_speed --cases tiny/complete/64x512 tiny/dense/64x512 tiny/peer/64x512
"""

import argparse
import gc
import itertools
import json
import statistics
import time
from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks import peer
from benchmarks.ideas import VARIANTS
from benchmarks.training import WAYS, LeptonTraining, Training
from lepton.api import Lepton
from lepton.data.shards import Batch
from lepton.errors import InputError, nearest
from lepton.model.size_config import size_config
from lepton.runtime.device import device_name, keep_freed_memory, peak_flops, pick_device, synchronize

STEPS_GPU = 4
"""Steps that a GPU is given at once, as in training, where the host prepares the next while it computes."""

Found = dict[str, Any]


@dataclass(frozen=True)
class Case:
    """What is to be timed."""

    name: str
    size: str
    variant: str
    rows: int
    length: int
    way: str

    @staticmethod
    def read(name: str, device: torch.device) -> "Case":
        """Read `size/variant/rows x tokens[/way]`.

        Raises:
            InputError: it is something else, or needs a library that is missing.
        """
        usual = "compiled" if device.type == "cuda" else "plain"
        try:
            size, variant, shape, way = [*name.split("/"), usual][:4]
            rows, length = map(int, shape.split("x"))
        except ValueError as error:
            raise InputError(f"case '{name}': write it like nano/complete/4x512 or nano/peer/4x512/compiled") from error
        for part, known in ((variant, [*VARIANTS, *peer.VARIANTS]), (way, list(WAYS))):
            if part not in known:
                raise InputError(f"case '{name}': unknown '{part}'{nearest(part, known)}")
        size_config(size)
        if variant in peer.VARIANTS:
            if way not in peer.MODES:
                raise InputError(f"case '{name}': a peer has no '{way}', but {', '.join(peer.MODES)}")
            peer.load_transformers()
        return Case(name, size, variant, rows, length, way)

    @property
    def match(self) -> tuple[str, int, int]:
        """Cases that can be compared have this in common."""
        return self.size, self.rows, self.length

    def training(self, device: torch.device) -> Training:
        """Build the model."""
        torch.manual_seed(0)
        if self.variant in peer.VARIANTS:
            return peer.PeerTraining(self.size, self.variant, self.way, device)
        model = Lepton(size_config(self.size, **VARIANTS[self.variant])).to(device)
        drafter = model.idea("drafter")
        if drafter is not None:
            drafter.ids.copy_(torch.arange(len(drafter.ids)))
        return LeptonTraining(model, self.way)

    def batch(self) -> Batch:
        """Random tokens, the same for all cases of a size and batch."""
        torch.manual_seed(0)
        tokens_BX = torch.randint(1, size_config(self.size).vocab_size, (self.rows, self.length + 1))
        return Batch(tokens_BX, torch.full((self.rows,), self.length + 1))


class Runner:
    """One case being run: its model and its times."""

    def __init__(self, case: Case, accumulate: int, device: torch.device) -> None:
        self.case, self.accumulate, self.device = case, accumulate, device
        on_gpu = device.type == "cuda"
        # What earlier cases keep on the card is not this one's.
        before = torch.cuda.memory_allocated() if on_gpu else 0
        torch.cuda.reset_peak_memory_stats() if on_gpu else None
        torch._dynamo.utils.compilation_time_metrics.clear()
        begun = time.perf_counter()
        self.training, self.batches = case.training(device), [case.batch()] * accumulate
        self.training.prepare(case.rows, case.length)
        synchronize(device)
        self.prepared = time.perf_counter() - begun
        self.step(1)
        self.peak = torch.cuda.max_memory_allocated() - before if on_gpu else None
        self.compiling = compile_seconds()
        self.seconds: list[float] = []

    def step(self, index: int) -> float:
        """Take a step, or on a GPU some; returns the seconds of one."""
        steps = STEPS_GPU if self.device.type == "cuda" else 1
        begun = time.perf_counter()
        for each in range(steps):
            self.training.step(self.batches, steps * index + each, 1.0)
        synchronize(self.device)
        return (time.perf_counter() - begun) / steps

    def found(self) -> Found:
        median = statistics.median(self.seconds)
        tokens = self.case.rows * self.case.length * self.accumulate
        flops = self.training.flops_per_token(self.case.length) * tokens
        peak = peak_flops(self.device)
        return {
            "case": self.case.name,
            "way": self.case.way,
            "accumulate": self.accumulate,
            "params_m": round(self.training.params / 1e6, 2),
            "prepare_s": round(self.prepared, 1),
            "step_ms": round(median * 1e3, 2),
            "step_ms_min": round(min(self.seconds) * 1e3, 2),
            "step_ms_max": round(max(self.seconds) * 1e3, 2),
            "tokens_per_s": round(tokens / median),
            "tflops": round(flops / median / 1e12, 3),
            "mfu": peak and round(flops / median / peak, 3),
            "peak_gb": self.peak and round(self.peak / 1e9, 2),
        } | ({"compile_s": self.compiling} if self.compiling else {})

    def profile(self, rows: int) -> Found:
        """Kernels of one optimizer step: how many, and which take longest; on a CPU its operators, by own time."""
        on_gpu = self.device.type == "cuda"
        kinds = [torch.profiler.ProfilerActivity.CUDA] if on_gpu else []
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU, *kinds]) as profile:
            self.step(0)
        spent: Counter[str] = Counter()
        calls: Counter[str] = Counter()
        for event in profile.events():
            if (event.device_type == torch.autograd.DeviceType.CUDA) == on_gpu:
                spent[event.name] += event.device_time_total if on_gpu else event.self_cpu_time_total
                calls[event.name] += 1
        top = [[round(us / 1e3, 3), calls[name], name[:90]] for name, us in spent.most_common(rows)]
        if not on_gpu:
            return {"top": top}
        launches = sum(1 for event in profile.events() if "Launch" in event.name and event.name.startswith("cu"))
        return {"kernels": calls.total(), "launches": launches, "kernel_ms": round(spent.total() / 1e3, 2), "top": top}


def compile_seconds() -> dict[str, list[float]]:
    """What the compiler took for each part: all of it, and its back end alone, forward and backward."""
    lines = torch._dynamo.utils.compile_times(repr="csv")
    table = dict(zip(*lines, strict=True))
    names = ("_compile.compile_inner", "compile_fx_inner")
    return {name: [round(float(x), 1) for x in str(table[name]).split(",")] for name in names if name in table}


def measure(cases: list[Case], steps: int, accumulate: int, profiled: int, device: torch.device) -> list[Found]:
    """Time cases of one size and batch, step by step in turns."""
    runners: list[Runner] = []
    errors: list[Found] = []
    for case in cases:
        try:
            runners.append(Runner(case, accumulate, device))
        except (torch.OutOfMemoryError, InputError) as error:
            errors.append({"case": case.name, "error": str(error)[:200]})
        gc.collect()
    for index in range(2, steps + 2):
        first = index % max(1, len(runners))
        for runner in runners[first:] + runners[:first]:
            runner.seconds.append(runner.step(index))
    found = [runner.found() for runner in runners]
    peers = [each["tokens_per_s"] for runner, each in zip(runners, found, strict=True) if runner.case.variant == "peer"]
    for runner, each in zip(runners, found, strict=True):
        if peers:
            each["ratio"] = round(each["tokens_per_s"] / max(peers), 3)
        if profiled:
            each |= runner.profile(profiled)
    return found + errors


COLUMNS = {
    "case": "case", "params M": "params_m", "step ms": "step_ms", "tokens/s": "tokens_per_s", "MFU": "mfu",
    "peak GB": "peak_gb", "kernels": "kernels", "launches": "launches", "ratio": "ratio",
}  # fmt: skip


def table(found: list[Found], columns: dict[str, str] = COLUMNS) -> str:
    """What was found, for people: a line a case. `columns` are their names, and what of it they show."""
    cells = [[str(each.get(key)) if each.get(key) is not None else "-" for key in columns.values()] for each in found]
    lines = [list(columns), *cells]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    rows = []
    for first, *rest in lines:
        numbers = (cell.rjust(width) for cell, width in zip(rest, widths[1:], strict=True))
        rows.append("  ".join([first.ljust(widths[0]), *numbers]))
    errors = [f"{each['case']}: {each['error']}" for each in found if "error" in each]
    return "\n".join([*rows, *errors])


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", default=["tiny/complete/64x512", "tiny/dense/64x512"])
    parser.add_argument("--accumulate", type=int, default=1)
    parser.add_argument("--steps", type=int, default=15)
    parser.add_argument("--profile", type=int, default=0, metavar="N", help="list the N kernels that take longest")
    parser.add_argument("--fresh_memory", action="store_true", help="on a CPU, leave the allocator as it is")
    chosen = parser.parse_args(arguments)
    device = pick_device(None)
    kept = device.type == "cpu" and not chosen.fresh_memory and keep_freed_memory()
    try:
        cases = [Case.read(name, device) for name in chosen.cases]
    except InputError as error:
        parser.error(str(error))
    found: list[Found] = []
    for _, group in itertools.groupby(sorted(cases, key=lambda case: case.match), key=lambda case: case.match):
        for each in measure(list(group), chosen.steps, chosen.accumulate, chosen.profile, device):
            found.append(each)
            print(json.dumps({key: value for key, value in each.items() if key != "top"}), flush=True)
            for line in each.get("top", []):
                print("  ", *line, flush=True)
        gc.collect()
        torch._dynamo.reset()
        if device.type == "cuda":
            torch.cuda.empty_cache()
    print(table(found))
    about: Found = {"memory_kept": kept, "torch": torch.__version__}
    if any(case.variant in peer.VARIANTS for case in cases):
        about["transformers"] = peer.load_transformers().__version__
    print(json.dumps({"device": device_name(device), **about, "cases": found}), flush=True)


if __name__ == "__main__":
    main()
