"""Small models and texts on which the laws are tested, and what it means for two results to be equal.

An idea joins the laws by a line here: a variant that switches it off, and the names of its outputs.
"""

import torch
from torch import Tensor

from lepton.config import LeptonConfig
from lepton.model import Lepton, Output, State

VOCAB = 97
EOS = 0
LENGTH = 100
SHAPE = {"width": 32, "layers": 4, "heads": 4, "kv_heads": 2, "head_dim": 8, "ffn": 64, "vocab_size": VOCAB}

# Everything on, then each idea off, then the baseline.
VARIANTS: dict[str, dict] = {
    "complete": {"window": 8},
    "factorised": {"window": 8, "embed_rank": 16},
    "wide window": {"window": 37},
    "dense": {"window": None, "dense": True},
}
CANARIES = ("complete", "dense")
# Per-position outputs [B, T, ...] of a forward pass that the laws speak of.
OUTPUTS = ("logits", "hidden_BTD")


def build(variant: str, seed: int = 0, dtype: torch.dtype = torch.float64) -> Lepton:
    """A small model whose parameters are all shaken: zero initialisation would hide leaks."""
    torch.manual_seed(seed)
    model = Lepton(LeptonConfig(**SHAPE, **VARIANTS[variant]))
    for parameter in model.parameters():
        parameter.data += 0.3 * torch.randn_like(parameter) / parameter.shape[-1] ** 0.5
    return model.to(dtype)


def text(seed: int, rows: int = 2, length: int = LENGTH, documents: bool = True) -> Tensor:
    """Random tokens, with document ends sprinkled in."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(1, VOCAB, (rows, length), generator=generator)
    if documents:
        tokens[torch.rand(rows, length, generator=generator) < 0.04] = EOS
    return tokens


def views(out: Output) -> dict[str, Tensor]:
    return {name: getattr(out, name) for name in OUTPUTS}


def tolerance(dtype: torch.dtype) -> float:
    return 1e-9 if dtype == torch.float64 else 1e-4


def assert_outputs(expected: dict[str, Tensor], got: dict[str, Tensor], what: object) -> None:
    """Compare per-position outputs that were sliced to the same rows and positions."""
    for name in OUTPUTS:
        worst = (expected[name] - got[name]).abs().max().item() if got[name].numel() else 0.0
        assert worst <= tolerance(got[name].dtype), f"{what}: {name} differs by {worst:.2e}"


def cut(views: dict[str, Tensor], rows: slice | Tensor, columns: slice) -> dict[str, Tensor]:
    return {name: value[rows, columns] for name, value in views.items()}


def assert_states(expected: State, got: State, what: object) -> None:
    """Compare states; a dense state may hold more columns than the row needs, all zero and to the left."""
    assert torch.equal(expected.position_B, got.position_B), f"{what}: position"
    for name in ("keys_BLRKH", "values_BLRKH"):
        a, b = getattr(expected, name), getattr(got, name)
        shared = min(a.shape[2], b.shape[2])
        for longer in (a, b):
            assert not longer[:, :, : longer.shape[2] - shared].any(), f"{what}: {name} keeps what is out of sight"
        a, b = a[:, :, a.shape[2] - shared :], b[:, :, b.shape[2] - shared :]
        worst = (a - b).abs().max().item() if a.numel() else 0.0
        assert worst <= tolerance(a.dtype), f"{what}: {name} differs by {worst:.2e}"
