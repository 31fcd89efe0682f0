"""Calibration: what a model's scores mean, measured on text that it was not trained on.

Two things are fitted, neither of which changes a prediction at full depth: the line that turns the logit of the
uncertainty head into a chance (Platt, 1999), and the router's table of quantiles, which turns a share of tokens into a
score. The first half of the validation split is for that; the second is left for measuring, so no figure is taken
where it was fitted.

Shapes: B rows, T tokens of a chunk, D width, V vocabulary; M positions.
"""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from lepton.data.shards import Batch, ShardedDataset
from lepton.errors import InputError
from lepton.model import Lepton, Output

TOKENS = 1 << 16
"""Positions that are looked at, where a call does not say."""
MIN_TOKENS = 1000
"""Fewest positions that anything is fitted on. Chances are off by about sqrt(p (1 - p) / N) from the sample alone: by
1 point of 100 for N = 1,000, by 20 for N = 4, while the error that calibration removes is 1 to 5. On a NANO of 80 steps
fits to N random positions left a calibration error of 0.166, 0.052, 0.025, 0.022 and 0.021 in another half of the
text for N = 4, 64, 250, 1,000 and 4,000; without a fit it was 0.016, so below 1,000 a fit can only do harm."""
CHUNK = 1024
"""Tokens of a row in one forward pass."""
POSITIONS, POSITIONS_CPU = 256, 64
"""Positions whose logits exist at once. A CPU takes memory for each slice from the system and gives it back; with 256
of 50,257 logits that is most of the time, and fragments what the process keeps (0.7 million page faults and 2.7 GB for
6,144 tokens of a NANO, against 0.1 million and 0.6 GB)."""
BINS = 15
"""Bins of the calibration error."""
PRIOR = 1e-3
"""Weight, in observations, of the line that changes nothing: it decides where all logits are equal."""


class Positions(NamedTuple):
    """Some positions whose next token is known."""

    hidden_MD: Tensor
    logits_MV: Tensor
    signals_M3: Tensor
    depth_M: Tensor
    target_M: Tensor


@dataclass(frozen=True)
class Outcomes:
    """What a model said of M positions and what came: fp64 on the CPU."""

    wrong_M: Tensor
    """1 where the most likely token is not the one that came, else 0."""
    logit_M: Tensor | None
    """Raw logit of the uncertainty head (None without the idea)."""
    benefit_M: Tensor | None
    """The router's score (None without the idea)."""
    doubt_M: Tensor
    """One minus the largest probability."""
    scaled_doubt_M: Tensor
    """The same with the logits divided by a temperature."""


@dataclass(frozen=True)
class Calibration:
    """What was fitted."""

    tokens: int
    """Positions that were read for it."""
    line: tuple[float, float] | None
    """Scale and shift of the uncertainty's logit (None without the idea, or where nothing was fitted)."""
    quantiles: Tensor | None
    """Scores of the router at the quantiles 0, 1/64, ..., 1, fp64 (None as above)."""


@torch.no_grad()
def calibrate(
    model: Lepton, batches: Iterable[Batch], max_tokens: int = TOKENS, *, min_tokens: int = MIN_TOKENS
) -> Calibration:
    """Fit the uncertainty's line and the router's quantiles on `batches`, and put them into `model`'s buffers.

    `batches` are windows that the model was not trained on, such as `calibration_batches` gives; at most `max_tokens`
    of their positions are read. A model without router and uncertainty is left alone, and so is one for which there are
    fewer than `min_tokens` positions: what it has, at first the identity, is then better than a fit.
    """
    if model.idea("router") is None and model.idea("uncertainty") is None:
        return Calibration(0, None, None)
    slices = list(_outcomes(model, batches, max_tokens))
    tokens = sum(part.shape[1] for part in slices)
    if tokens < max(min_tokens, 1):
        return Calibration(tokens, None, None)
    outcomes = _joined(model, slices)
    line, quantiles = None, None
    if model.idea("uncertainty") is not None and outcomes.logit_M is not None:
        line = fit_line(outcomes.logit_M, outcomes.wrong_M)
        model.idea("uncertainty").calibration.copy_(torch.tensor(line))
    if model.idea("router") is not None and outcomes.benefit_M is not None:
        places = torch.linspace(0, 1, len(model.idea("router").quantiles), dtype=torch.float64)
        quantiles = outcomes.benefit_M.quantile(places)
        model.idea("router").quantiles.copy_(quantiles)
    return Calibration(tokens, line, quantiles)


def calibration_batches(data: ShardedDataset, batch_size: int, max_tokens: int = TOKENS) -> Iterator[Batch]:
    """Yield windows of the first half of a validation split, spread evenly, with about `max_tokens` targets."""
    return _half(data, batch_size, max_tokens, second=False)


def evaluation_batches(data: ShardedDataset, batch_size: int, max_tokens: int = TOKENS) -> Iterator[Batch]:
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
            yield Batch(batch.tokens[rows], batch.lengths[rows])


@torch.no_grad()
def walk(
    model: Lepton,
    batches: Iterable[Batch],
    *,
    max_tokens: int | None = None,
    carry: bool = False,
    depth: float | None = None,
    think: int | None = None,
) -> Iterator[Positions]:
    """Yield every position of `batches` whose next token is known, a slice at a time and `max_tokens` in all.

    Each row stands on its own; with `carry`, the rows of a batch go on where those of the batch before ended.
    """
    device = model.embed.weight.device
    at_once = min(POSITIONS, POSITIONS_CPU) if device.type == "cpu" else POSITIONS
    left = math.inf if max_tokens is None else max_tokens
    out: Output | None = None
    for batch in batches:
        # Rows that the limit leaves nothing of are not computed: it may be far below a batch.
        first_B = (batch.lengths - 1).clamp(max=CHUNK).cumsum(0)
        if first_B[-1] >= left:
            batch = Batch(*(part[: int((first_B < left).sum()) + 1] for part in batch))
        tokens = batch.tokens.to(device)
        counts_B = (batch.lengths - 1).to(device)
        out = out if carry else None
        for start in range(0, tokens.shape[1] - 1, CHUNK):
            target_BT = tokens[:, start + 1 : start + 1 + CHUNK]
            chunk_BT = tokens[:, start : start + target_BT.shape[1]]
            here_B = (counts_B - start).clamp(0, chunk_BT.shape[1])
            state = None if out is None else out.state
            out = model.trunk(chunk_BT, state, lengths=here_B, depth=depth, think=think)
            valid_BT = torch.arange(chunk_BT.shape[1], device=device) < here_B[:, None]
            for index_M in valid_BT.flatten().nonzero()[:, 0].split(at_once):
                index_M = index_M[: int(min(left, at_once))]
                left -= len(index_M)
                hidden_MD = out.hidden.flatten(0, 1)[index_M]
                others = (out.signals, out.depth, target_BT)
                yield Positions(hidden_MD, model.head(hidden_MD), *(each.flatten(0, 1)[index_M] for each in others))
                if left <= 0:
                    return


@torch.no_grad()
def collect(
    model: Lepton,
    batches: Iterable[Batch],
    max_tokens: int | None = None,
    *,
    temperature: float = 1.0,
    carry: bool = False,
    depth: float | None = None,
    think: int | None = None,
) -> Outcomes:
    """Return what `model` says of the positions of `batches`; `temperature` is that of `Outcomes.scaled_doubt_M`.

    Raises:
        InputError: there is nothing to predict.
    """
    slices = list(_outcomes(model, batches, max_tokens, temperature, carry=carry, depth=depth, think=think))
    if not slices:
        raise InputError("the text holds no token to predict: give a longer one")
    return _joined(model, slices)


def _outcomes(
    model: Lepton,
    batches: Iterable[Batch],
    max_tokens: int | None,
    temperature: float = 1.0,
    *,
    carry: bool = False,
    depth: float | None = None,
    think: int | None = None,
) -> Iterator[Tensor]:
    """Yield the figures that `Outcomes` is made of, those of a slice of positions at a time: fp64 [figures, M]."""
    for part in walk(model, batches, max_tokens=max_tokens, carry=carry, depth=depth, think=think):
        logits_MV = part.logits_MV
        columns = [
            (logits_MV.argmax(-1) != part.target_M).to(logits_MV.dtype),
            logits_MV.log_softmax(-1).amax(-1),
            (logits_MV / temperature).log_softmax(-1).amax(-1),
            part.signals_M3[:, 0].to(logits_MV.dtype),
        ]
        if model.idea("uncertainty") is not None:
            columns.append(model.idea("uncertainty").logit(part.hidden_MD, logits_MV, part.signals_M3))
        yield torch.stack(columns).cpu().double()


def _joined(model: Lepton, slices: list[Tensor]) -> Outcomes:
    wrong_M, likely_M, scaled_M, benefit_M, *logit_M = torch.cat(slices, 1)
    return Outcomes(
        wrong_M,
        logit_M[0] if logit_M else None,
        benefit_M if model.idea("router") is not None else None,
        # From the logarithm, for what is left of a probability near 1.
        -torch.expm1(likely_M),
        -torch.expm1(scaled_M),
    )


def fit_line(logit_M: Tensor, wrong_M: Tensor) -> tuple[float, float]:
    """Return the scale and shift under which `sigmoid(scale * logit + shift)` fits the outcomes best.

    Maximum likelihood by Newton's method in fp64 (Platt, 1999; Lin, Lin and Weng, 2007). Platt's targets, a little
    inside of 0 and 1, keep the line finite where the logits separate the outcomes.
    """
    wrongs = wrong_M.double().sum()
    rights = len(wrong_M) - wrongs
    target_M = torch.where(wrong_M > 0, (wrongs + 1) / (wrongs + 2), 1 / (rights + 2))
    input_M2 = torch.stack([logit_M.double(), torch.ones_like(target_M)], -1)
    neutral_2 = torch.tensor([1.0, 0.0], dtype=torch.float64)

    def cost(line_2: Tensor) -> Tensor:
        score_M = input_M2 @ line_2
        return (F.softplus(score_M) - target_M * score_M).sum() + PRIOR / 2 * (line_2 - neutral_2).square().sum()

    line_2 = neutral_2
    for _ in range(100):
        chance_M = torch.sigmoid(input_M2 @ line_2)
        gradient_2 = input_M2.T @ (chance_M - target_M) + PRIOR * (line_2 - neutral_2)
        weight_M1 = (chance_M * (1 - chance_M))[:, None]
        curve_22 = input_M2.T @ (weight_M1 * input_M2) + PRIOR * torch.eye(2, dtype=torch.float64)
        step_2 = torch.linalg.solve(curve_22, gradient_2)
        while cost(line_2 - step_2) > cost(line_2) and step_2.abs().max() > 1e-12:
            step_2 = step_2 / 2
        line_2 = line_2 - step_2
        if step_2.abs().max() < 1e-10:
            break
    scale, shift = line_2.tolist()
    return scale, shift


def calibration_error(chance_M: Tensor, wrong_M: Tensor, bins: int = BINS) -> float:
    """Expected calibration error in 0..1: mean |chance - share of wrong| over bins of equally many positions.

    Equal chances count as equally wrong, so the result does not depend on the order of the positions.
    """
    chance_M, wrong_M = sorted_by_chance(chance_M, wrong_M)
    parts = zip(chance_M.tensor_split(bins), wrong_M.tensor_split(bins), strict=True)
    return sum((chance - wrong).sum().abs().item() for chance, wrong in parts) / len(chance_M)


def sorted_by_chance(chance_M: Tensor, wrong_M: Tensor) -> tuple[Tensor, Tensor]:
    """Return the chances in rising order and the outcomes beside them, those of equal chances averaged; fp64."""
    values, place_M, counts = chance_M.double().unique(return_inverse=True, return_counts=True)
    shares = torch.zeros_like(values).index_add(0, place_M, wrong_M.double()) / counts
    return values.repeat_interleave(counts), shares.repeat_interleave(counts)
