"""A model on paper of training on many GPUs: memory a GPU, bytes and seconds of communication, and the MFU to expect.

Data parallel: each GPU has everything, and gradients are added up in fp32 (ring: 2 (N-1)/N of their bytes leave a GPU),
and Muon's updates are gathered in fp32 ((N-1)/N). Sharded (HSDP: shares within a host of 8, copies between hosts): the
blocks' matrices are gathered in bf16 before the forward pass and again before the backward pass, gradients are
scattered in fp32, and everything in no block is gathered once in fp32; between hosts the shares of the gradients are
added up. Muon's matrices change places twice in fp32. Memory is `predicted_memory`, the forecast that training prints.

Seconds of communication are bytes over the bandwidths of `LINKS`; seconds of arithmetic are the FLOPs over the peak
times `--mfu`, that of micro-batches on one GPU. The optimizer adds the products of Muon at the same rate, which the
GPUs of a host share, and `TRAFFIC` bytes a parameter of which a GPU keeps the state. `--overlap` is the share of the
communication that arithmetic hides with shares; copies add up their gradients after it. docs/scaling.md holds the table
beside what `benchmarks.scaling` has measured on two GPUs.

    python -m benchmarks.scaling_model
    python -m benchmarks.scaling_model --sizes tiny medium --gpus 2 --rows 64 --length 512 --copies
"""

import argparse
from dataclasses import dataclass

import torch

from benchmarks.train_speed import table
from lepton.model import Network
from lepton.model.size_config import size_config
from lepton.model.weights import on_meta_device
from lepton.presets import SIZES
from lepton.train.cost import training_flops_per_token
from lepton.train.memory_forecast import predicted_memory
from lepton.train.optimizer import split_parameters
from lepton.train.settings import TrainSettings

HOST = 8
"""GPUs of a host."""
LINKS = {"inside": 240e9, "between": 40e9}
"""Bytes a second that leave a GPU: NVLink 4 inside a host of H100s, of its 450 GB/s what was measured (2026-11-27); one
InfiniBand port of 400 Gbit/s a GPU between hosts, of its 50 GB/s."""
MEMORY, TRAFFIC = 2.5e12, 140
"""Bytes a second of an H100's memory, and bytes that the optimizer moves for each parameter: TINY's step of four
micro-batches less four times what a step of one takes more (2026-11-27) gives 9.1 ms, of which 2.8 are products."""
PEAK = 989e12
"""FLOP/s of an H100 SXM in bf16, dense, from its data sheet."""
FP32, BF16 = 4, 2
NEWTON_SCHULZ = 5
"""Iterations of `torch.optim.Muon`, each of three products."""


@dataclass(frozen=True)
class Plan:
    """A size on a number of GPUs."""

    size: str
    gpus: int
    rows: int
    """Rows of a GPU's micro-batch, one a step."""
    length: int
    sharded: bool
    recompute: bool

    @property
    def shards(self) -> int:
        """GPUs that share weights: those of a host."""
        return min(self.gpus, HOST) if self.sharded else 1


def bytes_of(plan: Plan, model: Network) -> dict[str, float]:
    """Return the bytes that leave each GPU in a step: inside its host, and to others."""
    muon = FP32 * sum(parameter.numel() for _, parameter, _ in split_parameters(model)[0])
    everything = FP32 * model.num_params()
    in_blocks = sum(each.numel() for block in (model.stem, model.blocks) for each in block.parameters())
    inner = min(plan.gpus, HOST)
    hosts = plan.gpus // inner
    part, copies = (inner - 1) / inner, 2 * (hosts - 1) / hosts
    if not plan.sharded:
        return {"inside": part * (2 * everything + muon), "between": copies * everything / inner}
    gathers = (3 if plan.recompute else 2) * BF16 * in_blocks + FP32 * (model.num_params() - in_blocks)
    return {"inside": part * (gathers + everything + 2 * muon), "between": copies * everything / inner}


def muon_flops(model: Network) -> float:
    """Return the FLOPs in which Muon orthogonalises all its matrices once."""
    sides = [sorted(parameter.shape) for _, parameter, _ in split_parameters(model)[0]]
    return sum(NEWTON_SCHULZ * (4 * short**2 * long + 2 * short**3) for short, long in sides)


def predicted(plan: Plan, own_mfu: float, overlap: float) -> dict[str, object]:
    """Return a row of the table: memory, bytes, seconds and MFU of `plan`; `own_mfu` is that of micro-batches."""
    with on_meta_device():
        model = Network(size_config(plan.size))
    model.compute_dtype = torch.bfloat16
    settings = TrainSettings(
        batch_size=plan.rows,
        grad_accum=1,
        seq_len=plan.length,
        shard=plan.sharded,
        checkpoint_activations=plan.recompute,
    )
    tokens = plan.rows * plan.length
    flops = training_flops_per_token(model, plan.rows, plan.length) * tokens
    arithmetic = flops / (PEAK * own_mfu) * (4 / 3 if plan.recompute else 1)
    sent = bytes_of(plan, model)
    communication = sum(count / LINKS[where] for where, count in sent.items())
    hidden = min(overlap * communication, arithmetic) if plan.sharded else 0.0
    optimizer = muon_flops(model) / min(plan.gpus, HOST) / (PEAK * own_mfu)
    optimizer += TRAFFIC * model.num_params() / plan.shards / MEMORY
    step = arithmetic + optimizer + communication - hidden
    return {
        "size": plan.size,
        "gpus": plan.gpus,
        "way": ("HSDP" if plan.gpus > HOST else "FSDP") if plan.sharded else "copies",
        "recompute": "yes" if plan.recompute else "no",
        "memory_gb": round(predicted_memory(model, settings, plan.shards) / 1e9, 1),
        "inside_gb": round(sent["inside"] / 1e9, 2),
        "between_gb": round(sent["between"] / 1e9, 2),
        "arithmetic_ms": round(1e3 * arithmetic),
        "optimizer_ms": round(1e3 * optimizer, 1),
        "communication_ms": round(1e3 * communication, 1),
        "step_ms": round(1e3 * step, 1),
        "mfu": round(flops / step / PEAK, 3),
        "tokens_per_s": round(plan.gpus * tokens / step, -2),
    }


COLUMNS = {
    "size": "size", "GPUs": "gpus", "way": "way", "recompute": "recompute", "GB a GPU": "memory_gb",
    "sent GB, in host": "inside_gb", "to others": "between_gb", "arithmetic ms": "arithmetic_ms",
    "optimizer ms": "optimizer_ms", "communication ms": "communication_ms", "step ms": "step_ms", "MFU": "mfu",
    "tokens/s": "tokens_per_s",
}  # fmt: skip


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", default=["large", "xl", "xxl"], choices=list(SIZES))
    parser.add_argument("--gpus", nargs="+", type=int, default=[8, 64, 512])
    parser.add_argument("--rows", type=int, default=8, help="rows of a GPU's micro-batch")
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--mfu", type=float, default=0.45, help="of micro-batches on one GPU")
    parser.add_argument(
        "--overlap", type=float, default=0.5, help="share of the communication that is hidden, with shares"
    )
    parser.add_argument("--copies", action="store_true", help="data parallel instead of sharded")
    chosen = parser.parse_args(arguments)
    plans = [
        Plan(size, gpus, chosen.rows, chosen.length, not chosen.copies, size == "xxl")
        for size in chosen.sizes
        for gpus in chosen.gpus
    ]
    print(table([predicted(plan, chosen.mfu, chosen.overlap) for plan in plans], COLUMNS))


if __name__ == "__main__":
    main()
