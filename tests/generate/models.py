"""Prompts, models whose greedy text varies, and drafters that know it."""

import contextlib
from collections.abc import Iterator
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from lepton.api import Lepton
from lepton.engine.speculation import Speculation
from lepton.model.ideas.idea import Idea
from tests.laws.lab import build

# Its last token stands where no segment opens by itself.
PROMPT = [5, 9, 33, 71, 9, 2, 60, 61, 62, 63, 64, 8, 14, 12]
BATCH = [PROMPT, [7], [3, 1, 4, 1, 5, 9, 2, 6], PROMPT * 2]


def lively(variant: str, dtype: torch.dtype = torch.float64, **changes) -> Lepton:
    """A model whose blocks outweigh the embedding: one that is only shaken would repeat the last token forever."""
    shaken = build(variant)
    model = Lepton(shaken.config.replace(**changes)).double()
    model.load_state_dict(dict(shaken.state_dict()))  # under this model's configuration
    return enlivened(model).to(dtype).eval()


def enlivened(model: Lepton) -> Lepton:
    """Return the model with noise where its blocks write."""
    generator = torch.Generator().manual_seed(5)
    for name, parameter in model.named_parameters():
        if name.endswith(("attention.out.weight", "mlp.down.weight")):
            noise = torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
            parameter.data += 6 * noise / parameter.shape[-1] ** 0.5
    return model


@contextlib.contextmanager
def always_drafting() -> Iterator[None]:
    """Draft in every cycle, whether it pays or not."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Speculation, "choose", lambda self, bucket: self.choices[-1])
        yield


class Path(NamedTuple):
    """What an `Oracle` is in decoding; its cell's state is the place of the next token."""

    ids_Z: Tensor
    hidden_PD: Tensor
    drafted_P: Tensor

    def begin(self, seen_BF: Tensor, _embedded_BE: Tensor) -> Tensor:
        distance_B, place_B = torch.cdist(seen_BF.double(), self.hidden_PD.double()).min(-1)
        assert distance_B.max() < 1e-3, "the text left the known path"
        return self.step(place_B, place_B)

    def step(self, place_B: Tensor, _column_B: Tensor) -> Tensor:
        return (place_B + 1).clamp(max=len(self.drafted_P) - 1)

    def logits(self, place_B: Tensor) -> Tensor:
        return 100.0 * nn.functional.one_hot(self.drafted_P[place_B], len(self.ids_Z))


class Oracle(Idea):
    """A drafter that recognises where in known texts it is, and drafts what comes, or a wrong token where told to."""

    def __init__(self, count: int, vocab_size: int, hidden_PD: Tensor, following_P: Tensor, wrong_P: Tensor) -> None:
        super().__init__()
        self.count = count
        self.ids = torch.arange(vocab_size)
        self.hidden_PD, self.following_P, self.wrong_P = hidden_PD, following_P, wrong_P

    @property
    def seen_width(self) -> int:
        return self.hidden_PD.shape[1]

    def seen(self, hidden_BTD: Tensor, _flow: Any) -> Tensor:
        return hidden_BTD

    def prepared(self, *_: Any) -> Path:
        return Path(self.ids, self.hidden_PD, (self.following_P + self.wrong_P) % len(self.ids))


def oracle(
    model: Lepton, prompts: list[list[int]], new: int, *, count: int = 4, right: float = 1.0, **options
) -> Oracle:
    """A drafter that knows the greedy continuations, and is right at a share `right` of the places."""
    hidden, following = [], []
    plain = {"temperature": 0, "use_speculative": False}
    for prompt, tokens in zip(prompts, model.generate(prompts, new, **plain, **options), strict=True):
        opens = torch.arange(len(tokens))[None] == len(prompt) - 1
        hidden.append(model.trunk(torch.tensor([tokens]), opens=opens, **options).hidden[0])
        following.append(torch.tensor([*tokens[1:], 0]))
    places = sum(map(len, following))
    wrong = torch.rand(places, generator=torch.Generator().manual_seed(1)) >= right
    return Oracle(count, model.config.vocab_size, torch.cat(hidden).detach(), torch.cat(following), wrong.long())
