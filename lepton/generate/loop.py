"""The decoding loop: read the prompts in chunks, then draft tokens, verify them in one pass, keep the accepted ones.

Nothing is computed twice. Decoding one token at a time is the same step with no drafts. A state is a value that no pass
changes, so a rejected draft needs no code: the next state is that after the accepted tokens only.

Shapes: B rows of the call, A rows still running, Y drafts, T = Y + 1 tokens of a verification, D width, V vocabulary.
"""

import secrets
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from lepton.engine.options import GenerationOptions
from lepton.errors import InputError
from lepton.generate.acceptance import Acceptance, accept
from lepton.generate.drafting import Drafts, draft, no_drafts
from lepton.generate.prompts import Prompt, read_prompts, read_stops
from lepton.generate.sampling import probabilities, random_stream
from lepton.generate.stats import Stats
from lepton.model import Memory, Network, State
from lepton.model.arguments import checked_call
from lepton.model.fresh_state import check_state

PREFILL_CHUNK = 1024
"""Prompt tokens computed at once: bounds the memory of a long prompt."""


class NotFiniteError(InputError):
    """The model gives no numbers: its training diverged, or its weights are damaged."""


class RowOutput(NamedTuple):
    """New tokens of one row, from one step."""

    row: int
    tokens: list[int]
    uncertainties: list[float]
    """One for each token if they were asked for, else empty."""


class Verified(NamedTuple):
    """Outputs of the trunk that the next tokens are drawn from: for the prompt, or the newest token and its drafts."""

    hidden_ATD: Tensor
    signals_AT3: Tensor
    blocks_AT: Tensor
    """Blocks that the tokens went through; of a prompt, the sum over its tokens."""
    commit_accepted: Callable[[Tensor], State]
    """The state after the first token and that many drafts."""


class Step(NamedTuple):
    """What is needed to compute the state after the newest step."""

    rows: list[int]
    counts: list[int]
    """New tokens of each row."""
    commit_accepted: Callable[[Tensor], State]


class Generation:
    """The continuation of some prompts. Iterating it computes, step by step; `stats` grows on the way.

    The first step reads the prompts. A generation is iterated once; it may be left early. `state` is there at any
    time. Bad values raise InputError here, not in the first step. `uncertainty` says whether to compute that of each
    new token.
    """

    def __init__(
        self,
        model: Network,
        prompts: Prompt,
        options: GenerationOptions,
        *,
        state: State | None = None,
        memory: Memory | str | Path | None = None,
        uncertainty: bool = False,
    ) -> None:
        if uncertainty and model.idea("uncertainty") is None:
            raise InputError(
                "this model has no uncertainty head: use generate, or a model whose config has uncertainty=True"
            )
        self.model, self.options, self._uncertainty = model, options, uncertainty
        self.prompts, self.flat = read_prompts(prompts, model.config.vocab_size)
        """The prompts as lists, and whether the caller gave a single flat one."""
        self.stats = Stats()
        self._device = model.device
        rows = len(self.prompts)
        checked_call(model, rows, options.depth, options.think)
        if state is not None and memory is not None:
            raise InputError("state and memory are both given: a state has a memory of its own, so give one of them")
        if state is not None:
            check_state(model, state, rows)
        self._past = state if memory is None else model.new_state(rows, memory=memory)
        # Every step drafts the same number of tokens, so the text of a seed does not depend on `max_new_tokens`.
        drafter = model.idea("drafter") if options.use_speculative else None
        self._drafts = 0 if drafter is None else drafter.count
        self._stops = [[model.config.eos_id], *read_stops(options.stop, model.config.vocab_size)]
        seed = secrets.randbits(64) if options.seed is None else options.seed
        self._streams = [random_stream(seed, row) for row in range(rows)]
        self._pass = partial(model.trunk, depth=options.depth, think=options.think)
        self._new: list[list[int]] = [[] for _ in self.prompts]
        self._prefilled: Verified | None = None
        """The result of reading the prompts, if a state was asked for before the first token."""
        self._step: Step | None = None
        self._ended_states: dict[int, State] = {}
        """States of the rows that ended before the newest step."""

    @property
    def state(self) -> State:
        """What the model has read: what came before, the prompts, and all new tokens but the last.

        The last one was drawn, but no pass has read it. Put it before the next prompt, or give only it to continue the
        same text.
        """
        return self.state_without(0)

    @torch.no_grad()
    def state_without(self, unused: int) -> State:
        """Return `state` as if the last `unused` tokens of the newest step had not been drawn."""
        if self._step is None:
            self._prefilled = self._prefill()
        assert self._step is not None, "reading the prompts is the first step"
        rows, counts, commit_accepted = self._step
        state = commit_accepted(torch.tensor([count - 1 - unused for count in counts], device=self._device))
        if not self._ended_states:
            return state
        running = {row: state.rows(torch.tensor([i], device=self._device)) for i, row in enumerate(rows)}
        parts = self._ended_states | running
        return State.join([parts[row] for row in range(len(self.prompts))])

    @torch.no_grad()
    def __iter__(self) -> Iterator[list[RowOutput]]:
        rows = list(range(len(self.prompts)))
        if self.options.max_new_tokens == 0:
            return
        draws, verified = self._draws(rows), self._prefilled or self._prefill()
        self._prefilled = None
        drafts = no_drafts(len(rows), self.model.config.vocab_size, self._device)
        while True:
            logits_ATV = self.model.head(verified.hidden_ATD)
            uniforms_AY = draws[:, self._drafts : self._drafts + drafts.ids_AY.shape[1]]
            p_ATV = self._distribution(logits_ATV)
            acceptance = accept(p_ATV, drafts.q_AYV, drafts.ids_AY, uniforms_AY, draws[:, -1])
            outputs = self._outputs(rows, verified, logits_ATV, drafts, acceptance)
            counts = [len(each.tokens) for each in outputs]
            self._step = Step(rows, counts, verified.commit_accepted)
            yield outputs

            index = [i for i, row in enumerate(rows) if not self._ended(row)]
            if not index:
                return
            state = verified.commit_accepted(torch.tensor([count - 1 for count in counts], device=self._device))
            for i in set(range(len(rows))) - set(index):
                self._ended_states[rows[i]] = state.rows(torch.tensor([i], device=self._device))
            rows = [rows[i] for i in index]
            index_A = torch.tensor(index, device=self._device)
            token_A = acceptance.next_A[index_A]
            hidden_AD = verified.hidden_ATD[index_A, acceptance.accepted_A[index_A]]

            draws = self._draws(rows)
            if self._drafts:
                drafts = draft(self.model, hidden_AD, token_A, draws[:, : self._drafts], self._distribution)
            else:
                drafts = no_drafts(len(rows), self.model.config.vocab_size, self._device)
            verified = self._verify(torch.cat([token_A[:, None], drafts.ids_AY], 1), state.rows(index_A))

    def _prefill(self) -> Verified:
        """Read the prompts, PREFILL_CHUNK tokens at a time; the result is about each row's last token.

        The last prompt token opens a segment, so that the thoughts before the new tokens have seen the whole prompt. A
        prompt of one token opens none: after a given state it continues that text, and a fresh state opens one anyway.
        Shorter rows are padded on the right; a row whose prompt has ended gets length 0.
        """
        rows_B = torch.arange(len(self.prompts), device=self._device)
        filler = int(self.model.config.eos_id == 0)  # padding must not be eos_id, which would open segments
        state = self._past
        last: list[Tensor] = []
        blocks_B = torch.zeros_like(rows_B)
        multi_token_B = torch.tensor([len(prompt) > 1 for prompt in self.prompts], device=self._device)
        longest = max(map(len, self.prompts))
        for start in range(0, longest, PREFILL_CHUNK):
            width = min(PREFILL_CHUNK, longest - start)
            parts = [prompt[start : start + width] for prompt in self.prompts]
            tokens_BT = torch.tensor([[*part, *[filler] * (width - len(part))] for part in parts], device=self._device)
            lengths_B = torch.tensor([len(part) for part in parts], device=self._device)
            ends_B = torch.tensor([0 <= len(p) - start - 1 < width for p in self.prompts], device=self._device)
            index_T = torch.arange(width, device=self._device)
            opens_BT = (index_T == lengths_B[:, None] - 1) & (ends_B & multi_token_B)[:, None]
            out = self._pass(tokens_BT, state, lengths=lengths_B, opens=opens_BT)
            state = out.state
            at_B = (lengths_B - 1).clamp(min=0)
            found = out.hidden[rows_B, at_B], out.signals[rows_B, at_B]
            last = [torch.where(ends_B[:, None], *pair) for pair in zip(found, last or found, strict=True)]
            blocks_B += (out.depth * (index_T < lengths_B[:, None])).sum(1)
            self.stats.forward_calls += 1
        assert state is not None, "prompts are not empty"
        after_prompt = state
        # Each row's last token is counted with what it predicts.
        self.stats.positions += sum(map(len, self.prompts)) - len(self.prompts)
        self._step = Step(list(range(len(self.prompts))), [1] * len(self.prompts), lambda _accepted_A: after_prompt)
        return Verified(last[0][:, None], last[1][:, None], blocks_B[:, None], lambda _accepted_A: after_prompt)

    def _verify(self, tokens_AT: Tensor, state: State) -> Verified:
        """Pass the newest tokens and their drafts through the model."""
        out = self._pass(tokens_AT, state)
        self.stats.forward_calls += 1
        return Verified(out.hidden, out.signals, out.depth, lambda accepted_A: out.commit(1 + accepted_A))

    def _outputs(
        self,
        rows: Sequence[int],
        verified: Verified,
        logits_ATV: Tensor,
        drafts: Drafts,
        acceptance: Acceptance,
    ) -> list[RowOutput]:
        """Fetch the new tokens from the device, cut them where a row ends, and count."""
        ids_AT = torch.cat([drafts.ids_AY, acceptance.next_A[:, None]], 1)
        ids_AT = ids_AT.scatter(1, acceptance.accepted_A[:, None], acceptance.next_A[:, None])
        finite_A = logits_ATV.isfinite().all(-1).all(-1) & drafts.q_AYV.isfinite().all(-1).all(-1)
        blocks_A = verified.blocks_AT.sum(1)
        # One transfer from the device for all integers of the step.
        outcomes = torch.cat([ids_AT, torch.stack([acceptance.accepted_A, blocks_A, finite_A.long()], 1)], 1).tolist()
        uncertainties: list[list[float]] = [[] for _ in rows]
        if self._uncertainty:
            head = self.model.idea("uncertainty")
            uncertainties = head(verified.hidden_ATD, logits_ATV, verified.signals_AT3).tolist()

        outputs = []
        for row, (*ids, accepted, blocks, finite), unsure in zip(rows, outcomes, uncertainties, strict=True):
            if not finite:
                raise NotFiniteError("the model's logits are not finite: its training diverged")
            self.stats.positions += len(ids)
            self.stats.blocks += blocks
            from_prompt, tokens = not self._new[row], []
            for token in ids[: accepted + 1]:
                tokens.append(token)
                self._new[row].append(token)
                if self._ended(row):
                    break
            self.stats.new_tokens += len(tokens)
            if not from_prompt:
                self.stats.add_step(len(tokens), drafted=drafts.ids_AY.shape[1], accepted=accepted)
            outputs.append(RowOutput(row, tokens, unsure[: len(tokens)]))
        return outputs

    def _distribution(self, logits: Tensor) -> Tensor:
        return probabilities(logits, **self.options.distribution())

    def _ended(self, row: int) -> bool:
        new = self._new[row]
        return len(new) >= self.options.max_new_tokens or any(new[-len(stop) :] == stop for stop in self._stops)

    def _draws(self, rows: Sequence[int]) -> Tensor:
        """Uniform numbers for a step: Y to draft, Y to accept, and one to draw the token after them, [A, 2 * Y + 1].

        Y is the largest number of drafts of the model, so that what a row draws depends only on the row itself.
        """
        count = 2 * self._drafts + 1
        draws = [[self._streams[row].random() for _ in range(count)] for row in rows]
        return torch.tensor(draws, dtype=torch.float64, device=self._device)
