"""One stream of many tokens: is a token as fast, and the memory as large, after a million as after a thousand?"""

import itertools
import resource
import statistics
import sys
import time
from collections.abc import Sequence

import torch

from benchmarks.decoding import MOST_TOKENS, Found, Watched, endless
from lepton.engine.engine import Engine
from lepton.engine.options import GenerationOptions

MARKS = (1_000, 10_000, 100_000, 1_000_000)
TIMED = 500
"""Tokens that are decoded after a text; their median time is that of a token there."""
NOISE = 0.1
"""Time and bytes that differ by no more are constant."""


def resident_bytes(device: torch.device) -> int:
    """Bytes that tensors hold on the GPU now; on a CPU the most memory that the process has had."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def measure_stream(
    runner: Watched, text: Sequence[int], tokens: int, marks: Sequence[int] = MARKS, timed: int = TIMED
) -> Found:
    """Read a text of each length up to `tokens`, and go on with it, plain and greedy.

    `text` is repeated until it is long enough. Returned are for each length the milliseconds of a new token, the tokens
    read in a second, and the bytes, and whether milliseconds and bytes are constant. On a CPU the lists of tokens grow,
    by some bytes a token; the bytes of the state do not.
    """
    options = GenerationOptions(max_new_tokens=MOST_TOKENS, temperature=0.0, use_speculative=False)
    rows: list[Found] = []
    begun = time.perf_counter()
    for mark in sorted({*(mark for mark in marks if mark < tokens), tokens}):
        engine = Engine(runner)
        prompt = list(itertools.islice(itertools.cycle(text), mark))
        engine.add(endless(runner.model, prompt, options, 0))
        before, new = time.perf_counter(), 0
        while not new:
            new = sum(len(output.tokens) for output in engine.step())
        read = time.perf_counter() - before
        seconds: list[float] = []
        while len(seconds) < timed:
            before = time.perf_counter()
            new = sum(len(output.tokens) for output in engine.step())
            if new:
                seconds.append((time.perf_counter() - before) / new)
        found = {
            "tokens": mark,
            "token_ms": round(statistics.median(seconds) * 1e3, 4),
            "read_tokens_per_s": round(mark / read),
            "state_bytes": runner.pool.nbytes,
            "bytes": resident_bytes(runner.model.device),
        }
        engine.close()
        print(found, flush=True)
        rows.append(found)
    constant = all(is_constant([row[name] for row in rows]) for name in ("token_ms", "state_bytes", "bytes"))
    return {"marks": rows, "constant": constant, "seconds": round(time.perf_counter() - begun, 1)}


def is_constant(values: list[float]) -> bool:
    """Whether no value exceeds the first by more than `NOISE`."""
    return max(values) <= (1 + NOISE) * values[0]
