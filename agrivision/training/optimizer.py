"""The optimiser of a model, and its state by the names of the parameters."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from agrivision.config import OptimizerConfig
from agrivision.errors import CheckpointError

_ENCODER = "encoder."  # what the names of a timm encoder's parameters begin with
_STATE_KEYS = {"adamw": {"step", "exp_avg", "exp_avg_sq"}, "sgd": {"momentum_buffer"}}

log = logging.getLogger(__name__)


class Optimizer:
    """AdamW (Loshchilov and Hutter 2019) or SGD over the parameters of a model.

    Vectors (biases, normalisation) are not decayed: pulling them to zero regularises nothing.

    Args:
        model: whose parameters are optimised, on their device. What its `encoder` has, if there is one,
            may learn more slowly.
        config: which algorithm, with which constants.
    """

    def __init__(self, model: nn.Module, config: OptimizerConfig) -> None:
        self._named = {name: p for name, p in model.named_parameters() if p.requires_grad}
        groups = _groups(self._named, config)
        self._optimizer = _build(groups, config)
        self._clip_norm = config.clip_norm
        self._keys = _STATE_KEYS[config.name]
        if config.name == "sgd" and config.momentum:
            # Else a first step that is skipped leaves whatever was in the memory.
            for parameter in self._named.values():
                self._optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)

    def zero_grad(self) -> None:
        """Forget the gradients."""
        self._optimizer.zero_grad(set_to_none=True)

    def clip(self) -> torch.Tensor:
        """Scale the gradients down to the configured norm; returns their L2 norm before, a scalar."""
        limit = float("inf") if self._clip_norm is None else self._clip_norm
        return nn.utils.clip_grad_norm_(list(self._named.values()), limit)

    def step(self, learning_rate: float, good: torch.Tensor | None = None) -> None:
        """Change the weights.

        Args:
            learning_rate: of this step; an encoder gets its share of it.
            good: bool scalar where the weights are; if false, nothing changes, and nobody waits for
                the answer. None is true.
        """
        for group in self._optimizer.param_groups:
            group["lr"] = learning_rate * group["share"]
        # The fused kernels look at this themselves. It is meant for torch's scaler of losses.
        self._optimizer.found_inf = None if good is None else (~good).float()  # type: ignore[attr-defined]
        self._optimizer.step()

    def state_dict(self) -> dict[str, torch.Tensor]:
        """Flat: `exp_avg/PARAMETER` and so on."""
        return {
            f"{key}/{name}": value
            for name, parameter in self._named.items()
            for key, value in self._optimizer.state[parameter].items()
            if isinstance(value, torch.Tensor)
        }

    def load_state_dict(self, state: Mapping[str, torch.Tensor]) -> None:
        """Take over a state; one of the other algorithm is left aside with a warning.

        Raises:
            CheckpointError: it belongs to other parameters.
        """
        self._optimizer.state.clear()
        for path, value in state.items():
            key, _, name = path.partition("/")
            if key not in self._keys:
                log.warning("the checkpoint's optimiser is another one: this one starts anew")
                return
            parameter = self._named.get(name)
            if parameter is None or (value.ndim and value.shape != parameter.shape):
                raise CheckpointError(f"the optimiser's state {path} fits no parameter of this model")
            if value.ndim == 0:  # AdamW's count of steps: where it lives is the optimiser's affair
                device = parameter.device if self._optimizer.defaults.get("fused") else value.device
                self._optimizer.state[parameter][key] = value.clone().to(device)
            else:
                moment = torch.empty_like(parameter)  # the same memory format, hence the same bits
                self._optimizer.state[parameter][key] = moment.copy_(value)


def _groups(named: Mapping[str, nn.Parameter], config: OptimizerConfig) -> list[dict[str, Any]]:
    """The parameters by what is done to them: which are decayed, and the share of the rate they get."""
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in named.items():
        slow = config.encoder_lr if name.startswith(_ENCODER) else None
        share = 1.0 if slow is None else slow
        decay = config.weight_decay if parameter.ndim > 1 else 0.0
        groups.setdefault((decay, share), []).append(parameter)
    return [
        {"params": parameters, "weight_decay": decay, "share": share}
        for (decay, share), parameters in groups.items()
    ]


def _build(groups: list[dict[str, Any]], config: OptimizerConfig) -> torch.optim.Optimizer:
    # One kernel for all of a step's arithmetic, on CPUs too.
    if config.name == "adamw":
        betas = (config.beta1, config.beta2)
        return torch.optim.AdamW(groups, lr=config.lr, betas=betas, fused=True)
    nesterov = config.momentum > 0
    return torch.optim.SGD(
        groups, lr=config.lr, momentum=config.momentum, nesterov=nesterov, fused=True
    )
