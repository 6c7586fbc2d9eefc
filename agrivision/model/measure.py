"""How large a network is, how much it computes, and how fast it is here."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from agrivision.config import ModelConfig
from agrivision.model.build import build_model
from agrivision.model.precision import Precision, autocast

_ENOUGH_SECONDS = 2.0
_MOST_TIMES = 5


@dataclass(frozen=True, kw_only=True)
class Size:
    """What a network takes, whatever it runs on.

    Attributes:
        parameters: numbers that are trained.
        weight_bytes: of these and of running statistics, in float32.
        flop: floating-point operations of a forward pass over one image in evaluation; a multiply-add
            is two. Convolutions and matrix products alone, which is nearly all.
        side: of that image in pixels: the smallest that the network takes for the side asked for.
    """

    parameters: int
    weight_bytes: int
    flop: int
    side: int


@dataclass(frozen=True, kw_only=True)
class Speed:
    """How fast a network was.

    Attributes:
        predict: images in a second, forward.
        train: images in a second, forward and backward.
        peak_bytes: most memory that either took on the GPU; None on a CPU.
    """

    predict: float
    train: float
    peak_bytes: int | None


def size_of(config: ModelConfig, bands: int, classes: int, tile: int) -> Size:
    """Size of a network for images whose logits have at least `tile` pixels a side; nothing is run.

    Raises:
        ConfigurationError: there is no such network.
    """
    with torch.device("meta"):
        network = build_model(replace(config, encoder_weights=None), bands, classes).eval()
        side = network.input_size(tile)
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            network(torch.empty(1, bands, side, side))
    return Size(
        parameters=sum(each.numel() for each in network.parameters()),
        weight_bytes=sum(each.numel() * each.element_size() for each in network.state_dict().values()),
        flop=counter.get_total_flops(),
        side=side,
    )


def speed_of(
    config: ModelConfig,
    bands: int,
    classes: int,
    side: int,
    *,
    batch: int,
    device: torch.device,
    precision: Precision,
) -> Speed:
    """Run a network with random weights over noise.

    Args:
        config: of the network.
        bands: of the images.
        classes: of the logits.
        side: of the images in pixels, which the network takes.
        batch: images at once.
        device: where to.
        precision: of the convolutions.

    Raises:
        ConfigurationError: there is no such network.
        torch.OutOfMemoryError: it does not fit the GPU.
    """
    made = build_model(replace(config, encoder_weights=None), bands, classes)
    network: nn.Module = made.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    images = torch.randn(batch, bands, side, side, device=device)
    images = images.contiguous(memory_format=torch.channels_last)

    def predict() -> None:
        with torch.inference_mode(), autocast(device, precision):
            network(images)

    def train() -> None:
        with autocast(device, precision):
            logits = network(images)
        levels: tuple[Tensor, ...] = (logits,) if isinstance(logits, Tensor) else logits
        network.zero_grad()
        torch.stack([level.float().square().mean() for level in levels]).sum().backward()  # type: ignore[no-untyped-call]

    on_gpu = device.type == "cuda"
    if on_gpu:
        torch.cuda.reset_peak_memory_stats(device)
    network.eval()
    predicting = _seconds(predict, device)
    network.train()
    training = _seconds(train, device)
    peak = torch.cuda.max_memory_allocated(device) if on_gpu else None
    return Speed(predict=batch / predicting, train=batch / training, peak_bytes=peak)


def _seconds(run: Callable[[], None], device: torch.device) -> float:
    """Median of a few runs after one that warms up; beside a slow one the warming is nothing."""
    first = _time(run, device)
    if first > _ENOUGH_SECONDS:
        return first
    times = [_time(run, device)]
    while len(times) < _MOST_TIMES and sum(times) < _ENOUGH_SECONDS:
        times.append(_time(run, device))
    return statistics.median(times)


def _time(run: Callable[[], None], device: torch.device) -> float:
    begin = time.perf_counter()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - begin
