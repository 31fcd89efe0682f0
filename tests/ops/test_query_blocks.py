"""How a chunk is split into blocks of queries."""

import pytest

from lepton.ops.query_blocks import computed_pairs, query_blocks


@pytest.mark.parametrize("window", [None, 1, 100])
@pytest.mark.parametrize("length", [1, 256, 257, 1000])
def test_query_blocks_cover_a_chunk_and_count_its_pairs(length, window):
    blocks = query_blocks(length, 0, window)
    assert [first for first, *_ in blocks] == [0, *(last for _, last, *_ in blocks[:-1])]
    assert blocks[-1][1] == blocks[-1][3] == length
    assert computed_pairs(length, window) == sum((b - a) * (d - c) for a, b, c, d in blocks)
