"""Held-out positions: which of them are for fitting and which for measuring, and what a model predicts at each.

The first half of a validation split is for fitting and the second for measuring, so that no figure is taken from text
that something was fitted on.

Shapes: B rows, T tokens of a chunk, D width, V vocabulary; M positions.
"""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from lepton.data.shards import Batch, ShardedDataset
from lepton.errors import InputError
from lepton.model import Network, Output
from lepton.values import Least

DEFAULT_TOKENS = 1 << 16
"""Positions that are read by default."""
CHUNK = 1024
"""Tokens of a row in one forward pass."""
SLICE, SLICE_CPU = 256, 64
"""Positions of a slice, whose logits are in memory at once. On a CPU each slice takes memory from the system and gives
it back. With 256 x 50,257 logits that is most of the time, and it fragments the memory of the process. For 6,144
tokens of a NANO, 256 positions take 0.7 million page faults and 2.7 GB, and 64 positions 0.1 million and 0.6 GB."""


class Positions(NamedTuple):
    """A slice of positions whose next token is known, on the model's device."""

    hidden_MD: Tensor
    logits_MV: Tensor
    signals_M3: Tensor
    """What the uncertainty head reads beside the state; the first is the router's score."""
    depth_M: Tensor
    """Blocks that the token went through."""
    target_M: Tensor
    """The next token."""
    window_M: Tensor
    """Number of the row that the position is in, counted over all batches."""


@dataclass(frozen=True)
class Outcomes:
    """Predictions of a model at N positions beside the next tokens: fp64 on the CPU."""

    wrong_M: Tensor
    """1 where the most likely token is not the next token of the text, else 0."""
    uncertainty_logit_M: Tensor | None
    """Raw logit of the uncertainty head (None without the idea)."""
    router_score_M: Tensor | None
    """Score of the router (None without the idea)."""
    least_confidence_M: Tensor
    """One minus the largest probability."""
    scaled_least_confidence_M: Tensor
    """The same with the logits divided by a temperature."""
    window_M: Tensor
    """Number of the window that the position is in, int64."""


def calibration_batches(data: ShardedDataset, batch_size: int, max_tokens: int = DEFAULT_TOKENS) -> Iterator[Batch]:
    """Yield windows of the first half of a validation split, spread evenly, with about `max_tokens` targets."""
    return _half(data, batch_size, max_tokens, second=False)


def evaluation_batches(data: ShardedDataset, batch_size: int, max_tokens: int = DEFAULT_TOKENS) -> Iterator[Batch]:
    """Yield windows of the second half, which `calibration_batches` never gives; a single window is one of these."""
    return _half(data, batch_size, max_tokens, second=True)


def _half(data: ShardedDataset, batch_size: int, max_tokens: int, *, second: bool) -> Iterator[Batch]:
    limit = 2 * math.ceil(max_tokens / (batch_size * data.seq_len))
    count = min(data.windows, limit * batch_size)
    first, last = (math.ceil(count / 2) if count > 1 else 0, count) if second else (0, count // 2)
    for number, batch in enumerate(data.batches(batch_size, limit)):
        start = number * batch_size
        rows = slice(max(first - start, 0), max(last - start, 0))
        if len(batch.lengths[rows]):
            yield batch.rows(rows)


@torch.no_grad()
def iterate_positions(
    model: Network,
    batches: Iterable[Batch],
    *,
    max_tokens: int | None = None,
    carry: bool = False,
    depth: float | Least | None = None,
    think: int | None = None,
) -> Iterator[Positions]:
    """Yield all positions of `batches` whose next token is known and counts, a slice at a time.

    Args:
        model: in eval mode.
        batches: windows of text.
        max_tokens: positions in all, at most.
        carry: whether the rows of a batch continue those of the batch before; otherwise each row stands alone.
        depth: share of the tokens that go past the stem, or the least saving that lets one pass; None for all.
        think: rounds of thinking, None for the model's own number.
    """
    device = model.device
    slice_size = min(SLICE, SLICE_CPU) if device.type == "cpu" else SLICE
    left = math.inf if max_tokens is None else max_tokens
    out: Output | None = None
    windows = 0
    for batch in batches:
        # Rows beyond the limit are not computed: it may be far below a batch.
        first_B = (batch.lengths - 1).clamp(max=CHUNK).cumsum(0)
        if first_B[-1] >= left:
            batch = batch.rows(slice(int((first_B < left).sum()) + 1))
        tokens = batch.tokens.to(device)
        counts_B = (batch.lengths - 1).to(device)
        targets_BT, opens_BT = (None if each is None else each.to(device) for each in (batch.targets, batch.opens))
        out = out if carry else None
        for start in range(0, tokens.shape[1] - 1, CHUNK):
            target_BT = tokens[:, start + 1 : start + 1 + CHUNK]
            chunk_BT = tokens[:, start : start + target_BT.shape[1]]
            here_B = (counts_B - start).clamp(0, chunk_BT.shape[1])
            state = None if out is None else out.state
            here = slice(start, start + chunk_BT.shape[1])
            opens = None if opens_BT is None else opens_BT[:, here]
            out = model.trunk(chunk_BT, state, lengths=here_B, depth=depth, think=think, opens=opens)
            valid_BT = torch.arange(chunk_BT.shape[1], device=device) < here_B[:, None]
            if targets_BT is not None:
                valid_BT &= targets_BT[:, here]
            for index_M in valid_BT.flatten().nonzero()[:, 0].split(slice_size):
                index_M = index_M[: int(min(left, slice_size))]
                left -= len(index_M)
                hidden_MD = out.hidden.flatten(0, 1)[index_M]
                signals_M3, depth_M, target_M = (
                    each.flatten(0, 1)[index_M] for each in (out.signals, out.depth, target_BT)
                )
                window_M = windows + index_M // chunk_BT.shape[1]
                yield Positions(hidden_MD, model.head(hidden_MD), signals_M3, depth_M, target_M, window_M)
                if left <= 0:
                    return
        windows += len(tokens)


@torch.no_grad()
def collect_outcomes(
    model: Network,
    batches: Iterable[Batch],
    max_tokens: int | None = None,
    *,
    allow_none: bool = False,
    temperature: float = 1.0,
    carry: bool = False,
    depth: float | None = None,
    think: int | None = None,
) -> Outcomes:
    """Return the outcomes at the positions of `batches`; arguments not listed are those of `iterate_positions`.

    Args:
        allow_none: whether the batches may hold nothing to predict (N = 0).
        temperature: that of `Outcomes.scaled_least_confidence_M`.

    Raises:
        InputError: there is nothing to predict.
    """
    uncertainty = model.idea("uncertainty")
    figures = [torch.empty(4 if uncertainty is None else 5, 0, dtype=torch.float64)]
    numbers = [torch.empty(0, dtype=torch.int64)]
    for part in iterate_positions(model, batches, max_tokens=max_tokens, carry=carry, depth=depth, think=think):
        logits_MV = part.logits_MV
        log_max_M = logits_MV.log_softmax(-1).amax(-1)
        rows = [
            (logits_MV.argmax(-1) != part.target_M).to(logits_MV.dtype),
            log_max_M,
            log_max_M if temperature == 1 else (logits_MV / temperature).log_softmax(-1).amax(-1),
            part.signals_M3[:, 0].to(logits_MV.dtype),
        ]
        if uncertainty is not None:
            rows.append(uncertainty.logit(part.hidden_MD, logits_MV, part.signals_M3))
        figures.append(torch.stack(rows).cpu().double())
        numbers.append(part.window_M.cpu())
    wrong_M, log_max_M, scaled_log_max_M, score_M, *logit_M = torch.cat(figures, 1)
    if not len(wrong_M) and not allow_none:
        raise InputError("the text holds no token to predict: give a longer one")
    return Outcomes(
        wrong_M,
        logit_M[0] if logit_M else None,
        score_M if model.idea("router") is not None else None,
        # From the logarithm: 1 - p loses the digits of what is left of a probability near 1.
        -torch.expm1(log_max_M),
        -torch.expm1(scaled_log_max_M),
        torch.cat(numbers),
    )
