"""Thought tokens: latent vectors that are computed when a segment opens, and never appear in the output.

The thoughts of a segment, a group, start from learned vectors and the stem state of the token that opens the segment.
In each round one block, the same in all rounds, lets them attend to each other and to the window of tokens up to and
including the opening token. The initial vectors are added again and the sum is normed in each round. The opening token
is also the first that attends to the group, so the thoughts can influence the first generated token after a prompt.

With `over_tokens` the same block also runs over all tokens in each round: a token then has keys and values of its own
for each round, and a chain of n steps through the text takes n rounds, since each round can copy what another token has
found so far. What follows reads the tokens after their rounds. Looped blocks: Universal Transformer (2018), Saunshi et
al. (2025).
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lepton.config import IdeaConfig, LeptonConfig
from lepton.errors import InputError
from lepton.model.attention import Rotary, Slots
from lepton.model.block import Block
from lepton.model.checks import check_range
from lepton.model.ideas.idea import Contribution, Flow, Idea, Switch, Work, matrices
from lepton.model.kv_cache import KeysValues, KVCache
from lepton.model.kv_ring import KVRing, joined
from lepton.model.layers import Linear, at_indices, norm
from lepton.model.parameters import MATRIX, SCORE, normal
from lepton.model.rounds import Tokens, in_rounds
from lepton.model.timeline import Rounds, Timeline
from lepton.ops.attention import attend
from lepton.ops.attention_plan import AttentionPlan, CausalWindow
from lepton.ops.heads import shifted
from lepton.ops.query_blocks import computed_pairs

USUAL = 13
"""Of 16 rows this many think for the usual number of rounds in training, one for none, one for one, and one for the
most. So any number works afterwards, also 0. Most draws are the usual number, because drawing all numbers equally often
may make it worse (docs/log.md)."""


@dataclass(frozen=True, kw_only=True)
class ThoughtsConfig(IdeaConfig):
    """Thought tokens."""

    count: int = 4
    """Thought tokens per segment."""
    ffn: int = 768
    """Hidden width of the thinking block's MLP."""
    rounds: int = 2
    """Rounds of thinking, if a call gives none, and the usual number in training."""
    most_rounds: int = 4
    """The largest number in training; with `over_tokens` also that of any call."""
    over_tokens: bool = False
    """Whether all tokens think, and not only the thoughts: a token's keys and values of each round are state."""

    name = "thoughts"
    most = {"count": 1024, "ffn": 1 << 18, "rounds": 256, "most_rounds": 256}
    flat = {"thoughts": "count", "thought_ffn": "ffn", "rounds": "rounds"}
    flat_switch = "thoughts"

    def check(self, config: LeptonConfig) -> None:
        self.at_least(0, "rounds")
        self.at_least(1, "count", "ffn")
        if self.over_tokens and self.rounds > self.most_rounds:
            raise InputError(f"thoughts.rounds={self.rounds}: must be at most most_rounds={self.most_rounds}")
        config.check_segment()

    def build(self, config: LeptonConfig) -> "Thoughts":
        return Thoughts(config, self)

    def feature_width(self, config: LeptonConfig) -> int:
        return config.width

    @classmethod
    def preset(cls, size: str, width: int) -> "ThoughtsConfig":
        return cls(count=2 if size == "nano" else 4, ffn=width)


@dataclass(frozen=True)
class Group:
    """The thoughts of the segment that is open after a chunk."""

    states_BSD: Tensor
    active_B: Tensor
    """Whether there were any rounds; otherwise no token attends to the group."""
    change_B: Tensor
    """Root mean square of the change in the last round."""


@dataclass(frozen=True)
class ThoughtState:
    """The state of the thoughts."""

    kv: KVCache
    """Keys and values of the thinking block; with `over_tokens` a layer for each round."""
    group: Group


@dataclass(frozen=True)
class ThoughtUpdate:
    """The groups of a chunk, and the keys and values of its tokens in the thinking block."""

    groups: "Groups"
    chunk: Sequence[KeysValues]
    past: KVCache
    remembered: int | None

    def after(self, count_B: Tensor, timeline: Timeline) -> ThoughtState:
        """Return the state after the first `count_B` tokens."""
        kv = self.past.after(self.chunk, count_B, timeline, self.remembered)
        return ThoughtState(kv, self.groups.after(count_B))


@dataclass(frozen=True)
class Groups:
    """All groups of a chunk, [B, G, ...]. The first is that of the segment that is open before the chunk."""

    states_BGSD: Tensor
    active_BG: Tensor
    change_BG: Tensor
    timeline: Timeline

    def after(self, count_B: Tensor) -> Group:
        """Return the open group after the first `count_B` tokens."""
        rows = torch.arange(len(count_B), device=count_B.device)
        group_B = self.timeline.at(self.timeline.group_BT, count_B, 0)
        goes_on_B = ~self.timeline.ended(count_B)
        return Group(
            self.states_BGSD[rows, group_B] * goes_on_B[:, None, None],
            self.active_BG[rows, group_B] & goes_on_B,
            self.change_BG[rows, group_B] * goes_on_B,
        )

    def slots(self) -> Slots:
        """Return the slots for the deep blocks: each token attends to the group of its own segment."""
        groups, slots = self.states_BGSD.shape[1:3]
        group_G = torch.arange(groups, device=self.active_BG.device)
        mask_BTG = (self.timeline.group_BT[:, :, None] == group_G) & self.active_BG[:, None]
        states_BCD, bias_BC = as_slots(self.states_BGSD.flatten(1, 2))
        return Slots(states_BCD, mask_BTG.repeat_interleave(slots, 2), bias_BC)

    def read(self) -> tuple[Tensor, Tensor]:
        """Return for each token the normed mean of its group [B, T, D] (0 without rounds), and its change [B, T]."""
        mean_BGD = norm(self.states_BGSD.mean(2)) * self.active_BG[..., None]
        group_BT = self.timeline.group_BT
        mean_BTD = mean_BGD.gather(1, group_BT[..., None].expand(-1, -1, mean_BGD.shape[-1]))
        return mean_BTD, (self.change_BG * self.active_BG).gather(1, group_BT)


def as_slots(states_BCD: Tensor) -> tuple[Tensor, Tensor]:
    """Return the normed states of thoughts, and their biases, which are 0."""
    return norm(states_BCD), torch.zeros(states_BCD.shape[:2], device=states_BCD.device)


@dataclass(frozen=True)
class ThinkingInputs:
    """What is the same in all rounds of a chunk."""

    start_BGSD: Tensor
    """Initial thoughts."""
    each_B: Tensor
    """Rounds of each row."""
    here: Rotary
    """Rotary angles of the opening tokens."""
    plan: AttentionPlan
    """Attention mask of the thoughts."""

    def of_rows(self, rows_A: Tensor) -> "ThinkingInputs":
        """Return the inputs of the rows with indices `rows_A`."""
        start, each, cos, sin = (
            value.index_select(0, rows_A) for value in (self.start_BGSD, self.each_B, self.here.cos, self.here.sin)
        )
        return ThinkingInputs(start, each, Rotary(cos, sin), self.plan.of_rows(rows_A))


class Thoughts(Idea):
    """Initial vectors, the projection of the opening token, and the thinking block."""

    name = "thoughts"
    opens = True
    compiled: tuple[str, ...] = ("forward",)
    old_names = {"group.": "thoughts.group."}
    declares = {
        "start": SCORE.but(initial=normal(1)),
        "opening.weight": MATRIX,
        "again.weight": MATRIX.but(initial=nn.init.eye_),
    }

    def __init__(self, config: LeptonConfig, own: ThoughtsConfig) -> None:
        super().__init__()
        self.config, self.rounds, self.most_rounds = config, own.rounds, own.most_rounds
        self.thinks_always = own.over_tokens
        if own.over_tokens:
            # Compiled are the parts of a round: all of many rounds in one program take minutes to compile.
            self.think_limit, self.compiled = own.most_rounds, ("one_round", "block.forward")
        self.start = nn.Parameter(torch.empty(own.count, config.width))
        self.opening = Linear(config.width, config.width)
        self.again = Linear(config.width, config.width) if own.over_tokens else None
        self.block = Block(config, own.ffn, shifted=config.shifted_keys and own.over_tokens)

    def fresh(self, rows: int, dtype: torch.dtype, device: torch.device, *, allocate: bool) -> ThoughtState:
        nothing = torch.zeros(rows, *self.start.shape, dtype=dtype, device=device)
        inactive = torch.zeros(rows, dtype=torch.bool, device=device)
        group = Group(nothing, inactive, torch.zeros(rows, dtype=dtype, device=device))
        layers = self.most_rounds if self.thinks_always else 1
        return ThoughtState(KVCache.fresh(self.config, layers, rows, dtype, device, allocate=allocate), group)

    def limits(self, config: LeptonConfig) -> dict[str, tuple[float, float]]:
        return {"active_B": (0, 1), "change_B": (0, torch.inf)}

    def lasting_slots(self, past: ThoughtState) -> tuple[Tensor, Tensor]:
        return as_slots(past.group.states_BSD)

    def contribute(self, flow: Flow, past: ThoughtState) -> Contribution:
        """Compute a group for each segment that opens; each token attends to the group of its own segment."""
        rounds = self.rounds if flow.call.think is None else flow.call.think
        stream_BTD: Tensor | None = None
        seen: list[KeysValues] = []
        if self.thinks_always:
            stream_BTD, chunk = self.over_tokens(flow, past.kv, rounds)
        else:
            chunk = [self.block.attention.key_value(flow.u_BTD, flow.rotary)]
        if not self.thinks_always or flow.timeline.opening_BG.shape[1]:
            seen = [joined(past.kv.layer(round_), *each) for round_, each in enumerate(chunk)]
        if self.block.attention.shifted:
            seen = [(shifted(k_BJKH, flow.causal.starts_BJ), v_BJKH) for k_BJKH, v_BJKH in seen]
        groups = self(flow.u_BTD, seen, past.group, flow.rotary, flow.timeline, flow.causal, rounds)
        thought_BTD, change_BT = groups.read()
        update = ThoughtUpdate(groups, chunk, past.kv, self.config.remembered)
        given = {"slots": groups.slots(), "feature_BTF": thought_BTD, "signal_BT": change_BT}
        return Contribution(**given, stream_BTD=stream_BTD, update=update)

    def over_tokens(
        self, flow: Flow, past: KVCache | KVRing, rounds: int | Tensor | Rounds
    ) -> tuple[Tensor, list[KeysValues]]:
        """Return the residual stream of the tokens after their rounds, and their keys and values in each round."""
        assert self.again is not None
        each_B, usual = _each(rounds, len(flow.h_BTD), flow.h_BTD.device, self.rounds)
        tokens = Tokens(flow.h_BTD, self.again(flow.u_BTD), each_B, flow.rotary, flow.causal.plan())
        late_A = each_B.argsort(descending=True)[: late_rows(len(each_B))] if isinstance(rounds, Tensor) else None
        return in_rounds(self.block, tokens, past, min(usual, self.most_rounds), self.most_rounds, late_A)

    def forward(
        self,
        u_BTD: Tensor,
        seen: Sequence[KeysValues],
        past: Group,
        rotary: Rotary,
        timeline: Timeline,
        causal: CausalWindow,
        rounds: int | Tensor | Rounds,
    ) -> Groups:
        """Compute the groups of a chunk.

        Args:
            u_BTD: normed stem states.
            seen: keys and values of remembered tokens and chunk in the thinking block, for each round.
            past: the group that is open before the chunk.
            rotary: rotary angles of the chunk's tokens.
            timeline: its segments.
            causal: its attention mask.
            rounds: one number for all rows, or one for each; or an int tensor [B] in training: at most the usual
                number, in `late_rows` rows at most `most_rounds`.
        """
        opening_BG = timeline.opening_BG
        rows, groups = opening_BG.shape
        first = Groups(past.states_BSD[:, None], past.active_B[:, None], past.change_B[:, None], timeline)
        if groups == 0:
            return first
        index_BG = opening_BG.clamp(min=0)
        start_BGSD = self.start.to(u_BTD.dtype) + self.opening(at_indices(u_BTD, index_BG))[:, :, None]
        here = Rotary(at_indices(rotary.cos, index_BG), at_indices(rotary.sin, index_BG))
        plan = causal.plan_of_mask(self._mask(opening_BG, causal))
        each_B, usual = _each(rounds, rows, u_BTD.device, self.rounds)
        inputs = ThinkingInputs(start_BGSD, each_B, here, plan)
        z_BGSD, change_BG = start_BGSD, start_BGSD.new_zeros(rows, groups)
        z_BGSD, change_BG = self._think(inputs, seen, range(usual), z_BGSD, change_BG)
        if isinstance(rounds, Tensor):
            # Compiled shapes cannot depend on `rounds`: a fixed number of rows, those with the most rounds, continue.
            late_A = each_B.argsort(descending=True)[: late_rows(rows)]
            late = range(usual, self.most_rounds)
            z_AGSD, change_AG = (value.index_select(0, late_A) for value in (z_BGSD, change_BG))
            seen = [(k.index_select(0, late_A), v.index_select(0, late_A)) for k, v in seen]
            z_AGSD, change_AG = self._think(inputs.of_rows(late_A), seen, late, z_AGSD, change_AG)
            z_BGSD, change_BG = z_BGSD.index_copy(0, late_A, z_AGSD), change_BG.index_copy(0, late_A, change_AG)
        active_BG = (opening_BG >= 0) & (each_B > 0)[:, None]
        return Groups(
            torch.cat([first.states_BGSD, z_BGSD * active_BG[..., None, None]], 1),
            torch.cat([first.active_BG, active_BG], 1),
            torch.cat([first.change_BG, change_BG * active_BG], 1),
            timeline,
        )

    def _think(
        self, inputs: ThinkingInputs, seen: Sequence[KeysValues], rounds: range, z_BGSD: Tensor, change_BG: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Compute some rounds; return thoughts and their change. The last of `seen` serve later rounds."""
        for round_ in rounds:
            on_B = round_ < inputs.each_B
            z_BGSD, change_BG = self.one_round(z_BGSD, change_BG, on_B, seen[min(round_, len(seen) - 1)], inputs)
        return z_BGSD, change_BG

    def one_round(
        self, z_BGSD: Tensor, change_BG: Tensor, on_B: Tensor, seen: KeysValues, inputs: ThinkingInputs
    ) -> tuple[Tensor, Tensor]:
        """Return normed thoughts after one more round, and how far they moved; those of rows that are not `on` stay."""
        attention = self.block.attention
        # Queries have the position of the opening token, so they can prefer near tokens. Keys of slots have none.
        place = Rotary(*(each.repeat_interleave(z_BGSD.shape[2], 1) for each in (inputs.here.cos, inputs.here.sin)))
        z_BQD = norm(z_BGSD + inputs.start_BGSD).flatten(1, 2)
        q_BQNH, own_k, own_v = attention.query_key_value(z_BQD, place, None)
        out_BQNH = attend(q_BQNH, *seen, inputs.plan, (own_k, own_v))
        z_BQD = z_BQD + attention.out(out_BQNH.flatten(2))
        z_BQD = z_BQD + self.block.mlp(norm(z_BQD))
        thought_BGSD = norm(z_BQD).view_as(z_BGSD)
        moved_BG = (thought_BGSD - z_BGSD).detach().square().mean((-1, -2)).sqrt()
        z_BGSD = torch.where(on_B[:, None, None, None], thought_BGSD, z_BGSD)
        return z_BGSD, torch.where(on_B[:, None], moved_BG, change_BG)

    def _mask(self, opening_BG: Tensor, causal: CausalWindow) -> Tensor:
        """Return the bool mask [B, Q, J + Q] of Q = G x S thoughts.

        A thought attends to what its opening token attends to, if there is such a token, and to its own group.
        """
        slots = len(self.start)
        window_BGJ = causal.mask_of(opening_BG.clamp(min=0)) & (opening_BG >= 0)[..., None]
        group_Q = torch.arange(opening_BG.shape[1], device=opening_BG.device).repeat_interleave(slots)
        own_QQ = group_Q[:, None] == group_Q
        return torch.cat([window_BGJ.repeat_interleave(slots, 1), own_QQ.expand(len(opening_BG), -1, -1)], 2)

    def check_rounds(self, think_B: Tensor) -> None:
        check_range(think_B, 0, self.most_rounds, "rounds of thinking")
        late = late_rows(len(think_B))
        check_range((think_B > self.rounds).sum(), 0, late, f"rows that think for more than {self.rounds} rounds:")

    def rounds_in_training(self, rows: int, generator: torch.Generator) -> Tensor:
        """Draw the rounds of each row; in all but `late_rows` rows at most the usual number."""
        numbers = torch.tensor([0, min(1, self.rounds), *[self.rounds] * USUAL, self.most_rounds])
        rounds_B = numbers[torch.randint(len(numbers), (rows,), generator=generator)]
        rounds_B[(rounds_B > self.rounds).nonzero()[late_rows(rows) :]] = self.rounds
        return rounds_B

    def slots_of(self, groups: int) -> int:
        return (groups + 1) * len(self.start)

    def flops(self, work: Work) -> float:
        """Keys and values of the tokens, the projection of opening tokens, and the rounds over all groups."""
        config, attention = self.config, self.block.attention
        slots = work.groups * len(self.start)
        rounds = self.rounds if work.think is None else work.think
        a_round = slots * matrices(self.block) + 2 * config.heads * config.head_dim * slots * (work.length + slots)
        keys_values = work.length * matrices(attention.k, attention.v)
        total = work.groups * matrices(self.opening) + rounds * a_round
        if self.again is None:
            return total + keys_values
        pairs = computed_pairs(work.length, config.window)
        total += work.length * matrices(self.again)
        total += rounds * (work.length * matrices(self.block) + 2 * config.heads * config.head_dim * pairs)
        return total + keys_values * (min(2, self.most_rounds) if rounds == 0 else rounds < self.most_rounds)

    def kept_bytes(self, work: Work) -> float:
        """Each round concatenates its own keys and values with those of the tokens, and keeps them."""
        config = self.config
        slots = work.groups * len(self.start)
        heads = config.kv_heads if work.half else config.heads
        a_round = 2 * (work.length + slots) * heads * config.head_dim + 10 * slots * config.width
        if self.thinks_always:  # as in a block, and what goes in and is kept
            outputs = 3 * config.heads * config.head_dim + 2 * config.kv_heads * config.head_dim
            a_round += work.length * (6 * config.width + outputs + self.block.mlp.up.out_features)
        return int(work.itemsize * self.think_in_training(work.rows) * a_round)

    def think_in_training(self, rows: int) -> float:
        return self.rounds + (self.most_rounds - self.rounds) * late_rows(rows) / rows

    def switches(self) -> dict[str, Switch]:
        """Off: no rounds, so no token attends to a group."""

        @contextmanager
        def off(model: Any) -> Iterator[dict[str, Any]]:
            yield {"think": 0}

        return {self.name: off}


def _each(rounds: int | Tensor | Rounds, rows: int, device: torch.device, usual: int) -> tuple[Tensor, int]:
    """Return the rounds of each row [B], and the number that is computed for all of them, in training `usual`."""
    if isinstance(rounds, Rounds):
        return rounds.each_B, rounds.most
    if isinstance(rounds, Tensor):
        return rounds, usual
    return torch.full((rows,), rounds, device=device), rounds


def late_rows(rows: int) -> int:
    """Return how many of `rows` rows can have more than the usual number of rounds in training."""
    return max(1, rows // 8)
