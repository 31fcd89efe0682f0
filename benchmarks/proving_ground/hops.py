"""Hops: the letter after the latest earlier occurrence of the present one, and again from there, p times.

A row begins with p and goes on with letters, no two neighbours equal: with equal ones the last letter alone would be
right in 44 % of all rows at p = 16. After each letter there is a place for the letter p hops back, in letters of their
own. In the test all of these places are empty, but for the last one, which is asked for. In training a share of them
has the answer, all of them in half of the rows: a model of the same form that was asked at every place learnt 16 hops,
and asked at every 32nd place 8 (docs/log/2026-11-27.md). The letters lie equally far apart in training and in the test:
with answers between few of them, a model learns a distance that the test does not have. A level is a number of hops.

    python -m benchmarks.proving_ground.hops --models thoughts --rates 1 --seconds 300
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
    """Letters of a row."""
    every: int = 1
    """Letters from one that has a place for an answer in training to the next; the last one has one."""
    pauses: int = 0
    """Tokens without meaning between a letter and the place for its answer."""
    body: int = 4
    """Blocks of a model, half of them before its ideas."""

    small = {"length": 32, "trained": 4}
    columns = ((1, 1), (2, 2), (4, 4), (8, 8), (1, 8), (9, 16), (16, 16), (17, 32), (32, 32))

    def __post_init__(self) -> None:
        if not 1 <= self.trained <= DEEPEST:
            raise InputError(f"trained={self.trained}: must lie in 1..{DEEPEST}")
        if self.every < 1 or self.pauses < 0:
            raise InputError(f"every={self.every}, pauses={self.pauses}: must be at least 1 and 0")
        if self.body < 2:
            raise InputError(f"body={self.body}: give at least 2 blocks")

    @property
    def vocab_size(self) -> int:
        return self.hop + (2 if self.unary else DEEPEST)

    @property
    def chance(self) -> float:
        return 1 / self.alphabet

    @property
    def pause(self) -> int:
        """Stands where there is no answer; letters are 1 .. alphabet, and as answers those after them."""
        return EOS + 1 + 2 * self.alphabet

    @property
    def hop(self) -> int:
        """First of the tokens that say p."""
        return self.pause + 1

    @property
    def place(self) -> int:
        """Place of the last letter, where no pauses stand before it."""
        return self.head(torch.ones(1, dtype=torch.int64)).shape[1] + 2 * (self.length - 1)

    def draw(self, generator: torch.Generator, rows: int, share: float, *, test: bool) -> Questions:
        if test:
            tested = DEEPEST if self.unary else self.trained
            p_B = 1 + (torch.arange(rows) + torch.randint(tested, (1,), generator=generator)) % tested
        else:
            p_B = torch.randint(1, 1 + max(1, round(self.trained * share)), (rows,), generator=generator)
        letters_BL = letters(generator, rows, self.length, self.alphabet)
        index_L = torch.arange(self.length)
        found_BL = hop(letters_BL, index_L, p_B)
        last_L = index_L == self.length - 1
        asked_L = last_L if test else (self.length - 1 - index_L) % self.every == 0
        share_B = (2 * torch.rand(rows, generator=generator)).clamp(max=1)
        drawn_BL = torch.rand(rows, self.length, generator=generator) < share_B[:, None]
        given_BL = (found_BL >= 0) & asked_L & (last_L | drawn_BL)
        head_BX = self.head(p_B)
        answer_L = head_BX.shape[1] - 1 + (2 + self.pauses * asked_L).cumsum(0)
        letter_L = answer_L - 1 - self.pauses * asked_L
        tokens_BX = torch.full((rows, int(answer_L[-1]) + 1), self.pause)
        tokens_BX[:, : head_BX.shape[1]] = head_BX
        tokens_BX[:, letter_L] = letters_BL + 1
        tokens_BX[:, answer_L] = torch.where(given_BL, found_BL + 1 + self.alphabet, self.pause)
        targets_BT = torch.zeros(rows, tokens_BX.shape[1] - 1, dtype=torch.bool)
        targets_BT[:, answer_L - 1] = given_BL
        return Questions(tokens_BX, torch.full((rows,), tokens_BX.shape[1]), targets_BT, targets_BT * p_B[:, None])

    def head(self, p_B: Tensor) -> Tensor:
        """Return the tokens that say p: one and a pause, or a mark for each hop among `DEEPEST` places."""
        if not self.unary:
            return torch.stack([self.hop + p_B - 1, torch.full_like(p_B, self.pause)], 1)
        return self.hop + (torch.arange(DEEPEST) < p_B[:, None]).long()

    def shortcuts(self, questions: Questions) -> dict[str, Tensor]:
        """The letter before the question, and the answer of fewer hops than are asked for, by a plain reading."""
        rows, p_B = questions.tokens, questions.level.amax(1)
        first = self.head(p_B[:1]).shape[1]
        letters_BL = rows[:, first : self.place + 1 : 2] - 1
        end_Q = torch.tensor([self.length - 1])
        found = {"the last letter": letters_BL[:, -1:]}
        for fewer in (1, 2, 4):
            found[f"{fewer} hops" if fewer > 1 else "1 hop"] = hop(letters_BL, end_Q, p_B.clamp(max=fewer)).clamp(min=0)
        return {name: (guess_B1 + 1 + self.alphabet).expand_as(questions.level) for name, guess_B1 in found.items()}


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
    """Return the complete model: a window of the whole row, and tokens that think for as many rounds as hops.

    A segment opens at the last letter. More of them would cost time in each round, and the tokens think anyway.
    """
    body = {**SHAPE, "layers": task.body, "stem_layers": task.body // 2}
    config = LeptonConfig(**body, window=2 * task.place, segment=task.place, vocab_size=task.vocab_size)
    thoughts = {"rounds": task.trained, "most_rounds": max(DEEPEST, task.trained), "over_tokens": True}
    return config.replace(thoughts={"count": 4, "ffn": 512, **thoughts})


CONTENDERS = thinking(layers=20, pauses={"pauses": 8, "every": 16}, slots_alone={"segment": 16})
"""Slots alone think at every eighth letter. Pauses at each letter would make rows five times as long."""


def main(words: Sequence[str] | None = None) -> None:
    """Run the task; see `prove`."""
    prove(Hops, shape, CONTENDERS, {"steps": 8000, "rows": 64, "test_batches": 64, "test_rows": 128}, words)


if __name__ == "__main__":
    main()
