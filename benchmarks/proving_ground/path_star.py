"""Path-star: from a start some arms of equal length lead away; which first step leads to the goal?

A row lists the edges of the graph G(arms, length) in random order, then start and goal, and asks for the path. The ids
of the nodes are fresh in each row. Training begins with arms of one step, unless told otherwise, since a choice among
arms can then be learnt before a long way back from the goal. The first step must be planned: a guess is right once in
`arms` times. Later steps follow from the step before, so answers are free-running: after a wrong step the rest is wrong
(Bachmann and Nagarajan 2024). A level is a step: the last one is the share of whole paths.

    python -m benchmarks.proving_ground.path_star --models reversed
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.proving_ground.runner import SHAPE, Contender, dense, prove
from benchmarks.proving_ground.task import EOS, Questions, Task, different
from lepton.config import LeptonConfig
from lepton.errors import InputError

SEGMENT = 32
"""A segment opens at the question."""


@dataclass(frozen=True, kw_only=True)
class PathStar(Task):
    """Paths in star graphs."""

    arms: int = 5
    length: int = 5
    """Nodes of the path, the start included."""
    ids: int = 100
    """From which a row takes its nodes."""
    reversed: bool = False
    """Whether the path is asked for from the goal back, which needs no plan: each step is one look at the edges."""
    whole_arms: bool = False
    """Whether training has arms of the full length from the start."""
    first_only: bool = False
    """Whether only the first step is asked for, so that no step can be copied from the one before."""

    small = {"arms": 2, "length": 3, "ids": 10}
    columns = ((1, 1), (2, 2), (4, 4), (9, 9), (19, 19))
    free_running = True

    def __post_init__(self) -> None:
        nodes = 1 + self.arms * (self.length - 1)
        if self.arms < 1 or self.length < 2 or nodes > self.ids:
            raise InputError(
                f"G({self.arms}, {self.length}) has {nodes} nodes: give arms, a length >= 2 and as many ids"
            )

    @property
    def vocab_size(self) -> int:
        return self.between + 4

    @property
    def chance(self) -> float:
        return 1 / self.arms

    @property
    def between(self) -> int:
        """Ends an edge; the ids after it are before start and goal, the mark of the question, and padding."""
        return EOS + 1 + self.ids

    @property
    def place(self) -> int:
        """Place of the mark of the question."""
        return -(-(3 * self.arms * (self.length - 1) + 3) // SEGMENT) * SEGMENT

    def draw(self, generator: torch.Generator, rows: int, share: float, *, test: bool) -> Questions:
        steps = self.length - 1 if test else self.steps_in_training(generator, share)
        edges = self.arms * steps
        nodes_BN = different(generator, rows, 1 + edges, self.ids) + EOS + 1
        start_B, arms_BAS = nodes_BN[:, 0], nodes_BN[:, 1:].view(rows, self.arms, steps)
        from_BAS = torch.cat([start_B[:, None, None].expand(-1, self.arms, 1), arms_BAS[..., :-1]], 2)
        ends_BA = torch.full_like(arms_BAS, self.between)
        listed_BE3 = torch.stack([from_BAS, arms_BAS, ends_BA], 3).flatten(1, 2)
        order_BE = torch.rand(rows, edges, generator=generator).argsort(1)
        listed_BX = listed_BE3.gather(1, order_BE[..., None].expand(-1, -1, 3)).flatten(1)
        path_BS = arms_BAS[:, 0]  # in the row all arms are alike: ids and the order of the edges are random
        mark, goal_B = self.between + 1, path_BS[:, -1]
        asked_BX = torch.stack([torch.full_like(goal_B, mark), start_B, goal_B, torch.full_like(goal_B, mark + 1)], 1)
        padding_BX = torch.full((rows, self.place - 3 - listed_BX.shape[1]), mark + 2)
        answer_BS = path_BS.flip(1) if self.reversed else path_BS
        answer_BS = answer_BS[:, :1] if self.first_only else answer_BS
        missing = 0 if self.first_only else self.length - 1 - steps
        after_BX = torch.full((rows, missing), mark + 2)
        tokens_BX = torch.cat([padding_BX, listed_BX, asked_BX, answer_BS, after_BX], 1)
        level_BT = torch.zeros(rows, tokens_BX.shape[1] - 1, dtype=torch.int64)
        level_BT[:, self.place : self.place + answer_BS.shape[1]] = 1 + torch.arange(answer_BS.shape[1])
        return Questions(tokens_BX, torch.full((rows,), tokens_BX.shape[1]), level_BT > 0, level_BT)

    def steps_in_training(self, generator: torch.Generator, share: float) -> int:
        """Return the edges of an arm in a batch: one at first, one more in each part of the first half of training.

        Half of the batches have as many as there are by then, the others fewer or as many.
        """
        if self.whole_arms:
            return self.length - 1
        most = min(self.length - 1, 1 + int(share * (self.length - 1)))
        longest, fewer = torch.rand(2, generator=generator).tolist()
        return most if longest < 0.5 else 1 + int(fewer * most)

    def shortcuts(self, questions: Questions) -> dict[str, Tensor]:
        """The arm whose first edge is listed first, to its end; and the one whose first edge is listed last."""
        tokens_BX, edges = questions.tokens, self.arms * (self.length - 1)
        listed_BE3 = tokens_BX[:, self.place - 3 - 3 * edges : self.place - 3].view(len(tokens_BX), edges, 3)
        from_BE, to_BE, _ = listed_BE3.unbind(2)
        starts_BE = from_BE == tokens_BX[:, self.place - 2, None]
        next_BV = torch.zeros(len(tokens_BX), self.vocab_size, dtype=torch.int64).scatter(1, from_BE, to_BE)
        index_E = torch.arange(edges)
        found = {}
        for name, sign in (("the first arm", -1), ("the last arm", 1)):
            chosen_B = torch.where(starts_BE, sign * index_E, -edges).argmax(1)
            steps = [to_BE.gather(1, chosen_B[:, None])]
            for _ in range(self.length - 2):
                steps.append(next_BV.gather(1, steps[-1]))
            guess_BT = torch.zeros_like(questions.level)
            guess_BT[:, self.place :] = torch.cat(steps, 1)
            found[name] = guess_BT
        return found


def shape(task: PathStar) -> LeptonConfig:
    """Return the complete model: 8 layers, a window of the whole row, tokens that think, and a peek they learn from."""
    width = task.place + task.length + SEGMENT
    config = LeptonConfig(**{**SHAPE, "layers": 8}, window=width, segment=SEGMENT, vocab_size=task.vocab_size)
    thoughts = {"count": 4, "ffn": 512, "rounds": task.length, "most_rounds": task.length, "over_tokens": True}
    return config.replace(thoughts=thoughts, peek={"width": 64, "horizon": task.length, "into_trunk": True})


CONTENDERS = {
    "reversed": Contender(changes=dense(), data={"reversed": True}),
    "first_only": Contender(changes=dense(layers=12), data={"first_only": True}, equal=False),
    "deep": Contender(changes=dense(layers=12), equal=False),
    "dense": Contender(changes=dense()),
    "no_peek": Contender(changes={"peek": None}),
    "hint_alone": Contender(losses={"peek": 0.0}),
    "peek_apart": Contender(changes={"peek.into_trunk": False}),
    "complete": Contender(),
}
"""The control comes first: backwards the path should be found at this size. Forwards, a deeper model that is asked for
the first step alone shows whether planning can be learnt; with all steps, later ones teach to copy."""


def main(words: Sequence[str] | None = None) -> None:
    """Run the task; see `prove`."""
    prove(PathStar, shape, CONTENDERS, {"steps": 10000, "rows": 256, "test_batches": 16}, words)


if __name__ == "__main__":
    main()
