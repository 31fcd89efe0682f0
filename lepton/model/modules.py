"""What a model is made of: embedding, stem, ideas, deep blocks and head, and how it is put together."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lepton.config import IDEAS, LeptonConfig
from lepton.model.block import Block
from lepton.model.ideas.idea import Host, Idea
from lepton.model.layers import Linear
from lepton.model.parameters import BACKOUT, EMBEDDING, EMBEDDING_MATRIX, SHIFT, initialise
from lepton.ops.cross_entropy import soft_cap

COMMON_LOSSES = ("ce", "z")
"""Losses that are no idea's: cross-entropy, and the square of the log-normaliser."""


class Modules(Host):
    """The modules of a model, without a forward pass.

    `compute_dtype` is the dtype that activations run in; None means the parameters' own. Training in bf16 keeps
    fp32 parameters and sets it to ``torch.bfloat16``; softmax, losses, memory and logits are fp32 whatever it is.
    `checkpoint_activations` stores only each block's inputs and recomputes the block in the backward pass.
    Each idea of `config.ideas` is an attribute of its name; registered ideas that are absent are None.
    """

    declares = {
        "embed.weight": EMBEDDING,
        "embed_up.weight": EMBEDDING_MATRIX,
        "head_down.weight": EMBEDDING_MATRIX,
        "shift_D": SHIFT,
        "backout": BACKOUT,
    }

    def __init__(self, config: LeptonConfig) -> None:
        super().__init__()
        self.config = config
        self.compute_dtype: torch.dtype | None = None
        self.checkpoint_activations = False
        self.left_out: str | None = None
        for name in IDEAS:
            setattr(self, name, None)
        rank = config.embed_rank or config.width
        self.embed = nn.Embedding(config.padded_vocab_size, rank)
        self.embed_up = Linear(rank, config.width) if config.embed_rank else nn.Identity()
        self.shift_D = nn.Parameter(torch.empty(config.width)) if config.token_shift else None
        self.stem = nn.ModuleList(self._blocks(0, config.stem_layers))
        self._build(reads_top=False)
        self.blocks = nn.ModuleList(self._blocks(config.stem_layers, config.layers))
        self.backout = nn.Parameter(torch.empty(1)) if config.backout else None
        self.head_down = Linear(config.width, rank) if config.embed_rank else nn.Identity()
        self._build(reads_top=True)
        losses = [*COMMON_LOSSES, *(name for idea in self.ideas.values() for name in idea.loss_weights)]
        assert len(losses) == len({*losses}), f"two losses have one name: {losses}"
        initialise(self)

    def _blocks(self, first: int, end: int) -> Iterator[Block]:
        return (Block(self.config, shifted=self.config.shifts_keys(layer)) for layer in range(first, end))

    def _build(self, *, reads_top: bool) -> None:
        for idea in self.config.ideas:
            if idea.reads_top is reads_top:
                assert getattr(self, idea.name, None) is None, f"the name of the idea '{idea.name}' is taken"
                setattr(self, idea.name, idea.build(self.config))

    @property
    def ideas(self) -> dict[str, Idea]:
        """The ideas by name, in the order of the flow."""
        names = [idea.name for idea in self.config.ideas if idea.name != self.left_out]
        return {name: self._modules[name] for name in names}  # type: ignore[misc]

    def idea(self, name: str) -> Any:
        """Return the idea called `name`; None: the model is without it."""
        return self.ideas.get(name)

    @contextmanager
    def without(self, name: str) -> Iterator[dict[str, Any]]:
        """Leave an idea out inside the block, as in a model that is built without it. No state may cross its border."""
        before, self.left_out = self.left_out, name
        try:
            yield {}
        finally:
            self.left_out = before

    def head(self, hidden: Tensor) -> Tensor:
        """Return the logits [..., vocab_size] of states that `trunk` returned, in fp32 or better."""
        x = self.head_down(hidden)
        # The padded product is the fast one: a row of it is a whole number of 16 bytes.
        logits = (x @ self.embed.weight.to(x.dtype).T)[..., : self.config.vocab_size]
        return soft_cap(logits.to(torch.promote_types(x.dtype, torch.float32)), self.config.logit_cap)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of activations and of the state."""
        return self.compute_dtype or self.embed.weight.dtype

    @property
    def device(self) -> torch.device:
        """The device of parameters and state."""
        return self.embed.weight.device

    def num_params(self) -> int:
        """Trainable parameters; the tied embedding counts once."""
        return sum(parameter.numel() for parameter in self.parameters() if parameter.requires_grad)
