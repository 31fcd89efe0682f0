"""Recording the metrics of steps: figures stay on the device until they are written."""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lepton.errors import InputError
from lepton.runtime.device import peak_flops, peak_memory
from lepton.train.metrics_log import MetricsLog
from lepton.train.progress import Progress, Stopwatch, duration


class Pending(NamedTuple):
    """A step that is done but not reported yet."""

    step: int
    names: list[str]
    figures: Tensor
    """[names], fp32, on the device."""
    lr: float
    targets: int


class MetricsRecorder:
    """Writes steps and validations to metrics.jsonl, and shows a line from time to time."""

    def __init__(
        self,
        log: MetricsLog,
        progress: Progress,
        device: torch.device,
        *,
        flops_per_target: float,
        first: int,
        last: int,
        processes: int = 1,
    ) -> None:
        """`processes` are those that train together, each on a GPU like `device`."""
        self._log = log
        self._progress = progress
        self._device = device
        peak = peak_flops(device)
        self._peak = peak and peak * processes
        self._flops_per_target = flops_per_target
        self._first, self._last = first, last
        self._pending: list[Pending] = []
        self._watch = Stopwatch()
        self._seconds = 0.0
        self._entry: dict[str, Any] = {}

    def add(self, step: int, figures: dict[str, Tensor], *, lr: float, targets: int) -> None:
        """Note a finished step without waiting for the device; `figures` are scalars on it, 'loss' among them."""
        self._pending.append(Pending(step, list(figures), torch.stack(list(figures.values())), lr, targets))

    def flush(self) -> None:
        """Write what is pending.

        Raises:
            InputError: a loss or a gradient is not finite; the steps before that one are written.
        """
        if not self._pending:
            return
        rows = torch.stack([pending.figures for pending in self._pending]).tolist()
        seconds = self._watch.lap()
        self._seconds += seconds
        rate = sum(pending.targets for pending in self._pending) / seconds
        pending, self._pending = self._pending, []
        for done, values in zip(pending, rows, strict=True):
            figures = dict(zip(done.names, values, strict=True))
            check_finite(figures, done.step)
            self._entry = {"step": done.step, **figures, "lr": done.lr, "tokens_per_s": round(rate, 1)}
            self._log.write(self._entry)

    def show(self) -> None:
        """Flush, and show the newest step, the rate and the remaining time."""
        self.flush()
        self._progress.update(self._line(self._entry["step"], 1.0))

    def move(self, step: int, share: float) -> None:
        """On a terminal, show that `share` of a step is done, with the last known figures, without a device sync."""
        if self._progress.still:
            self._progress.update(self._line(step, share))

    def _line(self, step: int, share: float) -> str:
        words = [f"step {step:,}/{self._last:,}" + (f" ({share:.0%})" if share < 1 else "")]
        if self._entry:
            rate = self._entry["tokens_per_s"]
            words += [f"loss {self._entry['loss']:.3f}", f"lr {self._entry['lr']:.1e}", f"{rate:,.0f} tokens/s"]
            if self._peak:
                words.append(f"{100 * rate * self._flops_per_target / self._peak:.0f} % of the GPU's peak")
        memory = peak_memory(self._device)
        if memory is not None:
            words.append(f"{memory / 1e9:.1f} GB")
        done = step - 1 + share
        if done < self._last:
            seconds = self._seconds + self._watch.peek()
            words.append(f"{duration(seconds / (done - self._first) * (self._last - done))} left")
        return "  ".join(words)

    def note(self, figures: dict[str, Any]) -> None:
        """Write figures that do not belong to a step, such as a validation's; they must be finite."""
        check_finite(figures, figures["step"])
        self._log.write(figures)

    def sync(self) -> None:
        """Flush, and make all that was written durable."""
        self.flush()
        self._log.sync()

    def resume_clock(self) -> None:
        """Leave the time since the last `flush` out of the rate: it was spent on something else than steps."""
        self._watch.lap()

    def close(self) -> None:
        self._log.close()


class Unrecorded(MetricsRecorder):
    """Records nothing: what a process of a run has whose rank 0 records the metrics."""

    def __init__(self) -> None:
        pass

    def add(self, step: int, figures: dict[str, Tensor], *, lr: float, targets: int) -> None:
        pass

    def flush(self) -> None:
        pass

    def show(self) -> None:
        pass

    def move(self, step: int, share: float) -> None:
        pass

    def note(self, figures: dict[str, Any]) -> None:
        pass

    def sync(self) -> None:
        pass

    def resume_clock(self) -> None:
        pass

    def close(self) -> None:
        pass


def check_finite(figures: dict[str, Any], step: int) -> None:
    """Raise InputError if a figure is infinite or not a number."""
    for name, value in figures.items():
        if not math.isfinite(value):
            raise InputError(
                f"{name} is {value} at step {step}; nothing was saved after that: "
                "go on from an earlier checkpoint with a lower --lr and --muon_lr"
            )
