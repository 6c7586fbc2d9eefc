"""What the scripts about steps share: a trainer on batches that are ready, and the peers' loops."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from agrivision.config import (
    AugmentConfig,
    Config,
    DataConfig,
    LossConfig,
    ModelConfig,
    TrainingConfig,
)
from agrivision.data.augment import Augment
from agrivision.data.decode import Pixels
from agrivision.data.loader import Batch
from agrivision.data.normalise import Normaliser
from agrivision.data.order import Order
from agrivision.distributed import Ranks
from agrivision.model.build import build_model
from agrivision.model.losses import LabelSetLoss
from agrivision.model.precision import autocast
from agrivision.training.optimizer import Optimizer
from agrivision.training.preemption import StopRequest
from agrivision.training.trainer import SaveClock, Trainer
from agrivision.world import World

BANDS, CLASSES = 4, 9
NORMALISER = Normaliser(mean=(120.0,) * BANDS, std=(40.0,) * BANDS)
_ENDLESS = 10**9


def config(*, base: int, side: int, batch: int, **training: Any) -> Config:
    """A configuration without data: a UNet, all eight symmetries, some radiometry."""
    return Config(
        data=DataConfig(batch_size=batch, crop=side),
        augment=AugmentConfig(brightness=0.1, contrast=0.1),
        model=ModelConfig(base_channels=base),
        training=TrainingConfig(**training),
    )


class Ready:
    """A loader whose batch is always there: what is left is the loop.

    Args:
        order: which tells each rank its share.
        world: this rank.
        side: of the tiles in pixels.
        pinned: in page-locked memory.
    """

    def __init__(self, order: Order, world: World, side: int, *, pinned: bool = False) -> None:
        self.order, self.waited = order, 0.0
        self.reader = range(order.size)  # of which the trainer asks the number of tiles alone
        mine = order.share(world.rank, world.size)
        random = torch.Generator().manual_seed(world.rank)
        samples = mine.stop - mine.start

        def draw(shape: Sequence[int], dtype: torch.dtype, low: int, high: int) -> torch.Tensor:
            drawn = torch.randint(low, high, shape, generator=random).to(dtype)
            return drawn.pin_memory() if pinned else drawn

        tiles = (samples, side, side)
        self.pixels = Pixels(
            planes=(
                draw((*tiles, 3), torch.uint8, 0, 256),
                draw((*tiles, 1), torch.uint8, 0, 256),
            ),
            # One class a pixel, all of them valid: the sign bit of int16 is the valid one.
            labels=(1 << draw(tiles, torch.int16, 0, CLASSES)) | -(2**15),
        )
        self._batch = Batch(
            pixels=self.pixels,
            tiles=range(samples),
            count=samples,
            whole=order.batch(0),
            samples=range(samples),
        )

    def next_batch(self) -> Batch:
        """The same batch."""
        return self._batch

    def seek(self, cursor: int) -> None:
        """Every position is the same."""

    def isolate(self, quarantine: object, micro: int) -> None:
        """No tile is damaged."""


def network(settings: Config, device: torch.device) -> nn.Module:
    """The network of a configuration, with the same weights every time."""
    torch.manual_seed(0)
    layout = torch.channels_last if settings.training.channels_last else torch.contiguous_format
    model: nn.Module = build_model(settings.model, BANDS, CLASSES)
    return model.to(device, memory_format=layout)  # type: ignore[call-overload,no-any-return]


def augmentation(settings: Config, side: int) -> Augment:
    """Of a configuration."""
    return Augment(config=settings.augment, normaliser=NORMALISER, crop=side, seed=0)


def label_loss(device: torch.device) -> LabelSetLoss:
    """The loss of the default configuration."""
    return LabelSetLoss(torch.ones(CLASSES), LossConfig()).to(device)


def trainer(
    settings: Config, device: torch.device, ranks: Ranks | None = None, loader: Any = None
) -> Trainer:
    """The real trainer.

    Args:
        settings: of the run.
        device: of this rank.
        ranks: connected; None for one.
        loader: None for one that is always ready.
    """
    ranks = ranks or Ranks(World())
    side = settings.data.crop or 512
    if loader is None:
        order = Order(size=_ENDLESS, batch_size=settings.data.batch_size, seed=0, unit=_unit(settings))
        loader = Ready(order, ranks.world, side, pinned=device.type == "cuda")
    made = Trainer(
        settings,
        network(settings, device),
        label_loss(device),
        augmentation(settings, side),
        loader=loader,
        ranks=ranks,
        device=device,
    )
    made.total_steps = _ENDLESS
    return made


def _unit(settings: Config) -> int:
    return (settings.training.micro_batch_size or 1) if settings.training.invariant else 1


class Loop:
    """Runs a trainer's steps, and looks at the losses every tenth, as a run does.

    Args:
        made: the trainer.
    """

    def __init__(self, made: Trainer) -> None:
        self._trainer = made
        self._steps: Iterator[Any] = made.steps(StopRequest(), SaveClock(None))

    def __call__(self) -> None:
        """One step."""
        step = next(self._steps)
        if step.number % 10 == 0:
            self._trainer.tally.look()
            self._trainer.tally.restart()


def bare(settings: Config, device: torch.device) -> Callable[[], None]:
    """The kernels of a step and nothing else: augment, forward, loss, backward, clip, optimise."""
    side, model = settings.data.crop or 512, network(settings, device)
    ready = Ready(Order(size=_ENDLESS, batch_size=settings.data.batch_size, seed=0), World(), side)
    pixels = ready.pixels.to(device)
    augment, loss, optimizer = (
        augmentation(settings, side),
        label_loss(device),
        Optimizer(model, settings.optimizer),
    )
    forward: Callable[..., Any] = model
    score: Callable[..., Any] = loss
    if settings.training.compile:
        forward, score = torch.compile(model, dynamic=False), torch.compile(loss, dynamic=False)
    samples = range(settings.data.batch_size)

    def step() -> None:
        optimizer.zero_grad()
        images, labels = augment(pixels.planes, pixels.labels, 0, samples)
        with autocast(device, settings.training.precision):
            logits = forward(images)
        score(logits, labels).total.mean().backward()
        optimizer.clip()
        optimizer.step(1e-3)

    return step


def plain(
    model: nn.Module, device: torch.device, *, side: int, batch: int, precision: str = "fp32"
) -> Callable[[], None]:
    """The loop of a tutorial: normalised float images, cross-entropy, torch's AdamW.

    Args:
        model: from images (batch, 4, side, side) to logits of 9 classes; contiguous memory.
        device: where it runs.
        side: of the images.
        batch: images a step.
        precision: `fp32` or `bf16`.
    """
    model = model.to(device).train()
    random = torch.Generator().manual_seed(0)
    images = torch.randn(batch, BANDS, side, side, generator=random)
    labels = torch.randint(0, CLASSES, (batch, side, side), generator=random)
    criterion, optimizer = nn.CrossEntropyLoss(), torch.optim.AdamW(model.parameters(), lr=1e-3)

    def step() -> None:
        optimizer.zero_grad()
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=precision == "bf16"):
            loss = criterion(model(images.to(device)), labels.to(device))
        loss.backward()
        optimizer.step()
        loss.item()  # for the progress bar

    return step


def contiguous(settings: Config) -> Config:
    """The same in fp32 and contiguous memory, uncompiled."""
    training = replace(settings.training, precision="fp32", channels_last=False, compile=False)
    return replace(settings, training=training)


def rate(step: Callable[[], None], steps: int, images: int, device: torch.device) -> float:
    """Images a second over some steps.

    Args:
        step: does one.
        steps: how many.
        images: in each.
        device: waited for at the beginning and at the end.
    """
    settle(device)
    begin = time.perf_counter()
    for _ in range(steps):
        step()
    settle(device)
    return steps * images / (time.perf_counter() - begin)


def settle(device: torch.device) -> None:
    """Wait until a device has done all that it was told."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
