"""What is drawn for a training batch, and its static shapes: a pure function of seed, step and micro-batch."""

from typing import NamedTuple

import torch
from torch import Tensor

from lepton.model import Network
from lepton.model.objective import Step
from lepton.model.timeline import Timeline

GROUPS = 4
"""The usual bound on the segments of a row is rounded up to a multiple of this, which leaves room for several documents
per row. A batch that needs more doubles the bound, and another CUDA graph is captured."""


class Plan(NamedTuple):
    """What `MicroStep` takes beside a micro-batch."""

    think: Tensor | None
    """Rounds of each row [B]; None: without thoughts."""
    groups: int | None
    """Bound on the segments that open in a row."""
    step: Step


def plan_step(
    model: Network,
    tokens_BT: Tensor,
    seed: int,
    step: int,
    micro: int,
    *,
    scale: float = 1.0,
    opens_BT: Tensor | None = None,
) -> Plan:
    """Return all that is drawn for a micro-batch of a step at `scale` times the peak rates.

    The other arguments are those of `plan_batch`.
    """
    drawn_by = (model, tokens_BT, seed, step, micro)
    think, groups = plan_batch(*drawn_by, opens_BT)
    return Plan(think, groups, Step(scale, draw_served(*drawn_by)))


def usual_groups(length: int, segment: int) -> int:
    """Return the bound on the segments that open in a row of `length` targets, unless the row holds many documents."""
    return -(-((length + 1) // segment + GROUPS) // GROUPS) * GROUPS


def plan_batch(
    model: Network, tokens_BT: Tensor, seed: int, step: int, micro: int, opens_BT: Tensor | None = None
) -> tuple[Tensor | None, int | None]:
    """Return the rounds of each row [B], or None without thoughts, and a bound on the segments that open in a row.

    Args:
        model: only its configuration and its ideas are read.
        tokens_BT: a batch as `Network.loss` takes it, on the CPU.
        seed: seed of the run.
        step: optimizer step.
        micro: number of the micro-batch in its step.
        opens_BT: tokens that open a segment in addition.
    """
    rows, config = len(tokens_BT), model.config
    nothing = torch.zeros(rows, dtype=torch.int64)
    timeline = Timeline.read(
        tokens_BT[:, :-1], nothing, nothing, eos_id=config.eos_id, segment=config.segment, opens_BT=opens_BT
    )
    groups = usual_groups(tokens_BT.shape[1] - 1, config.segment)
    while groups < timeline.opening_BG.shape[1]:
        groups *= 2
    groups = min(groups, tokens_BT.shape[1] - 1)  # each token opens at most one
    generator = _generator(seed, step, micro)
    rounds = [idea.rounds_in_training(rows, generator) for idea in model.ideas.values()]
    return next((each for each in rounds if each is not None), None), groups


def draw_served(model: Network, tokens_BT: Tensor, seed: int, step: int, micro: int) -> Tensor | None:
    """Return the tokens that serve the deep blocks earlier keys and values, bool [B, T - 1]; None: the model has none.

    Arguments as those of `plan_batch`, of whose draws these are independent.
    """
    router = model.idea("router")
    if router is None:
        return None
    rows, length = tokens_BT.shape
    served: Tensor | None = router.served_in_training(rows, length - 1, _generator(seed, step, micro, stream=1))
    return served


def _generator(seed: int, step: int, micro: int, stream: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(((seed * 1_000_003 + step) * 1_009 + micro + stream * 2**63) % 2**64)
