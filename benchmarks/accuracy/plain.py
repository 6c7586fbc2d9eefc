"""Loops as tutorials write them: a UNet, cross-entropy on one label a pixel, a constant rate.

All normalise bands by their mean and deviation, crop and mirror at random, and compute in channels-last
memory, which is faster and changes nothing else.
"""

from __future__ import annotations

import dataclasses
import itertools
import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer
from torch.utils.data import DataLoader

from agrivision.model.build import build_model
from agrivision.model.unet import UNet
from benchmarks.accuracy import ours
from benchmarks.accuracy.outcome import Outcome, score, sizes
from benchmarks.accuracy.task import TRAIN, VAL, Task
from benchmarks.accuracy.tiles import IGNORED, Crops, read

_RATE = 1e-3  # AdamW's default in torch
_STUDENT_RATE = 1e-2
_STUDENT_BAND = "nir"


def same_network(task: Task, seed: int) -> Outcome:
    """The plain loop with the very network of the recommended recipe, but for the indices it sees."""
    schema, model = task.schema, ours.resolved(task, task.recommended).model
    torch.manual_seed(seed)
    # Coarse logits are the recipe's affair: they help it to learn, and are not there afterwards.
    one_level = dataclasses.replace(model, deep_supervision=0)
    network = build_model(one_level, len(schema.bands), len(schema.classes))
    return _train(task, network, nn.CrossEntropyLoss(ignore_index=IGNORED), _adamw(network))


def smp(task: Task, seed: int) -> Outcome:
    """The same loop with segmentation-models-pytorch's Unet, its smallest ResNet, random weights."""
    import segmentation_models_pytorch

    torch.manual_seed(seed)
    schema = task.schema
    network: nn.Module = segmentation_models_pytorch.Unet(
        "resnet18", encoder_weights=None, in_channels=len(schema.bands), classes=len(schema.classes)
    )
    return _train(task, network, nn.CrossEntropyLoss(ignore_index=IGNORED), _adamw(network))


def student(task: Task, seed: int) -> Outcome:
    """A student project's recipe: near-infrared alone, whole tiles, the paper's UNet, SGD, weights.

    No normalisation in the network, no momentum, cross-entropy weighted by inverse frequency.
    """
    torch.manual_seed(seed)
    pixels = torch.tensor(task.schema.split(TRAIN, labelled=True).class_pixels, dtype=torch.float32)
    weights = pixels.sum() / (len(pixels) * pixels.clamp(min=1))
    network = _unet(task, bands=1, norm="none")
    budget, tile = task.budget, task.schema.tile
    return _train(
        task,
        network,
        nn.CrossEntropyLoss(weights, ignore_index=IGNORED),
        SGD(network.parameters(), lr=_STUDENT_RATE),
        bands=[task.schema.bands.index(_STUDENT_BAND)],
        batch=max(1, budget.batch * budget.crop**2 // tile**2),
        side=tile,
    )


def _unet(task: Task, *, bands: int, norm: str = "batch") -> UNet:
    budget = task.budget
    return UNet(
        bands,
        len(task.schema.classes),
        base_channels=budget.base_channels,
        depth=budget.depth,
        norm="none" if norm == "none" else "batch",
    )


def _adamw(network: nn.Module) -> Optimizer:
    return AdamW(network.parameters(), lr=_RATE)


class Normalise:
    """Pixels of a data set to what a peer's network sees.

    Args:
        task: with the statistics of its training tiles.
        bands: that the network takes; None for all.
    """

    def __init__(self, task: Task, bands: Sequence[int] | None = None) -> None:
        known = task.schema.statistics
        self.bands = list(range(len(task.schema.bands)) if bands is None else bands)
        self._mean = torch.tensor(known.mean)[self.bands, None, None]
        self._std = torch.tensor(known.std)[self.bands, None, None]

    def __call__(self, pixels: Tensor) -> Tensor:
        """Float32 (batch, bands, side, side) of pixels (batch, all bands, side, side)."""
        normal = (pixels[:, self.bands] - self._mean) / self._std
        return normal.contiguous(memory_format=torch.channels_last)


def _train(
    task: Task,
    network: nn.Module,
    loss: nn.Module,
    optimizer: Optimizer,
    *,
    bands: Sequence[int] | None = None,
    batch: int | None = None,
    side: int | None = None,
) -> Outcome:
    batch, side = batch or task.budget.batch, side or task.budget.crop
    begin = time.perf_counter()
    network.to(memory_format=torch.channels_last)
    normalise = Normalise(task, bands)
    loader = DataLoader(Crops(read(task.dataset, TRAIN), side), batch, shuffle=True)
    steps, over = 0, _over(task, begin, batch, side)
    for samples in itertools.chain.from_iterable(itertools.repeat(loader)):
        optimizer.zero_grad()
        loss(network(normalise(samples["image"])), samples["mask"]).backward()
        optimizer.step()
        steps += 1
        if over(steps):
            break
    return scored(task, network, normalise, steps=steps, seconds=time.perf_counter() - begin)


def _over(task: Task, begin: float, batch: int, side: int) -> Callable[[int], bool]:
    """Whether the budget is used up after so many steps."""
    limit = task.budget.seconds
    if limit is None:
        return task.budget.steps_of(batch, side).__le__
    return lambda _: time.perf_counter() - begin >= limit


def scored(
    task: Task,
    network: nn.Module,
    normalise: Normalise,
    *,
    steps: int,
    seconds: float,
) -> Outcome:
    """Score a peer's network.

    Args:
        task: with the tiles to score it on.
        network: trained, from normalised images to logits.
        normalise: as it was in training.
        steps: that it was trained for.
        seconds: that they took.
    """
    network.eval()
    found = score(lambda pixels: network(normalise(pixels)).argmax(1), task.dataset, VAL)
    assert found.miou is not None  # of a split with valid pixels
    size = sizes(network, len(normalise.bands), task.budget.crop)
    return Outcome(miou=found.miou, iou=found.iou, steps=steps, seconds=seconds, **size)
