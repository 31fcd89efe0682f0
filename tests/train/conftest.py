"""The small data set, written once, and a small model."""

import pytest
import torch

from lepton.api import Lepton
from lepton.config import LeptonConfig
from tests.train.small import SHAPE, write_data


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    return write_data(tmp_path_factory.mktemp("training") / "data")


@pytest.fixture
def model():
    model = Lepton(LeptonConfig.from_dict(SHAPE))
    for parameter in model.parameters():
        parameter.data += 0.3 * torch.randn_like(parameter) / parameter.shape[-1] ** 0.5
    return model
