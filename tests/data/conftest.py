"""Small corpora, shards and a small tokenizer for the tests of the data."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from lepton.data.tokenizer import EOS, Tokenizer, load_tokenizer


@pytest.fixture(scope="session")
def shipped() -> Tokenizer:
    return load_tokenizer()


@pytest.fixture(scope="session")
def letters() -> Tokenizer:
    """A token a byte: quick to load and to hash."""
    tokens = [EOS, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    backend = tokenizers.Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([EOS])
    return Tokenizer(backend)


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
