"""GPU memory of training: predicted from shapes before the first step, and what to change where it is too little."""

import dataclasses
from collections.abc import Callable, Iterator

from torch import nn

from lepton.model import Network
from lepton.model.ideas.idea import Work
from lepton.model.layers import Linear
from lepton.ops.cross_entropy import ENTRIES_GPU
from lepton.ops.query_blocks import query_blocks
from lepton.train.batch_plan import usual_groups
from lepton.train.optimizer import split_parameters
from lepton.train.settings import TrainSettings
from lepton.train.split import USABLE, smaller_splits

FP32 = 4
SHARDS = (2, 4, 8)
"""GPUs of a host that the advice considers."""


def predicted_bytes(
    model: Network,
    batch_size: int,
    seq_len: int,
    checkpoint_activations: bool,
    optimizer: str = "muon",
    shards: int = 1,
) -> int:
    """Return about how many bytes tensors hold on a GPU at the peak of a training step, with compiled parts.

    Only shapes are read, so a model on the meta device will do. Memory is fullest when the head's loss is computed,
    or, if blocks are recomputed, in the backward pass of one of them. In half precision the kernels of
    `lepton.ops.triton` are taken to run. Without the compiler a block keeps about an eighth more.

    Args:
        model: with `compute_dtype` as in training.
        batch_size: rows of a micro-batch.
        seq_len: targets of a row.
        checkpoint_activations: whether only each block's inputs are stored; see `Modules`.
        optimizer: 'muon' or 'adamw'.
        shards: GPUs that share weights, gradients and optimizer state; the result is of each.
    """
    config, size = model.config, model.dtype.itemsize
    ends = config.layers * size * seq_len * config.width  # the input of each block is always kept
    work = _work(model, batch_size, seq_len)
    deep = _block(model, seq_len, _slots(model, work))
    inside = config.stem_layers * _block(model, seq_len, 0) + (config.layers - config.stem_layers) * deep
    gradients = size * seq_len * (2 * config.ffn + 4 * config.width)
    if checkpoint_activations:
        inside = 0
        gradients += deep
    row = ends + inside + _between(model, work) + int(sum(idea.kept_bytes(work) for idea in model.ideas.values()))
    busiest = max(_loss(model, batch_size * seq_len), batch_size * gradients)
    working = size * _matrices(model) if size < FP32 else 0
    if shards > 1:
        working = _gathered(model)
    return _parameters(model, optimizer) // shards + working + batch_size * row + busiest


def predicted_memory(model: Network, settings: TrainSettings, shards: int = 1) -> int:
    """Return `predicted_bytes` of `model` under `settings`; with `shard`, for each of so many GPUs."""
    batch_size, _ = settings.split
    return predicted_bytes(
        model,
        batch_size,
        settings.seq_len,
        settings.checkpoint_activations,
        settings.optimizer,
        shards if settings.shard else 1,
    )


def fitting_flags(
    settings: TrainSettings,
    predicted: Callable[[TrainSettings], int],
    available: int,
    sharded: Callable[[TrainSettings, int], int] | None = None,
) -> str:
    """Return flags with which a run fits into `available` bytes, such as '--batch_size 8 --grad_accum 4'.

    The first choice leaves the step unchanged: the largest smaller batch, or recomputed blocks. Then come both, and
    then shorter rows, or several GPUs that share the weights. `predicted` gives the bytes of any settings, whose split
    must be decided, and `sharded` those of each of so many GPUs.
    """

    def first(candidates: Iterator[TrainSettings]) -> TrainSettings | None:
        return next((each for each in candidates if predicted(each) <= USABLE * available), None)

    recomputed = settings.replace(checkpoint_activations=True)
    ways = [first(smaller_splits(settings))]
    if not settings.checkpoint_activations:
        with_recomputing = first(iter([recomputed])) or (None if ways[0] else first(smaller_splits(recomputed)))
        ways.append(with_recomputing)
    found = [_flags(settings, way) for way in ways if way]
    if found:
        return ", or ".join(found)
    shorter = first(_shorter(recomputed))
    advice = [_flags(settings, shorter)] if shorter else []
    if sharded is not None and not settings.shard:
        rows = settings.split[0] * settings.split[1]
        single = recomputed.replace(shard=True, batch_size=1, grad_accum=rows)
        for count in SHARDS:
            if rows % count == 0 and sharded(single, count) <= USABLE * available:
                split = f"--shard --checkpoint_activations --batch_size 1 --grad_accum {rows}"
                advice.append(f"{count} such GPUs: torchrun --nproc_per_node {count} train.py {split}")
                break
    return ", or ".join(advice) or "a smaller --model_size"


def _shorter(settings: TrainSettings) -> Iterator[TrainSettings]:
    """Yield the settings of a step in micro-batches of one row, halving the length of rows each time."""
    batch_size, grad_accum = settings.split
    rows = batch_size * grad_accum
    for halvings in range(1, settings.seq_len.bit_length()):
        yield settings.replace(batch_size=1, grad_accum=rows, seq_len=settings.seq_len >> halvings)


def _flags(settings: TrainSettings, other: TrainSettings) -> str:
    """Return the flags that change `settings` into `other`."""
    before, after = dataclasses.asdict(settings), dataclasses.asdict(other)
    changed = [name for name in after if after[name] != before[name]]
    flags = " ".join(f"--{name}" if after[name] is True else f"--{name} {after[name]}" for name in changed)
    return f"{flags} (the same step)" if "batch_size" in changed and "seq_len" not in changed else flags


def _parameters(model: Network, optimizer: str) -> int:
    """Parameters, gradients, and one average of Muon or two of AdamW, in fp32."""
    muon, rest = (sum(parameter.numel() for _, parameter, _ in part) for part in split_parameters(model))
    return FP32 * ((3 if optimizer == "muon" else 4) * muon + 4 * rest)


def _gathered(model: Network) -> int:
    """What is whole at one time of a sharded model: two blocks, the gradients of two, and all that is in no block."""
    blocks = [_matrices(block) for block in [*model.stem, *model.blocks]]
    rest = model.num_params() - sum(blocks)
    # A block's gradients once more in fp32, as they are added up; of the rest, gradients, and these as they are sent.
    return 2 * max(blocks) * (2 * model.dtype.itemsize + FP32) + 3 * FP32 * rest


def _matrices(module: nn.Module) -> int:
    """Elements of the matrices of a module."""
    return sum(part.weight.numel() for part in module.modules() if isinstance(part, Linear))


def _work(model: Network, batch_size: int, seq_len: int) -> Work:
    groups = usual_groups(seq_len, model.config.segment)
    return Work(seq_len, groups, rows=batch_size, itemsize=model.dtype.itemsize)


def _slots(model: Network, work: Work) -> int:
    """Slots that a deep block attends to beside the tokens, in training."""
    return sum(idea.slots_of(work.groups) for idea in model.ideas.values())


def _block(model: Network, seq_len: int, slots: int) -> int:
    """Bytes per row that a block keeps beside its input."""
    config = model.config
    outputs = config.heads * config.head_dim
    # Two normed inputs and what attention adds; queries before and after the norm, and the outputs of attention; keys
    # before the norm, and values; the MLP after its activation.
    token = 3 * config.width + 3 * outputs + 2 * config.kv_heads * config.head_dim + config.ffn
    return model.dtype.itemsize * (seq_len * token + _kv_numbers(model, seq_len, slots)) + FP32 * seq_len * config.heads


def _kv_numbers(model: Network, seq_len: int, slots: int) -> int:
    """Elements per row in the keys and values that attention over tokens and slots keeps."""
    config = model.config
    if model.dtype.itemsize < FP32:
        return 2 * (seq_len + slots) * config.kv_heads * config.head_dim
    # Without the kernel: of each query block, and for each query head.
    entries = sum(right - left + slots for _, _, left, right in query_blocks(seq_len, 0, config.window))
    return 2 * entries * config.heads * config.head_dim


def _between(model: Network, work: Work) -> int:
    """Bytes per row that are kept outside blocks and ideas."""
    config, seq_len = model.config, work.length
    numbers = 4 * config.width  # the embedding; the last state, normed, and its gradient
    masks = 5 * _slots(model, work)
    if model.dtype.itemsize == FP32:
        keys = seq_len if config.window is None else min(seq_len, 2 * config.window)
        # Attention's masks, with and without slots, as such and as the numbers that are added to scores.
        masks = 5 * (2 * keys + _slots(model, work))
    return seq_len * (model.dtype.itemsize * numbers + masks)


def _loss(model: Network, positions: int) -> int:
    """Bytes of the head's loss, and of the losses that compare predictions with the next tokens."""
    config, size = model.config, model.dtype.itemsize
    entries = min(positions * config.padded_vocab_size, ENTRIES_GPU)
    a_chunk = entries * (size if size < FP32 else 2 * size)  # in fp32 the exponentials stand beside the logits
    sampled = max((each.logits_bytes(positions, config.vocab_size, size) for each in model.ideas.values()), default=0)
    # The head's gradient in fp32, and the head in the activations' dtype; without the kernel also a chunk's gradient.
    head = FP32 + size if size < FP32 else FP32 + 2 * size
    return model.embed.weight.numel() * head + max(a_chunk, sampled)
