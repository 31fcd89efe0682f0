"""The split of a step into micro-batches: all of them train alike, and those that fill a GPU train fastest."""

from collections.abc import Callable, Iterator

from lepton.train.settings import BATCH_SIZE, TrainSettings

USABLE = 0.9
"""Share of a card's memory that a split may fill; fragmentation and forecast errors need the rest."""
VALIDATION_TOKENS = 1 << 15
"""Tokens that a validation reads at a time, at most. Its memory comes on top of what the steps keep."""


def smaller_splits(settings: TrainSettings) -> Iterator[TrainSettings]:
    """Yield the settings of the same step in smaller micro-batches, the largest first."""
    present, count = settings.split
    for batch_size in range(present - 1, 0, -1):
        if present * count % batch_size == 0:
            yield settings.replace(batch_size=batch_size, grad_accum=present * count // batch_size)


def largest_split(
    settings: TrainSettings, predicted: Callable[[TrainSettings], int], available: int | None
) -> TrainSettings:
    """Return the settings of the same step in the largest micro-batches that fit, or in single rows if none fit.

    Args:
        settings: with `grad_accum` decided. Where `batch_size` is None, a step has BATCH_SIZE x `grad_accum` rows.
        predicted: gives the bytes that any settings take.
        available: bytes of the GPU's memory; None on a CPU, where micro-batches keep their size: they fill its cores
            however few rows they have.
    """
    usual = settings.replace(batch_size=settings.batch_size or BATCH_SIZE)
    if available is None:
        return usual
    batch_size, grad_accum = usual.split
    whole = usual.replace(batch_size=batch_size * grad_accum, grad_accum=1)
    splits = [whole, *smaller_splits(whole)]
    return next((each for each in splits if predicted(each) <= USABLE * available), splits[-1])


def validated_alike(settings: TrainSettings, eval_batches: int) -> TrainSettings:
    """Return `settings` whose validations read the rows of `eval_batches` usual batches, or somewhat fewer."""
    return settings.replace(eval_batches=max(1, eval_batches * BATCH_SIZE // settings.split[0]))


def rows_at_once(settings: TrainSettings) -> int:
    """Return how many rows a validation reads at a time: a divisor of `batch_size`, so that it reads the same rows."""
    batch_size, _ = settings.split
    most = max(1, VALIDATION_TOKENS // settings.seq_len)
    return max(rows for rows in range(1, batch_size + 1) if batch_size % rows == 0 and rows <= most)
