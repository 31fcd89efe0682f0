"""What an idea is: a module, and everything that the rest of the package has to know of it.

An idea reads the states that the stem makes of a chunk (and what the ideas before it gave), and gives something to the
pass: a vector added to the stream, key/value slots that the deep blocks see, which tokens go deep, a feature or a
signal for later ideas. What it keeps of the past is its own part of the state. An idea of the other kind reads the top
state: it takes no part in the pass, and learns from losses of its own.

Everything else that runs over ideas is a loop over `Lepton.ideas`: initial values, optimizer groups, losses, FLOPs, the
forecast of memory, what is compiled, what can be switched off. So a new idea is one file with a configuration and a
module, and its line in `lepton/model/ideas/__init__.py`.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lepton.config import LeptonConfig
from lepton.errors import InputError
from lepton.model.attention import Rotary, Slots
from lepton.model.layers import norm
from lepton.model.parameters import Declarations
from lepton.model.timeline import Timeline
from lepton.ops.attention_plan import AttentionPlan, CausalWindow
from lepton.ops.cross_entropy import linear_cross_entropy

if TYPE_CHECKING:
    from lepton.model.lepton import Lepton

OUTCOME_STRIDE = 32
"""One position in so many shows the ideas that predict outcomes what came of a prediction."""

SIGNALS = ("router", "thoughts", "memory")
"""Ideas whose signals the uncertainty reads: benefit of depth, change of the thoughts, strength of the memory's
answer."""
LONGEST = (1 << 31) - 1
"""Largest position in a document."""

Switch = Callable[["Lepton"], AbstractContextManager[dict[str, Any]]]
"""Switches an idea off inside a block, without changing a parameter, and yields the arguments of the calls in it."""


@dataclass(frozen=True)
class Call:
    """What a caller asks of a pass."""

    depth: float = 1.0
    """Share of the tokens allowed past the stem."""
    think: int | Tensor | None = None
    """Rounds of thinking, for all rows or for each; None is the model's own number."""


@dataclass(frozen=True)
class Given:
    """What an idea gives to a pass. All that is left at None is not there."""

    added_BTD: Tensor | None = None
    """Added to the stream before the deep blocks."""
    slots: Slots | None = None
    """Key/value slots that the deep blocks see beside their window."""
    feature_BTF: Tensor | None = None
    """What later ideas may read of it."""
    signal_BT: Tensor | None = None
    """A number that says how the idea fared at each token."""
    inputs_BTI: Tensor | None = None
    """What it was made of, where a loss makes it again."""
    deep_BT: Tensor | None = None
    """The tokens that go past the stem."""
    record: Any = None
    """A dataclass whose `after(count_B, timeline)` is the idea's part of the state after so many tokens."""


@dataclass(frozen=True)
class Place:
    """A chunk before any layer: its tokens, and where they stand."""

    call: Call
    tokens_BT: Tensor
    embedded_BTE: Tensor
    """Token embeddings."""
    timeline: Timeline
    rotary: Rotary
    near: CausalWindow
    """What the tokens see of past and chunk."""


@dataclass(frozen=True)
class Flow(Place):
    """A chunk on its way from the stem to the deep blocks: what ideas read, and what they have given so far."""

    h_BTD: Tensor
    """The stream behind the stem."""
    u_BTD: Tensor
    """The same, normed."""
    x_BTD: Tensor
    """The stream with what the ideas have added to it so far; at the end it enters the deep blocks."""
    given: Mapping[str, Given] = field(default_factory=dict)
    """By the names of the ideas, in order; without what is in the stream, and without records."""

    @staticmethod
    def behind_stem(place: Place, h_BTD: Tensor) -> "Flow":
        """Return the flow as the first idea finds it."""
        return Flow(**vars(place), h_BTD=h_BTD, u_BTD=norm(h_BTD), x_BTD=h_BTD)

    def joined_by(self, name: str, given: Given) -> "Flow":
        """Return the flow with what one more idea gives."""
        x_BTD = self.x_BTD if given.added_BTD is None else self.x_BTD + given.added_BTD
        return replace(self, x_BTD=x_BTD, given={**self.given, name: replace(given, added_BTD=None, record=None)})

    def passed(self) -> "Flow":
        """Return the flow without what only the deep blocks look at."""
        return replace(self, given={name: replace(given, slots=None) for name, given in self.given.items()})

    def features(self, *names: str) -> list[Tensor]:
        """Return what these ideas let others read, of those that do."""
        found = [self.given[name].feature_BTF for name in names if name in self.given]
        return [feature for feature in found if feature is not None]

    def signals(self, *names: str) -> Tensor:
        """Return the signals of these ideas [B, T, number of names] in fp32 or better, zero for one that has none."""
        nothing_BT = torch.zeros_like(self.u_BTD[..., 0], dtype=torch.promote_types(self.u_BTD.dtype, torch.float32))
        found = [self.given[name].signal_BT if name in self.given else None for name in names]
        return torch.stack([nothing_BT if each is None else each.to(nothing_BT) for each in found], -1).detach()

    @cached_property
    def slots(self) -> Slots | None:
        """The slots of all ideas, side by side, those of the later ideas first."""
        return Slots.join(*(given.slots for given in reversed([*self.given.values()])))

    @cached_property
    def deep_BT(self) -> Tensor:
        """The tokens that go past the stem: those that every idea with a say in it sends on."""
        deep_BT = torch.ones_like(self.timeline.ends_BT)
        for given in self.given.values():
            if given.deep_BT is not None:
                deep_BT = deep_BT & given.deep_BT
        return deep_BT

    @cached_property
    def plan(self) -> AttentionPlan:
        """What the tokens see in the deep blocks."""
        chosen_BT = self.deep_BT if self.call.depth < 1 else None
        return self.near.plan(self.slots.mask_BTC if self.slots else None, chosen_BT)


@dataclass
class Outcome:
    """A chunk after the pass, and what really came: what the losses of ideas are made of."""

    model: "Lepton"
    hidden_BTD: Tensor
    """Normed top states."""
    flow: Flow
    following_BT: Tensor
    """The token after each, `IGNORE` where there is none."""
    position_BT: Tensor
    """Place in its document of each token, -1 in padding."""
    nats_M: Tensor
    """Loss of each of the B x T predictions."""

    @cached_property
    def sampled_M(self) -> Tensor:
        """The positions of the flattened batch that are compared with what came."""
        return picks(self.following_BT, OUTCOME_STRIDE)

    @cached_property
    def rows_VE(self) -> Tensor:
        """The rows of the head, without gradient, in the dtype of the activations."""
        return self.model.embed.weight.detach().to(self.hidden_BTD.dtype)

    def frozen_loss(self, x_MD: Tensor, target_M: Tensor) -> tuple[Tensor, Tensor]:
        """Mean cross-entropy of states, differentiable in them and not in the head, and the nats of each position."""
        model, x = self.model, norm(x_MD)
        if isinstance(model.head_down, nn.Linear):
            x = F.linear(x, model.head_down.weight.detach().to(x.dtype))
        loss, _, _, nats_M = linear_cross_entropy(
            x,
            self.rows_VE,
            target_M,
            vocab_size=model.config.vocab_size,
            cap=model.config.logit_cap,
            z_weight=0.0,
        )
        return loss, nats_M


def picks(tokens_BT: Tensor, stride: int) -> Tensor:
    """Every `stride`-th position of the flattened batch, from a start that depends on the batch alone."""
    stride = min(stride, tokens_BT.numel())
    count = tokens_BT.numel() // stride
    return tokens_BT.sum() % stride + stride * torch.arange(count, device=tokens_BT.device)


@dataclass(frozen=True)
class Work:
    """A pass over a fresh sequence of one document, for counting what it costs."""

    length: int
    """Tokens."""
    groups: int
    """Segments that there is room for."""
    depth: float = 1.0
    think: float | None = None
    rows: int = 1
    """Rows of a batch in training."""
    itemsize: int = 4
    """Bytes of an activation."""

    @property
    def half(self) -> bool:
        """Whether activations are in half precision, for which there are kernels."""
        return self.itemsize < 4


class Idea(nn.Module):
    """A module of the model that owns itself. What an idea does not need of this it leaves as it is."""

    name: ClassVar[str]
    """Its attribute in the model, and the beginning of its parameters' names."""
    title: ClassVar[str] = ""
    """What tables call it, where that is not its name."""
    declares: Declarations = {}
    loss_weights: ClassVar[Mapping[str, float]] = {}
    """Weight of each of its losses in the sum."""
    compiled: ClassVar[tuple[str, ...]] = ()
    """Its functions that are compiled for training; they take tensors and plain values."""
    opens: ClassVar[bool] = False
    """Whether something happens where a segment opens, so that shapes depend on how many do."""

    old_names: ClassVar[Mapping[str, str]] = {}
    """How names of its part of the state began in older files, and how they begin now."""

    def contribute(self, flow: Flow, past: Any) -> Given:
        """Return what it gives to a pass, `past` being its part of the state on entry."""
        raise NotImplementedError(f"{type(self).__name__} reads the top states")

    def after_blocks(self, x_BTD: Tensor, deep_BT: Tensor, call: Call) -> Tensor:
        """Return the last states, those of the tokens changed that did not go deep."""
        return x_BTD

    def fresh(self, rows: int, dtype: torch.dtype, device: torch.device, *, room: bool) -> Any:
        """Return its part of the state of `rows` sequences that have read nothing; None: it keeps nothing.

        Without `room` no places are laid out for what is remembered later.
        """
        return None

    def check_buffers(self, found: Mapping[str, Any], config: LeptonConfig) -> None:
        """Raise InputError for values of its buffers in a model's weights `found` that it cannot have."""

    def limits(self, config: LeptonConfig) -> dict[str, tuple[float, float]]:
        """Return the least and the largest value of fields of its part of the state; a file may not exceed them."""
        return {}

    def carried(self, past: Any, fresh: Any) -> Any:
        """Return its part of a memory as a new stream starts with it; `fresh` is that of a stream without a memory.

        Only asked of an idea whose part of the state has a true `outlives_window`.
        """
        return past

    def losses(self, outcome: Outcome) -> dict[str, Tensor]:
        """Return its losses by their names in `loss_weights`. None of them moves the trunk."""
        return {}

    def slots_of(self, groups: int) -> int:
        """Return how many slots it gives to a fresh sequence with room for `groups` segments."""
        return 0

    def flops(self, work: Work) -> float:
        """Return the multiply-adds of its matrix products in a pass, the slots' in the deep blocks left out."""
        return 0

    def extra_training_flops(self, work: Work, head: int) -> float:
        """Return what a training step costs per token beyond three passes, in FLOPs: losses, gradients that stop.

        `head` are the multiply-adds of the model's head for one position.
        """
        return 0

    def kept_bytes(self, work: Work) -> float:
        """Return about how many bytes of activations it keeps of a row of a batch for the backward pass."""
        return 0

    def sampled_logits(self) -> bool:
        """Return whether its losses look at logits of sampled positions."""
        return False

    def switches(self) -> dict[str, Switch]:
        """Return the ways to switch it off at run time, by what a table calls them."""
        return {self.title or self.name: lambda model: model.without(self.name)}

    def think_in_training(self, rows: int) -> float | None:
        """Return the rounds that are computed for a row of a training batch of `rows`, on average."""
        return None

    def check_rounds(self, think_B: Tensor) -> None:
        """Raise InputError for rounds of thinking per row that it cannot do."""

    def rounds_in_training(self, rows: int, generator: torch.Generator) -> Tensor | None:
        """Return the rounds of thinking of each row of a training batch, [rows]; None: it does not think."""
        return None

    def learn_frequencies(self, counts_V: Callable[[], Tensor]) -> None:
        """Take what it needs of how often each token occurs in the training data; `counts_V()` counts."""


def segment_within_window(config: LeptonConfig) -> None:
    """Raise InputError unless what a segment opens or closes is in sight of all of it."""
    if config.window is not None and config.segment > config.window:
        raise InputError(f"segment={config.segment}: must not be longer than window={config.window}")


def matrices(*modules: nn.Module | None) -> int:
    """Entries of the matrices in some modules: their multiply-adds per token."""
    parts = (part for module in modules if module is not None for part in module.modules())
    return sum(part.weight.numel() for part in parts if isinstance(part, nn.Linear))


def children(model: nn.Module) -> Iterator[Idea]:
    """Yield the ideas of a model in the order in which they were built."""
    return (module for module in model.children() if isinstance(module, Idea))


@contextmanager
def replaced(parameter: Tensor, value: Tensor) -> Iterator[None]:
    """Let `parameter` hold `value` for a while; its own tensor is put aside, not written to."""
    own = parameter.data
    parameter.data = value
    try:
        yield
    finally:
        parameter.data = own
