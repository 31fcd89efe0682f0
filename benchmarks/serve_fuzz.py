"""Whether `python -m lepton serve` bears requests of every kind: what schemathesis makes of its OpenAPI document.

Starts the server in a process of its own and sends `--requests`, valid ones and damaged ones, to all routes from
several threads. Each reply must have a status of the document and be what it says; none may be a 5xx, and no
traceback may stand in the server's log. Meanwhile one client asks for the same text again and again, which must stay
what it was, and no other reply may hold it. The server's resident memory is read all along: after the first tenth it
must not grow. Needs schemathesis, which `requirements-dev.txt` leaves out. Example:

    python -m benchmarks.serve_fuzz --requests 10000 --json found.json

Prints a line a figure, then all of it as one line of JSON.
"""

import argparse
import datetime
import http.client
import json
import math
import platform
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from lepton import checkpoint
from lepton.api import Lepton
from lepton.data.tokenizer import load_tokenizer
from lepton.model.size_config import size_config

CANARY = {"prompt": "The canary sings", "seed": 5, "temperature": 1.0, "max_tokens": 16}
BUSY = ("/v1/completions", "/v1/chat/completions")
"""Routes that get most of the requests."""
LIMITS = (
    "--max_tokens",
    "24",
    "--max_prompt",
    "300",
    "--max_choices",
    "4",
    "--max_request",
    "1200",
    "--max_think",
    "4",
)
"""Small, so that a request costs little."""


class Server:
    """`python -m lepton serve` on a free port, inside a `with` block, with its log in a file."""

    def __init__(self, folder: Path) -> None:
        self.log = folder / "log.txt"
        path = folder / "model.pt"
        tokenizer = load_tokenizer(None)
        torch.manual_seed(0)
        model = Lepton(size_config("nano", width=64, heads=1, layers=3, ffn=64, window=64, vocab_size=tokenizer.size))
        content = {"model": model.state_dict(), "config": model.config.to_dict(), "size": None, "step": 0}
        checkpoint.save(path, content | {"tokenizer": tokenizer.to_json()})
        words = [sys.executable, "-m", "lepton", "serve", "--checkpoint", str(path), "--dtype", "fp32", "--port", "0"]
        words += [*LIMITS, "--conversations", "8", "--max_conversations", "40", "--conversation_folder", str(folder)]
        with self.log.open("w") as log:
            self.process = subprocess.Popen(words, stderr=log)
        while "serving" not in (said := self.log.read_text()):
            if self.process.poll() is not None:
                raise SystemExit(f"the server did not start:\n{said}")
            time.sleep(0.1)
        self.port = int(said.rpartition("127.0.0.1:")[2].partition("/")[0])

    def __enter__(self) -> "Server":
        return self

    def __exit__(self, *error: object) -> None:
        self.process.terminate()
        self.process.wait(60)

    @property
    def megabytes(self) -> float:
        """Resident memory."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return int(status.partition("VmRSS:")[2].split()[0]) / 1024

    def ask(self, value: dict[str, Any]) -> str:
        """Return the text of a completion."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=300)
        try:
            connection.request("POST", "/v1/completions", json.dumps(value), {"Content-Type": "application/json"})
            found = json.loads(connection.getresponse().read())
            return str(found["choices"][0]["text"])
        finally:
            connection.close()


class Over(BaseException):
    """The time is over; no library takes it for a finding."""


class Fuzz:
    """Requests that were sent, and what was wrong."""

    def __init__(self, server: Server, count: int, seconds: float) -> None:
        self.server, self.count, self._end = server, count, time.monotonic() + seconds
        self.statuses: Counter[str] = Counter()
        self.faults: list[str] = []
        self.memory: list[tuple[int, float]] = []
        self.canary = server.ask(CANARY)
        self.canaries = 0
        self._lock, self._over = threading.Lock(), threading.Event()

    @property
    def sent(self) -> int:
        return sum(self.statuses.values())

    def run(self, threads: int, seed: int) -> None:
        """Send all requests."""
        import schemathesis

        schema = schemathesis.openapi.from_url(f"http://127.0.0.1:{self.server.port}/openapi.json")
        found = [each.ok() for each in schema.get_all_operations()]
        weights = [8 if each.path in BUSY else 1 for each in found]
        shares = [max(1, self.count * weight // sum(weights)) for weight in weights]
        work = [(operation, share // threads + 1) for operation, share in zip(found, shares, strict=True)]
        clients = [threading.Thread(target=self._client, args=(work, seed + i)) for i in range(threads)]
        watch = threading.Thread(target=self._watch)
        watch.start()
        for client in clients:
            client.start()
        for client in clients:
            client.join()
        self._over.set()
        watch.join()

    def _client(self, work: list[Any], number: int) -> None:
        for operation, share in work[number % len(work) :] + work[: number % len(work)]:
            try:
                self._operation(operation, share, number)
            except Over:
                return
            except Exception as error:  # what was found, or a fault of this program
                self._fault(f"{operation.label}: {type(error).__name__}: {str(error)[:600]}")

    def _operation(self, operation: Any, share: int, number: int) -> None:
        import hypothesis
        from schemathesis import GenerationMode

        for mode, part in ((GenerationMode.POSITIVE, share // 2 + 1), (GenerationMode.NEGATIVE, share // 2 + 1)):
            try:
                strategy = operation.as_strategy(generation_mode=mode)
            except Exception as error:  # such as: nothing of this route can be wrong
                print(f"{operation.label}: no {mode.value} requests ({type(error).__name__})", file=sys.stderr)
                continue
            settings = hypothesis.settings(
                max_examples=part,
                deadline=None,
                database=None,
                phases=[hypothesis.Phase.generate],
                suppress_health_check=[*hypothesis.HealthCheck],
            )
            run = hypothesis.seed(number)(settings(hypothesis.given(strategy)(self._send)))
            try:
                run()
            except hypothesis.errors.Unsatisfiable:
                print(f"{operation.label}: no {mode.value} requests", file=sys.stderr)

    def _send(self, case: Any) -> None:
        if time.monotonic() > self._end:
            raise Over
        response = case.call(base_url=f"http://127.0.0.1:{self.server.port}", timeout=300)
        what, body = f"{case.method} {case.formatted_path[:100]}", response.content
        with self._lock:
            self.statuses[str(response.status_code)] += 1
        if response.status_code >= 500:
            self._fault(f"{what}: {response.status_code} {body[:300]!r} for {str(case.body)[:300]}")
        elif response.status_code >= 400:
            error = json.loads(body)["error"]
            if not error["message"]:
                self._fault(f"{what}: {response.status_code} without a message")
        elif str(response.status_code) not in case.operation.definition.raw["responses"]:
            self._fault(f"{what}: status {response.status_code} is not in the document")
        if self.canary.encode() in body:
            self._fault(f"{what}: holds the text of another client")

    def _fault(self, text: str) -> None:
        with self._lock:
            self.faults.append(text)
        print(f"FAULT {text}", file=sys.stderr)

    def _watch(self) -> None:
        """Ask for the same text again and again, and read the memory."""
        while not self._over.is_set():
            if self.server.ask(CANARY) != self.canary:
                self._fault("the same request gave another text")
            self.canaries += 1
            self.memory.append((self.sent, round(self.server.megabytes, 1)))
            self._over.wait(1)


def figures(fuzz: Fuzz, seconds: float) -> dict[str, Any]:
    """Return what was found."""
    settled = [entry for entry in fuzz.memory if entry[0] >= fuzz.sent / 10]
    first, last = (sorted(size for _, size in part)[len(part) // 2] for part in (settled[:10], settled[-10:]))
    log = fuzz.server.log.read_text()
    return {
        "requests": fuzz.sent,
        "seconds": round(seconds, 1),
        "statuses": dict(sorted(fuzz.statuses.items())),
        "same_text": fuzz.canaries,
        "faults": fuzz.faults[:50],
        "tracebacks": log.count("Traceback"),
        "megabytes_after_a_tenth": first,
        "megabytes_at_the_end": last,
        "memory": fuzz.memory[:: max(1, len(fuzz.memory) // 100)],
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--seconds", type=float, default=math.inf, help="send no more after this time")
    parser.add_argument("--threads", type=int, default=4, help="clients at once")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, metavar="FILE")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, Server(Path(folder)) as server:
        fuzz, begun = Fuzz(server, args.requests, args.seconds), time.perf_counter()
        fuzz.run(args.threads, args.seed)
        found = figures(fuzz, time.perf_counter() - begun)
        alive = server.process.poll() is None and server.ask(CANARY) == fuzz.canary
    found |= {
        "answers_afterwards": alive,
        "date": datetime.date.today().isoformat(),
        "versions": {name: version(name) for name in ("schemathesis", "hypothesis", "starlette", "uvicorn", "torch")}
        | {"python": platform.python_version()},
        "command": "python -m benchmarks.serve_fuzz " + " ".join(sys.argv[1:]),
    }
    for name in ("requests", "seconds", "statuses", "tracebacks", "megabytes_after_a_tenth", "megabytes_at_the_end"):
        print(f"{name:<26} {found[name]}")
    print(f"{'faults':<26} {len(fuzz.faults)}")
    if args.json:
        args.json.write_text(json.dumps(found, indent=1) + "\n")
    print(json.dumps(found))
    return int(bool(fuzz.faults) or found["tracebacks"] > 0 or not alive)


if __name__ == "__main__":
    sys.exit(main())
