"""What a run measures on held-out data between its steps: the loss, and figures of the ideas."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lepton.data.shards import ShardedDataset
from lepton.data.tokenizer import Tokenizer
from lepton.evals.positions import collect_outcomes, evaluation_batches
from lepton.evals.reliability import calibration_error
from lepton.generate.completion import complete
from lepton.model import Network
from lepton.train.sample import beginning

FIGURE_TOKENS, FIGURE_NEW_TOKENS = 1024, 32
"""Held-out tokens and new tokens that the ideas' figures are measured on."""


@torch.no_grad()
def validation_loss(
    model: Network,
    data: ShardedDataset,
    tokenizer: Tokenizer,
    *,
    batch_size: int,
    limit: int | None,
    loss_of: Callable[[Tensor, Tensor, Tensor | None], Tensor],
) -> tuple[float, float]:
    """Return the mean loss of `model` on `data` in nats per token, and the same in bits per byte of text.

    Of conversations, the tokens of answers count alone.

    Bits per byte counts the UTF-8 bytes of the predicted tokens, so it compares models with different tokenizers.

    Args:
        model: left in the mode (train or eval) that it came in.
        data: a validation split.
        tokenizer: the one that `data` was made with.
        batch_size: windows at a time.
        limit: batches at most; None: all.
        loss_of: gives the mean loss of a batch's tokens, lengths and targets, such as `HeldOutLoss`.
    """
    device = model.device
    bytes_of_id = np.zeros(model.config.vocab_size, dtype=np.int64)
    bytes_of_id[: tokenizer.size] = tokenizer.token_bytes()
    training = model.training
    model.eval()
    total = torch.zeros((), device=device)
    targets = text_bytes = 0
    for batch in data.batches(batch_size, limit):
        tokens, lengths, _ = batch
        total += loss_of(*batch).float() * batch.counted
        targets += batch.counted
        valid = torch.arange(1, tokens.shape[1]) < lengths[:, None]
        valid = valid if batch.targets is None else valid & batch.targets
        text_bytes += int(bytes_of_id[tokens[:, 1:][valid].numpy()].sum())
    model.train(training)
    nats = float(total)
    return nats / max(targets, 1), nats / math.log(2) / max(text_bytes, 1)


@torch.no_grad()
def idea_figures(model: Network, data: ShardedDataset, *, batch_size: int) -> dict[str, float]:
    """Return figures of the ideas on held-out text, without those of ideas that `model` lacks.

    `mean_depth` is the mean number of blocks per token and `tokens_per_step` that of tokens per pass when drafting,
    both in one greedy continuation; `calibration_error` is that of the uncertainty.
    """
    figures: dict[str, float] = {}
    training = model.training
    model.eval()
    if model.idea("uncertainty") is not None:
        outcomes = collect_outcomes(model, evaluation_batches(data, batch_size, FIGURE_TOKENS), FIGURE_TOKENS)
        assert outcomes.uncertainty_logit_M is not None
        scale, shift = model.idea("uncertainty").calibration.double().tolist()
        chance_M = torch.sigmoid(scale * outcomes.uncertainty_logit_M + shift)
        figures["calibration_error"] = round(calibration_error(chance_M, outcomes.wrong_M), 4)
    if model.idea("drafter") is not None:
        stats = complete(model, beginning(data), FIGURE_NEW_TOKENS, temperature=0.0, always_draft=True).stats
        figures["tokens_per_step"] = round(stats.tokens_per_step, 3)
        figures["mean_depth"] = round(stats.mean_depth, 3)
    model.train(training)
    return figures


def in_words(validation: dict[str, Any], layers: int) -> str:
    """Return the figures of a validation in words; those of ideas that the model lacks are missing."""
    ideas = {
        "tokens_per_step": "{:.2f} tokens per model pass when drafting",
        "mean_depth": f"{{:.1f}} of {layers} blocks per token",
        "calibration_error": "chance of error misjudged by {:.1%} on average",
    }
    loss = f"validation loss {validation['val_loss']:.4f} nats per token, {validation['val_bpb']:.4f} bits per byte"
    figures = [text.format(validation[name]) for name, text in ideas.items() if name in validation]
    return f"step {validation['step']:,}: {'; '.join([loss, *figures])}"
