"""The learning rate as a function of the step."""

from __future__ import annotations

import math

from agrivision.config import OptimizerConfig, ScheduleConfig

_EXPONENTS = {"none": 0.0, "sqrt": 0.5, "linear": 1.0}  # of the ratio of the batch sizes


def peak_rate(config: OptimizerConfig, batch_size: int) -> float:
    """Learning rate after the warm-up, for a batch size.

    The mean gradient of a batch of k times as many samples has 1 / k of the variance. SGD keeps its
    noise with k times the rate (Goyal et al. 2017, arXiv:1706.02677); AdamW divides by the gradient's
    own size, and keeps it with the root of k (Malladi et al. 2022, arXiv:2205.10287).

    Args:
        config: with the rate at the reference batch size.
        batch_size: samples in one optimiser step over all ranks together.
    """
    if config.reference_batch is None:
        return config.lr
    return config.lr * math.pow(batch_size / config.reference_batch, _EXPONENTS[config.lr_scaling])


def learning_rate(config: ScheduleConfig, peak: float, step: int, total: int) -> float:
    """Learning rate of one step: a linear warm-up to the peak, then the decay.

    Args:
        config: shape of the schedule.
        peak: learning rate after the warm-up.
        step: number of the step, 0 … total - 1.
        total: steps of the whole run.

    Returns:
        A rate between 0 (excluded in the warm-up) and `peak`. Cosine decay is after Loshchilov and
        Hutter 2017, without restarts; the trapezoid falls as 1 - sqrt, after Hägele et al. 2024,
        arXiv:2405.18392.
    """
    warmup = round(config.warmup * total)
    if step < warmup:
        return peak * (step + 1) / (warmup + 1)
    tail = round(config.decay * total) if config.name == "trapezoid" else total
    start = max(warmup, total - tail)
    if config.name == "constant" or step < start:
        return peak
    decay = _decay(config, (step - start) / max(1, total - start))
    return peak * (config.final + (1 - config.final) * decay)


def _decay(config: ScheduleConfig, done: float) -> float:
    """What is left, 1 … 0, of the peak above the final rate after a share of the decay."""
    if config.name == "cosine":
        return 0.5 * (1 + math.cos(math.pi * done))
    if config.name == "trapezoid":
        return 1 - math.sqrt(done)
    return math.pow(1 - done, 1.0 if config.name == "linear" else config.power)
