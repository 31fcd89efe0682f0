"""Models that are trained on a task of the proving ground, one after the other, each at its best rate.

A task draws rows of tokens from its seed and a number. Some tokens are answers; only they have a loss, and each has a
level, its difficulty. `prove` gives each contender a short run at each of some learning rates, then a full run at the
best of them. It prints each row as soon as it is known, and ends with a line of JSON.

A contender has a time limit, all that it needs included; without `--seconds` they share eight minutes. Most of it is
for training: as many steps as fit are taken, with the whole schedule. What is left is for the test, each part of which
has an equal share. What was cut short is said, and the JSON counts the answers of each level.
"""

import argparse
import dataclasses
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.proving_ground.clock import TIMED, Clock, fitted
from benchmarks.proving_ground.task import Answer, Count, Questions, Score, Task, rules, score
from benchmarks.training import DEFAULTS, WAYS, LeptonTraining, change_ideas, own_schedule
from lepton.api import Lepton
from lepton.config import LeptonConfig
from lepton.errors import InputError, nearest
from lepton.model.parameters import FEED
from lepton.model.size_config import DENSE, count_params, widened
from lepton.runtime.device import free_unused_memory, synchronize
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

TOTAL = 480.0
"""Seconds of all contenders, where no limit of each is given."""
TRAINED = 0.75
"""Share of a contender's time at which training ends."""
LOOK = 20
"""Steps between two looks at the clock, each of which waits for the device."""
RULED = 16
"""Batches of the test that rules answer which need no model."""
SEARCHED = 2
"""Batches of the test at which rates are compared."""

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
    longer: bool = True
    """Whether it is tested on longer rows than those of training too."""
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

    def seconds_a_step(self, task: Task, rows: int, steps: int) -> float:
        """Return the mean time of a step, that of drawing its batch included."""
        self.restart()
        self.model.train()
        synchronize(self.device)
        clock = Clock(0)
        for step in range(TIMED):
            self.step([task.training(step, steps, rows)], step, 0.0)
        synchronize(self.device)
        return clock.spent / TIMED

    def learn(
        self, task: Task, rows: int, steps: int, rate: float, say: Callable[[str], None], clock: Clock | None = None
    ) -> int:
        """Train from the initial weights; `rate` is a multiple of the usual rates. Return the steps it took."""
        self.restart()
        self.model.train()
        for step in range(steps):
            if clock is not None and step % LOOK == 0:
                synchronize(self.device)
                if step and clock.left < 0:
                    say(f"stopped after step {step} of {steps}: the time is up")
                    return step
            figures = self.step([task.training(step, steps, rows)], step, rate * own_schedule(step, steps))
            if (step + 1) % max(1, steps // 8) == 0:
                say(f"step {step + 1} of {steps}, rate {rate:g}: loss {figures['loss'].item():.3f}")
        return steps


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
        self.clock = Clock(TOTAL)

    def say(self, name: str, line: str) -> None:
        print(f"  {name} {self.clock.spent:.0f} s: {line}", flush=True)

    def show(self, name: str, found: Score, **more: Any) -> None:
        """Print a row of the table, and keep it."""
        figures = (f"{100 * found.within(*column):7.1f}" for column in self.task.columns)
        print(f"{name:24} {more.get('params', 0) / 1e6:6.2f} {more.get('rate', 0):5g} {' '.join(figures)}", flush=True)
        self.rows.append({"name": name, **more, **found.to_dict()})

    def head(self) -> None:
        """Print the names of the columns, and what needs no model."""
        names = (self.task.column(*each) for each in self.task.columns)
        print(f"{'% right at level':24} {'M par':>6} {'rate':>5} {' '.join(f'{name:>7}' for name in names)}")
        few = range(min(RULED, self.chosen.test_batches))
        found = rules(self.task, (self.task.held_out(index, self.chosen.test_rows) for index in few))
        asked = next(iter(found.values())).asked
        self.show("a uniform guess", Score(asked, {level: self.task.chance * asked[level] for level in asked}))
        for name, each in found.items():
            self.show(name, each)

    def enter_all(self, contenders: Mapping[str, Contender]) -> None:
        """Let all take part; what one leaves of its share of the time is the others'."""
        for done, (name, contender) in enumerate(contenders.items()):
            share = self.clock.left / (len(contenders) - done)
            self.enter(name, contender, Clock(self.chosen.seconds or share))
            torch._dynamo.reset()  # beyond a number of programs a process the compiler goes on without, in silence
            free_unused_memory(self.device)

    def enter(self, name: str, contender: Contender, clock: Clock) -> None:
        """Train a contender at its best rate, and show what it can do."""
        chosen, task = self.chosen, dataclasses.replace(self.task, **contender.data)
        say = partial(self.say, name)
        training = self.prepared(task, contender)
        prepared = clock.spent
        until = Clock(TRAINED * clock.seconds - prepared)
        searches = len(chosen.rates) if len(chosen.rates) > 1 else 0
        runs = 1 + chosen.search * searches
        a_step = training.seconds_a_step(task, chosen.rows, chosen.steps)
        steps = fitted(chosen.steps, until.left, a_step, runs)
        say(f"{steps} of {chosen.steps} steps fit into {clock.seconds:.0f} s, {1e3 * a_step:.1f} ms each; "
            f"{prepared:.0f} s to prepare")  # fmt: skip
        searched = {}
        for rate in chosen.rates if searches else ():
            training.learn(task, chosen.rows, max(1, round(chosen.search * steps)), rate, say, until)
            quick = (task.held_out(index, chosen.test_rows) for index in range(SEARCHED))
            searched[rate] = score(answers_of(training.model, free_running=task.free_running), quick, task.whole)
            say(f"rate {rate:g}: {100 * searched[rate].share:.1f} % right, {searched[rate].nats:.3f} nats")
        rate = best_rate(searched) if searched else chosen.rates[0]
        reached = training.learn(task, chosen.rows, steps, rate, say, until)
        trained = clock.spent
        thinks = [None, *(chosen.think if training.model.idea("thoughts") is not None else ())]
        found = {}
        for done, think in enumerate(thinks):
            answer = answers_of(training.model, free_running=task.free_running, think=think)
            seconds = max(0.0, clock.left) / (len(thinks) - done)
            found[think] = self.tested(task, answer, Clock(seconds), say, longer=contender.longer)
        length = task.training(0, 1, 1).targets.shape[1]
        self.show(
            name,
            found[None],
            params=training.params,
            rate=rate,
            search={f"{each:g}": of_rate.to_dict() for each, of_rate in searched.items()},
            rate_at_edge=len(searched) > 1 and rate in (min(searched), max(searched)),
            think={think: each.to_dict() for think, each in found.items() if think is not None},
            training_flops_per_token=round(training.flops_per_token(length)),
            steps=reached,
            steps_of_schedule=steps,
            step_ms=round(1e3 * a_step, 1),
            seconds={"prepare": round(prepared, 1), "train": round(trained - prepared, 1),
                     "test": round(clock.spent - trained, 1)},
        )  # fmt: skip
        say(json.dumps(self.rows[-1]))

    def prepared(self, task: Task, contender: Contender) -> TaskTraining:
        """Return a contender with its initial weights, compiled and recorded."""
        chosen = self.chosen
        torch.manual_seed(chosen.seed)
        model = Lepton(contender.config(self.complete)).to(self.device)
        change_ideas(model, contender.losses, chosen.feeds_rate)
        training = TaskTraining(model, chosen.way, seed=chosen.seed)
        training.prepare(chosen.rows, task.training(0, 1, 1).targets.shape[1])
        return training

    def tested(self, task: Task, answer: Answer, clock: Clock, say: Callable[[str], None], *, longer: bool) -> Score:
        """Return the score in the test. Its parts share the time; each has one batch at least."""
        parts = dict[str, list[int]]()
        for index in range(self.chosen.test_batches):
            if longer or not task.longer(index):
                parts.setdefault(task.part(index), []).append(index)
        count = Count(task.whole)
        for done, (part, indices) in enumerate(parts.items()):
            own = Clock(clock.left / (len(parts) - done))
            for batches, index in enumerate(indices):
                if batches and own.left < 0:
                    say(f"{part}: {batches} of {len(indices)} batches in {own.spent:.1f} s, then the time is up")
                    break
                questions = task.held_out(index, self.chosen.test_rows)
                count.add(questions, *answer(questions))
        return count.score()


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
    parser.add_argument("--test_rows", type=int, default=defaults.get("test_rows", defaults["rows"]))
    parser.add_argument("--seconds", type=float, help=f"of each contender (default: {TOTAL:g} in all)")
    parser.add_argument("--rates", type=float, nargs="+", default=RATES, help="multiples of the usual learning rates")
    parser.add_argument("--search", type=float, default=0.15, help="share of the steps at which rates are compared")
    parser.add_argument(
        "--feeds_rate",
        type=float,
        default=defaults.get("feeds_rate", FEED.rate),
        help="share of the rate for what ideas add to the stream",
    )
    parser.add_argument("--think", type=int, nargs="*", default=[], help="rounds of thinking to test with in addition")
    parser.add_argument("--way", choices=WAYS, help="default: compiled on a GPU, plain on a CPU")
    parser.add_argument("--smoke", action="store_true", help="tiny models and few steps")
    chosen = parser.parse_args(words)
    for name in chosen.models:
        if name not in contenders:
            raise InputError(f"no contender {name!r}{nearest(name, contenders)}")
    chosen.way = chosen.way or ("compiled" if torch.cuda.is_available() else "plain")
    if chosen.smoke:
        chosen.steps, chosen.rows, chosen.test_rows, chosen.test_batches = 3, 8, 8, 2
        chosen.rates = chosen.rates[:2]
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
        defaults: `steps`, `rows` and `test_batches` of a full run, `test_rows` if they are not as many,
            and `feeds_rate` if it is not the usual one.
        words: of the command line.
    """
    chosen = read(kind, contenders, defaults, words)
    task = kind(**{each.name: getattr(chosen, each.name) for each in dataclasses.fields(kind)})
    complete = shape(task)
    if chosen.smoke:
        complete = complete.replace(**SMALL)
    proof = Proof(task, complete, chosen)
    proof.head()
    proof.enter_all({name: contenders[name] for name in chosen.models})
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    print(json.dumps({"task": kind.__name__, **vars(chosen), "rows_of_table": proof.rows,
                      "torch": torch.__version__, "device": device}), flush=True)  # fmt: skip
