"""A keyed permutation of 0..n-1 that is computed an index at a time, so that nothing of size n is stored.

A Feistel network over pairs (a, b) with 0 <= a, b < ceil(sqrt(n)) is a bijection of the numbers a * side + b; a result
of n or more is fed in again until it falls below n (cycle walking), which keeps it a bijection of 0..n-1.
"""

import math

import numpy as np

ROUNDS = 8


def permute(index: np.ndarray, n: int, seed: int, epoch: np.ndarray) -> np.ndarray:
    """Return the place of each of `index` (int64 [B], in 0..n-1) in the permutation of `seed` and its `epoch` [B]."""
    side = np.uint64(math.isqrt(n - 1) + 1)
    key = _mix(_mix(np.full(epoch.shape, seed % 2**64, np.uint64)) + epoch.astype(np.uint64))
    result = _feistel(index.astype(np.uint64), side, key)
    while len(outside := np.flatnonzero(result >= n)):
        result[outside] = _feistel(result[outside], side, key[outside])
    return result.astype(np.int64)


def _feistel(x: np.ndarray, side: np.uint64, key: np.ndarray) -> np.ndarray:
    a: np.ndarray = x // side
    b: np.ndarray = x % side
    for number in range(ROUNDS):
        a, b = b, (a + _mix(_mix(key + np.uint64(number)) + b) % side) % side
    return a * side + b


def _mix(x: np.ndarray) -> np.ndarray:
    """The finaliser of SplitMix64 (Steele, Lea and Flood, 2014): every bit of x decides every bit of the result."""
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
