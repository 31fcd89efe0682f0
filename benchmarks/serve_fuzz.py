"""Does `python -m lepton serve` bear whatever it is sent, and does its memory stay flat?

Two loads, each on a server of its own in a process of its own, with a small model of random weights:

fuzz    Schemathesis makes requests from the server's description, `/openapi.json`: half of them as it says, half of
        them broken. Several clients send them at once. Meanwhile canaries, who have another key, ask for the same
        texts again and again. Each must be what `Lepton.generate` gives for its seed, and no other answer may hold a
        part of one. Nothing may get a status of 500 or above, a refusal must be JSON with a message, and the server's
        log must stay empty.

memory  The same mixed load over and over: completions, streams to their end, streams that are left in the middle,
        turns of more conversations than are in memory, states saved and loaded, refusals. The memory of the process is
        read at regular intervals.

    python -m benchmarks.serve_fuzz --requests 10000 --json found.json

Prints all that was found as a line of JSON, and ends with code 1 if something was wrong. Needs requirements-dev.txt.
"""

import argparse
import contextlib
import datetime
import http.client
import json
import random
import statistics
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import hypothesis
import requests
import schemathesis
import torch
from schemathesis import Case, GenerationMode

from benchmarks.serve_load import Server, random_checkpoint
from lepton import checkpoint
from lepton.api import Lepton
from lepton.model.budget import Budget
from lepton.model.promise import Promise
from lepton.runtime.device import device_name, pick_device

KEYS = {"fuzz": "key-of-the-fuzz", "canary": "key-of-the-canaries"}
LIMITS = {
    "places": 16, "max_tokens": 8, "max_prompt": 128, "max_choices": 3, "max_request": 256, "max_think": 2,
    "max_body": 1 << 16, "max_conversations": 100, "conversations": 8, "max_seconds": 60,
}  # fmt: skip
CANARIES = {f"canary {i} sings of {word}": 100 + i for i, word in enumerate(("quartz", "zephyr", "oxbow", "fjord"))}
"""Prompts, and the seeds that are asked for with them."""
CANARY_TOKENS, PART = 8, 6
"""New tokens of a canary's text, and characters of it that no other answer may hold."""
NAMES = ("shared", "fuzz-1", "fuzz-2", "fuzz-3")
"""Ids of conversations for requests about one: those that are drawn hit none."""
MANY = ("/v1/completions", "/v1/chat/completions")
"""Paths that most requests go to."""


def model_file(path: Path, source: str | None) -> None:
    """Write the model: `source`, or the smallest size with random weights; it may abstain, and skip blocks at a cost.

    That is for the requests that ask for it. The records are of no calibration.
    """
    if source is None:
        random_checkpoint("nano", path)
    content = checkpoint.load(source or path)
    promise = Promise(risk=0.1, confidence=0.9, threshold=0.0, windows=1, tokens=1)
    budget = Budget(max_cost=0.02, least=0.0, share=0.5, cost=0.0, error=0.0, tokens=1)
    checkpoint.save(path, content | {"promises": [promise.to_dict()], "budgets": [budget.to_dict()]})


def started(path: Path, folder: Path) -> Server:
    """Return a server of the model with two keys."""
    keys = folder / "keys.txt"
    keys.write_text("\n".join(KEYS.values()), encoding="utf-8")
    flags = [word for name, value in LIMITS.items() for word in (f"--{name}", str(value))]
    return Server(path, "--dtype", "fp32", "--api_key_file", str(keys), *flags)


class Client:
    """Sends requests under one of the keys, and keeps what is wrong with the replies."""

    def __init__(self, port: int, key: str, secrets: set[bytes] | None = None) -> None:
        """`secrets` are what no reply to it may hold."""
        self.port, self.key, self.secrets = port, KEYS[key], secrets or set()
        self.statuses: Counter[int] = Counter()
        self.wrong: list[str] = []
        self._local, self._lock = threading.local(), threading.Lock()

    def _count(self, status: int) -> None:
        with self._lock:
            self.statuses[status] += 1

    def send(self, method: str, path: str, body: Any = None, *, raw: bytes | None = None) -> tuple[int, bytes]:
        """Return the status and the body of a reply; `body` is sent as JSON."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=120)
        headers = {"Authorization": f"Bearer {self.key}"}
        if body is not None:
            raw = json.dumps(body).encode()
            headers["Content-Type"] = "application/json"
        try:
            connection.request(method, path, raw, headers)
            reply = connection.getresponse()
            content = reply.read()
        finally:
            connection.close()
        self._count(reply.status)
        return reply.status, content

    def leave(self, body: dict[str, Any]) -> None:
        """Begin a stream and close the connection after its first bytes."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=120)
        headers = {"Authorization": f"Bearer {self.key}", "Content-Type": "application/json"}
        connection.request("POST", MANY[0], json.dumps(body | {"stream": True}), headers)
        reply = connection.getresponse()
        reply.read(64)
        self._count(reply.status)
        reply.close()
        connection.close()

    def send_case(self, case: Case) -> None:
        """Send what Schemathesis has made, and check the reply."""
        if not hasattr(self._local, "session"):
            self._local.session = requests.Session()
        given = case.as_transport_kwargs(base_url=f"http://127.0.0.1:{self.port}")
        given["headers"] = dict(given.get("headers") or {}) | {"Authorization": f"Bearer {self.key}"}
        name = f"{case.method} {case.formatted_path[:80]}"
        try:
            reply = self._local.session.request(**given, timeout=120)
        except (requests.exceptions.InvalidHeader, UnicodeError):  # what the client cannot send
            self._count(0)
            return
        except requests.RequestException as error:
            self.wrong.append(f"{name}: no reply ({error!r})")
            return
        self._count(reply.status_code)
        problem = problem_of(reply.status_code, reply.content, self.secrets)
        if problem:
            self.wrong.append(f"{name} {str(case.body)[:200]}: {problem}")


def problem_of(status: int, content: bytes, secrets: set[bytes]) -> str | None:
    """Return what is wrong with a reply to a request of any kind; None: nothing."""
    if status >= 500:
        return f"status {status}: {content[:200]!r}"
    if b"Traceback (most recent call last)" in content:  # the first word alone is a token of the tokenizer
        return f"a traceback: {content[:200]!r}"
    if status >= 400:
        try:
            error = json.loads(content)["error"]
        except (ValueError, KeyError, TypeError):
            return f"status {status} without an error in JSON: {content[:200]!r}"
        if not error["message"] or set(error) != {"message", "type", "param", "code"}:
            return f"an error of another form: {content[:200]!r}"
    said = content + joined(content) if content.startswith(b"data: ") else content
    found = [text for text in secrets if text in said]
    return f"holds a canary's text: {found[0]!r}" if found else None


def joined(stream: bytes) -> bytes:
    """Return the texts of a stream's answers, each as one in JSON."""
    texts: dict[int, str] = {}
    for line in stream.splitlines():
        if line.startswith(b"data: {"):
            for choice in json.loads(line[6:]).get("choices", []):
                text = choice["text"] if "text" in choice else choice["delta"].get("content", "")
                texts[choice["index"]] = texts.get(choice["index"], "") + text
    return json.dumps([*texts.values()]).encode()


class Canaries:
    """Ask for their texts again and again, in a thread of their own, until `stop` is set."""

    def __init__(self, client: Client, wanted: dict[str, str]) -> None:
        self.client, self.wanted = client, wanted
        self.asked, self.wrong = 0, list[str]()
        self.stop = threading.Event()
        self.turns = self._turns()
        """What a conversation gives while nobody else asks."""

    def _turns(self) -> list[str]:
        """Hold a conversation under an id that the fuzz uses, too, and return its answers."""
        found = []
        for i, prompt in enumerate(self.wanted):
            said = {"messages": [{"role": "user", "content": prompt}], "conversation": NAMES[0], "seed": i}
            status, content = self.client.send("POST", MANY[1], said | {"max_tokens": 8})
            found.append(json.loads(content)["choices"][0]["message"]["content"] if status == 200 else str(content))
        self.client.send("DELETE", f"/v1/conversations/{NAMES[0]}")
        return found

    def check(self) -> None:
        """Ask for each text once, streamed and whole, and for the conversation."""
        for prompt, text in self.wanted.items():
            body = {"prompt": prompt, "seed": CANARIES[prompt], "max_tokens": CANARY_TOKENS}
            whole = texts_of(self.client.send("POST", MANY[0], body), stream=False)
            streamed = texts_of(self.client.send("POST", MANY[0], body | {"stream": True}), stream=True)
            self.asked += 2
            self.wrong += [f"{prompt!r}: {each!r} is not {text!r}" for each in (whole, streamed) if each != text]
        self.asked += len(self.turns)
        if (turns := self._turns()) != self.turns:
            self.wrong.append(f"a conversation gave {turns!r}, not {self.turns!r}")

    def run(self) -> None:
        """Ask until the end, with a second between."""
        while not self.stop.wait(1):
            self.check()


def texts_of(reply: tuple[int, bytes], *, stream: bool) -> str:
    """Return the text of a completion; of a refusal what it says."""
    status, content = reply
    if status != 200:
        return content.decode()
    if not stream:
        return json.loads(content)["choices"][0]["text"]
    return json.loads(joined(content))[0]


def cases(described: dict[str, Any], count: int, seed: int) -> Iterator[Case]:
    """Yield `count` requests that Schemathesis makes of a description: most are about generation, half are broken."""
    operations = [each.ok() for each in schemathesis.openapi.from_dict(described).get_all_operations()]
    choose, made = random.Random(seed), 0
    most, few = min(40, 1 + count // 10), min(5, 1 + count // 50)  # of an operation, in a row
    while made < count:
        for operation in operations:
            for mode in (GenerationMode.POSITIVE, GenerationMode.NEGATIVE):
                found = drawn(operation, mode, most if operation.path in MANY else few, seed + made)
                for case in found[: count - made]:
                    if case.path_parameters and "id" in case.path_parameters and choose.random() < 0.7:
                        case.path_parameters["id"] = choose.choice(NAMES)
                    if isinstance(case.body, dict) and case.body.get("conversation") and choose.random() < 0.7:
                        case.body["conversation"] = choose.choice(NAMES)
                    made += 1
                    yield case


def drawn(operation: Any, mode: GenerationMode, count: int, seed: int) -> list[Case]:
    """Return up to `count` requests of one operation; none if it cannot be broken."""
    found: list[Case] = []
    try:
        strategy = operation.as_strategy(generation_mode=mode)
    except hypothesis.errors.HypothesisException:
        return found
    settings = hypothesis.settings(
        max_examples=count,
        database=None,
        deadline=None,
        phases=[hypothesis.Phase.generate],
        suppress_health_check=[*hypothesis.HealthCheck],
    )
    with contextlib.suppress(hypothesis.errors.Unsatisfiable):
        hypothesis.seed(seed)(settings(hypothesis.given(strategy)(lambda case: found.append(case))))()
    return found


def secrets_of(wanted: dict[str, str]) -> set[bytes]:
    """Return what no answer to others may hold: parts of the canaries' prompts and texts, as they stand in JSON."""
    found = {prompt[-PART:] for prompt in wanted} | {text[:PART] for text in wanted.values()}
    return {json.dumps(each)[1:-1].encode() for each in found}


def canary_texts(model: Lepton) -> dict[str, str]:
    """Return what the model must give to each canary."""
    found = {each: model.generate(each, CANARY_TOKENS, seed=seed)[len(each) :] for each, seed in CANARIES.items()}
    assert all(len(text) >= PART for text in found.values()), "a canary's text is too short to be known again"
    return found


def fuzz(port: int, wanted: dict[str, str], count: int, clients: int, seed: int) -> dict[str, Any]:
    """Send `count` requests that Schemathesis makes to the server at `port`; return what was seen."""
    client, own = Client(port, "fuzz", secrets_of(wanted)), Client(port, "canary")
    canaries = Canaries(own, wanted)
    described = json.loads(client.send("GET", "/openapi.json")[1])
    singing = threading.Thread(target=canaries.run)
    room = threading.Semaphore(4 * clients)  # so that few wait in memory

    def send(case: Case) -> None:
        try:
            client.send_case(case)
        finally:
            room.release()

    since = time.perf_counter()
    singing.start()
    try:
        with ThreadPoolExecutor(clients) as pool:
            for case in cases(described, count, seed):
                room.acquire()
                pool.submit(send, case)
    finally:
        canaries.stop.set()
        singing.join()
    seconds = time.perf_counter() - since
    canaries.check()
    return {
        "requests": count,
        "clients": clients,
        "seconds": round(seconds, 1),
        "statuses": {str(status): number for status, number in sorted(client.statuses.items())},
        "canaries": canaries.asked,
        "wrong": [*client.wrong, *canaries.wrong],
        "afterwards": quiet(client),
    }


def quiet(client: Client) -> dict[str, Any]:
    """Return what the server says of itself once nothing runs or waits, or after ten seconds."""
    for _ in range(100):
        found = json.loads(client.send("GET", "/health")[1])
        if not found["running"] + found["waiting"]:
            break
        time.sleep(0.1)
    return found


def remembered(path: Path, folder: Path, count: int, clients: int, every: int) -> dict[str, Any]:
    """Send a mixed load; return the memory of the server's process after each `every` requests, in bytes."""
    with started(path, folder) as server, ThreadPoolExecutor(clients) as pool:
        client = Client(server.port, "fuzz")
        memory = []
        since = time.perf_counter()
        for first in range(0, count, every):
            [*pool.map(lambda i: mixed(client, i), range(first, min(first + every, count)))]
            memory.append(server.memory())
        seconds, log = time.perf_counter() - since, [*server.log]
        answers = client.send("POST", MANY[0], {"max_tokens": 4, "prompt": "x"})[0] == 200
    kept = memory[max(1, len(memory) // 10) :]
    steps = [every * i for i in range(len(kept))]
    slope = statistics.linear_regression(steps, kept).slope if len(kept) > 1 and all(kept) else None
    return {
        "requests": count,
        "clients": clients,
        "every": every,
        "seconds": round(seconds, 1),
        "statuses": {str(status): number for status, number in sorted(client.statuses.items())},
        "memory": memory,
        "after_warm_up": kept[0],
        "last": kept[-1],
        "bytes_a_request": None if slope is None else round(slope, 1),
        "wrong": client.wrong + ([] if answers else ["no answer afterwards"]),
        "log": log,
    }


def mixed(client: Client, i: int) -> None:
    """Send request `i` of a load of ten kinds. Of its conversations each is deleted after a few turns."""
    name = f"talk-{(i + i // 10) % 40}"  # not the same one as those that are under way
    place = f"/v1/conversations/{name}"
    words = f"The history of the island begins {i} " * (1 + i % 3)
    body = {"prompt": words, "max_tokens": 1 + i % 4, "seed": i}
    said = {"messages": [{"role": "user", "content": words}], "max_tokens": 3, "conversation": name}
    kind = i % 10
    if kind in (0, 1):
        status = client.send("POST", MANY[0], body | {"n": 1 + kind})[0]
    elif kind in (2, 3):
        status = client.send("POST", MANY[0], body | {"stream": True, "logprobs": 5 * (kind - 2)})[0]
    elif kind == 4:
        client.leave(body | {"max_tokens": LIMITS["max_tokens"]})
        status = 200
    elif kind in (5, 6):
        status = client.send("POST", MANY[1], said)[0]
    elif kind == 7:
        status, state = client.send("GET", f"{place}/state")
        if status == 200:
            status = client.send("PUT", f"/v1/conversations/copy-{i // 10 % 5}/state", raw=state)[0]
    elif kind == 8:
        status = client.send("DELETE", place)[0] if i % 30 == 8 else client.send("GET", f"{place}/memory")[0]
    else:
        status = client.send("POST", MANY[0], body | {"max_tokens": -i})[0]
    allowed = (200,) if kind < 5 else (400,) if kind == 9 else (200, 404, 409)  # another client may be at the same one
    if status not in allowed:
        client.wrong.append(f"kind {kind}: status {status}")


def main(words: list[str] | None = None) -> int:
    """Measure and print; return 1 if something was wrong, else 0."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("--checkpoint", help="a model (default: the smallest size with random weights)")
    parser.add_argument("--requests", type=int, default=10_000, help="of each load (default: %(default)s)")
    parser.add_argument("--clients", type=int, default=6, help="requests at once (default: %(default)s)")
    parser.add_argument("--every", type=int, default=500, help="requests between readings of the memory")
    parser.add_argument("--loads", nargs="+", choices=["fuzz", "memory"], default=["fuzz", "memory"])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", help="file to write")
    args = parser.parse_args(words)
    figures: dict[str, Any] = {
        "date": datetime.date.today().isoformat(),
        "device": device_name(pick_device(None)),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "model": args.checkpoint or "nano, random weights",
        "limits": LIMITS,
    }
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model_file(folder / "model.pt", args.checkpoint)
        if "fuzz" in args.loads:
            wanted = canary_texts(Lepton.from_checkpoint(folder / "model.pt"))
            with started(folder / "model.pt", folder) as server:
                found = fuzz(server.port, wanted, args.requests, args.clients, args.seed)
                figures["fuzz"] = found | {"log": [*server.log]}  # "stopped" comes later
        if "memory" in args.loads:
            figures["memory"] = remembered(folder / "model.pt", folder, args.requests, args.clients, args.every)
    print(json.dumps(figures))
    if args.json:
        Path(args.json).write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    return int(any(figures[load]["wrong"] or figures[load]["log"] for load in args.loads))


if __name__ == "__main__":
    sys.exit(main())
