"""Several processes of one run on this machine, as torchrun would start them; none outlives its time."""

import multiprocessing
import os
import pickle
import socket
import sys
import time
import traceback
from pathlib import Path

from lepton.cli.train import main
from lepton.distributed import TORCHRUN, joined

TIME = 40
"""Seconds after which processes are killed, and the test has failed."""
# Each process is forked from one that has imported torch already, where the system can: that is most of its time.
FORKS = "forkserver" in multiprocessing.get_all_start_methods()
CONTEXT = multiprocessing.get_context("forkserver" if FORKS else "spawn")
CONTEXT.set_forkserver_preload([__name__, "lepton.train.trainer", "torch._dynamo", "torch.distributed.fsdp"])


def free_port() -> int:
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        return bound.getsockname()[1]


def be_a_rank(rank, size, port, printed, function, arguments):
    """Call a function as one of several processes; what it prints and returns goes to files."""
    for number, stream in enumerate(("stdout", "stderr"), 1):
        os.dup2(os.open(f"{printed}.{rank}.{stream}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    os.environ |= dict(zip(TORCHRUN, map(str, (rank, size, rank, size, "127.0.0.1", port)), strict=True))
    try:
        result = function(*arguments)
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(99)
    Path(f"{printed}.{rank}.result").write_bytes(pickle.dumps(result))
    sys.exit(result if isinstance(result, int) else 0)


class Processes:
    """Processes that run; `wait` ends them."""

    def __init__(self, folder: Path, function, *arguments, size: int = 2) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.printed, port = folder / "rank", free_port()
        self.all = [
            CONTEXT.Process(target=be_a_rank, args=(rank, size, port, self.printed, function, arguments))
            for rank in range(size)
        ]
        for process in self.all:
            process.start()

    def said(self, rank: int, stream: str = "stderr") -> str:
        path = Path(f"{self.printed}.{rank}.{stream}")
        return path.read_text() if path.exists() else ""

    def await_line(self, text: str, rank: int = 0) -> None:
        """Wait until a rank has printed `text`."""
        until = time.monotonic() + TIME
        while text not in self.said(rank, "stdout"):
            if time.monotonic() > until or not self.all[rank].is_alive():
                self.end()
                raise AssertionError(f"no '{text}': {self.said(rank, 'stdout')} {self.said(rank)}")
            time.sleep(0.01)

    def wait(self) -> list[int]:
        """Return the exit codes; raise if a process has not ended in time."""
        until = time.monotonic() + TIME
        for process in self.all:
            process.join(max(0, until - time.monotonic()))
        late = [rank for rank, process in enumerate(self.all) if process.is_alive()]
        self.end()
        assert not late, f"ranks {late} hang: {[self.said(rank) for rank in late]}"
        return [process.exitcode for process in self.all]

    def end(self) -> None:
        for process in self.all:
            process.kill()
            process.join()

    def results(self) -> list:
        """Return what the function returned in each process."""
        codes = self.wait()
        assert not any(codes), [self.said(rank) for rank in range(len(self.all))]
        return [pickle.loads(Path(f"{self.printed}.{rank}.result").read_bytes()) for rank in range(len(self.all))]


def train_in(folder: Path, words: list[str], size: int = 2) -> Processes:
    """Start `train.py` with these flags in several processes."""
    return Processes(folder, main, words, size=size)


def with_ranks(function, *arguments):
    """Call `function(ranks, ...)` with the processes joined, on the CPU."""
    with joined(os.environ, "cpu") as ranks:
        return function(ranks, *arguments)


def in_ranks(folder: Path, function, *arguments, size: int = 2) -> list:
    """Return what `function(ranks, ...)` returns in each of several processes that have joined."""
    return Processes(folder, with_ranks, function, *arguments, size=size).results()
