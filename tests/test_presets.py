"""The table of sizes; law 8 counts what the models have."""

import pytest

from lepton.config import IDEAS
from lepton.errors import InputError
from lepton.presets import SIZES, preset


@pytest.mark.parametrize("name", SIZES)
def test_a_size_has_the_shape_of_its_line_and_every_idea(name):
    size = preset(name)
    config = size.config(IDEAS)
    for field in ("width", "layers", "heads", "kv_heads", "head_dim", "ffn", "embed_rank"):
        assert getattr(config, field) == getattr(size, field)
    assert [idea.name for idea in config.ideas] == [*IDEAS]
    assert size.config({}).dense
    assert size.target_params == size.millions * 10**6


def test_sizes_grow():
    targets = [size.target_params for size in SIZES.values()]
    assert targets == sorted(set(targets))


@pytest.mark.parametrize(
    ("name", "message"), [("tinny", "did you mean 'tiny'"), (5, "unknown model size 5"), (None, "None")]
)
def test_another_size_is_refused(name, message):
    with pytest.raises(InputError, match=message):
        preset(name)
