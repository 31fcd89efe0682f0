"""Recall: 256 pairs of key and value in 1,024 tokens, then each key in another order, and its value is asked for.

A model with a window of 64 does not see the pair any more: only answers whose pair lies that far back are scored. With
`--two_step` the pairs are a -> b and b -> c in mixed order, each after a mark, and c is asked of a: what is read must
be asked with again. A level is the distance to the value that was to be read, in windows; of two steps that of the
nearer one.

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
    columns = ((1, 1), (2, 3), (4, 7), (8, 17), (1, 17))

    def __post_init__(self) -> None:
        if self.pairs < 16 or self.pairs % 16 or self.pairs > self.keys:
            raise InputError(f"pairs={self.pairs}: must be a multiple of 16, and at most keys={self.keys}")

    @property
    def vocab_size(self) -> int:
        return self.ask + 2

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

    @property
    def ask(self) -> int:
        """Begins a question for one step, the next id one for two, where there are both."""
        return self.value + self.values

    def draw(self, generator: torch.Generator, rows: int, share: float, *, test: bool) -> Questions:
        pairs = self.pairs >> min(HALVINGS, int((1 - share) * (HALVINGS + 1)))
        episodes = self.pairs // pairs
        keys_BEK = different(generator, rows, self.pairs, self.keys) + self.begin + 1
        keys_BEK = keys_BEK.view(rows, episodes, pairs)
        values_BEK = torch.randint(self.value, self.value + self.values, keys_BEK.shape, generator=generator)
        order_BEK, place_BEK = shuffled(generator, keys_BEK.shape)
        if self.two_step:
            values_BEK, question, nearest_BEQ = self._two_steps(generator, keys_BEK, values_BEK, place_BEK, test)
        else:
            turn_BEK, _ = shuffled(generator, keys_BEK.shape)
            question = [keys_BEK.gather(2, turn_BEK), values_BEK.gather(2, turn_BEK)]
            nearest_BEQ = place_BEK.gather(2, turn_BEK)
        stated = [keys_BEK.gather(2, order_BEK), values_BEK.gather(2, order_BEK)]
        if self.two_step:  # without the mark, b as a value could only be told from b as a key by counting
            stated.insert(0, torch.full_like(keys_BEK, self.begin))
        stated_BEX, questions_BEX = (torch.stack(each, 3).flatten(2) for each in (stated, question))
        # From the key that is asked for, back to the value that was stated after the key.
        size, tokens = len(stated), len(question)
        asked_Q = size * pairs + tokens * torch.arange(nearest_BEQ.shape[2]) + tokens - 2
        distance_BEQ = asked_Q - (size * nearest_BEQ + size - 1)
        none_BEX = torch.zeros_like(stated_BEX)
        none_BEQ = torch.zeros_like(distance_BEQ)
        level_BEX, targets_BEX = (
            torch.stack([*[none_BEQ] * (tokens - 2), each, none_BEQ], 3).flatten(2)
            for each in (distance_BEQ // self.window, torch.ones_like(distance_BEQ))
        )
        tokens_BX = torch.cat([stated_BEX, questions_BEX], 2).flatten(1)
        tokens_BX = torch.cat([torch.full((rows, 1), self.begin), tokens_BX], 1)
        level_BT, targets_BT = (
            torch.cat([torch.zeros(rows, 1, dtype=torch.int64), torch.cat([none_BEX, each], 2).flatten(1)], 1)[:, :-1]
            for each in (level_BEX, targets_BEX)
        )
        return Questions(tokens_BX, torch.full((rows,), tokens_BX.shape[1]), targets_BT > 0, level_BT)

    def _two_steps(
        self, generator: torch.Generator, keys_BEK: Tensor, values_BEK: Tensor, place_BEK: Tensor, test: bool
    ) -> tuple[Tensor, list[Tensor], Tensor]:
        """Return the values of all keys, the tokens of each question, and the place of its nearest pair.

        The first half of the keys are the a, the second the b. The test asks for c, as half of the rows in training do;
        in the others half of the questions ask for one step alone, from a or from b. With such rows alone a model
        learned all their questions and failed the test's: never more than about half of a row's had been of two steps.
        """
        half = keys_BEK.shape[2] // 2
        values_BEK = torch.cat([keys_BEK[..., half:], values_BEK[..., half:]], 2)
        a_BEQ, _ = shuffled(generator, keys_BEK[..., :half].shape)
        draws_BEQ = torch.rand(a_BEQ.shape, generator=generator)
        all_B = torch.rand(len(a_BEQ), generator=generator) < (1.0 if test else 0.5)
        two_BEQ = all_B[:, None, None] | (draws_BEQ < 0.5)
        first_BEQ = torch.where(~two_BEQ & (draws_BEQ > 0.75), a_BEQ + half, a_BEQ)
        last_BEQ = torch.where(two_BEQ, a_BEQ + half, first_BEQ)
        question = [self.ask + two_BEQ.long(), keys_BEK.gather(2, first_BEQ), values_BEK.gather(2, last_BEQ)]
        return values_BEK, question, torch.maximum(*(place_BEK.gather(2, each) for each in (first_BEQ, last_BEQ)))

    def shortcuts(self, questions: Questions) -> dict[str, Tensor]:
        """The value before, and of one step, by exclusion, the first that was stated and has not been asked for."""
        tokens_BX = questions.tokens
        index_X = torch.arange(tokens_BX.shape[1])
        are_values_BX = (tokens_BX >= self.value) & (tokens_BX < self.ask)
        latest_BX = torch.where(are_values_BX, index_X, 0).cummax(1).values
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
