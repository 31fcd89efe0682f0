"""The loss of `LeptonForCausalLM`: cross-entropy, and in training what the ideas learn from."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lepton.model import Network, Output
from lepton.model.ideas.idea import Outcome
from lepton.ops.cross_entropy import IGNORE, Z_WEIGHT


def following(labels_BT: Tensor) -> Tensor:
    """Return the label of the token after each; after the last there is none."""
    return torch.cat([labels_BT[:, 1:], labels_BT.new_full((len(labels_BT), 1), IGNORE)], 1)


def training_loss(
    network: Network,
    out: Output,
    logits_BTV: Tensor,
    labels_BT: Tensor,
    cross_entropy: Callable[..., Tensor],
    **options: Any,
) -> Tensor:
    """Return the loss of a pass without a past.

    In training it is that of `Network.loss`: the small losses of the ideas and of the log-normaliser are added. They
    keep drafts, uncertainty and routing true to the trunk that changes, and move none of its weights but through the
    log-normaliser.

    Args:
        network: in training mode or not.
        out: the pass over all tokens, padding on the right.
        logits_BTV: its logits.
        labels_BT: the tokens to predict, `IGNORE` where a prediction does not count.
        cross_entropy: that of transformers, with the arguments `logits`, `labels`, `vocab_size` and `options`.
        options: such as `num_items_in_batch`, the predictions that the steps of an accumulation have in all.
    """
    following_BT = following(labels_BT)
    ce = cross_entropy(
        logits=logits_BTV, labels=labels_BT, shift_labels=following_BT, vocab_size=logits_BTV.shape[-1], **options
    )
    if not network.training:
        return ce
    valid_M = (following_BT != IGNORE).flatten()
    count = valid_M.sum().clamp(min=1)
    z = (logits_BTV.logsumexp(-1).flatten().square() * valid_M).sum() / count
    total = Z_WEIGHT * z + ideas_loss(network, out, logits_BTV, following_BT)
    in_all = options.get("num_items_in_batch")
    return ce + (total if in_all is None else total * count / in_all)


def ideas_loss(network: Network, out: Output, logits_BTV: Tensor, following_BT: Tensor) -> Tensor:
    """Return the weighted sum of the ideas' losses; 0 for a model without any."""
    index_T = torch.arange(following_BT.shape[1], device=following_BT.device)
    position_BT = out.flow.timeline.position_BT.masked_fill(index_T >= out.lengths[:, None], -1)
    nats_M = torch.nn.functional.cross_entropy(
        logits_BTV.detach().flatten(0, 1), following_BT.flatten(), ignore_index=IGNORE, reduction="none"
    )
    outcome = Outcome(network, out.hidden, out.flow, following_BT, position_BT, nats_M)
    total = logits_BTV.new_zeros(())
    for idea in reversed([*network.ideas.values()]):
        for name, value in idea.losses(outcome).items():
            total = total + idea.loss_weights[name] * value
    return total
