"""The tasks that there are, and one that a small model learns in seconds."""

from dataclasses import dataclass

import torch

from benchmarks.proving_ground import babi, chains, hops, needle, path_star, recall
from benchmarks.proving_ground.task import Questions, Task

FILES = {"hops": (hops, hops.Hops()), "chains": (chains, chains.Chains()), "recall": (recall, recall.Recall()),
         "path_star": (path_star, path_star.PathStar()),
         "needle": (needle, needle.Needle(length=1024, tested=2048)),
         "babi": (babi, babi.Babi(filler=128, tested=256))}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Echo(Task):
    """Random tokens; the answer is the token before the question, three places back."""

    small = {}
    columns = ((1, 1), (2, 2))
    vocab_size = 12
    chance = 0.1

    def draw(self, generator, rows, share, *, test):
        tokens = torch.randint(1, 11, (rows, 12), generator=generator)
        tokens[:, 5::6] = tokens[:, 3::6]
        tokens[:, 4::6] = 11
        level = torch.zeros(rows, 11, dtype=torch.int64)
        level[:, 4::6] = torch.tensor([1, 2])
        return Questions(tokens, torch.full((rows,), 12), level > 0, level)
