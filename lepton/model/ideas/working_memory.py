"""Working memory: a matrix per head that every token writes to and reads from (gated delta rule, Yang et al. 2024).

    S_t = a_t (I - b_t k_t k_t') S_(t-1) + b_t k_t v_t'        o_t = S_t' q_t        |k| = |q| = 1

A token reads after it has written. With `reads` above 1 deep blocks ask the same memory again, with the states of their
own: a chain of n associations takes n reads, and what a read has found is noisy before a block has seen it. At the end
of a document the state is set to exactly 0; decay would never get there.
`lepton/ops/delta_rule.py` computes the rule, in fp32 or better, because the state is a sum over the whole past.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lepton.config import IdeaConfig, LeptonConfig
from lepton.errors import InputError
from lepton.model.ideas.idea import Contribution, Flow, Idea, Switch, Work, matrices
from lepton.model.layers import Linear, at_indices, norm
from lepton.model.parameters import BIAS, FEED, MATRIX, SCORE, replaced, scaled
from lepton.model.timeline import Timeline
from lepton.ops.delta_rule import CHUNK, Memories, Writes, chunked_delta_rule, delta_rule, read_again
from lepton.ops.few_writes import FEW, FewWrites, read_few, write_few

CONV = 4
"""Width of the causal convolution."""
UNIT_EPS = 1e-6
"""Smallest norm that queries and keys are divided by."""
READ_EPS = 1e-2
"""Epsilon of the norm of reads, about the mean square of a weak one. With a smaller one, reads of an empty memory would
be scaled up to unit size, and their rounding errors and gradients with them."""


HEADS = {"nano": 2, "micro": 3, "tiny": 4, "small": 4, "medium": 6, "large": 6, "xl": 8, "xxl": 8}
"""Heads of each size."""


@dataclass(frozen=True, kw_only=True)
class WorkingMemoryConfig(IdeaConfig):
    """The working memory."""

    heads: int = 4
    """Heads, each with its own matrix."""
    key_dim: int = 64
    """Width of a head's keys and queries."""
    value_dim: int = 128
    """Width of a head's values."""
    tied_decay: bool = False
    """Whether a token forgets only as far as it writes, a_t = sigmoid(..) ** b_t: a memory then outlasts any number of
    tokens that do not write. Heads begin with write rates of 0.05 to 0.5."""
    reads: int = 1
    """Reads of a token: one after the stem, the others before deep blocks, spread evenly over them."""

    name = "memory"
    most = {"heads": 1024, "key_dim": 4096, "value_dim": 4096, "reads": 64}
    flat = {"memory_heads": "heads", "key_dim": "key_dim", "value_dim": "value_dim"}
    flat_switch = "memory_heads"

    def check(self, config: LeptonConfig) -> None:
        self.at_least(1, "heads", "key_dim", "value_dim", "reads")
        if self.reads - 1 > (deep := config.layers - config.stem_layers):
            raise InputError(f"memory.reads={self.reads}: must be at most {deep + 1}, one more than deep blocks")

    def build(self, config: LeptonConfig) -> "WorkingMemory":
        return WorkingMemory(config, self)

    def feature_width(self, config: LeptonConfig) -> int:
        return self.heads * self.value_dim

    @classmethod
    def preset(cls, size: str, width: int) -> "WorkingMemoryConfig":
        nano = size == "nano"
        return cls(heads=HEADS.get(size, cls.heads), key_dim=32 if nano else 64, value_dim=64 if nano else 128)


@dataclass(frozen=True)
class WorkingMemoryState:
    """The state of the working memory."""

    matrix_BNHU: Tensor
    """A matrix per head, fp32 or better."""
    tail_BRI: Tensor
    """The last R = 3 inputs of the convolution."""

    outlives_window = True

    def cleared(self) -> "WorkingMemoryState":
        """Return an empty memory."""
        return WorkingMemoryState(torch.zeros_like(self.matrix_BNHU), torch.zeros_like(self.tail_BRI))


def first_tap(conv_I4: Tensor) -> None:
    """Fill with 1 for the token itself and 0 for those before it: the convolution starts as the identity."""
    scaled(conv_I4)  # overwritten below, but keeps the random stream unchanged for the parameters that follow
    conv_I4.zero_()[:, 0] = 1


def spread_decay(bias_N: Tensor) -> None:
    """Fill with 2 ... 6 over the heads: half-lives of about 5 to 280 tokens."""
    bias_N.copy_(torch.linspace(2, 6, len(bias_N)))


def spread_rate(bias_N: Tensor) -> None:
    """Fill with -3 ... 0 over the heads, the slowest head first in decay: write rates of about 0.5 to 0.05."""
    bias_N.copy_(torch.linspace(0, -3, len(bias_N)))


class AnotherRead(nn.Module):
    """A read of a deep block: a query from its state, and what it adds to the stream."""

    declares = {"ask.weight": MATRIX, "out.weight": FEED}

    def __init__(self, memory: "WorkingMemory", width: int) -> None:
        super().__init__()
        self.heads = memory.heads
        self.ask = Linear(width, memory.heads * memory.key_dim)
        self.out = Linear(memory.heads * memory.value_dim, width)

    def forward(self, x_BTD: Tensor, seen: "Seen | FewSeen") -> Tensor:
        """Return what is added to the stream `x_BTD`."""
        precise = torch.promote_types(x_BTD.dtype, torch.float32)
        q_BTNH = F.silu(self.ask(norm(x_BTD))).to(precise).unflatten(-1, (self.heads, -1))
        return self.out(_normed(seen.read(F.normalize(q_BTNH, dim=-1, eps=UNIT_EPS)), x_BTD.dtype))


class WorkingMemory(Idea):
    """Projections, causal convolution and gates around the delta rule."""

    name = "memory"
    title = "working memory"
    compiled: tuple[str, ...] = ("forward",)
    old_names = {
        f"{prefix}{name}": f"{prefix}memory.{name}" for prefix in ("memory.", "") for name in ("matrix_", "tail_")
    }
    declares = {
        "qkv.weight": MATRIX,
        "conv": SCORE.but(initial=first_tap),
        "gates.weight": SCORE,
        "decay_bias": BIAS.but(initial=spread_decay),
        "rate_bias": BIAS.but(initial=spread_rate),
        "out.weight": FEED,
    }

    def __init__(self, config: LeptonConfig, own: WorkingMemoryConfig) -> None:
        super().__init__()
        self.heads, self.key_dim, self.value_dim = own.heads, own.key_dim, own.value_dim
        self.channels = self.heads * (2 * self.key_dim + self.value_dim)
        self.qkv = Linear(config.width, self.channels)
        self.conv = nn.Parameter(torch.empty(self.channels, CONV))
        self.gates = Linear(config.width, 2 * self.heads)
        self.decay_bias = nn.Parameter(torch.empty(self.heads))
        self.rate_bias = nn.Parameter(torch.empty(self.heads)) if own.tied_decay else None
        self.out = Linear(self.heads * self.value_dim, config.width)
        deep = config.layers - config.stem_layers
        self.again = nn.ModuleDict(
            {str(read * deep // own.reads): AnotherRead(self, config.width) for read in range(1, own.reads)}
        )
        self.compiled = ("forward", *(f"again.{block}.forward" for block in self.again))

    def fresh(self, rows: int, dtype: torch.dtype, device: torch.device, *, allocate: bool) -> WorkingMemoryState:
        precise = torch.promote_types(dtype, torch.float32)
        matrix = torch.zeros(rows, self.heads, self.key_dim, self.value_dim, dtype=precise, device=device)
        return WorkingMemoryState(matrix, torch.zeros(rows, CONV - 1, self.channels, dtype=dtype, device=device))

    def carried(self, past: WorkingMemoryState, fresh: WorkingMemoryState) -> WorkingMemoryState:
        """Return `past` without inputs of the convolution: a new stream has no tokens before its first."""
        return replace(past, tail_BRI=fresh.tail_BRI)

    def contribute(self, flow: Flow, past: WorkingMemoryState) -> Contribution:
        """Read and write the memory, and add a projection of the reads to the stream."""
        read_BTF, strength_BT, update, seen = self(flow.u_BTD, past.tail_BRI, past.matrix_BNHU, flow.timeline)
        given = {"added_BTD": self.out(read_BTF), "feature_BTF": read_BTF, "signal_BT": strength_BT}
        return Contribution(**given, update=update, seen=seen)

    def before_block(self, block: int, x_BTD: Tensor, flow: Flow) -> Tensor | None:
        """Read the memory again, with the stream before a deep block."""
        if str(block) not in self.again:
            return None
        return self.again[str(block)](x_BTD, flow.contributions[self.name].seen)

    def flops(self, work: Work) -> float:
        """Projections, and the matrix products of the delta rule in chunks."""
        chunk = min(CHUNK, work.length)
        padded = -(-work.length // chunk) * chunk
        inside = 2 * chunk * self.key_dim + chunk * self.value_dim
        across = 3 * self.key_dim * self.value_dim
        total = work.length * matrices(self) + padded * self.heads * (inside + across)
        again = 2 * chunk * self.key_dim + chunk * self.value_dim + self.key_dim * self.value_dim
        total += len(self.again) * padded * self.heads * again
        return total

    def kept_bytes(self, work: Work) -> float:
        """Most activations are fp32."""
        chunk, keys, values = min(CHUNK, work.length), self.key_dim, self.value_dim
        # Outputs of the convolution, solutions, values and reads, keys and queries; then matrices and states of chunks.
        squares, states = (4, 2) if work.half else (10, 4)
        precise = (2 * keys + values) + (keys + values) + 2 * values + 2 * keys
        precise += squares * chunk + states * keys * values // chunk
        more = len(self.again) * (4 * (2 * chunk + 2 * keys + 2 * values) + 2 * work.itemsize * values)
        return self.heads * work.length * (4 * precise + work.itemsize * (2 * keys + values) + more)

    def switches(self) -> dict[str, Switch]:
        """Off: values are zero, so all reads are."""

        @contextmanager
        def off(model: Any) -> Iterator[dict[str, Any]]:
            weight = self.qkv.weight.detach().clone()
            weight.unflatten(0, (self.heads, -1))[:, -self.value_dim :] = 0
            with replaced(self.qkv.weight, weight):
                yield {}

        return {self.title: off}

    def forward(
        self, u_BTD: Tensor, tail_BRI: Tensor, state_BNHU: Tensor, timeline: Timeline
    ) -> "tuple[Tensor, Tensor, MemoryUpdate | FewUpdate, Seen | FewSeen | None]":
        """Read and write the memory with the normed stem states `u_BTD`.

        `tail_BRI` and `state_BNHU` are the state before the chunk. Returns the normed reads [B, T, N x U], the root
        mean square of the raw reads [B, T], the update of the state, and what deep blocks ask (None: none does).
        """
        if timeline.one_document and u_BTD.shape[1] <= FEW and not torch.is_grad_enabled():
            return self._few(u_BTD, tail_BRI, state_BNHU)
        raw_BTI = self.qkv(u_BTD)
        joined_BJI = torch.cat([tail_BRI, raw_BTI], 1)
        length = raw_BTI.shape[1]
        mixed_BTI = torch.zeros_like(raw_BTI)
        for distance in range(CONV):
            first = CONV - 1 - distance
            seen_BT1 = (timeline.position_BT >= distance)[..., None]
            mixed_BTI = (
                mixed_BTI + joined_BJI[:, first : first + length] * self.conv[:, distance].to(raw_BTI) * seen_BT1
            )
        precise = torch.promote_types(u_BTD.dtype, torch.float32)
        parts = F.silu(mixed_BTI).to(precise).unflatten(-1, (self.heads, -1))
        q, k, v = parts.split([self.key_dim, self.key_dim, self.value_dim], -1)
        log_decay_BTN, rate_BTN = self._gates(u_BTD, precise)
        chunk = min(CHUNK, length)
        writes = Writes(
            _chunks(F.normalize(q, dim=-1, eps=UNIT_EPS), chunk),
            _chunks(F.normalize(k, dim=-1, eps=UNIT_EPS), chunk),
            _chunks(v, chunk),
            _chunks(log_decay_BTN[..., None], chunk)[..., 0],
            _chunks(rate_BTN[..., None], chunk)[..., 0],
            _pad_chunks(timeline.document_BT, chunk),
        )
        entry_BP = F.pad(writes.document_BPO[:, :-1, -1], (1, 0))
        found = delta_rule(writes, state_BNHU, entry_BP)
        read_BTNU = found.reads.transpose(2, 3).flatten(1, 2)[:, :length]
        update = MemoryUpdate(writes, found.entry_BPNHU, found.end_BNHU, joined_BJI)
        strength_BT = read_BTNU.detach().square().mean((-1, -2)).sqrt()
        seen = Seen(writes, found, entry_BP) if self.again else None
        return _normed(read_BTNU, u_BTD.dtype), strength_BT, update, seen

    def _gates(self, u_BTD: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Return the logarithm of the decay, and the write rate, of each head [B, T, N]."""
        decay_BTN, rate_BTN = self.gates(u_BTD).to(dtype).chunk(2, -1)
        log_decay_BTN = F.logsigmoid(decay_BTN + self.decay_bias.to(dtype))
        if self.rate_bias is None:
            return log_decay_BTN, rate_BTN.sigmoid()
        rate_BTN = (rate_BTN + self.rate_bias.to(dtype)).sigmoid()
        return rate_BTN * log_decay_BTN, rate_BTN

    def _few(
        self, u_BTD: Tensor, tail_BRI: Tensor, state_BNHU: Tensor
    ) -> "tuple[Tensor, Tensor, FewUpdate, FewSeen | None]":
        """`forward` for a few tokens of one document, without gradients, in few operators.

        What the convolution sees of before the document is 0 in the tail.
        """
        joined_BJI = torch.cat([tail_BRI, self.qkv(u_BTD)], 1)
        # The taps of a token lie as the inputs do: the oldest first.
        taps_4I = self.conv.to(u_BTD.dtype).flip(1).t()
        mixed_BTI = (joined_BJI.unfold(1, CONV, 1).transpose(2, 3) * taps_4I).sum(2)
        parts = F.silu(mixed_BTI).to(state_BNHU.dtype).unflatten(2, (self.heads, -1))
        qk, v_BTNU = parts.split([2 * self.key_dim, self.value_dim], 3)
        qk_BTN2H = qk.unflatten(3, (2, self.key_dim))
        size_BTN21 = torch.linalg.vector_norm(qk_BTN2H, dim=4, keepdim=True).clamp_min(UNIT_EPS)
        writes = FewWrites(qk_BTN2H / size_BTN21, v_BTNU, *self._gates(u_BTD, state_BNHU.dtype))
        read_BTNU, added_BTNU = read_few(writes, state_BNHU)
        update = FewUpdate(writes, added_BTNU, state_BNHU, joined_BJI)
        strength_BT = torch.linalg.vector_norm(read_BTNU, dim=(2, 3)) * (self.heads * self.value_dim) ** -0.5
        seen = FewSeen(writes, state_BNHU) if self.again else None
        return _normed(read_BTNU, u_BTD.dtype), strength_BT, update, seen


def _normed(read_BTNU: Tensor, dtype: torch.dtype) -> Tensor:
    """Return reads with each head's normed [B, T, N x U]; weak ones stay small."""
    return F.rms_norm(read_BTNU, read_BTNU.shape[-1:], eps=READ_EPS).flatten(2).to(dtype)


def _chunks(x: Tensor, chunk: int) -> Tensor:
    """Split [B, T, N, ...] into chunks [B, P, N, O, ...], padded with zeros, which change nothing in the memory."""
    x = F.pad(x, (0, 0, 0, 0, 0, -x.shape[1] % chunk))
    return x.unflatten(1, (-1, chunk)).transpose(2, 3)


def _pad_chunks(document_BT: Tensor, chunk: int) -> Tensor:
    """Split into chunks [B, P, O], padded with each row's last value."""
    missing = -document_BT.shape[1] % chunk
    padded = torch.cat([document_BT, document_BT[:, -1:].expand(-1, missing)], 1)
    return padded.unflatten(1, (-1, chunk))


@dataclass(frozen=True)
class Seen:
    """The memory as each token of a chunk sees it, after its own write."""

    writes: Writes
    memories: Memories
    entry_BP: Tensor
    """The document of the token before each chunk of the delta rule."""

    def read(self, q_BTNH: Tensor) -> Tensor:
        """Return what queries of norm 1 read, [B, T, N, U]."""
        asked = self.writes._replace(q=_chunks(q_BTNH, self.writes.k.shape[-2]))
        reads = read_again(asked, self.memories, self.entry_BP)
        return reads.transpose(2, 3).flatten(1, 2)[:, : q_BTNH.shape[1]]


@dataclass(frozen=True)
class FewSeen:
    """As `Seen`, for a few tokens of one document."""

    writes: FewWrites
    state_BNHU: Tensor
    """The memory before the chunk."""

    def read(self, q_BTNH: Tensor) -> Tensor:
        """Return what queries of norm 1 read, [B, T, N, U]."""
        asked = self.writes._replace(qk_BTN2H=torch.stack([q_BTNH, self.writes.qk_BTN2H[:, :, :, 1]], 3))
        return read_few(asked, self.state_BNHU)[0]


@dataclass(frozen=True)
class MemoryUpdate:
    """The writes of a chunk, from which the memory after any number of its tokens follows."""

    writes: Writes
    entry_BPNHU: Tensor
    """The memory before each chunk of the delta rule."""
    end_BNHU: Tensor
    """The memory after the last one."""
    joined_BJI: Tensor
    """Inputs of the convolution: those before the chunk, then the chunk's."""

    def after(self, count_B: Tensor, timeline: Timeline) -> WorkingMemoryState:
        """Return the state after the first `count_B` tokens, by replaying the last writes on the memory before them."""
        chunk = self.writes.k.shape[-2]
        rows = torch.arange(len(count_B), device=count_B.device)
        whole_B, rest_B = count_B // chunk, count_B % chunk
        last_B = whole_B.clamp(max=self.writes.k.shape[1] - 1)
        state_BNHU = torch.where((whole_B > last_B)[:, None, None, None], self.end_BNHU, self.entry_BPNHU[rows, last_B])
        part = Writes(*(value[rows, last_B][:, None] for value in self.writes))
        written_BO = torch.arange(chunk, device=count_B.device) < rest_B[:, None]
        final_B1 = part.document_BPO[:, 0].gather(1, (rest_B - 1).clamp(min=0)[:, None])
        replay = part._replace(
            log_decay=part.log_decay * written_BO[:, None, None],
            rate=part.rate * written_BO[:, None, None],
            document_BPO=torch.where(written_BO, part.document_BPO[:, 0], final_B1)[:, None],
        )
        entry_B = torch.where(last_B > 0, self.writes.document_BPO[rows, (last_B - 1).clamp(min=0), -1], 0)
        # A single chunk of which only the state is needed: the Triton kernels would save little.
        replayed_BNHU = chunked_delta_rule(replay, state_BNHU, entry_B[:, None]).end_BNHU
        state_BNHU = torch.where((rest_B > 0)[:, None, None, None], replayed_BNHU, state_BNHU)
        state_BNHU = state_BNHU.masked_fill(timeline.ended(count_B)[:, None, None, None], 0)
        index_BR = count_B[:, None] + torch.arange(CONV - 1, device=count_B.device)
        tail_BRI = self.joined_BJI.gather(1, index_BR[..., None].expand(-1, -1, self.joined_BJI.shape[2]))
        in_document_BR = (
            torch.arange(CONV - 1, device=count_B.device) >= CONV - 1 - timeline.position_after(count_B)[:, None]
        )
        return WorkingMemoryState(state_BNHU, tail_BRI.where(in_document_BR[..., None], 0))


@dataclass(frozen=True)
class FewUpdate:
    """As `MemoryUpdate`, of a few tokens of one document."""

    writes: FewWrites
    added_BTNU: Tensor
    """What each token adds to the values of its key."""
    state_BNHU: Tensor
    """The memory before the chunk."""
    joined_BJI: Tensor
    """Inputs of the convolution: those before the chunk, then the chunk's."""

    def after(self, count_B: Tensor, timeline: Timeline) -> WorkingMemoryState:
        """Return the state after the first `count_B` tokens, none of which ends a document."""
        state_BNHU = write_few(self.writes, self.added_BTNU, self.state_BNHU, count_B)
        index_BR = count_B.unsqueeze(1) + torch.arange(CONV - 1, device=count_B.device)
        return WorkingMemoryState(state_BNHU, at_indices(self.joined_BJI, index_BR))
