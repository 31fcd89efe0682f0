"""What a forward pass costs, counted from the shapes that are really computed."""

from typing import TYPE_CHECKING

from torch import nn

from lepton.model.block import Block
from lepton.ops.delta_rule import CHUNK
from lepton.ops.query_blocks import computed_pairs

if TYPE_CHECKING:
    from lepton.model.lepton import Lepton


def flops_per_token(
    model: "Lepton", length: int, *, depth: float | None = None, think: float | None = None, groups: int | None = None
) -> float:
    """Floating-point operations of `forward` per token, over a fresh sequence of `length` tokens of one document.

    A multiply-add counts as two; only matrix products are counted. Attention counts every kv entry that is computed,
    masked or not, as torch's FLOP counter does with the math backend (triangular solves count nothing there, and so
    nothing here). `depth` is the share of tokens that go past the stem, `groups` the number of segments that there is
    room for, by default those that open. `lepton.train.flops` counts a training step.
    """
    config = model.config
    depth = 1.0 if depth is None else depth
    think = (config.rounds if model.thoughts is not None else 0) if think is None else think
    pairs = computed_pairs(length, config.window)
    groups = -(-length // config.segment) if groups is None else groups
    crystals = (groups + 1) * config.crystals if model.crystals is not None else 0
    slots = crystals + (groups + 1) * (config.thoughts if model.thoughts is not None else 0)

    total: float = length * (
        weights(model.embed_up) + weights(model.head_down) + config.padded_vocab_size * model.embed.embedding_dim
    )
    total += length * weights(model.stem) + 2 * config.stem_layers * config.heads * config.head_dim * pairs
    total += _thinking(model, length, groups, think) + _memory(model, length)
    for idea in (model.crystals, model.uncertainty):
        total += length * weights(idea)
    if model.peek is not None:
        total += length * (weights(model.peek) - weights(model.peek.summary))
    if model.router is not None:
        adapter = weights(model.router.exit_up) + weights(model.router.exit_down)
        total += length * (weights(model.router.benefit) + (1 - depth) * adapter)
    for block in model.blocks:
        assert isinstance(block, Block)
        always = weights(block.attention.k) + weights(block.attention.v)
        total += (length + (slots if depth > 0 else 0)) * always + depth * length * (weights(block) - always)
        total += depth * 2 * config.heads * config.head_dim * (pairs + slots * length)
    return 2 * total / length


def weights(*modules: nn.Module | None) -> int:
    """Entries of the matrices in some modules: their multiply-adds per token."""
    parts = (part for module in modules if module is not None for part in module.modules())
    return sum(part.weight.numel() for part in parts if isinstance(part, nn.Linear))


def _thinking(model: "Lepton", length: int, groups: int, rounds: float) -> float:
    """Multiply-adds of the thoughts of all segments."""
    if model.thoughts is None:
        return 0
    config, block = model.config, model.thoughts.block
    keys_values = weights(block.attention.k) + weights(block.attention.v)
    slots = groups * config.thoughts
    a_round = slots * weights(block) + 2 * config.heads * config.head_dim * slots * (length + slots)
    return length * keys_values + groups * weights(model.thoughts.opening) + rounds * a_round


def _memory(model: "Lepton", length: int) -> float:
    """Multiply-adds of the working memory: projections, and the products of the chunk form."""
    if model.memory is None:
        return 0
    config = model.config
    chunk = min(CHUNK, length)
    padded = -(-length // chunk) * chunk
    keys, values = config.key_dim, config.value_dim
    inside = 2 * chunk * keys + chunk * values
    across = 3 * keys * values
    return length * weights(model.memory) + padded * config.memory_heads * (inside + across)
