from __future__ import annotations

import contextlib
from collections.abc import Iterator

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from agrivision.config import ModelConfig
from agrivision.model.build import build_model
from agrivision.model.expansion import Bilinear, double
from agrivision.model.unet import UNet


@contextlib.contextmanager
def deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize(
    ("base_channels", "million_parameters", "gflop"),
    [(64, 31.04, 385.9), (32, 7.76, 96.9), (16, 1.94, 24.4)],
)
def test_the_published_network_has_its_parameters_and_operations(
    base_channels: int, million_parameters: float, gflop: float
) -> None:
    with torch.device("meta"):
        model, images = UNet(4, 9, base_channels=base_channels), torch.empty(1, 4, 512, 512)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(images)
    assert round(sum(p.numel() for p in model.parameters()) / 1e6, 2) == million_parameters
    assert round(counter.get_total_flops() / 1e9, 1) == gflop


def test_valid_convolutions_have_the_sizes_of_the_paper() -> None:
    with torch.device("meta"):
        model = UNet(1, 2, convolution="valid", norm="none")
        assert model(torch.empty(1, 1, 572, 572)).shape == (1, 2, 388, 388)
    assert model.input_size(388) == 572
    assert model.input_size(373) == 572
    assert model.input_size(372) == 556


@torch.no_grad()
@pytest.mark.parametrize("convolution", ["same", "valid"])
@pytest.mark.parametrize("depth", [1, 2, 3])
def test_input_size_is_the_smallest_that_gives_the_output(convolution: str, depth: int) -> None:
    with torch.device("meta"):
        model = UNet(1, 1, base_channels=1, depth=depth, convolution=convolution, norm="none")  # type: ignore[arg-type]
        gives = {}
        for side in range(1, 118):
            with contextlib.suppress(ValueError):
                gives[side] = model(torch.empty(1, 1, side, side)).shape[-1]
    assert len(gives) > 2
    for output in range(1, max(gives.values())):
        assert model.input_size(output) == min(side for side, got in gives.items() if got >= output)


@pytest.mark.parametrize(("convolution", "fits"), [("same", "112 x 96"), ("valid", "204 x 204")])
def test_sizes_that_do_not_fit_are_refused_with_one_that_does(convolution: str, fits: str) -> None:
    with torch.device("meta"):
        model = UNet(4, 9, base_channels=1, convolution=convolution)  # type: ignore[arg-type]
        images = torch.empty(1, 4, 100, 96) if convolution == "same" else torch.empty(1, 4, 200, 190)
    with pytest.raises(ValueError, match=fits):
        model(images)


@pytest.mark.parametrize("convolution", ["same", "valid"])
@pytest.mark.parametrize("up", ["transposed", "bilinear"])
@pytest.mark.parametrize("norm", ["batch", "group", "none"])
def test_every_parameter_is_alive_and_deterministic(convolution: str, up: str, norm: str) -> None:
    config = ModelConfig(
        base_channels=12,
        depth=2,
        convolution=convolution,  # type: ignore[arg-type]
        up=up,  # type: ignore[arg-type]
        norm=norm,  # type: ignore[arg-type]
        dropout=0.1,
    )
    torch.manual_seed(0)
    model = build_model(config, 4, 3)
    images = torch.randn(2, 4, model.input_size(20), model.input_size(12))
    with deterministic():
        (model(images) ** 2).mean().backward()
    dead = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert dead == []


@pytest.mark.parametrize("base_channels", [1, 3, 6, 10, 48])
def test_group_norm_takes_any_number_of_channels(base_channels: int) -> None:
    model = UNet(4, 2, base_channels=base_channels, depth=1, norm="group")
    groups = [layer for layer in model.modules() if isinstance(layer, nn.GroupNorm)]
    assert len(groups) == 6
    assert all(g.num_channels // g.num_groups >= min(4, g.num_channels) for g in groups)


def test_features_keep_their_magnitude() -> None:
    torch.manual_seed(0)
    model = UNet(4, 9, base_channels=32, depth=3, norm="none")
    logits = model(torch.randn(2, 4, 64, 64))
    assert 0.2 < logits.std() < 5


@pytest.mark.parametrize("size", [(1, 1), (1, 5), (2, 3), (8, 8)])
def test_double_is_bilinear_interpolation(size: tuple[int, int]) -> None:
    torch.manual_seed(1)
    ours = torch.randn(2, 3, *size, dtype=torch.float64, requires_grad=True)
    theirs = ours.detach().clone().requires_grad_()
    a = double(ours)
    b = F.interpolate(theirs, scale_factor=2, mode="bilinear", align_corners=False)
    torch.testing.assert_close(a, b)
    weight = torch.randn_like(a)
    (a * weight).sum().backward()
    (b * weight).sum().backward()
    torch.testing.assert_close(ours.grad, theirs.grad)


def test_projecting_first_changes_nothing() -> None:
    layer = Bilinear(6, 3).double()
    features = torch.randn(1, 6, 5, 4, dtype=torch.float64)
    torch.testing.assert_close(layer(features), layer.project(double(features)))
