"""Small models behind the interface of transformers."""

import torch

from lepton.api import Lepton
from lepton.hf.conversion import from_lepton
from lepton.hf.modeling import LeptonForCausalLM
from tests.generate.models import lively
from tests.laws.lab import VOCAB

CLOSE = {"rtol": 0, "atol": 1e-5}
"""In fp32."""


def pair(variant: str = "complete", dtype: torch.dtype = torch.float32) -> tuple[Lepton, LeptonForCausalLM]:
    """Return a model of LEPTON, and the same one for transformers."""
    model = lively(variant, dtype)
    return model, from_lepton(model)


def text(length: int, rows: int = 1, seed: int = 3, ends: bool = True) -> torch.Tensor:
    """Return random tokens [rows, length]; with `ends`, one in about 30 ends a document."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(1, VOCAB, (rows, length), generator=generator)
    if ends:
        tokens[torch.rand(tokens.shape, generator=generator) < 1 / 30] = 0
    return tokens


def left_padded(parts: list[torch.Tensor], filler: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return rows [T] as a batch padded on the left, and its attention mask."""
    width = max(map(len, parts))
    rows = [torch.cat([torch.full((width - len(part),), filler), part]) for part in parts]
    mask = [torch.cat([torch.zeros(width - len(part)), torch.ones(len(part))]) for part in parts]
    return torch.stack(rows), torch.stack(mask).long()
