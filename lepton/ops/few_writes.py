"""The gated delta rule for a few tokens of one document: the working memory of a decode step.

With few tokens the chunked form is many small operators. Here reading is one kernel on a GPU and a few operators
elsewhere, and so is the state after any number of the tokens, which is known only once drafts have been accepted. There
are no gradients. The rule is that of `lepton/ops/delta_rule.py`, whose `naive_delta_rule` is the reference.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from lepton.ops.kernels import Kernel

FEW = 8
"""Most tokens. `plain_read_few` relies on it."""


class FewWrites(NamedTuple):
    """What each token reads and writes; all tokens of a row are of the document that the state is of."""

    qk_BTN2H: Tensor
    """Queries, and keys, of norm 1."""
    v_BTNU: Tensor
    """Values."""
    log_decay_BTN: Tensor
    """log a."""
    rate_BTN: Tensor
    """b: the step size of the write, 0..1."""


def read_few(writes: FewWrites, state_BNHU: Tensor) -> tuple[Tensor, Tensor]:
    """Read the memory with 1 to `FEW` tokens, each after its own write.

    On a GPU in fp32 it is one launch, whose result for a row does not depend on the other rows. It neither copies nor
    synchronises, so it can be captured in a CUDA graph after a first call that builds the kernel.

    Args:
        writes: the tokens' inputs, in the dtype of the state.
        state_BNHU: the memory before the first token, fp32 or better.

    Returns:
        The reads o [B, T, N, U], and what `write_few` needs: what each token adds to the values of its key, of the same
        shape.
    """
    assert 0 < writes.v_BTNU.shape[1] <= FEW
    if FEW_WRITES.works(state_BNHU.device, state_BNHU.dtype, *state_BNHU.shape[2:]):
        return _read_few(*writes, state_BNHU)
    return plain_read_few(writes, state_BNHU)


def write_few(writes: FewWrites, added_BTNU: Tensor, state_BNHU: Tensor, count_B: Tensor) -> Tensor:
    """Return the memory after the first `count_B` tokens, [B, N, H, U].

    Args:
        writes: as for `read_few`.
        added_BTNU: from `read_few`.
        state_BNHU: the memory before the first token. It is not changed.
        count_B: int64, in 0..T. With 0 a row keeps its state exactly.
    """
    if FEW_WRITES.works(state_BNHU.device, state_BNHU.dtype, *state_BNHU.shape[2:]):
        return _write_few(writes.qk_BTN2H, added_BTNU, writes.log_decay_BTN, state_BNHU, count_B)
    return plain_write_few(writes, added_BTNU, state_BNHU, count_B)


def plain_read_few(writes: FewWrites, state_BNHU: Tensor) -> tuple[Tensor, Tensor]:
    """As `read_few`, in PyTorch, with as few operators as possible.

    The state itself is not needed: with the decay g from before the first token, and e_ij that from token j to i, token
    i adds b_i (v_i - g_i S' k_i - sum over j < i of e_ij (k_i k_j) added_j).
    """
    rows, heads, keys, values = state_BNHU.shape
    length, batch = writes.v_BTNU.shape[1], rows * heads
    qk = writes.qk_BTN2H.permute(0, 2, 3, 1, 4).reshape(batch, 2 * length, keys)
    v = writes.v_BTNU.transpose(1, 2).reshape(batch, length, values)
    log_g = writes.log_decay_BTN.transpose(1, 2).reshape(batch, length, 1).cumsum(1)
    rate = writes.rate_BTN.transpose(1, 2).reshape(batch, length, 1)
    seen = torch.bmm(qk, state_BNHU.reshape(batch, keys, values))
    read, known = (seen.view(batch, 2, length, values) * log_g.exp().unsqueeze(1)).unbind(1)
    alike = torch.bmm(qk, qk.narrow(1, length, length).mT)
    added = rate * (v - known)
    if length > 1:
        decayed = (log_g - log_g.mT).exp().tril()  # what overflows is above the diagonal
        alike, mix = (alike.view(batch, 2, length, length) * decayed.unsqueeze(1)).unbind(1)
        added = _solved((rate * mix).tril(-1), added)
    else:
        alike = alike.narrow(1, 0, 1)
    reads = torch.baddbmm(read, alike, added)
    reads_BTNU, added_BTNU = (each.view(rows, heads, length, values).transpose(1, 2) for each in (reads, added))
    return reads_BTNU, added_BTNU


def _solved(mix: Tensor, given: Tensor) -> Tensor:
    """Solve (identity + mix) x = given: x = (1 - mix) (1 + mix^2) (1 + mix^4) given, since mix^8 is 0.

    With up to 8 tokens its powers are small even if all keys are the same; with 64 they would overflow.
    """
    x = torch.baddbmm(given, mix, given, alpha=-1)
    power = 2
    while power < mix.shape[-1]:
        mix = torch.bmm(mix, mix)
        x = torch.baddbmm(x, mix, x)
        power *= 2
    return x


def plain_write_few(writes: FewWrites, added_BTNU: Tensor, state_BNHU: Tensor, count_B: Tensor) -> Tensor:
    """As `write_few`, in PyTorch."""
    length = added_BTNU.shape[1]
    taken_BT1 = (torch.arange(length, device=count_B.device) < count_B.unsqueeze(1)).unsqueeze(2)
    log_g_BTN = torch.where(taken_BT1, writes.log_decay_BTN, 0).cumsum(1)
    end_B1N = log_g_BTN.narrow(1, length - 1, 1)
    into_BTN = torch.where(taken_BT1, (end_B1N - log_g_BTN).exp(), 0)
    k = (writes.qk_BTN2H.select(3, 1) * into_BTN.unsqueeze(3)).permute(0, 2, 3, 1).flatten(0, 1)
    state = state_BNHU * end_B1N.exp().view(*state_BNHU.shape[:2], 1, 1)
    state.flatten(0, 1).baddbmm_(k, added_BTNU.transpose(1, 2).flatten(0, 1))
    return state


def _trial(device: torch.device, dtype: torch.dtype, keys: int, values: int) -> None:
    qk_BTN2H, v_BTNU = (torch.zeros(1, 2, 1, *shape, dtype=dtype, device=device) for shape in ((2, keys), (values,)))
    gate_BTN, state_BNHU = v_BTNU.new_zeros(1, 2, 1), v_BTNU.new_zeros(1, 1, keys, values)
    _, added_BTNU = _read_few(qk_BTN2H, v_BTNU, gate_BTN, gate_BTN, state_BNHU)
    _write_few(qk_BTN2H, added_BTNU, gate_BTN, state_BNHU, torch.ones(1, dtype=torch.int64, device=device))


FEW_WRITES = Kernel("memory of decoding", (torch.float32,), _trial)
"""`FEW_WRITES.works(device, dtype, key_dim, value_dim)`."""


@torch.library.custom_op("lepton::read_few", mutates_args=())
def _read_few(
    qk_BTN2H: Tensor, v_BTNU: Tensor, log_decay_BTN: Tensor, rate_BTN: Tensor, state_BNHU: Tensor
) -> tuple[Tensor, Tensor]:
    from lepton.ops.triton import few_writes

    gates = log_decay_BTN.contiguous(), rate_BTN.contiguous()
    return few_writes.read(qk_BTN2H, v_BTNU, *gates, state_BNHU.contiguous())


@_read_few.register_fake
def _(qk_BTN2H: Tensor, v_BTNU: Tensor, *_: Tensor) -> tuple[Tensor, Tensor]:
    return v_BTNU.new_empty(v_BTNU.shape), v_BTNU.new_empty(v_BTNU.shape)


@torch.library.custom_op("lepton::write_few", mutates_args=())
def _write_few(
    qk_BTN2H: Tensor, added_BTNU: Tensor, log_decay_BTN: Tensor, state_BNHU: Tensor, count_B: Tensor
) -> Tensor:
    from lepton.ops.triton import few_writes

    written = added_BTNU.contiguous(), log_decay_BTN.contiguous()
    return few_writes.write(qk_BTN2H, *written, state_BNHU.contiguous(), count_B.contiguous())


@_write_few.register_fake
def _(qk_BTN2H: Tensor, added_BTNU: Tensor, log_decay_BTN: Tensor, state_BNHU: Tensor, count_B: Tensor) -> Tensor:
    return state_BNHU.new_empty(state_BNHU.shape)


@register_flop_formula(torch.ops.lepton.read_few)
def _flops_read(qk: Any, v: Any, *_args: Any, out_shape: Any = None, **_: Any) -> int:
    """Three products of each token with the state: what its key knows, its write, its read."""
    return int(3 * 2 * v[0] * v[1] * v[2] * v[3] * qk[4])


@register_flop_formula(torch.ops.lepton.write_few)
def _flops_write(qk: Any, added: Any, *_args: Any, out_shape: Any = None, **_: Any) -> int:
    """The write of each token."""
    return int(2 * added[0] * added[1] * added[2] * added[3] * qk[4])
