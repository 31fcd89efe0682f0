"""The gated delta rule of working memory (Yang et al., 2024), for chunks of tokens at once.

    S_t = a_t (I - b_t k_t k_t') S_(t-1) + b_t k_t v_t'        o_t = S_t' q_t

`naive_delta_rule` is the slow reference, `chunked_delta_rule` the fast form in PyTorch. Two parts are sequential: the
triangular solve within a chunk, row after row, and the recurrence of the state over chunks. In fp32 on a GPU each of
them is an operator with a Triton kernel and a gradient. The rest are batched matrix products, the same in both forms.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from lepton.ops.kernels import Kernel

CHUNK = 64
"""Tokens per chunk. A shorter sequence is one chunk, which the Triton kernels do not take."""


class Writes(NamedTuple):
    """Inputs of the delta rule: what each token reads and writes, in chunks."""

    q: Tensor
    """Queries [B, P, N, O, H]."""
    k: Tensor
    """Keys [B, P, N, O, H], of norm 1."""
    v: Tensor
    """Values [B, P, N, O, U]."""
    log_decay: Tensor
    """log a, [B, P, N, O]."""
    rate: Tensor
    """b, [B, P, N, O]: the step size of the write, 0..1."""
    document_BPO: Tensor
    """Ordinal of the token's document. Each document starts with an empty memory."""


class Memories(NamedTuple):
    """What the memory was and gave in P chunks."""

    reads: Tensor
    """The reads o [B, P, N, O, U]."""
    entry_BPNHU: Tensor
    """The state before each chunk."""
    end_BNHU: Tensor
    """The state after the last one."""
    written: Tensor
    """What each token added to the values of its key, [B, P, N, O, U]."""


def delta_rule(writes: Writes, state_BNHU: Tensor, entry_document_BP: Tensor) -> Memories:
    """Run the memory over P chunks.

    Args:
        writes: the tokens' inputs.
        state_BNHU: the memory before the first chunk, fp32 or better.
        entry_document_BP: the document of the token before each chunk, whose memory the chunk starts with.
    """
    if writes.k.shape[-2] == CHUNK and DELTA_RULE.works(state_BNHU.device, state_BNHU.dtype, *state_BNHU.shape[2:]):
        return delta_rule_in_kernels(writes, state_BNHU, entry_document_BP)
    return chunked_delta_rule(writes, state_BNHU, entry_document_BP)


def read_again(writes: Writes, memories: Memories, entry_document_BP: Tensor) -> Tensor:
    """Return what other queries, `writes.q`, read from memories [B, P, N, O, U]: each token's own, after its write."""
    _, ratio, g = _decays(writes, entry_document_BP)
    inside = (writes.q @ writes.k.mT) * ratio
    return (g[..., None] * writes.q) @ memories.entry_BPNHU + inside @ memories.written


def naive_delta_rule(writes: Writes, state_BNHU: Tensor, entry_document_BP: Tensor) -> Memories:
    """As `delta_rule`, token by token; a slow reference."""
    chunks, size = writes.k.shape[1], writes.k.shape[3]
    reads, entries, written, document_B = [], [], [], entry_document_BP[:, 0]
    for p in range(chunks):
        entries.append(state_BNHU)
        for c in range(size):
            q, k, v, log_decay, rate = (part[:, p, :, c] for part in writes[:5])
            fresh_B = writes.document_BPO[:, p, c] != document_B
            document_B = writes.document_BPO[:, p, c]
            state_BNHU = torch.where(fresh_B[:, None, None, None], 0, state_BNHU)
            state_BNHU = log_decay.exp()[..., None, None] * state_BNHU
            known = torch.einsum("bhkv,bhk->bhv", state_BNHU, k)
            written.append(rate[..., None] * (v - known))
            state_BNHU = state_BNHU + torch.einsum("bhk,bhv->bhkv", k, written[-1])
            reads.append(torch.einsum("bhkv,bhk->bhv", state_BNHU, q))
    reads_BPNOU, written_BPNOU = (
        torch.stack(each, 2).unflatten(2, (chunks, size)).transpose(1, 2) for each in (reads, written)
    )
    return Memories(reads_BPNOU, torch.stack(entries, 1), state_BNHU, written_BPNOU)


def chunked_delta_rule(writes: Writes, state_BNHU: Tensor, entry_document_BP: Tensor) -> Memories:
    """As `delta_rule`, in PyTorch.

    The part of a chunk that does not depend on the state is a triangular system, solved for all chunks at once by
    substitution. Inverting the matrix by repeated squaring overflows fp32 on repeated tokens.
    """
    mix, given, inside, g, into = _prepare(writes, entry_document_BP)
    one = torch.eye(mix.shape[-1], dtype=mix.dtype, device=mix.device)
    solved = torch.linalg.solve_triangular(mix + one, given, upper=False, unitriangular=True)
    u, w = solved.split([writes.v.shape[-1], writes.k.shape[-1]], -1)
    reads, written, states = [], [], [state_BNHU]
    for p in range(mix.shape[1]):
        state = states[-1]
        written.append(u[:, p] - w[:, p] @ state)
        reads.append(g[:, p, :, :, None] * (writes.q[:, p] @ state) + inside[:, p] @ written[p])
        states.append(g[:, p, :, -1, None, None] * state + into[:, p].mT @ written[p])
    return Memories(torch.stack(reads, 1), torch.stack(states[:-1], 1), states[-1], torch.stack(written, 1))


def delta_rule_in_kernels(writes: Writes, state_BNHU: Tensor, entry_document_BP: Tensor) -> Memories:
    """As `delta_rule`, with the kernels: fp32, chunks of `CHUNK`."""
    q, k, v = (part.contiguous() for part in writes[:3])  # as batched matrix products need them
    mix, given, inside, g, into = _prepare(writes._replace(q=q, k=k, v=v), entry_document_BP)
    solved, _ = _solve(mix, given)
    written, entry, end = _carry(solved, into, g[..., -1], state_BNHU)
    before = (g[..., None] * q) @ entry
    reads = torch.baddbmm(*(part.flatten(0, 2) for part in (before, inside, written)))
    return Memories(reads.view_as(v), entry, end, written)


def _trial(device: torch.device, dtype: torch.dtype, keys: int, values: int) -> None:
    # As many rows as take the kernels' largest blocks.
    k = torch.zeros(256, 1, 1, CHUNK, keys, dtype=dtype, device=device, requires_grad=True)
    v = k.new_zeros(256, 1, 1, CHUNK, values)
    gate, document = k.new_zeros(256, 1, 1, CHUNK), torch.zeros(256, 1, CHUNK, dtype=torch.long, device=device)
    state = k.new_zeros(256, 1, keys, values)
    reads, *_ = delta_rule_in_kernels(Writes(k, k, v, gate, gate, document), state, document[:, :, 0])
    torch.autograd.grad(reads.sum(), k)


DELTA_RULE = Kernel("the memory", (torch.float32,), _trial)
"""`DELTA_RULE.works(device, dtype, key_dim, value_dim)`."""


class _Chunks(NamedTuple):
    """The part of the computation that does not depend on the state."""

    mix_BPNOO: Tensor
    """Effect of earlier writes of the chunk on a token's write; 0 on and above the diagonal."""
    given: Tensor
    """Right-hand sides [B, P, N, O, U + H] (scaled values, then keys) of the system with the matrix identity + mix."""
    inside_BPNOO: Tensor
    """Weights with which a token reads the writes of its chunk."""
    g_BPNO: Tensor
    """Decay of the state before the chunk when a token reads; 0 in another document."""
    into_BPNOH: Tensor
    """Decayed keys with which writes enter the state after the chunk."""


def _decays(writes: Writes, entry_document_BP: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return log g, the decays between the tokens of a chunk [B, P, N, O, O], and g; 0 across documents."""
    document_BPO, size = writes.document_BPO, writes.k.shape[-2]
    low = torch.ones(size, size, dtype=torch.bool, device=document_BPO.device).tril()
    same_BPOO = (document_BPO[:, :, :, None] == document_BPO[:, :, None, :]) & low
    log_g = writes.log_decay.cumsum(-1)
    ratio = (log_g[..., :, None] - log_g[..., None, :]).masked_fill(~same_BPOO[:, :, None], float("-inf")).exp()
    enters_BPO = document_BPO == entry_document_BP[:, :, None]
    return log_g, ratio, log_g.exp() * enters_BPO[:, :, None]


def _prepare(writes: Writes, entry_document_BP: Tensor) -> _Chunks:
    q, k, v, _, rate, document_BPO = writes
    log_g, ratio, g = _decays(writes, entry_document_BP)
    mix = (rate[..., None] * (k @ k.mT) * ratio).tril(-1)
    given = torch.cat([rate[..., None] * v, (rate * g)[..., None] * k], -1)
    inside = (q @ k.mT) * ratio
    stays_BPO = document_BPO == document_BPO[:, :, -1:]
    to_end = (log_g[..., -1:] - log_g).exp() * stays_BPO[:, :, None]
    return _Chunks(mix, given, inside, g, k * to_end[..., None])


@torch.library.custom_op("lepton::solve_unit_lower", mutates_args=())
def _solve(mix_BPNOO: Tensor, given: Tensor) -> tuple[Tensor, Tensor]:
    """Solve the system with the matrix identity + mix; return the solution and the inverse.

    Like PyTorch's triangular solve, it counts no FLOPs.
    """
    from lepton.ops.triton import delta_rule

    inverse_BPNOO = delta_rule.invert(mix_BPNOO.contiguous())
    return inverse_BPNOO @ given, inverse_BPNOO


@_solve.register_fake
def _(mix_BPNOO: Tensor, given: Tensor) -> tuple[Tensor, Tensor]:
    return given.new_empty(given.shape), mix_BPNOO.new_empty(mix_BPNOO.shape)


@torch.library.custom_op("lepton::solve_unit_lower_transposed", mutates_args=())
def _solve_transposed(inverse_BPNOO: Tensor, grad: Tensor) -> Tensor:
    return inverse_BPNOO.mT @ grad


@_solve_transposed.register_fake
def _(inverse_BPNOO: Tensor, grad: Tensor) -> Tensor:
    return grad.new_empty(grad.shape)


def _keep_solved(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*output)
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _differentiate_solved(ctx: Any, grad: Tensor, _inverse: None) -> tuple[Tensor, Tensor]:
    solved, inverse_BPNOO = ctx.saved_tensors
    given_grad = _solve_transposed(inverse_BPNOO, grad)
    return -(given_grad @ solved.mT).tril(-1), given_grad


_solve.register_autograd(_differentiate_solved, setup_context=_keep_solved)


@torch.library.custom_op("lepton::carry_state", mutates_args=())
def _carry(solved: Tensor, into_BPNOH: Tensor, decay_BPN: Tensor, state_BNHU: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The recurrence over chunks: written = u - w state, next state = decay state + into' written.

    `solved` is [B, P, N, O, U + H], u and then w. Returns what each chunk writes, the state before each, and the state
    after the last.
    """
    from lepton.ops.triton import delta_rule

    return delta_rule.forward(
        solved.contiguous(), into_BPNOH.contiguous(), decay_BPN.contiguous(), state_BNHU.contiguous()
    )


@_carry.register_fake
def _(solved: Tensor, into: Tensor, decay: Tensor, state_BNHU: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    keys, values = state_BNHU.shape[2:]
    written_BPNOU = solved.new_empty(*solved.shape[:4], values)
    entry_BPNHU = solved.new_empty(*solved.shape[:3], keys, values)
    return written_BPNOU, entry_BPNHU, state_BNHU.new_empty(state_BNHU.shape)


@torch.library.custom_op("lepton::carry_state_backward", mutates_args=())
def _carry_backward(
    written_grad_BPNOU: Tensor,
    entry_grad_BPNHU: Tensor,
    end_grad_BNHU: Tensor,
    solved: Tensor,
    into_BPNOH: Tensor,
    decay_BPN: Tensor,
    written_BPNOU: Tensor,
    entry_BPNHU: Tensor,
    ends: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of the inputs of `_carry`.

    `ends` is only for FLOP counts: (first state needs a gradient) + (last state has one), 0..2.
    """
    from lepton.ops.triton import delta_rule

    return delta_rule.backward(
        written_grad_BPNOU.contiguous(),
        entry_grad_BPNHU.contiguous(),
        end_grad_BNHU.contiguous(),
        solved.contiguous(),
        into_BPNOH.contiguous(),
        decay_BPN.contiguous(),
        written_BPNOU,
        entry_BPNHU,
    )


@_carry_backward.register_fake
def _(
    written_grad: Tensor,
    entry_grad: Tensor,
    end_grad_BNHU: Tensor,
    solved: Tensor,
    into_BPNOH: Tensor,
    decay_BPN: Tensor,
    *_: Any,
) -> tuple[Tensor, ...]:
    given = (solved, into_BPNOH, decay_BPN, end_grad_BNHU)
    return tuple(part.new_empty(part.shape) for part in given)


def _keep_carried(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    written_BPNOU, entry_BPNHU, _ = output
    ctx.save_for_backward(*inputs[:3], written_BPNOU, entry_BPNHU)
    ctx.to_state, ctx.state_shape = ctx.needs_input_grad[3], inputs[3].shape
    ctx.set_materialize_grads(False)


def _differentiate_carried(
    ctx: Any, written_grad: Tensor | None, entry_grad: Tensor | None, end_grad: Tensor | None
) -> tuple[Tensor | None, ...]:
    written_BPNOU, entry_BPNHU = ctx.saved_tensors[-2:]
    *gradients, state_grad_BNHU = _carry_backward(
        torch.zeros_like(written_BPNOU) if written_grad is None else written_grad,
        torch.zeros_like(entry_BPNHU) if entry_grad is None else entry_grad,
        entry_BPNHU.new_zeros(ctx.state_shape) if end_grad is None else end_grad,
        *ctx.saved_tensors,
        ctx.to_state + (end_grad is not None),
    )
    return *gradients, state_grad_BNHU if ctx.to_state else None


_carry.register_autograd(_differentiate_carried, setup_context=_keep_carried)


@register_flop_formula(torch.ops.lepton.carry_state)
def _flops(solved: Any, into: Any, decay: Any, state: Any, *_args: Any, out_shape: Any = None, **_: Any) -> int:
    """Two matrix products per chunk."""
    return int(2 * 2 * solved[0] * solved[1] * solved[2] * solved[3] * state[2] * state[3])


@register_flop_formula(torch.ops.lepton.carry_state_backward)
def _flops_backward(written: Any, entry: Any, end: Any, *args: Any, out_shape: Any = None, **_: Any) -> int:
    """Four products per chunk, as in `chunked_delta_rule`: two fewer for a first or last state without a gradient."""
    products = 4 * written[1] - 2 * (2 - args[-1])
    return int(2 * products * written[0] * written[2] * written[3] * end[2] * end[3])
