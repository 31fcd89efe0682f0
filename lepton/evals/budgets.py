"""The least computation that keeps the mean loss within a budget: a threshold on the router's predicted saving.

A token whose predicted saving is below the threshold skips the deep blocks. So what is easy is a property of the token,
and not a share of every text. The threshold is chosen by what the model really loses: with others' keys and values from
the stem, and with what the exit lacks. It is the largest at which the loss rises by no more than the budget less two
standard errors.

Shapes: W windows.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from lepton.data.shards import Batch
from lepton.errors import InputError
from lepton.evals.positions import iterate_positions
from lepton.model import Network
from lepton.model.budget import Budget
from lepton.values import Least, positive_nats

CANDIDATES = 64
"""Thresholds that are considered keep shares 1/64, ..., 1 of the tokens in the stem."""
MARGIN = 2.0
"""Standard errors that must lie between the loss and the budget."""
Batches = Callable[[], Iterable[Batch]]
"""Gives the same windows at each call."""


@dataclass(frozen=True)
class Reading:
    """What a pass over some windows gave, fp64 on the CPU."""

    nats_W: Tensor
    """Sum over the targets of each window."""
    tokens_W: Tensor
    deep: float
    """Tokens that went through the deep blocks."""
    scores: Tensor
    """The router's predicted saving at each position."""

    @property
    def tokens(self) -> int:
        """Targets in all."""
        return int(self.tokens_W.sum())


@dataclass(frozen=True)
class Cost:
    """What a threshold costs on some text."""

    cost: float
    """Nats a token by which the mean loss rose."""
    error: float
    """Its standard error: windows are drawn alike, positions of one are not independent."""
    share: float
    """Share of the tokens that went through the deep blocks."""


@torch.no_grad()
def read(model: Network, batches: Iterable[Batch], max_tokens: int, least: float | None = None) -> Reading:
    """Read windows at full depth, or with a threshold `least` on the predicted saving, in nats.

    Raises:
        InputError: there is nothing to predict.
    """
    rows, deep, scores = [torch.zeros(3, 0, dtype=torch.float64)], 0.0, []
    depth = None if least is None else Least(least)
    for part in iterate_positions(model, batches, max_tokens=max_tokens, depth=depth):
        nats_M = cross_entropy(part.logits_MV, part.target_M, reduction="none")
        rows.append(torch.stack([part.window_M.double(), nats_M.double(), torch.ones_like(nats_M).double()]).cpu())
        deep += float((part.depth_M > model.config.stem_layers).sum())
        scores.append(part.signals_M3[:, 0].cpu().double())
    window_M, nats_M, one_M = torch.cat(rows, 1)
    if not len(window_M):
        raise InputError("the text holds no token to predict: give a longer one")
    sums = torch.zeros(2, int(window_M.max()) + 1, dtype=torch.float64)
    sums.index_add_(1, window_M.long(), torch.stack([nats_M, one_M]))
    return Reading(sums[0], sums[1], deep, torch.cat(scores))


def cost_of(whole: Reading, less: Reading) -> Cost:
    """Return what `less` costs beside `whole`, a reading of the same windows at full depth."""
    lost_W = less.nats_W - whole.nats_W
    cost = (lost_W.sum() / whole.tokens).item()
    off_W = lost_W - cost * whole.tokens_W
    windows = len(off_W)
    spread = (off_W.square().sum() * windows / max(1, windows - 1)).sqrt().item()
    return Cost(cost, spread / whole.tokens, less.deep / less.tokens)


def find_budget(model: Network, batches: Batches, max_tokens: int, max_cost: float, *, data: str = "") -> Budget:
    """Return the threshold that lets the most tokens skip the deep blocks within `max_cost` nats a token.

    About seven passes over the text. If no threshold keeps to it, that of the budget lets none skip them.

    Args:
        model: with a router, in eval mode.
        batches: windows that the model was not trained on.
        max_tokens: positions that are read, at most.
        max_cost: by how much the mean loss may rise, in nats a token.
        data: what the text is.

    Raises:
        InputError: a cost that is not positive, a single window, or nothing to predict.
    """
    max_cost = positive_nats(max_cost)
    whole = read(model, batches(), max_tokens)
    if len(whole.nats_W) < 2:
        raise InputError("a single window, which says nothing about the next one: name more text")
    places = torch.arange(1, CANDIDATES + 1, dtype=torch.float64) / CANDIDATES
    thresholds = whole.scores.quantile(places).unique().tolist()
    # Below all scores: all tokens go deep, at no cost.
    least, found = whole.scores.min().item() - 1, Cost(0.0, 0.0, 1.0)
    low, high = 0, len(thresholds)
    while low < high:  # thresholds below `low` keep to the budget, those from `high` on do not
        middle = (low + high) // 2
        cost = cost_of(whole, read(model, batches(), max_tokens, thresholds[middle]))
        if cost.cost + MARGIN * cost.error <= max_cost:
            low, least, found = middle + 1, thresholds[middle], cost
        else:
            high = middle
    return Budget(
        max_cost=max_cost,
        least=least,
        share=found.share,
        cost=found.cost,
        error=found.error,
        tokens=whole.tokens,
        data=data,
    )
