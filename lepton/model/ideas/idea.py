"""The contract of an idea: a module of the model, and everything that the rest of the package has to know about it.

There are two kinds. An idea *in the pass* runs once per chunk, between the stem and the deep blocks: its `contribute`
reads the stem's states and what earlier ideas contributed, and returns a `Contribution`. It may change the residual
stream, give the deep blocks extra keys and values (slots), or decide which tokens go through them. It may keep state.
An idea *on the top states* (`reads_top` in its configuration) has no `contribute`; it learns from losses on the last
hidden states, and generation calls it by name. All else that concerns ideas is a loop over `Modules.ideas`. A new idea
is one file, and two lines in `__init__.py` (docs/add_an_idea.md). Methods of `Idea` receive and return the others:

    ChunkInputs   a chunk before the first block
    Flow          the same after the stem, with what the ideas have contributed so far
    Contribution  what one idea returns to the pass
    Outcome       a training batch after the pass, from which ideas compute their losses
    Work          a workload, for which ideas count FLOPs and bytes
"""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from functools import cached_property, reduce
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lepton.config import LeptonConfig
from lepton.model.attention import Rotary, Slots
from lepton.model.layers import norm
from lepton.model.parameters import Declarations
from lepton.model.timeline import Rounds, Timeline
from lepton.ops.attention_plan import AttentionPlan, CausalWindow
from lepton.ops.cross_entropy import linear_cross_entropy
from lepton.values import MAX_ROUNDS

OUTCOME_STRIDE = 32
"""Losses that need logits look at one position in this many, by default."""
SIGNALS = ("router", "thoughts", "memory")
"""Ideas whose signals the uncertainty reads: benefit of depth, last change of the thoughts, size of memory's read."""
LONGEST = (1 << 31) - 1
"""Largest position in a document."""


class Host(nn.Module):
    """The model that an idea belongs to: what ideas may use of it."""

    config: LeptonConfig
    embed: nn.Embedding
    head_down: nn.Module
    """Projection from the model's width to that of the embedding."""

    def without(self, name: str) -> AbstractContextManager[dict[str, Any]]:
        """Run without the idea `name` inside the block."""
        raise NotImplementedError


Switch = Callable[[Host], AbstractContextManager[dict[str, Any]]]
"""A context manager that switches an idea off without changing parameters. It yields keyword arguments, such as
``think=0``, with which the model must be called inside."""


@dataclass(frozen=True)
class Call:
    """Options of a pass."""

    depth: float | Tensor = 1.0
    """Share of the tokens that may go through the deep blocks. In decoding each row may have its own, fp64 [B]."""
    think: int | Tensor | Rounds | None = None
    """Rounds of thinking; None is the configuration's. A tensor [B] is for training, where few rows think for long."""
    static: bool = False
    """Whether no shape may depend on values, as in a CUDA graph. What skips the deep blocks is then masked."""
    served_BT: Tensor | None = None
    """Bool, in training: tokens that serve the deep blocks keys and values of the state before them."""
    least: float | Tensor | None = None
    """Nats: a token goes deep if the router predicts that it saves more, whatever share that is. In decoding each row
    may have its own, fp64 [B], infinite where `depth` decides; None: it does in all rows."""

    @property
    def routed(self) -> bool:
        """Whether tokens may skip the deep blocks."""
        return isinstance(self.depth, Tensor) or self.depth < 1 or self.least is not None


@dataclass(frozen=True)
class Contribution:
    """What an idea returns to the pass. None means that the part is absent."""

    added_BTD: Tensor | None = None
    """Added to the residual stream before the deep blocks."""
    slots: Slots | None = None
    """Extra keys and values for the deep blocks."""
    feature_BTF: Tensor | None = None
    """Features that later ideas may read. The configuration's `feature_width` is F."""
    signal_BT: Tensor | None = None
    """One number per token for the uncertainty, if the idea is one of `SIGNALS`."""
    inputs_BTI: Tensor | None = None
    """Inputs of the idea, kept only if its loss reruns the idea."""
    deep_BT: Tensor | None = None
    """Bool: the tokens that go through the deep blocks. Those of several ideas are combined with `and`."""
    stream_BTD: Tensor | None = None
    """A residual stream in place of the flow's: later ideas and the deep blocks read it."""
    seen: Any = None
    """What `before_block` reads; not kept after the pass."""
    update: Any = None
    """How the idea's state changes with this chunk: an object with `after(count_B, timeline)`, which returns the state
    after the first `count_B` tokens of each row. None: the idea has no state."""


@dataclass(frozen=True)
class ChunkInputs:
    """A chunk before the first block."""

    call: Call
    tokens_BT: Tensor
    embedded_BTE: Tensor
    """Token embeddings."""
    timeline: Timeline
    """Positions, documents and segments of the tokens."""
    rotary: Rotary
    """Rotary angles of the tokens."""
    causal: CausalWindow
    """Attention mask of the tokens, without slots."""
    wide: CausalWindow | None
    """The same in wide blocks; None: there are none."""


@dataclass(frozen=True)
class Flow(ChunkInputs):
    """A chunk between the stem and the deep blocks, with the contributions of the ideas that have run so far."""

    h_BTD: Tensor
    """Residual stream after the stem, and after an idea that gives another one."""
    u_BTD: Tensor
    """The same, normed. This is what ideas read."""
    x_BTD: Tensor
    """`h_BTD` plus what ideas have added so far. The deep blocks start from the final sum."""
    contributions: Mapping[str, Contribution] = field(default_factory=dict)
    """By name of the idea, in order; without `stream_BTD` and `added_BTD`, which are in the stream, and `update`."""

    @staticmethod
    def after_stem(inputs: ChunkInputs, h_BTD: Tensor) -> "Flow":
        """Return the flow that the first idea receives."""
        return Flow(**vars(inputs), h_BTD=h_BTD, u_BTD=norm(h_BTD), x_BTD=h_BTD)

    def plus(self, name: str, given: Contribution) -> "Flow":
        """Return the flow with the contribution of the idea `name`."""
        flow, x_BTD = self, given.stream_BTD
        if x_BTD is not None:
            flow = replace(self, h_BTD=x_BTD, u_BTD=norm(x_BTD), x_BTD=x_BTD)
        if given.added_BTD is not None:
            flow = replace(flow, x_BTD=flow.x_BTD + given.added_BTD)
        kept = replace(given, stream_BTD=None, added_BTD=None, update=None)
        return replace(flow, contributions={**self.contributions, name: kept})

    def without_inputs(self) -> "Flow":
        """Return the flow without what only the deep blocks need."""
        kept = {name: replace(each, slots=None, seen=None) for name, each in self.contributions.items()}
        return replace(self, contributions=kept)

    def features(self, *names: str) -> list[Tensor]:
        """Return the features [B, T, F] of those of these ideas that have any."""
        found = [self.contributions[name].feature_BTF for name in names if name in self.contributions]
        return [feature for feature in found if feature is not None]

    def signals(self, *names: str) -> Tensor:
        """Return the signals of these ideas [B, T, number of names], detached, fp32 or better; 0 for one without."""
        nothing_BT = torch.zeros_like(self.u_BTD[..., 0], dtype=torch.promote_types(self.u_BTD.dtype, torch.float32))
        found = [self.contributions[name].signal_BT if name in self.contributions else None for name in names]
        return torch.stack([nothing_BT if each is None else each.to(nothing_BT) for each in found], -1).detach()

    @cached_property
    def slots(self) -> Slots | None:
        """The slots of all ideas, concatenated, those of later ideas first; None: there are none."""
        return Slots.join(*(each.slots for each in reversed([*self.contributions.values()])))

    @cached_property
    def deep_BT(self) -> Tensor:
        """Bool: the tokens that go through the deep blocks; at depth 1 all of them, whatever ideas choose."""
        given = self.contributions.values() if self.call.routed else ()
        chosen = (each.deep_BT for each in given if each.deep_BT is not None)
        return reduce(torch.logical_and, chosen, torch.ones_like(self.timeline.ends_BT))

    @cached_property
    def plan(self) -> AttentionPlan:
        """Attention mask of the deep blocks that are not wide."""
        return self._plan_of(self.causal)

    @cached_property
    def wide_plan(self) -> AttentionPlan | None:
        """Attention mask of the wide blocks; None: there are none."""
        return None if self.wide is None else self._plan_of(self.wide)

    def _plan_of(self, causal: CausalWindow) -> AttentionPlan:
        chosen_BT = self.deep_BT if self.call.routed else None
        return causal.plan(self.slots.mask_BTC if self.slots else None, chosen_BT, static=self.call.static)


@dataclass
class Outcome:
    """A training batch after the pass: predictions and the tokens that really followed."""

    model: Host
    hidden_BTD: Tensor
    """Last hidden states, normed: the inputs of the head."""
    flow: Flow
    following_BT: Tensor
    """The token after each, `IGNORE` if absent."""
    position_BT: Tensor
    """Position of each token in its document, -1 in padding."""
    nats_M: Tensor | None
    """Cross-entropy of each of the B x T predictions; None where the ideas that are asked do not read it."""
    rate: float | Tensor = 1.0
    """Share of the peak learning rate; a tensor [] where a captured program reads it."""

    @cached_property
    def rows_VE(self) -> Tensor:
        """The embedding without gradient, in the dtype of the activations."""
        return self.model.embed.weight.detach().to(self.hidden_BTD.dtype)

    def frozen_loss(self, x_MD: Tensor, target_M: Tensor) -> tuple[Tensor, Tensor]:
        """Return the mean cross-entropy of hidden states and the nats of each; the head gets no gradient."""
        config = self.model.config
        options: dict[str, Any] = {"vocab_size": config.vocab_size, "cap": config.logit_cap, "z_weight": 0.0}
        loss, _, _, nats_M = linear_cross_entropy(self.frozen_down(norm(x_MD)), self.rows_VE, target_M, **options)
        return loss, nats_M

    def frozen_down(self, x_MD: Tensor) -> Tensor:
        """Return normed states as the embedding's rows meet them, [M, E]; the projection gets no gradient."""
        down = self.model.head_down
        return F.linear(x_MD, down.weight.detach().to(x_MD.dtype)) if isinstance(down, nn.Linear) else x_MD


def picks(tokens: Tensor, stride: int) -> Tensor:
    """Return the indices of every `stride`-th element of `tokens`, flattened, from a start that depends on its values.

    So which positions are sampled is a pure function of the batch.
    """
    stride = min(stride, tokens.numel())
    count = tokens.numel() // stride
    return tokens.sum() % stride + stride * torch.arange(count, device=tokens.device)


@dataclass(frozen=True)
class Work:
    """A pass over one document from its beginning, for counting its cost per row."""

    length: int
    """Tokens."""
    groups: int
    """Segments that tensors have space for: at least those that open."""
    depth: float = 1.0
    """Share of the tokens that go through the deep blocks."""
    think: float | None = None
    """Rounds of thinking; None is the configuration's number."""
    rows: int = 1
    """Rows of the batch, in training."""
    itemsize: int = 4
    """Bytes per element of an activation."""

    @property
    def half(self) -> bool:
        """Whether activations are in half precision, which Triton kernels need."""
        return self.itemsize < 4


class Idea(nn.Module):
    """Base class of an idea. Only `name`, `declares` and, in the pass, `contribute` are required."""

    # What it is called, and what trains it.

    name: ClassVar[str]
    """The attribute of the model that holds it, and the prefix of its parameters' names."""
    title: ClassVar[str] = ""
    """Its name in tables, if that is not `name`."""
    declares: Declarations = {}
    """Initial value and optimizer group of each of its parameters; see `lepton.model.parameters`."""
    loss_weights: ClassVar[Mapping[str, float]] = {}
    """Weight of each of its losses in the training loss."""
    compiled: tuple[str, ...] = ()
    """Names of its methods that are compiled for training, or of its modules' ("block.forward"). Their arguments are
    tensors, dataclasses of tensors and plain values."""
    opens: ClassVar[bool] = False
    """Whether it computes something for each segment that opens, so that shapes depend on the number of segments."""
    thinks_always: bool = False
    """Whether rounds of thinking run in every pass, and not only where a segment opens."""
    think_limit: int = MAX_ROUNDS
    """Most rounds of thinking that a call may ask for."""
    learns_from_own_text: ClassVar[bool] = False
    """Whether it has `own_text_losses`. No prediction of the model may then depend on its parameters."""
    old_names: ClassVar[Mapping[str, str]] = {}
    """Old state files: name prefix of its tensors -> present prefix."""

    # The pass.

    def contribute(self, flow: Flow, past: Any) -> Contribution:
        """Return its contribution to the pass over a chunk.

        `past` is its state before the chunk, None if it has none. The contribution must be causal: no value at a token
        may depend on later tokens.
        """
        raise NotImplementedError(f"{type(self).__name__} reads the top states")

    def before_block(self, block: int, x_BTD: Tensor, flow: Flow) -> Tensor | None:
        """Return what tokens that go deep add to the stream before a deep block, counted from 0; None: nothing."""
        return None

    def after_blocks(self, x_BTD: Tensor, deep_BT: Tensor, call: Call) -> Tensor:
        """Return the residual stream after the deep blocks; it may change the tokens that skipped them."""
        return x_BTD

    # Its state: a dataclass of tensors, one row per sequence. With a true class attribute `outlives_window` it is part
    # of `state.memory`, and has a method `cleared()`, which returns it empty.

    def fresh(self, rows: int, dtype: torch.dtype, device: torch.device, *, allocate: bool) -> Any:
        """Return the state of `rows` sequences that have read nothing; None: it has no state.

        Without `allocate`, dimensions that hold past tokens may have size 0: such a state is read once and dropped.
        """
        return None

    def lasting_slots(self, past: Any) -> tuple[Tensor, Tensor] | None:
        """Return normed states [B, C, D] and biases [B, C] of its slots if they stay the same until a segment opens.

        Only the mask then depends on the tokens, and decoding keeps the keys and values. None: they may change.
        """
        return None

    def carried(self, past: Any, fresh: Any) -> Any:
        """Return the state `past` of another stream as a new stream starts with it; `fresh` is an empty state.

        Called only for states that outlive the window.
        """
        return past

    def limits(self, config: LeptonConfig) -> dict[str, tuple[float, float]]:
        """Return the least and the largest value of fields of its state, which are checked in files."""
        return {}

    def check_buffers(self, found: Mapping[str, Any], config: LeptonConfig) -> None:
        """Raise InputError if the weights `found`, by name, have buffers of this idea with impossible values."""

    # Training.

    def losses(self, outcome: Outcome) -> dict[str, Tensor]:
        """Return its losses by name. Gradients stop at its own parameters, unless its configuration says otherwise."""
        return {}

    def own_text_losses(self, outcome: Outcome) -> dict[str, Tensor]:
        """Return its losses on text that the trained model wrote (`lepton.train.own_text`); `nats_M` is not known."""
        raise NotImplementedError(f"{type(self).__name__} does not learn from such text")

    def logits_bytes(self, positions: int, vocab_size: int, itemsize: int) -> int:
        """Return the bytes of the logits that its losses hold at one time, of so many positions."""
        return 0

    def learn_frequencies(self, counts_V: Callable[[], Tensor]) -> None:
        """Set buffers from the training data. `counts_V()` returns how often each token occurs in it."""

    def rounds_in_training(self, rows: int, generator: torch.Generator) -> Tensor | None:
        """Draw the rounds of thinking of each row of a training batch, int [rows]; None: it does not think."""
        return None

    def check_rounds(self, think_B: Tensor) -> None:
        """Raise InputError for rounds of thinking per row that it cannot compute."""

    # Costs.

    def slots_of(self, groups: int) -> int:
        """Return the number of its slots in a fresh sequence with space for `groups` segments."""
        return 0

    def flops(self, work: Work) -> float:
        """Return the multiply-adds of its matrix products in a pass over a row; those of its slots count elsewhere."""
        return 0

    def extra_training_flops(self, work: Work, head: int) -> float:
        """Return the FLOPs per token of a training step beyond three times those of a pass; they may be negative.

        Losses add FLOPs, stopped gradients save some. `head` are the multiply-adds of the model's head per token.
        """
        return 0

    def kept_bytes(self, work: Work) -> float:
        """Return about how many bytes of activations per row it keeps for the backward pass."""
        return 0

    def think_in_training(self, rows: int) -> float | None:
        """Return the mean rounds of thinking that are computed per row in a training batch; None: it does not think."""
        return None

    def switches(self) -> dict[str, Switch]:
        """Return ways to switch it off, by their names in tables. By default the model runs as if built without it."""
        return {self.title or self.name: lambda model: model.without(self.name)}


def matrices(*modules: nn.Module | None) -> int:
    """Return the number of weights in all linear layers of some modules, which is their multiply-adds per token."""
    parts = (part for module in modules if module is not None for part in module.modules())
    return sum(part.weight.numel() for part in parts if isinstance(part, nn.Linear))
