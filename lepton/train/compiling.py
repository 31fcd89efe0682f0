"""Compiling the loss, or saying why not."""

from collections.abc import Callable
from typing import TypeAlias

import torch

from lepton.model import Lepton
from lepton.model.loss import Loss
from lepton.train.thinking import plan_thoughts

LossFunction: TypeAlias = Callable[..., Loss]


def compiled_loss(model: Lepton, batch_size: int, seq_len: int, say: Callable[[str], None]) -> LossFunction:
    """Return `model.loss` compiled for batches of this shape, or as it is where this machine cannot compile.

    It is tried once, forward and backward, so that a missing compiler shows here and not amid a run.
    """
    say("compiling, which takes a minute or so; --no_compile starts at once and runs slower")
    device = model.embed.weight.device
    tokens = torch.full((batch_size, seq_len + 1), model.config.eos_id + 1, device=device)
    think, groups = plan_thoughts(model.config, tokens.cpu(), seed=0, step=0, micro=0)
    lengths = torch.full((batch_size,), seq_len + 1, device=device)
    compiled: LossFunction = torch.compile(model.loss, dynamic=False)
    try:
        think = None if think is None else think.to(device)
        compiled(tokens, lengths=lengths, think=think, groups=groups).loss.backward()
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # compilers fail in many ways; none of them should stop a run that works without
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        say(f"cannot compile here ({reason}): going on without, which runs slower")
        return model.loss
    finally:
        model.zero_grad(set_to_none=True)
    return compiled
