"""The drafter as cycles need it: its tables, made of the model's weights once, and again when these have changed."""

from typing import TYPE_CHECKING

import torch

from lepton.model import Network

if TYPE_CHECKING:
    from lepton.model.ideas.drafter import Prepared


class PreparedDrafter:
    """The drafter of a model, with tables that stay where they are."""

    def __init__(self, model: Network) -> None:
        self._model, self._on_cpu = model, model.device.type == "cpu"
        self._prepared: Prepared | None = None
        self._prepared_of: list[tuple[int, float]] = []
        self._is_old = True

    def refresh(self) -> None:
        """Take in the present weights, when they are needed."""
        self._is_old = True

    def get(self, drafts: int) -> "Prepared | None":
        """Return the drafter for a cycle, of the weights at the last `refresh`; None if it drafts nothing."""
        if not drafts:
            return None
        if self._prepared is None:
            self._prepared = self._prepare()
            self._prepared_of = self._look_of_drafter() if self._on_cpu else []
        elif self._is_old and not self._on_cpu:  # to look at the weights would wait for the device
            self._prepare_again()
        elif self._is_old and self._prepared_of != (look := self._look_of_drafter()):
            self._prepare_again()
            self._prepared_of = look
        self._is_old = False
        return self._prepared

    @torch.inference_mode(False)
    def _prepare(self) -> "Prepared":
        model = self._model
        prepared: Prepared = model.idea("drafter").prepared(model.embed, model.dtype, model.config.eos_id)
        return prepared

    def _prepare_again(self) -> None:
        assert self._prepared is not None
        for own, value in zip(self._prepared, self._prepare(), strict=True):
            own.copy_(value)

    def _look_of_drafter(self) -> list[tuple[int, float]]:
        """What tells the present weights that drafts depend on from others, on a CPU: versions, and sums of samples,
        since fused optimizers leave versions as they are."""
        drafter = self._model.idea("drafter")
        sources = [*drafter.parameters(), *drafter.buffers(), self._model.embed.weight]
        return [
            (
                0 if each.is_inference() else each._version,
                float(each.detach().flatten()[:: each.numel() // 1000 + 1].sum(dtype=torch.float64)),
            )
            for each in sources
        ]
