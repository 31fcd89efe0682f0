"""Small models and texts on which the laws are tested, and what it means for two results to be equal.

An idea joins the laws by a line here: a variant that switches it off, and the names of its outputs.
"""

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from lepton.api import Lepton, Output, State
from lepton.config import LeptonConfig
from lepton.model.state import flatten

VOCAB = 97
EOS = 0
LENGTH = 100
SHAPE = {
    "width": 32,
    "layers": 4,
    "heads": 4,
    "kv_heads": 2,
    "head_dim": 8,
    "ffn": 64,
    "shifted_keys": True,
    "token_shift": True,
    "backout": True,
    "vocab_size": VOCAB,
}
IDEAS = {
    "window": 8,
    "wide_window": 20,
    "segment": 4,
    "thoughts": 2,
    "thought_ffn": 32,
    "memory_heads": 2,
    "key_dim": 8,
    "value_dim": 8,
    "slots": 5,
    "crystals": 2,
    "hint": 8,
    "peek": 4,
    "exit_width": 16,
    "capacity_window": 8,
    "draft_width": 16,
    "draft_vocab": 40,
}
# Exit, router and ignorance as they learn when they are to be used.
ROUTED = {
    "uncertainty.pairs": 3,
    "router.into_stem": 0.1,
    "router.exit_stride": 5,
    "router.distil": True,
    "router.expected": True,
    "router.reads_exit": True,
    "router.served": 0.75,
}

# Everything on, then each idea off, then the baseline. Two are also without a part of the trunk.
VARIANTS: dict[str, dict] = {
    "complete": IDEAS,
    "over tokens": {**IDEAS, "thoughts.over_tokens": True, "memory.tied_decay": True, "memory.reads": 3},
    "no thoughts": {**IDEAS, "thoughts": 0},
    "no working memory": {**IDEAS, "memory_heads": 0},
    "no crystals": {**IDEAS, "slots": 0},
    "no peek": {**IDEAS, "hint": 0},
    "no router": {**IDEAS, "router": False},
    "no drafts": {**IDEAS, "drafts": 0},
    "no uncertainty": {**IDEAS, "uncertainty": False, "token_shift": False, "backout": False, "wide_window": None},
    "factorised, own keys": {**IDEAS, "embed_rank": 16, "shifted_keys": False, "drafter.reads_stem": True},
    "odd edges": {
        **IDEAS,
        "window": 37,
        "wide_window": 41,
        "segment": 5,
        "slots": 3,
        "crystals": 1,
        "capacity_window": 7,
        **ROUTED,
    },
    "dense": {"dense": True, "window": None},
}
CANARIES = ("complete", "dense")
# Outputs [B, T, ...] of a forward pass that the laws speak of, and what the ideas did on the way.
OUTPUTS = ("logits", "hidden", "uncertainty", "depth", "signals")
GIVEN = ("feature_BTF", "signal_BT", "deep_BT")


def once_a_device(make: Callable[..., Lepton]) -> Callable[..., Lepton]:
    """`functools.cache` for models: one that a test made on a CPU is none for a GPU."""
    cached = functools.cache(lambda _device, *args, **options: make(*args, **options))
    return functools.wraps(make)(lambda *args, **options: cached(torch.get_default_device(), *args, **options))


def build(variant: str, seed: int = 0, dtype: torch.dtype = torch.float64, **overrides) -> Lepton:
    """A small model whose parameters are all shaken: zero initialisation would hide leaks."""
    torch.manual_seed(seed)
    with torch.device("cpu"):  # the same one on every device
        model = Lepton(LeptonConfig.from_dict({**SHAPE, **VARIANTS[variant], **overrides}))
    for parameter in model.parameters():
        parameter.data += 0.3 * torch.randn_like(parameter) / parameter.shape[-1] ** 0.5
    if model.crystals is not None:
        model.crystals.score.weight.data *= 3
    return model.to(torch.get_default_device(), dtype)


def half_depth(variant: str) -> dict:
    """Routing at half depth, where the variant can."""
    shape = VARIANTS[variant]
    return {"depth": 0.5} if shape.get("router", True) and not shape.get("dense") else {}


def text(seed: int, rows: int = 2, length: int = LENGTH, documents: bool = True) -> Tensor:
    """Random tokens, with document ends sprinkled in."""
    with torch.device("cpu"):
        generator = torch.Generator().manual_seed(seed)
        tokens = torch.randint(1, VOCAB, (rows, length), generator=generator)
        if documents:
            tokens[torch.rand(rows, length, generator=generator) < 0.04] = EOS
    return tokens.to(torch.get_default_device())


def views(out: Output) -> dict[str, Tensor]:
    """Every output by its name, without those of ideas that are off."""
    found = {name: getattr(out, name) for name in OUTPUTS}
    for idea, given in out.flow.contributions.items():
        found |= {f"{idea}: {name}": getattr(given, name) for name in GIVEN}
    return {name: value for name, value in found.items() if value is not None}


def tolerance(dtype: torch.dtype) -> float:
    return 1e-9 if dtype == torch.float64 else 1e-4


def assert_outputs(expected: dict[str, Tensor], got: dict[str, Tensor], what: object) -> None:
    """Compare per-position outputs that were sliced to the same rows and positions."""
    assert expected.keys() == got.keys()
    for name, value in got.items():
        assert_close(expected[name], value, f"{what}: {name}")


def assert_close(expected: Tensor, got: Tensor, what: str) -> None:
    """Floats agree within the tolerance of their dtype; anything discrete is equal."""
    if not got.dtype.is_floating_point:
        assert torch.equal(expected, got), f"{what} differs"
    elif got.numel():
        worst = (expected - got).abs().max().item()
        assert worst <= tolerance(got.dtype), f"{what} differs by {worst:.2e}"


def cut(views: dict[str, Tensor], rows: slice | Tensor, columns: slice) -> dict[str, Tensor]:
    return {name: value[rows, columns] for name, value in views.items()}


def assert_states(expected: State, got: State, what: object) -> None:
    """Compare states; a dense state may hold more columns than the row needs, all zero and to the left."""
    left, right = flatten(expected), flatten(got)
    assert left.keys() == right.keys()
    for name, a in left.items():
        b = right[name]
        if name.endswith("_BLRKH"):
            shared = min(a.shape[2], b.shape[2])
            for longer in (a, b):
                assert not longer[:, :, : longer.shape[2] - shared].any(), f"{what}: {name} keeps what is out of sight"
            a, b = a[:, :, a.shape[2] - shared :], b[:, :, b.shape[2] - shared :]
        assert_close(a, b, f"{what}: {name}")
