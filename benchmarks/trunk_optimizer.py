"""The optimizer of a trial of the trunk: AdamW, and a Muon with the parts that its switches name.

Matrices of one shape lie in one tensor, and so do their gradients, so that an update is a few large kernels. All rates
lie on the device: a step can be captured as a CUDA graph, with rates that change from step to step.
"""

import math
from collections.abc import Callable
from fnmatch import fnmatchcase
from typing import NamedTuple

import torch
from torch import Tensor, nn

from benchmarks.trunk_model import TrunkModel
from benchmarks.trunk_switches import Trial
from lepton.model.parameters import BACKOUT
from lepton.train.optimizer import EPS, orthogonal, split_parameters
from lepton.train.schedule import lr_scale

QUINTIC, QUINTIC_STEPS, NORM_EPS = (3.4445, -4.7750, 2.0315), 5, 1e-7
"""As in `torch.optim.Muon`."""
POLAR_EXPRESS = (
    (8.156554524902461, -22.48329292557795, 15.878769915207462),
    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
    (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
    (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
)
"""The coefficients a, b, c of ``a x + b x x' x + c x x' x x' x`` in each of five steps, by the method of Amsel et al.
2025 (arXiv 2505.16932) with a safety factor of 2 %: the numbers that modded-nanogpt published and nanochat uses."""
POLAR_MARGIN = 1.01
"""How much larger than the Frobenius norm the divisor is, since rounding must not lift a singular value above 1."""
MOMENT_SHARE = 0.1
"""Weight of the present update in the running second moments."""


class Rates(NamedTuple):
    """What changes from step to step, as tensors without dimensions on the device."""

    lr: Tensor
    momentum: Tensor
    decay: Tensor


class Stack(NamedTuple):
    """All matrices of one shape, [count, rows, columns] each."""

    matrices: Tensor
    gradients: Tensor
    averages: Tensor
    """Of the gradients: the momentum."""
    moments: Tensor
    """Second moments of the updates' rows, [count, rows, 1], or of the columns of wide matrices."""


class Group(NamedTuple):
    """How AdamW treats some parameters."""

    lr: float
    betas: tuple[float, float]
    decay: float = 0.0
    eps: float = EPS


def group_of(name: str, trial: Trial) -> Group:
    """Return how AdamW treats the parameter `name`."""
    table = {
        "embed.weight": Group(trial.embed_lr, trial.embed_betas or trial.betas),
        "head.weight": Group(trial.head_lr, trial.head_betas or trial.betas),
        "embed_up.weight": Group(trial.projection_lr, trial.betas, trial.projection_decay),
        "head_down.weight": Group(trial.projection_lr, trial.betas, trial.projection_decay),
        "*.mix.scale": Group(trial.scale_lr, (0.8, 0.95)),
        "*.mix.again": Group(trial.reinjection_lr, (0.96, 0.95)),
        "smear.*": Group(trial.smear_lr, trial.betas),
        "backout": Group(trial.backout_lr, trial.betas, eps=BACKOUT.eps or EPS),
        "*_conv.weight": Group(trial.conv_lr, (0.9, 0.95)),
        "*.head_gates.weight": Group(trial.gate_lr, (0.9, 0.95)),
    }
    (found,) = (group for pattern, group in table.items() if fnmatchcase(name, pattern))
    return found


def rates_of(trial: Trial, step: int) -> tuple[float, float, float]:
    """Return the share of the peak rates, Muon's momentum, and the share of its decay for the step number `step`."""
    steps = trial.steps
    scale = lr_scale(
        step,
        max_steps=steps,
        warmup_steps=trial.warmup_steps,
        cooldown=trial.cooldown,
        min_lr_ratio=trial.final_rate,
    )
    start, peak, end = trial.momentum
    rising, falling = min(trial.momentum_steps, steps), max(1, round(trial.cooldown * steps))
    momentum = start + (peak - start) * min(1.0, step / max(1, rising))
    if step >= steps - falling:
        momentum = peak + (end - peak) * (step - (steps - falling)) / falling
    decay = 1.0 if trial.decay_schedule == "constant" else 0.5 * (1 + math.cos(math.pi * step / steps))
    return scale, momentum, decay


def equilibrated(stack: Tensor) -> Tensor:
    """Return matrices whose rows have one norm, that of all of the matrix staying the same."""
    rows = stack.float().norm(dim=-1, keepdim=True)
    mean = rows.square().mean(-2, keepdim=True).sqrt()
    return stack * (mean / rows.clamp_min(1e-6)).to(stack.dtype)


def polar_express(stack: Tensor, dtype: torch.dtype) -> Tensor:
    """As `lepton.train.optimizer.orthogonal`, with singular values nearer to 1."""
    wide = stack.shape[-2] <= stack.shape[-1]
    x = (stack if wide else stack.mT).to(dtype)
    x = x / (POLAR_MARGIN * x.norm(dim=(-2, -1), keepdim=True)).clamp(min=NORM_EPS)
    for a, b, c in POLAR_EXPRESS:
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return (x if wide else x.mT).to(stack.dtype)


def norm_of(stack: Tensor) -> Tensor:
    """Return the Frobenius norm of each matrix of a stack, never 0, [count, 1, 1]."""
    return stack.norm(dim=(-2, -1), keepdim=True).clamp_min(1e-6)


def evened(update: Tensor, moments: Tensor) -> Tensor:
    """Divide each row of the updates (column, where they are wide) by a running mean of its size.

    The norm of each update stays. `moments`, the running means of the squares, take up those of `update`.
    """
    moments.lerp_(update.square().mean(-1 if moments.shape[-1] == 1 else -2, keepdim=True), MOMENT_SHARE)
    result = update * moments.clamp_min(1e-10).rsqrt()
    return result * (norm_of(update) / norm_of(result))


def update_stack(stack: Stack, rates: Rates, trial: Trial, dtype: torch.dtype) -> None:
    """Update the matrices of a stack by Muon with Nesterov momentum; matrices are orthogonalised in `dtype`."""
    matrices, gradients, averages, moments = stack
    averages.lerp_(gradients, 1 - rates.momentum)
    update = gradients.lerp(averages, rates.momentum)
    if trial.row_equilibration:
        update = equilibrated(update)
    if trial.newton_schulz == "polar_express":
        update = polar_express(update, dtype)
    else:
        update = orthogonal(update, dtype, QUINTIC, QUINTIC_STEPS, NORM_EPS)
    rows, columns = update.shape[-2:]
    if trial.renormalisation:
        update = update * (math.sqrt(min(rows, columns)) / norm_of(update))
    if trial.second_moments:
        update = evened(update, moments)
    shrink = rates.lr * rates.decay
    decaying = torch.where(update * matrices >= 0, shrink, 0) if trial.cautious else shrink
    matrices.mul_(1 - decaying).sub_(rates.lr * math.sqrt(max(1, rows / columns)) * update)


class TrunkOptimizer:
    """Updates the parameters of a model, whose gradients lie in place, and sets these to zero.

    The matrices of blocks become parts of one tensor for each shape. `compiled` compiles the update of such a tensor.
    """

    def __init__(self, model: TrunkModel, *, compiled: bool = False) -> None:
        self.trial, self.parameters = model.trial, list(model.parameters())
        device = self.parameters[0].device
        on_gpu = device.type == "cuda"
        # As in the product: bf16 would amplify the smallest differences between runs in fp32.
        self.dtype = torch.float32 if model.dtype == torch.float32 else torch.bfloat16
        self.rates = Rates(*(torch.zeros((), device=device) for _ in Rates._fields))
        self._update: Callable[..., None] = torch.compile(update_stack, dynamic=False) if compiled else update_stack
        muon, rest = split_parameters(model)
        for _, parameter, _ in rest:
            parameter.grad = torch.zeros_like(parameter)
        shapes: dict[torch.Size, list[nn.Parameter]] = {}
        for _, matrix, _ in muon:
            shapes.setdefault(matrix.shape, []).append(matrix)
        self.stacks = [_stacked(matrices) for matrices in shapes.values()]
        members: dict[Group, list[nn.Parameter]] = {}
        for name, parameter, _ in rest:
            members.setdefault(group_of(name, self.trial), []).append(parameter)
        groups = [
            {"params": each, "betas": group.betas, "weight_decay": group.decay, "eps": group.eps}
            for group, each in members.items()
        ]
        self._adamw = torch.optim.AdamW(groups, fused=True, capturable=on_gpu)
        self._peaks = [group.lr for group in members]
        for group in self._adamw.param_groups:
            group["lr"] = torch.zeros((), device=device) if on_gpu else 0.0

    def set_rates(self, step: int) -> None:
        """Set the rates of the step number `step`; a captured `step` reads them."""
        scale, momentum, decay = rates_of(self.trial, step)
        self.rates.lr.fill_(self.trial.muon_lr * scale)
        self.rates.momentum.fill_(momentum)
        self.rates.decay.fill_(self.trial.weight_decay * decay)
        for group, peak in zip(self._adamw.param_groups, self._peaks, strict=True):
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(peak * scale)
            else:
                group["lr"] = peak * scale

    def step(self) -> Tensor:
        """Update the parameters; return the norm of the gradients before clipping."""
        limit = self.trial.clip or math.inf
        norm = nn.utils.clip_grad_norm_(self.parameters, limit)
        with torch.no_grad():
            for stack in self.stacks:
                self._update(stack, self.rates, self.trial, self.dtype)
        self._adamw.step()
        with torch.no_grad():
            torch._foreach_zero_([each.grad for each in self.parameters if each.grad is not None])
        return norm

    @torch.no_grad()
    def forget(self) -> None:
        """Set all state to what it was before the first step."""
        for stack in self.stacks:
            stack.averages.zero_()
            stack.moments.zero_()
        for state in self._adamw.state.values():
            for tensor in state.values():
                tensor.zero_()


@torch.no_grad()
def _stacked(matrices: list[nn.Parameter]) -> Stack:
    """Move parameters of one shape and their gradients into one tensor each."""
    stack = torch.stack([matrix.detach() for matrix in matrices])
    gradients = torch.zeros_like(stack)
    for matrix, place, gradient in zip(matrices, stack, gradients, strict=True):
        matrix.data, matrix.grad = place, gradient
    count, rows, columns = stack.shape
    moments = stack.new_zeros((count, rows, 1) if rows >= columns else (count, 1, columns))
    return Stack(stack, gradients, torch.zeros_like(stack), moments)
