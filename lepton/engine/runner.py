"""The model on its device: it holds the pool, reads prompts into it, and runs cycles over it."""

import math
from collections.abc import Callable, Iterable
from collections.abc import Sequence as Items
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lepton.engine.cycle import Outcome, Shape, choices
from lepton.engine.cycles import TOGETHER, Cycles
from lepton.engine.lookup import appended, remembered
from lepton.engine.pool import Held, Pool, Rows
from lepton.engine.prefill import read_prompts
from lepton.engine.prepared_drafter import PreparedDrafter
from lepton.engine.scheduler import Launch, Prefill
from lepton.engine.sequence import Sequence
from lepton.engine.speculation import Speculation, bucket_of
from lepton.model import Network, State
from lepton.ops.choose import sampling_of
from lepton.values import Least

PREFILL_TOKENS = 1 << 16
"""Prompt tokens of all rows that are computed at once, padding included."""


class TokenLogprobs(NamedTuple):
    """Log-probabilities where a token was chosen: those of the model, whatever the temperature."""

    chosen: float
    """That of the token."""
    most_probable: dict[int, float]
    """Those of the most probable tokens by id, the most probable first."""


class Details(NamedTuple):
    """What was asked for beside the new tokens of a row, an entry for each; lists that nobody asked for are empty."""

    uncertainties: list[float]
    logprobs: list[TokenLogprobs]
    depths: list[int]
    """Blocks that were passed where each new token was chosen."""

    def first(self, count: int) -> "Details":
        """Return those of the first so many tokens."""
        return Details(self.uncertainties[:count], self.logprobs[:count], self.depths[:count])


@dataclass(frozen=True)
class Results:
    """What a pass gave its rows, an entry for each. Lists, since of a thousand rows each microsecond counts."""

    tokens: list[list[int]]
    """New tokens: the accepted drafts and one more."""
    accepted: list[int]
    allowed: list[int]
    """Drafts that could have been accepted."""
    blocks: list[int]
    finite: list[int]
    """1, or 0 where the logits are not finite."""
    details: list[Details] | None
    """None: no row asked for any."""


class Running:
    """A pass whose outcome has not been read. `positions` are the tokens that it computes for each row."""

    def __init__(self, outcome: Outcome, order: list[int], positions: int, passes: int = 1) -> None:
        self.positions, self.passes = positions, passes
        self._order = order
        self._on_gpu = outcome.counts.is_cuda
        parts = [None if each is None else self._to_host(each) for each in outcome]
        self._parts = Outcome(*parts)  # type: ignore[arg-type]
        self._done = torch.cuda.current_stream().record_event() if self._on_gpu else None

    def _to_host(self, value: Tensor) -> Tensor:
        if not self._on_gpu:
            return value
        host = torch.empty(value.shape, dtype=value.dtype, pin_memory=True)
        return host.copy_(value, non_blocking=True)

    def read(self) -> Results:
        """Wait for the pass; return its results, for the sequences in the order in which they were given."""
        if self._done is not None:
            self._done.synchronize()
        counts = self._parts.counts.tolist()
        rows = [counts[i] for i in self._order]
        accepted, allowed, blocks, finite = ([row[column] for row in rows] for column in range(-4, 0))
        tokens = [row[: 1 + kept] for row, kept in zip(rows, accepted, strict=True)]
        asked = any(each is not None for each in self._parts[1:])
        return Results(tokens, accepted, allowed, blocks, finite, self._details(accepted) if asked else None)

    def _details(self, accepted: list[int]) -> list[Details]:
        """Return the details of the accepted drafts and of one more token of each row."""
        doubts, scores, ids, depths = ([] if each is None else each[self._order].tolist() for each in self._parts[1:])
        found = []
        for i, kept in enumerate(accepted):
            end = 1 + kept
            rows = zip(scores[i][:end], ids[i][:end], strict=True) if scores else ()
            probable = [TokenLogprobs(own, dict(zip(best, others, strict=True))) for (own, *others), best in rows]
            found.append(Details(doubts[i][:end] if doubts else [], probable, depths[i][:end] if depths else []))
        return found


class Runner:
    """A model with a pool of `places` sequences. What it computes for a sequence depends on no other."""

    @torch.inference_mode(False)  # its tensors outlive the call, which may be in inference mode
    def __init__(self, model: Network, places: int, longest: int) -> None:
        """Allocate a pool for `places` sequences; where the model has no window, of at most `longest` tokens."""
        self.model, self.places = model, places
        self._device = model.device
        drafter = model.idea("drafter")
        self.drafts = 0 if drafter is None else drafter.count
        thoughts = model.idea("thoughts")
        self.rounds: int = 0 if thoughts is None else thoughts.rounds
        self.speculation, self.routed_speculation = (
            Speculation((0, self.drafts) if self.drafts else (0,)) for _ in range(2)
        )
        self.drafter = PreparedDrafter(model)
        remembered = model.config.remembered
        self._longest = None if remembered is not None else bucket_of(longest + 1 + self.drafts)
        on_gpu = self._device.type == "cuda"
        self.together = TOGETHER if on_gpu else None
        """Rows that share a pass whether they open a segment or not."""
        self.pool = Pool(model, places + on_gpu, self._longest or (remembered or 0) + 1 + self.drafts)
        self._cycles = Cycles(model, self.pool, places, self.drafter)
        self._made_for = self._fingerprint()

    def is_current(self) -> bool:
        """Whether the model's weights and ideas are those that it was made for."""
        return self._made_for == self._fingerprint()

    def fits(self, places: int, longest: int) -> bool:
        """Whether it can run so many sequences of so many tokens, with the model as it is now."""
        room = self._longest is None or longest + 1 + self.drafts <= self._longest
        return places <= self.places and room and self.is_current()

    @property
    def is_warm(self) -> bool:
        """Whether cycles of it were compiled, which takes long."""
        return self._cycles.are_compiled

    def refresh(self) -> None:
        """Take in the present weights."""
        self.drafter.refresh()

    def _fingerprint(self) -> tuple[object, ...]:
        """Where the weights lie, and what else a captured pass depends on."""
        model = self.model
        return (
            model.dtype,
            model.left_out,
            id(model.idea("drafter")),
            *(each.data_ptr() for each in [*model.parameters(), *model.buffers()]),
        )

    @torch.no_grad()
    def prefill(self, work: Prefill) -> list[tuple[list[int], Running]]:
        """Read the prompts of some sequences into their places; the outcome is their first tokens.

        Returns:
            Passes, each with the indices in `work.sequences` of the sequences that it is about.
        """
        found = []
        for indices in prefill_batches(work.sequences):
            sequences = [work.sequences[i] for i in indices]
            first = sequences[0].options
            past = joined_past([each.past for each in sequences])
            prompts = [each.prompt for each in sequences]
            opens = [each.opens for each in sequences]
            read = read_prompts(self.model, prompts, past, depth=sequences[0].depth, think=first.think, opens=opens)
            for row, sequence in enumerate(sequences):
                if sequence.keeps_read:
                    sequence.read = read.state.rows(torch.tensor([row], device=self._device))
            place_B = torch.tensor([work.places[i] for i in indices], device=self._device)
            rows = self._rows(sequences, read.seen_BF)
            shape = replace(wanted_shape(sequences), rows=len(sequences))
            signals = read.signals_B3[:, None] if shape.uncertainty else None
            chosen_BT, finite_B, *wanted = choices(self.model, rows, read.hidden_BD[:, None], signals, shape)
            text_BL = appended(rows.text_BL, chosen_BT, torch.ones_like(place_B))
            rows = replace(rows, token_B=chosen_BT[:, 0], text_BL=text_BL, index_B=rows.index_B + 1)
            self.pool.load(place_B, Held(read.state, rows))
            if self.pool.keeps_slots:
                self.pool.keep_slots(self.model, place_B, read.state)
            zero_B = torch.zeros_like(place_B)
            more = torch.stack([zero_B, zero_B, read.blocks_B, finite_B.long()], 1)
            depths_BT = read.depth_B[:, None] if shape.scored else None
            outcome = Outcome(torch.cat([chosen_BT, more], 1), *wanted)._replace(depths_BT=depths_BT)
            found.append((indices, Running(outcome, list(range(len(sequences))), 0, read.passes)))
        return found

    @torch.no_grad()
    def launch(self, work: Launch) -> Running:
        """Start a cycle."""
        order = sorted(range(len(work.places)), key=work.places.__getitem__)
        places = [work.places[i] for i in order]
        shape = replace(
            wanted_shape(work.sequences),
            rows=len(places),
            drafts=work.drafts,
            opening=work.opening,
            rounds=work.rounds,
            routed=work.routed,
        )
        outcome = self._cycles.run(places, shape)
        row_of = [0] * len(order)
        for row, i in enumerate(order):
            row_of[i] = row
        return Running(outcome, row_of, 1 + work.drafts)

    def warm_up(
        self,
        rows: int,
        *,
        drafts: Iterable[int] | None = None,
        routed: bool = False,
        say: Callable[[str], None] | None = None,
    ) -> None:
        """Compile the cycles of `rows` sequences, and on a GPU capture them: they run at full speed from the first on.

        It takes a minute or more for each kind of cycle. What was compiled is kept on disk (`compiled_cache`), and a
        later process loads it in seconds. On a CPU it needs a C++ compiler, and serves cycles of exactly so many rows
        at depth 1.

        Args:
            rows: sequences that run at once.
            drafts: numbers of drafts of the cycles; None: none, and as many as the drafter gives.
            routed: whether tokens may skip the deep blocks, at a depth below 1.
            say: called with a line before something is compiled or loaded.
        """
        counts = {0, self.drafts} if drafts is None else {*drafts}
        self._cycles.warm_up(rows, counts, self.rounds, routed=routed, say=say)

    def _rows(self, sequences: Items[Sequence], seen_BF: Tensor) -> Rows:
        device = self._device
        zero_B = torch.zeros(len(sequences), dtype=torch.int64, device=device)
        stream_B2 = torch.tensor([each.stream for each in sequences], device=device)
        settings = [(each.options.temperature, each.options.top_p, each.options.top_k) for each in sequences]
        rounds = [self.rounds if each.options.think is None else each.options.think for each in sequences]
        rounds_B = torch.tensor(rounds, device=device)
        rules = [
            (1.0, each.depth.nats) if isinstance(each.depth, Least) else (each.depth, math.inf) for each in sequences
        ]
        depth_B, least_B = torch.tensor(rules, dtype=torch.float64, device=device).unbind(1)
        text_BL = remembered([each.prompt for each in sequences], device)
        sampling = sampling_of(settings, device)
        return Rows(zero_B, seen_BF, text_BL, zero_B, stream_B2, *sampling, rounds_B, depth_B, least_B)


def wanted_shape(sequences: Items[Sequence]) -> Shape:
    """Return what the passes of some sequences have to compute beside tokens."""
    logprobs = [each.logprobs for each in sequences if each.logprobs is not None]
    return Shape(
        rows=0,
        drafts=0,
        opening=False,
        rounds=0,
        uncertainty=any(each.uncertainty for each in sequences),
        scored=bool(logprobs),
        logprobs=max(logprobs, default=0),
    )


def prefill_batches(sequences: Items[Sequence]) -> list[list[int]]:
    """Split sequences into batches that are read together: of one depth and think, fresh or not, and not too large."""

    def kind(i: int) -> tuple[Any, ...]:
        think = sequences[i].options.think
        depth = sequences[i].depth
        rule = (True, depth.nats) if isinstance(depth, Least) else (False, depth)
        return *rule, -1 if think is None else think, sequences[i].past is None

    batches: list[list[int]] = []
    for _, group in groupby(sorted(range(len(sequences)), key=kind), kind):
        batch: list[int] = []
        for i in group:
            longest = max(len(sequences[j].prompt) for j in [*batch, i])
            if batch and (len(batch) + 1) * min(longest, 1024) > PREFILL_TOKENS:
                batches.append(batch)
                batch = []
            batch.append(i)
        batches.append(batch)
    return batches


def joined_past(pasts: list[tuple[State, int] | None]) -> State | None:
    """Return the states that some prompts continue, as one state; None: they are fresh."""
    if pasts[0] is None:
        return None
    given = [past for past in pasts if past is not None]
    first = given[0][0]
    if [row for _, row in given] == list(range(first.batch_size)) and all(state is first for state, _ in given):
        return first
    return State.join([state.rows(torch.tensor([row], device=state.position_B.device)) for state, row in given])
