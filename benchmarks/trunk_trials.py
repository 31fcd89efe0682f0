"""Changes of the trunk, tried side by side: the model without ideas, one run a change, all on the same batches.

A queue is lines of JSON, a trial each: `{"name": "gain", "size": "micro", "query_gain": 1.4}`. The fields are those of
`benchmarks.trunk_switches.Trial`; what a line leaves out is as in the product. Start one process a GPU with the same
queue: a process takes the next trial that none has taken, which it notes as a file in the folder `QUEUE.claims`. Delete
that folder to run everything again. Each result is a line that is appended to the `--json` file as soon as it is known:
the held-out loss over the whole validation split, the mean training loss of each eighth of the run, the learned
numbers, and all fields of the trial.

A batch is decided by seed and step, whatever else a trial changes. A row is read as one text, where the product begins
anew at each document; so compare trials with each other. On a GPU blocks are compiled, and a step is one CUDA graph:
use its speed to compare shapes, not as that of the product. One seed says little: at MICRO's 24.5 M tokens two seeds
differ by about 0.01. `--smoke` runs on a CPU in a minute.

    CUDA_VISIBLE_DEVICES=0 python -m benchmarks.trunk_trials --data_dir D --queue Q --json found.jsonl --deadline 500 &
    CUDA_VISIBLE_DEVICES=1 python -m benchmarks.trunk_trials --data_dir D --queue Q --json found.jsonl --deadline 500
"""

import argparse
import dataclasses
import gc
import json
import math
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.trunk_model import TrunkModel
from benchmarks.trunk_optimizer import TrunkOptimizer
from benchmarks.trunk_switches import Trial, read_queue
from lepton.data.shards import ShardedDataset
from lepton.data.stdlib import default_corpus
from lepton.data.tokenizer import load_tokenizer
from lepton.errors import InputError, reason
from lepton.runtime.cuda_graphs import CudaGraphs
from lepton.runtime.device import device_name, peak_memory, pick_device, pick_dtype, synchronize

CURVE = 8
"""Parts of a run whose mean training loss is kept."""
WARM_UP = 2
"""Steps before the capture, at rates of 0, in which kernels are compiled and loaded."""
SMOKE: dict[str, Any] = {"size": "nano", "rows": 2, "seq_len": 64, "tokens": 640}
SMOKE_QUEUE: tuple[dict[str, Any], ...] = ({"name": "as it is"}, {"name": "no shift", "shifted_keys": "none"})

Found = dict[str, Any]


class Rows(NamedTuple):
    """Rows of tokens on the device."""

    tokens: Tensor
    """Integers [..., B, T + 1]."""
    lengths: Tensor
    """Valid tokens of each row, [..., B]."""


class Data:
    """The tokens of a data set on the device, by what a trial says of them; those of the last trial are kept."""

    def __init__(self, folder: Path | None, device: torch.device, eval_batches: int | None = None) -> None:
        self.folder, self.device, self.eval_batches = folder, device, eval_batches
        self._kept: dict[Any, Any] = {}

    def train(self, trial: Trial) -> Rows:
        """Return the batches of all steps, in order."""
        key = ("train", trial.steps, trial.rows, trial.seq_len, trial.seed, trial.vocab_size)
        return self._of(key, lambda: self._read_train(trial))

    def held_out(self, trial: Trial) -> list[Rows]:
        """Return the batches of the validation split."""
        key = ("val", trial.rows, trial.seq_len, trial.vocab_size)
        return self._of(key, lambda: self._read_held_out(trial))

    def _of(self, key: Any, read: Callable[[], Any]) -> Any:
        if key not in self._kept:
            for other in [other for other in self._kept if other[0] == key[0]]:
                del self._kept[other]
            self._kept[key] = read()
        return self._kept[key]

    def _split(self, trial: Trial, split: Any) -> ShardedDataset:
        folder = self.folder or default_corpus(load_tokenizer(None))
        return ShardedDataset(folder, split=split, seq_len=trial.seq_len, seed=trial.seed, vocab_size=trial.vocab_size)

    def _read_train(self, trial: Trial) -> Rows:
        data = self._split(trial, "train")
        batches = [data.batch(step, batch_size=trial.rows) for step in range(trial.steps)]
        tokens = torch.stack([batch.tokens.int() for batch in batches])
        return Rows(tokens.to(self.device), torch.stack([batch.lengths for batch in batches]).to(self.device))

    def _read_held_out(self, trial: Trial) -> list[Rows]:
        batches = self._split(trial, "val").batches(trial.rows, self.eval_batches)
        return [Rows(batch.tokens.int().to(self.device), batch.lengths.to(self.device)) for batch in batches]


class Training:
    """A trial in training: `prepare`, then `step` for each of its batches."""

    def __init__(self, trial: Trial, device: torch.device, dtype: torch.dtype) -> None:
        self.trial, self.device = trial, device
        torch.manual_seed(trial.seed)
        with device:
            self.model = TrunkModel(trial, dtype)
        self.on_gpu = device.type == "cuda"
        self.optimizer = TrunkOptimizer(self.model, compiled=self.on_gpu)
        self.graphs = CudaGraphs(device)
        shape = (trial.rows, trial.seq_len)
        self.place = Rows(
            torch.ones(shape[0], shape[1] + 1, dtype=torch.int32, device=device),
            torch.full((shape[0],), shape[1] + 1, device=device),
        )
        """What a step reads."""
        self.figures = torch.zeros(2, device=device)
        """Mean nats a token, and the norm of the gradients, of the last step."""

    def prepare(self) -> None:
        """On a GPU, compile the blocks and capture a step; afterwards all is as before."""
        if not self.on_gpu:
            return
        for block in self.model.blocks:
            block.forward = torch.compile(block.forward, dynamic=False)
        aside = torch.cuda.Stream()
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):
            for _ in range(WARM_UP):
                self._step()
        torch.cuda.current_stream().wait_stream(aside)
        torch.cuda.synchronize()
        self.optimizer.forget()  # before the capture: what it replaces would not be what the graph updates
        self.graphs.capture("step", self._step)
        for block in self.model.blocks:
            del block.forward  # rows of the validation split may be fewer

    def step(self, index: int, rows: Rows) -> Tensor:
        """Take the step number `index` on a batch; return its `figures`, which the next step overwrites."""
        self.optimizer.set_rates(index)
        self.place.tokens.copy_(rows.tokens)
        self.place.lengths.copy_(rows.lengths)
        if self.on_gpu:
            self.graphs.replay("step")
        else:
            self._step()
        return self.figures

    def _step(self) -> None:
        loss, nats, _ = self.model.loss(self.place.tokens, self.place.lengths)
        loss.backward()
        self.figures.copy_(torch.stack([nats.float(), self.optimizer.step().float()]))

    @torch.no_grad()
    def held_out_loss(self, batches: list[Rows]) -> float:
        """Return the nats a target, over all targets."""
        nats = torch.stack([self.model.loss(*rows)[2].double().sum() for rows in batches]).sum()
        targets = torch.stack([(rows.lengths - 1).sum() for rows in batches]).sum()
        return (nats / targets).item()


def run(trial: Trial, data: Data, device: torch.device) -> Found:
    """Train a trial and return its row."""
    begun = time.perf_counter()
    rows, held_out = data.train(trial), data.held_out(trial)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    training = Training(trial, device, pick_dtype("auto", device))
    training.prepare()
    synchronize(device)
    prepared = time.perf_counter()
    figures = torch.zeros(trial.steps, 2, device=device)
    for index in range(trial.steps):
        figures[index] = training.step(index, Rows(rows.tokens[index], rows.lengths[index]))
    synchronize(device)
    seconds, peak = time.perf_counter() - prepared, peak_memory(device)
    loss = training.held_out_loss(held_out)
    tokens = int((rows.lengths - 1).sum())
    numbers = {name: each.item() for name, each in training.model.named_parameters() if each.numel() == 1}
    return {
        "name": trial.name,
        "loss": finite(loss, 4),
        "params": sum(parameter.numel() for parameter in training.model.parameters()),
        "tokens": tokens,
        "tokens_per_s": round(tokens / seconds),
        "seconds": round(seconds, 1),
        "prepare_s": round(prepared - begun, 1),
        "peak_gb": peak and round(peak / 1e9, 1),
        "grad_norm": finite(figures[-1, 1].item(), 3),
        "curve": [finite(part[:, 0].mean().item(), 3) for part in figures.tensor_split(CURVE) if len(part)],
        "numbers": {name: finite(number, 3) for name, number in numbers.items()},
    }


def finite(number: float, digits: int) -> float | None:
    """Return a rounded number, or None, which JSON has a word for, where it is none."""
    return round(number, digits) if math.isfinite(number) else None


def claim(folder: Path, name: str) -> bool:
    """Take a trial for this process; False: another one has it, or had it."""
    folder.mkdir(exist_ok=True)
    try:
        (folder / name).open("x").close()
    except FileExistsError:
        return False
    return True


def run_all(trials: list[Trial], claims: Path | None, data: Data, say: Callable[[Found], None], end: float) -> None:
    """Run the trials that no other process has claimed, none begun after `end`; give each row to `say`.

    A trial that fails has a row with its `error`, and the next one is run.
    """
    for trial in trials:
        if time.perf_counter() > end:
            print(f"{trial.name}: left for another call, the time is over", flush=True)
            continue
        if claims is not None and not claim(claims, trial.name):
            continue
        try:
            found = run(trial, data, data.device)
        except Exception as error:  # of many types: one trial must not take the others with it
            traceback.print_exc()
            found = {"name": trial.name, "error": reason(error)}
            torch._dynamo.reset()
        say({**found, "trial": dataclasses.asdict(trial)})
        gc.collect()
        if data.device.type == "cuda":
            torch.cuda.empty_cache()


def read_arguments(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--data_dir", type=Path, help="folder of shard_*.npy (default: the standard library)")
    add("--queue", type=Path, help="file of trials, a line of JSON each")
    add("--json", type=Path, help="file to which each result is appended, as a line")
    add("--deadline", type=float, default=math.inf, help="seconds after which no other trial is begun")
    add("--eval_batches", type=int, help="validation batches, spread over the split (default: all)")
    add("--device", help="default: a GPU where there is one")
    add("--smoke", action="store_true", help="tiny runs, of the queue or of two trials, to see that everything works")
    chosen = parser.parse_args(arguments)
    try:
        if chosen.queue is None and not chosen.smoke:
            raise InputError("give the trials with --queue FILE")
        chosen.trials = [Trial.read(each) for each in SMOKE_QUEUE] if chosen.queue is None else read_queue(chosen.queue)
        if chosen.json is not None and not chosen.json.parent.is_dir():
            raise InputError(f"no such folder: {chosen.json.parent}; make it first")
        if chosen.smoke:
            chosen.trials, chosen.eval_batches = [smaller(trial) for trial in chosen.trials], 1
    except InputError as error:
        parser.error(str(error))
    return chosen


def smaller(trial: Trial) -> Trial:
    """Return a trial with the same switches, of a few steps of the smallest size."""
    changed = {
        field.name: getattr(trial, field.name)
        for field in dataclasses.fields(Trial)
        if field.default is not dataclasses.MISSING and getattr(trial, field.name) != field.default
    }
    return Trial.read({**changed, "name": trial.name, **SMOKE})


def main(arguments: list[str] | None = None) -> None:
    chosen = read_arguments(arguments)
    device = pick_device(chosen.device)
    about = {"device": device_name(device), "torch": torch.__version__}

    def say(found: Found) -> None:
        print(json.dumps({name: value for name, value in found.items() if name != "trial"}), flush=True)
        if chosen.json is not None:
            with chosen.json.open("a", encoding="utf-8") as file:
                file.write(f"{json.dumps({**about, **found})}\n")

    claims = None if chosen.queue is None else chosen.queue.with_name(f"{chosen.queue.name}.claims")
    data = Data(chosen.data_dir, device, chosen.eval_batches)
    # Trials of equal shapes share what is compiled, so it is kept for as many shapes as a queue may have.
    with torch._dynamo.config.patch(recompile_limit=1_000, accumulated_recompile_limit=10_000):
        run_all(chosen.trials, claims, data, say, time.perf_counter() + chosen.deadline)


if __name__ == "__main__":
    main()
