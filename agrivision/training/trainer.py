"""The loop: batches in, better weights out, and a moment between two steps when everything is whole.

Ranks agree once a step, in one small sum: the loss, whether somebody asked to stop, whether a rank
could not read its next batch. What follows from it (skip, save, leave) is then the same decision
everywhere.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from agrivision.config import Config
from agrivision.data.augment import Augment
from agrivision.data.loader import Batch, TrainLoader
from agrivision.data.order import Stream, generator
from agrivision.distributed import Ranks, peers_may_fail
from agrivision.errors import CheckpointError, DatasetError
from agrivision.model.losses import LabelSetLoss
from agrivision.model.precision import autocast
from agrivision.training.ema import WeightAverage
from agrivision.training.optimizer import Optimizer
from agrivision.training.preemption import StopRequest
from agrivision.training.schedule import learning_rate


@dataclass(kw_only=True)
class Progress:
    """How far a run is: all that must survive besides tensors.

    Attributes:
        step: optimiser steps done, skipped ones included.
        cursor: samples consumed by all ranks together.
        nonfinite: steps in a row whose loss was not finite, up to now.
        skipped: steps skipped for that reason, altogether.
        sums: of the loss, its parts and the gradient norm since the last line in the log.
        counted: steps in those sums.
    """

    step: int = 0
    cursor: int = 0
    nonfinite: int = 0
    skipped: int = 0
    sums: dict[str, float] = field(default_factory=dict)
    counted: int = 0

    def state_dict(self) -> dict[str, Any]:
        """As JSON values."""
        return dict(vars(self))

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over a state.

        Raises:
            CheckpointError: it has other entries.
        """
        if set(state) != set(vars(self)):
            raise CheckpointError(f"the checkpoint's progress has the entries {', '.join(state)}")
        vars(self).update(state)

    def count(self, values: Mapping[str, float]) -> None:
        """Add one step's values to the sums."""
        self.sums = {name: self.sums.get(name, 0.0) + value for name, value in values.items()}
        self.counted += 1

    def take_means(self) -> dict[str, float]:
        """The means since the last call, and begin anew."""
        means = {name: value / self.counted for name, value in self.sums.items()}
        self.sums, self.counted = {}, 0
        return means


@dataclass(frozen=True, kw_only=True)
class Step:
    """What all ranks know of a step.

    Attributes:
        number: 1 for the first of the run.
        batch: this rank's part.
        stop: somebody asked to stop, or it is time.
        save: rank 0 wants a checkpoint (its clock says so).
        unreadable: ranks that could not read their next batch.
        skipped: the loss was not finite, the weights are as before.
        learning_rate: of this step.
    """

    number: int
    batch: Batch
    stop: bool
    save: bool
    unreadable: int
    skipped: bool
    learning_rate: float


class Trainer:
    """Runs optimiser steps.

    Args:
        config: of the run.
        model: on its device, without a wrapper.
        loss: of label sets, on the same device.
        augment: of the training samples.
        loader: of the training split.
        ranks: connected.
        device: of this rank.

    Attributes:
        progress: how far the run is.
        total_steps: of the whole run; set it before the first step.
        model: without a wrapper.
        optimizer: of its parameters.
        average: of its weights, None where the configuration wants none.
        trouble: why this rank cannot read its next batch.
    """

    def __init__(
        self,
        config: Config,
        model: nn.Module,
        loss: LabelSetLoss,
        augment: Augment,
        *,
        loader: TrainLoader,
        ranks: Ranks,
        device: torch.device,
    ) -> None:
        self.progress = Progress()
        self.total_steps = 0
        self.model = model
        self.optimizer = Optimizer(model, config.optimizer)
        decay = config.training.ema_decay
        self.average = WeightAverage(model, decay) if decay else None
        self.trouble: DatasetError | None = None
        self._config, self._loss, self._augment, self._loader = config, loss, augment, loader
        self._ranks, self._device = ranks, device
        self._wrapped = _wrap(model, ranks, device)
        self._statistics = [buffer for buffer in model.buffers() if buffer.is_floating_point()]

    @property
    def evaluated(self) -> nn.Module:
        """The model that is evaluated: the average of the weights where there is one."""
        return self.model if self.average is None else self.average.model

    def states(self) -> dict[str, Mapping[str, Any]]:
        """Everything that must survive, by name."""
        states: dict[str, Mapping[str, Any]] = {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "progress": self.progress.state_dict(),
        }
        return states if self.average is None else states | {"ema": self.average.state_dict()}

    def load_states(self, states: Mapping[str, Mapping[str, Any]]) -> None:
        """Take over the states of a checkpoint.

        Raises:
            CheckpointError: it belongs to another model or another optimiser.
        """
        try:
            self.model.load_state_dict(states["model"])
            if self.average is not None:
                # A run that switches the average on begins it with the weights.
                self.average.load_state_dict(states.get("ema", states["model"]))
            self.optimizer.load_state_dict(states["optimizer"])
            self.progress.load_state_dict(states["progress"])
        except KeyError as error:
            raise CheckpointError(f"the checkpoint has no state {error}") from None
        except RuntimeError as error:  # torch lists every tensor that does not fit; one is enough
            lines = str(error).strip().splitlines()
            raise CheckpointError(
                f"the checkpoint is of another model: {lines[min(1, len(lines) - 1)].strip()}"
            ) from None
        self._loader.seek(self.progress.cursor)

    def steps(self, stop: StopRequest, save_due: SaveClock) -> Iterator[Step]:
        """Train to the end of the run; between two steps the caller may save, evaluate or leave.

        Raises:
            DatasetError: the very first batch cannot be read on this or another rank.
            PeerLost: another rank is gone.
        """
        if self.progress.step >= self.total_steps:
            return
        batch = self._fetch()
        if self._ranks.largest(int(batch is None))[0]:
            raise self.trouble or DatasetError("another rank cannot read its batch: see its own line")
        while self.progress.step < self.total_steps:
            assert batch is not None
            self.model.train()
            before = [buffer.clone() for buffer in self._statistics]
            local = self._accumulate(batch)
            last = self.progress.step + 1 == self.total_steps
            following = batch if last else self._fetch()
            flags = (stop.made, save_due.passed(), following is None)
            step = self._finish(batch, *self._agree(local, flags))
            if step.skipped:  # running statistics have seen what was not finite
                for buffer, value in zip(self._statistics, before, strict=True):
                    buffer.copy_(value)
            yield step
            batch = following

    def _fetch(self) -> Batch | None:
        try:
            return self._loader.next_batch()
        except DatasetError as error:
            self.trouble = error
            return None

    def _accumulate(self, batch: Batch) -> torch.Tensor:
        """Gradients of this rank's part; returns the sums of loss, cross-entropy and Dice, (3,)."""
        self.optimizer.zero_grad()
        size = self._config.training.micro_batch_size or len(batch.tiles)
        starts = range(0, len(batch.tiles), size)
        sums = torch.zeros(3, device=self._device)
        for start in starts:
            part = slice(start, min(start + size, len(batch.tiles)))
            with self._unsynchronised(last=start == starts[-1]):
                sums += self._backward(batch, part)
        return sums

    def _backward(self, batch: Batch, part: slice) -> torch.Tensor:
        assert batch.whole is not None
        pixels = batch.pixels.part(part).to(self._device)
        tiles = batch.tiles[part]
        images, labels = self._augment(pixels.images(), pixels.label_bits(), batch.whole.epoch, tiles)
        self._seed(part.start)
        with autocast(self._device, self._config.training.precision), peers_may_fail():
            logits = self._wrapped(images)  # DDP sends rank 0's running statistics to the others
        losses = self._loss(logits, labels)
        # Samples that only fill up the batch have no weight, but keep the graph and the shapes.
        counts = torch.arange(part.start, part.stop, device=self._device) < batch.count
        # DDP averages over the ranks; the mean over the samples of all ranks is wanted.
        scale = self._ranks.world.size / batch.whole.count
        with peers_may_fail():
            ((losses.total * counts).sum() * scale).backward()
        parts = torch.stack([losses.total, losses.cross_entropy, losses.dice])
        return (parts.detach() * counts).sum(1)

    def _seed(self, start: int) -> None:
        """Dropout depends on the step and the sample's place in the global batch, not on history."""
        world = self._ranks.world
        place = self._config.data.batch_size * world.rank // world.size + start
        random = generator(self._config.seed, Stream.DROPOUT, self.progress.step, place)
        torch.manual_seed(int(random.integers(2**63)))

    def _unsynchronised(self, *, last: bool) -> contextlib.AbstractContextManager[Any]:
        """Only the last micro-batch of a step sends gradients to the other ranks."""
        if last or not isinstance(self._wrapped, DistributedDataParallel):
            return contextlib.nullcontext()
        return self._wrapped.no_sync()

    def _agree(
        self, local: torch.Tensor, flags: tuple[bool, ...]
    ) -> tuple[dict[str, float], tuple[int, ...]]:
        """The losses summed over the ranks, and on how many ranks each flag is up."""
        mine = torch.tensor([*local.double().tolist(), *map(float, flags)], dtype=torch.float64)
        total = self._ranks.sum(mine).tolist()
        losses = dict(zip(("total", "cross_entropy", "dice"), total[:3], strict=True))
        return losses, tuple(int(count) for count in total[3:])

    def _finish(self, batch: Batch, losses: dict[str, float], flags: tuple[int, ...]) -> Step:
        """Change the weights, unless the loss or the gradient is not finite."""
        assert batch.whole is not None
        progress = self.progress
        # Gradients are the same bits on all ranks by now, so this norm needs no agreement.
        norm = self.optimizer.clip().item()
        skipped = not (math.isfinite(norm) and all(map(math.isfinite, losses.values())))
        rate = self._learning_rate()
        if skipped:
            progress.nonfinite += 1
            progress.skipped += 1
        else:
            progress.nonfinite = 0
            self.optimizer.step(rate)
            means = {name: value / batch.whole.count for name, value in losses.items()}
            progress.count(means | {"gradient_norm": norm})
        progress.step += 1
        progress.cursor = batch.whole.next_cursor
        if self.average is not None and not skipped:
            self.average.update(self.model, progress.step)
        stop, save, unreadable = flags
        return Step(
            number=progress.step,
            batch=batch,
            stop=stop > 0,
            save=save > 0,
            unreadable=unreadable,
            skipped=skipped,
            learning_rate=rate,
        )

    def _learning_rate(self) -> float:
        config = self._config
        return learning_rate(config.schedule, config.optimizer.lr, self.progress.step, self.total_steps)


@dataclass
class SaveClock:
    """Says when it is time to save because of the minutes that passed; only rank 0's says so.

    Attributes:
        minutes: between two saves, None for never.
        last: `time.monotonic()` of the last save.
    """

    minutes: float | None
    last: float = field(default_factory=time.monotonic)

    def passed(self) -> bool:
        """Whether the time is over."""
        return self.minutes is not None and time.monotonic() - self.last >= 60 * self.minutes

    def restart(self) -> None:
        """A save was just made."""
        self.last = time.monotonic()


def _wrap(model: nn.Module, ranks: Ranks, device: torch.device) -> nn.Module:
    if ranks.world.size == 1:
        return model
    with peers_may_fail():
        # At every forward pass BatchNorm's running statistics become rank 0's, which are the ones that
        # are saved: a run that goes on then holds what the one that was never interrupted held.
        return DistributedDataParallel(
            model,
            device_ids=[device.index] if device.type == "cuda" else None,
            gradient_as_bucket_view=True,
        )
