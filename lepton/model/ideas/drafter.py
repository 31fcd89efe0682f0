"""Speculative drafts: a small recurrent cell predicts the next tokens one by one, and the model verifies them.

The cell starts from the last hidden state, detached, and reads the embedding of the token just drafted (EAGLE, 2024;
recurrent drafter, 2024). It proposes only frequent tokens. The model chooses its own token at each place, of the whole
vocabulary; a draft is kept if it is that token. Trunk and embedding get no gradient from its loss.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lepton.config import IdeaConfig, LeptonConfig
from lepton.errors import InputError
from lepton.model.ideas.idea import Flow, Idea, Outcome, Switch, Work, matrices, picks
from lepton.model.layers import Linear, norm
from lepton.model.parameters import MATRIX, ZERO_MATRIX
from lepton.ops.cross_entropy import IGNORE, linear_cross_entropy
from lepton.ops.divergence import divergence_chunk, linear_divergence
from lepton.ops.products import Added, products

FADE = 0.8
"""Weight of a draft's loss, relative to the draft before it."""
WIDTHS = {"nano": 128, "micro": 192, "tiny": 512, "small": 512, "medium": 512, "large": 512, "xl": 512, "xxl": 512}
"""Width of the cell of each size."""


@dataclass(frozen=True, kw_only=True)
class DrafterConfig(IdeaConfig):
    """The cell that drafts tokens for speculative decoding."""

    count: int = 4
    """Tokens drafted before a verification."""
    width: int = 256
    """Width of the cell."""
    vocab: int = 4096
    """Number of tokens that it can propose, the most frequent ones."""
    stride: int = 4
    """The loss uses one position in this many."""
    reads_stem: bool = False
    """Whether the cell also starts from the state after the stem, which says more of the token itself (EAGLE-3, Li et
    al. 2025, reads low and high layers)."""
    distil: bool = False
    """Whether a draft learns the model's own distribution at its place, over the tokens that can be proposed, and not
    the token that followed there: drafts are judged by the model (DistillSpec, Zhou et al. 2024)."""

    name = "drafter"
    most = {"count": 64, "width": 1 << 15, "vocab": 1 << 21, "stride": 1 << 20}
    reads_top = True
    flat = {"drafts": "count", "draft_width": "width", "draft_vocab": "vocab"}
    flat_switch = "drafts"

    def check(self, config: LeptonConfig) -> None:
        self.at_least(1, "count", "width", "stride")
        if not 1 <= self.vocab <= config.vocab_size:
            raise InputError(f"drafter.vocab={self.vocab}: must lie in 1..vocab_size={config.vocab_size}")

    def build(self, config: LeptonConfig) -> "Drafter":
        return Drafter(config, self)

    @classmethod
    def preset(cls, size: str, width: int) -> "DrafterConfig":
        """With what won at TINY (docs/log.md, 2026-11-28); NANO's training would be slowed most by it."""
        width = WIDTHS.get(size, cls.width)
        return cls(width=width) if size == "nano" else cls(width=width, vocab=8192, reads_stem=True)


class Prepared(NamedTuple):
    """The cell for decoding, in which what does not depend on the text is multiplied out.

    A draft reads its row of a table instead of a token's embedding, and its logits are one product. The tables hold
    3 W numbers for each token that can be proposed: 12.6 M from "tiny" on.
    """

    ids_Z: Tensor
    """The tokens that are proposed."""
    enter: Tensor
    """[W, F]."""
    token: Tensor
    """[W, E]."""
    up_cell: Tensor
    """[2 W, W]: the columns of `up` that read the cell."""
    up_token: Tensor
    """[2 W, W]: those that read a token."""
    down: Tensor
    """[W, 2 W]."""
    read: Tensor
    """[Z, 2 W]: what each proposal adds to the outputs of `up`."""
    propose_ZW: Tensor
    """Their embeddings, seen through `leave`."""

    def begin(self, seen_BF: Tensor, embedded_BE: Tensor) -> Tensor:
        """Return the cell's state [B, W], not yet normed, after the newest token, whose embedding is given."""
        (cell_BW,) = products(seen_BF, [self.enter])
        (token_BW,) = products(embedded_BE, [self.token], normed=True)
        (read,) = products(token_BW, [self.up_token], normed=True)
        return self._step(cell_BW, Added(read, torch.arange(len(read), device=read.device)))

    def step(self, cell_BW: Tensor, column_B: Tensor) -> Tensor:
        """Return the cell's state [B, W] after the proposals in some columns of the logits."""
        return self._step(cell_BW, Added(self.read, column_B))

    def _step(self, cell_BW: Tensor, read: Added) -> Tensor:
        (up,) = products(cell_BW, [self.up_cell], normed=True, added=read, squared_relu=True)
        return products(up, [self.down], residual=cell_BW, residual_normed=True)[0]

    def logits(self, cell_BW: Tensor) -> Tensor:
        """Return the logits [B, Z] of the proposals, before the soft cap."""
        return products(cell_BW, [self.propose_ZW], normed=True)[0]


class Drafter(Idea):
    """The cell, its input projections, and its output projection to the width of the embedding."""

    name = "drafter"
    compiled: tuple[str, ...] = ("loss",)
    loss_weights = {"draft": 0.1}
    learns_from_own_text = True
    declares = {
        **{f"{name}.weight": MATRIX.but(auxiliary=True) for name in ("enter", "token", "up", "leave")},
        "down.weight": ZERO_MATRIX.but(auxiliary=True),
    }
    ids: Tensor

    def __init__(self, config: LeptonConfig, own: DrafterConfig) -> None:
        super().__init__()
        width, embedding = own.width, config.embed_rank or config.width
        self.count, self.cap, self.vocab_size = own.count, config.logit_cap, own.vocab
        self.stride, self.distil, self.reads_stem = own.stride, own.distil, own.reads_stem
        if own.distil:
            self.compiled = ("divergence_chunk",)
        self.enter = Linear(config.width * (2 if own.reads_stem else 1), width)
        self.token = Linear(embedding, width)
        self.up = Linear(2 * width, 2 * width)
        self.down = Linear(2 * width, width)
        self.leave = Linear(width, embedding)
        # The tokens that can be proposed, most frequent first; set from the training data.
        self.register_buffer("ids", torch.empty(own.vocab, dtype=torch.int64))

    def reset(self) -> None:
        """Propose the first ids: those of byte-pair tokens are sorted by frequency."""
        self.ids.copy_(torch.arange(self.vocab_size))

    def check_buffers(self, found: Mapping[str, Any], config: LeptonConfig) -> None:
        ids = found.get(f"{self.name}.ids")
        if ids is not None and not ids.is_meta and not 0 <= int(ids.min()) <= int(ids.max()) < config.vocab_size:
            raise InputError(f"'{self.name}.ids' holds ids outside 0..vocab_size-1={config.vocab_size - 1}")

    def learn_frequencies(self, counts_V: Callable[[], Tensor]) -> None:
        """Propose the most frequent tokens, ties by id."""
        self.ids.copy_(counts_V().argsort(descending=True, stable=True)[: self.vocab_size])

    @property
    def seen_width(self) -> int:
        """F, the numbers that the cell starts from."""
        return self.enter.in_features

    def seen(self, hidden_BTD: Tensor, flow: Flow) -> Tensor:
        """Return what the cell starts from [B, T, F]: the last hidden states, perhaps with those after the stem."""
        return torch.cat([hidden_BTD, flow.u_BTD], -1) if self.reads_stem else hidden_BTD

    def begin(self, seen: Tensor) -> Tensor:
        """Return the cell's first state [..., W] for what it starts from, [..., F]."""
        return norm(self.enter(seen.detach()))

    def step(self, cell: Tensor, embedded: Tensor) -> Tensor:
        """Return the cell's state [..., W] after one more token with embedding [..., E]."""
        entered = torch.cat([cell, norm(self.token(norm(embedded.detach())))], -1)
        return norm(cell + self.down(F.relu(self.up(entered)).square()))

    def rows(self, embedding: nn.Embedding) -> Tensor:
        """Return the embeddings [Z, E] of the tokens that can be proposed, without gradient."""
        return embedding.weight.detach()[self.ids]

    @torch.no_grad()
    def prepared(self, embedding: nn.Embedding, dtype: torch.dtype, never: int) -> Prepared:
        """Return the cell for decoding in `dtype`, which never proposes the id `never`.

        In its place another token stands a second time, with the same logit and noise: the first or the last one.
        It is proposed only if there is no other.
        """
        place_Z = torch.arange(self.vocab_size, device=self.ids.device)
        never_Z = self.ids == never
        ids_Z = self.ids[torch.where(never_Z, torch.where(never_Z[-1], place_Z[0], place_Z[-1]), place_Z)]
        enter, token, up, down, leave, rows_ZE = (
            weight.detach().to(dtype, copy=True)
            for weight in (
                *(linear.weight for linear in (self.enter, self.token, self.up, self.down, self.leave)),
                embedding.weight.detach()[ids_Z],
            )
        )
        up_cell, up_token = (half.contiguous() for half in up.chunk(2, 1))
        read = F.linear(norm(F.linear(norm(rows_ZE), token)), up_token)
        return Prepared(ids_Z, enter, token, up_cell, up_token, down, read, rows_ZE @ leave)

    def loss(
        self,
        seen_MF: Tensor,
        read_MY: Tensor,
        target_MY: Tensor,
        embedding: nn.Embedding,
        taught_MYE: Tensor | None = None,
    ) -> Tensor:
        """Return the mean loss of the drafts after M positions, weighted by `FADE`: the cross-entropy of the targets.

        Args:
            seen_MF: what the cell starts from at the positions; see `seen`.
            read_MY: the token that the cell reads before each draft; the first is the next token, which the model
                itself predicts. Negative if absent.
            target_MY: the token that each draft should be; negative if absent.
            embedding: the model's.
            taught_MYE: inputs of the head at the place of each draft. The loss is then the divergence from the model's
                distribution over what can be proposed, wherever there is a target.
        """
        rows_ZE = self.rows(embedding).to(seen_MF.dtype)  # once for all drafts
        place_V = torch.full((embedding.num_embeddings,), IGNORE, device=rows_ZE.device)
        place_V = place_V.scatter(0, self.ids, torch.arange(self.vocab_size, device=rows_ZE.device))
        there_MY = target_MY >= 0
        target_MY = torch.where(there_MY, place_V[target_MY.clamp(min=0)], IGNORE)
        sizes: dict[str, Any] = {"vocab_size": self.vocab_size, "cap": self.cap}
        cell_MW, total, weights = self.begin(seen_MF), torch.zeros((), device=rows_ZE.device), 0.0
        for i in range(self.count):
            embedded_ME = F.embedding(read_MY[:, i].clamp(min=0), embedding.weight.detach()).to(cell_MW.dtype)
            cell_MW = self.step(cell_MW, embedded_ME)
            left_ME = self.leave(cell_MW)
            if taught_MYE is None:
                loss, *_ = linear_cross_entropy(left_ME, rows_ZE, target_MY[:, i], z_weight=0.0, **sizes)
            else:
                given = (left_ME, taught_MYE[:, i], rows_ZE, there_MY[:, i])
                loss, _ = linear_divergence(*given, chunk=self.divergence_chunk, **sizes)
            total, weights = total + FADE**i * loss, weights + FADE**i
        return total / weights

    def divergence_chunk(
        self, raw_OV: Tensor, teacher_OV: Tensor, share_O: Tensor, vocab_size: int, cap: float
    ) -> tuple[Tensor, Tensor]:
        """`lepton.ops.divergence.divergence_chunk`, which the compiler takes as a method."""
        return divergence_chunk(raw_OV, teacher_OV, share_O, vocab_size, cap)

    def losses(self, outcome: Outcome) -> dict[str, Tensor]:
        """The loss at one position in `stride`."""
        return self._losses(outcome, self.distil)

    def own_text_losses(self, outcome: Outcome) -> dict[str, Tensor]:
        """As `losses`; a draft learns the model's own distribution in any case."""
        return self._losses(outcome, True)

    def _losses(self, outcome: Outcome, distil: bool) -> dict[str, Tensor]:
        following_BT, position_BT = outcome.following_BT, outcome.position_BT
        ahead: list[Tensor] = []
        for i in range(self.count + 1):
            # The token i + 1 after each position, if it is in the chunk and the same document.
            token_BT = F.pad(following_BT[:, i:], (0, min(i, following_BT.shape[1])), value=IGNORE)
            if i:
                token_BT = token_BT.masked_fill(ahead[-1] < 0, IGNORE)  # the cell reads that token
                place_BT = F.pad(position_BT[:, i:], (0, min(i, position_BT.shape[1])), value=-1)
                token_BT = token_BT.masked_fill(place_BT != position_BT + i, IGNORE)
            ahead.append(token_BT)
        index_M = picks(following_BT, self.stride)
        tokens, hidden = torch.stack(ahead, -1).flatten(0, 1)[index_M], outcome.hidden_BTD.flatten(0, 1)
        taught_MYE = None
        if distil:  # draft i stands where the model predicts from the state i + 1 tokens later
            later_MY = index_M[:, None] + torch.arange(1, self.count + 1, device=index_M.device)
            taught_MYE = outcome.frozen_down(hidden.detach()[later_MY.clamp(max=len(hidden) - 1)])
        seen = self.seen(outcome.hidden_BTD, outcome.flow).flatten(0, 1)
        given = (seen[index_M], tokens[:, :-1], tokens[:, 1:], outcome.model.embed)
        return {"draft": self.loss(*given, taught_MYE)}

    def extra_training_flops(self, work: Work, head: int) -> float:
        step = 2 * matrices(self.token) + 3 * matrices(self.up, self.down, self.leave)
        step += (3 if self.distil else 2) * self.vocab_size * self.leave.out_features
        return 2 * (2 * matrices(self.enter) + self.count * step) / self.stride

    def kept_bytes(self, work: Work) -> float:
        """The steps of the cell at sampled positions."""
        return work.itemsize * work.length * (self.leave.out_features + 9 * self.leave.in_features)

    def switches(self) -> dict[str, Switch]:
        """No switches: the predictions do not depend on it."""
        return {}
