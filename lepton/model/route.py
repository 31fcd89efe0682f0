"""Which tokens of a chunk a block computes, and how to gather and scatter them.

Everything linear runs on exactly the chosen tokens. Attention runs on them padded to the most that one row has, over
the rows that have any: so what is skipped is not computed, in prefill as in decode.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from lepton.model.timeline import Band


@dataclass(frozen=True)
class Pick:
    """The chosen tokens of one band: M of them, in R rows, at most Q in one."""

    rows_R: Tensor
    """The rows that have any."""
    query_RQ: Tensor
    """Their tokens, counted in the band; 0 where a row has fewer."""
    source: slice
    """Where the band's tokens stand among all chosen ones."""
    place_M: Tensor
    """Where each of them stands in the padded R x Q."""

    @property
    def any(self) -> bool:
        """Whether the band has any chosen token."""
        return self.source.stop > self.source.start

    def pad(self, q_MNH: Tensor) -> Tensor:
        """Lay the band's queries out as [R, Q, N, H]."""
        rows, queries = self.query_RQ.shape
        padded = q_MNH.new_zeros(rows * queries, *q_MNH.shape[1:])
        return padded.index_copy(0, self.place_M, q_MNH[self.source]).unflatten(0, (rows, queries))

    def unpad(self, answer_RQNH: Tensor) -> Tensor:
        """Take the band's answers back out of the padding: [M, N, H]."""
        return answer_RQNH.flatten(0, 1)[self.place_M]


@dataclass(frozen=True)
class Route:
    """The chosen tokens of a chunk, band by band."""

    picks: list[Pick]
    index_M: Tensor
    """Each chosen token in the flattened B x T."""

    @staticmethod
    def of(chosen_BT: Tensor, bands: list[Band]) -> "Route":
        """Lay out the tokens where `chosen_BT` is true. Reads their number back to the host."""
        picks, indices, start = [], [], 0
        length = chosen_BT.shape[1]
        for band in bands:
            part_BQ = chosen_BT[:, band.queries]
            row_M, token_M = part_BQ.nonzero(as_tuple=True)
            count_B = part_BQ.sum(1)
            rows_R = count_B.nonzero()[:, 0]
            most = int(count_B.max())
            order_M = (part_BQ.cumsum(1) - 1)[row_M, token_M]
            place_M = ((count_B > 0).cumsum(0) - 1)[row_M] * most + order_M
            query_RQ = token_M.new_zeros(len(rows_R) * most).index_copy(0, place_M, token_M).view(len(rows_R), most)
            picks.append(Pick(rows_R, query_RQ, slice(start, start + len(token_M)), place_M))
            indices.append(row_M * length + token_M + band.queries.start)
            start += len(token_M)
        return Route(picks, torch.cat(indices))

    def take(self, x_BT: Tensor) -> Tensor:
        """Return the chosen tokens [M, ...] of [B, T, ...]."""
        return x_BT.flatten(0, 1)[self.index_M]

    def put(self, x_BT: Tensor, x_M: Tensor) -> Tensor:
        """Return `x_BT` with the chosen tokens replaced."""
        return x_BT.flatten(0, 1).index_copy(0, self.index_M, x_M).view_as(x_BT)
