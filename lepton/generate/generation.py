"""The continuation of some prompts: sequences of one engine, and what they have read."""

import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple, TypedDict, Unpack

from lepton.engine.engine import Engine, SequenceOutput
from lepton.engine.options import GenerationOptions
from lepton.engine.prefill import read_on, read_prompts
from lepton.engine.runner import TokenLogprobs
from lepton.engine.runners import Lease
from lepton.engine.sequence import Sequence
from lepton.engine.speculation import Always
from lepton.engine.stats import Stats
from lepton.errors import InputError
from lepton.generate.abstention import largest_kept, promise_of
from lepton.generate.budgets import budgeted
from lepton.generate.prompts import Prompt, read_stops
from lepton.generate.prompts import read_prompts as checked_prompts
from lepton.model import Memory, Network, State
from lepton.model.arguments import checked_call
from lepton.model.fresh_state import check_state
from lepton.ops.choose import stream_words
from lepton.values import depth_rule

MOST_AT_ONCE = 1024
"""Sequences that run at once; more wait for a place."""


class Wanted(TypedDict, total=False):
    """What a generation is to compute beside the tokens."""

    uncertainty: bool
    """Whether to compute that of each new token; by default not."""
    logprobs: int | None
    """Number of most probable tokens whose log-probabilities are wanted, beside that of each new token; None: none."""
    always_draft: bool
    """Whether every cycle drafts, also where plain decoding is faster; the text is the same. By default not."""
    abstain_at: float | None
    """A calibrated risk, to know which new tokens the model abstains from."""


class RowOutput(NamedTuple):
    """New tokens of one row, from one cycle."""

    row: int
    tokens: list[int]
    uncertainties: list[float]
    """One for each token if they were asked for, else empty."""
    logprobs: list[TokenLogprobs]
    """Likewise: the log-probability of each token, and those of the most probable ones by id."""
    abstained: list[bool]
    """Likewise: whether the model abstains from it."""


class Generation:
    """The continuation of some prompts. Iterating it computes, cycle by cycle; `stats` grows on the way.

    A generation is iterated once; it may be left early. `state` is there at any time. Bad values raise InputError here,
    not in the first cycle.
    """

    def __init__(
        self,
        model: Network,
        prompts: Prompt,
        options: GenerationOptions,
        *,
        state: State | None = None,
        memory: Memory | str | Path | None = None,
        **wanted: Unpack[Wanted],
    ) -> None:
        """Prepare to continue `prompts`.

        Args:
            model: what generates.
            prompts: token ids of one text or of several.
            options: how to generate.
            state: a past to continue from, with a row for each prompt.
            memory: what a new text remembers of earlier ones.
            wanted: what to compute beside the tokens.
        """
        uncertainty, abstain_at = wanted.get("uncertainty", False), wanted.get("abstain_at")
        if uncertainty and model.idea("uncertainty") is None:
            raise InputError(
                "this model has no uncertainty head: use generate, or a model whose config has uncertainty=True"
            )
        self.promise = None if abstain_at is None else promise_of(model, abstain_at, options)
        """What is promised of the new tokens that are not abstained from."""
        self.largest_kept = None if self.promise is None else largest_kept(model, self.promise)
        """Tokens of a larger uncertainty are abstained from."""
        uncertainty = uncertainty or self.promise is not None
        options = budgeted(model, options)
        self.model, self.options = model, options
        self.prompts, self.flat = checked_prompts(prompts, model.config.vocab_size)
        """The prompts as lists, and whether the caller gave a single flat one."""
        checked_call(model, len(self.prompts), options.depth, options.think)
        past = _past(model, len(self.prompts), state, memory)
        stops = [[model.config.eos_id], *read_stops(options.stop, model.config.vocab_size)]
        seed = secrets.randbits(64) if options.seed is None else options.seed
        phases = [0] * len(self.prompts) if past is None else past.phase_B.tolist()
        self.stats, self._always_draft, self._past = Stats(), wanted.get("always_draft", False), past
        self._sequences = [
            Sequence(
                prompt,
                options,
                stops=stops,
                stream=stream_words(seed, row),
                uncertainty=uncertainty,
                logprobs=wanted.get("logprobs"),
                past=None if past is None else (past, row),
                past_phase=phases[row],
            )
            for row, prompt in enumerate(self.prompts)
        ]
        self._row_of = {id(sequence): row for row, sequence in enumerate(self._sequences)}
        self._lease: Lease | None = None

    def __iter__(self) -> Iterator[list[RowOutput]]:
        if self.options.max_new_tokens == 0:
            return
        before = 0 if self._past is None else int(self._past.position_B.max())
        longest = before + max(map(len, self.prompts)) + self.options.max_new_tokens
        with Lease(self.model, min(len(self.prompts), MOST_AT_ONCE), longest) as lease:
            speculation = Always(lease.runner.speculation.choices) if self._always_draft else None
            engine = Engine(lease.runner, stats=self.stats, speculation=speculation)
            for sequence in self._sequences:
                engine.add(sequence)
            try:
                while not engine.idle:
                    if outputs := [self._output(each) for each in engine.step()]:
                        yield outputs
            finally:
                engine.close()

    def _output(self, output: SequenceOutput) -> RowOutput:
        limit = self.largest_kept
        abstained = [] if limit is None else [chance > limit for chance in output.uncertainties]
        return RowOutput(self._row_of[id(output.sequence)], *output[1:4], abstained)

    @property
    def state(self) -> State:
        """What the model has read: what came before, the prompts, and all new tokens but the last.

        The last one was drawn, but no pass has read it. Put it before the next prompt, or give only it to continue the
        same text.
        """
        return self.state_without([0] * len(self.prompts))

    def state_without(self, unused: list[int]) -> State:
        """Return `state` as if the last `unused` new tokens of each row had not been drawn.

        Prompts and new tokens are read once more: the states in the engine are those of texts that may have gone on.
        """
        depth, think = depth_rule(self.options.depth), self.options.think
        state = read_prompts(self.model, self.prompts, self._past, depth=depth, think=think).state
        texts = [
            sequence.new[: max(0, len(sequence.new) - 1 - behind)]
            for sequence, behind in zip(self._sequences, unused, strict=True)
        ]
        return read_on(self.model, texts, state, depth=depth, think=think)


def _past(model: Network, rows: int, state: State | None, memory: Memory | str | Path | None) -> State | None:
    """Return the state that the prompts continue, None if they begin texts."""
    if state is not None and memory is not None:
        raise InputError("state and memory are both given: a state has a memory of its own, so give one of them")
    if state is not None:
        check_state(model, state, rows)
    return state if memory is None else model.new_state(rows, memory=memory)
