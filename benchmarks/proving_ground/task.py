"""What a task of the proving ground is: questions with exact answers, each of a level, and how answers are counted."""

import dataclasses
import math
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

EOS = 0
"""Ends a document; no row of a task contains it."""


class Questions(NamedTuple):
    """Rows of tokens, some of which are answers."""

    tokens: Tensor
    """int64 [B, T + 1]."""
    lengths: Tensor
    """int64 [B]: valid tokens of each row."""
    targets: Tensor
    """bool [B, T]: the predictions with a loss; that of index t is of the token t + 1."""
    level: Tensor
    """int64 [B, T]: difficulty of the answers that are scored; 0: not scored."""

    @property
    def answers(self) -> Tensor:
        """The token after each [B, T]."""
        return self.tokens[:, 1:]


@dataclass(frozen=True, kw_only=True)
class Task(ABC):
    """A generator of questions. Its fields are flags of the command line."""

    seed: int = 0

    small: ClassVar[Mapping[str, int]] = {}
    """Fields that `--smoke` changes."""
    columns: ClassVar[tuple[tuple[int, int], ...]] = ()
    """Ranges of levels, first and last, that the table shows."""
    free_running: ClassVar[bool] = False
    """Whether a model reads its own answers and not the true ones; they then stand at the end of a row, the same places
    in all rows, and count as wrong after a wrong one."""

    @property
    @abstractmethod
    def vocab_size(self) -> int:
        """Token ids, `EOS` included."""

    @property
    @abstractmethod
    def chance(self) -> float:
        """Share of answers that are right by a uniform guess among those of the right kind."""

    @abstractmethod
    def draw(self, generator: torch.Generator, rows: int, share: float, *, test: bool) -> Questions:
        """Return rows of questions.

        Args:
            generator: the only source of randomness.
            rows: how many.
            share: how much of the difficulty there is, in 0..1: training begins with easy questions.
            test: whether they are for the final figures.
        """

    def column(self, first: int, last: int) -> str:
        """Return the heading, of at most 7 letters, of the levels `first` .. `last`."""
        return f"{first}" if first == last else f"{first}-{last}"

    def shortcuts(self, questions: Questions) -> dict[str, Tensor]:
        """Return the answers [B, T] of simple rules that do not solve the task, by name."""
        return {}

    def training(self, step: int, steps: int, rows: int) -> Questions:
        """Return the batch of step `step` of `steps`: a pure function of the seed and these."""
        generator = torch.Generator().manual_seed((self.seed * 1_000_003 + step) * 2)
        return self.draw(generator, rows, min(1.0, 2 * (step + 1) / steps), test=False)

    def held_out(self, index: int, rows: int) -> Questions:
        """Return batch `index` of the test, which has nothing in common with training but the rules."""
        generator = torch.Generator().manual_seed((self.seed * 1_000_003 + index) * 2 + 1)
        return self.draw(generator, rows, 1.0, test=True)


Answer = Callable[[Questions], tuple[Tensor, Tensor]]
"""Questions -> the answers [B, T], of which only those at scored places matter, and the nats of the true ones [B, T], 0
at other places."""


@dataclass(frozen=True)
class Score:
    """How many answers were right."""

    asked: Mapping[int, int]
    """Answers of each level."""
    right: Mapping[int, float]
    nats: float = math.nan
    """Mean of the true answers, each read after the true ones before it; NaN: not known."""

    def within(self, first: int, last: int) -> float:
        """Return the share of right answers at the levels `first` .. `last`; NaN: there are none."""
        levels = [level for level in self.asked if first <= level <= last]
        asked = sum(self.asked[level] for level in levels)
        return sum(self.right[level] for level in levels) / asked if asked else math.nan

    @property
    def share(self) -> float:
        """Right answers of all."""
        return self.within(1, max(self.asked, default=0))

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        levels = {level: round(self.within(level, level), 4) for level in sorted(self.asked)}
        nats = round(self.nats, 4) if math.isfinite(self.nats) else None
        return {"right": round(self.share, 4), "nats": nats, "right_at_level": levels}


def score(answer: Answer, batches: Iterable[Questions]) -> Score:
    """Count the right answers by level."""
    right, asked, nats = Counter[int](), Counter[int](), 0.0
    for questions in batches:
        guess_BT, nats_BT = answer(questions)
        right_BT = guess_BT == questions.answers
        for level in questions.level.unique().tolist():
            if level:
                here_BT = questions.level == level
                asked[level] += int(here_BT.sum())
                right[level] += int((right_BT & here_BT).sum())
        nats += float(nats_BT.double().sum())
    return Score(asked, right, nats / asked.total() if asked else math.nan)


def rules(task: Task, batches: Sequence[Questions]) -> dict[str, Score]:
    """Return what the shortcuts of a task score, and the most frequent answer of each level of these batches."""

    def says(name: str) -> Answer:
        return lambda questions: (task.shortcuts(questions)[name], torch.zeros_like(questions.level))

    def commonest(questions: Questions) -> tuple[Tensor, Tensor]:
        return best[questions.level], torch.zeros_like(questions.level)

    counts = torch.zeros(1 + max(int(each.level.max()) for each in batches), task.vocab_size, dtype=torch.int64)
    for each in batches:
        scored_BT = each.level > 0
        ones_M = torch.ones(int(scored_BT.sum()), dtype=torch.int64)
        counts.index_put_((each.level[scored_BT], each.answers[scored_BT]), ones_M, accumulate=True)
    best = counts.argmax(1)
    names = task.shortcuts(batches[0])
    answers = {name: says(name) for name in names} | {"most frequent answer": commonest}
    return {name: dataclasses.replace(score(answer, batches), nats=math.nan) for name, answer in answers.items()}
