"""Models in training as benchmarks drive them: whole steps on given batches, held-out nats, and a fresh start."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lepton.api import Lepton
from lepton.data.shards import Batch, ShardedDataset
from lepton.errors import InputError
from lepton.model.parameters import FEED
from lepton.runtime.device import pick_dtype
from lepton.train.batch_plan import plan_step
from lepton.train.cost import training_flops_per_token
from lepton.train.micro_step import MicroStep
from lepton.train.optimizer import Optimizers
from lepton.train.schedule import lr_scale
from lepton.train.settings import TrainSettings

WAYS = {
    "plain": {"compiled": False, "captured": False},
    "recorded": {"compiled": False, "captured": True},
    "compiled": {"compiled": True, "captured": True},
}
"""How a model may run; `compiled` is the usual one on a GPU, `plain` on a CPU."""
DEFAULTS = TrainSettings()
"""What `train.py` does by itself."""
FIRST_STEPS = 2
"""Steps before the clock runs: the second one of equal shapes is captured."""


def own_schedule(step: int, steps: int) -> float:
    """Return the share of the peak rates at a step, by the schedule of `train.py`."""
    return lr_scale(
        step,
        max_steps=steps,
        warmup_steps=DEFAULTS.warmup_steps,
        cooldown=DEFAULTS.cooldown,
        min_lr_ratio=DEFAULTS.min_lr_ratio,
    )


def change_ideas(model: Lepton, losses: Mapping[str, float], feeds_rate: float) -> None:
    """Change how ideas learn, before an optimizer is made.

    Args:
        model: it is changed.
        losses: weights of auxiliary losses; others stay as they are.
        feeds_rate: share of Muon's rate for the feeds of deep blocks.
    """
    for idea in model.ideas.values():
        idea.loss_weights = {name: losses.get(name, value) for name, value in idea.loss_weights.items()}
        idea.declares = {
            name: entry.but(rate=feeds_rate) if entry is FEED else entry for name, entry in idea.declares.items()
        }


class Training(ABC):
    """A model in training, as the clock sees it."""

    model: nn.Module

    def __init__(self, device: torch.device, seed: int) -> None:
        self.device, self.seed = device, seed

    @property
    @abstractmethod
    def params(self) -> int:
        """Parameters that inference uses."""

    @abstractmethod
    def flops_per_token(self, length: int) -> float:
        """Of forward and backward pass."""

    @abstractmethod
    def step(self, batches: Sequence[Batch], index: int, scale: float) -> dict[str, Tensor]:
        """One optimizer step, number `index`, over micro-batches at `scale` times the peak rates.

        Returns:
            `loss`, the mean nats a target, and `grad_norm`; both stay on the device.
        """

    @abstractmethod
    def nats(self, batch: Batch) -> Tensor:
        """Return the nats of each target [B, T], zero where a row has none; the model is to be in eval mode."""

    @abstractmethod
    def compile(self, rows: int, length: int) -> None:
        """Compile what batches of this shape need.

        Raises:
            InputError: it cannot be compiled here.
        """

    @abstractmethod
    def optimizer_states(self) -> Iterator[dict[str, Tensor]]:
        """Yield the tensors that an optimizer keeps of each parameter; all begin at zero."""

    def prepare(self, rows: int, length: int) -> None:
        """Compile, record, and take the first steps, which load kernels; afterwards all is as before."""
        self._first = [parameter.detach().cpu().clone() for parameter in self.model.parameters()]
        self.compile(rows, length)
        batch = self.idle(rows, length)
        for index in range(FIRST_STEPS):
            self.step([batch], index, 1.0)
        self.restart()

    def idle(self, rows: int, length: int) -> Batch:
        """Return a batch of this shape that says nothing."""
        return Batch(torch.ones(rows, length + 1, dtype=torch.int64), torch.full((rows,), length + 1))

    @torch.no_grad()
    def restart(self) -> None:
        """Go back to the initial weights; what is compiled and recorded stays."""
        torch.manual_seed(self.seed)
        for parameter, first in zip(self.model.parameters(), self._first, strict=True):
            parameter.copy_(first)
        for state in self.optimizer_states():
            for tensor in state.values():
                tensor.zero_()


class LeptonTraining(Training):
    """A LEPTON in training, by default with the rates of `train.py`; it lies on its device already."""

    model: Lepton

    def __init__(
        self,
        model: Lepton,
        way: str,
        *,
        seed: int = 0,
        lr: float = DEFAULTS.lr,
        muon_lr: float = DEFAULTS.muon_lr,
        weight_decay: float = DEFAULTS.weight_decay,
    ) -> None:
        super().__init__(model.device, seed)
        self.model, self.way = model.train(), way
        model.compute_dtype = pick_dtype("auto", self.device)
        self.optimizers = Optimizers(
            model, kind="muon", lr=lr, muon_lr=muon_lr, weight_decay=weight_decay, captured=WAYS[way]["captured"]
        )

    @property
    def params(self) -> int:
        return self.model.num_params()

    def flops_per_token(self, length: int) -> float:
        return training_flops_per_token(self.model, self.rows, length)

    def compile(self, rows: int, length: int) -> None:
        self.rows, lines = rows, []
        self.micro_step = MicroStep(self.model, **WAYS[self.way], say=lines.append)
        self.micro_step.prepare(rows, length)
        if any("cannot" in line for line in lines):
            raise InputError(f"{lines[-1]}, so nothing here would be worth timing")

    def step(self, batches: Sequence[Batch], index: int, scale: float) -> dict[str, Tensor]:
        for micro, (batch, share) in enumerate(zip(batches, shares(batches), strict=True)):
            think, groups, step = plan_step(self.model, batch.tokens, self.seed, index, micro, scale=scale)
            self.micro_step(batch.tokens, batch.lengths, think, groups, share, step=step)
        figures = self.micro_step.take_figures()
        return figures | {"grad_norm": self.optimizers.step(scale, DEFAULTS.grad_clip, self.micro_step.graphs)}

    def nats(self, batch: Batch, **options: Any) -> Tensor:
        """As in `Training`; `options` are those of `Network.trunk`."""
        tokens_BX = batch.tokens.to(self.device)
        hidden_BTD = self.model.trunk(tokens_BX[:, :-1], **options).hidden
        return torch.stack([
            nats_of(self.model.head(hidden), row, length)
            for hidden, row, length in zip(hidden_BTD, tokens_BX, batch.lengths.tolist(), strict=True)
        ])  # fmt: skip

    def optimizer_states(self) -> Iterator[dict[str, Tensor]]:
        for states in self.optimizers.state_dict()["states"].values():
            yield from states.values()


def shares(batches: Sequence[Batch]) -> list[float]:
    """Return the share of each micro-batch in the targets of its step."""
    counts = [int(batch.lengths.sum()) - len(batch.lengths) for batch in batches]
    return [count / sum(counts) for count in counts]


def nats_of(logits_TV: Tensor, tokens_X: Tensor, length: int) -> Tensor:
    """Return the nats of each target of a row, float32 [T]; zero beyond its `length` valid tokens."""
    nats_T = nn.functional.cross_entropy(logits_TV.float(), tokens_X[1:], reduction="none")
    nats_T[length - 1 :] = 0
    return nats_T


@torch.no_grad()
def held_out_nats(
    model: nn.Module, nats: Callable[[Batch], Tensor], data: ShardedDataset, rows: int, limit: int | None
) -> Tensor:
    """Return the sum of nats at each place of a window, and the number of targets there, float64 [2, T].

    Args:
        model: it is put into eval mode meanwhile.
        nats: `Training.nats` of it.
        data: a validation split.
        rows: windows at a time.
        limit: batches at most, of windows spread over the split; None: all.
    """
    was = model.training
    model.eval()
    sums = torch.zeros(2, data.seq_len, dtype=torch.float64)
    for batch in data.batches(rows, limit):
        sums[0] += nats(batch).sum(0).cpu()
        sums[1] += (torch.arange(data.seq_len) < batch.lengths[:, None] - 1).sum(0)
    model.train(was)
    return sums
