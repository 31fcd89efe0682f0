"""Needles: sentences that give a key its value, far back in noise or prose, and a question for one or four of them.

All sentences of a row have one of `TEMPLATES` forms of words, fresh for each row: no mark says that a needle comes, and
the distractors give other keys other values in the same words. Key and value are two tokens each. Training has 2 k
tokens, the test up to 64 k, read as a stream. Each token of an answer counts, the second read after the true first one.
A level is 1 and the number of times that the length has doubled since training.

    python -m benchmarks.proving_ground.needle --asked 4 --filler_dir D --models complete
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.proving_ground.contenders import MEMORY, remembering
from benchmarks.proving_ground.filler import prose
from benchmarks.proving_ground.runner import SHAPE, prove
from benchmarks.proving_ground.task import EOS, Questions, Task
from lepton.config import LeptonConfig
from lepton.errors import InputError

TEMPLATES = 50
WORDS = 64
"""Tokens of which the templates are made."""
FORM = (3, 2, 1)
"""Words of a template before the key, between key and value, and at the end."""
SENTENCE = sum(FORM) + 4
"""Tokens of a sentence."""
QUESTION = 6
"""Tokens of a question and its answer: the mark, two of the key, one for reading, two of the value."""


@dataclass(frozen=True, kw_only=True)
class Needle(Task):
    """Sentences far back, asked for by their key."""

    asked: int = 1
    """Keys that a row asks for."""
    distractors: int = 4
    """Sentences with keys that nobody asks for."""
    filler_dir: str = ""
    """Prepared data set for prose; empty: noise."""
    prose_ids: int = 50257
    """Ids of the data set's tokenizer."""
    ids: int = 4096
    """Tokens of which keys and values are made, and noise."""
    length: int = 2048
    """Tokens of a row in training, and the fewest in the test."""
    tested: int = 65536
    """Most tokens of a row in the test: `length` times a power of four, or twice that."""

    small = {"length": 256, "tested": 512, "ids": 64}
    columns = ((1, 1), (2, 2), (3, 3), (4, 4), (5, 5), (6, 6))

    def __post_init__(self) -> None:
        if self.tested not in [self.length << i for i in range(12)]:
            raise InputError(f"tested={self.tested}: must be length={self.length} times 1, 2, 4, ..")
        need = (self.asked + self.distractors) * SENTENCE * 2 + QUESTION * self.asked + 2
        if self.asked < 1 or self.length < need:
            raise InputError(f"length={self.length}, asked={self.asked}: ask for a key in at least {need} tokens")

    @property
    def first(self) -> int:
        """First of the tokens of keys, values and noise."""
        return self.prose_ids if self.filler_dir else EOS + 1

    @property
    def word(self) -> int:
        """First of the words of the templates; the mark of a question and the one for reading come after them."""
        return self.first + self.ids

    @property
    def vocab_size(self) -> int:
        return self.word + WORDS + 2

    @property
    def chance(self) -> float:
        return 1 / self.ids

    @property
    def lengths(self) -> list[int]:
        """Lengths of the test."""
        return [self.length << i for i in range(12) if self.length << i <= self.tested]

    def templates(self) -> Tensor:
        """Return the forms of words [TEMPLATES, words], the same for each seed."""
        generator = torch.Generator().manual_seed(17)
        return self.word + torch.randint(WORDS, (TEMPLATES, sum(FORM)), generator=generator)

    def draw(self, generator: torch.Generator, rows: int, share: float, *, test: bool) -> Questions:
        return self.hidden(generator, rows, self.length, share, test=test)

    def held_out(self, index: int, rows: int) -> Questions:
        """Return batch `index` of the test; batch after batch has another length."""
        generator = torch.Generator().manual_seed((self.seed * 1_000_003 + index) * 2 + 1)
        return self.hidden(generator, rows, self.lengths[index % len(self.lengths)], 1.0, test=True)

    def hidden(self, generator: torch.Generator, rows: int, length: int, share: float, *, test: bool) -> Questions:
        """Return rows of so many tokens, with the sentences in the last `share` of them."""
        count, asks = self.asked + self.distractors, QUESTION * self.asked
        if self.filler_dir:
            tokens_BX = prose(self.filler_dir, self.prose_ids, generator, rows, length + 1, test=test)
        else:
            tokens_BX = torch.randint(self.first, self.word, (rows, length + 1), generator=generator)
        most = (length + 1 - asks) // SENTENCE
        slots = max(count, round(most * share))
        begin = length + 1 - asks - slots * SENTENCE
        place_BK = torch.rand(rows, slots, generator=generator).argsort(1)[:, :count] * SENTENCE + begin
        drawn = torch.rand(rows, self.ids, generator=generator).argsort(1)[:, : 2 * count].view(rows, count, 2)
        keys_BK2 = self.first + drawn
        values_BK2 = torch.randint(self.first, self.word, (rows, count, 2), generator=generator)
        form_BW = self.templates()[torch.randint(TEMPLATES, (rows,), generator=generator)]
        before, between, after = (each[:, None].expand(-1, count, -1) for each in form_BW.split(FORM, 1))
        sentences_BKS = torch.cat([before, keys_BK2, between, values_BK2, after], 2)
        index_BKS = place_BK[..., None] + torch.arange(SENTENCE)
        tokens_BX.scatter_(1, index_BKS.flatten(1), sentences_BKS.flatten(1))
        marks = torch.tensor([self.word + WORDS, self.word + WORDS + 1]).expand(rows, self.asked, 2)
        asked = slice(None, self.asked)
        questions = torch.cat([marks[..., :1], keys_BK2[:, asked], marks[..., 1:], values_BK2[:, asked]], 2)
        tokens_BX[:, -asks:] = questions.flatten(1)
        level_BT = torch.zeros(rows, length, dtype=torch.int64)
        level = 1 + self.lengths.index(length)
        for question in range(self.asked):
            end = length - QUESTION * (self.asked - 1 - question)
            level_BT[:, end - 2 : end] = level
        return Questions(tokens_BX, torch.full((rows,), length + 1), level_BT > 0, level_BT)

    def column(self, first: int, last: int) -> str:
        return f"{self.length << first - 1}"

    def shortcuts(self, questions: Questions) -> dict[str, Tensor]:
        """The value of the latest sentence, whatever its key: found by the words that the row repeats."""
        tokens_BX, found = questions.tokens, torch.zeros_like(questions.level)
        for row in range(len(tokens_BX)):
            is_word = (tokens_BX[row] >= self.word) & (tokens_BX[row] < self.word + WORDS)
            latest = int(is_word.nonzero()[-1]) - 2
            for end in questions.level[row].nonzero()[1::2, 0].tolist():
                found[row, end - 1 : end + 1] = tokens_BX[row, latest : latest + 2]
        return {"the latest value": found}


def shape(task: Needle) -> LeptonConfig:
    """Return the complete model: a window of 512, the working memory and crystals."""
    config = LeptonConfig(**SHAPE, window=512, segment=64, vocab_size=task.vocab_size)
    return config.replace(memory=MEMORY, crystals={"slots": 64})


CONTENDERS = remembering()


def main(words: Sequence[str] | None = None) -> None:
    """Run the task; see `prove`."""
    prove(Needle, shape, CONTENDERS, {"steps": 6000, "rows": 16, "test_batches": 24}, words)


if __name__ == "__main__":
    main()
