"""Working memory: a matrix a head that every token writes to and reads from (gated delta rule, Yang et al. 2024).

    S_t = a_t (I - b_t k_t k_t') S_(t-1) + b_t k_t v_t'        o_t = S_t' q_t        |k| = |q| = 1

Read after write. A document's end is a mask, never a decay of 0. The chunk form below computes the same for many
tokens at once; `tests/model/test_memory.py` compares it with the recurrence. All of it runs in fp32 or better,
because the state is a sum over the whole past.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lepton.config import LeptonConfig
from lepton.model.attention import Linear, norm
from lepton.model.timeline import Timeline

CONV = 4
CHUNK = 64


class Writes(NamedTuple):
    """What tokens do to the memory, chunk-major: P chunks of C tokens, H heads; k [B, P, H, C, key_dim] and so on."""

    q: Tensor
    k: Tensor
    v: Tensor
    log_decay: Tensor
    rate: Tensor
    document_BPC: Tensor


def delta_rule(writes: Writes, state_BHKV: Tensor, entry_document_BP: Tensor) -> tuple[Tensor, list[Tensor]]:
    """Run the memory over P chunks; return the reads [B, P, H, C, value_dim] and the state after each chunk.

    `entry_document_BP` names the document that the state on entry to a chunk belongs to.

    The part of a chunk that does not depend on the state is solved for all chunks at once, by substitution: inverting
    by repeated squaring explodes in fp32 on repeated tokens.
    """
    q, k, v, log_decay, rate, document_BPC = writes
    low = torch.ones(k.shape[-2], k.shape[-2], dtype=torch.bool, device=k.device).tril()
    same_BPCC = (document_BPC[:, :, :, None] == document_BPC[:, :, None, :]) & low
    log_g = log_decay.cumsum(-1)
    ratio = (log_g[..., :, None] - log_g[..., None, :]).masked_fill(~same_BPCC[:, :, None], float("-inf")).exp()
    enters_BPC = document_BPC == entry_document_BP[:, :, None]
    g = log_g.exp() * enters_BPC[:, :, None]
    mix = (rate[..., None] * (k @ k.mT) * ratio).tril(-1)
    solved = torch.linalg.solve_triangular(
        mix + torch.eye(mix.shape[-1], dtype=mix.dtype, device=mix.device),
        torch.cat([rate[..., None] * v, (rate * g)[..., None] * k], -1),
        upper=False,
        unitriangular=True,
    )
    u, w = solved.split([v.shape[-1], k.shape[-1]], -1)
    inside = (q @ k.mT) * ratio
    stays_BPC = document_BPC == document_BPC[:, :, -1:]
    to_end = (log_g[..., -1:] - log_g).exp() * stays_BPC[:, :, None]
    reads, states, state = [], [], state_BHKV
    for p in range(k.shape[1]):
        written = u[:, p] - w[:, p] @ state
        reads.append(g[:, p, :, :, None] * (q[:, p] @ state) + inside[:, p] @ written)
        state = g[:, p, :, -1, None, None] * state + (k[:, p] * to_end[:, p, :, :, None]).mT @ written
        states.append(state)
    return torch.stack(reads, 1), states


class WorkingMemory(nn.Module):
    """Projections, short convolution and gates around the delta rule."""

    def __init__(self, config: LeptonConfig) -> None:
        super().__init__()
        self.heads, self.key_dim, self.value_dim = config.memory_heads, config.key_dim, config.value_dim
        self.channels = self.heads * (2 * self.key_dim + self.value_dim)
        self.qkv = Linear(config.width, self.channels)
        self.conv = nn.Parameter(torch.empty(self.channels, CONV))
        self.gates = Linear(config.width, 2 * self.heads)
        self.decay_bias = nn.Parameter(torch.empty(self.heads))
        self.out = Linear(self.heads * self.value_dim, config.width)

    def forward(
        self, u_BTD: Tensor, tail_BXC: Tensor, state_BHKV: Tensor, timeline: Timeline
    ) -> tuple[Tensor, Tensor, "MemoryRun"]:
        """Read and write the memory with the normed stem states `u_BTD`.

        `tail_BXC` holds the convolution's last inputs and `state_BHKV` the memory on entry. Returns the reads
        [B, T, heads x value_dim] (normed), their strength [B, T], and the record from which the state after any
        prefix follows.
        """
        raw_BTC = self.qkv(u_BTD)
        joined_BXC = torch.cat([tail_BXC, raw_BTC], 1)
        length = raw_BTC.shape[1]
        mixed_BTC = torch.zeros_like(raw_BTC)
        for distance in range(CONV):
            first = CONV - 1 - distance
            seen_BT1 = (timeline.position_BT >= distance)[..., None]
            mixed_BTC = (
                mixed_BTC + joined_BXC[:, first : first + length] * self.conv[:, distance].to(raw_BTC) * seen_BT1
            )
        precise = torch.promote_types(u_BTD.dtype, torch.float32)
        parts = F.silu(mixed_BTC).to(precise).unflatten(-1, (self.heads, -1))
        q, k, v = parts.split([self.key_dim, self.key_dim, self.value_dim], -1)
        decay, rate = self.gates(u_BTD).to(precise).chunk(2, -1)
        chunk = min(CHUNK, length)
        writes = Writes(
            _chunks(F.normalize(q, dim=-1, eps=1e-6), chunk),
            _chunks(F.normalize(k, dim=-1, eps=1e-6), chunk),
            _chunks(v, chunk),
            _chunks(F.logsigmoid(decay + self.decay_bias.to(precise))[..., None], chunk)[..., 0],
            _chunks(rate.sigmoid()[..., None], chunk)[..., 0],
            _pad_chunks(timeline.document_BT, chunk),
        )
        entry_BP = F.pad(writes.document_BPC[:, :-1, -1], (1, 0))
        reads, states = delta_rule(writes, state_BHKV, entry_BP)
        read_BTHV = reads.transpose(2, 3).flatten(1, 2)[:, :length]
        run = MemoryRun(writes, torch.stack([state_BHKV, *states], 1), joined_BXC)
        strength_BT = read_BTHV.detach().square().mean((-1, -2)).sqrt()
        return norm(read_BTHV).flatten(2).to(u_BTD.dtype), strength_BT, run


def _chunks(x_BTHX: Tensor, chunk: int) -> Tensor:
    """[B, T, H, X] as [B, P, H, C, X]; what fills the last chunk writes nothing and decays nothing."""
    x = F.pad(x_BTHX, (0, 0, 0, 0, 0, -x_BTHX.shape[1] % chunk))
    return x.unflatten(1, (-1, chunk)).transpose(2, 3)


def _pad_chunks(document_BT: Tensor, chunk: int) -> Tensor:
    missing = -document_BT.shape[1] % chunk
    padded = torch.cat([document_BT, document_BT[:, -1:].expand(-1, missing)], 1)
    return padded.unflatten(1, (-1, chunk))


@dataclass(frozen=True)
class MemoryRun:
    """What a chunk did to the memory: from it the memory after any prefix follows."""

    writes: Writes
    states_BPHKV: Tensor
    """The memory on entry and after each chunk."""
    joined_BXC: Tensor
    """Inputs of the convolution, those of the past first."""

    def after(self, count_B: Tensor, timeline: Timeline) -> tuple[Tensor, Tensor]:
        """Return the convolution's tail and the memory once the first `count_B` tokens are read."""
        chunk = self.writes.k.shape[-2]
        rows = torch.arange(len(count_B), device=count_B.device)
        whole_B, rest_B = count_B // chunk, count_B % chunk
        state_BHKV = self.states_BPHKV[rows, whole_B]
        last_B = whole_B.clamp(max=self.writes.k.shape[1] - 1)
        part = Writes(*(value[rows, last_B][:, None] for value in self.writes))
        written_BC = torch.arange(chunk, device=count_B.device) < rest_B[:, None]
        final_B1 = part.document_BPC[:, 0].gather(1, (rest_B - 1).clamp(min=0)[:, None])
        replay = part._replace(
            log_decay=part.log_decay * written_BC[:, None, None],
            rate=part.rate * written_BC[:, None, None],
            document_BPC=torch.where(written_BC, part.document_BPC[:, 0], final_B1)[:, None],
        )
        entry_B = torch.where(last_B > 0, self.writes.document_BPC[rows, (last_B - 1).clamp(min=0), -1], 0)
        _, states = delta_rule(replay, state_BHKV, entry_B[:, None])
        state_BHKV = torch.where((rest_B > 0)[:, None, None, None], states[0], state_BHKV)
        state_BHKV = state_BHKV.masked_fill(timeline.ended(count_B)[:, None, None, None], 0)
        index_BX = count_B[:, None] + torch.arange(CONV - 1, device=count_B.device)
        tail_BXC = self.joined_BXC.gather(1, index_BX[..., None].expand(-1, -1, self.joined_BXC.shape[2]))
        in_document_BX = (
            torch.arange(CONV - 1, device=count_B.device) >= CONV - 1 - timeline.position_after(count_B)[:, None]
        )
        return tail_BXC.where(in_document_BX[..., None], 0), state_BHKV
