"""The processes of one run, as `torchrun` starts them: who they are, what they tell each other, and how they end.

- Numbers that the host needs travel by gloo, also beside GPUs: the host then never waits for a GPU to learn that
  another process is gone.
- A process that fails leaves a note in torchrun's store, so that the others can say which one it was.
"""

import contextlib
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from lepton.errors import InputError, reason

TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
"""Variables that torchrun sets for each process."""
OTHERS = (("RANK", 1), ("WORLD_SIZE", 2), ("LOCAL_RANK", 1), ("LOCAL_WORLD_SIZE", 2), ("SLURM_STEP_NUM_TASKS", 2),
    ("OMPI_COMM_WORLD_SIZE", 2), ("PMI_SIZE", 2))  # fmt: skip
"""Variables that launchers set, and from which value on there are several processes. SLURM_NTASKS is not among them:
a batch script that asks for several tasks and starts one process has it, too."""
RESTARTS = "TORCHELASTIC_RESTART_COUNT"
"""How often torchrun has started the processes again."""
PATIENCE = 3.0
"""Seconds in which the processes that are left answer, after one is gone."""
TIMEOUT = timedelta(minutes=30)
"""How long a process waits for another that is alive, such as for rank 0 while it validates."""

T = TypeVar("T")


class RankLost(RuntimeError):
    """Another process of the run has failed, or is gone. `speaks`: this process is the one that is to say so."""

    def __init__(self, message: str, *, speaks: bool = True) -> None:
        super().__init__(message)
        self.speaks = speaks


@dataclass(frozen=True)
class Ranks:
    """The processes of a run, as one of them sees them. A single process gets back at once what it sends."""

    rank: int = 0
    """Number of this process among all."""
    size: int = 1
    """Number of processes."""
    local_rank: int = 0
    """Number of this process on its host."""
    local_size: int = 1
    """Number of processes on each host."""
    store: dist.Store | None = None

    @property
    def leads(self) -> bool:
        """Whether this process prints and writes files: rank 0 does."""
        return self.rank == 0

    @property
    def several(self) -> bool:
        return self.size > 1

    @property
    def shards(self) -> int:
        """Processes that share weights with `--shard`: all, or with several hosts those of each."""
        return min(self.size, self.local_size)

    def share(self, count: int) -> range:
        """Return this process's part of `count` micro-batches, which the number of processes must divide."""
        each = count // self.size
        return range(self.rank * each, (self.rank + 1) * each)

    def total(self, number: int) -> int:
        """Return the sum of a number over all processes."""
        return self._reduced(number, dist.ReduceOp.SUM)

    def largest(self, number: int) -> int:
        """Return the largest of a number over all processes."""
        return self._reduced(number, dist.ReduceOp.MAX)

    def wait(self) -> None:
        """Wait until all processes are here."""
        self.total(0)

    def told(self, value: T) -> T:
        """Return the value that rank 0 gave."""
        if not self.several:
            return value
        box: list[Any] = [value if self.leads else None]
        with self.watched():
            dist.broadcast_object_list(box, src=0, device=torch.device("cpu"))
        told: T = box[0]
        return told

    def add_(self, tensors: Sequence[Tensor]) -> None:
        """Replace each tensor by its sum over all processes. On a GPU nothing waits for it but what is queued later."""
        if self.several:
            with self.watched():
                for work in [dist.all_reduce(tensor, async_op=True) for tensor in tensors]:
                    work.wait()

    def copy_(self, tensors: Sequence[Tensor]) -> None:
        """Replace each tensor by rank 0's."""
        if self.several:
            with self.watched():
                for tensor in tensors:
                    dist.broadcast(tensor.detach(), src=0)

    def mesh(self, device_type: str, *, by_host: bool = False) -> DeviceMesh:
        """Return all processes as one dimension, or `by_host`, where there are several hosts, as (hosts, processes)."""
        if by_host and self.local_size < self.size:
            shape = self.size // self.local_size, self.local_size
            return init_device_mesh(device_type, shape, mesh_dim_names=("hosts", "processes"))
        return init_device_mesh(device_type, (self.size,))

    @contextlib.contextmanager
    def watched(self) -> Iterator[None]:
        """Raise RankLost where what happens inside fails because another process is gone."""
        try:
            yield
        except RuntimeError as error:
            if not self.several or isinstance(error, RankLost) or not is_of_others(error):
                raise
            raise self.lost(error) from error

    def note_failure(self, error: BaseException) -> None:
        """Tell the others why this process ends."""
        if self.store is not None and not isinstance(error, RankLost):
            with contextlib.suppress(RuntimeError):
                self.store.compare_set("failed", "", f"rank {self.rank} failed: {reason(error)}")
                self.store.set(f"left/{self.rank}", "failed")

    def _reduced(self, number: int, how: Any) -> int:
        if not self.several:
            return number
        box = torch.tensor([number], dtype=torch.int64)
        with self.watched():
            dist.all_reduce(box, how)
        return int(box)

    def lost(self, error: BaseException) -> RankLost:
        """Return the error to raise after one of communication.

        It names who is gone: the process that has noted its failure, or those that do not answer.
        """
        assert self.store is not None
        try:
            self.store.set(f"left/{self.rank}", "alive")
            until = time.monotonic() + PATIENCE
            while True:
                silent = [rank for rank in range(self.size) if not self.store.check([f"left/{rank}"])]
                if self.store.check(["failed"]):
                    return RankLost(self.store.get("failed").decode(), speaks=self.leads)
                if not silent or time.monotonic() > until:
                    break
                time.sleep(0.05)
        except RuntimeError:  # the store is gone, too: that of torchrun, or of a run that is being ended
            return RankLost(f"the other processes cannot be reached ({reason(error)})", speaks=self.leads)
        if not silent:
            return RankLost(f"the processes cannot reach each other ({reason(error)})", speaks=self.leads)
        names = f"rank{'s' * (len(silent) > 1)} {', '.join(map(str, silent))}"
        verb = "are" if len(silent) > 1 else "is"
        first = next(rank for rank in range(self.size) if rank not in silent)
        return RankLost(f"{names} {verb} gone: killed, or the host is down", speaks=self.rank == first)


def is_of_others(error: BaseException) -> bool:
    """Whether an error is one of communication. gloo raises plain RuntimeErrors."""
    return isinstance(error, dist.DistError) or "gloo" in str(error).lower() or "Connection" in str(error)


def ranks_of(environment: Mapping[str, str]) -> Ranks:
    """Return the processes that the launcher has started, not joined yet.

    Raises:
        InputError: another launcher than torchrun (srun, mpirun) has started several: each would run the same
            training, into the same folder.
    """
    values = [environment.get(name, "") for name in TORCHRUN]
    if all(values) and all(value.isdecimal() for value in values[:4]):
        rank, size, local_rank, local_size = map(int, values[:4])
        return Ranks(rank, size, local_rank, local_size)
    for name, least in OTHERS:
        value = environment.get(name, "")
        if value.isdecimal() and int(value) >= least:
            raise InputError(
                f"{name}={value}: a launcher other than torchrun started several processes; start them with "
                "torchrun --nproc_per_node N train.py (one torchrun a host), or one process with python train.py"
            )
    return Ranks()


def restarted(environment: Mapping[str, str]) -> bool:
    """Return whether torchrun has started the processes again, because one of them had failed."""
    value = environment.get(RESTARTS, "")
    return value.isdecimal() and int(value) > 0


def device_of(ranks: Ranks, name: str | None) -> int | None:
    """Return the number of this process's GPU, None for the CPU, where `name` is what the user chose for all of them.

    Raises:
        InputError: one GPU for several processes, or more processes on a host than it has GPUs.
    """
    if name == "cpu" or (name is None and not torch.cuda.is_available()):
        return None
    if name not in (None, "cuda"):
        raise InputError(f"--device {name} with {ranks.size} processes: each takes a GPU of its own; leave it out")
    if ranks.local_rank >= (count := torch.cuda.device_count()):
        raise InputError(
            f"{ranks.local_size} processes on a host with {count} GPUs: start torchrun --nproc_per_node {count}"
        )
    return ranks.local_rank


@contextlib.contextmanager
def joined(environment: Mapping[str, str], device: str | None) -> Iterator[Ranks]:
    """Join the processes of the run, and leave them at the end. A process's own GPU becomes the current one.

    Args:
        environment: what the launcher has set.
        device: name of the device that the user chose for all, if any.

    Raises:
        InputError: as `ranks_of` and `device_of`.
    """
    ranks = ranks_of(environment)
    if not ranks.several:
        yield ranks
        return
    gpu = device_of(ranks, device)
    on_gpu = gpu is not None
    if on_gpu:
        torch.cuda.set_device(gpu)
    store, _, _ = next(dist.rendezvous("env://", rank=ranks.rank, world_size=ranks.size, timeout=TIMEOUT))
    # torchrun's store outlives the processes: what those before a restart have left there would mislead these.
    store = dist.PrefixStore(f"start {environment.get(RESTARTS, '0')}", store)
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if on_gpu else "gloo",
        store=dist.PrefixStore("group", store),
        rank=ranks.rank,
        world_size=ranks.size,
        timeout=TIMEOUT,
    )
    ranks = Ranks(ranks.rank, ranks.size, ranks.local_rank, ranks.local_size, dist.PrefixStore("notes", store))
    try:
        yield ranks
    except BaseException as error:
        ranks.note_failure(error)
        if on_gpu:  # kernels that wait for a process that is gone would never end
            with contextlib.suppress(Exception):
                dist.distributed_c10d._abort_process_group()
        raise
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
