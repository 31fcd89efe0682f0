"""Loss against seconds and against tokens: LEPTON, its dense baseline and a Llama of `transformers`, one after another.

All train on the same batches, in the same order, on one device. `lepton` and `dense` are what `train.py` makes of a
size; `llama` is the peer of equal parameters of `benchmarks.peer`, with warm-up and a linear decay to zero. Its peak
rate is the best of `--rates` by held-out loss, each after a run over all tokens or after a shorter one
(`--search_tokens`), whose seconds do not count. LEPTON's rates are the defaults of `train.py`. `nanochat_*` are of
that project's code, which must be here (`benchmarks.nanochat`), at the best of `--nanochat_rates`.

The clock counts optimizer steps with the reading of their batches. Compiling and recording are printed apart, and the
clock stands still while the loss over a fixed part of the validation split is measured. Those losses are the curves;
`loss` is over the whole split, after the last step. Learning rates follow a schedule of the whole run, so a curve is no
row of independent ends: a run that ended at one of its points would have cooled down there, and reached a lower loss.
Compare the ends first. What a slower runner reaches in the seconds of a faster one takes a run of fewer `--tokens`.
Llama and nanochat read a row as one text; the other two begin anew where a document does. One seed says little (see
CONTRIBUTING).

It prints what is found as it is found, then a table, then all of it as one line of JSON; `--json` and `--svg` files are
written after each runner. `--smoke` runs on a CPU in a minute. Another runner is a function in `RUNNERS`.

    python -m benchmarks.time_to_loss --data_dir D --size tiny --tokens 49e6 --json found.json --svg curves.svg
"""

import argparse
import gc
import json
import math
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from benchmarks import nanochat, peer
from benchmarks.curves import Line, Panel, line_chart
from benchmarks.train_speed import table
from benchmarks.training import DEFAULTS, LeptonTraining, Training, held_out_nats, own_schedule
from lepton.api import Lepton
from lepton.data.shards import ShardedDataset
from lepton.data.stdlib import default_corpus
from lepton.data.tokenizer import load_tokenizer
from lepton.errors import InputError, nearest
from lepton.model.size_config import size_config
from lepton.runtime.device import device_name, keep_freed_memory, pick_device, synchronize
from lepton.train.assembly import token_counts
from lepton.train.schedule import warmup_length

SHOWN_NATS = 1.0
"""How much of the loss the chart shows, from the lowest one upwards."""

Found = dict[str, Any]


class Point(NamedTuple):
    """A point of a curve."""

    tokens: int
    seconds: float
    loss: float
    """On the part of the validation split that is measured on the way."""


class Runner(NamedTuple):
    """A recipe: a model in training, and the schedule of its rates."""

    training: Training
    schedule: Callable[[int, int], float]
    """Share of the peak rate in a step, of so many steps in all."""
    rates: tuple[float, ...] = ()
    """Peak rates to try, as `training.rate`; none: it knows its own."""


class Setup:
    """What all runners share: flags, device and data."""

    def __init__(self, chosen: argparse.Namespace) -> None:
        self.chosen, self.device = chosen, pick_device(chosen.device)
        config = size_config(chosen.size)
        folder = chosen.data_dir or default_corpus(load_tokenizer(None))
        options = {"seq_len": chosen.seq_len, "seed": chosen.seed, "eos_id": config.eos_id}
        self.train_set, self.held_out = (
            ShardedDataset(folder, split=split, vocab_size=config.vocab_size, **options) for split in ("train", "val")
        )
        self.way = "plain" if self.device.type == "cpu" else "recorded" if chosen.no_compile else "compiled"

    def steps(self, tokens: float) -> int:
        """Return the steps that so many tokens make."""
        return max(1, int(tokens) // (self.chosen.batch_size * self.chosen.seq_len))

    def loss(self, training: Training, limit: int | None) -> float:
        """Return the held-out nats a token."""
        rows = self.chosen.batch_size
        nats, targets = held_out_nats(training.model, training.nats, self.held_out, rows, limit).sum(1).tolist()
        return nats / targets


def lepton(setup: Setup, *, dense: bool = False) -> Runner:
    """LEPTON or its dense baseline, as `train.py` trains them by itself."""
    torch.manual_seed(setup.chosen.seed)
    model = Lepton(size_config(setup.chosen.size, dense=dense)).to(setup.device)
    for idea in model.ideas.values():
        idea.learn_frequencies(lambda: token_counts(setup.train_set, model.config.vocab_size))
    return Runner(LeptonTraining(model, setup.way, seed=setup.chosen.seed), own_schedule)


def llama(setup: Setup) -> Runner:
    """The peer of equal parameters."""
    way = setup.chosen.peer_way or ("plain" if setup.device.type == "cpu" else "compiled")
    training = peer.PeerTraining(setup.chosen.size, "peer", way, setup.device, seed=setup.chosen.seed)
    return Runner(training, linear_decay, tuple(sorted(setup.chosen.rates)))


def nanochat_of(setup: Setup, *, name: str) -> Runner:
    """A nanochat, which must be here: see `benchmarks.nanochat`."""
    vocabulary, length = size_config(setup.chosen.size).vocab_size, setup.chosen.seq_len
    training = nanochat.NanochatTraining(name, vocabulary, length, setup.device, seed=setup.chosen.seed)
    return Runner(training, training.schedule, tuple(sorted(setup.chosen.nanochat_rates)))


RUNNERS: dict[str, Callable[[Setup], Runner]] = {
    "lepton": lepton,
    "dense": lambda setup: lepton(setup, dense=True),
    "llama": llama,
    **{name: partial(nanochat_of, name=name) for name in nanochat.SHAPES},
}


def linear_decay(step: int, steps: int) -> float:
    """As much warm-up as LEPTON has, then linearly to zero, which for AdamW is as good as a cosine or better."""
    warmup = warmup_length(steps, DEFAULTS.warmup_steps)
    return min((step + 1) / (warmup + 1), (steps - step) / (steps - warmup))


def train(setup: Setup, runner: Runner, steps: int, points: int, say: Callable[[str], None]) -> list[Point]:
    """Train from the beginning, and return the curve."""
    chosen, training = setup.chosen, runner.training
    training.restart()
    curve: list[Point] = []
    step, tokens, seconds = 0, 0, 0.0
    for end in sorted({max(1, round(steps * (i + 1) / points)) for i in range(points)}):
        synchronize(setup.device)
        begun = time.perf_counter()
        while step < end:
            batch = setup.train_set.batch(step, batch_size=chosen.batch_size)
            training.step([batch], step, runner.schedule(step, steps))
            tokens += int(batch.lengths.sum()) - len(batch.lengths)
            step += 1
        synchronize(setup.device)
        seconds += time.perf_counter() - begun
        curve.append(Point(tokens, round(seconds, 3), round(setup.loss(training, chosen.eval_batches), 5)))
        say(f"{tokens / 1e6:.3g} M tokens in {seconds:.1f} s: loss {curve[-1].loss:.4f}")
    return curve


def trained(setup: Setup, runner: Runner, tokens: float, points: int, say: Callable[[str], None]) -> Found:
    """Train from the beginning, and return what is found."""
    curve = train(setup, runner, setup.steps(tokens), points, say)
    loss, end = setup.loss(runner.training, setup.chosen.final_batches), curve[-1]
    say(f"{end.tokens / end.seconds:,.0f} tokens/s, loss at the end {loss:.4f}")
    return {
        "tokens": end.tokens,
        "seconds": end.seconds,
        "tokens_per_s": round(end.tokens / end.seconds),
        "loss": round(loss, 5),
        "curve": [point._asdict() for point in curve],
    }


def trained_at_best_rate(setup: Setup, runner: Runner, say: Callable[[str], None]) -> Found:
    """Try all rates, and return what is found at the best."""
    chosen, tries = setup.chosen, {}
    tokens, points = (chosen.search_tokens, 1) if chosen.search_tokens else (chosen.tokens, chosen.points)
    for rate in runner.rates:
        runner.training.rate = rate
        tries[rate] = trained(setup, runner, tokens, points, lambda line, rate=rate: say(f"rate {rate:g}: {line}"))
    losses = {rate: each["loss"] if math.isfinite(each["loss"]) else None for rate, each in tries.items()}
    best = min(tries, key=lambda rate: (losses[rate] is None, losses[rate] or 0))
    at_edge = len(tries) > 1 and best in (runner.rates[0], runner.rates[-1])
    say(f"the best rate is {best:g}" + (", the outermost that was tried: try others beyond it" if at_edge else ""))
    found = tries[best]
    if chosen.search_tokens:
        runner.training.rate = best
        found = trained(setup, runner, chosen.tokens, chosen.points, say)
    by_name = {f"{rate:g}": loss for rate, loss in losses.items()}
    return found | {"rate": best, "rate_at_edge": at_edge, "rates": by_name, "rates_tokens": tries[best]["tokens"]}


def measure(setup: Setup, name: str) -> Found:
    """Build and train one runner; return what is found."""

    def say(line: str) -> None:
        print(f"{name}: {line}", flush=True)

    begun = time.perf_counter()
    runner = RUNNERS[name](setup)
    runner.training.prepare(setup.chosen.batch_size, setup.chosen.seq_len)
    synchronize(setup.device)
    prepared, params = round(time.perf_counter() - begun, 1), round(runner.training.params / 1e6, 2)
    say(f"{params} M parameters, built and prepared in {prepared} s")
    if runner.rates:
        found = trained_at_best_rate(setup, runner, say)
    else:
        found = trained(setup, runner, setup.chosen.tokens, setup.chosen.points, say)
    return {"name": name, "params_m": params, "prepare_s": prepared, **found}


def compare(found: list[Found]) -> Found:
    """Add to each runner how it stands beside the others; return where they are compared.

    Curves are read linearly between their points. A loss that is reached before the first point has that point's time.
    """
    ends = [each["curve"][-1] for each in found]
    at = {"equal_tokens": min(end["tokens"] for end in ends), "equal_seconds": min(end["seconds"] for end in ends)}
    at["equal_loss"] = max(end["loss"] for end in ends)
    for each in found:
        columns = {name: [point[name] for point in each["curve"]] for name in Point._fields}
        for name in ("tokens", "seconds"):
            each[f"loss_at_equal_{name}"] = float(np.interp(at[f"equal_{name}"], columns[name], columns["loss"]))
        each["seconds_to_equal_loss"] = seconds_to(at["equal_loss"], columns["seconds"], columns["loss"])
    return at


def seconds_to(loss: float, seconds: list[float], losses: list[float]) -> float | None:
    """Return when a curve first reaches a loss; None: it does not."""
    for i, reached in enumerate(losses):
        if reached <= loss:
            if i == 0:
                return seconds[0]
            part = (losses[i - 1] - loss) / (losses[i - 1] - reached)
            return seconds[i - 1] + part * (seconds[i] - seconds[i - 1])
    return None


def in_words(found: list[Found], at: Found) -> str:
    """Return the table of all runners."""
    columns = {
        "runner": "name",
        "params M": "params_m",
        "rate": "rate",
        "prepared s": "prepare_s",
        "tokens/s": "tokens_per_s",
        "seconds": "seconds",
        "loss": "loss",
        f"at {at['equal_tokens'] / 1e6:.3g} M tokens*": "loss_at_equal_tokens",
        f"at {at['equal_seconds']:.1f} s*": "loss_at_equal_seconds",
        f"seconds to {at['equal_loss']:.4f}*": "seconds_to_equal_loss",
    }
    digits = {"loss": 4, "seconds": 1, "rate": 6, "loss_at_equal_tokens": 4, "loss_at_equal_seconds": 4}
    digits["seconds_to_equal_loss"] = 1
    rounded = [
        {name: round(value, digits[name]) if name in digits and value is not None else value
         for name, value in each.items()}
        for each in found
    ]  # fmt: skip
    return f"{table(rounded, columns)}\n* on the part of the split that the curves show"


def chart(found: list[Found]) -> str:
    """Draw the curves."""
    panels = []
    for name, words, scale in (("seconds", "seconds of training", 1.0), ("tokens", "million tokens", 1e6)):
        curves = {each["name"]: each["curve"] for each in found}
        lines = [Line(label, [(each[name] / scale, each["loss"]) for each in curve]) for label, curve in curves.items()]
        panels.append(Panel(f"Held-out loss by {words}", lines))
    return line_chart("Held-out loss by seconds of training and by tokens", panels, span=SHOWN_NATS)


def read_arguments(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--data_dir", type=Path, help="folder of shard_*.npy (default: the standard library)")
    add("--size", default="tiny")
    add("--runners", nargs="+", default=["lepton", "dense", "llama"], metavar="RUNNER", help=", ".join(RUNNERS))
    add("--tokens", type=float, default=49e6)
    add("--batch_size", type=int, default=64)
    add("--seq_len", type=int, default=512)
    add("--rates", type=float, nargs="+", default=[1e-3, 2e-3, 4e-3], help="peak rates of AdamW to try for llama")
    add("--nanochat_rates", type=float, nargs="+", default=[0.25, 0.45, 0.7], help="shares of its peak rates to try")
    add("--search_tokens", type=float, help="tokens that each rate is tried on (default: all, each try a whole run)")
    add("--points", type=int, default=10, help="of a curve")
    add("--eval_batches", type=int, default=8, help="validation batches at a point, spread over the split")
    add("--final_batches", type=int, help="validation batches after the last step (default: all)")
    add("--seed", type=int, default=0)
    add("--seconds", type=float, help="after so many seconds no other runner is begun")
    add("--device", help="default: a GPU where there is one")
    add("--no_compile", action="store_true", help="record the kernels of LEPTON without compiling them")
    add("--peer_way", choices=peer.MODES, help="how llama runs (default: compiled; on a CPU plain)")
    add("--json", type=Path, help="write what was found to this file, too")
    add("--svg", type=Path, help="draw the curves into this file")
    add("--smoke", action="store_true", help="tiny settings, to see that everything runs")
    chosen = parser.parse_args(arguments)
    if chosen.smoke:
        chosen.size, chosen.batch_size, chosen.seq_len, chosen.tokens, chosen.search_tokens = "nano", 2, 64, 1280, 256
        chosen.points, chosen.eval_batches, chosen.final_batches = 5, 2, 4
    try:
        check(chosen)
    except InputError as error:
        parser.error(str(error))
    return chosen


def check(chosen: argparse.Namespace) -> None:
    """Raise InputError for what would fail only after other runners have taken their time."""
    for name in chosen.runners:
        if name not in RUNNERS:
            raise InputError(f"unknown runner '{name}'{nearest(name, list(RUNNERS))}; there are {', '.join(RUNNERS)}")
    for name in ("tokens", "batch_size", "seq_len", "points", "eval_batches"):
        if not getattr(chosen, name) >= 1:
            raise InputError(f"{name}={getattr(chosen, name)}: must be at least 1")
    for path in (chosen.json, chosen.svg):
        if path is not None and not path.parent.is_dir():
            raise InputError(f"no such folder: {path.parent}; make it first")
    size_config(chosen.size)
    if "llama" in chosen.runners:
        peer.load_transformers()
    if set(chosen.runners) & set(nanochat.SHAPES):
        nanochat.load_nanochat()


def main(arguments: list[str] | None = None) -> None:
    chosen = read_arguments(arguments)
    begun = time.perf_counter()
    setup = Setup(chosen)
    kept = setup.device.type == "cpu" and keep_freed_memory()
    about: Found = {name: str(value) if isinstance(value, Path) else value for name, value in vars(chosen).items()}
    about |= {"device": device_name(setup.device), "torch": torch.__version__, "memory_kept": kept}
    if "llama" in chosen.runners:
        about["transformers"] = peer.load_transformers().__version__
    found: list[Found] = []
    for name in chosen.runners:
        if chosen.seconds is not None and time.perf_counter() - begun > chosen.seconds:
            print(f"{name}: left out, {chosen.seconds:g} s are over", flush=True)
            continue
        found.append(measure(setup, name))
        at = compare(found)
        line = json.dumps({**about, **at, "runners": found}, default=str)
        if chosen.json:
            chosen.json.write_text(f"{line}\n", encoding="utf-8")
        if chosen.svg:
            chosen.svg.write_text(chart(found), encoding="utf-8")
        gc.collect()
        torch._dynamo.reset()
        if setup.device.type == "cuda":
            torch.cuda.empty_cache()
    print(in_words(found, at))
    print(line, flush=True)


if __name__ == "__main__":
    main()
