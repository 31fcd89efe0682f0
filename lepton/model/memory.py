"""Working memory: a matrix a head that every token writes to and reads from (gated delta rule, Yang et al. 2024).

    S_t = a_t (I - b_t k_t k_t') S_(t-1) + b_t k_t v_t'        o_t = S_t' q_t        |k| = |q| = 1

Read after write. A document's end is a mask, never a decay of 0. `lepton/ops/delta_rule.py` computes it. All of it runs
in fp32 or better, because the state is a sum over the whole past.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lepton.config import LeptonConfig
from lepton.model.layers import Linear
from lepton.model.timeline import Timeline
from lepton.ops.delta_rule import CHUNK, Writes, chunked_delta_rule, delta_rule

CONV = 4
READ_EPS = 1e-2
"""Added to the mean square of a read before it is normed: about that of a weak one. Without it the norm would bring
reads near zero, their rounding errors and their gradients to the size of all others."""


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
        [B, T, heads x value_dim] (normed), their strength [B, T], and the record from which the state after any prefix
        follows.
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
        reads, entry_BPHKV, end_BHKV = delta_rule(writes, state_BHKV, entry_BP)
        read_BTHV = reads.transpose(2, 3).flatten(1, 2)[:, :length]
        run = MemoryRun(writes, entry_BPHKV, end_BHKV, joined_BXC)
        strength_BT = read_BTHV.detach().square().mean((-1, -2)).sqrt()
        normed_BTHV = F.rms_norm(read_BTHV, read_BTHV.shape[-1:], eps=READ_EPS)
        return normed_BTHV.flatten(2).to(u_BTD.dtype), strength_BT, run


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
    entry_BPHKV: Tensor
    """The memory on entry to each chunk."""
    end_BHKV: Tensor
    """The memory after the last one."""
    joined_BXC: Tensor
    """Inputs of the convolution, those of the past first."""

    def after(self, count_B: Tensor, timeline: Timeline) -> tuple[Tensor, Tensor]:
        """Return the convolution's tail and the memory once the first `count_B` tokens are read."""
        chunk = self.writes.k.shape[-2]
        rows = torch.arange(len(count_B), device=count_B.device)
        whole_B, rest_B = count_B // chunk, count_B % chunk
        last_B = whole_B.clamp(max=self.writes.k.shape[1] - 1)
        state_BHKV = torch.where((whole_B > last_B)[:, None, None, None], self.end_BHKV, self.entry_BPHKV[rows, last_B])
        part = Writes(*(value[rows, last_B][:, None] for value in self.writes))
        written_BC = torch.arange(chunk, device=count_B.device) < rest_B[:, None]
        final_B1 = part.document_BPC[:, 0].gather(1, (rest_B - 1).clamp(min=0)[:, None])
        replay = part._replace(
            log_decay=part.log_decay * written_BC[:, None, None],
            rate=part.rate * written_BC[:, None, None],
            document_BPC=torch.where(written_BC, part.document_BPC[:, 0], final_B1)[:, None],
        )
        entry_B = torch.where(last_B > 0, self.writes.document_BPC[rows, (last_B - 1).clamp(min=0), -1], 0)
        # One chunk, and only its state: there is little that kernels could save.
        _, _, replayed_BHKV = chunked_delta_rule(replay, state_BHKV, entry_B[:, None])
        state_BHKV = torch.where((rest_B > 0)[:, None, None, None], replayed_BHKV, state_BHKV)
        state_BHKV = state_BHKV.masked_fill(timeline.ended(count_B)[:, None, None, None], 0)
        index_BX = count_B[:, None] + torch.arange(CONV - 1, device=count_B.device)
        tail_BXC = self.joined_BXC.gather(1, index_BX[..., None].expand(-1, -1, self.joined_BXC.shape[2]))
        in_document_BX = (
            torch.arange(CONV - 1, device=count_B.device) >= CONV - 1 - timeline.position_after(count_B)[:, None]
        )
        return tail_BXC.where(in_document_BX[..., None], 0), state_BHKV
