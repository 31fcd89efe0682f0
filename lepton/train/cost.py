"""The cost of training: floating-point operations counted from shapes, and an estimate of the time they take."""

import time
from collections.abc import Callable

import torch

from lepton.model import Network
from lepton.model.flops import flops_per_token
from lepton.model.ideas.idea import Work, matrices
from lepton.runtime.device import synchronize
from lepton.train.batch_plan import usual_groups

USUAL_SHARE = {"cuda": 0.25, "cpu": 0.2}
"""Share of a matrix product's rate that training reaches, for estimates; in fp32 on a CPU it is twice that."""
HOST_SECONDS = 0.006
"""Time that a GPU's host takes to launch a micro-batch, however small, for estimates."""


def training_flops_per_token(model: Network, rows: int, length: int) -> float:
    """Floating-point operations per target of `rows` of `length` targets, without the optimizer's.

    A backward pass repeats each product twice, for the gradients of its input and of its matrix, or once if one of the
    two has no gradient. This counts what is executed, with padded rounds of thinking and the usual number of segments.
    It leaves out what `checkpoint_activations` recomputes.

    Args:
        model: with its configuration and ideas.
        rows: rows of a micro-batch.
        length: targets per row.
    """
    config = model.config
    groups = usual_groups(length, config.segment)
    rounds = [idea.think_in_training(rows) for idea in model.ideas.values()]
    think = next((each for each in rounds if each is not None), None)
    work = Work(length, groups, think=think, rows=rows)
    head = matrices(model.head_down) + config.padded_vocab_size * model.embed.embedding_dim
    extra = sum(idea.extra_training_flops(work, head) for idea in model.ideas.values())
    return 3 * flops_per_token(model, length, think=think, groups=groups) + extra


def training_seconds(flops: float, micro_batches: int, device: torch.device, dtype: torch.dtype) -> float:
    """Return an estimate of the seconds that `flops` of training take, from the time of a matrix product."""
    size = 4096 if device.type == "cuda" else 768
    a = torch.ones(size, size, device=device, dtype=dtype)
    seconds = min(seconds_of(lambda: a @ a, device) for _ in range(4))
    share = USUAL_SHARE.get(device.type, 0.2) * (2 if (device.type, dtype) == ("cpu", torch.float32) else 1)
    rate = 2 * size**3 / seconds * share
    return flops / rate + (0 if device.type == "cpu" else micro_batches * HOST_SECONDS)


def seconds_of(action: Callable[[], object], device: torch.device) -> float:
    """Return the seconds that `action` takes on `device`."""
    synchronize(device)
    start = time.perf_counter()
    action()
    synchronize(device)
    return max(time.perf_counter() - start, 1e-9)
