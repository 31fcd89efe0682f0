"""What a task of the proving ground is: questions with exact answers, each of a level, and how answers are counted."""

import dataclasses
import math
from abc import ABC, abstractmethod
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping
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
    whole: ClassVar[int] = 1
    """Tokens of an answer, one after the other; it is right when all of them are. A model that is right about each
    after the true ones before it is a model that says the answer by itself, token by token, at temperature 0."""
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

    def part(self, index: int) -> str:
        """Return the part of the test that batch `index` belongs to: each part has its share of the time."""
        return "the test"

    def longer(self, index: int) -> bool:
        """Return whether batch `index` of the test has longer rows than training."""
        return False

    def training(self, step: int, steps: int, rows: int) -> Questions:
        """Return the batch of step `step` of `steps`: a pure function of the seed and these."""
        generator = torch.Generator().manual_seed((self.seed * 1_000_003 + step) * 2)
        return self.draw(generator, rows, min(1.0, 2 * (step + 1) / steps), test=False)

    def held_out(self, index: int, rows: int) -> Questions:
        """Return batch `index` of the test, which has nothing in common with training but the rules."""
        generator = torch.Generator().manual_seed((self.seed * 1_000_003 + index) * 2 + 1)
        return self.draw(generator, rows, 1.0, test=True)


def different(generator: torch.Generator, rows: int, count: int, below: int) -> Tensor:
    """Return `count` different numbers below `below` in random order [rows, count]."""
    return torch.rand(rows, below, generator=generator).topk(count).indices


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
    """Mean of the true answers, each token read after the true ones before it; NaN: not known."""

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
        asked = {level: self.asked[level] for level in sorted(self.asked)}
        return {"right": round(self.share, 4), "nats": nats, "right_at_level": levels, "asked_at_level": asked}


class Count:
    """The answers so far, by level; each has `whole` tokens."""

    def __init__(self, whole: int = 1) -> None:
        self.whole, self.right, self.asked, self.nats = whole, Counter[int](), Counter[int](), 0.0

    def add(self, questions: Questions, guess_BT: Tensor, nats_BT: Tensor) -> None:
        """Count the answers of a batch."""
        scored_BT = questions.level > 0
        right_A = (guess_BT == questions.answers)[scored_BT].view(-1, self.whole).all(1)
        level_A = questions.level[scored_BT].view(-1, self.whole)[:, 0]
        for level in level_A.unique().tolist():
            self.asked[level] += int((level_A == level).sum())
            self.right[level] += int(right_A[level_A == level].sum())
        self.nats += float(nats_BT.double().sum())

    def score(self) -> Score:
        asked = self.asked.total()
        return Score(dict(self.asked), dict(self.right), self.nats / asked if asked else math.nan)


def score(answer: Answer, batches: Iterable[Questions], whole: int = 1) -> Score:
    """Count the right answers by level; each has `whole` tokens."""
    count = Count(whole)
    for questions in batches:
        count.add(questions, *answer(questions))
    return count.score()


def rules(task: Task, batches: Iterable[Questions]) -> dict[str, Score]:
    """Return what the shortcuts of a task score, and the most frequent answer of each level of these batches."""
    found, answers = dict[str, Count](), defaultdict[int, Counter[tuple[int, ...]]](Counter)
    for questions in batches:
        for name, guess_BT in task.shortcuts(questions).items():
            found.setdefault(name, Count(task.whole)).add(questions, guess_BT, torch.zeros_like(guess_BT))
        scored_BT = questions.level > 0
        level_A = questions.level[scored_BT].view(-1, task.whole)[:, 0]
        for level, answer in zip(
            level_A.tolist(), questions.answers[scored_BT].view(-1, task.whole).tolist(), strict=True
        ):
            answers[level][tuple(answer)] += 1
    scores = {name: dataclasses.replace(count.score(), nats=math.nan) for name, count in found.items()}
    asked = {level: counts.total() for level, counts in answers.items()}
    most = {level: max(counts.values()) for level, counts in answers.items()}
    return scores | {"most frequent answer": Score(asked, most)}
