import pytest

from lepton.train.settings import TrainSettings
from lepton.train.split import USABLE, largest_split, rows_at_once, smaller_splits, validated_alike


def predicted(settings):
    """1 GB, and 1 GB a row."""
    return 10**9 * (1 + settings.split[0])


def test_smaller_splits_are_the_same_step():
    found = [each.split for each in smaller_splits(TrainSettings(batch_size=6, grad_accum=2, lr=1.0))]
    assert found == [(4, 3), (3, 4), (2, 6), (1, 12)]
    assert list(smaller_splits(TrainSettings(batch_size=1, grad_accum=5))) == []


@pytest.mark.parametrize(
    ("batch_size", "grad_accum", "room_gb", "expected"),
    [
        (None, 16, 100, (64, 1)),
        (None, 16, 40, (32, 2)),
        (None, 32, 140, (64, 2)),
        (None, 1, 100, (4, 1)),
        (2, 32, 100, (64, 1)),
        (2, 32, 20, (16, 4)),
        (3, 5, 15, (5, 3)),
        (7, 1, 8, (1, 7)),
        (None, 16, 1, (1, 64)),
        (None, 16, None, (4, 16)),
        (8, 2, None, (8, 2)),
    ],
)
def test_the_largest_that_fits(batch_size, grad_accum, room_gb, expected):
    settings = TrainSettings(batch_size=batch_size, grad_accum=grad_accum, lr=1.0)
    available = None if room_gb is None else room_gb * 10**9
    found = largest_split(settings, predicted, available)
    assert found.split == expected
    assert found == settings.replace(batch_size=expected[0], grad_accum=expected[1]), "nothing else changes"


def test_a_part_of_the_memory_is_left():
    settings = TrainSettings(batch_size=None, grad_accum=16)
    room = int(65 * 10**9 / USABLE)
    assert largest_split(settings, predicted, room + 9).split == (64, 1)
    assert largest_split(settings, predicted, room - 9).split == (32, 2)


@pytest.mark.parametrize(("batch_size", "eval_batches"), [(64, 1), (32, 2), (5, 12), (1, 64), (128, 1)])
def test_a_validation_reads_the_rows_that_it_would_read_anyway(batch_size, eval_batches):
    settings = TrainSettings(batch_size=batch_size, grad_accum=1)
    found = validated_alike(settings, 16)
    assert found == settings.replace(eval_batches=eval_batches)


@pytest.mark.parametrize(
    ("batch_size", "seq_len", "rows"), [(4, 512, 4), (64, 512, 64), (192, 512, 64), (129, 512, 43), (8, 1 << 16, 1)]
)
def test_a_validation_reads_some_rows_at_a_time(batch_size, seq_len, rows):
    assert rows_at_once(TrainSettings(batch_size=batch_size, grad_accum=1, seq_len=seq_len)) == rows
