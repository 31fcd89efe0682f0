"""The gated delta rule for a few tokens, token after token, in one launch.

A program has a block of the values of one head of one row, which do not depend on the others: U is its width here. Its
part of the state stays in registers. One warp computes it, so that sums over the keys need no memory that warps share.
All is fp32.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

COLUMNS = 16
"""Values per program: 64 bytes of each key's row, and 32 programs for a row of 4 heads of 128."""


@triton.jit
def _read(
    qk_ptr, v_ptr, decay_ptr, rate_ptr, state_ptr, read_ptr, added_ptr,
    key_row, key_token, key_head, key_part, value_row, value_token, value_head,
    HEADS: tl.constexpr, KEYS: tl.constexpr, VALUES: tl.constexpr, TOKENS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Reads, and what is added. The inputs of the next token are loaded before those of this one are used."""
    row, head, column = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2) * COLUMNS
    h, u = tl.arange(0, KEYS), column + tl.arange(0, COLUMNS)
    q_ptr = qk_ptr + row * key_row + head * key_head + h
    k_ptr = q_ptr + key_part
    v_ptr += row * value_row + head * value_head + u
    gate = row * TOKENS * HEADS + head
    state_HU = tl.load(state_ptr + ((row * HEADS + head) * KEYS + h[:, None]) * VALUES + u[None, :])
    k_H, q_H, v_U = tl.load(k_ptr), tl.load(q_ptr), tl.load(v_ptr)
    log_decay, rate = tl.load(decay_ptr + gate), tl.load(rate_ptr + gate)
    for t in tl.static_range(TOKENS):
        later = tl.minimum(t + 1, TOKENS - 1)
        next_k, next_q = tl.load(k_ptr + later * key_token), tl.load(q_ptr + later * key_token)
        next_v = tl.load(v_ptr + later * value_token)
        next_decay, next_rate = tl.load(decay_ptr + gate + later * HEADS), tl.load(rate_ptr + gate + later * HEADS)
        state_HU *= tl.exp(log_decay)
        added_U = rate * (v_U - tl.sum(k_H[:, None] * state_HU, 0))
        state_HU += k_H[:, None] * added_U[None, :]
        at = (gate + t * HEADS) * VALUES + u
        tl.store(added_ptr + at, added_U)
        tl.store(read_ptr + at, tl.sum(q_H[:, None] * state_HU, 0))
        k_H, q_H, v_U, log_decay, rate = next_k, next_q, next_v, next_decay, next_rate


@triton.jit
def _write(
    k_ptr, added_ptr, decay_ptr, state_ptr, count_ptr, after_ptr, key_row, key_token, key_head,
    HEADS: tl.constexpr, KEYS: tl.constexpr, VALUES: tl.constexpr, TOKENS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """The state after the first tokens. Nothing of the others is loaded."""
    row, head, column = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2) * COLUMNS
    h, u = tl.arange(0, KEYS), column + tl.arange(0, COLUMNS)
    at = ((row * HEADS + head) * KEYS + h[:, None]) * VALUES + u[None, :]
    count = tl.load(count_ptr + row)
    state_HU = tl.load(state_ptr + at)
    k_ptr += row * key_row + head * key_head + h
    for t in tl.static_range(TOKENS):
        place = (row * TOKENS + t) * HEADS + head
        k_H = tl.load(k_ptr + t * key_token, mask=t < count, other=0.0)
        added_U = tl.load(added_ptr + place * VALUES + u, mask=t < count, other=0.0)
        log_decay = tl.load(decay_ptr + place, mask=t < count, other=0.0)
        state_HU = state_HU * tl.exp(log_decay) + k_H[:, None] * added_U[None, :]
    tl.store(after_ptr + at, state_HU)


def read(
    qk_BTN2H: Tensor, v_BTNU: Tensor, log_decay_BTN: Tensor, rate_BTN: Tensor, state_BNHU: Tensor
) -> tuple[Tensor, Tensor]:
    """As `plain_read_few` in `lepton/ops/few_writes.py`. Gates and state are contiguous."""
    qk_BTN2H, v_BTNU = _dense(qk_BTN2H), _dense(v_BTNU)
    rows, heads, keys, values = state_BNHU.shape
    tokens = v_BTNU.shape[1]
    read_BTNU, added_BTNU = (v_BTNU.new_empty(rows, tokens, heads, values) for _ in range(2))
    with torch.cuda.device_of(state_BNHU):  # Triton launches on the current device
        _read[(rows, heads, values // COLUMNS)](
            qk_BTN2H, v_BTNU, log_decay_BTN, rate_BTN, state_BNHU, read_BTNU, added_BTNU,
            *qk_BTN2H.stride()[:4], *v_BTNU.stride()[:3],
            HEADS=heads, KEYS=keys, VALUES=values, TOKENS=tokens, COLUMNS=COLUMNS, num_warps=1,
        )  # fmt: skip
    return read_BTNU, added_BTNU


def write(qk_BTN2H: Tensor, added_BTNU: Tensor, log_decay_BTN: Tensor, state_BNHU: Tensor, count_B: Tensor) -> Tensor:
    """As `plain_write_few` in `lepton/ops/few_writes.py`. All but the keys are contiguous."""
    k_BTNH, after_BNHU = _dense(qk_BTN2H)[..., 1, :], torch.empty_like(state_BNHU)
    rows, heads, keys, values = state_BNHU.shape
    with torch.cuda.device_of(state_BNHU):
        _write[(rows, heads, values // COLUMNS)](
            k_BTNH, added_BTNU, log_decay_BTN, state_BNHU, count_B, after_BNHU, *k_BTNH.stride()[:3],
            HEADS=heads, KEYS=keys, VALUES=values, TOKENS=added_BTNU.shape[1], COLUMNS=COLUMNS, num_warps=1,
        )  # fmt: skip
    return after_BNHU


def _dense(x: Tensor) -> Tensor:
    """Return a tensor whose last dimension is contiguous."""
    return x if x.stride(-1) == 1 else x.contiguous()
