"""A small trial of the trunk, and its model, for tests."""

import torch

from benchmarks.trunk_model import TrunkModel
from benchmarks.trunk_switches import Trial

SMALL = {
    "name": "small",
    "size": "nano",
    "width": 32,
    "layers": 4,
    "heads": 4,
    "kv_heads": 2,
    "head_dim": 16,
    "ffn": 48,
    "embed_rank": 24,
    "vocab_size": 97,
    "rows": 2,
    "seq_len": 20,
    "tokens": 2 * 20 * 20,
}


def small(**changes):
    """Return a trial of 20 steps."""
    return Trial.read({**SMALL, **changes})


def shaken(trial):
    """Return the model of a trial with random parameters, equal for equal names: those that begin as 0 hide much."""
    torch.manual_seed(0)
    model = TrunkModel(trial)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(sum(name.encode())))
            parameter.copy_(noise * (parameter.shape[-1] ** -0.5 if parameter.dim() > 1 else 0.5))
    return model


def rows(trial, seed=0):
    """Return tokens [B, T + 1], none of which ends a document, and their lengths."""
    generator = torch.Generator().manual_seed(seed)
    shape = (trial.rows, trial.seq_len + 1)
    tokens = torch.randint(1, trial.vocab_size, shape, generator=generator)
    return tokens, torch.full((trial.rows,), trial.seq_len + 1)
