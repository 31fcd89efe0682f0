"""The cache that transformers carries from one pass to the next: a `State` of LEPTON."""

from typing import Any

from torch import Tensor
from transformers import Cache

from lepton.errors import InputError
from lepton.model import State


class LeptonCache(Cache):
    """What the model has read, one row for each sequence of a batch.

    `state` is a `State`, and None before the first pass. A pass replaces it. So a text can go on from any state of the
    same model, such as one with a memory: `LeptonCache(model.network.new_state(1, memory="notes.safetensors"))`. Its
    size does not grow with the text.
    """

    def __init__(self, state: State | None = None) -> None:
        super().__init__(layers=[])
        self.state = state
        self.columns = 0
        """Columns of `input_ids` that were read since, padding included."""

    def __repr__(self) -> str:
        return f"LeptonCache({self.columns} columns, {self.batch_size} rows)"

    def __len__(self) -> int:
        return 1

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Return the columns that were read."""
        return self.columns

    def get_max_length(self, layer_idx: int | None = None) -> int:
        """Return -1: texts may have any length."""
        return -1

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        """Return the columns of an attention mask for `query_length` new ones, and where it begins."""
        return self.columns + query_length, 0

    def update(self, *_: Any, **__: Any) -> Any:
        """Raise InputError: layers of another model have no place in it."""
        raise InputError("a LeptonCache holds the state of a whole model: give it to LeptonForCausalLM")

    def reset(self) -> None:
        """Forget everything."""
        self.state, self.columns = None, 0

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Keep the rows `beam_idx` [rows], in that order."""
        if self.state is not None:
            self.state = self.state.rows(beam_idx.to(self.state.position_B.device))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the rows `indices`."""
        self.reorder_cache(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each row `repeats` times."""
        if self.state is not None:
            index_B = self.state.phase_B.new_ones(self.state.batch_size).cumsum(0) - 1
            self.state = self.state.rows(index_B.repeat_interleave(repeats))

    def crop(self, tokens_to_remove: int) -> None:
        """Raise InputError unless nothing is to be removed: a state cannot go back."""
        if tokens_to_remove:
            raise InputError(f"crop({tokens_to_remove}): a state cannot go back; keep a copy of `cache.state` instead")

    @property
    def batch_size(self) -> int:
        """Rows; -1 before the first pass."""
        return -1 if self.state is None else self.state.batch_size

    @property
    def is_initialized(self) -> bool:
        return self.state is not None

    @property
    def is_compileable(self) -> bool:
        return False

    @property
    def is_croppable(self) -> bool:
        return False

    @property
    def is_sliding(self) -> list[bool]:
        return [False]

    @property
    def is_linear(self) -> list[bool]:
        return [False]  # so that transformers gives a continued text without the columns that were read

    @property
    def is_dummy(self) -> list[bool]:
        return [False]
