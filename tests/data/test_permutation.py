import numpy as np
import pytest

from lepton.data.permutation import permute


def order(n: int, seed: int = 0, epoch: int = 0) -> np.ndarray:
    return permute(np.arange(n), n, seed, np.full(n, epoch))


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 7, 16, 17, 100, 1023, 1024, 1025, 20_000])
def test_every_index_appears_once(n: int) -> None:
    assert sorted(order(n).tolist()) == list(range(n))


def test_seeds_and_epochs_give_other_orders() -> None:
    orders = [order(1000, seed, epoch) for seed in (0, 1, -1, 2**70 + 5) for epoch in (0, 1, 2)]
    matches = [np.mean(a == b) for i, a in enumerate(orders) for b in orders[:i]]
    assert max(matches) < 0.02


def test_an_index_depends_on_nothing_but_itself() -> None:
    whole = order(5000, seed=3, epoch=4)
    pick = np.array([4999, 0, 17, 17])
    assert (permute(pick, 5000, 3, np.full(4, 4)) == whole[pick]).all()


def test_indices_of_several_epochs_may_be_mixed() -> None:
    mixed = permute(np.array([5, 5]), 100, 0, np.array([0, 9]))
    assert mixed.tolist() == [order(100)[5], order(100, epoch=9)[5]]


def test_neighbours_land_all_over() -> None:
    places = order(4096)
    steps = np.abs(np.diff(places))
    assert 1200 < steps.mean() < 1530  # a random order: 4096 / 3
    assert abs(np.corrcoef(np.arange(4096), places)[0, 1]) < 0.06
    first_tenth = np.bincount(places[:409] // 512, minlength=8)
    assert first_tenth.min() > 25  # of 51 expected


def test_huge_ranges_stay_exact() -> None:
    n = 2685 * 20_000 * 4
    places = permute(np.arange(n - 20_000, n), n, 7, np.zeros(20_000, np.int64))
    assert places.min() >= 0
    assert places.max() < n
    assert len(set(places.tolist())) == 20_000
