"""One stream of many tokens: is a token as fast, and the memory as large, after a million as after a thousand?"""

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
"""Tokens before a mark whose median time is that of a token there."""
NOISE = 0.1
"""Time and bytes that differ by no more are constant."""


def resident_bytes(device: torch.device) -> int:
    """Bytes that tensors hold on the GPU now; on a CPU the most memory that the process has had."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def measure_stream(runner: Watched, prompt: list[int], tokens: int, marks: Sequence[int] = MARKS) -> Found:
    """Decode so many tokens, plain and greedy; return the milliseconds of a token and the bytes at each mark, and
    whether they are constant.

    On a CPU the lists of tokens themselves grow, by some bytes a token; the bytes of the state do not.
    """
    options = GenerationOptions(max_new_tokens=MOST_TOKENS, temperature=0.0, use_speculative=False)
    engine = Engine(runner)
    engine.add(endless(runner.model, prompt, options, 0))
    rows: list[Found] = []
    recent: list[float] = []
    begun, done = time.perf_counter(), 0
    for mark in sorted({*(mark for mark in marks if mark < tokens), tokens}):
        while done < mark:
            before = time.perf_counter()
            new = sum(len(output.tokens) for output in engine.step())
            if new:
                recent.append((time.perf_counter() - before) / new)
            done += new
        found = {
            "tokens": done,
            "token_ms": round(statistics.median(recent[-TIMED:]) * 1e3, 4),
            "state_bytes": runner.pool.nbytes,
            "bytes": resident_bytes(runner.model.device),
        }
        print(found, flush=True)
        rows.append(found)
        del recent[:-TIMED]
    engine.close()
    constant = all(is_constant([row[name] for row in rows]) for name in ("token_ms", "state_bytes", "bytes"))
    seconds = round(time.perf_counter() - begun, 1)
    return {"marks": rows, "constant": constant, "seconds": seconds}


def is_constant(values: list[float]) -> bool:
    """Whether no value exceeds the first by more than `NOISE`."""
    return max(values) <= (1 + NOISE) * values[0]
