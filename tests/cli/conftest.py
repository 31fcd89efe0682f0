"""A checkpoint that the tests of a module share."""

import pytest

from tests.cli.tiny import save_tiny


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    path = tmp_path_factory.mktemp("generate") / "final.pt"
    return path, *save_tiny(path)
