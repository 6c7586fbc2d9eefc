"""The learning rate: its shapes, how it follows the batch size, and what an encoder gets of it."""

from __future__ import annotations

import math
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from agrivision import checkpoint
from agrivision.config import Config, DataConfig, ModelConfig, OptimizerConfig, ScheduleConfig
from agrivision.errors import ConfigurationError
from agrivision.training.optimizer import Optimizer
from agrivision.training.schedule import learning_rate, peak_rate
from tests.heard import hear_one
from tests.training.runs import arguments, metrics

SHARES, STEPS = st.floats(0, 1), st.integers(1, 300)


def rates(config: ScheduleConfig, total: int, peak: float = 1.0) -> list[float]:
    return [learning_rate(config, peak, step, total) for step in range(total)]


@given(warmup=SHARES, final=SHARES, total=STEPS)
def test_linear_is_polynomial_with_power_one(warmup: float, final: float, total: int) -> None:
    line = ScheduleConfig(name="linear", warmup=warmup, final=final, power=3.0)
    power = ScheduleConfig(name="polynomial", warmup=warmup, final=final, power=1.0)
    assert rates(line, total) == rates(power, total)


@given(warmup=SHARES, decay=SHARES, final=SHARES, total=STEPS, peak=st.floats(1e-8, 1e3))
def test_a_trapezoid_rises_stays_and_falls(
    warmup: float, decay: float, final: float, total: int, peak: float
) -> None:
    config = ScheduleConfig(name="trapezoid", warmup=warmup, decay=decay, final=final)
    found = rates(config, total, peak)
    top = round(warmup * total)
    fall = max(top, total - round(decay * total))
    assert all(earlier < later for earlier, later in pairwise(found[: top + 1]))
    assert all(rate == peak for rate in found[top:fall])
    assert all(later <= earlier * (1 + 1e-12) for earlier, later in pairwise(found[fall:]))
    assert all(peak * final * (1 - 1e-12) <= rate <= peak * (1 + 1e-12) for rate in found[top:])
    end = learning_rate(config, peak, total, total)
    assert end == (peak if fall == total else pytest.approx(peak * final, rel=1e-9, abs=1e-12))


def test_a_trapezoid_falls_as_one_less_the_root() -> None:
    config = ScheduleConfig(name="trapezoid", warmup=0.0, decay=0.25, final=0.2)
    assert learning_rate(config, 1.0, 300, 400) == 1.0
    assert learning_rate(config, 1.0, 325, 400) == pytest.approx(0.2 + 0.8 * 0.5)
    assert learning_rate(config, 1.0, 364, 400) == pytest.approx(0.2 + 0.8 * 0.2)


@given(total=STEPS, more=st.integers(0, 300), decay=SHARES)
def test_a_run_with_a_trapezoid_can_be_lengthened(total: int, more: int, decay: float) -> None:
    """Up to the decay, the longer run has had the rates of the shorter one."""
    config = ScheduleConfig(name="trapezoid", warmup=0.0, decay=decay)
    begin = total - round(decay * total)
    assert rates(config, total)[:begin] == rates(config, total + more)[:begin]


@given(batch=st.integers(1, 4096), reference=st.integers(1, 4096), lr=st.floats(1e-6, 10))
def test_the_peak_follows_the_batch_size(batch: int, reference: int, lr: float) -> None:
    def peak(how: Any, size: int) -> float:
        return peak_rate(OptimizerConfig(lr=lr, lr_scaling=how, reference_batch=reference), size)

    assert peak("linear", reference) == peak("sqrt", reference) == lr
    assert peak("linear", batch) / batch == pytest.approx(lr / reference)
    assert peak("sqrt", batch) ** 2 == pytest.approx(lr * peak("linear", batch))
    assert peak_rate(OptimizerConfig(lr=lr), batch) == lr


def test_the_rate_of_a_run_is_the_scaled_one_and_said_once(dataset: Path, tmp_path: Path) -> None:
    changes = {
        "data__batch_size": 12,
        "optimizer__lr": 0.001,
        "optimizer__lr_scaling": "sqrt",
        "optimizer__reference_batch": 3,
        "schedule__name": "constant",
        "schedule__warmup": 0,
        "training__max_steps": 3,
        "monitor__tensorboard": "false",
    }
    ending = hear_one(arguments(dataset, tmp_path / "run", **changes))
    assert ending.code == 0
    said = [line for line in ending.err if "peak learning rate" in line]
    assert len(said) == 1
    assert "0.002" in said[0]
    assert "batches of 3, not 12 (sqrt)" in said[0]
    rows = [row["learning_rate"] for row in metrics(tmp_path / "run") if row["kind"] == "training"]
    assert rows == [pytest.approx(0.002)]


# What an encoder gets


class Encoded(nn.Module):
    """Two layers in an encoder and two behind it, one of each a vector."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
        self.encoder_head = nn.Sequential(nn.Conv2d(4, 2, 1), nn.BatchNorm2d(2))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.encoder_head(self.encoder(images))


def learned(model: nn.Module, config: OptimizerConfig, rate: float, steps: range) -> Optimizer:
    optimizer = Optimizer(model, config)
    learn(model, optimizer, rate, steps)
    return optimizer


def learn(model: nn.Module, optimizer: Optimizer, rate: float, steps: range) -> None:
    for step in steps:
        images = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        model(images).square().mean().backward()
        optimizer.step(rate)


def encoded() -> Encoded:
    torch.manual_seed(0)
    return Encoded()


@pytest.mark.parametrize("name", ["adamw", "sgd"])
def test_an_encoder_learns_as_with_its_share_of_the_rate(name: Any) -> None:
    """After one step: the encoder as with a tenth of the rate, all else as with the rate."""
    changes = {"name": name, "weight_decay": 0.1}
    shared, whole, tenth = encoded(), encoded(), encoded()
    learned(shared, OptimizerConfig(**changes, encoder_lr=0.125), 0.08, range(1))
    learned(whole, OptimizerConfig(**changes), 0.08, range(1))
    learned(tenth, OptimizerConfig(**changes), 0.01, range(1))
    for name, parameter in shared.named_parameters():
        model = tenth if name.startswith("encoder.") else whole
        assert torch.equal(parameter, model.get_parameter(name)), name
        if parameter.ndim > 1:  # BatchNorm leaves the biases before it without a gradient
            assert not torch.equal(parameter, encoded().get_parameter(name)), name


@pytest.mark.parametrize("name", ["adamw", "sgd"])
def test_an_encoder_with_its_share_goes_on_bit_for_bit(name: Any, tmp_path: Path) -> None:
    config = OptimizerConfig(name=name, encoder_lr=0.1)
    model = encoded()
    optimizer = learned(model, config, 0.05, range(3))
    states = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
    found = checkpoint.load(checkpoint.save(tmp_path, states, step=3, epoch=0)).states
    other = Encoded()
    resumed = Optimizer(other, config)
    other.load_state_dict(found["model"])
    resumed.load_state_dict(found["optimizer"])
    for each, its in ((model, optimizer), (other, resumed)):
        learn(each, its, 0.05, range(3, 6))
    for name, value in model.state_dict().items():
        assert torch.equal(value, other.state_dict()[name]), name
    for name, value in optimizer.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name


@pytest.mark.parametrize(
    ("build", "said"),
    [
        (lambda: OptimizerConfig(lr_scaling="sqrt"), "optimizer.reference_batch"),
        (lambda: OptimizerConfig(reference_batch=16), "optimizer.lr_scaling"),
        (lambda: OptimizerConfig(lr_scaling="linear", reference_batch=0), "reference_batch is 0"),
        (lambda: OptimizerConfig(encoder_lr=0.0), "optimizer.encoder_lr is 0.0"),
        (lambda: Config(optimizer=OptimizerConfig(encoder_lr=0.1)), "model.encoder is null"),
        (lambda: ScheduleConfig(decay=1.1), "schedule.decay is 1.1"),
    ],
)
def test_what_has_no_effect_or_no_sense_is_refused(build: Any, said: str) -> None:
    with pytest.raises(ConfigurationError, match=said):
        build()


def test_an_encoder_may_have_its_share() -> None:
    Config(
        optimizer=OptimizerConfig(encoder_lr=0.1, lr_scaling="linear", reference_batch=16),
        model=ModelConfig(encoder="resnet18"),
        data=DataConfig(batch_size=math.prod((4, 4))),
    )
