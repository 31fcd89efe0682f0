"""Facts of a made-up world: questions with one or several right answers, asked more or less often in training.

A document is a question, a subject of two tokens and a relation, and one of its right answers, drawn alike. Half of the
relations are closed, with one right answer each; the others are open. How often a question is asked does not depend on
its subject, its relation or its answers.

Shapes: Q questions, S subjects, V tokens, E questions of training in their order, N questions in hand.
"""

import math
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from benchmarks.proving_ground.task import EOS, Questions, Task

SEEN = (0, 2, 4, 8, 16, 32, 64, 128, 256)
"""How often a question is asked in training, two times in a batch."""
CLOSED = (8, 16, 32, 64)
"""Candidates of each closed relation; the n-th of them is drawn in proportion to n^-SKEW."""
SKEW = 0.5
OPEN = 64
"""Candidates of an open relation."""
SEVERAL = ((2, 3), (3, 4), (4, 5, 6), (6, 7, 8))
"""How many of them are right in each open relation: one of these numbers."""
WORDS = 5
"""Tokens of a document: two of the subject, relation, answer, end."""
PARTS = (0.5, 0.2)
"""Shares of the questions on which heads learn, and on which they are calibrated; the rest is judged."""


@dataclass(frozen=True, kw_only=True)
class Knowledge(Task):
    """Facts of a made-up world."""

    subjects: int = 6250
    """Each has a fact for each of the 8 relations."""
    syllables: int = 128
    """Tokens that names are made of."""
    facts: int = 32
    """Documents of a row."""

    small = {"subjects": 45, "syllables": 16, "facts": 4}

    @property
    def relations(self) -> int:
        return 2 * len(CLOSED)

    @property
    def questions(self) -> int:
        return self.subjects * self.relations

    @property
    def relation(self) -> int:
        """First of the relations; names are the ids before them."""
        return EOS + 1 + self.syllables

    @property
    def vocab_size(self) -> int:
        return self.relation + self.relations + sum(CLOSED) + OPEN * len(CLOSED)

    @property
    def chance(self) -> float:
        return 1 / OPEN

    def generator(self, number: int) -> torch.Generator:
        """Return a source of randomness of its own for each number."""
        return torch.Generator().manual_seed(self.seed * 1_000_003 + number)

    @cached_property
    def asked_Q3(self) -> Tensor:
        """The tokens of each question."""
        name_S = torch.randperm(self.syllables**2, generator=self.generator(0))[: self.subjects]
        names_S2 = EOS + 1 + torch.stack([name_S // self.syllables, name_S % self.syllables], 1)
        names_Q2 = names_S2.repeat_interleave(self.relations, 0)
        relation_Q = self.relation + torch.arange(self.questions) % self.relations
        return torch.cat([names_Q2, relation_Q[:, None]], 1)

    @cached_property
    def kind_Q(self) -> Tensor:
        """The relation of each question, counted from 0; the first half of them is closed."""
        return self.asked_Q3[:, 2] - self.relation

    @cached_property
    def open_Q(self) -> Tensor:
        return self.kind_Q >= len(CLOSED)

    @cached_property
    def right_QV(self) -> Tensor:
        """The chance of each token as the answer of each question; right are those above 0."""
        generator, right_QV = self.generator(1), torch.zeros(self.questions, self.vocab_size)
        first = self.relation + self.relations
        for kind, size in enumerate((*CLOSED, *[OPEN] * len(CLOSED))):
            (here_M,) = torch.where(self.kind_Q == kind)
            if kind < len(CLOSED):
                weight = torch.arange(1, size + 1) ** -SKEW
                chosen_M = weight.expand(len(here_M), -1).multinomial(1, generator=generator)[:, 0]
                right_QV[here_M, first + chosen_M] = 1
            else:
                place_MC = torch.rand(len(here_M), size, generator=generator).argsort(1).argsort(1)
                several = torch.tensor(SEVERAL[kind - len(CLOSED)])
                count_M1 = several[torch.randint(len(several), (len(here_M), 1), generator=generator)]
                right_QV[here_M, first : first + size] = (place_MC < count_M1) / count_M1
            first += size
        return right_QV

    @cached_property
    def seen_Q(self) -> Tensor:
        """How often each question is asked in training: alike many questions of a relation each number of `SEEN`."""
        generator = self.generator(2)
        place_SR = torch.rand(self.subjects, self.relations, generator=generator).argsort(0)
        return torch.tensor(SEEN)[(place_SR % len(SEEN)).flatten()]

    @cached_property
    def order_E(self) -> Tensor:
        """The questions of training in their order; each place stands for two answers."""
        order_E = torch.arange(self.questions).repeat_interleave(self.seen_Q // 2)
        return order_E[torch.randperm(len(order_E), generator=self.generator(3))]

    def part(self, number: int) -> Tensor:
        """Return the questions of part 0, on which heads learn, 1, for calibration, or 2, which is judged."""
        ends = [0, *(round(sum(PARTS[: i + 1]) * self.questions) for i in range(2)), self.questions]
        return torch.randperm(self.questions, generator=self.generator(4))[ends[number] : ends[number + 1]]

    def steps(self, rows: int) -> int:
        """Return the steps in which each question is asked as often as it should be."""
        return math.ceil(len(self.order_E) / (rows // 2 * self.facts))

    def draw(self, generator: torch.Generator, rows: int, share: float, *, test: bool) -> Questions:
        """Return rows of random questions."""
        count = rows // 2 * self.facts
        return self.rows_of(torch.randint(self.questions, (count,), generator=generator), rows, generator)

    def training(self, step: int, steps: int, rows: int) -> Questions:
        """Return the batch of a step: the rows 2 i and 2 i + 1 have the same questions, with independent answers."""
        count = rows // 2 * self.facts
        place_N = torch.arange(step * count, (step + 1) * count) % len(self.order_E)
        return self.rows_of(self.order_E[place_N], rows, self.generator(5 + 7919 * step))

    def rows_of(self, question_N: Tensor, rows: int, generator: torch.Generator) -> Questions:
        """Return questions with two answers each, the second one a row further."""
        answer_N2 = self.right_QV[question_N].multinomial(2, replacement=True, generator=generator)
        words_N2W = torch.full((len(question_N), 2, WORDS), EOS)
        words_N2W[:, :, :3] = self.asked_Q3[question_N, None]
        words_N2W[:, :, 3] = answer_N2
        tokens_BX = words_N2W.view(rows // 2, self.facts, 2, WORDS).transpose(1, 2).reshape(rows, -1)
        tokens_BX = torch.cat([torch.full((rows, 1), EOS), tokens_BX], 1)
        targets_T = torch.arange(tokens_BX.shape[1] - 1) % WORDS == 3
        targets_BT = targets_T.expand(rows, -1).clone()
        return Questions(tokens_BX, torch.full((rows,), tokens_BX.shape[1]), targets_BT, targets_BT.long())
