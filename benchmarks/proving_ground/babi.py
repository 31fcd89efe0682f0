"""Stories of bAbI, tasks 1, 2, 3 and 15, and a question about each after thousands of tokens of something else.

A row is a story, filler, and the question with its answer, one token. Filler is prose of a prepared data set, its
validation split in the test, or noise where none is given. Training begins without filler in between and comes to
`filler` tokens; the test has the lengths `filler`, twice that, and so on up to `tested`. In training the names, places,
things and animals of a story change places, since there are only a thousand questions a task. There each row has filler
of its own length, and before its story others with their questions: one question in 2 k tokens would teach slowly. A
level is a task, and its column says how much filler there is. Without `--data_dir` there are simple stories of our own,
tasks 1 and 15.

    python -m benchmarks.proving_ground.babi --data_dir BABI --filler_dir D --tokenizer pile_tokenizer.json
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache

import torch
from torch import Tensor

from benchmarks.proving_ground.contenders import FEEDS_RATE, MEMORY
from benchmarks.proving_ground.filler import noise, prose
from benchmarks.proving_ground.runner import SHAPE, Contender, dense, prove
from benchmarks.proving_ground.stories import KINDS, NUMBERS, PLURAL, Question, invented, load_stories, renamed
from benchmarks.proving_ground.task import EOS, Questions, Task
from lepton.config import LeptonConfig
from lepton.data.tokenizer import Tokenizer, load_tokenizer
from lepton.errors import InputError

NOISE_IDS = 256
"""Different tokens of the noise."""
STEP = 16
"""Levels of a length: the level of a task is its number, and `STEP` more for each doubling of the filler."""
FRAME = ("went", "to", "the", "where", "is", "what", "a", "are", "afraid", "of", ".", "?", PLURAL)
INVENTED = sorted({*FRAME, *(word for kind in KINDS for word in kind)})
"""Words of our own stories."""


@dataclass(frozen=True, kw_only=True)
class Babi(Task):
    """Questions about stories that lie far back."""

    data_dir: str = ""
    """Folder with the files of bAbI in one language; empty: stories of our own."""
    filler_dir: str = ""
    """Prepared data set; empty: noise."""
    tokenizer: str = ""
    """File of the tokenizer that the filler was prepared with; empty: the one that LEPTON ships."""
    filler: int = 2048
    """Most tokens between story and question in training, and the fewest in the test."""
    tested: int = 16384
    """Most tokens between story and question in the test: `filler` times a power of two."""
    before: bool = False
    """Whether the filler stands before the story instead, and the question right after it."""
    story: int = 0
    """Most tokens of a story; longer ones are left out. 0: as many as the longest has."""
    unchanged: bool = False
    """Whether training keeps the names of the stories."""
    alone: bool = False
    """Whether a row of training has one story, and all rows as much filler."""

    small = {"filler": 64, "tested": 128}
    columns = tuple((STEP * i + number,) * 2 for i in range(4) for number in NUMBERS)

    def __post_init__(self) -> None:
        if self.filler < 1 or self.tested not in [self.filler << i for i in range(8)]:
            raise InputError(f"tested={self.tested}: must be filler={self.filler} times 1, 2, 4, .. 128")
        if self.tokenizer and not self.filler_dir:
            raise InputError(f"tokenizer={self.tokenizer}: is that of --filler_dir, which is missing")

    @cached_property
    def prose_ids(self) -> int:
        """Ids of the filler, that of the end of a document included; words without one of their own come after them."""
        return 1 + NOISE_IDS if not self.filler_dir else self._words_and_ids[1]

    @cached_property
    def _words_and_ids(self) -> tuple[dict[str, int], int]:
        every = (*load_stories(self.data_dir, "train"), *load_stories(self.data_dir, "test")) if self.data_dir else ()
        words = sorted({*INVENTED, *(word for each in every for word in (*each.facts, *each.asked, each.answer))})
        if not self.filler_dir:
            return {word: 1 + NOISE_IDS + i for i, word in enumerate(words)}, 1 + NOISE_IDS
        tokenizer = _tokenizer(self.tokenizer)
        ids, free = dict[str, int](), tokenizer.size
        for word in words:
            (*more, token) = tokenizer.encode(word if word in ".?" else f" {word}")
            if more or token in ids.values():
                token, free = free, free + 1
            ids[word] = token
        return ids, tokenizer.size

    @property
    def ids(self) -> dict[str, int]:
        """The token of each word: the one of prose where it is one token there, as ` office`."""
        return self._words_and_ids[0]

    @cached_property
    def vocab_size(self) -> int:
        return 1 + max(self.prose_ids - 1, *self.ids.values())

    @property
    def chance(self) -> float:
        return 1 / 6

    @property
    def lengths(self) -> list[int]:
        """Filler of the test."""
        return [self.filler << i for i in range(8) if self.filler << i <= self.tested]

    @cached_property
    def room(self) -> tuple[int, int]:
        """Most tokens of a story and of a question."""
        every = self._questions("train") + self._questions("test")
        return max(len(each.facts) for each in every), max(len(each.asked) for each in every)

    def _questions(self, split: str) -> tuple[Question, ...]:
        if not self.data_dir:
            generator = torch.Generator().manual_seed(int(split == "test"))
            return tuple(invented(generator, number) for number in (1, 15) for _ in range(1000))
        found = load_stories(self.data_dir, split)
        return tuple(each for each in found if not self.story or len(each.facts) <= self.story)

    @cached_property
    def _sorted(self) -> dict[str, list[list[Question]]]:
        """The questions of each split, by task."""
        return {
            split: [same for number in NUMBERS if (same := [q for q in self._questions(split) if q.number == number])]
            for split in ("train", "test")
        }

    def draw(self, generator: torch.Generator, rows: int, share: float, *, test: bool) -> Questions:
        return self.behind(generator, rows, self.filler, share, test=test)

    def held_out(self, index: int, rows: int) -> Questions:
        """Return batch `index` of the test; batch after batch has another length of filler."""
        generator = torch.Generator().manual_seed((self.seed * 1_000_003 + index) * 2 + 1)
        return self.behind(generator, rows, self.lengths[index % len(self.lengths)], 1.0, test=True)

    def part(self, index: int) -> str:
        return f"behind {self.lengths[index % len(self.lengths)]} tokens"

    def longer(self, index: int) -> bool:
        return index % len(self.lengths) > 0

    def behind(self, generator: torch.Generator, rows: int, filler: int, share: float, *, test: bool) -> Questions:
        """Return questions behind `share` of so many tokens of filler, in training at most; the rest is before the
        story, where training has more stories.
        """
        many = not test and not self.alone
        story, asked = self.room
        width = story + filler + asked + 1
        tokens_BX = self.fill(generator, rows, width, test=test)
        level_BT = torch.zeros(rows, width - 1, dtype=torch.int64)
        longer = STEP * self.lengths.index(filler)
        for row in range(rows):
            part = float(torch.rand((), generator=generator)) if many else 1.0
            between = 0 if self.before else round(filler * share * part)
            end, first = width, True
            while first or many:
                question = self.one(generator, row if first else None, test=test)
                facts, words = ([self.ids[word] for word in each] for each in (question.facts, question.asked))
                question_at = end - 1 - len(words)
                facts_at = question_at - between * first - len(facts)
                if facts_at < 0:
                    break
                tokens_BX[row, facts_at : facts_at + len(facts)] = torch.tensor(facts)
                tokens_BX[row, question_at:end] = torch.tensor([*words, self.ids[question.answer]])
                level_BT[row, end - 2] = question.number + longer
                end, first = facts_at, False
        return Questions(tokens_BX, torch.full((rows,), width), level_BT > 0, level_BT)

    def one(self, generator: torch.Generator, index: int | None, *, test: bool) -> Question:
        """Return a question of the task of an index, or of any task."""
        tasks = self._sorted["test" if test else "train"]
        if index is None:
            index = int(torch.randint(len(tasks), (1,), generator=generator))
        same = tasks[index % len(tasks)]
        question = same[int(torch.randint(len(same), (1,), generator=generator))]
        return question if test or self.unchanged else renamed(question, generator)

    def fill(self, generator: torch.Generator, rows: int, length: int, *, test: bool) -> Tensor:
        """Return filler [rows, length]."""
        if not self.filler_dir:
            return noise(generator, rows, length, EOS + 1, NOISE_IDS)
        return prose(self.filler_dir, self.prose_ids, generator, rows, length, test=test)

    def column(self, first: int, last: int) -> str:
        return f"{first % STEP}@{self.filler << first // STEP}"

    def shortcuts(self, questions: Questions) -> dict[str, Tensor]:
        """The last word before the filler that answers some question of the task."""
        found = torch.zeros_like(questions.level)
        for row, level in enumerate(questions.level[:, -1].tolist()):
            same = next(each for each in self._sorted["test"] if each[0].number == level % STEP)
            answers = torch.tensor(sorted({self.ids[question.answer] for question in same}))
            between = 0 if self.before else self.lengths[level // STEP]
            places = torch.isin(questions.tokens[row, : -1 - between], answers).nonzero()
            found[row, -1] = questions.tokens[row, places[-1, 0]] if len(places) else 0
        return {"the last place named": found}


@lru_cache(maxsize=2)
def _tokenizer(path: str) -> Tokenizer:
    return load_tokenizer(path or None)


def shape(task: Babi) -> LeptonConfig:
    """Return the complete model: a window of 512, all that reads beyond it, and thoughts.

    With prose the embedding is factorised: at full width the head would take most of a step's time.
    """
    rank = 64 if task.filler_dir else None
    config = LeptonConfig(**SHAPE, window=512, segment=128, embed_rank=rank, vocab_size=task.vocab_size)
    thoughts = {"count": 4, "ffn": 512, "rounds": 4, "most_rounds": 8, "over_tokens": True}
    return config.replace(memory=MEMORY, crystals={"slots": 64}, thoughts=thoughts)


CONTENDERS = {
    "deep": Contender(changes=dense(layers=8), equal=False, longer=False),
    "dense": Contender(changes=dense(), longer=False),
    "window_only": Contender(changes={"ideas": ()}),
    "no_memory": Contender(changes={"memory": None}),
    "no_crystals": Contender(changes={"crystals": None}),
    "no_thoughts": Contender(changes={"thoughts": None}),
    "complete": Contender(),
}
"""The control comes first: full attention of 8 layers should learn the tasks, behind as much as in training."""


DEFAULTS = {"steps": 4000, "rows": 16, "test_batches": 64, "feeds_rate": FEEDS_RATE}


def main(words: Sequence[str] | None = None) -> None:
    """Run the task; see `prove`."""
    prove(Babi, shape, CONTENDERS, DEFAULTS, words)


if __name__ == "__main__":
    main()
