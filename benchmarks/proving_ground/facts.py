"""Facts of a made-up world: questions with one or several right answers, asked more or less often in training.

A document is a question, a subject of two tokens and a relation, and one of its right answers, drawn alike. Half of the
relations are closed, with one right answer each; the others are open. How often a question is asked does not depend on
its subject, its relation or its answers. Between them come strangers, subjects that are met once: so a model in
training meets what it does not know, as in real text, and learns what to expect then.

Shapes: Q questions, S subjects, V tokens, E questions of training in their order, N questions in hand.
"""

import math
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from benchmarks.proving_ground.task import EOS, Questions, Task
from lepton.errors import InputError

SEEN = (0, 2, 4, 8, 16, 32, 64, 128, 256)
"""How often a question is asked in training, two times in a batch."""
CLOSED = (3, 3, 4, 4)
"""Candidates of each closed relation, drawn alike."""
OPEN = 16
"""Candidates of an open relation, drawn alike."""
SEVERAL = ((3,), (3, 4), (4, 5), (5, 6))
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
    syllables: int = 512
    """Tokens that names are made of."""
    facts: int = 32
    """Documents of a row."""
    strangers: float = 0.5
    """Share of the documents in training that are about strangers."""

    small = {"subjects": 45, "syllables": 64, "facts": 4}

    def __post_init__(self) -> None:
        if len(self.order_E) - self.order_E.lt(self.questions).sum() > (self._names - self.subjects) * self.relations:
            raise InputError(f"syllables={self.syllables}: too few names for {self.subjects} subjects and strangers")

    @property
    def _names(self) -> int:
        return self.syllables**2

    @property
    def relations(self) -> int:
        return len(CLOSED) + len(SEVERAL)

    @property
    def questions(self) -> int:
        """Those that a subject and a relation make, without those about strangers, which are numbered after them."""
        return self.subjects * self.relations

    @property
    def relation(self) -> int:
        """First of the relations; names are the ids before them."""
        return EOS + 1 + self.syllables

    @property
    def vocab_size(self) -> int:
        return self.relation + self.relations + sum(CLOSED) + OPEN * len(SEVERAL)

    @property
    def chance(self) -> float:
        return 1 / OPEN

    def generator(self, number: int) -> torch.Generator:
        """Return a source of randomness of its own for each number."""
        return torch.Generator().manual_seed(self.seed * 1_000_003 + number)

    @cached_property
    def _name_S(self) -> Tensor:
        return torch.randperm(self._names, generator=self.generator(0))

    def words(self, question_N: Tensor) -> Tensor:
        """Return the tokens of questions [N, 3]."""
        name_N = self._name_S[question_N // self.relations]
        relation_N = self.relation + question_N % self.relations
        first_N, second_N = name_N // self.syllables, name_N % self.syllables
        return torch.stack([EOS + 1 + first_N, EOS + 1 + second_N, relation_N], 1)

    def drawn(self, question_N: Tensor, generator: torch.Generator) -> Tensor:
        """Draw right answers of questions: the chance of each token as an answer, fp32 [N, V]."""
        right_NV, first = torch.zeros(len(question_N), self.vocab_size), self.relation + self.relations
        kind_N = question_N % self.relations
        for kind, size in enumerate((*CLOSED, *[OPEN] * len(SEVERAL))):
            (here_M,) = torch.where(kind_N == kind)
            place_MC = torch.rand(len(here_M), size, generator=generator).argsort(1).argsort(1)
            several = torch.tensor((1,) if kind < len(CLOSED) else SEVERAL[kind - len(CLOSED)])
            count_M1 = several[torch.randint(len(several), (len(here_M), 1), generator=generator)]
            right_NV[here_M, first : first + size] = (place_MC < count_M1) / count_M1
            first += size
        return right_NV

    @cached_property
    def right_QV(self) -> Tensor:
        """The chance of each token as the answer of each question; right are those above 0."""
        return self.drawn(torch.arange(self.questions), self.generator(1))

    @cached_property
    def open_Q(self) -> Tensor:
        """Whether the relation of each question is an open one."""
        return torch.arange(self.questions) % self.relations >= len(CLOSED)

    @cached_property
    def seen_Q(self) -> Tensor:
        """How often each question is asked in training: alike many questions of a relation each number of `SEEN`."""
        place_SR = torch.rand(self.subjects, self.relations, generator=self.generator(2)).argsort(0)
        return torch.tensor(SEEN)[(place_SR % len(SEEN)).flatten()]

    @cached_property
    def order_E(self) -> Tensor:
        """The questions of training in their order; each place stands for two answers."""
        own_E = torch.arange(self.questions).repeat_interleave(self.seen_Q // 2)
        strangers = round(len(own_E) * self.strangers / (1 - self.strangers))
        order_E = torch.cat([own_E, self.questions + torch.arange(strangers)])
        return order_E[torch.randperm(len(order_E), generator=self.generator(3))]

    def part(self, number: int) -> Tensor:
        """Return the questions of part 0, on which heads learn, 1, for calibration, or 2, which is judged."""
        ends = [0, *(round(sum(PARTS[: i + 1]) * self.questions) for i in range(2)), self.questions]
        return torch.randperm(self.questions, generator=self.generator(4))[ends[number] : ends[number + 1]]

    def steps(self, rows: int) -> int:
        """Return the steps in which each question is asked as often as it should be."""
        return math.ceil(len(self.order_E) / (rows // 2 * self.facts))

    def draw(self, generator: torch.Generator, rows: int, share: float, *, test: bool) -> Questions:
        """Return rows of random questions of the world."""
        count = rows // 2 * self.facts
        return self.rows_of(torch.randint(self.questions, (count,), generator=generator), rows, generator)

    def training(self, step: int, steps: int, rows: int) -> Questions:
        """Return the batch of a step: the rows 2 i and 2 i + 1 have the same questions, with independent answers."""
        count = rows // 2 * self.facts
        place_N = torch.arange(step * count, (step + 1) * count) % len(self.order_E)
        return self.rows_of(self.order_E[place_N], rows, self.generator(5 + 7919 * step))

    def rows_of(self, question_N: Tensor, rows: int, generator: torch.Generator) -> Questions:
        """Return questions with two answers each, the second one a row further."""
        right_NV = self.drawn(question_N, generator)
        own_N = question_N < self.questions
        right_NV[own_N] = self.right_QV[question_N[own_N]]
        words_N2W = torch.full((len(question_N), 2, WORDS), EOS)
        words_N2W[:, :, :3] = self.words(question_N)[:, None]
        words_N2W[:, :, 3] = right_NV.multinomial(2, replacement=True, generator=generator)
        tokens_BX = words_N2W.view(rows // 2, self.facts, 2, WORDS).transpose(1, 2).reshape(rows, -1)
        tokens_BX = torch.cat([torch.full((rows, 1), EOS), tokens_BX], 1)
        targets_T = torch.arange(tokens_BX.shape[1] - 1) % WORDS == 3
        targets_BT = targets_T.expand(rows, -1).clone()
        return Questions(tokens_BX, torch.full((rows,), tokens_BX.shape[1]), targets_BT, targets_BT.long())
