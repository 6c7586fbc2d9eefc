"""An average of the weights, which is evaluated in their place."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping

import torch
from torch import nn

from agrivision.config import TrainingConfig

NewestShare = Callable[[int, int], float]


class WeightAverage:
    """An average of a model's weights over the steps.

    Buffers (BatchNorm's running statistics, which are averages already) are taken over as they are:
    they belong to weights that are near the average, and so it can be evaluated at any step. Estimated
    anew they may fit better, but that takes a pass over the training data at each evaluation.

    Args:
        model: with the weights to begin with.
        newest: the share of the newest weights in the average, 0 … 1, after `step` steps (1 is the
            first) of `total`. At 1 the average is a copy of the weights.
    """

    def __init__(self, model: nn.Module, newest: NewestShare) -> None:
        self.model = copy.deepcopy(model).eval().requires_grad_(requires_grad=False)
        self._newest = newest

    @torch.no_grad()
    def update(self, model: nn.Module, step: int, total: int) -> None:
        """Move the average towards the weights after `step` steps (the first is 1) of `total`."""
        mine: list[torch.Tensor] = list(self.model.parameters())
        theirs: list[torch.Tensor] = list(model.parameters())
        torch._foreach_lerp_(mine, theirs, self._newest(step, total))
        for buffer, value in zip(self.model.buffers(), model.buffers(), strict=True):
            buffer.copy_(value)

    def state_dict(self) -> dict[str, torch.Tensor]:
        """The averaged weights, by the model's names."""
        return self.model.state_dict()

    def load_state_dict(self, state: Mapping[str, torch.Tensor]) -> None:
        """Take over averaged weights."""
        self.model.load_state_dict(state)


def exponential(decay: float) -> NewestShare:
    """Exponential moving average (Polyak and Juditsky 1992; Tarvainen 2017).

    The decay grows from 0.1 with the number of steps to its final value, so that a short run is not
    evaluated on what the weights were before it began.

    Args:
        decay: final decay, 0 … 1 (1 excluded).
    """

    def newest(step: int, _: int) -> float:
        return 1 - min(decay, (1 + step) / (10 + step))

    return newest


def tail(share: float) -> NewestShare:
    """The even average over the last steps of a run (Izmailov et al. 2018, arXiv:1803.05407).

    Until they begin, the average is the weights.

    Args:
        share: of all steps, 0 … 1.
    """

    def newest(step: int, total: int) -> float:
        return 1 / max(1, step - (total - round(share * total)))

    return newest


def wanted_average(model: nn.Module, config: TrainingConfig) -> WeightAverage | None:
    """The average that a configuration wants of a model's weights; None where it wants none."""
    if config.ema_decay:
        return WeightAverage(model, exponential(config.ema_decay))
    return WeightAverage(model, tail(config.tail_average)) if config.tail_average else None
