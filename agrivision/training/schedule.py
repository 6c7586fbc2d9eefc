"""The learning rate as a function of the step."""

from __future__ import annotations

import math

from agrivision.config import ScheduleConfig


def learning_rate(config: ScheduleConfig, peak: float, step: int, total: int) -> float:
    """Learning rate of one step: a linear warm-up to the peak, then the decay.

    Args:
        config: shape of the schedule.
        peak: learning rate after the warm-up.
        step: number of the step, 0 … total - 1.
        total: steps of the whole run.

    Returns:
        A rate between 0 (excluded in the warm-up) and `peak`. Cosine decay is after Loshchilov and
        Hutter 2017, without restarts.
    """
    warmup = round(config.warmup * total)
    if step < warmup:
        return peak * (step + 1) / (warmup + 1)
    done = (step - warmup) / max(1, total - warmup)
    if config.name == "constant":
        return peak
    if config.name == "cosine":
        decay = 0.5 * (1 + math.cos(math.pi * done))
    else:
        decay = math.pow(1 - done, config.power)
    return peak * (config.final + (1 - config.final) * decay)
