"""Law 8: the table of sizes is true within 3 %, counted on the built complete model."""

import pytest

from lepton.model.size_config import count_params, size_config
from lepton.presets import SIZES


@pytest.mark.parametrize("size", SIZES)
def test_the_size_is_its_target(size):
    target = SIZES[size].target_params
    assert abs(count_params(size_config(size)) - target) <= 0.03 * target


@pytest.mark.parametrize("size", SIZES)
def test_the_dense_baseline_has_equal_parameters(size):
    complete, dense = count_params(size_config(size)), count_params(size_config(size, dense=True))
    assert abs(dense - complete) <= 0.01 * complete


def test_the_eight_sizes_are_there():
    assert list(SIZES) == ["nano", "micro", "tiny", "small", "medium", "large", "xl", "xxl"]
