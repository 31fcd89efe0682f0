"""How fast a model generates: tokens/s, milliseconds a cycle, time to the first token, and how far from the limit.

A case is `rows x context/mode/temperature`, such as `64x512/drafts/0.8`. What is left out at its end stands for all:
`64x512` are all modes of 64 rows after prompts of 512 tokens. Modes are those of `benchmarks.decoding` and, greedy
alone, the caches of the peer, a Llama of `transformers` of equal parameters (`benchmarks.peer_decoding`). Sampling is
with top-p 0.9.

A round reads a prompt in each row and decodes `--new_tokens` more. Prompts are cut from held-out text, 256 different
ones spread over it; a round has the same ones in all modes. Rounds before are the warm-up, whose time stands apart:
compiling and capturing for the first case of so many rows. On a CPU the cases of one model and shape take their rounds
in turns. So whatever else the machine does hits them alike. `ratio` is to the fastest peer, `vs_plain` to plain
decoding at the same temperature. Examples:

    python -m benchmarks.generate_speed --data_dir D --size tiny --train_tokens 49e6 --cases 1x512 64x512 64x8192/plain

    python -m benchmarks.generate_speed --checkpoint nano.pt tiny.pt --json found.json --svg docs/generate_speed.svg

    python -m benchmarks.generate_speed --size medium --random --cases 1x512/plain/0 --profile 20

Prints what is found as it is found, then a table, then all of it as one line of JSON. A case that fails says why, and
the others run.
"""

import argparse
import datetime
import gc
import itertools
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Protocol

import numpy as np
import torch

from benchmarks import peer
from benchmarks.bars import Bar, bar_chart
from benchmarks.decoding import MODES, Decoding, Found, Round, Shelf, Watched, bandwidth
from benchmarks.long_stream import measure_stream
from benchmarks.peer_decoding import CACHES, PeerDecoding
from benchmarks.subjects import Data, Subject, loaded_subject, random_subject, trained_subject
from benchmarks.train_speed import table
from lepton.errors import InputError, nearest
from lepton.runtime.device import device_name, freeze_objects, keep_freed_memory, pick_device, pick_dtype, synchronize

TEMPERATURES = (0.0, 0.8)
DEFAULT_CASES = {
    "cuda": ["1x512", "8x512", "64x512", "256x512", "1024x512", "64x8192/plain/0", "64x8192/auto/0"],
    "cpu": ["1x512/plain", "1x512/drafts", "1x512/auto", "1x512/dynamic"],
}
DEFAULT_SIZES = {"cuda": ["tiny"], "cpu": ["nano", "tiny"]}
DEFAULT_NEW_TOKENS = {"cuda": 256, "cpu": 32}
DEFAULT_TRAIN_TOKENS = {"cuda": 49e6, "cpu": 2e5}
LEAST_ROUNDS, TEXTS = 3, {"cuda": 16, "cpu": 8}
"""Rounds of a case, more where few rows have few texts."""
CHART_ROWS = (1, 64)
COLUMNS = {
    "case": "case", "tokens/s": "tokens_per_s", "cycle ms": "cycle_ms", "p99": "cycle_ms_p99",
    "first ms": "first_token_ms", "tok/cycle": "tokens_a_cycle", "kernels": "kernels", "waits": "host_waits",
    "of floor": "of_floor", "state kB": "state_kb", "peak GB": "peak_gb", "warm-up s": "warm_up_seconds",
    "ratio": "ratio", "vs plain": "vs_plain",
}  # fmt: skip


@dataclass(frozen=True)
class Case:
    """What is to be timed of a model."""

    rows: int
    context: int
    mode: str
    temperature: float

    def __str__(self) -> str:
        return f"{self.rows}x{self.context}/{self.mode}/{self.temperature:g}"

    @property
    def shape(self) -> tuple[int, int]:
        """Cases that are compared have this in common."""
        return self.rows, self.context


def read_cases(name: str, device: torch.device) -> list[Case]:
    """Read `ROWSxCONTEXT[/MODE[/TEMPERATURE]]`; a part that is missing stands for all of them.

    Raises:
        InputError: it is something else.
    """
    shape, mode, temperature = [*name.split("/"), "", "", ""][:3]
    try:
        rows, context = map(int, shape.split("x"))
        temperatures = [float(temperature)] if temperature else []
        if rows < 1 or context < 1 or name.count("/") > 2 or not all(0 <= each < 1e9 for each in temperatures):
            raise ValueError
    except ValueError as error:
        raise InputError(f"case '{name}': write it like 64x512/drafts/0.8, 64x512/drafts or 64x512") from error
    if mode and mode not in {**MODES, **CACHES}:
        raise InputError(f"case '{name}': unknown '{mode}'{nearest(mode, [*MODES, *CACHES])}")
    if mode in CACHES and temperatures not in ([], [0]):
        raise InputError(f"case '{name}': a peer is greedy, which is temperature 0")
    # A static cache is compiled on a GPU alone.
    everything = [*MODES, *(CACHES if device.type == "cuda" else ["dynamic"])]
    return [
        Case(rows, context, each, degree)
        for each in ([mode] if mode else everything)
        for degree in ([0.0] if each in CACHES else temperatures or TEMPERATURES)
    ]


class Timed(Protocol):
    """What a case times: `Decoding` or `PeerDecoding`."""

    def warm_up(self, tokens: int) -> None: ...
    def round(self, tokens: int) -> Round: ...
    def counted(self, top: int) -> Found: ...
    def figures(self, rounds: list[Round]) -> Found: ...
    def close(self) -> None: ...


@dataclass
class Lane:
    """One case being run."""

    subject: Subject
    case: Case
    rounds: list[Round] = field(default_factory=list)
    timed: Timed | None = None
    runner: Watched | None = None
    warm_up: float = 0.0
    others: int = 0
    """Bytes that LEPTON holds on the GPU beside a peer."""
    error: str | None = None
    found: Found = field(default_factory=dict)

    @property
    def name(self) -> str:
        return f"{self.subject.name}/{self.case}"


class Bench:
    """All cases of one run, and what was found."""

    def __init__(self, chosen: argparse.Namespace, device: torch.device) -> None:
        self.chosen, self.device = chosen, device
        self.shelf = Shelf(compiled=not chosen.no_compile)
        self.found: list[Found] = []
        self.bandwidth = bandwidth(device)
        self.begun = time.perf_counter()
        self.new_tokens = chosen.new_tokens or DEFAULT_NEW_TOKENS[device.type]

    def measure(self, subject: Subject, cases: list[Case]) -> None:
        """Time the cases of a model: on a GPU one after the other, on a CPU those of one shape in turns."""
        cases = sorted(cases, key=lambda case: case.shape)
        for shape, group in itertools.groupby(cases, key=lambda case: case.shape):
            prompts = subject.prompts(shape[1])
            lanes = [Lane(subject, case) for case in group]
            for together in [lanes] if self.device.type == "cpu" else [[lane] for lane in lanes]:
                self._take_turns(together, prompts)
            self.shelf.clear()
            self._free()

    def _free(self) -> None:
        gc.unfreeze()
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def _take_turns(self, lanes: list[Lane], prompts: list[list[int]]) -> None:
        steps = [lambda lane: self._prepare(lane, prompts), *[self._round] * self._rounds(lanes[0].case), self._finish]
        for number, step in enumerate(steps):
            first = number % len(lanes)
            for lane in lanes[first:] + lanes[:first]:
                if lane.error is None:
                    try:
                        step(lane)
                    except Exception as error:  # whatever it is, the other cases run
                        lane.error = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
                        lane.timed = lane.runner = None
        for lane in lanes:
            found = lane.found if lane.error is None else {"case": lane.name, "error": lane.error}
            self.found.append(found)
            print(json.dumps({key: value for key, value in found.items() if key != "top"}), flush=True)
            for line in found.get("top", []):
                print("  ", *line, flush=True)
        if any(lane.case.mode in CACHES for lane in lanes):
            torch._dynamo.reset()  # and with it the graphs of a compiled peer
        lanes.clear()
        self._free()

    def _rounds(self, case: Case) -> int:
        return self.chosen.rounds or max(LEAST_ROUNDS, -(-TEXTS[self.device.type] // case.rows))

    def _prepare(self, lane: Lane, prompts: list[list[int]]) -> None:
        case, subject = lane.case, lane.subject
        if time.perf_counter() - self.begun > self.chosen.seconds:
            raise TimeoutError("no time left to begin it")
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        begun = time.perf_counter()
        if case.mode in CACHES:
            lane.others = torch.cuda.memory_allocated() if self.device.type == "cuda" else 0
            limit = self.chosen.peer_seconds
            lane.timed = PeerDecoding(subject.size, case.mode, prompts, case.rows, self.device, limit)
        else:
            lane.runner = self.shelf.take(subject.model, case.rows, case.context)
            lane.timed = Decoding(lane.runner, case.mode, case.temperature, prompts, case.rows)
        lane.timed.warm_up(self.new_tokens)
        freeze_objects()
        synchronize(self.device)
        lane.warm_up = time.perf_counter() - begun

    def _round(self, lane: Lane) -> None:
        assert lane.timed is not None
        lane.rounds.append(lane.timed.round(self.new_tokens))

    def _finish(self, lane: Lane) -> None:
        """Say what was found, and count what is not timed."""
        timed, case = lane.timed, lane.case
        assert timed is not None
        peak = torch.cuda.max_memory_allocated() - lane.others if self.device.type == "cuda" else None
        figures = timed.figures(lane.rounds)
        cycles = np.array([seconds for each in lane.rounds for seconds in each.cycles])
        tokens = sum(each.tokens for each in lane.rounds)
        floor = figures["floor_bytes"] / self.bandwidth
        lane.found = {
            "case": lane.name,
            "tokens_per_s": round(statistics.median(each.tokens_per_s for each in lane.rounds), 1),
            "rounds": [round(each.tokens_per_s, 1) for each in lane.rounds],
            "cycle_ms": round(float(np.median(cycles)) * 1e3, 4),
            "cycle_ms_p99": round(float(np.quantile(cycles, 0.99)) * 1e3, 4),
            "cycles": len(cycles),
            "first_token_ms": round(statistics.median(each.first_token for each in lane.rounds) * 1e3, 2),
            "tokens_a_cycle": round(tokens / len(cycles) / case.rows, 3),
            "of_floor": round(floor / float(np.median(cycles)), 4),
            "peak_gb": peak and round(peak / 1e9, 3),
            "warm_up_seconds": round(lane.warm_up, 2),
            "state_kb": round(figures["state_bytes"] / 1e3, 1),
            **figures,
            **timed.counted(self.chosen.profile),
        }
        timed.close()
        if lane.runner is not None:
            self.shelf.give(lane.runner)
        lane.timed = lane.runner = None

    def stream(self, subject: Subject, tokens: int) -> Found:
        """One stream of so many tokens, compiled as cases are."""
        text = [token for prompt in subject.prompts(512) for token in prompt]
        try:
            runner = Watched(subject.model, 1, 1 << 12)
            if not self.chosen.no_compile:
                runner.warm_up(1, drafts=[0])
            return {"model": subject.name, **measure_stream(runner, text, tokens)}
        except Exception as error:
            return {"model": subject.name, "error": f"{type(error).__name__}: {str(error)[:300]}"}


def compare(found: list[Found]) -> None:
    """Add to each case its `ratio` to the fastest peer of its model and shape, and `vs_plain`."""
    peers: dict[str, float] = {}
    plain: dict[tuple[str, str], float] = {}
    for each in (each for each in found if "tokens_per_s" in each):
        shape, mode, temperature = each["case"].rsplit("/", 2)
        if mode in CACHES:
            peers[shape] = max(peers.get(shape, 0), each["tokens_per_s"])
        elif mode == "plain":
            plain[shape, temperature] = each["tokens_per_s"]
    for each in (each for each in found if "tokens_per_s" in each):
        shape, mode, temperature = each["case"].rsplit("/", 2)
        if shape in peers:
            each["ratio"] = round(each["tokens_per_s"] / peers[shape], 3)
        if (shape, temperature) in plain and mode not in CACHES:
            each["vs_plain"] = round(each["tokens_per_s"] / plain[shape, temperature], 3)


def chart(found: list[Found]) -> str:
    """Draw the greedy tokens/s of plain decoding, of drafts and of the peers at `CHART_ROWS`, where they were found."""
    labels = {"plain": "LEPTON, plain", "drafts": "LEPTON, drafts"}
    labels |= {cache: f"transformers, {cache}" for cache in CACHES}
    panels: dict[str, list[Bar]] = {}
    for each in (each for each in found if "tokens_per_s" in each):
        name, shape, mode, temperature = each["case"].rsplit("/", 3)
        rows, context = shape.split("x")
        if mode in labels and temperature == "0" and int(rows) in CHART_ROWS:
            heading = f"{name.upper()}, {rows} row{'s' * (rows != '1')}, context {context}: tokens/s"
            panels.setdefault(heading, []).append(Bar(labels[mode], each["tokens_per_s"], mode not in CACHES))
    return bar_chart("Tokens per second of greedy generation", list(panels.items()))


def makers(chosen: argparse.Namespace) -> Iterator[tuple[str, Callable[[], Subject]]]:
    """Return the names of the models, and what loads, makes or trains each."""
    device, data = chosen.device, Data(chosen.data_dir, chosen.tokenizer)
    for path in chosen.checkpoint:
        yield str(path), partial(loaded_subject, path, data, device)
    for size in chosen.size if chosen.size or chosen.checkpoint else DEFAULT_SIZES[device.type]:
        if chosen.random:
            yield size, partial(random_subject, size, data, device)
        else:
            tokens = chosen.train_tokens or DEFAULT_TRAIN_TOKENS[device.type]
            yield size, partial(trained_subject, size, tokens, data, chosen.models_dir, device)


def read_arguments(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--checkpoint", type=Path, nargs="+", default=[], help="trained models to measure")
    add(
        "--size",
        nargs="+",
        default=[],
        help="sizes to train, or with --random to make (default: tiny; on a CPU nano, too)",
    )
    add("--random", action="store_true", help="random weights instead of training: for timing alone")
    add("--data_dir", type=Path, help="folder of shard_*.npy, for training and prompts (default: the standard library)")
    add("--tokenizer", type=Path, help="the tokenizer that the data were made with (default: that of train.py)")
    add("--train_tokens", type=float, help="tokens to train on (default: 49e6; on a CPU 2e5)")
    add("--models_dir", type=Path, help="where trained models are kept, and found again (default: nowhere)")
    add("--cases", nargs="+", metavar="ROWSxCONTEXT[/MODE[/TEMPERATURE]]", help="what to measure")
    add("--new_tokens", type=int, help="tokens that a round adds to each row (default: 256; on a CPU 32)")
    add("--rounds", type=int, help="rounds of a case (default: at least 3, and 16 texts, on a CPU 8)")
    add("--seconds", type=float, default=float("inf"), help="after so many seconds no other case is begun")
    add("--peer_seconds", type=float, default=300, help="limit of each case of the peer (default: 300)")
    add("--profile", type=int, default=0, metavar="N", help="count kernels, and list the N that take longest")
    add("--stream", type=int, default=0, metavar="N", help="also go on with texts of up to N tokens")
    add("--no_compile", action="store_true", help="run cycles without compiling them")
    add("--threads", type=int, help="CPU threads")
    add("--json", type=Path, help="write what was found to this file, too")
    add("--svg", type=Path, help="draw a chart into this file")
    chosen = parser.parse_args(arguments)
    for name in ("new_tokens", "rounds", "stream", "threads"):
        if getattr(chosen, name) is not None and getattr(chosen, name) < (name != "stream"):
            parser.error(f"--{name} must be at least 1")
    try:
        chosen.device = pick_device(None)
        names = DEFAULT_CASES[chosen.device.type] if chosen.cases is None else chosen.cases
        chosen.cases = list(dict.fromkeys(case for name in names for case in read_cases(name, chosen.device)))
    except InputError as error:
        parser.error(str(error))
    return chosen


def main(arguments: list[str] | None = None) -> None:
    chosen = read_arguments(arguments)
    device = chosen.device
    if chosen.threads:
        torch.set_num_threads(chosen.threads)
    kept = device.type == "cpu" and keep_freed_memory()
    bench, models, streams = Bench(chosen, device), [], []
    for name, make in makers(chosen):
        try:
            subject = make()
        except InputError as error:
            bench.found.append({"case": name, "error": str(error)})
            continue
        print(f"{subject.name}: {subject.origin}", flush=True)
        models.append({"name": subject.name, "params_m": subject.model.num_params() / 1e6, "origin": subject.origin})
        bench.measure(subject, chosen.cases)
        if chosen.stream:
            streams.append(bench.stream(subject, chosen.stream))
        del subject
    compare(bench.found)
    print(table(bench.found, COLUMNS))
    about: Found = {
        "date": datetime.date.today().isoformat(),
        "command": " ".join(["python -m benchmarks.generate_speed", *(arguments or sys.argv[1:])]),
        "device": device_name(device),
        "dtype": str(pick_dtype("auto", device)).removeprefix("torch."),
        "torch": torch.__version__,
        "memory_kept": kept,
        "copy_gb_per_s": round(bench.bandwidth / 1e9, 1),
        "models": models,
    }
    if any(case.mode in CACHES for case in chosen.cases):
        try:
            about["transformers"] = peer.load_transformers().__version__
        except InputError as error:
            print(error)
    text = json.dumps({**about, "cases": bench.found, **({"streams": streams} if streams else {})})
    if chosen.json:
        chosen.json.write_text(text + "\n", encoding="utf-8")
    if chosen.svg:
        chosen.svg.write_text(chart(bench.found), encoding="utf-8")
    print(text, flush=True)


if __name__ == "__main__":
    main()
