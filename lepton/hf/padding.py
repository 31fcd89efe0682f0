"""Padded batches: transformers pads on either side and says so in a mask, LEPTON reads rows from their beginning."""

from dataclasses import dataclass

import torch
from torch import Tensor

from lepton.errors import InputError


@dataclass(frozen=True)
class Packed:
    """The columns of a batch with those that hold tokens first."""

    order_BT: Tensor | None
    """Column of the batch at each place; None: all columns hold tokens."""
    lengths_B: Tensor | None
    """Columns of each row that hold tokens; None: all."""

    @staticmethod
    def of(input_ids: Tensor, attention_mask: Tensor | None) -> "Packed":
        """Read a mask whose last columns belong to `input_ids` [B, T]; those before were read in earlier passes.

        Args:
            input_ids: token ids.
            attention_mask: 1 for columns that hold tokens, 0 for padding, [B, at least T]; None: all hold tokens.

        Raises:
            InputError: the mask has another shape, such as the one [B, 1, T, T] of attention from token to token.
        """
        if attention_mask is None:
            return Packed(None, None)
        rows, columns = input_ids.shape
        shape = tuple(attention_mask.shape)
        if len(shape) != 2 or shape[0] != rows or shape[1] < columns:
            raise InputError(
                f"attention_mask of shape {shape} for input_ids {(rows, columns)}: give one of {rows} rows and at "
                f"least {columns} columns, 1 for tokens and 0 for padding"
            )
        holds_BT = attention_mask[:, -columns:].bool().to(input_ids.device)
        order_BT = (~holds_BT).long().argsort(dim=1, stable=True) if columns > 1 else None
        return Packed(order_BT, holds_BT.sum(1))

    def pack(self, value_BT: Tensor, filler: int | bool) -> Tensor:
        """Return a value of each column [B, T] in the order of reading, with `filler` in what is padding."""
        if self.lengths_B is None:
            return value_BT
        ordered_BT = value_BT if self.order_BT is None else value_BT.gather(1, self.order_BT)
        index_T = torch.arange(value_BT.shape[1], device=value_BT.device)
        return ordered_BT.masked_fill(index_T >= self.lengths_B[:, None], filler)

    def unpack(self, value_BTX: Tensor) -> Tensor:
        """Return values [B, T, ...] in the order of reading in that of the columns."""
        if self.order_BT is None:
            return value_BTX
        place_BT = self.order_BT.argsort(dim=1)
        index = place_BT.reshape(*place_BT.shape, *[1] * (value_BTX.ndim - 2)).expand_as(value_BTX)
        return value_BTX.gather(1, index)
