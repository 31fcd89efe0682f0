"""Choosing the next token: Gumbel-max over the kept tokens, with noise that belongs to the place of the token.

The chosen token is ``argmax(log p + Gumbel noise)`` over the tokens that temperature, `top_k` and `top_p` keep, so its
distribution is p restricted to them. The noise depends only on (seed, row, number of the new token, token id), so the
choice is a function of the logits and the place. Drafts that are chosen with the same noise often equal the model's own
choice, and comparing the two verifies them ("drafter-invariant speculative decoding", Daliri et al. 2024).

The argmax is computed as a race: with E = -log(1 - u) and u uniform, it is that of p / E, since -log E is Gumbel noise.

A tensor with V columns may hold the logits of a subset of the ids. `naive_choose` sorts the vocabulary and is the slow
reference; on a CPU a faster form runs, on a GPU a Triton kernel.
"""

import random
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lepton.ops.cross_entropy import soft_cap
from lepton.ops.kernels import Kernel

TEMPERATURES = (1e-37, 1e37)
"""Temperatures other than 0 are clamped to this range: they and their inverses are normal numbers in fp32."""
LEAST_TOP_P = 1e-30
"""So small a nucleus holds one token. In fp32, `top_p` must not become 0."""
BITS = 0xFFFFFFFF


class Noise(NamedTuple):
    """Which noise each row gets."""

    stream_A2: Tensor
    """int64, the two words of `stream_words` for the row's seed and number."""
    index_A: Tensor
    """int64, number of the new token in its text, at least 0 and below 2^32."""


class Sampling(NamedTuple):
    """How each row is sampled. `sampling_of` makes it of plain numbers and clamps them."""

    temperature_A: Tensor
    """fp32: 0, or in `TEMPERATURES`."""
    top_p_A: Tensor
    """fp32, in (0, 1]; from 1 on every token is kept."""
    top_k_A: Tensor
    """int64; 0 keeps every token."""


def stream_words(seed: int, row: int) -> tuple[int, int]:
    """Return the words, 32 bits each, that make the noise of row `row` of a call with `seed` differ from others."""
    stream = random.Random(f"lepton {seed} {row}")
    return stream.getrandbits(32), stream.getrandbits(32)


def sampling_of(settings: Sequence[tuple[float, float, int | None]], device: torch.device | str = "cpu") -> Sampling:
    """Return the sampling of rows with the given (temperature, top_p, top_k)."""
    low, high = TEMPERATURES
    temperatures = [0.0 if each == 0 else min(max(each, low), high) for each, _, _ in settings]
    return Sampling(
        torch.tensor(temperatures, dtype=torch.float32, device=device),
        torch.tensor([max(top_p, LEAST_TOP_P) for _, top_p, _ in settings], dtype=torch.float32, device=device),
        torch.tensor([min(top_k or 0, BITS) for _, _, top_k in settings], dtype=torch.int64, device=device),
    )


def choose(
    logits_AV: Tensor, noise: Noise, sampling: Sampling, ids_V: Tensor | None = None, cap: float | None = None
) -> Tensor:
    """Choose a column per row.

    At temperature 0 it is that of the greatest logit. Otherwise it is Gumbel-max over the kept tokens: `top_k` of the
    most probable ones, and of these the fewest that hold `top_p` of their mass. Equals rank by column. A row's choice
    depends on no other row.

    Args:
        logits_AV: any float dtype; half precision is computed in fp32. If some are not finite, any valid column may be
            returned.
        noise: rows with equal streams and indices get the same noise.
        sampling: parameters of each row.
        ids_V: int64, the token id of each column, which its noise belongs to; None: the column is the id.
        cap: if given, the logits are `soft_cap(logits, cap)`.

    Returns:
        Columns, int64 [A].
    """
    in_kernel = CHOOSE.works(logits_AV.device, logits_AV.dtype)
    if cap is not None and not in_kernel:  # here a compiler joins it with what is before it
        logits_AV, cap = soft_cap(_precise(logits_AV), cap), None
    if in_kernel or logits_AV.device.type == "cpu":
        chosen: Tensor = _choose(logits_AV, *noise, *sampling, ids_V, cap)
        return chosen
    return naive_choose(logits_AV, noise, sampling, ids_V)


# The noise. The kernel computes the same integers.


def _mix(x: Tensor) -> Tensor:
    """Mix the 32 bits of int64 numbers: a bijection (constants from hash-prospector, of low bias, below 2^31)."""
    x = x ^ (x >> 16)
    x = x.mul_(0x21F0AAAD).bitwise_and_(BITS)
    x ^= x >> 15
    x = x.mul_(0x735A2D97).bitwise_and_(BITS)
    x ^= x >> 15
    return x


def noise_keys(noise: Noise) -> Tensor:
    """Return two words of 32 bits per row, int64 [A, 2]."""
    first_A, second_A = noise.stream_A2.unbind(1)
    return torch.stack([_mix(first_A ^ _mix(noise.index_A)), _mix(second_A ^ _mix(noise.index_A ^ BITS))], 1)


def noise_bits(keys_A2: Tensor, ids_AV: Tensor) -> Tensor:
    """Return 32 random bits for each key and token id, int64 [A, V]; `ids_AV` may have one row for all."""
    return _mix(_mix(ids_AV ^ keys_A2[:, :1]) ^ keys_A2[:, 1:])


def exponentials(keys_A2: Tensor, ids_AV: Tensor) -> Tensor:
    """Return a standard exponential variable for each key and token id, fp32 [A, V], at least 2^-33.

    Minus its logarithm is a standard Gumbel variable. Small values decide which token is chosen, so they are accurate:
    they are -log(1 - u) of u = (bits + 1/2) / 2^32.
    """
    u = noise_bits(keys_A2, ids_AV).to(torch.float32).add_(0.5).mul_(2.0**-32)
    return u.clamp_(max=1 - 2.0**-24).neg_().log1p_().neg_()


# The forms in PyTorch.


def _precise(logits_AV: Tensor) -> Tensor:
    return logits_AV.to(torch.promote_types(logits_AV.dtype, torch.float32))


def kept_in_rank(weights_AV: Tensor, top_p_A1: Tensor, top_k_A1: Tensor) -> Tensor:
    """Return which tokens are kept, bool [A, V], given unnormalised probabilities in falling order."""
    place_V = torch.arange(weights_AV.shape[1], device=weights_AV.device)
    among_AV = (place_V < top_k_A1) | (top_k_A1 == 0)
    masses_AV = weights_AV.where(among_AV, 0).cumsum(1)
    before_AV = masses_AV - weights_AV
    return among_AV & ((before_AV < top_p_A1 * masses_AV[:, -1:]) | (top_p_A1 >= 1) | (place_V == 0))


def naive_choose(logits_AV: Tensor, noise: Noise, sampling: Sampling, ids_V: Tensor | None = None) -> Tensor:
    """As `choose`, by sorting the vocabulary; without a branch, so that a GPU does not wait for the host."""
    temperature_A1, top_p_A1, top_k_A1 = (each[:, None] for each in sampling)
    ranked_AV, columns_AV = _precise(logits_AV).sort(dim=1, descending=True, stable=True)
    greedy_A1 = temperature_A1 == 0
    scale_A1 = torch.where(greedy_A1, 1.0, temperature_A1).reciprocal()
    weights_AV = ((ranked_AV - ranked_AV[:, :1]) * scale_A1).exp()
    kept_AV = kept_in_rank(weights_AV, top_p_A1, top_k_A1)
    ids_AV = columns_AV if ids_V is None else ids_V[columns_AV]
    scores_AV = weights_AV / exponentials(noise_keys(noise), ids_AV)
    place_A1 = scores_AV.where(kept_AV, -1.0).argmax(1, keepdim=True)
    return columns_AV.gather(1, place_A1.masked_fill(greedy_A1, 0))[:, 0]


def cpu_choose(logits_AV: Tensor, noise: Noise, sampling: Sampling, ids_V: Tensor | None = None) -> Tensor:
    """As `choose`; noise is computed, and tokens are sorted, only where a row needs it."""
    logits_AV = _precise(logits_AV).detach()
    # NumPy's argmax is many times faster than PyTorch's. Both return the first of equals.
    chosen_A = torch.from_numpy(logits_AV.numpy().argmax(1))
    rows = sampling.temperature_A.nonzero()[:, 0].tolist()
    if not rows:
        return chosen_A
    keys_A2 = noise_keys(noise)
    for row in rows:
        logits_V = logits_AV[row]
        weights_V = ((logits_V - logits_V[chosen_A[row]]) * sampling.temperature_A[row].reciprocal()).exp_()
        columns_M = kept_columns(logits_V, weights_V, float(sampling.top_p_A[row]), int(sampling.top_k_A[row]))
        if columns_M is None:
            ids_1V = (torch.arange(len(logits_V)) if ids_V is None else ids_V)[None]
            chosen_A[row] = int((weights_V / exponentials(keys_A2[row : row + 1], ids_1V)[0]).argmax())
        elif len(columns_M):  # none only if logits are not finite
            ids_1M = (columns_M if ids_V is None else ids_V[columns_M])[None]
            scores_1M = weights_V[columns_M] / exponentials(keys_A2[row : row + 1], ids_1M)
            chosen_A[row] = columns_M[scores_1M.argmax()]
    return chosen_A


def kept_columns(logits_V: Tensor, weights_V: Tensor, top_p: float, top_k: int) -> Tensor | None:
    """Return the columns of the kept tokens [M] in falling order of their logits; None if all are kept.

    `weights_V` are probabilities relative to the greatest one. Only tokens that may be kept are sorted. Often a few
    tokens hold the mass that is wanted. If not: a kept token and those that rank after it hold more than 1 - top_p of
    the mass, so its own share of it is more than (1 - top_p) / V.
    """
    size = len(logits_V)
    if 0 < top_k < size:
        candidates_M = (logits_V >= logits_V.topk(top_k).values[-1]).nonzero()[:, 0]
    elif top_p < 1:
        total = weights_V.sum()
        sure = 0.999 * (1 - top_p) / size * total  # rounding must lose no token
        for least in (1e-2, 1e-4, sure):
            candidates_M = (weights_V > least).nonzero()[:, 0]
            if weights_V[candidates_M].sum() > 1.001 * top_p * total:
                break
    else:
        return None
    order_M = logits_V[candidates_M].sort(descending=True, stable=True).indices
    columns_M = candidates_M[order_M]
    if 0 < top_k < size:
        columns_M = columns_M[:top_k]
    if top_p >= 1:
        return columns_M
    weights_M = weights_V[columns_M]
    total = weights_M.sum() if 0 < top_k < size else weights_V.sum()
    missing_M = weights_M.cumsum(0) - weights_M < top_p * total
    return columns_M[: max(1, int(missing_M.sum()))]


# The operator: a kernel on a GPU, `cpu_choose` on a CPU. A trace of a cycle holds it as a whole.


def _trial(device: torch.device, dtype: torch.dtype) -> None:
    from lepton.ops.triton.choose import RESIDENT, fused_choose

    stream_A2 = torch.zeros(1, 2, dtype=torch.int64, device=device)
    sampling = sampling_of([(1.0, 0.5, 2)], device)
    for columns, cap in ((16, 5.0), (RESIDENT + 1, None)):  # both forms
        ids_V = None if cap is None else torch.arange(columns, device=device)
        logits_AV = torch.zeros(1, columns, dtype=dtype, device=device)
        fused_choose(logits_AV, stream_A2, stream_A2[:, 0], *sampling, ids_V, cap)


CHOOSE = Kernel("choosing tokens", (torch.float32, torch.bfloat16, torch.float16), _trial)


@torch.library.custom_op("lepton::choose", mutates_args=(), device_types="cuda")
def _choose(
    logits_AV: Tensor,
    stream_A2: Tensor,
    index_A: Tensor,
    temperature_A: Tensor,
    top_p_A: Tensor,
    top_k_A: Tensor,
    ids_V: Tensor | None,
    cap: float | None,
) -> Tensor:
    from lepton.ops.triton.choose import fused_choose

    return fused_choose(logits_AV, stream_A2, index_A, temperature_A, top_p_A, top_k_A, ids_V, cap)


def _on_cpu(logits_AV: Tensor, stream_A2: Tensor, index_A: Tensor, *more: Any) -> Tensor:
    *sampling, ids_V, cap = more
    logits_AV = logits_AV if cap is None else soft_cap(_precise(logits_AV), cap)
    return cpu_choose(logits_AV, Noise(stream_A2, index_A), Sampling(*sampling), ids_V)


# Not `_choose.register_kernel`: the first call of what that registers loads the compiler, which takes a second.
_CPU = torch.library.Library("lepton", "FRAGMENT")
_CPU.impl("choose", _on_cpu, "CPU")


@_choose.register_fake
def _(logits_AV: Tensor, stream_A2: Tensor, index_A: Tensor, *_: Any) -> Tensor:
    return logits_AV.new_empty(len(logits_AV), dtype=torch.int64)
