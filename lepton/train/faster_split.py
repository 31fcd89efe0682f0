"""Whether another split of the step would be faster on this GPU: measured, where that costs little beside the run."""

import torch

from lepton.model import Network
from lepton.runtime.device import free_unused_memory, gpu_memory
from lepton.train.memory_forecast import predicted_memory
from lepton.train.micro_step import MicroStep
from lepton.train.settings import TrainSettings
from lepton.train.split import largest_split

FEW_TOKENS = 1 << 13
"""Tokens of a micro-batch up to which a GPU may be mostly idle."""
LONG_RUN = 60.0
"""Seconds of steps from which on a hint is worth the time of measuring it."""
WORTH = 1.2
"""Least gain that is worth a hint."""


def faster_split(model: Network, settings: TrainSettings, micro_step: MicroStep, steps: int) -> str | None:
    """Return the flags of a clearly faster split of the same step, and by how much it is faster; None if there is none.

    The other split is recorded without the compiler, which would take a minute. With it, it is faster still.

    Args:
        model: on a GPU; its gradients must be zero, and are zero again afterwards.
        settings: of the run, with the split decided.
        micro_step: prepared for this split.
        steps: steps to be done.
    """
    batch_size, grad_accum = settings.split
    memory = gpu_memory(model.device)
    if memory is None or grad_accum == 1 or batch_size * settings.seq_len > FEW_TOKENS:
        return None
    joined = settings.replace(batch_size=batch_size * grad_accum, grad_accum=1)
    other = largest_split(joined, lambda each: predicted_memory(model, each), memory[0])
    if other.split[0] <= batch_size:
        return None
    present = grad_accum * micro_step.seconds(batch_size, settings.seq_len)
    if present * steps < LONG_RUN:
        return None
    found = _seconds(model, other)
    free_unused_memory(model.device)  # the trial's, which is gone
    if found is None or present < WORTH * found:
        return None
    rows, count = other.split
    return (
        f"--batch_size {rows} --grad_accum {count} is the same step, at least {present / found:.1f} times faster here"
    )


def _seconds(model: Network, settings: TrainSettings) -> float | None:
    """Return the seconds of a step's micro-batches under `settings`, not compiled; None if they do not fit."""
    batch_size, grad_accum = settings.split
    trial = MicroStep(model, compiled=False, say=lambda line: None)
    try:
        trial.prepare(batch_size, settings.seq_len)
        return grad_accum * trial.seconds(batch_size, settings.seq_len)
    except torch.OutOfMemoryError:
        return None
