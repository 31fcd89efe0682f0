"""One cycle of decoding as a function of tensors: draft, verify, choose, accept, and write the state back.

Nothing in it waits for the device, and all shapes follow from `Shape`, so a GPU captures it once for each.
"""

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from lepton.engine.lookup import appended, looked_up
from lepton.engine.pool import Held, Pool, Rows
from lepton.model import Network
from lepton.model.ideas.idea import SIGNALS, Call
from lepton.model.output import commit
from lepton.model.timeline import Rounds
from lepton.ops.choose import Noise, Sampling, choose

if TYPE_CHECKING:
    from lepton.model.ideas.drafter import Prepared


COOLER = 0.8
"""Temperature of drafts, relative to that of their text."""
NUCLEUS = 0.85
"""Drafts are sampled from all that can be proposed if `top_p` is at least this: to search a nucleus takes time."""


@dataclass(frozen=True)
class Shape:
    """What is constant in a cycle."""

    rows: int
    drafts: int
    opening: bool
    """Whether a segment may open at the first token of a row."""
    rounds: int
    """Bound of the rounds of thinking."""
    routed: bool = False
    """Whether tokens may skip the deep blocks: each row has a depth of its own."""
    static: bool = False
    """Whether no shape may depend on values, so that the cycle can be captured."""
    uncertainty: bool = False
    logprobs: int = 0
    """Alternatives whose log-probabilities are wanted; see `GenerationOptions.logprobs`."""
    scored: bool = False
    """Whether log-probabilities are wanted."""
    whole: bool = False
    """Whether the rows are all places of the pool."""


class Outcome(NamedTuple):
    """What the host reads of a cycle of B rows with T = 1 + drafts tokens each."""

    counts: Tensor
    """int64 [B, T + 4]: the chosen tokens; how many drafts were accepted; how many were allowed; blocks that the tokens
    went through; whether all logits are finite."""
    doubts_BT: Tensor | None
    """Uncertainty of each token."""
    scores: Tensor | None
    """Log-probabilities [B, T, 1 + alternatives]: of the chosen token, then of the most probable ones."""
    alternatives: Tensor | None
    """Ids of the most probable tokens, int64 [B, T, alternatives]."""
    depths_BT: Tensor | None = None
    """Blocks that were passed where each token was chosen, if log-probabilities are wanted."""


def cycle(model: Network, pool: Pool, place_B: Tensor, shape: Shape, prepared: "Prepared | None") -> Outcome:
    """Run a cycle of the sequences in some places of the pool; `prepared` is the drafter, needed if it drafts."""
    held = pool.take(place_B, read_slots=not shape.opening, whole=shape.whole)
    tokens_BT = drafted(model, held.rows, shape.drafts, prepared)
    depth = held.rows.depth_B if shape.routed else 1.0
    least = held.rows.least_B if shape.routed else None
    call = Call(depth, Rounds(held.rows.rounds_B, shape.rounds), static=shape.static, least=least)
    out = model.decode(tokens_BT, held.state, call, opening=shape.opening)
    allowed_B = allowed_drafts(model, held.state.phase_B, shape.drafts)
    signals = out.flow.signals(*SIGNALS) if shape.uncertainty else None
    chosen_BT, finite_B, *wanted = choices(model, held.rows, out.hidden, signals, shape)
    index_Y = torch.arange(shape.drafts, device=place_B.device)
    agrees_BY = (chosen_BT[:, :-1] == tokens_BT[:, 1:]) & (index_Y < allowed_B[:, None])
    accepted_B = agrees_BY.long().cumprod(1).sum(1) if shape.drafts else torch.zeros_like(place_B)

    state = commit(out.chunk, 1 + accepted_B)
    if shape.opening and pool.keeps_slots:
        pool.keep_slots(model, place_B, state)
    last_B1 = accepted_B[:, None]
    seen_BTF = model.seen_by_drafter(out)
    rows = replace(
        held.rows,
        token_B=chosen_BT.gather(1, last_B1)[:, 0],
        seen_BF=seen_BTF.gather(1, last_B1[..., None].expand(-1, -1, seen_BTF.shape[2]))[:, 0],
        text_BL=appended(held.rows.text_BL, chosen_BT, 1 + accepted_B),
        index_B=held.rows.index_B + 1 + accepted_B,
    )
    pool.put(place_B, held, Held(state, rows))
    blocks_B = out.depth.sum(1)
    counts = torch.cat([chosen_BT, torch.stack([accepted_B, allowed_B, blocks_B, finite_B.long()], 1)], 1)
    return Outcome(counts, *wanted)._replace(depths_BT=out.depth if shape.scored else None)


def allowed_drafts(model: Network, phase_B: Tensor, drafts: int) -> Tensor:
    """Return how many drafts of each row may be accepted: a chunk begins at an opening or contains none."""
    allowed_B = torch.full_like(phase_B, drafts)
    if not any(idea.opens for idea in model.ideas.values()):
        return allowed_B
    return torch.minimum(allowed_B, model.config.segment - 1 - phase_B)


def drafted(model: Network, rows: Rows, drafts: int, prepared: "Prepared | None") -> Tensor:
    """Return the newest token of each row and drafts of those after it, [B, T]: by lookup, or from the cell.

    The id that ends a document is never drafted: no later token of a chunk may begin another one.
    """
    if not drafts:
        return rows.token_B[:, None]
    assert prepared is not None
    embedded_BE = F.embedding(rows.token_B, model.embed.weight).to(rows.seen_BF.dtype)
    cell_BW = prepared.begin(rows.seen_BF, embedded_BE)
    columns: list[Tensor] = []
    sampling = sampling_of_drafts(rows.sampling)
    for i in range(drafts):
        if columns:
            cell_BW = prepared.step(cell_BW, columns[-1])
        noise = Noise(rows.stream_B2, rows.index_B + i)
        columns.append(choose(prepared.logits(cell_BW), noise, sampling, prepared.ids_Z, model.config.logit_cap))
    drafts_BY = looked_up(rows.text_BL, prepared.ids_Z[torch.stack(columns, 1)], model.config.eos_id)
    return torch.cat([rows.token_B[:, None], drafts_BY], 1)


def sampling_of_drafts(sampling: Sampling) -> Sampling:
    """Return how drafts are sampled. As many are right as with the sampling of the text, and it takes less time.

    A cooler distribution has less in its tail, as has a nucleus.
    """
    temperature_B, top_p_B, top_k_B = sampling
    return Sampling(COOLER * temperature_B, torch.where(top_p_B < NUCLEUS, top_p_B, 1.0), top_k_B)


def choices(
    model: Network, rows: Rows, hidden_BTD: Tensor, signals: Tensor | None, shape: Shape
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """Return what the model chooses after each token [B, T], whether its logits are finite [B], and what else `shape`
    wants: see `Outcome`. `signals` are those of the uncertainty.
    """
    batch, length = hidden_BTD.shape[:2]
    logits_BTV = model.head(hidden_BTD)
    index_BT = rows.index_B[:, None] + torch.arange(length, device=hidden_BTD.device)
    noise = Noise(rows.stream_B2.repeat_interleave(length, 0), index_BT.flatten())
    sampling = Sampling(*(each.repeat_interleave(length) for each in rows.sampling))
    chosen_BT = choose(logits_BTV.flatten(0, 1), noise, sampling).view(batch, length)
    finite_B = logits_BTV.amax(-1).isfinite().all(1)
    doubts_BT = model.idea("uncertainty")(hidden_BTD, logits_BTV, signals) if shape.uncertainty else None
    if not shape.scored:
        return chosen_BT, finite_B, doubts_BT, None, None
    log_p_BTV = logits_BTV.log_softmax(-1)
    best = log_p_BTV.topk(shape.logprobs, -1)
    scores = torch.cat([log_p_BTV.gather(2, chosen_BT[..., None]), best.values], 2)
    return chosen_BT, finite_B, doubts_BT, scores, best.indices
