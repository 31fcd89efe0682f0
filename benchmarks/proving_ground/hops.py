"""Hops: the token after the latest earlier occurrence of the present one, and again from there, p times.

A row begins with p and goes on with letters, no two neighbours equal: with equal ones the last letter alone would be
right in 44 % of all rows at p = 16. Where a mark asks, the letter p hops back is the answer, in letters of their own.
Training has such marks all through the second half of a row, the test one at its end. A level is a number of hops.

    python -m benchmarks.proving_ground.hops --models deep
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.proving_ground.contenders import thinking
from benchmarks.proving_ground.runner import SHAPE, prove
from benchmarks.proving_ground.task import EOS, Questions, Task
from lepton.config import LeptonConfig
from lepton.errors import InputError

DEEPEST = 32
"""Most hops that a row can ask for."""


@dataclass(frozen=True, kw_only=True)
class Hops(Task):
    """Hops from letter to letter (Sanford et al. 2024)."""

    trained: int = 16
    """Most hops in training."""
    unary: bool = False
    """Whether p is written as p marks among `DEEPEST` places: then p > `trained` is tested too. Otherwise each p has a
    token of its own."""
    alphabet: int = 4
    length: int = 256
    """Place of the last question."""
    every: int = 32
    """Distance of the questions of the second half; segments open there."""
    pauses: int = 0
    """Tokens without meaning between a question and its answer."""

    small = {"length": 64, "every": 16, "trained": 4}
    columns = ((1, 1), (2, 2), (4, 4), (8, 8), (1, 8), (9, 16), (16, 16), (17, 32), (32, 32))

    def __post_init__(self) -> None:
        if not 1 <= self.trained <= DEEPEST:
            raise InputError(f"trained={self.trained}: must lie in 1..{DEEPEST}")
        if self.every < 3 + self.pauses:
            raise InputError(
                f"every={self.every}: must be at least {3 + self.pauses}, the places of a question and more"
            )

    @property
    def vocab_size(self) -> int:
        return self.hop + (2 if self.unary else DEEPEST)

    @property
    def chance(self) -> float:
        return 1 / self.alphabet

    @property
    def ask(self) -> int:
        """The mark of a question; letters are 1 .. alphabet, and as answers those after them."""
        return EOS + 1 + 2 * self.alphabet

    @property
    def pause(self) -> int:
        return self.ask + 1

    @property
    def hop(self) -> int:
        """First of the tokens that say p."""
        return self.ask + 2

    def draw(self, generator: torch.Generator, rows: int, share: float, *, test: bool) -> Questions:
        if test:
            tested = DEEPEST if self.unary else self.trained
            p_B = 1 + (torch.arange(rows) + torch.randint(tested, (1,), generator=generator)) % tested
        else:
            p_B = torch.randint(1, 1 + max(1, round(self.trained * share)), (rows,), generator=generator)
        head_BX = self.head(p_B)
        asks = [self.length] if test else [*range(self.length // 2, self.length + 1, self.every)]
        width = self.length + 2 + self.pauses
        place_X = torch.arange(width)
        free_X = place_X >= head_BX.shape[1]
        for place in asks:
            free_X[place : place + 2 + self.pauses] = False
        letters_BL = letters(generator, rows, int(free_X.sum()), self.alphabet)
        tokens_BX = torch.full((rows, width), self.pause)
        tokens_BX[:, : head_BX.shape[1]] = head_BX
        tokens_BX[:, free_X] = letters_BL + 1
        targets_BT = torch.zeros(rows, width - 1, dtype=torch.bool)
        before_X = free_X.cumsum(0)
        asked_Q = before_X[torch.tensor(asks)] - 1  # the letter before each question
        found_BQ = hop(letters_BL, asked_Q, p_B)
        for place, found_B in zip(asks, found_BQ.unbind(1), strict=True):
            tokens_BX[:, place] = self.ask
            answer = place + 1 + self.pauses
            tokens_BX[:, answer] = found_B.clamp(min=0) + 1 + self.alphabet
            targets_BT[:, answer - 1] = found_B >= 0
        return Questions(tokens_BX, torch.full((rows,), width), targets_BT, targets_BT * p_B[:, None])

    def head(self, p_B: Tensor) -> Tensor:
        """Return the tokens that say p: one, or a mark for each hop among `DEEPEST` places."""
        if not self.unary:
            return self.hop + p_B[:, None] - 1
        return self.hop + (torch.arange(DEEPEST) < p_B[:, None]).long()

    def shortcuts(self, questions: Questions) -> dict[str, Tensor]:
        """The letter before the question, and the answer of fewer hops than are asked for, by a plain reading."""
        rows = questions.tokens
        is_letter_BX = (rows > EOS) & (rows <= self.alphabet)
        ask = self.length
        last_B = rows[:, :ask].gather(1, is_letter_BX[:, :ask].cumsum(1).argmax(1)[:, None])
        p_B = questions.level.amax(1)
        letters_BL = rows[:, self.head(p_B[:1]).shape[1] : ask] - 1
        end_Q = torch.tensor([letters_BL.shape[1] - 1])
        found = {"the last letter": last_B + self.alphabet}
        for fewer in (1, 2, 4):
            found[f"{fewer} hops" if fewer > 1 else "1 hop"] = (
                hop(letters_BL, end_Q, p_B.clamp(max=fewer)).clamp(min=0) + 1 + self.alphabet
            )
        return {name: guess_B1.expand_as(questions.level) for name, guess_B1 in found.items()}


def letters(generator: torch.Generator, rows: int, count: int, alphabet: int) -> Tensor:
    """Return letters 0 .. alphabet - 1 [rows, count] of which no two neighbours are equal."""
    steps_BL = torch.randint(1, alphabet, (rows, count), generator=generator)
    steps_BL[:, 0] = torch.randint(alphabet, (rows,), generator=generator)
    return steps_BL.cumsum(1) % alphabet


def hop(letters_BL: Tensor, start_Q: Tensor, p_B: Tensor) -> Tensor:
    """Return the letter p hops before each start [B, Q], -1 where the row is too short for it.

    A hop goes from a letter to the one after its latest earlier occurrence.
    """
    rows, count = letters_BL.shape
    index_BL = torch.arange(count).expand(rows, -1)
    next_BL = torch.zeros_like(letters_BL)
    for letter in letters_BL.unique().tolist():
        here_BL = letters_BL == letter
        latest_BL = torch.where(here_BL, index_BL, -1).cummax(1).values
        earlier_BL = torch.cat([torch.full((rows, 1), -1), latest_BL[:, :-1]], 1)
        next_BL = torch.where(here_BL, torch.where(earlier_BL < 0, -1, earlier_BL + 1), next_BL)
    at_BQ = start_Q.expand(rows, -1)
    for done in range(int(p_B.max())):
        there_BQ = torch.where(at_BQ < 0, -1, next_BL.gather(1, at_BQ.clamp(min=0)))
        at_BQ = torch.where(done < p_B[:, None], there_BQ, at_BQ)
    return torch.where(at_BQ < 0, -1, letters_BL.gather(1, at_BQ.clamp(min=0)))


def shape(task: Hops) -> LeptonConfig:
    """Return the complete model: a window of the whole row, and tokens that think for as many rounds as hops."""
    config = LeptonConfig(**SHAPE, window=task.length + 64, segment=task.every, vocab_size=task.vocab_size)
    thoughts = {"rounds": task.trained, "most_rounds": max(DEEPEST, task.trained), "over_tokens": True}
    return config.replace(thoughts={"count": 4, "ffn": 512, **thoughts})


CONTENDERS = thinking(layers=20)


def main(words: Sequence[str] | None = None) -> None:
    """Run the task; see `prove`."""
    prove(Hops, shape, CONTENDERS, {"steps": 8000, "rows": 128, "test_batches": 64}, words)


if __name__ == "__main__":
    main()
