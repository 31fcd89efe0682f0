"""Rows of tasks that stand beside text: of one length, in one vocabulary, with many questions each.

The curriculum of each task is its own. Tasks are written in ids of the upper half of the vocabulary, which are rare in
text; needles and stories in the words of the tokenizer. Short questions stand one after the other in a row.
"""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.functional import pad

from benchmarks.proving_ground.babi import Babi
from benchmarks.proving_ground.chains import Chains
from benchmarks.proving_ground.hops import Hops
from benchmarks.proving_ground.needle import Needle
from benchmarks.proving_ground.recall import Recall
from benchmarks.proving_ground.task import Questions, Task

VOCABULARY = 50_257
LENGTH = 512
"""Targets of a row in training."""
PADDING = 1
"""After the last question of a row."""
TURNS = (*("hops", "recall", "two_step") * 2, *("chains", "babi") * 3, *("needle",) * 4)
"""Tasks of the rows, in turn: more of those with few answers a row."""


@dataclass(frozen=True)
class Part:
    """A task as it is written here."""

    task: Task
    ids: Tensor | None = None
    """Ids of the task's tokens; None: they are those of the tokenizer already."""
    copies: int = 1
    """Questions of the task that stand one after the other in a row."""

    def training(self, step: int, steps: int, rows: int) -> Questions:
        """Return rows of `LENGTH` targets."""
        found = self.written(self.task.training(step, steps, rows * self.copies))
        more = LENGTH - found.targets.shape[1]
        tokens, marks = pad(found.tokens, (0, more), value=PADDING), (found.targets, found.level)
        return Questions(tokens, found.lengths, *(pad(each, (0, more)) for each in marks))

    def held_out(self, index: int, rows: int) -> Questions:
        """Return rows of the test, as long as the task has them."""
        return self.written(self.task.held_out(index, rows * self.copies))

    def written(self, questions: Questions) -> Questions:
        """Return questions in the ids of this model, `copies` of them a row."""
        tokens_BX = questions.tokens if self.ids is None else self.ids[questions.tokens]
        targets_BX, level_BX = (pad(each, (0, 1)) for each in (questions.targets, questions.level))
        tokens_BX, targets_BX, level_BX = (
            each.reshape(len(each) // self.copies, -1) for each in (tokens_BX, targets_BX, level_BX)
        )
        lengths_B = torch.full((len(tokens_BX),), tokens_BX.shape[1])
        return Questions(tokens_BX, lengths_B, targets_BX[:, :-1], level_BX[:, :-1])


def parts_of(data_dir: str, tokenizer: str, babi_dir: str, seed: int) -> tuple[dict[str, Part], dict[str, Part]]:
    """Return the tasks by name, and those that the test has beside them.

    Args:
        data_dir: prepared data set, for the prose around needles and stories.
        tokenizer: file of its tokenizer; empty: the one that LEPTON ships.
        babi_dir: folder of bAbI; empty: stories of our own.
        seed: of the questions. The ids do not depend on it.
    """
    prose = {"filler_dir": data_dir, "tokenizer": tokenizer}
    own: dict[str, Task] = {
        "hops": Hops(seed=seed, length=255),
        "chains": Chains(seed=seed, tested=Chains.trained),
        "recall": Recall(seed=seed, pairs=128, keys=1024),
        "two_step": Recall(seed=seed, pairs=112, keys=1024, two_step=True),
    }
    generator, parts, first = torch.Generator().manual_seed(0), dict[str, Part](), 0
    rare_R = VOCABULARY // 2 + torch.randperm(VOCABULARY - VOCABULARY // 2, generator=generator)
    for name, task in own.items():
        parts[name] = Part(task, rare_R[first : first + task.vocab_size], copies_of(task))
        first += task.vocab_size
    parts["needle"] = Part(Needle(seed=seed, length=LENGTH, tested=4 * LENGTH, taught=6, distractors=2, **prose))
    babi = Babi(seed=seed, data_dir=babi_dir, filler=1, tested=1, story=72, **prose)
    words_W = torch.arange(babi.vocab_size)
    if (none := babi.vocab_size - VOCABULARY) > 0:  # words that are no token, after the ids of a large tokenizer
        words_W[VOCABULARY:] = rare_R[first : first + none]
    parts["babi"] = Part(babi, words_W, copies_of(babi))
    longer = {"recall_1024": Part(replace(own["recall"], pairs=256), parts["recall"].ids)}  # type: ignore[call-arg]
    return parts, longer


def copies_of(task: Task) -> int:
    """Return how many questions of a task fit into a row."""
    return (LENGTH + 1) // task.training(0, 1, 1).tokens.shape[1]


def rows_of_tasks(parts: Mapping[str, Part], step: int, steps: int, rows: int) -> Questions:
    """Return the rows of tasks of a step: of each in turn, the next ones in the next step."""
    names = [TURNS[(step * rows + row) % len(TURNS)] for row in range(rows)]
    found = [parts[name].training(step, steps, count) for name, count in sorted(Counter(names).items())]
    return Questions(*(torch.cat(each) for each in zip(*found, strict=True)))
