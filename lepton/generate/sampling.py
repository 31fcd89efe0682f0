"""The slow reference of how temperature, `top_k` and `top_p` cut probabilities; `lepton.ops.choose` is the fast form.

Everything is fp64, so that rounding errors over a long tail do not add up.
"""

import torch
from torch import Tensor


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
    ranked = p.sort(-1, descending=True).values[..., :top_k]
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
