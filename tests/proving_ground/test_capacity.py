"""Capacity: a memory with room gives all back, one without does not, and a second read finds less than a first."""

from benchmarks.proving_ground.capacity import recalled


def test_few_pairs_in_much_room():
    assert recalled(4, 64, 128, 0.5, pairs=8, rows=2) == [1, 1]


def test_many_pairs_in_little_room():
    one, two = recalled(1, 16, 128, 0.2, pairs=128, rows=2)
    assert two < one < 0.8


def test_what_was_written_first_is_gone_at_a_high_rate():
    slow, fast = (recalled(4, 64, 128, rate, rows=1)[0] for rate in (0.1, 1.0))
    assert fast < 0.8 < 0.95 < slow
