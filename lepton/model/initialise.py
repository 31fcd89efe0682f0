"""Initial values of all parameters and buffers, in one place."""

import torch
from torch import nn

from lepton.model.draft import Drafter
from lepton.model.memory import WorkingMemory
from lepton.model.router import QUANTILES, Router
from lepton.model.uncertainty import Uncertainty

# Ends of the names of matrices that start at zero, so that what they lead to begins as nothing added.
ZERO = (
    "attention.out.weight",
    "mlp.down.weight",
    "memory.out.weight",
    "peek.back.weight",
    "router.exit_down.weight",
    "drafter.down.weight",
    "uncertainty.out.weight",
)


@torch.no_grad()
def initialise(model: nn.Module) -> None:
    """Initialise `model`, from torch's global generator.

    | parameter                               | value                      | why                                       |
    | --------------------------------------- | -------------------------- | ----------------------------------------- |
    | embed                                   | normal, std 0.02           | tied: logits start small; input is normed |
    | attention.out, mlp.down                 | zero                       | each block starts as the identity         |
    | memory.out, peek.back, router.exit_down | zero                       | the ideas start by adding nothing         |
    | drafter.down, uncertainty.out           | zero                       | likewise                                  |
    | thoughts.start                          | normal, std 1              | slots must differ to think differently    |
    | memory.conv                             | 1 on the token, else 0     | starts as no convolution                  |
    | memory.decay_bias                       | 2 ... 6 over the heads     | half-lives of about 5 to 280 tokens       |
    | other biases                            | zero                       |                                           |
    | every other matrix                      | normal, std 1/sqrt(inputs) | unit scale in, unit scale out             |
    | router.quantiles                        | those of a unit normal     | what the initial scores are               |
    | drafter.ids                             | the first ids              | byte-pair ids come by frequency           |
    | uncertainty.calibration                 | scale 1, shift 0           | not calibrated yet                        |
    """
    if any(parameter.is_meta for parameter in model.parameters()):
        return  # there is no memory for values
    for name, parameter in model.named_parameters():
        if name.endswith("embed.weight"):
            nn.init.normal_(parameter, std=0.02)
        elif name.endswith(ZERO) or parameter.dim() == 1:
            nn.init.zeros_(parameter)
        elif name.endswith("thoughts.start"):
            nn.init.normal_(parameter)
        else:
            nn.init.normal_(parameter, std=parameter.shape[1] ** -0.5)
    for module in model.modules():
        if isinstance(module, WorkingMemory):
            module.conv.zero_()[:, 0] = 1
            module.decay_bias.copy_(torch.linspace(2, 6, module.heads))
        elif isinstance(module, Router):
            probability = torch.linspace(0, 1, QUANTILES).clamp(1e-3, 1 - 1e-3)
            module.quantiles.copy_(2**0.5 * torch.erfinv(2 * probability - 1))
        elif isinstance(module, Drafter):
            module.ids.copy_(torch.arange(module.vocab_size))
        elif isinstance(module, Uncertainty):
            module.calibration.copy_(torch.tensor([1.0, 0.0]))
