"""Run many benchmarks side by side on the GPUs of one machine, and lose nothing of what they find.

A plan is lines of `GPU LANE SECONDS NAME COMMAND...`; empty ones and those that begin with # do not count. Lanes run
side by side, the jobs of a lane one after the other, each for so many seconds at most and none beyond `--seconds` of
the whole. They share the compilers' caches. Of each job the last line of JSON is its result: it is printed and
written to `results.jsonl` as soon as it is known, its other output goes to `NAME.log`. A table of all comes last.

    python -m benchmarks.side_by_side plan.txt --out results --seconds 570
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SHOWN = ("val_loss", "tokens_per_s", "peak_gb")
"""What is shown of a result, where it has it."""


@dataclass(frozen=True)
class Job:
    """One command."""

    gpu: str
    lane: str
    seconds: float
    name: str
    command: str

    @staticmethod
    def read(line: str) -> "Job":
        """Read a line of a plan; ValueError names one that is none."""
        try:
            gpu, lane, seconds, name, command = line.split(maxsplit=4)
            return Job(gpu, lane, float(seconds), name, command)
        except ValueError:
            raise ValueError(f"no line of a plan: '{line}'; write GPU LANE SECONDS NAME COMMAND") from None


class Runner:
    """What all lanes share: the clock, the folder, and what was found."""

    def __init__(self, out: Path, seconds: float) -> None:
        self.out, self.end = out, time.monotonic() + seconds
        self.begun = time.monotonic()
        self.rows: list[dict[str, Any]] = []
        self.lock = threading.Lock()
        caches = {name: str(out.resolve() / name.lower()) for name in ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR")}
        self.environment = {**caches, **os.environ, "PYTHONUNBUFFERED": "1"}

    def run_lane(self, jobs: list[Job]) -> None:
        for job in jobs:
            self.tell(job, *self.run(job))

    def run(self, job: Job) -> tuple[str, str]:
        """Run a job; return how it ended and what it printed."""
        left = min(job.seconds, self.end - time.monotonic())
        if left <= 0:
            return "no time left", ""
        log = self.out / f"{job.name}.log"
        with log.open("w", encoding="utf-8") as file:
            process = subprocess.Popen(
                job.command,
                shell=True,
                stdout=file,
                stderr=subprocess.STDOUT,
                env={**self.environment, "CUDA_VISIBLE_DEVICES": job.gpu},
                start_new_session=True,
            )
            try:
                status = process.wait(left)
                end = "ok" if status == 0 else f"exit {status}"
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)  # with all that it has started
                process.wait()
                end = f"stopped after {left:.0f} s"
        return end, log.read_text(encoding="utf-8", errors="replace")

    def tell(self, job: Job, end: str, text: str) -> None:
        """Keep what a job found, and print it."""
        row = {"name": job.name, "end": end, "at_s": round(time.monotonic() - self.begun), **last_json(text)}
        with self.lock:
            self.rows.append(row)
            with (self.out / "results.jsonl").open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
            print(describe(row), flush=True)
            if end != "ok":
                print("\n".join(f"  | {line[:200]}" for line in text.splitlines()[-8:]), flush=True)


def last_json(text: str) -> dict[str, Any]:
    """Return the last line that is an object of JSON, or {}."""
    for line in reversed(text.splitlines()):
        if line.startswith("{"):
            try:
                return dict(json.loads(line))
            except ValueError:
                continue
    return {}


def describe(row: dict[str, Any]) -> str:
    """One line about a job."""
    found = [f"{name} {row[name]}" for name in SHOWN if row.get(name) is not None]
    return "  ".join([f"{row['at_s']:>5} s", row["name"], row["end"], *found])


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("plan", type=Path)
    parser.add_argument("--out", type=Path, required=True, help="folder for results.jsonl and logs")
    parser.add_argument("--seconds", type=float, default=3600, help="for all of it")
    chosen = parser.parse_args(arguments)
    lines = [line.strip() for line in chosen.plan.read_text(encoding="utf-8").splitlines()]
    lanes: defaultdict[str, list[Job]] = defaultdict(list)
    try:
        for job in (Job.read(line) for line in lines if line and not line.startswith("#")):
            lanes[job.lane].append(job)
    except ValueError as error:
        parser.error(str(error))
    chosen.out.mkdir(parents=True, exist_ok=True)
    runner = Runner(chosen.out, chosen.seconds)
    threads = [threading.Thread(target=runner.run_lane, args=(jobs,)) for jobs in lanes.values()]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    print("\n".join(["", *(describe(row) for row in sorted(runner.rows, key=lambda row: row["name"]))]))
    return int(any(row["end"] != "ok" for row in runner.rows))


if __name__ == "__main__":
    sys.exit(main())
