"""The learning-rate schedule: warm-up, a plateau at the peak, a linear cool-down.

The plateau makes runs extensible (a checkpoint from it continues with a larger `max_steps`), and a linear cool-down to
zero is as good as a cosine of the same length or better: Hägele et al. 2024 (arXiv 2405.18392), Bergsma et al. 2025
(arXiv 2502.15938).
"""


def warmup_length(max_steps: int, warmup_steps: int) -> int:
    """Return the steps of warm-up: `warmup_steps`, but never more than a tenth of the run."""
    return min(warmup_steps, max_steps // 10)


def lr_scale(step: int, *, max_steps: int, warmup_steps: int, cooldown: float, min_lr_ratio: float) -> float:
    """Return the share of the peak rate for the step after `step` finished ones, in [min_lr_ratio, 1] after warm-up.

    Args:
        step: optimizer steps done, 0 .. max_steps - 1.
        max_steps: steps of the whole run.
        warmup_steps: steps over which the rate rises linearly; see `warmup_length`.
        cooldown: share of `max_steps` over which it falls linearly at the end.
        min_lr_ratio: where it would arrive at `max_steps`.
    """
    warmup = warmup_length(max_steps, warmup_steps)
    if step < warmup:
        return (step + 1) / (warmup + 1)
    falling = max(1, round(cooldown * max_steps))
    remaining = min(1.0, (max_steps - step) / falling)
    return min_lr_ratio + (1 - min_lr_ratio) * remaining
