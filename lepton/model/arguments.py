"""The arguments of a forward pass, checked and completed."""

from dataclasses import replace

import torch
from torch import Tensor

from lepton.errors import InputError, shown
from lepton.model.checks import INTEGERS, check_device, check_flags, check_range, integers
from lepton.model.fresh_state import check_state, fresh_state
from lepton.model.ideas.idea import Call
from lepton.model.modules import Modules
from lepton.model.state import State
from lepton.values import Least, depth_rule, thinking_rounds, whole


def checked_tokens(model: Modules, tokens: Tensor, least: int) -> Tensor:
    """Return token ids [rows, at least `least`] as int64, on the model's device and within its vocabulary."""
    if not isinstance(tokens, Tensor):
        raise InputError(f"tokens of type {type(tokens).__name__}: give a tensor [rows, tokens], torch.tensor([ids])")
    if tokens.dim() != 2 or not tokens.shape[0] or tokens.shape[1] < least or tokens.dtype not in INTEGERS:
        raise InputError(
            f"tokens must be integers [rows, at least {least}], not {tokens.dtype} {list(tokens.shape)}"
            + ("; give tokens[None] for one row" if tokens.dim() == 1 else "")
        )
    check_device(tokens, model.device, "tokens")
    tokens = tokens.long()
    check_range(tokens, 0, model.config.vocab_size - 1, "token id")
    return tokens


def checked_lengths(tokens: Tensor, lengths: Tensor) -> Tensor:
    """Return the valid tokens of each row as int64 [rows], each at most the length of the row."""
    rows, length = tokens.shape
    lengths = integers(lengths, (rows,), tokens.device, "lengths", f"one value for each of {rows} rows")
    check_range(lengths, 0, length, "length")
    return lengths


def checked_for_loss(
    model: Modules,
    tokens: Tensor,
    lengths: Tensor | None,
    targets: Tensor | None,
    groups: int | None,
    auxiliary: bool,
) -> tuple[Tensor, Tensor | None, int | None]:
    """Return the arguments of `loss` that are its own, validated."""
    tokens = checked_tokens(model, tokens, 2)
    if targets is not None:
        check_flags(targets, (tokens.shape[0], tokens.shape[1] - 1), tokens.device, "targets", "a flag a prediction")
    if groups is not None:  # a static bound may be rounded up
        groups = whole("groups", groups, 0, tokens.shape[1] + 64, " segments of a row")
    if not isinstance(auxiliary, bool):
        raise InputError(f"auxiliary={shown(auxiliary)}: must be True or False")
    return tokens, None if lengths is None else checked_lengths(tokens, lengths), groups


def checked_call(model: Modules, rows: int, depth: float | Least | None, think: int | Tensor | None) -> Call:
    """Return what a caller asks of a pass, checked against what the model has."""
    rule = depth_rule(depth)
    call = Call(least=float(rule.nats)) if isinstance(rule, Least) else Call(rule)
    if call.routed and "router" not in model.ideas:
        raise InputError(f"depth={depth}: this model has no router and always runs all blocks; leave depth at 1")
    if think is None:
        return call
    if isinstance(think, Tensor):
        device = model.device
        think = integers(think, (rows,), device, "think", f"one number of rounds for each of {rows} rows")
        for idea in model.ideas.values():
            idea.check_rounds(think)
        return replace(call, think=think)
    think = thinking_rounds(think)
    if think and "thoughts" not in model.ideas:
        raise InputError(f"think={think}: this model has no thought tokens; leave think at 0")
    if think > (limit := min((idea.think_limit for idea in model.ideas.values()), default=think)):
        raise InputError(f"think={think}: this model keeps the states of {limit} rounds; give at most {limit}")
    return replace(call, think=think)


def checked(
    model: Modules,
    tokens: Tensor,
    state: State | None,
    lengths: Tensor | None,
    depth: float | Least | None,
    think: int | Tensor | None,
    opens: Tensor | None,
    served: Tensor | None = None,
) -> tuple[Tensor, State, Tensor, Call]:
    """Validate the arguments of `forward` and fill in what was left out."""
    tokens = checked_tokens(model, tokens, 1)
    rows, length = tokens.shape
    call = checked_call(model, rows, depth, think)
    if state is None:
        state = fresh_state(model, rows, allocate=False)
    else:
        check_state(model, state, rows)
    whole_rows = torch.full((rows,), length, device=tokens.device)
    lengths = whole_rows if lengths is None else checked_lengths(tokens, lengths)
    if opens is not None:
        check_flags(opens, tokens.shape, tokens.device, "opens", "the shape of the tokens")
    if served is not None:
        check_flags(served, tokens.shape, tokens.device, "served", "the shape of the tokens")
        call = replace(call, served_BT=served)
    return tokens, state, lengths, call
