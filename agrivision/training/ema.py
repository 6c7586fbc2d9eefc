"""A moving average of the weights, which is evaluated in their place."""

from __future__ import annotations

import copy
from collections.abc import Mapping

import torch
from torch import nn


class WeightAverage:
    """Exponential moving average of a model's weights (Polyak and Juditsky 1992; Tarvainen 2017).

    The decay grows from 0.1 with the number of steps to its final value, so that a short run is not
    evaluated on what the weights were before it began. Buffers (BatchNorm's running statistics, which
    are averages already) are taken over as they are.

    Args:
        model: with the weights to begin with.
        decay: final decay, 0 … 1 (1 excluded).
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.model = copy.deepcopy(model).eval().requires_grad_(requires_grad=False)
        self._decay = decay

    @torch.no_grad()
    def update(self, model: nn.Module, step: int) -> None:
        """Move the average towards the weights after `step` steps (the first is 1)."""
        decay = min(self._decay, (1 + step) / (10 + step))
        mine: list[torch.Tensor] = list(self.model.parameters())
        theirs: list[torch.Tensor] = list(model.parameters())
        torch._foreach_lerp_(mine, theirs, 1 - decay)
        for buffer, value in zip(self.model.buffers(), model.buffers(), strict=True):
            buffer.copy_(value)

    def state_dict(self) -> dict[str, torch.Tensor]:
        """The averaged weights, by the model's names."""
        return self.model.state_dict()

    def load_state_dict(self, state: Mapping[str, torch.Tensor]) -> None:
        """Take over averaged weights."""
        self.model.load_state_dict(state)
