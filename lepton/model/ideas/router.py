"""Sparse depth routing: which tokens go through the deep blocks, and how the others reach the head.

One score per token, computed from the stem state, predicts by how many nats the deep blocks lower the loss. With a
depth in 0..1, a token is a candidate for the deep blocks if its score is above the quantile of that share. A running
count decides: each window of `window` tokens in a document sends exactly round(depth x window) tokens deep. Within a
window the count may run ahead or fall back by a quarter of it, or by 2 if that is more. So a depth means the same
compute for every text. With a least saving in place of a depth, a token goes deep if its score is above it, and a text
of which little is to be saved takes less compute. The choice is causal: there is no top-k over a sequence, and no
statistic of a batch. Router and exit learn from stopped gradients, so they do not change the trunk, unless `into_stem`
or `served` says so: then the stem learns to predict, and the deep blocks to attend to tokens that did not go deep. In
the eight sizes the stem does; the deep blocks do not.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lepton.config import IdeaConfig, LeptonConfig
from lepton.model.block import few_mlp
from lepton.model.budget import Budget
from lepton.model.ideas.idea import (
    OUTCOME_STRIDE,
    Call,
    Contribution,
    Flow,
    Idea,
    Outcome,
    Switch,
    Work,
    matrices,
    picks,
)
from lepton.model.layers import Linear, norm
from lepton.model.parameters import BIAS, MATRIX, SCORE, ZERO_MATRIX, replaced
from lepton.model.timeline import Timeline
from lepton.ops.cross_entropy import ENTRIES_GPU, LOGIT_BYTES
from lepton.ops.divergence import divergence_chunk, linear_divergence

SLACK = 1 / 4
"""Part of a window by which the count may run ahead or fall back, because hard tokens come in bursts."""
QUANTILES = 65
"""Entries of the table of quantiles."""


@dataclass(frozen=True, kw_only=True)
class RouterConfig(IdeaConfig):
    """Depth routing."""

    exit_width: int = 384
    """Hidden width of the exit, the MLP of tokens that skip the deep blocks."""
    window: int = 64
    """Tokens in which the share of deep tokens is exact."""
    exit_stride: int = OUTCOME_STRIDE
    """Exit and score learn from one position in this many."""
    into_stem: float = 0.0
    """Weight of the exit's loss in the gradient of what the exit reads, relative to that of the model's own loss. It
    follows the learning rate, so it falls to 0 over the cool-down, which the trunk has to itself. 0: no gradient."""
    distil: bool = False
    """Whether the exit learns the deep model's distribution, KL(deep || exit), instead of the next token."""
    expected: bool = False
    """Whether the score learns KL(deep || exit), the nats that depth is expected to save, instead of the difference of
    the losses of the one token that followed, which is that and noise."""
    reads_exit: bool = False
    """Whether the score reads the state that the exit reads, after memory and hint, instead of the stem's."""

    served: float = 0.0
    """In training, in half of the rows, each token serves the deep blocks keys and values of its state before them with
    a chance that is uniform in 0..this in each row. So they learn to attend to tokens that did not go deep, while all
    streams run on and are trained. 0: none does."""

    name = "router"
    most = {"exit_width": 1 << 18, "window": 1 << 20, "exit_stride": 1 << 20, "into_stem": 100, "served": 1}
    flat = {"exit_width": "exit_width", "capacity_window": "window"}
    flat_switch = "router"

    def check(self, config: LeptonConfig) -> None:
        self.at_least(1, "exit_width", "window", "exit_stride")
        self.at_least(0, "into_stem", "served")

    def build(self, config: LeptonConfig) -> "Router":
        return Router(config, self)

    @classmethod
    def preset(cls, size: str, width: int) -> "RouterConfig":
        """With the options that won at MICRO and TINY (docs/log.md, 2026-11-28). NANO's head is most of its cost."""
        stride = cls.exit_stride if size == "nano" else 8
        learns: dict[str, Any] = {"into_stem": 0.3, "distil": True, "expected": True, "reads_exit": True}
        return cls(exit_width=width // 2, exit_stride=stride, **learns)


@dataclass(frozen=True)
class RouterState:
    """The state of the router."""

    taken_B: Tensor
    """Number of tokens of the current window that went deep."""


@dataclass(frozen=True)
class RouterUpdate:
    """The running count over a chunk, from which the state after any number of its tokens follows."""

    taken_BT: Tensor
    past: RouterState
    window: int

    def after(self, count_B: Tensor, timeline: Timeline) -> RouterState:
        """Return the count after the first `count_B` tokens."""
        inside_B = timeline.position_after(count_B) % self.window > 0
        return RouterState(timeline.at(self.taken_BT, count_B, self.past.taken_B) * inside_B)


class Router(Idea):
    """The score, the table of its quantiles, and the exit."""

    name = "router"
    loss_weights = {"exit": 0.1, "router": 0.1}
    old_names = {"taken_B": "router.taken_B"}
    declares = {
        "benefit.weight": SCORE.but(auxiliary=True),
        "benefit.bias": BIAS.but(auxiliary=True),
        "exit_up.weight": MATRIX.but(auxiliary=True),
        "exit_down.weight": ZERO_MATRIX.but(auxiliary=True),
    }
    quantiles: Tensor

    def __init__(self, config: LeptonConfig, own: RouterConfig) -> None:
        super().__init__()
        self.own, self.window = own, own.window
        self.vocab_size, self.cap = config.vocab_size, config.logit_cap
        self.width, self.deep_layers = config.width, config.layers - config.stem_layers
        if own.distil or own.expected:
            self.compiled = ("divergence_chunk",)
        self.benefit = nn.Linear(config.width, 1)
        self.exit_up = Linear(config.width, own.exit_width)
        self.exit_down = Linear(own.exit_width, config.width)
        # Scores at the quantiles 0, 1/64, ..., 1, measured by `lepton calibrate`.
        self.register_buffer("quantiles", torch.empty(QUANTILES))
        self.budgets: tuple[Budget, ...] = ()
        """What `lepton calibrate --max_cost` found for these weights; other weights, once loaded, have none."""

    def reset(self) -> None:
        """Set the quantiles to those of a standard normal, the scores of an untrained model."""
        probability = torch.linspace(0, 1, QUANTILES).clamp(1e-3, 1 - 1e-3)
        self.quantiles.copy_(2**0.5 * torch.erfinv(2 * probability - 1))

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self.budgets = ()

    def fresh(self, rows: int, dtype: torch.dtype, device: torch.device, *, allocate: bool) -> RouterState:
        return RouterState(torch.zeros(rows, dtype=torch.int64, device=device))

    def limits(self, config: LeptonConfig) -> dict[str, tuple[float, float]]:
        return {"taken_B": (0, self.window)}

    def contribute(self, flow: Flow, past: RouterState) -> Contribution:
        """Choose the tokens that go deep."""
        benefit_BT = self.score(norm(flow.x_BTD) if self.own.reads_exit else flow.u_BTD)
        call = flow.call
        deep_BT, taken_BT = self.choose(benefit_BT, call.depth, past.taken_B, flow.timeline, call.least)
        return Contribution(signal_BT=benefit_BT, deep_BT=deep_BT, update=RouterUpdate(taken_BT, past, self.window))

    def after_blocks(self, x_BTD: Tensor, deep_BT: Tensor, call: Call) -> Tensor:
        """Apply the exit to the tokens that skipped the deep blocks."""
        if not call.routed:
            return x_BTD
        if call.static:
            easy_M = (~deep_BT).flatten()
            return few_mlp(x_BTD.flatten(0, 1), self.exit_up, self.exit_down, easy_M).view_as(x_BTD)
        index_M = (~deep_BT).flatten().nonzero()[:, 0]
        easy_MD = self.exit(x_BTD.flatten(0, 1)[index_M])
        return x_BTD.flatten(0, 1).index_copy(0, index_M, easy_MD).view_as(x_BTD)

    def losses(self, outcome: Outcome) -> dict[str, Tensor]:
        """At sampled positions: the loss of predictions through the exit, and the squared error of the score."""
        flow, own = outcome.flow, self.own
        index_M = picks(outcome.following_BT, own.exit_stride)
        target_M = outcome.following_BT.flatten()[index_M]
        valid_M = target_M >= 0
        exit_MD = self.exit(self.learning(flow.x_BTD.flatten(0, 1)[index_M], outcome.rate))
        if own.distil:
            exit_loss, beyond_M = self.divergence(outcome, exit_MD, index_M, valid_M)
            if not own.expected:
                _, exit_nats_M = outcome.frozen_loss(exit_MD.detach(), target_M)
        else:
            exit_loss, exit_nats_M = outcome.frozen_loss(exit_MD, target_M)
            if own.expected:
                _, beyond_M = self.divergence(outcome, exit_MD.detach(), index_M, valid_M)
        assert outcome.nats_M is not None
        saved_M = beyond_M if own.expected else exit_nats_M - outcome.nats_M[index_M]
        benefit_BT = flow.contributions[self.name].signal_BT
        assert benefit_BT is not None
        error_M = (benefit_BT.flatten()[index_M] - saved_M.clamp(-5, 5)).square() * valid_M
        return {"exit": exit_loss, "router": error_M.sum() / valid_M.sum().clamp(min=1)}

    def learning(self, x_MD: Tensor, rate: float | Tensor) -> Tensor:
        """Return states that the exit learns from: the same, with the share of its gradient that `into_stem` says.

        `rate` is the share of the peak learning rate.
        """
        weight = self.loss_weights["exit"]
        if not self.own.into_stem or not weight:
            return x_MD.detach()
        share = torch.as_tensor(self.own.into_stem / weight * rate, dtype=x_MD.dtype, device=x_MD.device)
        return torch.lerp(x_MD.detach(), x_MD, share)

    def divergence(self, outcome: Outcome, exit_MD: Tensor, index_M: Tensor, valid_M: Tensor) -> tuple[Tensor, Tensor]:
        """Return the mean KL(deep || exit) over the valid of the picked positions, and that of each in nats.

        The deep model and the head get no gradient.
        """
        deep_MD = outcome.hidden_BTD.detach().flatten(0, 1)[index_M]
        student_ME, teacher_ME = (outcome.frozen_down(each) for each in (norm(exit_MD), deep_MD))
        options: dict[str, Any] = {"vocab_size": self.vocab_size, "cap": self.cap, "chunk": self.divergence_chunk}
        return linear_divergence(student_ME, teacher_ME, outcome.rows_VE, valid_M, **options)

    def divergence_chunk(
        self, raw_OV: Tensor, teacher_OV: Tensor, share_O: Tensor, vocab_size: int, cap: float
    ) -> tuple[Tensor, Tensor]:
        """`lepton.ops.divergence.divergence_chunk`, which the compiler takes as a method."""
        return divergence_chunk(raw_OV, teacher_OV, share_O, vocab_size, cap)

    def flops(self, work: Work) -> float:
        return work.length * (matrices(self.benefit) + (1 - work.depth) * matrices(self.exit_up, self.exit_down))

    def extra_training_flops(self, work: Work, head: int) -> float:
        """Score and exit give no gradient to their inputs; the exit and some heads run at sampled positions."""
        own = self.own
        heads = 4 if own.distil != own.expected else 3 if own.distil else 2
        passes = 3 if own.into_stem else 2
        sampled = 2 * (passes * matrices(self.exit_up) + 3 * matrices(self.exit_down) + heads * head)
        return sampled / own.exit_stride - 2 * matrices(self.benefit)

    def served_in_training(self, rows: int, length: int, generator: torch.Generator) -> Tensor | None:
        """Draw the tokens of a training batch that serve earlier keys and values, bool [rows, length]; None: none."""
        if not self.own.served:
            return None
        chance_B, half_B = torch.rand(2, rows, generator=generator)
        chance_B = self.own.served * chance_B * (half_B < 0.5)
        return torch.rand(rows, length, generator=generator) < chance_B[:, None]

    def kept_bytes(self, work: Work) -> float:
        """What the keys and values of each deep block are made of, if it is not what queries are made of."""
        return work.itemsize * work.length * self.deep_layers * self.width if self.own.served else 0

    def logits_bytes(self, positions: int, vocab_size: int, itemsize: int) -> int:
        entries = vocab_size * -(-positions // self.own.exit_stride)
        if not (self.own.distil and self.own.expected) or itemsize == torch.float32.itemsize:
            return LOGIT_BYTES * entries
        return 3 * itemsize * min(entries, ENTRIES_GPU)  # a chunk of student, teacher and gradient

    def switches(self) -> dict[str, Switch]:
        """Some depths, and half depth with random tokens, which shows what the router's choice is worth."""
        return {
            "depth 0.75": partial(_at_depth, depth=0.75),
            "depth 0.5": partial(_at_depth, depth=0.5),
            "depth 0.5 at random": partial(_at_random, self),
            "depth 0": partial(_at_depth, depth=0.0),
        }

    def score(self, u_BTD: Tensor) -> Tensor:
        """Return the nats [...] by which deep blocks should lower the loss, given normed stem states [..., D]."""
        precise = torch.promote_types(u_BTD.dtype, torch.float32)
        raw = F.linear(u_BTD.detach(), self.benefit.weight.to(u_BTD.dtype))[..., 0]
        return raw.to(precise) + self.benefit.bias.to(precise)

    def exit(self, x: Tensor) -> Tensor:
        """Return the last hidden state of tokens that skip the deep blocks."""
        return x + self.exit_down(F.relu(self.exit_up(norm(x))).square())

    def threshold(self, depth: float | Tensor) -> Tensor:
        """Return the scores that shares `depth` [...] of tokens exceed, interpolated in the table."""
        place = (1 - torch.as_tensor(depth, dtype=torch.float64, device=self.quantiles.device)) * (QUANTILES - 1)
        left = place.long().clamp(max=QUANTILES - 2)
        return torch.lerp(self.quantiles[left], self.quantiles[left + 1], (place - left).to(self.quantiles))

    def choose(
        self,
        score_BT: Tensor,
        depth: float | Tensor,
        taken_B: Tensor,
        timeline: Timeline,
        least: float | Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Return which tokens go deep [B, T], bool, and the running count of them in the window [B, T].

        `taken_B` is the count before the chunk. `depth` may be that of each row, fp64 [B], as may `least`: see `Call`.
        """
        place_BT = timeline.position_BT % self.window
        if not isinstance(depth, Tensor):
            if depth >= 1 and least is None:
                return torch.ones_like(score_BT, dtype=torch.bool), place_BT + 1
            depth = torch.full_like(taken_B, depth, dtype=torch.float64)
        threshold_B = self.threshold(depth).to(score_BT.dtype)
        least_BT, most_BT = self.bounds(depth[:, None], place_BT)
        if least is not None:
            given_B = least if isinstance(least, Tensor) else torch.full_like(depth, least)
            free_B = given_B.isfinite()
            threshold_B = torch.where(free_B, given_B.to(score_BT.dtype), threshold_B)
            least_BT = least_BT.masked_fill(free_B[:, None], 0)
            most_BT = torch.where(free_B[:, None], place_BT + 1, most_BT)
        wants_BT = (score_BT > threshold_B[:, None]).long()
        # The count after a token is clamp(count before + wants, least, most). Two such steps in sequence have the same
        # form, so an associative scan computes all counts. At the first token of a window the count before is 0.
        begins_BT = place_BT == 0
        start_BT = wants_BT.clamp(least_BT, most_BT)
        low_BT = torch.where(begins_BT, start_BT, least_BT)
        high_BT = torch.where(begins_BT, start_BT, most_BT)
        count_BT = running_clamp(wants_BT, low_BT, high_BT, taken_B)
        before_BT = torch.cat([taken_B[:, None], count_BT[:, :-1]], 1).masked_fill(begins_BT, 0)
        return count_BT > before_BT, count_BT

    def bounds(self, depth_B1: Tensor, place_BT: Tensor) -> tuple[Tensor, Tensor]:
        """Return the bounds [B, T] of the running count after tokens in some places of their windows."""
        share_BT = depth_B1 * (place_BT + 1)
        slack, whole_B1 = max(2, int(SLACK * self.window)), (depth_B1 * self.window).round().long()
        least_BT = torch.maximum((share_BT - slack).ceil().long(), whole_B1 - (self.window - 1 - place_BT))
        return least_BT.clamp(min=0), torch.minimum((share_BT + slack).floor().long(), whole_B1)


def running_clamp(add_BT: Tensor, low_BT: Tensor, high_BT: Tensor, start_B: Tensor) -> Tensor:
    """Return x_t = clamp(x_(t-1) + add_t, low_t, high_t) for all t at once, with x_(-1) = `start_B`: [B, T]."""
    distance = 1
    while distance < add_BT.shape[1]:
        # Compose each step with the one before it: clamp(clamp(x + a, low, high) + add, least, most).
        a, low, high = (value[:, :-distance] for value in (add_BT, low_BT, high_BT))
        add, least, most = (value[:, distance:] for value in (add_BT, low_BT, high_BT))
        joined = (add + a, (low + add).clamp(least, most), (high + add).clamp(least, most))
        add_BT, low_BT, high_BT = (
            torch.cat([value[:, :distance], rest], 1)
            for value, rest in zip((add_BT, low_BT, high_BT), joined, strict=True)
        )
        distance *= 2
    return (start_B[:, None] + add_BT).clamp(low_BT, high_BT)


@contextmanager
def _at_depth(model: Any, depth: float) -> Iterator[dict[str, Any]]:
    yield {"depth": depth}


@contextmanager
def _at_random(router: Router, model: Any) -> Iterator[dict[str, Any]]:
    """Replace the router's scores by pseudo-random numbers in 0..1 that are a function of only the state."""
    direction_D = torch.randn(router.benefit.in_features, generator=torch.Generator().manual_seed(0))

    def score(u_BTD: Tensor) -> Tensor:
        precise = u_BTD.to(torch.promote_types(u_BTD.dtype, torch.float32))
        return (precise @ (1000 * direction_D).to(precise)) % 1

    router.score = score  # type: ignore[method-assign]
    try:
        with replaced(router.quantiles, torch.linspace(0, 1, len(router.quantiles)).to(router.quantiles)):
            yield {"depth": 0.5}
    finally:
        del router.score
