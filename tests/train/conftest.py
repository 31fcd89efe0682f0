"""The small data set, written once."""

import pytest

from tests.train.small import write_data


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    return write_data(tmp_path_factory.mktemp("training") / "data")
