"""The training loop.

- A run is a function of its settings: batches depend only on seed and step, and a checkpoint holds the rest.
- The loss of a step is the mean over all of its targets, however they are split into micro-batches.
- The loop waits for the device only to report: losses stay there until then.
- The metrics of a step are durable before its checkpoint is, so that a resumed run reports each step once.
- Of several processes each takes its share of a step's micro-batches, and all have the same weights. Rank 0 alone
  validates, prints and writes; the others wait for it.
"""

import math
import os
import shlex
import sys
from collections.abc import Collection
from contextlib import nullcontext
from pathlib import Path
from typing import Any, TextIO

import torch
from torch import Tensor

from lepton.distributed import RankLost, Ranks, joined, restarted
from lepton.errors import InputError
from lepton.evals.calibration import calibrate
from lepton.evals.positions import calibration_batches
from lepton.runtime.device import free_unused_memory
from lepton.train.assembly import Parts, assemble, make_room
from lepton.train.batch_plan import plan_step
from lepton.train.cost import training_flops_per_token
from lepton.train.faster_split import faster_split
from lepton.train.gradients import FlatGradients
from lepton.train.held_out_loss import HeldOutLoss
from lepton.train.lock import locked
from lepton.train.messages import introduce, out_of_memory, rows_a_time
from lepton.train.metrics_recorder import MetricsRecorder, Unrecorded
from lepton.train.micro_step import MicroStep
from lepton.train.phases import Phases
from lepton.train.progress import Progress
from lepton.train.sample import sample_text
from lepton.train.saving import Saving
from lepton.train.schedule import lr_scale
from lepton.train.settings import TrainSettings
from lepton.train.sharded_checkpoint import ShardedSaving, sharded_path
from lepton.train.sharding import gathered
from lepton.train.split import rows_at_once, smaller_splits, validated_alike
from lepton.train.starting_point import StartingPoint, find_starting_point, going_on, run_folder
from lepton.train.stop_request import SIGPIPE, Interrupted, StopRequest
from lepton.train.validation import idea_figures, in_words, validation_loss

CALIBRATION_TOKENS = 1 << 12
"""Held-out tokens that uncertainty and routing are fitted on, before each validation."""


def train(
    settings: TrainSettings,
    *,
    given: Collection[str] | None = None,
    stream: TextIO | None = None,
    since: float | None = None,
) -> Path:
    """Train a model as `settings` say and return the path of its final checkpoint.

    Args:
        settings: everything about the run.
        given: names of the settings that the user chose. A resumed run takes all others from its checkpoint; by default
            those that differ from their defaults count as chosen.
        stream: where lines for people go, by default stdout.
        since: the `time.perf_counter()` from which the seconds of the run are counted, by default now.

    Under torchrun every process of the run calls this, with the same arguments.

    Raises:
        InputError: a setting, a file or data that cannot be used, or a loss that is not finite.
        Interrupted: a signal came, or the reader of `stream` left; what was reached is saved.
        RankLost: another process of the run has failed or is gone.
    """
    phases = Phases(since)
    given = settings.changed() if given is None else given
    if settings.threads:
        torch.set_num_threads(settings.threads)
    with joined(os.environ, settings.device) as ranks:
        progress = Progress((stream or sys.stdout) if ranks.leads else None)
        try:
            return _train(settings, given, ranks, progress, phases)
        except InputError as error:
            if not ranks.several:
                raise
            raise InputError(f"rank {ranks.rank}: {error}") from error


def _train(settings: TrainSettings, given: Collection[str], ranks: Ranks, progress: Progress, phases: Phases) -> Path:
    """`train`, once the processes of the run have joined."""
    with locked(run_folder(settings, given), progress.say) if ranks.leads else nullcontext():
        if ranks.leads and restarted(os.environ):
            settings = going_on(settings, given)
        start = find_starting_point(settings, given, ranks)
        trainer: Trainer | None = None
        try:
            with ranks.watched():
                trainer = Trainer(start, progress, phases, ranks)
                return trainer.run()
        except torch.OutOfMemoryError as error:
            raise InputError(out_of_memory(start, trainer.settings if trainer else None)) from error
        finally:
            progress.clear()  # what follows goes to stderr


class Trainer:
    """One run: its parts, its present step, and the loop over steps."""

    def __init__(self, start: StartingPoint, progress: Progress, phases: Phases, ranks: Ranks | None = None) -> None:
        self.ranks = ranks or Ranks()
        self.parts: Parts = assemble(start, phases, self.ranks)
        self.settings = self.parts.settings
        sharded = self.settings.shard
        self.gradients = FlatGradients(() if sharded or not self.ranks.several else self.parts.model.parameters())
        self.updating = False
        """Whether the weights are between two steps."""
        self.phases = phases
        self.saving: Saving | ShardedSaving
        if sharded:
            self.saving = ShardedSaving(self.parts.folder, self.ranks, progress.say)
        else:
            self.saving = Saving(self.parts.folder, beside=self.parts.device.type == "cuda", say=progress.say)
        self.start = start
        self.progress = progress
        self.step = start.step
        self.validation: dict[str, Any] | None = start.resumed["validation"] if start.resumed else None
        self.best: float = start.resumed["best"] if start.resumed else math.inf

    def run(self) -> Path:
        """Train until `max_steps` and return the final checkpoint."""
        parts = self.parts
        with self.phases("estimate"):
            if self.ranks.leads:
                introduce(parts, self.start, self.progress.say, self.ranks)
        with StopRequest(says=self.ranks.leads) as stop:
            micro_step = self._prepare()
            self.held_out_loss = HeldOutLoss(parts.model, micro_step.graphs, self.progress.say)
            self.recorder = self._recorder() if self.ranks.leads else Unrecorded()
            try:
                with self.ranks.watched():
                    self._steps(micro_step, stop)
            except RankLost as lost:
                raise RankLost(f"{lost}; {self._rescue()}", speaks=lost.speaks) from lost
            finally:
                with self.phases("checkpoints"):
                    self.saving.close()
                self.recorder.close()
        path = self._finish()
        if self.ranks.several and micro_step.graphs is not None:
            micro_step.graphs.clear()  # NCCL does not end while a graph holds its kernels
        return path

    def _steps(self, micro_step: MicroStep, stop: StopRequest) -> None:
        """The loop over steps, with what comes between them."""
        settings = self.settings
        if self.step == 0:
            self._validate()
        while self.step < settings.max_steps:
            self._train_step(micro_step)
            self.saving.check()
            last = self.step == settings.max_steps
            if self.step % settings.log_every == 0 or last:
                self.recorder.show()
            improved = (self.step % settings.eval_every == 0 or last) and self._validate()
            # Asked once: a signal that comes during the save waits for the next step.
            # One that came to any process stops all of them.
            stopping = self.ranks.largest(SIGPIPE if self.progress.closed else stop.signum or 0) or None
            saving = self.step % settings.save_every == 0 or last or stopping is not None
            if improved or saving:
                self._save(best=improved, step=saving)
            if stopping is not None:
                with self.phases("checkpoints"):
                    self.saving.wait()
                raise Interrupted(stopping, self._farewell())
            if self.step % settings.sample_every == 0 and not last:
                self._sample()

    def _recorder(self) -> MetricsRecorder:
        settings, parts = self.settings, self.parts
        log = make_room(self.start, parts.folder, self.progress.say, tensorboard=settings.tensorboard)
        if not parts.folder.has_best:
            self.best = math.inf  # best.pt of the resumed run is elsewhere: the next validation writes one
        return MetricsRecorder(
            log,
            self.progress,
            parts.device,
            flops_per_target=training_flops_per_token(parts.model, settings.split[0], settings.seq_len),
            first=self.step,
            last=settings.max_steps,
            processes=self.ranks.size,
        )

    def _train_step(self, micro_step: MicroStep) -> None:
        """One optimizer step: this process's micro-batches, an update, and a record that stays on the device."""
        settings, parts = self.settings, self.parts
        batch_size, grad_accum = settings.split
        own = self.ranks.share(grad_accum)
        batches = [
            parts.data.train.batch(self.step, micro, batch_size=batch_size, accumulate=grad_accum) for micro in own
        ]
        counts = [batch.counted for batch in batches]
        total = max(1, self.ranks.total(sum(counts)))  # of conversations, a step may hold no answer
        read = self.ranks.total(sum(int((batch.lengths - 1).sum()) for batch in batches))
        scale = lr_scale(
            self.step,
            max_steps=settings.max_steps,
            warmup_steps=settings.warmup_steps,
            cooldown=settings.cooldown,
            min_lr_ratio=settings.min_lr_ratio,
        )
        for done, (micro, batch, count) in enumerate(zip(own, batches, counts, strict=True), 1):
            tokens, opens = batch.tokens, batch.opens
            drawn_by = (parts.model, tokens, settings.seed, self.step, micro)
            think, groups, step = plan_step(*drawn_by, scale=scale, opens_BT=opens)
            micro_step(tokens, batch.lengths, think, groups, count / total, batch.targets, opens, step)
            self.recorder.move(self.step + 1, done / len(own))
        figures = self._added_up(micro_step.take_figures())
        self.updating = True
        norm = parts.optimizers.step(scale, settings.grad_clip, micro_step.graphs)
        self.step += 1
        self.updating = False
        figures["grad_norm"] = norm.float()
        self.recorder.add(self.step, figures, lr=settings.lr * scale, targets=read)

    def _added_up(self, figures: dict[str, Tensor]) -> dict[str, Tensor]:
        """Add up the gradients of all processes; return the sums of their `figures`."""
        if not self.ranks.several:
            return figures
        sums = torch.stack(list(figures.values()))
        self.ranks.add_([*self.gradients.buffers, sums])
        return dict(zip(figures, sums.unbind(), strict=True))

    def _validate(self) -> bool:
        """`_measure` in rank 0, while the others wait; return whether the loss is the best so far.

        Sharded, all measure together.
        """
        measures = self.ranks.leads or self.settings.shard
        improved = self.ranks.told(self._measure() if measures else False)
        self.ranks.copy_([*self.parts.model.buffers()])  # which calibration has set
        return improved

    def _measure(self) -> bool:
        """Calibrate, measure the held-out loss, and return whether it is the best so far (untrained it never is).

        Of a model that has learned nothing, or is sharded, only the loss is measured.
        """
        settings, parts, held_out = self.settings, self.parts, self.parts.data.held_out
        rows = rows_at_once(settings)
        learned = (self.step > 0 or self.start.weights is not None) and not settings.shard
        self.recorder.flush()
        self.progress.hint("validating ...")
        if learned:
            with self.phases("calibration"):
                calibrate(parts.model, calibration_batches(held_out, rows, CALIBRATION_TOKENS))
        with self.phases("validation"):
            limit = settings.eval_batches * settings.split[0] // rows
            loss, bpb = validation_loss(
                parts.model, held_out, parts.tokenizer, batch_size=rows, limit=limit, loss_of=self.held_out_loss
            )
        with self.phases("figures of ideas"):
            ideas = idea_figures(parts.model, held_out, batch_size=rows) if learned else {}
        self.validation = {"step": self.step, "val_loss": loss, "val_bpb": bpb, **ideas}
        self.recorder.note(self.validation)
        self._show_validation()
        self.recorder.resume_clock()
        improved = self.step > 0 and loss < self.best
        if improved:
            self.best = loss
        return improved

    def _save(self, *, best: bool, step: bool) -> None:
        if not self.ranks.leads and not self.settings.shard:
            return
        self.recorder.sync()
        with self.phases("checkpoints"):
            self.saving.save(self._payload(), best=best, step=step)
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

    def _rescue(self) -> str:
        """Save what was reached although another process is gone; return in words how to go on.

        On a GPU that is impossible: what waits there for the other process never ends.
        """
        if not self.ranks.leads or self.updating or self.parts.device.type != "cpu" or self.settings.shard:
            return f"go on from the newest checkpoint in {self.parts.folder.path} with --resume auto"
        if not self.parts.folder.step_path(self.step).exists():
            self._save(best=False, step=True)
        return self._farewell()

    def _finish(self) -> Path:
        """Save final.pt, and show the result of the run; return the path of final.pt."""
        path = self.parts.folder.final
        with self.phases("checkpoints"):
            self.saving.wait()
            payload = self._payload()
            if self.settings.shard:
                payload = gathered(payload, keep=self.ranks.leads)
            if not self.ranks.leads:
                return path
            self.parts.folder.finish(payload)
        if self.validation and self.step == self.start.step:  # no step was left to do, so it has not been shown
            self._show_validation()
        self._sample()
        self.progress.say(f"took {self.phases.in_words()}")
        self.progress.say(f"checkpoint: {path}")
        return path

    def _sample(self) -> None:
        """Show a text that the model writes."""
        if not self.ranks.leads or self.settings.shard:
            return
        settings, parts = self.settings, self.parts
        self.recorder.flush()
        self.progress.hint("writing a sample ...")
        with self.phases("samples"):
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
        if self.settings.shard:
            path = sharded_path(path.parent, self.step)
        return f"stopped at step {self.step:,}, saved {path}; go on with --resume {shlex.quote(str(path))}"

    def _show_validation(self) -> None:
        assert self.validation is not None
        self.progress.say(in_words(self.validation, self.parts.model.config.layers))

    def _prepare(self) -> MicroStep:
        """Compile and record, and say how long all took until here.

        Where `--batch_size auto` has hoped for too much memory, the next smaller split is tried.
        """
        parts, say = self.parts, self.progress.say
        while (micro_step := self._fitting_micro_step()) is None:
            free_unused_memory(parts.device)
            smaller = next(smaller_splits(self.settings, self.ranks.size))
            self.settings = validated_alike(smaller, self.start.settings.eval_batches)
            say(f"that was too much for the GPU's memory: {rows_a_time(self.settings)}")
        with self.phases("measure"):
            left = self.settings.max_steps - self.step
            hint = None if self.ranks.several else faster_split(parts.model, self.settings, micro_step, left)
        if hint:
            say(hint)
        say(f"prepared in {self.phases.fold('preparation', 'training')}")
        return micro_step

    def _fitting_micro_step(self) -> MicroStep | None:
        """Return what runs micro-batches of the present split, or None if they do not fit and a smaller one may do."""
        batch_size, _ = self.settings.split
        micro_step: MicroStep | None
        try:
            micro_step = MicroStep(
                self.parts.model,
                compiled=bool(self.settings.compile),
                captured=not self.settings.shard,
                say=self.progress.say,
                phase=self.phases,
            )
            micro_step.prepare(batch_size, self.settings.seq_len, answers=self.parts.data.train.has_answers)
        except torch.OutOfMemoryError:
            if self.start.settings.batch_size is not None or batch_size == 1:
                raise
            micro_step = None
        # Too much for one is too much for all.
        return None if self.ranks.largest(micro_step is None) else micro_step
