"""What passes and training steps cost, counted from the shapes that are really computed."""

from torch import nn

from lepton.model.block import Block
from lepton.model.ideas.idea import Work, matrices
from lepton.model.modules import Modules
from lepton.ops.query_blocks import computed_pairs


def flops_per_token(
    model: Modules, length: int, *, depth: float | None = None, think: float | None = None, groups: int | None = None
) -> float:
    """Return the floating-point operations of `forward` per token, over a fresh sequence of one document.

    A multiply-add counts as two; only matrix products are counted. Attention counts every score that is computed,
    masked or not, as torch's FLOP counter does with the math backend (triangular solves count nothing there, and so
    nothing here). `lepton.train.cost` counts a training step.

    Args:
        model: only its shapes are read.
        length: tokens of the sequence.
        depth: share of the tokens that go past the stem.
        think: rounds of thinking.
        groups: segments that there is room for, by default those that open.
    """
    config = model.config
    groups = -(-length // config.segment) if groups is None else groups
    work = Work(length, groups, 1.0 if depth is None else depth, think)
    slots = sum(idea.slots_of(groups) for idea in model.ideas.values())
    head = matrices(model.head_down) + config.padded_vocab_size * model.embed.embedding_dim
    total: float = length * (matrices(model.embed_up) + head)
    pairs, wide_pairs = (computed_pairs(length, window) for window in (config.window, config.wide_window))
    total += sum(_block(block, length, pairs, 0, 1.0) for block in model.stem)
    total += sum(
        _block(block, length, wide_pairs if wide else pairs, slots, work.depth)
        for block, wide in zip(model.blocks, config.wide_layers, strict=True)
    )
    total += sum(idea.flops(work) for idea in model.ideas.values())
    return 2 * total / length


def _block(block: nn.Module, length: int, pairs: int, slots: int, depth: float) -> float:
    """Multiply-adds of a block: keys and values of all tokens, and of the slots if any token looks at them."""
    assert isinstance(block, Block)
    attention = block.attention
    keys_values = matrices(attention.k, attention.v)
    total: float = (length + (slots if depth > 0 else 0)) * keys_values
    total += depth * length * (matrices(block) - keys_values)
    return total + depth * 2 * attention.heads * attention.head_dim * (pairs + slots * length)
