"""What a turn of a conversation costs: kept by the server under an id, and with all messages sent anew.

Starts the server in a process of its own and holds one conversation in both ways, turn by turn, one request at a time.
Both get the same messages and the same seed. Of each turn it notes the tokens that were read, the seconds to the first
text, and whether both texts are equal. In fp32 the last digits of a logit depend on how a text was cut, and so, rarely,
does a token: after one the two conversations go on with the answer of the kept one. Example:

    python -m benchmarks.serve_turns --size micro --turns 20 --json found.json

Prints a line a turn, then all of it as one line of JSON.
"""

import argparse
import contextlib
import datetime
import http.client
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.serve_load import Server, random_checkpoint
from lepton.runtime.device import device_name, pick_device

SAID = (
    "Tell me more about the history of the island, and of the people who came there by ship.",
    "What did they live on in the first winter, before the fields had been made?",
    "And who wrote all of this down, when nobody among them could read?",
)


def turn(port: int, body: dict[str, Any]) -> dict[str, Any]:
    """Ask for an answer; return its text, the seconds to its first piece and to its end, and the tokens read."""
    text, first, usage, since = "", 0.0, {}, time.perf_counter()
    asked = body | {"stream": True, "stream_options": {"include_usage": True}}
    with contextlib.closing(http.client.HTTPConnection("127.0.0.1", port)) as connection:
        connection.request("POST", "/v1/chat/completions", json.dumps(asked), {"Content-Type": "application/json"})
        with connection.getresponse() as response:
            if response.status != 200:
                raise SystemExit(response.read().decode())
            for line in response:
                if line.startswith(b"data: {"):
                    event = json.loads(line[6:])
                    usage = event["usage"] or usage
                    new = "".join(choice["delta"].get("content", "") for choice in event["choices"])
                    first = first or (time.perf_counter() - since if new else 0.0)
                    text += new
    seconds = time.perf_counter() - since
    return {"text": text, "first": first or seconds, "seconds": seconds, "read": usage["prompt_tokens"]}


def measure(path: Path, args: argparse.Namespace) -> dict[str, Any]:
    """Return the figures of one conversation."""
    history: list[dict[str, str]] = []
    turns = []
    flags = ["--dtype", args.dtype, "--places", "1", "--max_streams", "4", "--max_seconds", "86400"]
    with Server(path, *flags) as server:
        turn(server.port, {"messages": [{"role": "user", "content": "x"}], "max_tokens": 4})  # it makes the pool
        for number in range(args.turns):
            new = {"role": "user", "content": SAID[number % len(SAID)]}
            history.append(new)
            options = {"seed": number, "max_tokens": args.new_tokens}
            kept = turn(server.port, {"messages": [new], "conversation": "kept"} | options)
            whole = turn(server.port, {"messages": history} | options)
            history.append({"role": "assistant", "content": kept["text"]})
            turns.append(
                {"equal": kept["text"] == whole["text"]}
                | {f"{name}_kept": round(kept[name], 4) for name in ("read", "first", "seconds")}
                | {f"{name}_whole": round(whole[name], 4) for name in ("read", "first", "seconds")}
            )
    return {
        "date": datetime.date.today().isoformat(),
        "device": device_name(pick_device(None)),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "model": args.size or Path(args.checkpoint).name,
        "dtype": args.dtype,
        "new_tokens": args.new_tokens,
        "turns": turns,
    }


def main(words: list[str] | None = None) -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("--checkpoint", help="a trained model")
    parser.add_argument("--size", help="a size with random weights, instead")
    parser.add_argument("--turns", type=int, default=20)
    parser.add_argument("--new_tokens", type=int, default=64)
    parser.add_argument("--dtype", default="fp32", choices=["fp32", "bf16"])
    parser.add_argument("--json", help="file to write")
    args = parser.parse_args(words)
    if (args.checkpoint is None) == (args.size is None):
        parser.error("give --checkpoint FILE or --size NAME")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(args.checkpoint or Path(folder) / "random.pt")
        if args.size:
            random_checkpoint(args.size, path)
        figures = measure(path, args)
    print("turn  read: kept, whole   first text, ms: kept, whole   equal")
    for number, each in enumerate(figures["turns"], 1):
        firsts = f"{1000 * each['first_kept']:8.0f} {1000 * each['first_whole']:8.0f}"
        print(f"{number:4} {each['read_kept']:8} {each['read_whole']:8} {firsts}   {each['equal']}")
    print(json.dumps(figures))
    if args.json:
        Path(args.json).write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
