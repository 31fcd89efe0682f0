"""The engine: prefill a prompt in chunks, then decode a token at a time from the state. Nothing is computed twice.

Shapes: B rows of the call, R rows still running, T tokens of a chunk, D width, V vocabulary.
"""

import secrets
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lepton.errors import InputError
from lepton.generate.prompts import Prompt, read_prompts, read_stops
from lepton.generate.sampling import check_sampling, probabilities, random_stream, sample
from lepton.model import Lepton, State

PREFILL_CHUNK = 1024
"""Prompt tokens computed at once: bounds the memory of a long prompt."""


class Step(NamedTuple):
    """One new token for each row that still runs."""

    rows: list[int]
    ids: list[int]
    logits_RV: Tensor


def generate(
    model: Lepton,
    prompt_ids: Prompt,
    max_new_tokens: int = 100,
    temperature: float = 0.8,
    top_p: float = 0.9,
    top_k: int | None = None,
    use_speculative: bool = True,
    seed: int | None = None,
    stop: Any = None,
    depth: float | None = None,
    think: int | None = None,
) -> Any:
    """Continue `prompt_ids` and return prompt and new tokens.

    A flat list, or a tensor of shape [T] or [1, T], gives a flat list. A list of lists, whose lengths may differ, or a
    tensor [B, T] gives a list of lists; each row is what it would be alone.

    Generation ends after `max_new_tokens`, after the model's end-of-document id, or after one of `stop` has been
    produced (an id, a list of ids, or a list of id sequences); what ended it is kept. `temperature=0` is greedy.
    `seed` makes sampling repeatable: row r draws from the stream (seed, r). `use_speculative` never changes the result.
    `depth` (0..1) and `think` (rounds) are the model's own knobs.

    No parameter, buffer, mode or global random state changes. Bad values raise InputError.
    """
    prompts, flat = read_prompts(prompt_ids, model.config.vocab_size)
    for step in _steps(model, prompts, max_new_tokens, temperature, top_p, top_k, seed, stop, depth, think):
        for row, token in zip(step.rows, step.ids, strict=True):
            prompts[row].append(token)
    return prompts[0] if flat else prompts


def generate_stream(
    model: Lepton,
    prompt_ids: Prompt,
    max_new_tokens: int = 100,
    temperature: float = 0.8,
    top_p: float = 0.9,
    top_k: int | None = None,
    use_speculative: bool = True,
    seed: int | None = None,
    stop: Any = None,
    depth: float | None = None,
    think: int | None = None,
) -> Iterator[int]:
    """Return an iterator over the new tokens of one prompt, each as soon as it is known.

    The arguments are those of `generate`, and so are the tokens; bad values raise at the call. It may be left early.
    """
    prompts, flat = read_prompts(prompt_ids, model.config.vocab_size)
    if not flat:
        raise InputError(f"generate_stream follows one prompt, not a list of {len(prompts)}; use generate for a batch")
    steps = _steps(model, prompts, max_new_tokens, temperature, top_p, top_k, seed, stop, depth, think)
    return (step.ids[0] for step in steps)


def generate_with_uncertainty(
    model: Lepton,
    prompt_ids: Prompt,
    max_new_tokens: int = 100,
    temperature: float = 0.8,
    top_p: float = 0.9,
    top_k: int | None = None,
    use_speculative: bool = True,
    seed: int | None = None,
    stop: Any = None,
    depth: float | None = None,
    think: int | None = None,
) -> tuple[Any, Any]:
    """Return what `generate` returns, and for each new token a number in 0..1: how unsure the model is of it.

    The number is one minus the probability that the model itself gives the token (at temperature 1, before top-k and
    top-p). It is not a calibrated chance of being wrong: the uncertainty head that learns that is not in the model yet.
    For a list of prompts both are lists of lists.
    """
    prompts, flat = read_prompts(prompt_ids, model.config.vocab_size)
    doubts: list[list[float]] = [[] for _ in prompts]
    for step in _steps(model, prompts, max_new_tokens, temperature, top_p, top_k, seed, stop, depth, think):
        p_RV = probabilities(step.logits_RV, temperature=1.0)
        p_R = p_RV.gather(-1, torch.tensor(step.ids, device=p_RV.device)[:, None])[:, 0]
        for row, token, p in zip(step.rows, step.ids, p_R.tolist(), strict=True):
            prompts[row].append(token)
            doubts[row].append(min(1.0, max(0.0, 1.0 - p)))
    return (prompts[0], doubts[0]) if flat else (prompts, doubts)


def _steps(
    model: Lepton,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    temperature: float,
    top_p: float,
    top_k: int | None,
    seed: int | None,
    stop: Any,
    depth: float | None,
    think: int | None,
) -> Iterator[Step]:
    """Check every value now, and return the iterator that computes."""
    if max_new_tokens < 0:
        raise InputError(f"max_new_tokens={max_new_tokens}: must be at least 0")
    check_sampling(temperature, top_p, top_k)
    stops = [[model.config.eos_id], *read_stops(stop, model.config.vocab_size)]
    seed = secrets.randbits(64) if seed is None else seed
    streams = [random_stream(seed, row) for row in range(len(prompts))]

    @torch.no_grad()
    def decode() -> Iterator[Step]:
        if max_new_tokens == 0:
            return
        new: list[list[int]] = [[] for _ in prompts]
        rows = list(range(len(prompts)))
        hidden_RD, state = _prefill(model, prompts, depth, think)
        while True:
            logits_RV = model.head(hidden_RD)
            if not torch.isfinite(logits_RV).all():
                raise InputError("the model's logits are not finite: its training diverged; use an earlier checkpoint")
            p_RV = probabilities(logits_RV, temperature=temperature, top_p=top_p, top_k=top_k)
            ids = sample(p_RV, [streams[row].random() for row in rows])
            for row, token in zip(rows, ids, strict=True):
                new[row].append(token)
            yield Step(rows, ids, logits_RV)
            running = [i for i, row in enumerate(rows) if not _ended(new[row], stops, max_new_tokens)]
            if not running:
                return
            if len(running) < len(rows):
                state = state.rows(torch.tensor(running, device=hidden_RD.device))
            rows, ids = [rows[i] for i in running], [ids[i] for i in running]
            out = model.trunk(torch.tensor(ids, device=hidden_RD.device)[:, None], state, depth=depth, think=think)
            hidden_RD, state = out.hidden_BTD[:, -1], out.state

    return decode()


def _prefill(
    model: Lepton, prompts: Sequence[Sequence[int]], depth: float | None, think: int | None
) -> tuple[Tensor, State]:
    """Read the prompts, PREFILL_CHUNK tokens at a time; return each row's last hidden state [B, D] and the state.

    Shorter rows are padded on the right; a row that has ended idles with length 0.
    """
    device = model.embed.weight.device
    state: State | None = None
    last_BD = torch.zeros(len(prompts), model.config.width, dtype=model.dtype, device=device)
    for start in range(0, max(map(len, prompts)), PREFILL_CHUNK):
        parts = [prompt[start : start + PREFILL_CHUNK] for prompt in prompts]
        widest = max(map(len, parts))
        tokens_BT = torch.tensor([[*part, *[0] * (widest - len(part))] for part in parts], device=device)
        lengths_B = torch.tensor([len(part) for part in parts], device=device)
        out = model.trunk(tokens_BT, state, lengths=lengths_B, depth=depth, think=think)
        state = out.state
        end_BD = out.hidden_BTD[torch.arange(len(prompts), device=device), (lengths_B - 1).clamp(min=0)]
        last_BD = torch.where((lengths_B > 0)[:, None], end_BD, last_BD)
    assert state is not None, "prompts are not empty"
    return last_BD, state


def _ended(new: Sequence[int], stops: Sequence[Sequence[int]], max_new_tokens: int) -> bool:
    return len(new) >= max_new_tokens or any(new[-len(stop) :] == stop for stop in stops)
