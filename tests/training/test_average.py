"""The even average of the weights over the last steps."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from agrivision import checkpoint
from agrivision.config import TrainingConfig
from agrivision.errors import ConfigurationError
from agrivision.training.ema import WeightAverage, tail
from tests.ranks import run
from tests.training.runs import arguments


def network() -> nn.Module:
    return nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3))


def change(model: nn.Module, seed: int) -> None:
    random = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for tensor in (*model.parameters(), model[1].running_mean):
            tensor.copy_(torch.randn(tensor.shape, generator=random))


@given(share=st.floats(0, 1), total=st.integers(1, 500))
def test_all_weights_of_the_tail_count_alike_and_no_others(share: float, total: int) -> None:
    newest = tail(share)
    parts = [newest(step, total) for step in range(1, total + 1)]
    counted = min(total, max(1, round(share * total)))
    assert parts[: total - counted + 1] == [1.0] * (total - counted + 1)
    left = 1.0  # of the weights of a step, after all later ones have had their share
    for part in reversed(parts[-counted:]):
        assert part * left == pytest.approx(1 / counted)
        left *= 1 - part
    assert left == 0


def test_the_average_is_the_plain_mean() -> None:
    model = network()
    average = WeightAverage(model, tail(0.4))
    seen = []
    for step in range(1, 11):
        change(model, step)
        average.update(model, step, 10)
        seen.append({name: p.detach().double().clone() for name, p in model.named_parameters()})
        last = seen[6:] or seen[-1:]
        for name, parameter in average.model.named_parameters():
            mean = torch.stack([one[name] for one in last]).mean(0)
            torch.testing.assert_close(parameter.double(), mean, atol=1e-6, rtol=1e-6)
            if len(last) == 1:
                assert torch.equal(parameter, model.get_parameter(name))
        assert torch.equal(average.model[1].running_mean, model[1].running_mean)


def test_it_goes_on_bit_for_bit(tmp_path: Path) -> None:
    model, first = network(), WeightAverage(network(), tail(0.5))
    for step in (4, 5, 6):
        change(model, step)
        first.update(model, step, 8)
    second = WeightAverage(network(), tail(0.5))
    folder = checkpoint.save(tmp_path, {"ema": first.state_dict()}, step=6, epoch=0)
    second.load_state_dict(checkpoint.load(folder).states["ema"])
    for step in (7, 8):
        change(model, step)
        first.update(model, step, 8)
        second.update(model, step, 8)
    for name, value in first.state_dict().items():
        assert torch.equal(value, second.state_dict()[name]), name


def test_a_run_saves_the_mean_of_its_last_weights(dataset: Path, tmp_path: Path) -> None:
    changes = {
        "training__ema_decay": 0,
        "training__tail_average": 0.5,
        "training__epochs": 1,
        "training__checkpoint_every_steps": 1,
        "monitor__tensorboard": "false",
    }
    assert run(arguments(dataset, tmp_path, **changes)) == [0]
    saved = [checkpoint.load(entry) for entry in checkpoint.folders(tmp_path / "checkpoints")]
    assert [one.step for one in saved] == [1, 2, 3, 4, 5, 6]
    weights = [one.states["model"] for one in saved]
    for name, value in saved[-1].states["ema"].items():
        if "running" in name or "tracked" in name:
            assert torch.equal(value, weights[-1][name])
        else:
            mean = torch.stack([one[name].double() for one in weights[3:]]).mean(0)
            torch.testing.assert_close(value.double(), mean, atol=1e-7, rtol=1e-6)
            assert torch.equal(saved[2].states["ema"][name], weights[2][name])


def test_one_average_excludes_the_other() -> None:
    with pytest.raises(ConfigurationError, match="two averages"):
        TrainingConfig(ema_decay=0.9, tail_average=0.2)
    with pytest.raises(ConfigurationError, match="tail_average is 1"):
        TrainingConfig(tail_average=1.5)
