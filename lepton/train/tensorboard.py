"""Metrics that TensorBoard shows while a run goes on: `tensorboard --logdir CHECKPOINT_DIR`."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lepton.train.metrics_log import MetricsLog

FOLDER = "tensorboard"
"""Folder in that of the checkpoints."""


class TensorBoardLog(MetricsLog):
    """A metrics.jsonl whose records also go to TensorBoard, a curve for each name."""

    def __init__(self, path: Path, first: int) -> None:
        """Append to the file at `path`; what TensorBoard has of steps after `first` is hidden."""
        from torch.utils.tensorboard import SummaryWriter

        super().__init__(path)
        self._writer = SummaryWriter(str(path.parent / FOLDER), purge_step=first + 1)

    def write(self, entry: Mapping[str, Any]) -> None:
        """Append one object."""
        super().write(entry)
        for name, value in entry.items():
            if name != "step":
                self._writer.add_scalar(name, value, entry["step"])

    def sync(self) -> None:
        """Make the lines durable, and show them."""
        super().sync()
        self._writer.flush()

    def close(self) -> None:
        super().close()
        self._writer.close()
