"""Knowledge: whether a model tells what it does not know from what has several right answers.

The model learns the facts of `benchmarks.proving_ground.facts`. Half of the questions have one right answer, the others
several, and each is asked 0 to 256 times in training. Whoever knows several answers looks like one who guesses.

A question is *known* if it was asked in training and the model gives its right answers half of the probability or more.
Several scores rank the questions: largest probability, entropy and margin of the answer, and heads that read the
model's last state. One learns from pairs of independent answers (`uncertainty.pairs`), on questions of its own, while
the model stays as it is. Beside it stand the same head in training, the same network that learns from one answer at a
time, and, as a bound, the one that is told how often the model's answer is right. All are calibrated on other
questions, and judged on a third part.

    python -m benchmarks.proving_ground.knowledge
"""

import argparse
import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.proving_ground.facts import SEEN, WORDS, Knowledge
from benchmarks.proving_ground.runner import SHAPE, SMALL, TaskTraining
from benchmarks.training import WAYS
from lepton.api import Lepton
from lepton.config import LeptonConfig
from lepton.evals.reliability import auroc, calibration_error, sorted_by_chance
from lepton.model.ideas.idea import SIGNALS
from lepton.model.ideas.uncertainty import Ignorance, knowledge_loss, prediction_features, self_agreement
from lepton.model.parameters import initialise

COVERAGE = 0.8
"""Share of the questions that are answered when wrong answers are counted."""


@dataclass(frozen=True)
class Seen:
    """What a trained model says to some questions."""

    question_N: Tensor
    hidden_ND: Tensor
    logits_NV: Tensor
    signals_N3: Tensor
    right_NV: Tensor
    """The true chance of each answer."""
    times_N: Tensor
    """How often it was asked in training."""

    @cached_property
    def inputs_NF(self) -> Tensor:
        """What heads read beside the state."""
        features_N3, _ = prediction_features(self.logits_NV)
        return torch.cat([features_N3, self.signals_N3, self_agreement(self.logits_NV)[:, None]], 1)

    @cached_property
    def chance_NV(self) -> Tensor:
        return self.logits_NV.softmax(1)

    @cached_property
    def wrong_N(self) -> Tensor:
        """The chance that an answer drawn from the prediction is not right, fp64."""
        return (self.chance_NV.double() * (self.right_NV == 0)).sum(1)

    @cached_property
    def best_wrong_N(self) -> Tensor:
        """1 where the most likely answer is not right, else 0."""
        return (self.right_NV.gather(1, self.logits_NV.argmax(1, keepdim=True))[:, 0] == 0).double()

    @cached_property
    def unknown_N(self) -> Tensor:
        """1 where the question was never asked, or an answer is more likely wrong than right; else 0."""
        return ((self.wrong_N > 0.5) | (self.times_N == 0)).double()

    def pairs(self, count: int, generator: torch.Generator) -> "Pairs":
        """Return `count` pairs of independent answers of each question."""
        answers_NC = self.right_NV.cpu().multinomial(2 * count, replacement=True, generator=generator)
        chance_NC = self.chance_NV.gather(1, answers_NC.to(self.chance_NV.device))
        place_M = torch.arange(len(answers_NC)).repeat_interleave(count)
        same_M = answers_NC.view(-1, 2)[:, 0] == answers_NC.view(-1, 2)[:, 1]
        wrong_M = self.wrong_N.repeat_interleave(count)
        return Pairs(*(each.to(wrong_M.device) for each in (place_M, same_M, chance_NC.view(-1, 2), wrong_M)))


class Pairs(NamedTuple):
    """Pairs of answers to some questions."""

    place_M: Tensor
    """Of the question, among those that were asked."""
    same_M: Tensor
    """Whether both answers are the same."""
    chance_M2: Tensor
    """The model's chance of each."""
    wrong_M: Tensor
    """The chance that the model's answer is wrong, which only the bound is told."""

    def at(self, pick_M: Tensor) -> "Pairs":
        return Pairs(*(each[pick_M] for each in self))


@torch.no_grad()
def asked(model: Lepton, task: Knowledge, question_N: Tensor) -> Seen:
    """Ask a model, in eval mode, some questions."""
    found = []
    for some_M in question_N.split(4096):
        out = model.trunk(task.words(some_M).to(model.device))
        found.append((out.hidden[:, -1].float(), model.head(out.hidden[:, -1]), out.flow.signals(*SIGNALS)[:, -1]))
    hidden, logits, signals = (torch.cat(each) for each in zip(*found, strict=True))
    truth = (task.right_QV[question_N].to(model.device), task.seen_Q[question_N].to(model.device))
    return Seen(question_N, hidden, logits, signals.float(), *truth)


Loss = Callable[[Tensor, Tensor, Pairs], Tensor]
"""(logit that the model's answer is right [M], logit that two answers agree [M], pairs) -> losses [M]."""


def of_pairs(right_M: Tensor, agree_M: Tensor, pairs: Pairs) -> Tensor:
    """The loss of `Ignorance` for what it says of answers, without that of how open a question is."""
    return knowledge_loss(right_M, agree_M, pairs.chance_M2)


def alone(right_M: Tensor, agree_M: Tensor, pairs: Pairs) -> Tensor:
    """The loss of the control: either answer by itself, so an open choice looks like ignorance."""
    return F.binary_cross_entropy_with_logits(right_M, pairs.chance_M2.mean(1), reduction="none")


def told(right_M: Tensor, agree_M: Tensor, pairs: Pairs) -> Tensor:
    """The loss of the bound: the chance that the model's answer is wrong."""
    return F.binary_cross_entropy_with_logits(right_M, 1 - pairs.wrong_M.to(right_M.dtype), reduction="none")


def learned(seen: Seen, pairs: Pairs, loss: Loss, epochs: int, rate: float, seed: int) -> Ignorance:
    """Return a head that has learned from what a model says to some questions; the model stays as it is."""
    torch.manual_seed(seed)
    head = Ignorance(seen.hidden_ND.shape[1]).to(seen.hidden_ND.device)
    initialise(head)
    optimizer = torch.optim.AdamW(head.parameters(), lr=rate, weight_decay=0.1)
    generator, rows = torch.Generator().manual_seed(seed), min(512, len(pairs.place_M))
    steps = epochs * (len(pairs.place_M) // rows)
    for step in range(steps):
        pick_M = torch.randint(len(pairs.place_M), (rows,), generator=generator).to(pairs.place_M.device)
        some = pairs.at(pick_M)
        right_M, agree_M = head(seen.hidden_ND[some.place_M], seen.inputs_NF[some.place_M])
        openness = F.binary_cross_entropy_with_logits(agree_M, some.same_M.to(agree_M.dtype))
        optimizer.param_groups[0]["lr"] = rate * min(1.0, 2 * (1 - step / steps))
        (openness + loss(right_M, agree_M, some).mean()).backward()
        optimizer.step()
        optimizer.zero_grad()
    return head


def calibrated(head: Ignorance, seen: Seen, pairs: Pairs, loss: Loss) -> float:
    """Fit the line of a head to questions that it did not learn from; return the mean loss."""
    with torch.no_grad():
        right_M, agree_M = (each.double()[pairs.place_M] for each in head(seen.hidden_ND, seen.inputs_NF))
    line = torch.tensor([1.0, 0.0], dtype=torch.float64, device=right_M.device, requires_grad=True)
    optimizer = torch.optim.LBFGS([line], max_iter=50, line_search_fn="strong_wolfe")

    def mean() -> Tensor:
        optimizer.zero_grad()
        found = loss(line[0] * right_M + line[1], agree_M, pairs).mean()
        found.backward()
        return found

    optimizer.step(mean)
    head.line.copy_(line.detach())
    return mean().item()


@torch.no_grad()
def doubt(head: Ignorance, seen: Seen) -> Tensor:
    """Return the chance that the model's answer is wrong, as a head sees it, fp64 [N]."""
    scale, shift = head.line.double()
    return torch.sigmoid(-(scale * head(seen.hidden_ND, seen.inputs_NF)[0].double() + shift))


def plain_scores(seen: Seen) -> dict[str, Tensor]:
    """Return what a prediction says by itself, [N] each: the larger, the more doubtful."""
    chance_NV = seen.chance_NV.double()
    first_N, second_N = chance_NV.topk(2, 1).values.unbind(1)
    return {
        "max-probability": 1 - first_N,
        "entropy": torch.special.entr(chance_NV).sum(1),
        "margin": 1 - (first_N - second_N),
        "two samples agree": 1 - chance_NV.square().sum(1),
    }


def judged(doubt_N: Tensor, seen: Seen, *, is_chance: bool) -> dict[str, float | None]:
    """Return the figures of a score."""
    doubt_N, wrong_N = doubt_N.cpu(), seen.wrong_N.cpu()
    _, ranked_N = sorted_by_chance(doubt_N, wrong_N)
    open_N = seen.right_NV.amax(1).cpu() < 1
    unknown_N = seen.unknown_N.cpu()
    ranked = {
        "auroc_known": auroc(doubt_N, unknown_N),
        "auroc_closed": auroc(doubt_N[~open_N], unknown_N[~open_N]),
        "auroc_open": auroc(doubt_N[open_N], unknown_N[open_N]),
        "auroc_right": auroc(doubt_N, seen.best_wrong_N.cpu()),
    }
    return {name: None if math.isnan(value) else value for name, value in ranked.items()} | {
        "ece": calibration_error(doubt_N, wrong_N) if is_chance else None,
        "wrong_at_coverage": ranked_N[: round(COVERAGE * len(ranked_N))].mean().item(),
    }


def gain(table: dict[str, dict[str, float | None]], name: str) -> float | None:
    """Return by how much a head knows more than the best of what a prediction says by itself; None: undefined."""
    plain = [table[each]["auroc_known"] for each in ("max-probability", "entropy", "margin")]
    own = table[name]["auroc_known"]
    return None if own is None or None in plain else own - max(each for each in plain if each is not None)


def show(name: str, found: dict[str, float | None]) -> None:
    """Print a row of the table."""
    values = ("      -" if value is None else f"{100 * value:7.2f}" for value in found.values())
    print(f"{name:24} {' '.join(values)}", flush=True)


def by_seen(seen: Seen, task: Knowledge) -> list[dict[str, float]]:
    """Return the share of known questions by how often they were asked."""
    times_N, open_N, rows = seen.times_N.cpu(), task.open_Q[seen.question_N], []
    for times in SEEN:
        parts = {"closed": (times_N == times) & ~open_N, "open": (times_N == times) & open_N}
        known = {name: 1 - seen.unknown_N.cpu()[part].mean().item() for name, part in parts.items()}
        right = {f"{name}_right": 1 - seen.best_wrong_N.cpu()[part].mean().item() for name, part in parts.items()}
        rows.append({"seen": times, **known, **right})
    return rows


def read(words: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--subjects", type=int, default=Knowledge.subjects, help="times 8 are the facts")
    parser.add_argument("--rows", type=int, default=32, help="rows of a batch, an even number")
    parser.add_argument("--rate", type=float, default=1.0, help="multiple of the usual learning rates")
    parser.add_argument("--width", type=int, default=384, help="of the model, a multiple of 64")
    parser.add_argument("--pairs", type=int, default=1, help="pairs of answers of a question that heads learn from")
    parser.add_argument("--epochs", type=int, default=40, help="passes of a head over its questions")
    parser.add_argument("--head_rate", type=float, default=1e-3)
    parser.add_argument("--way", choices=WAYS, help="default: compiled on a GPU, plain on a CPU")
    parser.add_argument("--smoke", action="store_true", help="a tiny model of a tiny world, few steps")
    chosen = parser.parse_args(words)
    chosen.way = chosen.way or ("compiled" if torch.cuda.is_available() else "plain")
    return chosen


def shape(task: Knowledge, width: int) -> LeptonConfig:
    """Return the model: a trunk, and the heads of uncertainty."""
    sizes = {"width": width, "heads": width // 64, "kv_heads": width // 64, "ffn": 4 * width}
    config = LeptonConfig(**{**SHAPE, **sizes}, window=16, segment=16, vocab_size=task.vocab_size)
    return config.replace(uncertainty={"pairs": WORDS})


def trained(task: Knowledge, config: LeptonConfig, chosen: argparse.Namespace) -> TaskTraining:
    """Return a training that is over, its model in eval mode."""
    device, begun = torch.device("cuda" if torch.cuda.is_available() else "cpu"), time.perf_counter()

    def say(line: str) -> None:
        print(f"  {time.perf_counter() - begun:.0f} s: {line}", flush=True)

    torch.manual_seed(chosen.seed)
    training = TaskTraining(Lepton(config).to(device), chosen.way, seed=chosen.seed)
    training.prepare(chosen.rows, task.facts * WORDS)
    steps = 3 if chosen.smoke else task.steps(chosen.rows)
    training.learn(task, chosen.rows, steps, chosen.rate, say)
    training.model.eval()
    return training


def main(words: Sequence[str] | None = None) -> None:
    """Train the model and the heads; print a table, and a line of JSON."""
    chosen, begun = read(words), time.perf_counter()
    fields = {"seed": chosen.seed, "subjects": chosen.subjects, **(Knowledge.small if chosen.smoke else {})}
    task = Knowledge(**fields)
    config = shape(task, chosen.width)
    training = trained(task, config.replace(**SMALL) if chosen.smoke else config, chosen)
    model = training.model
    learning, calibration, test = (asked(model, task, task.part(number)) for number in range(3))
    rows = by_seen(test, task)
    print(f"{'seen':>5} {'% known: closed':>16} {'open':>8} {'% right: closed':>16} {'open':>8}")
    for row in rows:
        print(f"{row['seen']:5} {100 * row['closed']:16.1f} {100 * row['open']:8.1f} "
              f"{100 * row['closed_right']:16.1f} {100 * row['open_right']:8.1f}")  # fmt: skip
    generator, table = task.generator(6), {}
    learn, line = (seen.pairs(chosen.pairs, generator) for seen in (learning, calibration))
    print(f"{'%':24} {'known':>7} {'closed':>7} {'open':>7} {'right':>7} {'ECE':>7} {'wrong@80':>8}")
    for name, score_N in plain_scores(test).items():
        table[name] = judged(score_N, test, is_chance=name == "max-probability")
        show(name, table[name])
    taught: dict[str, Loss] = {"head of single answers": alone, "head of pairs": of_pairs, "told what is right": told}
    heads = {"head of pairs, training": model.idea("uncertainty").pairs}
    losses = {"head of pairs, training": calibrated(heads["head of pairs, training"], calibration, line, of_pairs)}
    for name, loss in taught.items():
        heads[name] = learned(learning, learn, loss, chosen.epochs, chosen.head_rate, chosen.seed)
        losses[name] = calibrated(heads[name], calibration, line, loss)
    for name, head in heads.items():
        table[name] = judged(doubt(head, test), test, is_chance=True)
        show(name, table[name])
    gains = {name: gain(table, name) for name in heads}
    print("over the best of max-probability, entropy and margin:")
    for name, value in gains.items():
        print(f"{name:24} {'      -' if value is None else f'{100 * value:+7.2f}'}")
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    found: dict[str, Any] = {"task": "Knowledge", **vars(chosen), "facts": task.questions, "table": table}
    found |= {"gains": gains, "losses": losses, "by_seen": rows, "params": training.params}
    found |= {"unknown": test.unknown_N.mean().item(), "wrong": test.wrong_N.mean().item()}
    found |= {"seconds": time.perf_counter() - begun, "torch": torch.__version__, "device": device}
    print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
