"""The engine: each step schedules a cycle, launches it, and reads the one before.

A GPU thus always has work while the host reads, and what the host knows is one cycle old. A CPU computes nothing beside
its host, so there a step reads what it has launched.
"""

import time
from collections import deque
from dataclasses import dataclass
from typing import NamedTuple

from lepton.engine.runner import Results, Runner, Running, TokenLogprobs
from lepton.engine.scheduler import Launch, Prefill, Scheduler
from lepton.engine.sequence import Sequence
from lepton.engine.speculation import Speculation, bucket_of
from lepton.engine.stats import Stats
from lepton.errors import InputError


class NotFiniteError(InputError):
    """The model gives no numbers: its training diverged, or its weights are damaged."""


class SequenceOutput(NamedTuple):
    """New tokens of one sequence, from one cycle."""

    sequence: Sequence
    tokens: list[int]
    uncertainties: list[float]
    """One for each token if they were asked for, else empty."""
    logprobs: list[TokenLogprobs]
    """For each token its log-probability and those of the most probable ones by id, if they were asked for."""
    depths: list[int]
    """Blocks that were passed where each token was chosen, if log-probabilities were asked for."""
    drafted: int
    """Tokens that were drafted in this cycle."""
    accepted: int
    """Drafts that were right: so many of `tokens`, from the first on, are drafts."""


@dataclass
class Work:
    """What has been launched."""

    plan: Prefill | Launch
    indices: list[int]
    """The sequences of the plan that it is about."""
    running: Running
    since: float
    """When it was launched, in seconds."""


class Engine:
    """Generates for many sequences at once. They join and leave between cycles; each is as it would be alone."""

    def __init__(
        self,
        runner: Runner,
        *,
        stats: Stats | None = None,
        speculation: Speculation | None = None,
        ahead: int | None = None,
    ) -> None:
        """Make an engine that uses `runner` alone.

        Args:
            runner: the model on its device.
            stats: what is counted is added here.
            speculation: decides how many tokens are drafted; None: by what the runner has measured so far, apart for
                depth 1 and for depths below, whose passes take another time.
            ahead: number of cycles that are launched before one is read; None: 1 on a GPU, else 0.
        """
        self.runner, self.stats = runner, stats or Stats()
        self._speculations = speculation or runner.speculation, speculation or runner.routed_speculation
        self._scheduler = Scheduler(
            runner.places,
            runner.model.config.segment,
            rounds=runner.rounds,
            drafts=self._choose_drafts,
            together=runner.together,
        )
        self._ahead = int(runner.model.device.type == "cuda") if ahead is None else ahead
        self._launched: deque[list[Work]] = deque()
        self._read_at = 0.0

    def add(self, sequence: Sequence) -> None:
        """Let a sequence wait for a place."""
        self._scheduler.add(sequence)

    def cancel(self, sequence: Sequence) -> None:
        """End a sequence; its place is free once the passes that it is in have been read."""
        self._scheduler.cancel(sequence)

    @property
    def idle(self) -> bool:
        """Whether nothing is left to do."""
        return not (self._scheduler.waiting or self._scheduler.running or self._launched)

    def close(self) -> None:
        """End all sequences, and wait for the passes that they are in."""
        for sequence in self._scheduler.sequences:
            self.cancel(sequence)
        while self._launched:
            for work in self._launched.popleft():
                self._finish(work)

    def step(self) -> list[SequenceOutput]:
        """Launch a cycle, and return the outcome of one: on a GPU of the one before, which may be nothing."""
        prefill = self._scheduler.admit()
        works = []
        if prefill.sequences:
            since = time.perf_counter()
            works += [Work(prefill, *each, since) for each in self.runner.prefill(prefill)]
        if self._ahead or not works:  # without a lag, what the prompts gave is known before the next cycle
            for launch in self._scheduler.launches():
                since = time.perf_counter()
                works.append(Work(launch, [*range(len(launch.sequences))], self.runner.launch(launch), since))
        if works:
            self._launched.append(works)
        if self._launched and (len(self._launched) > self._ahead or not works):
            return [output for work in self._launched.popleft() for output in self._finish(work)]
        return []

    def _finish(self, work: Work) -> list[SequenceOutput]:
        results = work.running.read()
        now = time.perf_counter()
        seconds, self._read_at = now - max(work.since, self._read_at), now
        sequences = [work.plan.sequences[i] for i in work.indices]
        running = [each.reason is None for each in sequences]
        if not all(results.finite) and any(on and not row for on, row in zip(running, results.finite, strict=True)):
            raise NotFiniteError("the model's logits are not finite: its training diverged")
        counted = self._scheduler.finish(sequences, results.tokens)
        self._count(work, sequences, results, counted)
        if isinstance(work.plan, Launch):
            tokens_read = sum(len(new) for new, on in zip(results.tokens, running, strict=True) if on)
            bucket = bucket_of(len(sequences))
            self._speculations[work.plan.routed].record(bucket, work.plan.drafts, seconds, tokens_read, sum(running))
        outputs = []
        rows = zip(sequences, counted, results.allowed, results.accepted, strict=True)
        for i, (sequence, tokens, drafted, accepted) in enumerate(rows):
            if not (count := len(tokens)):
                continue
            accepted = min(accepted, count)  # the text may have ended within the drafts that were right
            if results.details is None:
                outputs.append(SequenceOutput(sequence, tokens, [], [], [], drafted, accepted))
            else:
                outputs.append(SequenceOutput(sequence, tokens, *results.details[i].first(count), drafted, accepted))
        return outputs

    def _count(self, work: Work, sequences: list[Sequence], results: Results, counted: list[list[int]]) -> None:
        stats, lengths = self.stats, [*map(len, counted)]
        stats.forward_calls += work.running.passes
        stats.blocks += sum(results.blocks)
        stats.new_tokens += sum(lengths)
        if isinstance(work.plan, Launch):
            stats.positions += work.running.positions * len(sequences)
            stats.add_steps(zip(lengths, results.allowed, results.accepted, strict=True))
        else:
            stats.positions += sum(len(each.prompt) for each in sequences)

    def _choose_drafts(self, rows: int, routed: bool) -> int:
        return self._speculations[routed].choose(bucket_of(rows)) if self.runner.drafts else 0
