"""Recall: 256 pairs of key and value in 1,024 tokens, then each key in another order, and its value is asked for.

A model with a window of 64 does not see the pair any more: only answers whose pair lies that far back are scored. With
`--two_step` the pairs are a -> b and b -> c in mixed order, each after a mark, and c is asked of a: what is read must
be asked with again.
A level is the distance to the value that was to be read, in windows; of two steps that of the nearer one.

    python -m benchmarks.proving_ground.recall --models dense
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.proving_ground.contenders import FEEDS_RATE, MEMORY, remembering
from benchmarks.proving_ground.runner import SHAPE, Contender, prove
from benchmarks.proving_ground.task import EOS, Questions, Task, different
from lepton.config import LeptonConfig
from lepton.errors import InputError

HALVINGS = 3
"""How often the pairs of an episode are halved at the start of training, whose rows hold more episodes instead."""


@dataclass(frozen=True, kw_only=True)
class Recall(Task):
    """Associative recall."""

    pairs: int = 256
    """Pairs of a row; a multiple of 16."""
    window: int = 64
    """Window of the models, and the least distance of an answer that is scored."""
    keys: int = 4096
    values: int = 256
    two_step: bool = False

    small = {"pairs": 32, "window": 16, "keys": 128, "values": 16}
    columns = ((1, 1), (2, 3), (4, 7), (8, 15), (1, 15))

    def __post_init__(self) -> None:
        if self.pairs < 16 or self.pairs % 16 or self.pairs > self.keys:
            raise InputError(f"pairs={self.pairs}: must be a multiple of 16, and at most keys={self.keys}")

    @property
    def vocab_size(self) -> int:
        return self.value + self.values

    @property
    def chance(self) -> float:
        return 1 / self.values

    @property
    def begin(self) -> int:
        """The first token of a row, and the mark of a pair; keys are the ids after it."""
        return EOS + 1

    @property
    def value(self) -> int:
        """First of the values."""
        return self.begin + 1 + self.keys

    def draw(self, generator: torch.Generator, rows: int, share: float, *, test: bool) -> Questions:
        pairs = self.pairs >> min(HALVINGS, int((1 - share) * (HALVINGS + 1)))
        episodes = self.pairs // pairs
        keys_BEK = different(generator, rows, self.pairs, self.keys) + self.begin + 1
        keys_BEK = keys_BEK.view(rows, episodes, pairs)
        values_BEK = torch.randint(self.value, self.vocab_size, keys_BEK.shape, generator=generator)
        if self.two_step:  # a -> b, b -> c
            a_BEQ, b_BEQ = keys_BEK.chunk(2, 2)
            asked_BEQ, answer_BEQ = a_BEQ, values_BEK[..., : pairs // 2]
            values_BEK = torch.cat([b_BEQ, answer_BEQ], 2)
        else:
            asked_BEQ, answer_BEQ = keys_BEK, values_BEK
        order_BEK, place_BEK = shuffled(generator, keys_BEK.shape)
        stated = [keys_BEK.gather(2, order_BEK), values_BEK.gather(2, order_BEK)]
        if self.two_step:  # without the mark, b as a value could only be told from b as a key by counting
            stated.insert(0, torch.full_like(keys_BEK, self.begin))
        stated_BEX = torch.stack(stated, 3).flatten(2)
        turn_BEQ, _ = shuffled(generator, asked_BEQ.shape)
        questions_BEX = torch.stack([asked_BEQ.gather(2, turn_BEQ), answer_BEQ.gather(2, turn_BEQ)], 3).flatten(2)
        nearest_BEQ = place_BEK.unflatten(2, (-1, asked_BEQ.shape[2])).amax(2).gather(2, turn_BEQ)
        # From the key that is asked for, back to the value that was stated after the key.
        size = len(stated)
        distance_BEQ = size * pairs + 2 * torch.arange(asked_BEQ.shape[2]) - (size * nearest_BEQ + size - 1)
        none_BEX = torch.zeros_like(stated_BEX)
        level_BEX = torch.stack([distance_BEQ // self.window, torch.zeros_like(distance_BEQ)], 3).flatten(2)
        targets_BEX = torch.stack([torch.ones_like(distance_BEQ), torch.zeros_like(distance_BEQ)], 3).flatten(2)
        tokens_BX = torch.cat([stated_BEX, questions_BEX], 2).flatten(1)
        tokens_BX = torch.cat([torch.full((rows, 1), self.begin), tokens_BX], 1)
        level_BT, targets_BT = (
            torch.cat([torch.zeros(rows, 1, dtype=torch.int64), torch.cat([none_BEX, each], 2).flatten(1)], 1)[:, :-1]
            for each in (level_BEX, targets_BEX)
        )
        return Questions(tokens_BX, torch.full((rows,), tokens_BX.shape[1]), targets_BT > 0, level_BT)

    def shortcuts(self, questions: Questions) -> dict[str, Tensor]:
        """The value before, and of one step, by exclusion, the first that was stated and has not been asked for."""
        tokens_BX = questions.tokens
        index_X = torch.arange(tokens_BX.shape[1])
        latest_BX = torch.where(tokens_BX >= self.value, index_X, 0).cummax(1).values
        found = {"the value before": tokens_BX.gather(1, latest_BX)[:, :-1]}
        if not self.two_step:
            stated_BKX, asked_BKX = tokens_BX[:, 1:].view(len(tokens_BX), 2, -1, 2).unbind(1)
            same_BQK = asked_BKX[:, :, None, 0] == stated_BKX[:, None, :, 0]
            asked_BQK = same_BQK.cumsum(1) - same_BQK.long()
            left_BQ = stated_BKX[..., 1].gather(1, asked_BQK.argmin(2))
            guess_BT = torch.zeros_like(questions.level)
            guess_BT[:, 1 + 2 * self.pairs :: 2] = left_BQ
            found["a value not asked for yet"] = guess_BT
        return found


def shuffled(generator: torch.Generator, shape: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Return a random order of the last dimension for each of the others, and the place of each element in it."""
    order = torch.rand(*shape, generator=generator).argsort(-1)
    return order, order.argsort(-1)


def shape(task: Recall) -> LeptonConfig:
    """Return the complete model: a short window, the working memory and crystals.

    A second read asks with what the first found, noise included: by `capacity`, with random keys, 4 heads are enough
    for one step and far too few for two.
    """
    config = LeptonConfig(**SHAPE, window=task.window, segment=task.window, vocab_size=task.vocab_size)
    memory = {**MEMORY, "heads": 16, "reads": 2} if task.two_step else MEMORY
    return config.replace(memory=memory, crystals={"slots": 64})


CONTENDERS = remembering(one_read=Contender(changes={"crystals": None, "memory.reads": 1}))
"""For two steps the memory is read twice, but for `one_read`; the control should find them with 8 layers if not with 4.
"""


DEFAULTS = {"steps": 6000, "rows": 64, "test_batches": 8, "feeds_rate": FEEDS_RATE}


def main(words: Sequence[str] | None = None) -> None:
    """Run the task; see `prove`."""
    prove(Recall, shape, CONTENDERS, DEFAULTS, words)


if __name__ == "__main__":
    main()
