"""A generation: read the prompts in chunks, then draft tokens, verify them in one pass, and keep what stands.

Nothing is computed twice. Decoding one token at a time is the same cycle with no drafts.

Shapes: B rows of the call, A rows still running, Y drafts, T = Y + 1 tokens of a verification, D width, V vocabulary.
"""

import secrets
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lepton.errors import InputError, shown
from lepton.generate.acceptance import Verdict, accept
from lepton.generate.drafting import Drafts, draft, no_drafts
from lepton.generate.prompts import Prompt, read_prompts, read_stops
from lepton.generate.sampling import check_sampling, probabilities, random_stream
from lepton.generate.stats import Stats
from lepton.model import Lepton, Memory, State
from lepton.model.checks import SEEDS, whole
from lepton.model.entry import check_state, checked_call

PREFILL_CHUNK = 1024
"""Prompt tokens computed at once: bounds the memory of a long prompt."""


class NotFiniteError(InputError):
    """The model gives no numbers: its training diverged, or its weights are damaged."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """How to generate; `lepton.generate.generate` says what each means."""

    max_new_tokens: int = 100
    temperature: float = 0.8
    top_p: float = 0.9
    top_k: int | None = None
    use_speculative: bool = True
    seed: int | None = None
    stop: Any = None
    depth: float | None = None
    think: int | None = None
    uncertainty: bool = False
    """Whether to compute the uncertainty of each new token."""

    def __post_init__(self) -> None:
        whole("max_new_tokens", self.max_new_tokens, 0)
        check_sampling(self.temperature, self.top_p, self.top_k)
        if self.seed is not None:
            whole("seed", self.seed, *SEEDS)
        for name in ("use_speculative", "uncertainty"):
            if not isinstance(getattr(self, name), bool):
                raise InputError(f"{name}={shown(getattr(self, name))}: must be True or False")


class News(NamedTuple):
    """What a cycle gave one row."""

    row: int
    tokens: list[int]
    uncertainties: list[float]
    """One for each token if they were asked for, else empty."""


class Chunk(NamedTuple):
    """What the trunk made of the newest tokens of each row, the last of which predict the next."""

    hidden_ATD: Tensor
    signals_AT3: Tensor
    blocks_AT: Tensor
    """Blocks that the tokens went through; of a prompt, the sum over its tokens."""
    commit: Callable[[Tensor], State]
    """The state after the first token and that many drafts."""


class Cycle(NamedTuple):
    """The newest cycle, as far as a state follows from it."""

    rows: list[int]
    given: list[int]
    """Tokens that each row was given."""
    commit: Callable[[Tensor], State]


class Generation:
    """The continuation of some prompts. Iterating it computes, cycle by cycle; `stats` grows on the way.

    The first cycle reads the prompts. A generation is iterated once; it may be left early. `state` is there at any
    time. Bad values raise InputError here, not in the first cycle.
    """

    def __init__(
        self,
        model: Lepton,
        prompts: Prompt,
        options: Options,
        *,
        state: State | None = None,
        memory: Memory | str | Path | None = None,
    ) -> None:
        if options.uncertainty and model.idea("uncertainty") is None:
            raise InputError(
                "this model has no uncertainty head: use generate, or a model whose config has uncertainty=True"
            )
        self.model, self.options = model, options
        self.prompts, self.flat = read_prompts(prompts, model.config.vocab_size)
        """The prompts as lists, and whether the caller gave a single flat one."""
        self.stats = Stats()
        self._device = model.embed.weight.device
        rows = len(self.prompts)
        checked_call(model, rows, options.depth, options.think)
        if state is not None and memory is not None:
            raise InputError("state and memory are both given: a state has a memory of its own, so give one of them")
        if state is not None:
            check_state(model, state, rows)
        self._past = state if memory is None else model.new_state(rows, memory=memory)
        # Drafts of a cycle: always as many, so that what a seed gives does not depend on how much is asked for.
        drafter = model.idea("drafter") if options.use_speculative else None
        self._drafts = 0 if drafter is None else drafter.count
        self._stops = [[model.config.eos_id], *read_stops(options.stop, model.config.vocab_size)]
        seed = secrets.randbits(64) if options.seed is None else options.seed
        self._streams = [random_stream(seed, row) for row in range(rows)]
        self._distribution = partial(
            probabilities, temperature=options.temperature, top_p=options.top_p, top_k=options.top_k
        )
        self._pass = partial(model.trunk, depth=options.depth, think=options.think)
        self._new: list[list[int]] = [[] for _ in self.prompts]
        self._first: Chunk | None = None
        """What the prompts gave, if a state was asked for before the first token."""
        self._cycle: Cycle | None = None
        self._left: dict[int, State] = {}
        """States of the rows that ended before the newest cycle."""

    @property
    def state(self) -> State:
        """What the model has read: what came before, the prompts, and all new tokens but the last.

        The last one was drawn, but no pass has seen it. Put it before the next prompt, or give it alone to go on with
        the same text.
        """
        return self.state_without(0)

    @torch.no_grad()
    def state_without(self, rest: int) -> State:
        """Return `state` as if the last `rest` tokens of the newest cycle had not been drawn."""
        if self._cycle is None:
            self._first = self._prefill()
        assert self._cycle is not None, "reading the prompts is the first cycle"
        rows, given, commit = self._cycle
        state = commit(torch.tensor([count - 1 - rest for count in given], device=self._device))
        if not self._left:
            return state
        parts = self._left | {row: state.rows(torch.tensor([i], device=self._device)) for i, row in enumerate(rows)}
        return State.join([parts[row] for row in range(len(self.prompts))])

    @torch.no_grad()
    def __iter__(self) -> Iterator[list[News]]:
        rows = list(range(len(self.prompts)))
        if self.options.max_new_tokens == 0:
            return
        draws, chunk = self._draws(rows), self._first or self._prefill()
        self._first = None
        drafts = no_drafts(len(rows), self.model.config.vocab_size, self._device)
        while True:
            logits_ATV = self.model.head(chunk.hidden_ATD)
            trials_AY = draws[:, self._drafts : self._drafts + drafts.ids_AY.shape[1]]
            verdict = accept(self._distribution(logits_ATV), drafts.q_AYV, drafts.ids_AY, trials_AY, draws[:, -1])
            cycle = self._hand_out(rows, chunk, logits_ATV, drafts, verdict)
            given = [len(each.tokens) for each in cycle]
            self._cycle = Cycle(rows, given, chunk.commit)
            yield cycle

            index = [i for i, row in enumerate(rows) if not self._ended(row)]
            if not index:
                return
            state = chunk.commit(torch.tensor([count - 1 for count in given], device=self._device))
            for i in set(range(len(rows))) - set(index):
                self._left[rows[i]] = state.rows(torch.tensor([i], device=self._device))
            rows = [rows[i] for i in index]
            index_A = torch.tensor(index, device=self._device)
            token_A = verdict.next_A[index_A]
            hidden_AD = chunk.hidden_ATD[index_A, verdict.accepted_A[index_A]]

            draws = self._draws(rows)
            if self._drafts:
                drafts = draft(self.model, hidden_AD, token_A, draws[:, : self._drafts], self._distribution)
            else:
                drafts = no_drafts(len(rows), self.model.config.vocab_size, self._device)
            chunk = self._verify(torch.cat([token_A[:, None], drafts.ids_AY], 1), state.rows(index_A))

    def _prefill(self) -> Chunk:
        """Read the prompts, PREFILL_CHUNK tokens at a time; the result is about each row's last token.

        It opens a segment: the thoughts of the answer start from the whole question. A prompt of one token opens none:
        behind a state it goes on with the text that ended there, and a fresh past opens one anyway. Shorter rows are
        padded on the right; a row that has ended idles with length 0.
        """
        rows_B = torch.arange(len(self.prompts), device=self._device)
        filler = int(self.model.config.eos_id == 0)  # the end of a document would open segments in the padding
        state = self._past
        last: list[Tensor] = []
        blocks_B = torch.zeros_like(rows_B)
        question_B = torch.tensor([len(prompt) > 1 for prompt in self.prompts], device=self._device)
        longest = max(map(len, self.prompts))
        for start in range(0, longest, PREFILL_CHUNK):
            width = min(PREFILL_CHUNK, longest - start)
            parts = [prompt[start : start + width] for prompt in self.prompts]
            tokens_BT = torch.tensor([[*part, *[filler] * (width - len(part))] for part in parts], device=self._device)
            lengths_B = torch.tensor([len(part) for part in parts], device=self._device)
            ends_B = torch.tensor([0 <= len(p) - start - 1 < width for p in self.prompts], device=self._device)
            index_T = torch.arange(width, device=self._device)
            opens_BT = (index_T == lengths_B[:, None] - 1) & (ends_B & question_B)[:, None]
            out = self._pass(tokens_BT, state, lengths=lengths_B, opens=opens_BT)
            state = out.state
            at_B = (lengths_B - 1).clamp(min=0)
            found = out.hidden[rows_B, at_B], out.signals[rows_B, at_B]
            last = [torch.where(ends_B[:, None], *pair) for pair in zip(found, last or found, strict=True)]
            blocks_B += (out.depth * (index_T < lengths_B[:, None])).sum(1)
            self.stats.forward_calls += 1
        assert state is not None, "prompts are not empty"
        read = state
        # Each row's last token is counted with what it predicts.
        self.stats.positions += sum(map(len, self.prompts)) - len(self.prompts)
        self._cycle = Cycle(list(range(len(self.prompts))), [1] * len(self.prompts), lambda _accepted_A: read)
        return Chunk(last[0][:, None], last[1][:, None], blocks_B[:, None], lambda _accepted_A: read)

    def _verify(self, tokens_AT: Tensor, state: State) -> Chunk:
        """Pass the newest tokens and their drafts through the model."""
        out = self._pass(tokens_AT, state)
        self.stats.forward_calls += 1
        return Chunk(out.hidden, out.signals, out.depth, lambda accepted_A: out.commit(1 + accepted_A))

    def _hand_out(
        self,
        rows: Sequence[int],
        chunk: Chunk,
        logits_ATV: Tensor,
        drafts: Drafts,
        verdict: Verdict,
    ) -> list[News]:
        """Fetch the outcome from the device, cut it where a row ends, and count."""
        ids_AT = torch.cat([drafts.ids_AY, verdict.next_A[:, None]], 1)
        ids_AT = ids_AT.scatter(1, verdict.accepted_A[:, None], verdict.next_A[:, None])
        finite_A = logits_ATV.isfinite().all(-1).all(-1) & drafts.q_AYV.isfinite().all(-1).all(-1)
        blocks_A = chunk.blocks_AT.sum(1)
        # The one place of a cycle that waits for the device.
        outcomes = torch.cat([ids_AT, torch.stack([verdict.accepted_A, blocks_A, finite_A.long()], 1)], 1).tolist()
        uncertainties: list[list[float]] = [[] for _ in rows]
        if self.options.uncertainty:
            assert self.model.idea("uncertainty") is not None, "the constructor asked"
            uncertainties = self.model.idea("uncertainty")(chunk.hidden_ATD, logits_ATV, chunk.signals_AT3).tolist()

        news = []
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
                self.stats.add_cycle(len(tokens), drafted=drafts.ids_AY.shape[1], accepted=accepted)
            news.append(News(row, tokens, unsure[: len(tokens)]))
        return news

    def _ended(self, row: int) -> bool:
        new = self._new[row]
        return len(new) >= self.options.max_new_tokens or any(new[-len(stop) :] == stop for stop in self._stops)

    def _draws(self, rows: Sequence[int]) -> Tensor:
        """Uniform numbers for a cycle: Y to draft by, Y to accept by, and one for the token behind [A, 2 * Y + 1].

        Y is what the model drafts at most, so that what a row draws depends on nothing but itself.
        """
        count = 2 * self._drafts + 1
        draws = [[self._streams[row].random() for _ in range(count)] for row in rows]
        return torch.tensor(draws, dtype=torch.float64, device=self._device)
