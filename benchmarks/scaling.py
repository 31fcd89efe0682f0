"""How training scales from one GPU to several: tokens/s, efficiency, memory beside its forecast, and communication.

A case is `size/rows x tokens[/shard][/recompute]`; rows are those of a GPU's micro-batch. Each case and number of
processes runs under a torchrun of its own, with whole optimizer steps as `train.py` takes them: gradients added up,
Muon's work shared, sums read by nobody. `micro` is the micro-batches a GPU takes a step. `efficiency` is tokens/s of N
processes over N times those of one. `comm ms` are the milliseconds a step in which a GPU runs kernels of NCCL, from the
profiler; waiting for another GPU is part of it. Prints each row as soon as it is known, then a table.

    python -m benchmarks.scaling --data_dir D --json F --deadline 500
    python -m benchmarks.scaling --smoke
"""

import argparse
import faulthandler
import json
import os
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch.distributed.run import get_args_parser

from benchmarks.train_speed import STEPS_GPU, table
from lepton.api import Lepton
from lepton.data.shards import Batch, ShardedDataset
from lepton.distributed import Ranks, joined
from lepton.model.size_config import size_config
from lepton.runtime.device import peak_flops, peak_memory, pick_dtype, synchronize
from lepton.train.batch_plan import plan_step
from lepton.train.cost import training_flops_per_token
from lepton.train.gradients import FlatGradients
from lepton.train.memory_forecast import predicted_memory
from lepton.train.micro_step import MicroStep
from lepton.train.optimizer import Optimizers
from lepton.train.settings import TrainSettings
from lepton.train.sharding import shard

CASES = ("tiny/64x512", "medium/16x1024", "xl/16x1024/shard", "xxl/16x1024/shard/recompute")
SMOKE = ("nano/2x64", "nano/2x64/shard", "nano/2x64/shard/recompute")
RESULT = "RESULT "
COLUMNS = {
    "case": "case", "GPUs": "processes", "micro": "micro", "step ms": "step_ms", "tokens/s": "tokens_per_s",
    "efficiency": "efficiency", "MFU": "mfu", "comm ms": "comm_ms", "peak GB": "peak_gb", "forecast": "forecast_gb",
}  # fmt: skip

Row = dict[str, Any]


class Run:
    """One case in one of its processes."""

    def __init__(self, case: str, ranks: Ranks, data_dir: str | None) -> None:
        self.case, self.ranks, self.data_dir = case, ranks, data_dir
        size, shape, *ways = case.split("/")
        self.rows, self.length = map(int, shape.split("x"))
        self.sharded = "shard" in ways
        on_gpu = torch.cuda.is_available()
        self.device = torch.device("cuda", ranks.local_rank) if on_gpu else torch.device("cpu")
        torch.manual_seed(0)
        with self.device:  # billions of random numbers take a CPU minutes
            self.model = model = Lepton(size_config(size)).train()
        if (drafter := model.idea("drafter")) is not None:
            drafter.ids.copy_(torch.arange(len(drafter.ids)))
        model.compute_dtype = pick_dtype("auto", self.device)
        model.checkpoint_activations = "recompute" in ways
        mesh = ranks.mesh(self.device.type, by_host=self.sharded) if ranks.several else None
        if self.sharded:
            shard(model, mesh)
        else:
            model.to(self.device)
        self.gradients = FlatGradients(() if self.sharded or not ranks.several else model.parameters())
        own = TrainSettings()
        rates = {"lr": own.lr, "muon_lr": own.muon_lr, "weight_decay": own.weight_decay}
        self.optimizers = Optimizers(model, kind="muon", **rates, mesh=mesh)
        self.micro_step = MicroStep(model, compiled=on_gpu, captured=not self.sharded, say=self._say)
        self.micro_step.prepare(self.rows, self.length)
        settings = own.replace(
            batch_size=self.rows, grad_accum=1, seq_len=self.length, shard=self.sharded,
            checkpoint_activations=model.checkpoint_activations,
        )  # fmt: skip
        self.forecast = predicted_memory(model, settings, ranks.shards)

    def _say(self, line: str) -> None:
        if self.ranks.leads:
            print(line, file=sys.stderr, flush=True)

    def batches(self, micro: int) -> list[Batch]:
        """Return this process's micro-batches, the same for each step."""
        own = self.ranks.share(micro * self.ranks.size)
        if self.data_dir is not None:
            vocab, eos = self.model.config.vocab_size, self.model.config.eos_id
            data = ShardedDataset(
                Path(self.data_dir), seq_len=self.length, seed=0, split="train", vocab_size=vocab, eos_id=eos
            )
            return [data.batch(0, i, batch_size=self.rows, accumulate=own.stop * self.ranks.size) for i in own]
        generator = torch.Generator().manual_seed(self.ranks.rank)
        shape = self.rows, self.length + 1
        whole = torch.full((self.rows,), self.length + 1)
        return [Batch(torch.randint(1, self.model.config.vocab_size, shape, generator=generator), whole) for _ in own]

    def step(self, batches: list[Batch], index: int) -> None:
        """One optimizer step, as the trainer takes it."""
        counts = [int(batch.lengths.sum()) - len(batch.lengths) for batch in batches]
        total = self.ranks.total(sum(counts))
        for micro, (batch, count) in enumerate(zip(batches, counts, strict=True)):
            think, groups, step = plan_step(self.model, batch.tokens, 0, index, micro)
            self.micro_step(batch.tokens, batch.lengths, think, groups, count / total, step=step)
        figures = torch.stack(list(self.micro_step.take_figures().values()))
        self.ranks.add_([*self.gradients.buffers, figures])
        self.optimizers.step(1e-3, 1.0, self.micro_step.graphs)
        self.ranks.largest(0)

    def row(self, micro: int, steps: int) -> Row:
        """Time steps of `micro` micro-batches."""
        batches = self.batches(micro)
        for index in range(3):  # the second is captured, the third may load what is left
            self.step(batches, index)
        synchronize(self.device)
        seconds, at_once = [], STEPS_GPU if self.device.type == "cuda" else 1
        for turn in range(steps):
            begun = time.perf_counter()
            for index in range(at_once):
                self.step(batches, at_once * turn + index)
            synchronize(self.device)
            seconds.append((time.perf_counter() - begun) / at_once)
        median = statistics.median(seconds)
        processes, tokens = self.ranks.size, self.rows * self.length * micro * self.ranks.size
        flops = training_flops_per_token(self.model, self.rows, self.length) * tokens / median
        peak, memory = peak_flops(self.device), peak_memory(self.device)
        return {
            "case": self.case,
            "processes": processes,
            "micro": micro,
            "step_ms": round(1e3 * median, 2),
            "step_ms_min": round(1e3 * min(seconds), 2),
            "step_ms_max": round(1e3 * max(seconds), 2),
            "tokens_per_s": round(tokens / median),
            "mfu": peak and round(flops / (peak * processes), 3),
            "comm_ms": self._communication(batches),
            "peak_gb": memory and round(memory / 1e9, 2),
            "forecast_gb": round(self.forecast / 1e9, 2),
            "params_m": round(self.model.num_params() / 1e6, 1),
        }

    def _communication(self, batches: list[Batch]) -> float | None:
        if self.device.type != "cuda":
            return None
        kinds = [torch.profiler.ProfilerActivity.CUDA]
        with torch.profiler.profile(activities=kinds) as profile:
            self.step(batches, 0)
            synchronize(self.device)
        spent = sum(event.device_time_total for event in profile.events() if "nccl" in event.name.lower())
        return round(spent / 1e3, 2)


def be_a_process(case: str, micros: list[int], steps: int, data_dir: str | None) -> None:
    """Run one case in one process; rank 0 prints its rows. One that is ended says where it was."""
    faulthandler.register(signal.SIGTERM, chain=True)
    with joined(os.environ, None) as ranks:
        if not torch.cuda.is_available():
            torch.set_num_threads(1)
        run = Run(case, ranks, data_dir)
        for micro in micros:
            row = run.row(micro, steps)
            if ranks.leads:
                print(RESULT + json.dumps(row), flush=True)
        if ranks.several and run.micro_step.graphs is not None:
            run.micro_step.graphs.clear()  # NCCL does not end while a graph holds its kernels


def launched(case: str, processes: int, chosen: argparse.Namespace, left: float) -> list[Row]:
    """Run a case in so many processes; return its rows, and a row with the error if there is one."""
    words = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    if "--virtual-local-rank" in get_args_parser().format_help():
        words.append("--virtual-local-rank")  # each process sees its GPU as number 0, so all share what is compiled
    words += ["-m", "benchmarks.scaling", "--case", case, "--steps", str(chosen.steps)]
    words += ["--micro", *map(str, chosen.micro)]
    words += ["--data_dir", chosen.data_dir] if chosen.data_dir else []
    rows: list[Row] = []
    error = f"no time: {left:.0f} s are left"
    if left > 0:
        torchrun = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        late = ""
        try:
            said, problem = torchrun.communicate(timeout=left)
        except subprocess.TimeoutExpired:
            torchrun.terminate()  # it ends its processes; killed, it would leave them
            said, problem = torchrun.communicate()
            late = f"\nended after {left:.0f} s"
        problem = problem + late if torchrun.returncode else ""
        sys.stderr.write(problem[-8000:])
        rows = [json.loads(line.removeprefix(RESULT)) for line in said.splitlines() if line.startswith(RESULT)]
        lines = [line for line in problem.splitlines() if "Error" in line or line.startswith("ended")]
        error = (lines or problem.splitlines()[-1:] or [""])[-1]
    return [*rows, *([{"case": case, "processes": processes, "error": error}] if error else [])]


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+")
    parser.add_argument("--processes", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--micro", nargs="+", type=int, default=[1, 4], help="micro-batches a GPU and step")
    parser.add_argument("--steps", type=int, default=8, help="times that four steps are timed")
    parser.add_argument("--data_dir", help="folder of shards (default: random tokens)")
    parser.add_argument("--deadline", type=float, default=3600, help="seconds after which no case begins or goes on")
    parser.add_argument("--json", metavar="FILE")
    parser.add_argument("--smoke", action="store_true", help="NANO on any machine, in a minute or so")
    parser.add_argument("--case", help=argparse.SUPPRESS)
    chosen = parser.parse_args(arguments)
    if chosen.case:
        be_a_process(chosen.case, chosen.micro, chosen.steps, chosen.data_dir)
        return
    if chosen.smoke:
        chosen.steps, chosen.micro = 1, [1]
    until = time.monotonic() + chosen.deadline
    found: list[Row] = []
    for case in chosen.cases or (SMOKE if chosen.smoke else CASES):
        for processes in chosen.processes:
            if processes == 1 and "/shard" in case:
                continue
            for row in launched(case, processes, chosen, until - time.monotonic()):
                one = next((each for each in found if same_work(each, row) and each["processes"] == 1), None)
                if one and "error" not in row:
                    row["efficiency"] = round(row["tokens_per_s"] / (processes * one["tokens_per_s"]), 3)
                found.append(row)
                print(json.dumps(row), flush=True)
                if chosen.json:
                    name = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
                    about = {"device": name, "torch": torch.__version__, "rows": found}
                    Path(chosen.json).write_text(json.dumps(about, indent=1) + "\n")
    print(table(found, COLUMNS))


def same_work(one: Row, other: Row) -> bool:
    """Whether two rows are of the same work a GPU."""
    return all(one.get(name) == other.get(name) for name in ("case", "micro")) and "error" not in one


if __name__ == "__main__":
    main()
