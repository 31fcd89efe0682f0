"""How `python -m lepton serve` bears many clients at once: speed, time to the first token, and whether each is right.

Starts the server in a process of its own, opens `--streams` connections at once, each with a prompt and a seed of its
own, and reads all streams to their ends. Every text is then compared with `Lepton.generate` for its seed, alone.
Neighbours in a batch may change the last digits of a logit, and with them, rarely, a token: such texts are counted as
`different`. The tests do the same in fp64, where there is none. Examples:

    python -m benchmarks.serve_load --checkpoint nano.pt --streams 1000 --places 64

    python -m benchmarks.serve_load --size nano --streams 100 --new_tokens 16 --json found.json

Prints a line a figure, then all of it as one line of JSON.
"""

import argparse
import asyncio
import datetime
import json
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lepton import checkpoint
from lepton.api import Lepton, create_lepton
from lepton.data.tokenizer import load_tokenizer
from lepton.runtime.device import device_name, pick_device

PROMPTS = (
    "The history of the island begins",
    "def main(arguments):\n",
    "It was a dark night, and",
    "The population of the country",
    "import os\nimport sys\n\n",
    "She looked at him and said,",
)


@dataclass
class Stream:
    """What one client saw."""

    prompt: str
    seed: int
    text: str = ""
    first: float = 0.0
    """Seconds from the start of all to the first text."""
    last: float = 0.0
    error: str | None = None


class Server:
    """`python -m lepton serve` on a free port, inside a `with` block."""

    def __init__(self, path: Path, *flags: str) -> None:
        words = [sys.executable, "-m", "lepton", "serve", "--checkpoint", str(path), "--port", "0", *flags]
        self._process = subprocess.Popen(words, stderr=subprocess.PIPE, text=True)
        self.log: list[str] = []
        """What the server has said after it was ready."""
        assert self._process.stderr is not None
        for line in self._process.stderr:
            print(line, end="", file=sys.stderr)
            if "serving" in line:
                self.port = int(line.partition("127.0.0.1:")[2].partition("/")[0])
                self._follower = threading.Thread(target=self._follow_log)
                self._follower.start()
                return
        raise SystemExit("the server did not start")

    def _follow_log(self) -> None:
        assert self._process.stderr is not None
        for line in self._process.stderr:
            self.log.append(line)

    def __enter__(self) -> "Server":
        return self

    def __exit__(self, *error: object) -> None:
        self._process.terminate()
        self._process.wait()
        self._follower.join()
        assert self._process.stderr is not None
        self._process.stderr.close()

    def memory(self) -> int | None:
        """Return the bytes that the process holds, where the system says."""
        try:
            pages = Path(f"/proc/{self._process.pid}/statm").read_text(encoding="ascii").split()[1]
        except OSError:
            return None
        return int(pages) * 4096


async def follow(port: int, stream: Stream, new_tokens: int, since: float) -> None:
    """Send a request and read its stream to the end."""
    fields = {"prompt": stream.prompt, "seed": stream.seed, "max_tokens": new_tokens, "temperature": 0.8}
    body = json.dumps(fields | {"stream": True}).encode()
    head = "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    head += f"Content-Length: {len(body)}\r\nConnection: close\r\n\r\n"
    try:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(head.encode() + body)
        async for line in reader:
            if not line.startswith(b"data: {"):
                if line.startswith(b'{"error"'):
                    stream.error = line.decode()
                continue
            event = json.loads(line[6:])
            if "error" in event:
                stream.error = event["error"]["message"]
            for choice in event.get("choices", []):
                stream.first = stream.first or time.perf_counter() - since
                stream.text += choice["text"]
        writer.close()
    except OSError as error:
        stream.error = str(error)
    stream.last = time.perf_counter() - since


async def follow_all(port: int, streams: list[Stream], new_tokens: int) -> float:
    """Follow all streams at once; return the seconds of all of it."""
    since = time.perf_counter()
    await asyncio.gather(*(follow(port, stream, new_tokens, since) for stream in streams))
    return time.perf_counter() - since


def different(path: Path, streams: list[Stream], args: argparse.Namespace) -> int:
    """Return how many texts are not those of `Lepton.generate`."""
    model = Lepton.from_checkpoint(path).to(pick_device(None), {"bf16": torch.bfloat16}.get(args.dtype, torch.float32))
    assert model.tokenizer is not None
    count = 0
    for stream in streams:
        wanted = model.generate(stream.prompt, args.new_tokens, seed=stream.seed, temperature=0.8)
        count += wanted != stream.prompt + stream.text
    return count


def measure(path: Path, args: argparse.Namespace) -> dict[str, Any]:
    """Return the figures of one load."""
    streams = [Stream(PROMPTS[i % len(PROMPTS)], i) for i in range(args.streams)]
    flags = ["--dtype", args.dtype, "--places", str(args.places), "--max_streams", str(args.streams)]
    flags += ["--warm_up", *map(str, args.warm_up)] if args.warm_up else []
    with Server(path, *flags, "--max_seconds", "86400") as server:
        asyncio.run(follow_all(server.port, [Stream(PROMPTS[0], 0)], 4))  # its first request makes the pool
        before = server.memory()
        seconds = asyncio.run(follow_all(server.port, streams, args.new_tokens))
        after = server.memory()
    right = [each for each in streams if each.error is None]
    firsts = sorted(each.first for each in right)
    figures = {
        "date": datetime.date.today().isoformat(),
        "device": device_name(pick_device(None)),
        "threads": torch.get_num_threads(),
        "model": args.size or Path(args.checkpoint).name,
        "streams": args.streams,
        "places": args.places,
        "new_tokens": args.new_tokens,
        "dtype": args.dtype,
        "seconds": round(seconds, 2),
        "failed": len(streams) - len(right),
        "first_token_p50": round(statistics.median(firsts), 3) if firsts else None,
        "first_token_p99": round(firsts[int(0.99 * (len(firsts) - 1))], 3) if firsts else None,
        "memory_before": before,
        "memory_after": after,
    }
    checked = right if args.check is None else right[: args.check]
    figures |= {"checked": len(checked), "different": different(path, checked, args)}
    return figures


def random_checkpoint(size: str, path: Path) -> None:
    """Write a model with random weights and the tokenizer that LEPTON ships."""
    torch.manual_seed(0)
    model, tokenizer = create_lepton(size), load_tokenizer(None)
    content = {"model": model.state_dict(), "config": model.config.to_dict(), "size": size, "step": 0}
    checkpoint.save(path, content | {"tokenizer": tokenizer.to_json()})


def main(words: list[str] | None = None) -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("--checkpoint", help="a trained model")
    parser.add_argument("--size", help="a size with random weights, instead")
    parser.add_argument("--streams", type=int, default=1000)
    parser.add_argument("--places", type=int, default=64)
    parser.add_argument("--new_tokens", type=int, default=32)
    parser.add_argument("--dtype", default="fp32", choices=["fp32", "bf16"])
    parser.add_argument("--warm_up", type=int, nargs="+", default=[])
    parser.add_argument("--check", type=int, help="texts to compare (default: all)")
    parser.add_argument("--json", help="file to write")
    args = parser.parse_args(words)
    if (args.checkpoint is None) == (args.size is None):
        parser.error("give --checkpoint FILE or --size NAME")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(args.checkpoint or Path(folder) / "random.pt")
        if args.size:
            random_checkpoint(args.size, path)
        figures = measure(path, args)
    for name, value in figures.items():
        print(f"{name:16}{value}")
    print(json.dumps(figures))
    if args.json:
        Path(args.json).write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
