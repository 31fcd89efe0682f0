"""What a training step computes, counted from shapes: forward and backward passes, and the losses of the ideas."""

from lepton.model import Lepton
from lepton.model.accounting import flops_per_token, weights
from lepton.model.objective import DRAFT_STRIDE, OUTCOME_STRIDE
from lepton.model.thoughts import MAX_TRAINING_ROUNDS, USUAL_ROUNDS, late_rows
from lepton.train.thinking import usual_groups


def training_flops_per_token(model: Lepton, rows: int, length: int) -> float:
    """Floating-point operations per target of `rows` of `length` targets, without the optimizer's.

    A backward pass costs each product twice over, once for its input and once for its matrix; where one of the two has
    no gradient, once. Counted is what runs: all the rounds of thinking that there is room for, and the usual number of
    segments. What is computed again with `checkpoint_activations` is not counted.
    """
    config = model.config
    late = (MAX_TRAINING_ROUNDS - USUAL_ROUNDS) * late_rows(rows) / rows
    think = USUAL_ROUNDS + late if model.thoughts is not None else None
    total = 3 * flops_per_token(model, length, think=think, groups=usual_groups(length, config.segment))
    head = config.padded_vocab_size * model.embed.embedding_dim + weights(model.head_down)
    if model.router is not None:
        router = model.router
        total -= 2 * weights(router.benefit)  # it reads stopped gradients
        total += 2 * (2 * weights(router.exit_up) + 3 * weights(router.exit_down) + 2 * head) / OUTCOME_STRIDE
    if model.uncertainty is not None:
        doubt = model.uncertainty
        total -= 3 * 2 * weights(doubt)  # the loss looks at samples alone
        total += 2 * (2 * weights(doubt.state, doubt.features) + 3 * weights(doubt.out) + head) / OUTCOME_STRIDE
    if model.drafter is not None:
        drafter = model.drafter
        step = 2 * weights(drafter.token) + 3 * weights(drafter.up, drafter.down, drafter.leave)
        step += 2 * config.draft_vocab * model.embed.embedding_dim
        total += 2 * (2 * weights(drafter.enter) + config.drafts * step) / DRAFT_STRIDE
    if model.peek is not None:
        peek = model.peek
        total += 2 * (2 * weights(peek.up) + 3 * weights(peek.down, peek.summary)) / DRAFT_STRIDE
    return total
