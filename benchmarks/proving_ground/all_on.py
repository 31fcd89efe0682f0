"""All on: one model with all six ideas learns text and the tasks of the proving ground together.

A step is 64 rows of 512 tokens: first text of a prepared data set, then rows of tasks (`--share` of the rows), of which
the answers alone are targets. The step's loss is the mean over text and the mean over answers, weighted by the rows of
each: one mean over all targets would leave the answers about 3 %. `mixture.py` says how tasks are written.

A size is changed as the tasks need it (`CHANGES`): all tokens think, for 8 rounds, so 16 hops cannot take a round each;
the memory has 16 heads and is read twice. The MLPs are narrowed until the parameters are again those of the size.
`dense` has as many parameters and takes as many steps; `dense_flops` is the same model with as many more steps, text
and tasks included, as make its training FLOPs equal. Beyond an epoch, text is read again.

At the usual windows of 256 and 512 a row of training fits into a wide block's window. What lies further back is asked
for in the test alone: 256 pairs in 1,025 tokens, and needles in 2,048. `--change window=64 wide_window=128` makes the
rows of training need the memory too; `dense` does not take such changes.

`--tokens` and the speed count text; tasks come in addition. Other options are those of `benchmarks.ideas`; `--brief`
leaves out the uncertainty, depths and drafts. `--smoke` runs on a CPU.

    python -m benchmarks.proving_ground.all_on --data_dir D --tokenizer F --babi_dir B --variant complete
"""

import argparse
import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.ideas import Run, alone, read_arguments, variant_config
from benchmarks.proving_ground.clock import fitted
from benchmarks.proving_ground.contenders import FEEDS_RATE
from benchmarks.proving_ground.mixture import LENGTH, Part, parts_of, rows_of_tasks
from benchmarks.proving_ground.runner import answers_of
from benchmarks.proving_ground.task import Questions, Score, score
from benchmarks.proving_ground.text import seconds_a_step
from benchmarks.training import DEFAULTS, LeptonTraining
from lepton.api import Lepton
from lepton.config import LeptonConfig
from lepton.data.shards import Batch
from lepton.evals.calibration import calibrate, fit_temperature
from lepton.evals.positions import DEFAULT_TOKENS, calibration_batches, evaluation_batches
from lepton.evals.reliability import measure_uncertainty
from lepton.model.weights import on_meta_device
from lepton.train.batch_plan import plan_step
from lepton.train.cost import training_flops_per_token

CHANGES = (
    "thoughts.over_tokens=true",
    "thoughts.rounds=8",
    "thoughts.most_rounds=8",
    "memory.heads=16",
    "memory.key_dim=64",
    "memory.value_dim=128",
    "memory.tied_decay=true",
    "memory.reads=2",
)
"""What the tasks need of a size; `--change` comes after it."""
WINDOWS = ("window", "wide_window", "segment")
"""What a dense model does not change with the complete one: it has full attention."""
VARIANTS = ("complete", "dense", "dense_flops")
DEPTHS = (0.75, 0.5)


class Mixed(NamedTuple):
    """The rows of a step."""

    text: Batch
    tasks: Questions


class MixedTraining(LeptonTraining):
    """A LEPTON that is trained on text and on questions in each step."""

    def __init__(self, model: Lepton, way: str, task_rows: int, **options: Any) -> None:
        super().__init__(model, way, **options)
        self.task_rows = task_rows

    def idle(self, rows: int, length: int) -> Any:
        text, tasks = (super(MixedTraining, self).idle(each, length) for each in (rows, self.task_rows))
        every_BT = torch.ones(self.task_rows, length, dtype=torch.bool)
        return Mixed(text, Questions(tasks.tokens, tasks.lengths, every_BT, every_BT.long()))

    def step(self, batches: Sequence[Any], index: int, scale: float) -> dict[str, Tensor]:
        """One optimizer step on a `Mixed`; `loss` is that of text, `answers` that of the questions."""
        (mixed,) = batches
        found = []
        for micro, batch in enumerate(mixed):
            share = len(batch.tokens) / sum(len(each.tokens) for each in mixed)
            think, groups, step = plan_step(self.model, batch.tokens, self.seed, index, micro, scale=scale)
            targets = batch.targets if isinstance(batch, Questions) else None
            self.micro_step(batch.tokens, batch.lengths, think, groups, share, targets, step=step)
            found.append(self.micro_step.take_figures()["loss"] / share)
        norm = self.optimizers.step(scale, DEFAULTS.grad_clip, self.micro_step.graphs)
        return {"loss": found[0], "answers": found[1], "grad_norm": norm}


class AllOn(Run):
    """A model, its text and its tasks, and the findings so far."""

    def __init__(self, arguments: argparse.Namespace, chosen: argparse.Namespace) -> None:
        self.chosen = chosen
        rows = arguments.batch_size
        self.task_rows = min(rows - 1, max(1, round(chosen.share * rows)))
        arguments.batch_size = rows - self.task_rows
        super().__init__(arguments)
        folders = (arguments.data_dir, arguments.tokenizer or "", chosen.babi_dir)
        self.parts, self.longer = parts_of(*folders, arguments.seed)
        more = 1.0
        if chosen.variant == "dense_flops":
            more = self.flops(config_of(arguments.size, "complete", chosen.change)) / self.flops(self.model.config)
            self.steps = round(more * self.steps)
        self.answers: list[list[float]] = []
        self.findings |= {**vars(chosen), "steps": self.steps, "steps_ratio": round(more, 4),
                          "task_rows": self.task_rows, "config": self.model.config.flat_dict(),
                          "training_flops_per_token": round(self.flops(self.model.config))}  # fmt: skip

    def config(self) -> LeptonConfig:
        return config_of(self.arguments.size, self.chosen.variant, self.chosen.change)

    def flops(self, config: LeptonConfig) -> float:
        """Return the training FLOPs of a token of such a model."""
        with on_meta_device():
            model = Lepton(config)
        return training_flops_per_token(model, self.arguments.batch_size, LENGTH)

    def in_training(self) -> LeptonTraining:
        way = "plain" if self.device == "cpu" else "recorded" if self.arguments.no_compile else "compiled"
        rates = {name: getattr(self.arguments, name) for name in ("lr", "muon_lr", "weight_decay")}
        return MixedTraining(self.model, way, self.task_rows, seed=self.arguments.seed, **rates)

    def step(self, batch: Batch, step: int, steps: int) -> dict[str, Tensor]:
        mixed: Any = Mixed(batch, rows_of_tasks(self.parts, step, steps, self.task_rows))
        figures = super().step(mixed, step, steps)
        if step % 100 == 0 or step == steps - 1:
            self.answers.append([step, round(figures["answers"].item(), 4)])
            print(f"{self.chosen.variant} step {step} of {steps}: answers {self.answers[-1][1]:.4f}", flush=True)
        return figures

    def begin(self) -> None:
        """Compile and record; find how many steps fit; say what a row of each task holds."""
        self.prepare()
        if self.chosen.seconds is not None:
            self.steps = self.findings["steps"] = fitted(self.steps, self.chosen.seconds, seconds_a_step(self), 1)
        self.answers.clear()
        counts = {name: part.training(self.steps - 1, self.steps, 16).targets for name, part in self.parts.items()}
        self.tell(answers_a_row={name: each.sum().item() / 16 for name, each in counts.items()})

    def judge(self) -> None:
        self.model.eval()
        self.tell(answers_curve=self.answers)
        loss = self.held_out_loss(self.arguments.eval_batches)
        self.tell(val_loss=round(loss, 4), loss_of_quarters=[round(quarter, 4) for quarter in self.quarters])
        scores = dict[str, Score]()
        for name, part in {**self.parts, **self.longer}.items():
            if not self.has_time(0):
                print(f"{name}: not judged, the time is up", flush=True)
            else:
                batches = (part.held_out(index, self.chosen.test_rows) for index in range(self.chosen.test_batches))
                answer = answers_of(self.model, free_running=part.task.free_running)
                scores[name] = score(answer, batches, part.task.whole)
                self.tell(**{name: {"chance": part.task.chance, **scores[name].to_dict()}})
        if self.model.idea("router") is not None and not self.arguments.brief and self.has_time(0):
            self.ideas()
        show({**self.parts, **self.longer}, scores, self.findings)

    def ideas(self) -> None:
        """The uncertainty, the loss where not all tokens go deep, and the drafts."""
        tokens = 4 * LENGTH if self.chosen.smoke else DEFAULT_TOKENS
        calibrate(self.model, calibration_batches(self.held_out, 4, tokens))
        temperature = fit_temperature(self.model, calibration_batches(self.held_out, 4, tokens))
        judged = evaluation_batches(self.held_out, 4, tokens)
        found = measure_uncertainty(self.model, judged, max_tokens=tokens, temperature=temperature)
        self.tell(reliability=found.to_dict())
        losses = {f"{depth:g}": self.held_out_loss(self.arguments.eval_batches, depth=depth) for depth in DEPTHS}
        self.tell(loss_at_depth={depth: round(loss, 4) for depth, loss in losses.items()})
        if self.has_time(0):
            self.drafts()


def config_of(size: str, variant: str, changes: Sequence[str]) -> LeptonConfig:
    """Return the configuration of a variant, with the parameters of the size."""
    if variant == "complete":
        return variant_config(size, variant, [*CHANGES, *changes])
    return variant_config(size, "dense", [each for each in changes if each.split("=")[0] not in WINDOWS])


def show(parts: Mapping[str, Part], scores: Mapping[str, Score], findings: Mapping[str, Any]) -> None:
    """Print the table."""
    print(f"{findings['variant']}: text {findings['val_loss']:.4f} nats; % right of the tasks, and at each level")
    for name, found in scores.items():
        task = parts[name].task
        levels = (
            f"{task.column(level, level)}:{100 * found.within(level, level):.1f}" for level in sorted(found.asked)
        )
        print(f"{name:12} {100 * found.share:6.1f} (chance {100 * task.chance:.2f})  {' '.join(levels)}")


def read(words: Sequence[str] | None = None) -> tuple[argparse.Namespace, argparse.Namespace]:
    """Return the options of `benchmarks.ideas`, and those of this file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--variant", default="complete", choices=VARIANTS)
    parser.add_argument("--change", nargs="+", default=[], metavar="FIELD=JSON", help="fields of the configuration")
    parser.add_argument("--share", type=float, default=0.25, help="share of the rows that are tasks")
    parser.add_argument("--babi_dir", default="", help="folder of bAbI (default: stories of our own)")
    parser.add_argument("--seconds", type=float, help="of the training (default: all of its tokens)")
    parser.add_argument("--test_batches", type=int, default=16, help="of each task")
    parser.add_argument("--test_rows", type=int, default=64)
    parser.add_argument("--smoke", action="store_true", help="the smallest size, few rows, three steps")
    chosen, rest = parser.parse_known_args(words)
    usual = ["--size", "tiny", "--tokens", "49e6", "--feeds_rate", str(FEEDS_RATE)]
    arguments = read_arguments([*usual, *rest])
    arguments.variant, arguments.seq_len, arguments.smoke = chosen.variant, LENGTH, chosen.smoke
    if chosen.smoke:
        arguments.size, arguments.batch_size, arguments.eval_batches = "nano", 4, 1
        arguments.tokens = 3 * 3 * LENGTH
        chosen.test_batches, chosen.test_rows = 1, 2
    return arguments, chosen


def main(words: Sequence[str] | None = None) -> None:
    """Train one variant and judge it; print each finding, a table, and a line of JSON."""
    run = AllOn(*read(words))
    # A block is compiled for the rows of text and for those of tasks: more programs than the compiler keeps by itself.
    with torch._dynamo.config.patch(recompile_limit=1_000, accumulated_recompile_limit=10_000):
        run.begin()
        with alone(run.arguments.lock):
            run.train()
            if run.arguments.save:
                run.save(run.arguments.save)
            run.judge()
    run.findings["took_s"] = round(run.elapsed(), 1)
    print(json.dumps({"task": "AllOn", **run.findings}), flush=True)


if __name__ == "__main__":
    main()
