"""Looking at a model from outside: its loss on held-out data, and a sample of what it writes."""

import math

import numpy as np
import torch

from lepton.data.shards import ShardedDataset
from lepton.data.tokenizer import Tokenizer
from lepton.generate.engine import generate, generate_with_stats
from lepton.model import Lepton
from lepton.train.calibration import calibration_error, collect, evaluation_batches

PROMPT_TOKENS = 16
FIGURE_TOKENS, FIGURE_NEW_TOKENS = 1024, 32
"""Held-out tokens and new tokens that the ideas' figures are measured on."""


@torch.no_grad()
def evaluate(
    model: Lepton, data: ShardedDataset, tokenizer: Tokenizer, *, batch_size: int, limit: int | None
) -> tuple[float, float]:
    """Return the mean loss of `model` on `data` in nats a token, and the same in bits per byte of text.

    Bits per byte counts the UTF-8 bytes of the predicted tokens, so it compares models with different tokenizers.

    Args:
        model: left in the mode (train or eval) that it came in.
        data: a validation split.
        tokenizer: the one that `data` was made with.
        batch_size: windows at a time.
        limit: batches at most; None: all.
    """
    device = model.embed.weight.device
    bytes_of_id = np.zeros(model.config.vocab_size, dtype=np.int64)
    bytes_of_id[: tokenizer.size] = tokenizer.token_bytes()
    training = model.training
    model.eval()
    total = torch.zeros((), device=device)
    targets = text_bytes = 0
    for tokens, lengths in data.batches(batch_size, limit):
        count = int(lengths.sum()) - len(lengths)
        parts = model.loss(tokens.to(device), lengths=lengths.to(device), auxiliary=False).parts
        total += parts["ce"].float() * count
        targets += count
        valid = torch.arange(1, tokens.shape[1]) < lengths[:, None]
        text_bytes += int(bytes_of_id[tokens[:, 1:][valid].numpy()].sum())
    model.train(training)
    nats = float(total)
    return nats / targets, nats / math.log(2) / max(text_bytes, 1)


@torch.no_grad()
def idea_figures(model: Lepton, data: ShardedDataset, *, batch_size: int) -> dict[str, float]:
    """Return what the ideas do on held-out text, without those that `model` lacks.

    `mean_depth` is the mean number of blocks a token goes through and `tokens_a_cycle` what speculation gives, both in
    one greedy continuation; `calibration_error` is that of the uncertainty.
    """
    figures: dict[str, float] = {}
    training = model.training
    model.eval()
    if model.idea("uncertainty") is not None:
        outcomes = collect(model, evaluation_batches(data, batch_size, FIGURE_TOKENS), FIGURE_TOKENS)
        assert outcomes.logit_M is not None
        scale, shift = model.idea("uncertainty").calibration.double().tolist()
        chance_M = torch.sigmoid(scale * outcomes.logit_M + shift)
        figures["calibration_error"] = round(calibration_error(chance_M, outcomes.wrong_M), 4)
    if model.idea("drafter") is not None:
        _, stats = generate_with_stats(model, _beginning(data), max_new_tokens=FIGURE_NEW_TOKENS, temperature=0.0)
        figures["tokens_a_cycle"] = round(stats.tokens_a_cycle, 3)
        figures["mean_depth"] = round(stats.mean_depth, 3)
    model.train(training)
    return figures


def sample_text(
    model: Lepton, data: ShardedDataset, tokenizer: Tokenizer, *, prompt: str | None, max_new_tokens: int, seed: int
) -> str:
    """Return a prompt and what `model` continues it with; without a `prompt`, the beginning of `data`."""
    ids = _beginning(data) if prompt is None else tokenizer.encode(prompt)
    training = model.training
    model.eval()
    ids = generate(model, ids, max_new_tokens=max_new_tokens, seed=seed)
    model.train(training)
    return tokenizer.decode(ids)


def _beginning(data: ShardedDataset) -> list[int]:
    """Return the first tokens of `data`, at most PROMPT_TOKENS."""
    tokens, lengths = next(data.batches(1))
    ids: list[int] = tokens[0, : min(PROMPT_TOKENS, int(lengths[0]))].tolist()
    return ids
