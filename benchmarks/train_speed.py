"""How fast a model trains: tokens/s, share of the card's peak, memory, kernel launches, and what each part costs.

Each case is a size, a variant of `benchmarks.ideas`, a batch and a way to run (`plain`, `recorded`, `compiled`), timed
over whole optimizer steps on random tokens. Prints a line of JSON a case, then a table, then all of it as one line.

    python -m benchmarks.train_speed --cases tiny/complete/64x512 tiny/dense/64x512
"""

import argparse
import gc
import json
import statistics
import time
from collections import Counter
from typing import Any

import torch

from benchmarks.ideas import VARIANTS
from lepton.model import Lepton
from lepton.model.factory import size_config
from lepton.train import hardware
from lepton.train.micro_step import MicroStep
from lepton.train.optimizer import Optimizers
from lepton.train.thinking import plan_thoughts

WAYS = {
    "plain": {"compiled": False, "recorded": False},
    "recorded": {"compiled": False, "recorded": True},
    "compiled": {"compiled": True, "recorded": True},
}


class Case:
    """One model, trained for some steps on random tokens."""

    def __init__(self, name: str, accumulate: int) -> None:
        self.name, self.accumulate = name, accumulate
        size, variant, shape, *rest = name.split("/")
        self.way = rest[0] if rest else "compiled"
        self.rows, self.length = map(int, shape.split("x"))
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        torch.manual_seed(0)
        self.model = Lepton(size_config(size, **VARIANTS[variant])).to(self.device).train()
        self.model.compute_dtype = hardware.pick_dtype("auto", self.device)
        if self.model.drafter is not None:
            self.model.drafter.ids.copy_(torch.arange(len(self.model.drafter.ids)))
        self.optimizers = Optimizers(self.model, kind="muon", lr=6e-4, muon_lr=0.02, weight_decay=0.1)
        self.tokens = torch.randint(1, self.model.config.vocab_size, (self.rows, self.length + 1))
        self.lengths = torch.full((self.rows,), self.length + 1)

    def step(self, index: int) -> None:
        for micro in range(self.accumulate):
            think, groups = plan_thoughts(self.model.config, self.tokens, 0, index, micro)
            self.micro_step(self.tokens, self.lengths, think, groups, 1 / self.accumulate)
        self.micro_step.take_figures()
        self.optimizers.step(1.0, 1.0)

    def measure(self, steps: int, profiled: int) -> dict[str, Any]:
        torch.cuda.reset_peak_memory_stats() if self.device.type == "cuda" else None
        begun = time.perf_counter()
        self.micro_step = MicroStep(self.model, **WAYS[self.way], say=print)
        self.micro_step.prepare(self.rows, self.length)
        self.step(0)
        hardware.synchronize(self.device)
        prepared = time.perf_counter() - begun
        seconds = []
        for index in range(1, steps + 1):
            begun = time.perf_counter()
            self.step(index)
            hardware.synchronize(self.device)
            seconds.append(time.perf_counter() - begun)
        median = statistics.median(seconds)
        tokens = self.rows * self.length * self.accumulate
        flops = 3 * self.model.flops_per_token(self.length) * tokens
        peak = hardware.peak_flops(self.device)
        found = {
            "case": self.name,
            "accumulate": self.accumulate,
            "params_m": round(self.model.num_params() / 1e6, 1),
            "prepare_s": round(prepared, 1),
            "step_ms": round(median * 1e3, 2),
            "step_ms_min": round(min(seconds) * 1e3, 2),
            "tokens_per_s": round(tokens / median),
            "tflops": round(flops / median / 1e12, 1),
            "mfu": peak and round(flops / median / peak, 3),
            "peak_gb": self.device.type == "cuda" and round(torch.cuda.max_memory_allocated() / 1e9, 2),
        }
        if profiled:
            found |= {"compile_s": self.compile_seconds()} | self.profile(profiled)
        return found

    def compile_seconds(self) -> dict[str, list[float]]:
        """What the compiler took for each part: all of it, and its back end alone, forward and backward."""
        lines = torch._dynamo.utils.compile_times(repr="csv")
        table = dict(zip(*lines, strict=True))
        names = ("_compile.compile_inner", "compile_fx_inner")
        return {name: [round(float(x), 1) for x in str(table[name]).split(",")] for name in names if name in table}

    def profile(self, rows: int) -> dict[str, Any]:
        """Kernels of one optimizer step: how many, and which take longest."""
        kinds = [torch.profiler.ProfilerActivity.CUDA] if self.device.type == "cuda" else []
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU, *kinds]) as profile:
            self.step(0)
            hardware.synchronize(self.device)
        spent: Counter[str] = Counter()
        calls: Counter[str] = Counter()
        for event in profile.events():
            if event.device_type == torch.autograd.DeviceType.CUDA:
                spent[event.name] += event.device_time_total
                calls[event.name] += 1
        launches = sum(1 for event in profile.events() if "Launch" in event.name and event.name.startswith("cu"))
        top = [[round(us / 1e3, 3), calls[name], name[:90]] for name, us in spent.most_common(rows)]
        return {"kernels": calls.total(), "launches": launches, "kernel_ms": round(spent.total() / 1e3, 2), "top": top}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", default=["tiny/complete/64x512", "tiny/dense/64x512"])
    parser.add_argument("--accumulate", type=int, default=1)
    parser.add_argument("--steps", type=int, default=15)
    parser.add_argument("--profile", type=int, default=0, metavar="N", help="list the N kernels that take longest")
    arguments = parser.parse_args()
    found = []
    for name in arguments.cases:
        try:
            found.append(Case(name, arguments.accumulate).measure(arguments.steps, arguments.profile))
        except torch.OutOfMemoryError as error:
            found.append({"case": name, "error": str(error)[:200]})
        print(json.dumps({key: value for key, value in found[-1].items() if key != "top"}), flush=True)
        for line in found[-1].get("top", []):
            print("  ", *line, flush=True)
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    print(json.dumps({"device": device, "torch": torch.__version__, "cases": found}), flush=True)


if __name__ == "__main__":
    main()
