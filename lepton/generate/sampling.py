"""Sampling as pure functions: logits to probabilities, and probabilities with a uniform number to a token.

Shapes: R rows, V vocabulary, K ranked tokens. All is fp64: a row is small, and a tail of thousands of tokens adds up.
"""

import math
import random
from collections.abc import Sequence

import torch
from torch import Tensor

from lepton.errors import InputError

USUAL_NUCLEUS = 1024
"""Tokens ranked before all are: ranking the whole vocabulary takes as long as a small model's step."""


def check_sampling(temperature: float, top_p: float, top_k: int | None) -> None:
    """Raise InputError for a value that names no distribution."""
    if not (temperature >= 0 and math.isfinite(temperature)):
        raise InputError(f"temperature={temperature}: must be 0 (greedy) or a positive number")
    if not 0 < top_p <= 1:
        raise InputError(f"top_p={top_p}: must lie in (0, 1]; 1 keeps every token")
    if top_k is not None and top_k < 1:
        raise InputError(f"top_k={top_k}: must be at least 1; leave it out (None) to keep every token")


def probabilities(logits_RV: Tensor, *, temperature: float, top_p: float = 1.0, top_k: int | None = None) -> Tensor:
    """Return the distribution to sample from, fp64 [R, V]; each row sums to 1.

    The temperature comes first, then the `top_k` most probable tokens, then of these the fewest that hold `top_p` of
    their mass (nucleus sampling, Holtzman et al. 2019). Equals rank by id. Temperature 0 is an exact one-hot.
    """
    logits_RV = logits_RV.double()
    if temperature == 0:
        return torch.nn.functional.one_hot(logits_RV.argmax(-1), logits_RV.shape[-1]).double()
    # The maximum goes first: dividing by a tiny temperature then overflows only towards probability 0.
    p_RV = torch.softmax((logits_RV - logits_RV.amax(-1, keepdim=True)) / temperature, -1)
    if top_k is None and top_p == 1:
        return p_RV
    ranked_RK = _ranked(p_RV, top_p, top_k)
    count_R1 = torch.full_like(p_RV[:, :1], ranked_RK.shape[-1], dtype=torch.int64)
    if top_p < 1:
        mass = 1.0 if top_k is None else ranked_RK.sum(-1, keepdim=True)
        missing_RK = ranked_RK.cumsum(-1) / mass < top_p
        count_R1 = torch.minimum(count_R1, missing_RK.sum(-1, keepdim=True) + 1)
    # Every token above the last kept value stays, and of those equal to it the first ones.
    last_R1 = ranked_RK.gather(-1, count_R1 - 1)
    above_RV, equal_RV = p_RV > last_R1, p_RV == last_R1
    places_R1 = count_R1 - above_RV.sum(-1, keepdim=True)
    kept_RV = p_RV.where(above_RV | (equal_RV & (equal_RV.cumsum(-1) <= places_R1)), 0.0)
    return kept_RV / kept_RV.sum(-1, keepdim=True)


def _ranked(p_RV: Tensor, top_p: float, top_k: int | None) -> Tensor:
    """Return the largest probabilities in falling order: `top_k` of them, or enough to hold `top_p`."""
    if top_k is not None:
        return p_RV.topk(min(top_k, p_RV.shape[-1])).values
    ranked_RK = p_RV.topk(min(USUAL_NUCLEUS, p_RV.shape[-1])).values
    enough = bool((ranked_RK.cumsum(-1)[:, -1] >= top_p).all())
    return ranked_RK if enough else p_RV.sort(-1, descending=True).values


def sample(p_RV: Tensor, uniforms: Sequence[float]) -> list[int]:
    """Return a token a row by inverting the cumulative distribution at `uniforms`, one number in [0, 1) a row.

    A token of probability 0 is never returned.
    """
    cumulative_RV = p_RV.cumsum(-1)
    total_R1 = cumulative_RV[:, -1:].contiguous()
    point_R1 = torch.tensor(uniforms, dtype=torch.float64, device=p_RV.device)[:, None] * total_R1
    index_R1 = torch.searchsorted(cumulative_RV, point_R1, right=True)
    last_R1 = torch.searchsorted(cumulative_RV, total_R1)  # the last possible token: a product rounded up stops there
    ids: list[int] = torch.minimum(index_R1, last_R1)[:, 0].tolist()
    return ids


def random_stream(seed: int, row: int) -> random.Random:
    """Return row `row`'s own stream of uniforms: it depends on no other row and touches no global generator."""
    return random.Random(f"lepton {seed} {row}")
