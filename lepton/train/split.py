"""The split of a step into micro-batches: all of them train alike, and those that fill a GPU train fastest."""

from collections.abc import Callable, Iterator

from lepton.errors import InputError
from lepton.train.settings import BATCH_SIZE, TrainSettings

USABLE = 0.9
"""Share of a card's memory that a split may fill; fragmentation and forecast errors need the rest."""
VALIDATION_TOKENS = 1 << 15
"""Tokens that a validation reads at a time, at most. Its memory comes on top of what the steps keep."""


def smaller_splits(settings: TrainSettings, processes: int = 1) -> Iterator[TrainSettings]:
    """Yield the settings of the same step in smaller micro-batches, the largest first, which `processes` can share."""
    present, count = settings.split
    rows = present * count
    for batch_size in range(present - 1, 0, -1):
        if rows % batch_size == 0 and rows // batch_size % processes == 0:
            yield settings.replace(batch_size=batch_size, grad_accum=rows // batch_size)


def check_shared(settings: TrainSettings, processes: int) -> None:
    """Raise InputError unless `processes` can share the micro-batches of a step evenly."""
    _, count = settings.split
    if count % processes == 0:
        return
    same = next(smaller_splits(settings, processes), None)
    ways = [f"--batch_size {same.batch_size} --grad_accum {same.grad_accum} (the same step)"] if same else []
    below = count // processes * processes
    ways.append(f"--grad_accum {f'{below} or ' if below else ''}{below + processes}")
    fewer = max(each for each in range(1, processes) if count % each == 0)
    raise InputError(
        f"grad_accum={count}: {processes} processes cannot share {count} micro-batch{'es' * (count > 1)} a step "
        f"evenly: use {', or '.join(ways)}, or start {fewer} process{'es' * (fewer > 1)}"
    )


def largest_split(
    settings: TrainSettings, predicted: Callable[[TrainSettings], int], available: int | None, processes: int = 1
) -> TrainSettings:
    """Return the settings of the same step in the largest micro-batches that fit, or in single rows if none fit.

    Args:
        settings: with `grad_accum` decided. Where `batch_size` is None, a step has BATCH_SIZE x `grad_accum` rows.
        predicted: gives the bytes that any settings take.
        available: bytes of the GPU's memory; None on a CPU, where micro-batches keep their size: they fill its cores
            however few rows they have.
        processes: those that share the micro-batches of a step.
    """
    usual = settings.replace(batch_size=settings.batch_size or BATCH_SIZE)
    if available is None:
        return usual
    batch_size, grad_accum = usual.split
    whole = usual.replace(batch_size=batch_size * grad_accum, grad_accum=1)
    splits = [*([whole] if processes == 1 else []), *smaller_splits(whole, processes)]
    if not splits:
        return usual  # which `check_shared` refuses
    return next((each for each in splits if predicted(each) <= USABLE * available), splits[-1])


def validated_alike(settings: TrainSettings, eval_batches: int) -> TrainSettings:
    """Return `settings` whose validations read the rows of `eval_batches` usual batches, or somewhat fewer."""
    return settings.replace(eval_batches=max(1, eval_batches * BATCH_SIZE // settings.split[0]))


def rows_at_once(settings: TrainSettings) -> int:
    """Return how many rows a validation reads at a time: a divisor of `batch_size`, so that it reads the same rows."""
    batch_size, _ = settings.split
    most = max(1, VALIDATION_TOKENS // settings.seq_len)
    return max(rows for rows in range(1, batch_size + 1) if batch_size % rows == 0 and rows <= most)
