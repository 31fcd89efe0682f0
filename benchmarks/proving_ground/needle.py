"""Needles: sentences that give a key its value, far back in noise or prose, and questions for one or four of them.

A key is two words, a value a number of four digits, in the tokens of a real tokenizer; noise is any of its tokens, and
prose that of a data set that was prepared with it. All sentences of a row are of one template of fifty: no mark says
that a needle comes, and the distractors give other keys other values in the same words. Ten templates are left for the
test, which asks for one key in noise, one in prose, four in prose, and for one in the words of training (`known`). An
answer is right when both its tokens are. Of four, each is asked for after the true answers to those before.

Training has rows of 2 k tokens, half of them noise, with more sentences and more questions than the test: one question
in 2 k tokens would teach slowly. The test reads up to 64 k tokens as a stream. One model is trained for all parts of
the test. Training and test keep to the time limit of `--seconds`, by default 480 s for all contenders: three quarters
for training, the rest in equal shares for each kind and length of the test; where time is up, the run says it.

    python -m benchmarks.proving_ground.needle --filler_dir D --tokenizer pile_tokenizer.json --models dense complete
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from benchmarks.proving_ground.contenders import FEEDS_RATE, MEMORY, remembering
from benchmarks.proving_ground.filler import prose
from benchmarks.proving_ground.runner import SHAPE, prove
from benchmarks.proving_ground.sentences import KEY, NEW, TEMPLATES, VALUE, Language, language
from benchmarks.proving_ground.task import EOS, Questions, Task, different
from lepton.config import LeptonConfig
from lepton.errors import InputError

KINDS = {"noise": 1, "prose": 1, "four": 4, "known": 1}
"""Kinds of the test, and the keys that a row asks for."""
NEAREST = 0.5
"""Share of the filler that holds all sentences at the start of training. Nearer ones would lie in the window, and the
first lesson would be that it needs no memory."""
STEP = 16
"""Levels of a kind: one for each length of the test."""


@dataclass(frozen=True, kw_only=True)
class Needle(Task):
    """Sentences far back, asked for by their key."""

    taught: int = 8
    """Keys that a row of training asks for."""
    distractors: int = 4
    """Sentences with keys that nobody asks for."""
    filler_dir: str = ""
    """Prepared data set for prose; empty: noise in all rows, and no part of the test in prose."""
    tokenizer: str = ""
    """File of the tokenizer that the prose was prepared with; empty: the one that LEPTON ships."""
    length: int = 2048
    """Tokens of a row in training, and the fewest in the test."""
    tested: int = 65536
    """Most tokens of a row in the test, which has `length`, four times that, and so on, and this."""

    small = {"length": 256, "tested": 512, "taught": 1, "distractors": 1, "rows": 2, "test_rows": 2, "test_batches": 6}
    columns = tuple((STEP * kind + i,) * 2 for kind in range(4) for i in range(1, 5) if kind < 3 or i in (1, 4))
    whole = VALUE

    def __post_init__(self) -> None:
        if self.tested not in [self.length << i for i in range(12)]:
            raise InputError(f"tested={self.tested}: must be length={self.length} times 1, 2, 4, ..")
        if self.tokenizer and not self.filler_dir:
            raise InputError(f"tokenizer={self.tokenizer}: is that of --filler_dir, which is missing")
        asked = max(self.taught, *KINDS.values())
        room = 2 * (asked + self.distractors) * self.language.sentences_FS.shape[1]
        need = room + asked * len(self.language.question_Q)
        if self.taught < 1 or self.distractors < 0 or self.length < need:
            raise InputError(
                f"length={self.length}: give at least {need} tokens for taught={self.taught}, "
                f"distractors={self.distractors}"
            )

    @cached_property
    def language(self) -> Language:
        return language(self.tokenizer)

    @property
    def vocab_size(self) -> int:
        return self.language.size

    @property
    def chance(self) -> float:
        return 1 / len(self.language.values_N2)

    @cached_property
    def lengths(self) -> list[int]:
        """Lengths of the test."""
        return sorted({self.tested, *(self.length << i for i in range(0, 12, 2) if self.length << i <= self.tested)})

    @cached_property
    def parts(self) -> list[tuple[int, str]]:
        """Length and kind of the parts of the test, batch after batch another one."""
        kinds = [kind for kind in KINDS if self.filler_dir or kind != "prose"]
        return [(length, kind) for length in self.lengths for kind in kinds]

    def part(self, index: int) -> str:
        length, kind = self.parts[index % len(self.parts)]
        return f"{kind} {length}"

    def longer(self, index: int) -> bool:
        return self.parts[index % len(self.parts)][0] > self.length

    def draw(self, generator: torch.Generator, rows: int, share: float, *, test: bool) -> Questions:
        old = len(TEMPLATES) - NEW
        form_B = torch.randint(old, (rows,), generator=generator)
        filler_BX = self.filler(generator, rows, self.length + 1, noise=rows // 2, test=test)
        return self.hidden(generator, filler_BX, form_B, self.taught, share, 1)

    def held_out(self, index: int, rows: int) -> Questions:
        """Return batch `index` of the test, of one of its parts."""
        generator = torch.Generator().manual_seed((self.seed * 1_000_003 + index) * 2 + 1)
        length, kind = self.parts[index % len(self.parts)]
        old = len(TEMPLATES) - NEW
        low, high = (0, old) if kind == "known" else (old, len(TEMPLATES))
        form_B = torch.randint(low, high, (rows,), generator=generator)
        filler_BX = self.filler(generator, rows, length + 1, noise=rows if kind == "noise" else 0, test=True)
        level = 1 + self.lengths.index(length) + STEP * [*KINDS].index(kind)
        return self.hidden(generator, filler_BX, form_B, KINDS[kind], 1.0, level)

    def filler(self, generator: torch.Generator, rows: int, length: int, *, noise: int, test: bool) -> Tensor:
        """Return filler [rows, length], the first `noise` rows without prose; all without a data set."""
        noise = noise if self.filler_dir else rows
        filler_BX = torch.randint(EOS + 1, self.vocab_size, (rows, length), generator=generator)
        if noise < rows:
            left = rows - noise
            filler_BX[noise:] = prose(self.filler_dir, self.vocab_size, generator, left, length, test=test)
        return filler_BX

    def hidden(
        self, generator: torch.Generator, tokens_BX: Tensor, form_B: Tensor, asked: int, share: float, level: int
    ) -> Questions:
        """Return rows with sentences in the last `share` of the filler `tokens_BX`, and questions at their end.

        Args:
            generator: of keys, values and places.
            tokens_BX: filler, which is changed.
            form_B: template of each row.
            asked: keys that are asked for.
            share: in 0..1.
            level: of the answers.
        """
        said, (rows, width), count = self.language, tokens_BX.shape, asked + self.distractors
        sentence, question = said.sentences_FS.shape[1], len(said.question_Q)
        body = width - asked * question
        most = body // sentence
        slots = max(count, round(most * max(NEAREST, share)))
        place_BK = different(generator, rows, count, slots) * sentence + body - slots * sentence
        words_BK = different(generator, rows, KEY * count, len(said.words_W))
        keys_BK2 = said.words_W[words_BK].view(rows, count, KEY)
        values_BK2 = said.values_N2[torch.randint(len(said.values_N2), (rows, count), generator=generator)]
        index_BX = (place_BK[..., None] + torch.arange(sentence)).flatten(1)
        under_BKS = tokens_BX.gather(1, index_BX).view(rows, count, sentence)
        forms_BKS = said.sentences_FS[form_B][:, None].expand(-1, count, -1)
        tokens_BX.scatter_(1, index_BX, said.written(forms_BKS, keys_BK2, values_BK2, under_BKS).flatten(1))
        form_BKQ = said.question_Q.expand(rows, asked, -1)
        asked_BKQ = said.written(form_BKQ, keys_BK2[:, :asked], values_BK2[:, :asked], form_BKQ)
        tokens_BX[:, body:] = asked_BKQ.flatten(1)
        level_BX = torch.zeros_like(tokens_BX)
        level_BX[:, body:].view(rows, asked, question)[..., -VALUE:] = level
        level_BT = level_BX[:, 1:].contiguous()
        return Questions(tokens_BX, torch.full((rows,), width), level_BT > 0, level_BT)

    def column(self, first: int, last: int) -> str:
        kind, i = divmod(first, STEP)
        lengths = [*self.lengths, *[0] * 4]
        return f"{[*KINDS][kind][0]}{lengths[i - 1]}" if lengths[i - 1] else "-"

    def shortcuts(self, questions: Questions) -> dict[str, Tensor]:
        """The value of the latest sentence, whatever its key."""
        tokens_BX, found = questions.tokens, torch.zeros_like(questions.level)
        values = {tuple(each) for each in self.language.values_N2.tolist()}
        for row, places in enumerate(questions.level):
            ends = (places > 0).nonzero()[:, 0].view(-1, VALUE)
            tokens = tokens_BX[row].tolist()
            at = int(ends[0, 0]) - len(self.language.question_Q) + VALUE
            latest = next(i for i in range(at, 0, -1) if tuple(tokens[i : i + VALUE]) in values)
            found[row, ends] = tokens_BX[row, latest : latest + VALUE]
        return {"the latest number": found}


def shape(task: Needle) -> LeptonConfig:
    """Return the complete model: a window of 512, the working memory and crystals.

    The embedding is factorised: at full width it would be four times the rest, and the head most of a step's time.
    """
    config = LeptonConfig(**SHAPE, window=512, segment=64, embed_rank=64, vocab_size=task.vocab_size)
    return config.replace(memory=MEMORY, crystals={"slots": 64})


CONTENDERS = remembering()


DEFAULTS = {"steps": 6000, "rows": 16, "test_batches": 64, "test_rows": 64, "feeds_rate": FEEDS_RATE}


def main(words: Sequence[str] | None = None) -> None:
    """Run the task; see `prove`."""
    prove(Needle, shape, CONTENDERS, DEFAULTS, words)


if __name__ == "__main__":
    main()
