"""More training of single ideas, after the whole model's, on text that the model itself wrote.

A draft follows the model's own text, at the temperature that the user chose; in training it followed text of people.
Here the trained model writes first, and an idea that `learns_from_own_text` learns its losses on that (a draft model
learns better from text of the models than from given text: DistillSpec, Zhou et al. 2024). Every other parameter stays
as it is, so predictions and losses of the model do too, bit for bit.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import NamedTuple

import torch
from torch import Tensor

from lepton.engine.options import GenerationOptions
from lepton.errors import InputError
from lepton.generate.completion import complete
from lepton.model import Network
from lepton.model.ideas.idea import Idea, Outcome
from lepton.ops.cross_entropy import IGNORE
from lepton.train.optimizer import Optimizers
from lepton.train.schedule import lr_scale
from lepton.train.settings import TrainSettings

PEAK = TrainSettings()
"""Rates of training."""


@dataclass(frozen=True, kw_only=True)
class OwnText:
    """How much text the model writes, and how it is learnt."""

    temperatures: tuple[float, ...] = (0.0, 0.8, 1.0)
    """Each prompt is continued at each of them, without top-p and top-k."""
    new_tokens: int = 128
    """Of each continuation at most."""
    rows: int = 64
    """Continuations of a step. All are learnt once before one is learnt again."""
    steps: int = 300
    share: float = 1.0
    """Share of training's peak rates that the first steps take; it falls to zero in a straight line."""


class Row(NamedTuple):
    """A prompt and what the model wrote after it."""

    tokens: list[int]
    prompt: int
    """Tokens of the prompt."""


def learners(model: Network) -> list[Idea]:
    """Return the ideas that learn from the model's own text.

    Raises:
        InputError: there are none.
    """
    found = [idea for idea in model.ideas.values() if idea.learns_from_own_text]
    if not found:
        raise InputError("no idea of this model learns from its own text: it was built without drafts")
    return found


def write(model: Network, prompts: Sequence[Sequence[int]], how: OwnText) -> list[Row]:
    """Return `prompts` with what the model writes after them, at each temperature.

    With many at once drafts would save no time, so there are none. What `Lepton.warm_up(..., speculative=False)` has
    compiled is used.
    """
    rows = []
    for temperature in how.temperatures:
        options = GenerationOptions(temperature=temperature, top_p=1.0, seed=0, use_speculative=False)
        texts = complete(model, prompts, how.new_tokens, options=options).rows
        rows += [Row(text, len(prompt)) for text, prompt in zip(texts, prompts, strict=True)]
    return rows


def learn(
    model: Network, rows: Sequence[Row], how: OwnText, say: Callable[[int, int, float], None] = lambda *_: None
) -> None:
    """Train the ideas that learn from the model's own text on `rows`; nothing else of the model changes.

    Args:
        model: a trained model, in eval mode, which it stays in.
        rows: what `write` returned.
        how: the amount and the rates.
        say: called now and then with the step, the number of steps and the mean loss of the step in nats.

    Raises:
        InputError: no idea learns from such text, or a loss is not finite.
    """
    ideas = learners(model)
    needed = {id(parameter): parameter.requires_grad for parameter in model.parameters()}
    own = {id(parameter) for idea in ideas for parameter in idea.parameters()}
    try:
        for parameter in model.parameters():
            parameter.requires_grad_(id(parameter) in own)
        lr, muon_lr = how.share * PEAK.lr, how.share * PEAK.muon_lr
        optimizers = Optimizers(model, kind="muon", lr=lr, muon_lr=muon_lr, weight_decay=0.0, captured=False)
        for step, some in enumerate(islice(_batches(rows, how.rows), how.steps)):
            loss = _loss(model, ideas, some)
            loss.backward()
            optimizers.step(lr_scale(step, max_steps=how.steps, warmup_steps=10, cooldown=1.0, min_lr_ratio=0.0), 1.0)
            if step % 20 == 0 or step == how.steps - 1:
                nats = loss.item()
                if not math.isfinite(nats):
                    raise InputError(f"the loss of step {step} is {nats}: the checkpoint's weights have diverged")
                say(step + 1, how.steps, nats)
    finally:
        for parameter in model.parameters():
            parameter.requires_grad_(needed[id(parameter)])
            parameter.grad = None


def _batches(rows: Sequence[Row], size: int) -> Iterator[list[Row]]:
    """Yield batches without end; each pass over the rows has an order of its own."""
    generator = torch.Generator().manual_seed(0)
    while True:
        order = torch.randperm(len(rows), generator=generator).tolist()
        for first in range(0, len(order), size):
            yield [rows[index] for index in order[first : first + size]]


def _loss(model: Network, ideas: Sequence[Idea], rows: Sequence[Row]) -> Tensor:
    """Return the weighted mean loss of the ideas at the tokens that the model wrote."""
    lengths_B = torch.tensor([len(row.tokens) for row in rows])
    index_T = torch.arange(int(lengths_B.max()))
    tokens_BT = torch.tensor([row.tokens + [0] * (len(index_T) - len(row.tokens)) for row in rows])
    prompt_B = torch.tensor([row.prompt for row in rows])
    counted_BT = (index_T[1:] >= prompt_B[:, None]) & (index_T[1:] < lengths_B[:, None])
    tokens_BT, lengths_B, counted_BT = (each.to(model.device) for each in (tokens_BT, lengths_B, counted_BT))
    with torch.no_grad():
        out = model.trunk(tokens_BT[:, :-1])
    following_BT = tokens_BT[:, 1:].masked_fill(~counted_BT, IGNORE)
    there_BT = torch.arange(following_BT.shape[1], device=model.device) < lengths_B[:, None]
    position_BT = out.flow.timeline.position_BT.masked_fill(~there_BT, -1)
    outcome = Outcome(model, out.hidden, out.flow, following_BT, position_BT, None)
    losses = [(idea.loss_weights[name], loss) for idea in ideas for name, loss in idea.own_text_losses(outcome).items()]
    return torch.stack([weight * loss for weight, loss in losses]).sum() / sum(weight for weight, _ in losses)
