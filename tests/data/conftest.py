"""Small corpora, shards and a small tokenizer for the tests of the data."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from lepton.data.tokenizer import Tokenizer, load_tokenizer
from tests.data.small import small


@pytest.fixture(scope="session")
def shipped() -> Tokenizer:
    return load_tokenizer()


@pytest.fixture(scope="session")
def letters() -> Tokenizer:
    """A token a byte: quick to load and to hash."""
    return Tokenizer(small(257))


@pytest.fixture
def shard_folder(tmp_path: Path) -> Callable[..., Path]:
    """A function that writes arrays as shards and returns their folder."""

    def write(*arrays: np.ndarray, val: tuple[np.ndarray, ...] = (), name: str = "data") -> Path:
        folder = tmp_path / name
        for place, group in ((folder, arrays), (folder / "val", val)):
            for number, array in enumerate(group):
                place.mkdir(parents=True, exist_ok=True)
                np.save(place / f"shard_{number:05d}.npy", array)
        return folder

    return write
