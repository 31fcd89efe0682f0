"""The folder of a run: which checkpoints it holds, which are kept, and what happens to those of an earlier run."""

import re
import shutil
from pathlib import Path
from typing import Any

from lepton import checkpoint
from lepton.files import readable, remove_unfinished
from lepton.train.metrics_log import BAD

SHARDED_NAME = re.compile(r"step_(\d+)\.dcp")
"""Name of a sharded checkpoint, a folder; see `lepton.train.sharded_checkpoint`."""
BEST, FINAL, METRICS = "best.pt", "final.pt", "metrics.jsonl"


class RunFolder:
    """`checkpoint_dir`: step_N.pt (the newest `keep`), best.pt, final.pt and metrics.jsonl.

    Only for a run that holds the folder's lock (`lepton.train.lock`).
    """

    def __init__(self, path: str | Path, *, keep: int, owned: bool = True) -> None:
        """`owned`: whether this process writes to the folder; of several, the others only know where it is."""
        self.path = Path(path)
        self.keep = keep
        if owned:
            remove_unfinished(self.path)
            checkpoint.remove_unfinished(self.path)

    @property
    def metrics(self) -> Path:
        return self.path / METRICS

    def step_path(self, step: int) -> Path:
        return self.path / f"step_{step}.pt"

    @property
    def final(self) -> Path:
        return self.path / FINAL

    @property
    def has_best(self) -> bool:
        """Whether best.pt is there."""
        return (self.path / BEST).exists()

    def save(self, payload: dict[str, Any], *, best: bool, step: bool) -> None:
        """Save `payload` as best.pt, as its step_N.pt, or as both sharing the disk space; prune beyond `keep`.

        best.pt comes first: a run killed between the two resumes from an earlier step and writes best.pt again.
        """
        path = self.step_path(payload["step"])
        if best:
            checkpoint.save(self.path / BEST, payload)
        if step and best:
            checkpoint.duplicate(self.path / BEST, path)
        elif step:
            checkpoint.save(path, payload)
        for _, old in checkpoint.steps_in(self.path)[: -self.keep]:
            old.unlink(missing_ok=True)

    def finish(self, payload: dict[str, Any]) -> Path:
        """Save the last step as final.pt."""
        path, last = self.final, self.step_path(payload["step"])
        if last.exists():
            checkpoint.duplicate(last, path)
        else:
            checkpoint.save(path, payload)
        return path

    def set_aside(self, *, after: int = -1) -> Path | None:
        """Move an earlier run out of the way, so that nothing of it is overwritten; return where to.

        With `after`, a run is resumed from that step: only if step_N.pt with a larger N exist does anything move,
        and metrics.jsonl is copied, since its beginning belongs to both; so is a best.pt from before.
        """
        fresh = after < 0
        metrics = [path for path in (self.metrics, self.metrics.with_name(METRICS + BAD)) if path.exists()]
        for path in metrics:
            readable(path, "metrics file")
        steps = [*checkpoint.steps_in(self.path), *sharded_steps(self.path, whole=False)]
        later = [path for step, path in steps if step > after]
        named = [path for name in (BEST, FINAL) if (path := self.path / name).exists()]
        if not later and not (fresh and named):
            if fresh:
                for path in metrics:  # of a run that ended before its first checkpoint
                    path.unlink()
            return None
        aside = next(path for n in range(1, 10**6) if not (path := self.path / f"previous-{n}").exists())
        aside.mkdir()
        for path in metrics:
            shutil.copy2(path, aside / path.name)
            if fresh:
                path.unlink()
        for path in [*named, *later]:
            if path.name == BEST and self._is_from(path, after):
                checkpoint.duplicate(path, aside / BEST)
            else:
                path.rename(aside / path.name)
        return aside

    @staticmethod
    def _is_from(path: Path, after: int) -> bool:
        """Whether a checkpoint is whole and of step `after` or earlier: it belongs to the resumed run as well."""
        return checkpoint.is_whole(path) and checkpoint.load(path)["step"] <= after


def sharded_steps(folder: str | Path, *, whole: bool = True) -> list[tuple[int, Path]]:
    """Return (N, path) of each step_N.dcp in `folder`, oldest first, by default only of those that are whole."""
    folder = Path(folder)
    found = [(match, path) for path in folder.glob("*.dcp") if (match := SHARDED_NAME.fullmatch(path.name))]
    return sorted((int(match[1]), path) for match, path in found if not whole or (path / ".metadata").exists())
