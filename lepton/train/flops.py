"""What a training step computes, counted from shapes: forward and backward passes, and the losses of the ideas."""

from lepton.model import Network
from lepton.model.flops import flops_per_token
from lepton.model.ideas.idea import Work, matrices
from lepton.train.thinking import usual_groups


def training_flops_per_token(model: Network, rows: int, length: int) -> float:
    """Floating-point operations per target of `rows` of `length` targets, without the optimizer's.

    A backward pass costs each product twice over, once for its input and once for its matrix; where one of the two has
    no gradient, once. Counted is what runs: all the rounds of thinking that there is room for, and the usual number of
    segments. What is computed again with `checkpoint_activations` is not counted.
    """
    config = model.config
    groups = usual_groups(length, config.segment)
    rounds = [idea.think_in_training(rows) for idea in model.ideas.values()]
    think = next((each for each in rounds if each is not None), None)
    work = Work(length, groups, think=think, rows=rows)
    head = matrices(model.head_down) + config.padded_vocab_size * model.embed.embedding_dim
    extra = sum(idea.extra_training_flops(work, head) for idea in model.ideas.values())
    return 3 * flops_per_token(model, length, think=think, groups=groups) + extra
