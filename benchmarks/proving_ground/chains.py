"""Chains: k operations modulo 97 from left to right, and only the result is asked for: there is no scratchpad.

A row is `a + b * c - d =`, right-aligned, and the result. Training has up to 8 operations, the test twice as many. A
level is a number of operations.

    python -m benchmarks.proving_ground.chains --models deep
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.proving_ground.contenders import thinking
from benchmarks.proving_ground.runner import SHAPE, prove
from benchmarks.proving_ground.task import EOS, Questions, Task
from lepton.config import LeptonConfig

OPERATIONS = 3
"""Addition, subtraction, multiplication."""


@dataclass(frozen=True, kw_only=True)
class Chains(Task):
    """Chains of operations modulo a prime."""

    trained: int = 8
    """Most operations in training."""
    tested: int = 16
    """Most operations in the test."""
    modulus: int = 97
    pauses: int = 0
    """Tokens without meaning between `=` and the result."""

    small = {"trained": 2, "tested": 4, "modulus": 7}
    columns = ((1, 1), (2, 2), (4, 4), (8, 8), (1, 8), (9, 16), (16, 16))

    @property
    def vocab_size(self) -> int:
        return self.operation + OPERATIONS + 3

    @property
    def chance(self) -> float:
        return 1 / self.modulus

    @property
    def operation(self) -> int:
        """First of the operations; numbers are the ids before them, 0 first."""
        return EOS + 1 + self.modulus

    @property
    def equals(self) -> int:
        """After it come the ids of padding and pauses."""
        return self.operation + OPERATIONS

    @property
    def place(self) -> int:
        """Place of `=`: a segment opens there, the second one."""
        return 2 * max(self.trained, self.tested) + 2

    def draw(self, generator: torch.Generator, rows: int, share: float, *, test: bool) -> Questions:
        most = self.tested if test else max(1, round(self.trained * share))
        count_B = torch.randint(1, most + 1, (rows,), generator=generator)
        numbers_BK = torch.randint(1, self.modulus, (rows, most + 1), generator=generator)
        kinds_BK = torch.randint(OPERATIONS, (rows, most), generator=generator)
        value_B = numbers_BK[:, 0]
        for i in range(most):
            begun_B = i >= most - count_B
            applied_B = self.apply(value_B, kinds_BK[:, i], numbers_BK[:, i + 1])
            value_B = torch.where(begun_B, applied_B, numbers_BK[:, i + 1])
        chain_BX = torch.empty(rows, 2 * most + 1, dtype=torch.int64)
        chain_BX[:, ::2] = EOS + 1 + numbers_BK
        chain_BX[:, 1::2] = self.operation + kinds_BK
        left_BX = torch.arange(2 * most + 1) < 2 * (most - count_B)[:, None]
        tokens_BX = torch.full((rows, self.place + 2 + self.pauses), self.equals + 1)
        tokens_BX[:, self.place - chain_BX.shape[1] : self.place] = chain_BX.masked_fill(left_BX, self.equals + 1)
        tokens_BX[:, self.place] = self.equals
        tokens_BX[:, self.place + 1 : -1] = self.equals + 2
        tokens_BX[:, -1] = EOS + 1 + value_B
        targets_BT = torch.zeros(rows, tokens_BX.shape[1] - 1, dtype=torch.bool)
        targets_BT[:, -1] = True
        return Questions(tokens_BX, torch.full((rows,), tokens_BX.shape[1]), targets_BT, targets_BT * count_B[:, None])

    def apply(self, left: Tensor, kind: Tensor, right: Tensor) -> Tensor:
        """Return left + right, left - right or left x right, as `kind` says."""
        results = torch.stack([left + right, left - right, left * right])
        return results.gather(0, kind[None])[0] % self.modulus

    def shortcuts(self, questions: Questions) -> dict[str, Tensor]:
        """The last number, and the last operation alone."""
        left, kind, right = (questions.tokens[:, self.place - back] for back in (3, 2, 1))
        alone = EOS + 1 + self.apply(left - EOS - 1, kind - self.operation, right - EOS - 1)
        guesses = {"the last number": right, "the last operation": alone}
        return {name: guess_B[:, None].expand_as(questions.level) for name, guess_B in guesses.items()}


def shape(task: Chains) -> LeptonConfig:
    """Return the complete model: a window of the whole row, and thoughts that open at `=`."""
    config = LeptonConfig(**SHAPE, window=2 * task.place, segment=task.place, vocab_size=task.vocab_size)
    thoughts = {"rounds": 8, "most_rounds": 16, "over_tokens": True}
    return config.replace(thoughts={"count": 4, "ffn": 512, **thoughts})


CONTENDERS = thinking(layers=16)


def main(words: Sequence[str] | None = None) -> None:
    """Run the task; see `prove`."""
    prove(Chains, shape, CONTENDERS, {"steps": 8000, "rows": 1024, "test_batches": 16}, words)


if __name__ == "__main__":
    main()
