"""The training loop.

- A run is a function of its settings: batches depend only on seed and step, and a checkpoint holds the rest.
- The loss of a step is the mean over all of its targets, however they are split into micro-batches.
- The loop waits for the device only to report: losses stay there until then.
- The metrics of a step are durable before its checkpoint is, so that a resumed run reports each step once.
"""

import math
import os
import shlex
import sys
from collections.abc import Collection
from pathlib import Path
from typing import Any, TextIO

import torch

from lepton.errors import InputError
from lepton.evals.calibration import calibrate
from lepton.evals.positions import calibration_batches
from lepton.train.assembly import Parts, assemble, make_room
from lepton.train.batch_plan import plan_batch
from lepton.train.cost import training_flops_per_token
from lepton.train.lock import locked
from lepton.train.messages import introduce, out_of_memory
from lepton.train.metrics_recorder import MetricsRecorder
from lepton.train.micro_step import MicroStep
from lepton.train.progress import Progress
from lepton.train.sample import sample_text
from lepton.train.schedule import lr_scale
from lepton.train.settings import TrainSettings
from lepton.train.single_process import refuse_several_processes
from lepton.train.starting_point import StartingPoint, find_starting_point, run_folder
from lepton.train.stop_request import SIGPIPE, Interrupted, StopRequest
from lepton.train.validation import idea_figures, in_words, validation_loss

CALIBRATION_TOKENS = 1 << 12
"""Held-out tokens that uncertainty and routing are fitted on, before each validation."""


def train(settings: TrainSettings, *, given: Collection[str] | None = None, stream: TextIO | None = None) -> Path:
    """Train a model as `settings` say and return the path of its final checkpoint.

    Args:
        settings: everything about the run.
        given: names of the settings that the user chose. A resumed run takes all others from its checkpoint; by default
            those that differ from their defaults count as chosen.
        stream: where lines for people go, by default stdout.

    Raises:
        InputError: a setting, a file or data that cannot be used, or a loss that is not finite.
        Interrupted: a signal came, or the reader of `stream` left; what was reached is saved.
    """
    refuse_several_processes(os.environ)
    progress = Progress(stream or sys.stdout)
    if settings.threads:
        torch.set_num_threads(settings.threads)
    given = settings.changed() if given is None else given
    with locked(run_folder(settings, given), progress.say):
        start = find_starting_point(settings, given)
        try:
            return Trainer(start, progress).run()
        except torch.OutOfMemoryError as error:
            raise InputError(out_of_memory(start)) from error
        finally:
            progress.clear()  # what follows goes to stderr


class Trainer:
    """One run: its parts, its present step, and the loop over steps."""

    def __init__(self, start: StartingPoint, progress: Progress) -> None:
        self.parts: Parts = assemble(start)
        self.settings = self.parts.settings
        self.start = start
        self.progress = progress
        self.step = start.step
        self.validation: dict[str, Any] | None = start.resumed["validation"] if start.resumed else None
        self.best: float = start.resumed["best"] if start.resumed else math.inf

    def run(self) -> Path:
        """Train until `max_steps` and return the final checkpoint."""
        settings, parts = self.settings, self.parts
        introduce(parts, self.start, self.progress.say)
        log = make_room(self.start, parts.folder, self.progress.say)
        if not parts.folder.has_best:
            self.best = math.inf  # best.pt of the resumed run is elsewhere: the next validation writes one
        with StopRequest() as stop:
            micro_step = self._micro_step()
            self.recorder = MetricsRecorder(
                log,
                self.progress,
                parts.device,
                flops_per_target=training_flops_per_token(parts.model, settings.batch_size, settings.seq_len),
                first=self.step,
                last=settings.max_steps,
            )
            try:
                if self.step == 0:
                    self._validate()
                while self.step < settings.max_steps:
                    self._train_step(micro_step)
                    last = self.step == settings.max_steps
                    if self.step % settings.log_every == 0 or last:
                        self.recorder.show()
                    improved = (self.step % settings.eval_every == 0 or last) and self._validate()
                    # Asked once: a signal that comes during the save waits for the next step.
                    stopping = SIGPIPE if self.progress.closed else stop.signum
                    saving = self.step % settings.save_every == 0 or last or stopping is not None
                    if improved or saving:
                        self._save(best=improved, step=saving)
                    if stopping is not None:
                        raise Interrupted(stopping, self._farewell())
                    if self.step % settings.sample_every == 0 and not last:
                        self._sample()
            finally:
                self.recorder.close()
        return self._finish()

    def _train_step(self, micro_step: MicroStep) -> None:
        """One optimizer step: all its micro-batches, an update, and a record that stays on the device."""
        settings, parts = self.settings, self.parts
        assert settings.grad_accum is not None
        batches = [
            parts.data.train.batch(self.step, micro, batch_size=settings.batch_size, accumulate=settings.grad_accum)
            for micro in range(settings.grad_accum)
        ]
        counts = [int(batch.lengths.sum()) - len(batch.lengths) for batch in batches]
        for micro, (batch, count) in enumerate(zip(batches, counts, strict=True)):
            think, groups = plan_batch(parts.model, batch.tokens, settings.seed, self.step, micro)
            micro_step(batch.tokens, batch.lengths, think, groups, count / sum(counts))
            self.recorder.move(self.step + 1, (micro + 1) / settings.grad_accum)
        figures = micro_step.take_figures()
        scale = lr_scale(
            self.step,
            max_steps=settings.max_steps,
            warmup_steps=settings.warmup_steps,
            cooldown=settings.cooldown,
            min_lr_ratio=settings.min_lr_ratio,
        )
        norm = parts.optimizers.step(scale, settings.grad_clip, micro_step.graphs)
        figures["grad_norm"] = norm.float()
        self.step += 1
        self.recorder.add(self.step, figures, lr=settings.lr * scale, targets=sum(counts))

    def _validate(self) -> bool:
        """Calibrate, measure the held-out loss, and return whether it is the best so far (untrained it never is)."""
        settings, parts, held_out = self.settings, self.parts, self.parts.data.held_out
        rows = settings.batch_size
        self.recorder.flush()
        self.progress.hint("validating ...")
        calibrate(parts.model, calibration_batches(held_out, rows, CALIBRATION_TOKENS))
        loss, bpb = validation_loss(
            parts.model, held_out, parts.tokenizer, batch_size=rows, limit=settings.eval_batches
        )
        ideas = idea_figures(parts.model, held_out, batch_size=rows)
        self.validation = {"step": self.step, "val_loss": loss, "val_bpb": bpb, **ideas}
        self.recorder.note(self.validation)
        self._show_validation()
        self.recorder.resume_clock()
        improved = self.step > 0 and loss < self.best
        if improved:
            self.best = loss
        return improved

    def _save(self, *, best: bool, step: bool) -> None:
        self.recorder.sync()
        self.parts.folder.save(self._payload(), best=best, step=step)
        self.recorder.resume_clock()

    def _payload(self) -> dict[str, Any]:
        """Return everything that resuming and generation need."""
        parts = self.parts
        rng = {"cpu": torch.get_rng_state()}
        if parts.device.type == "cuda":
            rng["cuda"] = torch.cuda.get_rng_state(parts.device)
        return {
            "model": parts.model.state_dict(),
            "config": parts.model.config.to_dict(),
            "size": parts.size,
            "tokenizer": parts.tokenizer.to_json(),
            "step": self.step,
            "optimizer": parts.optimizers.state_dict(),
            "rng": rng,
            "training": self.settings.to_dict(),
            "data": parts.data.origin,
            "validation": self.validation,
            "best": self.best,
        }

    def _finish(self) -> Path:
        """Save final.pt, and show the result of the run."""
        path = self.parts.folder.finish(self._payload())
        if self.validation and self.step == self.start.step:  # no step was left to do, so it has not been shown
            self._show_validation()
        self._sample()
        self.progress.say(f"checkpoint: {path}")
        return path

    def _sample(self) -> None:
        """Show a text that the model writes."""
        settings, parts = self.settings, self.parts
        self.recorder.flush()
        self.progress.hint("writing a sample ...")
        text = sample_text(
            parts.model,
            parts.data.held_out,
            parts.tokenizer,
            prompt=settings.sample_prompt,
            max_new_tokens=settings.sample_tokens,
            seed=settings.seed,
        )
        self.progress.say("\n".join([f"sample at step {self.step:,}:", *(f"  | {line}" for line in text.splitlines())]))
        self.recorder.resume_clock()

    def _farewell(self) -> str:
        path = self.parts.folder.step_path(self.step)
        return f"stopped at step {self.step:,}, saved {path}; go on with --resume {shlex.quote(str(path))}"

    def _show_validation(self) -> None:
        assert self.validation is not None
        self.progress.say(in_words(self.validation, self.parts.model.config.layers))

    def _micro_step(self) -> MicroStep:
        settings = self.settings
        micro_step = MicroStep(self.parts.model, compiled=bool(settings.compile), say=self.progress.say)
        micro_step.prepare(settings.batch_size, settings.seq_len)
        return micro_step
