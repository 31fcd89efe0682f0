import pytest
import torch

from lepton.errors import InputError
from lepton.hf.padding import Packed

MASK = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 0], [0, 1, 0, 1, 0], [1, 1, 1, 1, 1], [0, 0, 0, 0, 0]])
IDS = torch.arange(1, 26).reshape(5, 5)


def test_tokens_come_first_in_their_order():
    packed = Packed.of(IDS, MASK)
    assert packed.lengths_B.tolist() == [3, 4, 2, 5, 0]
    assert packed.pack(IDS, -1).tolist() == [
        [3, 4, 5, -1, -1],
        [6, 7, 8, 9, -1],
        [12, 14, -1, -1, -1],
        [16, 17, 18, 19, 20],
        [-1, -1, -1, -1, -1],
    ]


def test_unpacking_puts_each_value_back():
    packed, holds = Packed.of(IDS, MASK), MASK.bool()
    assert torch.equal(packed.unpack(packed.pack(IDS, -1))[holds], IDS[holds])
    wide = packed.pack(IDS, -1)[..., None].expand(-1, -1, 3)
    assert torch.equal(packed.unpack(wide)[holds], IDS[holds][:, None].expand(-1, 3))


def test_a_mask_may_have_the_columns_of_earlier_passes():
    earlier = torch.tensor([[0, 0, 0]] * 5)
    packed = Packed.of(IDS, torch.cat([earlier, MASK], 1))
    assert torch.equal(packed.pack(IDS, -1), Packed.of(IDS, MASK).pack(IDS, -1))


def test_without_a_mask_nothing_moves():
    packed = Packed.of(IDS, None)
    assert packed.lengths_B is None
    assert packed.pack(IDS, -1) is packed.unpack(IDS) is IDS


@pytest.mark.parametrize("shape", [(5,), (4, 5), (5, 4), (5, 1, 5, 5)])
def test_another_shape_is_refused(shape):
    with pytest.raises(InputError, match="give one of 5 rows and at least 5 columns"):
        Packed.of(IDS, torch.ones(shape))
