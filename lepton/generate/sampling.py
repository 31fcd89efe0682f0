"""Sampling as pure functions: logits to probabilities, and probabilities with a uniform number to a token.

Shapes: A rows, V vocabulary. Everything is fp64: it is cheap, and rounding errors over a long
tail would add up.
"""

import random

import torch
from torch import Tensor

USUAL_NUCLEUS = 1024
"""Number of top tokens to try first: ranking the whole vocabulary would take as long as a step of a small model."""


def probabilities(logits: Tensor, *, temperature: float, top_p: float = 1.0, top_k: int | None = None) -> Tensor:
    """Return the distributions [..., V] to sample from, fp64; each sums to 1.

    The temperature comes first, then the `top_k` most probable tokens, then of these the fewest that hold `top_p` of
    their mass (nucleus sampling, Holtzman et al. 2019). Equals rank by id. Temperature 0 is an exact one-hot.
    """
    logits = logits.double()
    if temperature == 0:
        return torch.nn.functional.one_hot(logits.argmax(-1), logits.shape[-1]).double()
    # The maximum goes first: dividing by a tiny temperature then overflows only towards probability 0.
    p = torch.softmax((logits - logits.amax(-1, keepdim=True)) / float(temperature), -1)
    if top_k is None and top_p == 1:
        return p
    ranked = _ranked(p, top_p, top_k)
    count = torch.full_like(p[..., :1], ranked.shape[-1], dtype=torch.int64)
    if top_p < 1:
        mass = 1.0 if top_k is None else ranked.sum(-1, keepdim=True)
        missing = ranked.cumsum(-1) / mass < top_p
        count = torch.minimum(count, missing.sum(-1, keepdim=True) + 1)
    # Every token above the last kept value stays, and of those equal to it the first ones.
    last = ranked.gather(-1, count - 1)
    above, equal = p > last, p == last
    places = count - above.sum(-1, keepdim=True)
    kept = p.where(above | (equal & (equal.cumsum(-1) <= places)), 0.0)
    return kept / kept.sum(-1, keepdim=True)


def _ranked(p: Tensor, top_p: float, top_k: int | None) -> Tensor:
    """Return the largest probabilities in falling order: `top_k` of them, or enough to hold `top_p`."""
    if top_k is not None:
        return p.topk(min(top_k, p.shape[-1])).values
    # A GPU sorts everything in less time than it takes to ask whether that is needed.
    if not p.is_cuda:
        ranked = p.topk(min(USUAL_NUCLEUS, p.shape[-1])).values
        if (ranked.cumsum(-1)[..., -1] >= top_p).all():
            return ranked
    return p.sort(-1, descending=True).values


def sample(weights_AV: Tensor, uniforms_A: Tensor) -> Tensor:
    """Return a token per row [A] by inverting the cumulative distribution at `uniforms_A`, numbers in [0, 1).

    The weights need not sum to 1. A token of weight 0 is never returned.
    """
    cumulative_AV = weights_AV.cumsum(-1)
    total_A1 = cumulative_AV[:, -1:].contiguous()
    index_A1 = torch.searchsorted(cumulative_AV, uniforms_A.to(total_A1)[:, None] * total_A1, right=True)
    last_A1 = torch.searchsorted(cumulative_AV, total_A1)  # the last token with weight, if the product is rounded up
    # If weights are NaN, any valid index is returned; the caller checks.
    return torch.minimum(index_A1, last_A1)[:, 0].clamp(max=weights_AV.shape[-1] - 1)


def random_stream(seed: int, row: int) -> random.Random:
    """Return row `row`'s own stream of uniforms: it depends on no other row and touches no global generator."""
    return random.Random(f"lepton {seed} {row}")
