"""Models that are trained on a task of the proving ground, one after the other, each at its best rate.

A task draws rows of tokens from its seed and a number. Some tokens are answers; only they have a loss, and each has a
level, its difficulty. `prove` gives each contender a short run at each of some learning rates, then a full run at the
best of them. It prints each row as soon as it is known, and ends with a line of JSON.
"""

import argparse
import dataclasses
import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from benchmarks.proving_ground.task import Answer, Questions, Score, Task, rules, score
from benchmarks.training import DEFAULTS, WAYS, LeptonTraining, own_schedule
from lepton.api import Lepton
from lepton.config import LeptonConfig
from lepton.errors import InputError, nearest
from lepton.model.size_config import DENSE, count_params, widened
from lepton.train.batch_plan import plan_step

SHAPE: dict[str, Any] = {
    "width": 256,
    "layers": 4,
    "stem_layers": 2,
    "heads": 4,
    "kv_heads": 4,
    "ffn": 1024,
    "shifted_keys": True,
    "token_shift": True,
    "backout": True,
}
"""Trunk of the contenders, unless a task says otherwise: about 3.5 M parameters."""
SMALL: dict[str, Any] = {"width": 64, "heads": 2, "kv_heads": 2, "head_dim": 32, "ffn": 128}
"""What `--smoke` makes of it."""
RATES = (0.3, 1.0, 3.0)
"""Learning rates that are compared, as multiples of those of `train.py`."""

CHUNK = 2048
"""Tokens that a test reads at a time; longer rows are streams."""


@dataclass(frozen=True, kw_only=True)
class Contender:
    """A model that takes part, by what sets it apart from the complete one."""

    changes: Mapping[str, Any] = field(default_factory=dict)
    """Of the configuration; see `LeptonConfig.replace`."""
    data: Mapping[str, Any] = field(default_factory=dict)
    """Of the fields of the task."""
    losses: Mapping[str, float] = field(default_factory=dict)
    """Weights of auxiliary losses."""
    equal: bool = True
    """Whether its MLPs are widened until it has as many parameters as the complete model."""

    def config(self, complete: LeptonConfig) -> LeptonConfig:
        """Return its configuration, beside that of the complete model."""
        config = complete.replace(**self.changes)
        return widened(config, count_params(complete)) if self.equal and self.changes else config


def dense(**changes: Any) -> dict[str, Any]:
    """Return the changes that make a plain transformer with full attention, and others."""
    return {**DENSE, **changes}


class TaskTraining(LeptonTraining):
    """A LEPTON that is trained on questions."""

    def idle(self, rows: int, length: int) -> Any:
        batch = super().idle(rows, length)
        every_BT = torch.ones(rows, length, dtype=torch.bool)
        return Questions(batch.tokens, batch.lengths, every_BT, every_BT.long())

    def step(self, batches: Sequence[Any], index: int, scale: float) -> dict[str, Tensor]:
        (batch,) = batches
        think, groups, step = plan_step(self.model, batch.tokens, self.seed, index, 0, scale=scale)
        self.micro_step(batch.tokens, batch.lengths, think, groups, 1.0, batch.targets, step=step)
        figures = self.micro_step.take_figures()
        return figures | {"grad_norm": self.optimizers.step(scale, DEFAULTS.grad_clip, self.micro_step.graphs)}

    def learn(self, task: Task, rows: int, steps: int, rate: float, say: Callable[[str], None]) -> None:
        """Train from the initial weights; `rate` is a multiple of the usual rates."""
        self.restart()
        self.model.train()
        for step in range(steps):
            figures = self.step([task.training(step, steps, rows)], step, rate * own_schedule(step, steps))
            if (step + 1) % max(1, steps // 8) == 0:
                say(f"step {step + 1} of {steps}, rate {rate:g}: loss {figures['loss'].item():.3f}")


@torch.no_grad()
def answers_of(model: Lepton, *, free_running: bool, think: int | None = None) -> Answer:
    """Return the model, in eval mode, as what answers questions; `think` are its rounds of thinking."""
    model.eval()

    @torch.no_grad()
    def answer(questions: Questions) -> tuple[Tensor, Tensor]:
        tokens_BX, scored_BT = questions.tokens.to(model.device), (questions.level > 0).to(model.device)
        logits_MV = model.head(hidden_at(model, tokens_BX[:, :-1], scored_BT, think))
        truth_M = tokens_BX[:, 1:][scored_BT]
        nats_M = torch.nn.functional.cross_entropy(logits_MV.float(), truth_M, reduction="none")
        nats_BT = torch.zeros(scored_BT.shape, device=model.device).masked_scatter(scored_BT, nats_M)
        if free_running:
            guess_BT = rolled_out(model, tokens_BX, scored_BT, think)
        else:
            guess_BT = torch.full_like(tokens_BX[:, 1:], -1).masked_scatter(scored_BT, logits_MV.argmax(-1))
        return guess_BT.cpu(), nats_BT.cpu()

    return answer


@torch.no_grad()
def hidden_at(model: Lepton, tokens_BT: Tensor, chosen_BT: Tensor, think: int | None = None) -> Tensor:
    """Return the hidden vectors of the chosen places [M, width], row by row.

    Rows longer than `CHUNK` are read as a stream: a chunk after the other, with the state that the last one left.
    """
    if tokens_BT.shape[1] <= CHUNK:
        return model.trunk(tokens_BT, think=think).hidden[chosen_BT]
    state, found, rows = None, [], []
    for start in range(0, tokens_BT.shape[1], CHUNK):
        output = model.trunk(tokens_BT[:, start : start + CHUNK], state, think=think)
        here_BT = chosen_BT[:, start : start + CHUNK]
        found.append(output.hidden[here_BT])
        rows.append(here_BT.nonzero()[:, 0])
        state = output.commit(output.lengths)
    return torch.cat(found)[torch.cat(rows).argsort(stable=True)]


def rolled_out(model: Lepton, tokens_BX: Tensor, scored_BT: Tensor, think: int | None) -> Tensor:
    """Return the answers of a model that reads its own [B, T], -1 after a wrong one."""
    own_BX, right_B = tokens_BX.clone(), torch.ones(len(tokens_BX), dtype=torch.bool, device=tokens_BX.device)
    guess_BT = torch.full_like(tokens_BX[:, 1:], -1)
    for t in scored_BT[0].nonzero()[:, 0].tolist():
        own_BX[:, t + 1] = model.head(model.trunk(own_BX[:, : t + 1], think=think).hidden[:, -1]).argmax(-1)
        guess_BT[:, t] = own_BX[:, t + 1].masked_fill(~right_B, -1)
        right_B &= own_BX[:, t + 1] == tokens_BX[:, t + 1]
    return guess_BT


class Proof:
    """A task, the options of a run, and the rows of its table."""

    def __init__(self, task: Task, complete: LeptonConfig, chosen: argparse.Namespace) -> None:
        self.task, self.complete, self.chosen = task, complete, chosen
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.rows: list[dict[str, Any]] = []
        self.begun = time.perf_counter()

    def tests(self, task: Task, batches: int | None = None) -> list[Questions]:
        """Return the test of a task, the same at each call."""
        return [task.held_out(index, self.chosen.rows) for index in range(batches or self.chosen.test_batches)]

    def say(self, name: str, line: str) -> None:
        print(f"  {name} {time.perf_counter() - self.begun:.0f} s: {line}", flush=True)

    def show(self, name: str, found: Score, **more: Any) -> None:
        """Print a row of the table, and keep it."""
        figures = (f"{100 * found.within(*column):7.1f}" for column in self.task.columns)
        print(f"{name:24} {more.get('params', 0) / 1e6:6.2f} {more.get('rate', 0):5g} {' '.join(figures)}", flush=True)
        self.rows.append({"name": name, **more, **found.to_dict()})

    def head(self) -> None:
        """Print the names of the columns, and what needs no model."""
        names = (self.task.column(*each) for each in self.task.columns)
        print(f"{'% right at level':24} {'M par':>6} {'rate':>5} {' '.join(f'{name:>7}' for name in names)}")
        tests = self.tests(self.task)
        found = rules(self.task, tests)
        asked = next(iter(found.values())).asked
        self.show("a uniform guess", Score(asked, {level: self.task.chance * asked[level] for level in asked}))
        for name, each in found.items():
            self.show(name, each)

    def enter(self, name: str, contender: Contender) -> None:
        """Train a contender at its best rate, and show what it can do."""
        chosen, task = self.chosen, dataclasses.replace(self.task, **contender.data)
        torch.manual_seed(chosen.seed)
        model = Lepton(contender.config(self.complete)).to(self.device)
        for idea in model.ideas.values():
            idea.loss_weights = {key: contender.losses.get(key, value) for key, value in idea.loss_weights.items()}
        training = TaskTraining(model, chosen.way, seed=chosen.seed)
        length = task.training(0, 1, 1).targets.shape[1]
        training.prepare(chosen.rows, length)
        say, tests, since = lambda line: self.say(name, line), self.tests(task), time.perf_counter()
        searched = {}
        for rate in chosen.rates if len(chosen.rates) > 1 else ():
            training.learn(task, chosen.rows, max(1, round(chosen.search * chosen.steps)), rate, say)
            searched[rate] = score(answers_of(model, free_running=task.free_running), tests[:2])
            say(f"rate {rate:g}: {100 * searched[rate].share:.1f} % right, {searched[rate].nats:.3f} nats")
        rate = best_rate(searched) if searched else chosen.rates[0]
        training.learn(task, chosen.rows, chosen.steps, rate, say)
        thoughts = {
            think: score(answers_of(model, free_running=task.free_running, think=think), tests).to_dict()
            for think in (chosen.think if model.idea("thoughts") is not None else ())
        }
        self.show(
            name,
            score(answers_of(model, free_running=task.free_running), tests),
            params=training.params,
            rate=rate,
            search={f"{each:g}": found.to_dict() for each, found in searched.items()},
            rate_at_edge=len(searched) > 1 and rate in (min(searched), max(searched)),
            think=thoughts,
            training_flops_per_token=round(training.flops_per_token(length)),
            seconds=round(time.perf_counter() - since, 1),
        )


def best_rate(searched: Mapping[float, Score]) -> float:
    """Return the rate with most right answers; within a point, the one with the fewest nats."""
    nats = {rate: found.nats if math.isfinite(found.nats) else math.inf for rate, found in searched.items()}
    return max(searched, key=lambda rate: (round(searched[rate].share, 2), -nats[rate]))


def read(
    kind: type[Task], contenders: Mapping[str, Contender], defaults: Mapping[str, Any], words: Sequence[str] | None
) -> argparse.Namespace:
    """Read the command line: the fields of the task, and the options of a run."""
    parser = argparse.ArgumentParser(description=kind.__doc__)
    for each in dataclasses.fields(kind):
        if isinstance(each.default, bool):
            parser.add_argument(f"--{each.name}", action="store_true")
        else:
            parser.add_argument(f"--{each.name}", type=type(each.default), default=each.default)
    parser.add_argument("--models", nargs="+", default=[*contenders], metavar="NAME", help=", ".join(contenders))
    parser.add_argument("--steps", type=int, default=defaults["steps"])
    parser.add_argument("--rows", type=int, default=defaults["rows"], help="rows of a batch")
    parser.add_argument("--test_batches", type=int, default=defaults["test_batches"])
    parser.add_argument("--rates", type=float, nargs="+", default=RATES, help="multiples of the usual learning rates")
    parser.add_argument("--search", type=float, default=0.15, help="share of the steps at which rates are compared")
    parser.add_argument("--think", type=int, nargs="*", default=[], help="rounds of thinking to test with in addition")
    parser.add_argument("--way", choices=WAYS, help="default: compiled on a GPU, plain on a CPU")
    parser.add_argument("--smoke", action="store_true", help="tiny models and few steps")
    chosen = parser.parse_args(words)
    for name in chosen.models:
        if name not in contenders:
            raise InputError(f"no contender {name!r}{nearest(name, contenders)}")
    chosen.way = chosen.way or ("compiled" if torch.cuda.is_available() else "plain")
    if chosen.smoke:
        chosen.steps, chosen.rows, chosen.test_batches, chosen.rates = 3, 8, 2, chosen.rates[:2]
        vars(chosen).update(kind.small)
    return chosen


def prove(
    kind: type[Task],
    shape: Callable[[Any], LeptonConfig],
    contenders: Mapping[str, Contender],
    defaults: Mapping[str, Any],
    words: Sequence[str] | None = None,
) -> None:
    """Run a task from the command line.

    Args:
        kind: the task.
        shape: the complete model's configuration for it.
        contenders: by name.
        defaults: `steps`, `rows` and `test_batches` of a full run.
        words: of the command line.
    """
    chosen = read(kind, contenders, defaults, words)
    task = kind(**{each.name: getattr(chosen, each.name) for each in dataclasses.fields(kind)})
    complete = shape(task)
    if chosen.smoke:
        complete = complete.replace(**SMALL)
    proof = Proof(task, complete, chosen)
    proof.head()
    for name in chosen.models:
        proof.enter(name, contenders[name])
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    print(json.dumps({"task": kind.__name__, **vars(chosen), "rows_of_table": proof.rows,
                      "torch": torch.__version__, "device": device}), flush=True)  # fmt: skip
